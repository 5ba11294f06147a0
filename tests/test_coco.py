"""Annotation files of all kinds, the download, and the command line as a person uses it."""

import argparse
import contextlib
import gc
import http.server
import io
import json
import shutil
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import SHARED, TinyNetwork, needs_shared
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from reference_inputs import synthetic_image

import coco
import coco_download
import evaluation
import utils
import weights
from coco import CATEGORIES, CATEGORY_IDS, CLASS_NAMES, CocoDataset
from config import Config
from dataset import TorchDataset
from model import MaskRCNN

# pycocotools and numpy 2 disagree about __array__; Python 3.12 warns of forks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

MINI = SHARED / "data" / "coco_mini"
SQUARE = [[2, 3, 8, 3, 8, 9, 2, 9]]  # rows 3 to 8, columns 2 to 7


def square_mask(y1=3, x1=2, y2=9, x2=8, shape=(20, 30)):
    mask = np.zeros(shape, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def uncompressed(mask):
    flat = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


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


def load(path, **options):
    dataset = CocoDataset()
    summary = dataset.load_annotations(path.parent, path, **options)
    dataset.prepare()
    return dataset, summary


def annotation(id_=1, image_id=1, category_id=7, segmentation=SQUARE, **more):
    return {
        "id": id_,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        **more,
    }


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
        {"id": 1, "file_name": "other.png", "height": 20, "width": 30},
        {"id": 2, "file_name": "missing.png", "height": 20, "width": 30},
        {"file_name": "3.png"},
        {"id": 4},
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
        annotation(7, segmentation=[[1, 2, 3, 4]]),
        annotation(8, segmentation={"size": [20, 31], "counts": [620]}),
        annotation(9, segmentation={"size": [20, 30], "counts": [1, 2]}),
        annotation(10, segmentation=far),
        annotation(11, segmentation=[["a", "b", "c", "d", "e", "f"]]),
        annotation(12, segmentation=[[1, 1, float("nan"), 1, 5, 5]]),
        annotation(13, image_id=[1]),
        annotation(14, segmentation={"size": [20, 30]}),
        {"image_id": 1, "category_id": 9},
    ]
    dataset, summary = load(write(tmp_path, items, images))
    assert summary.remarks == {
        "images dropped, their id came before": [1],
        "images dropped, no such file": [f"2 ({tmp_path / 'missing.png'})"],
        "images dropped, no id or file_name, at the positions": [3, 4],
        "annotations dropped, repeated": [1],
        "annotations dropped, no such image": [3, 4],
        "annotations dropped, no such category": [5, "position 15"],
        "annotations dropped, neither mask nor box": [6, 7],
        "annotations dropped, mask of another size than the image": [8],
        "annotations dropped, run lengths do not add up to the image": [9],
        "annotations dropped, outline far outside of the image": [10, 12],
        "annotations dropped, malformed": [11, 13, 14],
    }
    # The same id with another content is another annotation: many tools count from 1 per image.
    assert dataset.load_mask(0)[0].sum(axis=(0, 1)).tolist() == [36, 81]
    assert (summary.images, summary.annotations) == (1, 2)
    lines = str(summary).splitlines()
    assert lines[0].endswith("1 images (0 without objects), 2 annotations (0 crowds), 2 classes")
    assert "  2 annotations dropped, no such image: 3, 4" in lines
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
        ('{"images": [], "annotations": [], "categories": []}', "none of the 0 can be used"),
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


def test_damaged_run_lengths_are_an_error_with_the_image(tmp_path):
    damaged = annotation(segmentation={"size": [20, 30], "counts": "0000zz"})
    dataset, _ = load(write(tmp_path, [damaged]))
    with pytest.raises(ValueError, match="custom.1: run lengths"):
        dataset.ground_truth(0)
    with pytest.raises(ValueError, match="run lengths"):
        dataset.load_mask(0)


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
    item = TorchDataset(dataset, config)[0]
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


def standard_layout(root, subset, year=2017, images="val", ids=(1, 2)):
    """A tiny data set with COCO's categories in COCO's layout."""
    records = [{"id": i, "file_name": f"{i:012}.png", "height": 20, "width": 30} for i in ids]
    items = [annotation(i, image_id=i, category_id=90) for i in ids]
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    path = write(root / f"{images}{year}", items, records, categories)
    (root / "annotations").mkdir(exist_ok=True)
    path.rename(root / "annotations" / f"instances_{subset}{year}.json")


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


# --- Download ------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """Serves `server.files`, by path; answers are cut after server.cut bytes while that is set."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append((self.path, self.headers.get("Range")))
            content = server.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: server.cut])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.cut = {}, [], None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(coco_download, "COCO_URL", url)
    monkeypatch.setattr(coco_download, "MINIVAL_URL", url)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


IMAGES = "/zips/val2017.zip"
ANNOTATIONS = "/annotations/annotations_trainval2017.zip"


def whole_download():
    names = {f"val2017/{i}.jpg": bytes([i]) * 500 for i in range(3)}
    others = {"annotations/instances_train2017.json": b"{}", "annotations/captions.json": b"{}"}
    return {
        IMAGES: zipped(**{"val2017/": b""}, **names),
        ANNOTATIONS: zipped(**{"annotations/instances_val2017.json": b"[7]"}, **others),
    }


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


WHOLE = ["annotations/instances_val2017.json", *(f"val2017/{i}.jpg" for i in range(3))]


def test_download_fetches_what_is_missing(server, tmp_path):
    server.files = whole_download()
    coco_download.download(tmp_path / "coco", "val")
    assert tree(tmp_path / "coco") == WHOLE
    assert (tmp_path / "coco" / "val2017" / "2.jpg").read_bytes() == b"\2" * 500
    assert (tmp_path / "coco" / "annotations" / "instances_val2017.json").read_bytes() == b"[7]"
    coco_download.download(tmp_path / "coco", "val", 2017)
    assert server.requests == [(IMAGES, None), (ANNOTATIONS, None)]


def test_a_broken_download_is_resumed(server, tmp_path):
    server.files, server.cut = whole_download(), 700
    with pytest.raises(ConnectionError, match="cannot download .*val2017.zip .* which resumes it"):
        coco_download.download(tmp_path, "val")
    assert tree(tmp_path) == ["val2017.zip.part"]
    server.cut = None
    coco_download.download(tmp_path, "val")
    assert server.requests[1] == (IMAGES, "bytes=700-")
    assert tree(tmp_path) == WHOLE


def test_the_files_of_2014_have_their_own_places(server, tmp_path):
    server.files = {
        "/zips/val2014.zip": zipped(**{"val2014/1.jpg": b"1"}),
        f"/{coco_download.MINIVAL_FILES['minival']}": zipped(
            **{"instances_minival2014.json": b"{}"}
        ),
    }
    coco_download.download(tmp_path, "minival", "2014")
    assert tree(tmp_path) == ["annotations/instances_minival2014.json", "val2014/1.jpg"]


@pytest.mark.parametrize("name", ["val2017/../../evil.jpg", "val2017//../../../evil.jpg"])
def test_an_archive_that_writes_elsewhere_is_refused(server, tmp_path, name):
    server.files = {IMAGES: zipped(**{"val2017/1.jpg": b"1", name: b"evil"})}
    with pytest.raises(ValueError, match=r"must not be unpacked: it would write to .*evil.jpg"):
        coco_download.download(tmp_path / "a" / "b", "val")
    assert [path for path in tree(tmp_path) if not path.endswith(".part")] == []


def test_a_damaged_archive_is_deleted(server, tmp_path):
    server.files = whole_download()
    content = bytearray(server.files[IMAGES])
    content[content.index(b"\1" * 500) + 9] ^= 1
    server.files[IMAGES] = bytes(content)
    with pytest.raises(ValueError, match="val2017.zip arrived damaged .*CRC.* deleted; try again"):
        coco_download.download(tmp_path, "val")
    assert tree(tmp_path) == []
    server.files[IMAGES] = b"<html>no zip</html>"
    with pytest.raises(ValueError, match="arrived damaged"):
        coco_download.download(tmp_path, "val")
    assert tree(tmp_path) == []
    server.files[IMAGES] = zipped(**{"else/1.jpg": b"1"})
    with pytest.raises(ValueError, match="must hold val2017, which is not in it"):
        coco_download.download(tmp_path, "val")


def test_a_full_disk_is_noticed_before(server, tmp_path, monkeypatch):
    server.files = whole_download()
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(coco_download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="needs 1,500 bytes for val2017, has 100; make room"):
        coco_download.download(tmp_path, "val")
    assert tree(tmp_path) == ["val2017.zip.part"]


def test_a_missing_file_is_one_line(server, tmp_path, capsys):
    arguments = ["inspect", f"--dataset={tmp_path}", "--download=true"]
    assert coco.main(arguments) == 2
    error = capsys.readouterr().err
    assert "train2017.zip (HTTP Error 404" in error
    assert error.count("\n") == 1


# --- Command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network with COCO's classes that trains in a moment, as a checkpoint."""
    torch.manual_seed(0)
    options = {"POST_NMS_ROIS_INFERENCE": 20, "POST_NMS_ROIS_TRAINING": 20, "NUM_WORKERS": 0}
    config = TinyNetwork(NUM_CLASSES=81, VALIDATION_STEPS=1, **options)
    path = tmp_path_factory.mktemp("model") / "tiny.pth"
    weights.save_weights(MaskRCNN(config), path)
    return path


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    standard_layout(root, "train", images="train", ids=(1, 2, 3, 4))
    standard_layout(root, "val", ids=(5, 6))
    return root


def test_evaluate_prints_the_table_and_writes_the_results(checkpoint, layout, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["evaluate", f"--dataset={layout}", "--year=2017", f"--model={checkpoint}"]
    assert coco.main([*options, "--results", str(out), "--device=cpu", "--batch=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(out.read_text())
    assert lines[0].startswith(f"2 images, 2 objects, {len(results)} detections, ")
    assert lines[1].split() == [*evaluation.METRICS]
    assert [line.split()[0] for line in lines[2:4]] == ["bbox", "segm"]
    assert lines[-1].startswith("toothbrush")
    # All detections, as the original's InferenceConfig, though the file says 0.7.
    assert 0 < min(r["score"] for r in results) < 0.7
    assert {r["image_id"] for r in results} == {5, 6}
    assert {r["category_id"] for r in results} <= set(CATEGORY_IDS[1:])

    assert coco.main([*options, "--limit=1"]) == 0
    assert capsys.readouterr().out.startswith("1 images, 1 objects")


def test_train_resume_and_evaluate(checkpoint, layout, tmp_path, capsys):
    logs = tmp_path / "logs"
    common = [f"--dataset={layout}", f"--logs={logs}", "--device=cpu"]
    first = ["train", *common, "--steps=1", "--epochs=1", "--layers=heads", "--seed=3", "--lr=1e-5"]
    assert coco.main([*first, f"--model={checkpoint}", "--accumulate=2", "--workers=0"]) == 0
    (folder,) = logs.iterdir()
    assert folder.name.startswith("coco")
    assert (folder / "mask_rcnn_coco_0001.pth").is_file()
    saved = weights.read_options(folder / "mask_rcnn_coco_0001.pth")
    assert (saved["GRADIENT_ACCUMULATION"], saved["SEED"], saved["STEPS_PER_EPOCH"]) == (2, 3, 1)
    assert saved["BACKBONE"]["width"] == 8

    assert coco.main(["train", *common, "--model=last", "--epochs=2", "--layers=heads"]) == 0
    assert [path.name for path in logs.iterdir()] == [folder.name]
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["learning_rate"] == 1e-5
    for record in records:
        assert {"val_loss", "bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"} <= record.keys()
    before, after = (
        weights.read_state_dict(p).state_dict for p in (checkpoint, folder / "best.pth")
    )
    assert torch.equal(before["fpn.C2.0.conv1.weight"], after["fpn.C2.0.conv1.weight"])

    assert coco.main(["evaluate", *common, "--model=last"]) == 0
    assert "2 images" in capsys.readouterr().out


class OverfitConfig(Config):
    NAME = "overfit"
    NUM_CLASSES = 81
    IMAGES_PER_GPU = 5
    IMAGE_MIN_DIM = None
    IMAGE_MAX_DIM = 192
    BACKBONE = {"blocks": (1, 1, 1, 1), "width": 16}  # noqa: RUF012
    TOP_DOWN_PYRAMID_SIZE = 64
    RPN_CHANNELS = 64
    FPN_CLASSIF_FC_LAYERS_SIZE = 256
    RPN_ANCHOR_SCALES = (16, 32, 64, 96, 160)
    PRE_NMS_LIMIT = 500
    POST_NMS_ROIS_TRAINING = 100
    POST_NMS_ROIS_INFERENCE = 100
    TRAIN_ROIS_PER_IMAGE = 48
    OPTIMIZER = "adamw"
    LR_SCHEDULE = "cosine"
    WARMUP_STEPS = 20
    WEIGHT_DECAY = 0.0
    VALIDATION_STEPS = 0


@pytest.mark.slow
@needs_shared
def test_five_photographs_are_learned_by_heart(tmp_path):
    file = json.loads((MINI / "annotations" / "instances_train2017.json").read_text())
    chosen = {173350, 187334, 213148, 221184, 249346}  # dogs, sheep, breakfast, aeroplanes, a bear
    file["images"] = [image for image in file["images"] if image["id"] in chosen]
    file["annotations"] = [a for a in file["annotations"] if a["image_id"] in chosen]
    path = tmp_path / "five.json"
    path.write_text(json.dumps(file))
    torch.manual_seed(0)
    weights.save_weights(MaskRCNN(OverfitConfig()), tmp_path / "random.pth")
    data = f"--images={MINI / 'train2017'} --annotations={path} --val-annotations={path}"
    options = f"--model={tmp_path / 'random.pth'} --logs={tmp_path} --device=cpu --workers=0"
    run = f"train {data} {options} --epochs=3 --steps=60 --layers=all --seed=0"
    assert coco.main(run.split()) == 0
    (history,) = tmp_path.glob("coco*/history.jsonl")
    record = json.loads(history.read_text().splitlines()[-1])
    assert record["segm_AP50"] > 0.9
    assert record["bbox_AP50"] > 0.9


def test_a_damaged_last_checkpoint_is_passed_over(checkpoint, layout, tmp_path):
    folder = tmp_path / "logs" / "coco20260101T000000"
    folder.mkdir(parents=True)
    content = checkpoint.read_bytes()
    (folder / "mask_rcnn_coco_0001.pth").write_bytes(content)
    (folder / "mask_rcnn_coco_0002.pth").write_bytes(content[: len(content) // 2])
    args = argparse.Namespace(model="last", logs=tmp_path / "logs")
    assert coco.model_file(args) == folder / "mask_rcnn_coco_0001.pth"
    (folder / "mask_rcnn_coco_0001.pth").unlink()
    with pytest.raises(ValueError, match="none of the checkpoints can be read: .*0002.pth"):
        coco.model_file(args)


def test_an_image_that_a_worker_cannot_read_is_named_in_one_line(checkpoint, tmp_path, capsys):
    standard_layout(tmp_path, "train", images="train", ids=(1,))
    standard_layout(tmp_path, "val", ids=(5,))
    (image,) = (tmp_path / "train2017").iterdir()
    image.write_bytes(b"no picture")
    run = ["train", f"--dataset={tmp_path}", f"--model={checkpoint}", "--device=cpu", "--workers=1"]
    assert coco.main([*run, "--steps=1", "--epochs=1", f"--logs={tmp_path / 'logs'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"coco.py: image coco.1 ({image}) cannot be used")


class Recorder:
    """Takes the place of MaskRCNN.train_model."""

    def __init__(self, monkeypatch, error=None):
        self.calls, self.error = [], error
        recorder = self

        def train_model(model, train, val, learning_rate, epochs, layers, **options):
            recorder.model, recorder.train, recorder.val, recorder.options = (
                model,
                train,
                val,
                options,
            )
            recorder.calls.append((layers, epochs, learning_rate))
            if recorder.error:
                raise recorder.error

        monkeypatch.setattr(MaskRCNN, "train_model", train_model)


def test_the_stages_of_the_original(checkpoint, layout, tmp_path, monkeypatch):
    run = ["train", f"--dataset={layout}", f"--model={checkpoint}", f"--logs={tmp_path}"]
    recorder = Recorder(monkeypatch)
    assert coco.main(run) == 0
    expected = [("heads", 40, 0.001), ("4+", 120, 0.001), ("all", 160, pytest.approx(0.0001))]
    assert recorder.calls == expected
    assert recorder.train.num_images == 4
    assert recorder.val.num_images == 2
    assert recorder.options["augmentation"] is coco.horizontal_flip
    metrics = recorder.options["evaluate"](recorder.model)
    assert [*metrics] == ["bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"]

    recorder.calls.clear()
    assert coco.main([*run, "--layers=5+", "--lr=0.02"]) == 0
    assert coco.main([*run, "--epochs=7", "--image-dim=192", "--batch=4"]) == 0
    assert recorder.calls == [("5+", 40, 0.02), ("all", 7, 0.001)]
    config = recorder.model.config
    assert (config.IMAGE_MAX_DIM, config.IMAGE_MIN_DIM, config.IMAGES_PER_GPU) == (192, 150, 4)
    assert config.NAME == "coco"


def test_the_seed_comes_before_the_weights(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "CocoConfig", type("Small", (TinyNetwork,), {"NAME": "coco"}))
    recorder = Recorder(monkeypatch)
    found = []
    for seed in (1, 1, 2):
        arguments = ["train", f"--dataset={layout}", "--model=random", f"--seed={seed}"]
        assert coco.main([*arguments, f"--logs={tmp_path}"]) == 0
        found.append(recorder.model.fpn.C1[0].weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_own_classes_start_anew(checkpoint, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "photos", [annotation(), annotation(2, image_id=2, category_id=3)])
    own = ["--images", str(path.parent), "--annotations", str(path)]
    recorder = Recorder(monkeypatch)
    logs = f"--logs={tmp_path}"
    assert coco.main(["train", *own, f"--model={checkpoint}", "--seed=1", logs]) == 0
    assert recorder.val is None
    assert recorder.options["evaluate"] is None
    assert "6 excluded" in capsys.readouterr().out
    model = recorder.model
    assert model.config.NUM_CLASSES == 3
    stored = weights.read_state_dict(checkpoint).state_dict
    for name, tensor in model.state_dict().items():
        own_layer = name.rpartition(".")[0] in coco.CLASS_LAYERS
        assert (stored[name].shape != tensor.shape) == own_layer
        if not own_layer:
            assert torch.equal(stored[name], tensor)

    val = ["--val-images", str(path.parent), "--val-annotations", str(path)]
    assert coco.main(["train", *own, *val, f"--model={checkpoint}", logs]) == 0
    assert recorder.val.num_images == 2
    assert coco.main(["evaluate", *own, f"--model={checkpoint}"]) == 2
    error = capsys.readouterr().err
    assert "classes of the data set, 3 with the background, got 81" in error


def own_data(folder, count, categories=None):
    """Options for photographs in COCO's format, each of which shows two objects."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in range(count)]
    items = [annotation(2 * i + j, i, (3, 7)[j]) for i in range(count) for j in (0, 1)]
    path = write(folder, items, images, categories)
    return ["--images", str(folder), "--annotations", str(path)]


def test_a_fifth_of_own_images_is_kept_to_validate_with(checkpoint, tmp_path, monkeypatch, capsys):
    recorder = Recorder(monkeypatch)

    def kept(*options, count=11):
        run = ["train", *own_data(tmp_path / "photos", count), f"--model={checkpoint}", *options]
        assert coco.main([*run, f"--logs={tmp_path}"]) == 0
        parts = [{i["id"] for i in part.image_info} for part in (recorder.train, recorder.val)]
        assert parts[0] | parts[1] == set(range(count))
        assert not parts[0] & parts[1]
        return parts[1]

    first = kept()
    assert len(first) == 2
    assert recorder.options["evaluate"](recorder.model).keys() >= {"segm_AP"}
    assert kept("--seed=0") == first  # SEED of the file
    assert kept("--seed=1") != first
    assert len(kept("--val-share=0.5")) == 5
    for options in (["--val-share=0"], ["--val-annotations", str(tmp_path / "photos.json")]):
        run = ["train", *own_data(tmp_path / "photos", 11), f"--model={checkpoint}", *options]
        if "--val-annotations" in options:
            shutil.copy(tmp_path / "photos" / "annotations.json", options[1])
        assert coco.main([*run, f"--logs={tmp_path}"]) == 0
        assert recorder.train.num_images == 11
    assert recorder.val.num_images == 11


def test_the_stages_of_own_data(checkpoint, tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    logs = [f"--logs={tmp_path}", f"--model={checkpoint}"]
    run = ["train", *own_data(tmp_path / "photos", 5), *logs]
    assert coco.main(run) == 0
    assert recorder.calls == [("heads", 10, 0.001), ("all", 30, pytest.approx(0.0001))]
    assert recorder.model.config.STEPS_PER_EPOCH == 100
    assert coco.main([*run, "--steps=7"]) == 0
    assert recorder.model.config.STEPS_PER_EPOCH == 7
    recorder.calls.clear()
    assert coco.main([*run, "--epochs=3"]) == 0
    assert recorder.calls == [("all", 3, 0.001)]
    run = ["train", *own_data(tmp_path / "many", 260), *logs, "--batch=1", "--accumulate=2"]
    assert coco.main([*run, "--val-share=0.01"]) == 0
    assert recorder.model.config.STEPS_PER_EPOCH == 129  # half of 258


def test_a_run_of_own_data_goes_on_as_it_began(checkpoint, tmp_path):
    run = ["train", *own_data(tmp_path / "photos", 6), f"--logs={tmp_path / 'logs'}"]
    first = [f"--model={checkpoint}", "--epochs=1", "--steps=1", "--seed=4", "--layers=heads"]
    assert coco.main([*run, *first, "--device=cpu"]) == 0
    assert coco.main([*run, "--model=last", "--epochs=2", "--layers=heads", "--device=cpu"]) == 0
    (folder,) = (tmp_path / "logs").iterdir()
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(record["epoch"], record["steps"]) for record in records] == [(1, 1), (2, 1)]
    assert all("segm_AP" in record for record in records)


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


def test_from_via_to_numbers(checkpoint, tmp_path, capsys):
    logs, photos = f"--logs={tmp_path / 'logs'}", tmp_path / "photos"
    data = [*write_via(photos, ["nut", "fig"]), "--class-attribute=kind"]
    assert coco.main(["inspect", *data, f"--output={tmp_path / 'sheet.png'}"]) == 0
    assert "12 objects, 0 crowds, of 2 classes:\n        6 fig\n" in capsys.readouterr().out
    assert utils.load_image(tmp_path / "sheet.png").std() > 10

    run = ["train", *data, f"--model={checkpoint}", logs, "--epochs=1", "--steps=1", "--device=cpu"]
    assert coco.main(run) == 0
    (best,) = tmp_path.glob("logs/coco*/best.pth")
    assert weights.read_options(best)["CLASS_NAMES"] == ["BG", "fig", "nut"]
    (record,) = map(json.loads, (best.parent / "history.jsonl").read_text().splitlines())
    assert "segm_AP" in record  # one of the six images was kept

    # A file without figs: its nuts are still the second class.
    nuts = [*write_via(photos, ["nut"], "nuts.json"), "--class-attribute=kind"]
    capsys.readouterr()
    for model in (best, "last"):
        assert coco.main(["evaluate", *nuts, f"--model={model}", logs]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("6 images, 6 objects")
        assert [line.split()[0] for line in lines[lines.index("") + 2 :]] == ["nut"]
    dates = [*write_via(photos, ["date"], "dates.json"), "--class-attribute=kind"]
    assert coco.main(["evaluate", *dates, f"--model={best}"]) == 2
    error = capsys.readouterr().err
    assert "0.png, region 0 must be of a class in ['fig', 'nut'], got 'date'" in error


def test_validation_data_of_via_have_the_classes_of_the_training_data(
    checkpoint, tmp_path, monkeypatch, capsys
):
    recorder = Recorder(monkeypatch)
    data = [*write_via(tmp_path, ["nut", "fig"]), "--class-attribute=kind"]
    run = ["train", *data, f"--model={checkpoint}", f"--logs={tmp_path}"]
    write_via(tmp_path, ["nut"], "val.json", count=2)
    assert coco.main([*run, "--val-annotations", str(tmp_path / "val.json")]) == 0
    assert recorder.train.num_images == 6
    assert recorder.val.num_images == 2
    assert recorder.val.class_names == ["BG", "fig", "nut"]
    assert recorder.val.load_mask(0)[1].tolist() == [2]
    write_via(tmp_path, ["date"], "val.json", count=2)
    assert coco.main([*run, "--val-annotations", str(tmp_path / "val.json")]) == 2
    assert "must be of a class in ['fig', 'nut'], got 'date'" in capsys.readouterr().err


def test_from_labelme_to_numbers(checkpoint, tmp_path, capsys):
    data, logs = write_labelme(tmp_path / "photos"), f"--logs={tmp_path / 'logs'}"
    assert coco.main(["inspect", *data, f"--output={tmp_path / 'sheet.png'}"]) == 0
    assert "12 objects, 0 crowds, of 2 classes:\n        6 fig\n" in capsys.readouterr().out
    run = ["train", *data, f"--model={checkpoint}", logs, "--epochs=1", "--steps=1", "--device=cpu"]
    assert coco.main(run) == 0
    (best,) = tmp_path.glob("logs/coco*/best.pth")
    assert weights.read_options(best)["CLASS_NAMES"] == ["BG", "fig", "nut"]
    capsys.readouterr()
    assert coco.main(["evaluate", *data, f"--model={best}"]) == 0
    assert capsys.readouterr().out.startswith("6 images, 12 objects")


def test_the_coco_weights_know_their_classes(checkpoint, tmp_path, monkeypatch, capsys):
    # As of the published file: 81 classes, and no names in it.
    monkeypatch.setattr(weights, "find_weights", lambda name, backbone=None: checkpoint)
    data = write_via(tmp_path, ["toothbrush"])
    run = ["evaluate", *data, "--class-attribute=kind", "--model=coco"]
    assert coco.main(run) == 0
    output = capsys.readouterr().out
    assert output.startswith("6 images, 6 objects")
    assert output.splitlines()[-1].startswith("toothbrush")


def test_classes_are_told_apart_by_name(checkpoint, tmp_path, monkeypatch, capsys, caplog):
    item = annotation(category_id=1)
    paths = [
        write(tmp_path / name, [item], categories=[{"id": 1, "name": name}, {"id": 2, "name": "b"}])
        for name in ("a", "c")
    ]
    data = [f"--images={path.parent} --annotations={path} --logs={tmp_path}" for path in paths]
    run = f"--model={checkpoint} --epochs=1 --steps=1 --device=cpu"
    assert coco.main(f"train {data[0]} {run}".split()) == 0
    (best,) = tmp_path.glob("coco*/best.pth")
    assert weights.read_options(best)["CLASS_NAMES"] == ["BG", "a", "b"]

    assert coco.main(f"evaluate {data[0]} --model=last".split()) == 0
    assert "trained on other classes" not in caplog.text
    assert coco.main(f"evaluate {data[1]} --model=last".split()) == 0
    assert "trained on other classes, a, b, than those of the data, c, b" in caplog.text

    capsys.readouterr()
    assert coco.main(f"train {data[1]} --model=last".split()) == 2
    error = capsys.readouterr().err
    assert "must have the classes of" in error
    assert "['BG', 'a', 'b'], got ['BG', 'c', 'b']; start a new run" in error
    Recorder(monkeypatch)
    for text, count in zip(data, (0, 6), strict=True):
        assert coco.main(f"train {text} --model={best}".split()) == 0
        out = capsys.readouterr().out
        assert ("6 excluded" in out) == (count == 6)


def test_an_interrupt_says_where_the_checkpoint_is(
    checkpoint, layout, tmp_path, monkeypatch, capsys
):
    run = ["train", f"--dataset={layout}", f"--model={checkpoint}", f"--logs={tmp_path}"]
    Recorder(monkeypatch, KeyboardInterrupt("saved logs/x_0003.pth"))
    assert coco.main(run) == 130
    error = capsys.readouterr().err
    assert "interrupted: saved logs/x_0003.pth; go on with --model=last\n" in error


def test_inspect_counts_and_draws(layout, tmp_path, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    assert (
        coco.main(["inspect", f"--dataset={layout}", f"--output={sheet}", "--image-dim=128"]) == 0
    )
    text = capsys.readouterr().out
    assert "4 of 4 images, 0 of which cannot be used" in text
    assert "4 objects, 0 crowds, of 80 classes:\n        4 toothbrush\n" in text
    assert utils.load_image(sheet).std() > 10


@pytest.mark.parametrize("command", ["train", "evaluate", "inspect"])
def test_help_shows_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as ended:
        coco.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out.replace("\\\n", " ")
    examples = [
        line.split() for line in text.splitlines() if line.startswith(("  python", "  torchrun"))
    ]
    assert len(examples) >= 2
    for example in examples:
        arguments = example[example.index("coco.py") + 1 :]
        args = coco.build_parser().parse_args(arguments)
        coco.check(args)
        assert args.command == command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "--model"),
        ("train --model=coco", "the data must be --dataset, or --images and --annotations"),
        ("train --model=coco --dataset=a --annotations=b", "the data must be --dataset, or"),
        ("train --model=coco --images=a", "the data must be --dataset, or --images and"),
        ("train --model=coco --annotations=a", "--images and --annotations must come together"),
        ("train --model=coco --images=a --annotations=a --year=2014", "are for --dataset"),
        ("train --model=coco --images=a --annotations=a --download", "are for --dataset"),
        ("train --model=coco --dataset=a --val-annotations=b", "are for --annotations"),
        ("train --model=coco --images=a --annotations=a --val-images=b", "--val-annotations"),
        ("train --model=coco --dataset=a --format=via", "are for --annotations"),
        ("train --model=coco --dataset=a --class-attribute=b", "are for --annotations"),
        ("inspect --images=a --annotations=b --class-attribute=c", "is for --format via"),
        ("inspect --images=a --annotations=b --format=voc", "invalid choice: 'voc'"),
        ("train --model=coco --dataset=a --val-share=0.1", "--val-share is for --annotations"),
        (
            "train --model=coco --images=a --annotations=b --val-share=0.1 --val-annotations=c",
            "--val-share is for --annotations without --val-annotations",
        ),
        ("train --model=coco --images=a --annotations=b --val-share=20", "from 0 to 1, got '20'"),
        ("inspect --images=a --annotations=b.json --format=via", "b.json"),
        ("evaluate --model=coco --dataset=a --backbone=resnet50", "unrecognized arguments"),
        ("train --model=coco --dataset=a --year=2015", "invalid choice: '2015'"),
        ("train --model=coco --dataset=a --download=perhaps", "must be true or false"),
        ("train --model=coco --dataset=a --batch=0", "--batch: must be a whole number from 1"),
        ("train --model=coco --dataset=a --lr=-1", "--lr: must be a number above 0, got '-1'"),
        ("train --model=coco --dataset=a --lr=fast", "--lr: must be a number above 0"),
        ("train --model=coco --dataset=a --amp=fp8", "invalid choice: 'fp8'"),
        ("train --model=coco --dataset=a --device=toaster", "--device: must be cpu, cuda"),
        ("train --model=coco --dataset=a --image-dim=1000", "use 960 or 1024"),
        ("train --model=nothing.pth --dataset=a", "no weight file nothing.pth"),
        ("train --model=last --dataset=a --logs=nowhere", "no checkpoint of a run named 'coco'"),
        ("train --model=random --dataset=nowhere", "no annotation file nowhere/annotations/inst"),
        ("evaluate --model=imagenet --dataset=a", "evaluate needs a trained model"),
        ("evaluate --model=coco --dataset=a --limit=-1", "--limit: must be a whole number from 0"),
        ("evaluate --model=coco --dataset=a --epochs=3", "unrecognized arguments: --epochs=3"),
        ("inspect --images=a --annotations=b.json", "no annotation file b.json"),
        ("dance", "invalid choice: 'dance'"),
        ("", "required: COMMAND"),
    ],
)
def test_bad_arguments_get_one_line_and_status_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = coco.main(arguments.split())
    except SystemExit as ended:  # how argparse leaves
        status = ended.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert captured.err.startswith("coco.py: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_download_is_not_for_many_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["train", "--model=random", f"--dataset={tmp_path}"]
    assert coco.main([*options, "--download"]) == 2
    assert "must not run under torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--download"], True),
        (["--download=True"], True),
        (["--download=false"], False),
        (["--download", "no"], False),
    ],
)
def test_download_is_a_flag_or_a_word(arguments, expected):
    args = coco.build_parser().parse_args(["inspect", "--dataset=a", *arguments])
    assert args.download is expected
