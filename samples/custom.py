"""Fine-tunes on photographs of your own, annotated as COCO json or with VIA or labelme.

python samples/custom.py train --images photos --annotations photos.json
python samples/custom.py train --images photos --annotations via_project.json --format via
python samples/custom.py train --images photos --annotations photos --format labelme --model last
python samples/custom.py evaluate --images new --annotations new.json --model last

Without --val-annotations a fifth of the images, chosen by --seed, is kept for validation.
"""

import argparse
import base64
import copy
import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.draw import polygon

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as modellib
import training
import utils
import weights
from coco import CocoDataset
from config import Config
from dataset import ColorJitter, Compose, ScaleJitter, horizontal_flip
from evaluation import evaluate_coco, evaluator

logger = logging.getLogger(__name__)

# What was drawn: an outline [P, (x, y)] in image pixels, the first of which reaches from 0 to 1,
# or a mask [h, w] bool and the (x, y) of its first pixel.
Drawing = np.ndarray | tuple[np.ndarray, tuple[int, int]]
# Class name, drawings that together are one object, and how messages name it.
Object = tuple[str, list[Drawing], str]

# --- Readers -------------------------------------------------------------------------------------


class DrawnDataset(utils.Dataset):
    """Images with objects that were drawn in an annotation tool; subclasses read its files."""

    def load_annotations(
        self,
        images: str | Path,
        annotations: str | Path,
        attribute: str | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """Adds images and classes; call prepare() next.

        Images without regions are kept, as ones that show no object. Points and lines have no
        area: they are left out, with a warning.

        Args:
            images: the folder of the images.
            annotations: the file that the tool saved; for labelme the folder of its files.
            attribute: for VIA, the region attribute that holds the class; by default the only
                one. Without any attribute all regions are of the class "object".
            class_names: the classes in their order, e.g. those of the training data; by default
                all that occur, in alphabetical order.

        Raises:
            FileNotFoundError, ValueError: names the file, image and region.
        """
        entries = list(self.read(Path(images), Path(annotations), attribute))
        names = list(class_names) or sorted({o[0] for _, objects in entries for o in objects})
        if not names:
            raise ValueError(f"{annotations} must have regions with an area, found none")
        for class_id, name in enumerate(names, start=1):
            self.add_class("custom", class_id, name)
        for path, objects in entries:
            for name, _, where in objects:
                if name not in names:
                    raise ValueError(f"{where} must be of a class in {names}, got {name!r}")
            instances = [(names.index(name) + 1, drawings) for name, drawings, _ in objects]
            self.add_image("custom", path.name, path, shape=upright_shape(path), objects=instances)

    def read(
        self, images: Path, annotations: Path, attribute: str | None
    ) -> Iterator[tuple[Path, list[Object]]]:
        """Each image and its objects."""
        raise NotImplementedError

    def load_mask(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        info = self.image_info[image_id]
        masks = np.zeros((*info["shape"], len(info["objects"])), dtype=bool)
        for i, (_, drawings) in enumerate(info["objects"]):
            for drawing in drawings:
                draw(masks[:, :, i], drawing)
        return masks, np.array([class_id for class_id, _ in info["objects"]], dtype=np.int32)


class ViaDataset(DrawnDataset):
    """VGG Image Annotator 1 and 2: exported annotations, or a saved project, as json."""

    def read(
        self, images: Path, annotations: Path, attribute: str | None
    ) -> Iterator[tuple[Path, list[Object]]]:
        data = read_json(annotations)
        entries = data.get("_via_img_metadata", data) if isinstance(data, dict) else None
        entries = list(entries.values()) if isinstance(entries, dict) else [None]
        if not all(isinstance(entry, dict) and "filename" in entry for entry in entries):
            raise ValueError(f"{annotations} is not of VIA 1 or 2; check --format")
        regions = []
        for entry in entries:
            found = entry.get("regions") or []  # VIA 1 numbers them in a dict
            regions.append(list(found.items() if isinstance(found, dict) else enumerate(found)))

        every = [region for found in regions for _, region in found if isinstance(region, dict)]
        attributes = sorted({k for region in every for k in region.get("region_attributes") or ()})
        if attribute is None and len(attributes) > 1:
            raise ValueError(
                f"{annotations}: the class must be in one of {attributes}; see --class-attribute"
            )
        attribute = attribute or next(iter(attributes), None)

        def understand(region: dict[str, Any]) -> tuple[str, Drawing | None]:
            values = region["region_attributes"]
            name = "object" if attribute is None else via_class(attribute, values.get(attribute))
            return name, via_outline(region["shape_attributes"])

        for entry, found in zip(entries, regions, strict=True):
            named = ((f"{annotations}, {entry['filename']}, region {k}", r) for k, r in found)
            objects = [(name, [d], where) for name, d, where in drawn(named, understand)]
            yield images / entry["filename"], objects


def via_class(attribute: str, value: Any) -> str:
    if isinstance(value, dict):  # check boxes
        chosen = [name for name, is_set in value.items() if is_set]
        value = chosen[0] if len(chosen) == 1 else None
    if not str(value or "").strip():
        raise ValueError(f"needs one class in the attribute {attribute!r}")
    return str(value).strip()


def via_outline(shape: dict[str, Any]) -> Drawing | None:
    kind = shape["name"]
    if kind == "polygon":
        return np.array([shape["all_points_x"], shape["all_points_y"]], dtype=float).T
    if kind == "rect":
        return rectangle(shape["x"], shape["y"], shape["width"], shape["height"])
    if kind == "circle":
        return ellipse(shape["cx"], shape["cy"], shape["r"], shape["r"])
    if kind == "ellipse":
        theta = shape.get("theta", 0.0)
        return ellipse(shape["cx"], shape["cy"], shape["rx"], shape["ry"], theta)
    if kind in ("point", "polyline"):
        return None
    raise ValueError(f"unknown shape {kind!r}")


class LabelmeDataset(DrawnDataset):
    """labelme: one json per image.

    An image is looked for where the json says, then by its name in the folder of the images; the
    copy of it in the json is not read. Regions of one label and group id are one object.
    """

    def read(
        self, images: Path, annotations: Path, attribute: str | None
    ) -> Iterator[tuple[Path, list[Object]]]:
        files = sorted(annotations.glob("*.json")) if annotations.is_dir() else [annotations]
        if not files:
            raise FileNotFoundError(f"the folder {annotations} has no json files of labelme")
        for file in files:
            data = read_json(file)
            if not isinstance(data, dict) or not {"shapes", "imagePath"} <= data.keys():
                raise ValueError(f"{file} is not of labelme; check --format")
            path = file.parent / data["imagePath"].replace("\\", "/")
            if not path.is_file():
                path = images / path.name
            shapes = [(f"{file}, region {i}", shape) for i, shape in enumerate(data["shapes"])]
            groups = {where: shape.get("group_id") for where, shape in shapes if shape}
            objects: dict[Any, Object] = {}
            for name, drawing, where in drawn(shapes, lambda s: (s["label"], labelme_drawing(s))):
                group = where if groups[where] is None else (name, groups[where])
                objects.setdefault(group, (name, [], where))[1].append(drawing)
            yield path, list(objects.values())


def labelme_drawing(shape: dict[str, Any]) -> Drawing | None:
    kind, points = shape.get("shape_type") or "polygon", np.array(shape["points"], dtype=float)
    if kind in ("polygon", "oriented_rectangle"):
        return points
    if kind == "rectangle":
        return rectangle(*points[0], *(points[1] - points[0]))
    if kind == "circle":  # its centre and a point of its rim
        (cx, cy), rim = points
        radius = math.dist((cx, cy), rim)
        return ellipse(cx, cy, radius, radius)
    if kind == "mask":
        patch = np.array(Image.open(io.BytesIO(base64.b64decode(shape["mask"])))) > 0
        x, y = points[0].round().astype(int).tolist()
        return patch, (x, y)
    if kind in ("point", "points", "line", "linestrip"):
        return None
    raise ValueError(f"unknown shape {kind!r}")


def drawn(
    regions: Iterable[tuple[str, Any]], understand: Callable[[Any], tuple[str, Drawing | None]]
) -> Iterator[tuple[str, Drawing, str]]:
    """Class name, drawing and name for messages of each region that has an area."""
    for where, region in regions:
        try:
            name, drawing = understand(region)
            if isinstance(drawing, np.ndarray) and (
                len(drawing) < 3 or not np.isfinite(drawing).all()
            ):
                raise ValueError("needs three points or more, all of them finite")
        except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{where} cannot be used ({reason}): {str(region)[:80]}") from error
        if drawing is None:
            logger.warning("%s is a point or line without an area, left out", where)
        else:
            yield name, drawing, where


def rectangle(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], float)


def ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> np.ndarray:
    """An outline of 128 points; theta, in radians, turns the x axis towards the y axis."""
    t = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    x, y, cos, sin = rx * np.cos(t), ry * np.sin(t), np.cos(theta), np.sin(theta)
    return np.stack([cx + x * cos - y * sin, cy + x * sin + y * cos], axis=1)


def draw(mask: np.ndarray, drawing: Drawing) -> None:
    """Sets the pixels of mask [H, W] bool whose centres are inside of a drawing."""
    if isinstance(drawing, np.ndarray):
        mask[polygon(drawing[:, 1] - 0.5, drawing[:, 0] - 0.5, mask.shape)] = True
        return
    patch, (x, y) = drawing
    rows, columns = np.nonzero(patch)
    rows, columns = rows + y, columns + x
    inside = (rows >= 0) & (rows < len(mask)) & (columns >= 0) & (columns < mask.shape[1])
    mask[rows[inside], columns[inside]] = True


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not json ({error}); export the annotations as json") from error


def upright_shape(path: Path) -> tuple[int, int]:
    """Height and width of an image as utils.load_image reads it, without decoding it."""
    with Image.open(path) as image:
        width, height = image.size
        lies = image.getexif().get(0x0112) in (5, 6, 7, 8)  # its orientation
    return (width, height) if lies else (height, width)


# --- Training ------------------------------------------------------------------------------------


class CustomConfig(Config):
    NAME = "custom"
    CLASS_NAMES: Sequence[str] = ()  # checkpoints and config.json tell them


AUGMENTATION = Compose(horizontal_flip, ScaleJitter(0.7, 1.4), ColorJitter())


def load(
    args: argparse.Namespace, annotations: str, class_names: Sequence[str] = ()
) -> utils.Dataset:
    if args.format == "coco":
        data: Any = CocoDataset()
        data.load_annotations(args.images, annotations)
    else:
        data = ViaDataset() if args.format == "via" else LabelmeDataset()
        data.load_annotations(args.images, annotations, args.class_attribute, class_names)
    data.prepare()
    if class_names and data.class_names[1:] != list(class_names):
        raise ValueError(f"{annotations} must have {class_names}, got {data.class_names[1:]}")
    return data


def split(data: utils.Dataset, seed: int) -> tuple[utils.Dataset, utils.Dataset]:
    """A data set of four fifths of the images, and one of the others."""
    order = np.random.default_rng(seed).permutation(data.num_images)
    count = math.ceil(len(order) / 5)
    if len(order) < 2:
        raise ValueError(f"there must be two images or more to train on, got {len(order)}")
    parts = copy.copy(data), copy.copy(data)
    for part, chosen in zip(parts, (order[count:], order[:count]), strict=True):
        part.image_info = [data.image_info[i] for i in np.sort(chosen)]
        part.prepare()
    return parts


def make_model(args: argparse.Namespace, **options: Any) -> modellib.MaskRCNN:
    """A model that fits the weight file; options of the config win over those of the file."""
    file = None
    if args.model not in ("none", "imagenet"):
        path = args.model
        if path == "last":
            path = training.find_checkpoints(args.logs, CustomConfig.NAME)[0]
        file = weights.read_state_dict(weights.find_weights(path))
        known = {k: v for k, v in weights.read_options(file).items() if hasattr(CustomConfig, k)}
        options = {**known, "NAME": CustomConfig.NAME, **options}
    model = modellib.MaskRCNN(CustomConfig(**options), args.logs)
    if args.model != "none":
        # The last layers of a network for other classes do not fit; here they start anew.
        weights.load_weights(model, file or args.model, skip_mismatched=True)
    return model


def train(args: argparse.Namespace, device: torch.device) -> utils.Dataset:
    data = load(args, args.annotations)
    if args.val_annotations:
        val = load(args, args.val_annotations, data.class_names[1:])
    else:
        data, val = split(data, args.SEED)
    batch = args.IMAGES_PER_GPU * training.world_size()
    options = {k: v for k, v in vars(args).items() if k.isupper() and v is not None}
    if args.image_dim is not None:
        options |= {"IMAGE_MIN_DIM": args.image_dim, "IMAGE_MAX_DIM": args.image_dim}
    model = make_model(
        args,
        NUM_CLASSES=data.num_classes,
        CLASS_NAMES=data.class_names[1:],
        STEPS_PER_EPOCH=math.ceil(data.num_images / batch),
        VALIDATION_STEPS=math.ceil(val.num_images / batch),
        **options,
    ).to(device)
    if args.model == "last":
        model.resume()
    heads, rest = args.epochs
    judge = evaluator(val)
    model.train_model(data, val, args.lr, heads, "heads", AUGMENTATION, evaluate=judge)
    model.train_model(data, val, args.lr / 10, heads + rest, "all", AUGMENTATION, evaluate=judge)
    if model.log_dir is None:
        raise ValueError(f"--epochs must ask for one epoch or more, got {heads} and {rest}")
    args.model = str(model.log_dir / "best.pth")
    return val


def evaluate(args: argparse.Namespace, device: torch.device, data: utils.Dataset | None) -> None:
    model = make_model(args).to(device)
    data = data or load(args, args.annotations, model.config.to_dict()["CLASS_NAMES"])
    result = evaluate_coco(model, data, min_confidence=0.0)
    if training.is_main():
        print(f"{args.model}: {result}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["train", "evaluate"])
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder of the images")
    parser.add_argument("--annotations", required=True, help="a json; for labelme their folder")
    parser.add_argument("--val-annotations", help="of other images in the same folder")
    parser.add_argument("--format", choices=["coco", "via", "labelme"], default="coco")
    parser.add_argument("--class-attribute", help="VIA's region attribute that holds the class")
    parser.add_argument(
        "--model", default="coco", help='"coco", "imagenet", "none", "last" or a weight file'
    )
    parser.add_argument("--epochs", type=int, nargs=2, default=[10, 20], metavar=("HEADS", "ALL"))
    parser.add_argument("--lr", type=float, default=0.001, help="of the heads; a tenth for all")
    parser.add_argument("--batch", dest="IMAGES_PER_GPU", type=int, default=2)
    parser.add_argument("--backbone", dest="BACKBONE", choices=["resnet50", "resnet101"])
    parser.add_argument("--image-dim", type=int, help="side of the network input, a multiple of 64")
    parser.add_argument("--workers", dest="NUM_WORKERS", type=int)
    parser.add_argument("--seed", dest="SEED", type=int, default=0)
    parser.add_argument("--logs", default="logs")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with training.distributed(args.device) as device:
            evaluate(args, device, train(args, device) if args.command == "train" else None)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        print(f"custom.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
