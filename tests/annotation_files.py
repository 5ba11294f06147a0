"""Writes small data sets in the formats that the library reads."""

import json

from PIL import Image
from reference_inputs import synthetic_image

from coco import CATEGORIES

SQUARE = [[2, 3, 8, 3, 8, 9, 2, 9]]  # rows 3 to 8, columns 2 to 7


def write(folder, annotations=(), images=None, categories=None, size=(20, 30), **content):
    """A json file beside its images, which are made unless they are given."""
    folder.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in (1, 2)]
    for image in images:
        if "file_name" in image and not image["file_name"].startswith("missing"):
            path = folder / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(synthetic_image(*size)).save(path)
    if categories is None:
        categories = [{"id": 7, "name": "cup"}, {"id": 3, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories, **content}
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def annotation(id_=1, image_id=1, category_id=7, segmentation=SQUARE, **more):
    return {
        "id": id_,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        **more,
    }


def standard_layout(root, subset, year=2017, images="val", ids=(1, 2)):
    """A tiny data set with COCO's categories in COCO's layout."""
    records = [{"id": i, "file_name": f"{i:012}.png", "height": 20, "width": 30} for i in ids]
    items = [annotation(i, image_id=i, category_id=90) for i in ids]
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    path = write(root / f"{images}{year}", items, records, categories)
    (root / "annotations").mkdir(exist_ok=True)
    path.rename(root / "annotations" / f"instances_{subset}{year}.json")


def own_data(folder, count, categories=None):
    """Options for photographs in COCO's format, each of which shows two objects."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in range(count)]
    items = [annotation(2 * i + j, i, (3, 7)[j]) for i in range(count) for j in (0, 1)]
    path = write(folder, items, images, categories)
    return ["--images", str(folder), "--annotations", str(path)]


def write_via(folder, kinds, name="via.json", count=6):
    """Options for photographs annotated with VIA, with an object of each kind in each."""
    folder.mkdir(exist_ok=True)
    entries = {}
    for i in range(count):
        Image.fromarray(synthetic_image(20, 30)).save(folder / f"{i}.png")
        regions = [
            {
                "shape_attributes": {"name": "rect", "x": 2, "y": 3, "width": 6 + j, "height": 6},
                "region_attributes": {"kind": kind, "note": "?"},
            }
            for j, kind in enumerate(kinds)
        ]
        entries[f"{i}.png9"] = {"filename": f"{i}.png", "size": 9, "regions": regions}
    (folder / name).write_text(json.dumps(entries))
    return ["--images", str(folder), "--annotations", str(folder / name), "--format=via"]


def write_labelme(folder, count=6):
    folder.mkdir(exist_ok=True)
    shape = {"shape_type": "rectangle", "points": [[2, 3], [8, 9]], "group_id": None}
    for i in range(count):
        Image.fromarray(synthetic_image(20, 30)).save(folder / f"{i}.png")
        shapes = [{**shape, "label": "nut"}, {**shape, "label": "fig"}]
        content = {"shapes": shapes, "imagePath": f"{i}.png", "imageData": None}
        (folder / f"{i}.json").write_text(json.dumps(content))
    return ["--images", str(folder), "--annotations", str(folder), "--format=labelme"]
