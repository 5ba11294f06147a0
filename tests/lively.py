"""Small networks of every kind, of random weights that find objects of many scores and classes."""

import functools

import numpy as np
import skimage.data
import torch
from torch import nn

from config import Config
from model import MaskRCNN
from presets import (
    Detectron2Config,
    Detectron2X101Config,
    MatterportConfig,
    TorchvisionConfig,
    TorchvisionV2Config,
)

SQUARE = {"IMAGE_MIN_DIM": 128, "IMAGE_MAX_DIM": 128}
EDGE = {"IMAGE_MIN_DIM": 96, "IMAGE_MAX_DIM": 160}
LIVELY: dict[str, tuple[type[Config], dict]] = {
    "matterport": (MatterportConfig, SQUARE),
    "torchvision": (TorchvisionConfig, EDGE),
    "torchvision_v2": (TorchvisionV2Config, EDGE),
    "detectron2": (Detectron2Config, EDGE),
    "detectron2_x101": (Detectron2X101Config, EDGE),
    # What no preset has.
    "pad64": (MatterportConfig, {"IMAGE_RESIZE_MODE": "pad64", "IMAGE_MIN_DIM": 100}),
    "none": (MatterportConfig, {"IMAGE_RESIZE_MODE": "none", "RPN_ANCHOR_STRIDE": 2}),
    "mixed": (
        MatterportConfig,
        {**SQUARE, "ROI_ALIGN": "roi_align", "ROI_SAMPLING_RATIO": 2, "DETECTION_PER_CLASS": True},
    ),
}


@functools.cache
def lively(name: str) -> MaskRCNN:
    preset, options = LIVELY[name]
    backbone = {"blocks": (1, 1, 1, 1), "width": 16}
    if preset.BACKBONE.startswith("resnext"):
        backbone |= {"groups": 4, "width_per_group": 32}
    config = preset(
        NUM_CLASSES=4,
        BACKBONE=backbone,
        TOP_DOWN_PYRAMID_SIZE=16,
        FPN_CLASSIF_FC_LAYERS_SIZE=32,
        RPN_ANCHOR_SCALES=(8, 16, 32, 64, 128),
        PRE_NMS_LIMIT=1000,
        POST_NMS_ROIS_INFERENCE=200,
        DETECTION_MIN_CONFIDENCE=0.5,
        **{"RPN_CHANNELS": 16} | options,
    )
    model = MaskRCNN(config, mode="inference")
    generator = torch.Generator().manual_seed(1)

    def normal(tensor, scale, mean=0.0):
        tensor.copy_(mean + scale * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                normal(module.weight, (2 / module.weight[0].numel()) ** 0.5)
                normal(module.bias, 0.05)
            elif isinstance(module, nn.BatchNorm2d):
                normal(module.weight, 0.1, 1)
                normal(module.bias, 0.1)
                normal(module.running_mean, 0.1)
                module.running_var.uniform_(0.8, 1.2, generator=generator)
        if config.STD_PIXEL is None:
            model.fpn.C1[0].weight /= 60
        model.rpn.conv_bbox.weight *= 0.1
        model.classifier.linear_bbox.weight *= 0.1
        # Such that on a photograph scores differ, no class is left out, and none is certain.
        image = np.ascontiguousarray(skimage.data.astronaut()[:128, -192:])
        molded = model.mold_inputs([image])
        spread(model.rpn.conv_class, model.predict(*molded).rpn.logits)
        log_probs = model.predict(*molded).class_probs.clamp(min=1e-30).log()
        spread(model.classifier.linear_class, log_probs - log_probs.mean(dim=1, keepdim=True))
    return model


def spread(layer, logits):
    """Makes the logits of a layer differ by 2 or so from their mean, which becomes 0."""
    kinds = logits.shape[-1]
    mean, std = logits.reshape(-1, kinds).mean(dim=0), logits.std()
    layer.bias.sub_(mean.repeat(len(layer.bias) // kinds)).mul_(2 / std)
    layer.weight.mul_(2 / std)
