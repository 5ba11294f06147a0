"""COCO's evaluation of boxes and masks, for any data set (https://cocodataset.org)."""

import contextlib
import io
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import distributed
import utils
from boxed_masks import BoxedMasks, read_masks
from config import Config

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass
class CocoEvaluation:
    """COCO's numbers for boxes and masks; NaN where there is nothing to find.

    Attributes:
        bbox: COCO's 12 numbers for boxes by their names, see METRICS.
        segm: the same for masks.
        bbox_per_class: AP of boxes by class name.
        segm_per_class: AP of masks by class name.
        images: images looked at.
        objects: objects in them, without crowds.
        results: detections in COCO's result format, with the ids of the data set.
        seconds: for one image, decoding left out.
        truth: the instances of each image, see ground_truth, by its internal id.
        detections: what detect(masks="rle") gave of each image, by its internal id.
        precision: COCOeval's, for "bbox" and "segm": [10 IoUs from 0.5 to 0.95, 101 recalls from 0
            to 1, class without background] float64, -1 for a class without objects; objects of all
            sizes, max_detections of a class in an image.
    """

    bbox: dict[str, float]
    segm: dict[str, float]
    bbox_per_class: dict[str, float]
    segm_per_class: dict[str, float]
    images: int
    objects: int
    results: list[dict[str, Any]]
    seconds: float
    truth: dict[int, list[dict[str, Any]]] = field(repr=False)
    detections: dict[int, dict[str, Any]] = field(repr=False)
    precision: dict[str, np.ndarray] = field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """What train_model wants of its `evaluate`."""
        both = {"bbox": self.bbox, "segm": self.segm}
        return {f"{kind}_{name}": both[kind][name] for kind in both for name in ("AP", "AP50")}

    def __str__(self) -> str:
        def row(title: str, values: Sequence[object]) -> str:
            cells = (f"{v:7.3f}" if isinstance(v, float) else f"{v:>7}" for v in values)
            return f"{title:15}" + "".join(cells).replace("nan", "  -")

        lines = [
            f"{self.images} images, {self.objects} objects, {len(self.results)} detections,"
            f" {self.seconds:.3f} s per image"
        ]
        if not self.objects:
            lines.append("no ground truth: there is no object to find, so there are no numbers")
        elif not self.results:
            lines.append("nothing was detected, so AP is 0")
        lines += [row("", METRICS), row("bbox", [*self.bbox.values()])]
        lines += [row("segm", [*self.segm.values()]), "", row("AP of class", ["bbox", "segm"])]
        for name, ap in self.bbox_per_class.items():
            if not math.isnan(ap):
                lines.append(row(f"{name:14} ", [ap, self.segm_per_class[name]]))
        return "\n".join(lines)


def evaluate_coco(
    model: Any,
    dataset: utils.Dataset,
    *,
    image_ids: Sequence[int] | np.ndarray | None = None,
    limit: int | None = None,
    min_confidence: float | None = None,
    max_detections: int = 100,
    results_path: str | Path | None = None,
    verbose: int = 1,
) -> CocoEvaluation | None:
    """Detects the objects of a data set and compares boxes and masks with it, as COCO does.

    Under torchrun each process takes its share of the images. With the config's
    SKIP_UNREADABLE_IMAGES, those that cannot be used are left out, with a warning.

    Args:
        model: or whatever has its detect() and config.
        dataset: any prepared utils.Dataset.
        image_ids: which images, by their internal ids; None for all.
        limit: at most so many of them; None or 0 for no limit.
        min_confidence: instead of the config's DETECTION_MIN_CONFIDENCE. COCO's numbers are about
            all detections: 0.
        max_detections: the best of each class in an image that count, from 10 on. COCO's are 100;
            where images hold more objects, more. AR100 is then about these.
        results_path: where to write the detections in COCO's result format.
        verbose: 1 shows a progress bar.

    Returns:
        The numbers; None in all processes but the main one.

    Raises:
        ValueError: no images, other classes than the model's, or an image that cannot be used.
    """
    chosen = dataset.image_ids if image_ids is None else image_ids
    ids = list(dict.fromkeys(map(int, chosen)))[: limit or None]
    if not ids:
        raise ValueError("there must be images to evaluate, got none")
    if dataset.num_classes != model.config.NUM_CLASSES:
        raise ValueError(
            f"the model must have the classes of the data set, {dataset.num_classes} with the"
            f" background, got {model.config.NUM_CLASSES}"
        )
    if max_detections < 10:
        raise ValueError(f"max_detections must be at least 10, got {max_detections}")
    if results_path is not None:
        Path(results_path).parent.mkdir(parents=True, exist_ok=True)
    # First, because an annotation that cannot be used should be known before hours of detection.
    skip = getattr(model.config, "SKIP_UNREADABLE_IMAGES", False)
    truth = {}
    for i in ids if distributed.is_main() else ():
        instances = _attempt(ground_truth, dataset, i, skip=skip)
        if instances is not None:
            truth[i] = instances

    confidence = model.config.DETECTION_MIN_CONFIDENCE
    model.config.DETECTION_MIN_CONFIDENCE = confidence if min_confidence is None else min_confidence
    try:
        share = ids[distributed.rank() :: distributed.world_size()]
        found, seconds = _detect_all(model, dataset, share, verbose)
    finally:
        model.config.DETECTION_MIN_CONFIDENCE = confidence
    shares = distributed.gather((found, seconds))
    if not distributed.is_main():
        return None
    detections = {i: result for found, _ in shares for i, result in found.items()}
    ids = [i for i in ids if i in truth and i in detections]
    truth = {i: truth[i] for i in ids}
    if not ids:
        raise ValueError("there must be images to evaluate, but none can be read")

    category_ids = [info["id"] for info in dataset.class_info]
    results = [
        result
        for i in ids
        for result in build_coco_results(dataset.image_info[i]["id"], detections[i], category_ids)
    ]
    if results_path is not None:
        content = json.dumps(results).encode()
        utils.write_atomic(results_path, lambda file: file.write(content))
    bbox, bbox_per_class, bbox_precision = _score(
        dataset, truth, detections, "bbox", max_detections
    )
    segm, segm_per_class, segm_precision = _score(
        dataset, truth, detections, "segm", max_detections
    )
    return CocoEvaluation(
        bbox,
        segm,
        bbox_per_class,
        segm_per_class,
        images=len(ids),
        objects=sum(not a["iscrowd"] for instances in truth.values() for a in instances),
        results=results,
        seconds=sum(seconds for _, seconds in shares) / len(ids),
        truth=truth,
        detections={i: detections[i] for i in ids},
        precision={"bbox": bbox_precision, "segm": segm_precision},
    )


def least_score(config: Config) -> float:
    """DETECTION_MIN_CONFIDENCE to evaluate with: AP is about all detections.

    Those of each class are many, hence the 0.05 that the authors of such models evaluate with.
    """
    score = config.DETECTION_MIN_CONFIDENCE
    per_class = getattr(config, "DETECTION_PER_CLASS", False)
    return float(score) if per_class and score <= 0.05 else 0.0


def evaluator(
    dataset: utils.Dataset, limit: int | None = None, max_detections: int = 100
) -> Callable[[Any], dict[str, float]]:
    """What train_model(evaluate=...) takes: bbox_AP, bbox_AP50, segm_AP and segm_AP50."""

    def evaluate(model: Any) -> dict[str, float]:
        least = least_score(model.config)
        options: dict[str, Any] = {"limit": limit, "max_detections": max_detections}
        result = evaluate_coco(model, dataset, min_confidence=least, verbose=0, **options)
        return {} if result is None else result.metrics

    return evaluate


def build_coco_results(
    image_id: int | str, result: dict[str, Any], category_ids: Sequence[int | str] | None = None
) -> list[dict[str, Any]]:
    """The detections of an image in COCO's result format, ready for json.dump.

    Args:
        image_id: as in the annotation file.
        result: of MaskRCNN.detect(..., masks="rle"); `boxes`, if there, count before `rois`.
        category_ids: by class id; None gives the class ids themselves.

    Returns:
        Dicts of image_id, category_id, bbox [x, y, width, height], score and segmentation.
    """
    results = []
    for box, class_id, score, mask in zip(
        result.get("boxes", result["rois"]).tolist(),
        result["class_ids"].tolist(),
        result["scores"].tolist(),
        result["masks"],
        strict=True,
    ):
        y1, x1, y2, x2 = box
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[class_id] if category_ids else class_id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
                "segmentation": mask,
            }
        )
    return results


def ground_truth(dataset: utils.Dataset, image_id: int) -> list[dict[str, Any]]:
    """The instances of an image; a data set may have a method ground_truth(image_id) for it."""
    if hasattr(dataset, "ground_truth"):
        return dataset.ground_truth(image_id)
    return instances_of_masks(*read_masks(dataset, image_id))


def instances_of_masks(masks: BoxedMasks, class_ids: np.ndarray) -> list[dict[str, Any]]:
    """Masks and their class ids as a list of instances."""
    parts = zip(class_ids, masks.parts, strict=True)
    return [instance(int(i), utils.rle_encode(part, box, masks.size)) for i, (box, part) in parts]


def instance(
    class_id: int,
    rle: dict[str, Any],
    bbox: Sequence[float] | None = None,
    area: float | None = None,
) -> dict[str, Any]:
    """An object or crowd in COCO's format, its category_id being the internal class id.

    Args:
        class_id: negative for crowds.
        rle: compressed run lengths of the mask.
        bbox: [x, y, width, height]; None for that of the mask.
        area: None for that of the mask.
    """
    from pycocotools import mask as coco_mask

    return {
        "category_id": abs(class_id),
        "iscrowd": int(class_id < 0),
        "segmentation": rle,
        "bbox": coco_mask.toBbox(rle).tolist() if bbox is None else bbox,
        "area": float(coco_mask.area(rle)) if area is None else area,
    }


def overlaps(
    found: Sequence[dict[str, Any]], instances: Sequence[dict[str, Any]], kind: str
) -> np.ndarray:
    """How much detections overlap instances, as COCO's evaluation computes it.

    Args:
        found: N detections of an image in COCO's result format.
        instances: M instances of the same image, see `instance`.
        kind: "bbox" or "segm".

    Returns:
        [N, M] float64, intersection over union; of a crowd, over the detection's area.
    """
    from pycocotools import mask as coco_mask

    if not found or not instances:
        return np.zeros((len(found), len(instances)))
    key = "bbox" if kind == "bbox" else "segmentation"
    crowds = [i["iscrowd"] for i in instances]
    return coco_mask.iou([d[key] for d in found], [i[key] for i in instances], crowds)


def as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """The union of polygons [[x, y, x, y, ...], ...] as run lengths, which are returned as such."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict):
        return segmentation
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))


def _load_image(dataset: utils.Dataset, image_id: int) -> np.ndarray:
    return dataset.load_image(image_id)


def _attempt(
    read: Callable[[Any, int], Any], dataset: utils.Dataset, image_id: int, *, skip: bool
) -> Any:
    """What `read` gives of an image; None, with a warning, if it cannot be used and skip is set."""
    try:
        return read(dataset, image_id)
    except (OSError, ValueError) as error:
        if not skip:
            remedy = "correct or remove it, or set SKIP_UNREADABLE_IMAGES (--skip-unreadable)"
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{error}; {remedy}") from error
        logger.warning("left out: %s", error)
        return None


def _detect_all(
    model: Any, dataset: utils.Dataset, image_ids: Sequence[int], verbose: int
) -> tuple[dict[int, dict[str, Any]], float]:
    """The result of detect(masks="rle") for each image, and seconds in detect."""
    size = model.config.BATCH_SIZE
    dataset = dataset.at_bit_depth(model.config.IMAGE_BIT_DEPTH)
    batches = [image_ids[start : start + size] for start in range(0, len(image_ids), size)]
    results: dict[int, dict[str, Any]] = {}
    seconds = 0.0

    def load(batch: Sequence[int]) -> dict[int, np.ndarray]:
        skip = getattr(model.config, "SKIP_UNREADABLE_IMAGES", False)
        images = {i: _attempt(_load_image, dataset, i, skip=skip) for i in batch}
        return {i: image for i, image in images.items() if image is not None}

    disable = not (verbose and distributed.is_main())
    bar = utils.progress(total=len(image_ids), desc="evaluate", unit="image", disable=disable)
    # One thread decodes the next batch while the model works on this one.
    with ThreadPoolExecutor(1) as pool, bar:
        following = pool.submit(load, batches[0]) if batches else None
        for number, batch in enumerate(batches):
            assert following is not None
            images = following.result()
            if number + 1 < len(batches):
                following = pool.submit(load, batches[number + 1])
            start = time.perf_counter()
            if images:
                found = model.detect(list(images.values()), masks="rle")
                results.update(zip(images, found, strict=True))
            seconds += time.perf_counter() - start
            bar.update(len(batch))
    return results, seconds


def _score(
    dataset: utils.Dataset,
    truth: dict[int, list[dict[str, Any]]],
    detections: dict[int, dict[str, Any]],
    kind: str,
    max_detections: int,
) -> tuple[dict[str, float], dict[str, float], np.ndarray]:
    """COCO's 12 numbers, AP by class name, and precision, for "bbox" or "segm"."""
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def index(annotations: Sequence[dict[str, Any]]) -> Any:
        coco = COCO()
        # Numbered from 1: to COCOeval, an object with the id 0 is one that nothing matched.
        coco.dataset = {
            # Their sizes are read, but only polygons would need them.
            "images": [{"id": i, "height": 0, "width": 0} for i in truth],
            "categories": [{"id": i} for i in range(1, dataset.num_classes)],
            "annotations": [{"id": n, **a} for n, a in enumerate(annotations, start=1)],
        }
        coco.createIndex()
        return coco

    found = [r for i in truth for r in build_coco_results(i, detections[i])]
    for result in found:
        # Not COCO.loadRes, which takes the area of the box for that of a mask with a box.
        result["area"] = (
            float(coco_mask.area(result["segmentation"]))
            if kind == "segm"
            else result["bbox"][2] * result["bbox"][3]
        )
        result["iscrowd"] = 0
    expected = [{"image_id": i, **a} for i, instances in truth.items() for a in instances]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(index(expected), index(found), kind)
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    def number(value: float) -> float:
        return float(value) if value > -1 else math.nan

    # [T, R, K - 1]: of all sizes; the copy lets go of the others.
    precision = evaluation.eval["precision"][:, :, :, 0, -1].copy()
    judged = precision[precision > -1]
    numbers = dict(zip(METRICS, map(number, evaluation.stats), strict=True))
    # The one number for which summarize() knows no other count than 100.
    numbers["AP"] = float(judged.mean()) if len(judged) else math.nan
    names = dataset.class_names[1:]
    means = map(number, precision.mean(axis=(0, 1)))
    return numbers, dict(zip(names, means, strict=True)), precision
