"""What to know of a data set before training on it: sizes, objects, anchors, and how it looks."""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import evaluation
import utils
from boxed_masks import BoxedMasks, read_masks
from config import Config


@dataclass
class Check:
    """What of a data set training would not see.

    Attributes:
        warnings: lines on what is lost, and why.
        error: why there is nothing to train on, or which images cannot be used; "" for neither.
    """

    warnings: list[str]
    error: str


# What keeps an object from being trained, and what to do about it.
CROWD = "crowds (iscrowd); crowd_as_objects=True, --crowd-as-objects, takes them for objects"
NO_PIXEL = (
    "without a pixel in their image; were they drawn on another size of it, or are they in 0..1 or"
    " in percent?"
)
TOO_SMALL = (
    "of less than half a pixel of the network's input; use a larger IMAGE_MAX_DIM, --image-dim"
)


def check_objects(dataset: utils.Dataset, config: Config) -> Check:
    """Counts the objects that training will really see, before it begins.

    All images of a data set that tells the extents of its objects (see CocoDataset) are counted;
    of others, of which masks must be drawn, some.

    Args:
        dataset: prepared.
        config: what it is to be trained with.
    """
    cheap = hasattr(dataset, "extents")
    ids = _spread(range(dataset.num_images), dataset.num_images if cheap else 200)
    lost: dict[str, Counter[int]] = {reason: Counter() for reason in (CROWD, NO_PIXEL, TOO_SMALL)}
    trained: Counter[int] = Counter()
    faults = _faults(dataset)
    scale = functools.lru_cache(1000)(functools.partial(_scale, config))
    for image_id in ids:
        try:
            class_ids, boxes, size = _extents(dataset, image_id)
        except (OSError, ValueError) as error:
            faults.append(str(error))
            continue
        sides = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=math.inf)
        for class_id, side in zip(class_ids.tolist(), sides.tolist(), strict=True):
            if class_id < 0:
                lost[CROWD][-class_id] += 1
            elif side <= 0:
                lost[NO_PIXEL][class_id] += 1
            elif side * scale(tuple(size)) < 0.5:
                lost[TOO_SMALL][class_id] += 1
            else:
                trained[class_id] += 1
    return _judge(dataset, config, trained, lost, list(dict.fromkeys(faults)))


def _extents(dataset: Any, image_id: int) -> tuple[np.ndarray, np.ndarray, Sequence[int]]:
    if hasattr(dataset, "extents"):
        return dataset.extents(image_id)
    masks, class_ids = read_masks(dataset, image_id)
    return class_ids, masks.tight().boxes.astype(np.float64), masks.size


def _faults(dataset: Any) -> list[str]:
    """What is wrong with the files of some images, of all where they are few."""
    faults = []
    if hasattr(dataset, "check_size"):
        for image_id in _spread(range(dataset.num_images), 1000):
            try:
                dataset.check_size(image_id)
            except (OSError, ValueError) as error:
                faults.append(str(error))
    return faults


def _scale(config: Config, size: Sequence[int]) -> float:
    """Network pixels per pixel of an image of this size."""
    scale = utils.resize_to_network(np.empty((*size, 0), np.uint8), config).scale
    return float(np.mean(scale))


def _judge(
    dataset: utils.Dataset,
    config: Config,
    trained: Counter[int],
    lost: dict[str, Counter[int]],
    faults: list[str],
) -> Check:
    lines = []
    total = sum(trained.values()) + sum(sum(counts.values()) for counts in lost.values())
    causes = [f"{counts.total()} {reason}" for reason, counts in lost.items() if counts]
    if not trained:
        if not total:
            causes = [
                f"{len(ids)} {remark}: {ids[0]}"
                for summary in getattr(dataset, "summaries", ())
                for remark, ids in summary.remarks.items()
                if "dropped" in remark
            ] or ["none of them has an annotation"]
        text = f"there must be objects to train on, found none in {dataset.num_images} images"
        return Check([], f"{text}: {'; '.join(causes)}")
    for reason, counts in lost.items():
        if counts.total() > 0.1 * total:
            lines.append(f"{counts.total()} of {total} objects are {reason}")
    names = dataset.class_names
    for class_id in range(1, dataset.num_classes):
        gone = {reason: counts[class_id] for reason, counts in lost.items() if counts[class_id]}
        if gone and not trained[class_id]:
            parts = ", ".join(f"{count} {reason}" for reason, count in gone.items())
            lines.append(f"of the class {names[class_id]!r} nothing is left to train on: {parts}")
    seen = trained.keys() | {class_id for counts in lost.values() for class_id in counts}
    if empty := [names[i] for i in range(1, dataset.num_classes) if i not in seen]:
        more = ", ..." if len(empty) > 8 else ""
        lines.append(f"without any object: {', '.join(map(repr, empty[:8]))}{more}")
    if not faults:
        return Check(lines, "")
    text = f"{len(faults)} images cannot be used: {faults[0]}"
    if config.SKIP_UNREADABLE_IMAGES:
        return Check([*lines, text], "")
    remedy = "correct or remove them, or skip them with SKIP_UNREADABLE_IMAGES, --skip-unreadable"
    return Check(lines, f"{text}; {remedy}")


@dataclass(frozen=True)
class ImageSurvey:
    """What there is to know of an image before training on it.

    Attributes:
        image_id: internal.
        size: (height, width).
        class_ids: [N] of its annotations, negative for crowds.
        sides: [N] float64, root of the box area in network pixels; 0 for what lies outside.
        fits: [N] float64, the largest IoU with an anchor; NaN for crowds and what lies outside.
    """

    image_id: int
    size: tuple[int, int]
    class_ids: np.ndarray
    sides: np.ndarray
    fits: np.ndarray


@dataclass(frozen=True)
class Survey:
    """What there is to know of a data set before training on it; str() tells it in some lines.

    Attributes:
        dataset: what was looked at.
        config: what it would be trained with.
        images: those that could be used.
        faults: what is wrong with the others.
    """

    dataset: utils.Dataset
    config: Config
    images: list[ImageSurvey]
    faults: list[str]

    @property
    def sides(self) -> np.ndarray:
        """[N] float64, of all objects that the network's input shows; see ImageSurvey."""
        return np.concatenate([np.zeros(0), *(i.sides[~np.isnan(i.fits)] for i in self.images)])

    @property
    def fits(self) -> np.ndarray:
        """[N] float64, of the same objects; see ImageSurvey."""
        return np.concatenate([np.zeros(0), *(i.fits[~np.isnan(i.fits)] for i in self.images)])

    def __str__(self) -> str:
        config, names = self.config, self.dataset.class_names
        classes = Counter(c for image in self.images for c in image.class_ids.tolist())
        objects = sum(count for class_id, count in classes.items() if class_id > 0)
        counts = [int(np.count_nonzero(image.class_ids > 0)) for image in self.images]
        heights, widths = np.array([image.size for image in self.images]).reshape(-1, 2).T
        many = sum(n > config.MAX_GT_INSTANCES for n in counts)
        fits = self.fits
        shares = ", ".join(
            f"{np.count_nonzero(fits < t)} ({np.mean(fits < t) if len(fits) else 0:.1%}) below {t}"
            for t in (0.3, 0.5, 0.7)
        )
        lines = [
            f"{len(self.images) + len(self.faults)} of {self.dataset.num_images} images,"
            f" {len(self.faults)} of which cannot be used",
            *(f"  {fault}" for fault in self.faults[:10]),
            "5 % / median / 95 % of",
            f"  image width       {_range(widths)}",
            f"  image height      {_range(heights)}",
            f"  objects per image {_range(counts)}, {counts.count(0)} images without,"
            f" {many} with more than MAX_GT_INSTANCES = {config.MAX_GT_INSTANCES}",
            f"  object side       {_range(self.sides)} network pixels (root of the box area);"
            f" RPN_ANCHOR_SCALES = {tuple(config.RPN_ANCHOR_SCALES)}",
            f"best anchor of each object: of {len(fits)}, IoU of {shares}",
            f"{objects} objects, {classes.total() - objects} crowds,"
            f" of {self.dataset.num_classes - 1} classes:",
        ]
        ids = sorted(self.dataset.class_ids[1:].tolist(), key=lambda i: -classes[i])
        return "\n".join([*lines, *(f"  {classes[i]:7} {names[i]}" for i in ids)])


def _range(values: Sequence[float] | np.ndarray) -> str:
    low, middle, high = np.percentile(values, (5, 50, 95)) if len(values) else [math.nan] * 3
    return f"{low:.0f} / {middle:.0f} / {high:.0f}"


def survey(dataset: utils.Dataset, config: Config, limit: int | None = None) -> Survey:
    """Reads the images and objects of a data set, and measures them as training would see them.

    Args:
        dataset: prepared.
        config: what it would be trained with; resizing and anchors matter.
        limit: look at so many images only, spread evenly; None or 0 for all.
    """
    dataset = dataset.at_bit_depth(config.IMAGE_BIT_DEPTH)
    images, faults = [], []
    anchors = functools.lru_cache(2)(functools.partial(_anchors, config))
    ids = _spread(range(dataset.num_images), limit or dataset.num_images)
    for image_id in utils.progress(ids, desc="inspect", unit="image"):
        try:
            height, width = dataset.load_image(image_id).shape[:2]
            instances = evaluation.ground_truth(dataset, image_id)
        except (OSError, ValueError) as error:
            faults.append(str(error))
            continue
        class_ids = _signed_class_ids(instances)
        boxes, shape = _network_boxes(_corners(instances), (height, width), config)
        sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1))
        fits = np.full(len(boxes), math.nan)
        counted = (class_ids > 0) & (sides > 0)
        fits[counted] = _best_overlaps(boxes[counted], anchors(shape))
        images.append(ImageSurvey(image_id, (height, width), class_ids, sides, fits))
    return Survey(dataset, config, images, faults)


def inspect(
    dataset: utils.Dataset,
    config: Config,
    sheet: str | Path | None = None,
    limit: int | None = None,
    samples: int = 12,
) -> str:
    """What to know of a data set before training on it, in some lines: see Survey.

    Args:
        dataset, config, limit: see survey.
        sheet: a picture file to draw samples into, images with their annotations.
        samples: images in the sheet.

    Returns:
        Lines of text: sizes of images and objects, objects per image and class, and how well the
        anchors fit.
    """
    found = survey(dataset, config, limit)
    if sheet is not None:
        draw_sheet(found, sheet, samples)
    return str(found)


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most count of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _signed_class_ids(instances: Sequence[dict[str, Any]]) -> np.ndarray:
    """[N] int32 of instances in COCO's format, negative for crowds."""
    ids = [i["category_id"] * (-1 if i["iscrowd"] else 1) for i in instances]
    return np.array(ids, dtype=np.int32)


def _corners(instances: Sequence[dict[str, Any]]) -> np.ndarray:
    """Boxes [N, (y1, x1, y2, x2)] float64 of instances in COCO's format."""
    x, y, width, height = np.array([i["bbox"] for i in instances]).reshape(-1, 4).T
    return np.stack([y, x, y + height, x + width], axis=1)


def _anchors(config: Config, shape: Sequence[int]) -> torch.Tensor:
    """All anchors, [A, 4] float64, of a network input of (height, width) pixels."""
    anchors = utils.generate_pyramid_anchors(**config.anchor_options(shape))
    return torch.from_numpy(anchors)


def _best_overlaps(boxes: np.ndarray, anchors: torch.Tensor) -> np.ndarray:
    """The largest IoU of each box with an anchor."""
    # All pairs of 450 boxes and the anchors of 1024 x 1024 pixels would take gigabytes.
    blocks = torch.from_numpy(boxes).split(max(1, 2**20 // len(anchors)))
    best = [utils.compute_overlaps(block, anchors).amax(dim=1) for block in blocks]
    return torch.cat(best).numpy()


def _network_boxes(
    boxes: np.ndarray, size: Sequence[int], config: Config
) -> tuple[np.ndarray, tuple[int, int]]:
    """Boxes [N, 4] of an image of this size in network pixels, and the network input's shape."""
    # An image without channels costs nothing.
    resized = utils.resize_to_network(np.empty((*size, 0), np.uint8), config)
    height, width = resized.image.shape[:2]
    corner = resized.window[:2] if resized.crop is None else [-n for n in resized.crop[:2]]
    scale = np.tile(np.broadcast_to(resized.scale, 2), 2)
    boxes = utils.clip_boxes(boxes * scale + np.tile(corner, 2), (0, 0, height, width))
    return boxes, (height, width)


# The longer side of a picture in the sheet, which is drawn smaller still: large images are shrunk
# before anything is drawn.
SHEET_SIDE = 1024


def _shrunk(
    image: np.ndarray, boxes: np.ndarray, masks: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Image, boxes and run lengths at SHEET_SIDE."""
    size = image.shape[:2]
    resized = utils.resize_image(image, max_dim=SHEET_SIDE)
    y1, x1, y2, x2 = resized.window
    parts = BoxedMasks(size, map(utils.rle_decode_part, masks))
    parts = parts.resize(resized.scale, [(0, 0), (0, 0)])
    rles = [utils.rle_encode(part, box, parts.size) for box, part in parts.parts]
    return resized.image[y1:y2, x1:x2], boxes * resized.scale, rles


def draw_sheet(found: Survey, path: str | Path, samples: int = 12) -> None:
    """Draws images with their annotations into one picture file; none if no image can be used.

    Args:
        found: what survey returns.
        path: of the file.
        samples: images in the sheet, spread evenly.
    """
    import visualize  # for matplotlib, which nothing else here needs

    if not found.images:
        return
    dataset, pictures, titles = found.dataset, [], []
    for image_id in _spread([image.image_id for image in found.images], samples):
        image, instances = dataset.load_image(image_id), evaluation.ground_truth(dataset, image_id)
        class_ids = _signed_class_ids(instances)
        boxes, masks = _corners(instances), [instance["segmentation"] for instance in instances]
        if max(image.shape[:2]) > SHEET_SIDE:
            image, boxes, masks = _shrunk(image, boxes, masks)
        pictures.append(
            visualize.draw_instances(image, boxes, masks, class_ids, dataset.class_names)
        )
        titles.append(str(dataset.image_info[image_id]["id"]))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    columns = min(3, len(pictures))
    visualize.display_images(pictures, titles, columns, show=False, save_path=path)
