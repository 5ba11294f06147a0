"""Weight files: load, save, download and convert.

Formats, recognised by content: Matterport's Keras .h5 (models of any class count, and the ResNet-50
"notop" file), .pth files of the port, own checkpoints, and torchvision's ResNets.
Every reader returns the state_dict names of model.MaskRCNN, so loading and converting share the
rest.

    python weights.py info mask_rcnn_coco.h5
    python weights.py convert mask_rcnn_coco.h5 mask_rcnn_coco.pth
    python weights.py download coco
"""

import difflib
import hashlib
import http.client
import os
import pickle
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import cli
import utils

VERSION = "1.0.0"  # of the library, as in pyproject.toml


class Source(NamedTuple):
    """A file on the network and what a complete copy of it looks like."""

    url: str
    size: int | None = None  # bytes
    checksum: str = ""  # algorithm:leading hex digits


SOURCES = {
    "coco": Source(
        "https://github.com/matterport/Mask_RCNN/releases/download/v2.0/mask_rcnn_coco.h5",
        size=257_557_808,
    ),
    "resnet50": Source(
        "https://download.pytorch.org/models/resnet50-0676ba61.pth", checksum="sha256:0676ba61"
    ),
    "resnet101": Source(
        "https://download.pytorch.org/models/resnet101-63fe2227.pth", checksum="sha256:63fe2227"
    ),
    "resnet50_keras": Source(
        "https://github.com/fchollet/deep-learning-models/releases/download/v0.2/"
        "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        checksum="md5:a268eb855778b3df3c7506639542a6af",
    ),
}

SHIPPED = ("shapes", "nuclei")
RESNETS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}


class WeightFile(NamedTuple):
    """The content of a weight file under our names.

    Attributes:
        path: where it was read.
        state_dict: name -> tensor on the CPU.
        format: "keras", "torchvision", "pytorch" (a plain state_dict) or "checkpoint".
        config: what the file tells about its model; always has BACKBONE_STYLE.
        zeroed: convolution biases of the backbone that the file does not have; 0 in state_dict.
        training: what a checkpoint of a run holds besides, see training.py; else None.
    """

    path: Path
    state_dict: dict[str, Tensor]
    format: str
    config: dict[str, Any]
    zeroed: list[str]
    training: dict[str, Any] | None = None


# Loading and saving


class LoadReport(NamedTuple):
    """What load_weights did; every list holds state_dict keys.

    `zeroed` are convolution biases that the file does not have: set to 0, and counted as loaded.
    """

    path: Path
    format: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    excluded: list[str]
    zeroed: list[str]

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.format}): {len(self.loaded)} tensors loaded"]
        for name in ("missing", "unexpected", "mismatched", "excluded", "zeroed"):
            if keys := getattr(self, name):
                lines.append(f"  {len(keys)} {name}: {_group(keys)}")
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    path: str | Path | WeightFile,
    exclude: Sequence[str] = (),
    skip_mismatched: bool = False,
    verbose: bool = True,
) -> LoadReport:
    """Copies the tensors of a weight file into the model, all or (on an error) none of them.

    The backbone's style (stride position, BatchNorm epsilon, input scaling) follows the file that
    the backbone comes from, through `model.set_backbone_style` where the model has it.

    Args:
        model: MaskRCNN, or a module with state_dict keys of the same pattern.
        path: a file of any format that read_state_dict knows, "coco" or "imagenet"; or what
            read_state_dict returned, so that a file is read once.
        exclude: what to leave as it is: modules ("mask", "classifier.linear_class"), regular
            expressions of modules, or Matterport's layers ("mrcnn_bbox_fc").
        skip_mismatched: leave tensors of another shape as they are instead of raising.
        verbose: print the report.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or not finite, a shape differs, an excluded name matches
            nothing, the backbone has another depth, or most of it would not be loaded.
    """
    if isinstance(path, WeightFile):
        file = path
    else:
        backbone = getattr(getattr(model, "config", None), "BACKBONE", None)
        file = read_state_dict(find_weights(path, backbone))
    target = model.state_dict()
    excluded = _matching(exclude, target.keys() | file.state_dict.keys())
    wanted = {key: tensor for key, tensor in target.items() if key not in excluded}
    found = {key: tensor for key, tensor in file.state_dict.items() if key not in excluded}
    mismatched = [key for key in wanted if key in found and found[key].shape != wanted[key].shape]
    loaded = [key for key in wanted if key in found and key not in mismatched]
    report = LoadReport(
        path=file.path,
        format=file.format,
        loaded=loaded,
        missing=[key for key in wanted if key not in found],
        unexpected=[key for key in found if key not in wanted],
        mismatched=mismatched,
        excluded=[key for key in target if key in excluded],
        zeroed=[key for key in loaded if key in file.zeroed],
    )

    _check_fit(report, found, wanted, skip_mismatched)
    set_backbone_style = getattr(model, "set_backbone_style", None)
    if set_backbone_style and any(key.startswith("fpn.C") for key in loaded):
        set_backbone_style(file.config["BACKBONE_STYLE"])
    with torch.no_grad():
        for key in loaded:
            target[key].copy_(found[key])
    if verbose:
        print(report)
    return report


def _check_fit(
    report: LoadReport, found: dict[str, Tensor], wanted: dict[str, Tensor], skip_mismatched: bool
) -> None:
    path, mismatched = report.path, report.mismatched
    blocks, model_blocks = _blocks(found), _blocks(wanted)
    if any(blocks) and any(model_blocks) and blocks != model_blocks:
        raise ValueError(
            f"{path} has a backbone of {_depth(blocks)}, the model one of {_depth(model_blocks)}; "
            "set BACKBONE to that of the file, or load a file for that of the model"
        )
    if mismatched and not skip_mismatched:
        shapes = [f"{k} {tuple(found[k].shape)} / {tuple(wanted[k].shape)}" for k in mismatched[:4]]
        modules = list(dict.fromkeys(key.rpartition(".")[0] for key in mismatched))
        raise ValueError(
            f"{path}: {len(mismatched)} tensors have another shape (file / model): "
            f"{', '.join(shapes)}{', ...' if len(mismatched) > 4 else ''}; "
            f"use skip_mismatched=True or exclude={modules}"
        )
    backbone = [key in report.loaded for key in wanted if key.startswith("fpn.C")]
    if sum(backbone) * 2 < len(backbone):
        raise ValueError(
            f"{path} fills only {sum(backbone)} of the {len(backbone)} backbone tensors, fpn.C1 to "
            "fpn.C5; use a file that has them, or exclude=['fpn.C.*'] to keep those of the model"
        )


def save_weights(
    model: nn.Module, path: str | Path, training: dict[str, Any] | None = None
) -> None:
    """Writes a checkpoint {"model": state_dict, "config": plain values, "version"}, atomically.

    Args:
        training: plain values and tensors of a run, to be kept in it as well.
    """
    config = getattr(model, "config", None)
    values = plain(config.to_dict()) if config else {}
    values["BACKBONE_STYLE"] = getattr(model, "backbone_style", "keras")
    _save_checkpoint(model.state_dict(), values, path, training)


def _save_checkpoint(
    state_dict: dict[str, Any],
    config: dict[str, Any],
    path: str | Path,
    training: dict[str, Any] | None = None,
) -> None:
    data = {"model": state_dict, "config": config, "version": VERSION}
    if training is not None:
        data["training"] = training
    utils.write_atomic(path, lambda file: torch.save(data, file))


def plain(value: Any) -> Any:
    """The value in types that torch.load(weights_only=True) admits; functions by name."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", str(value))


def _matching(names: Sequence[str], keys: Iterable[str]) -> set[str]:
    """The keys that the names of `exclude` stand for."""
    matching = set()
    for name in [names] if isinstance(names, str) else names:
        if name in WEIGHTLESS_LAYERS:
            continue
        module = "rpn" if name == "rpn_model" else _keras_module(name) or name
        pattern = rf"(?:{module})(?:\..+)?"
        try:
            hits = {key for key in keys if re.fullmatch(pattern, key)}
        except re.error as error:
            raise ValueError(f"exclude: {name!r} is no regular expression: {error}") from error
        if not hits:
            known = {key.rpartition(".")[0] for key in keys} | {"fpn", "rpn", "classifier", "mask"}
            close = difflib.get_close_matches(name, [*KERAS_LAYERS, *sorted(known)])
            raise ValueError(
                f"exclude: {name!r} matches nothing in the model or the file; "
                + (f"did you mean {' or '.join(close)}?" if close else "see model.state_dict()")
            )
        matching |= hits
    return matching


def _blocks(keys: Iterable[str]) -> tuple[int, ...]:
    """The number of residual blocks in C2..C5."""
    matches = [re.match(r"fpn\.C([2-5])\.(\d+)\.", key) for key in keys]
    blocks = {match.groups() for match in matches if match}
    return tuple(sum(stage == number for stage, _ in blocks) for number in "2345")


def _depth(blocks: tuple[int, ...]) -> str:
    name = f" ({RESNETS[blocks]})" if blocks in RESNETS else ""
    return "-".join(map(str, blocks)) + " blocks" + name


def _group(keys: Sequence[str], limit: int = 6) -> str:
    """mask.conv5.{weight,bias}, ... and 3 more."""
    leaves: dict[str, list[str]] = {}
    for key in keys:
        module, _, leaf = key.rpartition(".")
        leaves.setdefault(module, []).append(leaf)
    names = [
        f"{module}.{leaf[0]}" if len(leaf) == 1 else f"{module}.{{{','.join(leaf)}}}"
        for module, leaf in leaves.items()
    ]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# Reading


def read_state_dict(path: str | Path) -> WeightFile:
    """Reads a weight file of any known format.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the format is unknown, the file is damaged, or a tensor holds NaN or infinity.
    """
    path = _existing(path)
    with path.open("rb") as file:
        magic = file.read(8)
    if magic == b"\x89HDF\r\n\x1a\n":
        (state, kind, config), training = _read_keras(path), None
    elif magic.startswith((b"PK\x03\x04", b"\x80\x02")):  # zip; before torch 1.6, a pickle
        state, kind, config, training = _read_torch(path)
    else:
        raise ValueError(
            f"{path} is neither HDF5 (.h5) nor a torch file (.pth): {path.stat().st_size:,} bytes, "
            f"starting with {magic!r}; if it is a web page saved in place of it, download it again"
        )
    if not any(key.startswith(("fpn.", "rpn.", "classifier.", "mask.")) for key in state):
        raise ValueError(
            f"{path} holds neither Mask R-CNN weights nor a ResNet-50 or ResNet-101; "
            f"its tensors: {_group(list(state)) or 'none'}"
        )
    config.setdefault("BACKBONE_STYLE", "torchvision" if kind == "torchvision" else "keras")

    zeroed = []
    if kind in ("keras", "torchvision"):
        for key, tensor in list(state.items()):
            bias = re.sub(r"weight$", "bias", key)
            if key.startswith("fpn.C") and tensor.ndim == 4 and bias not in state:
                state[bias] = torch.zeros(len(tensor))
                zeroed.append(bias)
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path} holds NaN or infinity in {key}; use an earlier checkpoint")
    return WeightFile(path, state, kind, config, zeroed, training)


def read_options(path: str | Path | WeightFile) -> dict[str, Any]:
    """Options of Config for a model that fits a weight file, or what read_state_dict made of it.

    Our checkpoints hold all of them; elsewhere the shapes tell the backbone, widths and classes.
    Raises what read_state_dict raises, and ValueError where the file is but a part of a model.
    """
    file = path if isinstance(path, WeightFile) else read_state_dict(path)
    state, config = file.state_dict, file.config
    if file.format == "checkpoint" and "BACKBONE" in config:
        return config
    parts = ("fpn.C1.0", "fpn.P2_conv1", "rpn.conv_shared", "classifier.linear_class")
    missing = [part for part in parts if f"{part}.weight" not in state]
    if missing:
        raise ValueError(f"{file.path} must hold a whole model to detect with, lacks {missing}")
    blocks, width = _blocks(state), len(state["fpn.C1.0.weight"])
    classes, channels = state["classifier.linear_class.weight"].shape
    return {
        "BACKBONE": RESNETS.get(blocks)
        if width == 64 and blocks in RESNETS
        else {"blocks": blocks, "width": width},
        "NUM_CLASSES": classes,
        "FPN_CLASSIF_FC_LAYERS_SIZE": channels,
        "TOP_DOWN_PYRAMID_SIZE": len(state["fpn.P2_conv1.weight"]),
        "RPN_CHANNELS": len(state["rpn.conv_shared.weight"]),
        **config,
    }


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


def _keras_module(layer: str) -> str | None:
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


def _read_keras(path: Path) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    import h5py

    layers: dict[str, list[np.ndarray]] = {}
    try:
        with h5py.File(path, "r") as file:
            for group_name, group in file.get("model_weights", file).items():
                for name in _keras_weight_names(group) if isinstance(group, h5py.Group) else ():
                    # A model inside the model (rpn_model; mask_rcnn after multi-GPU training) has
                    # the layer in the weight's name, to which TensorFlow appends _1 where a
                    # session holds two models.
                    inner = re.sub(r"_\d+$", "", name.split("/")[-2]) if "/" in name else group_name
                    layer = group_name if _keras_module(group_name) else inner
                    layers.setdefault(layer, []).append(np.asarray(group[name], np.float32))
    except (OSError, KeyError) as error:
        raise ValueError(_damage(path, error)) from error

    state = {}
    for layer, arrays in layers.items():
        module = _keras_module(layer) or layer
        names = ("weight", "bias", "running_mean", "running_var")
        for name, array in zip(names, arrays, strict=False):
            if array.ndim == 4:  # HWIO -> OIHW; a deconvolution's HWOI -> IOHW
                array = array.transpose(3, 2, 0, 1)
            elif array.ndim == 2:
                array = array.T
            state[f"{module}.{name}"] = torch.from_numpy(np.ascontiguousarray(array))
    return state, "keras", {}


def _keras_weight_names(group: Any) -> list[str]:
    """The weights of one group in Keras' order: kernel, bias; or gamma, beta, mean, variance."""
    if "weight_names" in group.attrs:
        return [n.decode() if isinstance(n, bytes) else n for n in group.attrs["weight_names"]]
    names: list[str] = []
    group.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    # Sorted by name, as old kernels (_W) and biases (_b) and the rest of a BatchNorm are right.
    return sorted(names, key=lambda name: (not re.search("kernel|gamma", name), name))


def _read_torch(
    path: Path,
) -> tuple[dict[str, Tensor], str, dict[str, Any], dict[str, Any] | None]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors and plain values, which "
            "torch.load(weights_only=True) refuses; if you trust its origin, load it yourself and "
            "save its state_dict alone"
        ) from error
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(_damage(path, error)) from error

    kind, config, training = "pytorch", {}, None
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        kind, config, training = "checkpoint", dict(data.get("config") or {}), data.get("training")
        data = data["model"]
    elif isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict) or not all(isinstance(item, Tensor) for item in data.values()):
        raise ValueError(
            f"{path} must hold a state_dict, alone or under 'model' or 'state_dict', got "
            f"{', '.join(map(str, data)) if isinstance(data, dict) else type(data).__name__}"
        )

    state = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): tensor  # DataParallel, torch.compile
        for key, tensor in data.items()
        if not str(key).endswith("num_batches_tracked")
    }
    if {"conv1.weight", "layer1.0.conv3.weight"} <= state.keys():
        return _from_torchvision(state), "torchvision", config, None
    return state, kind, config, training


def _from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """layer1.0.conv2.weight -> fpn.C2.0.conv2.weight; without the classifier fc."""
    renamed = {}
    for key, tensor in state.items():
        key = re.sub(r"^conv1\.", "fpn.C1.0.", key)
        key = re.sub(r"^bn1\.", "fpn.C1.1.", key)
        key = re.sub(r"^layer(\d)\.", lambda match: f"fpn.C{int(match[1]) + 1}.", key)
        if not key.startswith("fc."):
            renamed[key] = tensor
    return renamed


def _damage(path: Path, error: Exception) -> str:
    sizes = [s.size for s in SOURCES.values() if s.size and s.url.endswith(f"/{path.name}")]
    expected = "".join(f", expected {size:,}" for size in sizes)
    reason = str(error).partition("\n")[0] or type(error).__name__
    return (
        f"{path} is damaged or truncated ({path.stat().st_size:,} bytes{expected}): {reason}; "
        "download or copy it again"
    )


# Finding and downloading


def find_weights(name_or_path: str | Path, backbone: object = "resnet101") -> Path:
    """The file behind a name, downloaded if need be, or behind a path.

    Args:
        name_or_path: "shapes" or "nuclei" (which ship with the library), "coco"
            (mask_rcnn_coco.h5, or .pth), "imagenet" (torchvision's ResNet) or a path. Files to be
            downloaded are looked for in the working directory, beside this module and in the cache
            folder first.
        backbone: for "imagenet", "resnet50" or "resnet101".

    Raises:
        FileNotFoundError: no such file.
        ValueError: no ImageNet weights exist for the backbone.
        ConnectionError: see download.
    """
    name, home = str(name_or_path), Path(__file__).resolve().parent
    if name == "imagenet":
        if backbone not in ("resnet50", "resnet101"):
            raise ValueError(
                f"'imagenet' needs BACKBONE 'resnet50' or 'resnet101', got {backbone!r}; "
                "give the path of a file that fits"
            )
        name = str(backbone)
    elif name in SHIPPED:
        return _existing(home / "samples" / f"{name}.pth")
    elif name != "coco":
        return _existing(name_or_path)
    file = Path(SOURCES[name].url).name
    for folder in (Path.cwd(), home, cache_folder()):
        for candidate in (folder / file, (folder / file).with_suffix(".pth")):
            if candidate.is_file():
                return candidate
    return download(name)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, ["coco", "imagenet", *beside])
        hint = f", did you mean {' or '.join(close)}?" if close else ""
        raise FileNotFoundError(f"no weight file {path}{hint} (a path, 'coco' or 'imagenet')")
    return path


def cache_folder() -> Path:
    """$MASK_RCNN_HOME, or mask_rcnn in the user's cache folder."""
    if home := os.environ.get("MASK_RCNN_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mask_rcnn"


def download(name: str, folder: str | Path | None = None, progress: bool = True) -> Path:
    """Downloads a published file once; an interrupted download is resumed.

    Args:
        name: "coco", "resnet50", "resnet101" (torchvision's) or "resnet50_keras".
        folder: where to keep it; None is cache_folder().
        progress: show a progress bar.

    Raises:
        ValueError: no such name, or the file is not what was published.
        ConnectionError: the network or the server fails.
    """
    if name not in SOURCES:
        raise ValueError(f"name must be one of {', '.join(SOURCES)}, got {name!r}")
    source = SOURCES[name]
    target = (Path(folder) if folder else cache_folder()).absolute() / Path(source.url).name
    if target.is_file():
        if fault := _fault(target, source):
            raise ValueError(f"{target} has {fault}; delete it to download it again")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        fetch(source.url, part, progress)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"cannot download {source.url} ({error}); try again, which resumes it, "
            f"or save that address by other means as {target}"
        ) from error
    if fault := _fault(part, source):
        part.unlink()
        raise ValueError(f"the download of {source.url} had {fault} and was deleted; try again")
    os.replace(part, target)
    return target


def fetch(url: str, part: Path, progress: bool) -> None:
    """Downloads into `part`, after what is already there."""
    from tqdm import tqdm

    start = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "mask-rcnn", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing comes after what is there: whole or wrong, _fault tells
            return
        raise
    if response.status != 206:  # the server sends it from the beginning
        start = 0
    length = response.headers["Content-Length"]
    total = start + int(length) if length else None
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=not progress)
    with response, bar, part.open("ab" if start else "wb") as file:
        while chunk := response.read(1 << 20):
            file.write(chunk)
            bar.update(len(chunk))
        size = file.tell()
    if total is not None and size < total:  # http.client says nothing of it
        raise ConnectionError(f"the connection broke after {size:,} of {total:,} bytes")


def _fault(path: Path, source: Source) -> str | None:
    """What distinguishes the file from the published one."""
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        return f"{size:,} bytes instead of {source.size:,}"
    if source.checksum:
        algorithm, _, expected = source.checksum.partition(":")
        digest = hashlib.new(algorithm, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if not digest.hexdigest().startswith(expected):
            return f"the {algorithm} {digest.hexdigest()} instead of {expected}"
    return None


# Command line


def convert(source: str | Path, target: str | Path) -> None:
    """Writes a weight file of any format as a checkpoint (.pth), which loads faster."""
    source, target = _existing(source), Path(target)
    if target.suffix != ".pth" or (target.exists() and target.samefile(source)):
        raise ValueError(f"OUT must end in .pth and be another file than IN, got {target}")
    file = read_state_dict(source)
    _save_checkpoint(file.state_dict, file.config, target)


def describe(path: str | Path) -> str:
    """Format, size, backbone and classes of a weight file, for people."""
    file = read_state_dict(path)
    state, kind, config = file.state_dict, file.format, file.config
    numbers = sum(tensor.numel() for tensor in state.values())
    head = state.get("classifier.linear_class.weight")
    return (
        f"{path}: format {kind}, {len(state)} tensors, {numbers:,} numbers\n"
        f"backbone: {_depth(_blocks(state))}, style {config['BACKBONE_STYLE']}\n"
        f"classes: {'none, no heads' if head is None else len(head)}"
    )


def build_parser() -> cli.Parser:
    """The parser of the command line."""
    parser = cli.Parser(
        prog="weights.py",
        description="Converts, downloads and describes weight files of Mask R-CNN.",
        epilog="""examples:
  python weights.py download coco
  python weights.py info mask_rcnn_coco.h5
  python weights.py convert mask_rcnn_coco.h5 mask_rcnn_coco.pth""",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("convert", help="write a .h5 or .pth as a checkpoint")
    command.add_argument("source", metavar="IN", help="any weight file")
    command.add_argument("target", metavar="OUT", help="the .pth to write")
    command.set_defaults(run=lambda args: convert(args.source, args.target))
    command = commands.add_parser("download", help="fetch published weights")
    command.add_argument("name", metavar="NAME", help=", ".join(SOURCES))
    command.add_argument("--folder", help="where to keep it (default: the cache folder)")
    command.set_defaults(run=lambda args: print(download(args.name, args.folder)))
    command = commands.add_parser("info", help="format, size, backbone and classes of a file")
    command.add_argument("file", metavar="FILE", help="any weight file")
    command.set_defaults(run=lambda args: print(describe(args.file)))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
