"""Networks as files that detect without this library: ONNX, and torch.export's .pt2.

    python weights.py export nuclei nuclei.onnx
    python weights.py export logs/.../best.pth mine.pt2 --min-confidence 0.5

docs/export.md has the inputs and outputs of both.
"""

import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cli
import graph
import utils
from config import Config
from families import class_names
from model import MaskRCNN
from weights import VERSION

OUTPUTS = ("boxes", "class_ids", "scores", "masks", "image_index")
SIDES = ("batch", "height", "width")  # of images, whatever they are
OPSET = 18  # of ONNX, from 2022

# What becomes of NMS in ONNX. In a program of torch it is that of graph.py.
_suppress = torch.library.custom_op(
    "mask_rcnn::suppress",
    graph.suppress,
    mutates_args=(),
    schema="(Tensor boxes, Tensor scores, float iou_threshold, SymInt most) -> Tensor",
)
_suppress.register_fake(lambda boxes, scores, *_: torch.empty_like(scores, dtype=torch.bool))


def export(model: MaskRCNN, path: str | Path) -> None:
    """Writes all of detect, from the pixels of an image on, whole or not at all.

    Args:
        model: with the options that the file is to have, such as DETECTION_MIN_CONFIDENCE.
        path: ends in .onnx or .pt2, which says what is written.

    Raises:
        ValueError: another suffix, a package is missing, or the network cannot be exported.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check(path)
    config = model.config
    if config.IMAGE_RESIZE_MODE == "crop":
        raise ValueError("IMAGE_RESIZE_MODE 'crop' is for training; export with 'square'")
    if [*config.DETECTION_SCALES] != [1.0] or config.DETECTION_FLIPS:
        raise ValueError(
            "an exported network sees an image once: DETECTION_SCALES must be (1.0,) and"
            f" DETECTION_FLIPS (), got {config.DETECTION_SCALES} and {config.DETECTION_FLIPS}"
        )
    try:
        data = to_onnx(model) if path.suffix == ".onnx" else to_pt2(model)
    except Exception as error:  # torch has many kinds, and long messages
        raise ValueError(
            "a network must be one that torch.export can follow, as all those of this library, got"
            f" {type(error).__name__}: {cli.one_line(error)}"
        ) from error
    utils.write_atomic(path, lambda file: file.write(data))


def check(path: Path) -> None:
    """Raises what can be known before an export, which takes a minute."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"OUT must end in .onnx or .pt2, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} must be in a folder that exists; make {path.parent}")
    if path.suffix == ".onnx":
        with cli.extra("onnx"):
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401


def to_pt2(model: MaskRCNN) -> bytes:
    """The content of a .pt2 file."""
    file = io.BytesIO()
    torch.export.save(trace(model, graph.suppress), file, extra_files=about(model.config))
    return file.getvalue()


def to_onnx(model: MaskRCNN) -> bytes:
    """The content of an ONNX file, of standard operators only."""
    from onnxscript import ir, optimizer

    exported = torch.onnx.export(
        trace(model, _suppress),
        (),
        dynamo=True,
        verbose=False,
        optimize=False,  # which ONNX Runtime does when it loads a file
        opset_version=OPSET,
        input_names=["images"],
        output_names=OUTPUTS,
        custom_translation_table=translations(),
    )
    assert exported is not None
    program = exported.model
    optimizer.fold_constants(program)
    optimizer.remove_unused_nodes(program)
    program.graph.inputs[0].shape = ir.Shape([*SIDES, model.config.IMAGE_CHANNEL_COUNT])
    for output in program.graph.outputs:
        assert output.shape is not None
        output.shape = ir.Shape(["objects", *output.shape[1:]])
    program.metadata_props.update(about(model.config))
    return ir.to_proto(program).SerializeToString()


def about(config: Config) -> dict[str, str]:
    """What a program needs to know to show the objects."""
    return {
        "class_names": json.dumps(class_names(config)),
        "mask_paste": config.MASK_PASTE,
        "min_confidence": str(config.DETECTION_MIN_CONFIDENCE),
        "tile": json.dumps(config.DETECTION_TILE),
        "version": VERSION,
    }


def trace(model: MaskRCNN, suppress: graph.Suppress) -> torch.export.ExportedProgram:
    """All of detect as a program of torch, for any number of images of any one size."""
    channels = model.config.IMAGE_CHANNEL_COUNT
    images = torch.zeros(2, 96, 110, channels, dtype=torch.uint8)
    sides = {i: torch.export.Dim(name, min=1) for i, name in enumerate(SIDES)}
    detector = graph.DetectionGraph(model, suppress)
    with torch.no_grad():  # around it, since a change of it within would be a part of the program
        return torch.export.export(detector, (images,), dynamic_shapes=(sides,), strict=False)


def translations() -> dict[Any, Any]:
    """What becomes of operators that torch.onnx does not know."""
    import onnxscript
    from onnxscript import ir

    op: Any = onnxscript.opset18

    def constant(value: Any, dtype: Any = np.int64) -> Any:
        return op.Constant(value=ir.tensor(np.array(value, dtype)))

    def suppress(boxes: Any, scores: Any, iou_threshold: float, most: int) -> Any:
        limits = constant([most]), constant([iou_threshold], np.float32)
        least = constant([graph.LEAST], np.float32)
        selected = op.NonMaxSuppression(boxes, scores, *limits, least)  # [N, (group, class, place)]
        count = op.Slice(op.Shape(selected), constant([0]), constant([1]))
        none = op.Expand(constant(False, bool), op.Shape(scores))
        return op.ScatterND(none, selected, op.Expand(constant(True, bool), count))

    def roi_align(
        features: Any,
        boxes: Any,
        box_index: Any,
        height: int,
        width: int,
        sampling_ratio: int,
        aligned: bool,
    ) -> Any:
        return op.RoiAlign(
            features,
            op.Gather(boxes, constant([1, 0, 3, 2]), axis=1),
            box_index,
            output_height=height,
            output_width=width,
            sampling_ratio=sampling_ratio,
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        )

    def crop_and_resize(
        image: Any, boxes: Any, box_index: Any, height: int, width: int, outside: float
    ) -> Any:
        """RoIAlign with one sample in each bin, in the middle, where crop_and_resize has its own.

        Boxes end at the border at most, where neither has to do with what lies outside.
        """
        size = op.Cast(
            op.Slice(op.Shape(image), constant([2]), constant([4])), to=ir.DataType.FLOAT
        )
        last = op.Sub(size, constant(1, np.float32))
        first, end = op.Split(boxes, axis=1, num_outputs=2)
        first, end = op.Mul(first, last), op.Mul(end, last)
        # One sample is that of a bin which is as large as the box.
        widened = [n - 1 if n > 1 else math.inf for n in (height, width)]
        half = op.Div(op.Sub(end, first), constant([2 * n for n in widened], np.float32))
        # half_pixel, which takes small boxes as they are, moves boxes by half a cell.
        cell = constant(0.5, np.float32)
        cells = op.Concat(
            op.Add(op.Sub(first, half), cell), op.Add(op.Add(end, half), cell), axis=1
        )
        return roi_align(image, cells, box_index, height, width, 1, True)

    def fmin(a: Any, b: Any) -> Any:
        return op.Where(op.IsNaN(a), b, op.Min(a, b))

    def fmax(a: Any, b: Any) -> Any:
        return op.Where(op.IsNaN(a), b, op.Max(a, b))

    def sort(x: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
        """TopK puts equal ones in their order."""
        size = op.Gather(op.Shape(x), constant([dim]))
        return op.TopK(x, size, axis=dim, largest=descending, sorted=True)

    def sym_sqrt(x: Any) -> Any:
        return op.Sqrt(op.Cast(x, to=ir.DataType.FLOAT))

    ops, aten = torch.ops, torch.ops.aten
    return {
        ops.mask_rcnn.suppress.default: suppress,
        ops.roialign.roi_align.default: roi_align,
        ops.roialign.crop_and_resize.default: crop_and_resize,
        aten.fmin.default: fmin,
        aten.fmax.default: fmax,
        aten.sort.stable: sort,
        torch.sym_sqrt: sym_sqrt,
    }


def run(weights: str, path: str, min_confidence: float | None) -> None:
    """The command `weights.py export`."""
    check(Path(path))
    for name in ("onnxscript", "onnx_ir"):  # which tell of each node that stays as it is
        logging.getLogger(name).setLevel(logging.WARNING)
    options: dict[str, Any] = (
        {} if min_confidence is None else {"DETECTION_MIN_CONFIDENCE": min_confidence}
    )
    export(MaskRCNN.from_weights(weights, **options), path)
    print(f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB, images to {', '.join(OUTPUTS)}")
