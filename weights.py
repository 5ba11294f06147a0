"""Weights of a model: load, save and convert.

Reading a file is in weight_files.py, downloading one in downloads.py.

    python weights.py info mask_rcnn_coco.h5
    python weights.py convert mask_rcnn_coco.h5 mask_rcnn_coco.pth
    python weights.py download coco
    python weights.py export coco coco.onnx
"""

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import cli
import utils
from config import BACKBONE_OPTIONS, RESNETS
from downloads import SOURCES, Source, cache_folder, download, existing, fetch, find_weights
from keras_h5 import KERAS_LAYERS, WEIGHTLESS_LAYERS, keras_module
from weight_files import (
    SIZES,
    WeightFile,
    blocks_of,
    depth_in_words,
    group_names,
    options_of_shapes,
    printable,
    read_state_dict,
)

__all__ = [
    "SOURCES",
    "VERSION",
    "LoadReport",
    "Source",
    "WeightFile",
    "cache_folder",
    "convert",
    "describe",
    "download",
    "fetch",
    "find_weights",
    "load_weights",
    "plain",
    "read_options",
    "read_state_dict",
    "save_weights",
]

VERSION = "1.0.0"  # of the library, as in pyproject.toml

# The convolution that the image goes into, and the layers with a part for each class.
STEM = "fpn.C1.0.weight"
CLASS_MODULES = {"classifier.linear_class", "classifier.linear_bbox", "mask.conv5"}


# Loading and saving


class LoadReport(NamedTuple):
    """What load_weights did; every list holds state_dict keys.

    `zeroed` and `unscaled` are what the file does not have, see WeightFile: set to 0 and to 1, and
    counted as loaded.
    """

    path: Path
    format: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    excluded: list[str]
    zeroed: list[str]
    unscaled: list[str]

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.format}): {len(self.loaded)} tensors loaded"]
        for name in self._fields[3:]:
            if keys := getattr(self, name):
                lines.append(f"  {len(keys)} {name}: {group_names(keys)}")
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    path: str | Path | WeightFile,
    exclude: Sequence[str] = (),
    skip_mismatched: bool = False,
    verbose: bool = True,
) -> LoadReport:
    """Copies the tensors of a weight file into the model, all or (on an error) none of them.

    What the ResNet needs (place of the stride, BatchNorm epsilon, border, mean and deviation of
    the pixels) follows the file that it comes from, through `model.set_backbone` where the model
    has it.

    Args:
        model: MaskRCNN, or a module with state_dict keys of the same pattern.
        path: a file of any format that read_state_dict knows, or a name, see find_weights; or what
            read_state_dict returned, so that a file is read once.
        exclude: what to leave as it is: modules ("mask", "classifier.linear_class"), regular
            expressions of modules, or Matterport's layers ("mrcnn_bbox_fc").
        skip_mismatched: leave tensors of another shape as they are instead of raising, unless it
            is the first convolution, without which the backbone is worth nothing.
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
        unscaled=[key for key in loaded if key in file.unscaled],
    )

    _check_fit(report, found, wanted, skip_mismatched)
    set_backbone = getattr(model, "set_backbone", None)
    if set_backbone and any(key.startswith("fpn.C") for key in loaded):
        options = {name: file.config[name] for name in BACKBONE_OPTIONS if name in file.config}
        if STEM not in loaded:  # which takes the pixels
            options = {k: v for k, v in options.items() if k not in ("MEAN_PIXEL", "STD_PIXEL")}
        set_backbone(options)
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
    blocks, model_blocks = blocks_of(found), blocks_of(wanted)
    if any(blocks) and any(model_blocks) and blocks != model_blocks:
        raise ValueError(
            f"{path} has a backbone of {depth_in_words(found)}, the model one of "
            f"{depth_in_words(wanted)}; set BACKBONE to that of the file, or load a file for "
            "that of the model"
        )
    if mismatched and not skip_mismatched:
        raise ValueError(f"{path}: {_differences(mismatched, found, wanted)}")
    backbone = [key in report.loaded for key in wanted if key.startswith("fpn.C")]
    if sum(backbone) * 2 < len(backbone):
        raise ValueError(
            f"{path} fills only {sum(backbone)} of the {len(backbone)} backbone tensors, fpn.C1 to "
            "fpn.C5; use a file that has them, or exclude=['fpn.C.*'] to keep those of the model"
        )
    if STEM in mismatched:  # the rest of the backbone is worth nothing after it
        raise ValueError(f"{path}: {_differences([STEM], found, wanted)}")


def _differences(keys: list[str], found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """Tensors of another shape, and what to do about them."""
    shapes = [f"{k} {tuple(found[k].shape)} / {tuple(wanted[k].shape)}" for k in keys[:4]]
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    if STEM in keys and found[STEM].ndim == 4 and found[STEM].shape[1] != wanted[STEM].shape[1]:
        remedy = (
            f"the first convolution is for images of {found[STEM].shape[1]} channels: set "
            "IMAGE_CHANNEL_COUNT (and MEAN_PIXEL) to that, or exclude=['conv1'] to start it at "
            "random and train all layers"
        )
    elif set(modules) <= CLASS_MODULES:
        remedy = f"use skip_mismatched=True or exclude={modules}, and train these for other classes"
    else:
        remedy = (
            "the file is of a network of other sizes, which MaskRCNN.from_weights(file) builds; or "
            "set the options of yours as read_options(file) tells them"
        )
    more = ", ..." if len(keys) > 4 else ""
    count = f"{len(keys)} tensors have" if len(keys) > 1 else "1 tensor has"
    return f"{count} another shape (file / model): {', '.join(shapes)}{more}; {remedy}"


def save_weights(
    model: nn.Module, path: str | Path, training: dict[str, Any] | None = None
) -> None:
    """Writes a checkpoint {"model": state_dict, "config": plain values, "version"}, atomically.

    Args:
        training: plain values and tensors of a run, to be kept in it as well.
    """
    config = getattr(model, "config", None)
    values = plain(config.to_dict()) if config else {}
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
        module = "rpn" if name == "rpn_model" else keras_module(name) or name
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


def read_options(path: str | Path | WeightFile) -> dict[str, Any]:
    """Options of Config for a model that fits a weight file, or what read_state_dict made of it.

    Our checkpoints hold all of them; elsewhere the shapes tell the backbone, widths and classes.
    Raises what read_state_dict raises, and ValueError where the file is but a part of a model or
    a checkpoint's options do not fit its tensors.
    """
    file = path if isinstance(path, WeightFile) else read_state_dict(path)
    state, config = file.state_dict, file.config
    known = options_of_shapes(file.path, state)
    if file.format == "checkpoint" and "BACKBONE" in config:
        for name, value in known.items():
            told = _sizes(config[name]) if name == "BACKBONE" else config.get(name, value)
            if told is not None and told != (_sizes(value) if name == "BACKBONE" else value):
                raise ValueError(
                    f"{file.path} holds a model of {name} {value!r}, but its config says "
                    f"{printable(repr(config[name]))}; use another checkpoint"
                )
        return config
    if not is_whole(file):
        missing = [part for part in SIZES if f"{part}.weight" not in state]
        raise ValueError(f"{file.path} must hold a whole model to detect with, lacks {missing}")
    return {**known, **config}


def is_whole(file: WeightFile) -> bool:
    """Whether a file holds a whole model, and not only a backbone."""
    return all(f"{part}.weight" in file.state_dict for part in SIZES)


def _sizes(option: Any) -> dict[str, Any] | None:
    """BACKBONE as a dict of all sizes; None for a function, which a checkpoint has by its name."""
    sizes = RESNETS.get(option) if isinstance(option, str) else option
    if not isinstance(sizes, dict):
        return None
    blocks = sizes.get("blocks")
    return {
        "groups": 1,
        "width_per_group": 64,
        **sizes,
        "blocks": tuple(blocks) if isinstance(blocks, list | tuple) else blocks,
    }


# Command line


def convert(source: str | Path, target: str | Path) -> None:
    """Writes a weight file of any format as a checkpoint (.pth), which loads faster."""
    source, target = existing(source), Path(target)
    if target.suffix != ".pth" or (target.exists() and target.samefile(source)):
        raise ValueError(f"OUT must end in .pth and be another file than IN, got {target}")
    file = read_state_dict(source)
    _save_checkpoint(file.state_dict, plain(file.config), target)


def describe(path: str | Path) -> str:
    """Format, size, backbone and classes of a weight file, for people."""
    file = read_state_dict(path)
    state, kind, config = file.state_dict, file.format, file.config
    numbers = sum(tensor.numel() for tensor in state.values())
    head, blocks = state.get("classifier.linear_class.weight"), blocks_of(state)
    backbone = (
        f"{depth_in_words(state)}, stride in the {'1x1' if config['STRIDE_IN_1X1'] else '3x3'} "
        f"convolution, BatchNorm epsilon {config['BATCH_NORM_EPS']:g}"
    )
    return (
        f"{path}: format {kind}, {len(state)} tensors, {numbers:,} numbers\n"
        f"backbone: {backbone if any(blocks) else 'none of residual blocks'}\n"
        f"classes: {'none, no heads' if head is None else len(head)}"
    )


def _export(args: argparse.Namespace) -> None:
    # By its name, since the network and its export stand below this module; see CONTRIBUTING.md.
    importlib.import_module("export").run(args.model, args.target, args.min_confidence)


def build_parser() -> cli.Parser:
    """The parser of the command line."""
    parser = cli.Parser(
        prog="weights.py",
        description="Converts, exports, downloads and describes weights of Mask R-CNN.",
        epilog="""examples:
  python weights.py download coco
  python weights.py download detectron2_r101
  python weights.py info mask_rcnn_coco.h5
  python weights.py convert mask_rcnn_coco.h5 mask_rcnn_coco.pth
  python weights.py convert model_final_f10217.pkl detectron2.pth
  python weights.py export nuclei nuclei.onnx
  python weights.py export logs/.../best.pth mine.pt2 --min-confidence 0.5""",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("convert", help="write a .h5, .pth or .pkl as a checkpoint")
    command.add_argument("source", metavar="IN", help="any weight file")
    command.add_argument("target", metavar="OUT", help="the .pth to write")
    command.set_defaults(run=lambda args: convert(args.source, args.target))
    command = commands.add_parser("download", help="fetch published weights")
    command.add_argument("name", metavar="NAME", help=", ".join(SOURCES))
    command.add_argument("--folder", help="where to keep it (default: the cache folder)")
    command.set_defaults(run=lambda args: print(download(args.name, args.folder)))
    command = commands.add_parser("export", help="write a network for ONNX Runtime or torch.export")
    command.add_argument("model", metavar="MODEL", help="a name, as download has it, or a file")
    command.add_argument("target", metavar="OUT", help="the .onnx or .pt2 to write")
    text = "least score of an object, 0 to 1; default: the network's own"
    command.add_argument("--min-confidence", type=cli.share, metavar="X", help=text)
    command.set_defaults(run=_export)
    command = commands.add_parser("info", help="format, size, backbone and classes of a file")
    command.add_argument("file", metavar="FILE", help="any weight file")
    command.set_defaults(run=lambda args: print(describe(args.file)))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
