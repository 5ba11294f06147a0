"""The network's parts on hand-made input, and detect() as users call it."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TinyNetwork, load_golden
from reference_inputs import synthetic_image, uniform
from torch import nn

import model as modellib
import utils
import weights
from config import Config
from model import MaskRCNN, Rois, RPNOutput
from presets import TORCHVISION_RESNET

UNIT_WINDOW = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


class TinyConfig(TinyNetwork):
    NUM_CLASSES = 3
    POST_NMS_ROIS_INFERENCE = 50
    DETECTION_MAX_INSTANCES = 10
    DETECTION_MIN_CONFIDENCE = 0.0


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = MaskRCNN(TinyConfig()).eval()
    with torch.no_grad():  # clearly different scores, so that rounding changes no order
        model.classifier.linear_class.weight.mul_(20)
        model.classifier.linear_class.bias.copy_(torch.tensor([-9.0, 0.0, 0.0]))
    return model


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------ parts


def test_same_pad_is_tensorflows():
    # SAME: ceil(size / stride) outputs and the odd pixel after the end.
    conv = nn.Conv2d(1, 1, 3, stride=2, bias=False)
    nn.init.ones_(conv.weight)
    even = torch.arange(1.0, 5.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert modellib.same_pad(even, conv).shape == (1, 1, 5, 5)
    assert conv(modellib.same_pad(even, conv))[0, 0, 0].tolist() == [3 * 6, 3 * 7]
    odd = torch.ones(1, 1, 5, 5)
    assert modellib.same_pad(odd, conv).shape == (1, 1, 7, 7)
    assert conv(modellib.same_pad(odd, conv)).shape == (1, 1, 3, 3)


def test_max_pool_hangs_over_the_end_as_in_tensorflow():
    pool = modellib.resnet((1, 1, 1, 1), width=4)[0][3]
    row = torch.tensor([5.0, 1.0, 2.0, 9.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert pool(row)[0, 0, 0].tolist() == [5.0, 9.0]  # windows 5 1 2 and 2 9


def test_levels_of_rois_follow_equation_1():
    # Each pyramid level holds its own number, so a crop tells where it comes from.
    side = 1024
    features = [torch.full((1, 1, side // 2**i, side // 2**i), float(i)) for i in (2, 3, 4, 5)]
    sides = torch.tensor([0.0, 10, 79, 80, 158, 159, 224, 316, 318, 1023])
    corner = sides / (side - 1)
    boxes = torch.stack([torch.zeros(10), torch.zeros(10), corner, corner], dim=1)
    rois = Rois(boxes, torch.zeros(10, dtype=torch.int64))
    pooled = modellib.pyramid_roi_align(features, rois, 2, (side, side), Config())
    expected = [
        2 if s == 0 else min(max(round(4 + math.log2(s * side / 1023 / 224)), 2), 5)
        for s in sides.tolist()
    ]
    assert pooled[:, 0, 0, 0].tolist() == expected
    assert set(expected) == {2, 3, 4, 5}


def test_rois_of_a_batch_come_from_their_own_image_in_order():
    features = [torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, s, s) for s in (16, 8, 4, 2)]
    index = torch.tensor([2, 0, 1, 2])
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 0.1, 0.1], [0.5, 0.5, 1, 1], [0, 0, 0.2, 0.9]])
    pooled = modellib.pyramid_roi_align(features, Rois(boxes, index), 3, (64, 64), Config())
    assert (pooled == index.view(4, 1, 1, 1)).all()


def test_no_box_that_ends_at_the_border_loses_its_last_row():
    # Plain float32 arithmetic puts the last sample of 1 in 20 of these beyond the map, where it
    # would be zero.
    features = [torch.ones(1, 1, s, s) for s in (256, 128, 64, 32)]
    start = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    end = torch.ones(5000)
    boxes = torch.stack([start, 0 * start, end, 0 * start + 0.3], dim=1)
    boxes = torch.cat([boxes, boxes[:, [1, 0, 3, 2]]])
    rois = Rois(boxes, torch.zeros(len(boxes), dtype=torch.int64))
    pooled = modellib.pyramid_roi_align(features, rois, 7, (1024, 1024), Config())
    assert pooled.min() > 0.999


def test_roi_align_of_the_reference():
    golden = load_golden("training_side.npz")
    features = [
        torch.from_numpy((uniform(f"ra/f{i}", (1, s, s, 6)) * 2 - 1).astype(np.float32))
        for i, s in enumerate((64, 32, 16, 8))
    ]
    boxes = torch.from_numpy(golden["roi_align/boxes_norm"])
    rois = Rois(boxes, torch.zeros(len(boxes), dtype=torch.int64))
    maps = [x.permute(0, 3, 1, 2).contiguous() for x in features]
    pooled = (
        modellib.pyramid_roi_align(maps, rois, 7, (256, 256), Config()).permute(0, 2, 3, 1).numpy()
    )
    inside = (golden["roi_align/boxes_norm"][:, 2:] < 1).all(axis=1)
    assert inside.sum() > 20
    np.testing.assert_allclose(pooled[inside], golden["roi_align/out7"][inside], atol=2e-6)
    # White noise, so moving the border samples by 2**-22 of the map shows.
    np.testing.assert_allclose(pooled, golden["roi_align/out7"], atol=1e-4)


def test_proposals_of_the_reference():
    golden = load_golden("training_side.npz")
    scales, shapes = (8, 16, 32, 64, 128), golden["anchors/256/backbone_shapes"]
    pixels = utils.generate_pyramid_anchors(scales, (0.5, 1, 2), shapes, (4, 8, 16, 32, 64), 1)
    anchors = torch.from_numpy(utils.norm_boxes(pixels, (256, 256)))
    out = golden["proposal_layer/out300"]
    count = len(anchors)
    foreground = uniform("prop/s", (2, count)).astype(np.float32)
    deltas = ((uniform("prop/d", (2, count, 4)) * 2 - 1) * 1.5).astype(np.float32)
    # Logits whose softmax is the given score.
    score = torch.from_numpy(foreground).double()
    logits = torch.stack([(1 - score).log(), score.log()], dim=2)
    rpn = RPNOutput(logits.float(), torch.from_numpy(deltas))
    rois = modellib.proposal_layer(rpn, anchors, UNIT_WINDOW.repeat(2, 1), [count], 300, Config())
    for image in (0, 1):
        boxes = rois.boxes[rois.image_index == image].numpy()
        assert boxes.shape == (300, 4)
        np.testing.assert_allclose(boxes, out[image], atol=1e-6)


@pytest.mark.parametrize("confidence", ["0", "0.7"])
def test_refined_detections_of_the_reference(confidence):
    golden = load_golden("training_side.npz")
    rois, probs = (torch.from_numpy(golden[f"detection_layer/{n}"]) for n in ("rois", "probs"))
    window = torch.from_numpy(golden["detection_layer/window"])[None]
    deltas = torch.from_numpy((uniform("det/d", (200, 4, 4)) * 2 - 1).astype(np.float32))
    expected = golden[f"detection_layer/out_conf{confidence}"]
    expected = expected[expected[:, 4] > 0]
    config = Config(NUM_CLASSES=4, DETECTION_MIN_CONFIDENCE=float(confidence))
    proposals = Rois(rois, torch.zeros(200, dtype=torch.int64))
    found = modellib.refine_detections(proposals, probs, deltas, window, config)
    np.testing.assert_allclose(found.boxes.numpy(), expected[:, :4], atol=1e-6)
    assert found.class_ids.tolist() == expected[:, 4].tolist()
    np.testing.assert_array_equal(found.scores.numpy(), expected[:, 5])


def test_refine_detections_by_hand():
    boxes = torch.tensor(
        [
            [0.1, 0.1, 0.5, 0.5],  # 0: class 1, kept
            [0.1, 0.1, 0.5, 0.52],  # 1: class 1, lower score, near duplicate of 0
            [0.1, 0.1, 0.5, 0.5],  # 2: class 2, the same box in another class, kept
            [0.6, 0.6, 0.9, 0.9],  # 3: background
            [0.6, 0.6, 0.9, 0.9],  # 4: class 1 below the confidence
            [0.1, 0.1, 0.5, 0.5],  # 5: class 1 in the other image, kept
            [0.8, 0.8, 1.0, 1.0],  # 6: class 1 in the other image, moved and clipped
        ]
    )
    index = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    probs = torch.tensor(
        [
            *([0.0, 0.9, 0.1], [0.1, 0.8, 0.1], [0.0, 0.05, 0.95], [0.9, 0.1, 0.0]),
            *([0.3, 0.4, 0.3], [0.0, 0.7, 0.3], [0.2, 0.8, 0.0]),
        ]
    )
    deltas = torch.zeros(7, 3, 4)
    deltas[6, 1, 0] = 5.0  # 5 * 0.1 of the height of 0.2: 0.1 down
    deltas[6, 2] = 9.0  # of another class, without effect
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.95, 1.0]])
    config = Config(NUM_CLASSES=3, DETECTION_MIN_CONFIDENCE=0.5)
    found = modellib.refine_detections(Rois(boxes, index), probs, deltas, windows, config)
    assert found.roi_index.tolist() == [2, 0, 6, 5]
    assert found.class_ids.tolist() == [2, 1, 1, 1]
    assert found.image_index.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(found.boxes[2], torch.tensor([0.9, 0.8, 0.95, 1.0]))

    config.DETECTION_MAX_INSTANCES = 1
    found = modellib.refine_detections(Rois(boxes, index), probs, deltas, windows, config)
    assert found.roi_index.tolist() == [2, 6]

    config = Config(NUM_CLASSES=3, DETECTION_MIN_CONFIDENCE=0.3, DETECTION_PER_CLASS=True)
    found = modellib.refine_detections(Rois(boxes, index), probs, deltas, windows, config)
    # Proposal 4 is an object of both classes now, and 5 of its second one.
    assert found.roi_index.tolist() == [2, 0, 4, 4, 6, 5, 5]
    assert found.class_ids.tolist() == [2, 1, 1, 2, 1, 1, 2]
    scores = torch.tensor([0.95, 0.9, 0.4, 0.3, 0.8, 0.7, 0.3])
    torch.testing.assert_close(found.scores, scores)


def test_mask_head_gives_the_logits_of_the_class_asked_for(tiny):
    features = [torch.randn(1, 16, s, s) for s in (32, 16, 8, 4)]
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7]]).repeat(3, 1)
    rois = Rois(boxes, torch.zeros(3, dtype=torch.int64))
    with torch.no_grad():
        logits = tiny.mask(features, rois, torch.arange(3), (128, 128))
        bottom = nn.Sequential(*(tiny.mask.get_submodule(n) for n in ("conv1", "bn1")), nn.ReLU())
        x = bottom(modellib.pyramid_roi_align(features, rois, 14, (128, 128), Config()))
        for i in (2, 3, 4):
            x = tiny.mask.get_submodule(f"conv{i}")(x)
            x = tiny.mask.get_submodule(f"bn{i}")(x).relu()
        all_classes = tiny.mask.conv5(tiny.mask.deconv(x).relu())  # [3, K, 28, 28]
    torch.testing.assert_close(logits, all_classes[range(3), range(3)])


def test_backbones_of_other_depth_and_width_and_of_ones_own():
    def backbone(config):
        widths = (config.IMAGE_CHANNEL_COUNT, 4, 6, 8, 10, 12)
        strides = (2, 2, 2, 2, 2)
        pairs = zip(widths, widths[1:], strides, strict=False)
        return [nn.Conv2d(a, b, 3, stride=s, padding=1) for a, b, s in pairs]

    class OwnConfig(TinyConfig):
        BACKBONE = backbone

        def COMPUTE_BACKBONE_SHAPE(image_shape):
            return [(image_shape[0] // s, image_shape[1] // s) for s in (4, 8, 16, 32, 64)]

    model = MaskRCNN(OwnConfig())
    assert [model.fpn.P2_conv1.in_channels, model.fpn.P5_conv1.in_channels] == [6, 12]
    assert len(model.detect([noise(50, 60)])) == 1

    bad = OwnConfig()
    bad.BACKBONE = lambda config: [nn.Identity()] * 5
    with pytest.raises(ValueError, match="strides 4, 8, 16, 32, got"):
        MaskRCNN(bad)
    bad.BACKBONE = lambda config: [nn.Identity()] * 4
    with pytest.raises(ValueError, match=r"C1\.\.C5, got 4"):
        MaskRCNN(bad)


def test_resnet101_has_the_blocks_and_channels_of_the_paper():
    stages = modellib.resnet((3, 4, 23, 3))
    assert [len(stage) for stage in stages[1:]] == [3, 4, 23, 3]
    assert [stage[-1].conv3.out_channels for stage in stages[1:]] == [256, 512, 1024, 2048]
    assert [stage[0].conv1.stride[0] for stage in stages[1:]] == [1, 2, 2, 2]
    # torchvision's count, without its fc layer, plus a bias per output of a convolution.
    published = 44_549_160 - (2048 * 1000 + 1000) + 52_672
    assert sum(p.numel() for stage in stages for p in stage.parameters()) == published


def test_batch_norm_stays_frozen_in_training_unless_asked(tiny):
    norms = [m for m in tiny.modules() if isinstance(m, nn.BatchNorm2d)]
    assert tiny.train().training
    assert not any(m.training for m in norms)
    tiny.config.TRAIN_BN = True
    assert all(m.training for m in norms if tiny.train())
    tiny.config.TRAIN_BN = False
    tiny.eval()


@pytest.mark.parametrize("stride", [1, 2])
def test_there_is_one_anchor_per_output_of_the_rpn(stride):
    model = MaskRCNN(TinyConfig(RPN_ANCHOR_STRIDE=stride)).eval()
    for shape in ((128, 192), (64, 64)):
        features = [
            torch.zeros(1, 16, math.ceil(shape[0] / s), math.ceil(shape[1] / s))
            for s in (4, 8, 16, 32, 64)
        ]
        rpn, _ = model.propose(features, shape)
        assert rpn.logits.shape[1] == rpn.deltas.shape[1] == len(model.get_anchors(shape))


# ------------------------------------------------------------------ detect


@pytest.mark.slow
def test_a_hundred_objects_in_6000_x_4000_pixels_stay_below_3_gigabytes():
    command = [sys.executable, ROOT / "benchmarks" / "inference.py", "--peak", "large"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    count, gigabytes = run.stdout.splitlines()
    assert count == "100 detections in 6000 x 4000"
    assert float(gigabytes) < 3


def equal_results(a, b):
    np.testing.assert_array_equal(a["rois"], b["rois"])
    np.testing.assert_array_equal(a["class_ids"], b["class_ids"])
    np.testing.assert_allclose(a["scores"], b["scores"], atol=1e-4)
    assert (a["masks"] != b["masks"]).mean() < 1e-3


@pytest.mark.parametrize("mode", ["square", "pad64"])
def test_a_batch_gives_what_single_images_give(mode):
    torch.manual_seed(0)
    model = MaskRCNN(TinyConfig(IMAGE_RESIZE_MODE=mode, IMAGES_PER_GPU=4)).eval()
    images = [noise(100, 120, 1), synthetic_image(90, 70), noise(100, 120, 2), noise(300, 40, 3)]
    together = model.detect(images)
    for image, result in zip(images, together, strict=True):
        equal_results(result, model.detect([image])[0])
        assert result["masks"].shape == (*image.shape[:2], len(result["scores"]))


def test_results_have_the_documented_types_and_order(tiny):
    image = synthetic_image(90, 150)
    result = tiny.detect([image])[0]
    count = len(result["scores"])
    assert 0 < count <= 10
    assert result["rois"].dtype == np.int32
    assert result["class_ids"].dtype == np.int32
    assert result["scores"].dtype == np.float32
    assert result["masks"].dtype == bool
    assert result["rois"].shape == (count, 4)
    assert (np.diff(result["scores"]) <= 0).all()
    assert set(result["class_ids"]) <= {1, 2}
    y1, x1, y2, x2 = result["rois"].T
    assert (y1 >= 0).all()
    assert (x1 >= 0).all()
    assert (y1 < y2).all()
    assert (y2 <= 90).all()
    assert (x1 < x2).all()
    assert (x2 <= 150).all()
    for i in range(count):  # nothing outside the box
        outside = result["masks"][:, :, i].copy()
        outside[y1[i] : y2[i], x1[i] : x2[i]] = False
        assert not outside.any()


def test_all_kinds_of_masks_tell_the_same(tiny):
    image = synthetic_image(90, 150)
    full, rle, box = (tiny.detect([image], masks=m)[0] for m in ("full", "rle", "box"))
    assert full["masks"].any()
    for i, (y1, x1, y2, x2) in enumerate(full["rois"]):
        np.testing.assert_array_equal(utils.rle_decode(rle["masks"][i]), full["masks"][:, :, i])
        np.testing.assert_array_equal(box["masks"][i], full["masks"][y1:y2, x1:x2, i])
    with pytest.raises(ValueError, match="'full', 'rle' or 'box', got 'png'"):
        tiny.detect([image], masks="png")


def test_nothing_found_gives_empty_arrays(tiny):
    bias = tiny.classifier.linear_class.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias.copy_(torch.tensor([1e4, 0.0, 0.0]))  # all background
    try:
        for kind, shape in (("full", (50, 60, 0)), ("rle", (0,)), ("box", (0,))):
            result = tiny.detect([np.zeros((50, 60, 3), np.uint8)], masks=kind)[0]
            assert result["rois"].shape == (0, 4)
            assert result["class_ids"].shape == result["scores"].shape == (0,)
            assert np.shape(result["masks"]) == shape
    finally:
        with torch.no_grad():
            bias.copy_(before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (400, 1), (2, 3), (700, 500)])
def test_images_of_any_size(tiny, shape):
    result = tiny.detect([noise(*shape)])[0]
    assert result["masks"].shape[:2] == shape
    assert len(result["rois"]) > 0
    assert (result["rois"][:, :2] >= 0).all()
    assert (result["rois"][:, 2:] <= shape).all()


def test_images_of_any_kind(tiny):
    image = synthetic_image(64, 80)
    expected = tiny.detect([image])[0]
    alpha = np.concatenate([image, image[:, :, :1]], axis=2)
    sixteen = image.astype(np.uint16) * 257
    for same in (alpha, sixteen, image / 255.0, np.asfortranarray(image), image[::-1][::-1]):
        equal_results(tiny.detect([same])[0], expected)
    grey = tiny.detect([image[:, :, 0]])[0]
    equal_results(grey, tiny.detect([image[:, :, [0, 0, 0]]])[0])


def test_what_is_no_list_of_images_is_refused(tiny):
    with pytest.raises(TypeError, match=r"list of images, got ndarray; use detect\(\[image\]\)"):
        tiny.detect(noise(10, 10))
    with pytest.raises(ValueError, match="float"):
        tiny.detect([np.full((10, 10, 3), 200.0)])
    with pytest.raises(TypeError):
        tiny.detect([torch.zeros(3, 10, 10)])
    assert tiny.detect([]) == []


def test_detect_restores_the_mode_and_tells_on_request(tiny, capsys):
    tiny.train()
    tiny.rpn.eval()
    tiny.detect([noise(20, 30)], verbose=1)
    assert tiny.training
    assert not tiny.rpn.training
    assert "20x30" in capsys.readouterr().out
    tiny.eval()


def test_modes_that_cannot_detect_say_so(tiny):
    config = TinyConfig(IMAGE_RESIZE_MODE="none")
    with pytest.raises(ValueError, match="multiples of 64 in mode 'none', got 60 x 64"):
        MaskRCNN(config).detect([noise(60, 64)])
    assert MaskRCNN(config).detect([noise(64, 128)])[0]["masks"].shape[:2] == (64, 128)
    config = TinyConfig(IMAGE_RESIZE_MODE="crop")
    with pytest.raises(ValueError, match="for training"):
        MaskRCNN(config).detect([noise(64, 64)])


def test_a_model_is_built_to_fit_a_file(tiny, tmp_path):
    path = tmp_path / "tiny.pth"
    weights.save_weights(tiny, path)
    model = MaskRCNN.from_weights(path, DETECTION_MAX_INSTANCES=3)
    assert model.config.IMAGE_MAX_DIM == 128
    assert not model.training
    image = synthetic_image(90, 150)
    result, expected = model.detect([image])[0], tiny.detect([image])[0]
    np.testing.assert_array_equal(result["rois"], expected["rois"][:3])
    np.testing.assert_array_equal(result["masks"], expected["masks"][:, :, :3])


def test_config_is_checked_when_the_model_is_built():
    with pytest.raises(ValueError, match="IMAGE_MAX_DIM must be a multiple of 64"):
        MaskRCNN(TinyConfig(IMAGE_MAX_DIM=100))


def test_a_backbone_that_the_config_refuses_changes_nothing():
    options = {"IMAGE_CHANNEL_COUNT": 4, "MEAN_PIXEL": (1.0, 2.0, 3.0, 4.0)}
    model = MaskRCNN(TinyConfig(**options))
    with pytest.raises(ValueError, match="MEAN_PIXEL must have one number per channel"):
        model.set_backbone(TORCHVISION_RESNET)
    assert model.config.STRIDE_IN_1X1
    assert model.mean.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    assert model.detect([image])[0]["masks"].shape[:2] == (40, 50)


def test_a_fresh_model_keeps_its_batch_norm():
    model = MaskRCNN(TinyConfig())
    before = model.fpn.C1[1].running_mean.clone()
    with torch.no_grad():
        model.fpn(torch.randn(1, 3, 128, 128))
    assert torch.equal(model.fpn.C1[1].running_mean, before)


def test_a_backbone_of_ones_own_keeps_its_weights_and_follows_its_options():
    def backbone(config):
        stages = modellib.resnet((1, 1, 1, 1), width=8)
        nn.init.constant_(stages[0][0].weight, 0.125)
        return stages

    model = MaskRCNN(TinyConfig(BACKBONE=backbone))
    assert (model.fpn.C1[0].weight == 0.125).all()
    assert model.rpn.conv_shared.weight.std() > 0
    model.set_backbone(TORCHVISION_RESNET)
    assert model.fpn.C3[0].conv2.stride == (2, 2)
    assert model.fpn.C1[3].padding == 1


def test_two_models_of_one_config_have_backbones_of_their_own(tmp_path):
    config = TinyConfig()
    plain, other = MaskRCNN(config), MaskRCNN(config)
    other.set_backbone(TORCHVISION_RESNET)
    weights.save_weights(plain, tmp_path / "plain.pth")
    weights.save_weights(other, tmp_path / "other.pth")
    assert MaskRCNN.from_weights(tmp_path / "plain.pth").config.STRIDE_IN_1X1
    found = MaskRCNN.from_weights(tmp_path / "other.pth").config
    for name, value in TORCHVISION_RESNET.items():
        assert weights.plain(getattr(found, name)) == weights.plain(value)


def test_double_and_half_precision(tiny):
    image = synthetic_image(90, 150)
    expected = tiny.detect([image])[0]
    torch.manual_seed(0)
    double = MaskRCNN(TinyConfig()).double().eval()
    double.load_state_dict(tiny.state_dict())
    equal_results(double.detect([image])[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = tiny.detect([image])[0]
    assert half["scores"].dtype == np.float32
    np.testing.assert_allclose(half["scores"][:3], expected["scores"][:3], atol=0.1)


def test_anchors_follow_the_options_and_do_not_pile_up(tiny):
    model = MaskRCNN(TinyConfig())
    before = model.get_anchors((128, 128))
    model.config.RPN_ANCHOR_SCALES = (16, 32, 64, 128, 256)
    sides = model.get_anchors((128, 128)) - before
    assert (sides[:, 2] > 0).all()
    for width in range(64, 64 * 20, 64):
        model.get_anchors((64, width))
    assert len(model._anchors) <= 8


def test_maps_of_other_sizes_than_the_anchors_are_refused():
    config = TinyConfig(COMPUTE_BACKBONE_SHAPE=lambda shape: [(3, 3)] * 5)
    with pytest.raises(ValueError, match="COMPUTE_BACKBONE_SHAPE must give the sizes of P2"):
        MaskRCNN(config).detect([noise(20, 30)])


def test_imagenet_weights_come_from_where_the_config_says(tmp_path):
    model = MaskRCNN(TinyConfig(IMAGENET_MODEL_PATH=tmp_path / "resnet.pth"))
    with pytest.raises(FileNotFoundError, match="resnet.pth"):
        model.load_weights("imagenet")


# --- Models from files, and calls written for Matterport's library ------------------------------


class TwoClasses(TinyNetwork):
    NAME = "two"
    NUM_CLASSES = 2
    DETECTION_MAX_INSTANCES = 7


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(1)
    model = MaskRCNN(TinyNetwork(NUM_CLASSES=4, POOL_SIZE=5))
    weights.save_weights(model, tmp_path / "four.pth")
    return model, tmp_path / "four.pth"


def test_a_class_of_configuration_is_filled_with_what_the_file_tells(checkpoint):
    saved, path = checkpoint
    options = {"NUM_CLASSES": 4, "PRE_NMS_LIMIT": 50}
    model = MaskRCNN.from_weights(path, TwoClasses, model_dir="elsewhere", **options)
    assert type(model.config) is TwoClasses
    assert not model.training
    assert model.model_dir.name == "elsewhere"
    # Of the file; of the class, which wins; and what is asked for, which wins over both.
    assert (model.config.NUM_CLASSES, model.config.POOL_SIZE) == (4, 5)
    assert (model.config.NAME, model.config.DETECTION_MAX_INSTANCES) == ("two", 7)
    assert model.config.PRE_NMS_LIMIT == 50
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_other_classes_start_anew(checkpoint):
    saved, path = checkpoint
    head = ["classifier.linear_class", "mrcnn_bbox_fc", "mask.conv5"]
    model = MaskRCNN.from_weights(path, TwoClasses, head)
    assert model.classifier.linear_class.out_features == 2
    assert torch.equal(model.rpn.conv_shared.weight, saved.rpn.conv_shared.weight)
    with pytest.raises(ValueError, match="another shape"):
        MaskRCNN.from_weights(path, TwoClasses)


def test_a_configuration_is_taken_as_it_is(checkpoint):
    _, path = checkpoint
    config = TinyNetwork(NUM_CLASSES=4, POOL_SIZE=5, NAME="mine")
    assert MaskRCNN.from_weights(path, config).config is config
    with pytest.raises(TypeError, match="must be set in the config that is given, got {'SEED': 1}"):
        MaskRCNN.from_weights(path, config, SEED=1)


def test_options_that_became_properties_are_no_trouble_in_older_checkpoints(checkpoint):
    _, path = checkpoint
    data = torch.load(path, weights_only=True)
    data["config"] |= {"MASK_SHAPE": [28, 28], "BACKBONE_STRIDES": [4, 8, 16, 32, 64]}
    torch.save(data, path)
    assert MaskRCNN.from_weights(path).config.MASK_SHAPE == (28, 28)


def test_calls_of_matterport_work_or_name_the_new_spelling(checkpoint):
    _, path = checkpoint
    model = MaskRCNN(mode="inference", model_dir="logs", config=TwoClasses())
    assert not model.training
    assert MaskRCNN(mode="training", model_dir="logs", config=TwoClasses()).training
    with pytest.raises(ValueError, match="mode must be 'training' or 'inference', got 'test'"):
        MaskRCNN(TwoClasses(), mode="test")

    model = MaskRCNN(TwoClasses(POOL_SIZE=5))
    excluded = ["mrcnn_class_logits", "mrcnn_bbox_fc", "mrcnn_bbox", "mrcnn_mask"]
    report = model.load_weights(path, by_name=True, exclude=excluded)
    assert len(report.excluded) == 6
    assert report.loaded
    for call in (
        lambda: model.train(utils.Dataset()),
        lambda: model.train(utils.Dataset(), None, learning_rate=0.1, epochs=1, layers="heads"),
        lambda: model.train(1),
    ):
        with pytest.raises(
            TypeError, match=r"^train\(\) takes True or False.* train_model\(train_"
        ):
            call()
