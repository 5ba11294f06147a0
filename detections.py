"""What the network finds in a batch, and the detections of an image, as users get them.

Letters in shapes and frames of boxes are those of model.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import utils
from boxed_masks import BoxedMasks, Part
from config import Config
from nms import batched_nms


class RPNOutput(NamedTuple):
    """What the region proposal network says of each anchor of each image."""

    logits: Tensor  # [B, A, 2] background, foreground; [B, A, 1] unless RPN_SCORE is "softmax"
    deltas: Tensor  # [B, A, 4] dy, dx, log(dh), log(dw) in units of RPN_BBOX_STD_DEV


class Rois(NamedTuple):
    """Boxes of all images of a batch in one list, images in ascending order."""

    boxes: Tensor  # [R, 4] the BOX_FRAME
    image_index: Tensor  # [R] int64


class Detections(NamedTuple):
    """Final boxes of all images of a batch: images ascending, then scores descending."""

    boxes: Tensor  # [N, 4] the BOX_FRAME
    class_ids: Tensor  # [N] int64
    scores: Tensor  # [N]
    image_index: Tensor  # [N] int64
    roi_index: Tensor  # [N] int64, the proposal it was refined from


class Prediction(NamedTuple):
    """What each stage found in a batch, from the region proposals on."""

    rpn: RPNOutput
    proposals: Rois
    class_probs: Tensor  # [R, K]
    class_deltas: Tensor  # [R, K, 4] in units of BBOX_STD_DEV
    detections: Detections
    mask_probs: Tensor  # [N, M, M] of the detected class


class Objects(NamedTuple):
    """The objects of an image in its own frame, best score first."""

    boxes: np.ndarray  # [N, 4] float32
    class_ids: np.ndarray  # [N] int32
    scores: np.ndarray  # [N] float32
    # Of each mask the pixels that may be set: their box, whole numbers, and [height, width] bool.
    parts: Iterable[Part]


def refine_detections(
    proposals: Rois, class_probs: Tensor, class_deltas: Tensor, windows: Tensor, config: Config
) -> Detections:
    """Boxes of the likeliest class of each proposal, refined, clipped and without duplicates.

    With DETECTION_PER_CLASS, those of each class that is likely enough.

    Args:
        proposals: the rois that the classifier judged.
        class_probs: [R, K].
        class_deltas: [R, K, 4] in units of BBOX_STD_DEV.
        windows: [B, 4] the BOX_FRAME, the part of each network input that shows the image.

    Source: Mask R-CNN paper, section 3.1, inference.
    """
    if config.DETECTION_PER_CLASS:
        rows, class_ids = (class_probs[:, 1:] >= config.DETECTION_MIN_CONFIDENCE).nonzero().T
        class_ids = class_ids + 1
    else:
        scores, likeliest = class_probs.max(dim=1)
        rows = ((likeliest > 0) & (scores >= config.DETECTION_MIN_CONFIDENCE)).nonzero()[:, 0]
        class_ids = likeliest[rows]
    scores, image_index = class_probs[rows, class_ids], proposals.image_index[rows]
    deltas = class_deltas[rows, class_ids] * class_deltas.new_tensor(config.BBOX_STD_DEV)
    boxes = utils.apply_box_deltas(proposals.boxes[rows], deltas, config.BBOX_LOG_SCALE_LIMIT)
    boxes = utils.clip_boxes(boxes, windows[image_index])
    large = utils.are_larger(boxes, config.DETECTION_MIN_SIZE)
    boxes, rows, class_ids = boxes[large], rows[large], class_ids[large]
    scores, image_index = scores[large], image_index[large]

    group = image_index * config.NUM_CLASSES + class_ids
    keep = batched_nms(boxes, scores, group, config.DETECTION_NMS_THRESHOLD)
    keep = torch.cat(
        [
            keep[image_index[keep] == image][: config.DETECTION_MAX_INSTANCES]
            for image in range(len(windows))
        ]
    )
    return Detections(boxes[keep], class_ids[keep], scores[keep], image_index[keep], rows[keep])


def unmold_boxes(
    boxes: Tensor, window: Tensor, image_shape: Sequence[int], config: Config
) -> Tensor:
    """Boxes [N, 4] of the BOX_FRAME in image pixels, within the image.

    Args:
        window: [4] the BOX_FRAME, the part of the network input that shows the image.
        image_shape: (height, width, ...) of the image.

    Returns:
        [N, 4] float32; whole numbers in the unit frame, or if MASK_PASTE is "rounded".
    """
    # A window of one pixel has no extent in the unit frame.
    shift, scale = window[:2].repeat(2), (window[2:] - window[:2]).clamp(min=1e-9).repeat(2)
    boxes = (boxes - shift) / scale
    if config.BOX_FRAME == "unit":
        boxes = utils.denorm_boxes(boxes, image_shape).float()
    else:
        boxes = boxes * boxes.new_tensor(image_shape[:2]).repeat(2)
        boxes = utils.clip_boxes(boxes, (0.0, 0.0, *map(float, image_shape[:2])))
    return boxes.round() if config.MASK_PASTE == "rounded" else boxes


def unmold_detections(
    prediction: Prediction,
    image: int,
    image_shape: Sequence[int],
    window: Tensor,
    masks: str,
    config: Config,
) -> dict[str, Any]:
    """The detections of one image of a batch, in the form that MaskRCNN.detect returns.

    Args:
        image: position in the batch.
        image_shape: (height, width, ...) of the image before it was molded.
        window: [4] the BOX_FRAME, the part of the network input that shows the image.
        masks: "full", "rle" or "box".
    """
    return as_result(unmold(prediction, image, image_shape, window, config), image_shape, masks)


def unmold(
    prediction: Prediction, image: int, image_shape: Sequence[int], window: Tensor, config: Config
) -> Objects:
    """The detections of one image of a batch in its frame; see unmold_detections.

    The masks are pasted one by one, as `parts` is read, which is possible once.
    """
    detections = prediction.detections
    members = (detections.image_index == image).nonzero()[:, 0]
    boxes = unmold_boxes(detections.boxes[members], window, image_shape, config)
    # Boxes thinner than a pixel of the image can round to nothing.
    visible = utils.are_larger(boxes, 0)
    boxes, members = boxes[visible], members[visible]
    pasted = (
        utils.paste_mask(probs, box, image_shape[:2], config.MASK_PASTE)
        for probs, box in zip(prediction.mask_probs[members], boxes.tolist(), strict=True)
    )
    return Objects(
        boxes.cpu().numpy(),
        detections.class_ids[members].to(torch.int32).cpu().numpy(),
        detections.scores[members].cpu().numpy(),
        ((box, part.cpu().numpy()) for part, box in pasted),
    )


def as_result(objects: Objects, image_shape: Sequence[int], masks: str) -> dict[str, Any]:
    """Objects of an image in the form that MaskRCNN.detect returns, with masks of that kind."""
    size = (image_shape[0], image_shape[1])
    rois = objects.boxes.round().astype(np.int32)
    found: Any
    if masks == "full":
        canvas = np.zeros((len(rois), *size), dtype=bool)
        for row, ((y1, x1, y2, x2), part) in zip(canvas, objects.parts, strict=True):
            row[y1:y2, x1:x2] = part
        found = canvas.transpose(1, 2, 0)  # [H, W, N]
    elif masks == "rle":
        found = [utils.rle_encode(part, box, size) for box, part in objects.parts]
    else:
        # A part may be a pixel larger or smaller than its box.
        found = [
            np.asarray(BoxedMasks(size, [part])[y1:y2, x1:x2])[:, :, 0]
            for part, (y1, x1, y2, x2) in zip(objects.parts, rois.tolist(), strict=True)
        ]
    return {
        "rois": rois,
        "boxes": objects.boxes,
        "class_ids": objects.class_ids,
        "scores": objects.scores,
        "masks": found,
    }
