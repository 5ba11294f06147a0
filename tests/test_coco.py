"""The command line of coco.py as a person uses it."""

import argparse
import json
import logging
import shutil

import pytest
import torch
from annotation_files import annotation, own_data, standard_layout, write, write_labelme, write_via
from conftest import SHARED, TinyNetwork, needs_shared
from PIL import Image

import coco
import evaluation
import utils
import weights
from augmentation import ColorJitter, ScaleJitter, horizontal_flip, rot90
from coco import CATEGORY_IDS, CocoDataset
from config import Config
from families import TORCHVISION_CLASS_NAMES
from model import MaskRCNN

# pycocotools and numpy 2 disagree about __array__; Python 3.12 warns of forks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

MINI = SHARED / "data" / "coco_mini"


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
    Image.fromarray(utils.load_image(image)).save(image, format="JPEG")
    image.write_bytes(image.read_bytes()[:-100])
    run = ["train", f"--dataset={tmp_path}", f"--model={checkpoint}", "--device=cpu", "--workers=1"]
    assert coco.main([*run, "--steps=1", "--epochs=1", f"--logs={tmp_path / 'logs'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"coco.py: image coco.1 ({image}) cannot be used")
    assert line.endswith("SKIP_UNREADABLE_IMAGES (--skip-unreadable)")


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
    assert recorder.options["augmentation"].augmentations == (coco.horizontal_flip,)
    metrics = recorder.options["evaluate"](recorder.model)
    assert [*metrics] == ["bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"]

    recorder.calls.clear()
    assert coco.main([*run, "--layers=5+", "--lr=0.02"]) == 0
    assert coco.main([*run, "--epochs=7", "--image-dim=192", "--batch=4"]) == 0
    assert recorder.calls == [("5+", 40, 0.02), ("all", 7, 0.001)]
    config = recorder.model.config
    assert (config.IMAGE_MAX_DIM, config.IMAGE_MIN_DIM, config.IMAGES_PER_GPU) == (192, 150, 4)
    assert config.NAME == "coco"


def test_a_few_photographs_and_the_small_network(tmp_path, monkeypatch, capsys):
    run = ["train", *own_data(tmp_path, 6), f"--logs={tmp_path / 'logs'}", "--model=shapes"]
    recorder = Recorder(monkeypatch)
    assert coco.main(run) == 0
    assert recorder.calls == [("all", 5, 0.0015)]
    config = recorder.model.config
    assert (config.IMAGE_MAX_DIM, config.IMAGES_PER_GPU, config.STEPS_PER_EPOCH) == (256, 4, 100)
    assert (config.TRAIN_BN, config.OPTIMIZER, config.LR_SCHEDULE) == (True, "adamw", "cosine")
    flip, scale, color = recorder.options["augmentation"].augmentations
    assert flip is horizontal_flip
    assert isinstance(scale, ScaleJitter)
    assert isinstance(color, ColorJitter)

    assert coco.main([*run, "--augment=turn,color"]) == 0
    assert recorder.options["augmentation"].augmentations[0] is rot90
    assert coco.main([*run, "--augment=turn,blur"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "coco.py: --augment must be of flip, turn, scale, color, got 'blur'"
    )


@pytest.mark.slow
@needs_shared("data/fruits_nuts")
def test_the_recipe_for_small_data_sets(tmp_path):
    """Of docs/training.md, with a third of the 18 photographs held out."""
    folder = SHARED / "data" / "fruits_nuts"
    own = ["--images", str(folder / "images"), "--annotations", str(folder / "instances.json")]
    run = ["train", *own, "--model=shapes", "--augment=flip,turn,scale,color", "--device=cpu"]
    assert coco.main([*run, "--val-share=0.34", "--seed=1", f"--logs={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*/mask_rcnn_coco_0005.pth")
    model = MaskRCNN.from_weights(path)
    dataset = CocoDataset()
    dataset.load_annotations(folder / "images", folder / "instances.json")
    dataset.prepare()
    _, held_out = dataset.split(0.34, seed=1)
    result = evaluation.evaluate_coco(model, held_out, min_confidence=0.0)
    print(result)
    assert result.images == 6
    assert result.segm["AP50"] > 0.5  # it was 0.944
    assert min(result.segm_per_class.values()) > 0.1  # each class is found


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


@pytest.fixture(scope="module")
def by_category_id(tmp_path_factory):
    """A network whose classes are torchvision's: a class for each category id, used or not."""
    torch.manual_seed(0)
    options = {"POST_NMS_ROIS_INFERENCE": 20, "VALIDATION_STEPS": 1, "NUM_WORKERS": 0}
    config = TinyNetwork(NUM_CLASSES=91, CLASS_NAMES=TORCHVISION_CLASS_NAMES, **options)
    path = tmp_path_factory.mktemp("model") / "torchvision.pth"
    weights.save_weights(MaskRCNN(config), path)
    return path


def test_evaluating_a_network_of_91_classes(by_category_id, layout, tmp_path, monkeypatch, capsys):
    """Those of torchvision; the objects of the layout are toothbrushes, of category id 90."""
    box, mask = [2, 2, 8, 12], torch.zeros(20, 30, dtype=torch.uint8).numpy()
    mask[2:8, 2:12] = 1
    found = {
        "rois": torch.tensor([box, box, box]).numpy(),
        "class_ids": torch.tensor([90, 26, 1]).numpy(),
        "scores": torch.tensor([0.9, 0.8, 0.7]).numpy(),
        "masks": [utils.rle_encode(mask[2:8, 2:12], box, (20, 30))] * 3,
    }
    monkeypatch.setattr(MaskRCNN, "detect", lambda model, images, masks: [found] * len(images))
    out = tmp_path / "out.json"
    run = ["evaluate", f"--dataset={layout}", f"--model={by_category_id}", f"--results={out}"]
    assert coco.main(run) == 0
    results = json.loads(out.read_text())
    assert [r["category_id"] for r in results] == [90, 26, 1] * 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("toothbrush")


def test_training_keeps_a_class_for_each_category_id(
    by_category_id, layout, tmp_path, monkeypatch, caplog
):
    recorder = Recorder(monkeypatch)
    run = ["train", f"--dataset={layout}", f"--model={by_category_id}", f"--logs={tmp_path}"]
    with caplog.at_level(logging.INFO):
        assert coco.main(run) == 0
    assert "excluded" not in caplog.text
    assert recorder.train.class_names == recorder.val.class_names == TORCHVISION_CLASS_NAMES
    assert recorder.train.load_mask(0)[1].tolist() == [90]
    stored = weights.read_state_dict(by_category_id).state_dict
    for name, tensor in recorder.model.state_dict().items():
        assert torch.equal(stored[name], tensor), name
    with caplog.at_level(logging.INFO):
        assert coco.main([*run, "--classes=toothbrush"]) == 0
    assert "6 excluded" in caplog.text
    assert recorder.train.class_names == recorder.val.class_names == ["BG", "toothbrush"]


def test_least_score_is_that_of_the_authors():
    for changes, expected in (
        ({}, 0.0),
        ({"DETECTION_PER_CLASS": True}, 0.0),
        ({"DETECTION_PER_CLASS": True, "DETECTION_MIN_CONFIDENCE": 0.05}, 0.05),
        ({"DETECTION_PER_CLASS": False, "DETECTION_MIN_CONFIDENCE": 0.05}, 0.0),
    ):
        assert coco.least_score(Config(**changes)) == expected


def test_own_classes_start_anew(checkpoint, tmp_path, monkeypatch, caplog, capsys):
    path = write(tmp_path / "photos", [annotation(), annotation(2, image_id=2, category_id=3)])
    own = ["--images", str(path.parent), "--annotations", str(path)]
    recorder = Recorder(monkeypatch)
    logs = f"--logs={tmp_path}"
    with caplog.at_level(logging.INFO):
        assert coco.main(["train", *own, f"--model={checkpoint}", "--seed=1", logs]) == 0
    assert recorder.val is None
    assert recorder.options["evaluate"] is None
    assert "6 excluded" in caplog.text
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


@pytest.mark.parametrize(
    ("begin", "go_on"),
    [
        ("--model={file} --steps=1 --seed=4", "--model=last"),
        ["--resume --model={file} --steps=1"] * 2,
    ],
)
def test_a_run_of_own_data_goes_on_as_it_began(checkpoint, tmp_path, begin, go_on):
    run = ["train", *own_data(tmp_path / "photos", 6), f"--logs={tmp_path / 'logs'}"]
    run += ["--layers=heads", "--device=cpu"]
    begin, go_on = (options.format(file=checkpoint).split() for options in (begin, go_on))
    assert coco.main([*run, *begin, "--epochs=1"]) == 0
    assert coco.main([*run, *go_on, "--epochs=2"]) == 0
    (folder,) = (tmp_path / "logs").iterdir()
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(record["epoch"], record["steps"]) for record in records] == [(1, 1), (2, 1)]
    assert all("segm_AP" in record for record in records)


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
    nuts = [*write_via(photos, ["nut"], "nuts.json", count=2), "--class-attribute=kind"]
    capsys.readouterr()
    for model in (best, "last"):
        assert coco.main(["evaluate", *nuts, f"--model={model}", logs]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("2 images, 2 objects")
        assert [line.split()[0] for line in lines[lines.index("") + 2 :]] == ["nut"]
    dates = [*write_via(photos, ["date"], "dates.json"), "--class-attribute=kind"]
    assert coco.main(["evaluate", *dates, f"--model={best}"]) == 2
    error = capsys.readouterr().err
    assert (
        "must have classes of ['fig', 'nut'], got ['date'], the first in 0.png, region 0" in error
    )


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
    assert "must have classes of ['fig', 'nut'], got ['date']" in capsys.readouterr().err


def test_some_classes_of_several_files_of_via(checkpoint, tmp_path, monkeypatch, capsys):
    recorder = Recorder(monkeypatch)
    first = write_via(tmp_path / "a", ["nut", "fig", "date"], count=2)
    second = write_via(tmp_path / "b", ["date", "nut"], count=3)
    third = write_via(tmp_path / "c", ["date"])
    images, files = ([option[i] for option in (first, second, third)] for i in (1, 3))
    data = ["--images", *images, "--annotations", *files, "--format=via", "--class-attribute=kind"]
    run = ["train", *data, f"--model={checkpoint}", f"--logs={tmp_path}", "--val-share=0"]
    assert coco.main([*run, "--classes=nut,fig"]) == 0
    assert recorder.train.class_names == ["BG", "nut", "fig"]
    found = [recorder.train.load_mask(i)[1].tolist() for i in recorder.train.image_ids]
    assert sorted(found) == [[1], [1], [1], [1, 2], [1, 2]]  # none of the third file's images
    assert coco.main([*run, "--classes=nut,pea"]) == 2
    message = "must be among 'date', 'fig', 'nut', got 'pea' for "
    assert message in capsys.readouterr().err


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
    data = write_via(tmp_path, ["toothbrush"], count=1)
    run = ["evaluate", *data, "--class-attribute=kind", "--model=coco"]
    assert coco.main(run) == 0
    output = capsys.readouterr().out
    assert output.startswith("1 images, 1 objects")
    assert output.splitlines()[-1].startswith("toothbrush")


def categories_of(**names):
    return [{"id": id_, "name": name} for name, id_ in names.items()]


def test_classes_are_told_apart_by_name(checkpoint, tmp_path, monkeypatch, capsys, caplog):
    item = annotation(category_id=1)
    paths = [
        write(tmp_path / name, [item], categories=categories_of(**{name: 1, "b": 2}))
        for name in ("a", "c")
    ]
    data = [f"--images={path.parent} --annotations={path} --logs={tmp_path}" for path in paths]
    run = f"--model={checkpoint} --epochs=1 --steps=1 --device=cpu"
    assert coco.main(f"train {data[0]} {run}".split()) == 0
    (best,) = tmp_path.glob("coco*/best.pth")
    assert weights.read_options(best)["CLASS_NAMES"] == ["BG", "a", "b"]

    assert coco.main(f"evaluate {data[0]} --model=last".split()) == 0
    capsys.readouterr()
    for command in ("evaluate", "train"):
        assert coco.main(f"{command} {data[1]} --model=last".split()) == 2
        error = capsys.readouterr().err
        assert "must have objects of no other classes than 'a', 'b', got 'c'" in error
    recorder = Recorder(monkeypatch)
    for text, count in zip(data, (0, 6), strict=True):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert coco.main(f"train {text} --model={best}".split()) == 0
        assert ("6 excluded" in caplog.text) == (count == 6)

    # Other ids, another order, and a class that the file lacks: still the run's classes.
    items = [annotation(1, category_id=9), annotation(2, image_id=2, category_id=9)]
    other = write(tmp_path / "other", items, categories=categories_of(b=9))
    data = f"--images={other.parent} --annotations={other} --logs={tmp_path}"
    assert coco.main(f"train {data} --model=last".split()) == 0
    assert recorder.train.class_names == ["BG", "a", "b"]
    assert recorder.train.load_mask(0)[1].tolist() == [2]
    capsys.readouterr()
    assert coco.main(f"evaluate {data} --model={best}".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[lines.index("") + 2 :]] == ["b"]


def test_validation_data_may_number_their_classes_otherwise(
    checkpoint, tmp_path, monkeypatch, capsys
):
    recorder = Recorder(monkeypatch)
    data = own_data(tmp_path / "photos", 4, categories_of(cup=3, cat=7))
    _, _, _, path = own_data(tmp_path / "val", 2, categories_of(dog=1, cat=3, cup=7))
    val = ["--val-images", str(tmp_path / "val"), "--val-annotations", path]
    run = ["train", *data, f"--model={checkpoint}", f"--logs={tmp_path}"]
    assert coco.main([*run, *val]) == 0
    assert recorder.val.class_names == recorder.train.class_names == ["BG", "cup", "cat"]
    assert recorder.train.load_mask(0)[1].tolist() == [1, 2]
    assert recorder.val.load_mask(0)[1].tolist() == [2, 1]
    own_data(tmp_path / "val", 2, categories_of(dog=3, cat=7))
    assert coco.main([*run, *val]) == 2
    assert "no other classes than 'cup', 'cat', got 'dog'" in capsys.readouterr().err


def test_some_classes_only(checkpoint, tmp_path, monkeypatch, capsys):
    recorder = Recorder(monkeypatch)
    items = [annotation(1), annotation(2, category_id=3), annotation(3, image_id=2, category_id=3)]
    path = write(tmp_path / "photos", items)
    data = ["--images", str(path.parent), "--annotations", str(path)]
    val = ["--val-annotations", str(path)]
    run = ["train", *data, f"--model={checkpoint}", f"--logs={tmp_path}"]
    assert coco.main([*run, *val, "--classes=cup"]) == 0
    assert recorder.train.class_names == recorder.val.class_names == ["BG", "cup"]
    assert [recorder.train.num_images, recorder.val.num_images] == [1, 2]
    assert recorder.val.load_mask(0)[1].tolist() == [1]
    for names, message in (("dog", "must be among 'cup', 'cat', got 'dog'"), ("a,,b", "names")):
        try:
            status = coco.main([*run, f"--classes={names}"])
        except SystemExit as ended:
            status = ended.code
        assert status == 2
        assert message in capsys.readouterr().err


def test_several_files_of_annotations(checkpoint, layout, tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    first, second = (own_data(tmp_path / name, 2)[1::2] for name in "ab")
    run = ["train", f"--model={checkpoint}", f"--logs={tmp_path}", "--val-share=0"]
    several = ["--images", first[0], second[0], "--annotations", first[1], second[1]]
    assert coco.main([*run, *several]) == 0
    assert recorder.train.num_images == 4
    again = ["--annotations", first[1], "--annotations", first[1]]
    assert coco.main([*run, "--images", first[0], *again]) == 0
    ids = [info["id"] for info in recorder.train.image_info]
    assert ids == [0, 1, "annotations.json/0", "annotations.json/1"]


def test_nothing_to_train_on_is_an_error_that_names_the_cause(
    checkpoint, tmp_path, monkeypatch, capsys, caplog
):
    recorder = Recorder(monkeypatch)
    crowds = [annotation(i, iscrowd=1, category_id=c) for i, c in enumerate((3, 7))]
    path = write(tmp_path / "photos", crowds)
    data = ["--images", str(path.parent), "--annotations", str(path)]
    run = ["train", *data, f"--model={checkpoint}", f"--logs={tmp_path}"]
    inspect = ["inspect", *data, f"--output={tmp_path / 'sheet.png'}"]
    for command in (run, inspect):
        assert coco.main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "found none in 2 images: 2 crowds (iscrowd); " in error
        assert "--crowd-as-objects" in error
        assert coco.main([*command, "--crowd-as-objects"]) == 0
    assert recorder.train.load_mask(0)[1].tolist() == [1, 2]

    write(tmp_path / "photos", [annotation(0, image_id=9)])
    assert coco.main(run) == 2
    assert "1 annotations dropped, no such image: 0" in capsys.readouterr().err
    write(tmp_path / "photos", [annotation(0, iscrowd=1), annotation(1, category_id=3)])
    assert coco.main(run) == 0
    assert "1 of 2 objects are crowds (iscrowd)" in caplog.text
    assert "of the class 'cup' nothing is left to train on: 1 crowds" in caplog.text


def test_going_on_without_what_cannot_be_read(checkpoint, tmp_path, monkeypatch, capsys, caplog):
    data = own_data(tmp_path / "photos", 3)
    (tmp_path / "photos" / "1.png").write_bytes(b"no picture")
    run = ["train", *data, f"--model={checkpoint}", f"--logs={tmp_path}", "--device=cpu"]
    run += ["--epochs=1", "--steps=4", "--workers=0", "--val-share=0"]
    assert coco.main(run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 images cannot be used: " in error
    assert error.endswith("--skip-unreadable")
    assert coco.main([*run, "--skip-unreadable"]) == 0
    evaluate = ["evaluate", *data, "--model=last", f"--logs={tmp_path}", "--device=cpu"]
    assert coco.main([*evaluate, "--skip-unreadable"]) == 0
    assert capsys.readouterr().out.startswith("2 images, 4 objects")


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
        ("inspect --images=a --annotations b --format=via --crowd-as-objects", "is for --format"),
        ("inspect --images a b c --annotations b.json c.json", "one folder of images, or one for"),
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
