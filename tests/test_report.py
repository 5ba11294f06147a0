"""The pages of report/: matches against cases by hand and slow loops, numbers against pycocotools,
and the pages themselves in a browser.
"""

import html.parser
import json
import re
import shutil
import sys
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from annotation_files import own_data
from conftest import SHARED, TinyNetwork, needs_shared
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_evaluation import (
    SCENES,
    Oracle,
    Squares,
    as_text,
    noisy_result,
    result_of,
    truth_as_result,
)

import coco
import evaluation
import inspection
import report
import utils
import weights
from model import MaskRCNN
from report import charts, mistakes, pages, pictures
from report.mistakes import FALSE, FOUND, IGNORED, MISSED, POOR, WRONG

pytest.importorskip("jinja2", reason="the extra [report] is not installed")

# pycocotools and numpy 2 disagree about __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MINI = SHARED / "data" / "coco_mini"


def mask(y1, x1, y2, x2):
    full = np.zeros((60, 80), bool)
    full[y1:y2, x1:x2] = True
    return full


def instance(class_id, *box):
    return evaluation.instance(class_id, utils.rle_encode(mask(*box)))


def found(*detections):
    """A result of (class id, score, box or mask)."""
    masks = [d[2] if isinstance(d[2], np.ndarray) else mask(*d[2]) for d in detections]
    boxes = [utils.extract_bboxes(m[:, :, None])[0] for m in masks]
    rles = [utils.rle_encode(m) for m in masks]
    return result_of(boxes, [d[0] for d in detections], [d[1] for d in detections], rles)


# --- What belongs together -----------------------------------------------------------------------


def test_every_kind_by_hand():
    truth = [
        instance(1, 0, 0, 10, 10),  # found
        instance(1, 0, 20, 10, 30),  # detected with 6 of 10 rows: a poor mask
        instance(2, 0, 40, 10, 50),  # detected as 1
        instance(2, 30, 0, 40, 10),  # missed
        instance(-1, 30, 40, 60, 80),
    ]
    result = found(
        (1, 0.5, (0, 0, 10, 9)),
        (1, 0.9, (0, 20, 6, 30)),
        (1, 0.8, (0, 40, 10, 50)),
        (2, 0.7, (45, 0, 55, 10)),  # false
        (1, 0.6, (1, 0, 10, 10)),  # found, before the one of 0.5, which is false then
        (1, 0.4, (35, 45, 45, 55)),  # in the crowd
        (2, 0.3, (35, 60, 45, 70)),  # in the crowd of another class: false
    )
    judgement = mistakes.judge(truth, result)
    assert judgement.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert judgement.matches.tolist() == [1, 2, -1, 0, -1, -1, -1]
    np.testing.assert_allclose(judgement.ious, [0.6, 1, 0, 0.9, 0, 0, 0])
    kinds = judgement.kinds(0)
    assert kinds.detections.tolist() == [POOR, WRONG, FALSE, FOUND, FALSE, IGNORED, FALSE]
    assert kinds.objects.tolist() == [FOUND, POOR, WRONG, MISSED]
    # (0.6 + 0.9) / (two pairs of one class + one of two classes + half of three false and a missed)
    assert kinds.quality == pytest.approx(1.5 / 5)
    counts = mistakes.confusion([kinds], 3)
    assert counts.tolist() == [[0, 1, 2], [0, 2, 0], [1, 1, 0]]

    kinds = judgement.kinds(0.75)
    assert kinds.detections.tolist() == [POOR, WRONG, *[IGNORED] * 5]
    assert kinds.objects.tolist() == [MISSED, POOR, WRONG, MISSED]
    assert mistakes.confusion([kinds], 3).tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 0]]


def test_a_mask_that_fits_nothing_is_poor_if_the_box_fits_its_class():
    frame = mask(0, 0, 20, 20)
    frame[2:18, 2:18] = False
    truth = [instance(1, 0, 0, 20, 20)]
    kinds = [
        mistakes.judge(truth, found((class_id, 0.9, frame))).kinds(0).detections.tolist()
        for class_id in (1, 2)
    ]
    assert kinds == [[POOR], [FALSE]]
    # The mask that fits is taken, whatever the class of the box.
    judgement = mistakes.judge([*truth, instance(2, 0, 0, 18, 20)], found((2, 0.9, frame)))
    assert judgement.matches.tolist() == [1]


def test_of_two_objects_of_one_shape_that_of_the_class_is_taken():
    truth = [instance(1, 0, 0, 20, 20), instance(2, 0, 0, 20, 20)]
    judgement = mistakes.judge(truth, found((2, 0.9, (0, 0, 20, 20)), (1, 0.8, (0, 0, 20, 20))))
    assert judgement.matches.tolist() == [1, 0]


def test_nothing_beside_nothing_is_right():
    kinds = mistakes.judge([], result_of([], [], [], [])).kinds(0.5)
    assert kinds.quality == 1
    assert mistakes.confusion([kinds], 3).sum() == 0
    assert mistakes.judge([], found((1, 0.9, (0, 0, 9, 9)))).kinds(0.5).quality == 0


def slow_kinds(truth, result, score):
    """Of (object, detection) the pairs with their classes, by loops over whole masks."""
    objects = [i for i in truth if not i["iscrowd"]]
    free = set(range(len(objects)))
    pairs = []
    for d in np.argsort(-result["scores"], kind="stable"):
        if result["scores"][d] < score:
            continue
        pixels = utils.rle_decode(result["masks"][d])
        best, best_iou = None, 0
        for g in sorted(free):
            other = utils.rle_decode(as_text(objects[g]["segmentation"]))
            iou = (pixels & other).sum() / max(1, (pixels | other).sum())
            if iou >= 0.5 and iou > best_iou:
                best, best_iou = g, iou
        class_id = int(result["class_ids"][d])
        if best is not None:
            free.remove(best)
            pairs.append((objects[best]["category_id"], class_id))
            continue
        covered = [
            (pixels & utils.rle_decode(as_text(i["segmentation"]))).sum() >= 0.5 * pixels.sum()
            for i in truth
            if i["iscrowd"] and i["category_id"] == class_id
        ]
        if not any(covered):
            pairs.append((0, class_id))
    return sorted([*pairs, *((objects[g]["category_id"], 0) for g in free)])


def test_matches_are_those_of_slow_loops():
    rng = np.random.default_rng(0)
    compared = 0
    for n in range(12):
        scene = [
            (int(rng.choice((1, 2, 2, -1))), *(int(v) for v in rng.integers(0, (40, 60))), 14)
            for _ in range(rng.integers(0, 9))
        ]
        dataset = Squares(scene)
        truth, result = evaluation.ground_truth(dataset, 0), noisy_result(dataset, 0)
        if len(result["scores"]):
            result["scores"] = rng.permutation(len(result["scores"])).astype(np.float32) / 10
        for score in (0, 0.2, 0.5):
            kinds = mistakes.judge(truth, result).kinds(score)
            pairs = sorted((t, p) for _, t, p in kinds.pairs.tolist())
            assert pairs == slow_kinds(truth, result, score), n
            compared += len(pairs)
            expected = np.zeros((3, 3), int)
            for t, p in pairs:
                expected[t, p] += 1
            np.testing.assert_array_equal(mistakes.confusion([kinds], 3), expected)
    assert compared > 50


def test_precision_and_recall_by_score_are_those_of_pycocotools(capsys):
    """Of one class and of masks that are boxes, COCO's matches at an IoU of 0.5 are ours."""
    rng = np.random.default_rng(1)
    scenes = [
        [(1, int(y), int(x), 12) for y, x in zip(*rng.integers(0, 48, (2, 6)), strict=True)]
        for _ in range(8)
    ]
    dataset = Squares(*scenes, names=("brick",))
    model = Oracle(dataset, lambda i: noisy_result(dataset, i))
    result = evaluation.evaluate_coco(model, dataset, verbose=0)
    images = [{"id": i, "height": 60 + i, "width": 80} for i in result.truth]
    objects = [{"image_id": i, **a} for i, instances in result.truth.items() for a in instances]
    numbers = {info["id"]: i for i, info in enumerate(dataset.image_info)}
    detections = [
        {**r, "image_id": numbers[r["image_id"]], "category_id": 1, "iscrowd": 0, "area": 1}
        for r in result.results
    ]
    truth, dets = COCO(), COCO()
    for index, items in ((truth, objects), (dets, detections)):
        index.dataset = {
            "images": images,
            "categories": [{"id": 1}],
            "annotations": [{**item, "id": n} for n, item in enumerate(items, start=1)],
        }
        index.createIndex()
    reference = COCOeval(truth, dets, "segm")
    reference.evaluate()
    capsys.readouterr()
    matched = [e for e in reference.evalImgs if e and e["aRng"] == [0, 1e10]]
    scores = np.concatenate([e["dtScores"] for e in matched])
    right = np.concatenate([e["dtMatches"][0] > 0 for e in matched])
    levels = np.arange(21) / 20
    judgements = [mistakes.judge(t, result.detections[i]) for i, t in result.truth.items()]
    curve = mistakes.score_curve(judgements, levels)
    for n, level in enumerate(levels):
        counted = scores >= level
        if counted.any():
            assert curve.precision[n] == pytest.approx(right[counted].mean())
        assert curve.recall[n] == pytest.approx(right[counted].sum() / 48)
    assert 0.1 < curve.f1.max() < 1
    p, r = curve.precision[5], curve.recall[5]
    assert curve.f1[5] == pytest.approx(2 * p * r / (p + r))


# --- The page and its files ----------------------------------------------------------------------


def unpacked(data):
    """The data of a page with [kind, class, other class, count] for the items of each image."""
    kinds, classes = len(data["kinds"]), len(data["classes"])
    for row in data["images"]:
        items = []
        for number in row[9]:
            if number < 0:
                items[-1][3] = -number
            else:
                pair, kind = divmod(number, kinds)
                items.append([kind, *divmod(pair, classes), 1])
        row[9] = items
    return data


def data_of(browser):
    return unpacked(json.loads(select(browser, "#data")[0].get_attribute("textContent")))


class Page(html.parser.HTMLParser):
    """What a page holds: text of each table, elements, links, the data of its script."""

    def __init__(self, folder):
        super().__init__()
        self.tags, self.links, self.tables, self.text, self.names = [], [], [], "", set()
        self._script = None
        self.feed((folder / "index.html").read_text("utf-8"))
        self.tables = [[row for row in table if row] for table in self.tables]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.names.add(attributes.get("id"))
        self.links += [attributes[a] for a in ("href", "src") if a in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self._script = attributes.get("id", "code")

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None
        elif tag == "table":
            self.tables[-1].append([])

    def handle_data(self, text):
        if self._script == "data":
            self.data = unpacked(json.loads(text))
        elif self._script is None:
            self.text += text
            if self.tables and self.tables[-1] and self.tables[-1][-1]:
                self.tables[-1][-1][-1] += text.strip()


@pytest.fixture(scope="module")
def mini():
    if not MINI.exists():
        pytest.skip("../shared/data/coco_mini is not there")
    dataset = coco.CocoDataset()
    dataset.load_coco(MINI, "val")
    dataset.prepare()
    model = Oracle(dataset, lambda i: noisy_result(dataset, i))
    return dataset, evaluation.evaluate_coco(model, dataset, verbose=0)


@needs_shared
def test_numbers_of_the_page_are_those_of_pycocotools(mini, tmp_path, capsys):
    dataset, result = mini
    report.write_evaluation(tmp_path, dataset, result, pictures=1)
    page = Page(tmp_path)
    metrics, classes, _ = page.tables
    for column, kind in ((2, "segm"), (3, "bbox")):
        truth = COCO(str(MINI / "annotations" / "instances_val2017.json"))
        dets = [{k: v for k, v in r.items() if k != "bbox"} for r in result.results]
        reference = COCOeval(truth, truth.loadRes(dets if kind == "segm" else result.results), kind)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
        assert [row[column] for row in metrics[1:]] == [f"{v:.3f}" for v in reference.stats]
        precision = reference.eval["precision"][:, :, :, 0, 2]
        by_name = {row[0]: row for row in classes[1:]}
        for k, name in enumerate(coco.CLASS_NAMES[1:]):
            values = precision[:, :, k]
            if name in by_name:
                ap = "\N{EN DASH}" if values.max() == -1 else f"{values.mean():.3f}"
                assert by_name[name][1 if kind == "segm" else 3] == ap
            else:
                assert values.max() == -1
    capsys.readouterr()
    objects = {row[0]: int(row[5]) for row in classes[1:]}
    assert sum(objects.values()) == result.objects
    # What the page lists of the images adds up to its table.
    items = [item for row in page.data["images"] for item in row[9]]
    for name, row in by_name.items():
        class_id = coco.CLASS_NAMES.index(name)
        counts = [
            sum(n for kind, t, _, n in items if t == class_id and kind in kinds)
            for kinds in ((FOUND, POOR), (WRONG,), (MISSED,))
        ]
        assert [int(v) for v in row[6:9]] == counts
    assert objects["person"] == sum(
        i["category_id"] == 1 and not i["iscrowd"] for t in result.truth.values() for i in t
    )


@needs_shared
def test_images_are_sorted_and_all_are_listed(mini, tmp_path):
    dataset, result = mini
    report.write_evaluation(tmp_path, dataset, result, score=0.3, pictures=4)
    rows = Page(tmp_path).data["images"]
    assert len(rows) == dataset.num_images
    assert {row[0] for row in rows} == {str(info["id"]) for info in dataset.image_info}
    qualities = [row[7] for row in rows]
    assert qualities == sorted(qualities)
    assert [row[4] >= 0 for row in rows] == [True] * 4 + [False] * (len(rows) - 4)
    for row in rows:
        image_id = next(i for i, info in enumerate(dataset.image_info) if str(info["id"]) == row[0])
        counted = sum(item[3] for item in row[9] if item[0] != MISSED)
        scores = result.detections[image_id]["scores"]
        assert counted <= (scores >= 0.3).sum()
        objects = sum(item[3] for item in row[9] if item[1])
        assert objects == sum(not i["iscrowd"] for i in result.truth[image_id])
    names = {f"{row[4]}{end}" for row in rows[:4] for end in (".jpg", "-truth.svg", "-found.svg")}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names


EVIL = ["</script><b>&'\"", 'a "class" <i>']
FILES = ["a b#c?.png", "ünï %41.png", "<i>&amp;'.png"]


class Files(Squares):
    """Squares in files with names that need care."""

    def __init__(self, folder, *scenes, names=EVIL):
        super().__init__(*scenes, names=names)
        folder.mkdir()
        for i, info in enumerate(self.image_info):
            stem = FILES[i % len(FILES)]
            info["path"] = folder / (stem if i < len(FILES) else f"{i} {stem}")
            info["id"] = f"{i}/#<'> é"
            Image.fromarray(Squares.load_image(self, i)).save(info["path"])

    def load_image(self, image_id):
        return utils.Dataset.load_image(self, image_id)


def test_names_are_escaped_and_links_lead_to_the_files(tmp_path):
    dataset = Files(tmp_path / "photos #1", *SCENES)
    model = Oracle(dataset, lambda i: noisy_result(dataset, i))
    result = evaluation.evaluate_coco(model, dataset, verbose=0)
    report.write_evaluation(tmp_path / "a" / "report", dataset, result, title="</title><b>")
    report.write_inspection(
        tmp_path / "b", inspection.survey(dataset, TinyNetwork(NUM_CLASSES=3)), problems=["<b>x"]
    )
    for folder in (tmp_path / "a" / "report", tmp_path / "b"):
        page = Page(folder)
        assert page.tags.count("script") == 2  # nothing of a name has become an element
        assert not {"b", "i"} & set(page.tags)
        assert page.data["classes"][1:] == EVIL
        assert EVIL[0] in page.text
        paths = set()
        for row in page.data["images"]:
            link = urllib.parse.urlparse(f"{page.data['folders'][row[2]]}/{row[3] or row[1]}")
            assert not link.fragment
            assert not link.query
            paths.add((folder / urllib.parse.unquote(link.path)).resolve())
        assert paths == {info["path"].resolve() for info in dataset.image_info}
        assert {row[0] for row in page.data["images"]} == {i["id"] for i in dataset.image_info}
    assert "<b>x" in page.text


def test_images_of_two_sources_with_one_id_are_told_apart(tmp_path):
    dataset = Squares(*SCENES)
    dataset.add_class("other", 1, "stone")
    dataset.add_image("other", "s0", None, scene=[(3, 5, 5, 9)])
    dataset.prepare()
    model = Oracle(dataset, lambda i: truth_as_result(dataset, i))
    report.write_evaluation(
        tmp_path, dataset, evaluation.evaluate_coco(model, dataset, verbose=0), pictures=1
    )
    names = {row[0]: row[2] for row in Page(tmp_path).data["images"]}
    assert names == dict.fromkeys(["toy.s0", "s1", "s2", "s3", "other.s0"], -1)


def test_where_there_is_no_number_there_is_a_dash(tmp_path):
    dataset = Squares([], [(-1, 3, 3, 30)])
    rle = utils.rle_encode(np.ones((60, 80), bool))
    nothing, something = result_of([], [], [], []), result_of([[0, 0, 60, 80]], [1], [0.9], [rle])
    for answer, said in ((lambda i: nothing, "no object to find"), (lambda i: something, "false")):
        result = evaluation.evaluate_coco(Oracle(dataset, answer), dataset, verbose=0)
        report.write_evaluation(tmp_path, dataset, result)
        page = Page(tmp_path)
        assert {cell for row in page.tables[0][1:] for cell in row[2:]} == {"\N{EN DASH}"}
        assert said in page.text
        assert "nan" not in page.text.lower()
    result = evaluation.evaluate_coco(
        Oracle(Squares(*SCENES), lambda i: nothing), Squares(*SCENES), verbose=0
    )
    report.write_evaluation(tmp_path, Squares(*SCENES), result)
    assert "Nothing was detected, so AP is 0" in Page(tmp_path).text


def squares_report(folder, **options):
    dataset = Squares(*SCENES)
    model = Oracle(dataset, lambda i: noisy_result(dataset, i))
    result = evaluation.evaluate_coco(model, dataset, verbose=0)
    report.write_evaluation(folder, dataset, result, **options)


def test_an_earlier_page_is_replaced_and_nothing_else(tmp_path):
    squares_report(tmp_path)
    (tmp_path / "pictures" / "mine.jpg").write_text("mine")
    squares_report(tmp_path, pictures=1, title="Second")
    assert Page(tmp_path).text.count("Second") == 2
    kept = [path.name for path in (tmp_path / "pictures").iterdir()]
    assert "mine.jpg" in kept
    assert len(kept) == 1 + 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "pictures"]

    (tmp_path / "index.html").write_text("<title>My own page</title>")
    with pytest.raises(ValueError, match="must be new or empty .* holds 'index.html'"):
        squares_report(tmp_path)
    assert "My own" in (tmp_path / "index.html").read_text()


def test_a_page_that_cannot_be_finished_leaves_the_earlier_one(tmp_path, monkeypatch):
    squares_report(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    def fail(image, path):
        raise OSError("disk full")

    monkeypatch.setattr(pages, "save_photo", fail)
    with pytest.raises(OSError, match="disk full"):
        squares_report(tmp_path, title="Second")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_the_list_stays_within_its_limit():
    row = ["397133", "000000397133.jpg", 0, 0, -1, 640, 427, 53, 4, [*range(20000, 20020)]]
    rows = pages._within_limit([row] * 100_000)
    size = len(json.dumps(rows, separators=(",", ":")))
    assert 0.99 * pages.LIST_BYTES < size < 1.01 * pages.LIST_BYTES
    assert len(rows) > 5_000  # MS COCO's validation images, with twenty kinds of mistakes each


def test_the_counts_of_an_inspection(tmp_path):
    config = TinyNetwork(NUM_CLASSES=3, IMAGE_RESIZE_MODE="pad64", IMAGE_MIN_DIM=None)
    survey = inspection.survey(Squares(*SCENES), config)
    report.write_inspection(tmp_path, survey)
    page = Page(tmp_path)
    # (class, objects, images, crowds, median side)
    assert [row[:5] for row in page.tables[0][1:]] == [
        ["brick", "2", "2", "1", "14"],
        ["tile", "2", "2", "0", "26"],
    ]
    assert [sum(item[3] for item in row[9]) for row in page.data["images"]] != [0] * 4
    assert sorted(row[1] for row in page.data["images"]) == ["s0", "s1", "s2", "s3"]
    assert len([*(tmp_path / "pictures").glob("*.svg")]) == 4


def test_problems_that_the_loader_found_are_listed(tmp_path, capsys):
    data = own_data(tmp_path / "photos", 4)
    path = tmp_path / "photos" / "annotations.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = []
    content["annotations"][0].pop("bbox", None)
    content["images"].append({"id": 9, "file_name": "missing.png", "height": 20, "width": 30})
    path.write_text(json.dumps(content))
    folder = tmp_path / "report"
    common = ["inspect", *data, f"--output={tmp_path / 's.png'}", "--image-dim=128"]
    assert coco.main([*common, "--report", str(folder)]) == 0
    assert f"report: {folder / 'index.html'}" in capsys.readouterr().out
    page = Page(folder)
    assert "1 images dropped, no such file: 9" in page.text
    assert "1 annotations dropped, neither mask nor box: 0" in page.text


def test_evaluate_writes_the_page(tmp_path, capsys):
    torch.manual_seed(0)
    data = own_data(tmp_path / "photos", 3)
    model = MaskRCNN(TinyNetwork(NUM_CLASSES=3, POST_NMS_ROIS_INFERENCE=20))
    weights.save_weights(model, tmp_path / "tiny.pth")
    run = ["evaluate", *data, f"--model={tmp_path / 'tiny.pth'}", "--device=cpu"]
    folder = tmp_path / "new" / "report"
    options = ["--report", str(folder), "--report-score=0", "--report-images=2"]
    assert coco.main([*run, *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith("3 images, 6 objects")
    assert text.endswith(f"report: {folder / 'index.html'}\n")
    page = Page(folder)
    assert "tiny.pth on annotations.json" in page.text
    assert len([*(folder / "pictures").glob("*.jpg")]) == 2

    # Before the evaluation, whose time would be lost.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert coco.main([*run, "--report", str(tmp_path / "other")]) == 2
    captured = capsys.readouterr()
    assert "holds 'thesis.tex'; choose another one" in captured.err
    assert captured.out == ""


def test_without_jinja_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r'jinja2; install it with pip install -e "\.\[report\]"'):
        report.check_folder(tmp_path / "report")


# --- Pictures and charts -------------------------------------------------------------------------


def inside(d, y, x):
    """Whether points [Y], [X] are in the path of an SVG by the even-odd rule, [Y, X]."""
    odd = np.zeros((len(y), len(x)), bool)
    for ring in re.findall(r"M([^Z]+)Z", d):
        points = np.array([p.split() for p in ring.split("L")], float)
        for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
            crossed = (y1 > y) != (y2 > y)
            at = x1 + (y[crossed] - y1) * (x2 - x1) / (y2 - y1)
            odd[crossed] ^= x < at[:, None]
    return odd


@pytest.mark.parametrize("size", [(60, 80), (1600, 1200)])
def test_outlines_are_where_the_masks_are(size):
    """Of a ring with a hole and a bar apart, at the photograph's scale and shrunk."""
    f = size[0] / 20
    y, x = np.arange(size[0]), np.arange(size[1])
    distance = np.hypot(y[:, None] + 0.5 - 10 * f, x + 0.5 - 8 * f)
    pixels = (distance < 7 * f) & (distance > 3 * f)
    pixels[round(18 * f) : round(19 * f), : round(10 * f)] = True
    svg = pictures.draw_marks(
        [pictures.Mark("false", utils.rle_encode(pixels), [0, 0, 9, 9], "<x>")], size
    )
    assert ">&lt;x&gt;</text>" in svg
    scale = 1000 / max(size)
    view = [float(v) for v in re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups()]
    assert view == [size[1] * scale, size[0] * scale]
    d = max(re.findall(r'<path class="false" d="([^"]+)"', svg), key=len)
    assert d.count("M") == 3
    # Every seventh pixel of the large one.
    y, x = (v[:: 7 if size[0] > 100 else 1] for v in (y, x))
    drawn = inside(d, (y + 0.5) * scale, (x + 0.5) * scale)
    pixels = pixels[np.ix_(y, x)]
    assert (drawn & pixels).sum() / (drawn | pixels).sum() > 0.96


def test_a_mark_without_a_pixel_shows_its_box():
    empty = utils.rle_encode(np.zeros((60, 80), bool))
    svg = pictures.draw_marks([pictures.Mark("missed", empty, [8, 16, 24, 8], "")], (60, 80))
    assert "M100 200L400 200L400 300L100 300Z" in svg


def test_photos_are_shrunk_and_of_any_channels(tmp_path):
    for shape in ((1000, 1600, 3), (30, 40, 1), (30, 40, 2), (30, 40, 5)):
        pictures.save_photo(np.full(shape, 90, np.uint8), tmp_path / "a.jpg")
        photo = utils.load_image(tmp_path / "a.jpg")
        assert photo.shape[:2] == ((500, 800) if shape[0] == 1000 else shape[:2])
        assert abs(int(photo[5, 5, 0]) - 90) < 3


def test_bars_have_the_heights_of_their_counts():
    svg = charts.histogram(np.array([0.1, 0.1, 0.9, 0.9, 0.9, 0.9]), np.linspace(0, 1, 11), 0.5)
    bars = re.findall(r'class="bar (\w+)".*?height="([\d.]+)"><title>([^<]+)', svg)
    assert [(kind, title[-3:]) for kind, _, title in bars] == [("false", ": 2"), ("true", ": 4")]
    assert float(bars[1][1]) == pytest.approx(2 * float(bars[0][1]))
    # All counts from 1 to 1e6 have at most six lines, and fit.
    for top in np.unique(np.logspace(0, 6, 400).astype(int)):
        svg = charts.histogram(np.full(min(top, 3), 0.5), np.linspace(0, 1, 3), 0)
        svg = charts._bars(np.array([top]), ["true"], [""], [], [], ("", ""))
        assert 2 <= svg.count('class="grid"') <= 6
        assert float(re.search(r' height="([\d.]+)"><', svg)[1]) <= charts.BOTTOM - charts.TOP
    svg = charts.mirrored(np.array([0, 9, 99]), np.array([1, 0, 0]), 0.5)
    tall = [float(h) for h in re.findall(r' height="([\d.]+)"><', svg)]
    assert tall[1] == pytest.approx(2 * tall[0], abs=0.1)  # logarithms of 10 and 100
    assert charts.log_histogram(np.zeros(0), [32.0]).count("marker") == 1
    assert "rect" not in charts.counts([])


# --- In a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (
        "headless",
        "no-sandbox",  # does without the privileges that a container lacks
        "disable-dev-shm-usage",
        "disable-gpu",
        "disable-quic",
        "disable-sync",
        "disable-background-networking",
        "disable-component-update",
        "no-first-run",
    ):
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as browser:
        yield browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Both pages of 40 images in a folder with a difficult name, of which 30 are drawn."""
    root = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(3)
    scenes = [
        [(int(rng.integers(1, 3)), *map(int, rng.integers(0, 40, 2)), 15) for _ in range(i % 5)]
        for i in range(39)
    ]
    dataset = Files(root / "ä #1", *scenes, [(2, 5, 5, 20), (3, 30, 40, 12)], names=[*EVIL, "tile"])
    model = Oracle(dataset, lambda i: noisy_result(dataset, i))
    result = evaluation.evaluate_coco(model, dataset, verbose=0)
    report.write_evaluation(root / "evaluation", dataset, result, score=0.3, pictures=30)
    survey = inspection.survey(dataset, TinyNetwork(NUM_CLASSES=4))
    report.write_inspection(root / "inspection", survey, pictures=30)
    return root


@pytest.fixture(params=["evaluation", "inspection"])
def page(request, browser, site):
    """A page of 1200 x 900 pixels, and that it had nothing to complain about."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.set_window_size(1200, 900)
    browser.get("about:blank")
    browser.get((site / request.param / "index.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def select(browser, css):
    return browser.find_elements("css selector", css)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listed(browser):
    return [element.get_attribute("id") for element in select(browser, "#list > li")]


def is_open(browser):
    return browser.execute_script("return document.getElementById('large').open")


def shown_name(browser):
    return select(browser, "#large-name")[0].text


def test_a_click_on_a_class_filters(page):
    from selenium.webdriver.support.ui import Select

    assert select(page, "#status")[0].text == "40 of 40 images"
    assert len(listed(page)) == 24
    button = next(b for b in select(page, "button[data-class]") if b.text == "tile")
    button.click()
    data = data_of(page)
    tile = data["classes"].index("tile")
    expected = [row[0] for row in data["images"] if any(tile in i[1:3] for i in row[9])]
    assert 1 <= len(expected) < 40
    assert listed(page) == [f"image-{name}" for name in expected]
    assert select(page, "#status")[0].text == f"{len(expected)} of 40 images · tile"
    assert Select(select(page, "#class")[0]).first_selected_option.text == "tile"
    select(page, "#reset")[0].click()
    assert select(page, "#status")[0].text == "40 of 40 images"
    Select(select(page, "#class")[0]).select_by_visible_text("tile")
    assert len(listed(page)) == len(expected)
    select(page, "#reset")[0].click()

    chip = select(page, "button[data-kind]")[-1]
    chip.click()
    kind = int(chip.get_attribute("data-kind"))
    count = sum(any(i[0] == kind for i in row[9]) for row in data["images"])
    assert chip.get_attribute("aria-pressed") == "true"
    assert select(page, "#status")[0].text.startswith(f"{count} of 40 images")


def test_a_number_of_the_matrix_leads_to_its_images(browser, site):
    browser.get((site / "evaluation" / "index.html").as_uri())
    cell = select(browser, "td.off button")[0]
    truth, found = map(int, cell.get_attribute("data-pair").split(","))
    count = int(cell.text)
    browser.execute_script("arguments[0].click()", cell)
    data = data_of(browser)
    items = [i for row in data["images"] for i in row[9] if i[1:3] == [truth, found]]
    assert sum(i[3] for i in items) == count
    assert select(browser, "#status")[0].text.startswith(f"{len(items)} of 40 images")
    assert browser.get_log("browser") == []


def test_the_large_view_by_click_and_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    first, second = select(page, "#list a")[:2]
    names = [element.text.splitlines()[0] for element in (first, second)]
    first.click()
    until(lambda: is_open(page))
    assert shown_name(page).startswith(f"{names[0]} 1 of 40")
    assert page.current_url.partition("#image-")[2]
    press(page, Keys.ARROW_RIGHT)
    assert shown_name(page).startswith(f"{names[1]} 2 of 40")
    press(page, Keys.ARROW_LEFT, Keys.ARROW_LEFT)  # there is none before the first
    assert shown_name(page).startswith(names[0])
    page.execute_script("document.querySelector('#next').click()")
    assert shown_name(page).startswith(names[1])
    press(page, "m")
    marks = select(page, "#panels img.marks")
    assert marks
    assert not any(mark.is_displayed() for mark in marks)
    press(page, "m")
    assert all(mark.is_displayed() for mark in marks)
    press(page, Keys.ESCAPE)
    until(lambda: "#" not in page.current_url)  # an event after the one that closes it
    assert not is_open(page)
    assert page.switch_to.active_element == select(page, "#list a")[1]

    press(page, Keys.ENTER)
    until(lambda: is_open(page))
    assert shown_name(page).startswith(names[1])
    select(page, "#close")[0].click()
    assert not is_open(page)
    # By Tab from the status on: each step is visible.
    page.execute_script("arguments[0].focus()", select(page, "#order")[0])
    press(page, Keys.TAB)
    outline = page.execute_script(
        "return getComputedStyle(document.activeElement).outlineStyle + document.activeElement.href"
    )
    assert outline.startswith("solid")
    assert "#image-" in outline


def test_the_address_of_an_image_opens_it(page):
    data = data_of(page)
    row = data["images"][-1]  # one without a picture
    assert row[4] == -1
    page.get(page.current_url + "#image-" + urllib.parse.quote(row[0], safe=""))
    page.refresh()
    assert is_open(page)
    assert shown_name(page).startswith(row[1])
    assert "pictures of 30 images" in select(page, "#panels")[0].text
    page.back()


def test_all_links_and_pictures_are_there(page):
    select(page, "#more")[0].click()
    assert not select(page, "#more")[0].is_displayed()
    assert len(listed(page)) == 40
    assert len(select(page, "#list .pair")) == 30
    loaded = """
        const images = [...document.images];
        images.forEach((image) => (image.loading = "eager"));
        return images.map((image) => image.complete && image.naturalWidth > 0);
    """
    until(lambda: all(page.execute_script(loaded)))
    for element in select(page, "a[href^='#']:not(#list a)"):
        target = element.get_attribute("href").partition("#")[2]
        assert page.execute_script("return document.getElementById(arguments[0])", target)
    # The files, by the links that the browser made.
    page.execute_script("document.querySelector('#list a').click()")
    until(lambda: is_open(page))
    addresses = page.execute_script("""
        return [...Array(40)].map(() => {
            const address = document.getElementById("file").href;
            document.getElementById("next").click();
            return address;
        });
    """)
    paths = {Path(urllib.parse.unquote(urllib.parse.urlparse(a).path)) for a in addresses}
    assert len(paths) == 40
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(page, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.refresh()
    widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
    assert page.execute_script(widths) == [390, 390]
    color = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    levels = [int(v) for v in re.findall(r"\d+", color)]
    assert max(levels) < 60 if scheme == "dark" else min(levels) > 200
    # Text stands out: WCAG asks for a contrast of 4.5.
    for element in select(page, "p, td, th, h1, .chip, .counts li, figcaption")[::7]:
        text = page.execute_script("return getComputedStyle(arguments[0]).color", element)
        back = [255, 255, 255] if scheme == "light" else [22, 22, 21]
        assert contrast([int(v) for v in re.findall(r"\d+", text)[:3]], back) >= 4.5, element.text
    page.execute_script("document.querySelector('#list a').click()")
    until(lambda: is_open(page))
    assert page.execute_script(
        "const d = document.getElementById('large'); return d.scrollWidth <= d.clientWidth"
    )
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(*colors):
    def luminance(color):
        v = np.array(color) / 255
        return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) @ (
            0.2126,
            0.7152,
            0.0722,
        )

    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)
