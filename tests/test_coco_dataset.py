"""Data sets in COCO's format: annotation files of all kinds, and MS COCO itself."""

import contextlib
import gc
import json

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
import utils
from coco import CATEGORIES, CATEGORY_IDS, CLASS_NAMES
from coco_dataset import CocoDataset
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
    assert gc.isenabled()  # switched off for a while


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
