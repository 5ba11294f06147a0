"""Trains, evaluates and looks at data in COCO's format: MS COCO itself, or one's own.

    python coco.py train --dataset=/path/to/coco --model=imagenet --download
    python coco.py train --dataset=/path/to/coco --model=last            # go on after a stop
    python coco.py evaluate --dataset=/path/to/coco --model=coco
    python coco.py inspect --images photos --annotations train.json

See https://cocodataset.org for the format and the data.
"""

import argparse
import contextlib
import functools
import gc
import http.client
import json
import logging
import math
import os
import shutil
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import evaluation
import model as modellib
import training
import utils
import weights
from config import Config
from dataset import horizontal_flip
from evaluation import build_coco_results as build_coco_results
from evaluation import evaluate_coco, evaluator
from inspection import inspect

logger = logging.getLogger(__name__)


class CocoConfig(Config):
    """Configuration of the published weights, mask_rcnn_coco.h5."""

    NAME = "coco"
    NUM_CLASSES = 1 + 80


# Category id of the annotation files and name, in the order of the class ids 1..80.
CATEGORIES = {
    **{1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train"},
    **{8: "truck", 9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign"},
    **{14: "parking meter", 15: "bench", 16: "bird", 17: "cat", 18: "dog", 19: "horse"},
    **{20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe"},
    **{27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee"},
    **{35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat"},
    **{40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket"},
    **{44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon"},
    **{51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli"},
    **{57: "carrot", 58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair"},
    **{63: "couch", 64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet", 72: "tv"},
    **{73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard", 77: "cell phone"},
    **{78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book"},
    **{85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier"},
    **{90: "toothbrush"},
}
CATEGORY_IDS = [0, *CATEGORIES]
CLASS_NAMES = ["BG", *CATEGORIES.values()]


# --- Data set ------------------------------------------------------------------------------------

SUBSETS = {"2014": ("train", "val", "minival", "valminusminival"), "2017": ("train", "val")}


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
    remarks: dict[str, list[Any]]

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
            auto_download: fetch what is missing, see download.

        Raises:
            ValueError, FileNotFoundError: see load_annotations; or there is no such subset.
        """
        images, annotations = _layout(dataset_dir, subset, year)
        if auto_download:
            download(dataset_dir, subset, year)
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
        content = _read(file)
        remarks: dict[str, list[Any]] = defaultdict(list)
        names = {c["id"]: c["name"] for c in content["categories"]}
        ordered = sorted(names, key=lambda i: (isinstance(i, str), i))
        wanted = ordered if class_ids is None else list(class_ids)
        if unknown := [i for i in wanted if i not in names]:
            raise ValueError(f"class_ids must be category ids of {file}, got {unknown}")
        images = _usable_images(content["images"], images_dir, remarks)
        if not images:
            first = next((f"; {remark}: {ids[0]}" for remark, ids in remarks.items()), "")
            raise FileNotFoundError(
                f"{images_dir} must hold the images of {file}, but none of the"
                f" {len(content['images'])} can be used{first}"
            )
        taken = {info["id"] for info in self.image_info if info["source"] == source}
        if repeated := taken & images.keys():
            raise ValueError(
                f"image ids must differ within the source {source!r}, got {min(map(str, repeated))}"
                f" again from {file}; load it as another source"
            )
        _attach_annotations(content["annotations"], images, set(names), set(wanted), remarks)

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
        info = self.image_info[image_id]
        if "annotations" not in info:
            return super().load_mask(image_id)
        shape = info["height"], info["width"]
        masks = [
            utils.rle_decode(evaluation.as_rle(a["segmentation"], *shape))
            for a in info["annotations"]
        ]
        visible = [i for i, mask in enumerate(masks) if mask.any()]
        class_ids = [self._class_id(info, info["annotations"][i]) for i in visible]
        if not visible:
            return np.zeros((*shape, 0), dtype=bool), np.zeros(0, dtype=np.int32)
        return np.stack([masks[i] for i in visible], axis=2), np.array(class_ids, dtype=np.int32)

    def ground_truth(self, image_id: int) -> list[dict[str, Any]]:
        """What evaluation compares with: boxes and areas are those of the file, if it has them.

        Raises:
            ValueError: run lengths that are damaged.
        """
        info = self.image_info[image_id]
        if "annotations" not in info:
            return evaluation.instances_of_masks(*super().load_mask(image_id))
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


def _layout(dataset_dir: str | Path, subset: str, year: int | str) -> tuple[Path, Path]:
    """Folder of images and file of annotations of a subset of MS COCO."""
    subsets = SUBSETS.get(str(year))
    if subsets is None or subset not in subsets:
        known = "; ".join(f"{', '.join(names)} of {y}" for y, names in SUBSETS.items())
        raise ValueError(f"subset and year must be one of {known}, got {subset} of {year}")
    images = subset if subset == "train" else "val"
    folder = Path(dataset_dir)
    return folder / f"{images}{year}", folder / "annotations" / f"instances_{subset}{year}.json"


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
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


def _usable_images(
    items: Sequence[dict[str, Any]], folder: Path, remarks: dict[str, list[Any]]
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
                height, width = upright_size(path)
            except OSError:
                remarks["images dropped, unreadable"].append(f"{image_id} ({path})")
                continue
        images[image_id] = {"path": path, "height": height, "width": width, "annotations": []}
    return images


def upright_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image file as its EXIF orientation says; reads the header alone."""
    with Image.open(path) as picture:
        width, height = picture.size
        turned = picture.getexif().get(0x0112, 1) >= 5  # Orientation: 5 to 8 are on their side
    return (width, height) if turned else (height, width)


def _attach_annotations(
    items: Sequence[dict[str, Any]],
    images: dict[Any, dict[str, Any]],
    known: set[Any],
    wanted: set[Any],
    remarks: dict[str, list[Any]],
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
                annotation, remark = _usable_annotation(item, image["height"], image["width"])
                if annotation is not None:
                    image["annotations"].append(annotation)
                if remark:
                    remarks[f"annotations {remark}"].append(name)
        except (TypeError, ValueError, KeyError):  # something else where a number or list belongs
            remarks["annotations dropped, malformed"].append(name)


def _usable_annotation(
    item: dict[str, Any], height: int, width: int
) -> tuple[dict[str, Any] | None, str]:
    """An annotation in the form that CocoDataset keeps, if it can be used, and a remark on it."""
    limit = 10 * max(height, width)

    def sane(numbers: Sequence[float]) -> bool:
        # pycocotools walks along outlines pixel by pixel, however far they lead.
        near = -limit < min(numbers) and max(numbers) < limit
        return near and math.isfinite(sum(numbers))

    bbox, area, segmentation = item.get("bbox"), item.get("area"), item.get("segmentation")
    if not (isinstance(bbox, list) and len(bbox) == 4 and sane(bbox) and min(bbox[2:]) > 0):
        bbox = None
    if not (isinstance(area, int | float) and 0 <= area < math.inf):
        area = None
    remark = ""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if segmentation["size"] != [height, width]:
            return None, "dropped, mask of another size than the image"
        if not isinstance(counts, str) and (min(counts) < 0 or sum(counts) != height * width):
            return None, "dropped, run lengths do not add up to the image"
    else:
        parts = segmentation or []
        if parts and not isinstance(parts[0], list):  # a list of numbers instead of lists
            parts = [parts]
        segmentation = [part for part in parts if len(part) >= 6 and len(part) % 2 == 0]
        if not all(map(sane, segmentation)):
            return None, "dropped, outline far outside of the image"
        if not segmentation:
            if bbox is None:
                return None, "dropped, neither mask nor box"
            x, y, w, h = bbox
            segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            remark = "without a mask: their box is taken as one"
        elif len(segmentation) < len(parts):
            remark = "with parts of less than three points, which are left out"
    return {
        "category_id": item["category_id"],
        "iscrowd": int(item.get("iscrowd") in (1, "1")),
        "segmentation": segmentation,
        "bbox": bbox,
        "area": area,
    }, remark


# --- Download ------------------------------------------------------------------------------------

COCO_URL = "http://images.cocodataset.org"
MINIVAL_URL = "https://dl.dropboxusercontent.com/s"  # of the 2014 subsets, by Ross Girshick
MINIVAL_FILES = {
    "minival": "o43o90bna78omob/instances_minival2014.json.zip",
    "valminusminival": "s3tw5zcg7395368/instances_valminusminival2014.json.zip",
}


def download(dataset_dir: str | Path, subset: str, year: int | str = "2017") -> None:
    """Fetches what is missing of a subset of MS COCO, 1 GB (val) to 18 GB (train).

    An interrupted download is resumed. Files and folders appear under their names only when they
    are whole.

    Raises:
        ConnectionError: the network or the server fails.
        ValueError: a damaged archive, or one that wants to write elsewhere.
        OSError: the disk is full.
    """
    images, annotations = _layout(dataset_dir, subset, year)
    if not images.is_dir():
        _fetch_and_unpack(f"{COCO_URL}/zips/{images.name}.zip", images.name, images)
    if not annotations.is_file():
        url, member = f"{COCO_URL}/annotations/annotations_trainval{year}.zip", "annotations/"
        if subset in MINIVAL_FILES:
            url, member = f"{MINIVAL_URL}/{MINIVAL_FILES[subset]}", ""
        _fetch_and_unpack(url, member + annotations.name, annotations)


def _fetch_and_unpack(url: str, member: str, target: Path) -> None:
    """Makes a file or folder of a zip archive at url appear as target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: on the same disk, where there is room and a rename is one step.
    archive = target.parent / (Path(url).name + ".part")
    logger.info("downloading %s to %s", url, archive)
    try:
        weights.fetch(url, archive, progress=training.is_main())
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"cannot download {url} ({error}); try again, which resumes it, or unpack that file's"
            f" {member} as {target} by other means"
        ) from error
    folder = target.parent / f".{target.name}.unpacking"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as file:
            members = [m for m in file.infolist() if f"{m.filename}/".startswith(f"{member}/")]
            _check_members(members, member, folder, url)
            logger.info("unpacking %d files to %s", len(members), target)
            file.extractall(folder, members)  # compares checksums
        os.replace(folder / member, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise ValueError(f"{url} arrived damaged ({error}) and was deleted; try again") from error
    finally:
        shutil.rmtree(folder)
    archive.unlink()


def _check_members(members: Sequence[zipfile.ZipInfo], wanted: str, folder: Path, url: str) -> None:
    if not members:
        raise ValueError(f"{url} must hold {wanted}, which is not in it")
    for member in members:
        if not (folder / member.filename).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{url} must not be unpacked: it would write to {member.filename!r}")
    size, free = sum(m.file_size for m in members), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{folder.parent} needs {size:,} bytes for {wanted}, has {free:,}; make room")


# --- Command line --------------------------------------------------------------------------------

CLASS_LAYERS = ("classifier.linear_class", "classifier.linear_bbox", "mask.conv5")
# Layers, last epoch, and what the learning rate is multiplied with: the original's schedule.
STAGES = (("heads", 40, 1.0), ("4+", 120, 1.0), ("all", 160, 0.1))
# What options are called in Config.
OPTIONS = {
    "batch": "IMAGES_PER_GPU",
    "workers": "NUM_WORKERS",
    "backbone": "BACKBONE",
    "accumulate": "GRADIENT_ACCUMULATION",
    "lr": "LEARNING_RATE",
    "steps": "STEPS_PER_EPOCH",
    "amp": "AMP",
    "seed": "SEED",
}
# What gets one line instead of a traceback.
EXPECTED = (OSError, ValueError, training.NonFiniteLossError, torch.OutOfMemoryError)


def train(args: argparse.Namespace, device: torch.device) -> None:
    path = model_file(args)  # first: a wrong one should not cost the minutes of loading the data
    train_set, val_set = load_data(args, validation=False), load_data(args, validation=True)
    assert train_set is not None
    if val_set is not None and val_set.class_names != train_set.class_names:
        raise ValueError(
            f"training and validation data must have the same categories, got"
            f" {train_set.class_names[1:]} and {val_set.class_names[1:]}"
        )
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model = model_to_train(args, path, train_set).to(device)
    rate = model.config.LEARNING_RATE
    stages = [(layers, epochs, rate * factor) for layers, epochs, factor in STAGES]
    if args.epochs or args.layers:
        stages = [(args.layers or "all", args.epochs or 40, rate)]
    try:
        for layers, epochs, learning_rate in stages:
            logger.info("layers %s to epoch %d at %g", layers, epochs, learning_rate)
            model.train_model(
                train_set,
                val_set,
                learning_rate,
                epochs,
                layers,
                augmentation=horizontal_flip,
                callbacks=[log_epoch],
                evaluate=None if val_set is None else evaluator(val_set, args.limit),
            )
    except KeyboardInterrupt as interrupt:
        saved = str(interrupt) or (model.log_dir and f"the last checkpoint is in {model.log_dir}")
        message = f"{saved}; go on with --model=last" if saved else "before the first step"
        raise KeyboardInterrupt(message) from None
    logger.info("finished: %s", model.log_dir)


def log_epoch(record: training.Record) -> None:
    names = ("loss", "val_loss", "bbox_AP", "segm_AP")
    numbers = ", ".join(f"{name} {record[name]:.3f}" for name in names if name in record)
    logger.info("epoch %d: %s", record["epoch"], numbers)


def model_file(args: argparse.Namespace) -> Path | None:
    """The file behind --model, in all processes after the main one has found or fetched it."""
    path = None
    if training.is_main() and args.model == "last":
        checkpoints = training.find_checkpoints(args.logs, CocoConfig.NAME)
        path = training.first_readable(checkpoints).path
    elif training.is_main() and args.model != "random":
        path = weights.find_weights(args.model, args.backbone or CocoConfig.BACKBONE)
    return training.from_main(path)


def model_to_train(
    args: argparse.Namespace, path: Path | None, dataset: CocoDataset
) -> modellib.MaskRCNN:
    """A model for the classes of the data set, with the weights that --model asks for."""
    options = config_options(args)
    options |= {"NUM_CLASSES": dataset.num_classes, "CLASS_NAMES": dataset.class_names}
    if path is None or args.model == "imagenet":
        model = modellib.MaskRCNN(CocoConfig(**options), args.logs)
        if path is not None:
            model.load_weights(path, verbose=training.is_main())
        return model

    file = weights.read_state_dict(path)
    known = {k: v for k, v in weights.read_options(file).items() if hasattr(Config, k)}
    # Not the name in the file: --model=last looks for this one.
    config = CocoConfig(**known | {"NAME": CocoConfig.NAME} | options)
    model = modellib.MaskRCNN(config, args.logs)
    names = known.get("CLASS_NAMES") or (CLASS_NAMES if args.model == "coco" else None)
    same = known["NUM_CLASSES"] == dataset.num_classes and names in (None, dataset.class_names)
    if args.model == "last":
        if not same:
            raise ValueError(
                f"the data set must have the classes of {path}, {names or known['NUM_CLASSES']},"
                f" got {dataset.class_names}; start a new run from it with --model={path}"
            )
        logger.info("going on from %s", model.resume(path))
        return model
    if not same:
        logger.info("other classes than the file's: %s start anew", ", ".join(CLASS_LAYERS))
    exclude = () if same else CLASS_LAYERS
    weights.load_weights(model, file, exclude, verbose=training.is_main())
    return model


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    if args.model in ("imagenet", "random"):
        raise ValueError(f"evaluate needs a trained model, got --model={args.model}")
    path = model_file(args)
    assert path is not None
    dataset = load_data(args, validation=args.dataset is not None)
    assert dataset is not None
    # The original's InferenceConfig too keeps all detections: AP is about all of them.
    options = config_options(args) | {"DETECTION_MIN_CONFIDENCE": 0.0}
    model = modellib.MaskRCNN.from_weights(path, **options).to(device)
    names = model.config.CLASS_NAMES
    if names is not None and list(names) != dataset.class_names:
        logger.warning(
            "the model was trained on other classes, %s, than those of the data, %s",
            ", ".join(names[1:]),
            ", ".join(dataset.class_names[1:]),
        )
    count = min(args.limit or dataset.num_images, dataset.num_images)
    logger.info("%s on %d of %d images (see --limit)", path, count, dataset.num_images)
    result = evaluate_coco(model, dataset, limit=args.limit, results_path=args.results)
    if result is not None:
        print(result)


def inspect_data(args: argparse.Namespace, device: torch.device) -> None:
    dataset = load_data(args, validation=False)
    assert dataset is not None
    config = CocoConfig(**config_options(args), NUM_CLASSES=dataset.num_classes)
    print(inspect(dataset, config, args.output, args.limit))
    print(f"sheet: {args.output}")


def load_data(args: argparse.Namespace, validation: bool) -> CocoDataset | None:
    """The data to train on, or to validate with; None if there is none of that kind."""
    dataset = CocoDataset()
    if args.dataset is not None:
        subsets = ["val"] if validation else ["train"]
        if args.year == "2014":
            subsets = ["minival"] if validation else ["train", "valminusminival"]
        for subset in subsets:
            year = args.year or "2017"
            dataset.load_coco(args.dataset, subset, year, auto_download=args.download)
    elif not validation:
        dataset.load_annotations(args.images, args.annotations)
    elif args.val_annotations is not None:
        dataset.load_annotations(args.val_images or args.images, args.val_annotations)
    else:
        return None
    dataset.prepare()
    return dataset


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of Config that the command line sets."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = {OPTIONS[name]: value for name, value in given.items() if name in OPTIONS}
    if args.image_dim is not None:
        # The original's proportion, 800 to 1024.
        options |= {"IMAGE_MAX_DIM": args.image_dim, "IMAGE_MIN_DIM": args.image_dim * 25 // 32}
    return options


class Parser(argparse.ArgumentParser):
    """Answers wrong arguments with one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"coco.py: {message}; see {self.prog} --help\n")


def whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}, got {text!r}")
        return value

    return parse


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def device_name(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda, cuda:1, ..., got {text!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"there is no CUDA device here for {text!r}")
    return text


def boolean(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return words[text.lower()]


EXAMPLES = {
    "train": """examples:
  python coco.py train --dataset=/path/to/coco --model=coco
  python coco.py train --dataset=/path/to/coco --model=imagenet --download
  python coco.py train --dataset=/path/to/coco --model=last
  python coco.py train --images photos --annotations train.json --val-annotations val.json \\
      --model coco --layers heads --epochs 10 --steps 100
  torchrun --nproc-per-node=8 -- coco.py train --dataset=/path/to/coco --model=imagenet

Without --epochs and --layers: heads to epoch 40, stage 4 and up to epoch 120, all layers to epoch
160 at a tenth of the learning rate. Images are flipped at random. What is not given is as in the
file of --model, or as in config.py.""",
    "evaluate": """examples:
  python coco.py evaluate --dataset=/path/to/coco --model=coco --limit 0
  python coco.py evaluate --dataset=/path/to/coco --model=last --results results.json
  python coco.py evaluate --images photos --annotations val.json --model logs/coco.../best.pth""",
    "inspect": """examples:
  python coco.py inspect --dataset=/path/to/coco --image-dim 512
  python coco.py inspect --images photos --annotations train.json --output sheet.png""",
}


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    table = (
        ("train", train, "train a model; every epoch leaves a checkpoint"),
        ("evaluate", evaluate, "compute COCO's numbers for boxes and masks"),
        ("inspect", inspect_data, "draw annotated images and count what is in a data set"),
    )
    for name, function, text in table:
        command = commands.add_parser(
            name, help=text, description=text, epilog=EXAMPLES[name], formatter_class=raw
        )
        command.set_defaults(function=function, val_images=None, val_annotations=None, device=None)
        add_options(command, name)
    return parser


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    add = parser.add_argument
    add("--dataset", metavar="DIR", help="MS COCO in its standard layout")
    add("--year", choices=SUBSETS, help="of MS COCO; default: 2017")
    add(
        "--download",
        type=boolean,
        nargs="?",
        const=True,
        metavar="true|false",
        help="fetch what is missing of MS COCO",
    )
    add("--images", metavar="DIR", help="instead of --dataset: the images of one's own data")
    add("--annotations", metavar="FILE", help="and their json in COCO's format")
    if command == "train":
        add("--val-annotations", metavar="FILE", help="what to evaluate each epoch on")
        add("--val-images", metavar="DIR", help="its images; default: --images")
    limit = "images to evaluate, 0 for all" if command != "inspect" else "images, 0 for all"
    add("--limit", type=whole(0), default=500, metavar="N", help=f"{limit}; default: 500")
    add(
        "--image-dim",
        type=whole(1),
        metavar="N",
        help="side of the network input, a multiple of 64",
    )
    if command == "inspect":
        add("--output", default="inspect.png", metavar="FILE", help="default: inspect.png")
        return

    models = {"train": "coco, imagenet, random, last or a file", "evaluate": "coco, last or a file"}
    add("--model", required=True, help=f"weights: {models[command]} (.h5, .pth)")
    add("--logs", default="logs", metavar="DIR", help="of the checkpoints; default: logs")
    add("--device", type=device_name, help="cpu, cuda, ...; default: cuda where there is one")
    add("--batch", type=whole(1), metavar="N", help="images at once, in each process")
    add("--backbone", choices=tuple(modellib.BLOCKS), help="of a new model; default: resnet101")
    if command == "evaluate":
        add("--results", metavar="OUT.json", help="write the detections in COCO's result format")
        return
    add("--workers", type=whole(0), metavar="N", help="processes that load images")
    add("--accumulate", type=whole(1), metavar="N", help="batches that make one step")
    add("--lr", type=positive, metavar="X", help="learning rate")
    add("--layers", help="one stage only: heads, 3+, 4+, 5+, all or a regular expression")
    add("--epochs", type=whole(1), metavar="N", help="one stage only, to this epoch")
    add("--steps", type=whole(1), metavar="N", help="steps of an epoch")
    add("--amp", choices=("bf16", "fp16"), help="compute in 16 bits")
    add("--seed", type=whole(0), metavar="N", help="of new weights, order and augmentation")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    if (args.dataset is None) == (args.annotations is None):
        raise ValueError("the data must be --dataset, or --images and --annotations")
    if (args.images is None) != (args.annotations is None):
        raise ValueError("--images and --annotations must come together")
    if args.dataset is None and (args.year or args.download):
        raise ValueError("--year and --download are for --dataset")
    if args.dataset is not None and (args.val_annotations or args.val_images):
        raise ValueError("--val-annotations and --val-images are for --annotations")
    if args.val_images and not args.val_annotations:
        raise ValueError("--val-images needs --val-annotations")
    if args.download and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--download must not run under torchrun; run inspect --download before")
    CocoConfig(**config_options(args)).validate()


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        check(args)
        with training.distributed(args.device) as device:
            if not training.is_main():
                logging.disable(logging.WARNING)
            args.function(args, device)
    except KeyboardInterrupt as interrupt:
        print(f"coco.py: interrupted: {interrupt}".rstrip(": "), file=sys.stderr)
        return 130
    except EXPECTED as error:
        lines = str(error).splitlines() or [type(error).__name__]
        # What comes from a worker begins with a title and a traceback, and ends with the message.
        message = lines[-1] if lines[0].startswith("Caught ") else lines[0]
        print(f"coco.py: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
