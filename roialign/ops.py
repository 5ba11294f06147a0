"""The operator roialign::crop_and_resize: schema, plain torch kernels, gradient and Python call."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from operators import compiled_devices, load_kernels
from roialign.common import Checks, empty_like, to_float

_checks = Checks("crop_and_resize", "image")


def crop_and_resize(
    image: Tensor,
    boxes: Tensor,
    box_index: Tensor,
    crop_height: int,
    crop_width: int,
    extrapolation_value: float = 0.0,
) -> Tensor:
    """Samples each box of an image on a regular grid: tf.image.crop_and_resize, bilinear.

    The grid's corners are the box's corners, and the corners 0 and 1 are the centres of the first
    and the last pixel, so pixel y = y1 * (H - 1) + i * (y2 - y1) * (H - 1) / (crop_height - 1) for
    row i; a single row lies in the middle. One bilinear sample per point. A point outside
    [0, H - 1] x [0, W - 1] gets the extrapolation value; so does one that is not finite.
    The gradient flows to the image only.

    Args:
        image: [B, C, H, W] float32 or float64, contiguous or channels_last.
        boxes: [R, (y1, x1, y2, x2)], dtype of image, unit frame; may be flipped or reach outside.
        box_index: [R] int32 or int64, the image of each box. Out of range it raises on the CPU;
            on other devices, where a check would wait for the device, its crop is extrapolation.
        crop_height, crop_width: points per crop.
        extrapolation_value: for the points outside.

    Returns:
        [R, C, crop_height, crop_width], dtype, device and memory format of image.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or a device does not fit.
        IndexError: box_index is out of range (CPU).
    """
    if not (image.is_floating_point() and boxes.is_floating_point()):
        # Half precision may come in under autocast; the kernels get float32.
        raise TypeError(f"image and boxes must be float32, got {image.dtype} and {boxes.dtype}")
    if box_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"box_index must be int32 or int64, got {box_index.dtype}")
    if image.dim() != 4 or 0 in image.shape[2:]:
        raise ValueError(f"image must be [B, C, H, W] with pixels, got shape {tuple(image.shape)}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [R, (y1, x1, y2, x2)], got shape {tuple(boxes.shape)}")
    if box_index.shape != boxes.shape[:1]:
        raise ValueError(
            f"box_index must be [R] = [{len(boxes)}] like boxes, got {list(box_index.shape)}"
        )
    if not image.device == boxes.device == box_index.device:
        raise ValueError(
            f"image, boxes and box_index must be on one device, got {image.device}, "
            f"{boxes.device} and {box_index.device}"
        )
    if crop_height < 1 or crop_width < 1:
        raise ValueError(f"a crop must be at least 1 x 1, got {crop_height} x {crop_width}")
    return torch.ops.roialign.crop_and_resize(
        image, boxes, box_index, crop_height, crop_width, extrapolation_value
    )


def is_compiled() -> tuple[str, ...]:
    """The devices with a compiled kernel, of "cpu" and "cuda"; empty (false) in plain torch."""
    return compiled_devices("roialign::crop_and_resize")


def _taps(start: Tensor, end: Tensor, count: int, size: int) -> tuple[Tensor, ...]:
    """Per sample of an axis the pixels around it, the share of the second, inside: [R, count]."""
    last = size - 1
    if count > 1:
        # As a tensor: CUDA would replace the division by a number with a multiplication.
        step = (end - start) * last / start.new_full((), count - 1)
        position = torch.arange(count, dtype=start.dtype, device=start.device) * step.unsqueeze(1)
        position = (start * last).unsqueeze(1) + position
    else:
        position = (0.5 * (start + end) * last).unsqueeze(1)
    inside = (position >= 0) & (position <= last)
    position = position.where(inside, 0)
    low = position.floor()
    return low.long(), position.ceil().long(), position - low, inside


def _points(
    values: Tensor,
    boxes: Tensor,
    box_index: Tensor,
    crop_size: Sequence[int],
    image_size: Sequence[int],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The sample points of crops (h, w) in images (B, H, W).

    Returns:
        Rows of [B * H * W, C] with the pixels top left, top right, bottom left and bottom right of
        each point, [R, h, w]; the shares of the bottom and of the right, and whether the point is
        inside, all broadcasting to [R, h, w, C].
    """
    _checks.kinds(values, boxes, box_index)
    _checks.sizes(boxes, box_index, crop_size, image_size)
    images, height, width = image_size
    known = (box_index >= 0) & (box_index < images)
    y1, x1, y2, x2 = boxes.unbind(1)
    top, bottom, down, inside_y = _taps(y1, y2, crop_size[0], height)
    left, right, across, inside_x = _taps(x1, x2, crop_size[1], width)
    first = box_index.long().where(known, 0).unsqueeze(1) * height
    rows = [
        ((first + y) * width).unsqueeze(2) + x.unsqueeze(1)
        for y in (top, bottom)
        for x in (left, right)
    ]
    inside = (inside_y & known.unsqueeze(1)).unsqueeze(2) & inside_x.unsqueeze(1)
    return rows, down[:, :, None, None], across[:, None, :, None], inside.unsqueeze(3)


def _forward(
    image: Tensor,
    boxes: Tensor,
    box_index: Tensor,
    crop_height: int,
    crop_width: int,
    extrapolation_value: float,
) -> Tensor:
    _checks.kinds(image, boxes, box_index)
    finite, most = math.isfinite(extrapolation_value), torch.finfo(image.dtype).max
    if finite and abs(extrapolation_value) > most:
        raise ValueError(
            f"crop_and_resize: extrapolation_value must fit {image.dtype}, got "
            f"{extrapolation_value}"
        )
    images, _, height, width = image.shape
    rows, down, across, inside = _points(
        image, boxes, box_index, (crop_height, crop_width), (images, height, width)
    )
    pixels = image.permute(0, 2, 3, 1).flatten(0, 2)
    top_left, top_right, bottom_left, bottom_right = (pixels[row] for row in rows)
    top = top_left + (top_right - top_left) * across
    bottom = bottom_left + (bottom_right - bottom_left) * across
    crops = (top + (bottom - top) * down).where(inside, extrapolation_value)
    return empty_like(image, len(boxes), crop_height, crop_width).copy_(crops.permute(0, 3, 1, 2))


def _backward(
    grad: Tensor, boxes: Tensor, box_index: Tensor, images: int, height: int, width: int
) -> Tensor:
    _checks.kinds(grad, boxes, box_index)
    _checks.gradient(grad, boxes)
    channels, *crop_size = grad.shape[1:]
    rows, down, across, inside = _points(grad, boxes, box_index, crop_size, (images, height, width))
    points = grad.permute(0, 2, 3, 1).where(inside, 0)
    top, bottom = (1 - down) * points, down * points
    shares = (1 - across) * top, across * top, (1 - across) * bottom, across * bottom
    pixels = grad.new_zeros(images * height * width, channels)
    for row, share in zip(rows, shares, strict=True):
        pixels.index_add_(0, row.flatten(), share.flatten(0, 2))
    grad_image = pixels.view(images, height, width, channels).permute(0, 3, 1, 2)
    return empty_like(grad, images, height, width).copy_(grad_image)


def _forward_fake(
    image: Tensor,
    boxes: Tensor,
    box_index: Tensor,
    crop_height: int,
    crop_width: int,
    extrapolation_value: float,
) -> Tensor:
    _checks.kinds(image, boxes, box_index)
    return empty_like(image, boxes.shape[0], crop_height, crop_width)


def _backward_fake(
    grad: Tensor, boxes: Tensor, box_index: Tensor, images: int, height: int, width: int
) -> Tensor:
    _checks.kinds(grad, boxes, box_index)
    return empty_like(grad, images, height, width)


def _save_forward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    image, boxes, box_index, *_ = inputs
    ctx.save_for_backward(boxes, box_index)
    ctx.image_size = image.shape[0], *image.shape[2:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    boxes, box_index = ctx.saved_tensors
    grad_image = torch.ops.roialign.crop_and_resize_backward(
        grad, boxes, box_index, *ctx.image_size
    )
    return grad_image, None, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, boxes, box_index, *_ = inputs
    ctx.save_for_backward(boxes, box_index)
    ctx.crop_size = grad.shape[2:]


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The backward is linear, the transpose of the forward: so its own gradient is the forward.
    boxes, box_index = ctx.saved_tensors
    crops = torch.ops.roialign.crop_and_resize(grad, boxes, box_index, *ctx.crop_size, 0.0)
    return crops, None, None, None, None, None


def _autocast(image: Tensor, boxes: Tensor, *arguments: Any) -> Tensor:
    """Under autocast half precision becomes float32."""
    with torch.autocast(image.device.type, enabled=False):
        return torch.ops.roialign.crop_and_resize(to_float(image), to_float(boxes), *arguments)


_library = torch.library.Library("roialign", "FRAGMENT")
_library.define(
    "crop_and_resize(Tensor image, Tensor boxes, Tensor box_index, SymInt crop_height, "
    "SymInt crop_width, float extrapolation_value) -> Tensor"
)
_library.define(
    "crop_and_resize_backward(Tensor grad, Tensor boxes, Tensor box_index, SymInt images, "
    "SymInt height, SymInt width) -> Tensor"
)
_library.impl("crop_and_resize", _forward, "CompositeExplicitAutograd")
_library.impl("crop_and_resize_backward", _backward, "CompositeExplicitAutograd")
_library.impl("crop_and_resize", _autocast, "AutocastCPU")
_library.impl("crop_and_resize", _autocast, "AutocastCUDA")
_FORWARD, _BACKWARD = "roialign::crop_and_resize", "roialign::crop_and_resize_backward"
torch.library.register_fake(_FORWARD, _forward_fake)
torch.library.register_fake(_BACKWARD, _backward_fake)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save_forward)
torch.library.register_autograd(_BACKWARD, _differentiate_backward, setup_context=_save_backward)
load_kernels(__file__)
