"""Data sets in COCO's format: MS COCO itself, or one's own (https://cocodataset.org)."""

import contextlib
import functools
import gc
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import coco_download
import evaluation
import image_files
import utils
from boxed_masks import BoxedMasks

logger = logging.getLogger(__name__)

Remarks = dict[str, list[Any]]


@dataclass
class LoadSummary:
    """What a file of annotations held.

    Attributes:
        file: the file.
        images: images kept, `negatives` of which have no annotation.
        annotations: annotations kept, `crowds` of which mark crowds.
        classes: classes, without the background.
        remarks: what was dropped or changed and why, with the ids in the file.
    """

    file: Path
    images: int
    negatives: int
    annotations: int
    crowds: int
    classes: int
    remarks: Remarks

    def __str__(self) -> str:
        lines = [
            f"{self.file}: {self.images} images ({self.negatives} without objects),"
            f" {self.annotations} annotations ({self.crowds} crowds), {self.classes} classes"
        ]
        for remark, ids in self.remarks.items():
            first = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
            lines.append(f"  {len(ids)} {remark}: {first}")
        return "\n".join(lines)


class CocoDataset(utils.Dataset):
    """Images annotated in COCO's format; prepare() it after loading.

    image_info holds for each image, besides id, source and path: height and width, and a list of
    annotations, dicts of category_id, iscrowd, segmentation (polygons or run lengths) and, where
    the file has them, bbox [x, y, width, height] and area.
    """

    def load_coco(
        self,
        dataset_dir: str | Path,
        subset: str,
        year: int | str = "2017",
        class_ids: Sequence[int] | None = None,
        auto_download: bool = False,
    ) -> LoadSummary:
        """Adds a subset of MS COCO in its standard layout.

        Args:
            dataset_dir: holds annotations/instances_{subset}{year}.json and {subset}{year}/.
            subset: "train" or "val"; for 2014 also "minival" and "valminusminival", which share
                the images of "val".
            year: 2014 or 2017.
            class_ids: category ids; only they and images that show one of them are loaded.
            auto_download: fetch what is missing, see coco_download.download.

        Raises:
            ValueError, FileNotFoundError: see load_annotations; or there is no such subset.
        """
        images, annotations = coco_download.layout(dataset_dir, subset, year)
        if auto_download:
            coco_download.download(dataset_dir, subset, year)
        if not annotations.is_file():
            raise FileNotFoundError(
                f"no annotation file {annotations}; {dataset_dir} must hold it and the folder"
                f" {images.name}, which --download fetches"
            )
        return self.load_annotations(images, annotations, "coco", class_ids)

    def load_annotations(
        self,
        images_dir: str | Path,
        annotation_file: str | Path,
        source: str = "custom",
        class_ids: Sequence[int | str] | None = None,
    ) -> LoadSummary:
        """Adds the images of any json file in COCO's format.

        Classes are numbered by rising category id. Annotations without a mask get their box as
        one. What cannot be used is dropped, logged, and listed in the summary.

        Args:
            images_dir: what the file's file_name starts from.
            annotation_file: with the lists images, annotations and categories.
            source: keeps several data sets apart, see utils.Dataset.
            class_ids: category ids; only they and images that show one of them are loaded.

        Raises:
            FileNotFoundError: no such file, or none of its images.
            ValueError: the file is no COCO json, or image ids that this source already has.
        """
        with _no_garbage_collection():
            return self._load(Path(images_dir), Path(annotation_file), source, class_ids)

    def _load(
        self,
        images_dir: Path,
        file: Path,
        source: str,
        class_ids: Sequence[int | str] | None,
    ) -> LoadSummary:
        content = read_content(file)
        remarks: Remarks = defaultdict(list)
        names = {c["id"]: c["name"] for c in content["categories"]}
        wanted = choose_categories(names, class_ids, file)
        images = usable_images(content["images"], images_dir, remarks)
        if not images:
            first = next((f"; {remark}: {ids[0]}" for remark, ids in remarks.items()), "")
            raise FileNotFoundError(
                f"{images_dir} must hold the images of {file}, but none of the"
                f" {len(content['images'])} can be used{first}"
            )
        self._check_new(images, source, file)
        attach_annotations(content["annotations"], images, set(names), set(wanted), remarks)

        if class_ids is not None:
            images = {i: image for i, image in images.items() if image["annotations"]}
        for category_id in wanted:
            self._add_category(source, category_id, names[category_id])
        for image_id, image in images.items():
            self.add_image(source, image_id, **image)
        annotations = [a for image in images.values() for a in image["annotations"]]
        summary = LoadSummary(
            file=file,
            images=len(images),
            negatives=sum(not image["annotations"] for image in images.values()),
            annotations=len(annotations),
            crowds=sum(a["iscrowd"] for a in annotations),
            classes=len(wanted),
            remarks=dict(remarks),
        )
        logger.log(logging.WARNING if remarks else logging.INFO, "%s", summary)
        return summary

    def _check_new(self, images: dict[Any, dict[str, Any]], source: str, file: Path) -> None:
        taken = {info["id"] for info in self.image_info if info["source"] == source}
        if repeated := taken & images.keys():
            raise ValueError(
                f"image ids must differ within the source {source!r}, got {min(map(str, repeated))}"
                f" again from {file}; load it as another source"
            )

    def _add_category(self, source: str, category_id: int | str, name: str) -> None:
        if category_id == 0:
            # A usual id in exported files, but add_class keeps 0 for the background.
            info = {"source": source, "id": 0, "name": name}
            if info not in self.class_info:
                self.class_info.append(info)
        else:
            self.add_class(source, category_id, name)

    def load_image(self, image_id: int) -> np.ndarray:
        """The image [H, W, 3] uint8, RGB; ValueError if its annotations are for another size."""
        image = super().load_image(image_id)
        info = self.image_info[image_id]
        if "annotations" in info and image.shape[:2] != (info["height"], info["width"]):
            raise ValueError(
                f"image {info['source']}.{info['id']} must be {info['width']} x {info['height']}"
                f" as in its annotations, but {info['path']} is {image.shape[1]} x"
                f" {image.shape[0]} when upright; correct width and height, or the EXIF orientation"
            )
        return image

    def load_mask(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Masks [H, W, N] bool, those without a pixel left out, and class ids [N] int32.

        A negative class id marks a crowd.
        """
        masks, class_ids = self.load_boxed_masks(image_id)
        return np.asarray(masks), class_ids

    def load_boxed_masks(self, image_id: int) -> tuple[BoxedMasks, np.ndarray]:
        """What load_mask gives, each mask in its box."""
        info = self.image_info[image_id]
        if "annotations" not in info:
            masks, class_ids = super().load_mask(image_id)
            return BoxedMasks.from_array(masks), class_ids
        size = info["height"], info["width"]
        parts, visible = [], []
        for annotation in info["annotations"]:
            rle = evaluation.as_rle(annotation["segmentation"], *size)
            box, part = utils.rle_decode_part(rle)
            if part.size:
                parts.append((box, part))
                visible.append(self._class_id(info, annotation))
        return BoxedMasks(size, parts), np.array(visible, dtype=np.int32)

    def ground_truth(self, image_id: int) -> list[dict[str, Any]]:
        """What evaluation compares with: boxes and areas are those of the file, if it has them.

        Raises:
            ValueError: run lengths that are damaged.
        """
        info = self.image_info[image_id]
        if "annotations" not in info:
            return evaluation.instances_of_masks(*self.load_boxed_masks(image_id))
        instances = []
        for annotation in info["annotations"]:
            rle = evaluation.as_rle(annotation["segmentation"], info["height"], info["width"])
            if isinstance(annotation["segmentation"], dict):
                try:
                    rle = utils.rle_encode(utils.rle_decode(rle))  # a damaged one crashes C code
                except ValueError as error:
                    raise ValueError(f"image {info['source']}.{info['id']}: {error}") from error
            class_id = self._class_id(info, annotation)
            box, area = annotation["bbox"], annotation["area"]
            instances.append(evaluation.instance(class_id, rle, box, area))
        return instances

    def _class_id(self, info: dict[str, Any], annotation: dict[str, Any]) -> int:
        class_id = self.map_source_class_id(f"{info['source']}.{annotation['category_id']}")
        return -class_id if annotation["iscrowd"] else class_id

    def image_reference(self, image_id: int) -> str:
        """The page of an image of MS COCO, the path of any other."""
        info = self.image_info[image_id]
        if info["source"] == "coco":
            return f"https://cocodataset.org/#explore?id={info['id']}"
        return str(info["path"])


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Saves the third of the time that goes into looking through millions of lists for garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- Reading -------------------------------------------------------------------------------------


def read_content(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The content of an annotation file, with the structure that the rest relies on."""
    if not file.is_file():
        raise FileNotFoundError(f"no annotation file {file}")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # no JSON, or no text at all
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    for name in ("images", "annotations", "categories"):
        items = content.get(name) if isinstance(content, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError(
                f"{file} must be in COCO's format, an object with the lists images, annotations"
                f" and categories of objects; {name} is not there or no such list"
            )
    names: dict[Any, Any] = {}
    for category in content["categories"]:
        id_, name = category.get("id"), category.get("name")
        if not _is_id(id_) or not isinstance(name, str) or names.setdefault(str(id_), name) != name:
            raise ValueError(
                f"{file}: a category must have a name and an id of its own, 0, 1, ... or a string,"
                f" got {category}"
            )
    return content


def _is_id(value: object) -> bool:
    return isinstance(value, str) or (type(value) is int and value >= 0)


def choose_categories(
    names: dict[Any, str], class_ids: Sequence[int | str] | None, file: Path
) -> list[Any]:
    """The category ids to load, in the order of the class ids."""
    if class_ids is None:
        return sorted(names, key=lambda i: (isinstance(i, str), i))
    if unknown := [i for i in class_ids if i not in names]:
        raise ValueError(f"class_ids must be category ids of {file}, got {unknown}")
    return list(class_ids)


def usable_images(
    items: Sequence[dict[str, Any]], folder: Path, remarks: Remarks
) -> dict[Any, dict[str, Any]]:
    """By id, path, height, width and an empty list of annotations of the images that exist."""
    images: dict[Any, dict[str, Any]] = {}

    @functools.cache
    def listing(parent: Path) -> set[str]:
        # One look at a folder instead of one at each of its 118 287 files.
        return set(os.listdir(parent)) if parent.is_dir() else set()

    for position, item in enumerate(items):
        image_id, name = item.get("id"), item.get("file_name")
        if not _is_id(image_id) or not isinstance(name, str):
            remarks["images dropped, no id or file_name, at the positions"].append(position)
            continue
        if image_id in images:
            remarks["images dropped, their id came before"].append(image_id)
            continue
        path = folder / name.replace("\\", "/")
        if path.name not in listing(path.parent) and not path.is_file():
            remarks["images dropped, no such file"].append(f"{image_id} ({path})")
            continue
        height, width = item.get("height"), item.get("width")
        if type(height) is not int or type(width) is not int or min(height, width) < 1:
            try:
                height, width = image_files.read_size(path)
            except (OSError, ValueError):
                remarks["images dropped, unreadable"].append(f"{image_id} ({path})")
                continue
        images[image_id] = {"path": path, "height": height, "width": width, "annotations": []}
    return images


def attach_annotations(
    items: Sequence[dict[str, Any]],
    images: dict[Any, dict[str, Any]],
    known: set[Any],
    wanted: set[Any],
    remarks: Remarks,
) -> None:
    """Puts what can be used of the annotations of wanted categories to their images."""
    seen: dict[Any, dict[str, Any]] = {}
    for position, item in enumerate(items):
        name = item.get("id", f"position {position}")
        try:
            image, category_id = images.get(item.get("image_id")), item.get("category_id")
            repeated = seen.setdefault(name, item) is not item and seen[name] == item
            if image is None:
                remarks["annotations dropped, no such image"].append(name)
            elif category_id not in known:
                remarks["annotations dropped, no such category"].append(name)
            elif repeated:
                remarks["annotations dropped, repeated"].append(name)
            elif category_id in wanted:
                annotation, remark = usable_annotation(item, image["height"], image["width"])
                if annotation is not None:
                    image["annotations"].append(annotation)
                if remark:
                    remarks[f"annotations {remark}"].append(name)
        except (TypeError, ValueError, KeyError):  # something else where a number or list belongs
            remarks["annotations dropped, malformed"].append(name)


def usable_annotation(
    item: dict[str, Any], height: int, width: int
) -> tuple[dict[str, Any] | None, str]:
    """An annotation in the form that CocoDataset keeps, if it can be used, and a remark on it."""
    limit = 10 * max(height, width)
    bbox, area = usable_box(item.get("bbox"), limit), item.get("area")
    if not (isinstance(area, int | float) and 0 <= area < math.inf):
        area = None
    segmentation = item.get("segmentation")
    if isinstance(segmentation, dict):
        segmentation, remark = usable_run_lengths(segmentation, height, width)
    else:
        segmentation, remark = usable_outlines(segmentation or [], bbox, limit)
    if segmentation is None:
        return None, remark
    return {
        "category_id": item["category_id"],
        "iscrowd": int(item.get("iscrowd") in (1, "1")),
        "segmentation": segmentation,
        "bbox": bbox,
        "area": area,
    }, remark


def usable_box(box: Any, limit: float) -> list[float] | None:
    """A box [x, y, width, height] that has an area; else None."""
    usable = isinstance(box, list) and len(box) == 4 and is_near(box, limit) and min(box[2:]) > 0
    return box if usable else None


def usable_run_lengths(
    rle: dict[str, Any], height: int, width: int
) -> tuple[dict[str, Any] | None, str]:
    """Run lengths that fit the image, or None and why they do not."""
    counts = rle["counts"]
    if rle["size"] != [height, width]:
        return None, "dropped, mask of another size than the image"
    if not isinstance(counts, str) and (min(counts) < 0 or sum(counts) != height * width):
        return None, "dropped, run lengths do not add up to the image"
    return rle, ""


def usable_outlines(
    parts: list[Any], bbox: list[float] | None, limit: float
) -> tuple[list[list[float]] | None, str]:
    """Polygons [[x, y, x, y, ...], ...], that of the box where there is none, and a remark."""
    if parts and not isinstance(parts[0], list):  # a list of numbers instead of lists
        parts = [parts]
    outlines = [part for part in parts if len(part) >= 6 and len(part) % 2 == 0]
    if not all(is_near(outline, limit) for outline in outlines):
        return None, "dropped, outline far outside of the image"
    if outlines:
        lost = len(outlines) < len(parts)
        remark = "with parts of less than three points, which are left out" if lost else ""
        return outlines, remark
    if bbox is None:
        return None, "dropped, neither mask nor box"
    x, y, w, h = bbox
    outline = [x, y, x + w, y, x + w, y + h, x, y + h]
    return [outline], "without a mask: their box is taken as one"


def is_near(numbers: Sequence[float], limit: float) -> bool:
    """Whether all are finite and below the limit: pycocotools walks outlines pixel by pixel."""
    return -limit < min(numbers) and max(numbers) < limit and math.isfinite(sum(numbers))
