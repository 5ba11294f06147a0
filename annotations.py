"""Data sets of images annotated with VIA or labelme, read from the files that these tools save."""

import base64
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from skimage.draw import polygon

import image_files
import utils
from boxed_masks import BoxedMasks, Part

logger = logging.getLogger(__name__)

# What was drawn: an outline [P, (x, y)] in image pixels, the first of which reaches from 0 to 1,
# or a mask [h, w] bool and the (x, y) of its first pixel.
Drawing = np.ndarray | tuple[np.ndarray, tuple[int, int]]


class Region(NamedTuple):
    """What was drawn with one stroke of the tool."""

    class_name: str
    drawing: Drawing
    where: str  # how messages name it


class Object(NamedTuple):
    """One object: a region, or several that belong together."""

    class_name: str
    drawings: list[Drawing]
    where: str


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
        objects = [obj for _, found in entries for obj in found]
        names = list(class_names) or sorted({obj.class_name for obj in objects})
        if not names:
            raise ValueError(f"{annotations} must have regions with an area, found none")
        for obj in objects:
            if obj.class_name not in names:
                raise ValueError(
                    f"{obj.where} must be of a class in {names}, got {obj.class_name!r}"
                )
        for class_id, name in enumerate(names, start=1):
            self.add_class("custom", class_id, name)
        for path, found in entries:
            instances = [(names.index(obj.class_name) + 1, obj.drawings) for obj in found]
            shape = image_files.read_size(path)
            self.add_image("custom", path.name, path, shape=shape, objects=instances)

    def read(
        self, images: Path, annotations: Path, attribute: str | None
    ) -> Iterator[tuple[Path, list[Object]]]:
        """Each image and its objects."""
        raise NotImplementedError

    def load_mask(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Masks [H, W, N] bool and class ids [N] int32."""
        masks, class_ids = self.load_boxed_masks(image_id)
        return np.asarray(masks), class_ids

    def load_boxed_masks(self, image_id: int) -> tuple[BoxedMasks, np.ndarray]:
        """What load_mask gives, each mask in its box."""
        info = self.image_info[image_id]
        parts = [draw(drawings, info["shape"]) for _, drawings in info["objects"]]
        class_ids = [class_id for class_id, _ in info["objects"]]
        return BoxedMasks(info["shape"], parts), np.array(class_ids, dtype=np.int32)


# --- VIA -----------------------------------------------------------------------------------------


class ViaDataset(DrawnDataset):
    """VGG Image Annotator 1 and 2: exported annotations, or a saved project, as json."""

    def read(
        self, images: Path, annotations: Path, attribute: str | None
    ) -> Iterator[tuple[Path, list[Object]]]:
        """Each image and its objects."""
        entries = via_entries(annotations)
        attribute = attribute or via_attribute(annotations, entries)

        def understand(region: dict[str, Any]) -> tuple[str, Drawing | None]:
            name = via_class(attribute, region["region_attributes"])
            return name, via_drawing(region["shape_attributes"])

        for entry in entries:
            name = entry["filename"]
            named = [(f"{annotations}, {name}, region {k}", r) for k, r in via_regions(entry)]
            found = usable_regions(named, understand)
            yield images / name, [Object(r.class_name, [r.drawing], r.where) for r in found]


def via_entries(file: Path) -> list[dict[str, Any]]:
    """The images of a file: dicts of filename, regions and more."""
    content = read_json(file)
    entries = content.get("_via_img_metadata", content) if isinstance(content, dict) else None
    entries = list(entries.values()) if isinstance(entries, dict) else [None]
    if not all(isinstance(entry, dict) and "filename" in entry for entry in entries):
        raise ValueError(f"{file} is not of VIA 1 or 2; check --format")
    return entries


def via_regions(entry: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The regions of an image and what VIA calls them: VIA 1 numbers them in a dict."""
    regions = entry.get("regions") or []
    return list(regions.items() if isinstance(regions, dict) else enumerate(regions))


def via_attribute(file: Path, entries: Sequence[dict[str, Any]]) -> str | None:
    """The region attribute that holds the class: the only one; None if there is none at all."""
    regions = [region for entry in entries for _, region in via_regions(entry)]
    attributes = sorted(
        {
            name
            for region in regions
            if isinstance(region, dict)
            for name in region.get("region_attributes") or ()
        }
    )
    if len(attributes) > 1:
        raise ValueError(f"{file}: the class must be in one of {attributes}; see --class-attribute")
    return next(iter(attributes), None)


def via_class(attribute: str | None, values: dict[str, Any]) -> str:
    """The class of a region by its attributes: a word, or the one check box that is set."""
    if attribute is None:
        return "object"
    value = values.get(attribute)
    if isinstance(value, dict):
        chosen = [name for name, is_set in value.items() if is_set]
        value = chosen[0] if len(chosen) == 1 else None
    if not str(value or "").strip():
        raise ValueError(f"needs one class in the attribute {attribute!r}")
    return str(value).strip()


def via_drawing(shape: dict[str, Any]) -> Drawing | None:
    """What was drawn; None for what has no area."""
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


# --- labelme -------------------------------------------------------------------------------------


class LabelmeDataset(DrawnDataset):
    """labelme: one json per image.

    An image is looked for where the json says, then by its name in the folder of the images; the
    copy of it in the json is not read. Regions of one label and group id are one object.
    """

    def read(
        self, images: Path, annotations: Path, attribute: str | None
    ) -> Iterator[tuple[Path, list[Object]]]:
        """Each image and its objects."""
        files = sorted(annotations.glob("*.json")) if annotations.is_dir() else [annotations]
        if not files:
            raise FileNotFoundError(f"the folder {annotations} has no json files of labelme")
        for file in files:
            content = labelme_content(file)
            yield labelme_image(file, content, images), labelme_objects(file, content)


def labelme_content(file: Path) -> dict[str, Any]:
    """The content of a file, which has at least shapes and imagePath."""
    content = read_json(file)
    if not isinstance(content, dict) or not {"shapes", "imagePath"} <= content.keys():
        raise ValueError(f"{file} is not of labelme; check --format")
    return content


def labelme_image(file: Path, content: dict[str, Any], images: Path) -> Path:
    """Where the image of a file is."""
    path = file.parent / content["imagePath"].replace("\\", "/")
    return path if path.is_file() else images / path.name


def labelme_objects(file: Path, content: dict[str, Any]) -> list[Object]:
    """The objects of a file: regions of one label and group id are one."""
    named = [(f"{file}, region {i}", shape) for i, shape in enumerate(content["shapes"])]
    groups = {where: shape.get("group_id") for where, shape in named if shape}
    objects: dict[Any, Object] = {}
    for region in usable_regions(named, lambda shape: (shape["label"], labelme_drawing(shape))):
        name, group = region.class_name, groups[region.where]
        key = region.where if group is None else (name, group)
        objects.setdefault(key, Object(name, [], region.where)).drawings.append(region.drawing)
    return list(objects.values())


def labelme_drawing(shape: dict[str, Any]) -> Drawing | None:
    """What was drawn; None for what has no area."""
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


# --- Regions of both -----------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The content of a json file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not json ({error}); export the annotations as json") from error


def usable_regions(
    named: Iterable[tuple[str, Any]], understand: Callable[[Any], tuple[str, Drawing | None]]
) -> Iterator[Region]:
    """The regions that have an area.

    Args:
        named: what messages call each region, and what the file holds of it.
        understand: gives class name and drawing, None for what has no area.
    """
    for where, region in named:
        try:
            name, drawing = understand(region)
            check_drawing(drawing)
        except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{where} cannot be used ({reason}): {str(region)[:80]}") from error
        if drawing is None:
            logger.warning("%s is a point or line without an area, left out", where)
        else:
            yield Region(name, drawing, where)


def check_drawing(drawing: Drawing | None) -> None:
    """Raises ValueError for an outline that encloses nothing."""
    if isinstance(drawing, np.ndarray) and (len(drawing) < 3 or not np.isfinite(drawing).all()):
        raise ValueError("needs three points or more, all of them finite")


def rectangle(x: float, y: float, width: float, height: float) -> np.ndarray:
    """An outline of four points."""
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], float)


def ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> np.ndarray:
    """An outline of 128 points; theta, in radians, turns the x axis towards the y axis."""
    t = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    x, y, cos, sin = rx * np.cos(t), ry * np.sin(t), np.cos(theta), np.sin(theta)
    return np.stack([cx + x * cos - y * sin, cy + x * sin + y * cos], axis=1)


def draw(drawings: Sequence[Drawing], size: Sequence[int]) -> Part:
    """The pixels of an image of this size whose centres are inside of a drawing, as BoxedMasks."""
    rows, columns = np.concatenate([pixels(drawing, size) for drawing in drawings], axis=1)
    if len(rows) == 0:
        return (0, 0, 0, 0), np.zeros((0, 0), dtype=bool)
    y1, x1, y2, x2 = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    part = np.zeros((y2 - y1, x2 - x1), dtype=bool)
    part[rows - y1, columns - x1] = True
    return (int(y1), int(x1), int(y2), int(x2)), part


def pixels(drawing: Drawing, size: Sequence[int]) -> np.ndarray:
    """Row and column [2, P] of each pixel inside of a drawing and an image of this size."""
    if isinstance(drawing, np.ndarray):
        return np.stack(polygon(drawing[:, 1] - 0.5, drawing[:, 0] - 0.5, size))
    patch, (x, y) = drawing
    found = np.stack(np.nonzero(patch)) + np.array([[y], [x]])
    inside = (found >= 0).all(axis=0) & (found < np.reshape(size, (2, 1))).all(axis=0)
    return found[:, inside]
