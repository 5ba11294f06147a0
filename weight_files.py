"""What a weight file holds, whatever its format, under the names of model.MaskRCNN.

Formats, recognised by content: Matterport's Keras .h5 (models of any class count, and the ResNet-50
"notop" file), .pth files of the port, own checkpoints, torchvision's ResNets, and safetensors of
any of these names. What else people take for weights gets words that help.

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

import torch
from torch import Tensor

import keras_h5
from downloads import SOURCES, existing, printable

RESNETS: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}
STYLES = ("keras", "torchvision")


class WeightFile(NamedTuple):
    """The content of a weight file under our names.

    Attributes:
        path: where it was read.
        state_dict: name -> tensor on the CPU.
        format: "keras", "torchvision", "safetensors", "pytorch" (a plain state_dict) or
            "checkpoint".
        config: what the file tells about its model; always has BACKBONE_STYLE.
        zeroed: convolution biases of the backbone and BatchNorm shifts (Keras' center=False) that
            the file does not have; 0 in state_dict.
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


# Our modules; those of a backbone that is a callable may have any name below fpn.C1 to fpn.C5.
_MODULES = (
    r"fpn\.(?:C[1-5]|P[2-5]_conv[12])|rpn\.conv_(?:shared|class|bbox)"
    r"|classifier\.(?:conv[12]|bn[12]|linear_class|linear_bbox)|mask\.(?:conv[1-5]|bn[1-4]|deconv)"
)
_OURS = re.compile(rf"(?:{_MODULES})\..+", re.DOTALL)
# What comes before the names where a model is part of another module: module. (DataParallel),
# model. (Lightning) and so on. A ResNet of torchvision is known by a block of three convolutions.
_PREFIX = re.compile(rf"(.*\.|)(?:(?:{_MODULES})\.|layer1\.0\.conv3\.weight$)", re.DOTALL)
_FOREIGN = {
    "Detectron2": r"backbone\.bottom_up\.|proposal_generator\.",
    "maskrcnn-benchmark": r"backbone\.body\.stem\.|roi_heads\.\w+\.feature_extractor\.",
    "torchvision": r"backbone\.body\.|rpn\.head\.",
    "MMDetection": r"neck\.|rpn_head\.|roi_head\.|bbox_head\.",
}
# Where training programs put the state_dict among other things.
_CONTAINERS = (
    *("model", "state_dict", "model_state_dict", "model_state", "net", "network"),
    *("weights", "module"),
)
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
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        content = _read_safetensors(path)
    else:
        raise ValueError(f"{path} {_what_else(path, head)}")
    state, kind, config, training = content
    # Some more tensors may be there, of another branch or a second model.
    if sum(_OURS.fullmatch(key) is not None for key in state) * 4 < max(len(state), 1):
        raise ValueError(
            f"{path} holds neither Mask R-CNN weights nor a ResNet-50 or ResNet-101; "
            f"its tensors: {group_names(state) or 'none'}"
        )
    # The bytes of a Keras file were counted before they were read.
    size = path.stat().st_size
    _check_tensors(path, state, None if kind == "keras" else keras_h5.MOST_EXPANSION * size)
    config.setdefault("BACKBONE_STYLE", "torchvision" if kind == "torchvision" else "keras")
    if config["BACKBONE_STYLE"] not in STYLES:
        raise ValueError(
            f"{path} must have a BACKBONE_STYLE of {' or '.join(STYLES)} in its config, got "
            f"{config['BACKBONE_STYLE']!r:.80}; use another checkpoint"
        )

    zeroed: list[str] = []
    unscaled: list[str] = []
    if kind in ("keras", "torchvision"):
        zeroed = _add_biases(state)
    if kind == "keras":
        norms = [key.removesuffix(".running_mean") for key in state if "running_mean" in key]
        for leaf, value, added in (("bias", 0.0, zeroed), ("weight", 1.0, unscaled)):
            for module in norms:
                if f"{module}.{leaf}" not in state:
                    mean = state[f"{module}.running_mean"]
                    state[f"{module}.{leaf}"] = torch.full_like(mean, value)
                    added.append(f"{module}.{leaf}")
    return WeightFile(path, state, kind, config, zeroed, training, unscaled)


def _add_biases(state: dict[str, Tensor]) -> list[str]:
    """Gives the backbone's convolutions a bias of 0 where they have none; returns which."""
    added = []
    for key, tensor in list(state.items()):
        bias = re.sub(r"weight$", "bias", key)
        if key.startswith("fpn.C") and tensor.ndim == 4 and bias not in state:
            state[bias] = tensor.new_zeros(len(tensor))
            added.append(bias)
    return added


def blocks_of(keys: Iterable[str]) -> tuple[int, ...]:
    """The number of residual blocks in C2..C5."""
    matches = [re.match(r"fpn\.C([2-5])\.(\d+)\.", key) for key in keys]
    blocks = {match.groups() for match in matches if match}
    return tuple(sum(stage == number for stage, _ in blocks) for number in "2345")


def depth_in_words(blocks: tuple[int, ...]) -> str:
    """Blocks in words: 3-4-6-3 blocks (resnet50)."""
    name = f" ({RESNETS[blocks]})" if blocks in RESNETS else ""
    return "-".join(map(str, blocks)) + " blocks" + name


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
    state = {} if data == {} else _state_dict_in(data)
    if state is None:
        names = ", ".join(map(str, list(data)[:20])) if isinstance(data, dict) else ""
        raise ValueError(
            f"{path} must hold a state_dict, alone or under {', '.join(map(repr, _CONTAINERS))}, "
            f"got {printable(names) or type(data).__name__}; save model.state_dict() alone"
        )
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


def _state_dict_in(data: Any, levels: int = 3) -> Mapping[Any, Tensor] | None:
    """The first dict of tensors in what a file holds."""
    if not isinstance(data, Mapping) or levels == 0:
        return None
    if data and all(isinstance(item, Tensor) for item in data.values()):
        return data
    found = (_state_dict_in(data.get(name), levels - 1) for name in _CONTAINERS)
    return next((state for state in found if state is not None), None)


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
    names = {key: t for key, t in names.items() if not key.endswith("num_batches_tracked")}
    found = Counter(match[1] for key in names if (match := _PREFIX.match(key)))
    prefix = max(found, key=found.__getitem__, default="")  # the first of those as frequent
    if not any(_OURS.fullmatch(key.removeprefix(prefix)) for key in names):
        _refuse_others(path, names)
    state: dict[str, Tensor] = {}
    for key, tensor in names.items():
        name = key.removeprefix(prefix)
        if name in state:
            raise ValueError(
                f"{path} has two tensors for {printable(name)}, with and without "
                f"{printable(prefix)!r}; save one state_dict"
            )
        state[name] = tensor.detach()
    if {"conv1.weight", "layer1.0.conv3.weight"} <= state.keys():
        return _Content(_from_torchvision(state), "torchvision", content.config)
    return content._replace(state=state)


def _refuse_others(path: Path, names: Iterable[str]) -> None:
    for program, pattern in _FOREIGN.items():
        if any(re.match(rf"(?:\w+\.)*?(?:{pattern})", name) for name in names):
            raise ValueError(
                f"{path} holds weights of a network of {program}, which is built otherwise than "
                f"this library's Mask R-CNN and cannot be converted; run it with {program}, or "
                "start from 'coco' or 'imagenet'"
            )


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
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return (
            "is a pickle that torch.save did not write, and is not opened, since that could run "
            "code; if you trust its origin (Detectron2's .pkl is another network), load it "
            "yourself and save a state_dict with torch.save"
        )
    if path.suffix in (".pb", ".index", ".meta", ".onnx", ".tflite") or ".data-000" in path.name:
        return (
            f"is part of another program's model ({printable(path.name)}); load that with Keras "
            "and write it as .h5: model.save('model.h5')"
        )
    return (
        f"is neither HDF5 (.h5) nor a torch file (.pth) nor safetensors: {size:,} bytes, starting "
        f"with {head[:8]!r}; download or copy it again"
    )
