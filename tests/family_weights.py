"""Files of torchvision's and detectron2's networks: random numbers under the published names."""

import functools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

# Blocks of C2 to C5, and channels of the 3 x 3 convolutions of C2 and their groups.
DETECTRON2 = {
    "r50": ((3, 4, 6, 3), 64, 1),
    "r101": ((3, 4, 23, 3), 64, 1),
    "x101": ((3, 4, 23, 3), 256, 32),
    "tiny": ((1, 1, 1, 1), 64, 1),
}


def resnet_shapes(blocks, inner, groups, stem=64):
    """{name: shape} of detectron2's ResNet, whose last stage but one is res5."""
    shapes = {}

    def convolution(name, out, channels, size):
        shapes[f"{name}.weight"] = (out, channels, size, size)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{leaf}"] = (out,)

    convolution("stem.conv1", stem, 3, 7)
    channels = stem
    for stage, count in enumerate(blocks):
        width, out = inner << stage, 4 * stem << stage
        for block in range(count):
            name = f"res{stage + 2}.{block}"
            if block == 0:
                convolution(f"{name}.shortcut", out, channels, 1)
            convolution(f"{name}.conv1", width, channels, 1)
            convolution(f"{name}.conv2", width, width // groups, 3)
            convolution(f"{name}.conv3", out, width, 1)
            channels = out
    return shapes


def detectron2_shapes(name, classes=80, pyramid=256, fully=1024):
    """{name: shape} of mask_rcnn_*_FPN_3x."""
    body = resnet_shapes(*DETECTRON2[name])
    shapes = {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}

    def layer(module, *shape, out=0):
        shapes[f"{module}.weight"] = shape
        shapes[f"{module}.bias"] = (out or shape[0],)

    for stage in (2, 3, 4, 5):
        layer(f"backbone.fpn_lateral{stage}", pyramid, 64 << stage, 1, 1)
        layer(f"backbone.fpn_output{stage}", pyramid, pyramid, 3, 3)
    shapes |= {f"backbone.bottom_up.{key}": shape for key, shape in body.items()}
    for level in range(5):
        shapes[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = (3, 4)
    layer("proposal_generator.rpn_head.conv", pyramid, pyramid, 3, 3)
    layer("proposal_generator.rpn_head.objectness_logits", 3, pyramid, 1, 1)
    layer("proposal_generator.rpn_head.anchor_deltas", 12, pyramid, 1, 1)
    layer("roi_heads.box_head.fc1", fully, pyramid * 49)
    layer("roi_heads.box_head.fc2", fully, fully)
    layer("roi_heads.box_predictor.cls_score", classes + 1, fully)
    layer("roi_heads.box_predictor.bbox_pred", 4 * classes, fully)
    for i in (1, 2, 3, 4):
        layer(f"roi_heads.mask_head.mask_fcn{i}", pyramid, pyramid, 3, 3)
    layer("roi_heads.mask_head.deconv", pyramid, pyramid, 2, 2)
    layer("roi_heads.mask_head.predictor", classes, pyramid, 1, 1)
    return shapes


def arrays(shapes, seed=0):
    """Random arrays; each is a part of one long one, since numbers take time."""
    numbers = np.random.default_rng(seed).random(max(map(math.prod, shapes.values())) + 997)
    numbers = numbers.astype(np.float32)
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        start = i % 997
        found[name] = numbers[start : start + math.prod(shape)].reshape(shape)
    if "pixel_mean" in found:
        found["pixel_mean"] = np.float32([103.53, 116.28, 123.675]).reshape(3, 1, 1)
        found["pixel_std"] = np.ones((3, 1, 1), np.float32)
    return found


def write_detectron2(path, name, *, protocol=4, **sizes):
    """A .pkl as the model zoo has it; returns its arrays."""
    found = arrays(detectron2_shapes(name, **sizes))
    if name == "x101":
        found["pixel_std"] = np.float32([57.375, 57.12, 58.395]).reshape(3, 1, 1)
    path.write_bytes(pickle.dumps({"model": found, "__author__": "test"}, protocol=protocol))
    return found


@functools.cache
def torchvision_network(name):
    """torchvision's own Mask R-CNN of random weights; the first one's BatchNorm is frozen."""
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                tensor.uniform_(0.1, 1)
    return model


def torchvision_state(name):
    """The state_dict as it was published: of frozen BatchNorm, which does not count batches."""
    state = torchvision_network(name).state_dict()
    if name.endswith("_v2"):
        return dict(state)
    return {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}


def tiny_torchvision(classes=5):
    """A Mask R-CNN of torchvision with few blocks and channels."""
    torchvision = pytest.importorskip("torchvision")
    detection, ops = torchvision.models.detection, torchvision.ops
    resnet = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 2, 1], norm_layer=ops.FrozenBatchNorm2d
    )
    body = detection.backbone_utils.BackboneWithFPN(
        resnet,
        {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)},
        [256, 512, 1024, 2048],
        16,
    )
    model = detection.MaskRCNN(
        body,
        box_head=detection.faster_rcnn.TwoMLPHead(16 * 49, 32),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, classes),
        mask_head=detection.mask_rcnn.MaskRCNNHeads(16, (16,) * 4, 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(16, 16, classes),
    )
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.uniform_(0.1, 1)
    return model


def old_torchvision_name(name):
    """As files before torchvision 0.13 have it."""
    parts = name.split(".")
    if "inner_blocks" in name or "layer_blocks" in name or "mask_head." in name:
        del parts[-2]
    if "mask_head." in name:
        parts[-2] = f"mask_fcn{int(parts[-2]) + 1}"
    if "rpn.head.conv." in name:
        del parts[-3:-1]
    return ".".join(parts)


def expected_shapes(blocks, inner, groups, classes, stem=64, pyramid=256, fully=1024, second=False):
    """{key: shape} of the network of model.py, written out apart from it."""
    shapes = {}

    def layer(module, *shape, out=0, norm=None):
        shapes[f"{module}.weight"] = shape
        shapes[f"{module}.bias"] = (out or shape[0],)
        for leaf in ("weight", "bias", "running_mean", "running_var") if norm else ():
            shapes[f"{norm}.{leaf}"] = (shape[0],)

    layer("fpn.C1.0", stem, 3, 7, 7, norm="fpn.C1.1")
    channels = stem
    for stage, count in enumerate(blocks):
        width, out = inner << stage, 4 * stem << stage
        for block in range(count):
            name = f"fpn.C{stage + 2}.{block}"
            layer(f"{name}.conv1", width, channels, 1, 1, norm=f"{name}.bn1")
            layer(f"{name}.conv2", width, width // groups, 3, 3, norm=f"{name}.bn2")
            layer(f"{name}.conv3", out, width, 1, 1, norm=f"{name}.bn3")
            if block == 0:
                down = f"{name}.downsample"
                layer(f"{down}.0", out, channels, 1, 1, norm=f"{down}.1")
            channels = out
        level = f"fpn.P{stage + 2}"
        layer(f"{level}_conv1", pyramid, out, 1, 1, norm=second and f"{level}_bn1")
        layer(f"{level}_conv2.1", pyramid, pyramid, 3, 3, norm=second and f"{level}_bn2")
    layer("rpn.conv_shared", pyramid, pyramid, 3, 3)
    if second:
        layer("rpn.conv_shared2", pyramid, pyramid, 3, 3)
        for i in range(4):
            name = f"classifier.convs.{i}"
            layer(f"{name}.0", pyramid, pyramid, 3, 3, norm=f"{name}.1")
    layer("rpn.conv_class", 3, pyramid, 1, 1)
    layer("rpn.conv_bbox", 12, pyramid, 1, 1)
    layer("classifier.conv1", fully, pyramid, 7, 7)
    if not second:
        layer("classifier.conv2", fully, fully, 1, 1)
    layer("classifier.linear_class", classes, fully)
    layer("classifier.linear_bbox", 4 * classes, fully)
    for i in (1, 2, 3, 4):
        layer(f"mask.conv{i}", pyramid, pyramid, 3, 3, norm=second and f"mask.bn{i}")
    layer("mask.deconv", pyramid, pyramid, 2, 2)
    layer("mask.conv5", classes, pyramid, 1, 1)
    return shapes


def sensible_torchvision(version):
    """maskrcnn_resnet50_fpn ("v1") or _v2 ("v2") of torchvision, ready to detect.

    Its random weights find objects, of scores and classes of many kinds. That of v1 is built as it
    is for its published weights: frozen, and with an eps of 0.
    """
    from torchvision.models import detection
    from torchvision.ops import FrozenBatchNorm2d

    if version == "v2":
        return _sensible(detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None))
    network = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    body = network.backbone.body
    for name, module in list(body.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, leaf = name.rpartition(".")
            frozen = FrozenBatchNorm2d(module.num_features, eps=0.0)
            setattr(body.get_submodule(parent), leaf, frozen)
    return _sensible(network)


def _sensible(network):
    generator = torch.Generator().manual_seed(1)

    def normal(tensor, scale):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)

    def near(tensor, value):
        tensor.copy_(value * (0.8 + 0.4 * torch.rand(tensor.shape, generator=generator)))

    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
                normal(module.weight, math.sqrt(2 / module.weight[0].numel()))
                if module.bias is not None:
                    normal(module.bias, 0.05)
            elif hasattr(module, "running_var"):
                near(module.weight, 0.3 if name.endswith("bn3") else 1)
                near(module.running_var, 1)
                normal(module.bias, 0.1)
                normal(module.running_mean, 0.1)
        network.rpn.head.cls_logits.weight.mul_(0.3)
        network.rpn.head.bbox_pred.weight.mul_(0.05)
        network.roi_heads.box_predictor.cls_score.weight.mul_(0.18)
        network.roi_heads.box_predictor.bbox_pred.weight.mul_(0.03)
    return network.eval()
