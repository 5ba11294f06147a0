"""Data sets of images annotated with VIA or labelme, read from the files that these tools save."""

import base64
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage.draw import polygon

import utils
from coco import upright_size

logger = logging.getLogger(__name__)

# What was drawn: an outline [P, (x, y)] in image pixels, the first of which reaches from 0 to 1,
# or a mask [h, w] bool and the (x, y) of its first pixel.
Drawing = np.ndarray | tuple[np.ndarray, tuple[int, int]]
# Class name, drawings that together are one object, and how messages name it.
Object = tuple[str, list[Drawing], str]


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
            self.add_image("custom", path.name, path, shape=upright_size(path), objects=instances)

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
