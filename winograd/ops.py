"""The operators of winograd: schemas, kernels in plain torch, and functions for Python."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from operators import compiled_devices, load_kernels

# Winograd's F(4 x 4, 3 x 3): a tile of 4 x 4 outputs is A ((G w G') * (B x B')) A' of its 6 x 6
# inputs x. Of the points 0, +-1/sqrt(2), +-sqrt(2) and infinity, since their rounding errors are a
# quarter of those of the usual 0, +-1 and +-2.
_ROOT = 2**0.5
_A: list[list[float]] = [
    [1, 1, 1, 1, 1, 0],
    [0, _ROOT / 2, -_ROOT / 2, _ROOT, -_ROOT, 0],
    [0, 1 / 2, 1 / 2, 2, 2, 0],
    [0, _ROOT / 4, -_ROOT / 4, 2 * _ROOT, -2 * _ROOT, 1],
]
_B: list[list[float]] = [
    [1, 0, -5 / 2, 0, 1, 0],
    [0, -_ROOT, -2, _ROOT / 2, 1, 0],
    [0, _ROOT, -2, -_ROOT / 2, 1, 0],
    [0, -_ROOT / 2, -1 / 2, _ROOT, 1, 0],
    [0, _ROOT / 2, -1 / 2, -_ROOT, 1, 0],
    [0, 1, 0, -5 / 2, 0, 1],
]
_G = [
    [1, 0, 0],
    [-2 / 3, -_ROOT / 3, -1 / 3],
    [-2 / 3, _ROOT / 3, -1 / 3],
    [1 / 6, _ROOT / 6, 1 / 3],
    [1 / 6, -_ROOT / 6, 1 / 3],
    [0, 0, 1],
]


def conv3x3(
    input: Tensor, weight_transformed: Tensor, bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """F.conv2d(input, weight, bias, padding=1), followed by ReLU if asked for; without a gradient.

    The largest error is about 2e-6 of the largest output. An input that is not finite makes every
    output that sees it NaN or infinite, and may do so to others in the same tiles of 4 x 4 outputs,
    which are counted from the top left corner; ReLU makes 0 of -inf. Outputs in other tiles are
    what they would be without it. Both kernels have NaN, inf and -inf in the same places.

    Args:
        input: [B, C, H, W] float32; best channels_last, else it is copied.
        weight_transformed: the result of transform_weight for a weight [K, C, 3, 3].
        bias: [K] float32.
        relu: whether negative outputs become 0.

    Returns:
        [B, K, H, W] float32, channels_last.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: the shapes or the devices do not fit.
        RuntimeError: a gradient is asked for.

    Source: Lavin and Gray 2015, arXiv:1509.09308; the points are those of ncnn.
    """
    tensors = {"input": input, "weight_transformed": weight_transformed}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            # Half precision may come in under autocast; the kernels get float32.
            raise TypeError(f"{name} must be float32, got {tensor.dtype}; use .float()")
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on {input.device} like input, got {tensor.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"conv3x3 has no gradient, but {name} asks for one; use torch.no_grad() or F.conv2d"
            )
    _check_shapes(input, weight_transformed, bias)
    return torch.ops.winograd.conv3x3(input, weight_transformed, bias, relu)


def transform_weight(weight: Tensor) -> Tensor:
    """The form of a weight that conv3x3 takes: four times the memory.

    Args:
        weight: [K, C, 3, 3] float32; K and C are multiples of 16.

    Returns:
        [36, K / 16, C, 16] float32: for each of 6 x 6 points and 16 outputs a matrix.

    Raises:
        TypeError: weight is not float32.
        ValueError: the shape does not fit.
    """
    _check_weight(weight)
    return torch.ops.winograd.transform_weight(weight)


def weight_gradient(input: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the weight of F.conv2d(input, weight, padding=1), without one of its own.

    The largest error is about 1e-6 of the largest output.

    Args:
        input: [B, C, H, W] float32; C is a multiple of 16; best channels_last.
        gradient: [B, K, H, W] float32, of the output; K is a multiple of 16.

    Returns:
        [K, C, 3, 3] float32.

    Raises:
        TypeError: a tensor is not float32.
        ValueError: the shapes do not fit.
    """
    _check_gradient(input, gradient)
    return torch.ops.winograd.weight_gradient(input, gradient)


def is_compiled() -> tuple[str, ...]:
    """("cpu",) if there is a compiled kernel, else empty (false): plain torch computes the same."""
    return compiled_devices("winograd::conv3x3")


def is_faster(input_shape: Sequence[int], weight_shape: Sequence[int]) -> bool:
    """Whether conv3x3 of [B, C, H, W] with [K, C, 3, 3] beats F.conv2d, by a rule of thumb.

    It needs the compiled kernel, 64 channels to make up for the transforms, and 8 tiles of 4 x 4
    pixels to make up for the larger weight; see benchmarks/convolution.py.
    """
    batch, _, height, width = input_shape
    tiles = batch * -(-height // 4) * -(-width // 4)
    channels = weight_shape[:2]
    fits = min(channels) >= 64 and not any(count % 16 for count in channels)
    return bool(is_compiled()) and fits and tiles >= 8


def _check_kinds(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """What every kernel refuses, the fake one too, which mixed devices may lead to."""
    tensors = {"input": input, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.float32:
            raise TypeError(f"conv3x3: {name} must be float32, got {tensor.dtype}; use .float()")
        if tensor.device != input.device:
            raise ValueError(
                f"conv3x3: {name} must be on {input.device} like input, got {tensor.device}"
            )


def _check_shapes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if input.dim() != 4:
        raise ValueError(f"conv3x3: input must be [B, C, H, W], got shape {tuple(input.shape)}")
    channels = input.shape[1]
    fits = weight.dim() == 4 and weight.shape[0] == 36 and weight.shape[2:] == (channels, 16)
    if not fits or channels % 16:
        raise ValueError(
            f"conv3x3: weight_transformed must be [36, K / 16, {channels}, 16], as transform_weight"
            f" makes it for the channels of input, got shape {tuple(weight.shape)}"
        )
    outputs = 16 * weight.shape[1]
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"conv3x3: bias must be [K] = [{outputs}], got {list(bias.shape)}")


def _check_weight(weight: Tensor) -> None:
    if weight.dtype != torch.float32:
        raise TypeError(f"transform_weight: weight must be float32, got {weight.dtype}")
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or any(n % 16 for n in weight.shape[:2]):
        raise ValueError(
            "transform_weight: weight must be [K, C, 3, 3] with multiples of 16 for K and C, got "
            f"shape {tuple(weight.shape)}; use F.conv2d for others"
        )


def _check_gradient(input: Tensor, gradient: Tensor) -> None:
    for name, tensor in {"input": input, "gradient": gradient}.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"weight_gradient: {name} must be float32, got {tensor.dtype}")
        if tensor.dim() != 4 or tensor.shape[1] % 16:
            raise ValueError(
                f"weight_gradient: {name} must be [B, C, H, W] with a multiple of 16 for C, got"
                f" shape {tuple(tensor.shape)}"
            )
    if input.shape[0] != gradient.shape[0] or input.shape[2:] != gradient.shape[2:]:
        raise ValueError(
            "weight_gradient: input and gradient must have the same images, got shapes"
            f" {tuple(input.shape)} and {tuple(gradient.shape)}"
        )


def _empty(input: Tensor, weight: Tensor) -> Tensor:
    batch, _, height, width = input.shape
    return torch.empty(
        (batch, 16 * weight.shape[1], height, width),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last,
    )


def _conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """The plain torch kernel: all tiles at once, as 36 matrix products."""
    _check_kinds(input, weight, bias)
    _check_shapes(input, weight, bias)
    output = _empty(input, weight)
    if output.numel() == 0:
        return output
    height, width = input.shape[2:]
    tiles = _transform_tiles(input)
    products = tiles.flatten(0, 1).flatten(1, 3) @ weight.transpose(1, 2).flatten(2)
    products = products.view(*tiles.shape[:-1], -1)
    result = _transform(_A, _transform(_A, products), dim=1)  # [4, 4, B, rows, columns, K]
    result = result.permute(2, 5, 3, 0, 4, 1).flatten(4, 5).flatten(2, 3)
    result = result[:, :, :height, :width]
    if bias is not None:
        result = result + bias.view(-1, 1, 1)
    return output.copy_(result.relu() if relu else result)


def _transform_tiles(input: Tensor) -> Tensor:
    """The points of the 6 x 6 inputs of each tile, [6, 6, B, rows, columns, C]."""
    # Tiles start every four pixels; the last ones may hang over the edge.
    height, width = input.shape[2:]
    input = F.pad(input, (1, 1 + -width % 4, 1, 1 + -height % 4))
    tiles = input.unfold(2, 6, 4).unfold(3, 6, 4)  # [B, C, rows, columns, 6, 6]
    return _transform(_B, _transform(_B, tiles.permute(4, 5, 0, 2, 3, 1)), dim=1)


def _transform(matrix: list[list[float]], values: Tensor, dim: int = 0) -> Tensor:
    """The matrix times the values of a dimension.

    Without its zeros, as in C++: times 0 what is not finite would become NaN where it has no place.
    """
    rows = values.unbind(dim)
    sums = []
    for factors in matrix:
        terms = [factor * row for factor, row in zip(factors, rows, strict=True) if factor]
        sums.append(functools.reduce(torch.add, terms))
    return torch.stack(sums, dim)


def _transform_weight(weight: Tensor) -> Tensor:
    _check_weight(weight)
    outputs, channels = weight.shape[:2]
    g = torch.tensor(_G, dtype=torch.float64, device=weight.device)
    # One product of matrices, [36, 9] @ [9, K * C].
    transformed = torch.kron(g, g) @ weight.double().reshape(-1, 9).T
    transformed = transformed.float().view(36, outputs // 16, 16, channels)
    return transformed.transpose(2, 3).contiguous()


def _weight_gradient(input: Tensor, gradient: Tensor) -> Tensor:
    _check_gradient(input, gradient)
    outputs, channels = gradient.shape[1], input.shape[1]
    if input.numel() == 0:
        return input.new_zeros(outputs, channels, 3, 3)
    height, width = input.shape[2:]
    factors = F.pad(gradient, (0, -width % 4, 0, -height % 4)).unfold(2, 4, 4).unfold(3, 4, 4)
    turned = [list(column) for column in zip(*_A, strict=True)]
    factors = _transform(turned, _transform(turned, factors.permute(4, 5, 0, 2, 3, 1)), dim=1)
    factors, tiles = (x.flatten(0, 1).flatten(1, 3) for x in (factors, _transform_tiles(input)))
    products = (factors.transpose(1, 2) @ tiles).unflatten(0, (6, 6))  # [6, 6, K, C]
    turned = [list(column) for column in zip(*_G, strict=True)]
    return _transform(turned, _transform(turned, products), dim=1).permute(2, 3, 0, 1).contiguous()


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    _check_kinds(input, weight, bias)
    return _empty(input, weight)


def _transform_fake(weight: Tensor) -> Tensor:
    outputs, channels = weight.shape[:2]
    return weight.new_empty(36, outputs // 16, channels, 16)


def _autocast_gradient(input: Tensor, gradient: Tensor) -> Tensor:
    with torch.autocast(input.device.type, enabled=False):
        return torch.ops.winograd.weight_gradient(input.float(), gradient.float())


def _gradient_fake(input: Tensor, gradient: Tensor) -> Tensor:
    _check_gradient(input, gradient)
    return input.new_empty(gradient.shape[1], input.shape[1], 3, 3)


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """Under autocast half precision becomes float32."""
    with torch.autocast(input.device.type, enabled=False):
        bias = None if bias is None else bias.float()
        return torch.ops.winograd.conv3x3(input.float(), weight.float(), bias, relu)


_library = torch.library.Library("winograd", "FRAGMENT")
_library.define("conv3x3(Tensor input, Tensor weight, Tensor? bias, bool relu) -> Tensor")
_library.define("transform_weight(Tensor weight) -> Tensor")
_library.define("weight_gradient(Tensor input, Tensor gradient) -> Tensor")
_library.impl("conv3x3", _conv3x3, "CompositeExplicitAutograd")
_library.impl("transform_weight", _transform_weight, "CompositeExplicitAutograd")
_library.impl("weight_gradient", _weight_gradient, "CompositeExplicitAutograd")
_library.impl("conv3x3", _autocast, "AutocastCPU")
_library.impl("conv3x3", _autocast, "AutocastCUDA")
_library.impl("weight_gradient", _autocast_gradient, "AutocastCPU")
_library.impl("weight_gradient", _autocast_gradient, "AutocastCUDA")
torch.library.register_fake("winograd::conv3x3", _fake)
torch.library.register_fake("winograd::transform_weight", _transform_fake)
torch.library.register_fake("winograd::weight_gradient", _gradient_fake)
load_kernels(__file__)
