"""The sample that one copies for data of one's own, from annotations to a picture."""

import json

import numpy as np
import pytest
from conftest import SHARED, TinyNetwork, needs_shared
from PIL import Image
from reference_inputs import synthetic_image

import coco
import model as modellib
import utils
import weights
from samples import custom

RECT = {"name": "rect", "x": 12, "y": 7, "width": 20, "height": 31}
CIRCLE = {"name": "circle", "cx": 64, "cy": 30, "r": 17.5}


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    options = {"NUM_WORKERS": 0, "POST_NMS_ROIS_INFERENCE": 20, "POST_NMS_ROIS_TRAINING": 20}
    weights.save_weights(modellib.MaskRCNN(TinyNetwork(NUM_CLASSES=7, **options)), path)
    return path


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of images, the working directory."""
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        Image.fromarray(synthetic_image(60, 90)).save(f"{i}.png")
    return tmp_path


def write_via(kinds, name="via.json", images=range(6)):
    regions = [
        {"shape_attributes": shape, "region_attributes": {"kind": kind}}
        for shape, kind in zip((RECT, CIRCLE), kinds, strict=True)
    ]
    entries = {f"{i}.png1": {"filename": f"{i}.png", "size": 1, "regions": regions} for i in images}
    with open(name, "w") as file:
        json.dump(entries, file)
    return ["--images", ".", "--annotations", name, "--format", "via", "--device", "cpu"]


def write_labelme():
    points = [[12, 7], [32, 38]]
    shapes = [{"label": "fig", "points": points, "group_id": None, "shape_type": "rectangle"}]
    for i in range(6):
        with open(f"{i}.json", "w") as file:
            json.dump({"shapes": shapes, "imagePath": f"{i}.png", "imageData": None}, file)
    return ["--images", ".", "--annotations", ".", "--format", "labelme", "--device", "cpu"]


def history(folder):
    (path,) = folder.glob("logs/custom*/history.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_annotations_to_a_picture(photos, tiny_weights, capsys):
    data = write_via(["fig", "date"])
    assert custom.main(["train", *data, "--model", str(tiny_weights), "--epochs", "1", "1"]) == 0
    records = history(photos)
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["steps"] for record in records] == [3, 3]  # 5 images, by two
    assert [record["learning_rate"] for record in records] == pytest.approx([1e-3, 1e-4])
    assert all(np.isfinite(record["val_loss"]) for record in records)
    assert all("segm_AP" in record for record in records)
    assert "1 images, 2 objects" in capsys.readouterr().out
    assert utils.load_image("custom.png").std() > 10

    (best,) = photos.glob("logs/custom*/best.pth")
    trained = weights.read_state_dict(best)
    assert trained.config["CLASS_NAMES"] == ["BG", "date", "fig"]
    assert trained.config["NUM_CLASSES"] == 3
    assert trained.config["BACKBONE"]["width"] == 8
    # What fits was loaded, and BatchNorm stays as it was; the class layers are new.
    stored = weights.read_state_dict(tiny_weights).state_dict
    for name, tensor in trained.state_dict.items():
        own = name.rpartition(".")[0] in coco.CLASS_LAYERS
        assert (tensor.shape != stored[name].shape) == own
        if "running" in name:
            assert tensor.equal(stored[name])

    assert custom.main(["evaluate", *data, "--model", str(best)]) == 0
    assert "6 images, 12 objects" in capsys.readouterr().out
    others = write_via(["fig", "nut"], "others.json")
    assert custom.main(["evaluate", *others, "--model", str(best)]) == 2
    message = "custom.py: classes must be ['BG', 'date', 'fig'], got ['BG', 'fig', 'nut']"
    assert message in capsys.readouterr().err


def test_it_goes_on_where_it_stopped(photos, tiny_weights, capsys):
    run = ["train", *write_labelme(), "--model", str(tiny_weights)]
    assert custom.main([*run, "--epochs", "1", "0"]) == 0
    assert custom.main([*run, "--epochs", "1", "1", "--resume"]) == 0
    assert "going on from" in capsys.readouterr().out
    assert [record["epoch"] for record in history(photos)] == [1, 2]


def test_a_few_images_are_better_than_none(photos, tiny_weights, capsys):
    data = write_via(["fig", "date"], images=range(1))
    run = ["train", *data, "--model", str(tiny_weights), "--epochs", "1", "0"]
    assert custom.main(run) == 0
    output = capsys.readouterr().out
    assert "less than five images" in output
    assert "1 images, 2 objects" in output


def test_an_interrupt_says_how_to_go_on(photos, tiny_weights, capsys, monkeypatch):
    def press(*arguments, **options):
        raise KeyboardInterrupt("saved x.pth")

    monkeypatch.setattr(modellib.MaskRCNN, "train_model", press)
    run = ["train", *write_via(["fig", "date"]), "--model", str(tiny_weights)]
    assert custom.main(run) == 130
    error = capsys.readouterr().err
    assert error == "custom.py: interrupted: saved x.pth; go on with --resume\n"


@needs_shared
def test_training_on_photographs_of_fruits_and_nuts(photos, tiny_weights):
    fruits = SHARED / "data" / "fruits_nuts"
    data = ["--images", str(fruits / "images"), "--annotations", str(fruits / "instances.json")]
    run = ["train", *data, "--model", str(tiny_weights), "--epochs", "1", "0", "--device", "cpu"]
    assert custom.main(run) == 0
    (checkpoint,) = photos.glob("logs/custom*/mask_rcnn_custom_0001.pth")
    config = weights.read_options(checkpoint)
    assert config["CLASS_NAMES"] == ["BG", "date", "fig", "hazelnut"]
    assert config["STEPS_PER_EPOCH"] == 8  # 15 of the 18 images, by two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--annotations", "gone.json"], "gone.json"),
        (["--annotations", "text.json"], "text.json is not json"),
        (["--model", "gone.pth"], "gone.pth"),
    ],
)
def test_a_bad_value_gets_one_line_and_status_2(photos, tiny_weights, capsys, arguments, message):
    run = ["train", *write_via(["fig", "date"]), "--model", str(tiny_weights)]
    (photos / "text.json").write_text("text")
    assert custom.main([*run, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("custom.py: ")
    assert error.count("\n") == 1
    assert message in error
