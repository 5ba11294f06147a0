"""Keras' weight files (.h5): Matterport's names of layers, and arrays found by their names.

Every array is checked before it is read: an HDF5 file may name other files of this machine, and may
declare arrays that are far larger than itself.
"""

import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Matterport's layers, except those of the residual blocks, and our modules.
KERAS_LAYERS = {
    "conv1": "fpn.C1.0",
    "bn_conv1": "fpn.C1.1",
    **{f"fpn_c{i}p{i}": f"fpn.P{i}_conv1" for i in (2, 3, 4, 5)},
    **{f"fpn_p{i}": f"fpn.P{i}_conv2.1" for i in (2, 3, 4, 5)},
    "rpn_conv_shared": "rpn.conv_shared",
    "rpn_class_raw": "rpn.conv_class",
    "rpn_bbox_pred": "rpn.conv_bbox",
    **{
        f"mrcnn_class_{name}{i}": f"classifier.{name}{i}" for name in ("conv", "bn") for i in (1, 2)
    },
    "mrcnn_class_logits": "classifier.linear_class",
    "mrcnn_bbox_fc": "classifier.linear_bbox",
    **{f"mrcnn_mask_{name}{i}": f"mask.{name}{i}" for name in ("conv", "bn") for i in (1, 2, 3, 4)},
    "mrcnn_mask_deconv": "mask.deconv",
    "mrcnn_mask": "mask.conv5",
}
# Matterport's tutorials exclude mrcnn_bbox too.
WEIGHTLESS_LAYERS = ("mrcnn_bbox", "mrcnn_class", "rpn_bbox", "rpn_class")

# What stands at the end of an array's name in Keras 1 and later, and what it is in torch.
LEAVES = {
    "kernel": "weight",
    "W": "weight",
    "gamma": "weight",
    "bias": "bias",
    "b": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "running_mean": "running_mean",
    "moving_variance": "running_var",
    "running_variance": "running_var",
    "running_std": "running_var",  # Keras 1 calls it so; it is the variance
}
_LEAF = re.compile(rf"(?:.*[/_])?({'|'.join(LEAVES)})(?:_\d+)?(?::\d+)?", re.DOTALL)

# Bounds of what is read: objects in a file, groups in groups, bytes of arrays per byte of the file
# (compressed weights have some, an array that was declared and never written any number).
MOST_OBJECTS, MOST_LEVELS, MOST_EXPANSION = 20_000, 16, 20

KERAS_3 = (
    "which numbers its arrays; load it with Keras and write the format that names them: "
    "model.save('model.h5')"
)


class Refused(ValueError):
    """A whole file that is not what can be read, or should not be."""


def keras_module(layer: str) -> str | None:
    """Our module for a Matterport layer: res4b_branch2a -> fpn.C4.1.conv1."""
    match = re.fullmatch(r"(res|bn)([2-5])([a-z])_branch(1|2[abc])", layer)
    if match is None:
        return KERAS_LAYERS.get(layer)
    kind, stage, block, branch = match.groups()
    if branch == "1":
        part = "downsample.0" if kind == "res" else "downsample.1"
    else:
        part = ("conv" if kind == "res" else "bn") + str("abc".index(branch[1]) + 1)
    return f"fpn.C{stage}.{ord(block) - ord('a')}.{part}"


def read_keras(path: Path) -> dict[str, Tensor]:
    """The arrays of a Keras file, under our names where there are such.

    Raises:
        Refused: the file is no set of named floating-point arrays of its own.
        Exception: h5py raises most kinds on a damaged file.
    """
    import h5py

    _check_heaps(path)
    state: dict[str, Tensor] = {}
    most = MOST_EXPANSION * path.stat().st_size
    with h5py.File(path, "r") as file:
        root = _child(file, "model_weights") if "model_weights" in file else file
        if not isinstance(root, h5py.Group):
            raise Refused("model_weights must be a group; save it again with Keras")
        for name, dataset in _datasets(root):
            if re.search(r"(^|/)vars/\d+$", name):
                raise Refused(f"it is in the format of Keras 3, {KERAS_3}")
            key, ours = _key(name)
            if not _is_float(dataset):
                if ours:
                    raise Refused(
                        f"{name!r} must be an array of floating-point numbers, got {dataset.dtype} "
                        f"{dataset.shape}; save the model before it is quantised"
                    )
                continue  # a counter, the state of a generator
            most -= _bytes(dataset, name)
            if most < 0:
                raise Refused(
                    f"its arrays are more than {MOST_EXPANSION} times as large as the file, with "
                    f"{dataset.shape} for {name!r}: they were declared and not written; save it "
                    "again"
                )
            tensor = _tensor(dataset)
            if key in state and not torch.equal(state[key], tensor):
                raise Refused(
                    f"it has two different arrays for {key!r}, one of them {name!r}; save one model"
                )
            state[key] = tensor
    return state


def _check_heaps(path: Path) -> None:
    """Refuses lists of free space in a circle, which HDF5 would follow until the memory ends.

    The names of a group are in a local heap ("HEAP", where its first free block is, where it
    begins), in which each free block begins with the place of the next one.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:

        def number(where: int) -> int:
            return int.from_bytes(content[where : where + 8], "little")

        heap = content.find(b"HEAP\0")
        while heap >= 0:
            block, start, seen = number(heap + 16), number(heap + 24), set()
            while start + block < len(content) and block not in seen:
                seen.add(block)
                block = number(start + block)
            if block in seen:
                raise Refused("its free space leads back into itself; download or copy it again")
            heap = content.find(b"HEAP\0", heap + 1)


def _child(group: Any, name: str) -> Any:
    """An object of this file; a link could lead to another file, or nowhere."""
    import h5py

    link = group.get(name, getlink=True)
    if link is None:
        raise KeyError(f"no object for {name!r}")
    if not isinstance(link, h5py.HardLink):
        raise Refused(f"{name!r} is a link ({type(link).__name__}); save it again with Keras")
    return group[name]


def _datasets(root: Any) -> Iterator[tuple[str, Any]]:
    """All arrays below a group and their names, in the order of the file."""
    import h5py

    waiting, objects = [("", root, 0)], 0
    while waiting:
        path, group, level = waiting.pop()
        below = []
        for name in group:
            objects += 1
            if objects > MOST_OBJECTS or level > MOST_LEVELS:
                raise Refused(
                    f"it has more than {MOST_OBJECTS:,} objects, or groups that hold each other; "
                    "save it again with Keras"
                )
            item = _child(group, name)
            if isinstance(item, h5py.Group):
                below.append((f"{path}{name}/", item, level + 1))
            elif isinstance(item, h5py.Dataset):
                yield path + name, item
        waiting += reversed(below)


def _key(name: str) -> tuple[str, bool]:
    """conv1/conv1/kernel:0 -> fpn.C1.0.weight, and whether it is of a layer of ours."""
    *parts, leaf = name.split("/")
    # A model inside the model (rpn_model; mask_rcnn after multi-GPU training) has the layer in the
    # array's name, to which TensorFlow appends _1 where a session holds two models.
    outer, inner = (parts[0], re.sub(r"_\d+$", "", parts[-1])) if parts else ("", "")
    module = keras_module(outer) or keras_module(inner)
    match = _LEAF.fullmatch(leaf)
    if module is not None and match is None:
        raise Refused(f"{name!r} must be called kernel, bias, gamma, beta, moving_mean or so")
    leaf = LEAVES[match[1]] if match else leaf
    return ".".join(filter(None, (module or inner, leaf))), module is not None


def _is_float(dataset: Any) -> bool:
    kind, size = dataset.dtype.kind, dataset.dtype.itemsize
    return bool(dataset.shape) and kind == "f" and size in (2, 4, 8)


def _bytes(dataset: Any, name: str) -> int:
    """What reading an array takes; it must be stored in this file."""
    import h5py

    layout = dataset.id.get_create_plist()
    if layout.get_external_count() or layout.get_layout() == h5py.h5d.VIRTUAL:
        raise Refused(f"{name!r} is stored in another file; save it again with Keras")
    # A chunk, which is read as a whole, may be larger than the array.
    cells = max(math.prod(shape) for shape in (dataset.shape, dataset.chunks or ()))
    return cells * dataset.dtype.itemsize


def _tensor(dataset: Any) -> Tensor:
    with np.errstate(over="ignore"):  # of float64; what is infinite is refused later
        array = np.asarray(dataset[()], np.float32)
    if array.ndim == 4:  # HWIO -> OIHW; a deconvolution's HWOI -> IOHW
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
    return torch.from_numpy(np.ascontiguousarray(array))
