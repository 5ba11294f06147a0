"""Detections as annotations, read again by the reader of COCO's format."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import coco_export
import utils
from coco_dataset import CocoDataset
from evaluation import build_coco_results

# pycocotools and numpy 2 disagree about __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 90, 120
NAMES = ["BG", "fig", "date"]


def blobs(count):
    """Masks with holes and several parts, and one of a single pixel."""
    rng = np.random.default_rng(0)
    for _ in range(count - 1):
        values = ndimage.gaussian_filter(rng.random((HEIGHT, WIDTH)), 4)
        yield values > np.quantile(values, 0.7)
    yield np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) == 777


def result(masks):
    """As MaskRCNN.detect(masks="rle") gives it."""
    return {
        "rois": np.array([utils.extract_bboxes(mask[:, :, None])[0] for mask in masks]),
        "class_ids": np.arange(len(masks), dtype=np.int32) % 2 + 1,
        "scores": np.linspace(0.9, 0.5, len(masks)),
        "masks": [utils.rle_encode(mask) for mask in masks],
    }


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photos" / "inside" / "a.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    return path


@pytest.mark.parametrize("polygons", [False, True], ids=["run lengths", "polygons"])
@pytest.mark.parametrize("category_ids", [None, [0, 7, 3]], ids=["class ids", "category ids"])
def test_what_is_written_is_read_again(tmp_path, photo, polygons, category_ids):
    masks = list(blobs(5))
    images = [coco_export.image_record("a7", photo, tmp_path / "photos")]
    assert images == [{"id": "a7", "file_name": "inside/a.png", "height": 90, "width": 120}]
    found = build_coco_results("a7", result(masks), category_ids)
    content = coco_export.to_coco(images, found, NAMES, category_ids, polygons)
    file = tmp_path / "found.json"
    file.write_text(json.dumps(content))

    data = CocoDataset()
    summary = data.load_annotations(tmp_path / "photos", file)
    data.prepare()
    assert (summary.images, summary.annotations, summary.remarks) == (1, 5, {})
    read, class_ids = data.load_mask(0)
    names = [data.class_names[i] for i in class_ids]
    assert names == ["fig", "date", "fig", "date", "fig"]
    for mask, again in zip(masks, np.moveaxis(read, 2, 0), strict=True):
        if polygons:
            assert (mask & again).sum() >= 0.95 * (mask | again).sum()
        else:
            np.testing.assert_array_equal(mask, again)
    for annotation, mask in zip(content["annotations"], masks, strict=True):
        assert annotation["area"] == mask.sum()
        assert isinstance(annotation["segmentation"], list) == polygons
    # The same data set, from the image ids and paths of the first.
    assert coco_export.dataset_records(data, tmp_path / "photos") == images


def test_detections_without_a_pixel_are_left_out(photo):
    empty = np.zeros((HEIGHT, WIDTH), dtype=bool)
    found = build_coco_results(1, result([empty, ~empty]))
    images = [coco_export.image_record(1, photo, photo.parent)]
    content = coco_export.to_coco(images, found, NAMES, polygons=True)
    assert [a["category_id"] for a in content["annotations"]] == [2]


def test_results_of_other_images_or_categories_are_refused(photo):
    found = build_coco_results(1, result([np.ones((HEIGHT, WIDTH), dtype=bool)]))
    images = [coco_export.image_record(2, photo, photo.parent)]
    with pytest.raises(ValueError, match="must be of the images and categories given, got image 1"):
        coco_export.to_coco(images, found, NAMES)
    with pytest.raises(ValueError, match="category 1"):
        coco_export.to_coco([{**images[0], "id": 1}], found, NAMES, [0, 7, 3])
