"""Data sets of images annotated with VIA or labelme, read from the files that these tools save."""

import base64
import collections
import io
import json
import logging
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import image_files
import utils
from boxed_masks import BoxedMasks
from coco_dataset import LoadSummary, Remarks, folder_of_each, id_key, shortened
from file_names import ImageFolder, is_below
from outlines import Drawing, draw, ellipse, fill, pixel_box, place, rectangle

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # (height, width)


class Object(NamedTuple):
    """One object: a region, or several that belong together."""

    class_name: str
    drawings: list[Drawing]
    where: str  # how messages name it


class ReadImage(NamedTuple):
    """An image that is there, and what can be used of its objects."""

    path: Path
    size: Size
    objects: list[Object]


@dataclass
class Request:
    """What a reader is to read.

    Attributes:
        images: the folder of the images.
        annotations: the file or folder of the annotations.
        attribute: of VIA's regions, holds the class; None for the only one.
        class_name: of objects where the annotations know no classes.
        remarks: takes what is dropped, and why.
    """

    images: Path
    annotations: Path
    attribute: str | None
    class_name: str
    remarks: Remarks


class DrawnDataset(utils.Dataset):
    """Images with objects that were drawn in an annotation tool; subclasses read its files.

    image_info holds for each image, besides id, source and path: its shape and a list of objects,
    each a class id and what was drawn. The id is the path from the folder of the images.
    """

    def load_annotations(
        self,
        images: str | Path,
        annotations: str | Path,
        attribute: str | None = None,
        class_names: Sequence[str] = (),
        only_classes: Sequence[str] | None = None,
    ) -> LoadSummary:
        """Adds images and classes; call prepare() next.

        Images without regions are kept, as ones that show no object. What cannot be used is
        dropped, logged, and listed in the summary, and so are points and lines, which have no area.

        Args:
            images: the folder of the images.
            annotations: the file that the tool saved; for labelme the folder of its files, which
                may lie in folders of it.
            attribute: for VIA, the region attribute that holds the class; by default the only
                one. Without any attribute all regions are of one class, "object" or the one that
                class_names gives.
            class_names: the classes in their order, e.g. those of the training data; by default
                all that occur, in alphabetical order.
            only_classes: the classes whose objects are loaded; those of others are left out.
                Without class_names, they are the classes, and the file must have them.

        Raises:
            FileNotFoundError: no such file, or none of its images.
            ValueError: a file of another kind, one without any object, or other classes.
        """
        return self.load_files([images], [annotations], class_names, only_classes, attribute)[0]

    def load_files(
        self,
        images_dirs: Sequence[str | Path],
        annotation_files: Sequence[str | Path],
        class_names: Sequence[str] | None = None,
        only_classes: Sequence[str] | None = None,
        attribute: str | None = None,
    ) -> list[LoadSummary]:
        """Adds the images of several files, see load_annotations; one folder each, or one for all.

        Raises:
            FileNotFoundError, ValueError: see load_annotations; or an image is in several files.
        """
        files, names = [Path(file) for file in annotation_files], list(class_names or ())
        folders = folder_of_each(images_dirs, files)
        name = names[0] if len(names) == 1 else "object"
        contents = []
        for folder, file in zip(folders, files, strict=True):
            remarks: Remarks = collections.defaultdict(list)
            found = list(self.read(Request(folder, file, attribute, name, remarks)))
            if not found:
                raise FileNotFoundError(
                    f"{folder} must hold the images of {file}, but none can be used"
                    f"{_first(remarks)}"
                )
            contents.append((found, remarks))
        occurring = {obj.class_name for found, _ in contents for im in found for obj in im.objects}
        listed = ", ".join(map(str, files))
        if not names and not occurring:
            first = _first({k: v for _, remarks in contents for k, v in remarks.items()})
            raise ValueError(f"{listed} must have objects with an area, found none{first}")
        known = names or sorted(occurring)
        if unknown := [name for name in only_classes or () if name not in known]:
            raise ValueError(
                f"the classes must be among {shortened(known)}, got {shortened(unknown)} for"
                f" {listed}"
            )
        if only_classes:
            names = names or list(only_classes)
            contents = [([_with(im, only_classes) for im in found], r) for found, r in contents]
        for file, (found, _) in zip(files, contents, strict=True):
            _check_classes(file, found, names)
        names = self._add_classes(names or sorted(occurring))
        return [
            self._add(folder, file, found, names, remarks)
            for folder, file, (found, remarks) in zip(folders, files, contents, strict=True)
        ]

    def _add_classes(self, names: Sequence[str]) -> list[str]:
        """All classes in the order of their ids."""
        known = [info["name"] for info in self.class_info if info["source"] == "custom"]
        names = list(dict.fromkeys([*known, *names]))
        for class_id, name in enumerate(names, start=1):
            self.add_class("custom", class_id, name)
        return names

    def _add(
        self,
        images: Path,
        file: Path,
        found: Sequence[ReadImage],
        names: Sequence[str],
        remarks: Remarks,
    ) -> LoadSummary:
        taken = {info["id"] for info in self.image_info}
        paths = {os.path.realpath(info["path"]) for info in self.image_info if info["path"]}
        for path, size, drawn in found:
            image_id, real = _image_id(path, images, file), os.path.realpath(path)
            if image_id in taken:  # in another folder that was loaded before
                image_id = path.as_posix()
            if image_id in taken or real in paths:
                raise ValueError(f"images must be loaded once, got {path} again from {file}")
            taken.add(image_id)
            paths.add(real)
            instances = [(names.index(obj.class_name) + 1, obj.drawings) for obj in drawn]
            self.add_image("custom", image_id, path, shape=size, objects=instances)
        summary = LoadSummary(
            file=file,
            images=len(found),
            negatives=sum(not image.objects for image in found),
            annotations=sum(len(image.objects) for image in found),
            crowds=0,
            classes=len(names),
            remarks=dict(remarks),
        )
        logger.log(logging.WARNING if remarks else logging.INFO, "%s", summary)
        return summary

    def read(self, request: Request) -> Iterator[ReadImage]:
        """Each image that can be used and its objects."""
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


def _first(remarks: Remarks) -> str:
    """The end of a message, with the first remark."""
    return next((f"; {remark}: {items[0]}" for remark, items in remarks.items()), "")


def _with(image: ReadImage, classes: Sequence[str]) -> ReadImage:
    """An image with its objects of some classes."""
    return image._replace(objects=[obj for obj in image.objects if obj.class_name in classes])


def _check_classes(file: Path, found: Sequence[ReadImage], names: Sequence[str]) -> None:
    """Raises ValueError for a class that is not in names, unless these are empty."""
    occurring = {obj.class_name: obj.where for im in reversed(found) for obj in im.objects[::-1]}
    if names and (unknown := sorted(occurring.keys() - set(names))):
        raise ValueError(
            f"{file} must have classes of {list(names)}, got {unknown}, the first in"
            f" {occurring[unknown[0]]}; rename them, or leave them out with only_classes, on a"
            " command line --classes"
        )


def _image_id(path: Path, images: Path, annotations: Path) -> str:
    """The path from the folder of the images, or else from that of the annotations."""
    folders = images, annotations if annotations.is_dir() else annotations.parent
    paths = [Path(os.path.relpath(path, folder)).as_posix() for folder in folders]
    return next((name for name in paths if not name.startswith("../")), paths[0])


# --- VIA -----------------------------------------------------------------------------------------


class ViaDataset(DrawnDataset):
    """VGG Image Annotator 1 and 2: exported annotations, or a saved project, as json."""

    def read(self, request: Request) -> Iterator[ReadImage]:
        """Each image that can be used and its objects."""
        contents = via_contents(request.annotations, request.remarks)
        regions = [region for content in contents for _, region in via_regions(content)]
        attribute = via_attribute(request.annotations, regions, request.attribute)

        def understand(region: Any, size: Size) -> tuple[str, Drawing | None]:
            drawing = via_drawing(region["shape_attributes"])
            if drawing is None or attribute is None:
                return request.class_name, drawing
            return via_class(attribute, region["region_attributes"]), drawing

        entries = via_entries(contents, request.images, request.remarks)
        for entry, size in usable_images(entries, request.remarks):
            found = usable_regions(entry.regions, understand, size, request.remarks)
            objects = [Object(name, [drawing], where) for where, name, drawing, _ in found]
            yield ReadImage(entry.path, size, objects)


def via_contents(file: Path, remarks: Remarks) -> list[dict[str, Any]]:
    """What a file holds of each image: dicts of filename, regions and more."""
    content = read_json(file)
    items = content.get("_via_img_metadata", content) if isinstance(content, dict) else None
    if not isinstance(items, dict):
        items = {"": None}
    usable, dropped = [], []
    for key, item in items.items():
        if (
            isinstance(item, dict)
            and isinstance(item.get("filename"), str)
            and isinstance(item.get("regions") or [], list | dict)
        ):
            usable.append(item)
        else:
            dropped.append(key)
    if dropped and not usable:
        raise ValueError(f"{file} is not of VIA 1 or 2; check --format")
    if dropped:
        remarks["images dropped, malformed"] += dropped
    return usable


def via_regions(content: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The regions of an image and what VIA calls them: VIA 1 numbers them in a dict."""
    regions = content.get("regions") or []
    return list(regions.items() if isinstance(regions, dict) else enumerate(regions))


def via_attribute(file: Path, regions: Sequence[Any], wanted: str | None) -> str | None:
    """The region attribute that holds the class: the only one; None if there is none at all."""
    found: set[str] = set()
    for region in regions:
        attributes = region.get("region_attributes") if isinstance(region, dict) else None
        found.update(attributes if isinstance(attributes, dict) else ())
    if wanted is None and len(found) > 1:
        raise ValueError(
            f"{file}: the class must be in one of {sorted(found)}; see --class-attribute"
        )
    if wanted is not None and found and wanted not in found:
        raise ValueError(f"{file}: the class must be in one of {sorted(found)}, got {wanted!r}")
    return wanted or next(iter(found), None)


def via_entries(
    contents: Sequence[dict[str, Any]], images: Path, remarks: Remarks
) -> Iterator["Entry"]:
    """What a file holds of each image that is there."""
    folder = ImageFolder(images)
    names = [content["filename"] for content in contents]
    for content, name, path in zip(contents, names, folder.find_all(names), strict=True):
        if path is None:
            hint = folder.hint(name)
            missing = f"{name} ({hint})" if hint else name
            remarks[f"images dropped, no such file in {images}"].append(missing)
            continue
        if not is_below(path, images):
            remarks[f"images outside of {images}"].append(name)
        regions = [(f"{name}, region {key}", region) for key, region in via_regions(content)]
        # Its bytes tell which of two images of one name it is.
        is_own = content.get("size") == path.stat().st_size
        yield Entry(name, path, regions, is_own)


def via_class(attribute: str, values: dict[str, Any]) -> str:
    """The class of a region by its attributes: a word, or the one check box that is set."""
    value = values.get(attribute)
    if isinstance(value, dict):
        chosen = [name for name, is_set in value.items() if is_set]
        value = chosen[0] if len(chosen) == 1 else None
    return class_name(value, f"no class, or several, in the attribute {attribute!r}")


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
    raise Unusable(f"of an unknown shape, {kind!r:.40}")


# --- labelme -------------------------------------------------------------------------------------


class LabelmeDataset(DrawnDataset):
    """labelme, and X-AnyLabeling, which saves the same format: one json per image.

    An image is looked for where the json says, then by its name in the folder of the images; the
    copy of it in the json is not read. Regions of one label and group id are one object.
    """

    def read(self, request: Request) -> Iterator[ReadImage]:
        """Each image that can be used and its objects."""

        def understand(region: Any, size: Size) -> tuple[str, Drawing | None, Any]:
            drawing = labelme_drawing(region, size)
            name = "" if drawing is None else class_name(region["label"], "no label")
            return name, drawing, region.get("group_id")

        contents = labelme_contents(request.annotations, request.remarks)
        entries = labelme_entries(contents, request)
        for entry, size in usable_images(entries, request.remarks):
            found = usable_regions(entry.regions, understand, size, request.remarks)
            objects: dict[Any, Object] = {}
            for where, name, drawing, group in found:
                # repr, as a group id may be anything.
                key = where if group is None else (name, repr(group))
                objects.setdefault(key, Object(name, [], where)).drawings.append(drawing)
            yield ReadImage(entry.path, size, list(objects.values()))


def labelme_contents(annotations: Path, remarks: Remarks) -> dict[Path, dict[str, Any]]:
    """The content of each file of labelme, which has at least shapes and imagePath."""
    files = [annotations]
    if annotations.is_dir():
        files = sorted(f for f in annotations.rglob("*.json") if not f.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"the folder {annotations} has no json files of labelme")
    contents: dict[Path, dict[str, Any]] = {}
    faults: list[ValueError] = []
    for file in files:
        try:
            content = read_json(file)
            if (
                not isinstance(content, dict)
                or not isinstance(content.get("shapes"), list)
                or not isinstance(content.get("imagePath"), str)
            ):
                raise ValueError(f"{file} is not of labelme; check --format")
            contents[file] = content
        except (OSError, ValueError) as error:
            if file is annotations:
                raise
            faults.append(ValueError(str(error)))
            remarks["files dropped, not of labelme"].append(os.path.relpath(file, annotations))
    if not contents:
        raise faults[0]
    return contents


def labelme_entries(contents: dict[Path, dict[str, Any]], request: Request) -> Iterator["Entry"]:
    """What each file holds, where its image is there."""
    folder = ImageFolder(request.images)
    root = request.annotations if request.annotations.is_dir() else request.annotations.parent
    for file, content in contents.items():
        where, name = os.path.relpath(file, root), content["imagePath"]
        path = labelme_image(file, root, name, folder)
        if path is None:
            hint = folder.hint(name)
            missing = f"{name} of {where}" + (f" ({hint})" if hint else "")
            request.remarks[f"images dropped, no such file in {request.images}"].append(missing)
            continue
        if not is_below(path, request.images) and not is_below(path, root):
            request.remarks[f"images outside of {request.images}"].append(f"{name} of {where}")
        regions = [(f"{where}, region {i}", shape) for i, shape in enumerate(content["shapes"])]
        size = content.get("imageHeight"), content.get("imageWidth")
        is_own = file.stem == path.stem
        yield Entry(where, path, regions, is_own, size if None not in size else None)


def labelme_image(file: Path, root: Path, name: str, folder: ImageFolder) -> Path | None:
    """Where the image of a file is."""
    below = os.path.join(folder.path, os.path.relpath(file.parent, root))
    for parent in (file.parent, below):
        path = os.path.join(parent, name.replace("\\", "/"))
        if os.path.isfile(path):
            return Path(path)
    return folder.find(name)


def labelme_drawing(shape: dict[str, Any], size: Size) -> Drawing | None:
    """What was drawn; None for what has no area."""
    kind = shape.get("shape_type") or "polygon"
    if kind in ("point", "points", "line", "linestrip"):
        return None
    points = np.array(shape["points"], dtype=float)
    # The latter two are X-AnyLabeling's.
    if kind in ("polygon", "oriented_rectangle", "rotation", "quadrilateral"):
        return points
    if kind == "rectangle":  # two corners; X-AnyLabeling: all four
        if points.shape not in ((2, 2), (4, 2)):
            raise ValueError(f"a rectangle has two or four corners, got an array {points.shape}")
        low, high = points.min(axis=0), points.max(axis=0)
        return rectangle(*low, *(high - low))
    if kind == "circle":  # its centre and a point of its rim
        (cx, cy), rim = points
        radius = math.dist((cx, cy), rim)
        return ellipse(cx, cy, radius, radius)
    if kind == "mask":
        check_near(points, size)
        x, y = points[0].round().astype(int).tolist()
        return place(labelme_patch(shape.get("mask"), size), x, y, size)
    raise Unusable(f"of an unknown shape, {kind!r:.40}")


def labelme_patch(text: Any, size: Size) -> np.ndarray:
    """The mask [h, w] bool of a region, which is a picture in a text."""
    data = base64.b64decode(text)
    try:
        with Image.open(io.BytesIO(data)) as file:
            if file.width * file.height > 4 * size[0] * size[1]:
                raise Unusable("a mask that is larger than the image")
            patch = np.array(file)
    except Unusable:
        raise
    except Exception as error:  # image decoders raise whatever they stumble over
        raise ValueError(f"its mask is no picture, {error}") from error
    if patch.ndim != 2:
        raise ValueError(f"its mask must be a grey picture, got an array {patch.shape}")
    return patch > 0


# --- Images and regions of both ------------------------------------------------------------------


class Entry(NamedTuple):
    """What a file holds of an image that is there."""

    name: str  # how messages name it
    path: Path
    regions: list[tuple[str, Any]]  # how messages name each, and what the file holds of it
    is_own: bool  # where several entries are of one file: whether it is surely that of this one
    size: tuple[Any, Any] | None = None  # that the image had when it was annotated


class Region(NamedTuple):
    """What was drawn with one stroke of the tool."""

    where: str
    class_name: str
    drawing: Drawing
    group: Any


class Unusable(ValueError):
    """Why a region cannot be used, in the words of a remark."""


def read_json(path: Path) -> Any:
    """The content of a json file."""
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not json ({error}); export the annotations as json") from error


def usable_images(entries: Iterable[Entry], remarks: Remarks) -> Iterator[tuple[Entry, Size]]:
    """The entries whose image can be read and is theirs alone, and its size."""
    by_path: dict[str, list[Entry]] = collections.defaultdict(list)
    for entry in entries:
        by_path[os.path.realpath(entry.path)].append(entry)
    for same in by_path.values():
        own = [entry for entry in same if entry.is_own] if len(same) > 1 else same
        kept = own[0] if len(own) == 1 else None
        if dropped := [f"{e.name} ({e.path.name})" for e in same if e is not kept]:
            remarks["images dropped, others are of the same file"] += dropped
        if kept is None:
            continue
        try:
            size = image_files.read_size(kept.path)
        except (OSError, ValueError) as error:
            remarks["images dropped, unreadable"].append(f"{kept.name} ({error})")
            continue
        if kept.size is not None and [*map(id_key, kept.size)] != [*map(id_key, size)]:
            sizes = " and ".join(f"{width} x {height}" for height, width in (kept.size, size))
            remarks["images dropped, of another size when annotated and now"].append(
                f"{kept.name} ({sizes})"
            )
            continue
        yield kept, size


def usable_regions(
    named: Iterable[tuple[str, Any]],
    understand: Callable[[Any, Size], tuple[Any, ...]],
    size: Size,
    remarks: Remarks,
) -> Iterator[Region]:
    """The regions that have pixels in an image.

    Args:
        named: what messages call each region, and what the file holds of it.
        understand: gives class name, drawing (None for what has no area) and group, if any.
        size: of the image.
        remarks: takes the others.
    """
    for where, region in named:
        try:
            name, drawing, *group = understand(region, size)
            if drawing is None:
                remarks["regions left out, points and lines without an area"].append(where)
                continue
            check_drawing(drawing, size)
        except Unusable as error:
            remarks[f"regions dropped, {error}"].append(where)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            remarks["regions dropped, malformed"].append(f"{where} ({reason:.80})")
        else:
            yield Region(where, name, drawing, *(group or [None]))


def class_name(value: Any, fault: str) -> str:
    """A class as text; Unusable(fault) for what is neither a text nor a number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str) and not (is_number and math.isfinite(value)):
        raise Unusable(fault)
    text = " ".join(str(value).split())
    if not text:
        raise Unusable(fault)
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise Unusable("of a class whose name cannot be printed")
    return text


def check_near(points: np.ndarray, size: Size) -> None:
    """Raises Unusable for points [P, (x, y)] that cannot be meant for an image of this size."""
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be an array [P, (x, y)], got {points.shape}")
    if not np.isfinite(points).all():
        raise Unusable("with numbers that are not finite")
    if np.abs(points).max(initial=0) > 10 * max(size):
        raise Unusable("far outside of the image")


def check_drawing(drawing: Drawing, size: Size) -> None:
    """Raises Unusable for what has no pixel in an image of this size."""
    if isinstance(drawing, np.ndarray):
        check_near(drawing, size)
        if len(drawing) < 3:
            raise Unusable("of fewer than three points")
        if np.ptp(drawing, axis=0).max() <= 1:
            raise Unusable("not larger than a pixel; were they drawn in 0..1?")
        y1, x1, y2, x2 = pixel_box(drawing, size)
        rows = np.arange(y1, y2)
        # Some rows are nearly always enough to know.
        if fill(drawing, rows[:: max(1, len(rows) // 8)], x1, x2).any():
            return
    if draw([drawing], size)[1].size == 0:
        raise Unusable("without a pixel in the image; were they drawn at another scale?")
