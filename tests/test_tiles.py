"""Windows, scales and mirror images: what they cover, and that objects come out once and whole."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import DATA, TinyNetwork
from PIL import Image
from reference_inputs import synthetic_image

import coco
import demo
import tiles
import utils
from config import Config
from detections import Objects
from model import MaskRCNN
from samples.scenes import scene

CONFIG = Config(DETECTION_MIN_CONFIDENCE=0.28)


def objects_of(masks, class_ids, scores) -> Objects:
    """Objects of masks [H, W, N], as a perfect network would give them."""
    boxes = utils.extract_bboxes(masks)
    parts = [
        ((y1, x1, y2, x2), masks[y1:y2, x1:x2, i])
        for i, (y1, x1, y2, x2) in enumerate(boxes.tolist())
    ]
    order = np.argsort(-np.asarray(scores, np.float32), kind="stable")
    return Objects(
        boxes[order].astype(np.float32),
        np.asarray(class_ids, np.int32)[order],
        np.asarray(scores, np.float32)[order],
        [parts[i] for i in order],
    )


def masks_of(objects, size):
    masks = np.zeros((*size, len(objects.scores)), bool)
    for i, ((y1, x1, y2, x2), part) in enumerate(objects.parts):
        masks[y1:y2, x1:x2, i] = part
    return masks


def disk(size, y, x, radius):
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def seen_in_windows(masks, class_ids, windows, rng, least=0.1):
    """What a network that finds all it sees would give for each window, placed in the image."""
    found = []
    for window in windows:
        view = tiles.View(window, 1.0, "none")
        cuts = view.cut(masks)
        areas = cuts.sum(axis=(0, 1))
        visible = areas > np.maximum(least * masks.sum(axis=(0, 1)), 4)
        scores = rng.uniform(0.5, 1, visible.sum())
        objects = objects_of(cuts[:, :, visible], np.asarray(class_ids)[visible], scores)
        found.append((view, view.place(objects)))
    return found


def same_masks(found, expected):
    """Whether two stacks [H, W, N] hold the same masks in whatever order."""
    pack = [
        sorted(np.packbits(m).tobytes() for m in np.moveaxis(s, 2, 0)) for s in (found, expected)
    ]
    return pack[0] == pack[1]


# --- Windows ---


@pytest.mark.parametrize("seed", range(20))
def test_windows_cover_an_image_with_at_least_the_overlap(seed):
    rng = np.random.default_rng(seed)
    size, tile = rng.integers(1, 400, 2).tolist(), rng.integers(16, 200, 2).tolist()
    overlap = float(rng.choice([0, 0.25, 0.5, 8, 15]))
    windows = tiles.windows(size, tile, overlap)
    covered = np.zeros(size, int)
    for y1, x1, y2, x2 in windows:
        assert (y2 - y1, x2 - x1) == (min(size[0], tile[0]), min(size[1], tile[1]))
        covered[y1:y2, x1:x2] += 1
    assert covered.min() == 1 or min(size) == 0
    for axis in (0, 1):
        spans = sorted({(window[axis], window[axis + 2]) for window in windows})
        shared = [a[1] - b[0] for a, b in itertools.pairwise(spans)]
        least = round(overlap * tile[axis]) if overlap < 1 else overlap
        assert all(pixels >= least for pixels in shared)
        # And no more windows than that takes.
        assert (len(spans) - 2) * (tile[axis] - least) + tile[axis] < size[axis] or len(spans) <= 1


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        ((0, 8), 0, "whole pixels"),
        ((8,), 0, "height, width"),
        ((8.5, 8), 0, "whole pixels"),
        ((64, 32), 32, "fewer than the tile"),
        ((64, 64), -1, "share below 1"),
        ((64, 64), float("nan"), "share below 1"),
        (0, 0, "whole pixels"),
        ("ab", 0, "whole pixels"),
        ((float("inf"), 8), 0, "whole pixels"),
    ],
)
def test_windows_that_cannot_be_are_refused(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        tiles.windows((100, 100), tile, overlap)


def test_one_number_is_the_side_of_squares():
    assert tiles.windows((100, 120), 64, 0.25) == tiles.windows((100, 120), (64, 64), 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"DETECTION_TILE": 1024}, "DETECTION_TILE must be"),
        ({"DETECTION_TILE": (100, 200), "DETECTION_OVERLAP": 100}, "fewer than DETECTION_TILE"),
        ({"DETECTION_SCALES": (1e9,)}, "at most 100"),
        ({"DETECTION_SCALES": (2, 2)}, "each once"),
        ({"DETECTION_FLIPS": ("both", "both")}, "each once"),
        ({"DETECTION_FLIPS": "both"}, "DETECTION_FLIPS must be"),
        ({"DETECTION_SCALES": (2.0,), "IMAGE_RESIZE_MODE": "none"}, "does not resize"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options).validate()


def test_a_config_without_windows_gives_one_view():
    assert tiles.views((30, 40, 3), Config()) == [tiles.View((0, 0, 30, 40), 1.0, "none")]


@pytest.mark.parametrize("flip", tiles.FLIPS)
def test_what_is_found_in_a_view_lies_where_it_is_in_the_image(flip):
    masks = np.random.default_rng(0).random((50, 70, 3)) < 0.02
    view = tiles.View((10, 5, 47, 61), 1.0, flip)
    placed = view.place(objects_of(view.cut(masks), [1, 2, 3], [0.9, 0.8, 0.7]))
    expected = np.zeros_like(masks)
    expected[10:47, 5:61] = masks[10:47, 5:61]
    np.testing.assert_array_equal(masks_of(placed, (50, 70)), expected)
    np.testing.assert_array_equal(placed.boxes, utils.extract_bboxes(expected))


# --- Seams ---


@pytest.mark.parametrize("radius", [4, 11])
def test_objects_on_every_seam_come_out_once_and_whole(radius):
    """Disks in a dense grid, so that each seam and crossing cuts some in every way."""
    size, step = (200, 260), 2 * radius + 3
    centers = itertools.product(range(radius, 200, step), range(radius, 260, step))
    masks = np.stack([disk(size, y, x, radius) for y, x in centers], axis=2)
    class_ids = np.arange(masks.shape[2]) % 3 + 1
    windows = tiles.windows(size, (96, 96), 24)
    found = seen_in_windows(masks, class_ids, windows, np.random.default_rng(radius))
    assert sum(len(objects.scores) for _, objects in found) > 1.5 * len(class_ids)
    merged = tiles.merge(found, size, CONFIG)
    assert same_masks(masks_of(merged, size), masks)
    assert (np.diff(merged.scores) <= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_objects_larger_than_the_overlap_are_joined(seed):
    rng = np.random.default_rng(seed)
    size = (240, 240)
    windows = tiles.windows(size, (128, 128), 32)
    masks = np.stack(
        [disk(size, *rng.uniform(70, 170, 2), 50), disk(size, 12, rng.uniform(10, 230), 8)], axis=2
    )
    merged = tiles.merge(seen_in_windows(masks, [1, 1], windows, rng), size, CONFIG)
    assert same_masks(masks_of(merged, size), masks)
    whole = utils.extract_bboxes(masks)
    assert {*map(tuple, merged.boxes.tolist())} == {*map(tuple, whole.tolist())}


def test_objects_of_two_classes_at_one_place_both_stay():
    size = (100, 160)
    masks = np.stack([disk(size, 50, 80, 15)] * 2, axis=2)
    windows = tiles.windows(size, (100, 100), 40)
    found = seen_in_windows(masks, [1, 2], windows, np.random.default_rng(0))
    merged = tiles.merge(found, size, CONFIG)
    assert sorted(merged.class_ids.tolist()) == [1, 2]
    assert same_masks(masks_of(merged, size), masks)


def test_neighbours_that_touch_at_a_seam_stay_two():
    size = (100, 160)
    left, right = np.zeros(size, bool), np.zeros(size, bool)
    left[30:70, 50:80] = True
    right[30:70, 80:110] = True
    masks = np.stack([left, right], axis=2)
    for overlap in (10, 20, 40):
        windows = tiles.windows(size, (100, 100), overlap)
        found = seen_in_windows(masks, [1, 1], windows, np.random.default_rng(0))
        assert same_masks(masks_of(tiles.merge(found, size, CONFIG), size), masks)


def test_the_whole_object_stays_although_its_part_scores_higher():
    size = (100, 200)
    mask = np.zeros((*size, 1), bool)
    mask[40:60, 90:120] = True
    frames = [(0, 0, 100, 100), (0, 80, 100, 200)]
    found = []
    for frame, score in zip(frames, (0.99, 0.6), strict=True):
        view = tiles.View(frame, 1.0, "none")
        found.append((view, view.place(objects_of(view.cut(mask), [1], [score]))))
    merged = tiles.merge(found, size, CONFIG)
    assert merged.scores.tolist() == [pytest.approx(0.6)]
    assert same_masks(masks_of(merged, size), mask)


def test_nothing_found_in_any_window_is_an_empty_list():
    empty = objects_of(np.zeros((50, 50, 0), bool), [], [])
    views = [tiles.View(frame, 1.0, "none") for frame in tiles.windows((50, 90), (50, 50), 10)]
    merged = tiles.merge([(view, view.place(empty)) for view in views], (50, 90), CONFIG)
    assert merged.boxes.shape == (0, 4)
    assert len(list(merged.parts)) == len(merged.scores) == len(merged.class_ids) == 0


# --- Votes ---


def test_views_vote_by_score():
    size = (60, 60)
    here, there = disk(size, 20, 20, 10), disk(size, 45, 45, 8)
    wider = disk(size, 20, 20, 12)
    views = [
        objects_of(np.stack([here, there], axis=2), [1, 2], [0.9, 0.8]),
        objects_of(wider[:, :, None], [1], [0.5]),
        objects_of(np.stack([here, there], axis=2), [1, 1], [0.7, 0.9]),
    ]
    merged = tiles.vote(views, CONFIG)
    # Three see the first. The second is of class 1 or 2: each is seen once, 0.9 / 3 and 0.8 / 3.
    np.testing.assert_allclose(merged.scores, [0.7, 0.3], atol=1e-6)
    assert merged.class_ids.tolist() == [1, 1]
    np.testing.assert_array_equal(masks_of(merged, size)[:, :, 0], here)
    np.testing.assert_allclose(
        merged.boxes[0],
        np.array([10, 10, 31, 31]) + np.array([-2, -2, 2, 2]) * 0.5 / 2.1,
        rtol=1e-6,
    )


def test_an_object_counts_once_however_often_a_view_has_it():
    size = (60, 60)
    twice = np.stack([disk(size, 20, 20, 10), disk(size, 20, 21, 10)], axis=2)
    views = [objects_of(twice, [1, 1], [0.9, 0.8]), objects_of(twice[:, :, :1], [1], [0.7])]
    merged = tiles.vote(views, CONFIG)
    np.testing.assert_allclose(merged.scores, [0.8, 0.4], atol=1e-6)


# --- The network ---


@pytest.fixture(scope="module")
def shapes():
    return MaskRCNN.from_weights("shapes")


@pytest.fixture(scope="module")
def canvas():
    """Three scenes side by side, [256, 768, 3]."""
    return np.concatenate([scene(seed).image for seed in (1, 2, 3)], axis=1)


def test_windows_of_the_scenes_give_what_the_scenes_give_alone(shapes, canvas):
    alone = shapes.detect([scene(seed).image for seed in (1, 2, 3)], masks="rle")
    together = shapes.detect([canvas], masks="rle", tile=(256, 256), overlap=0)[0]
    assert sum(len(r["scores"]) for r in alone) - len(together["scores"]) in range(4)  # at seams
    expected = {round(float(s), 4) for r in alone for s in r["scores"]}
    assert {round(float(s), 4) for s in together["scores"]} <= expected


def test_an_image_shifted_against_the_windows_gives_the_same_objects(shapes, canvas):
    """Most objects do not care where the seams are."""
    found = shapes.detect([canvas], masks="full", tile=(216, 256), overlap=80)[0]
    shifted = shapes.detect([canvas[24:, 56:]], masks="full", tile=(216, 256), overlap=80)[0]
    masks = found["masks"][24:, 56:]
    masks = masks[:, :, masks.sum(axis=(0, 1)) > 0.9 * found["masks"].sum(axis=(0, 1))]
    ious = utils.compute_overlaps_masks(masks, shifted["masks"])
    assert (ious.max(axis=1) > 0.7).mean() > 0.9
    assert ((ious > 0.5).sum(axis=1) <= 1).all()  # none twice


def test_a_window_that_holds_the_image_changes_nothing(shapes, canvas):
    plain, tiled = (shapes.detect([canvas], tile=tile)[0] for tile in (None, (2000, 2000)))
    for key in plain:
        np.testing.assert_array_equal(plain[key], tiled[key])


def test_the_network_is_never_shown_more_than_a_window(shapes, canvas, monkeypatch):
    shown = []
    mold = MaskRCNN.mold_inputs

    def watch(self, images, scale=1.0):
        shown.extend(image.shape[:2] for image in images)
        return mold(self, images, scale)

    monkeypatch.setattr(MaskRCNN, "mold_inputs", watch)
    shapes.detect([canvas], masks="box", tile=(200, 250))
    assert {*shown} == {(200, 250)}
    assert len(shown) == len(tiles.windows(canvas.shape, (200, 250), 0.25))


def test_results_are_those_of_the_image_in_all_three_kinds_of_masks(shapes, canvas):
    image = canvas[:, :320]
    full, rle, box = (
        shapes.detect([image], masks=kind, tile=(256, 256))[0] for kind in ("full", "rle", "box")
    )
    assert full["masks"].shape == (*image.shape[:2], len(full["scores"]))
    for i, (y1, x1, y2, x2) in enumerate(full["rois"]):
        mask = full["masks"][:, :, i]
        np.testing.assert_array_equal(utils.rle_decode(rle["masks"][i]), mask)
        np.testing.assert_array_equal(box["masks"][i], mask[y1:y2, x1:x2])


def test_a_scale_shows_the_network_a_larger_or_smaller_image():
    torch.manual_seed(0)
    for mode, scale, expected in [
        ("square", 2.0, (256, 256)),
        ("square", 0.5, (64, 64)),
        ("pad64", 3.0, (320, 192)),
        ("shortest_edge", 2.0, (384, 256)),
    ]:
        options = {"IMAGE_MIN_DIM": None} if mode == "pad64" else {}
        options |= {"IMAGE_MAX_DIM": 256} if mode == "shortest_edge" else {}
        model = MaskRCNN(TinyNetwork(IMAGE_RESIZE_MODE=mode, **options)).eval()
        molded, windows = model.mold_inputs([synthetic_image(90, 60)], scale)
        assert tuple(molded.shape[2:]) == expected, mode
        plain, _ = model.mold_inputs([synthetic_image(90, 60)])
        assert plain.shape[2] < molded.shape[2] or scale < 1
        assert len(windows) == 1


def test_a_scale_needs_a_mode_that_resizes():
    image = synthetic_image(64, 64)
    for mode in ("none", "crop"):
        with pytest.raises(ValueError, match="one scale alone"):
            utils.resize_image(image, min_dim=64, mode=mode, zoom=2.0)


def test_a_view_below_the_threshold_still_counts():
    """Where mirror images disagree about the threshold, their mean decides."""
    every, sure, few = (
        MaskRCNN.from_weights("shapes", DETECTION_FLIPS=("horizontal",), **options).detect(
            [scene(2).image]
        )[0]["scores"]
        for options in (
            {"DETECTION_MIN_CONFIDENCE": tiles.VIEW_CONFIDENCE},
            {"DETECTION_MIN_CONFIDENCE": 0.9},
            {"DETECTION_MIN_CONFIDENCE": 0.9, "DETECTION_MAX_INSTANCES": 3},
        )
    )
    np.testing.assert_array_equal(sure, every[every >= 0.9])
    assert 0 < len(sure) < len(every)
    assert 0 < len(few) <= 3


def test_mirror_images_of_an_image_that_is_its_own_mirror_image(shapes):
    """Then all four votes agree up to the network's own asymmetry."""
    image = scene(2).image
    config = shapes.config
    plain = shapes.detect([image])[0]
    try:
        config.DETECTION_FLIPS = ("horizontal", "vertical", "both")
        voted = shapes.detect([image])[0]
        mirrored = shapes.detect([image[::-1, ::-1]])[0]
    finally:
        config.DETECTION_FLIPS = ()
    np.testing.assert_allclose(voted["scores"], mirrored["scores"], atol=1e-5)
    np.testing.assert_allclose(voted["masks"], mirrored["masks"][::-1, ::-1])
    ious = utils.compute_overlaps_masks(voted["masks"], plain["masks"])
    assert (ious.max(axis=1) > 0.7).mean() > 0.9


# --- The commands ---


def test_the_demo_takes_windows_scales_and_mirror_images(canvas, tmp_path, capsys):
    image = canvas[:, :400]
    Image.fromarray(image).save(tmp_path / "scenes.png")
    options = ["--tile", "256x300", "--overlap", "64", "--scale", "0.9,1.1", "--flip", "horizontal"]
    arguments = [str(tmp_path / "scenes.png"), "--model", "shapes", "--output", str(tmp_path)]
    assert demo.main([*arguments, *options, "--json"]) == 0
    results = json.loads((tmp_path / "scenes.json").read_text())
    model = MaskRCNN.from_weights(
        "shapes",
        DETECTION_MIN_CONFIDENCE=0.7,
        DETECTION_TILE=(256, 300),
        DETECTION_OVERLAP=64,
        DETECTION_SCALES=(0.9, 1.1),
        DETECTION_FLIPS=("horizontal",),
    )
    expected = model.detect([image], masks="rle")[0]
    np.testing.assert_allclose([r["score"] for r in results], expected["scores"], rtol=1e-6)
    assert [r["segmentation"] for r in results] == expected["masks"]
    assert "window" in capsys.readouterr().err  # the progress bar


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--tile", "0"), "must be pixels, as 1024 or 768x1024"),
        (("--tile", "1x2x3"), "must be pixels"),
        (("--overlap", "-1"), "share below 1"),
        (("--scale", "2,x"), "above 0"),
        (("--flip", "sideways"), "must be horizontal, vertical or both"),
    ],
)
def test_options_that_cannot_be_get_one_line(option, message, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--model", "shapes", *option])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_stages_are_of_whole_images(tmp_path, capsys):
    assert demo.main(["--model", "shapes", "--stages", "--tile", "100"]) == 2
    assert "--stages shows images as a whole" in capsys.readouterr().err


def test_evaluation_takes_windows(tmp_path, capsys):
    model = tmp_path / "shapes.pth"
    model.write_bytes((DATA.parent.parent / "samples" / "shapes.pth").read_bytes())
    Image.fromarray(scene(1).image).save(tmp_path / "one.png")
    masks = scene(1).masks
    content = {
        "images": [{"id": 1, "file_name": "one.png", "height": 256, "width": 256}],
        "categories": [
            {"id": i, "name": n} for i, n in enumerate(("circle", "square", "triangle"), 1)
        ],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 1,
                "category_id": int(c),
                "iscrowd": 0,
                "segmentation": utils.rle_encode(masks[:, :, i]),
                "area": int(masks[:, :, i].sum()),
                "bbox": [int(x1), int(y1), int(x2 - x1), int(y2 - y1)],
            }
            for i, (c, (y1, x1, y2, x2)) in enumerate(
                zip(scene(1).class_ids, utils.extract_bboxes(masks), strict=True)
            )
        ],
    }
    (tmp_path / "one.json").write_text(json.dumps(content))
    data = ["--images", str(tmp_path), "--annotations", str(tmp_path / "one.json")]
    views = ["--tile", "160", "--overlap", "0.4", "--max-detections", "50"]
    results = tmp_path / "results.json"
    arguments = ["evaluate", *data, "--model", str(model), *views, "--results", str(results)]
    assert coco.main(arguments) == 0
    assert "segm" in capsys.readouterr().out
    model = MaskRCNN.from_weights("shapes", DETECTION_TILE=(160, 160), DETECTION_OVERLAP=0.4)
    model.config.DETECTION_MIN_CONFIDENCE = 0.0
    expected = model.detect([scene(1).image], masks="rle")[0]
    found = json.loads(results.read_text())
    np.testing.assert_allclose([r["score"] for r in found], expected["scores"], rtol=1e-6)
