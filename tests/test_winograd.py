"""The operators of winograd: both kernels, on every vector width, against F.conv2d in float64."""

import math
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from test_operators import run_unbuilt

from winograd import conv3x3, is_compiled, is_faster, transform_weight, weight_gradient
from winograd.ops import _conv3x3 as plain
from winograd.ops import _weight_gradient as plain_gradient

NAN, INF = math.nan, math.inf
needs_compiled = pytest.mark.skipif("cpu" not in is_compiled(), reason="winograd is not compiled")
operator = torch.ops.winograd.conv3x3
both_kernels = pytest.mark.parametrize(
    "kernel",
    [pytest.param(plain, id="plain"), pytest.param(operator, id="compiled", marks=needs_compiled)],
)
ONE_LAYER = 3e-6  # of the largest output; direct convolution comes to 3e-7


def sample(batch=2, channels=16, outputs=32, height=13, width=10, seed=0):
    """Activations as after a ReLU, a weight as in training and a bias."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(batch, channels, height, width, generator=generator).relu_()
    weight = torch.randn(outputs, channels, 3, 3, generator=generator)
    weight *= (2 / (9 * channels)) ** 0.5
    bias = torch.randn(outputs, generator=generator)
    return input.to(memory_format=torch.channels_last), weight, bias


def convolve(input, weight, bias=None, relu=False):
    """The definition: F.conv2d in float64, on the values as they are."""
    bias = None if bias is None else bias.double()
    output = F.conv2d(input.double(), weight.double(), bias, padding=1)
    return output.relu() if relu else output


def error(output, expected):
    return ((output - expected).abs().max() / expected.abs().max()).item()


@both_kernels
@pytest.mark.parametrize("height", [1, 3, 4, 5, 8, 14])
@pytest.mark.parametrize("width", [1, 2, 6, 7, 12, 15])
def test_any_size(kernel, height, width):
    input, weight, bias = sample(2, 16, 16, height, width)
    output = kernel(input, transform_weight(weight), bias, False)
    assert output.dtype == torch.float32
    assert output.shape == (2, 16, height, width)
    assert error(output, convolve(input, weight, bias)) < ONE_LAYER


@both_kernels
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width"),
    [
        (1, 16, 48, 9, 9),
        (5, 48, 16, 6, 11),
        (1, 64, 64, 40, 56),
        (3, 256, 80, 14, 14),
        (1, 512, 512, 16, 17),
        (40, 32, 32, 7, 7),
        (1, 1024, 16, 4, 4),
    ],
)
@pytest.mark.parametrize("relu", [False, True])
def test_any_number_of_images_and_channels(kernel, batch, channels, outputs, height, width, relu):
    input, weight, bias = sample(batch, channels, outputs, height, width)
    output = kernel(input, transform_weight(weight), bias, relu)
    assert error(output, convolve(input, weight, bias, relu)) < ONE_LAYER
    assert (output < 0).any().item() != relu


@both_kernels
def test_a_chain_of_layers_stays_exact(kernel):
    """As the 23 blocks of C4 of a ResNet-101: the error grows slower than the number of layers."""
    input, _, _ = sample(1, 64, 64, 32, 32)
    output, expected = input, input.double()
    for layer in range(23):
        _, weight, bias = sample(1, 64, 64, 1, 1, seed=layer)
        output = kernel(output, transform_weight(weight), bias, True)
        expected = convolve(expected, weight, bias, True)
    assert error(output, expected) < 3 * ONE_LAYER


@needs_compiled
def test_wide_layers_are_as_exact_as_direct_ones():
    """Sums over many channels are made in parts: in one go, the error would be 1.3e-6."""
    input, weight, bias = sample(1, 256, 64, 16, 16)
    expected = convolve(input, weight, bias)
    output = operator(input, transform_weight(weight), bias, False)
    assert (output - expected).norm() / expected.norm() < 9e-7


@both_kernels
def test_without_a_bias(kernel):
    input, weight, bias = sample()
    transformed = transform_weight(weight)
    output = kernel(input, transformed, None, False)
    assert error(output, convolve(input, weight)) < ONE_LAYER
    assert torch.equal(output, kernel(input, transformed, torch.zeros_like(bias), False))


@both_kernels
def test_a_convolution_computed_by_hand(kernel):
    """Ones under the filter 1..9: the middle sees all of it, a border what lies inside."""
    input, weight = torch.zeros(1, 16, 3, 5), torch.zeros(16, 16, 3, 3)
    input[0, 3] = 1
    weight[7, 3] = torch.arange(1.0, 10.0).view(3, 3)
    output = kernel(input, transform_weight(weight), None, False)
    expected = torch.zeros(1, 16, 3, 5)
    expected[0, 7] = torch.tensor(
        [[28, 39, 39, 39, 24], [33, 45, 45, 45, 27], [16, 21, 21, 21, 12]]
    )
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-5)


@both_kernels
def test_strided_inputs(kernel):
    input, weight, bias = sample()
    transformed = transform_weight(weight)
    expected = kernel(input, transformed, bias, True)
    assert torch.equal(kernel(input.contiguous(), transformed, bias, True), expected)
    wide = torch.cat([input, input], dim=1)[:, :16]
    assert not wide.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(kernel(wide, transformed, bias, True), expected)
    every_second = transformed.repeat_interleave(2, dim=1)[:, ::2]
    twice = bias.repeat_interleave(2)[::2]
    assert torch.equal(kernel(input, every_second, twice, True), expected)
    moved = torch.empty(input.numel() + 1)[1:].view(2, 13, 10, 16).permute(0, 3, 1, 2)
    assert torch.equal(kernel(moved.copy_(input), transformed, bias, True), expected)


@both_kernels
def test_the_output_is_channels_last(kernel):
    input, weight, bias = sample()
    for layout in (torch.contiguous_format, torch.channels_last):
        output = kernel(
            input.contiguous(memory_format=layout), transform_weight(weight), bias, True
        )
        assert output.is_contiguous(memory_format=torch.channels_last)


@both_kernels
def test_empty(kernel):
    input, weight, bias = sample()
    transformed = transform_weight(weight)
    assert kernel(input[:0], transformed, bias, True).shape == (0, 32, 13, 10)
    assert kernel(input[:, :, :0], transformed, bias, True).shape == (2, 32, 0, 10)
    assert kernel(input, transformed[:, :0], bias[:0], True).shape == (2, 0, 13, 10)


@both_kernels
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_stays_in_the_tiles_that_see_it(kernel, value):
    input, weight, bias = sample(1, 16, 16, 20, 20)
    transformed = transform_weight(weight)
    clean = kernel(input, transformed, bias, False)
    for y, x in product(range(6, 10), range(7, 11)):  # at each place of a tile
        sick = input.clone()
        sick[0, 2, y, x] = value
        output = kernel(sick, transformed, bias, False)
        assert not output[:, :, y - 1 : y + 2, x - 1 : x + 2].isfinite().any()
        rows, columns = (slice((i - 1) // 4 * 4, (i + 1) // 4 * 4 + 4) for i in (y, x))
        output[:, :, rows, columns] = clean[:, :, rows, columns]
        assert torch.equal(output, clean)


@needs_compiled
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("values", [[NAN], [INF], [-INF], [INF, -INF], [INF, NAN, 0]])
def test_kernels_agree_on_what_is_not_finite(relu, values):
    for seed in range(4):
        input, weight, bias = sample(2, 16, 16, 21, 18, seed=seed)
        random = torch.Generator().manual_seed(seed)
        places = torch.rand(input.shape, generator=random) < 0.002
        chosen = torch.randint(len(values), input.shape, generator=random)
        input = torch.tensor(values)[chosen].where(places, input)
        transformed = transform_weight(weight)
        one, two = (k(input, transformed, bias, relu) for k in (operator, plain))
        assert 0 < one.isfinite().sum() < one.numel()
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4, equal_nan=True)


@needs_compiled
def test_kernels_agree():
    input, weight, bias = sample(2, 64, 48, 30, 21)
    transformed = transform_weight(weight)
    by_operator = operator(input, transformed, bias, False)
    torch.testing.assert_close(by_operator, plain(input, transformed, bias, False))


@needs_compiled
@pytest.mark.parametrize("size", [(1, 32, 32, 60, 60), (1, 64, 96, 5, 5), (3, 16, 80, 20, 7)])
def test_the_output_does_not_depend_on_threads_or_on_the_batch(size):
    input, weight, bias = sample(*size)
    transformed = transform_weight(weight)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(operator(input, transformed, bias, True))
            one_by_one = [operator(image, transformed, bias, True) for image in input.split(1)]
            results.append(torch.cat(one_by_one))
    finally:
        torch.set_num_threads(threads)
    for result in results:
        assert torch.equal(result, results[0])


@needs_compiled
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_width_of_vectors(capability):
    """In a process of its own, since the processor is asked once; what it lacks falls back."""
    code = """
import torch
from test_winograd import convolve, error, operator, sample, transform_weight, weight_gradient
for size in ((1, 64, 80, 30, 21), (2, 16, 16, 3, 5), (7, 32, 48, 7, 7), (1, 48, 32, 4, 64)):
    input, weight, bias = sample(*size)
    output = operator(input, transform_weight(weight), bias, True)
    print(error(output, convolve(input, weight, bias, True)))
    found = weight_gradient(input, output)
    weight.requires_grad_()
    (convolve(input, weight) * output.double()).sum().backward()
    print(error(found, weight.grad.double()))
"""
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    environment = {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(folders)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    errors = [float(line) for line in result.stdout.split()]
    assert len(errors) == 8
    assert max(errors) < ONE_LAYER


def test_transformed_weights_are_those_of_the_paper():
    """G w G' of one filter, at each of 6 x 6 points evaluated as a polynomial in x and y."""
    _, weight, _ = sample()
    transformed = transform_weight(weight)
    assert transformed.shape == (36, 2, 16, 16)
    assert transformed.is_contiguous()
    points = [0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5), INF]
    filter = weight[19, 5].double()
    for i, y in enumerate(points):
        for j, x in enumerate(points):
            value = sum(
                (filter[a, b] * scaled(y, a) * scaled(x, b)).item()
                for a in range(3)
                for b in range(3)
            )
            found = transformed[6 * i + j, 1, 5, 3].item()
            assert found == pytest.approx(value, rel=1e-5, abs=1e-6)


def scaled(point, power):
    """A power of a point, over the product of its distances from the finite others."""
    if math.isinf(point):
        return float(power == 2)
    a, b = 0.5**0.5, 2**0.5
    others = [x for x in (0, a, -a, b, -b) if abs(x - point) > 0.1]
    return point**power / math.prod(point - x for x in others)


@pytest.mark.parametrize("kernel", [plain_gradient, weight_gradient])
@pytest.mark.parametrize(
    "size",
    [
        (1, 16, 16, 1, 1),
        (2, 16, 32, 3, 7),
        (3, 48, 16, 14, 14),
        (1, 32, 64, 8, 5),
        (40, 16, 16, 17, 20),
    ],
)
def test_gradients_of_weights_are_those_of_float64(kernel, size):
    """The last one has 1000 tiles, which are more than a block."""
    batch, channels, outputs, height, width = size
    input, _, _ = sample(batch, channels, 16, height, width)
    gradient, _, _ = sample(batch, outputs, 16, height, width, seed=1)
    found = kernel(input, gradient)
    shape = (outputs, channels, 3, 3)
    assert found.shape == shape
    expected = torch.nn.grad.conv2d_weight(input.double(), shape, gradient.double(), padding=1)
    assert error(found, expected) < ONE_LAYER
    contiguous = kernel(input.contiguous(), gradient.contiguous())
    assert error(contiguous, expected) < ONE_LAYER
    assert (kernel(input[:0], gradient[:0]) == torch.zeros(shape)).all()


def test_gradients_of_weights_have_the_same_bits_each_time():
    input, gradient = (sample(40, 16, 16, 17, 20, seed=seed)[0] for seed in (0, 1))
    first = weight_gradient(input, gradient)
    assert all(torch.equal(weight_gradient(input, gradient), first) for _ in range(5))


@pytest.mark.parametrize("name", ["winograd::weight_gradient", "weight_gradient"])
@pytest.mark.parametrize(
    ("input", "gradient", "error", "message"),
    [
        (torch.zeros(1, 16, 4, 4).double(), torch.zeros(1, 16, 4, 4), TypeError, "float32, got"),
        (torch.zeros(1, 8, 4, 4), torch.zeros(1, 16, 4, 4), ValueError, "multiples? of 16"),
        (torch.zeros(16, 4, 4), torch.zeros(1, 16, 4, 4), ValueError, r"must be \[B, C, H, W\]"),
        (torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 4, 5), ValueError, "the same images"),
        (torch.zeros(1, 16, 4, 4), torch.zeros(2, 16, 4, 4), ValueError, "the same images"),
    ],
)
def test_errors_of_gradients_of_weights(name, input, gradient, error, message):
    function = torch.ops.winograd.weight_gradient if "::" in name else weight_gradient
    with pytest.raises(error, match=message):
        function(input, gradient)


@both_kernels
def test_no_channels_are_an_empty_sum(kernel):
    input, _, bias = sample(1, 16, 32, 5, 5)
    output = kernel(input[:, :0], torch.zeros(36, 2, 0, 16), bias, True)
    assert torch.equal(output, bias.relu().view(1, -1, 1, 1).expand(1, 32, 5, 5))


def test_gradients_of_weights_under_autocast_are_float32():
    input, gradient = (sample(1, 16, 16, 9, 9, seed=seed)[0] for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.ops.winograd.weight_gradient(input, gradient)
    assert torch.equal(found, weight_gradient(input, gradient))


def test_opcheck():
    input, weight, bias = sample(1, 16, 32, 6, 9)
    transformed = transform_weight(weight)
    for arguments in ((input, transformed, bias, True), (input[:0], transformed, None, False)):
        torch.library.opcheck(operator.default, arguments)
    torch.library.opcheck(torch.ops.winograd.transform_weight.default, (weight,))
    gradient = torch.rand(1, 32, 6, 9)
    torch.library.opcheck(torch.ops.winograd.weight_gradient.default, (input, gradient))


def test_autocast_computes_in_float32():
    input, weight, bias = sample()
    transformed = transform_weight(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = conv3x3(input.bfloat16(), transformed, bias, relu=True)
    assert torch.equal(output, conv3x3(input.bfloat16().float(), transformed, bias, relu=True))


INPUT, WEIGHT, BIAS = torch.zeros(2, 16, 8, 8), torch.zeros(36, 2, 16, 16), torch.zeros(32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": INPUT.byte()}, TypeError, "input must be float32, got torch.uint8"),
        ({"input": INPUT.double()}, TypeError, "must be float32, got .*ouble|float64"),
        ({"bias": BIAS.double()}, TypeError, "must be float32, got .*ouble|float64"),
        ({"input": INPUT[0]}, ValueError, r"input must be \[B, C, H, W\], got shape \(16, 8, 8\)"),
        ({"input": INPUT[:, :8]}, ValueError, r"must be \[36, K / 16, 8, 16\].* \(36, 2, 16, 16\)"),
        (
            {"weight_transformed": torch.zeros(32, 16, 3, 3)},
            ValueError,
            r"as transform_weight makes it.* got shape \(32, 16, 3, 3\)",
        ),
        ({"bias": BIAS[:31]}, ValueError, r"bias must be \[K\] = \[32\], got \[31\]"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias must be on cpu like input, got meta"),
        (
            {"input": INPUT.clone().requires_grad_()},
            RuntimeError,
            "conv3x3 has no gradient, but input asks for one",
        ),
    ],
)
def test_errors(changes, error, message):
    arguments = {"input": INPUT, "weight_transformed": WEIGHT, "bias": BIAS}
    with pytest.raises(error, match=message):
        conv3x3(**{**arguments, **changes})


def test_parameters_are_fine_without_a_gradient():
    input, weight, bias = sample()
    with torch.no_grad():
        output = conv3x3(input.requires_grad_(), transform_weight(weight), bias)
    assert error(output, convolve(input.detach(), weight, bias)) < ONE_LAYER


@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (24, 16, 3, 3), (16, 16, 1, 1), (16, 16, 9)])
def test_weights_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 16 for K and C.* use F.conv2d for others"):
        transform_weight(torch.zeros(shape))
    with pytest.raises(TypeError, match="weight must be float32, got torch.float64"):
        transform_weight(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": INPUT[0]}, ValueError, r"input must be \[B, C, H, W\], got .*16, 8, 8"),
        ({"input": INPUT[:, :8]}, ValueError, "weight.* must be .*36, 2, 16, 16"),
        (
            {"input": INPUT[:, :8], "weight": WEIGHT[:, :, :8]},
            ValueError,
            "weight.* must be .*8, 16",
        ),
        ({"weight": WEIGHT[:35]}, ValueError, "weight.* must be .*35, 2, 16, 16"),
        ({"weight": WEIGHT[..., :8]}, ValueError, "weight.* must be .*36, 2, 16, 8"),
        ({"weight": WEIGHT[0]}, ValueError, "weight.* must be .*2, 16, 16"),
        ({"bias": BIAS[:31]}, ValueError, r"bias must be \[K\] = \[32\], got \[31\]"),
        ({"input": INPUT.double()}, TypeError, "input must be float32, got .*(Double|64)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must be float32, got .*(Half|16)"),
        ({"bias": BIAS.long()}, TypeError, "bias must be float32, got .*(Long|64)"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu like input, got meta"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias must be on cpu like input, got meta"),
        ({"input": INPUT.to("meta")}, ValueError, "weight must be on meta like input, got cpu"),
    ],
)
@pytest.mark.parametrize("kernel", [plain, operator])
def test_the_operator_itself_refuses_what_conv3x3_refuses(kernel, changes, error, message):
    arguments = {"input": INPUT, "weight": WEIGHT, "bias": BIAS, "relu": False}
    with pytest.raises(error, match=f"^conv3x3: {message}"):
        kernel(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "expected"),
    [
        ((1, 64, 256, 256), (64, 64, 3, 3), True),
        ((1, 256, 12, 12), (512, 256, 3, 3), True),
        ((2, 256, 8, 8), (512, 256, 3, 3), True),
        ((1, 256, 8, 8), (512, 256, 3, 3), False),
        ((0, 256, 14, 14), (256, 256, 3, 3), False),
        ((1, 64, 256, 256), (48, 64, 3, 3), False),
        ((1, 72, 256, 256), (64, 72, 3, 3), False),
    ],
)
def test_is_faster_with_many_channels_and_tiles(input_shape, weight_shape, expected):
    assert is_faster(input_shape, weight_shape) == (expected and bool(is_compiled()))


def test_an_unbuilt_checkout_works(tmp_path):
    code = """
import torch
from winograd import conv3x3, is_compiled, transform_weight
weight = torch.zeros(16, 16, 3, 3)
weight[2, 1, 1, 1] = 3
input = torch.arange(2 * 16 * 2 * 2.).view(2, 16, 2, 2)
print(is_compiled(), conv3x3(input, transform_weight(weight))[1, 2].round().tolist())
"""
    expected = "() [[204.0, 207.0], [210.0, 213.0]]"
    assert run_unbuilt(code, tmp_path) == (expected, "")
