"""BoxedMasks against the arrays that they stand for."""

import numpy as np
import pytest

import augmentation
import dataset as data
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
