"""BoxedMasks against the arrays that they stand for."""

import tracemalloc
import types

import numpy as np
import pytest
from annotation_files import annotation, write
from PIL import Image

import augmentation
import coco
import dataset as data
import evaluation
import inspection
import utils
from boxed_masks import BoxedMasks
from config import Config


def blobs(seed, height=37, width=53, count=6):
    """Masks [H, W, N] of blobs, one of them empty and one that fills the image."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((height, width, count), dtype=bool)
    for i in range(count - 2):
        y, x = rng.integers(0, height - 5), rng.integers(0, width - 5)
        part = masks[y : y + rng.integers(1, 20), x : x + rng.integers(1, 30), i]
        part[...] = rng.random(part.shape) < 0.6
    masks[..., -1] = True
    return masks


def same(boxed, masks):
    assert isinstance(boxed, BoxedMasks)
    assert boxed.shape == masks.shape
    np.testing.assert_array_equal(np.asarray(boxed), masks)
    np.testing.assert_array_equal(boxed.tight().boxes, utils.extract_bboxes(masks))
    assert boxed.any() == masks.any()


OPERATIONS = {
    "rows": lambda m: m[3:20],
    "part": lambda m: m[3:20, 10:11],
    "mirror": lambda m: m[:, ::-1],
    "upside down": lambda m: m[::-1],
    "every third": lambda m: m[::3, 1::2],
    "repeated": lambda m: m[np.arange(74)[:, None] // 2, np.arange(53)],
    "nothing": lambda m: m[5:5],
    "transposed": lambda m: m.swapaxes(0, 1),
    "turned": lambda m: augmentation._turn(m, 3),
    "padded": lambda m: augmentation._pad(m, [(2, 3), (0, 4)]),
    "all": lambda m: augmentation._pad(m[::-1, 4:40].swapaxes(0, 1)[::2], [(1, 0), (5, 5)]),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_they_do_what_arrays_do(name, seed):
    masks, operation = blobs(seed), OPERATIONS[name]
    same(operation(BoxedMasks.from_array(masks)), operation(masks))


@pytest.mark.parametrize("quarters", range(4))
def test_quarter_turns_are_numpys(quarters):
    masks = blobs(0)
    np.testing.assert_array_equal(augmentation._turn(masks, quarters), np.rot90(masks, quarters))


@pytest.mark.parametrize(
    ("scale", "padding", "crop"),
    [
        (0.4, [(1, 2), (3, 4), (0, 0)], None),
        (1.0, [(0, 0), (0, 0), (0, 0)], None),
        (2.3, [(5, 0), (0, 0), (0, 0)], None),
        (2.0, [(0, 0), (0, 0), (0, 0)], (10, 20, 30, 40)),
    ],
)
def test_they_are_resized_as_arrays(scale, padding, crop):
    masks = blobs(1)
    expected = utils.resize_mask(masks, scale, padding, crop)
    same(BoxedMasks.from_array(masks).resize(scale, padding, crop), expected)


def test_mini_masks_are_those_of_the_array():
    masks = blobs(2)[:, :, [0, 1, 5]]
    boxes = utils.extract_bboxes(masks)
    np.testing.assert_array_equal(
        BoxedMasks.from_array(masks).minimize((9, 7)), utils.minimize_mask(boxes, masks, (9, 7))
    )


def test_other_orders_of_rows_are_refused():
    with pytest.raises(IndexError, match="rise or fall throughout"):
        BoxedMasks.from_array(blobs(0))[[0, 2, 1]]
    with pytest.raises(ValueError, match="axes must be 0 and 1, got 0 and 2"):
        BoxedMasks.from_array(blobs(0)).swapaxes(0, 2)


class Blobs(utils.Dataset):
    def __init__(self):
        super().__init__()
        self.add_class("blobs", 1, "blob")
        for i in range(4):
            self.add_image("blobs", i, None)
        self.prepare()

    def load_image(self, image_id):
        return np.random.default_rng(image_id).integers(0, 256, (37, 53, 3), dtype=np.uint8)

    def load_mask(self, image_id):
        return blobs(image_id), np.ones(6, np.int32)


class BoxedBlobs(Blobs):
    def load_boxed_masks(self, image_id):
        return BoxedMasks.from_array(blobs(image_id)), np.ones(6, np.int32)


class OwnBlobs(BoxedBlobs):
    """A load_mask of one's own counts, although the class that it derives from can do more."""

    def load_mask(self, image_id):
        return blobs(image_id)[:, :, :2], np.ones(2, np.int32)


def dense_flip(image, masks, rng):
    assert type(masks) is np.ndarray
    return image[:, ::-1], masks[:, ::-1]


@pytest.mark.parametrize("mini", [True, False])
@pytest.mark.parametrize(
    "augment",
    [
        None,
        dense_flip,
        data.Compose(
            *(data.horizontal_flip, data.vertical_flip, data.rot90, data.RandomCrop()),
            *(dense_flip, data.ScaleJitter(0.4, 2.5), data.ColorJitter()),
        ),
        data.Compose(data.rot90, data.ScaleJitter(0.4, 2.5), data.RandomCrop()),
    ],
)
def test_training_sees_the_same_of_either_form(augment, mini):
    config = Config(NUM_CLASSES=2, IMAGE_MIN_DIM=64, IMAGE_MAX_DIM=64, USE_MINI_MASK=mini)
    config.MAX_GT_INSTANCES = 3
    items, boxed_items = (data.TorchDataset(d(), config, augment) for d in (Blobs, BoxedBlobs))
    for epoch in range(3):
        items.set_epoch(epoch)
        boxed_items.set_epoch(epoch)
        for (image, target), (other, boxed) in zip(items, boxed_items, strict=True):
            assert (image == other).all()
            for name in ("class_ids", "boxes", "masks"):
                assert target[name].tolist() == boxed[name].tolist(), name


def test_a_mask_loader_of_ones_own_counts():
    config = Config(NUM_CLASSES=2, IMAGE_MIN_DIM=64, IMAGE_MAX_DIM=64)
    assert len(data.TorchDataset(OwnBlobs(), config)[0][1]["boxes"]) == 2
    assert len(data.TorchDataset(BoxedBlobs(), config)[0][1]["boxes"]) == 5  # one is empty


# --- Memory --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """150 objects on 3024 x 4032 pixels: masks [H, W, N] of 1.8 GB."""
    folder, rng = tmp_path_factory.mktemp("crowded"), np.random.default_rng(0)
    corners = rng.integers((0, 0), (4032 - 80, 3024 - 80), (150, 2)).tolist()
    outlines = [[x, y, x + 60, y, x + 60, y + 60, x, y + 60] for x, y in corners]
    items = [annotation(i, segmentation=[outline]) for i, outline in enumerate(outlines)]
    image = {"id": 1, "file_name": "1.png", "height": 3024, "width": 4032}
    path = write(folder, items, [image], [{"id": 7, "name": "cup"}])
    Image.new("RGB", (4032, 3024)).save(folder / "1.png")
    dataset = coco.CocoDataset()
    dataset.load_annotations(folder, path)
    dataset.prepare()
    return dataset


def one_item(dataset, config, folder):
    image, target = data.TorchDataset(dataset, config, data.horizontal_flip)[0]
    assert image.shape == (3, 1024, 1024)
    assert target["masks"].shape == (config.MAX_GT_INSTANCES, *config.MINI_MASK_SHAPE)


def evaluate(dataset, config, folder):
    truth = evaluation.ground_truth(dataset, 0)
    boxes = np.array([i["bbox"] for i in truth[:20]]).astype(int)
    corners = np.concatenate([boxes[:, 1::-1], boxes[:, 1::-1] + boxes[:, :1:-1]], axis=1)
    ones = np.ones(20, int)
    masks = [i["segmentation"] for i in truth[:20]]
    found = {"rois": corners, "class_ids": ones, "scores": ones.astype(float), "masks": masks}
    model = types.SimpleNamespace(config=config, detect=lambda images, masks: [found])
    result = evaluation.evaluate_coco(model, dataset, verbose=0)
    assert result.objects == 150
    assert result.segm["AR100"] == pytest.approx(20 / 150)


def look(dataset, config, folder):
    assert "150 objects, 0 crowds" in inspection.inspect(dataset, config)
    truth = evaluation.ground_truth(dataset, 0)
    boxes, masks = inspection._corners(truth), [i["segmentation"] for i in truth]
    image, _, masks = inspection._shrunk(dataset.load_image(0), boxes, masks)
    assert image.shape == (768, 1024, 3)
    assert len(masks) == 150


@pytest.mark.parametrize("task", [one_item, evaluate, look])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_memory_does_not_grow_with_objects_times_pixels(crowded, task, tmp_path, monkeypatch):
    pairs, usual = [], utils.compute_overlaps

    def counted(boxes1, boxes2):
        pairs.append(len(boxes1) * len(boxes2))
        return usual(boxes1, boxes2)

    monkeypatch.setattr(utils, "compute_overlaps", counted)  # torch's memory is not traced
    image = 3024 * 4032 * 3
    config = Config(NUM_CLASSES=2, IMAGES_PER_GPU=1)
    tracemalloc.start()
    try:
        task(crowded, config, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert image < peak < 150e6
    assert max(pairs, default=0) <= 2**20
