"""crop_and_resize and roi_align: both CPU kernels against loops, others' numbers, edge cases."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import SHARED, load_golden, needs_shared
from reference_inputs import uniform
from test_operators import run_unbuilt

from roialign import crop_and_resize, is_compiled, roi_align
from roialign.align import _backward as plain_align_backward
from roialign.align import _forward as plain_align
from roialign.ops import _backward as plain_backward
from roialign.ops import _forward as plain_forward

NAN, INF = math.nan, math.inf
needs_compiled = pytest.mark.skipif("cpu" not in is_compiled(), reason="roialign is not compiled")


def operator(image, boxes, box_index, crop_height, crop_width, extrapolation_value=0.0):
    return torch.ops.roialign.crop_and_resize(
        image, boxes, box_index, crop_height, crop_width, extrapolation_value
    )


def plain(image, boxes, box_index, crop_height, crop_width, extrapolation_value=0.0):
    return plain_forward(image, boxes, box_index, crop_height, crop_width, extrapolation_value)


both_kernels = pytest.mark.parametrize(
    "kernel",
    [pytest.param(plain, id="plain"), pytest.param(operator, id="compiled", marks=needs_compiled)],
)
both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def sample(dtype=torch.float32, layout=torch.contiguous_format, boxes=12, seed=0):
    """An image [3, 5, 9, 13] and boxes inside, across and outside of it, some of them flipped."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, 5, 9, 13, generator=generator, dtype=dtype)
    corners = torch.rand(boxes, 4, generator=generator, dtype=dtype) * 1.6 - 0.3
    index = torch.randint(3, (boxes,), generator=generator)
    return image.contiguous(memory_format=layout), corners, index


@both_kernels
@both_layouts
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (1, 4), (3, 1), (14, 2)])
@pytest.mark.parametrize("value", [0.0, -1.5])
def test_crops_what_a_loop_crops(kernel, layout, size, value):
    image, boxes, index = sample(layout=layout)
    crops = kernel(image, boxes, index, *size, value)
    expected = reference.crop_and_resize(image.numpy(), boxes.numpy(), index, *size, value)
    assert crops.dtype == torch.float32
    np.testing.assert_allclose(crops.numpy(), expected, rtol=1e-5, atol=1e-6)


@both_kernels
@both_layouts
@pytest.mark.parametrize(("size", "name"), [((5, 7), "out5x7"), ((1, 1), "out1x1")])
def test_crops_what_tensorflow_crops(kernel, layout, size, name):
    golden = load_golden("training_side.npz")
    image = torch.from_numpy((uniform("car/im", (1, 9, 11, 2)) * 2 - 1).astype(np.float32))
    boxes = torch.from_numpy(golden["crop_and_resize/boxes"])
    image = image.permute(0, 3, 1, 2).contiguous(memory_format=layout)
    crops = kernel(image, boxes, torch.zeros(5, dtype=torch.int32), *size)
    expected = golden[f"crop_and_resize/{name}"]
    np.testing.assert_allclose(crops.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=2e-7)
    assert ((crops.permute(0, 2, 3, 1).numpy() == 0) == (expected == 0)).all()


@both_kernels
@pytest.mark.parametrize(
    ("name", "side", "image"),
    [
        ("small", 256, "photo1"),
        ("small", 256, "synth"),
        ("coco", 1024, "photo1"),
        ("coco", 1024, "synth"),
    ],
)
def test_border_samples_are_where_tensorflow_has_them(kernel, name, side, image):
    """Of the rois that end at exactly 1, those with a row or column of zeros, and no others."""
    golden = load_golden(f"inference_{name}.npz")
    rois = torch.from_numpy(golden[f"{image}/rpn_rois"])
    height, width = (rois[:, 2:] - rois[:, :2]).unbind(1)
    level = (4 + torch.log2((height * width).sqrt() / (224 / side))).round().clamp(2, 5)
    outside = torch.zeros(len(rois), dtype=torch.bool)
    for number in range(2, 6):
        at_level = (level == number).nonzero().squeeze(1)
        ones = torch.ones(1, 1, side >> number, side >> number)
        crops = kernel(ones, rois[at_level], torch.zeros_like(at_level), 7, 7)
        outside[at_level] = (crops == 0).flatten(1).any(1)
    assert outside.nonzero().squeeze(1).tolist() == golden[f"{image}/edge_zeroed_rois"].tolist()


@both_kernels
def test_a_grid_drawn_by_hand(kernel):
    image = torch.arange(12.0).reshape(1, 1, 3, 4)  # 0 1 2 3 / 4 5 6 7 / 8 9 10 11
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 1 / 3], [1, 1, 0, 0], [0.25, 0, 0.75, 2]])
    crops = kernel(image, boxes, torch.zeros(4, dtype=torch.int64), 3, 2, 99.0)
    expected = [
        [[0, 3], [4, 7], [8, 11]],
        [[0, 1], [2, 3], [4, 5]],
        [[11, 8], [7, 4], [3, 0]],
        [[2, 99], [4, 99], [6, 99]],
    ]
    np.testing.assert_allclose(crops[:, 0].numpy(), expected, atol=1e-6)


@both_kernels
@both_layouts
def test_a_point_on_the_last_pixel_is_inside_and_the_next_number_is_not(kernel, layout):
    image = torch.ones(1, 2, 5, 5).contiguous(memory_format=layout)
    beyond = np.nextafter(np.float32(1), np.float32(2))
    before = -np.nextafter(np.float32(0), np.float32(1))
    edges = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, beyond, 1], [before, 0, 1, 1]])
    crops = kernel(image, edges, torch.zeros(4, dtype=torch.int64), 2, 2)[:, 0]
    assert crops.tolist() == [
        [[1, 1], [1, 1]],
        [[1, 1], [1, 1]],
        [[1, 1], [0, 0]],
        [[0, 0], [1, 1]],
    ]


@both_kernels
@both_layouts
@pytest.mark.parametrize("size", [(2, 3), (1, 1)])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38, -3e38])
@pytest.mark.parametrize("position", range(4))
def test_boxes_that_are_not_finite_are_outside(kernel, layout, size, value, position):
    image = torch.ones(1, 2, 40, 50).contiguous(memory_format=layout)
    boxes = torch.tensor([[0.1, 0.1, 0.9, 0.9]] * 2)
    boxes[0, position] = value
    crops = kernel(image, boxes, torch.zeros(2, dtype=torch.int64), *size, -7.0)
    assert set(crops[0].unique().tolist()) <= {1.0, -7.0}
    axis = crops[0] if position % 2 == 0 else crops[0].transpose(1, 2)
    assert (axis[:, 0 if size == (1, 1) or position < 2 else -1] == -7).all()
    assert (crops[1] == 1).all()


@both_kernels
def test_values_that_are_not_finite_stay_where_they_are(kernel):
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 6, 6] = INF
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    crops = kernel(image, boxes, torch.zeros(2, dtype=torch.int64), 3, 3)
    assert (crops[0] == 0).all()
    assert not crops[1].isfinite().all()


@both_kernels
@both_layouts
def test_empty(kernel, layout):
    image, boxes, index = sample(layout=layout)
    crops = kernel(image, boxes[:0], index[:0], 7, 5)
    assert crops.shape == (0, 5, 7, 5)
    assert kernel(image[:, :0], boxes, index, 7, 5).shape == (12, 0, 7, 5)
    assert kernel(image[:0], boxes[:0], index[:0], 7, 5).shape == (0, 5, 7, 5)


@both_kernels
@both_layouts
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_strided_inputs(kernel, layout, index_dtype):
    image, boxes, index = sample(layout=layout)
    wide = torch.cat([image, image], dim=3)[..., :13]
    tall = boxes.t().contiguous().t()
    every_second = index.repeat_interleave(2).to(index_dtype)[::2]
    assert not wide.is_contiguous(memory_format=layout)
    assert not tall.is_contiguous()
    crops = kernel(wide, tall, every_second, 4, 4)
    assert torch.equal(crops, kernel(image, boxes, index, 4, 4))


@both_kernels
@both_layouts
def test_the_memory_format_of_the_image_is_kept(kernel, layout):
    image, boxes, index = sample(layout=layout)
    crops = kernel(image, boxes, index, 4, 4)
    assert crops.is_contiguous(memory_format=layout)
    assert kernel(image[:, :1], boxes, index, 4, 4).is_contiguous()


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both_layouts
@pytest.mark.parametrize("size", [(7, 7), (1, 3)])
def test_kernels_agree_to_the_last_bit(dtype, layout, size):
    image, boxes, index = sample(dtype, layout, boxes=200)
    boxes[::7, 2:] = 1
    boxes[::31] = NAN
    crops = operator(image, boxes, index, *size, 0.5)
    assert torch.equal(crops, plain(image, boxes, index, *size, 0.5))


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both_layouts
@pytest.mark.parametrize("size", [(7, 7), (1, 3)])
def test_backward_kernels_agree_with_autograd(dtype, layout, size):
    image, boxes, index = sample(dtype, layout, boxes=50)
    image.requires_grad_()
    grad = torch.randn(50, 5, *size, dtype=dtype).contiguous(memory_format=layout)
    (expected,) = torch.autograd.grad(plain(image, boxes, index, *size), image, grad)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    (compiled,) = torch.autograd.grad(operator(image, boxes, index, *size), image, grad)
    torch.testing.assert_close(compiled, expected, **tolerance)
    by_hand = plain_backward(grad, boxes, index, 3, 9, 13)
    torch.testing.assert_close(by_hand, expected, **tolerance)
    assert by_hand.stride() == compiled.stride() == image.stride()


@needs_compiled
@both_layouts
def test_backward_does_not_depend_on_the_number_of_threads(layout):
    generator = torch.Generator().manual_seed(0)
    boxes, index = torch.rand(300, 4, generator=generator), torch.randint(2, (300,))
    grad = torch.randn(300, 64, 7, 7, generator=generator).contiguous(memory_format=layout)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                torch.ops.roialign.crop_and_resize_backward(grad, boxes, index, 2, 20, 30)
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@both_layouts
@pytest.mark.parametrize("size", [(3, 2), (1, 1)])
def test_gradcheck(layout, size):
    image, boxes, index = sample(torch.float64, layout, boxes=3)
    image = image[:, :2, :3, :4].contiguous(memory_format=layout).requires_grad_()
    arguments = (image, boxes, index, *size, 0.5)
    assert torch.autograd.gradcheck(crop_and_resize, arguments)
    assert torch.autograd.gradgradcheck(crop_and_resize, arguments)


def test_gradient_reaches_the_image_only():
    image, boxes, index = sample()
    image.requires_grad_()
    boxes.requires_grad_()
    crop_and_resize(image, boxes, index, 3, 3).sum().backward()
    assert image.grad is not None
    assert boxes.grad is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
@both_layouts
@pytest.mark.parametrize("boxes", [0, 3])
@pytest.mark.parametrize("size", [(3, 2), (1, 1)])
def test_opcheck(layout, boxes, size):
    image, corners, index = sample(layout=layout, boxes=boxes)
    operators = torch.ops.roialign
    arguments = (image.requires_grad_(), corners, index, *size, 0.5)
    torch.library.opcheck(operators.crop_and_resize.default, arguments)
    grad = torch.randn(boxes, 5, *size).contiguous(memory_format=layout).requires_grad_()
    arguments = (grad, corners, index, 3, 9, 13)
    torch.library.opcheck(operators.crop_and_resize_backward.default, arguments)


def test_autocast_computes_in_float32():
    image, boxes, index = sample()
    half = image.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        crops = crop_and_resize(half, boxes, index, 3, 3)
    assert torch.equal(crops, crop_and_resize(half.detach().float(), boxes, index, 3, 3))
    crops.sum().backward()
    assert half.grad.dtype == torch.bfloat16


IMAGE, BOXES, INDEX = torch.zeros(2, 3, 8, 8), torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": IMAGE.byte()}, TypeError, "must be float32, got torch.uint8"),
        ({"image": IMAGE.half()}, TypeError, "must be float32 or float64, got"),
        ({"boxes": BOXES.double()}, TypeError, "got .*ouble"),
        (
            {"box_index": INDEX.float()},
            TypeError,
            "box_index must be int32 or int64, got torch.float32",
        ),
        ({"image": IMAGE[0]}, ValueError, r"image must be \[B, C, H, W\] .* got shape \(3, 8, 8\)"),
        ({"image": IMAGE[..., :0]}, ValueError, r"got shape \(2, 3, 8, 0\)"),
        ({"boxes": BOXES[:, :3]}, ValueError, r"boxes must be \[R, .* got shape \(3, 3\)"),
        ({"box_index": INDEX[:2]}, ValueError, r"box_index must be \[R\] = \[3\] .* got \[2\]"),
        ({"box_index": INDEX.to("meta")}, ValueError, "on one device, got cpu, cpu and meta"),
        ({"crop_height": 0}, ValueError, "at least 1 x 1, got 0 x 7"),
        ({"box_index": INDEX + 2}, IndexError, "box_index.* must be within 0..1, got 2"),
        ({"box_index": INDEX - 1}, IndexError, "box_index.* must be within 0..1, got -1"),
    ],
)
def test_errors(changes, error, message):
    arguments = {"image": IMAGE, "boxes": BOXES, "box_index": INDEX, "crop_height": 7}
    with pytest.raises(error, match=message):
        crop_and_resize(**{**arguments, **changes}, crop_width=7)


@both_kernels
def test_kernels_check_the_index(kernel):
    for index in (-1, 2, 2**40):
        with pytest.raises(IndexError, match="box_index.* must be within 0..1, got"):
            kernel(IMAGE, BOXES, INDEX + index, 7, 7)
    with pytest.raises(IndexError, match="box_index.* must be within 0..1, got 2"):
        kernel(IMAGE[:, :0], BOXES, INDEX + 2, 7, 7)


BAD_CALLS = [
    ({"values": IMAGE[0]}, ValueError, "must be "),
    (
        {"values": torch.zeros(3, 3, 8, 8).half()},
        TypeError,
        "must (both )?be float32 or float64, got",
    ),
    ({"boxes": BOXES[:, :3]}, ValueError, r"boxes must be \[R, 4\], got.*3"),
    ({"boxes": BOXES[0]}, ValueError, r"boxes must be \[R, 4\], got.*4"),
    ({"boxes": BOXES.double()}, TypeError, "boxes must .*, got .*(Double|64)"),
    ({"box_index": INDEX[:2]}, ValueError, r"box_index must be \[R\] = \[3\], got \[2\]"),
    ({"box_index": INDEX.float()}, TypeError, "box_index must be int32 or int64, got .*(Float|32)"),
    ({"box_index": INDEX.short()}, TypeError, "box_index must be int32 or int64, got .*(Short|16)"),
    ({"box_index": INDEX.to("meta")}, ValueError, "on one device, got cpu, cpu and meta"),
    ({"boxes": BOXES.to("meta")}, ValueError, "on one device, got cpu, meta and cpu"),
]


def bad_call(kernel, arguments, changes, error, message, name="crop_and_resize"):
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        kernel(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD_CALLS,
        ({"values": IMAGE[..., :0]}, ValueError, "must have sides of 1 to 16777216 pixels, got"),
        ({"height": 0}, ValueError, "at least one pixel, got 0 x 7"),
        ({"height": -1}, ValueError, "at least one pixel, got -1 x 7"),
        ({"value": 1e300}, ValueError, "extrapolation_value must fit .*, got 1e"),
    ],
)
@pytest.mark.parametrize("kernel", [plain, operator])
def test_the_operator_itself_refuses_what_crop_and_resize_refuses(kernel, changes, error, message):
    arguments = {"values": IMAGE, "boxes": BOXES, "box_index": INDEX}
    arguments |= {"height": 7, "width": 7, "value": 0.0}
    bad_call(kernel, arguments, changes, error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD_CALLS,
        ({"values": torch.zeros(4, 3, 7, 7)}, ValueError, "grad must be .* with the R of boxes"),
        ({"box_index": INDEX + 2}, IndexError, "box_index.* must be within 0..1, got 2"),
        ({"values": torch.zeros(3, 3, 0, 7)}, ValueError, "at least one pixel, got 0 x 7"),
        ({"images": -1}, ValueError, "got -1 of 8 x 8"),
        ({"height": 0}, ValueError, "sides of 1 to 16777216 pixels, got 2 of 0 x 8"),
        ({"width": 2**25}, ValueError, "sides of 1 to 16777216 pixels, got 2 of 8 x 33554432"),
    ],
)
@pytest.mark.parametrize(
    "kernel", [plain_backward, torch.ops.roialign.crop_and_resize_backward], ids=["plain", "op"]
)
def test_the_gradient_refuses_them_too(kernel, changes, error, message):
    arguments = {"values": torch.zeros(3, 3, 7, 7), "boxes": BOXES, "box_index": INDEX}
    arguments |= {"images": 2, "height": 8, "width": 8}
    bad_call(kernel, arguments, changes, error, message)


both_aligners = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(plain_align, id="plain"),
        pytest.param(roi_align, id="compiled", marks=needs_compiled),
    ],
)
# sampling_ratio, aligned: detectron2's, torchvision's, and the others
samplings = pytest.mark.parametrize(
    "sampling", [(0, True), (2, False), (2, True), (0, False), (3, True)]
)


def align_sample(dtype=torch.float32, layout=torch.contiguous_format, boxes=12, seed=0):
    """Features [3, 5, 9, 13] and boxes in cells, inside, across and outside of the map."""
    features, boxes, index = sample(dtype, layout, boxes, seed)
    return features, boxes * torch.tensor([9, 13, 9, 13], dtype=dtype), index


# On a map of 9 x 13 cells: all of it, around it, far around it, beside it, touching it, within a
# cell of it; empty, thin, flipped; on its last cell.
SPECIAL = torch.tensor(
    [
        [0, 0, 9, 13],
        [-5, -7, 20, 30],
        [-300, -400, 500, 600],
        [-20, -20, -10, -10],
        [12, 16, 15, 20],
        [-3, -3, 0, 0],
        [9, 13, 12, 16],
        [-1.5, -1.5, -0.6, -0.6],
        [4, 5, 4, 5],
        [4, 5, 4.01, 5.01],
        [2, 7, 8, 7],
        [8, 9, 2, 3],
        [2, 9, 8, 3],
        [8, 12, 9, 13],
        [-0.5, -0.5, 0.5, 0.5],
    ]
)


@both_aligners
@both_layouts
@samplings
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (1, 4)])
def test_aligns_what_a_loop_aligns(kernel, layout, sampling, size):
    features, boxes, index = align_sample(layout=layout)
    boxes = torch.cat([boxes, SPECIAL[3:]])  # the loop takes long over the others
    index = torch.cat([index, torch.arange(len(boxes) - len(index)) % 3])
    crops = kernel(features, boxes, index, *size, *sampling)
    expected = reference.roi_align(features.numpy(), boxes.numpy(), index, *size, *sampling)
    assert crops.dtype == torch.float32
    assert crops.is_contiguous(memory_format=layout)
    np.testing.assert_allclose(crops.numpy(), expected, rtol=1e-5, atol=1e-6)


@both_aligners
@both_layouts
@samplings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(7, 7), (14, 3)])
def test_aligns_what_torchvision_aligns(kernel, layout, sampling, dtype, size):
    ops = pytest.importorskip("torchvision.ops")
    features, boxes, index = align_sample(dtype, layout, boxes=60)
    boxes = torch.cat([boxes, SPECIAL.to(dtype)])
    index = torch.cat([index, torch.arange(len(SPECIAL)) % 3])
    ratio, aligned = sampling
    if aligned and not ratio:  # torchvision fails at boxes that are flipped along one axis
        flipped = boxes[:, 2:] < boxes[:, :2]
        defined = flipped[:, 0] == flipped[:, 1]
        boxes, index = boxes[defined], index[defined]
    rois = torch.cat([index.unsqueeze(1).to(dtype), boxes[:, [1, 0, 3, 2]]], 1)
    expected = ops.roi_align(features.contiguous(), rois, size, 1.0, ratio, aligned)
    crops = kernel(features, boxes, index, *size, *sampling)
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(crops, expected, check_stride=False, **tolerance)


@both_aligners
@both_layouts
@needs_shared("golden/detectron2/detectron2_ops.npz")
@pytest.mark.parametrize(
    ("variant", "sampling"),
    [("aligned_sr0", (0, True)), ("aligned_sr2", (2, True)), ("legacy_sr2", (2, False))],
)
def test_aligns_what_detectron2_aligns(kernel, layout, variant, sampling):
    golden = load_golden("detectron2_ops.npz", SHARED / "golden" / "detectron2")
    recorded = {
        name.removeprefix("roi_align/"): torch.from_numpy(values)
        for name, values in golden.items()
        if name.startswith("roi_align/")
    }
    features = recorded["features"].contiguous(memory_format=layout)
    index, x1, y1, x2, y2 = recorded["rois"].unbind(1)
    boxes, index = torch.stack([y1, x1, y2, x2], 1) * recorded["spatial_scale"], index.int()
    tolerance = {"rtol": 1e-5, "atol": 3e-6, "check_stride": False}
    crops = kernel(features, boxes, index, 7, 7, *sampling)
    torch.testing.assert_close(crops, recorded[f"{variant}/out7"], **tolerance)
    crops = kernel(features, boxes, index, 14, 14, *sampling)
    torch.testing.assert_close(crops[:, :1], recorded[f"{variant}/out14_ch0"], **tolerance)
    backward = {
        plain_align: plain_align_backward,
        roi_align: torch.ops.roialign.roi_align_backward,
    }[kernel]
    grad = recorded["upstream7"].contiguous(memory_format=layout)
    grad_features = backward(grad, boxes, index, 2, 24, 32, *sampling)
    tolerance["atol"] = 1e-5  # of sums of hundreds of numbers
    torch.testing.assert_close(grad_features, recorded[f"{variant}/grad_features"], **tolerance)


@both_aligners
def test_bins_drawn_by_hand(kernel):
    features = torch.arange(12.0).reshape(1, 1, 3, 4)  # 0 1 2 3 / 4 5 6 7 / 8 9 10 11
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 3, 4], [1, 1, 1, 1]])
    index = torch.zeros(3, dtype=torch.int64)
    crops = kernel(features, boxes, index, 2, 2, 1, True)  # the middle of a cell is the cell
    assert crops[0, 0].tolist() == [[0, 1], [4, 5]]
    crops = kernel(features, boxes, index, 1, 1, 0, True)  # the mean of all; an empty box
    assert crops.flatten().tolist() == [2.5, 5.5, 0]
    crops = kernel(features, boxes, index, 1, 1, 1, False)  # half a cell on; at least one cell
    assert crops.flatten().tolist() == [5, 8, 7.5]


@both_aligners
@both_layouts
def test_a_sample_a_cell_outside_counts_and_the_next_number_does_not(kernel, layout):
    features = torch.ones(1, 2, 5, 5).contiguous(memory_format=layout)
    before = np.nextafter(np.float32(-1), np.float32(-2))
    beyond = np.nextafter(np.float32(5), np.float32(6))
    for middle, expected in ((np.float32(-1), 1), (before, 0), (np.float32(5), 1), (beyond, 0)):
        start, end = middle - np.float32(0.5), middle + np.float32(0.5)
        assert start + np.float32(0.5) * (end - start) == middle  # where the only sample is
        boxes = torch.tensor([[start, 1, end, 2], [1, start, 2, end]])
        crops = kernel(features, boxes, torch.zeros(2, dtype=torch.int64), 1, 1, 1, False)
        assert (crops == expected).all()


@both_aligners
@both_layouts
@pytest.mark.parametrize("sampling", [(0, True), (2, True), (0, False), (2, False)])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38, -3e38])
@pytest.mark.parametrize("position", range(4))
def test_bins_of_boxes_that_are_not_finite_are_zero(kernel, layout, sampling, value, position):
    features = torch.ones(1, 2, 40, 50).contiguous(memory_format=layout)
    boxes = torch.tensor([[4.0, 4, 20, 20]] * 2)
    boxes[0, position] = value
    crops = kernel(features, boxes, torch.zeros(2, dtype=torch.int64), 3, 2, *sampling)
    made_a_cell_high = not sampling[1] and value < 0 and position >= 2
    assert ((crops[0] - float(made_a_cell_high)).abs() < 1e-6).all()
    assert ((crops[1] - 1).abs() < 1e-6).all()


@both_aligners
def test_work_is_bounded_by_the_map(kernel):
    """Boxes of millions of samples per bin: the mean is what the map has of a box."""
    features = torch.ones(1, 1, 8, 12)
    sides = torch.tensor([1e3, 1e5, 1e7, 2.0**24, 2.0**25, 1e30])
    boxes = torch.stack([-sides / 2, torch.zeros(6), sides / 2, torch.full((6,), 12.0)], 1)
    crops = kernel(features, boxes, torch.zeros(6, dtype=torch.int64), 1, 4, 0, True).flatten(1)
    # The map, and nearly a cell on each side: 8.5 to 10 samples of about a cell.
    assert (crops[:4] * sides[:4, None] > 8).all()
    assert (crops[:4] * sides[:4, None] < 13).all()
    assert (crops[4:] == 0).all()
    flipped = boxes[:, [2, 1, 0, 3]]
    crops = kernel(features, flipped, torch.zeros(6, dtype=torch.int64), 1, 4, 0, True)
    assert (crops == 0).all()
    crops = kernel(features, boxes, torch.zeros(6, dtype=torch.int64), 1, 4, 1024, True)
    assert (crops[3:] <= 1).all()


@both_aligners
@both_layouts
def test_values_that_are_not_finite_stay_in_the_bins_that_read_them(kernel, layout):
    features = torch.zeros(1, 1, 8, 8).contiguous(memory_format=layout)
    features[0, 0, 6, 6] = INF
    features[0, 0, 0, 0] = NAN  # where the plain kernel puts what a bin lacks
    boxes = torch.tensor([[2.0, 2, 4, 4], [4, 4, 8, 8], [-20, -20, -10, -10]])
    crops = kernel(features, boxes, torch.zeros(3, dtype=torch.int64), 2, 2, 0, True)[:, 0]
    assert (crops[[0, 2]] == 0).all()
    assert crops[1].isfinite().tolist() == [[True, True], [True, False]]


@both_aligners
@both_layouts
@samplings
def test_empty_bins(kernel, layout, sampling):
    features, boxes, index = align_sample(layout=layout)
    assert kernel(features, boxes[:0], index[:0], 7, 5, *sampling).shape == (0, 5, 7, 5)
    assert kernel(features[:, :0], boxes, index, 7, 5, *sampling).shape == (12, 0, 7, 5)
    assert kernel(features[:0], boxes[:0], index[:0], 7, 5, *sampling).shape == (0, 5, 7, 5)


@both_aligners
@both_layouts
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_strided_inputs_and_memory_formats(kernel, layout, index_dtype):
    features, boxes, index = align_sample(layout=layout)
    wide = torch.cat([features, features], dim=3)[..., :13]
    tall = boxes.t().contiguous().t()
    every_second = index.repeat_interleave(2).to(index_dtype)[::2]
    crops = kernel(wide, tall, every_second, 4, 4, 2, True)
    assert torch.equal(crops, kernel(features, boxes, index, 4, 4, 2, True))
    for part in (features[:, :1], features[..., :1, :1].contiguous(memory_format=layout)):
        assert kernel(part, boxes, index, 4, 4, 2, True).is_contiguous()


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both_layouts
@samplings
def test_align_kernels_agree(dtype, layout, sampling):
    """Forward and backward; channels that are no multiple of a vector."""
    generator = torch.Generator().manual_seed(5)
    _, boxes, index = align_sample(dtype, boxes=50)
    boxes = torch.cat([boxes, SPECIAL.to(dtype)])
    index = torch.cat([index, torch.arange(len(SPECIAL)) % 3])
    features = torch.randn(3, 37, 9, 13, generator=generator, dtype=dtype)
    features = features.contiguous(memory_format=layout).requires_grad_()
    crops = roi_align(features, boxes, index, 5, 3, *sampling)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    expected = plain_align(features, boxes, index, 5, 3, *sampling)
    torch.testing.assert_close(crops, expected, **tolerance)
    grad = torch.randn(crops.shape, generator=generator, dtype=dtype)
    grad = grad.contiguous(memory_format=layout)
    (by_autograd,) = torch.autograd.grad(expected, features, grad)
    (compiled,) = torch.autograd.grad(crops, features, grad)
    by_hand = plain_align_backward(grad, boxes, index, 3, 9, 13, *sampling)
    torch.testing.assert_close(compiled, by_autograd, **tolerance)
    torch.testing.assert_close(by_hand, by_autograd, **tolerance)
    assert by_hand.stride() == compiled.stride() == features.stride()


@needs_compiled
def test_align_does_not_depend_on_layout_and_threads():
    generator = torch.Generator().manual_seed(0)
    boxes = 30 * torch.rand(300, 4, generator=generator)
    index = torch.randint(2, (300,), generator=generator)
    features = torch.randn(2, 64, 20, 30, generator=generator)
    grad = torch.randn(300, 64, 7, 7, generator=generator)
    threads = torch.get_num_threads()
    crops, gradients = [], []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for layout in (torch.contiguous_format, torch.channels_last):
                own = features.contiguous(memory_format=layout)
                crops.append(roi_align(own, boxes, index, 7, 7))
                own = grad.contiguous(memory_format=layout)
                backward = torch.ops.roialign.roi_align_backward
                gradients.append(backward(own, boxes, index, 2, 20, 30, 0, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(crops[0], other) for other in crops)
    assert all(torch.equal(gradients[0], other) for other in gradients)


@both_layouts
@pytest.mark.parametrize("size", [(3, 2), (1, 1)])
@pytest.mark.parametrize("sampling", [(0, True), (2, False)])
def test_align_gradcheck(layout, size, sampling):
    features, boxes, index = align_sample(torch.float64, layout, boxes=3)
    features = features[:, :2, :3, :4].contiguous(memory_format=layout).requires_grad_()
    arguments = (features, boxes / 3, index, *size, *sampling)
    assert torch.autograd.gradcheck(roi_align, arguments)
    assert torch.autograd.gradgradcheck(roi_align, arguments)


def test_align_gradient_reaches_the_features_only():
    features, boxes, index = align_sample()
    features.requires_grad_()
    boxes.requires_grad_()
    roi_align(features, boxes, index, 3, 3).sum().backward()
    assert features.grad is not None
    assert boxes.grad is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
@both_layouts
@pytest.mark.parametrize("boxes", [0, 3])
@pytest.mark.parametrize("sampling", [(0, True), (2, False)])
def test_align_opcheck(layout, boxes, sampling):
    features, corners, index = align_sample(layout=layout, boxes=boxes)
    operators = torch.ops.roialign
    arguments = (features.requires_grad_(), corners, index, 3, 2, *sampling)
    torch.library.opcheck(operators.roi_align.default, arguments)
    grad = torch.randn(boxes, 5, 3, 2).contiguous(memory_format=layout).requires_grad_()
    arguments = (grad, corners, index, 3, 9, 13, *sampling)
    torch.library.opcheck(operators.roi_align_backward.default, arguments)


def test_align_under_autocast_computes_in_float32():
    features, boxes, index = align_sample()
    half = features.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        crops = roi_align(half, boxes, index, 3, 3)
    assert torch.equal(crops, roi_align(half.detach().float(), boxes, index, 3, 3))
    crops.sum().backward()
    assert half.grad.dtype == torch.bfloat16


BAD_RATIOS = [
    ({"ratio": -1}, ValueError, "sampling_ratio must be within 0..1024, got -1; 0 adapts"),
    ({"ratio": 1025}, ValueError, "sampling_ratio must be within 0..1024, got 1025"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD_CALLS,
        *BAD_RATIOS,
        ({"values": IMAGE.byte()}, TypeError, "features .*must (both )?be float32 or float64, got"),
        ({"values": IMAGE[..., :0]}, ValueError, "features must have sides of 1 to 16777216"),
        ({"height": 0}, ValueError, "at least one pixel, got 0 x 7"),
        ({"box_index": INDEX + 2}, IndexError, "box_index.* must be within 0..1, got 2"),
        ({"box_index": INDEX - 2**40}, IndexError, "box_index.* must be within 0..1, got -1"),
    ],
)
@pytest.mark.parametrize("kernel", [plain_align, roi_align], ids=["plain", "op"])
def test_roi_align_refuses(kernel, changes, error, message):
    arguments = {"values": IMAGE, "boxes": BOXES, "box_index": INDEX}
    arguments |= {"height": 7, "width": 7, "ratio": 2, "aligned": True}
    bad_call(kernel, arguments, changes, error, message, "roi_align")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *BAD_CALLS,
        *BAD_RATIOS,
        ({"values": torch.zeros(4, 3, 7, 7)}, ValueError, "grad must be .* with the R of boxes"),
        ({"box_index": INDEX + 2}, IndexError, "box_index.* must be within 0..1, got 2"),
        ({"images": -1}, ValueError, "got -1 of 8 x 8"),
        ({"height": 0}, ValueError, "sides of 1 to 16777216 pixels, got 2 of 0 x 8"),
    ],
)
@pytest.mark.parametrize(
    "kernel", [plain_align_backward, torch.ops.roialign.roi_align_backward], ids=["plain", "op"]
)
def test_its_gradient_refuses_them_too(kernel, changes, error, message):
    arguments = {"values": torch.zeros(3, 3, 7, 7), "boxes": BOXES, "box_index": INDEX}
    arguments |= {"images": 2, "height": 8, "width": 8, "ratio": 0, "aligned": True}
    bad_call(kernel, arguments, changes, error, message, "roi_align")


def test_an_unbuilt_checkout_works(tmp_path):
    code = """
import torch
from roialign import crop_and_resize, is_compiled, roi_align
image = torch.arange(4., dtype=torch.float64).view(1, 1, 2, 2).requires_grad_()
arguments = image, torch.tensor([[0., 0, 1, 1]]).double(), torch.tensor([0]), 3, 3
print(is_compiled(), crop_and_resize(*arguments).flatten().tolist())
print(torch.autograd.gradcheck(crop_and_resize, arguments))
print(torch.autograd.gradcheck(roi_align, arguments))
"""
    expected = "() [0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 2.5, 3.0]\nTrue\nTrue"
    assert run_unbuilt(code, tmp_path) == (expected, "")
