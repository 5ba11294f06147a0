"""What a weight file holds, whatever its format, under the names of model.MaskRCNN.

Formats, recognised by content: Matterport's Keras .h5 (models of any class count, and the ResNet-50
"notop" file), .pth files of the port, own checkpoints, torchvision's and detectron2's Mask R-CNN
and ResNets (.pth, .pkl), and safetensors of any of these names. What else people take for weights
gets words that help.

A file is not trusted: nothing in it is executed, no other file is read, and what it declares is
compared with its size before memory is taken.
"""

import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import families
import keras_h5
import pickles
from config import RESNETS
from downloads import SOURCES, existing, printable
from presets import KERAS_RESNET, TORCHVISION_RESNET

# What BACKBONE_STYLE, an option of version 1.0, stands for.
STYLES = {"keras": KERAS_RESNET, "torchvision": TORCHVISION_RESNET}


class WeightFile(NamedTuple):
    """The content of a weight file under our names.

    Attributes:
        path: where it was read.
        state_dict: name -> tensor on the CPU.
        format: "keras", "safetensors", "pytorch" (a plain state_dict), "checkpoint", or one of
            families.FORMATS.
        config: what the file tells about its model; always has STRIDE_IN_1X1, BATCH_NORM_EPS,
            STEM_POOL_PADDING and STD_PIXEL, as the ResNet needs them.
        zeroed: convolution biases and BatchNorm shifts (Keras' center=False) that the file does
            not have; 0 in state_dict.
        training: what a checkpoint of a run holds besides, see training.py; else None.
        unscaled: BatchNorm scales that the file does not have (Keras' scale=False); 1 in
            state_dict.
    """

    path: Path
    state_dict: dict[str, Tensor]
    format: str
    config: dict[str, Any]
    zeroed: list[str]
    training: dict[str, Any] | None = None
    unscaled: Sequence[str] = ()


class _Content(NamedTuple):
    """What the reader of a format returns; see WeightFile."""

    state: dict[str, Tensor]
    format: str
    config: dict[str, Any]
    training: dict[str, Any] | None = None
    author: object = None  # what a .pkl says of who wrote it


# Our modules; those of a backbone that is a callable may have any name below fpn.C1 to fpn.C5.
_MODULES = (
    r"fpn\.(?:C[1-5]|P[2-5]_(?:conv|bn)[12])|rpn\.conv_(?:shared\d*|class|bbox)"
    r"|classifier\.(?:convs\.\d+\.[01]|conv[12]|bn[12]|linear_class|linear_bbox)"
    r"|mask\.(?:conv[1-5]|bn[1-4]|deconv)"
)
_OURS = re.compile(rf"(?:{_MODULES})\..+", re.DOTALL)
# What comes before the names where a model is part of another module: module. (DataParallel),
# model. (Lightning) and so on.
_PREFIX = re.compile(rf"(.*\.|)(?:{_MODULES})\.", re.DOTALL)
# Where training programs put the state_dict among other things.
_CONTAINERS = (
    *("model", "state_dict", "model_state_dict", "model_state", "net", "network"),
    *("weights", "module", "blobs"),
)
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # a pickled number; before torch 1.6
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_state_dict(path: str | Path) -> WeightFile:
    """Reads a weight file of any known format.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the format is unknown, the file is damaged, or a tensor is not one of finite
            floating-point numbers.
    """
    path = existing(path)
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        content = _read_keras(path)
    elif head.startswith((b"PK\x03\x04", b"PK\x05\x06")):  # a zip; an empty one
        _check_zip(path)
        content = _read_torch(path)
    elif head.startswith(_OLD_TORCH):
        content = _read_torch(path)
    elif head.startswith(_PICKLE) or (path.suffix == ".pkl" and head[:1] in (b"(", b"}")):
        content = _read_pickle(path)
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        content = _read_safetensors(path)
    else:
        raise ValueError(f"{path} {_what_else(path, head)}")
    state, kind, config, training, author = content
    # Some more tensors may be there, of another branch or a second model.
    if sum(_OURS.fullmatch(key) is not None for key in state) * 4 < max(len(state), 1):
        raise ValueError(
            f"{path} holds neither Mask R-CNN weights nor a ResNet of 50 layers or more; "
            f"its tensors: {group_names(state) or 'none'}"
        )
    # The bytes of a Keras file were counted before they were read.
    size = path.stat().st_size
    _check_tensors(path, state, None if kind == "keras" else keras_h5.MOST_EXPANSION * size)
    if kind in families.FORMATS:
        try:
            state, options = families.convert(kind, state, author)
        except families.Refused as error:
            raise ValueError(f"{path} {error}") from error
        whole = "classifier.linear_class.weight" in state
        shapes = options_of_shapes(path, state) if whole else {}
        config = options | shapes | config
    _set_backbone_options(path, config)

    zeroed: list[str] = []
    unscaled: list[str] = []
    if kind == "keras" or kind in families.FORMATS:
        zeroed = _add_biases(state, "fpn.C" if kind == "keras" else "")
    if kind == "keras":
        norms = [key.removesuffix(".running_mean") for key in state if "running_mean" in key]
        for leaf, value, added in (("bias", 0.0, zeroed), ("weight", 1.0, unscaled)):
            for module in norms:
                if f"{module}.{leaf}" not in state:
                    mean = state[f"{module}.running_mean"]
                    state[f"{module}.{leaf}"] = torch.full_like(mean, value)
                    added.append(f"{module}.{leaf}")
    return WeightFile(path, state, kind, config, zeroed, training, unscaled)


def _set_backbone_options(path: Path, config: dict[str, Any]) -> None:
    """Fills in what the ResNet needs; BACKBONE_STYLE was one option for all of that."""
    style = config.pop("BACKBONE_STYLE", None)
    if style is not None:
        if not isinstance(style, str) or style not in STYLES:
            raise ValueError(
                f"{path} must have a BACKBONE_STYLE of {' or '.join(STYLES)} in its config, got "
                f"{style!r:.80}; use another checkpoint"
            )
        config |= STYLES[style]
    for name, value in KERAS_RESNET.items():
        config.setdefault(name, value)


def _add_biases(state: dict[str, Tensor], start: str) -> list[str]:
    """Gives our convolutions a bias of 0 where they have none; returns which.

    Args:
        start: of their names.
    """
    added = []
    for key, tensor in list(state.items()):
        bias = re.sub(r"weight$", "bias", key)
        ours = key.startswith(start) and _OURS.fullmatch(key)
        if ours and tensor.ndim == 4 and bias != key and bias not in state:
            state[bias] = tensor.new_zeros(len(tensor))
            added.append(bias)
    return added


def blocks_of(keys: Iterable[str]) -> tuple[int, ...]:
    """The number of residual blocks in C2..C5."""
    matches = [re.match(r"fpn\.C([2-5])\.(\d+)\.", key) for key in keys]
    blocks = {match.groups() for match in matches if match}
    return tuple(sum(stage == number for stage, _ in blocks) for number in "2345")


def backbone_of(state: Mapping[str, Tensor]) -> str | dict[str, Any] | None:
    """What BACKBONE calls the ResNet of these tensors; None without its first convolution."""
    stem, inner = state.get("fpn.C1.0.weight"), state.get("fpn.C2.0.conv2.weight")
    if stem is None or stem.ndim != 4:
        return None
    sizes: dict[str, Any] = {"blocks": blocks_of(state), "width": stem.shape[0]}
    if inner is not None and inner.ndim == 4 and inner.shape[1]:
        # As Config counts, for a first stage of 64 channels.
        groups, width = inner.shape[0] // inner.shape[1], inner.shape[1] * 64 // stem.shape[0]
        if (groups, width) != (1, 64):
            sizes |= {"groups": groups, "width_per_group": width}
    return next((name for name, known in RESNETS.items() if known == sizes), sizes)


def depth_in_words(state: Mapping[str, Tensor]) -> str:
    """Blocks in words: 3-4-6-3 blocks (resnet50)."""
    name = backbone_of(state)
    return (
        "-".join(map(str, blocks_of(state)))
        + " blocks"
        + (f" ({name})" if isinstance(name, str) else "")
    )


# The layers whose shapes tell options, and their dimensions.
SIZES = {"fpn.C1.0": 4, "fpn.P2_conv1": 4, "rpn.conv_shared": 4, "classifier.linear_class": 2}


def options_of_shapes(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of Config that the tensors tell, as far as they are there."""
    shapes = {}
    for module, dimensions in SIZES.items():
        if (tensor := state.get(f"{module}.weight")) is not None:
            if tensor.ndim != dimensions:
                raise ValueError(
                    f"{path} must have {dimensions} dimensions in {module}.weight, got "
                    f"{tuple(tensor.shape)}; use a file of a Mask R-CNN of this kind"
                )
            shapes[module] = tensor.shape
    modules = {key.rpartition(".")[0] for key in state}
    options: dict[str, Any] = {}
    if "fpn.C1.0" in shapes:
        options["BACKBONE"] = backbone_of(state)
    if "fpn.P2_conv1" in shapes:
        options["TOP_DOWN_PYRAMID_SIZE"] = shapes["fpn.P2_conv1"][0]
        options["FPN_BATCH_NORM"] = "fpn.P2_bn1" in modules
    if "rpn.conv_shared" in shapes:
        options["RPN_CHANNELS"] = shapes["rpn.conv_shared"][0]
        options["RPN_CONV_LAYERS"] = sum(name.startswith("rpn.conv_shared") for name in modules)
    if "classifier.linear_class" in shapes:
        classes, channels = shapes["classifier.linear_class"]
        options |= {"NUM_CLASSES": classes, "FPN_CLASSIF_FC_LAYERS_SIZE": channels}
    first = state.get("classifier.conv1.weight")
    if first is not None and first.ndim == 4:
        layers = {name for name in modules if re.fullmatch(r"classifier\.convs\.\d+\.0", name)}
        options["POOL_SIZE"] = first.shape[2]
        options["CLASSIFIER_CONV_LAYERS"] = len(layers)
        options["CLASSIFIER_FC_LAYERS"] = 2 if "classifier.conv2" in modules else 1
        options["HEAD_FC_BATCH_NORM"] = "classifier.bn1" in modules
    if "mask.conv1" in modules:
        options["HEAD_CONV_BATCH_NORM"] = "mask.bn1" in modules
    return options


def group_names(keys: Iterable[str], limit: int = 6) -> str:
    """Names of tensors in one line: mask.conv5.{weight,bias}, ... and 3 more."""
    leaves: dict[str, list[str]] = {}
    for key in keys:
        module, _, leaf = key.rpartition(".")
        leaves.setdefault(module, []).append(leaf)
    names = [
        f"{module}.{leaf[0] if len(leaf) == 1 else '{' + ','.join(leaf) + '}'}".lstrip(".")
        for module, leaf in leaves.items()
    ]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(name) for name in names[:limit]) + more


# --- Formats -------------------------------------------------------------------------------------


def _read_keras(path: Path) -> _Content:
    try:
        return _Content(keras_h5.read_keras(path), "keras", {})
    except keras_h5.Refused as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(_damage(path, error)) from error


def _read_safetensors(path: Path) -> _Content:
    import safetensors.torch

    try:
        state = safetensors.torch.load_file(path)
    except Exception as error:
        raise ValueError(_damage(path, error)) from error
    # Of their own memory: that of safetensors is the file, which may change or go away.
    content = _named(path, state, _Content({}, "safetensors", {}))
    return content._replace(state={key: tensor.clone() for key, tensor in content.state.items()})


def _read_pickle(path: Path) -> _Content:
    try:
        data = pickles.read_pickle(path)
    except pickles.Refused as error:
        raise ValueError(
            f"{path} is a pickle that {error}: it may hold arrays of numbers and plain values "
            "alone; if you trust its origin, load it yourself and save a state_dict with torch.save"
        ) from error
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(_damage(path, error)) from error
    arrays = _state_dict_in(data, np.ndarray)
    if arrays is None:
        raise ValueError(f"{path} must hold arrays, {_containers(data)}")
    state, left = {}, path.stat().st_size
    for key in list(arrays):
        array = arrays.pop(key)  # one after the other, since they are copied
        if isinstance(array, np.ndarray):
            left -= array.nbytes
            if left < 0:
                raise ValueError(
                    f"{path} has arrays of more bytes than it has itself, with {array.shape} for "
                    f"{printable(str(key))}; save each array once"
                )
            native = array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
            state[key] = torch.from_numpy(native)
    author = data.get("__author__")
    return _named(path, state, _Content({}, "pytorch", {}, author=author))


def _read_torch(path: Path) -> _Content:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles; what matters is checked below
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors and plain values, which "
            "torch.load(weights_only=True) refuses; if you trust its origin, load it yourself and "
            "save its state_dict alone"
        ) from error
    except Exception as error:
        raise ValueError(_damage(path, error)) from error
    state = {} if data == {} else _state_dict_in(data, Tensor)
    if state is None:
        raise ValueError(f"{path} must hold a state_dict, {_containers(data)}")
    content = _Content({}, "pytorch", {})
    if "config" in data and data.get("model") is state:
        config, training = data["config"] or {}, data.get("training")
        if not isinstance(config, dict) or not _is_plain(config):
            raise ValueError(f"{path} must have a config of plain values; use another checkpoint")
        if training is not None and not isinstance(training, dict):
            raise ValueError(
                f"{path} must have a dict under 'training', got {type(training).__name__}; "
                "use another checkpoint"
            )
        content = _Content({}, "checkpoint", dict(config), training)
    return _named(path, state, content)


def _state_dict_in(data: Any, kind: type, levels: int = 3) -> Any:
    """The first dict of tensors, or of arrays, in what a file holds."""
    if not isinstance(data, Mapping) or levels == 0:
        return None
    # The oldest .pkl files have an array beside each of plain values.
    fits = any if kind is np.ndarray else all
    if data and fits(isinstance(item, kind) for item in data.values()):
        return data
    found = (_state_dict_in(data.get(name), kind, levels - 1) for name in _CONTAINERS)
    return next((state for state in found if state is not None), None)


def _containers(data: Any) -> str:
    """Where a state_dict may be, and what there is instead."""
    names = ", ".join(map(str, list(data)[:20])) if isinstance(data, dict) else ""
    return (
        f"alone or under {', '.join(map(repr, _CONTAINERS))}, got "
        f"{printable(names) or type(data).__name__}; save model.state_dict() alone"
    )


def _is_plain(config: dict[Any, Any]) -> bool:
    """Whether these are options: names and values of few levels, none of which holds itself."""
    waiting: list[tuple[Any, int]] = [(config, 0)]
    values = 0
    while waiting:
        value, level = waiting.pop()
        values += 1
        if level > 8 or values > 100_000:
            return False
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                return False
            waiting += [(item, level + 1) for item in value.values()]
        elif isinstance(value, list | tuple):
            waiting += [(item, level + 1) for item in value]
        elif value is not None and not isinstance(value, bool | int | float | str):
            return False
    return True


def _named(path: Path, tensors: Mapping[Any, Tensor], content: _Content) -> _Content:
    """The tensors under our names; `content` is what is known of the file besides."""
    names = {str(key).replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}
    counted = any("backbone.body.bn1.num_batches_tracked" in key for key in names)
    names = {key: t for key, t in names.items() if not key.endswith("num_batches_tracked")}
    found = Counter(match[1] for key in names if (match := _PREFIX.match(key)))
    prefix = max(found, key=found.__getitem__, default="")  # the first of those as frequent
    renamed = {key: key.removeprefix(prefix) for key in names}
    if not any(_OURS.fullmatch(name) for name in renamed.values()):
        try:
            family = families.recognise(names)
        except families.Refused as error:
            raise ValueError(f"{path} {error}") from error
        if family is not None:
            kind, prefix = family
            ours = families.rename(kind, [key.removeprefix(prefix) for key in names])
            renamed = {key: ours[key.removeprefix(prefix)] for key in names}
            config = dict(content.config)
            if kind == families.TORCHVISION and counted:
                # Its own BatchNorm; the published one is frozen, and has an epsilon of 0.
                config["BATCH_NORM_EPS"] = TORCHVISION_RESNET["BATCH_NORM_EPS"]
            content = content._replace(format=kind, config=config)
    state: dict[str, Tensor] = {}
    for key, name in renamed.items():
        if name in state:
            raise ValueError(
                f"{path} has two tensors for {printable(name)}, one of them {printable(key)!r}; "
                "save one state_dict"
            )
        if name:
            state[name] = names[key].detach()
    return content._replace(state=state)


# --- Checks --------------------------------------------------------------------------------------


def _check_tensors(path: Path, state: dict[str, Tensor], most: int | None) -> None:
    """Each must be dense, those of ours of floating-point numbers, all finite, in `most` bytes."""
    total = 0
    for key, tensor in state.items():
        ours = _OURS.fullmatch(key) is not None
        dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)
        if not dense or tensor.device.type != "cpu" or type(tensor) is not Tensor:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            kind = "quantised" if tensor.is_quantized else kind if not dense else tensor.device.type
            raise ValueError(
                f"{path} must hold dense tensors, got a {kind} one for {printable(key)}; save "
                "the weights of the model before it is quantised, pruned or emptied"
            )
        integer = not (tensor.is_floating_point() or tensor.is_complex())
        if tensor.dtype not in _FLOATS and (ours or not integer):
            raise ValueError(
                f"{path} must hold floating-point weights of 16 to 64 bits, got "
                f"{str(tensor.dtype).removeprefix('torch.')} for {printable(key)}; save the "
                "weights of the model before it is quantised"
            )
        if ours and tensor.ndim == 0:
            raise ValueError(
                f"{path} must hold arrays, got a single number for {printable(key)}; save "
                "model.state_dict() again"
            )
        total += tensor.numel() * tensor.element_size()
        if most is not None and total > most:
            raise ValueError(
                f"{path} declares tensors of more than {keras_h5.MOST_EXPANSION} times its size, "
                f"with {tuple(tensor.shape)} for {printable(key)}; save contiguous tensors"
            )
        if not _is_finite(tensor):
            raise ValueError(
                f"{path} holds NaN or infinity in {printable(key)}; use an earlier checkpoint"
            )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all are finite in float32, as which a model takes them."""
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    # What is not finite leaves a sum that is not, and a sum takes a fraction of the time.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _check_zip(path: Path) -> None:
    """A zip archive must be one that torch.save wrote, and its checksums right."""
    fault, others = None, None
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if not any(name.endswith("/data.pkl") for name in names):
                others = names
            elif any(name.endswith("/constants.pkl") for name in names):
                fault = "is a TorchScript program; open it with torch.jit.load and save its"
                fault += " state_dict() with torch.save"
            elif any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members):
                fault = "is packed or encrypted in a way that torch.save does not use; unpack it,"
                fault += " torch.load it yourself and save its state_dict"
            elif sum(member.file_size for member in members) > path.stat().st_size:
                fault = "is damaged: it declares more bytes than it has; download or copy it again"
            # torch does not compare the checksums. Without set_crc32_options(True), its default,
            # it writes one and the same number for all.
            elif len({member.CRC for member in members}) > 1 and (bad := archive.testzip()):
                fault = f"is damaged: {printable(bad)!r} does not have the checksum that was"
                fault += " stored with it; download or copy it again"
    except Exception as error:
        raise ValueError(_damage(path, error)) from error
    if others is not None:
        fault = _what_zip(others)
    if fault:
        raise ValueError(f"{path} {fault}")


def _damage(path: Path, error: Exception) -> str:
    sizes = [s.size for s in SOURCES.values() if s.size and s.url.endswith(f"/{path.name}")]
    expected = "".join(f", expected {size:,}" for size in sizes)
    reason = printable(str(error).partition("\n")[0]) or type(error).__name__
    return (
        f"{path} is damaged or truncated ({path.stat().st_size:,} bytes{expected}): {reason}; "
        "download or copy it again"
    )


# --- What is taken for weights -------------------------------------------------------------------

_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")


def _what_zip(names: Sequence[str]) -> str:
    if "model.weights.h5" in names:
        return f"is in the format .keras of Keras 3, {keras_h5.KERAS_3}"
    files = [name for name in names if name.endswith((".h5", ".hdf5", ".pth", ".pt", ".pkl"))]
    if files or any(name.endswith(".safetensors") for name in names):
        inside = files or [name for name in names if name.endswith(".safetensors")]
        shown = ", ".join(map(printable, inside[:3]))
        return f"is a zip archive that holds {shown}; unpack it and give that file"
    shown = ", ".join(map(printable, names[:3])) or "nothing"
    return f"is a zip archive without weights: it holds {shown}; give a .h5, .pth or .safetensors"


def _what_else(path: Path, head: bytes) -> str:
    """What a file is that is no weight file, and what to do."""
    size = path.stat().st_size
    if not head.strip(b"\0"):
        content = "holds nothing but zeros" if head else "is empty"
        return f"{content} ({size:,} bytes); download or copy it again"
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a git-lfs pointer, which stands for the file in a repository; run `git lfs pull` "
            "there, or download the file itself"
        )
    if head.lstrip().startswith(b"<"):
        return "is a web page, saved in place of the file; download the file itself"
    if head.startswith(_PACKED) or head[257:262] == b"ustar":
        return "is a packed archive; unpack it and give the weight file in it"
    if path.suffix in (".pb", ".index", ".meta", ".onnx", ".tflite") or ".data-000" in path.name:
        return (
            f"is part of another program's model ({printable(path.name)}); load that with Keras "
            "and write it as .h5: model.save('model.h5')"
        )
    return (
        f"is neither HDF5 (.h5) nor a torch file (.pth) nor safetensors nor a pickle of arrays "
        f"(.pkl): {size:,} bytes, starting with {head[:8]!r}; download or copy it again"
    )
