"""Outlines to masks and back, against scikit-image and pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy import ndimage
from skimage.draw import polygon

import outlines
import utils

# pycocotools and numpy 2 disagree about __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def random_outline(rng, grid):
    points = rng.uniform(-10, 50, (rng.integers(3, 12), 2))
    return points if grid == 0 else np.round(points * grid) / grid


@pytest.mark.parametrize("grid", [0, 1, 2], ids=["anywhere", "corners", "corners and centres"])
def test_outlines_take_the_pixels_that_skimage_takes(grid):
    rng = np.random.default_rng(grid)
    for _ in range(200):
        size, outline = rng.integers(1, 50, 2), random_outline(rng, grid)
        expected = np.zeros(size, dtype=bool)
        expected[polygon(outline[:, 1] - 0.5, outline[:, 0] - 0.5, size)] = True
        (y1, x1, y2, x2), part = outlines.draw([outline], size)
        mask = np.zeros(size, dtype=bool)
        mask[y1:y2, x1:x2] = part
        np.testing.assert_array_equal(mask, expected)


def test_drawings_of_one_object_are_united_in_a_tight_box():
    first, second = outlines.rectangle(2, 3, 4, 5), outlines.rectangle(10, -5, 30, 9)
    third = utils.rle_encode(np.eye(20, dtype=bool))
    box, part = outlines.draw([first, second, third], (20, 20))
    assert box == (0, 0, 20, 20)
    assert part.sum() == 4 * 5 + 10 * 4 + 20 - 3
    assert outlines.draw([first], (20, 20))[0] == (3, 2, 8, 6)
    assert outlines.draw([outlines.rectangle(30, 3, 4, 5)], (20, 20))[1].size == 0


def test_many_points_take_no_time():
    angle = np.linspace(0, 2 * np.pi, 30_000)
    star = np.stack([500 + 400 * np.cos(angle), 500 + 400 * np.sin(7 * angle)], axis=1)
    assert outlines.draw([star], (1000, 1000))[1].any()  # point by pixel it takes half a minute


def random_masks(count, largest=100):
    rng = np.random.default_rng(0)
    for i in range(count):
        values = rng.random(rng.integers(1, largest, 2))
        if i % 3:
            values = ndimage.gaussian_filter(values, rng.uniform(0.7, 5))
        yield values > np.quantile(values, rng.uniform(0.2, 0.9))


def decode(polygons, shape):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *shape))) > 0


def test_polygons_with_all_corners_are_the_mask():
    for mask in random_masks(60, 50):
        if mask.any():
            polygons = outlines.mask_polygons(utils.rle_encode(mask), tolerance=0)
            np.testing.assert_array_equal(decode(polygons, mask.shape), mask)
            assert len(polygons) == ndimage.label(mask)[1]  # holes are bays


def test_simplified_polygons_keep_the_mask():
    for mask in random_masks(60):
        if mask.any():
            found = decode(outlines.mask_polygons(utils.rle_encode(mask)), mask.shape)
            assert (found & mask).sum() >= 0.95 * (found | mask).sum()


def test_a_ring_becomes_one_polygon_of_few_points():
    y, x = np.mgrid[:200, :200]
    mask = ((y - 100) ** 2 + (x - 100) ** 2 < 80**2) & ((y - 90) ** 2 + (x - 90) ** 2 > 30**2)
    (points,) = outlines.mask_polygons(utils.rle_encode(mask))
    assert len(points) / 2 < 150
    assert not decode([points], mask.shape)[90, 90]


def test_the_corners_of_a_square_are_its_polygon():
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:9, 2:8] = True
    (points,) = outlines.mask_polygons(utils.rle_encode(mask))
    assert {tuple(p) for p in np.reshape(points, (-1, 2))} == {(2, 3), (8, 3), (8, 9), (2, 9)}
    assert outlines.mask_polygons(utils.rle_encode(mask & False)) == []
