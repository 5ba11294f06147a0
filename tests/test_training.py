"""Training targets, losses and MaskRCNN.forward, against the Keras reference and by hand."""

import numpy as np
import pytest
import torch
from conftest import SmallConfig, TinyNetwork, load_golden
from reference import iou
from reference_inputs import synthetic_image, uniform
from torch import nn

import model as modellib
import utils
from config import Config
from keras_h5 import keras_module
from model import MaskRCNN, RoiTargets
from targets import crop_masks, sample

LOSSES = (
    *("rpn_class_loss", "rpn_bbox_loss"),
    *("mrcnn_class_loss", "mrcnn_bbox_loss", "mrcnn_mask_loss"),
)


class TinyConfig(TinyNetwork):
    NUM_CLASSES = 4
    POST_NMS_ROIS_TRAINING = 200
    MINI_MASK_SHAPE = (28, 28)


class EverythingConfig(TinyConfig):
    """Nothing is left to chance: there is room for every anchor and every roi of the target."""

    USE_RPN_ROIS = False
    RPN_TRAIN_ANCHORS_PER_IMAGE = 10**6
    TRAIN_ROIS_PER_IMAGE = 10**5
    ROI_POSITIVE_RATIO = 0.01


def tensors(golden, prefix, *names):
    return [torch.from_numpy(golden[f"{prefix}/{name}"]) for name in names]


def unpack(golden, name):
    shape = golden[f"{name}_shape"]
    return np.unpackbits(golden[f"{name}_packed"])[: shape.prod()].reshape(shape).astype(bool)


def anchors_of(side, smallest):
    scales = [smallest * 2**i for i in range(5)]
    shapes = [(side // s, side // s) for s in (4, 8, 16, 32, 64)]
    anchors = utils.generate_pyramid_anchors(scales, (0.5, 1, 2), shapes, (4, 8, 16, 32, 64), 1)
    return torch.from_numpy(anchors)


def tiny_image(seed=0):
    image = synthetic_image(128, 128)[:, :: 1 if seed == 0 else -1].copy()
    return torch.from_numpy(image).permute(2, 0, 1)


def tiny_target(**changes):
    masks = torch.zeros(2, 28, 28, dtype=torch.bool)
    masks[0, 4:], masks[1, :, 5:20] = True, True
    target = {
        "class_ids": torch.tensor([1, 3]),
        "boxes": torch.tensor([[10.0, 20.0, 60.0, 50.0], [50.0, 30.0, 128.0, 128.0]]),
        "masks": masks,
        "image_id": 7,  # ignored, like all that forward does not know
    }
    target |= changes
    near = [target["boxes"] + shift for shift in (-3, 0, 4)]
    return {"rois": torch.cat([*near, torch.rand(20, 4).sort(dim=1).values * 128])} | target


EMPTY = {
    "class_ids": torch.zeros(0, dtype=torch.int64),
    "boxes": torch.zeros(0, 4),
    "masks": torch.zeros(0, 28, 28, dtype=torch.bool),
    "rois": torch.tensor([[0.0, 0.0, 50.0, 60.0], [30.0, 40.0, 128.0, 128.0]]),
}


def tiny_model(config=None):
    torch.manual_seed(0)
    model = MaskRCNN(config or TinyConfig()).train()
    with torch.no_grad():
        model.rpn.conv_bbox.weight.mul_(0.02)  # proposals near their anchors
    return model


# ------------------------------------------------------------------ targets of the RPN


@pytest.mark.parametrize(
    "case",
    ["256_all", "256_crowd_all", "256_default", "256_many", "256_possub", "1024_default"],
)
def test_rpn_targets_of_the_reference(case):
    golden, prefix = load_golden("training_side.npz"), f"rpn_targets/{case}"
    side = int(case.split("_")[0])
    anchors = anchors_of(side, 8 if side == 256 else 32)
    class_ids, gt_boxes = tensors(golden, prefix, "gt_class_ids", "gt_boxes")
    count = int(golden[f"{prefix}/per_image"])
    config = Config(RPN_TRAIN_ANCHORS_PER_IMAGE=count if count > 0 else 2 * len(anchors) + 2)
    random = np.random.RandomState(int(golden[f"{prefix}/np_seed"]))

    def permutation(n, device):
        # The reference draws what it leaves out, the first of a permutation: keep the last.
        return torch.from_numpy(random.permutation(n)[::-1].copy())

    targets = modellib.build_rpn_targets(
        anchors, class_ids.long(), gt_boxes.float(), config, permutation
    )
    match = targets.match.numpy()
    positive = golden[f"{prefix}/positive_idx"]
    np.testing.assert_array_equal(np.flatnonzero(match == 1), positive)
    if f"{prefix}/match_i8" in golden:
        np.testing.assert_array_equal(match, golden[f"{prefix}/match_i8"])
    else:
        np.testing.assert_array_equal(np.flatnonzero(match == -1), golden[f"{prefix}/negative_idx"])
    rows = golden[f"{prefix}/bbox_positive_rows"]
    np.testing.assert_allclose(targets.deltas.numpy(), rows, atol=1e-5)


def test_rpn_targets_by_the_definition():
    random = np.random.RandomState(1)
    corners = random.randint(0, 90, (6, 2))
    boxes = np.concatenate([corners, corners + random.randint(4, 60, (6, 2))], axis=1)
    boxes = np.concatenate([boxes, [[300, 300, 310, 310]]])  # touched by no anchor
    class_ids = np.array([1, 2, -1, 3, 1, -2, 1])
    anchors = anchors_of(128, 8)[::7]
    overlaps = np.array([[iou(a, b) for b in boxes] for a in anchors.tolist()])
    crowds, overlaps = overlaps[:, class_ids < 0], overlaps[:, class_ids > 0]
    expected = []
    for row, crowd in zip(overlaps, crowds, strict=True):
        best = any(v > 0 and v == column.max() for v, column in zip(row, overlaps.T, strict=True))
        if best or row.max() >= 0.7:
            expected.append(1)
        else:
            expected.append(-1 if row.max() < 0.3 and crowd.max() < 0.001 else 0)
    config = Config(RPN_TRAIN_ANCHORS_PER_IMAGE=10**6)
    targets = modellib.build_rpn_targets(
        anchors, torch.from_numpy(class_ids), torch.from_numpy(boxes).float(), config
    )
    assert targets.match.tolist() == expected
    assert {expected.count(v) > 4 for v in (-1, 0, 1)} == {True}

    objects = boxes[class_ids > 0]
    assigned = objects[overlaps.argmax(axis=1)][np.array(expected) == 1]
    moved = utils.apply_box_deltas(
        anchors[targets.match == 1],
        targets.deltas * torch.tensor(config.RPN_BBOX_STD_DEV),
    )
    np.testing.assert_allclose(moved.numpy(), assigned, atol=1e-3)


@pytest.mark.parametrize("class_ids", [[], [-1]])
def test_without_objects_all_sampled_anchors_are_background(class_ids):
    anchors = anchors_of(128, 8)
    boxes = torch.tensor([[0.0, 0.0, 64.0, 128.0]])[: len(class_ids)]
    class_ids = torch.tensor(class_ids, dtype=torch.int64)
    targets = modellib.build_rpn_targets(anchors, class_ids, boxes, Config())
    assert targets.deltas.shape == (0, 4)
    assert (targets.match == -1).sum() == 256
    assert (targets.match == 1).sum() == 0
    if len(class_ids):  # none of them on the crowd
        centres = (anchors[targets.match == -1][:, 0] + anchors[targets.match == -1][:, 2]) / 2
        assert (centres >= 64).all()


def test_sampling_is_random_and_reproducible():
    candidates = torch.arange(1000) % 3 == 0
    torch.manual_seed(1)
    first, second = (sample(candidates, 50, torch.randperm) for _ in range(2))
    assert len(first) == len(first.unique()) == 50
    assert candidates[first].all()
    assert first.tolist() == sorted(first.tolist()) != second.tolist()
    torch.manual_seed(1)
    assert torch.equal(sample(candidates, 50, torch.randperm), first)
    assert len(sample(candidates, 500, torch.randperm)) == 334


# ------------------------------------------------------------------ targets of the heads


@pytest.mark.parametrize("case", ["mini", "full", "crowd", "subsample", "nopos"])
def test_roi_targets_of_the_reference(case):
    golden, prefix = load_golden("training_side.npz"), f"det_targets/{case}"
    class_ids, gt_boxes, proposals = (
        golden[f"{prefix}/{name}"][0] for name in ("gt_class_ids", "gt_boxes_norm", "proposals")
    )
    masks = unpack(golden, f"{prefix}/gt_masks")[0].transpose(2, 0, 1)
    real = class_ids != 0  # the rest is padding, like boxes of zeros
    pixels = golden[f"{prefix}/gt_boxes_px"].astype(np.float32)
    np.testing.assert_array_equal(utils.norm_boxes(pixels, (256, 256)), gt_boxes[real])
    proposals = proposals[proposals.any(axis=1)]
    expected_rois = golden[f"{prefix}/rois"]
    expected_rois = expected_rois[expected_rois.any(axis=1)]
    config = Config(
        TRAIN_ROIS_PER_IMAGE=int(golden[f"{prefix}/train_rois_per_image"]),
        USE_MINI_MASK=bool(golden[f"{prefix}/mini"]),
    )
    targets = modellib.sample_rois(
        torch.from_numpy(proposals),
        torch.from_numpy(class_ids[real]).long(),
        torch.from_numpy(gt_boxes[real]),
        torch.from_numpy(masks[real]),
        config,
        permutation=torch.arange,
    )
    count, positive = len(expected_rois), len(targets.deltas)
    np.testing.assert_array_equal(targets.rois.numpy(), expected_rois)
    expected_ids = golden[f"{prefix}/target_class_ids"]
    assert targets.class_ids.tolist() == expected_ids[:count].tolist()
    assert positive == (expected_ids > 0).sum()
    assert (positive == 0) == (case == "nopos")
    deltas = golden[f"{prefix}/target_bbox"][:positive]
    np.testing.assert_allclose(targets.deltas.numpy(), deltas, atol=1e-5)
    np.testing.assert_array_equal(
        targets.masks.numpy(), golden[f"{prefix}/target_mask_u8"][:positive]
    )


def corner_boxes(*sides):
    return torch.tensor([[0.0, 0.0, side, side] for side in sides])


def test_an_image_without_objects_gives_background():
    config = Config(TRAIN_ROIS_PER_IMAGE=30, ROI_POSITIVE_RATIO=0.33)
    proposals = torch.rand(100, 4).sort(dim=1).values
    no_boxes, no_masks = torch.zeros(0, 4), torch.zeros(0, 56, 56, dtype=torch.bool)
    no_ids = torch.zeros(0, dtype=torch.int64)
    targets = modellib.sample_rois(proposals, no_ids, no_boxes, no_masks, config)
    assert targets.class_ids.tolist() == [0] * (30 - 9)
    assert targets.deltas.shape == (0, 4)
    assert targets.masks.shape == (0, 28, 28)
    few = modellib.sample_rois(proposals[:5], no_ids, no_boxes, no_masks, config)
    assert torch.equal(few.rois, proposals[:5])

    crowd = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    masks = torch.ones(1, 56, 56, dtype=torch.bool)
    targets = modellib.sample_rois(proposals, torch.tensor([-1]), crowd, masks, config)
    assert 0 < len(targets.rois) <= 21
    for roi in targets.rois.tolist():
        assert iou(roi, crowd[0].tolist()) < 0.001


def test_roi_targets_by_hand():
    # The object stands behind a crowd in the list; the rois: IoU 1, 0.5625, 0.36, on the crowd.
    gt_boxes = torch.tensor([[0.6, 0.6, 0.9, 0.9], [0.0, 0.0, 0.4, 0.4]])
    masks = torch.zeros(2, 56, 56, dtype=torch.bool)
    masks[1, :, 28:] = True  # the right half
    proposals = torch.cat([corner_boxes(0.4, 0.3, 0.24), torch.tensor([[0.7, 0.7, 0.8, 0.8]])])
    config = Config()
    targets = modellib.sample_rois(proposals, torch.tensor([-2, 3]), gt_boxes, masks, config)
    assert torch.equal(targets.rois, proposals[:3])
    assert targets.class_ids.tolist() == [3, 3, 0]
    grow = [(0.2 - 0.15) / 0.3 / 0.1] * 2 + [np.log(0.4 / 0.3) / 0.2] * 2
    expected = torch.tensor([[0.0] * 4, grow], dtype=torch.float32)
    torch.testing.assert_close(targets.deltas, expected, atol=1e-5, rtol=1e-5)
    # The second is three quarters of the object: the last of its columns look beyond the middle.
    columns = torch.arange(28)
    assert torch.equal(targets.masks[0], (columns >= 14).float().expand(28, 28))
    assert torch.equal(targets.masks[1], (columns / 27 * 0.75 * 55 > 27.5).float().expand(28, 28))


def test_full_and_mini_masks_give_the_same_targets():
    blob = np.hypot(*np.mgrid[-50:206, -60:196]) < 40
    box = utils.extract_bboxes(blob[:, :, None])
    mini = utils.minimize_mask(box, blob[:, :, None], (56, 56))
    unit = torch.from_numpy(utils.norm_boxes(box.astype(np.float32), (256, 256)))
    proposals = unit + torch.tensor([[0.03, 0.0, 0.01, -0.04], [-0.02, -0.03, 0.0, 0.0]])
    ids = torch.tensor([1])
    options = {"TRAIN_ROIS_PER_IMAGE": 10}
    from_full, from_mini = (
        modellib.sample_rois(
            proposals, ids, unit, torch.from_numpy(masks), Config(USE_MINI_MASK=use, **options)
        ).masks
        for use, masks in ((False, blob[None]), (True, mini.transpose(2, 0, 1).copy()))
    )
    assert len(from_full) == 2
    assert 0.3 < from_full.mean() < 0.9
    assert (from_full != from_mini).float().mean() < 0.02


@pytest.mark.parametrize("mini", [True, False])
def test_no_mask_loses_its_last_row_at_the_border(mini):
    start = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) * 0.9
    boxes = torch.cat([start, torch.ones(300, 2)], dim=1)
    size = (56, 56) if mini else (64, 64)
    masks = torch.ones(300, *size, dtype=torch.bool)
    config = Config(USE_MINI_MASK=mini)
    assert crop_masks(masks, boxes, boxes, torch.arange(300), config).all()


# ------------------------------------------------------------------ losses


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor)[0].numpy()


def compare(loss, prediction, golden, prefix):
    np.testing.assert_allclose(loss.item(), golden[f"{prefix}/value"], rtol=1e-6)
    ours, theirs = gradient(loss, prediction), golden[f"{prefix}/grad"]
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, atol=1e-8)


def test_rpn_losses_of_the_reference():
    golden = load_golden("training_side.npz")
    prefix = "losses/rpn_class"
    match, logits = tensors(golden, prefix, "in0_rpn_match", "in1_rpn_class_logits")
    logits.requires_grad_()
    compare(modellib.rpn_class_loss(match[:, :, 0], logits), logits, golden, prefix)

    prefix = "losses/rpn_bbox"
    target, match, deltas = tensors(
        golden, prefix, "in0_target_bbox", "in1_rpn_match", "in2_rpn_bbox"
    )
    match = match[:, :, 0]
    counts = (match == 1).sum(dim=1)  # the reference pads the targets of each image
    target = torch.cat([rows[:count] for rows, count in zip(target, counts, strict=True)])
    deltas.requires_grad_()
    compare(modellib.rpn_bbox_loss(target, match, deltas), deltas, golden, prefix)


@pytest.mark.parametrize("case", ["all_active", "inactive3"])
def test_class_loss_of_the_reference(case):
    golden, prefix = load_golden("training_side.npz"), f"losses/mrcnn_class_{case}"
    class_ids, logits, active = tensors(
        golden, prefix, "in0_target_class_ids", "in1_logits", "in2_active"
    )
    logits.requires_grad_()
    active = active.bool().repeat_interleave(class_ids.shape[1], dim=0)  # [R, K]
    loss = modellib.mrcnn_class_loss(class_ids.flatten().long(), logits.flatten(0, 1), active)
    compare(loss, logits, golden, prefix)


def test_class_loss_leaves_out_what_looks_like_a_class_the_data_set_lacks():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [1.0, 4.0, 0.0]])
    ids = torch.tensor([0, 1, 1])
    active = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    log_probs = logits.log_softmax(dim=1)
    expected = -(log_probs[0, 0] + log_probs[2, 1]) / 2
    torch.testing.assert_close(modellib.mrcnn_class_loss(ids, logits, active), expected)
    assert modellib.mrcnn_class_loss(ids[1:2], logits[1:2], active[1:2]) == 0


def test_bbox_loss_of_the_reference():
    golden, prefix = load_golden("training_side.npz"), "losses/mrcnn_bbox"
    target, class_ids, deltas = tensors(
        golden, prefix, "in0_target_bbox", "in1_target_class_ids", "in2_pred_bbox"
    )
    class_ids = class_ids.flatten().long()
    deltas.requires_grad_()
    target = target.flatten(0, 1)[class_ids > 0]
    loss = modellib.mrcnn_bbox_loss(target, class_ids, deltas.flatten(0, 1))
    compare(loss, deltas, golden, prefix)


@pytest.mark.parametrize("saturated", [False, True])
def test_mask_loss_of_the_reference(saturated):
    golden, prefix = load_golden("training_side.npz"), "losses/mrcnn_mask"
    class_ids = torch.from_numpy(golden[f"{prefix}/in1_target_class_ids"]).flatten().long()
    packed = golden[f"{prefix}/in0_target_mask_packed"]
    target = torch.from_numpy(np.unpackbits(packed).reshape(48, 28, 28)).float()
    probs = uniform("loss/pm", (2, 24, 28, 28, 4)).astype(np.float32)
    if saturated:
        prefix += "_saturated"
        probs[0, :, :4], probs[0, :, 4:8] = 0, 1
    probs = torch.from_numpy(probs).flatten(0, 1)
    positive = class_ids.nonzero()[:, 0]
    probs = probs[positive, :, :, class_ids[positive]]
    logits = probs.logit().requires_grad_()
    loss = modellib.mrcnn_mask_loss(target[positive], logits)
    # The 1e-7 that Keras adds in the logarithm counts for nothing but near 0 and 1.
    rtol = 2e-3 if saturated else 3e-5
    np.testing.assert_allclose(loss.item(), golden[f"{prefix}/value"], rtol=rtol)

    # d loss / d logit = d loss / d prob * prob * (1 - prob), summed over a roi's pixels; with the
    # 1e-7 of Keras, on which the gradient for probabilities near 0 and 1 depends.
    ours = np.zeros(48)
    ours[positive] = (
        (torch.from_numpy(gradient(loss, logits)) / ((probs + 1e-7) * (1 - probs + 1e-7)))
        .abs()
        .sum((1, 2))
    )
    theirs = golden[f"{prefix}/grad_roi_abs_sum"].flatten()
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    assert (theirs > 0.01).sum() == len(positive)


def test_mask_loss_is_exact_and_bounded():
    logits = torch.tensor([-100.0, -12.0, 0.0, 12.0, 100.0], requires_grad=True)
    ones = torch.ones(1)
    values = [modellib.mrcnn_mask_loss(ones, x[None]).item() for x in logits]
    expected = [-np.log(2e-7), 12.0 + 6.1442e-6, np.log(2), 6.1442e-6, 2e-7]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    grad = gradient(modellib.mrcnn_mask_loss(torch.ones(5), logits), logits) * 5
    np.testing.assert_allclose(grad, [0, -1, -0.5, -6.144e-6, 0], rtol=0.01)


def test_losses_of_nothing_are_0_with_the_graph_attached():
    match = torch.zeros(2, 5, dtype=torch.int8)
    no_ids, no_deltas = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    no_active = torch.zeros(0, 3, dtype=torch.bool)
    background = torch.zeros(4, dtype=torch.int64)
    rpn_logits, rpn_deltas = torch.randn(2, 5, 2), torch.randn(2, 5, 4)
    cases = [
        (rpn_logits, lambda x: modellib.rpn_class_loss(match, x)),
        (rpn_deltas, lambda x: modellib.rpn_bbox_loss(no_deltas, match, x)),
        (torch.randn(0, 3), lambda x: modellib.mrcnn_class_loss(no_ids, x, no_active)),
        (torch.randn(4, 3, 4), lambda x: modellib.mrcnn_bbox_loss(no_deltas, background, x)),
        (torch.randn(0, 28, 28), lambda x: modellib.mrcnn_mask_loss(torch.zeros(0, 28, 28), x)),
    ]
    for prediction, loss in cases:
        value = loss(prediction.requires_grad_())
        assert value.item() == 0
        assert not gradient(value, prediction).any()


# ------------------------------------------------------------------ a whole step
#
# The bounds are two to five times what kernels of SSE4.1, AVX2 and AVX-512 came to.


@pytest.fixture(scope="module")
def step(small_h5):
    """The reference's training step, with its choice of anchors and rois: model and losses."""
    golden = load_golden("training_step_small.npz")
    class_ids = torch.from_numpy(golden["gt_class_ids"]).long()
    boxes = torch.from_numpy(golden["gt_boxes_px"]).float()
    masks = torch.from_numpy(unpack(golden, "gt_mini_masks").transpose(2, 0, 1))
    model = MaskRCNN(SmallConfig()).train()
    model.load_weights(small_h5, verbose=False)
    shape = (256, 256)
    images, _ = model.mold_inputs([synthetic_image(200, 256)])
    features = model.fpn(model.normalize(images))
    _, proposals = model.propose(features, shape)

    # What chance chooses from, and what does not depend on it, is ours.
    everything = SmallConfig(RPN_TRAIN_ANCHORS_PER_IMAGE=10**6)
    anchors, _ = model._all_anchors(shape)
    rpn_targets = modellib.build_rpn_targets(anchors, class_ids, boxes, everything)
    match = torch.zeros_like(rpn_targets.match)
    match[golden["rpn_match_pos_idx"]], match[golden["rpn_match_neg_idx"]] = 1, -1
    assert torch.equal(rpn_targets.match == 1, match == 1)
    assert (rpn_targets.match[match == -1] == -1).all()
    rois = torch.from_numpy(golden["rois"][0])
    real = int(rois.any(dim=1).sum())
    ids = torch.from_numpy(golden["target_class_ids"][0]).long()
    unit_boxes = utils.norm_boxes(boxes, shape)
    targets = modellib.sample_rois(rois[:real], class_ids, unit_boxes, masks, model.config)
    assert torch.equal(targets.rois, rois[:real])
    assert torch.equal(targets.class_ids, ids[:real])
    # The reference fills up its 200 rois with empty boxes, and counts them as background.
    roi_targets = RoiTargets(rois, ids, targets.deltas, targets.masks)
    losses = model.compute_losses(
        features,
        shape,
        [rpn_targets._replace(match=match)],
        [roi_targets],
        torch.ones(1, 4, dtype=torch.bool),
    )
    sum(losses.values()).backward()
    return golden, model, proposals, roi_targets, losses


@pytest.mark.parametrize("options", [{}, {"RPN_CONV_LAYERS": 2, "RPN_SCORE": "sigmoid"}])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_rpn_at_some_anchors_is_the_rpn_at_all_of_them(stride, options):
    torch.manual_seed(0)
    config = Config(TOP_DOWN_PYRAMID_SIZE=6, RPN_CHANNELS=8, RPN_ANCHOR_STRIDE=stride, **options)
    rpn = modellib.RPN(config).double()
    features = [torch.randn(2, 6, n, 2 * n, dtype=torch.float64) for n in (8, 4, 3, 2, 1)]
    levels = [rpn(feature) for feature in features]
    count = sum(level.logits.shape[1] for level in levels)
    for share in (0.2, 0.0):
        judged = (torch.rand(2, count) < share).nonzero(as_tuple=True)
        some = rpn.at(features, *judged)
        for name in ("logits", "deltas"):
            whole = torch.cat([getattr(level, name) for level in levels], dim=1)
            torch.testing.assert_close(getattr(some, name), whole[judged])
    some.logits.sum().backward()
    assert rpn.conv_shared.weight.grad is not None


def test_proposals_and_targets_of_the_reference_step(step):
    golden, _, proposals, targets, _ = step
    theirs = golden["rpn_rois"][0]
    distance = np.abs(proposals.boxes.numpy()[:, None] - theirs).max(axis=2)
    assert distance.shape == (2000, 2000)
    assert distance.min(axis=0).max() < 1e-5
    assert distance.min(axis=1).max() < 1e-5
    positive = len(targets.deltas)
    assert positive == 14
    deltas = golden["target_bbox"][0]
    np.testing.assert_allclose(targets.deltas.numpy(), deltas[:positive], atol=1e-5)
    assert not deltas[positive:].any()
    masks = golden["target_mask_u8"][0, :positive]
    np.testing.assert_array_equal(targets.masks.numpy(), masks)


def test_losses_of_the_reference_step(step):
    golden, *_, losses = step
    assert tuple(losses) == LOSSES
    for name, loss in losses.items():
        np.testing.assert_allclose(loss.item(), golden[name][0], rtol=1e-5, err_msg=name)


def keras_gradient(model, name):
    """The gradient of a Keras weight, "layer/kernel:0", in its layout."""
    layer, weight = name.removesuffix(":0").split("/")
    leaf = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}[weight]
    grad = model.get_parameter(f"{keras_module(layer)}.{leaf}").grad.numpy()
    if weight == "kernel":  # (out, in, h, w) to (h, w, in, out)
        grad = grad.T if grad.ndim == 2 else grad.transpose(2, 3, 1, 0)
    return grad


def test_gradients_of_the_reference_step(step):
    golden, model, *_ = step
    names, norms = golden["weight_names"], golden["stop/grad_norm_per_weight"]
    ours = np.array([np.linalg.norm(keras_gradient(model, name).astype(float)) for name in names])
    assert len(ours) == len(list(model.parameters()))
    np.testing.assert_allclose(ours, norms, rtol=2e-3)
    total = np.linalg.norm(ours)
    np.testing.assert_allclose(total, golden["stop/global_grad_norm"], rtol=2e-5)
    sampled = [name for name in names if f"stop/grad/{name}/val" in golden]
    assert len(sampled) >= 30
    for name in sampled:
        place = golden[f"grad/{name}/idx"]
        theirs = golden[f"stop/grad/{name}/val"].astype(float)
        difference = keras_gradient(model, name).ravel()[place] - theirs
        relative = np.sqrt(np.mean(difference**2) / np.mean(theirs**2))
        assert relative < 5e-3, name


# ------------------------------------------------------------------ forward


def test_forward_gives_the_weighted_losses_in_order():
    model = tiny_model(EverythingConfig())
    batch = torch.stack([tiny_image(0), tiny_image(1)]), [tiny_target(), EMPTY]
    losses = model(*batch)
    assert tuple(losses) == LOSSES
    assert all(loss.dim() == 0 and loss.item() > 0 for loss in losses.values())
    factors = dict(zip(LOSSES, (1.0, 2.0, 0.0, 0.5, 3.0), strict=True))
    model.config.LOSS_WEIGHTS = factors
    for name, loss in model(*batch).items():
        torch.testing.assert_close(loss, factors[name] * losses[name])


def test_each_image_of_a_batch_meets_its_own_targets():
    model = tiny_model(EverythingConfig())
    others = torch.tensor([[3.0, 70.0, 40.0, 128.0], [60.0, 10.0, 120.0, 90.0]])
    first, second = (tiny_image(0), tiny_target()), (tiny_image(1), tiny_target(boxes=others))

    @torch.no_grad()
    def losses(*pairs):
        found = model(torch.stack([image for image, _ in pairs]), [t for _, t in pairs])
        return torch.stack(list(found.values()))

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    close(losses(first, second), losses(second, first))
    close(losses(first, first), losses(first))
    mixed = losses((first[0], second[1]), (second[0], first[1]))
    # Whether an anchor is background differs for few; the rest differs clearly.
    assert ((mixed - losses(first, second)).abs() > 1e-3)[1:].all()


def test_images_without_objects_are_negatives():
    model = tiny_model()
    losses = model(torch.stack([tiny_image()] * 2), [EMPTY, EMPTY])
    zero = {"rpn_bbox_loss", "mrcnn_bbox_loss", "mrcnn_mask_loss"}
    assert {name for name, loss in losses.items() if loss == 0} == zero
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.classifier.linear_class.weight.grad.any()
    assert not model.mask.conv5.weight.grad.any()


def test_classes_that_the_data_set_lacks_are_no_mistakes():
    model = tiny_model(EverythingConfig())
    with torch.no_grad():
        model.classifier.linear_class.bias[2] = 1e3  # everything looks like class 2
    target = tiny_target()
    everything = model(tiny_image()[None], [target])
    active = torch.tensor([True, True, False, True])
    masked = model(tiny_image()[None], [target | {"active_class_ids": active}])
    assert everything["mrcnn_class_loss"] > 100
    assert masked["mrcnn_class_loss"] == 0
    torch.testing.assert_close(masked["mrcnn_bbox_loss"], everything["mrcnn_bbox_loss"])


def test_rois_of_the_data_set_replace_the_proposals_on_request():
    model = tiny_model(TinyConfig(USE_RPN_ROIS=False))
    target = tiny_target(rois=tiny_target()["boxes"])
    losses = model(tiny_image()[None], [target])
    with torch.no_grad():
        features = model.fpn(model.normalize(tiny_image()[None]))[:4]
        unit = utils.norm_boxes(target["rois"], (128, 128))
        rois = modellib.Rois(unit, torch.zeros(2, dtype=torch.int64))
        logits, deltas = model.classifier(features, rois, (128, 128))
    # Rois that are the objects themselves: no deltas are wanted.
    wanted = nn.functional.smooth_l1_loss(deltas[[0, 1], [1, 3]], torch.zeros(2, 4))
    torch.testing.assert_close(losses["mrcnn_bbox_loss"].detach(), wanted)
    wanted = nn.functional.cross_entropy(logits, target["class_ids"])
    torch.testing.assert_close(losses["mrcnn_class_loss"].detach(), wanted)
    with pytest.raises(ValueError, match=r"targets\[0\] must have .*rois.*, lacks {'rois'}"):
        model(tiny_image()[None], [{k: v for k, v in target.items() if k != "rois"}])


def test_the_heads_do_not_train_the_proposals():
    config = EverythingConfig(USE_RPN_ROIS=True, RPN_ANCHOR_SCALES=(64, 64, 64, 64, 64))
    model = tiny_model(config)
    with torch.no_grad():
        model.rpn.conv_bbox.weight.zero_()  # proposals are anchors, and many hit the objects
    losses = model(tiny_image()[None], [tiny_target()])
    assert losses["mrcnn_bbox_loss"] > 0
    parameters = list(model.rpn.parameters())
    heads = sum(losses[name] for name in LOSSES[2:])
    grads = torch.autograd.grad(heads, parameters, allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in grads)
    grads = torch.autograd.grad(losses["rpn_class_loss"] + losses["rpn_bbox_loss"], parameters)
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("mini", [True, False])
def test_a_few_steps_lower_each_loss(mini):
    model = tiny_model(TinyConfig(TRAIN_BN=True, USE_MINI_MASK=mini, USE_RPN_ROIS=False))
    target = tiny_target()
    if not mini:
        target["masks"] = torch.zeros(2, 128, 128, dtype=torch.bool)
        target["masks"][0, 10:60, 20:50], target["masks"][1, 70:, 30:] = True, True
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    history = []
    for _ in range(40):
        losses = model(tiny_image()[None], [target])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        history.append([loss.item() for loss in losses.values()])
    before, after = np.mean(history[:3], axis=0), np.mean(history[-3:], axis=0)
    assert (after < 0.9 * before).all(), (before, after)


def test_half_precision_gives_nearly_the_same_losses():
    model = tiny_model(EverythingConfig())
    target = tiny_target()
    exact = model(tiny_image()[None], [target])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(tiny_image()[None], [target])
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.02)


def test_without_targets_forward_predicts():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"needs targets; call model.eval\(\)"):
        model(tiny_image()[None])
    model.eval()
    images = torch.stack([tiny_image(0), tiny_image(1)])
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)
    found, expected = model(images), model.predict(images, windows)
    assert torch.equal(found.proposals.boxes, expected.proposals.boxes)
    assert torch.equal(found.detections.boxes, expected.detections.boxes)
    assert tuple(model(images, [EMPTY, EMPTY])) == LOSSES


def test_errors_name_what_is_wrong_with_a_batch():
    model = tiny_model()
    image = tiny_image()[None]
    nan = torch.tensor([[0.0, 0.0, float("nan"), 5.0], [0.0, 0.0, 5.0, 5.0]])
    flat = torch.tensor([[0.0, 0.0, 5.0, 5.0], [9.0, 3.0, 9.0, 8.0]])
    cases = [
        (TypeError, "images must be a tensor of torch.uint8, got torch.float32", image.float(), {}),
        (TypeError, "images must be a tensor of torch.uint8, got list", [image], {}),
        (ValueError, r"images must have shape \[B, 3, H, W\], got \[3, 128, 128\]", image[0], {}),
        (ValueError, "multiples of 64, got shape", image[:, :, :100], {}),
        (ValueError, "a dict for each image, got 1 for 2", torch.cat([image] * 2), {}),
        (
            TypeError,
            r"targets\[0\] class_ids must be a tensor of torch.int64, got torch.int32",
            image,
            {"class_ids": torch.tensor([1, 3], dtype=torch.int32)},
        ),
        (
            ValueError,
            r"class_ids must be 1..3, or negative for crowds, got 4; NUM_CLASSES",
            image,
            {"class_ids": torch.tensor([1, 4])},
        ),
        (ValueError, "negative for crowds, got 0", image, {"class_ids": torch.tensor([0, 1])}),
        (
            ValueError,
            r"boxes must have shape \[2, 4\], got \[1, 4\]",
            image,
            {"boxes": flat[:1]},
        ),
        (TypeError, "boxes must be a tensor of torch.float32", image, {"boxes": flat.double()}),
        (ValueError, r"boxes must be finite .* got \[0.0, 0.0, nan", image, {"boxes": nan}),
        (ValueError, r"y1 < y2 and x1 < x2, got \[9.0, 3.0, 9.0", image, {"boxes": flat}),
        (
            ValueError,
            r"masks must have shape \[2, 28, 28\], got \[2, 128, 128\]",
            image,
            {"masks": torch.zeros(2, 128, 128, dtype=torch.bool)},
        ),
        (
            TypeError,
            "masks must be a tensor of torch.bool",
            image,
            {"masks": torch.ones(2, 28, 28)},
        ),
        (
            ValueError,
            r"active_class_ids must have shape \[4\], got \[3\]",
            image,
            {"active_class_ids": torch.ones(3, dtype=torch.bool)},
        ),
    ]
    for error, message, images, changes in cases:
        with pytest.raises(error, match=message):
            model(images, [tiny_target(**changes)])
    with pytest.raises(ValueError, match=r"targets\[0\] must have boxes, class_ids, masks, lacks"):
        model(image, [{"boxes": flat, "masks": EMPTY["masks"]}])


# ------------------------------------------------------------------ set_trainable


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("train_bn", [False, True])
def test_layers_by_name_both_ways(train_bn):
    model = tiny_model(TinyConfig(TRAIN_BN=train_bn))
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for leaf in ("weight", "bias")
    }
    assert norms
    everything = {name for name, _ in model.named_parameters()}
    without = {
        "heads": ("fpn.C1.", "fpn.C2.", "fpn.C3.", "fpn.C4.", "fpn.C5."),
        "all": (),
        "5+": ("fpn.C1.", "fpn.C2.", "fpn.C3.", "fpn.C4."),
        "4+": ("fpn.C1.", "fpn.C2.", "fpn.C3."),
        "3+": ("fpn.C1.", "fpn.C2."),
    }
    for layers in ("heads", "all", "5+", "heads", "4+", "3+"):
        expected = {name for name in everything if not name.startswith(without[layers])}
        if not train_bn:
            expected -= norms
        assert model.set_trainable(layers) == len(expected)
        assert trainable(model) == expected, layers
    assert model.set_trainable(r"mask\.conv5\..*|rpn\.conv_class\.bias") == 3
    assert trainable(model) == {"mask.conv5.weight", "mask.conv5.bias", "rpn.conv_class.bias"}


def test_layers_that_match_nothing_are_refused():
    model = tiny_model()
    model.set_trainable("heads")
    before = trainable(model)
    for layers in ("head", "mask", "6+", r"mask\.bn1\..*"):
        with pytest.raises(ValueError, match=r"heads, 3\+, 4\+, 5\+, all or a regular expression"):
            model.set_trainable(layers)
    assert trainable(model) == before


def test_frozen_layers_get_no_gradient():
    model = tiny_model()
    model.set_trainable("heads")
    sum(model(tiny_image()[None], [tiny_target()]).values()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)
