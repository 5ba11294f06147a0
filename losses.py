"""The losses; their names end in _loss. Their mean over all processes is what training minimises.

A sum over nothing is 0 and keeps the graph, so that each parameter gets a gradient in each step.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import distributed


def mean(total: Tensor, count: int | Tensor) -> Tensor:
    """A sum over its number of terms, of which the processes may have unlike numbers.

    So it is divided by their mean number. Since gradients are averaged over the processes, they are
    those of one process that has all of the images.
    """
    terms = distributed.average(torch.as_tensor(count, dtype=torch.float32, device=total.device))
    return total / terms.clamp(min=1 / distributed.world_size())


def rpn_class_loss(match: Tensor, logits: Tensor) -> Tensor:
    """Cross entropy of the sampled anchors.

    Args:
        match: [S] or [B, A] int8, see RPNTargets.
        logits: [S, 2] or [B, A, 2] background, foreground; or the foreground's alone, [..., 1].
    """
    judged = match != 0
    target, logits = match[judged] > 0, logits[judged].float()
    if logits.shape[1] == 1:
        total = F.binary_cross_entropy_with_logits(logits[:, 0], target.float(), reduction="sum")
    else:
        total = F.cross_entropy(logits, target.long(), reduction="sum")
    return mean(total, len(target))


def smooth_l1_loss(target: Tensor, deltas: Tensor) -> Tensor:
    """Mean over all numbers (Fast R-CNN paper, equation 3)."""
    return mean(F.smooth_l1_loss(deltas.float(), target, reduction="sum"), target.numel())


def rpn_bbox_loss(target_deltas: Tensor, match: Tensor, deltas: Tensor) -> Tensor:
    """Smooth L1 distance of the anchors that are objects.

    Args:
        target_deltas: [P, 4] of the anchors with match 1, image by image.
        match: [S] or [B, A] int8, see RPNTargets.
        deltas: [S, 4] or [B, A, 4].
    """
    return smooth_l1_loss(target_deltas, deltas[match == 1])


def mrcnn_class_loss(target_class_ids: Tensor, logits: Tensor, active: Tensor) -> Tensor:
    """Cross entropy of the rois.

    A data set without a class does not tell that a roi is not of that class: rois for which such a
    class is the likeliest are left out.

    Args:
        target_class_ids: [R] int64.
        logits: [R, K].
        active: [R, K] bool, the classes that the data set of the roi's image has.
    """
    losses = F.cross_entropy(logits.float(), target_class_ids, reduction="none")
    judged = active.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    return mean((losses * judged).sum(), judged.sum())


def mrcnn_bbox_loss(target_deltas: Tensor, target_class_ids: Tensor, deltas: Tensor) -> Tensor:
    """Smooth L1 distance of the rois that are objects, in the deltas of their class.

    Args:
        target_deltas: [P, 4] of the rois with a class.
        target_class_ids: [R] int64.
        deltas: [R, K, 4].
    """
    positive = target_class_ids.nonzero()[:, 0]
    return smooth_l1_loss(target_deltas, deltas[positive, target_class_ids[positive]])


def mrcnn_mask_loss(target_masks: Tensor, logits: Tensor) -> Tensor:
    """Binary cross entropy of the masks of rois that are objects.

    Computed from logits, which loses no digits. Keras computes it from probabilities, which it
    clips to 1e-7 and adds 1e-7 to in the logarithm, so the loss of a pixel ends at -log(2e-7);
    beyond it there is no gradient. The clamp says the same of logits.

    Args:
        target_masks: [P, M, M] float32, 0 or 1.
        logits: [P, M, M] of the class of each roi.
    """
    limit = -math.log(2e-7)
    logits = logits.float().clamp(-limit, limit)
    losses = F.binary_cross_entropy_with_logits(logits, target_masks, reduction="sum")
    return mean(losses, target_masks.numel())
