"""What inspect says of a data set, against counts by hand and against the training's own items."""

import numpy as np
import pytest
import torch
from annotation_files import annotation, write
from conftest import SHARED, TinyNetwork, needs_shared
from test_evaluation import Squares

import coco
import inspection
import utils
from dataset import TorchDataset
from model import MaskRCNN, build_rpn_targets

SCENES = ([(1, 5, 5, 20), (2, 30, 40, 12), (1, 0, 0, 3)], [], [(2, 1, 1, 8), (-1, 30, 10, 25)])
SMALL = TinyNetwork(NUM_CLASSES=3, IMAGE_RESIZE_MODE="pad64", IMAGE_MIN_DIM=None)


def test_counts():
    text = inspection.inspect(Squares(*SCENES), SMALL)
    assert "3 of 3 images, 0 of which cannot be used" in text
    assert "image width       80 / 80 / 80" in text
    assert "image height      60 / 61 / 62" in text
    assert "objects per image 0 / 1 / 3, 1 images without, 0 with more than" in text
    assert "4 objects, 1 crowds, of 2 classes:\n        2 brick\n        2 tile" in text
    # Sides 3, 8, 12 and 20: 5 % lie below 3.75, half below 10, 95 % below 18.8.
    assert "object side       4 / 10 / 19 network pixels" in text


def test_a_limit_spreads_evenly():
    text = inspection.inspect(Squares(*SCENES), SMALL, limit=1)
    assert "1 of 3 images" in text
    assert "3 objects, 0 crowds" in text
    assert inspection._spread(range(10), 4) == [0, 2, 5, 7]
    assert inspection._spread([5, 6], 4) == [5, 6]


def test_images_that_cannot_be_used_are_counted_and_named():
    dataset = Squares(*SCENES)
    usual = dataset.load_image
    dataset.load_image = lambda i: utils.load_image("/nowhere/a.png") if i == 1 else usual(i)
    text = inspection.inspect(dataset, SMALL)
    assert "3 of 3 images, 1 of which cannot be used\n  image file /nowhere/a.png does not" in text
    assert "0 images without" in text


def test_a_data_set_without_objects():
    text = inspection.inspect(Squares([], []), SMALL)
    assert "best anchor of each object: of 0, IoU of 0 (0.0%) below 0.3" in text
    assert "object side       nan" in text


def test_the_fit_of_the_anchors():
    # Centred on an anchor of 8 pixels and as large; and so small that none overlaps it by 0.1.
    config = TinyNetwork(NUM_CLASSES=3, IMAGE_RESIZE_MODE="none", RPN_ANCHOR_RATIOS=(1,))

    class Whole(Squares):
        def load_image(self, image_id):
            return np.zeros((64, 128, 3), np.uint8)

        def load_mask(self, image_id):
            masks, class_ids = super().load_mask(image_id)
            return np.pad(masks, ((0, 64 - len(masks)), (0, 48), (0, 0))), class_ids

    text = inspection.inspect(Whole([(1, 28, 28, 8), (1, 10, 10, 2)]), config)
    assert "of 2, IoU of 1 (50.0%) below 0.3, 1 (50.0%) below 0.5, 1 (50.0%) below 0.7" in text


@needs_shared
@pytest.mark.parametrize(
    "options",
    [
        {"IMAGE_MIN_DIM": 100, "IMAGE_MAX_DIM": 256},
        {"IMAGE_RESIZE_MODE": "pad64", "IMAGE_MIN_DIM": None, "IMAGE_MIN_SCALE": 0.5},
    ],
)
def test_boxes_are_those_that_training_sees(options):
    dataset = coco.CocoDataset()
    dataset.load_coco(SHARED / "data" / "coco_mini", "val")
    dataset.image_info = dataset.image_info[:8]
    dataset.prepare()
    config = TinyNetwork(NUM_CLASSES=81, **options)
    items = TorchDataset(dataset, config)
    for image_id in range(8):
        masks, _ = dataset.load_mask(image_id)
        boxes, shape = inspection._network_boxes(
            utils.extract_bboxes(masks).astype(np.float64), masks.shape[:2], config
        )
        image, item = items[image_id]
        assert shape == image.shape[1:]
        if len(boxes) == len(item["boxes"]):  # no object was lost by resizing
            np.testing.assert_allclose(boxes, item["boxes"], atol=2.5)
    assert sum(len(items[i][1]["boxes"]) for i in range(8)) > 20


def test_anchors_are_those_of_the_model():
    torch.manual_seed(0)
    model = MaskRCNN(SMALL)
    anchors = inspection._anchors(SMALL, (64, 128))
    assert torch.equal(anchors, model._all_anchors((64, 128))[0])
    # An object that no anchor matches by 0.7 still has one that is trained for it: its best.
    box = torch.tensor([[10.0, 10.0, 12.0, 12.0]])
    assert (build_rpn_targets(anchors, torch.tensor([1]), box, SMALL).match == 1).any()


def test_the_sheet_shows_the_annotations(tmp_path):
    sheets = []
    for scenes in (SCENES, ([], [], [])):
        path = tmp_path / "new folder" / "sheet.png"
        inspection.inspect(Squares(*scenes), SMALL, path, samples=2)
        sheets.append(utils.load_image(path).astype(int))
    marked, plain = sheets
    assert marked.shape == plain.shape
    halves = np.split(np.abs(marked - plain).max(axis=2), [marked.shape[1] // 2], axis=1)
    assert (halves[0] > 50).mean() > 0.02  # the first image has objects,
    assert (halves[1] > 50).mean() < 0.001  # the second has none


def test_the_sheet_is_drawn_at_its_own_scale(tmp_path, monkeypatch):
    import visualize

    drawn = []
    usual = visualize.draw_instances

    def draw(image, boxes, masks, *rest):
        drawn.append((image.shape, boxes, np.stack([utils.rle_decode(rle) for rle in masks], 2)))
        return usual(image, boxes, masks, *rest)

    monkeypatch.setattr(visualize, "draw_instances", draw)
    monkeypatch.setattr(inspection, "SHEET_SIDE", 40)  # half of the images' 80
    inspection.inspect(Squares(*SCENES), SMALL, tmp_path / "sheet.png", samples=1)
    ((shape, boxes, masks),) = drawn
    assert shape == (30, 40, 3)
    halves = np.array([[5, 5, 25, 25], [30, 40, 42, 52], [0, 0, 3, 3]]) / 2
    np.testing.assert_allclose(boxes, halves)
    assert masks.shape == (30, 40, 3)
    np.testing.assert_allclose(utils.extract_bboxes(masks), halves, atol=1)


# --- The check before training -------------------------------------------------------------------


def test_the_check_counts_what_will_be_trained():
    check = inspection.check_objects(Squares(*SCENES), SMALL)
    assert (check.warnings, check.error) == (
        [f"1 of 5 objects are {inspection.CROWD}"],
        "",
    )
    check = inspection.check_objects(Squares([(1, 5, 5, 20)], [(-2, 1, 1, 9)]), SMALL)
    assert check.error == ""
    lost = f"of the class 'tile' nothing is left to train on: 1 {inspection.CROWD}"
    assert check.warnings[1:] == [lost]
    assert inspection.check_objects(Squares([(1, 5, 5, 20)]), SMALL).warnings == [
        "without any object: 'tile'"
    ]
    check = inspection.check_objects(Squares([(1, 5, 5, 0)], [(-2, 1, 1, 9)]), SMALL)
    assert check.error.startswith("there must be objects to train on, found none in 2 images: ")
    assert f"1 {inspection.CROWD}; 1 {inspection.NO_PIXEL}" in check.error
    check = inspection.check_objects(Squares([], []), SMALL)
    assert check.error.endswith("found none in 2 images: none of them has an annotation")


def test_the_check_knows_what_the_network_cannot_see(tmp_path):
    image = {"id": 1, "file_name": "1.png", "height": 600, "width": 800}
    outlines = [
        [x, 9, x + side, 9, x + side, 9 + side, x, 9 + side]
        for x, side in ((9, 4), (50, 90), (200.1, 0.3), (900, 50))
    ]
    items = [annotation(i, segmentation=[outline]) for i, outline in enumerate(outlines)]
    path = write(tmp_path, items, [image], [{"id": 7, "name": "cup"}], size=(600, 800))
    dataset = coco.CocoDataset()
    dataset.load_annotations(tmp_path, path)
    dataset.prepare()
    extents = dataset.extents(0)
    assert extents.boxes.tolist() == [[9, 9, 13, 13], [9, 50, 99, 140], [0] * 4, [0] * 4]
    assert extents.size == (600, 800)
    lost = [f"2 of 4 objects are {inspection.NO_PIXEL}"]
    config = TinyNetwork(NUM_CLASSES=2, IMAGE_MIN_DIM=64)  # 128 pixels for 800
    assert inspection.check_objects(dataset, config).warnings == lost
    config = TinyNetwork(NUM_CLASSES=2, IMAGE_MIN_DIM=64, IMAGE_MAX_DIM=64)
    lost += [f"1 of 4 objects are {inspection.TOO_SMALL}"]
    assert inspection.check_objects(dataset, config).warnings == lost


def test_the_check_names_images_that_cannot_be_used(tmp_path):
    path = write(tmp_path, [annotation(), annotation(2, image_id=2)])
    (tmp_path / "2.png").write_bytes(b"no picture")
    dataset = coco.CocoDataset()
    dataset.load_annotations(tmp_path, path)
    dataset.prepare()
    check = inspection.check_objects(dataset, TinyNetwork(NUM_CLASSES=3))
    assert check.error.startswith(f"1 images cannot be used: image custom.2 ({tmp_path}/2.png)")
    assert check.error.endswith("--skip-unreadable")
    skipping = TinyNetwork(NUM_CLASSES=3, SKIP_UNREADABLE_IMAGES=True)
    check = inspection.check_objects(dataset, skipping)
    assert check.error == ""
    assert check.warnings[-1].startswith("1 images cannot be used")
