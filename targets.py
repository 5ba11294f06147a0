"""Training targets: what the region proposal network and the heads should say of an image."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from config import Config
from roialign import crop_and_resize, roi_align


class RPNTargets(NamedTuple):
    """What the region proposal network should say of one image."""

    match: Tensor  # [A] int8: 1 object, -1 background, 0 not judged
    deltas: Tensor  # [P, 4] of the anchors with match 1, in units of RPN_BBOX_STD_DEV


class RoiTargets(NamedTuple):
    """What the heads should say of the rois sampled from one image: the P objects come first."""

    rois: Tensor  # [R, 4] the BOX_FRAME
    class_ids: Tensor  # [R] int64, 0 for background
    deltas: Tensor  # [P, 4] in units of BBOX_STD_DEV
    masks: Tensor  # [P, M, M] float32, 0 or 1


def sample(candidates: Tensor, count: int, permutation: Callable[..., Tensor]) -> Tensor:
    """At most count of the indices where candidates [N] bool is set, ascending.

    Args:
        permutation: torch.randperm, or a function called like it: permutation(n, device=device).
            It is called only if some have to be left out.
    """
    index = candidates.nonzero()[:, 0]
    if len(index) > count:
        index = index[permutation(len(index), device=index.device)[:count]].sort().values
    return index


def match_boxes(
    boxes: Tensor, class_ids: Tensor, gt_boxes: Tensor, crowd_iou: float
) -> tuple[Tensor, Tensor]:
    """Overlaps of boxes with the objects of an image, and which boxes keep clear of its crowds.

    Args:
        boxes: [N, 4], any frame.
        class_ids: [G], negative for crowds.
        gt_boxes: [G, 4], the frame of boxes.
        crowd_iou: CROWD_IOU of the config.

    Returns:
        overlaps: [objects + 1, N] IoU; the last row is 0, so that there always is a maximum.
        clear: [N] bool.
    """

    def overlaps(members: Tensor) -> Tensor:
        # A box without area overlaps nothing.
        others = F.pad(gt_boxes[members].to(boxes.dtype), (0, 0, 0, 1))
        # In pieces that fit a CPU's cache: half the time for the 261 888 anchors of COCO.
        parts = [utils.compute_overlaps(others, part) for part in boxes.split(2**14)]
        return torch.cat(parts, dim=1)

    return overlaps(class_ids > 0), overlaps(class_ids < 0).amax(dim=0) < crowd_iou


@torch.no_grad()
def build_rpn_targets(
    anchors: Tensor,
    class_ids: Tensor,
    gt_boxes: Tensor,
    config: Config,
    permutation: Callable[..., Tensor] = torch.randperm,
) -> RPNTargets:
    """Chooses the anchors of one image that the region proposal network learns from.

    Objects are the anchors of RPN_POSITIVE_IOU or more with an object and, for each object, its
    best ones; background are those below RPN_NEGATIVE_IOU with every object and CROWD_IOU with
    every crowd. Sampled to RPN_TRAIN_ANCHORS_PER_IMAGE, objects at most half of them.

    Args:
        anchors: [A, 4] float64, network pixels: in Matterport's own arithmetic the best
            anchors of an object are often several of exactly the same IoU.
        class_ids: [G] int64, negative for crowds.
        gt_boxes: [G, 4], network pixels.
        permutation: the source of randomness, see sample.

    Source: Faster R-CNN paper, section 3.1.2.
    """
    overlaps, clear = match_boxes(anchors, class_ids, gt_boxes, config.CROWD_IOU)
    iou, assignment = overlaps.max(dim=0)
    best_iou = overlaps.amax(dim=1, keepdim=True)
    # An object that no anchor touches has no best anchor.
    best = ((overlaps == best_iou) & (best_iou > 0)).any(dim=0)
    objects = best | (iou >= config.RPN_POSITIVE_IOU)
    background = (iou < config.RPN_NEGATIVE_IOU) & clear & ~best

    count = config.RPN_TRAIN_ANCHORS_PER_IMAGE
    positive = sample(objects, count // 2, permutation)
    negative = sample(background, count - len(positive), permutation)
    match = torch.zeros(len(anchors), dtype=torch.int8, device=anchors.device)
    match[positive], match[negative] = 1, -1
    # Matterport: the object that the anchor overlaps most, even if it is the best of another one.
    assigned = gt_boxes[class_ids > 0][assignment[positive]]
    deltas = utils.box_refinement(anchors[positive], assigned)
    return RPNTargets(match, deltas / deltas.new_tensor(config.RPN_BBOX_STD_DEV))


@torch.no_grad()
def sample_rois(
    proposals: Tensor,
    class_ids: Tensor,
    gt_boxes: Tensor,
    masks: Tensor,
    config: Config,
    permutation: Callable[..., Tensor] = torch.randperm,
) -> RoiTargets:
    """Chooses the proposals of one image that the heads learn from, and what they should say.

    Objects are the proposals of ROI_POSITIVE_IOU or more with an object; background are those below
    it with every object, and below CROWD_IOU with every crowd. At most TRAIN_ROIS_PER_IMAGE, of
    which the share ROI_POSITIVE_RATIO are objects; where there are fewer objects there is less
    background too.

    As in Matterport, an image whose proposals all miss its objects teaches nothing; otherwise a new
    network would learn that everything is background. Unlike there, an image without objects gives
    the background of a full sample, and samples are not filled up with empty boxes.

    Args:
        proposals: [N, 4] float32, the BOX_FRAME.
        class_ids: [G] int64, negative for crowds.
        gt_boxes: [G, 4] float32, the BOX_FRAME.
        masks: [G, h, w] bool, cut to the boxes if USE_MINI_MASK, else of the network input.
        permutation: the source of randomness, see sample.

    Source: Mask R-CNN paper, section 3.1, training.
    """
    overlaps, clear = match_boxes(proposals, class_ids, gt_boxes, config.CROWD_IOU)
    iou, assignment = overlaps.max(dim=0)
    most = int(config.TRAIN_ROIS_PER_IMAGE * config.ROI_POSITIVE_RATIO)
    positive = sample(iou >= config.ROI_POSITIVE_IOU, most, permutation)
    is_object = (class_ids > 0).nonzero()[:, 0]
    if len(is_object):
        background_count = int(len(positive) / config.ROI_POSITIVE_RATIO) - len(positive)
    else:
        background_count = config.TRAIN_ROIS_PER_IMAGE - most
    negative = sample((iou < config.ROI_POSITIVE_IOU) & clear, background_count, permutation)

    rois, assigned = proposals[positive], is_object[assignment[positive]]
    deltas = utils.box_refinement(rois, gt_boxes[assigned])
    return RoiTargets(
        torch.cat([rois, proposals[negative]]),
        F.pad(class_ids[assigned], (0, len(negative))),
        deltas / deltas.new_tensor(config.BBOX_STD_DEV),
        crop_masks(masks, rois, gt_boxes, assigned, config),
    )


def crop_masks(
    masks: Tensor, rois: Tensor, gt_boxes: Tensor, assigned: Tensor, config: Config
) -> Tensor:
    """The part of a mask that each roi sees, [P, M, M] float32 of 0 and 1.

    Args:
        masks: [G, h, w] bool, cut to gt_boxes if USE_MINI_MASK, else of the network input.
        rois: [P, 4] the BOX_FRAME.
        gt_boxes: [G, 4] the BOX_FRAME.
        assigned: [P] int64, the mask of each roi.
    """
    boxes = rois
    if config.USE_MINI_MASK:
        corner, far_corner = gt_boxes[assigned].split(2, dim=1)
        boxes = (rois - corner.repeat(1, 2)) / (far_corner - corner).repeat(1, 2)
    height, width = config.MASK_SHAPE
    if config.BOX_FRAME == "network":
        if config.USE_MINI_MASK:
            boxes = boxes * boxes.new_tensor(masks.shape[1:]).repeat(2)
        crops = roi_align(masks[:, None].float(), boxes, assigned, height, width, 0, True)
        return (crops[:, 0] >= 0.5).float()
    # As in pyramid_roi_align, rounding must not carry the last sample beyond the mask. Not a clamp:
    # a roi may reach beyond its object.
    boxes = boxes.where(boxes != 1, 1 - 2**-22)
    crops = crop_and_resize(masks[:, None].float(), boxes, assigned, height, width)
    return (crops[:, 0] > 0.5).float()
