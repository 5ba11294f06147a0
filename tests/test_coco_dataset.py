"""Data sets in COCO's format: annotation files of all kinds, and MS COCO itself."""

import contextlib
import json
import pickle
import random

import numpy as np
import pytest
from annotation_files import SQUARE, annotation, standard_layout, write
from conftest import SHARED, TinyNetwork, needs_shared
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from reference_inputs import synthetic_image

import coco
import evaluation
import inspection
import utils
from coco import CATEGORIES, CATEGORY_IDS, CLASS_NAMES
from coco_dataset import CocoDataset
from coco_file import read_run_lengths
from dataset import TorchDataset

# pycocotools and numpy 2 disagree about __array__; Python 3.12 warns of forks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

MINI = SHARED / "data" / "coco_mini"


def square_mask(y1=3, x1=2, y2=9, x2=8, shape=(20, 30)):
    mask = np.zeros(shape, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def uncompressed(mask):
    flat = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def load(path, **options):
    dataset = CocoDataset()
    summary = dataset.load_annotations(path.parent, path, **options)
    dataset.prepare()
    return dataset, summary


# --- Annotations ---------------------------------------------------------------------------------


def test_every_way_to_write_a_mask(tmp_path):
    mask = square_mask()
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    compressed = {"size": [20, 30], "counts": compressed["counts"].decode()}
    two_parts = [*SQUARE, [20, 10, 25, 10, 25, 15, 20, 15]]
    path = write(
        tmp_path,
        [
            annotation(1, segmentation=SQUARE),
            annotation(2, segmentation=SQUARE[0]),
            annotation(3, segmentation=compressed),
            annotation(4, segmentation=uncompressed(mask)),
            annotation(5, segmentation=[], bbox=[2, 3, 6, 6]),
            annotation(6, segmentation=[[1, 1, 4, 4], *SQUARE]),
            annotation(7, segmentation=two_parts, category_id=3),
            annotation(8, segmentation=uncompressed(square_mask(0, 0, 20, 30)), iscrowd=1),
        ],
    )
    dataset, summary = load(path)
    masks, class_ids = dataset.load_mask(0)
    assert masks.shape == (20, 30, 8)
    assert masks.dtype == bool
    for i in range(6):
        np.testing.assert_array_equal(masks[:, :, i], mask)
    np.testing.assert_array_equal(masks[:, :, 6], mask | square_mask(10, 20, 15, 25))
    assert masks[:, :, 7].all()
    assert dataset.class_names == ["BG", "cat", "cup"]
    assert class_ids.tolist() == [2, 2, 2, 2, 2, 2, 1, -2]
    assert class_ids.dtype == np.int32
    assert (summary.images, summary.negatives, summary.annotations) == (2, 1, 8)
    assert (summary.crowds, summary.classes) == (1, 2)
    assert summary.remarks == {
        "annotations without a mask: their box is taken as one": [5],
        "annotations with parts of less than three points, which are left out": [6],
    }
    truth = dataset.ground_truth(0)
    assert [t["category_id"] for t in truth] == [2, 2, 2, 2, 2, 2, 1, 2]
    assert [t["iscrowd"] for t in truth] == [0] * 7 + [1]
    assert [t["bbox"] for t in truth[:6]] == [[2, 3, 6, 6]] * 6
    assert truth[6]["bbox"] == [2, 3, 23, 12]
    assert [t["area"] for t in truth] == [36] * 6 + [61, 600]


def test_boxes_and_areas_of_the_file_come_first(tmp_path):
    given = annotation(1, bbox=[2.5, 3.5, 5.25, 5], area=30.5)
    odd = annotation(2, bbox=[2, 3, 0, 6], area=float("nan"))
    dataset, _ = load(write(tmp_path, [given, odd]))
    first, second = dataset.ground_truth(0)
    assert (first["bbox"], first["area"]) == ([2.5, 3.5, 5.25, 5], 30.5)
    assert (second["bbox"], second["area"]) == ([2, 3, 6, 6], 36)


def test_an_image_without_objects_is_a_negative(tmp_path):
    dataset, summary = load(write(tmp_path, [annotation()]))
    masks, class_ids = dataset.load_mask(1)
    assert masks.shape == (20, 30, 0)
    assert masks.dtype == bool
    assert len(class_ids) == 0
    assert dataset.ground_truth(1) == []
    assert summary.negatives == 1


def test_a_mask_without_pixels_is_left_out(tmp_path):
    speck = annotation(2, segmentation=[[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]], category_id=3)
    dataset, _ = load(write(tmp_path, [speck, annotation(1)]))
    masks, class_ids = dataset.load_mask(0)
    assert masks.shape == (20, 30, 1)
    assert class_ids.tolist() == [2]


@pytest.mark.parametrize("ids", [(5, 90, 17), ("hen", "egg", "ant"), (0, 1, 2), (3, "a", 1)])
def test_category_ids_of_any_kind(tmp_path, ids):
    categories = [{"id": id_, "name": f"<{id_}>"} for id_ in ids]
    items = [annotation(i, category_id=id_) for i, id_ in enumerate(ids)]
    dataset, summary = load(write(tmp_path, items, categories=categories))
    ordered = sorted(ids, key=lambda i: (isinstance(i, str), i))
    assert dataset.class_names == ["BG", *(f"<{id_}>" for id_ in ordered)]
    assert [info["id"] for info in dataset.class_info[1:]] == ordered
    class_ids = dataset.load_mask(0)[1]
    assert class_ids.tolist() == [1 + ordered.index(id_) for id_ in ids]
    assert summary.remarks == {}


def test_string_ids_go_through_to_the_results(tmp_path):
    images = [{"id": "left", "file_name": "a/l.png", "height": 20, "width": 30}]
    categories = [{"id": "c", "name": "cup"}]
    item = annotation("x", image_id="left", category_id="c")
    dataset, _ = load(write(tmp_path, [item], images, categories))
    rle = utils.rle_encode(square_mask())
    found = {
        "rois": np.array([[3, 2, 9, 8]]),
        "class_ids": np.array([1]),
        "scores": np.array([0.5]),
        "masks": [rle],
    }

    class Model:
        config = TinyNetwork(NUM_CLASSES=2)

        def detect(self, images, masks):
            return [found]

    result = evaluation.evaluate_coco(Model(), dataset, verbose=0)
    assert result.segm["AP"] == pytest.approx(1)
    expected = {"image_id": "left", "category_id": "c", "bbox": [2, 3, 6, 6], "score": 0.5}
    assert result.results == [{**expected, "segmentation": rle}]


def test_what_is_dropped_and_why(tmp_path, caplog):
    images = [
        {"id": 1, "file_name": "1.png", "height": 20, "width": 30},
        {"id": 2, "file_name": "missing.png", "height": 20, "width": 30},
        {"file_name": "3.png"},
        {"id": 4},
        {"id": 5, "file_name": "5.png", "height": 20, "width": 30},
        {"id": 5.0, "file_name": "6.png", "height": 20, "width": 30},
        {"id": 7, "file_name": "7.png", "height": 20, "width": 30},
        {"id": 7, "file_name": "7.png", "height": 20, "width": 30},
    ]
    far = [[0, 0, 1e9, 0, 0, 1e9]]
    items = [
        annotation(1),
        annotation(1),
        annotation(1, segmentation=[[0, 0, 9, 0, 9, 9, 0, 9]]),
        annotation(3, image_id=77),
        annotation(4, image_id=2),
        annotation(5, category_id=8),
        annotation(6, segmentation=[]),
        annotation(7, segmentation=[[1, 2, 3, 4]], bbox=[1, 2, 2, 2]),
        annotation(8, segmentation={"size": [20, 31], "counts": [620]}),
        annotation(9, segmentation={"size": [20, 30], "counts": [1, 2]}),
        annotation(10, segmentation=far),
        annotation(11, segmentation=[["a", "b", "c", "d", "e", "f"]], bbox=[1, 2, 2, 2]),
        annotation(12, segmentation=[[1, 1, float("nan"), 1, 5, 5]]),
        annotation(13, image_id=[1]),
        annotation(14, segmentation={"size": [20, 30]}),
        {"image_id": 1, "category_id": 9},
        annotation(16, image_id=5),
    ]
    dataset, summary = load(write(tmp_path, items, images))
    assert summary.remarks == {
        "images listed more than once": [7],
        "images dropped, several with one id": ["5 (5.png, 6.png)"],
        "images dropped, no such file": [f"2 ({tmp_path / 'missing.png'})"],
        "images dropped, no id or file_name, at the positions": [2, 3],
        "annotations dropped, repeated": [1],
        "annotations dropped, no such image": [3, 4, 13],
        "annotations dropped, several images have the id of theirs": [16],
        "annotations dropped, no such category": [5, "position 15"],
        "annotations dropped, neither mask nor box": [6],
        "annotations dropped, outline of less than three points": [7],
        "annotations dropped, mask of another size than the image": [8],
        "annotations dropped, run lengths are damaged or do not add up to their size": [9, 14],
        "annotations dropped, outline far outside of the image": [10, 12],
        "annotations dropped, malformed": [11],
    }
    # The same id with another content is another annotation: many tools count from 1 per image.
    assert dataset.load_mask(0)[0].sum(axis=(0, 1)).tolist() == [36, 81]
    assert (summary.images, summary.annotations) == (2, 2)
    lines = str(summary).splitlines()
    assert lines[0].endswith("2 images (1 without objects), 2 annotations (0 crowds), 2 classes")
    assert "  3 annotations dropped, no such image: 3, 4, 13" in lines
    assert str(summary) in caplog.text


def test_a_summary_names_the_first_few_only(tmp_path):
    items = [annotation(i, image_id=9) for i in range(20)]
    _, summary = load(write(tmp_path, items))
    assert "20 annotations dropped, no such image: 0, 1, 2, 3, 4, ..." in str(summary)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "is not valid JSON: Expecting value"),
        ("", "is not valid JSON"),
        ("\xff\xfe\x00", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must be in COCO's format, .* images is not there"),
        ('{"images": [], "annotations": {}}', "annotations is not there or no such list"),
        ('{"images": [1], "annotations": []}', "images is not there or no such list"),
        ('{"images": [], "annotations": []}', "categories is not there"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": null, "name": "a"}]}',
            "a category must have a name and an id",
        ),
        (
            '{"images": [], "annotations": [], "categories":'
            ' [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "a category must have a name and an id of its own.*'b'",
        ),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories, and a model"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            "none of the 0 can be used",
        ),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        CocoDataset().load_annotations(tmp_path, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = write(tmp_path, [annotation()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path)[1].annotations == 1


def test_a_wrong_folder_is_named(tmp_path):
    path = write(tmp_path, [annotation()])
    with pytest.raises(FileNotFoundError, match=r"elsewhere must hold the images .* none of the 2"):
        CocoDataset().load_annotations(tmp_path / "elsewhere", path)
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        CocoDataset().load_annotations(tmp_path, tmp_path / "nothing.json")


def test_upright_images_and_annotations_for_another_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [
        {"id": 1, "file_name": "a.jpg", "height": 30, "width": 20},  # as it is to be seen
        {"id": 2, "file_name": "b.jpg"},
        {"id": 3, "file_name": "c.jpg", "height": 20, "width": 30},  # as it is stored
    ]
    path = write(tmp_path, [annotation(i, image_id=i) for i in (1, 2, 3)], images)
    for image in images:
        Image.fromarray(synthetic_image(20, 30)).save(tmp_path / image["file_name"], exif=exif)
    dataset, _ = load(path)
    for i in (0, 1):
        assert dataset.load_image(i).shape == (30, 20, 3)
        mask = dataset.load_mask(i)[0][:, :, 0]
        np.testing.assert_array_equal(mask, square_mask(shape=(30, 20)))
    message = r"custom.3 must be 30 x 20 as in its annotations, but .*c.jpg is 20 x 30 when upright"
    with pytest.raises(ValueError, match=message):
        dataset.load_image(2)


@pytest.mark.parametrize(
    "counts",
    ["0000zz", "b'ab0'", "", "\ud800", [1.5, 598.5], [600, 2**63, 0], [[600]], None],
)
def test_damaged_run_lengths_are_dropped_when_loaded(tmp_path, counts):
    damaged = annotation(segmentation={"size": [20, 30], "counts": counts})
    dataset, summary = load(write(tmp_path, [damaged, annotation(2)]))
    text = "annotations dropped, run lengths are damaged or do not add up to their size"
    assert summary.remarks == {text: [1]}
    assert dataset.load_mask(0)[1].tolist() == [2]


def test_some_classes_only(tmp_path):
    items = [annotation(1), annotation(2, image_id=2, category_id=3), annotation(3, category_id=3)]
    dataset, summary = load(write(tmp_path, items), class_ids=[7])
    assert dataset.class_names == ["BG", "cup"]
    assert [info["id"] for info in dataset.image_info] == [1]
    assert dataset.load_mask(0)[1].tolist() == [1]
    assert (summary.annotations, summary.classes, summary.remarks) == (1, 1, {})
    with pytest.raises(ValueError, match=r"category ids of .*, got \[8\]"):
        load(write(tmp_path, items), class_ids=[7, 8])


def test_two_files_in_one_data_set(tmp_path):
    first, second = write(tmp_path / "a", [annotation()]), write(tmp_path / "b", [annotation()])
    dataset = CocoDataset()
    dataset.load_annotations(first.parent, first)
    with pytest.raises(ValueError, match="image ids must differ within the source 'custom', got 1"):
        dataset.load_annotations(second.parent, second)
    dataset.load_annotations(second.parent, second, source="more")
    dataset.prepare()
    assert dataset.class_names == ["BG", "cat", "cup", "cat", "cup"]
    assert [dataset.load_mask(i)[1].tolist() for i in range(4)] == [[2], [], [4], []]
    assert dataset.image_reference(2) == str(tmp_path / "b" / "1.png")


def test_training_takes_the_items(tmp_path):
    crowd = annotation(2, segmentation=uncompressed(square_mask(10, 10, 20, 30)), iscrowd=1)
    dataset, _ = load(write(tmp_path, [annotation(), crowd]))
    config = TinyNetwork(NUM_CLASSES=3, IMAGE_RESIZE_MODE="pad64", IMAGE_MIN_DIM=None)
    _, item = TorchDataset(dataset, config)[0]
    assert item["class_ids"].tolist() == [2, -2]
    y, x = 22, 17  # (64 - 20) / 2, (64 - 30) / 2
    assert item["boxes"].tolist() == [
        [3 + y, 2 + x, 9 + y, 8 + x],
        [10 + y, 10 + x, 20 + y, 30 + x],
    ]


# --- Files as people have them -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "image", "category"), [((1, 7), "1", "7"), ((1.0, "7"), 1, 7.0), (("1.0", 7.0), 1, "7")]
)
def test_ids_may_differ_in_type(tmp_path, ids, image, category):
    images = [{"id": ids[0], "file_name": "1.png", "height": 20.0, "width": 30}]
    item = annotation(image_id=image, category_id=category)
    path = write(tmp_path, [item], images, [{"id": ids[1], "name": "cup"}])
    dataset, summary = load(path)
    assert summary.remarks == {}
    assert dataset.load_mask(0)[1].tolist() == [1]


def test_ids_that_exist_in_two_types_are_told_apart(tmp_path):
    images = [{"id": i, "file_name": f"{i!r}.png", "height": 20, "width": 30} for i in (1, "1")]
    items = [annotation(1, image_id=1), annotation(2, image_id="1"), annotation(3, image_id="1.0")]
    dataset, summary = load(write(tmp_path, items, images))
    assert [len(info["annotations"]) for info in dataset.image_info] == [1, 1]
    assert summary.remarks == {"annotations dropped, several images have the id of theirs": [3]}


@pytest.mark.parametrize(
    "segmentation",
    [
        [[[2, 3, 8, 3, 8, 9, 2, 9]]],
        [[2, 3], [8, 3], [8, 9], [2, 9]],
        [[[2, 3], [8, 3], [8, 9], [2, 9]]],
        [[[[2, 3]], [[8, 3]], [[8, 9]], [[2, 9]]]],
        [2, 3, 8.0, 3, 8, 9, 2, 9],
        {"size": [20.0, 30], "counts": [43, *[6, 14] * 5, 6, 451.0]},
        {"size": [20, 30], "counts": str(utils.rle_encode(square_mask())["counts"].encode())},
    ],
)
def test_points_and_run_lengths_that_can_be_read_are_read(tmp_path, segmentation):
    path = write(tmp_path, [annotation(segmentation=segmentation, bbox=[0, 0, 20, 15])])
    dataset, summary = load(path)
    np.testing.assert_array_equal(dataset.load_mask(0)[0][:, :, 0], square_mask())
    assert [*summary.remarks] == [
        "annotations whose box does not fit their mask: the mask's is used"
    ]


@pytest.mark.parametrize(
    "segmentation", [[[1, 2, "3", 4, 5, 6]], [[{"x": 1}]], "1 2 3", 5, True, [[1, [2], 3]]]
)
def test_an_outline_that_cannot_be_read_is_not_its_box(tmp_path, segmentation):
    item = annotation(segmentation=segmentation, bbox=[2, 3, 6, 6])
    _, summary = load(write(tmp_path, [item]))
    assert summary.remarks == {"annotations dropped, malformed": [1]}


@pytest.mark.parametrize("box", [[5, 6, 6, 6], [2, 3, 18, 9], [0.1, 0.1, 0.2, 0.3], [28, 2, 9, 9]])
def test_a_box_of_another_convention_is_not_used(tmp_path, box):
    item = annotation(segmentation=[[2, 3, 12, 3, 12, 9, 2, 9]], bbox=box)
    dataset, summary = load(write(tmp_path, [item]))
    assert dataset.ground_truth(0)[0]["bbox"] == [2, 3, 10, 6]
    text = "annotations whose box does not fit their mask: the mask's is used"
    assert summary.remarks == {text: [1]}


def test_outlines_of_another_scale_are_remarked(tmp_path):
    def outline(scale, shift=0):
        return [(scale * x + shift for x in SQUARE[0])]

    items = [
        annotation(i, segmentation=[[*part] for part in outline(*values)])
        for i, values in enumerate([(1, 0), (0.05,), (4, 4), (0.01, 5)])
    ]
    _, summary = load(write(tmp_path, items))
    assert [(remark[:34], ids) for remark, ids in summary.remarks.items()] == [
        ("annotations that lie outside of th", [2]),
        ("annotations smaller than a pixel, ", [1]),
        ("annotations smaller than a pixel", [3]),
    ]


def test_percent_are_remarked(tmp_path):
    images = [{"id": 1, "file_name": "1.png", "height": 400, "width": 500}]
    outlines = [[[x, x, x + 10, x, x + 10, x + 10]] for x in (0, 20, 40, 60, 80)]
    items = [annotation(i, segmentation=outline) for i, outline in enumerate(outlines)]
    _, summary = load(write(tmp_path, items, images, size=(400, 500)))
    text = "annotations all of which lie in the first 100 x 100 pixels: in percent?"
    assert summary.remarks == {text: [0, 1, 2, 3, 4]}
    _, summary = load(write(tmp_path, items[:4], images, size=(400, 500)))
    assert summary.remarks == {}


def test_groups_and_names_that_coincide(tmp_path):
    categories = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "animals"},
        {"id": 2, "name": "cat", "supercategory": "animals"},
        {"id": 3, "name": "person", "supercategory": "person"},
    ]
    dataset, summary = load(write(tmp_path, [annotation(category_id=1)], categories=categories))
    assert dataset.class_names == ["BG", "cat", "person"]
    assert summary.remarks == {
        "categories dropped, without annotations and only a group of others": ["animals"],
        "categories dropped, without annotations and named as another": ["cat"],
    }
    items = [annotation(i, category_id=i) for i in range(3)]
    with pytest.raises(ValueError, match="one name for each category, got 'cat' for the ids 1 and"):
        load(write(tmp_path, items, categories=categories))


def test_names_that_would_coincide_stay_whole(tmp_path):
    categories = [{"id": 1, "name": "nail, of iron"}, {"id": 2, "name": "nail, of a finger"}]
    dataset, _ = load(write(tmp_path, [annotation(category_id=2)], categories=categories))
    assert dataset.class_names[1:] == ["nail, of iron", "nail, of a finger"]


def test_what_a_terminal_would_obey_is_escaped(tmp_path):
    categories = [{"id": 7, "name": "\x1b[2Jcup\ud800"}]
    images = [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "missing\x1b\ud800.png"}]
    dataset, summary = load(write(tmp_path, [annotation()], images, categories))
    assert dataset.class_names == ["BG", "\\x1b[2Jcup\\ud800"]
    assert "missing\\x1b\\ud800.png" in str(summary)
    assert str(summary).replace("\n", "").isprintable()


def test_classes_are_matched_by_name(tmp_path):
    categories = [{"id": 1, "name": "cup"}, {"id": 7, "name": "dog"}, {"id": 3, "name": "hat"}]
    items = [annotation(1, category_id=1), annotation(2, category_id=7)]
    path = write(tmp_path, items, categories=categories)
    dataset, summary = load(path, class_names=["cat", "dog", "cup"])
    assert dataset.class_names == ["BG", "cat", "dog", "cup"]
    assert dataset.load_mask(0)[1].tolist() == [3, 2]
    assert len({info["id"] for info in dataset.class_info}) == 4
    assert (summary.remarks, summary.classes) == ({}, 3)
    with pytest.raises(ValueError, match="no other classes than 'cup', got 'dog'; .* --classes"):
        load(path, class_names=["cup"])
    dataset, _ = load(path, class_names=["dog", "cup"], only_classes=["cup"])
    assert dataset.load_mask(0)[1].tolist() == [2]
    dataset, _ = load(path, only_classes=["hat", "dog"])
    assert dataset.class_names == ["BG", "hat", "dog"]
    assert dataset.load_mask(0)[1].tolist() == [2]
    with pytest.raises(ValueError, match="must be among 'cup', 'dog', 'hat', got 'cat'"):
        load(path, only_classes=["cat"])


def test_several_files_have_classes_in_common(tmp_path):
    first = write(tmp_path / "a", [annotation(1), annotation(2, category_id=3)])
    categories = [{"id": 7, "name": "hat"}, {"id": 8, "name": "cat"}]
    second = write(tmp_path / "b", [annotation(1), annotation(2, category_id=8)], None, categories)
    dataset = CocoDataset()
    dataset.load_files([first.parent, second.parent], [first, second])
    dataset.prepare()
    assert dataset.class_names == ["BG", "cat", "cup", "hat"]
    assert [dataset.load_mask(i)[1].tolist() for i in range(4)] == [[2, 1], [], [3, 1], []]
    ids = [info["id"] for info in dataset.image_info]
    assert ids == [1, 2, "annotations.json/1", "annotations.json/2"]
    assert len({info["id"] for info in dataset.class_info}) == 4
    with pytest.raises(ValueError, match="one folder of images, or one for each of the 2"):
        CocoDataset().load_files([tmp_path] * 3, [first, second])


def test_crowds_become_objects_if_asked_for(tmp_path):
    path = write(tmp_path, [annotation(iscrowd=1)])
    assert load(path)[0].load_mask(0)[1].tolist() == [-2]
    dataset, summary = load(path, crowd_as_objects=True)
    assert dataset.load_mask(0)[1].tolist() == [2]
    assert summary.crowds == 0


@pytest.mark.parametrize("side", [10**9, 10**5, 2**63, 1e30, -1, "wide"])
def test_sizes_that_cannot_be_are_those_of_the_image(tmp_path, side):
    images = [{"id": 1, "file_name": "1.png", "height": side, "width": side}]
    dataset, _ = load(write(tmp_path, [annotation()], images))
    assert dataset.load_mask(0)[0].shape == (20, 30, 1)


def test_a_size_is_compared_with_the_file_before_a_mask_is_drawn(tmp_path):
    images = [{"id": 1, "file_name": "1.png", "height": 30_000, "width": 30_000}]
    dataset, _ = load(write(tmp_path, [annotation()], images))
    for read in (dataset.load_mask, dataset.ground_truth, dataset.check_size):
        with pytest.raises(ValueError, match="must be 30000 x 30000 as in its annotations, but"):
            read(0)


def test_an_outline_of_endless_length_is_dropped(tmp_path):
    zigzag = [x for i in range(15_000) for x in (-250.0 + i / 60, 250.0 * (-1) ** i)]
    _, summary = load(write(tmp_path, [annotation(segmentation=[zigzag])]))
    text = "annotations dropped, outline far longer than around the image"
    assert summary.remarks == {text: [1]}


def test_names_of_files_are_looked_for(tmp_path):
    images = [
        {"id": 1, "file_name": "1.png"},
        {"id": 2, "file_name": "C:\\photos\\2.PNG"},
        {"id": 3, "coco_url": "http://images.org/val/3.png"},
        {"id": 4, "file_name": "../4.png"},
        {"id": 5, "file_name": "1.jpg"},
        {"id": 6, "file_name": "./1.png"},
    ]
    path = write(tmp_path / "photos", [annotation()], [{"id": 1, "file_name": "1.png"}])
    for name in ("2.png", "3.png", "../4.png"):
        (path.parent / name).write_bytes((path.parent / "1.png").read_bytes())
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": images}))
    _, summary = load(path)
    folder = path.parent
    assert summary.remarks == {
        "images found under another form of their name": [
            f"2 (C:\\photos\\2.PNG: {folder}/2.png)",
            f"3 (http://images.org/val/3.png: {folder}/3.png)",
        ],
        "images outside of the folder": [f"4 ({folder}/../4.png)"],
        "images dropped, no such file": [f"5 ({folder}/1.jpg; 1.png is there)"],
        "images that share their file with another": [f"6 ({folder}/1.png)"],
    }


def test_an_image_is_pickled_with_its_own_annotations_alone(tmp_path):
    rle = {"size": [20, 30], "counts": [43, *[6, 14] * 5, 6, 451]}
    two = [*SQUARE, [20, 10, 25, 10, 25, 15, 20, 15]]
    items = [
        annotation(1, segmentation=two, bbox=[2, 3, 23, 12], area=61, iscrowd=1),
        annotation(2, segmentation=rle, category_id=3),
        *(annotation(i, image_id=2) for i in range(3, 1000)),
    ]
    dataset, _ = load(write(tmp_path, items))
    data = pickle.dumps(dataset.image_info[0])
    assert len(data) < 2000
    first, second = dataset.image_info[0]["annotations"], pickle.loads(data)["annotations"]
    assert len(first) == len(second) == 2
    assert str([*first]) == str([*second])
    assert str([*first[1:]]) == str([second[1]])


# --- Files of chance -----------------------------------------------------------------------------

ODD = (None, True, -1, 0, 1.5, 1e308, 2**63, 10**400, "", "x", "1", "\ud800", "\x00", [], {}, [[]])


def mutate(value, rng, depth=0):
    """A copy of a JSON value, with something else in one place."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        copied = value.copy()
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        action = rng.random() if depth or rng.random() < 0.2 else 1
        if action < 0.08:
            copied.pop(key)
        elif action < 0.16 and isinstance(value, list):
            copied.insert(key, rng.choice(value))
        elif action < 0.22:
            copied[key] = [value[key]]
        else:
            copied[key] = mutate(value[key], rng, depth + 1)
        return copied
    if type(value) in (int, float) and rng.random() < 0.6:
        small = max(min(value, 1e300), -1e300)
        changed = (value * 1000, small / 100, -value, float(small), str(value), value + 1)
        return rng.choice(changed)
    return rng.choice((float("nan"), float("inf"), *ODD)) if depth else value


def check_files_of_chance(folder, count, seed):
    """Loads mutated files; whatever loads must give masks, truth and a check, or a ValueError."""
    rle = {"size": [20, 30], "counts": [43, *[6, 14] * 5, 6, 451]}
    text = {"size": [20, 30], "counts": utils.rle_encode(square_mask())["counts"]}
    items = [
        annotation(1, bbox=[2, 3, 6, 6], area=36, iscrowd=0),
        annotation(2, segmentation=rle, category_id=3, iscrowd=1),
        annotation(3, segmentation=text, image_id=2),
        annotation(4, segmentation=[], bbox=[1, 1, 5, 5], image_id=2),
    ]
    path = write(folder, items)
    content = json.loads(path.read_text())
    rng = random.Random(seed)
    loaded = 0
    for _ in range(count):
        changed = content
        for _ in range(rng.randint(1, 4)):
            changed = mutate(changed, rng)
        data = json.dumps(changed).encode()
        if rng.random() < 0.1:
            data = bytearray(data)
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            dataset, summary = load(path)
            str(summary).encode()
            check = inspection.check_objects(dataset, TinyNetwork(NUM_CLASSES=dataset.num_classes))
            objects = 0
            for i in range(dataset.num_images):
                dataset.ground_truth(i)
                objects += int((dataset.load_mask(i)[1] > 0).sum())
                pickle.loads(pickle.dumps(dataset.image_info[i]))
            assert objects or check.error
            loaded += 1
        except Exception as error:
            if type(error) not in (ValueError, FileNotFoundError) or "\n" in str(error):
                raise AssertionError(data) from error
    return loaded


def test_a_few_hundred_files_of_chance(tmp_path):
    assert check_files_of_chance(tmp_path, 300, seed=0) > 60


@pytest.mark.slow
def test_thousands_of_files_of_chance(tmp_path):
    assert check_files_of_chance(tmp_path, 10_000, seed=1) > 2000


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_run_lengths_of_chance(count):
    rng = random.Random(count)
    good = utils.rle_encode(square_mask())["counts"]
    for _ in range(count):
        text = list(good)
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text)) :][:1] = chr(rng.randrange(256))
            text[rng.randrange(len(text))] = chr(rng.randrange(40, 120))
        rle = {"size": [20, 30], "counts": "".join(text)[: rng.randint(0, len(text))]}
        try:
            found = read_run_lengths(rle)
        except (ArithmeticError, LookupError, SyntaxError, TypeError, ValueError):
            continue
        box, part = utils.rle_decode_part({"size": found.size, "counts": found.counts})
        y1, x1, y2, x2 = box
        assert not part.size or found.bounds[0::2] == (x1, x2)
        assert found.bounds[1] <= y1
        assert y2 <= found.bounds[3]


# --- MS COCO -------------------------------------------------------------------------------------


def test_coco_has_80_categories_in_rising_order():
    assert len(CATEGORIES) == 80
    assert sorted(CATEGORIES) == list(CATEGORIES)
    assert CATEGORY_IDS[1:] == list(CATEGORIES)
    assert (CLASS_NAMES[0], CLASS_NAMES[1], CLASS_NAMES[-1]) == ("BG", "person", "toothbrush")


@needs_shared
def test_a_real_part_of_coco():
    dataset = CocoDataset()
    summary = dataset.load_coco(MINI, "train", 2017)
    dataset.load_coco(MINI, "val")
    dataset.prepare()
    assert dataset.class_names == CLASS_NAMES
    assert [info["id"] for info in dataset.class_info] == CATEGORY_IDS
    assert (summary.images, summary.negatives, summary.annotations) == (215, 1, 2035)
    assert (summary.crowds, summary.classes, summary.remarks) == (19, 80, {})
    assert dataset.num_images == 266
    assert dataset.image_reference(0).endswith("explore?id=790")


@needs_shared
def test_masks_are_those_of_pycocotools():
    file = MINI / "annotations" / "instances_val2017.json"
    with contextlib.redirect_stdout(None):
        reference = COCO(str(file))
    dataset = CocoDataset()
    dataset.load_coco(MINI, "val")
    dataset.prepare()
    crowds = 0
    for image_id, info in enumerate(dataset.image_info):
        annotations = reference.imgToAnns[info["id"]]
        expected = [reference.annToMask(a).astype(bool) for a in annotations]
        masks, class_ids = dataset.load_mask(image_id)
        assert masks.shape[:2] == dataset.load_image(image_id).shape[:2]
        visible = [i for i, mask in enumerate(expected) if mask.any()]
        assert masks.shape[2] == len(class_ids) == len(visible)
        for n, i in enumerate(visible):
            np.testing.assert_array_equal(masks[:, :, n], expected[i])
            assert CATEGORY_IDS[abs(class_ids[n])] == annotations[i]["category_id"]
            assert (class_ids[n] < 0) == annotations[i]["iscrowd"]
        crowds += (class_ids < 0).sum()
    assert crowds == 5


@needs_shared
@pytest.mark.parametrize(
    ("folder", "file", "images", "annotations", "classes"),
    [
        ("nuclei", "instances_val.json", 88, 2232, ["nucleus"]),
        ("fruits_nuts", "instances.json", 18, 165, ["date", "fig", "hazelnut"]),
    ],
)
def test_other_real_data(folder, file, images, annotations, classes):
    dataset = CocoDataset()
    root = SHARED / "data" / folder
    summary = dataset.load_annotations(root / "images", root / file)
    dataset.prepare()
    assert (summary.images, summary.annotations, summary.remarks) == (images, annotations, {})
    assert dataset.class_names[1:] == classes
    stored = json.loads((root / file).read_text())["annotations"]
    first = [a for a in stored if a["image_id"] == dataset.image_info[0]["id"]]
    areas = dataset.load_mask(0)[0].sum(axis=(0, 1))
    assert dataset.load_image(0).shape[:2] == dataset.load_mask(0)[0].shape[:2]
    np.testing.assert_allclose(areas, [a["area"] for a in first], rtol=0.02)


def test_the_subsets_of_2014_share_their_images(tmp_path):
    standard_layout(tmp_path, "train", 2014, "train", (1, 2))
    standard_layout(tmp_path, "minival", 2014, "val", (3,))
    standard_layout(tmp_path, "valminusminival", 2014, "val", (4, 5))
    args = coco.build_parser().parse_args(["inspect", f"--dataset={tmp_path}", "--year=2014"])
    train = coco.training_data(args)
    val = coco.validation_data(args, train.class_names)
    assert [info["id"] for info in train.image_info] == [1, 2, 4, 5]
    assert [info["id"] for info in val.image_info] == [3]
    assert train.image_info[2]["path"] == tmp_path / "val2014" / "000000000004.png"
    assert train.load_mask(3)[1].tolist() == [80]
    with pytest.raises(ValueError, match="must be one of .*, got minival of 2017"):
        CocoDataset().load_coco(tmp_path, "minival")
    message = "no annotation file .*instances_val2017.json; .* must hold it and the folder val2017"
    with pytest.raises(FileNotFoundError, match=message):
        CocoDataset().load_coco(tmp_path, "val", 2017)
