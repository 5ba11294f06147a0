"""Mask R-CNN (He et al. 2017, arXiv:1703.06870) on a ResNet feature pyramid.

Top-down in the order of the data: ResNet, feature pyramid, region proposals, RoIAlign, the two
heads, and `MaskRCNN`, which ties them together; detections.py makes results of what the heads say,
targets.py and losses.py are for training. By default the arithmetic is that of Matterport's Keras
model, so that its published weights give its detections; presets.py has that of other libraries.
"The port" is multimodallearning/pytorch-mask-rcnn, whose state_dict keys these are.

Letters in shapes: B images, A anchors of an image, R rois of the batch, N detections, K classes,
C channels, H W image, h w feature map, P pooled size, M mask size.
Frames of boxes (y1, x1, y2, x2): image (pixels of the user's image), network (pixels of the padded
network input) and unit (network pixels scaled so that 0 and 1 are the corner pixels of the input;
see utils.norm_boxes). BOX_FRAME stands for the unit frame or, with ROI_ALIGN "roi_align", for
network pixels.
"""

import contextlib
import copy
import itertools
import logging
import math
import re
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoints
import fused
import tiles
import training
import utils
import weights
from augmentation import Augmentation
from config import BACKBONE_OPTIONS, RESNETS, Config
from dataset import check_batch
from detections import (
    Objects,
    Prediction,
    Rois,
    RPNOutput,
    as_result,
    refine_detections,
    unmold,
)
from fused import convolve, deconvolve, dense
from losses import (
    mrcnn_bbox_loss,
    mrcnn_class_loss,
    mrcnn_mask_loss,
    rpn_bbox_loss,
    rpn_class_loss,
)
from nms import nms
from roialign import crop_and_resize, roi_align
from targets import RoiTargets, RPNTargets, build_rpn_targets, sample_rois

logger = logging.getLogger(__name__)


############################################################
#  ResNet (He et al. 2015, arXiv:1512.03385)
############################################################


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the momentum of Keras and the state_dict keys of the port."""

    def __init__(self, channels: int, eps: float = 0.001) -> None:
        super().__init__(channels, eps=eps, momentum=0.01)
        # The port's files are older than this buffer, and a fixed momentum has no use for it.
        self.num_batches_tracked = None

    # torch's own version would put num_batches_tracked into state_dicts that lack it.
    _load_from_state_dict = nn.Module._load_from_state_dict


def batch_norm(wanted: bool, channels: int, config: Config) -> BatchNorm2d | None:
    """The BatchNorm of a layer of the pyramid or the heads, if they have one."""
    return BatchNorm2d(channels, config.HEAD_BATCH_NORM_EPS) if wanted else None


class Convolution(nn.Sequential):
    """A convolution and, if there is one, its BatchNorm, which may be kept elsewhere."""

    def forward(self, x: Tensor, norm: nn.Module | None = None, relu: bool = False) -> Tensor:
        modules: list[Any] = list(self)
        return convolve(modules[0], x, modules[1] if len(modules) == 2 else norm, relu)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution around a shortcut.

    Where the stride is belongs to the weights, see MaskRCNN.set_backbone.
    """

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride=stride)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1)
        self.bn3 = BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = Convolution(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride), BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = convolve(self.conv1, x, self.bn1, relu=True)
        x = convolve(self.conv2, x, self.bn2, relu=True)
        return convolve(self.conv3, x, self.bn3, relu=True, add=shortcut)


class Stem(nn.Sequential):
    """7 x 7 convolution, BatchNorm, ReLU and pooling."""

    def forward(self, x: Tensor) -> Tensor:
        modules: list[Any] = list(self)
        if len(modules) != 4 or type(modules[2]) is not nn.ReLU or fused.is_watched(modules[2]):
            return super().forward(x)  # somebody changed or watches it
        conv, norm, _, pool = modules
        return pool(convolve(conv, x, norm, relu=True))


class StemPool(nn.MaxPool2d):
    """The 3 x 3 pooling of stride 2 after conv1; see MaskRCNN.set_backbone for its border."""


def resnet(
    blocks: Sequence[int],
    width: int = 64,
    in_channels: int = 3,
    groups: int = 1,
    width_per_group: int = 64,
) -> list[nn.Module]:
    """The stages C1..C5 of a ResNet or ResNeXt with bottleneck blocks.

    Args:
        blocks: blocks in C2, C3, C4 and C5.
        width: channels of C1; C2..C5 have 4, 8, 16 and 32 times as many.
        in_channels: channels of the image.
        groups: of the 3 x 3 convolutions (ResNeXt, arXiv:1611.05431).
        width_per_group: channels of each group in C2, where width is 64.

    Returns:
        Five modules, to be applied one after the other, of stride 4, 1, 2, 2 and 2.
    """
    stages: list[nn.Module] = [
        Stem(
            nn.Conv2d(in_channels, width, 7, stride=2, padding=3),
            BatchNorm2d(width),
            nn.ReLU(inplace=True),
            # TensorFlow's SAME padding: on an even map the last window hangs over the edge.
            StemPool(3, stride=2, ceil_mode=True),
        )
    ]
    channels = width
    for stage, count in enumerate(blocks):
        stage_width = width * 2**stage
        inner = stage_width * width_per_group // 64 * groups
        layers = []
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Bottleneck(channels, inner, 4 * stage_width, stride, groups))
            channels = 4 * stage_width
        stages.append(nn.Sequential(*layers))
    return stages


def build_backbone(config: Config) -> list[nn.Module]:
    """C1..C5 as config.BACKBONE asks."""
    backbone = config.option("BACKBONE")
    if isinstance(backbone, str):
        backbone = RESNETS[backbone]
    if isinstance(backbone, dict):
        return resnet(**backbone, in_channels=config.IMAGE_CHANNEL_COUNT)
    stages = list(backbone(config))
    if len(stages) != 5:
        raise ValueError(f"BACKBONE must return the five modules C1..C5, got {len(stages)}")
    return stages


############################################################
#  Feature pyramid (Lin et al. 2016, arXiv:1612.03144)
############################################################


class FPN(nn.Module):
    """Bottom-up backbone and top-down pyramid.

    Args:
        stages: the modules C1..C5; C2..C5 must have the strides 4, 8, 16 and 32.
        config: channels of the image and of P2..P6, and whether the latter have a BatchNorm.
    """

    def __init__(self, stages: Sequence[nn.Module], config: Config) -> None:
        super().__init__()
        self.C1, self.C2, self.C3, self.C4, self.C5 = stages
        c2, c3, c4, c5 = self._channels(config.IMAGE_CHANNEL_COUNT)
        channels = config.TOP_DOWN_PYRAMID_SIZE

        def norm() -> BatchNorm2d | None:
            return batch_norm(config.FPN_BATCH_NORM, channels, config)

        def smooth() -> Convolution:
            # The port: a padding layer came first, hence the key P2_conv2.1.weight.
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            return Convolution(OrderedDict({"1": conv}))

        self.P5_conv1, self.P5_bn1 = nn.Conv2d(c5, channels, 1), norm()
        self.P5_conv2, self.P5_bn2 = smooth(), norm()
        self.P4_conv1, self.P4_bn1 = nn.Conv2d(c4, channels, 1), norm()
        self.P4_conv2, self.P4_bn2 = smooth(), norm()
        self.P3_conv1, self.P3_bn1 = nn.Conv2d(c3, channels, 1), norm()
        self.P3_conv2, self.P3_bn2 = smooth(), norm()
        self.P2_conv1, self.P2_bn1 = nn.Conv2d(c2, channels, 1), norm()
        self.P2_conv2, self.P2_bn2 = smooth(), norm()

    @torch.no_grad()
    def _channels(self, in_channels: int) -> list[int]:
        """Channels of C2..C5, read off a run on a small image, whose strides are checked too."""
        training = self.training
        side = 64
        maps = self.eval().bottom_up(torch.zeros(1, in_channels, side, side))
        self.train(training)
        strides = [side // x.shape[2] for x in maps]
        if strides != [4, 8, 16, 32]:
            raise ValueError(f"C2..C5 of BACKBONE must have strides 4, 8, 16, 32, got {strides}")
        return [x.shape[1] for x in maps]

    def bottom_up(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """C2..C5 of images [B, C, H, W], which are normalised (see MaskRCNN.normalize)."""
        x, maps = images, []
        for stage in (self.C1, self.C2, self.C3, self.C4, self.C5):
            # Below the first stage that learns, all run as in detection, without a graph.
            learns = x.requires_grad or any(p.requires_grad for p in stage.parameters())
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                x = stage(x)
            maps.append(x)
        _, c2, c3, c4, c5 = maps
        return c2, c3, c4, c5

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """P2..P6 of normalised images [B, C, H, W], whose sides are multiples of 32."""
        c2, c3, c4, c5 = self.bottom_up(images)
        p5 = convolve(self.P5_conv1, c5, self.P5_bn1)
        p4 = convolve(self.P4_conv1, c4, self.P4_bn1, add=F.interpolate(p5, scale_factor=2.0))
        p3 = convolve(self.P3_conv1, c3, self.P3_bn1, add=F.interpolate(p4, scale_factor=2.0))
        p2 = convolve(self.P2_conv1, c2, self.P2_bn1, add=F.interpolate(p3, scale_factor=2.0))
        del c2, c3, c4, c5
        p2, p3 = self.P2_conv2(p2, self.P2_bn2), self.P3_conv2(p3, self.P3_bn2)
        p4, p5 = self.P4_conv2(p4, self.P4_bn2), self.P5_conv2(p5, self.P5_bn2)
        p6 = p5[:, :, ::2, ::2]  # for the largest anchors only
        return p2, p3, p4, p5, p6


############################################################
#  Region proposals (Ren et al. 2015, arXiv:1506.01497)
############################################################


class RPN(nn.Module):
    """Region proposal network, applied to one pyramid level at a time."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels, stride = config.RPN_CHANNELS, config.RPN_ANCHOR_STRIDE
        in_channels = config.TOP_DOWN_PYRAMID_SIZE
        self.anchors_per_cell = len(config.RPN_ANCHOR_RATIOS)
        for layer in range(config.RPN_CONV_LAYERS):
            last = layer == config.RPN_CONV_LAYERS - 1
            strided = last and stride > 1  # then same_pad pads, by the size of the map
            conv = nn.Conv2d(in_channels, channels, 3, stride if last else 1, 0 if strided else 1)
            name = f"conv_shared{layer + 1}" if layer else "conv_shared"
            self.add_module(name, conv)
            in_channels = channels
        logits = 2 if config.RPN_SCORE == "softmax" else 1
        self.conv_class = nn.Conv2d(channels, logits * self.anchors_per_cell, 1)
        self.conv_bbox = nn.Conv2d(channels, 4 * self.anchors_per_cell, 1)

    def shared(self) -> list[nn.Conv2d]:
        """The convolutions before the two outputs."""
        layers: Any = dict(self.named_children())
        return [layers[name] for name in layers if name.startswith("conv_shared")]

    def forward(self, x: Tensor) -> RPNOutput:
        """Logits and deltas of the anchors of a map [B, C, h, w], in the order of the anchors."""
        for conv in self.shared():
            x = convolve(conv, x if conv.stride == (1, 1) else same_pad(x, conv), relu=True)
        batch, anchors = x.shape[0], self.anchors_per_cell
        logits = convolve(self.conv_class, x, exact=True).permute(0, 2, 3, 1)
        deltas = convolve(self.conv_bbox, x, exact=True).permute(0, 2, 3, 1)
        return RPNOutput(
            logits.reshape(batch, -1, self.conv_class.out_channels // anchors),
            deltas.reshape(batch, -1, 4),
        )

    def at(
        self, features: Sequence[Tensor], image_index: Tensor, anchor_index: Tensor
    ) -> RPNOutput:
        """Logits [S, 1 or 2] and deltas [S, 4] of some anchors of P2..P6, for the losses.

        A gradient through forward would pass all cells of the maps, nearly all of it zeros: a
        quarter of the work of a training step.

        Args:
            features: P2..P6, each [B, C, h, w].
            image_index: [S] int64.
            anchor_index: [S] int64, as in the output of forward for all levels in turn.
        """
        *hidden, conv = self.shared()
        for layer in hidden:
            features = [convolve(layer, feature, relu=True) for feature in features]
        ratios = self.anchors_per_cell
        logits = self.conv_class.out_channels // ratios
        ratio, cells = anchor_index % ratios, anchor_index // ratios
        (size, _), (stride, _) = conv.kernel_size, conv.stride
        reach = torch.arange(size, device=cells.device)
        patches = features[0].new_empty(len(cells), size, size, features[0].shape[1])
        start = 0
        for feature in features:
            height, width = (math.ceil(n / stride) for n in feature.shape[2:])
            end = start + height * width
            members = ((cells >= start) & (cells < end)).nonzero()
            y = (cells[members] - start) // width * stride + reach  # [M, size]
            x = (cells[members] - start) % width * stride + reach
            padded = same_pad(feature, conv).permute(0, 2, 3, 1)
            rows = image_index[members[:, :, None]] * padded.shape[1] + y[:, :, None]
            pixels = (rows * padded.shape[2] + x[:, None]).flatten()
            # Not padded[...]: the gradient of that depends on which thread comes first.
            found = padded.flatten(0, 2).index_select(0, pixels)
            patches[members[:, 0]] = found.view(-1, size, size, found.shape[1])
            start = end
        x = F.relu(F.conv2d(patches.permute(0, 3, 1, 2), conv.weight, conv.bias), inplace=True)
        rows = torch.arange(len(cells), device=cells.device)
        return RPNOutput(
            self.conv_class(x).view(-1, ratios, logits)[rows, ratio],
            self.conv_bbox(x).view(-1, ratios, 4)[rows, ratio],
        )


def same_pad(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Pads as TensorFlow's SAME: ceil(size / stride) outputs, an odd pixel goes to the end."""
    padding: list[int] = []
    for size, kernel, stride in zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        padding = [total // 2, total - total // 2, *padding]
    return F.pad(x, padding)


def refine_anchors(anchors: Tensor, deltas: Tensor, region: Tensor, config: Config) -> Tensor:
    """Anchors [N, 4], the BOX_FRAME, moved by RPN deltas [N, 4] and clipped to a region [4]."""
    std_dev = anchors.new_tensor(config.RPN_BBOX_STD_DEV)
    boxes = utils.apply_box_deltas(anchors, deltas * std_dev, config.BBOX_LOG_SCALE_LIMIT)
    return utils.clip_boxes(boxes, region)


@torch.no_grad()
def proposal_layer(
    rpn: RPNOutput,
    anchors: Tensor,
    regions: Tensor,
    level_sizes: Sequence[int],
    count: int,
    config: Config,
) -> Rois:
    """The anchors of highest foreground score, refined, clipped and without near duplicates.

    Args:
        rpn: the output for all levels.
        anchors: [A, 4] float32, the BOX_FRAME.
        regions: [B, 4] the BOX_FRAME, to which the proposals of each image are clipped.
        level_sizes: anchors of each level.
        count: proposals to keep per image.
    """
    logits = rpn.logits.float()
    ranks = logits.softmax(dim=2)[:, :, 1] if config.RPN_SCORE == "softmax" else logits[:, :, 0]
    scores = ranks.sigmoid() if config.RPN_SCORE == "sigmoid" else ranks
    rivals = level_sizes if config.RPN_PER_LEVEL else [len(anchors)]
    boxes, image_index = [], []
    for image, region in enumerate(regions):
        kept, kept_scores = [], []
        for start, level_ranks in zip(
            itertools.accumulate(rivals, initial=0), ranks[image].split(list(rivals)), strict=False
        ):
            limit = min(config.PRE_NMS_LIMIT, len(level_ranks))
            top = level_ranks.topk(limit, sorted=False).indices.sort().values
            # By rank, then in anchor order: nms breaks ties of scores by position.
            top = start + top[level_ranks[top].argsort(descending=True, stable=True)]
            refined = refine_anchors(anchors[top], rpn.deltas[image, top], region, config)
            large = utils.are_larger(refined, config.RPN_MIN_SIZE)
            refined, level_scores = refined[large], scores[image, top[large]]
            keep = nms(refined, level_scores, config.RPN_NMS_THRESHOLD)[:count]
            kept.append(refined[keep])
            kept_scores.append(level_scores[keep])
        best = torch.cat(kept_scores).argsort(descending=True, stable=True)[:count]
        boxes.append(torch.cat(kept)[best])
        image_index.append(torch.full_like(best, image))
    return Rois(torch.cat(boxes), torch.cat(image_index))


############################################################
#  RoIAlign over the pyramid
############################################################


def roi_levels(boxes: Tensor, image_shape: Sequence[int], config: Config) -> Tensor:
    """The pyramid level, 2 to 5, of boxes [R, 4], the BOX_FRAME; [R] float.

    Source: FPN paper, equation 1.
    """
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # A box of 224 x 224 pixels belongs to P4. log(0) = -inf is clamped to P2.
    unit = config.BOX_FRAME == "unit"
    side = 224.0 / torch.sym_sqrt(image_shape[0] * image_shape[1]) if unit else 224.0
    levels = 4 + ((height * width).sqrt() / side).log2() + config.ROI_LEVEL_OFFSET
    return levels.floor().clamp(2, 5)


def pyramid_roi_align(
    features: Sequence[Tensor],
    rois: Rois,
    pool_size: int,
    image_shape: Sequence[int],
    config: Config,
) -> Tensor:
    """Crops each roi from the pyramid level that suits its size, as ROI_ALIGN says.

    Args:
        features: P2..P5, each [B, C, h, w].
        rois: boxes to crop; no gradient flows to them.
        pool_size: P.
        image_shape: (height, width) of the network input.

    Returns:
        [R, C, P, P], in the order of the rois.
    """
    boxes = rois.boxes.detach()
    unit = config.BOX_FRAME == "unit"
    if unit:
        # A box may end at the border, 1.0. Rounding must not carry its last sample beyond, where
        # the crop is 0: which boxes lose a row or column that way would depend on their last bits.
        boxes = boxes.clamp(max=1 - 2**-22)
    levels = roi_levels(boxes, image_shape, config)
    boxes = boxes.to(torch.promote_types(boxes.dtype, features[0].dtype))
    # As the maps, which convolutions that follow take without a copy.
    last = features[0].is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    shape = boxes.shape[0], features[0].shape[1], pool_size, pool_size
    pooled = torch.empty(shape, dtype=boxes.dtype, device=boxes.device, memory_format=layout)
    for level, feature in enumerate(features, start=2):
        members = (levels == level).nonzero()[:, 0]
        some, index = boxes[members], rois.image_index[members]
        if unit:
            pooled[members] = crop_and_resize(feature, some, index, pool_size, pool_size)
        else:
            cells, samples = some / 2**level, config.ROI_SAMPLING_RATIO
            pooled[members] = roi_align(
                feature, cells, index, pool_size, pool_size, samples, config.ROI_ALIGNED
            )
    return pooled


############################################################
#  Heads
############################################################


class Classifier(nn.Module):
    """Class scores and class-specific box deltas of rois.

    The fully connected layers are convolutions, as in Matterport's model.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        pyramid, channels = config.TOP_DOWN_PYRAMID_SIZE, config.FPN_CLASSIF_FC_LAYERS_SIZE
        self.convs = nn.ModuleList()
        for _ in range(config.CLASSIFIER_CONV_LAYERS):
            layers: list[Any] = [nn.Conv2d(pyramid, pyramid, 3, padding=1)]
            layers += filter(None, [batch_norm(config.HEAD_CONV_BATCH_NORM, pyramid, config)])
            self.convs.append(Convolution(*layers))
        norm = config.HEAD_FC_BATCH_NORM
        self.conv1 = nn.Conv2d(pyramid, channels, config.POOL_SIZE)
        self.bn1 = batch_norm(norm, channels, config)
        self.conv2: nn.Conv2d | None = None
        if config.CLASSIFIER_FC_LAYERS == 2:
            self.conv2 = nn.Conv2d(channels, channels, 1)
            self.bn2 = batch_norm(norm, channels, config)
        self.linear_class = nn.Linear(channels, config.NUM_CLASSES)
        self.linear_bbox = nn.Linear(channels, 4 * config.NUM_CLASSES)

    def forward(
        self, features: Sequence[Tensor], rois: Rois, image_shape: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Class logits [R, K] and deltas [R, K, 4] of the rois in P2..P5."""
        x = pyramid_roi_align(features, rois, self.config.POOL_SIZE, image_shape, self.config)
        for conv in self.convs:
            x = conv(x, relu=True)
        x = dense(self.conv1, x, self.bn1)
        if self.conv2 is not None:
            x = dense(self.conv2, x, self.bn2)
        x = x.flatten(1).to(self.linear_class.weight.dtype)  # [R, C]
        with torch.autocast(x.device.type, enabled=False):  # 16 bits are too few for results
            return self.linear_class(x), self.linear_bbox(x).unflatten(1, (-1, 4))


class Mask(nn.Module):
    """Mask logits of boxes for one class each."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        channels = config.TOP_DOWN_PYRAMID_SIZE
        for layer in range(1, 5):
            self.add_module(f"conv{layer}", nn.Conv2d(channels, channels, 3, padding=1))
            norm = batch_norm(config.HEAD_CONV_BATCH_NORM, channels, config)
            self.register_module(f"bn{layer}", norm)
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv5 = nn.Conv2d(channels, config.NUM_CLASSES, 1)

    def forward(
        self, features: Sequence[Tensor], rois: Rois, class_ids: Tensor, image_shape: Sequence[int]
    ) -> Tensor:
        """Logits [R, M, M] of the class class_ids [R] of each roi in P2..P5."""
        x = pyramid_roi_align(features, rois, self.config.MASK_POOL_SIZE, image_shape, self.config)
        layers: Any = dict(self.named_children())
        for layer in range(1, 5):
            x = convolve(layers[f"conv{layer}"], x, layers.get(f"bn{layer}"), relu=True)
        x = deconvolve(self.deconv, x).to(self.conv5.weight.dtype)  # [R, P, P, 2, 2, C]
        # conv5 for the wanted class of each roi only, one of K.
        # Not weight[class_ids]: the gradient of that depends on which thread comes first.
        weight = self.conv5.weight.flatten(1).index_select(0, class_ids)  # [R, C]
        assert self.conv5.bias is not None
        logits = (x.flatten(1, 4) @ weight[:, :, None]).view(x.shape[:5])
        logits = logits.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return logits + self.conv5.bias[class_ids, None, None]


############################################################
#  Mask R-CNN
############################################################


# What set_trainable's names stand for.
HEADS = r"fpn\.P.*|rpn\..*|classifier\..*|mask\..*"
LAYERS = {
    "heads": HEADS,
    "3+": rf"fpn\.C[345]\..*|{HEADS}",
    "4+": rf"fpn\.C[45]\..*|{HEADS}",
    "5+": rf"fpn\.C5\..*|{HEADS}",
    "all": ".*",
}


class MaskRCNN(nn.Module):
    """The whole network.

    Args:
        config: checked and kept; some of its options are read again in each call.
        model_dir: folder for the logs and checkpoints of training; made when first written to.
        mode: "training" or "inference", as Matterport has it; None is "training". Later on,
            model.train() and model.eval() change it.

    Raises:
        ValueError: the config contradicts itself, or there is no such mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: Config, model_dir: str | Path = "logs", mode: str | None = None
    ) -> None:
        super().__init__()
        config.validate()
        if mode not in (None, "training", "inference"):
            raise ValueError(f"mode must be 'training' or 'inference', got {mode!r}")
        self.config = config
        self.model_dir = Path(model_dir)
        self.fpn = FPN(build_backbone(config), config)
        self.rpn = RPN(config)
        self.classifier = Classifier(config)
        self.mask = Mask(config)
        channels = config.IMAGE_CHANNEL_COUNT
        self.register_buffer("mean", torch.empty(channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(channels, 1, 1), persistent=False)
        self.run = checkpoints.Run()
        self._anchors: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._initialize_weights()
        self.set_backbone({})
        self.train(mode != "inference")

    def _initialize_weights(self) -> None:
        """Glorot's uniform distribution and zero biases, as Keras does."""
        # A backbone of one's own brings its weights.
        own = self._stages() if callable(self.config.option("BACKBONE")) else []
        brought = {module for stage in own for module in stage.modules()}
        for module in self.modules():
            if module in brought:
                continue
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _stages(self) -> list[nn.Module]:
        return [self.fpn.C1, self.fpn.C2, self.fpn.C3, self.fpn.C4, self.fpn.C5]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def train(self, mode: bool = True, *arguments: Any, **options: Any) -> "MaskRCNN":
        """Training mode, in which BatchNorm stays frozen unless config.TRAIN_BN.

        Raises:
            TypeError: a data set, with which Matterport's train() began to train.
        """
        if not isinstance(mode, bool) or arguments or options:
            raise TypeError(
                "train() takes True or False, as in any module of PyTorch; to train on data use"
                " train_model(train_dataset, val_dataset, learning_rate, epochs, layers)"
            )
        super().train(mode)
        if mode and not self.config.TRAIN_BN:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    # --- From images to detections, or to losses

    def forward(
        self, images: Tensor, targets: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor] | Prediction:
        """The losses of a batch, or, without targets, what predict() finds in it.

        Args:
            images: [B, C, H, W] uint8, or float32 of 0..255 in the mode "shortest_edge"; sides
                multiples of IMAGE_SIZE_DIVISOR.
            targets: for each image a dict as dataset.py makes it, of tensors on any device:
                class_ids [N] int64, 1..K-1, negative for crowds;
                boxes [N, 4] float32, network pixels, of positive height and width;
                masks [N, h, w] bool, cut to the boxes and of MINI_MASK_SHAPE if USE_MINI_MASK,
                else of the network input; and, if present,
                active_class_ids [K] bool, the classes of the image's data set (default: all);
                window [4] float32, network pixels, the part that shows the image (default: all);
                rois [M, 4] float32, network pixels, for which to train the heads unless
                USE_RPN_ROIS. Other keys are ignored.

        Returns:
            rpn_class_loss, rpn_bbox_loss, mrcnn_class_loss, mrcnn_bbox_loss and mrcnn_mask_loss in
            this order, each a number times its LOSS_WEIGHTS; their sum is to be minimised.

        Raises:
            TypeError, ValueError: images or targets of another kind; says which and why.
        """
        check_batch(images, targets, self.config)
        images = images.to(self.device)
        if targets is None:
            if self.training:
                raise ValueError("training mode needs targets; call model.eval() to predict")
            return self.predict(images, self._whole(len(images), images.shape[2:]))
        image_shape = images.shape[2:]
        windows = self._whole(len(images), image_shape)
        for window, target in zip(windows, targets, strict=True):
            if "window" in target:
                window.copy_(self.to_frame(target["window"], image_shape))
        every_class = torch.ones(self.config.NUM_CLASSES, dtype=torch.bool)
        active = [target.get("active_class_ids", every_class).to(self.device) for target in targets]
        with self._fast(detects=False):
            features = self.fpn(self.normalize(images))
            with torch.no_grad():
                _, proposals = self.propose(features, image_shape, windows)
            rpn_targets, roi_targets = self._build_targets(targets, proposals, image_shape)
            return self.compute_losses(
                features, image_shape, rpn_targets, roi_targets, torch.stack(active)
            )

    @torch.no_grad()
    def predict(self, images: Tensor, windows: Tensor) -> Prediction:
        """Runs all stages on molded images, see mold_inputs; `detect` is the friendlier way.

        Args:
            images: [B, C, H, W] as in forward, on the model's device.
            windows: [B, 4] float32, the BOX_FRAME, the part of each that shows the image.
        """
        with self._fast(detects=True):
            image_shape = images.shape[2:]
            *features, p6 = self.fpn(self.normalize(images))
            rpn, proposals = self.propose([*features, p6], image_shape, windows)
            features = [feature.to(self.mean.dtype) for feature in features]  # RoIAlign is exact
            class_logits, class_deltas = self.classifier(features, proposals, image_shape)
            class_probs = class_logits.float().softmax(dim=1)
            detections = refine_detections(
                proposals, class_probs, class_deltas, windows, self.config
            )
            rois = Rois(detections.boxes, detections.image_index)
            mask_logits = self.mask(features, rois, detections.class_ids, image_shape)
            return Prediction(
                rpn, proposals, class_probs, class_deltas, detections, mask_logits.float().sigmoid()
            )

    def _fast(self, detects: bool) -> contextlib.AbstractContextManager[Any]:
        """Inside, the network is as fast as it can be on this device and the config allows.

        Raises:
            ValueError: CPU_PRECISION asks for what this processor does not have.
        """
        config = self.config
        if self.device.type == "cuda" and detects and config.CUDA_PRECISION != "float32":
            return torch.autocast("cuda", getattr(torch, config.CUDA_PRECISION))
        if self.device.type != "cpu":
            return contextlib.nullcontext()
        if config.CPU_PRECISION == "bfloat16" and detects:
            if not self._keeps_to_itself(hooks=True):
                raise ValueError(
                    "CPU_PRECISION 'bfloat16' needs the layers of this library in model.fpn, got"
                    " others; use 'float32'"
                )
            if not fused.can_use_bfloat16():
                raise ValueError(
                    "CPU_PRECISION 'bfloat16' needs a processor with AVX512-BF16 or AMX, got one of"
                    f" {torch.backends.cpu.get_cpu_capability()}; use 'float32'"
                )
            return fused.fast(self._keeps_to_itself(), torch.bfloat16)
        return (
            fused.fast(self._keeps_to_itself()) if config.CPU_WINOGRAD else contextlib.nullcontext()
        )

    def _keeps_to_itself(self, hooks: bool = False) -> bool:
        """Whether nothing but this file sees the maps of the ResNet and the pyramid.

        Then sums may be made in place: no module there is of another kind, and no hook is set,
        unless hooks are allowed.
        """
        kinds = {FPN, Stem, Bottleneck, Convolution, StemPool, BatchNorm2d}
        kinds |= {nn.Sequential, nn.Conv2d, nn.ReLU}
        modules = list(self.fpn.modules())
        known = all(type(module) in kinds for module in modules)
        return known and (hooks or not any(map(fused.is_watched, modules)))

    def detect(
        self,
        images: Sequence[np.ndarray],
        verbose: int = 0,
        masks: str = "full",
        tile: Sequence[int] | int | None = None,
        overlap: float | None = None,
    ) -> list[dict[str, Any]]:
        """Finds the objects in images.

        Args:
            images: a list of arrays [H, W, 3] uint8 RGB of any sizes. Grey, RGBA, 16-bit and
                float (0..1) images are converted, see utils.as_uint8_image.
            verbose: 1 prints the sizes, objects and seconds of each batch, or shows a progress bar
                of the windows where there are several.
            masks: "full" for masks at the image's size, "rle" for COCO run-length encoding (small,
                for big images and many objects), "box" for masks at the size of their boxes.
            tile: (height, width) of windows to look at an image in, for large images, or the side
                of squares; None for the config's DETECTION_TILE.
            overlap: of the windows; None for the config's DETECTION_OVERLAP.

        Returns:
            A dict of numpy arrays per image, best score first:
            rois [N, (y1, x1, y2, x2)] int32, image pixels, half-open; boxes [N, 4] float32, the
            same before they were rounded, if MASK_PASTE keeps fractions; class_ids [N] int32;
            scores [N] float32; masks: [H, W, N] bool, or a list of N dicts {"size", "counts"}, or
            a list of N arrays [y2 - y1, x2 - x1] bool, the part in each of rois.

        Raises:
            TypeError, ValueError: an image that cannot be understood.
        """
        if masks not in ("full", "rle", "box"):
            raise ValueError(f"masks must be 'full', 'rle' or 'box', got {masks!r}")
        if not isinstance(images, (list, tuple)):
            raise TypeError(
                f"detect takes a list of images, got {type(images).__name__}; use detect([image])"
            )
        channels = self.config.IMAGE_CHANNEL_COUNT
        depth = self.config.IMAGE_BIT_DEPTH
        images = [utils.as_uint8_image(image, channels, depth) for image in images]
        views = [tiles.views(image.shape, self.config, tile, overlap) for image in images]
        # Views of one size share a batch: so each image gives what it gives alone.
        batches = defaultdict(list)
        square = self.config.IMAGE_RESIZE_MODE == "square"
        for i, view in ((i, view) for i, several in enumerate(views) for view in several):
            shape = view.cut(images[i]).shape
            batches[view.scale, "square" if square else shape].append((i, view))

        results: list[dict[str, Any]] = [{} for _ in images]
        found: list[list[Any]] = [[] for _ in images]
        size, whole = self.config.BATCH_SIZE, max(map(len, views), default=1) == 1
        total = sum(map(len, views))
        hidden = whole or not verbose
        bar = utils.progress(total=total, unit="window", leave=False, disable=hidden)
        wanted = copy.copy(self.config)
        with utils.evaluating(self), bar, self._doubting():
            for (scale, _), members in batches.items():
                for start in range(0, len(members), size):
                    batch = members[start : start + size]
                    cuts = [view.cut(images[i]) for i, view in batch]
                    detected = self._detect_batch(cuts, scale, verbose if whole else 0)
                    for (i, view), objects in zip(batch, detected, strict=True):
                        found[i].append((view, view.place(objects)))
                        if len(found[i]) == len(views[i]):
                            merged = tiles.merge(found[i], images[i].shape, wanted)
                            found[i] = []
                            results[i] = as_result(merged, images[i].shape, masks)
                    bar.update(len(batch))
        return results

    @contextlib.contextmanager
    def _doubting(self) -> Iterator[None]:
        """Inside, views that vote find objects of low scores too, since others may be surer."""
        config, confidence = self.config, self.config.DETECTION_MIN_CONFIDENCE
        if len(config.DETECTION_SCALES) > 1 or config.DETECTION_FLIPS:
            config.DETECTION_MIN_CONFIDENCE = min(confidence, tiles.VIEW_CONFIDENCE)
        try:
            yield
        finally:
            config.DETECTION_MIN_CONFIDENCE = confidence

    def _detect_batch(self, images: list[np.ndarray], scale: float, verbose: int) -> list[Objects]:
        start = time.perf_counter()
        molded, windows = self.mold_inputs(images, scale)
        prediction = self.predict(molded, windows)
        found = [
            unmold(prediction, i, image.shape, windows[i], self.config)
            for i, image in enumerate(images)
        ]
        if verbose:
            shapes = ", ".join(f"{image.shape[0]}x{image.shape[1]}" for image in images)
            counts = ", ".join(str(len(objects.scores)) for objects in found)
            seconds = time.perf_counter() - start
            print(f"images {shapes}: {counts} objects in {seconds:.2f} s")
        return found

    def mold_inputs(
        self, images: Sequence[np.ndarray], scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Resizes and pads images, which must come to one shape, and stacks them.

        Args:
            images: arrays [H, W, C] uint8.
            scale: times the size that the config gives them.

        Returns:
            images [B, C, H, W] on the model's device, uint8, or float32 in the mode
            "shortest_edge"; and windows [B, 4] float32, the BOX_FRAME, the part of each that shows
            the image.
        """
        if self.config.IMAGE_RESIZE_MODE == "crop":
            raise ValueError("IMAGE_RESIZE_MODE 'crop' is for training; detect with 'square'")
        resized = [utils.resize_to_network(image, self.config, zoom=scale) for image in images]
        molded = torch.from_numpy(np.stack([item.image for item in resized]))
        corners = torch.tensor([item.window for item in resized])
        windows = self.to_frame(corners, molded.shape[1:3])
        return molded.to(self.device).permute(0, 3, 1, 2), windows

    def to_frame(self, boxes: Tensor, image_shape: Sequence[int]) -> Tensor:
        """Boxes [N, 4] from network pixels to the BOX_FRAME, float32, on the model's device."""
        boxes = boxes.to(self.device)
        unit = self.config.BOX_FRAME == "unit"
        return utils.norm_boxes(boxes, image_shape) if unit else boxes.float()

    def _whole(self, count: int, image_shape: Sequence[int]) -> Tensor:
        """The whole network input as a box of the BOX_FRAME, for each of some images [count, 4]."""
        box = torch.tensor([[0, 0, *image_shape[:2]]])
        return self.to_frame(box, image_shape).repeat(count, 1)

    def normalize(self, images: Tensor) -> Tensor:
        """Network input of images [B, C, H, W]: float32, minus the mean, over the std."""
        return (images - self.mean) / self.std

    def propose(
        self,
        features: Sequence[Tensor],
        image_shape: Sequence[int],
        windows: Tensor | None = None,
    ) -> tuple[RPNOutput, Rois]:
        """Runs the region proposal network on P2..P6; windows as in predict, None for all."""
        levels = [self.rpn(feature) for feature in features]
        rpn = RPNOutput(
            torch.cat([level.logits for level in levels], dim=1),
            torch.cat([level.deltas for level in levels], dim=1),
        )
        config = self.config
        count = config.POST_NMS_ROIS_TRAINING if self.training else config.POST_NMS_ROIS_INFERENCE
        anchors = self.get_anchors(image_shape)
        if len(anchors) != rpn.logits.shape[1]:
            raise ValueError(
                f"COMPUTE_BACKBONE_SHAPE must give the sizes of P2..P6, {len(anchors)} anchors for"
                f" {tuple(image_shape)} pixels, got {rpn.logits.shape[1]} from the network"
            )
        if windows is None or not config.CLIP_TO_IMAGE:
            windows = self._whole(len(rpn.logits), image_shape)
        sizes = [level.logits.shape[1] for level in levels]
        return rpn, proposal_layer(rpn, anchors, windows, sizes, count, config)

    def get_anchors(self, image_shape: Sequence[int]) -> Tensor:
        """Anchors [A, 4] float32, the BOX_FRAME, for a network input of (height, width) pixels."""
        return self._all_anchors(image_shape)[1]

    def _all_anchors(self, image_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Anchors [A, 4], float64 network pixels, and float32 in the BOX_FRAME."""
        options = self.config.anchor_options(image_shape)
        key = (*image_shape[:2], self.device, str(options))
        if key not in self._anchors:
            pixels = torch.from_numpy(utils.generate_pyramid_anchors(**options)).to(self.device)
            if len(self._anchors) == 8:  # in mode "pad64" each image may have a shape of its own
                self._anchors.pop(next(iter(self._anchors)))
            self._anchors[key] = pixels, self.to_frame(pixels, image_shape)
        return self._anchors[key]

    # --- Losses

    def _build_targets(
        self, targets: Sequence[Mapping[str, Any]], proposals: Rois, image_shape: Sequence[int]
    ) -> tuple[list[RPNTargets], list[RoiTargets]]:
        """What the region proposal network and the heads should say of each image."""
        config = self.config
        anchors, _ = self._all_anchors(image_shape)
        rpn_targets, roi_targets = [], []
        for i, target in enumerate(targets):
            names = ("class_ids", "boxes", "masks")
            class_ids, boxes, masks = (target[name].to(self.device) for name in names)
            rpn_targets.append(build_rpn_targets(anchors, class_ids, boxes, config))
            rois = proposals.boxes[proposals.image_index == i]
            if not config.USE_RPN_ROIS:
                rois = self.to_frame(target["rois"], image_shape)
            framed = self.to_frame(boxes, image_shape)
            roi_targets.append(sample_rois(rois, class_ids, framed, masks, config))
        return rpn_targets, roi_targets

    def compute_losses(
        self,
        features: Sequence[Tensor],
        image_shape: Sequence[int],
        rpn_targets: Sequence[RPNTargets],
        roi_targets: Sequence[RoiTargets],
        active: Tensor,
    ) -> dict[str, Tensor]:
        """Runs the heads on the sampled rois of all images and compares; see forward.

        Args:
            features: P2..P6.
            active: [B, K] bool, the classes that the data set of each image has.
        """
        match = torch.stack([target.match for target in rpn_targets])  # [B, A]
        judged = match.nonzero(as_tuple=True)
        match, rpn = match[judged], self.rpn.at(features, *judged)
        features = features[:4]
        counts = torch.tensor([len(target.rois) for target in roi_targets], device=self.device)
        image_index = torch.arange(len(counts), device=self.device).repeat_interleave(counts)
        rois = Rois(torch.cat([target.rois for target in roi_targets]), image_index)
        class_ids = torch.cat([target.class_ids for target in roi_targets])
        positive = class_ids.nonzero()[:, 0]
        objects = Rois(rois.boxes[positive], rois.image_index[positive])

        class_logits, class_deltas = self.classifier(features, rois, image_shape)
        mask_logits = self.mask(features, objects, class_ids[positive], image_shape)
        rpn_deltas = torch.cat([target.deltas for target in rpn_targets])
        deltas = torch.cat([target.deltas for target in roi_targets])
        masks = torch.cat([target.masks for target in roi_targets])
        losses = {
            "rpn_class_loss": rpn_class_loss(match, rpn.logits),
            "rpn_bbox_loss": rpn_bbox_loss(rpn_deltas, match, rpn.deltas),
            "mrcnn_class_loss": mrcnn_class_loss(class_ids, class_logits, active[image_index]),
            "mrcnn_bbox_loss": mrcnn_bbox_loss(deltas, class_ids, class_deltas),
            "mrcnn_mask_loss": mrcnn_mask_loss(masks, mask_logits),
        }
        factors = self.config.LOSS_WEIGHTS
        return {name: factors.get(name, 1.0) * loss for name, loss in losses.items()}

    # --- Weights

    def set_backbone(self, options: Mapping[str, Any]) -> None:
        """Makes the ResNet compute what its weights were trained with.

        Called by load_weights. Where that is not what the config says, the model gets a config of
        its own, since other models may share the one that it had.

        Args:
            options: some of config.BACKBONE_OPTIONS.

        Raises:
            ValueError: a value that cannot be, or does not fit IMAGE_CHANNEL_COUNT.
        """
        known = {name: getattr(self.config, name) for name in BACKBONE_OPTIONS}
        if weights.plain(known | dict(options)) != weights.plain(known):
            config = copy.copy(self.config)
            vars(config).update(options)
            config.validate()
            self.config = self.classifier.config = self.mask.config = config
        config, std = self.config, self.config.STD_PIXEL
        self.mean.copy_(torch.as_tensor(config.MEAN_PIXEL).view(-1, 1, 1))
        self.std.copy_(torch.as_tensor(1.0 if std is None else std).view(-1, 1, 1))
        for module in itertools.chain.from_iterable(stage.modules() for stage in self._stages()):
            if isinstance(module, BatchNorm2d):
                module.eps = config.BATCH_NORM_EPS
            elif isinstance(module, StemPool):
                same = config.STEM_POOL_PADDING == "same"
                module.padding, module.ceil_mode = (0, True) if same else (1, False)
            elif isinstance(module, Bottleneck):
                # The strides of the first block of C3, C4 and C5 are 2 and 1, or 1 and 2.
                strides = [module.conv1.stride, module.conv2.stride]
                strides.sort(reverse=config.STRIDE_IN_1X1)
                module.conv1.stride, module.conv2.stride = strides

    def load_weights(
        self,
        path: str | Path | weights.WeightFile,
        exclude: Sequence[str] | None = None,
        skip_mismatched: bool = False,
        verbose: bool = True,
        by_name: bool = True,
    ) -> weights.LoadReport:
        """Loads a file of any known format; see weights.load_weights.

        Args:
            path: a weight file, or a name that weights.find_weights knows.
            exclude: modules that keep their weights, by our names or Matterport's.
            skip_mismatched: leave tensors of another shape as they are instead of raising.
            verbose: print what was loaded.
            by_name: Matterport's; tensors are always found by their names.
        """
        if path == "imagenet":
            path = self.config.IMAGENET_MODEL_PATH or path
        return weights.load_weights(self, path, exclude or (), skip_mismatched, verbose)

    @classmethod
    def from_weights(
        cls,
        path: str | Path | weights.WeightFile,
        config: type[Config] | Config = Config,
        exclude: Sequence[str] = (),
        model_dir: str | Path = "logs",
        **options: Any,
    ) -> "MaskRCNN":
        """A model in inference mode with the weights of a file.

        Args:
            path: a name such as "coco", "torchvision_v2" or "nuclei"; a weight file, which tells
                depth, widths, classes and what its family needs, and if it is a checkpoint of ours
                all options; or what weights.read_state_dict made of one.
            config: a class of configuration, which is filled with what the file tells, except for
                options that the class sets itself; or a configuration to be taken as it is.
            exclude: modules that start anew, e.g. those of other classes; see load_weights.
            model_dir: folder for the logs and checkpoints of training.
            options: of config, e.g. DETECTION_MIN_CONFIDENCE=0.5; they win over the file's. Of a
                config or class, config.BACKBONE_OPTIONS do not: they follow the file.

        Raises:
            FileNotFoundError, ValueError: see weights.load_weights.
        """
        if isinstance(config, type):
            if not isinstance(path, weights.WeightFile):
                path = weights.read_state_dict(weights.find_weights(path))
            config = config(**config.unset(weights.read_options(path)) | options)
            given = {name: options[name] for name in BACKBONE_OPTIONS if name in options}
            path = path._replace(config=path.config | given)
        elif options:
            raise TypeError(f"options must be set in the config that is given, got {options}")
        model = cls(config, model_dir)
        report = model.load_weights(path, exclude, verbose=False)
        if report.missing or report.excluded:
            logger.info("%s", report)
        return model.eval()

    # --- Training

    def set_trainable(self, layers: str) -> int:
        r"""Lets training change the chosen layers and no others.

        BatchNorm layers are left out unless config.TRAIN_BN.

        Args:
            layers: "heads" (all but the ResNet), "3+", "4+" or "5+" (also C3, C4 or C5 and up),
                "all", or a regular expression for whole parameter names, e.g. r"mask\..*".

        Returns:
            The number of parameters (tensors) that training changes.

        Raises:
            ValueError: there is none.
        """
        pattern = LAYERS.get(layers, layers)
        frozen = {
            parameter
            for module in self.modules()
            if isinstance(module, nn.BatchNorm2d) and not self.config.TRAIN_BN
            for parameter in module.parameters()
        }
        chosen = {
            name
            for name, parameter in self.named_parameters()
            if re.fullmatch(pattern, name) and parameter not in frozen
        }
        if not chosen:
            raise ValueError(
                f"layers must be one of {', '.join(LAYERS)} or a regular expression that matches"
                f" trainable parameters, got {layers!r}; see model.named_parameters()"
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in chosen)
        logger.info("layers %r: training changes %d parameters", layers, len(chosen))
        return len(chosen)

    def train_model(
        self,
        train_dataset: utils.Dataset,
        val_dataset: utils.Dataset | None,
        learning_rate: float,
        epochs: int,
        layers: str,
        augmentation: Augmentation | None = None,
        callbacks: Sequence[training.Callback] = (),
        evaluate: Callable[["MaskRCNN"], dict[str, float]] | None = None,
    ) -> None:
        """Trains one stage; docs/training.md says what it leaves in log_dir.

        Args:
            train_dataset: prepared.
            val_dataset: prepared, or None. Its losses are computed after each epoch.
            learning_rate: at the beginning, see LR_SCHEDULE.
            epochs: the epoch to train to, counted from the beginning of the run: a second stage of
                10 epochs after one of 20 says 30. A stage that is done returns at once.
            layers: see set_trainable.
            augmentation: of the training images, see dataset.py.
            callbacks: called with the record of each epoch, a dict as in history.jsonl; one that
                returns True ends the stage. Under torchrun in the main process only.
            evaluate: gives numbers for the record, such as coco.py's segm_AP, every
                EVALUATE_EVERY epochs and after the last. Called in all processes; what the main
                one gives counts.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint was saved.
            training.NonFiniteLossError: a loss became NaN or infinite. It names the images.
            ValueError: the data, config or layers do not fit.
            OSError: the last checkpoint could not be written.
        """
        self._fast(detects=True)  # which complains, before the evaluation of the first epoch does
        self.config.CLASS_NAMES = list(train_dataset.class_names)
        self.set_trainable(layers)
        self.train()
        for part in (self.fpn, self.rpn, self.mask):  # a fifth faster than contiguous weights
            part.to(memory_format=torch.channels_last)
        if self.config.COMPILE:
            self.fpn.compile()
        stage = training.Stage(layers, learning_rate, epochs)
        data = training.Data(train_dataset, val_dataset, augmentation)
        training.fit(self, self.run, stage, data, training.Hooks(evaluate, callbacks))

    @property
    def epoch(self) -> int:
        """Finished epochs of the run."""
        return self.run.epoch

    @property
    def log_dir(self) -> Path | None:
        """The folder of the run's checkpoints and logs; None before its first step."""
        return self.run.log_dir

    def find_last(self) -> Path:
        """The newest checkpoint of config.NAME's runs in model_dir that can be read.

        Raises:
            FileNotFoundError, ValueError: there is none, or none can be read.
        """
        return checkpoints.read_last(self.model_dir, self.config.NAME).path

    def resume(self, path: str | Path | weights.WeightFile | None = None) -> Path:
        """Loads a checkpoint of a run so that the next train_model goes on with it.

        On a CPU the run then ends with the bits of one that was never stopped, as long as the
        config and the arguments of train_model stay the same.

        Args:
            path: a file, or what weights.read_state_dict made of it; None for the newest one in
                model_dir that can be read.

        Returns:
            The path of the checkpoint that was loaded.

        Raises:
            FileNotFoundError, ValueError: there is none, or none can be read.
        """
        if path is None:
            path = checkpoints.read_last(self.model_dir, self.config.NAME)
        elif not isinstance(path, weights.WeightFile):
            path = weights.read_state_dict(path)
        self.run.resume(self, path)
        return path.path
