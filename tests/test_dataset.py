import json
import logging
import os
import pickle
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared
from PIL import Image

import dataset as data
import utils
from config import Config

# Python 3.12 and later warn of any fork of a process with threads, which torch always has.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Rectangles(utils.Dataset):
    """Images of noise, given as (height, width, [(class id, y1, x1, y2, x2), ...])."""

    def __init__(self, *scenes):
        super().__init__()
        self.add_class("toy", 1, "brick")
        self.add_class("toy", 2, "tile")
        for i, (height, width, objects) in enumerate(scenes):
            self.add_image("toy", f"s{i}", None, size=(height, width), objects=objects)
        self.prepare()

    def load_image(self, image_id):
        if self.image_info[image_id]["path"] is not None:
            return super().load_image(image_id)
        size = self.image_info[image_id]["size"]
        return np.random.default_rng(image_id).integers(0, 256, (*size, 3), dtype=np.uint8)

    def load_mask(self, image_id):
        info = self.image_info[image_id]
        masks = np.zeros((*info["size"], len(info["objects"])), dtype=bool)
        for i, (_, y1, x1, y2, x2) in enumerate(info["objects"]):
            masks[y1:y2, x1:x2, i] = True
        return masks, np.array([o[0] for o in info["objects"]], np.int32)


def make_config(**options):
    defaults = {"NUM_CLASSES": 3, "IMAGE_RESIZE_MODE": "none", "USE_MINI_MASK": False}
    return Config(**{**defaults, "NUM_WORKERS": 0, **options})


def pick(values):
    """A stand-in for a numpy Generator whose random() and integers() give these."""

    class Rng:
        def random(self):
            return values.pop(0)

        def integers(self, below):
            value = values.pop(0)
            assert 0 <= value < below
            return value

        def uniform(self, low, high):
            value = values.pop(0)
            assert low <= value <= high
            return value

    return Rng()


def square(height, width, y1, x1, y2, x2):
    masks = np.zeros((height, width, 1), dtype=bool)
    masks[y1:y2, x1:x2] = True
    return np.where(masks, 200, 10).astype(np.uint8).repeat(3, axis=2), masks


def box_of(masks):
    """Written apart from utils.extract_bboxes."""
    y, x = np.nonzero(masks[:, :, 0])
    return (y.min(), x.min(), y.max() + 1, x.max() + 1)


# --- Augmentation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("augmentation", "values", "box", "size"),
    [
        (data.horizontal_flip, [0.49], (2, 13, 5, 17), (10, 20)),
        (data.horizontal_flip, [0.51], (2, 3, 5, 7), (10, 20)),
        (data.vertical_flip, [0.49], (5, 3, 8, 7), (10, 20)),
        (data.vertical_flip, [0.51], (2, 3, 5, 7), (10, 20)),
        (data.rot90, [0], (2, 3, 5, 7), (10, 20)),
        (data.rot90, [1], (13, 2, 17, 5), (20, 10)),  # counter-clockwise
        (data.rot90, [2], (5, 13, 8, 17), (10, 20)),
        (data.rot90, [3], (3, 5, 7, 8), (20, 10)),
        (data.RandomCrop(0.5), [0.5, 1, 2], (1, 1, 4, 5), (5, 10)),
        # The first part shows nothing of the object, the second cuts it.
        (data.RandomCrop(0.5), [0.5, 5, 10, 0.5, 3, 4], (0, 0, 2, 3), (5, 10)),
        (data.ScaleJitter(), [0.0, 0, 0], (2, 3, 5, 7), (10, 20)),
        (data.ScaleJitter(0.5, 2), [np.log(2), 1, 2], (2, 2, 8, 10), (10, 20)),
    ],
)
def test_geometry(augmentation, values, box, size):
    image, masks = square(10, 20, 2, 3, 5, 7)
    before = image.copy(), masks.copy()
    new_image, new_masks = data.augment(augmentation, image, masks, pick(values))
    assert new_image.shape == (*size, 3)
    y1, x1, y2, x2 = box
    assert box_of(new_masks) == box
    assert new_masks.sum() == (y2 - y1) * (x2 - x1)
    assert (new_image[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] == 200).all()  # edges may be interpolated
    outside = np.ones(size, dtype=bool)
    outside[max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1] = False
    assert (new_image[outside] == 10).all()
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(masks, before[1])


def test_scale_jitter_puts_a_smaller_image_on_black():
    image, masks = square(20, 40, 5, 9, 12, 24)
    new_image, new_masks = data.ScaleJitter()(image, masks, pick([np.log(0.5), 3, 6]))
    assert new_image.shape == (20, 40, 3)
    assert box_of(new_masks) == (3 + 2, 6 + 4, 3 + 6, 6 + 12)
    assert new_masks.sum() == 4 * 8
    assert (new_image[7:8, 12:17] == 200).all()
    shown = np.zeros((20, 40), dtype=bool)
    shown[3:13, 6:26] = True
    assert (new_image[shown] > 0).all()
    assert not new_image[~shown].any()


def test_random_crop_may_find_no_object_but_rarely_does():
    image, masks = square(100, 100, 0, 0, 10, 10)
    crop, rng = data.RandomCrop(0.5), np.random.default_rng(0)
    hits, sides = [], []
    for _ in range(200):
        new_image, new_masks = crop(image, masks, rng)
        hits.append(new_masks.any())
        sides.append(len(new_image))
        assert (new_image[:, :, :1] == np.where(new_masks, 200, 10)).all()
    assert 0.85 < np.mean(hits) < 1
    assert min(sides) in (50, 51)
    assert max(sides) > 95
    assert crop(image, masks[:, :, :0], rng)[1].shape[2] == 0


def test_color_jitter():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    masks = np.zeros((20, 30, 2), dtype=bool)

    def jitter(**options):
        off = {"brightness": 0, "contrast": 0, "saturation": 0}
        out, same = data.ColorJitter(**{**off, **options})(image, masks, np.random.default_rng(3))
        assert same is masks
        assert out.dtype == np.uint8
        return out.astype(float)

    np.testing.assert_array_equal(jitter(), image)
    draws = np.random.default_rng(3).uniform(0.7, 1.3, 3)
    bright = jitter(brightness=0.3)
    np.testing.assert_allclose(bright, np.clip(image * draws[0], 0, 255), atol=0.51)
    spread = jitter(contrast=0.3)
    expected = np.clip(image.mean() + (image - image.mean()) * draws[1], 0, 255)
    np.testing.assert_allclose(spread, expected, atol=0.51)
    gray = jitter(saturation=1.0)
    low, high = gray.min(axis=2), gray.max(axis=2)
    drawn = np.random.default_rng(3).uniform(0, 2, 3)[2]
    expected = (image.max(axis=2) - image.min(axis=2).astype(float)) * drawn
    unclipped = (low > 0) & (high < 255)
    assert unclipped.sum() > 100
    np.testing.assert_allclose((high - low)[unclipped], expected[unclipped], atol=1.01)
    one = data.ColorJitter()(image[:, :, :1], masks, rng)[0]  # no colour to saturate
    assert one.shape == (20, 30, 1)


def test_compose_applies_in_order():
    image, masks = square(10, 20, 2, 3, 5, 7)
    both = data.Compose(data.rot90, data.vertical_flip)
    _, new_masks = both(image, masks, pick([1, 0.1]))
    assert box_of(new_masks) == (3, 2, 7, 5)

    def contiguous(image, masks, rng):  # as torch and OpenCV need them
        assert image.flags.c_contiguous
        assert masks.flags.c_contiguous
        return image, masks

    data.Compose(data.horizontal_flip, contiguous)(image, masks, pick([0.1]))


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda i, m: i, r"got uint8 \[64, 64, 3\]$"),
        (lambda i, m: (i, m[:, :, :1]), r"got .*bool \[64, 64, 1\]"),
        (lambda i, m: (i.astype(np.float32), m), r"got float32 \[64, 64, 3\], bool"),
        (lambda i, m: (i, m.astype(np.uint8)), r"got .*uint8 \[64, 64, 2\]"),
        (lambda i, m: (i[:32], m), r"got uint8 \[32, 64, 3\], bool \[64, 64, 2\]"),
        (lambda i, m: (i[:0], m[:0]), r"got uint8 \[0, 64, 3\]"),
        (lambda i, m: (i[:, :, 0], m), r"got uint8 \[64, 64\], bool"),
        (lambda i, m: None, "got <class 'NoneType'>"),
        (lambda i, m: (torch.tensor(i), m), "got <class 'torch.Tensor'>, bool"),
    ],
)
def test_a_wrong_augmentation_is_named(result, got):
    def spoil(image, masks, rng):
        return result(image, masks)

    image, masks = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 2), bool)
    with pytest.raises(ValueError, match=r"augmentation .*spoil must return.*" + got):
        data.augment(data.Compose(data.rot90, spoil), image, masks, np.random.default_rng(0))
    # Inside a data set the image is named too, and the option to skip does not hide it.
    scene = Rectangles((64, 64, [(1, 0, 0, 5, 5), (2, 9, 9, 30, 30)]))
    items = data.TorchDataset(scene, make_config(SKIP_UNREADABLE_IMAGES=True), spoil)
    with pytest.raises(ValueError, match=r"image toy\.s0: .*spoil must return"):
        items[0]


# --- Items ---------------------------------------------------------------------------------------


def test_item_without_resizing():
    scenes = Rectangles((64, 128, [(2, 3, 5, 10, 25), (-1, 0, 0, 64, 128)]))
    image, target = data.TorchDataset(scenes, make_config())[0]
    np.testing.assert_array_equal(image, scenes.load_image(0).transpose(2, 0, 1))
    assert image.is_contiguous()
    assert target["class_ids"].tolist() == [2, -1]
    assert target["boxes"].tolist() == [[3, 5, 10, 25], [0, 0, 64, 128]]
    assert target["masks"].sum(dim=(1, 2)).tolist() == [7 * 20, 64 * 128]
    assert target["masks"][0, 3:10, 5:25].all()
    assert target["active_class_ids"].tolist() == [True, True, True]
    assert target["image_id"] == 0
    kinds = [x.dtype for x in (image, *(target[k] for k in ("class_ids", "boxes", "masks")))]
    assert kinds == [torch.uint8, torch.int64, torch.float32, torch.bool]


def test_item_is_resized_and_padded():
    scenes = Rectangles((40, 60, [(1, 10, 20, 20, 40)]))
    config = make_config(IMAGE_RESIZE_MODE="square", IMAGE_MIN_DIM=None, IMAGE_MAX_DIM=64)
    image, target = data.TorchDataset(scenes, config)[0]
    assert image.shape == (3, 64, 64)
    assert target["boxes"].tolist() == [[22, 22, 32, 42]]
    np.testing.assert_array_equal(image[:, 12:52, 2:62], scenes.load_image(0).transpose(2, 0, 1))
    assert not image[:, :12].any()
    config = make_config(IMAGE_RESIZE_MODE="square", IMAGE_MIN_DIM=None, IMAGE_MAX_DIM=128)
    config.IMAGE_MIN_SCALE = 2
    image, target = data.TorchDataset(scenes, config)[0]
    # Masks are resized corner to corner, so their edges may differ by a pixel.
    np.testing.assert_allclose(target["boxes"], [[24 + 20, 4 + 40, 24 + 40, 4 + 80]], atol=1)


def test_mini_masks():
    masks = np.zeros((64, 64, 1), dtype=bool)
    masks[8:24, 16:32, 0] = np.tri(16, dtype=bool)

    class Triangle(Rectangles):
        def load_mask(self, image_id):
            return masks, np.array([1])

    config = make_config(USE_MINI_MASK=True, MINI_MASK_SHAPE=(8, 8))
    _image, target = data.TorchDataset(Triangle((64, 64, [])), config)[0]
    assert target["boxes"].tolist() == [[8, 16, 24, 32]]
    # Each pixel of the mini mask is the mean of 2 x 2, above one half: 3 of 4 on the diagonal.
    np.testing.assert_array_equal(target["masks"][0], np.tri(8, dtype=bool))


def test_instances_without_pixels_are_dropped_and_reported_once(caplog):
    scenes = Rectangles((64, 64, [(1, 5, 5, 5, 9), (2, 1, 2, 3, 4), (-1, 7, 7, 7, 7)]))
    items = data.TorchDataset(scenes, make_config(USE_MINI_MASK=True))
    with caplog.at_level(logging.INFO, "dataset"):
        for _ in range(2):
            _, target = items[0]
    assert target["class_ids"].tolist() == [2]
    assert target["boxes"].tolist() == [[1, 2, 3, 4]]
    assert target["masks"].shape == (1, 56, 56)
    assert caplog.messages == ["image toy.s0: 2 of 3 objects have no pixels left, dropped"]

    def crop_away(image, masks, rng):
        return np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, masks.shape[2]), bool)

    _image, target = data.TorchDataset(scenes, make_config(USE_MINI_MASK=True), crop_away)[0]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 56, 56)


def test_at_most_max_gt_instances_and_all_crowds():
    objects = [(1 + i % 2, i, i, i + 1, i + 1) for i in range(30)]
    scenes = Rectangles((64, 64, [(-2, 0, 0, 64, 64), *objects, (-1, 0, 0, 9, 9)]))
    items = data.TorchDataset(scenes, make_config(MAX_GT_INSTANCES=5))
    chosen = set()
    for epoch in range(20):
        items.set_epoch(epoch)
        _image, target = items[0]
        class_ids, boxes = target["class_ids"].tolist(), target["boxes"][:, 0].int().tolist()
        assert class_ids[0] == -2
        assert class_ids[-1] == -1
        assert len(class_ids) == 7
        assert len(set(boxes[1:-1])) == 5
        for class_id, y, mask in zip(
            class_ids[1:-1], boxes[1:-1], target["masks"][1:-1], strict=True
        ):
            assert class_id == 1 + y % 2
            assert mask.nonzero().tolist() == [[y, y]]
        chosen.update(boxes[1:-1])
    assert len(chosen) > 20  # a random choice, not the first five


def test_active_classes_are_those_of_the_source():
    scenes = Rectangles((64, 64, []))
    scenes.add_class("other", 1, "leaf")
    scenes.add_image("other", "o0", None, size=(64, 64), objects=[(3, 0, 0, 9, 9)])
    scenes.prepare()
    items = data.TorchDataset(scenes, make_config(NUM_CLASSES=4))
    assert items[0][1]["active_class_ids"].tolist() == [True, True, True, False]
    assert items[1][1]["active_class_ids"].tolist() == [True, False, False, True]


def test_crop_mode_cuts_image_and_masks_alike():
    class Painted(Rectangles):
        def load_image(self, image_id):
            masks, _ = self.load_mask(image_id)
            return np.where(masks[:, :, :1], 255, 0).astype(np.uint8).repeat(3, axis=2)

    scenes = Painted((100, 150, [(1, 30, 40, 60, 90)]))
    config = make_config(IMAGE_RESIZE_MODE="crop", IMAGE_MIN_DIM=64)
    items = data.TorchDataset(scenes, config)
    corners = set()
    for epoch in range(8):
        items.set_epoch(epoch)
        image, target = items[0]
        assert image.shape == (3, 64, 64)
        assert torch.equal(image[0] == 255, target["masks"].any(dim=0))
        assert equal([data.collate([(image, target)])], [data.collate([items[0]])])
        corners.update(map(tuple, target["boxes"].tolist()))
    assert len(corners) > 3


def test_images_without_objects():
    scenes = Rectangles(*[(64, 64, []), (64, 64, [(-1, 0, 0, 9, 9)]), (64, 64, [(1, 2, 2, 9, 9)])])
    _, empty = data.TorchDataset(scenes, make_config(USE_MINI_MASK=True))[0]
    assert empty["image_id"] == 0
    assert empty["boxes"].shape == (0, 4)
    assert empty["boxes"].dtype == torch.float32
    assert empty["class_ids"].shape == (0,)
    assert empty["masks"].shape == (0, 56, 56)

    items = data.TorchDataset(scenes, make_config(SKIP_EMPTY_IMAGES=True))
    assert [items[i][1]["image_id"] for i in range(3)] == [2, 2, 2]
    nothing = data.TorchDataset(Rectangles((64, 64, [])), make_config(SKIP_EMPTY_IMAGES=True))
    with pytest.raises(ValueError, match=r"100 were skipped in a row, the last toy\.s0"):
        nothing[0]


def with_files(folder, *contents):
    """A data set of image files: None is a good one, bytes are written as they are."""
    scenes = Rectangles()
    for i, content in enumerate(contents):
        path = folder / f"{i}.png"
        if content is None:
            Image.fromarray(np.full((64, 64, 3), 10 * i, np.uint8)).save(path)
        elif content:
            path.write_bytes(content)
        scenes.add_image("toy", i, path, size=(64, 64), objects=[(1, 1, 1, 5, 5)])
    scenes.prepare()
    return scenes


def test_an_unreadable_file_is_named_or_skipped(tmp_path, caplog):
    scenes = with_files(tmp_path, None, b"no picture", None, b"")
    items = data.TorchDataset(scenes, make_config())
    assert items[2][0].unique().tolist() == [20]
    with pytest.raises(ValueError, match=r"image toy\.1 \(.*1\.png\) cannot be used.*SKIP_UNREAD"):
        items[1]
    with pytest.raises(ValueError, match=r"image toy\.3 \(.*3\.png\).*FileNotFoundError"):
        items[3]

    caplog.clear()
    items = data.TorchDataset(scenes, make_config(SKIP_UNREADABLE_IMAGES=True))
    found = [items[i] for i in (0, 1, 2, 3, 1, 3)]
    ids = [target["image_id"] for _, target in found]
    assert ids[0] == 0
    assert ids[2] == 2
    assert set(ids) == {0, 2}
    assert ids[1:4:2] == ids[4:]  # the same stand-ins again
    assert [image.unique().tolist() for image, _ in found] == [[10 * i] for i in ids]
    assert len(caplog.messages) == 2
    assert all("another takes its place" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("masks", "class_ids", "message"),
    [
        (np.zeros((64, 32, 1), bool), [1], "as large as the upright image, 64 x 64, got 64 x 32"),
        (np.zeros((64, 64, 2), bool), [1], r"class ids \[N\], got \[64, 64, 2\] and \[1\]"),
        (np.zeros((64, 64, 2), bool), [1, 3], r"class ids must be in 1\.\.2.*got \[3\]"),
        (np.zeros((64, 64, 2), bool), [0, -3], r"got \[0, -3\]"),
        (KeyError("segmentation"), [], r"KeyError\('segmentation'\)"),
    ],
)
def test_a_wrong_annotation_is_named(masks, class_ids, message):
    class Wrong(Rectangles):
        def load_mask(self, image_id):
            if isinstance(masks, Exception):
                raise masks
            return masks, np.array(class_ids)

    items = data.TorchDataset(Wrong((64, 64, [])), make_config())
    with pytest.raises(ValueError, match=r"image toy\.s0 cannot be used: .*" + message):
        items[0]


def test_what_the_constructor_refuses():
    scenes = Rectangles((64, 65, []))
    with pytest.raises(ValueError, match="NUM_CLASSES must be 3 as in the data set.*got 81"):
        data.TorchDataset(scenes, make_config(NUM_CLASSES=81))
    with pytest.raises(ValueError, match="must have images"):
        data.TorchDataset(Rectangles(), make_config())
    with pytest.raises(ValueError, match=r"image toy\.s0: .*64 x 65; use .* 'pad64'"):
        data.TorchDataset(scenes, make_config())[0]
    with pytest.raises(AttributeError, match="call prepare"):
        data.TorchDataset(utils.Dataset(), make_config())


def test_an_index_counts_like_one_of_a_list():
    items = data.TorchDataset(Rectangles(*[(64, 64, [])] * 3), make_config())
    assert len(items) == 3
    assert [target["image_id"] for _, target in items] == [0, 1, 2]
    assert items[-1][1]["image_id"] == items[np.int64(2)][1]["image_id"] == 2
    with pytest.raises(IndexError):
        items[3]


def test_packed_list():
    values = [{"a": 1}, "text", np.arange(3), None]
    packed = data._PackedList(values)
    assert len(packed) == 4
    assert packed[0] == {"a": 1}
    assert packed[-3] == "text"
    assert packed[np.int64(3)] is None
    assert packed[2].tolist() == [0, 1, 2]
    with pytest.raises(IndexError):
        packed[4]
    assert list(data._PackedList([])) == []


# --- Reproducibility and loading -----------------------------------------------------------------

SCENES = [(64, 64, [(1, i, 2 * i, i + 9, 2 * i + 20)] if i != 3 else []) for i in range(7)]
AUGMENTATION = data.Compose(data.horizontal_flip, data.rot90, data.ColorJitter())


def equal(batches1, batches2):
    for (images1, targets1), (images2, targets2) in zip(batches1, batches2, strict=True):
        if not torch.equal(images1, images2):
            return False
        for one, two in zip(targets1, targets2, strict=True):
            assert one.keys() == two.keys()
            for a, b in zip(one.values(), two.values(), strict=True):
                if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
                    return False
    return True


def image_ids(batch):
    return [target["image_id"] for target in batch[1]]


def test_epoch_seed_and_image_decide_alone():
    def make(**options):
        return data.TorchDataset(Rectangles(*SCENES), make_config(**options), AUGMENTATION)

    items = make()
    forwards = [items[i][0] for i in range(7)]
    backwards = [items[i][0] for i in range(6, -1, -1)][::-1]
    assert all(map(torch.equal, forwards, backwards))
    items.set_epoch(1)
    second = [items[i][0] for i in range(7)]
    assert not any(map(torch.equal, forwards, second))
    items.set_epoch(0)
    assert torch.equal(items[4][0], forwards[4])
    assert not torch.equal(make(SEED=1)[4][0], forwards[4])
    assert torch.equal(make(SEED=0)[4][0], forwards[4])

    def draw(image, masks, rng):
        return np.full_like(image, rng.integers(256)), masks

    drawn = data.TorchDataset(Rectangles(*SCENES), make_config(), draw)
    assert len({int(drawn[i][0][0, 0, 0]) for i in range(7)}) > 3  # not one draw for all


def test_workers_change_nothing():
    def run(workers):
        config = make_config(NUM_WORKERS=workers, IMAGES_PER_GPU=2, SKIP_EMPTY_IMAGES=True)
        items = data.TorchDataset(Rectangles(*SCENES), config, AUGMENTATION)
        loader = data.make_loader(items, config, shuffle=True)
        state = torch.random.get_rng_state()
        epochs = []
        for epoch in range(3):
            data.set_epoch(loader, epoch)
            epochs.append(list(loader))
        data.set_epoch(loader, 1)
        next(iter(loader))  # an epoch that is left early
        data.set_epoch(loader, 2)
        assert equal(list(loader), epochs[2])
        assert torch.equal(torch.random.get_rng_state(), state)
        return epochs

    alone, two = run(0), run(2)
    for epoch in range(3):
        assert equal(alone[epoch], two[epoch])
    images = [
        {i: x for batch in epoch for i, x in zip(image_ids(batch), batch[0], strict=True)}
        for epoch in alone
    ]
    assert not any(torch.equal(images[0][i], images[1][i]) for i in set(images[0]) & set(images[1]))
    assert [len(image_ids(batch)) for batch in alone[0]] == [2, 2, 2, 1]
    orders = [[i for batch in epoch for i in image_ids(batch)] for epoch in alone]
    assert orders[0] != orders[1] != orders[2]
    assert all(3 not in order for order in orders)


def test_a_worker_s_error_names_the_image(tmp_path):
    config = make_config(NUM_WORKERS=1, IMAGES_PER_GPU=1)
    items = data.TorchDataset(with_files(tmp_path, None, b"no picture"), config)
    loader = data.make_loader(items, config, shuffle=False)
    batches = iter(loader)
    assert image_ids(next(batches)) == [0]
    with pytest.raises(ValueError, match=r"image toy\.1 \(.*1\.png\) cannot be used"):
        next(batches)


@pytest.mark.skipif(sys.platform == "win32", reason="kill does not send Ctrl-C there")
def test_workers_survive_an_interrupt():
    config = make_config(NUM_WORKERS=1, IMAGES_PER_GPU=1)
    items = data.TorchDataset(Rectangles(*SCENES), config)
    batches = iter(data.make_loader(items, config, shuffle=False))
    found = [image_ids(next(batches))[0]]
    os.kill(batches._workers[0].pid, signal.SIGINT)
    assert found + [image_ids(batch)[0] for batch in batches] == list(range(7))


def test_validation_is_the_same_in_each_run():
    config = make_config(IMAGES_PER_GPU=3)
    items = data.TorchDataset(Rectangles(*SCENES), config)
    loader = data.make_loader(items, config, shuffle=False)
    runs = []
    for epoch in range(2):
        data.set_epoch(loader, epoch)
        runs.append(list(loader))
    assert equal(*runs)
    assert [image_ids(batch) for batch in runs[0]] == [[0, 1, 2], [3, 4, 5], [6]]
    assert runs[0][1][1][0]["boxes"].shape == (0, 4)
    assert runs[0][0][1][1]["boxes"].tolist() == [[1, 2, 10, 22]]


def test_processes_share_the_images(monkeypatch):
    config = make_config(IMAGES_PER_GPU=1)
    items = data.TorchDataset(Rectangles(*SCENES[:6]), config)
    monkeypatch.setattr("distributed.world_size", lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr("distributed.rank", lambda rank=rank: rank)
        loader = data.make_loader(items, config, shuffle=True)
        data.set_epoch(loader, 5)
        assert loader.sampler.epoch == 5
        seen.append([image_ids(batch)[0] for batch in loader])
    assert len(seen[0]) == len(seen[1]) == 3
    assert sorted(seen[0] + seen[1]) == list(range(6))


def test_number_of_workers(monkeypatch):
    items = data.TorchDataset(Rectangles(*SCENES), make_config())
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    config = make_config(NUM_WORKERS=None)
    assert data.make_loader(items, config, shuffle=False).num_workers == 3
    assert data.make_loader(items, make_config(), shuffle=False).num_workers == 0
    monkeypatch.setattr(sys, "platform", "win32")
    assert data.make_loader(items, config, shuffle=False).num_workers == 0


def test_a_data_set_survives_pickling():
    """As the spawned workers of Windows and macOS get it."""
    items = data.TorchDataset(Rectangles(*SCENES), make_config(), AUGMENTATION)
    items.set_epoch(4)
    again = pickle.loads(pickle.dumps(items))
    assert equal([data.collate([items[2]])], [data.collate([again[2]])])


def test_the_user_s_data_set_is_left_alone():
    scenes = Rectangles(*SCENES)
    infos = scenes.image_info
    data.TorchDataset(scenes, make_config())
    assert scenes.image_info is infos
    assert isinstance(infos, list)


@pytest.mark.parametrize("mini", [True, False])
def test_collate_pads_images_of_several_sizes(mini):
    scenes = Rectangles(
        *[(50, 100, [(1, 5, 10, 20, 30)]), (120, 60, [(2, 0, 0, 9, 9), (1, 50, 50, 60, 60)])],
        *[(64, 64, [])],
    )
    config = make_config(IMAGE_RESIZE_MODE="pad64", IMAGE_MIN_DIM=None, USE_MINI_MASK=mini)
    config.MINI_MASK_SHAPE = (64, 64)  # as large as the last image, and still no full mask
    items = data.TorchDataset(scenes, config)
    singles = [items[i] for i in range(3)]
    images, targets = data.collate(singles)
    assert images.shape == (3, 3, 128, 128)
    assert targets[0]["boxes"].tolist() == [[12, 24, 27, 44]]
    assert [len(target["class_ids"]) for target in targets] == [1, 2, 0]
    for (image, single), padded, target in zip(singles, images, targets, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(padded[:, :height, :width], image)
        assert not padded[:, height:].any()
        assert not padded[:, :, width:].any()
        full = target["masks"]
        if mini:
            assert full.shape[1:] == (64, 64)
        else:
            assert full.shape[1:] == (128, 128)
            assert torch.equal(full[:, :height, :width], single["masks"])
            assert full.sum() == single["masks"].sum()


# --- Real data -----------------------------------------------------------------------------------


@needs_shared("data/nuclei")
def test_nuclei():
    """Real images through the loader: what comes out is what the annotation file says."""
    folder = SHARED / "data" / "nuclei"
    content = json.loads((folder / "instances_val.json").read_text())
    by_image = {}
    for annotation in content["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation["segmentation"])

    class Nuclei(utils.Dataset):
        def load_mask(self, image_id):
            rles = self.image_info[image_id]["rles"]
            masks = np.stack([utils.rle_decode(rle) for rle in rles], axis=2)
            return masks, np.ones(len(rles), np.int32)

    nuclei = Nuclei()
    nuclei.add_class("nuclei", 1, "nucleus")
    for info in content["images"][:4]:
        file = next(folder.rglob(info["file_name"]))
        nuclei.add_image("nuclei", info["id"], file, rles=by_image[info["id"]])
    nuclei.prepare()
    config = make_config(NUM_CLASSES=2, IMAGE_RESIZE_MODE="pad64", IMAGE_MIN_DIM=None)
    items = data.TorchDataset(nuclei, config)
    for images, targets in data.make_loader(items, config, shuffle=False):
        for padded, target in zip(images, targets, strict=True):
            image_id = target["image_id"]
            areas = [utils.rle_decode(r).sum() for r in nuclei.image_info[image_id]["rles"]]
            assert target["masks"].sum(dim=(1, 2)).tolist() == areas
            # Nuclei are brighter than what lies around them; the padding is left out.
            height, width = nuclei.load_image(image_id).shape[:2]
            y, x = (padded.shape[1] - height) // 2, (padded.shape[2] - width) // 2
            gray = padded.float().mean(dim=0)[y : y + height, x : x + width]
            cells = target["masks"].any(dim=0)[y : y + height, x : x + width]
            assert gray[cells].mean() > 2 * gray[~cells].mean()


def test_files_are_scaled_from_the_bit_depth_of_the_config(tmp_path):
    Image.fromarray(np.full((64, 64), 4095, np.uint16)).save(tmp_path / "deep.png")
    files = utils.Dataset()
    files.add_class("cells", 1, "cell")
    files.add_image("cells", "a", tmp_path / "deep.png")
    files.prepare()
    options = {"NUM_CLASSES": 2, "IMAGE_MIN_DIM": 64, "IMAGE_MAX_DIM": 64}
    for depth, value in ((None, 16), (12, 255), (13, 127)):
        image, _ = data.TorchDataset(files, Config(IMAGE_BIT_DEPTH=depth, **options))[0]
        assert image.unique().tolist() == [value]
    assert files.bit_depth is None
    files.bit_depth = 12
    image, _ = data.TorchDataset(files, Config(IMAGE_BIT_DEPTH=13, **options))[0]
    assert image.unique().tolist() == [255]
