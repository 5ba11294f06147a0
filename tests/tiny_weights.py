"""Small models of random weights, and Keras files of them as all eras wrote them."""

import copy
import functools

import h5py
import numpy as np
import torch
from torch import nn

from config import Config
from model import MaskRCNN


@functools.cache
def _tiny(blocks, width, classes):
    config = Config(
        NAME="tiny",
        BACKBONE={"blocks": blocks, "width": width},
        TOP_DOWN_PYRAMID_SIZE=6,
        RPN_CHANNELS=5,
        FPN_CLASSIF_FC_LAYERS_SIZE=10,
        POOL_SIZE=3,
        MASK_POOL_SIZE=4,
        NUM_CLASSES=classes,
    )
    return MaskRCNN(config)


def tiny(blocks=(1, 1, 1, 1), width=4, classes=4, seed=0):
    """A small MaskRCNN whose tensors, BatchNorm statistics included, are all random."""
    model = copy.deepcopy(_tiny(blocks, width, classes))
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def copy_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_state(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key in state:
        assert torch.equal(state[key], expected[key]), key


# The layers of a Matterport model with one block a stage, written out by hand.
LAYERS = {
    "conv1": "fpn.C1.0",
    "bn_conv1": "fpn.C1.1",
    "res2a_branch2a": "fpn.C2.0.conv1",
    "bn2a_branch2a": "fpn.C2.0.bn1",
    "res2a_branch2b": "fpn.C2.0.conv2",
    "bn2a_branch2b": "fpn.C2.0.bn2",
    "res2a_branch2c": "fpn.C2.0.conv3",
    "bn2a_branch2c": "fpn.C2.0.bn3",
    "res2a_branch1": "fpn.C2.0.downsample.0",
    "bn2a_branch1": "fpn.C2.0.downsample.1",
    "res3a_branch2a": "fpn.C3.0.conv1",
    "bn3a_branch2a": "fpn.C3.0.bn1",
    "res3a_branch2b": "fpn.C3.0.conv2",
    "bn3a_branch2b": "fpn.C3.0.bn2",
    "res3a_branch2c": "fpn.C3.0.conv3",
    "bn3a_branch2c": "fpn.C3.0.bn3",
    "res3a_branch1": "fpn.C3.0.downsample.0",
    "bn3a_branch1": "fpn.C3.0.downsample.1",
    "res4a_branch2a": "fpn.C4.0.conv1",
    "bn4a_branch2a": "fpn.C4.0.bn1",
    "res4a_branch2b": "fpn.C4.0.conv2",
    "bn4a_branch2b": "fpn.C4.0.bn2",
    "res4a_branch2c": "fpn.C4.0.conv3",
    "bn4a_branch2c": "fpn.C4.0.bn3",
    "res4a_branch1": "fpn.C4.0.downsample.0",
    "bn4a_branch1": "fpn.C4.0.downsample.1",
    "res5a_branch2a": "fpn.C5.0.conv1",
    "bn5a_branch2a": "fpn.C5.0.bn1",
    "res5a_branch2b": "fpn.C5.0.conv2",
    "bn5a_branch2b": "fpn.C5.0.bn2",
    "res5a_branch2c": "fpn.C5.0.conv3",
    "bn5a_branch2c": "fpn.C5.0.bn3",
    "res5a_branch1": "fpn.C5.0.downsample.0",
    "bn5a_branch1": "fpn.C5.0.downsample.1",
    "fpn_c5p5": "fpn.P5_conv1",
    "fpn_p5": "fpn.P5_conv2.1",
    "fpn_c4p4": "fpn.P4_conv1",
    "fpn_p4": "fpn.P4_conv2.1",
    "fpn_c3p3": "fpn.P3_conv1",
    "fpn_p3": "fpn.P3_conv2.1",
    "fpn_c2p2": "fpn.P2_conv1",
    "fpn_p2": "fpn.P2_conv2.1",
    "rpn_conv_shared": "rpn.conv_shared",
    "rpn_class_raw": "rpn.conv_class",
    "rpn_bbox_pred": "rpn.conv_bbox",
    "mrcnn_class_conv1": "classifier.conv1",
    "mrcnn_class_bn1": "classifier.bn1",
    "mrcnn_class_conv2": "classifier.conv2",
    "mrcnn_class_bn2": "classifier.bn2",
    "mrcnn_class_logits": "classifier.linear_class",
    "mrcnn_bbox_fc": "classifier.linear_bbox",
    "mrcnn_mask_conv1": "mask.conv1",
    "mrcnn_mask_bn1": "mask.bn1",
    "mrcnn_mask_conv2": "mask.conv2",
    "mrcnn_mask_bn2": "mask.bn2",
    "mrcnn_mask_conv3": "mask.conv3",
    "mrcnn_mask_bn3": "mask.bn3",
    "mrcnn_mask_conv4": "mask.conv4",
    "mrcnn_mask_bn4": "mask.bn4",
    "mrcnn_mask_deconv": "mask.deconv",
    "mrcnn_mask": "mask.conv5",
}


def keras_arrays(model, layer):
    """[(Keras' short name, array in Keras' layout)] of a layer, in Keras' order."""
    module = model.get_submodule(LAYERS[layer])
    if isinstance(module, nn.BatchNorm2d):
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        tensors = (module.weight, module.bias, module.running_mean, module.running_var)
    else:
        letters = {nn.Linear: "oi->io", nn.Conv2d: "oihw->hwio", nn.ConvTranspose2d: "iohw->hwoi"}
        names = ("kernel", "bias")
        tensors = (torch.einsum(letters[type(module)], module.weight), module.bias)
    return [(name, tensor.detach().numpy()) for name, tensor in zip(names, tensors, strict=True)]


OLD_NAMES = {
    "kernel": "W",
    "bias": "b",
    "gamma": "gamma",
    "beta": "beta",
    "moving_mean": "running_mean",
    "moving_variance": "running_std",
}


def write_keras(path, model, era="keras2", layers=LAYERS):
    """A Keras file; the eras differ in groups, names and attributes, not in arrays."""
    with h5py.File(path, "w") as file:
        root = file
        if era == "save":  # model.save() instead of model.save_weights()
            root = file.create_group("model_weights")
            optimizer = file.create_group("optimizer_weights/SGD")
            optimizer["iterations:0"] = np.int64(7)
            optimizer["conv1/kernel:0"] = np.full((2, 2), np.nan)
            file.create_group("top_level_model_weights").attrs["weight_names"] = []
        contents = {"input_image": [], "activation_1": []}
        for layer in layers:
            group = "rpn_model" if layer.startswith("rpn_") else layer
            group = "mask_rcnn" if era == "multi_gpu" else group
            for short, array in keras_arrays(model, layer):
                name = f"{layer}/{short}:0"
                if era in ("keras1", "bare1") and group == layer:
                    name = f"{layer}_{OLD_NAMES[short]}_1:0"
                elif era == "wrapped" and group.startswith("mrcnn_"):  # TimeDistributed
                    name = f"conv2d_3/{short}:0"
                elif era == "second_model":  # the second model of a TensorFlow 1 session
                    name = f"{layer}_1/{short}:0"
                elif era == "scoped":
                    name = f"mask_rcnn/{group}/{layer}/{short}:0"
                contents.setdefault(group, []).append((name, array))
        root.attrs["layer_names"] = [name.encode() for name in contents]
        for group, items in contents.items():
            created = root.create_group(group)
            names = [name for name, _ in items]
            if era == "str":
                created.attrs["weight_names"] = names
            elif era not in ("bare", "bare1"):
                created.attrs["weight_names"] = [name.encode() for name in names]
            for name, array in items:
                created[name] = array


ERAS = ["keras2", "keras1", "save", "multi_gpu", "second_model", "scoped", "wrapped", "str"]
ERAS += ["bare", "bare1"]  # without the attribute weight_names
