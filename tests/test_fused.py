"""The fast path of detection on a CPU beside the plain one, and when it must not be taken."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallConfig, TinyNetwork
from reference_inputs import synthetic_image
from torch import nn

import fused
import model as modellib
from fused import convolve
from model import MaskRCNN
from winograd import is_compiled

LAST = torch.channels_last


class WideConfig(TinyNetwork):
    """Just wide enough for Winograd; with random BatchNorm its detections are of all kinds."""

    BACKBONE = {"blocks": (2, 1, 1, 1), "width": 64}  # noqa: RUF012
    TOP_DOWN_PYRAMID_SIZE = 256
    RPN_CHANNELS = 256
    NUM_CLASSES = 3
    POST_NMS_ROIS_INFERENCE = 50
    DETECTION_MIN_CONFIDENCE = 0.0


def randomize(model, seed=0):
    """Statistics of BatchNorm as after a training, and small residuals, which stay finite."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, count):
        return low + (high - low) * torch.rand(count, generator=generator)

    with torch.no_grad():
        for name, norm in model.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                count = norm.num_features
                scale = 0.3 if name.endswith("bn3") else 1.0
                norm.weight.copy_(scale * uniform(0.5, 1.5, count))
                norm.bias.copy_(uniform(-0.2, 0.2, count))
                norm.running_mean.copy_(uniform(-0.2, 0.2, count))
                norm.running_var.copy_(uniform(0.5, 2.0, count))
            elif isinstance(norm, nn.Conv2d):
                norm.bias.copy_(uniform(-0.1, 0.1, norm.out_channels))
    return model.eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomize(MaskRCNN(WideConfig()))


@pytest.fixture
def calls(monkeypatch):
    """The kernel size of each convolution that is folded anew."""
    found = []
    original = fused.fold

    def counted(conv, norm):
        found.append(conv.kernel_size[0])
        return original(conv, norm)

    monkeypatch.setattr(fused, "fold", counted)
    return found


def stages(model, images):
    """{stage: tensor} of everything that the convolutions make."""
    with torch.no_grad():
        x = model.normalize(images)
        found = dict(zip(("C2", "C3", "C4", "C5"), model.fpn.bottom_up(x), strict=True))
        pyramid = model.fpn(x)
        found |= zip(("P2", "P3", "P4", "P5", "P6"), pyramid, strict=True)
        for i, feature in enumerate(pyramid, start=2):
            found[f"logits {i}"], found[f"deltas {i}"] = model.rpn(feature)
        corners = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0], [0.4, 0.4, 0.5, 0.5]])
        rois = modellib.Rois(corners, torch.zeros(3, dtype=torch.int64))
        shape = images.shape[2:]
        found["masks"] = model.mask(pyramid[:4], rois, torch.tensor([1, 2, 1]), shape)
        return found


def assert_close(found, expected, limit=1e-4):
    for stage, tensor in expected.items():
        error = (found[stage] - tensor).abs().max() / tensor.abs().max()
        assert error < limit, stage


def molded(model):
    return model.mold_inputs([synthetic_image(200, 256)])[0]


def unequal(found, expected):
    return any(not torch.equal(found[stage], tensor) for stage, tensor in expected.items())


@pytest.mark.parametrize("weights", ["random", "deterministic"])
def test_every_stage_of_a_resnet50(weights, request, calls):
    torch.manual_seed(0)
    model = MaskRCNN(SmallConfig()).eval()
    if weights == "random":
        randomize(model)
    else:
        model.load_weights(request.getfixturevalue("small_h5"), verbose=False)
    images = molded(model)
    expected = stages(model, images)
    assert calls == []
    model.optimize_for_inference()
    found = stages(model, images)
    assert_close(found, expected)
    assert calls.count(1) == 2 * 16 + 4 + 4 + 2  # of the blocks, shortcuts, pyramid and RPN
    # 16 blocks, P2..P5, the RPN and the mask head. P5 has 4 tiles: no Winograd, so not folded.
    assert calls.count(3) == 16 + 4 + 1 + 4 - (1 if is_compiled() else 0)


def test_detections_are_the_same(model):
    image = synthetic_image(100, 128)
    fast = model.detect([image])[0]
    model.config.CPU_WINOGRAD = False
    fused.drop(model)
    plain = model.detect([image])[0]
    assert len(plain["scores"]) > 5
    assert fast["class_ids"].tolist() == plain["class_ids"].tolist()
    assert abs(fast["rois"] - plain["rois"]).max() <= 1
    assert abs(fast["scores"] - plain["scores"]).max() < 1e-4
    assert (fast["masks"] != plain["masks"]).mean() < 1e-3


def test_the_first_detection_prepares_and_the_next_keeps(model, calls):
    image = synthetic_image(100, 128)
    model.detect([image])
    count = len(calls)
    assert count > 20
    model.detect([image])
    assert len(calls) == count


def test_without_cpu_winograd_nothing_is_prepared(model, calls):
    images = molded(model)
    model.config.CPU_WINOGRAD = False
    x = model.normalize(images)
    with torch.no_grad():
        block, x = model.fpn.C2[0], model.fpn.C1(x)
        y = F.relu(block.bn1(block.conv1(x)))
        y = F.relu(block.bn2(block.conv2(y)))
        expected = F.relu(block.bn3(block.conv3(y)) + block.downsample[1](block.downsample[0](x)))
        model.predict(images, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
        found = block(x)
        assert torch.equal(found, expected)
        assert calls == []
        model.optimize_for_inference()
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4


def change_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def change_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def replace_parameters(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach() * 1.1)


def load_state_dict(model):
    model.load_state_dict(randomize(MaskRCNN(WideConfig()), seed=1).state_dict())


def assign_state_dict(model):
    other = randomize(MaskRCNN(WideConfig()), seed=1)
    model.load_state_dict(other.state_dict(), assign=True)


def change_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(0.5)


def change_style(model):
    model.set_backbone_style("torchvision")


def train_a_step(model):
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.eval()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_data,
        replace_parameters,
        load_state_dict,
        assign_state_dict,
        change_statistics,
        change_style,
        train_a_step,
    ],
)
def test_changed_weights_count(model, change):
    images = molded(model)
    model.optimize_for_inference()
    before = stages(model, images)
    change(model)
    model.optimize_for_inference()
    found = stages(model, images)
    fused.drop(model)
    expected = stages(model, images)
    assert_close(found, expected)
    for stage, tensor in expected.items():
        assert (before[stage] - tensor).abs().max() > 1e-2 * tensor.abs().max()


def test_training_and_gradients_take_the_plain_path(model, calls):
    images = molded(model)
    expected = stages(model, images)
    model.optimize_for_inference()
    x = model.normalize(images)
    for feature, stage in zip(model.fpn(x), ("P2", "P3", "P4", "P5"), strict=False):
        assert feature.requires_grad
        assert torch.equal(feature, expected[stage])
    model.train()
    found = stages(model, images)
    assert not unequal(found, expected)
    model.eval()
    assert not unequal(stages(model, images), expected)  # train() has dropped it
    assert calls == []


def test_losses_do_not_depend_on_a_detection_before(model):
    images = molded(model)
    target = {
        "class_ids": torch.tensor([1]),
        "boxes": torch.tensor([[10.0, 20.0, 90.0, 100.0]]),
        "masks": torch.ones(1, 56, 56, dtype=torch.bool),
    }

    def losses():
        torch.manual_seed(0)
        with torch.no_grad():
            return model(images, [target])

    expected = losses()
    model.detect([synthetic_image(100, 128)])
    assert losses() == expected


@pytest.mark.parametrize("kind", ["double", "autocast", "training", "hook", "compiling"])
def test_what_is_not_plain_inference_in_float32_is_not_fused(kind, calls, monkeypatch):
    conv, norm = nn.Conv2d(256, 256, 3, padding=1).eval(), nn.BatchNorm2d(256).eval()
    x = torch.randn(1, 256, 32, 32).contiguous(memory_format=LAST)
    fused.prepare(conv)
    seen = []
    if kind == "double":
        conv, norm, x = conv.double(), norm.double(), x.double()
    elif kind == "training":
        norm.train()
    elif kind == "hook":
        conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    elif kind == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad(), torch.autocast("cpu", enabled=kind == "autocast"):
        found = convolve(conv, x, norm, relu=True)
        assert calls == []
        assert torch.equal(found, norm(conv(x)).relu())
    assert len(seen) == 2 * (kind == "hook")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_channels": 64},
        {"stride": 2},
        {"stride": 2, "kernel_size": 1, "padding": 0},
        {"dilation": 2, "padding": 2},
        {"groups": 4},
        {"padding_mode": "reflect"},
        {"padding": "same"},
        {"padding": 0},
        {"padding": 1, "kernel_size": 1},
        {"bias": False},
        {"bias": False, "kernel_size": 1, "padding": 0},
        {"out_channels": 24},
        {"kernel_size": 5, "padding": 2},
    ],
)
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("with_norm", [False, True])
def test_any_convolution(options, layout, with_norm):
    torch.manual_seed(0)
    options = {"in_channels": 256, "out_channels": 256, "kernel_size": 3, "padding": 1, **options}
    conv, norm = nn.Conv2d(**options).eval(), None
    if with_norm:
        norm = randomize(nn.ModuleList([nn.BatchNorm2d(options["out_channels"])]))[0]
    x = torch.randn(2, options["in_channels"], 20, 27).contiguous(memory_format=layout)
    with torch.no_grad():
        expected = conv(x) if norm is None else norm(conv(x))
        other = torch.randn(expected.shape).contiguous(memory_format=layout)
        fused.prepare(conv)
        torch.testing.assert_close(convolve(conv, x, norm), expected, rtol=1e-4, atol=1e-5)
        before = other.clone()
        found = convolve(conv, x, norm, relu=True, add=other)
        torch.testing.assert_close(found, (expected + other).relu(), rtol=1e-4, atol=1e-5)
        assert torch.equal(other, before)
        found = convolve(conv, x, norm, add=other, overwrite=True)
        torch.testing.assert_close(found, expected + before, rtol=1e-4, atol=1e-5)
        assert convolve(conv, x[:0], norm, relu=True).shape == (0, *expected.shape[1:])


def test_without_onednn_torch_has_the_same_result(monkeypatch):
    conv = nn.Conv2d(16, 32, 1).eval()
    x, other = torch.randn(2, 16, 9, 9), torch.randn(2, 32, 9, 9)
    fused.prepare(conv)
    with torch.no_grad():
        expected = [convolve(conv, x, relu=True), convolve(conv, x, add=other)]
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        torch.testing.assert_close(convolve(conv, x, relu=True), expected[0])
        torch.testing.assert_close(convolve(conv, x, add=other), expected[1])
        assert convolve(conv, x, relu=True).min() == 0


def test_the_input_of_a_stage_and_what_a_hook_keeps_are_not_overwritten(model):
    model.optimize_for_inference()
    block = modellib.Bottleneck(256, 64).eval()
    stage = modellib.Stage(block, modellib.Bottleneck(256, 64).eval()).eval()
    fused.prepare(stage)
    kept = []
    block.register_forward_hook(
        lambda module, inputs, output: kept.append((output, output.clone()))
    )
    x = torch.randn(1, 256, 32, 32).contiguous(memory_format=LAST)
    before = x.clone()
    with torch.no_grad():
        stage(x)
    assert torch.equal(x, before)
    assert torch.equal(*kept[0])


def test_state_dicts_copies_and_pickles_know_nothing_of_it(model):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    size = len(pickle.dumps(model))
    image = synthetic_image(100, 128)
    expected = model.detect([image])[0]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    data = pickle.dumps(model)
    assert abs(len(data) - size) < 0.05 * size  # anchors
    for other in (copy.deepcopy(model), pickle.loads(data)):
        assert not any(module in fused._prepared for module in other.modules())
        result = other.detect([image])[0]
        assert (result["rois"] == expected["rois"]).all()
        assert (result["scores"] == expected["scores"]).all()


def test_memory_is_freed():
    model = MaskRCNN(WideConfig()).eval()
    before = len(fused._prepared)
    image = synthetic_image(100, 128)
    for free in (MaskRCNN.train, MaskRCNN.double):
        model.float().eval().detect([image])
        assert len(fused._prepared) > before
        free(model)
        assert len(fused._prepared) == before
    model.float().eval().detect([image])
    del model
    gc.collect()
    assert len(fused._prepared) == before
