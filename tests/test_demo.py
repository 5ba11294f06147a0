"""The demo as a person runs it, with a small network of random weights."""

import json
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from reference_inputs import synthetic_image
from test_model import TinyConfig

import demo
import utils
import weights
from coco import CATEGORY_IDS, CLASS_NAMES, build_coco_results
from coco_dataset import CocoDataset
from model import MaskRCNN


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("one.png", (60, 90)), ("two.jpg", (90, 60))):
        Image.fromarray(synthetic_image(*size)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(model_path, tmp_path, *arguments):
    common = ("--model", str(model_path), "--output", str(tmp_path / "out"))
    return demo.main([*map(str, arguments), *common, "--min-confidence", "0"])


# pycocotools and numpy 2 disagree about __array__.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_folder_gives_a_picture_and_results_for_each_image(model_path, photos, tmp_path, capsys):
    assert run(model_path, tmp_path, photos, "--json") == 0
    out = tmp_path / "out"
    names = ["one.json", "one_detections.png", "two.json", "two_detections.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    picture = utils.load_image(out / "one_detections.png")
    assert picture.shape == (60, 90, 3)
    assert (picture != synthetic_image(60, 90)).any()

    model = MaskRCNN.from_weights(model_path, DETECTION_MIN_CONFIDENCE=0.0)
    expected = model.detect([synthetic_image(60, 90)])[0]
    results = json.loads((out / "one.json").read_text())
    assert len(results) == len(expected["scores"]) > 0
    for i, found in enumerate(results):
        y1, x1, y2, x2 = expected["rois"][i].tolist()
        assert found["image_id"] == "one"
        assert found["category_id"] == expected["class_ids"][i]
        assert found["bbox"] == [x1, y1, x2 - x1, y2 - y1]
        assert found["score"] == pytest.approx(expected["scores"][i])
        decoded = coco_mask.decode(found["segmentation"]).astype(bool)
        np.testing.assert_array_equal(decoded, expected["masks"][:, :, i])
    assert f"one.png: {len(results)} objects" in capsys.readouterr().out


def test_stages_are_four_pictures_of_the_same_detections(model_path, photos, tmp_path):
    assert run(model_path, tmp_path, photos / "one.png", "--stages", "--json") == 0
    out = tmp_path / "out"
    stages = ["one_1_anchors", "one_2_refinement", "one_3_masks", "one_4_final"]
    assert sorted(path.stem for path in out.glob("*.png")) == stages
    staged = json.loads((out / "one.json").read_text())
    assert run(model_path, tmp_path, photos / "one.png", "--json") == 0
    assert json.loads((out / "one.json").read_text()) == staged
    plain, final = (utils.load_image(out / f"one_{n}.png") for n in ("detections", "4_final"))
    np.testing.assert_array_equal(plain, final)


def test_without_arguments_it_takes_a_photograph_at_hand(model_path, tmp_path):
    assert run(model_path, tmp_path) == 0
    picture = utils.load_image(tmp_path / "out" / "astronaut_detections.png")
    assert picture.shape == (512, 512, 3)


def test_the_first_run_needs_no_network_and_finds_coins(tmp_path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    assert demo.main(["--output", str(tmp_path), "--json"]) == 0
    coins, shapes = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("coins", "shapes"))
    assert 22 <= len(coins) <= 26
    assert {found["category_id"] for found in coins} == {1}
    assert {found["category_id"] for found in shapes} == {1, 2, 3}
    assert (tmp_path / "coins_detections.png").is_file()
    assert "coins: 24 objects" in capsys.readouterr().out


def test_checkpoints_bring_the_names_of_their_classes():
    config = TinyConfig(CLASS_NAMES=["BG", *"abcdefg"][: TinyConfig.NUM_CLASSES])
    assert demo.class_names(config)[1] == "a"
    assert demo.class_names(TinyConfig())[1] == "class 1"


def test_a_broken_image_is_named_and_the_rest_is_done(model_path, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes((photos / "one.png").read_bytes()[:200])
    assert run(model_path, tmp_path, photos) == 1
    captured = capsys.readouterr()
    assert "skipped" in captured.err
    assert "broken.png" in captured.err
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_models_of_other_channel_counts(tmp_path, photos):
    path = tmp_path / "grey.pth"
    config = TinyConfig(IMAGE_CHANNEL_COUNT=1, MEAN_PIXEL=(100.0,))
    weights.save_weights(MaskRCNN(config), path)
    assert run(path, tmp_path, photos, "--stages") == 0
    assert utils.load_image(tmp_path / "out" / "one_4_final.png").shape == (60, 90, 3)


def test_images_of_one_name_do_not_overwrite_each_other(model_path, photos, tmp_path):
    Image.fromarray(utils.load_image(photos / "one.png")).save(photos / "one.jpg")
    assert run(model_path, tmp_path, photos) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"one_detections.png", "one-2_detections.png"} < names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "no image or folder nowhere.jpg"),
        (["--min-confidence", "70"], "--min-confidence: must be a number from 0 to 1, got '70'"),
        (["--model", "nowhere.pth"], "no weight file nowhere.pth"),
        (["--device", "toaster"], "toaster"),
        (["--coco", "found.json"], "--list, --results and --coco are for images of one's own"),
        (["one.png", "--no-pictures", "--stages"], "--no-pictures does not go with"),
        (["one.png", "--list", "list.json"], "--list needs the folder of its images"),
    ],
)
def test_bad_arguments_get_one_line_and_status_2(model_path, tmp_path, capsys, arguments, message):
    common = ["--model", str(model_path), "--output", str(tmp_path / "out")]
    try:
        status = demo.main([*common, *arguments])
    except SystemExit as ended:  # how argparse leaves
        status = ended.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("demo.py: ")
    assert error.count("\n") == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("options", [[], ["--polygons"]], ids=["run lengths", "polygons"])
def test_detections_become_annotations_to_train_on(model_path, photos, tmp_path, options):
    inside = photos / "inside"
    inside.mkdir()
    (photos / "two.jpg").rename(inside / "two.jpg")
    file = tmp_path / "new" / "found.json"
    arguments = [photos, inside, "--coco", file, "--no-pictures", "--json", *options]
    assert run(model_path, tmp_path, *arguments) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.json", "two.json"]
    data = CocoDataset()
    summary = data.load_annotations(photos, file)
    data.prepare()
    assert [info["id"] for info in data.image_info] == ["one", "two"]
    assert summary.annotations > 0
    model = MaskRCNN.from_weights(model_path, DETECTION_MIN_CONFIDENCE=0.0)
    found = model.detect([data.load_image(0)])[0]
    visible = found["masks"].any(axis=(0, 1))
    masks, class_ids = data.load_mask(0)
    np.testing.assert_array_equal(class_ids, found["class_ids"][visible])
    for mask, again in zip(found["masks"].T[visible], masks.T, strict=True):
        assert (mask & again).sum() >= 0.95 * (mask | again).sum()
    (first, *_) = json.loads((tmp_path / "out" / "one.json").read_text())
    assert isinstance(first["segmentation"], list if options else dict)


def test_results_of_an_unlabelled_list(model_path, photos, tmp_path, capsys):
    images = [{"id": 7, "file_name": "two.jpg"}, {"id": "x", "file_name": "gone.jpg"}]
    file, results = tmp_path / "list.json", tmp_path / "results.json"
    file.write_text(json.dumps({"images": images, "categories": []}))
    options = ["--list", file, "--results", results, "--no-pictures"]
    assert run(model_path, tmp_path, photos, *options) == 1
    assert not (tmp_path / "out").exists()
    assert {found["image_id"] for found in json.loads(results.read_text())} == {7}
    assert "skipped gone.jpg: no such file in" in capsys.readouterr().err

    assert run(model_path, tmp_path, photos, "--results", results, "--no-pictures") == 0
    ids = [found["image_id"] for found in json.loads(results.read_text())]
    assert ids == sorted(ids)
    assert set(ids) == {"one", "two"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must have a list images, each with an id and a file_name"),
        ('{"images": [{"id": 1.5, "file_name": "one.png"}]}', "must have a list images"),
        ('{"images": [{"id": 1, "file_name": "gone.png"}]}', "must hold the images of"),
        (
            '{"images": [{"id": 1, "file_name": "one.png"}, {"id": 2, "file_name": "one.png"}]}',
            "must name each image once, got one.png again",
        ),
    ],
)
def test_lists_that_cannot_be_used(model_path, photos, tmp_path, capsys, content, message):
    (tmp_path / "list.json").write_text(content)
    assert run(model_path, tmp_path, photos, "--list", tmp_path / "list.json") == 2
    assert message in capsys.readouterr().err


def test_nothing_found_says_what_is_below_the_threshold(
    model_path, photos, tmp_path, capsys, monkeypatch
):
    best = np.array([0.62, 0.5, 0.1], np.float32)

    def detect(model, images, verbose=0, *, masks):
        scores = best[best >= model.config.DETECTION_MIN_CONFIDENCE]
        n = len(scores)
        rois, class_ids = np.zeros((n, 4), np.int32), np.ones(n, np.int32)
        return [{"rois": rois, "class_ids": class_ids, "scores": scores, "masks": []}]

    monkeypatch.setattr(MaskRCNN, "detect", detect)
    options = [str(photos), "--model", str(model_path), "--output", str(tmp_path / "out")]
    assert demo.main(options) == 0
    expected = "0 objects (3 scored below --min-confidence 0.7, the best of them 0.62), "
    assert capsys.readouterr().out.count(expected) == 2
    best = best[:0]
    assert demo.main(options) == 0
    assert "one.png: 0 objects (none at any score), " in capsys.readouterr().out


def test_a_mistake_in_the_program_is_no_skipped_image(model_path, photos, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("mistake")

    monkeypatch.setattr(MaskRCNN, "detect", fail)
    with pytest.raises(RuntimeError, match="mistake"):
        run(model_path, tmp_path, photos)


def test_an_empty_folder_is_refused(model_path, tmp_path, capsys):
    assert run(model_path, tmp_path, tmp_path) == 2
    assert "no images in the folder" in capsys.readouterr().err


def test_without_network_one_line_says_which_file_to_put_where(tmp_path, capsys, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setenv("MASK_RCNN_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--model", "coco", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert weights.SOURCES["coco"].url in error
    assert str(tmp_path / "cache" / "mask_rcnn_coco.h5") in error
    assert error.count("\n") == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.write(path, [])
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == "old"


def test_coco_results_have_the_category_ids_of_the_annotations():
    result = {
        "rois": np.array([[1, 2, 11, 22]], np.int32),
        "class_ids": np.array([CLASS_NAMES.index("toothbrush")], np.int32),
        "scores": np.array([0.5], np.float32),
        "masks": [{"size": [30, 30], "counts": "abc"}],
    }
    (found,) = build_coco_results(139, result, CATEGORY_IDS)
    assert (found["image_id"], found["category_id"]) == (139, 90)
    assert found["bbox"] == [2, 1, 20, 10]
    json.dumps(found)


def test_folders_give_images_but_no_output_of_an_earlier_run(tmp_path):
    for name in ("a.png", "._a.png", "b.jfif"):
        Image.fromarray(synthetic_image(40, 60)).save(tmp_path / name, format="PNG")
    demo.write(tmp_path / "a_detections.png", synthetic_image(40, 60))
    assert [path.name for path in demo.find_images([str(tmp_path)])] == ["a.png", "b.jfif"]
