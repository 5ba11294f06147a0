"""utils against the Keras reference's numbers, and against scikit-image, scipy, pycocotools and
naive loops where the reference data is not there."""

import copy
import hashlib
import logging
import math
import pickle
import platform
import random
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import scipy.ndimage
import torch
import torchvision
from conftest import ROOT, load_golden
from PIL import Image
from pycocotools import mask as coco_mask
from reference_inputs import uniform
from skimage.transform import resize as skimage_resize

import image_files
import utils

GOLDEN = "training_side.npz"


@pytest.fixture
def golden():
    return load_golden(GOLDEN)


def unpack(packed, shape):
    return np.unpackbits(packed)[: math.prod(shape)].reshape(shape).astype(bool)


def random_boxes(rng, count, size=100):
    corners = np.sort(rng.integers(0, size, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4) + np.array([0, 0, 1, 1])  # at least one pixel


def filled(boxes, height=64, width=64):
    masks = np.zeros((height, width, len(boxes)), dtype=bool)
    for i, (y1, x1, y2, x2) in enumerate(boxes):
        masks[y1:y2, x1:x2, i] = True
    return masks


# --- Boxes ---------------------------------------------------------------------------------------


def test_boxes_match_reference(golden):
    box, gt_box = golden["box_refinement/box"], golden["box_refinement/gt"]
    deltas = utils.box_refinement(box, gt_box)
    np.testing.assert_allclose(deltas, golden["box_refinement/out"], rtol=1e-6, atol=1e-7)
    moved = utils.apply_box_deltas(box, golden["apply_box_deltas/deltas"])
    np.testing.assert_allclose(moved, golden["apply_box_deltas/out"], rtol=1e-6, atol=1e-4)
    unit = utils.norm_boxes(box, (200, 300))
    np.testing.assert_array_equal(unit, golden["norm_boxes/out"])
    np.testing.assert_array_equal(utils.denorm_boxes(unit, (200, 300)), golden["denorm_boxes/out"])
    pixels = utils.denorm_boxes(golden["denorm_boxes/in2"], (427, 640))
    np.testing.assert_array_equal(pixels, golden["denorm_boxes/out2"])
    assert deltas.dtype == moved.dtype == unit.dtype == np.float32
    assert pixels.dtype == np.int32


def test_overlaps_match_reference(golden):
    boxes1, boxes2 = golden["overlaps/boxes1"], golden["overlaps/boxes2"]
    np.testing.assert_array_equal(utils.compute_overlaps(boxes1, boxes2), golden["overlaps/iou"])
    graph = utils.compute_overlaps(boxes1.astype(np.float32), boxes2.astype(np.float32))
    np.testing.assert_array_equal(graph, golden["overlaps/iou_graph"])
    assert graph.dtype == np.float32


def test_overlaps_of_hand_drawn_boxes():
    boxes = np.array([[0, 0, 10, 10], [0, 5, 10, 15], [5, 5, 10, 10], [20, 20, 30, 30]])
    expected = [
        [1, 50 / 150, 25 / 100, 0],
        [50 / 150, 1, 25 / 100, 0],
        [25 / 100, 25 / 100, 1, 0],
        [0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(utils.compute_overlaps(boxes, boxes), expected)
    np.testing.assert_array_equal(utils.compute_iou(boxes[1], boxes), expected[1])


def test_overlaps_match_torchvision():
    rng = np.random.default_rng(0)
    boxes1, boxes2 = random_boxes(rng, 50), random_boxes(rng, 20)
    xyxy = [torch.from_numpy(b[:, [1, 0, 3, 2]]).double() for b in (boxes1, boxes2)]
    expected = torchvision.ops.box_iou(*xyxy).numpy()
    np.testing.assert_allclose(utils.compute_overlaps(boxes1, boxes2), expected, rtol=1e-12)


def test_overlaps_of_empty_and_huge_boxes():
    boxes = np.array([[3, 3, 3, 3], [0, 0, 60000, 60000]], dtype=np.int32)  # area > 2**31
    np.testing.assert_array_equal(utils.compute_overlaps(boxes, boxes), [[0, 0], [0, 1]])
    assert utils.compute_overlaps(boxes, boxes[:0]).shape == (2, 0)
    assert utils.compute_overlaps(boxes[:0], boxes).dtype == np.float64


def test_norm_and_denorm_are_inverse():
    boxes = random_boxes(np.random.default_rng(1), 200, 400)
    unit = utils.norm_boxes(boxes, (401, 517, 3))
    np.testing.assert_allclose(unit[0, 3], (boxes[0, 3] - 1) / 516, rtol=1e-6)
    np.testing.assert_array_equal(utils.denorm_boxes(unit, (401, 517, 3)), boxes)
    full = utils.norm_boxes(np.array([0, 0, 401, 517]), np.array([401, 517]))
    np.testing.assert_array_equal(full, [0, 0, 1, 1])


def test_denorm_rounds_half_to_even():
    unit = np.array([[0.5, 1.5, 1.5, 2.5]]) / 4  # pixels 0.5, 1.5, 2.5, 3.5 of a 5 x 5 image
    np.testing.assert_array_equal(utils.denorm_boxes(unit, (5, 5)), [[0, 2, 2, 4]])


def test_denorm_computes_in_float64():
    unit = np.random.default_rng(4).random((20000, 4)).astype(np.float32)
    scale = np.array([4095, 5119, 4095, 5119])
    expected = np.around(unit.astype(np.float64) * scale + [0, 0, 1, 1])
    in_float32 = np.around(unit * scale.astype(np.float32) + np.float32([0, 0, 1, 1]))
    assert (expected != in_float32).any()
    np.testing.assert_array_equal(utils.denorm_boxes(unit, (4096, 5120)), expected)


def test_deltas_by_hand():
    box, gt_box = np.array([[10, 20, 30, 60]]), np.array([[15, 20, 55, 40]])
    deltas = utils.box_refinement(box, gt_box)
    np.testing.assert_allclose(deltas, [[0.75, -0.25, math.log(2), math.log(0.5)]], rtol=1e-6)
    np.testing.assert_allclose(utils.apply_box_deltas(box, deltas), gt_box, rtol=1e-6)


def test_deltas_of_batches_follow_the_order_of_operations():
    rng = np.random.default_rng(2)
    boxes = rng.random((2, 30, 4)).astype(np.float32)
    deltas = rng.standard_normal((2, 30, 4)).astype(np.float32)
    moved = utils.apply_box_deltas(torch.from_numpy(boxes), torch.from_numpy(deltas)).numpy()
    half = np.float32(0.5)
    for axis in (0, 1):
        size = boxes[..., axis + 2] - boxes[..., axis]
        center = (boxes[..., axis] + half * size) + deltas[..., axis] * size
        size = size * torch.from_numpy(deltas[..., axis + 2]).exp().numpy()
        start = center - half * size
        np.testing.assert_array_equal(moved[..., axis], start)
        np.testing.assert_array_equal(moved[..., axis + 2], start + size)


def test_clip_boxes():
    boxes = torch.tensor([[[-1.0, 0.2, 2.0, 0.9]], [[0.3, -5.0, 0.4, 7.0]]])
    clipped = utils.clip_boxes(boxes, (0.0, 0.0, 1.0, 1.0))
    assert clipped.tolist() == torch.tensor([[[0, 0.2, 1, 0.9]], [[0.3, 0, 0.4, 1]]]).tolist()
    windows = torch.tensor([[[0.0, 0.5, 0.5, 0.75]], [[0.0, 0.0, 1.0, 1.0]]])  # one per image
    assert utils.clip_boxes(boxes, windows)[0].tolist() == [[0.0, 0.5, 0.5, 0.75]]


def test_clip_boxes_tames_overflow():
    boxes = utils.apply_box_deltas(np.array([[0.2, 0.2, 0.4, 0.4]]), np.array([[0, 0, 99.0, 99.0]]))
    assert not np.isfinite(boxes).any()
    np.testing.assert_array_equal(utils.clip_boxes(boxes, (0, 0, 1, 1)), [[0, 0, 1, 1]])


def test_facade_keeps_the_kind():
    array = np.array([[1, 2, 3, 4]], dtype=np.float32)
    array.flags.writeable = False
    tensor = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    assert isinstance(utils.compute_overlaps(array, array[:, ::-1]), np.ndarray)
    assert isinstance(utils.compute_overlaps(tensor, tensor), torch.Tensor)
    mixed = utils.compute_overlaps(boxes1=array, boxes2=tensor)
    assert isinstance(mixed, torch.Tensor)
    assert mixed.item() == pytest.approx(4 / 6)
    assert utils.norm_boxes.__doc__


# --- Anchors -------------------------------------------------------------------------------------

PYRAMIDS = {
    "256": ((8, 16, 32, 64, 128), (256, 256)),
    "256b": ((16, 32, 64, 128, 256), (256, 256)),
    "320x448": ((32, 64, 128, 256, 512), (320, 448)),
    "1024": ((32, 64, 128, 256, 512), (1024, 1024)),
}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_anchors_match_reference(golden, name):
    scales, shape = PYRAMIDS[name]
    feature_shapes = golden[f"anchors/{name}/backbone_shapes"]
    anchors = utils.generate_pyramid_anchors(
        scales, (0.5, 1, 2), feature_shapes, (4, 8, 16, 32, 64), 1
    )
    index = golden[f"anchors/{name}/idx"]
    np.testing.assert_array_equal(anchors[index], golden[f"anchors/{name}/boxes_px_at_idx"])
    unit = utils.norm_boxes(anchors, shape)
    np.testing.assert_array_equal(unit[index], golden[f"anchors/{name}/boxes_norm_at_idx"])
    for array, key in ((anchors, "sha256_px_f64"), (unit, "sha256_norm_f32")):
        assert hashlib.sha256(array.tobytes()).hexdigest() == golden[f"anchors/{name}/{key}"]


def test_anchors_with_stride_match_reference(golden):
    shapes = golden["anchors/256/backbone_shapes"]
    anchors = utils.generate_pyramid_anchors(
        (32, 64, 128, 256, 512), (0.5, 1, 2), shapes, (4, 8, 16, 32, 64), 2
    )
    np.testing.assert_array_equal(anchors, golden["anchors/256_stride2/boxes_px"])


def test_anchors_match_naive_loops():
    expected = [
        (y - s / r**0.5 / 2, x - s * r**0.5 / 2, y + s / r**0.5 / 2, x + s * r**0.5 / 2)
        for y in (0, 32, 64)
        for x in (0, 32)
        for r in (0.5, 1, 2)
        for s in (10, 20)
    ]
    anchors = utils.generate_anchors((10, 20), (0.5, 1, 2), (5, 4), 16, 2)
    np.testing.assert_allclose(anchors, expected, rtol=1e-14)


def test_pyramid_needs_one_scale_per_level():
    with pytest.raises(ValueError, match="zip"):
        utils.generate_pyramid_anchors((8, 16), (1,), [(4, 4)], [4], 1)


# --- Images --------------------------------------------------------------------------------------


def test_images_are_read_by_the_names_that_notebooks_use():
    assert utils.load_image is image_files.load_image
    assert utils.as_uint8_image is image_files.as_uint8_image


RGB = np.random.default_rng(5).integers(0, 256, (12, 17, 3)).astype(np.uint8)


def skimage_reference(image, shape):
    return skimage_resize(
        image, shape, order=1, mode="constant", anti_aliasing=False, preserve_range=True
    )


@pytest.mark.parametrize("trailing", [(), (1,), (3,)])
def test_resize_equals_skimage(trailing):
    rng = np.random.default_rng(6)
    for _ in range(60):
        shape, new_shape = rng.integers(1, 60, 2), tuple(rng.integers(1, 60, 2))
        image = rng.integers(0, 256, (*shape, *trailing)).astype(np.uint8)
        resized, expected = utils.resize(image, new_shape), skimage_reference(image, new_shape)
        assert resized.dtype == np.float64
        np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-9)


def test_resize_equals_skimage_for_other_dtypes():
    rng = np.random.default_rng(7)
    for image in (rng.random((9, 14)) > 0.5, rng.standard_normal((9, 14, 2))):
        expected = skimage_reference(image.astype(np.float64), (21, 6))
        np.testing.assert_allclose(utils.resize(image, (21, 6)), expected, rtol=0, atol=1e-12)


def test_resize_by_hand():
    # 0 beyond the border, but never below the image's least value.
    np.testing.assert_array_equal(utils.resize(np.array([[0, 8]]), (1, 4)), [[0, 2, 6, 6]])
    np.testing.assert_array_equal(utils.resize(np.array([[4, 8]]), (1, 4)), [[4, 5, 7, 6]])
    np.testing.assert_array_equal(utils.resize(np.full((2, 2), 9), (5, 3)), np.full((5, 3), 9))
    assert utils.resize(np.ones((3, 4, 2)), (0, 5)).shape == (0, 5, 2)
    assert utils.resize(np.ones((3, 4, 0)), (6, 5)).shape == (6, 5, 0)


RESIZE_CASES = {
    "square_up": (60, 90, {"min_dim": 100, "max_dim": 128}),
    "square_down": (150, 101, {"min_dim": 100, "max_dim": 128}),
    "square_noscale": (100, 128, {"min_dim": 100, "max_dim": 128}),
    "pad64": (70, 90, {"min_dim": 128, "mode": "pad64"}),
    "pad64_minscale": (70, 90, {"min_dim": 64, "min_scale": 2.0, "mode": "pad64"}),
    "none": (33, 47, {"min_dim": 64, "max_dim": 64, "mode": "none"}),
    "crop": (90, 120, {"min_dim": 64, "min_scale": 1.25, "mode": "crop"}),
}


@pytest.mark.parametrize("case", RESIZE_CASES)
def test_resize_image_matches_reference(golden, case):
    height, width, arguments = RESIZE_CASES[case]
    image = np.floor(uniform(f"resize/{case}", (height, width, 3)) * 256).astype(np.uint8)
    random.seed(5)
    resized = utils.resize_image(image, **arguments)
    expected = {k: golden[f"resize_image/{case}/{k}"] for k in ("out", "window", "scale")}
    np.testing.assert_array_equal(resized.image, expected["out"])
    assert resized.image.dtype == np.uint8
    assert resized.window == tuple(expected["window"])
    assert resized.scale == expected["scale"]
    np.testing.assert_array_equal(resized.padding, golden[f"resize_image/{case}/padding"])
    crop = golden[f"resize_image/{case}/crop"].tolist()
    assert (-1 if resized.crop is None else list(resized.crop)) == crop

    mask = uniform(f"resizemask/{case}", (height, width, 3)) > 0.6
    mask = utils.resize_mask(mask, resized.scale, resized.padding, resized.crop)
    packed, shape = (golden[f"resize_mask/{case}/{k}"] for k in ("out_packed", "out_shape"))
    np.testing.assert_array_equal(mask, unpack(packed, shape))


def test_resize_image_square():
    image = np.full((50, 100, 3), 7, dtype=np.uint8)
    square, window, scale, padding, crop = utils.resize_image(image, min_dim=64, max_dim=128)
    assert (window, scale, padding, crop) == (
        (32, 0, 96, 128),
        1.28,
        [(32, 32), (0, 0), (0, 0)],
        None,
    )
    np.testing.assert_array_equal(square[32:96], 7)
    assert square.sum() == 7 * 64 * 128 * 3


def test_resize_image_of_extreme_shape_keeps_a_pixel():
    image = np.full((1, 3000, 3), 9, dtype=np.uint8)
    square, window, scale, padding, _ = utils.resize_image(image, max_dim=128)
    assert window == (63, 0, 64, 128)
    np.testing.assert_array_equal(square[63], 9)
    mask = utils.resize_mask(np.ones((1, 3000, 1), bool), scale, padding)
    np.testing.assert_array_equal(mask[:, :, 0], square[:, :, 0] == 9)


def test_resize_image_crops_at_random():
    image = np.arange(80 * 90, dtype=np.uint16).reshape(80, 90, 1)
    seen = set()
    rng = np.random.default_rng(8)
    for _ in range(300):
        cut, window, scale, _, crop = utils.resize_image(image, min_dim=64, mode="crop", rng=rng)
        y, x, height, width = crop
        assert (window, scale, height, width) == ((0, 0, 64, 64), 1, 64, 64)
        np.testing.assert_array_equal(cut, image[y : y + 64, x : x + 64])
        seen.add((y, x))
    assert {y for y, _ in seen} == set(range(17))
    assert {x for _, x in seen} == set(range(27))


def test_a_square_has_the_side_that_was_asked_for():
    image = np.zeros((50, 80, 3), np.uint8)
    for side in (100, 1000):
        assert utils.resize_image(image, max_dim=side).image.shape == (side, side, 3)
    # Only a zoomed one must come to multiples of 64, since it becomes a network's input.
    for zoom, side in ((1.5, 192), (2.0, 256), (0.01, 64)):
        assert utils.resize_image(image, max_dim=128, zoom=zoom).image.shape == (side, side, 3)


def test_resize_image_refuses():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="got mode='fit'"):
        utils.resize_image(image, max_dim=64, mode="fit")
    with pytest.raises(ValueError, match=r"square with max_dim.*max_dim=None"):
        utils.resize_image(image, min_dim=64)
    with pytest.raises(ValueError, match=r"crop with min_dim.*min_dim=None"):
        utils.resize_image(image, max_dim=64, mode="crop")


# --- Masks ---------------------------------------------------------------------------------------


def test_masks_match_reference(golden):
    shape = golden["masks/shape"]
    masks = unpack(golden["masks/masks_packed"], shape)
    boxes = utils.extract_bboxes(masks)
    np.testing.assert_array_equal(boxes, golden["masks/extract_bboxes"])
    masks, boxes = masks[:, :, :5], boxes[:5]  # the last one is empty
    overlaps = utils.compute_overlaps_masks(masks, masks)
    np.testing.assert_allclose(overlaps, golden["masks/overlaps_masks_0to5_vs_0to5"], atol=1e-7)
    for side in (28, 56):
        mini_masks = utils.minimize_mask(boxes, masks, (side, side))
        np.testing.assert_array_equal(mini_masks, golden[f"minimize_mask/{side}"])
        expanded = utils.expand_mask(boxes, mini_masks, (60, 80, 3))
        expected = unpack(golden[f"expand_mask/{side}_packed"], (60, 80, 5))
        np.testing.assert_array_equal(expanded, expected)


@pytest.mark.parametrize("kind", [("masks28", "full_packed"), ("smooth28", "smooth_full_packed")])
def test_unmold_mask_matches_reference(golden, kind):
    masks, expected = (golden[f"unmold_mask/{key}"] for key in kind)
    boxes = golden["unmold_mask/boxes"]
    full = [utils.unmold_mask(m, b, (60, 80, 3)) for m, b in zip(masks, boxes, strict=True)]
    np.testing.assert_array_equal(np.stack(full, axis=2), unpack(expected, (60, 80, 5)))


def test_resize_mask_equals_scipy():
    rng = np.random.default_rng(9)
    lost = 0
    for _ in range(150):
        mask = rng.integers(1, 200, (*rng.integers(1, 80, 2), 2)).astype(np.uint8)
        scale = rng.uniform(0.5, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = scipy.ndimage.zoom(mask, [scale, scale, 1], order=0)
        if expected.size == 0:
            continue
        resized = utils.resize_mask(mask, scale, [(0, 0)] * 3)
        # scipy zeroes a last row or column whose position rounds to just beyond the mask.
        np.testing.assert_array_equal(np.where(expected == 0, 0, resized), expected)
        lost += (expected == 0).any()
        assert (resized > 0).all()
    assert lost < 20


def test_resize_mask_pads_and_crops():
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    padded = utils.resize_mask(mask, 1, [(1, 0), (0, 2), (0, 0)])[:, :, 0]
    np.testing.assert_array_equal(padded, [[0] * 5, [0, 1, 2, 0, 0], [3, 4, 5, 0, 0]])
    cropped = utils.resize_mask(mask, 2, [(0, 0)] * 3, crop=(1, 2, 2, 3))
    whole = utils.resize_mask(mask, 2, [(0, 0)] * 3)
    np.testing.assert_array_equal(cropped, whole[1:3, 2:5])
    assert utils.resize_mask(np.zeros((4, 5, 0), bool), 2, [(0, 0)] * 3).shape == (8, 10, 0)


def test_extract_bboxes():
    masks = filled([(2, 3, 5, 9), (0, 0, 1, 1), (63, 63, 64, 64), (0, 0, 64, 64), (7, 7, 7, 7)])
    masks[10, 20, 0] = True
    expected = [[2, 3, 11, 21], [0, 0, 1, 1], [63, 63, 64, 64], [0, 0, 64, 64], [0, 0, 0, 0]]
    boxes = utils.extract_bboxes(masks)
    np.testing.assert_array_equal(boxes, expected)
    assert boxes.dtype == np.int32
    np.testing.assert_array_equal(utils.extract_bboxes(masks.astype(np.float32) * 0.3), expected)
    assert utils.extract_bboxes(masks[:, :, :0]).shape == (0, 4)
    np.testing.assert_array_equal(utils.extract_bboxes(masks[:0]), np.zeros((5, 4)))


def test_mini_masks_equal_skimage():
    rng = np.random.default_rng(10)
    boxes = random_boxes(rng, 8, 60)
    masks = scipy.ndimage.gaussian_filter(rng.random((64, 64, 8)), (2, 2, 0)) > 0.5
    mini_masks = utils.minimize_mask(boxes, masks, (28, 20))
    assert mini_masks.any()
    assert not mini_masks.all()
    expanded = utils.expand_mask(boxes, mini_masks, (64, 64))
    for i, (y1, x1, y2, x2) in enumerate(boxes):
        part = masks[y1:y2, x1:x2, i].astype(np.float64)
        mini = np.around(skimage_reference(part, (28, 20))).astype(bool)
        np.testing.assert_array_equal(mini_masks[:, :, i], mini)
        full = np.zeros((64, 64), bool)
        back = skimage_reference(mini.astype(np.float64), (y2 - y1, x2 - x1))
        full[y1:y2, x1:x2] = np.around(back).astype(bool)
        np.testing.assert_array_equal(expanded[:, :, i], full)


def test_minimize_mask_refuses_a_box_without_area():
    boxes = np.array([[0, 0, 2, 2], [5, 5, 5, 9]])
    with pytest.raises(ValueError, match=r"got \[5, 5, 5, 9\] for instance 1; drop"):
        utils.minimize_mask(boxes, np.ones((9, 9, 2), bool), (4, 4))


def test_expand_mask_without_instances_or_area():
    mini_masks = np.ones((28, 28, 2), bool)
    boxes = np.array([[3, 3, 3, 9], [0, 0, 2, 2]])
    areas = utils.expand_mask(boxes, mini_masks, (20, 30, 3)).sum(axis=(0, 1))
    assert areas.tolist() == [0, 4]
    assert utils.expand_mask(boxes[:0], mini_masks[:, :, :0], (20, 30)).shape == (20, 30, 0)


def paste_mask(mask, height, width):
    """A mask in a box of this size, which is not in the corner of its image."""
    box = (5, 3, 5 + height, 3 + width)
    pasted, corners = utils.paste_mask(mask, box, (200, 200))
    assert corners == box
    return pasted


@pytest.mark.parametrize("low", [0.0, 0.3, 0.5])
def test_paste_mask_equals_skimage(low):
    rng = np.random.default_rng(11)
    for _ in range(40):
        mask = (low + (1 - low) * rng.random((28, 28))).astype(np.float32)
        height, width = (int(n) for n in rng.integers(1, 150, 2))
        expected = skimage_reference(mask, (height, width)) >= 0.5
        pasted = paste_mask(torch.from_numpy(mask), height, width)
        assert pasted.dtype == torch.bool
        np.testing.assert_array_equal(pasted.numpy(), expected)


def test_paste_mask_by_hand():
    mask = torch.tensor([[0.0, 1.0]])
    assert paste_mask(mask, 1, 2).tolist() == [[False, True]]
    assert paste_mask(mask, 1, 3).tolist() == [[False, True, True]]  # 0.5 counts
    assert paste_mask(mask, 3, 1).tolist() == [[False], [True], [False]]  # 1/3, 1/2, 1/3
    assert paste_mask(torch.full((28, 28), 0.5), 101, 67).all()
    assert not paste_mask(torch.full((28, 28), 0.499), 101, 67).any()
    assert paste_mask(mask, 0, 4).shape == (0, 4)


def test_unmold_mask_places_the_box():
    full = utils.unmold_mask(np.ones((28, 28), np.float32), np.array([2, 3, 5, 9]), (10, 12, 3))
    np.testing.assert_array_equal(full, filled([(2, 3, 5, 9)], 10, 12)[:, :, 0])
    assert full.dtype == bool


def test_overlaps_of_masks():
    boxes = [(0, 0, 10, 10), (0, 5, 10, 15), (0, 0, 64, 64), (9, 9, 9, 9)]
    masks = filled(boxes)
    overlaps = utils.compute_overlaps_masks(masks, masks)
    expected = utils.compute_overlaps(np.array(boxes), np.array(boxes))
    np.testing.assert_array_equal(overlaps, expected)  # two empty masks: 0, not NaN
    rng = np.random.default_rng(12)
    masks1, masks2 = rng.random((150, 30, 3)), rng.random((150, 30, 2)).astype(np.float32)
    expected = [
        [((a > 0.5) & (b > 0.5)).sum() / ((a > 0.5) | (b > 0.5)).sum() for b in masks2.T]
        for a in masks1.T
    ]
    np.testing.assert_allclose(utils.compute_overlaps_masks(masks1, masks2), expected, rtol=1e-14)
    assert utils.compute_overlaps_masks(masks1, masks2[:, :, :0]).shape == (3, 0)
    assert utils.compute_overlaps_masks(masks1[:0], masks2[:0]).tolist() == [[0, 0]] * 3


# --- Run-length encoding -------------------------------------------------------------------------


def coco_encode(mask):
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def rle_masks():
    rng = np.random.default_rng(13)
    masks = [rng.random(tuple(rng.integers(1, 40, 2))) < rng.random() for _ in range(150)]
    masks += [np.zeros((7, 9), bool), np.ones((7, 9), bool), np.ones((1, 1), bool)]
    masks += [rng.random((1, 50)) > 0.5, rng.random((50, 1)) > 0.5]
    masks += [filled([(y, x, y + 1, x + 1)], 5, 6)[:, :, 0] for y in (0, 4) for x in (0, 5)]
    masks += [scipy.ndimage.gaussian_filter(rng.random((300, 400)), 9) > 0.5]
    return masks


def test_rle_equals_pycocotools():
    for mask in rle_masks():
        rle = utils.rle_encode(mask)
        assert rle == {"size": list(mask.shape), "counts": coco_encode(mask)}
        assert all(type(n) is int for n in rle["size"])
        decoded = utils.rle_decode(rle)
        assert decoded.dtype == bool
        np.testing.assert_array_equal(decoded, mask)
        as_bytes = {"size": rle["size"], "counts": rle["counts"].encode()}
        np.testing.assert_array_equal(utils.rle_decode(as_bytes), mask)


def test_rle_of_a_large_image():
    mask = np.zeros((6000, 4000), dtype=bool)
    mask[3000:3100, 200:260] = True
    mask[-1, -1] = True
    rle = utils.rle_encode(mask)
    assert rle["counts"] == coco_encode(mask)
    np.testing.assert_array_equal(utils.rle_decode(rle), mask)
    # 6000 rows: the box alone, which must not cost the whole image.
    piece = utils.rle_encode(np.ones((100, 60), np.uint8), (3000, 200, 3100, 260), (6000, 4000, 3))
    mask[-1, -1] = False
    assert piece == utils.rle_encode(mask)


def test_rle_in_a_box():
    rng = np.random.default_rng(14)
    for _ in range(150):
        height, width = (int(n) for n in rng.integers(1, 12, 2))
        y1, y2 = sorted(rng.integers(0, height + 1, 2).tolist())
        x1, x2 = sorted(rng.integers(0, width + 1, 2).tolist())
        piece = rng.random((y2 - y1, x2 - x1)) < 0.7
        mask = np.zeros((height, width), bool)
        mask[y1:y2, x1:x2] = piece
        rle = utils.rle_encode(piece, np.array([y1, x1, y2, x2]), (height, width))
        assert rle == {"size": [height, width], "counts": coco_encode(mask)}


def test_rle_decode_of_counts():
    mask = utils.rle_decode({"size": [2, 3], "counts": [1, 2, 2, 1]})
    np.testing.assert_array_equal(mask, [[0, 1, 0], [1, 0, 1]])
    assert utils.rle_decode({"size": [0, 5], "counts": []}).shape == (0, 5)


def test_rle_refuses():
    good = utils.rle_encode(np.eye(9, dtype=bool))["counts"]
    high = good[:-1] + chr(ord(good[-1]) + 64)  # the same five bits
    low = chr(ord("@") - 64) + good[1:]
    for counts in ("", good + "P", high, low, "~~", b"\xff" * 3):
        with pytest.raises(ValueError, match="run lengths must be in COCO's compressed format"):
            utils.rle_decode({"size": [9, 9], "counts": counts})
    for counts in (good[:-1], good + "1"):
        with pytest.raises(ValueError, match=r"add up to 9 \* 9 = 81, got a sum of"):
            utils.rle_decode({"size": [9, 9], "counts": counts})
    for counts in ([80], [90, -9], "P" * 20 + "0"):
        with pytest.raises(ValueError, match="run lengths must"):
            utils.rle_decode({"size": [9, 9], "counts": counts})
    with pytest.raises(ValueError, match="must fill its box"):
        utils.rle_encode(np.ones((3, 3), bool), (0, 0, 3, 4), (9, 9))
    with pytest.raises(ValueError, match="clip the box"):
        utils.rle_encode(np.ones((3, 3), bool), (8, 0, 11, 3), (9, 9))
    with pytest.raises(ValueError, match="image's size"):
        utils.rle_encode(np.ones((3, 3), bool), (0, 0, 3, 3))
    with pytest.raises(ValueError, match="one at a time"):
        utils.rle_encode(np.ones((3, 3, 2), bool))


# --- Dataset -------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    Image.fromarray(np.dstack([RGB, RGB[:, :, 0]])).save(tmp_path / "a.png")
    dataset = utils.Dataset()
    dataset.add_class("shapes", 1, "square")
    dataset.add_class("shapes", 7, "circle, round")
    dataset.add_class("coco", 1, "person")
    dataset.add_class("shapes", 1, "square")
    dataset.add_image("shapes", "a", tmp_path / "a.png", license="free")
    dataset.add_image("coco", 139, tmp_path / "none.png")
    return dataset


def test_dataset_numbers_classes_and_images(dataset):
    dataset.prepare()
    assert dataset.num_classes == 4
    assert dataset.class_names == ["BG", "square", "circle", "person"]
    assert dataset.class_ids.tolist() == [0, 1, 2, 3]
    assert (dataset.num_images, dataset.image_ids.tolist()) == (2, [0, 1])
    assert dataset.sources == ["", "shapes", "coco"]
    assert dataset.source_class_ids == {"": [0], "shapes": [0, 1, 2], "coco": [0, 3]}
    assert dataset.map_source_class_id("shapes.7") == 2
    assert dataset.map_source_class_id("coco.1") == 3
    assert dataset.map_source_image_id("coco.139") == 1
    assert dataset.get_source_class_id(2, "shapes") == 7
    assert dataset.image_info[0]["license"] == "free"
    assert dataset.source_image_link(1).name == "none.png"
    assert dataset.image_reference(0) == ""


def test_dataset_loads_without_alpha_and_without_objects(dataset):
    dataset.prepare()
    np.testing.assert_array_equal(dataset.load_image(0), RGB)
    masks, class_ids = dataset.load_mask(0)
    assert (masks.shape, masks.dtype, class_ids.shape) == ((12, 17, 0), bool, (0,))
    resized = utils.resize_mask(masks, 2, [(0, 8), (0, 0), (0, 0)])
    assert resized.shape == (32, 34, 0)
    assert utils.extract_bboxes(resized).shape == (0, 4)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        dataset.load_image(1)


def test_dataset_scales_as_its_bit_depth_says(dataset, tmp_path):
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "deep.png")
    dataset.add_image("coco", 1, tmp_path / "deep.png")
    dataset.prepare()
    assert dataset.load_image(2).max() == 16
    dataset.bit_depth = 12
    assert dataset.load_image(2).min() == 255


def test_dataset_refuses(dataset):
    with pytest.raises(AttributeError, match=r"'image_ids'; call prepare\(\) first"):
        _ = dataset.image_ids
    with pytest.raises(AttributeError, match=r"call prepare\(\) first"):
        dataset.map_source_class_id("coco.1")
    with pytest.raises(AttributeError, match=r"no attribute 'imageids'$"):
        _ = dataset.imageids
    with pytest.raises(ValueError, match="must not contain a dot"):
        dataset.add_class("a.b", 1, "x")
    with pytest.raises(ValueError, match=r"at least 1 .* got 0"):
        dataset.add_class("shapes", 0, "x")
    with pytest.raises(ValueError, match=r"one name, got 'star' after 'square'"):
        dataset.add_class("shapes", 1, "star")
    dataset.prepare()
    with pytest.raises(ValueError, match=r"got 'coco\.2'"):
        dataset.map_source_class_id("coco.2")
    with pytest.raises(ValueError, match="of source 'coco'"):
        dataset.get_source_class_id(1, "coco")
    dataset.add_image("shpaes", "b", "b.png")
    with pytest.raises(ValueError, match=r"got 'shpaes'; .* one of \['shapes', 'coco'\]"):
        dataset.prepare()


def test_dataset_travels_to_workers(dataset):
    dataset.prepare()
    for other in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert other.class_names == dataset.class_names
    assert not hasattr(copy.copy(utils.Dataset()), "image_ids")


# --- Metrics -------------------------------------------------------------------------------------


def instances(boxes, class_ids, scores=None):
    boxes = np.array(boxes).reshape(-1, 4)
    class_ids = np.array(class_ids, dtype=np.int64)
    parts = (boxes, class_ids, filled(boxes))
    return parts if scores is None else (*parts[:2], np.array(scores, dtype=float), parts[2])


def test_ap_matches_reference(golden):
    gt = instances(golden["ap/gt_boxes"], golden["ap/gt_class_ids"])
    pred = instances(golden["ap/pred_boxes"], golden["ap/pred_class_ids"], golden["ap/pred_scores"])
    for threshold in (0.5, 0.75):
        expected = {
            k: golden[f"ap/{threshold}/{k}"]
            for k in ("gt_match", "pred_match", "ap", "precisions", "recalls", "overlaps")
        }
        gt_match, pred_match, _ = utils.compute_matches(*gt, *pred, iou_threshold=threshold)
        np.testing.assert_array_equal(gt_match, expected["gt_match"])
        np.testing.assert_array_equal(pred_match, expected["pred_match"])
        results = utils.compute_ap(*gt, *pred, iou_threshold=threshold)
        for result, name in zip(results, ("ap", "precisions", "recalls", "overlaps"), strict=True):
            np.testing.assert_allclose(result, expected[name], rtol=0, atol=1e-7)
    assert utils.compute_ap_range(*gt, *pred) == pytest.approx(float(golden["ap/range"]), abs=1e-7)
    recall, positive_ids = utils.compute_recall(pred[0], gt[0], 0.5)
    assert recall == golden["ap/recall"]
    np.testing.assert_array_equal(positive_ids, golden["ap/recall_ids"])


SQUARE, RIGHT, LOW = (0, 0, 10, 10), (0, 20, 10, 30), (30, 0, 40, 10)


def test_matches_by_hand():
    # By falling score: a duplicate of the first object, a wrong class, a hit, a shifted hit.
    gt = instances([SQUARE, RIGHT, LOW], [1, 2, 1])
    pred = instances([(0, 0, 10, 8), LOW, SQUARE, RIGHT], [1, 2, 1, 2], [0.6, 0.8, 0.9, 0.7])
    gt_match, pred_match, overlaps = utils.compute_matches(*gt, *pred)
    assert gt_match.tolist() == [0, 2, -1]
    assert pred_match.tolist() == [0, -1, 1, -1]
    np.testing.assert_array_equal(overlaps, [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0.8, 0, 0]])
    ap, precisions, recalls, _ = utils.compute_ap(*gt, *pred)
    np.testing.assert_allclose(precisions, [1, 1, 2 / 3, 2 / 3, 0.5, 0])
    np.testing.assert_allclose(recalls, [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    assert ap == pytest.approx(1 / 3 + 2 / 9)


def test_matches_follow_masks_and_classes_through_padding():
    gt = instances([(0, 0, 0, 0), SQUARE, RIGHT], [0, 1, 2])
    pred = instances([RIGHT, (0, 0, 0, 0), SQUARE], [2, 0, 1], [0.5, 0.9, 0.6])
    gt_match, pred_match, _ = utils.compute_matches(*gt, *pred)
    assert (gt_match.tolist(), pred_match.tolist()) == ([0, 1], [0, 1])


def test_the_first_prediction_is_not_matched_twice():
    gt, pred = instances([SQUARE], [1]), instances([SQUARE, SQUARE], [1, 1], [0.9, 0.8])
    gt_match, pred_match, _ = utils.compute_matches(*gt, *pred)
    assert (gt_match.tolist(), pred_match.tolist()) == ([0], [0, -1])


def test_predictions_of_equal_score_keep_their_order():
    rng = np.random.default_rng(15)
    boxes = [(0, 0, 10, width) for width in rng.integers(1, 11, 100)]
    scores = rng.choice([0.2, 0.5, 0.9], 100)
    _, _, overlaps = utils.compute_matches(
        *instances([SQUARE], [1]), *instances(boxes, [1] * 100, scores)
    )
    order = sorted(range(100), key=lambda i: -scores[i])
    np.testing.assert_allclose(overlaps[:, 0], [boxes[i][3] / 10 for i in order])


def test_ap_without_objects_or_predictions():
    some, nothing = instances([SQUARE], [1]), instances([], [])
    found, silent = instances([SQUARE], [1], [0.9]), instances([], [], [])
    assert utils.compute_ap(*some, *found)[0] == 1
    assert utils.compute_ap(*some, *silent)[0] == 0
    assert utils.compute_ap(*nothing, *found)[0] == 0
    assert utils.compute_ap(*nothing, *silent)[0] == 1
    _, precisions, recalls, overlaps = utils.compute_ap(*nothing, *found)
    assert (precisions.tolist(), recalls.tolist(), overlaps.shape) == ([0, 0, 0], [0, 0, 1], (1, 0))


def test_ap_range(caplog):
    gt, pred = instances([SQUARE], [1]), instances([(0, 0, 10, 8)], [1], [0.9])  # IoU 0.8
    assert utils.compute_ap_range(*gt, *pred, iou_thresholds=np.array([0.7, 0.9])) == 0.5
    with caplog.at_level(logging.INFO):
        utils.compute_ap_range(*gt, *pred, iou_thresholds=[0.7, 0.9], verbose=0)
        assert not caplog.records
        utils.compute_ap_range(*gt, *pred, iou_thresholds=[0.7, 0.9])
    assert [r.getMessage() for r in caplog.records] == [
        "AP @0.70: 1.000",
        "AP @0.90: 0.000",
        "AP @0.70-0.90: 0.500",
    ]


def test_recall():
    boxes, none = np.array([SQUARE, RIGHT]), np.zeros((0, 4), dtype=int)
    recall, positive_ids = utils.compute_recall(np.array([LOW, (0, 0, 10, 8), SQUARE]), boxes, 0.8)
    assert (recall, positive_ids.tolist()) == (0.5, [1, 2])
    assert utils.compute_recall(none, boxes, 0.5)[0] == 0
    assert utils.compute_recall(boxes, none, 0.5)[0] == 1


def test_memory_is_kept_for_the_next_tensor():
    code = """
import resource, torch, utils
utils.keep_memory()
utils.keep_memory()
def faults():
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = [faults() for _ in range(20)][-1]  # until the heap has found its shape
print(faults() - first)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if platform.libc_ver()[0] == "glibc":
        assert int(result.stdout) < 1000  # of 64 MB, which are 16384 pages


def test_progress_is_on_stdout_in_a_notebook_alone(monkeypatch, capsys):
    assert list(utils.progress([1, 2], desc="count")) == [1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert "count: 100%" in err

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    with utils.progress(total=2) as bar:
        bar.update(2)
    out, err = capsys.readouterr()
    assert "2/2" in out
    assert err == ""
    ipython.get_ipython = lambda: None  # imported, as by matplotlib, but nothing runs in it
    assert not utils.in_notebook()
