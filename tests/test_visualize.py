"""Pictures are compared with colours worked out by hand, drawings with what their Axes hold."""

import itertools
import sys
import types

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import TinyNetwork
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from skimage.io import imread

import utils
import visualize
from dataset import TorchDataset

NAMES = ["BG", "cat", "dog", "bird"]
# Both draw instances, the second one for the frames of videos.
both = pytest.mark.parametrize("draw", [visualize.draw_instances, visualize.paint_instances])
NONE = np.zeros((0, 4)), np.zeros((60, 80, 0), bool), np.zeros(0, int), NAMES, np.zeros(0)


@pytest.fixture(autouse=True)
def nothing_is_shown(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a window was shown")

    monkeypatch.setattr(plt, "show", fail)
    yield
    assert plt.get_fignums() == []


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture
def ax():
    figure = Figure(figsize=(8, 6), dpi=100)
    FigureCanvasAgg(figure)
    return figure.add_axes((0, 0, 1, 1))


def disk(height, width, y, x, radius):
    rows, cols = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (cols - x) ** 2 <= radius**2


def scene(height=200, width=300):
    """Three instances of two classes, the first far larger than the others."""
    masks = np.stack([disk(height, width, 100, 150, 70), disk(height, width, 100, 150, 20)], -1)
    masks = np.concatenate([masks, disk(height, width, 160, 270, 15)[..., None]], -1)
    return utils.extract_bboxes(masks), masks, np.array([1, 2, 1])


def changed(picture, image):
    return (picture != image).any(axis=2)


def near(picture, color, tolerance=12):
    return (np.abs(picture.astype(int) - np.multiply(color, 255)) <= tolerance).all(axis=2)


def polygons(ax):
    """Outlines of the boxes on `ax`, [N, (y1, x1, y2, x2)], with their dash patterns."""
    boxes, dashes = [], []
    for collection in ax.collections:
        if isinstance(collection, PolyCollection):
            styles = itertools.cycle(collection.get_linestyle())  # one may stand for all
            for path, (_, pattern) in zip(collection.get_paths(), styles, strict=False):
                (x1, y1), (x2, y2) = path.vertices.min(0), path.vertices.max(0)
                boxes.append([y1 + 0.5, x1 + 0.5, y2 + 0.5, x2 + 0.5])
                dashes.append(pattern is not None)
    return np.array(boxes), dashes


# --- Colours and pixels --------------------------------------------------------------------------


@pytest.mark.parametrize("mask_type", [bool, np.uint8, np.float32])
def test_apply_mask_blends_in_place(mask_type):
    image = np.full((2, 2, 3), 100, np.uint8)
    mask = np.array([[1, 0], [0, 1]]).astype(mask_type)
    result = visualize.apply_mask(image, mask, (1, 0, 0.5), alpha=0.25)
    assert result is image
    # 100 * 0.75 + 255 * 0.25 * (1, 0, 0.5) = 138.75, 75, 106.875
    assert image.tolist() == [[[139, 75, 107], [100] * 3], [[100] * 3, [139, 75, 107]]]


def test_apply_mask_keeps_other_dtypes():
    assert visualize.apply_mask(
        np.full((1, 1, 3), 100, np.uint32), np.ones((1, 1)), (1, 1, 0)
    ).tolist() == [[[178, 178, 50]]]  # 177.5, ties to even
    floats = visualize.apply_mask(np.full((1, 1, 3), 100.0), np.ones((1, 1)), (1, 1, 0))
    assert floats.tolist() == [[[177.5, 177.5, 50]]]


def test_random_colors():
    assert visualize.random_colors(0) == []
    assert visualize.random_colors(5, seed=3) == visualize.random_colors(5, seed=3)
    first = {visualize.random_colors(1, seed=seed)[0] for seed in range(5)}
    assert len(first) == 5
    colors = np.array(visualize.random_colors(12, seed=0))
    assert colors.min() >= 0
    np.testing.assert_allclose(colors.max(axis=1), 1)
    distance = np.abs(colors[:, None] - colors).sum(-1) + 9 * np.eye(12)
    assert distance.min() > 0.25
    assert np.max(visualize.random_colors(12, bright=False)) == pytest.approx(0.7)


def test_draw_box_paints_two_pixels_inside_the_box():
    image = np.zeros((9, 12, 3), np.uint8)
    assert visualize.draw_box(image, np.array([1, 2, 8, 20]), [7, 8, 9]) is image
    expected = np.zeros((9, 12), bool)
    expected[1:8, 2:12] = True
    expected[3:6, 4:10] = False
    np.testing.assert_array_equal(image.any(axis=2), expected)
    assert image[1, 2].tolist() == [7, 8, 9]


# --- draw_instances ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(16, 16), (61, 97), (97, 61), (1023, 517), (421, 1000), (1000, 421)]
)
@both
def test_no_instances_leave_the_image_as_it_is(draw, shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    masks = np.zeros((*shape, 0), bool)
    picture = draw(image, np.zeros((0, 4)), masks, np.zeros(0, int), NAMES)
    assert picture.dtype == np.uint8
    assert picture is not image
    np.testing.assert_array_equal(picture, image)


def test_masks_are_blended_as_by_hand():
    image = np.random.default_rng(2).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    before = image.copy()
    boxes, masks, class_ids = scene()
    colors = [(1, 0, 0), (0, 0, 1), "lime"]
    picture = visualize.draw_instances(
        image, boxes, masks, class_ids, NAMES,
        colors=colors, captions=[""] * 3, show_bbox=False, alpha=0.4,
    )  # fmt: skip
    np.testing.assert_array_equal(image, before)
    contours = np.zeros((200, 300), bool)
    for mask, radius in zip(masks.transpose(2, 0, 1), (70, 20, 15), strict=True):
        y, x = np.argwhere(mask).mean(0)
        contours |= disk(200, 300, y, x, radius + 4) & ~disk(200, 300, y, x, radius - 4)
    expected = image.astype(float)
    for i in (0, 1, 2):  # the largest first
        color = np.array([(255, 0, 0), (0, 0, 255), (0, 255, 0)][i])
        expected[masks[..., i]] = np.rint(0.6 * expected[masks[..., i]] + 0.4 * color)
    np.testing.assert_array_equal(picture[~contours], expected[~contours])
    # The contour line, antialiased, is as good as red somewhere in every row that it crosses.
    assert near(picture, (1, 0, 0), 80)[32:168].any(axis=1).all()


def test_large_instances_do_not_hide_small_ones():
    image = np.zeros((200, 300, 3), np.uint8)
    boxes, masks, class_ids = scene()
    small_first = [2, 1, 0]
    pictures = [
        visualize.draw_instances(
            image, boxes[order], masks[..., order], class_ids[order], NAMES,
            colors=np.eye(3)[order], captions=[""] * 3, alpha=1,
        )
        for order in ([0, 1, 2], small_first)
    ]  # fmt: skip
    np.testing.assert_array_equal(*pictures)
    assert pictures[0][100, 150].tolist() == [0, 255, 0]


def test_masks_stay_inside_their_boxes():
    image = np.zeros((60, 80, 3), np.uint8)
    picture = visualize.draw_instances(
        image, np.array([[20, 20, 40, 40]]), np.ones((60, 80, 1), bool), np.array([1]), NAMES,
        colors=["white"], captions=[""], show_bbox=False,
    )  # fmt: skip
    assert picture[21:39, 21:39].min() >= 127
    outside = changed(picture, image)
    outside[18:42, 18:42] = False
    assert not outside.any()


def test_contours_run_along_the_edge_of_the_mask(ax, image):
    masks = np.zeros((60, 80, 1), bool)
    masks[20:40, 30:80] = True
    visualize.display_instances(
        image, utils.extract_bboxes(masks), masks, np.array([1]), NAMES, ax=ax
    )
    (contours,) = (c for c in ax.collections if isinstance(c, LineCollection))
    (contour,) = contours.get_segments()
    assert contour.min(0).tolist() == [29.5, 19.5]  # pixel centres are whole numbers
    assert contour.max(0).tolist() == [79.5, 39.5]


def test_run_lengths_draw_like_arrays(image):
    masks = np.stack([disk(60, 80, 30, 40, 15), disk(60, 80, 20, 20, 9)], -1)
    boxes, class_ids = utils.extract_bboxes(masks), np.array([1, 2])
    rles = [utils.rle_encode(masks[..., i]) for i in range(2)]
    np.testing.assert_array_equal(
        visualize.draw_instances(image, boxes, rles, class_ids, NAMES),
        visualize.draw_instances(image, boxes, masks, class_ids, NAMES),
    )


def test_boxes_are_lines_on_their_edges():
    image = np.zeros((100, 100, 3), np.uint8)
    picture = visualize.draw_instances(
        image, np.array([[20, 30, 80, 90]]), None, np.array([1]), NAMES,
        colors=["red"], captions=[""],
    )  # fmt: skip
    assert near(picture, (1, 0, 0), 80)[[20, 79], 60].all()
    assert near(picture, (1, 0, 0), 80)[50, [30, 89]].all()
    touched = changed(picture, image)
    assert touched[50].nonzero()[0].tolist() == [29, 30, 89, 90]  # centred on the half-open edge
    assert not touched[22:78, 32:88].any()
    assert not visualize.draw_instances(
        image, np.array([[20, 30, 80, 90]]), None, np.array([1]), NAMES,
        captions=[""], show_bbox=False,
    ).any()  # fmt: skip


@pytest.mark.parametrize(("color", "ink"), [((1, 1, 0), 0), ((0, 0, 0.5), 255)])
def test_label_is_legible_and_above_its_box(color, ink):
    image = np.full((200, 300, 3), 128, np.uint8)
    picture = visualize.draw_instances(
        image, np.array([[100, 50, 180, 250]]), None, np.array([2]), NAMES, np.array([0.9]),
        colors=[color], show_bbox=False,
    )  # fmt: skip
    rows, cols = np.nonzero(changed(picture, image))
    assert 80 <= rows.min() < rows.max() < 100
    assert 49 <= cols.min() <= 50
    assert cols.max() < 150
    label = picture[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
    assert near(label, color).mean() > 0.4
    assert near(label, [ink / 255] * 3, 60).sum() > 20


@pytest.mark.parametrize("box", [[0, 0, 50, 300], [0, 260, 200, 300], [190, 290, 200, 300]])
def test_labels_stay_inside_the_image(ax, box):
    image = np.zeros((200, 300, 3), np.uint8)
    visualize.display_instances(image, np.array([box]), None, np.array([3]), NAMES, ax=ax)
    (text,) = ax.texts
    ax.figure.canvas.draw()
    label, frame = text.get_bbox_patch().get_window_extent(), ax.get_window_extent()
    assert label.x0 >= frame.x0 - 1
    assert label.y0 >= frame.y0 - 1
    assert label.x1 <= frame.x1 + 1
    assert label.y1 <= frame.y1 + 1


def test_labels_move_apart(ax):
    boxes = np.array([[50, 50, 150, 200], [52, 51, 150, 199], [55, 53, 148, 198], [52, 52, 90, 90]])
    class_ids = np.array([1, 2, 3, 1])
    visualize.display_instances(
        np.zeros((200, 300, 3), np.uint8), boxes, None, class_ids, NAMES, ax=ax
    )
    assert sorted(text.get_text() for text in ax.texts) == ["bird", "cat", "cat", "dog"]
    ax.figure.canvas.draw()
    labels = [text.get_bbox_patch().get_window_extent() for text in ax.texts]
    for i, one in enumerate(labels):
        for other in labels[:i]:
            assert min(one.x1, other.x1) - max(one.x0, other.x0) < 1 or (
                min(one.y1, other.y1) - max(one.y0, other.y0) < 1
            )


def test_colors_by_class():
    image = np.zeros((200, 300, 3), np.uint8)
    boxes, masks, class_ids = scene()
    nothing = {"captions": [""] * 3, "show_bbox": False, "alpha": 1, "colors": "class"}
    picture = visualize.draw_instances(image, boxes, masks, class_ids, NAMES, **nothing)
    cat, dog = picture[60, 110], picture[100, 150]
    np.testing.assert_array_equal(cat, picture[160, 270])
    assert np.abs(cat.astype(int) - dog).max() > 60
    again = visualize.draw_instances(
        image, boxes[1:], masks[..., 1:], class_ids[1:], NAMES, **nothing | {"captions": [""] * 2}
    )
    np.testing.assert_array_equal(again[100, 150], dog)
    np.testing.assert_array_equal(again[160, 270], cat)
    by_instance = visualize.draw_instances(
        image, boxes, masks, class_ids, NAMES, **nothing | {"colors": None}
    )
    assert (by_instance[60, 110] != by_instance[160, 270]).any()


@both
def test_empty_boxes_are_not_drawn(draw, image):
    boxes = np.array([[0, 0, 0, 0], [10, 10, 10, 30], [30, 30, 20, 40], [70, 90, 80, 99]], float)
    boxes = np.vstack([boxes, np.full((1, 4), np.nan)])
    masks, class_ids = np.ones((60, 80, 5), bool), np.ones(5, int)
    np.testing.assert_array_equal(draw(image, boxes, masks, class_ids, NAMES), image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": np.zeros((60, 80, 2), bool)}, "'masks': 2"),
        ({"class_ids": np.ones(3, int)}, "'class_ids': 3"),
        ({"captions": []}, "'captions': 0"),
        ({"colors": ["red", "red"]}, "colors must hold one per instance, 1, got 2"),
        ({"colors": "clas"}, 'colors must be "class"'),
    ],
)
@both
def test_instances_must_agree(draw, image, change, message):
    one = {"boxes": np.ones((1, 4)), "masks": None, "class_ids": np.ones(1, int)}
    with pytest.raises(ValueError, match=message):
        draw(image, **one | {"class_names": NAMES} | change)


# --- Frames of videos ----------------------------------------------------------------------------


def test_painted_instances_look_like_drawn_ones():
    image = np.random.default_rng(2).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    before = image.copy()
    boxes, masks, class_ids = scene()
    options = {"colors": [(1, 0, 0), (0, 0, 1), "lime"], "captions": [""] * 3, "alpha": 0.4}
    drawn, painted = (
        f(image, boxes, masks, class_ids, NAMES, **options)
        for f in (visualize.draw_instances, visualize.paint_instances)
    )
    np.testing.assert_array_equal(image, before)
    inside = disk(200, 300, 100, 150, 60) & ~disk(200, 300, 100, 150, 32)
    assert inside.sum() > 5000
    np.testing.assert_array_equal(painted[inside], drawn[inside])
    assert (painted[inside] != image[inside]).any(axis=1).all()
    np.testing.assert_array_equal(painted[:20], image[:20])


def test_painted_lines_are_whole_pixels_inside_what_they_surround():
    image = np.zeros((720, 1280, 3), np.uint8)
    mask = np.zeros((720, 1280), bool)
    mask[300:400, 500:700] = True
    picture = visualize.paint_instances(
        image, np.array([[290, 480, 420, 740]]), [utils.rle_encode(mask)], np.array([1]), NAMES,
        colors=["red"], captions=[""], alpha=0,
    )  # fmt: skip
    expected = np.zeros((720, 1280), bool)
    for y1, x1, y2, x2 in ((290, 480, 420, 740), (300, 500, 400, 700)):
        expected[y1:y2, x1:x2] = True
        expected[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3] = False
    np.testing.assert_array_equal(picture[:, :, 0] == 255, expected)
    assert not picture[~expected].any()


@pytest.mark.parametrize(("color", "ink"), [((1, 1, 0), 0), ((0, 0, 0.5), 255)])
@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((100, 50, 180, 250), (80, 100), (50, 150)),
        ((0, 50, 180, 250), (0, 20), (50, 150)),  # inside, where there is no room above
        ((100, 290, 180, 300), (80, 100), (200, 300)),  # as far to the right as it goes
    ],
)
def test_painted_labels_are_legible_and_in_place(color, ink, box, rows, columns):
    image = np.full((200, 300, 3), 128, np.uint8)
    options = {"class_ids": np.array([2]), "class_names": NAMES, "colors": [color]}
    picture, without = (
        visualize.paint_instances(image, np.array([box]), None, captions=captions, **options)
        for captions in (["dog #7 0.90"], [""])
    )
    y, x = np.nonzero(changed(picture, without))
    assert rows[0] <= y.min() < y.max() < rows[1]
    assert columns[0] <= x.min() < x.max() < columns[1]
    label = picture[y.min() : y.max() + 1, x.min() : x.max() + 1]
    assert near(label, color).mean() > 0.4
    assert near(label, [ink / 255] * 3, 60).sum() > 20


def test_labels_that_find_no_room_are_cut_off():
    image = np.zeros((10, 12, 3), np.uint8)
    box = np.array([[2, 2, 8, 9]])
    picture = visualize.paint_instances(image, box, None, np.array([1]), NAMES, np.array([0.5]))
    assert picture.shape == image.shape
    assert picture.any()


# --- Figures -------------------------------------------------------------------------------------


def test_display_instances_draws_on_the_given_axes(ax, image):
    boxes = np.array([[5, 5, 30, 40], [10, 50, 50, 75]])
    class_ids, scores = np.array([1, -2]), np.array([0.987, 0.5])
    assert visualize.display_instances(
        image, boxes, None, class_ids, NAMES, scores, "Pets", ax=ax
    ) is ax  # fmt: skip
    texts = {text.get_text(): text for text in ax.texts}
    assert set(texts) == {"cat 0.99", "dog (crowd) 0.50"}
    assert ax.get_title() == "Pets"
    np.testing.assert_array_equal(ax.images[0].get_array(), image)
    found, dotted = polygons(ax)
    np.testing.assert_allclose(sorted(found.tolist()), boxes)
    assert not any(dotted)


def test_captions_replace_names_and_may_hold_dollars(ax, image):
    boxes, class_ids = np.array([[5, 5, 30, 40], [10, 50, 50, 75]]), np.array([1, 2])
    visualize.display_instances(
        image, boxes, None, class_ids, NAMES, ax=ax, captions=["$5 or 6$", ""]
    )
    (text,) = ax.texts
    assert text.get_text() == "$5 or 6$"
    assert not text.get_parse_math()


def test_show_only_for_own_figures_and_where_it_can(monkeypatch, image):
    calls = []
    monkeypatch.setattr(plt, "show", lambda: calls.append(plt.get_fignums()))
    visualize.display_instances(image, *NONE)
    visualize.display_images([image])
    assert calls == []  # this backend only writes files
    monkeypatch.setattr(plt, "get_backend", lambda: "QtAgg")
    shown_by_others = plt.figure("another")
    visualize.display_instances(image, *NONE, ax=shown_by_others.add_subplot())
    visualize.display_instances(image, *NONE, show=False)
    assert calls == []
    plt.close(shown_by_others)
    visualize.display_instances(image, *NONE)
    visualize.display_images([image])
    assert calls == [[1], [1, 2]]
    plt.close("all")


def test_save_path(tmp_path, image):
    visualize.display_instances(image, *NONE, figsize=(3, 2), save_path=tmp_path / "one.png")
    visualize.display_images([image] * 2, save_path=tmp_path / "two.png")
    visualize.display_differences(
        image, *NONE[:1], *NONE[2:0:-1], *NONE[:1], NONE[2], NONE[4], NONE[1], NAMES,
        save_path=tmp_path / "three.png",
    )  # fmt: skip
    for name in ("one", "two", "three"):
        assert imread(tmp_path / f"{name}.png").std() > 10


def test_display_images_fills_whole_rows(image):
    figure = visualize.display_images([image, image[..., 0]] * 2, ["a", "b", "c", "d"], cols=2)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "d"]
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 2)
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), image[..., 0])
    assert visualize.display_images([]).axes == []


def test_display_top_masks(image):
    masks = np.zeros((60, 80, 4), bool)
    masks[:2, :2, 0] = masks[10:40, 10:40, 1] = masks[50:52, :3, 2] = True
    figure = visualize.display_top_masks(image, masks, np.array([1, 2, 1, 3]), NAMES)
    assert [ax.get_title() for ax in figure.axes] == ["H x W = 60 x 80", "dog", "cat"]
    numbered = np.zeros((60, 80))
    numbered[:2, :2], numbered[50:52, :3] = 1, 2
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), numbered)
    assert len(visualize.display_top_masks(image, *NONE[1:4]).axes) == 1


def test_display_differences(ax):
    image = np.zeros((100, 100, 3), np.uint8)
    squares = np.array([[10, 10, 30, 30], [60, 60, 80, 80], [10, 20, 30, 40], [60, 60, 80, 80]])
    padding = np.zeros((1, 4), int)
    masks = np.zeros((100, 100, 5), bool)
    for i, (y1, x1, y2, x2) in enumerate(squares):
        masks[y1:y2, x1:x2, i] = True
    # Ground truth: padding, 0, 1. Predictions, worst first: 2 (half of 0), padding, 3 (all of 1,
    # but of another class), one below the score threshold.
    visualize.display_differences(
        image,
        np.vstack([padding, squares[:2]]), np.array([0, 1, 2]), masks[..., [4, 0, 1]],
        np.vstack([squares[2:3], padding, squares[[3, 0]]]), np.array([1, 0, 3, 1]),
        np.array([0.6, 0, 0.8, 0.4]), masks[..., [2, 4, 3, 0]],
        NAMES, ax=ax, iou_threshold=0.3,
    )  # fmt: skip
    assert sorted(text.get_text() for text in ax.texts) == ["0.60 / 0.33", "0.80 / 1.00"]
    boxes, _ = polygons(ax)
    assert sorted(boxes.tolist()) == sorted(squares.tolist())
    blended = ax.images[0].get_array()
    assert blended[20, 15].tolist() == [0, 102, 0]
    assert blended[20, 35].tolist() == [128, 0, 0]


def test_display_differences_without_ground_truth(ax, image):
    masks = disk(60, 80, 30, 40, 15)[..., None]
    visualize.display_differences(
        image, np.zeros((0, 4)), np.zeros(0, int), NONE[1],
        utils.extract_bboxes(masks), np.array([1]), np.array([0.9]), masks, NAMES, ax=ax,
    )  # fmt: skip
    assert [text.get_text() for text in ax.texts] == ["0.90 / 0.00"]


def test_draw_boxes(ax, image):
    boxes = np.array([[5, 5, 20, 20], [0, 0, 0, 0], [10, 30, 40, 60], [2, 60, 30, 78]])
    refined = boxes + 3
    visualize.draw_boxes(
        image, boxes, refined, captions=list("abcd"), visibilities=[0, 1, 1, 2], title="t", ax=ax
    )
    assert sorted(text.get_text() for text in ax.texts) == ["a", "c", "d"]
    found, dotted = polygons(ax)
    drawn = sorted(zip(found.tolist(), dotted, strict=True))
    before = [(boxes[0].tolist(), True), (boxes[2].tolist(), True), (boxes[3].tolist(), False)]
    assert drawn == sorted(before + [(refined[i].tolist(), False) for i in (2, 3)])
    edges = np.vstack([c.get_edgecolor() for c in ax.collections if isinstance(c, PolyCollection)])
    assert (edges[:, :3] == 0.5).all(axis=1).sum() == 1
    (joins,) = (c for c in ax.collections if isinstance(c, LineCollection))
    assert sorted(s.tolist() for s in joins.get_segments()) == [
        [[29.5, 9.5], [32.5, 12.5]],
        [[59.5, 1.5], [62.5, 4.5]],
    ]
    with pytest.raises(ValueError, match="got neither"):
        visualize.draw_boxes(image)


def test_draw_boxes_with_masks_only_of_refined_boxes(image):
    masks = disk(60, 80, 30, 40, 15)[..., None]
    drawn = visualize.draw_boxes(image, refined_boxes=utils.extract_bboxes(masks), masks=masks)
    changes = changed(drawn.images[0].get_array(), image)
    assert (changes <= masks[..., 0]).all()
    assert changes.sum() > 0.9 * masks.sum()


def test_draw_rois(image):
    rois = np.array([[5, 5, 25, 25], [10, 40, 50, 70], [30, 5, 55, 30]])
    masks = np.ones((3, 28, 28), np.float32)
    drawn = visualize.draw_rois(image, rois, rois + 2, masks, np.array([1, 0, 2]), NAMES)
    assert sorted(text.get_text() for text in drawn.texts) == ["cat", "dog"]
    assert drawn.get_title() == "3 of 3 RoIs, 2 of them positive"
    changes = changed(drawn.images[0].get_array(), image)
    assert changes[5:25, 5:25].mean() > 0.9
    assert not changes[10:50, 40:70].any()
    drawn = visualize.draw_rois(image, rois, rois, masks, np.array([1, 0, 2]), NAMES, limit=1)
    assert len(polygons(drawn)[0]) in (1, 2)
    empty = np.zeros((0, 4))
    visualize.draw_rois(image, empty, empty, np.zeros((0, 28, 28)), np.zeros(0, int), NAMES)


# --- The stages ----------------------------------------------------------------------------------


def test_anchor_stage():
    image = np.full((400, 500, 3), 90, np.uint8)
    anchors = np.array([[50, 50, 150, 250], [200, 200, 300, 300]])
    picture = visualize.draw_anchor_stage(image, anchors, anchors + 30, anchors[:1] + 30, limit=2)
    panel = 500
    assert picture.dtype == np.uint8
    assert picture.shape == (400 + 8 + 28, 3 * panel + 4 * 8, 3)
    panels = [picture[28:428, 8 + i * (panel + 8) :][:, :panel] for i in range(3)]
    best, other = plt.get_cmap("plasma")([1.0, 0.3])[:, :3]
    assert near(panels[1], best, 60)[79:81, 100:200].any(axis=0).all()
    assert near(panels[1], other, 60)[229:231, 250:300].any(axis=0).all()
    touched = [(np.abs(p.astype(int) - 60) > 40).any(axis=2) for p in panels]  # 90 - 90 / 3
    top = [t[50, 52:248].mean() for t in touched]
    refined_top = [t[79:81, 90:270].any(axis=0).mean() for t in touched]
    assert 0.2 < top[0] < 0.9  # dotted
    assert refined_top[0] < 0.1
    assert refined_top[1] > 0.95
    assert refined_top[2] > 0.95
    assert touched[1][65, 63:68].any()  # joined at the corner
    assert not touched[2][200:300, 190:215].any()  # not kept
    assert not touched[2][60:70, 60:70].any()
    np.testing.assert_array_equal(panels[0][390, 490], [60, 60, 60])


def test_refinement_stage():
    image = np.full((200, 300, 3), 90, np.uint8)
    proposals, boxes = np.array([[20, 20, 120, 180]]), np.array([[40, 40, 140, 200]])
    picture = visualize.draw_refinement_stage(
        image, proposals, boxes, np.array([1]), NAMES, np.array([0.9])
    )
    assert picture.shape == image.shape
    touched = changed(picture, np.full_like(image, 60))
    assert 0.3 < touched[20, 22:178].mean() < 0.95
    assert touched[40, 42:198].all()
    assert touched[30, 29:32].any()
    assert touched[141:155, 40:70].mean() > 0.8  # the label
    assert not touched[:15].any()


def test_mask_stage():
    image = np.full((200, 300, 3), 90, np.uint8)
    boxes, _, class_ids = scene()
    probs = np.zeros((3, 28, 28), np.float32)
    probs[:, :, :14] = 1
    picture = visualize.draw_mask_stage(image, probs, boxes, class_ids, NAMES)
    side = 112
    assert picture.shape == (28 + 3 * (side + 8), 8 + 3 * (side + 8), 3)
    column = picture[28:, 8 : 8 + side]
    raw, pasted = column[side + 8 : 2 * side + 8], column[2 * side + 16 : -8]
    high, low = (np.array(plt.get_cmap("magma")(p)[:3]) for p in (1.0, 0.0))
    assert near(raw, high, 2)[:, 2:54].all()
    assert near(raw, low, 2)[:, 58:110].all()
    blue = np.array(visualize.random_colors(3, seed=0)[0])
    blend = (90 + 255 * blue) / 2 / 255
    assert near(pasted, blend, 2)[20:90, 20:50].all()
    assert near(pasted, [90 / 255] * 3, 2)[20:90, 62:98].all()
    assert visualize.draw_mask_stage(
        image, probs, boxes, class_ids, NAMES, limit=2
    ).shape == (28 + 3 * 158, 8 + 2 * 158, 3)  # fmt: skip


def test_stages_without_instances(image):
    boxes, _, class_ids, names, scores = NONE
    assert visualize.draw_anchor_stage(image, boxes, boxes, boxes).shape[1] == 3 * 320 + 4 * 8
    refinement = visualize.draw_refinement_stage(image, boxes, boxes, class_ids, names, scores)
    np.testing.assert_array_equal(refinement, image - image // 3)
    probs = np.zeros((0, 28, 28))
    sheet = visualize.draw_mask_stage(image, probs, boxes, class_ids, names, scores)
    np.testing.assert_array_equal(sheet, image)


# --- Plots and tables ----------------------------------------------------------------------------


def test_plot_precision_recall():
    drawn = visualize.plot_precision_recall(0.75, np.array([1, 1, 0.5]), np.array([0, 0.5, 1]))
    np.testing.assert_array_equal(drawn.lines[0].get_xydata(), [[0, 1], [0.5, 1], [1, 0.5]])
    assert drawn.get_title() == "Precision-recall curve, AP@50 = 0.750"


def test_plot_overlaps():
    overlaps = np.array([[0.8, 0], [0.2, 0.7]])
    drawn = visualize.plot_overlaps(
        np.array([1, 2, 0]), np.array([1, 3, 0]), np.array([0.9, 0.6, 0]), overlaps, NAMES
    )
    texts = [text.get_text() for text in drawn.texts]
    assert texts == ["0.800\nmatch", "0.000\n", "0.200\n", "0.700\nwrong"]
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["cat 0.90", "bird 0.60"]
    assert [label.get_text() for label in drawn.get_xticklabels()] == ["cat", "dog"]
    none = np.zeros(0, int)
    assert not visualize.plot_overlaps(none, none, np.zeros(0), np.zeros((0, 0)), NAMES).texts


def test_plot_loss(tmp_path):
    loss, val_loss = [[3, 1, 0.5, 0.5, 0.5, 0.5], [2, 0.5, 0.5, 0.5, 0.25, 0.25]], [[4] * 6]
    figure = visualize.plot_loss(loss, val_loss, log_dir=tmp_path)
    assert imread(tmp_path / "loss.png").std() > 10
    assert [ax.get_title() for ax in figure.axes] == list(visualize.LOSS_NAMES)
    train, valid = figure.axes[4].lines
    np.testing.assert_array_equal(train.get_xydata(), [[1, 0.5], [2, 0.25]])
    np.testing.assert_array_equal(valid.get_xydata(), [[1, 4]])
    (total,) = visualize.plot_loss([3, 2], [], save=False).axes
    np.testing.assert_array_equal(total.lines[0].get_ydata(), [3, 2])
    with pytest.raises(ValueError, match="needs log_dir"):
        visualize.plot_loss([3], [3])


def test_plot_history():
    records = [
        {"epoch": 1, "loss": 3.0, "val_loss": 4.0},
        {"epoch": 2, "loss": 2.0, "val_loss": 3.5, "segm_AP": 0.25},
    ]
    losses, scores = visualize.plot_history(records).axes
    assert [line.get_label() for line in losses.lines] == ["loss", "val_loss"]
    np.testing.assert_array_equal(losses.lines[1].get_xydata(), [[1, 4], [2, 3.5]])
    (line,) = scores.lines
    assert line.get_label() == "segm_AP"
    np.testing.assert_array_equal(line.get_xydata(), [[2, 0.25]])
    assert len(visualize.plot_history(records[:1]).axes) == 1  # nothing was evaluated
    assert visualize.plot_history([]).axes == []


def test_plot_weights():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    first, second = visualize.plot_weights(model).axes
    assert [ax.get_title() for ax in (first, second)] == ["0.weight\n4 x 3", "1.weight\n5 x 4"]
    assert sum(bar.get_height() for bar in second.patches) == 20
    low, high = (model[0].weight.min().item(), model[0].weight.max().item())
    assert first.patches[0].get_x() == pytest.approx(low)
    assert first.patches[-1].get_x() + first.patches[-1].get_width() == pytest.approx(high)
    assert len(visualize.plot_weights(model, ".*", limit=3).axes) == 3
    model[0].weight.data[0] = torch.nan
    assert sum(bar.get_height() for bar in visualize.plot_weights(model).axes[0].patches) == 9
    with pytest.raises(ValueError, match=r"such as 0\.weight, .*, got 'conv'"):
        visualize.plot_weights(model, "conv")


def test_display_activations_shows_the_liveliest_channels():
    maps = torch.tensor([1.0, 3.0, 2.0])[:, None, None] * torch.eye(4)
    figure = visualize.display_activations({"C2": maps, "C3": maps[:1].numpy()}, channels=2)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["C2, channel 1", "C2, channel 2", "C3, channel 0", ""]
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), maps[1])
    assert figure.axes[0].get_gridspec().get_geometry() == (2, 2)


def test_display_table_prints(capsys):
    visualize.display_table([["name", "n"], ["weight", 12]])
    assert capsys.readouterr().out == "name    n\nweight  12\n"
    visualize.display_table([])
    assert capsys.readouterr().out == ""


def test_display_table_in_a_notebook(monkeypatch, capsys):
    shown = []
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=None)
    display.HTML, display.display = str, shown.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    visualize.display_table([["a<b", 1]])
    assert shown == ["<table><tr><td>a&lt;b</td><td>1</td></tr></table>"]
    assert capsys.readouterr().out == ""


def test_display_weight_stats(capsys):
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 1), torch.nn.Linear(2, 1), torch.nn.Linear(2, 1), torch.nn.BatchNorm2d(1)
    )
    with torch.no_grad():
        for parameter in model[:3].parameters():
            parameter.zero_()
        model[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
        model[2].weight.copy_(torch.tensor([[-2000.0, 0.0]]))
        model[2].bias.fill_(torch.nan)
        model[3].running_var.fill_(5000)  # of what the layer is given: not a weight
    rows = {row[0]: row[1:] for row in visualize.display_weight_stats(model)}
    assert rows["0.weight"] == ["(1, 2)", "  +1.0000", "  +2.0000", "  +0.5000", ""]
    assert rows["1.weight"][-1] == "dead?"
    assert rows["1.bias"][-1] == rows["3.running_mean"][-1] == rows["3.running_var"][-1] == ""
    assert rows["2.weight"][-1] == "overflow?"
    assert rows["2.bias"][-1] == "not finite"
    assert "3.num_batches_tracked" not in rows
    assert "overflow?" in capsys.readouterr().out


@both
def test_labels_give_way_to_the_picture_where_there_are_many(draw):
    image = np.full((200, 300, 3), 90, np.uint8)

    def picture(count, **options):
        corners = np.stack(np.divmod(np.arange(count), 15), axis=1) * 18
        boxes = np.concatenate([corners, corners + 12], axis=1)
        return draw(image, boxes, None, np.ones(count, int), NAMES, np.full(count, 0.5), **options)

    for count, labelled in ((100, True), (101, False)):
        plain = picture(count, captions=[""] * count)
        assert (picture(count) != plain).any() == labelled


class Blocks(utils.Dataset):
    """An image of two rectangles, of which a mini mask loses nothing."""

    def __init__(self):
        super().__init__()
        for i, name in enumerate(NAMES[1:], start=1):
            self.add_class("pets", i, name)
        self.add_image("pets", image_id=0, path=None)
        self.prepare()

    def load_image(self, image_id):
        return np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8)

    def load_mask(self, image_id):
        masks = np.zeros((128, 128, 2), bool)
        masks[10:50, 20:60, 0] = masks[70:120, 60:118, 1] = True
        return masks, np.array([1, 3], np.int32)


def test_annotations_and_targets_are_drawn_as_instances():
    data = Blocks()
    image, (masks, class_ids) = data.load_image(0), data.load_mask(0)
    boxes = np.array([[10, 20, 50, 60], [70, 60, 120, 118]])
    expected = visualize.draw_instances(image, boxes, masks, class_ids, NAMES)
    np.testing.assert_array_equal(visualize.draw_annotations(data, 0), expected)
    plain = visualize.draw_instances(image, boxes, masks, class_ids, NAMES, captions=["", ""])
    assert (plain != expected).any()
    np.testing.assert_array_equal(visualize.draw_annotations(data, 0, captions=["", ""]), plain)
    for options in ({}, {"MINI_MASK_SHAPE": (7, 9)}, {"USE_MINI_MASK": False}):
        item = TorchDataset(data, TinyNetwork(NUM_CLASSES=4, **options))[0]
        np.testing.assert_array_equal(visualize.draw_target(*item, NAMES), expected)


def test_draw_anchor_levels(monkeypatch):
    figures = []
    render = visualize._render
    monkeypatch.setattr(
        visualize, "_render", lambda figure: figures.append(figure) or render(figure)
    )
    image = np.full((128, 64, 3), 90, np.uint8)
    config = TinyNetwork(RPN_ANCHOR_RATIOS=(1, 4))
    picture = visualize.draw_anchor_levels(image, config)
    assert picture.dtype == np.uint8
    first, *others = figures[0].axes
    assert first.get_title() == f"P2: {2 * 32 * 16} of 8 pixels"
    assert [ax.get_title() for ax in others][-1] == "P6: 4 of 128 pixels"
    # In the middle a square of 8 x 8 pixels and one of 4 x 16.
    boxes, dashes = polygons(first)
    assert boxes.tolist() == [[60, 28, 68, 36], [62, 24, 66, 40]]
    assert not any(dashes)
    (dots,) = first.lines
    assert len(np.unique(dots.get_xydata(), axis=0)) == 32 * 16


@both
def test_all_kinds_of_masks_are_drawn_alike(draw):
    boxes = np.array([[4, 6, 24, 30], [20, 10, 40, 50]])
    masks = np.zeros((48, 64, 2), bool)
    masks[6:20, 8:30, 0] = masks[22:40, 10:44, 1] = True
    encoded = [utils.rle_encode(masks[:, :, i]) for i in range(2)]
    cut = [masks[y1:y2, x1:x2, i] for i, (y1, x1, y2, x2) in enumerate(boxes)]
    image = np.full((48, 64, 3), 90, np.uint8)
    pictures = [
        draw(image, boxes, kind, np.array([1, 1]), ["BG", "cell"]) for kind in (masks, encoded, cut)
    ]
    assert (pictures[0] != image).any()
    np.testing.assert_array_equal(pictures[1], pictures[0])
    np.testing.assert_array_equal(pictures[2], pictures[0])
