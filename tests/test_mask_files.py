"""Folders of images and of masks, in each form that is read."""

import shutil

import numpy as np
import pytest
from PIL import Image
from test_image_files import damaged

from mask_files import VOID, MasksDataset

HEIGHT, WIDTH = 40, 60


@pytest.fixture
def folders(tmp_path):
    """Two photographs, a.jpg and a_1.jpg, and an empty folder for masks."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for name in ("a.jpg", "a_1.jpg"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / name)
    return images, masks


def square(i):
    """The i-th of some squares that do not touch."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[5 + i : 15 + i, 2 + 14 * i : 12 + 14 * i] = True
    return mask


def labels(values, dtype=np.uint8):
    """A label image of squares."""
    return np.sum([square(i) * value for i, value in enumerate(values)], axis=0).astype(dtype)


def save(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if mode is not None:
        picture = picture.convert(mode)
    picture.save(path)


def read(folders, **options):
    data = MasksDataset()
    data.summary = data.load_annotations(*folders, **options)
    data.prepare()
    return data


def assert_squares(data, image_id, count):
    masks, class_ids = data.load_mask(image_id)
    masks = masks[:, :, masks.any(axis=0).argmax(axis=0).argsort()]  # from left to right
    expected = np.stack([square(i) for i in range(count)], axis=2)
    np.testing.assert_array_equal(masks, expected)
    return [data.class_names[i] for i in class_ids]


@pytest.mark.parametrize("name", ["a.png", "a_mask.png", "a_LABELS.tif", "a_instances.bmp"])
def test_each_value_of_a_label_image_is_an_object(folders, name):
    save(folders[1] / name, labels([1, 2, 255]))
    save(folders[1] / "a_1.png", labels([0]))
    data = read(folders)
    assert assert_squares(data, 0, 3) == ["object"] * 3
    assert data.load_mask(1)[0].shape == (HEIGHT, WIDTH, 0)
    assert data.summary.remarks == {}
    assert (data.summary.images, data.summary.negatives, data.summary.annotations) == (2, 1, 3)
    assert read(folders, class_names=["nut"]).class_names == ["BG", "nut"]


@pytest.mark.parametrize("kind", ["16 bits", "32 bits", "palette", "colours", "alpha"])
def test_kinds_of_label_images(folders, kind):
    path = folders[1] / "a.png"
    if kind == "16 bits":
        save(path, labels([300, 40000, 1], np.uint16))
    elif kind == "32 bits":
        path = folders[1] / "a.tif"
        save(path, labels([300, 2_000_000, 1], np.int32))
    elif kind == "palette":
        picture = Image.fromarray(labels([1, 2, 3]), mode=None).convert("P")
        picture.putpalette([0, 0, 0, 9, 9, 9, 9, 9, 9, 0, 0, 0])  # the values count, not these
        picture.putdata(labels([1, 2, 3]).ravel().tolist())
        picture.save(path)
    else:
        values = labels([1, 2, 3])
        colours = np.array([[0, 0, 0], [200, 0, 0], [0, 200, 0], [0, 0, 1]], np.uint8)[values]
        if kind == "alpha":
            colours = np.dstack([np.maximum(colours, 7), 255 * (values > 0).astype(np.uint8)])
        save(path, colours)
    assert_squares(read(folders), 0, 3)


def test_one_file_for_each_object(folders):
    masks = folders[1]
    for i in range(3):
        save(masks / "a" / f"{i}.png", 255 * square(i).astype(np.uint8))
    # Of two images whose names fit, the longer one is meant.
    for i, value in enumerate((1, 255)):
        save(masks / f"a_1_{i}.png", value * square(i).astype(np.uint8))
    data = read(folders)
    assert_squares(data, 0, 3)
    assert_squares(data, 1, 2)
    assert data.summary.remarks == {}


def test_soft_borders_of_one_object_are_cut_in_the_middle(folders):
    save(folders[1] / "a_x.png", (255 * square(0) // 1 + 100 * square(1)).astype(np.uint8))
    assert_squares(read(folders), 0, 1)


def test_folders_inside_are_classes(folders):
    save(folders[1] / "fig" / "a.png", labels([3]))
    save(folders[1] / "date" / "a" / "1.png", 255 * square(1).astype(np.uint8))
    save(folders[1] / "date" / "a_2.png", 255 * square(2).astype(np.uint8))
    data = read(folders)
    assert data.class_names == ["BG", "date", "fig"]
    masks, class_ids = data.load_mask(0)
    order = [int(np.flatnonzero(masks[:, :, i].any(axis=0))[0] // 14) for i in range(3)]
    assert [data.class_names[class_ids[order.index(i)]] for i in range(3)] == [
        "fig",
        "date",
        "date",
    ]


def test_voc_and_cvat_tell_classes_by_colour(folders):
    masks, colours = folders[1], np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for i, colour in enumerate([(128, 0, 0), (0, 128, 0), (128, 0, 0), (0, 0, 0)]):
        colours[square(i)] = colour
    objects = colours.copy()
    for i, colour in enumerate([(128, 0, 0), (0, 128, 0), (128, 128, 0), (9, 9, 9)]):
        objects[square(i)] = colour
    border = np.array([VOID >> 16, VOID >> 8 & 255, VOID & 255])
    colours[-1] = objects[-1] = border
    save(masks / "SegmentationClass" / "a.png", colours)
    save(masks / "SegmentationObject" / "a.png", objects)
    data = read(folders)
    assert data.class_names == ["BG", "#008000", "#800000"]
    labelmap = (
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nfig:128,0,0::\ndate:0,128,0::\n"
    )
    (masks / "labelmap.txt").write_text(labelmap)
    data = read(folders)
    assert data.summary.annotations == 3
    names = {}
    found, class_ids = data.load_mask(0)
    for i in range(3):
        (k,) = [k for k in range(3) if (found[:, :, k] == square(i)).all()]
        names[i] = data.class_names[class_ids[k]]
    assert names == {0: "fig", 1: "date", 2: "fig"}
    (items,) = [
        v for k, v in data.summary.remarks.items() if k == "objects dropped, without a class"
    ]
    assert len(items) == 1
    (masks / "labelmap.txt").write_text("fig 128 0 0")
    with pytest.raises(ValueError, match='must have lines as "cat:250,50,83", got'):
        read(folders)


def test_what_cannot_be_used_is_dropped_and_listed(folders):
    images, masks = folders
    for name in ("b.png", "c.png", "d.png", "a.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / name)
    (images / "d.png").write_bytes(b"no image")
    save(masks / "a.png", labels([1, 2]))
    save(masks / "a_1_0.png", 0 * labels([1]))
    save(masks / "b.png", labels([1])[:, 1:])
    save(masks / "d.png", labels([1]))
    save(masks / "z.png", labels([1]))
    save(masks / "a.jpg", labels([1]))
    (masks / "c.png").write_bytes((masks / "a.png").read_bytes()[:60])
    (masks / "notes.txt").write_text("no mask")
    (masks / "._a.png").write_text("hidden")
    data = read(folders)
    assert [info["id"] for info in data.image_info] == ["a.jpg", "a_1.jpg"]
    listed = {remark: len(items) for remark, items in data.summary.remarks.items()}
    assert listed == {
        "images dropped, another has the same name but for its end": 1,
        "masks left out, of a format that blurs values; save them as PNG": 1,
        "masks left out, no image has their name": 1,
        "masks dropped, without a pixel": 1,
        "masks dropped, unreadable or of another size": 2,
        "images dropped, none of their masks can be used": 2,
        "images dropped, unreadable": 1,
    }
    (masks / "b.png").unlink()
    data = read(folders)
    assert data.summary.remarks["images dropped, without a file or folder of masks"] == ["b.png"]


def test_label_images_of_one_value_each_are_remarked(folders):
    save(folders[1] / "a.png", 255 * (square(0) | square(1)).astype(np.uint8))
    *_, remark = read(folders).summary.remarks
    assert remark == "label images of one value each, which makes all of it one object"


def test_wrong_folders_are_refused(folders):
    images, masks = folders
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere, which is to hold the masks"):
        read((images, masks / "nowhere"))
    with pytest.raises(ValueError, match="must be in a folder of their own"):
        read((images, images))
    with pytest.raises(FileNotFoundError, match="none can be used; images dropped, without"):
        read(folders)
    save(masks / "a.png", labels([0]))
    with pytest.raises(ValueError, match="must have objects with an area, found none"):
        read(folders)


# --- Damaged files -------------------------------------------------------------------------------


def read_damaged_masks(folders, rounds):
    """Reads folders whose mask files are damaged; how many were read, and how many refused."""
    images, masks = folders
    whole = folders[0].parent / "whole"
    save(whole / "a.png", labels([1, 2, 255]))
    save(whole / "a_1.tif", labels([300, 40000], np.uint16))
    save(whole / "fig" / "a_1_0.png", square(2))
    save(whole / "date" / "a" / "0.gif", 255 * square(1).astype(np.uint8))
    save(whole / "date" / "a" / "1.bmp", np.dstack([labels([9])] * 3))
    save(whole / "SegmentationObject" / "a.png", labels([1, 2]), "P")
    save(whole / "SegmentationClass" / "a.png", labels([7, 7]), "RGB")
    (whole / "labelmap.txt").write_text("fig:7,7,7::\n")
    contents = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*.*")}
    counts = [0, 0]
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        shutil.rmtree(masks)
        for path, content in contents.items():
            if (path.suffix == ".txt" or path.parent.name.startswith("Segm")) != bool(seed % 2):
                continue
            (masks / path).parent.mkdir(parents=True, exist_ok=True)
            (masks / path).write_bytes(damaged(content, rng) if rng.random() < 0.7 else content)
        data = MasksDataset()
        try:
            summary = data.load_annotations(images, masks)
        except (ValueError, OSError):
            counts[1] += 1
            continue
        data.prepare()
        found = [data.load_mask(i) for i in data.image_ids]
        assert all(m.any(axis=(0, 1)).all() and m.shape[:2] == (HEIGHT, WIDTH) for m, _ in found)
        assert 0 < sum(len(class_ids) for _, class_ids in found) == summary.annotations
        counts[0] += 1
    return counts


@pytest.mark.filterwarnings("ignore")  # of image decoders
def test_damaged_masks(folders):
    assert min(read_damaged_masks(folders, 60)) > 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_thousands_of_damaged_masks(folders):
    assert min(read_damaged_masks(folders, 2000)) > 100
