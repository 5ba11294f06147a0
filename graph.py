"""What MaskRCNN.detect does, as one graph of tensor operations that torch.export can follow.

`detect` resizes in numpy, goes from image to image and drops boxes on its way. Here a whole batch
goes through at once, and shapes do not depend on what is found: what is dropped gets a score of
-inf, until all is known. The layers and RoIAlign are those of model.py.

Letters in shapes and frames of boxes are those of model.py; also G groups of boxes, and S boxes in
each. Sizes of images are float64 tensors, in which numbers are computed as Python does.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from detections import Rois, RPNOutput
from model import BatchNorm2d, MaskRCNN, refine_anchors

LEAST = torch.finfo(torch.float32).min  # any score above it is that of a box

# NMS: of boxes [G, S, 4], their scores [G, K, S] in K classes, a threshold of IoU and a number to
# which boxes it keeps, [G, K, S] bool. Each class is for itself, a score of -inf is no candidate,
# and what comes after the number of best ones may be dropped.
Suppress = Callable[[Tensor, Tensor, float, int], Tensor]


def suppress(boxes: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    """NMS, see Suppress, by the operator of this library, which keeps more than `most`."""
    group, class_id, place = (scores > LEAST).nonzero().unbind(1)
    # As nms.batched_nms, which looks at how many there are.
    distance = (boxes.max() - boxes.min()).double().ceil() + 1
    shift = (group * scores.shape[1] + class_id).unsqueeze(1) * distance
    apart = boxes[group, place].double() + shift * distance.new_tensor([1, 0, 1, 0])
    keep = torch.ops.nms.nms(apart, scores[group, class_id, place], iou_threshold)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    places = group[keep], class_id[keep], place[keep]
    return kept.index_put(places, torch.ones_like(keep, dtype=torch.bool))


class Scale(nn.Module):
    """BatchNorm that does not learn, on any number of images, none included."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        self.register_buffer("scale", scale.float().view(-1, 1, 1))
        self.register_buffer("shift", shift.float().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class DetectionGraph(nn.Module):
    """From images of one size to their objects; see forward.

    Args:
        model: is copied, to the CPU.
        suppress: NMS.
    """

    def __init__(self, model: MaskRCNN, suppress: Suppress = suppress) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().requires_grad_(False)
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, BatchNorm2d):
                    setattr(module, name, Scale(child))
        self.config = model.config
        self.suppress = suppress
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Finds the objects in images, as detect does.

        Args:
            images: [B, H, W, C] uint8, of any size.

        Returns:
            boxes [N, 4] float32, image frame, the `boxes` of detect; class_ids [N] int64; scores
            [N]; masks [N, M, M], the probabilities in each box; and image_index [N] int64. Images
            ascending, then scores descending.
        """
        model, config = self.model, self.config
        size = _as_size(images.shape[1:3])
        pixels, window, full = self.mold(images, size)
        window, whole = (
            self.to_frame(box, full).float() for box in (window, torch.cat([0 * full, full]))
        )
        image_shape = pixels.shape[2:]
        features = model.fpn(pixels)
        region = window if config.CLIP_TO_IMAGE else whole
        rois, real = self.propose(features, image_shape, full, region)
        batch, count = real.shape
        index = torch.arange(batch).unsqueeze(1).expand(-1, count).flatten()
        proposals = Rois(rois.flatten(0, 1), index)
        logits, deltas = model.classifier(features[:4], proposals, image_shape)
        probs = logits.softmax(dim=1).unflatten(0, (-1, count))
        deltas = deltas.unflatten(0, (-1, count))
        boxes, class_ids, scores = self.refine(rois, real, probs, deltas, window)
        in_image = self.unmold(boxes, window, size)
        # Boxes thinner than a pixel of the image can round to nothing.
        index, place = ((scores > LEAST) & utils.are_larger(in_image, 0)).nonzero().unbind(1)
        boxes, in_image, class_ids, scores = (
            x[index, place] for x in (boxes, in_image, class_ids, scores)
        )
        masks = model.mask(features[:4], Rois(boxes, index), class_ids, image_shape).sigmoid()
        return in_image, class_ids, scores, masks, index

    # --- From images to the network's input: utils.resize_image

    def mold(self, images: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Resizes and pads images of this size [2].

        Returns:
            The normalised input of the network [B, C, H, W], the part of it that shows the image
            [4], and its size [2], both float64, network pixels.
        """
        config = self.config
        mode = config.IMAGE_RESIZE_MODE
        scaled = self.scaled_size(size)
        if mode == "square":
            assert config.IMAGE_MAX_DIM is not None
            height = width = config.IMAGE_MAX_DIM
        else:
            # As multiples: torch.export then sees that the sizes of all maps are whole numbers.
            divisor = 64 if mode == "pad64" else config.IMAGE_SIZE_DIVISOR
            height, width = (divisor * n for n in _as_numbers((scaled / divisor).ceil()))
        full = _as_size((height, width))
        if mode == "shortest_edge":
            pixels = self.model.normalize(self.scale_shortest_edge(images, size, scaled))
            below, right = height - pixels.shape[2], width - pixels.shape[3]
            torch._check(below >= 0)
            torch._check(right >= 0)
            # With MEAN_PIXEL, which is 0 now.
            return F.pad(pixels, (0, right, 0, below)), torch.cat([0 * scaled, scaled]), full
        start = ((full - scaled) / 2).floor()
        pixels = resize(images, (height, width), size, scaled, start)
        return self.model.normalize(pixels), torch.cat([start, start + scaled]), full

    def scaled_size(self, size: Tensor) -> Tensor:
        """The size [2] of what the network sees of images of this size [2]."""
        config = self.config
        mode, limits = config.IMAGE_RESIZE_MODE, (config.IMAGE_MIN_DIM, config.IMAGE_MAX_DIM)
        # Tensors: where a number is divided by one, torch multiplies with its reciprocal.
        least, most = (None if n is None else size.new_tensor(n) for n in limits)
        shorter, longer = size.amin(0), size.amax(0)
        if mode == "none":
            return size
        if mode == "shortest_edge":
            assert least is not None
            assert most is not None
            if config.IMAGE_SIDE_ROUNDING == "floor":
                sides = (size * torch.minimum(least / shorter, most / longer)).floor()
            else:
                sides = size * (least / shorter)
                sides = (sides * (most / sides.amax(0)).clamp(max=1) + 0.5).floor()
            return sides.clamp(min=1)
        scale = torch.ones_like(shorter) if least is None else least / shorter
        scale = scale.clamp(min=max(1.0, config.IMAGE_MIN_SCALE))
        if mode == "square":
            assert most is not None
            scale = torch.where((longer * scale).round() > most, most / longer, scale)
        return (size * scale).round().clamp(min=1)

    def scale_shortest_edge(self, images: Tensor, size: Tensor, scaled: Tensor) -> Tensor:
        """Images [B, H, W, C] of a size [2] in another, [B, C, height, width] float32."""
        height, width = _as_numbers(scaled)
        images = images.permute(0, 3, 1, 2)
        if self.config.IMAGE_INTERPOLATION == "float":
            shape = height, width
            return F.interpolate(images.float(), shape, mode="bilinear", align_corners=False)
        across = pillow_weights(images.shape[3], width, size[1] / scaled[1])
        down = pillow_weights(images.shape[2], height, size[0] / scaled[0])
        return pillow_round(down @ pillow_round(images.double() @ across.T)).float()

    # --- Frames of boxes

    def to_frame(self, boxes: Tensor, full: Tensor) -> Tensor:
        """Boxes [..., 4] float64 from pixels of the network's input, of size [2], to BOX_FRAME."""
        if self.config.BOX_FRAME == "network":
            return boxes
        return (boxes - boxes.new_tensor([0, 0, 1, 1])) / (full - 1).repeat(2)

    def unmold(self, boxes: Tensor, window: Tensor, size: Tensor) -> Tensor:
        """Boxes [..., 4] of the BOX_FRAME in pixels of images of this size [2], as unmold_boxes."""
        shift, extent = window[:2].repeat(2), (window[2:] - window[:2]).clamp(min=1e-9).repeat(2)
        boxes = (boxes - shift) / extent
        if self.config.BOX_FRAME == "unit":
            boxes = boxes.double() * (size - 1).repeat(2) + size.new_tensor([0, 0, 1, 1])
            return boxes.round().float()
        sides = size.float()
        boxes = utils.clip_boxes(boxes * sides.repeat(2), torch.cat([0 * sides, sides]))
        return boxes.round() if self.config.MASK_PASTE == "rounded" else boxes

    # --- Region proposals: proposal_layer

    def anchors(
        self, features: Sequence[Tensor], image_shape: Sequence[int], full: Tensor
    ) -> list[Tensor]:
        """The anchors [A, 4] of each of P2..P6, float32, the BOX_FRAME."""
        config = self.config
        anchors = []
        for scale, feature, stride in zip(
            config.RPN_ANCHOR_SCALES, features, config.BACKBONE_STRIDES, strict=True
        ):
            ratios, rounding = config.RPN_ANCHOR_RATIOS, config.RPN_ANCHOR_ROUNDING
            around = torch.from_numpy(utils.generate_anchors(scale, ratios, (1, 1), 1, 1, rounding))
            grid = config.RPN_ANCHOR_SPACING == "grid"
            y, x = (
                torch.arange(0, cells, config.RPN_ANCHOR_STRIDE, dtype=torch.float64)
                * (side // cells if grid else stride)
                for side, cells in zip(image_shape, feature.shape[2:], strict=True)
            )
            y, x = y[:, None].expand(-1, x.shape[0]), x.expand(y.shape[0], -1)
            boxes = torch.stack([y, x, y, x], dim=2).view(-1, 1, 4) + around
            anchors.append(self.to_frame(boxes.view(-1, 4), full).float())
        return anchors

    def propose(
        self, features: Sequence[Tensor], image_shape: Sequence[int], full: Tensor, region: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best anchors, refined, clipped to region [4], and without near duplicates.

        Returns:
            Boxes [B, R, 4], the BOX_FRAME, and which of them there are, [B, R] bool.
        """
        config = self.config
        levels = [self.model.rpn(feature) for feature in features]
        anchors = self.anchors(features, image_shape, full)
        if not config.RPN_PER_LEVEL:
            parts = zip(*levels, strict=True)
            levels = [RPNOutput(*(torch.cat(part, dim=1) for part in parts))]
            anchors = [torch.cat(anchors)]
        ranked = [self.rank(*rivals, region) for rivals in zip(levels, anchors, strict=True)]
        boxes, scores = (torch.stack(part, dim=1) for part in zip(*ranked, strict=True))
        count = config.POST_NMS_ROIS_INFERENCE
        keep = self.suppress(
            boxes.flatten(0, 1), scores.flatten(0, 1)[:, None], config.RPN_NMS_THRESHOLD, count
        )
        scores = scores.masked_fill(~keep.view(scores.shape), -torch.inf).flatten(1)
        best, scores = _best(scores, count)
        return _take(boxes.flatten(1, 2), best), scores > LEAST

    def rank(self, rpn: RPNOutput, anchors: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [B, S, 4] and scores [B, S] of the PRE_NMS_LIMIT best anchors, best first."""
        config = self.config
        softmax = config.RPN_SCORE == "softmax"
        ranks = rpn.logits.softmax(dim=2)[:, :, 1] if softmax else rpn.logits[:, :, 0]
        limit, count = config.PRE_NMS_LIMIT, ranks.shape[1]
        padded = F.pad(ranks, (0, limit), value=-torch.inf)  # there may be fewer
        top = padded.topk(limit, dim=1).indices.sort(dim=1).values
        # By rank, then in anchor order: NMS breaks ties of scores by position.
        order, ranks = _best(padded.gather(1, top), limit)
        top = top.gather(1, order).clamp(max=count - 1)
        boxes = refine_anchors(anchors[top], _take(rpn.deltas, top), region, config)
        scores = ranks.sigmoid() if config.RPN_SCORE == "sigmoid" else ranks
        real = (ranks > LEAST) & utils.are_larger(boxes, config.RPN_MIN_SIZE)
        return boxes, scores.masked_fill(~real, -torch.inf)

    # --- Detections: refine_detections

    def refine(
        self, rois: Tensor, real: Tensor, probs: Tensor, deltas: Tensor, window: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The final boxes [B, N, 4], the BOX_FRAME, their class_ids and scores [B, N], best first.

        Args:
            rois: [B, R, 4].
            real: [B, R] bool, which there are.
            probs: [B, R, K].
            deltas: [B, R, K, 4] in units of BBOX_STD_DEV.
            window: [4], the part of the input that shows the image.
        """
        config = self.config
        # What each roi may be: all classes but the background, or (DETECTION_PER_CLASS) its
        # likeliest.
        if config.DETECTION_PER_CLASS:
            scores, deltas = probs[:, :, 1:], deltas[:, :, 1:]
            class_ids = torch.arange(1, config.NUM_CLASSES).expand(scores.shape)
        else:
            scores, class_ids = probs.max(dim=2, keepdim=True)
            deltas = deltas.gather(2, class_ids.unsqueeze(3).expand(-1, -1, -1, 4))
        deltas = deltas * deltas.new_tensor(config.BBOX_STD_DEV)
        boxes = utils.apply_box_deltas(rois.unsqueeze(2), deltas, config.BBOX_LOG_SCALE_LIMIT)
        boxes = utils.clip_boxes(boxes, window)  # [B, R, 1 or K - 1, 4]
        real = real.unsqueeze(2) & (scores >= config.DETECTION_MIN_CONFIDENCE) & (class_ids > 0)
        real = real & utils.are_larger(boxes, config.DETECTION_MIN_SIZE)
        scores = scores.masked_fill(~real, -torch.inf)
        threshold, count = config.DETECTION_NMS_THRESHOLD, config.DETECTION_MAX_INSTANCES
        if config.DETECTION_PER_CLASS:
            apart = boxes.transpose(1, 2).flatten(0, 1), scores.transpose(1, 2).flatten(0, 1)
            keep = self.suppress(apart[0], apart[1].unsqueeze(1), threshold, count)
            keep = keep.view(-1, config.NUM_CLASSES - 1, rois.shape[1]).transpose(1, 2)
        else:
            own = class_ids == torch.arange(config.NUM_CLASSES)  # [B, R, K]
            by_class = torch.where(own, scores, -torch.inf).transpose(1, 2)
            keep = self.suppress(boxes.squeeze(2), by_class, threshold, count)
            keep = keep.any(dim=1).unsqueeze(2)
        scores = scores.masked_fill(~keep, -torch.inf)
        best, scores = _best(scores.flatten(1), count)
        return _take(boxes.flatten(1, 2), best), class_ids.flatten(1).gather(1, best), scores


def _as_size(sides: Sequence[int]) -> Tensor:
    """Sides as a tensor [2]."""
    return torch.stack([torch.scalar_tensor(side, dtype=torch.float64) for side in sides])


def _as_numbers(size: Tensor) -> list[int]:
    """A tensor [2] as numbers, from 1."""
    numbers: Any = [side.long().item() for side in size.unbind()]
    for n in numbers:
        torch._check(n >= 1)
    return numbers


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices and scores of the best of each row, equal ones in their order."""
    ranked = scores.sort(dim=1, descending=True, stable=True)
    return ranked.indices[:, :count], ranked.values[:, :count]


def _take(boxes: Tensor, index: Tensor) -> Tensor:
    """Boxes [B, n, 4] of an index [B, n] in boxes [B, m, 4]."""
    return boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4))


# --- Resizing: what utils.py does in numpy and in Pillow -----------------------------------------


def resize(
    images: Tensor, shape: Sequence[int], size: Tensor, scaled: Tensor, start: Tensor
) -> Tensor:
    """utils.resize to the last grey level, with zeros around it.

    Args:
        images: [B, H, W, C] uint8.
        shape: (height, width) of the result.
        size, scaled, start: [2] of the images, of what they become, and where that begins.

    Returns:
        [B, C, height, width] float32.
    """
    (rows, inside_y), (columns, inside_x) = (
        _taps(shape[i], size[i], scaled[i], start[i]) for i in (0, 1)
    )
    terms = [
        images.index_select(1, y).index_select(2, x) * down.view(-1, 1, 1) * across.view(-1, 1)
        for y, down in rows
        for x, across in columns
    ]
    resized = terms[0] + terms[1] + terms[2] + terms[3]  # in this order: see utils.resize
    low, high = images.flatten(1).amin(1), images.flatten(1).amax(1)
    bounds = (low.double().view(-1, 1, 1, 1), high.double().view(-1, 1, 1, 1))
    resized = torch.minimum(torch.maximum(resized, bounds[0]), bounds[1]).floor()
    resized = resized * (inside_y[:, None] & inside_x).unsqueeze(2)
    return resized.permute(0, 3, 1, 2).float()


def _taps(
    count: int, size: Tensor, scaled: Tensor, start: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The two samples beside each pixel of a side, their weights, and which pixels are inside."""
    place = torch.arange(count, dtype=torch.float64) - start
    position = (place + 0.5) * (size / scaled) - 0.5
    lower = position.floor()
    fraction = position - lower
    lower_weight = torch.where(lower >= 0, 1 - fraction, 0)
    upper_weight = torch.where(lower + 1 < size, fraction, 0)
    last = (size - 1).long()
    taps = [
        (torch.minimum(index.long().clamp(min=0), last), weight)
        for index, weight in ((lower, lower_weight), (lower + 1, upper_weight))
    ]
    return taps, (place >= 0) & (place < scaled)


def pillow_weights(old: int, new: int, scale: Tensor) -> Tensor:
    """The weights [new, old] of pixels in Pillow's bilinear resizing, in units of 2^-22.

    Source: precompute_coeffs and normalize_coeffs_8bpc of Pillow's Resample.c.
    """
    support = scale.clamp(min=1)
    center = ((torch.arange(new, dtype=torch.float64) + 0.5) * scale).unsqueeze(1)
    pixel = torch.arange(old, dtype=torch.float64)
    reached = (pixel >= (center - support + 0.5).floor()) & (
        pixel < (center + support + 0.5).floor()
    )
    weights = (1 - ((pixel - center + 0.5) * (1 / support)).abs()).clamp(min=0) * reached
    return (weights / weights.sum(dim=1, keepdim=True) * 2**22 + 0.5).floor()


def pillow_round(sums: Tensor) -> Tensor:
    """The grey levels of sums of pillow_weights times grey levels."""
    return ((sums + 2**21) / 2**22).floor().clamp(0, 255)
