"""samples/nuclei.py: its augmentation, its command line, and the weights that ship."""

import argparse
import json

import numpy as np
import pytest
import torch
from conftest import SHARED, needs_shared
from PIL import Image

import evaluation
import model as modellib
import utils
import weights
from samples import nuclei

NUCLEI = SHARED / "data" / "nuclei"


def cells(count, size, radius, seed=0):
    """Bright discs on a dim, noisy ground, [S, S, 3] uint8 and [S, S, N] bool."""
    rng = np.random.default_rng(seed)
    step = size / count
    centers = [(step * (i + 0.5), step * (j + 0.5)) for i in range(count) for j in range(count)]
    y, x = np.mgrid[:size, :size] + 0.5
    masks = np.stack([np.hypot(y - cy, x - cx) < radius for cy, cx in centers], axis=2)
    image = rng.normal(12, 2, (size, size)) + 100 * masks.any(axis=2)
    return np.repeat(image[..., None].clip(0, 255).astype(np.uint8), 3, axis=2), masks


def write_coco(folder, images):
    """images/ and instances_{train,val}.json of (image, masks)."""
    (folder / "images").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "nucleus"}]}
    for i, (image, masks) in enumerate(images, start=1):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        height, width = image.shape[:2]
        content["images"].append(
            {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
        )
        for mask in masks.transpose(2, 0, 1):
            annotation = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": 1}
            annotation |= {"segmentation": utils.rle_encode(mask), "iscrowd": 0}
            content["annotations"].append(annotation)
    for subset in ("train", "val"):
        (folder / f"instances_{subset}.json").write_text(json.dumps(content))


def test_crops_are_square_parts_of_the_image_that_show_a_nucleus():
    y, x = np.mgrid[:100, :120].astype(np.uint8)
    image = np.stack([y, x, x], axis=2)
    masks = np.zeros((100, 120, 1), dtype=bool)
    masks[60:95, 10:50, 0] = True
    crop, sides = nuclei.Crop(0.4, 0.65), []
    for seed in range(100):
        part, cut = crop(image, masks, np.random.default_rng(seed))
        top, left = part[0, 0, :2].astype(int)
        side = len(part)
        np.testing.assert_array_equal(part, image[top : top + side, left : left + side])
        np.testing.assert_array_equal(cut, masks[top : top + side, left : left + side])
        assert part.shape == (side, side, 3)
        assert cut.any()
        sides.append(side)
    assert 40 <= min(sides) < 45
    assert 60 < max(sides) <= 65


def test_exposure_keeps_the_order_of_grey_levels_and_the_masks():
    image = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    masks = np.zeros((16, 16, 2), dtype=bool)
    levels = []
    for seed in range(50):
        exposed, same = nuclei.expose(image, masks, np.random.default_rng(seed))
        assert same is masks
        assert exposed.dtype == np.uint8
        curve = exposed[..., 0].ravel().astype(int)
        assert curve[0] == 0
        assert (np.diff(curve) >= 0).all()
        levels.append(curve[128])
    # 128 becomes at least 255 * 0.406 * 0.502 ** 1.65 = 33, and at most 255.
    assert 33 <= min(levels) < 70
    assert 170 < max(levels) <= 255


def test_half_of_the_images_lose_sharpness_and_gain_noise():
    image, masks = cells(4, 64, 6)
    sharpness, noise = [], []
    for seed in range(60):
        degraded, same = nuclei.degrade(image, masks, np.random.default_rng(seed))
        assert same is masks
        assert degraded.dtype == np.uint8
        assert (degraded == degraded[..., :1]).all()  # grey stays grey
        sharpness.append(np.abs(np.diff(degraded[..., 0].astype(float), axis=0)).max())
        noise.append(np.std(degraded[masks.any(axis=2)]))
    assert 20 <= len({*noise}) - 1 <= 40  # the rest are as they were
    assert min(sharpness) < 60 < max(sharpness)


def test_training_leaves_weights_for_whole_images(tmp_path, monkeypatch, capsys):
    write_coco(tmp_path, [cells(2, 64, 8, seed) for seed in range(10)])
    small = {"backbone": {"blocks": (1, 1, 1, 1), "width": 8}, "pyramid": 16}
    for config in (nuclei.NucleiConfig, nuclei.TrainingConfig):
        monkeypatch.setattr(config, "BACKBONE", small["backbone"])
        monkeypatch.setattr(config, "TOP_DOWN_PYRAMID_SIZE", small["pyramid"])
    monkeypatch.setattr(nuclei.TrainingConfig, "IMAGE_MIN_DIM", 64)
    monkeypatch.setattr(nuclei.TrainingConfig, "IMAGE_MAX_DIM", 64)
    monkeypatch.setattr(nuclei.TrainingConfig, "NUM_WORKERS", 0)
    output = tmp_path / "out.pth"
    common = ["--dataset", str(tmp_path), "--device", "cpu"]
    train = ["train", "--epochs", "1", "--steps", "2", "--logs", str(tmp_path / "logs")]
    assert nuclei.main([*train, *common, "--output", str(output)]) == 0

    options = weights.read_options(output)
    assert (options["IMAGE_RESIZE_MODE"], options["NAME"]) == ("pad64", "nuclei")
    card = json.loads(output.with_suffix(".json").read_text())
    assert (card["class_names"], card["config"]["IMAGE_MIN_SCALE"]) == (["BG", "nucleus"], 2)
    (log,) = (tmp_path / "logs").glob("nuclei*")
    record = json.loads((log / "history.jsonl").read_text().splitlines()[-1])
    assert record["steps"] == 2
    assert 0 <= record["segm_AP"] <= 1  # whole images were looked at, after crops were learned
    trained = torch.load(output, weights_only=True)["model"]
    assert trained["fpn.C1.1.running_mean"].abs().max() > 0  # TRAIN_BN

    capsys.readouterr()
    numbers = []
    for name in (str(output), "last"):
        run = ["evaluate", *common, "--model", name, "--logs", str(tmp_path / "logs")]
        assert nuclei.main(run) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("10 images, 40 objects")
        numbers.append(lines[1:])
    assert numbers[0] == numbers[1]
    assert nuclei.main(["train", *common, "--model", str(output)]) == 2
    assert "must be last or left out" in capsys.readouterr().err


def test_a_missing_data_set_is_one_line(tmp_path, capsys):
    assert nuclei.main(["evaluate", "--dataset", str(tmp_path), "--device", "cpu"]) == 2
    assert "instances_val.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def shipped():
    return modellib.MaskRCNN.from_weights(nuclei.WEIGHTS)


def test_the_shipped_weights_are_small_and_say_what_they_are(shipped):
    assert nuclei.WEIGHTS.stat().st_size < 10_000_000
    for name in ("BACKBONE", "IMAGE_MIN_SCALE", "DETECTION_TILE", "DETECTION_MAX_INSTANCES"):
        expected = weights.plain(getattr(nuclei.NucleiConfig, name))
        assert weights.plain(getattr(shipped.config, name)) == expected, name
    card = json.loads(nuclei.WEIGHTS.with_suffix(".json").read_text())
    assert card["class_names"] == ["BG", "nucleus"]
    assert card["config"]["IMAGE_RESIZE_MODE"] == "pad64"
    assert {"command", "data", "seed", "segm_AP", "segm_AP50", "version"} <= card.keys()


@pytest.mark.parametrize(
    ("size", "count", "radius"), [(256, 6, 8), (360, 4, 25), (520, 20, 7), (700, 8, 25)]
)
def test_the_shipped_weights_find_bright_discs(shipped, size, count, radius):
    image, masks = cells(count, size, radius)
    result = shipped.detect([image])[0]
    overlaps = utils.compute_overlaps_masks(masks, result["masks"])
    assert (overlaps.max(axis=1) > 0.7).sum() >= 0.9 * masks.shape[2]
    assert (overlaps.max(axis=0) < 0.5).sum() <= 0.1 * masks.shape[2]


@needs_shared
def test_the_shipped_weights_on_validation_images(shipped):
    data = nuclei.load(argparse.Namespace(dataset=NUCLEI), "val")
    ids = np.linspace(0, data.num_images - 1, 10).astype(int)
    result = evaluation.evaluate_coco(shipped, data, image_ids=ids, min_confidence=0.0, verbose=0)
    assert result.segm["AP"] > 0.5
    assert result.segm["AP50"] > 0.8
