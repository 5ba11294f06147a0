"""Deterministic weights in the layout of mask_rcnn_coco.h5, for which the reference was run.

Each weight W of a layer L is made of whole numbers r that RandomState, seeded with the crc32 of
"mrcnn-ref-v1/L/W", draws from -32768..32767. Kernels are r minus its mean over the inputs, scaled
by gain * sqrt(6 / fan_in); the rest is a constant plus a multiple of r.
"""

import sys
import zlib
from pathlib import Path

import h5py
import numpy as np

CLASSES = {"coco": 81, "small": 4}
BLOCKS = {"coco": (3, 4, 23, 3), "small": (3, 4, 6, 3)}
GAINS = {
    "coco": {"fpn_p2": 0.5, "fpn_p3": 0.75, "fpn_p4": 1.2, "fpn_p5": 1.8, "class": 1.25},
    "small": {"fpn_p2": 0.4, "fpn_p3": 0.8, "fpn_p4": 1.6, "fpn_p5": 2.6, "class": 1.8},
}
BACKGROUND = {"coco": 4.5, "small": 1.5}
VARIANCE = {"bn_conv1": 4000.0, "branch2b": 0.0225, "branch2c": 16.0, "mrcnn_class_bn1": 0.25}


def layers(name):
    """(layer, kernel shape or channels of a BatchNorm) in the order of the network."""
    yield "conv1", (7, 7, 3, 64)
    yield "bn_conv1", 64
    channels = 64
    for stage, blocks in enumerate(BLOCKS[name], start=2):
        width = 64 * 2 ** (stage - 2)
        for block in range(blocks):
            branch = f"{stage}{chr(ord('a') + block)}_branch"
            shapes = {
                "2a": (1, 1, channels, width),
                "2b": (3, 3, width, width),
                "2c": (1, 1, width, 4 * width),
            }
            if block == 0:
                shapes["1"] = (1, 1, channels, 4 * width)
            for part, shape in shapes.items():
                yield f"res{branch}{part}", shape
                yield f"bn{branch}{part}", shape[-1]
            channels = 4 * width
    for level in (5, 4, 3, 2):
        yield f"fpn_c{level}p{level}", (1, 1, 64 * 2**level, 256)
        yield f"fpn_p{level}", (3, 3, 256, 256)
    yield "rpn_conv_shared", (3, 3, 256, 512)
    yield "rpn_class_raw", (1, 1, 512, 6)
    yield "rpn_bbox_pred", (1, 1, 512, 12)
    classes = CLASSES[name]
    yield "mrcnn_class_conv1", (7, 7, 256, 1024)
    yield "mrcnn_class_bn1", 1024
    yield "mrcnn_class_conv2", (1, 1, 1024, 1024)
    yield "mrcnn_class_bn2", 1024
    yield "mrcnn_class_logits", (1024, classes)
    yield "mrcnn_bbox_fc", (1024, 4 * classes)
    for i in (1, 2, 3, 4):
        yield f"mrcnn_mask_conv{i}", (3, 3, 256, 256)
        yield f"mrcnn_mask_bn{i}", 256
    yield "mrcnn_mask_deconv", (2, 2, 256, 256)
    yield "mrcnn_mask", (1, 1, 256, classes)


def gain(name, layer):
    fixed = {"fpn_c5p5": 1.2, "fpn_c4p4": 1.0, "fpn_c3p3": 0.8, "fpn_c2p2": 0.5}
    fixed |= {"rpn_class_raw": 0.6, "mrcnn_bbox_fc": 0.5, "mrcnn_mask": 3.0}
    fixed |= {"mrcnn_class_logits": GAINS[name]["class"]} | GAINS[name]
    return fixed.get(layer, 0.15 if layer.endswith("branch2b") else 1.0)


def whole_numbers(layer, weight, shape):
    seed = zlib.crc32(f"mrcnn-ref-v1/{layer}/{weight}".encode())
    return np.floor(np.random.RandomState(seed).random_sample(shape) * 65536.0) - 32768.0


def kernel(name, layer, shape):
    r = whole_numbers(layer, "kernel", shape)
    inputs = (3,) if layer == "mrcnn_mask_deconv" else tuple(range(len(shape) - 1))
    fan_in = int(np.prod([shape[axis] for axis in inputs]))
    centred = r - r.sum(axis=inputs, keepdims=True) / fan_in
    return centred * (gain(name, layer) * np.sqrt(6.0 / fan_in) / 32768.0)


def shapes(layer, shape):
    """{weight: shape} of a layer."""
    if isinstance(shape, tuple):
        outputs = shape[-2] if layer == "mrcnn_mask_deconv" else shape[-1]
        return {"kernel": shape, "bias": (outputs,)}
    return dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), (shape,))


def arrays(name, layer, shape):
    """{weight: array} of a layer."""
    if isinstance(shape, tuple):
        outputs = shapes(layer, shape)["bias"]
        bias = 0.05 * gain(name, layer) * (whole_numbers(layer, "bias", outputs) / 32768.0)
        if layer == "mrcnn_class_logits":
            bias[0] += BACKGROUND[name]
        return {"kernel": kernel(name, layer, shape), "bias": bias}
    variance = next((v for key, v in VARIANCE.items() if layer.endswith(key)), 1.0)
    scaled = {
        weight: whole_numbers(layer, weight, (shape,)) / 32768.0
        for weight in ("gamma", "beta", "moving_mean", "moving_variance")
    }
    return {
        "gamma": 1.0 + 0.2 * scaled["gamma"],
        "beta": 0.05 * scaled["beta"],
        "moving_mean": 0.05 * np.sqrt(variance) * scaled["moving_mean"],
        "moving_variance": variance * (1.0 + 0.4 * scaled["moving_variance"]),
    }


def create_sparse(group, name, shape):
    """An array of zeros whose space in the file is there, and takes none on the disk."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    folder, _, leaf = name.rpartition("/")
    space = h5py.h5s.create_simple(shape)
    where = group.require_group(folder).id
    h5py.h5d.create(where, leaf.encode(), h5py.h5t.IEEE_F32LE, space, options)


def write_h5(name, path, only=None, empty=False):
    """Writes the weights of configuration "coco" or "small" as Keras' save_weights does.

    Args:
        only: whether to write a layer, a function of its name; all if None.
        empty: zeros, which take neither time nor space.
    """
    with h5py.File(path, "w") as file:
        groups = []
        for layer, shape in layers(name):
            if only and not only(layer):
                continue
            group_name = "rpn_model" if layer.startswith("rpn_") else layer
            group = file.require_group(group_name)
            names = list(group.attrs.get("weight_names", []))
            values = {} if empty else arrays(name, layer, shape)
            for weight, size in shapes(layer, shape).items():
                if empty:
                    create_sparse(group, f"{layer}/{weight}:0", size)
                else:
                    group[f"{layer}/{weight}:0"] = values[weight].astype(np.float32)
                names.append(f"{layer}/{weight}:0".encode())
            group.attrs["weight_names"] = np.array(names, dtype="S")
            if group_name not in groups:
                groups.append(group_name)
        file.attrs["layer_names"] = [group_name.encode() for group_name in groups]


if __name__ == "__main__":  # python tests/keras_weights.py coco coco.h5
    write_h5(sys.argv[1], Path(sys.argv[2]))
