"""The operator nms::nms: its schema, its plain torch kernel and the functions that call it."""

import torch
from torch import Tensor

from operators import compiled_devices, load_kernels


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression with the rule of tf.image.non_max_suppression.

    From the highest score down, a box is kept unless its IoU with a box already kept exceeds the
    threshold. Areas are (y2 - y1) * (x2 - x1), without a +1, and flipped corners are put in order.
    A box of area 0, or with a coordinate that is not finite, overlaps nothing: it is kept.
    A NaN score ranks last, with -inf, and its box overlaps nothing either.

    Args:
        boxes: [N, (y1, x1, y2, x2)] float32 or float64, any one frame.
        scores: [N] float32 or float64, on the device of boxes.
        iou_threshold: 0..1.

    Returns:
        [K] int64, indices of the kept boxes by descending score, equal scores by ascending index.

    Raises:
        TypeError: boxes or scores are not floating point tensors of 32 or 64 bits.
        ValueError: the shapes, the devices or the threshold do not fit.
    """
    _check(boxes, scores, iou_threshold)
    return torch.ops.nms.nms(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, group: Tensor, iou_threshold: float) -> Tensor:
    """`nms` within each group (a class, an image, or both), all groups in one call.

    Overlaps are computed in float64, where shifting the groups apart leaves float32 boxes of up to
    a few thousand pixels exact.

    Args:
        boxes: [N, (y1, x1, y2, x2)] float32 or float64, any one frame.
        scores: [N] float32 or float64, on the device of boxes.
        group: [N] int64, any numbers; boxes with different numbers never suppress each other.
        iou_threshold: 0..1.

    Returns:
        [K] int64, indices of the kept boxes by descending score, equal scores by ascending index.

    Raises:
        TypeError, ValueError: as in `nms`.
    """
    _check(boxes, scores, iou_threshold)
    if group.dtype != torch.int64:
        raise TypeError(f"group must be int64, got {group.dtype}; use group.long()")
    if group.shape != scores.shape or group.device != scores.device:
        raise ValueError(
            f"group must have the shape and device of scores, {tuple(scores.shape)} on "
            f"{scores.device}, got {tuple(group.shape)} on {group.device}"
        )
    if len(boxes) == 0:
        return group.new_empty(0)
    boxes = boxes.double()
    extent = torch.where(boxes.isfinite(), boxes, 0).aminmax()
    # A whole number keeps the low bits of the coordinates.
    distance = (extent.max - extent.min).ceil() + 1
    rank = group.unique(return_inverse=True)[1]
    shift = (rank * distance).unsqueeze(1) * boxes.new_tensor([1, 0, 1, 0])
    return torch.ops.nms.nms(boxes + shift, scores, iou_threshold)


def is_compiled() -> tuple[str, ...]:
    """The devices with a compiled kernel, of "cpu" and "cuda"; empty (false) in plain torch."""
    return compiled_devices("nms::nms")


def _check_kinds(boxes: Tensor, scores: Tensor, iou_threshold: float) -> None:
    """What every kernel refuses, the fake one too, which mixed devices may lead to."""
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"nms: {name} must be float32 or float64, got {tensor.dtype}; use .float()"
            )
    if boxes.device != scores.device:
        raise ValueError(
            f"nms: boxes and scores must be on one device, got {boxes.device} and {scores.device}"
        )
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"nms: iou_threshold must be within 0..1, got {iou_threshold}")


def _check(boxes: Tensor, scores: Tensor, iou_threshold: float) -> None:
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        # Under autocast any floating point type comes in, and the kernel gets float32.
        if not tensor.is_floating_point():
            raise TypeError(
                f"nms: {name} must be float32 or float64, got {tensor.dtype}; use .float()"
            )
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"nms: boxes must be [N, (y1, x1, y2, x2)], got shape {tuple(boxes.shape)}"
        )
    if scores.shape != boxes.shape[:1] or scores.device != boxes.device:
        raise ValueError(
            f"nms: scores must be [N] = [{len(boxes)}] on {boxes.device} like boxes, got "
            f"{list(scores.shape)} on {scores.device}"
        )
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"nms: iou_threshold must be within 0..1, got {iou_threshold}")


def _overlaps(a: Tensor, b: Tensor, iou_threshold: float) -> Tensor:
    """Where the IoU exceeds the threshold, bool [N, M] of (y1, x1, y2, x2, area) [N, 5], [M, 5]."""
    ay1, ax1, ay2, ax2, a_area = a.unsqueeze(2).unbind(1)
    by1, bx1, by2, bx2, b_area = b.unbind(1)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)
    intersection = height * width
    return intersection / (a_area + b_area - intersection) > iou_threshold


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The plain torch kernel: keeps the best boxes of a block and drops what they suppress."""
    _check_kinds(boxes, scores, iou_threshold)
    _check(boxes, scores, iou_threshold)
    unscored = scores.isnan()
    order = scores.masked_fill(unscored, -torch.inf).argsort(stable=True, descending=True)
    y1, x1, y2, x2 = boxes.masked_fill(unscored.unsqueeze(1), torch.nan)[order].unbind(1)
    top, bottom = torch.minimum(y1, y2), torch.maximum(y1, y2)
    left, right = torch.minimum(x1, x2), torch.maximum(x1, x2)
    boxes = torch.stack([top, left, bottom, right, (bottom - top) * (right - left)], dim=1)

    keep = []
    candidates = torch.arange(len(order), device=order.device)
    while len(candidates):
        block, rest = candidates[:256], candidates[256:]
        suppresses = _overlaps(boxes[block], boxes[block], iou_threshold).triu(1)
        kept = torch.ones_like(block, dtype=torch.bool)
        # Every round settles at least one more box in order of rank; a few rounds settle all.
        while not torch.equal(kept, better := ~suppresses[kept].any(0)):
            kept = better
        keep.append(block[kept])
        candidates = rest[~_overlaps(boxes[block[kept]], boxes[rest], iou_threshold).any(0)]
    return order[torch.cat(keep)] if keep else order


def _fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    _check_kinds(boxes, scores, iou_threshold)
    count = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(count, dtype=torch.int64)


def _autocast(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Under autocast half precision becomes float32."""
    with torch.autocast(boxes.device.type, enabled=False):
        boxes, scores = (t if t.dtype == torch.float64 else t.float() for t in (boxes, scores))
        return torch.ops.nms.nms(boxes, scores, iou_threshold)


_library = torch.library.Library("nms", "FRAGMENT")
_library.define("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
_library.impl("nms", _nms, "CompositeExplicitAutograd")
_library.impl("nms", _autocast, "AutocastCPU")
_library.impl("nms", _autocast, "AutocastCUDA")
torch.library.register_fake("nms::nms", _fake)
load_kernels(__file__)
