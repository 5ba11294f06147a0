"""COCO's numbers, against pycocotools used the plain way and against hand-made cases."""

import contextlib
import copy
import io
import json
import math
import os
import types

import numpy as np
import pytest
import torch
from conftest import SHARED, TinyNetwork, free_port, needs_shared
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import coco
import evaluation
import utils
from model import MaskRCNN

# pycocotools and numpy 2 disagree about __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# A precision has an epsilon in its denominator.
ONES = pytest.approx([1.0] * 6)
MINI = SHARED / "data" / "coco_mini"


class Squares(utils.Dataset):
    """Images of noise with squares, given as [(class id, y, x, side), ...] for each image."""

    def __init__(self, *scenes, names=("brick", "tile")):
        super().__init__()
        for i, name in enumerate(names, start=1):
            self.add_class("toy", 10 * i, name)
        for i, scene in enumerate(scenes):
            self.add_image("toy", f"s{i}", None, scene=scene)
        self.prepare()

    def load_image(self, image_id):
        rng = np.random.default_rng(image_id)
        return rng.integers(0, 256, (60 + image_id, 80, 3), dtype=np.uint8)

    def load_mask(self, image_id):
        scene = self.image_info[image_id]["scene"]
        masks = np.zeros((60 + image_id, 80, len(scene)), dtype=bool)
        for i, (_, y, x, side) in enumerate(scene):
            masks[y : y + side, x : x + side, i] = True
        return masks, np.array([s[0] for s in scene], np.int32)


class Oracle:
    """A model that knows the answers: what `answer` gives for each image of a data set."""

    def __init__(self, dataset, answer, batch=3):
        self.config = types.SimpleNamespace(
            BATCH_SIZE=batch,
            NUM_CLASSES=dataset.num_classes,
            DETECTION_MIN_CONFIDENCE=0.7,
            IMAGE_BIT_DEPTH=None,
        )
        images = [dataset.load_image(i) for i in range(dataset.num_images)]
        self.answers = {image.tobytes(): answer(i) for i, image in enumerate(images)}
        self.batches, self.confidences = [], []

    def detect(self, images, masks):
        assert masks == "rle"
        self.batches.append(len(images))
        self.confidences.append(self.config.DETECTION_MIN_CONFIDENCE)
        return [self.answers[image.tobytes()] for image in images]


def result_of(boxes, class_ids, scores, rles):
    return {
        "rois": np.array(boxes, dtype=np.float64).reshape(-1, 4),
        "class_ids": np.array(class_ids, dtype=np.int32),
        "scores": np.array(scores, dtype=np.float32),
        "masks": list(rles),
    }


def as_text(rle):
    return {
        **rle,
        "counts": rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"],
    }


def truth_as_result(dataset, image_id):
    objects = [i for i in evaluation.ground_truth(dataset, image_id) if not i["iscrowd"]]
    x, y, w, h = np.array([i["bbox"] for i in objects]).reshape(-1, 4).T
    boxes = np.stack([y, x, y + h, x + w], axis=1)
    rles = [as_text(i["segmentation"]) for i in objects]
    scores = np.linspace(1, 0.5, len(objects))
    return result_of(boxes, [i["category_id"] for i in objects], scores, rles)


def noisy_result(dataset, image_id):
    """Shifted, missed, doubled and misnamed objects, with random scores."""
    rng = np.random.default_rng(image_id)
    masks, class_ids = dataset.load_mask(image_id)
    found = []
    for i in rng.permutation(len(class_ids))[: rng.integers(0, 40)]:
        mask = np.roll(masks[:, :, i], rng.integers(-3, 4, 2), axis=(0, 1))
        class_id = abs(int(class_ids[i])) if rng.random() < 0.8 else 1
        box = utils.extract_bboxes(mask[:, :, None])[0]
        found.append((box, class_id, rng.random(), utils.rle_encode(mask)))
    return result_of(*zip(*found, strict=True)) if found else result_of([], [], [], [])


SCENES = ([(1, 5, 5, 20), (2, 30, 40, 12)], [], [(1, 0, 0, 8), (-1, 30, 10, 25)], [(2, 9, 9, 40)])


def test_ground_truth_fed_back_is_perfect():
    dataset = Squares(*SCENES)
    model = Oracle(dataset, lambda i: truth_as_result(dataset, i))
    result = evaluation.evaluate_coco(model, dataset, verbose=0)
    # Squares of 8, 12 and 20 pixels are small, that of 40 is medium, none is large.
    assert [*result.bbox] == [*evaluation.METRICS]
    for numbers in (result.bbox, result.segm):
        assert [numbers[n] for n in ("AP", "AP50", "AP75", "APs", "APm", "AR1")] == ONES
        assert math.isnan(numbers["APl"])
        assert math.isnan(numbers["ARl"])
    for per_class in (result.bbox_per_class, result.segm_per_class):
        assert per_class == pytest.approx({"brick": 1.0, "tile": 1.0})
    assert (result.images, result.objects, len(result.results)) == (4, 4, 4)
    assert result.seconds >= 0
    assert model.batches == [3, 1]


@needs_shared
def test_ground_truth_of_coco_fed_back_is_perfect():
    dataset = coco.CocoDataset()
    dataset.load_coco(MINI, "val")
    dataset.prepare()
    model = Oracle(dataset, lambda i: truth_as_result(dataset, i), batch=8)
    result = evaluation.evaluate_coco(model, dataset, verbose=0)
    for numbers in (result.bbox, result.segm):
        assert [numbers[n] for n in evaluation.METRICS[:6]] == ONES
    assert result.objects == 385


@needs_shared
def test_numbers_are_those_of_pycocotools_used_the_plain_way(tmp_path):
    dataset = coco.CocoDataset()
    dataset.load_coco(MINI, "val")
    dataset.prepare()
    model = Oracle(dataset, lambda i: noisy_result(dataset, i))
    path = tmp_path / "new folder" / "results.json"
    result = evaluation.evaluate_coco(model, dataset, results_path=path, verbose=0)
    assert result.results == json.loads(path.read_text())

    for kind, ours in (("bbox", result.bbox), ("segm", result.segm)):
        found = copy.deepcopy(result.results)
        for detection in found if kind == "segm" else ():
            del detection["bbox"]  # or loadRes takes its area for the mask's
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(MINI / "annotations" / "instances_val2017.json"))
            reference = COCOeval(truth, truth.loadRes(found), kind)
            reference.evaluate()
            reference.accumulate()
            reference.summarize()
        assert 0.05 < ours["AP"] < 0.9
        np.testing.assert_array_equal(np.array([*ours.values()]), reference.stats)

        precision = reference.eval["precision"][:, :, :, 0, 2]
        per_class = result.bbox_per_class if kind == "bbox" else result.segm_per_class
        assert [*per_class] == coco.CLASS_NAMES[1:]
        for k, value in enumerate(per_class.values()):
            judged = precision[:, :, k][precision[:, :, k] > -1]
            assert value == pytest.approx(judged.mean()) if len(judged) else math.isnan(value)


def test_as_many_detections_count_as_one_says():
    """Of 120 objects, all found, COCO's 100 give a recall of 100 / 120."""
    boxes = [(1, 4 * y, 4 * x, 3) for y in range(12) for x in range(10)]
    dataset = Squares(boxes)
    rles = [utils.rle_encode(np.asarray(m)) for m in np.moveaxis(dataset.load_mask(0)[0], 2, 0)]
    corners = [utils.rle_decode_part(rle)[0] for rle in rles]
    scores = np.linspace(0.9, 0.5, len(boxes)).tolist()
    model = Oracle(dataset, lambda i: result_of(corners, [1] * len(boxes), scores, rles))
    for count, recall in ((100, 100 / 120), (60, 0.5), (120, 1.0), (500, 1.0)):
        result = evaluation.evaluate_coco(model, dataset, max_detections=count, verbose=0)
        assert result.segm["AR100"] == result.bbox["AR100"] == pytest.approx(recall)
        # Of 101 points of recall those that are reached have a precision of 1.
        assert result.segm["AP"] == pytest.approx(int(recall * 100 + 1) / 101)
    with pytest.raises(ValueError, match="at least 10"):
        evaluation.evaluate_coco(model, dataset, max_detections=9, verbose=0)


def test_without_detections_ap_is_0_and_it_says_so():
    dataset = Squares(*SCENES)
    model = Oracle(dataset, lambda i: result_of([], [], [], []))
    result = evaluation.evaluate_coco(model, dataset, verbose=0)
    assert result.metrics == {"bbox_AP": 0, "bbox_AP50": 0, "segm_AP": 0, "segm_AP50": 0}
    assert result.results == []
    assert "nothing was detected, so AP is 0" in str(result)


def test_without_objects_there_is_no_number_and_it_says_so():
    dataset = Squares([], [(-1, 3, 3, 30)])
    rle = utils.rle_encode(np.ones((60, 80), bool))
    model = Oracle(
        dataset,
        lambda i: (
            result_of([[0, 0, 60, 80]], [1], [0.9], [rle]) if i == 0 else result_of([], [], [], [])
        ),
    )
    result = evaluation.evaluate_coco(model, dataset, verbose=0)
    assert all(map(math.isnan, [*result.bbox.values(), *result.segm.values()]))
    assert "no ground truth" in str(result)
    assert "nan" not in str(result)


def test_what_lies_in_a_crowd_is_not_wrong():
    scene = [(1, 0, 0, 10), (-1, 20, 20, 30)]
    dataset = Squares(scene)

    def answer(image_id, crowd_class=1):
        masks = np.zeros((60, 80, 2), bool)
        masks[25:35, 25:35, 0] = masks[0:10, 0:10, 1] = True
        boxes = [[25, 25, 35, 35], [0, 0, 10, 10]]
        rles = [utils.rle_encode(masks[:, :, i]) for i in range(2)]
        return result_of(boxes, [crowd_class, 1], [0.9, 0.8], rles)

    inside = evaluation.evaluate_coco(Oracle(dataset, answer), dataset, verbose=0)
    assert (inside.bbox["AP"], inside.segm["AP"]) == pytest.approx((1.0, 1.0))
    dataset = Squares(scene[:1])
    alone = evaluation.evaluate_coco(Oracle(dataset, answer), dataset, verbose=0)
    assert alone.bbox["AP"] == alone.segm["AP"] == pytest.approx(0.5)


def test_results_have_the_ids_of_the_data_set(tmp_path):
    dataset = Squares(*SCENES)
    model = Oracle(dataset, lambda i: truth_as_result(dataset, i))
    path = tmp_path / "results.json"
    evaluation.evaluate_coco(model, dataset, results_path=path, verbose=0)
    found = json.loads(path.read_text())
    summary = [(r["image_id"], r["category_id"], r["bbox"]) for r in found]
    assert summary == [
        ("s0", 10, [5, 5, 20, 20]),
        ("s0", 20, [40, 30, 12, 12]),
        ("s2", 10, [0, 0, 8, 8]),
        ("s3", 20, [9, 9, 40, 40]),
    ]
    assert found[1]["score"] == 0.5
    mask = utils.rle_decode(found[1]["segmentation"])
    np.testing.assert_array_equal(mask, dataset.load_mask(0)[0][:, :, 1])


def test_a_part_of_the_images():
    dataset = Squares(*SCENES)
    model = Oracle(dataset, lambda i: truth_as_result(dataset, i))

    def images(**options):
        result = evaluation.evaluate_coco(model, dataset, verbose=0, **options)
        return result.images, sorted({r["image_id"] for r in result.results})

    assert images(limit=1) == (1, ["s0"])
    assert images(limit=0) == (4, ["s0", "s2", "s3"])
    assert images(image_ids=np.array([3, 0])) == (2, ["s0", "s3"])
    assert images(image_ids=np.array([3, 0]), limit=1) == (1, ["s3"])
    with pytest.raises(ValueError, match="must be images to evaluate"):
        images(image_ids=[])


def test_minimum_confidence_is_set_for_the_evaluation_only():
    dataset = Squares(*SCENES)
    model = Oracle(dataset, lambda i: truth_as_result(dataset, i), batch=4)
    evaluation.evaluate_coco(model, dataset, verbose=0)
    evaluation.evaluate_coco(model, dataset, min_confidence=0.1, verbose=0)
    metrics = evaluation.evaluator(dataset)(model)
    assert [*metrics] == ["bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"]
    assert [*metrics.values()] == pytest.approx([1.0] * 4)
    assert model.confidences == [0.7, 0.1, 0.0]
    assert model.config.DETECTION_MIN_CONFIDENCE == 0.7


def test_another_number_of_classes_is_refused():
    dataset = Squares(*SCENES)
    model = Oracle(Squares(*SCENES, names=("brick",)), lambda i: None)
    with pytest.raises(ValueError, match="classes of the data set, 3 with the background, got 2"):
        evaluation.evaluate_coco(model, dataset, verbose=0)


def test_an_image_that_cannot_be_read_is_named():
    dataset = Squares(*SCENES)
    model = Oracle(dataset, lambda i: truth_as_result(dataset, i))
    dataset.load_image = lambda i: utils.load_image(f"/nowhere/{i}.png")
    with pytest.raises(FileNotFoundError, match="nowhere/0.png"):
        evaluation.evaluate_coco(model, dataset, verbose=0)


def test_a_real_network_goes_through_and_stays_in_training_mode():
    torch.manual_seed(0)
    dataset = Squares(*SCENES)
    model = MaskRCNN(TinyNetwork(NUM_CLASSES=3, POST_NMS_ROIS_INFERENCE=30))
    assert model.training
    result = evaluation.evaluate_coco(model, dataset, min_confidence=0.0, verbose=0)
    assert model.training
    assert len(result.results) > 0
    assert {r["category_id"] for r in result.results} <= {10, 20}
    assert result.seconds > 0
    lines = str(result).splitlines()
    assert lines[0].startswith(f"4 images, 4 objects, {len(result.results)} detections")
    assert lines[1].split() == [*evaluation.METRICS]
    assert lines[2].split() == [
        "bbox",
        *(f"{v:.3f}".replace("nan", "-") for v in result.bbox.values()),
    ]


def _process(rank, port, folder):
    os.environ.update(
        {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
    import distributed

    dataset = Squares(*SCENES, [(1, 1, 1, 5)])
    with distributed.join("cpu"):
        model = Oracle(dataset, lambda i: noisy_result(dataset, i), batch=1)
        result = evaluation.evaluate_coco(model, dataset, verbose=0)
        only_first = evaluation.evaluate_coco(model, dataset, limit=1, verbose=0)
    if rank == 0:
        summary = [result.bbox, result.segm, result.results, only_first.images, model.batches]
        (folder / "0.json").write_text(json.dumps(summary))
    else:
        assert (result, only_first) == (None, None)
        (folder / "1.json").write_text(json.dumps(model.batches))


def test_two_processes_share_the_images(tmp_path):
    start, arguments = torch.multiprocessing.start_processes, (free_port(), tmp_path)
    start(_process, arguments, nprocs=2, start_method="forkserver")  # see conftest.FORKS
    bbox, segm, results, images, batches = json.loads((tmp_path / "0.json").read_text())
    assert (images, len(batches)) == (1, 3 + 1)
    assert json.loads((tmp_path / "1.json").read_text()) == [1, 1]

    dataset = Squares(*SCENES, [(1, 1, 1, 5)])
    model = Oracle(dataset, lambda i: noisy_result(dataset, i))
    alone = evaluation.evaluate_coco(model, dataset, verbose=0)
    assert results == alone.results
    np.testing.assert_array_equal([*bbox.values()], [*alone.bbox.values()])
    np.testing.assert_array_equal([*segm.values()], [*alone.segm.values()])


def test_images_that_cannot_be_used_are_skipped_if_asked_for(caplog):
    dataset = Squares(*SCENES)
    model = Oracle(dataset, lambda i: truth_as_result(dataset, i))
    model.config.SKIP_UNREADABLE_IMAGES = True
    usual = dataset.load_image
    dataset.load_image = lambda i: utils.load_image("/nowhere/0.png") if i == 0 else usual(i)
    result = evaluation.evaluate_coco(model, dataset, verbose=0)
    assert result.images == 3
    assert {r["image_id"] for r in result.results} == {"s2", "s3"}
    assert "left out: image file /nowhere/0.png" in caplog.text
    dataset.load_image = lambda i: utils.load_image("/nowhere/0.png")
    with pytest.raises(ValueError, match="none can be read"):
        evaluation.evaluate_coco(model, dataset, verbose=0)
