"""Detections as annotations in COCO's format, for annotation tools and as data to train on."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import image_files
import outlines
import utils


def image_record(
    image_id: int | str, path: str | Path, folder: str | Path, size: Sequence[int] | None = None
) -> dict[str, Any]:
    """What COCO's format tells of an image.

    Args:
        image_id: as in the results.
        path: the file.
        folder: what file_name starts from.
        size: (height, width); None reads them from the file.
    """
    height, width = image_files.read_size(path) if size is None else size
    name = Path(os.path.relpath(path, folder)).as_posix()
    return {"id": image_id, "file_name": name, "height": int(height), "width": int(width)}


def dataset_records(
    dataset: utils.Dataset, folder: str | Path, image_ids: Iterable[int] | None = None
) -> list[dict[str, Any]]:
    """What COCO's format tells of images of a data set.

    Args:
        dataset: prepared.
        folder: what file_name starts from.
        image_ids: internal ids of images; None for all.
    """
    ids = dataset.image_ids if image_ids is None else image_ids
    infos = [dataset.image_info[i] for i in ids]
    return [image_record(info["id"], info["path"], folder) for info in infos]


def to_coco(
    images: Sequence[dict[str, Any]],
    results: Iterable[dict[str, Any]],
    class_names: Sequence[str],
    category_ids: Sequence[int | str] | None = None,
    polygons: bool = False,
) -> dict[str, Any]:
    """A file of annotations in COCO's format, which CocoDataset and annotation tools read.

    Args:
        images: see image_record and dataset_records.
        results: detections in COCO's result format with masks in run lengths, as those of
            evaluation.build_coco_results and of CocoEvaluation.results.
        class_names: that of the background first.
        category_ids: by class id, as in the results; None for the class ids.
        polygons: whether masks become outlines, see outlines.mask_polygons. Most annotation
            tools can change these alone.

    Returns:
        images, annotations and categories, ready for json.dump. Each annotation has its score.

    Raises:
        ValueError: results of other images or categories.
    """
    ids = range(len(class_names)) if category_ids is None else category_ids
    names = dict(zip(ids[1:], class_names[1:], strict=True))
    known = {image["id"] for image in images}
    annotations = []
    for number, result in enumerate(results, start=1):
        if result["image_id"] not in known or result["category_id"] not in names:
            raise ValueError(
                "results must be of the images and categories given, got image"
                f" {result['image_id']!r} and category {result['category_id']!r}"
            )
        rle = result["segmentation"]
        (y1, x1, y2, x2), part = utils.rle_decode_part(rle)
        annotations.append(
            {
                "id": number,
                "image_id": result["image_id"],
                "category_id": result["category_id"],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(part.sum()),
                "iscrowd": 0,
                "score": result["score"],
                "segmentation": outlines.mask_polygons(rle) if polygons else rle,
            }
        )
    annotations = [annotation for annotation in annotations if annotation["area"]]
    categories = [{"id": id_, "name": name} for id_, name in names.items()]
    return {"images": list(images), "annotations": annotations, "categories": categories}
