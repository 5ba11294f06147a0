"""The generated scenes of the sample shapes, and the weights that ship with it on a photograph."""

import json

import numpy as np
import pytest
from scipy import ndimage
from skimage import data

import utils
import weights
from dataset import TorchDataset
from model import MaskRCNN
from samples import scenes, shapes

SEEDS = range(40, 52)


def fresh(seed):
    return scenes.scene.__wrapped__(seed)


def filled_share(mask):
    """Area over that of the smallest rectangle around, at any angle: 0.5, 0.79 and 1 in theory."""
    y, x = np.nonzero(mask & ~ndimage.binary_erosion(mask))
    angles = np.linspace(0, np.pi / 2, 45, endpoint=False)[:, None]
    across, along = y * np.cos(angles) - x * np.sin(angles), y * np.sin(angles) + x * np.cos(angles)
    return (mask.sum() / ((np.ptp(across, axis=1) + 1) * (np.ptp(along, axis=1) + 1))).max()


def test_a_seed_gives_one_scene_and_another_seed_another():
    first, again, other = fresh((3, 7)), fresh((3, 7)), fresh((3, 8))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.image != other.image).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_scene_is_an_image_with_disjoint_masks(seed):
    image, masks, class_ids = fresh(seed)
    assert image.shape == (256, 256, 3)
    assert image.dtype == np.uint8
    assert masks.shape == (256, 256, len(class_ids))
    assert masks.dtype == bool
    assert masks.sum(axis=2).max() == 1
    assert masks.sum(axis=(0, 1)).min() >= 30
    assert 1 <= len(class_ids) <= 30
    assert set(class_ids.tolist()) <= {1, 2, 3}


def test_masks_have_the_shape_of_their_class():
    shares = {1: [], 2: [], 3: []}
    for seed in SEEDS:
        _, masks, class_ids = fresh(seed)
        objects = np.pad(masks.any(axis=2), 2, constant_values=True)
        for mask, (y1, x1, y2, x2), class_id in zip(
            np.moveaxis(masks, 2, 0), utils.extract_bboxes(masks), class_ids, strict=True
        ):
            mask = np.pad(mask[y1:y2, x1:x2], 2)
            others = objects[y1 : y2 + 4, x1 : x2 + 4] & ~mask
            whole = not (others & ndimage.binary_dilation(mask)).any()
            if whole and mask.sum() > 300:
                shares[class_id].append(filled_share(mask))
    assert min(map(len, shares.values())) >= 10
    medians = [np.median(shares[class_id]) for class_id in (1, 2, 3)]
    np.testing.assert_allclose(medians, [np.pi / 4, 0.91, 0.53], atol=0.05)


def test_objects_are_drawn_where_their_masks_say():
    # The edge of an object is an edge of the picture: steps across it are larger than elsewhere.
    ratios = []
    for seed in SEEDS:
        image, masks, _ = fresh(seed)
        steps = np.hypot(*np.gradient(image.mean(axis=2)))
        edge = np.zeros((256, 256), bool)
        for mask in np.moveaxis(masks, 2, 0):
            edge |= np.hypot(*np.gradient(mask.astype(float))) > 0
        ratios.append(steps[edge].mean() / steps[~edge].mean())
    assert min(ratios) > 1
    assert np.median(ratios) > 2


def test_dataset_draws_the_scenes_of_its_seed():
    dataset = shapes.ShapesDataset(3, seed=5)
    masks, class_ids = dataset.load_mask(2)
    image, expected_masks, expected_ids = fresh((5, 2))
    np.testing.assert_array_equal(dataset.load_image(2), image)
    np.testing.assert_array_equal(masks, expected_masks)
    np.testing.assert_array_equal(class_ids, expected_ids)
    assert dataset.class_names == ["BG", "circle", "square", "triangle"]
    _, item = TorchDataset(dataset, shapes.ShapesConfig())[2]
    np.testing.assert_array_equal(item["boxes"].numpy(), utils.extract_bboxes(expected_masks))


def test_truth_of_the_coins_is_24_discs():
    _, masks, _ = scenes.coins()
    grey = data.coins()
    assert masks.shape == (303, 384, 24)
    assert masks.sum(axis=2).max() == 1
    boxes = utils.extract_bboxes(masks)
    sides = boxes[:, 2:] - boxes[:, :2]
    np.testing.assert_allclose(masks.sum(axis=(0, 1)) / sides.prod(axis=1), np.pi / 4, atol=0.07)
    for mask in np.moveaxis(masks, 2, 0):
        around = ndimage.binary_dilation(mask, iterations=5) & ~ndimage.binary_dilation(mask)
        assert grey[mask].mean() > grey[around].mean() + 25


def test_compare_counts_by_hand():
    masks = np.zeros((20, 20, 3), bool)
    masks[:8, :10, 0], masks[10:, :10, 1], masks[10:, 10:, 2] = True, True, True
    truth = scenes.Scene(np.zeros((20, 20, 3), np.uint8), masks, np.array([1, 1, 1]))
    found = np.zeros((20, 20, 3), bool)
    found[:10, :10, 0], found[10:, :10, 1], found[:9, 11:, 2] = True, True, True
    result = {
        "rois": utils.extract_bboxes(found),
        "class_ids": np.array([1, 2, 1]),  # the second is of another class, the third nowhere
        "scores": np.array([0.9, 0.8, 0.7]),
        "masks": found,
    }
    assert shapes.compare(result, truth) == (1, 2, 0.8)


def test_training_leaves_weights_and_a_card(tmp_path, monkeypatch, capsys):
    few = shapes.ShapesDataset
    monkeypatch.setattr(shapes, "ShapesDataset", lambda count, seed: few(min(count, 2), seed))
    monkeypatch.setattr(shapes.ShapesConfig, "NUM_WORKERS", 0)
    output = tmp_path / "new.pth"
    options = [f"--logs={tmp_path}", f"--output={output}", "--seed=3", "--device=cpu"]
    assert shapes.main(["train", "--epochs=1", "--steps=1", *options]) == 0
    card = json.loads(output.with_suffix(".json").read_text())
    assert card["command"] == "python samples/shapes.py train --epochs 1 --steps 1 --seed 3"
    assert (card["seed"], card["coins"]["of"], card["config"]["SEED"]) == (3, 24, 3)
    assert card["config"]["CLASS_NAMES"] == shapes.CLASS_NAMES
    first = weights.read_state_dict(output).state_dict
    # The run is over, so to resume it changes nothing.
    assert shapes.main(["train", "--epochs=1", "--steps=1", "--resume", *options]) == 0
    for key, tensor in weights.read_state_dict(output).state_dict.items():
        assert tensor.equal(first[key])
    capsys.readouterr()
    assert shapes.main(["evaluate", f"--model={output}", "--limit=2", "--device=cpu"]) == 0
    assert "of 24 found" in capsys.readouterr().out


def test_shipped_weights_find_the_coins_of_a_photograph():
    model = MaskRCNN.from_weights(shapes.WEIGHTS)
    found, false, overlap = shapes.compare(model.detect([data.coins()])[0], scenes.coins())
    assert found >= 22
    assert false <= 2
    assert overlap >= 0.8


def test_shipped_weights_tell_the_classes_apart():
    model = MaskRCNN.from_weights(shapes.WEIGHTS)
    objects = found = false = 0
    for i in range(10):
        truth = scenes.scene((shapes.HELD_OUT, i))
        hits, misses, _ = shapes.compare(model.detect([truth.image])[0], truth)
        objects, found, false = objects + len(truth.class_ids), found + hits, false + misses
    assert found >= 0.8 * objects
    assert false <= 0.1 * objects


def test_card_describes_the_shipped_weights():
    card = json.loads(shapes.WEIGHTS.with_suffix(".json").read_text())
    file = weights.read_state_dict(shapes.WEIGHTS)
    assert shapes.WEIGHTS.stat().st_size < 8e6
    assert card["class_names"] == shapes.CLASS_NAMES
    # Of an option of that time others took the place.
    config = {k: v for k, v in card["config"].items() if k != "BACKBONE_STYLE"}
    found = json.loads(json.dumps(file.config))
    assert config == {name: found[name] for name in config}
    assert card["config"]["NUM_CLASSES"] == 4
    assert card["coins"]["found"] >= 22
