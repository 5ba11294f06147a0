"""The operator roialign::roi_align: schema, plain torch kernels, gradient and Python call."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from roialign.common import MAX_SIDE, Checks, empty_like, to_float

MAX_SAMPLING_RATIO = 1024
MAX_TOGETHER = 1 << 22  # numbers that the plain torch kernels hold at once, or one cell of each bin
_checks = Checks("roi_align", "features")


def roi_align(
    features: Tensor,
    boxes: Tensor,
    box_index: Tensor,
    height: int,
    width: int,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Divides each box into bins and averages bilinear samples in each: RoIAlign.

    A bin has a grid of sampling_ratio x sampling_ratio samples, each in the middle of its part of
    the bin. A sample reads the four cells around it, and is moved to the map if it lies less than
    a cell outside: 0 is the centre of the first cell, size - 1 that of the last, and a sample
    outside [-1, size] counts as 0. So does one that is not finite. The values are those of
    torchvision.ops.roi_align and of detectron2's ROIAlign with spatial_scale 1, except for
    rounding and for boxes at which those fail or read outside of the map.

    With an adaptive number, boxes that are empty, flipped, not finite or longer than 2^24 cells
    give zeros (aligned=False makes the first two a cell long); with a fixed one, aligned mirrors a
    flipped box. The work does not grow with the part of a box that lies outside of the map. The
    gradient flows to the features only, and on the CPU it does not depend on the number of threads.

    Source: Mask R-CNN, section 3, and `aligned` of detectron2.

    Args:
        features: [B, C, H, W] float32 or float64; on the CPU best channels_last, else it is copied.
        boxes: [R, (y1, x1, y2, x2)], dtype of features, in cells of the map: pixels of the image
            divided by the stride of the map.
        box_index: [R] int32 or int64, the image of each box. Out of range it raises on the CPU;
            on other devices, where a check would wait for the device, its crop is 0.
        height, width: bins per box.
        sampling_ratio: samples per bin and axis, at most 1024; 0 takes as many as the bin has
            cells, rounded up.
        aligned: whether the boxes' frame has the centre of the first cell at 0.5, as it has where
            a box is in continuous pixels; they are shifted by -0.5. Otherwise it is at 0, and
            boxes are made at least 1 cell high and wide from their top left corner, as the first
            implementations do.

    Returns:
        [R, C, height, width], dtype, device and memory format of features.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, a number of bins or of samples does not fit.
        IndexError: box_index is out of range (CPU).
    """
    return torch.ops.roialign.roi_align(
        features, boxes, box_index, height, width, sampling_ratio, aligned
    )


def _check_ratio(sampling_ratio: int) -> None:
    if not 0 <= sampling_ratio <= MAX_SAMPLING_RATIO:
        raise ValueError(
            f"roi_align: sampling_ratio must be within 0..{MAX_SAMPLING_RATIO}, got "
            f"{sampling_ratio}; 0 adapts the number of samples to the box"
        )


def _count_leading(samples: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """Of so many ordered samples those before the first that does not hold, by bisection."""
    count = torch.zeros_like(samples)
    for bit in reversed(range(_most(samples).bit_length())):
        more = count + (1 << bit)
        count = more.where((more <= samples) & holds(more - 1), count)
    return count


def _axis(
    start: Tensor, end: Tensor, bins: int, size: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The cells that bins read along an axis of the map, and their shares of the mean.

    Returns:
        [R] how many cells each bin of a box has at most, and [R, bins, most] the cells and their
        shares, 0 where a bin has fewer.
    """
    shift = 0.5 if aligned else 0.0
    start = start - shift
    side = end - shift - start
    if not aligned:
        side = side.where(~(side < 1), 1)
    # As a tensor: CUDA would replace the division by a number with a multiplication.
    step = side / side.new_full((), bins)
    origin = start.unsqueeze(1) + torch.arange(bins, dtype=step.dtype, device=step.device) * (
        step.unsqueeze(1)
    )
    if sampling_ratio:
        samples = torch.full_like(side, sampling_ratio, dtype=torch.int64)
    else:
        samples = step.where((side > 0) & (side <= MAX_SIDE), 0).ceil().long()

    def positions(i: Tensor) -> Tensor:  # of samples [R, bins, n]
        share = (i.to(step.dtype) + 0.5) * step[:, None, None] / samples[:, None, None]
        return origin.unsqueeze(2) + share

    if sampling_ratio:
        first, meeting = torch.zeros_like(origin, dtype=torch.int64), samples
    else:
        # The rest lies outside of the map.
        all_of_them = samples.unsqueeze(1).expand(-1, bins)
        first = _count_leading(all_of_them, lambda i: positions(i.unsqueeze(2)).squeeze(2) < -1)
        last = _count_leading(all_of_them, lambda i: positions(i.unsqueeze(2)).squeeze(2) <= size)
        meeting = (last - first).amax(1)
    sample = first.unsqueeze(2) + torch.arange(_most(meeting), device=first.device)
    position = positions(sample)
    inside = (position >= -1) & (position <= size) & (sample < samples[:, None, None])
    position = position.where(inside, 0).clamp(0, size - 1)
    low = position.floor()
    share = torch.stack([1 - (position - low), position - low], 3)
    share = (share / samples[:, None, None, None]).where(inside.unsqueeze(3), 0).flatten(2)
    cell = torch.stack([low, position.ceil()], 3).long().flatten(2)
    # Samples share cells: those of a bin are summed where that makes fewer.
    lowest = cell.where(share != 0, size).amin(2, keepdim=True)
    count = (cell.where(share != 0, -1).amax(2) + 1 - lowest.squeeze(2)).clamp(min=0).amax(1)
    if (most := _most(count)) > cell.shape[2]:
        return 2 * meeting, cell, share
    summed = share.new_zeros(len(share), bins, most)
    bin_start = most * torch.arange(len(share) * bins, device=share.device).view(-1, bins, 1)
    place = bin_start + (cell - lowest).where(share != 0, 0)
    summed.view(-1).index_add_(0, place.flatten(), share.flatten())
    cell = (lowest + torch.arange(most, device=cell.device)).clamp(max=size - 1)
    return count, cell, summed


def _most(counts: Tensor) -> int:
    """The largest, at least 1."""
    return max(1, int(counts.max())) if counts.numel() else 1


def _cells(
    boxes: Tensor,
    box_index: Tensor,
    crop_size: Sequence[int],
    image_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    channels: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The cells that the bins of crops (h, w) read in images (B, H, W).

    Yields:
        For boxes with as many cells, some cells of each bin after the other: which boxes, [n], rows
        of [B * H * W, C], [n, h, w, cells], and shares of the mean, [n, h, w, cells, 1]. A share of
        0 is no cell, and what lies there may not be finite.
    """
    images, height, width = image_size
    known = (box_index >= 0) & (box_index < images)
    y1, x1, y2, x2 = boxes.unbind(1)
    in_rows, y, down = _axis(y1, y2, crop_size[0], height, sampling_ratio, aligned)
    in_columns, x, across = _axis(x1, x2, crop_size[1], width, sampling_ratio, aligned)
    y = (y + (box_index.long().where(known, 0) * height)[:, None, None]) * width
    down = down.where(known[:, None, None], 0)
    counts = torch.stack([in_rows, in_columns], 1)
    for most in counts.unique(dim=0):
        members = (counts == most).all(1).nonzero().squeeze(1)
        rows, columns = most.tolist()
        top, left = y[members, :, :rows], x[members, :, :columns]
        pixel = (top[:, :, None, :, None] + left[:, None, :, None]).flatten(3)
        top, left = down[members, :, :rows], across[members, :, :columns]
        share = (top[:, :, None, :, None] * left[:, None, :, None]).flatten(3)
        one = len(members) * y.shape[1] * x.shape[1] * channels
        together = max(1, MAX_TOGETHER // max(1, one))
        parts = pixel.split(together, 3), share.unsqueeze(4).split(together, 3)
        yield from ((members, *part) for part in zip(*parts, strict=True))


def _forward(
    features: Tensor,
    boxes: Tensor,
    box_index: Tensor,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    _checks.kinds(features, boxes, box_index)
    images, channels, *size = features.shape
    sizes = (height, width), (images, *size)
    _checks.sizes(boxes, box_index, *sizes)
    _check_ratio(sampling_ratio)
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2)
    crops = features.new_zeros(len(boxes), height, width, channels)
    for members, pixel, share in _cells(
        boxes, box_index, *sizes, sampling_ratio, aligned, channels
    ):
        parts = (pixels[pixel] * share).where(share != 0, 0)
        crops.index_add_(0, members, parts.sum(3))
    return empty_like(features, len(boxes), height, width).copy_(crops.permute(0, 3, 1, 2))


def _backward(
    grad: Tensor,
    boxes: Tensor,
    box_index: Tensor,
    images: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    _checks.kinds(grad, boxes, box_index)
    _checks.gradient(grad, boxes)
    channels, *crop_size = grad.shape[1:]
    sizes = crop_size, (images, height, width)
    _checks.sizes(boxes, box_index, *sizes)
    _check_ratio(sampling_ratio)
    bins = grad.permute(0, 2, 3, 1)
    pixels = grad.new_zeros(images * height * width, channels)
    for members, pixel, share in _cells(
        boxes, box_index, *sizes, sampling_ratio, aligned, channels
    ):
        parts = (bins[members].unsqueeze(3) * share).where(share != 0, 0)
        pixels.index_add_(0, pixel.flatten(), parts.flatten(0, 3))
    grad_features = pixels.view(images, height, width, channels).permute(0, 3, 1, 2)
    return empty_like(grad, images, height, width).copy_(grad_features)


def _forward_fake(
    features: Tensor, boxes: Tensor, box_index: Tensor, height: int, width: int, *sampling: Any
) -> Tensor:
    _checks.kinds(features, boxes, box_index)
    return empty_like(features, boxes.shape[0], height, width)


def _backward_fake(
    grad: Tensor,
    boxes: Tensor,
    box_index: Tensor,
    images: int,
    height: int,
    width: int,
    *sampling: Any,
) -> Tensor:
    _checks.kinds(grad, boxes, box_index)
    return empty_like(grad, images, height, width)


def _save_forward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    features, boxes, box_index, _, _, *ctx.sampling = inputs
    ctx.save_for_backward(boxes, box_index)
    ctx.image_size = features.shape[0], *features.shape[2:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_features = torch.ops.roialign.roi_align_backward(
        grad, *ctx.saved_tensors, *ctx.image_size, *ctx.sampling
    )
    return grad_features, *[None] * 6


def _save_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, boxes, box_index, _, _, _, *ctx.sampling = inputs
    ctx.save_for_backward(boxes, box_index)
    ctx.crop_size = grad.shape[2:]


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The backward is linear, the transpose of the forward: so its own gradient is the forward.
    crops = torch.ops.roialign.roi_align(grad, *ctx.saved_tensors, *ctx.crop_size, *ctx.sampling)
    return crops, *[None] * 7


def _autocast(features: Tensor, boxes: Tensor, *arguments: Any) -> Tensor:
    """Under autocast half precision becomes float32."""
    with torch.autocast(features.device.type, enabled=False):
        return torch.ops.roialign.roi_align(to_float(features), to_float(boxes), *arguments)


_library = torch.library.Library("roialign", "FRAGMENT")
_library.define(
    "roi_align(Tensor features, Tensor boxes, Tensor box_index, SymInt height, SymInt width, "
    "int sampling_ratio, bool aligned) -> Tensor"
)
_library.define(
    "roi_align_backward(Tensor grad, Tensor boxes, Tensor box_index, SymInt images, SymInt height, "
    "SymInt width, int sampling_ratio, bool aligned) -> Tensor"
)
_library.impl("roi_align", _forward, "CompositeExplicitAutograd")
_library.impl("roi_align_backward", _backward, "CompositeExplicitAutograd")
_library.impl("roi_align", _autocast, "AutocastCPU")
_library.impl("roi_align", _autocast, "AutocastCUDA")
_FORWARD, _BACKWARD = "roialign::roi_align", "roialign::roi_align_backward"
torch.library.register_fake(_FORWARD, _forward_fake)
torch.library.register_fake(_BACKWARD, _backward_fake)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save_forward)
torch.library.register_autograd(_BACKWARD, _differentiate_backward, setup_context=_save_backward)
