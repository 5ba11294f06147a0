"""The fast path on a CPU beside the plain one, and when it must not be taken."""

import contextlib
import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallConfig, TinyNetwork
from reference_inputs import synthetic_image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

import fused
import model as modellib
from fused import convolve, fast
from model import MaskRCNN
from presets import (
    KERAS_RESNET,
    TORCHVISION_RESNET,
    Detectron2Config,
    TorchvisionConfig,
    TorchvisionV2Config,
)
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


class QuickConfig(WideConfig):
    """Every kind of layer at the least cost: P2, the RPN on it and the mask head use Winograd."""

    BACKBONE = {"blocks": (2, 1, 1, 1), "width": 16}  # noqa: RUF012
    TOP_DOWN_PYRAMID_SIZE = 64
    RPN_CHANNELS = 64
    IMAGE_MIN_DIM = 64
    IMAGE_MAX_DIM = 64


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


def make_model(config=WideConfig):
    torch.manual_seed(0)
    return randomize(MaskRCNN(config()))


def make_twin(model):
    """A model without the fast path that has the tensors of another one."""
    config = copy.copy(model.config)
    config.CPU_WINOGRAD = False
    twin = MaskRCNN(config).eval()
    for module, other in zip(twin.modules(), model.modules(), strict=True):
        module._parameters, module._buffers = other._parameters, other._buffers
    return twin


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def quick():
    return make_model(QuickConfig)


@pytest.fixture
def calls(monkeypatch):
    """The convolutions that are folded anew."""
    found = []
    original = fused.fold

    def counted(conv, norm):
        found.append(conv)
        return original(conv, norm)

    monkeypatch.setattr(fused, "fold", counted)
    return found


def kernel_sizes(calls):
    return [conv.kernel_size[0] for conv in calls]


def molded(model):
    return model.mold_inputs([synthetic_image(200, 256)])[0]


WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def stages(model, images, quickly=True):
    """{stage: tensor} of everything that the convolutions make."""
    with torch.no_grad(), fast(overwrite=True) if quickly else contextlib.nullcontext():
        x = model.normalize(images)
        c2, c3, c4, c5 = model.fpn.bottom_up(x)
        found = {"C2": c2, "C3": c3, "C4": c4, "C5": c5}
        pyramid = model.fpn(x)
        found |= zip(("P2", "P3", "P4", "P5", "P6"), pyramid, strict=True)
        for i, feature in enumerate(pyramid, start=2):
            found[f"logits {i}"], found[f"deltas {i}"] = model.rpn(feature)
        corners = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0], [0.4, 0.4, 0.5, 0.5]])
        rois = modellib.Rois(corners, torch.zeros(3, dtype=torch.int64))
        shape = images.shape[2:]
        found["classes"], found["deltas"] = model.classifier(pyramid[:4], rois, shape)
        found["masks"] = model.mask(pyramid[:4], rois, torch.tensor([1, 2, 1]), shape)
        return found


def difference(found, expected):
    """Of the stage that differs most, as a part of its largest number."""
    return max(
        ((found[stage] - tensor).abs().max() / tensor.abs().max()).item()
        for stage, tensor in expected.items()
    )


def equal(found, expected):
    return all(torch.equal(found[stage], tensor) for stage, tensor in expected.items())


def same_prediction(one, other):
    """The bits of two predictions."""

    def tensors(prediction):
        rpn, proposals, probs, deltas, detections, masks = prediction
        return [*rpn, *proposals, probs, deltas, *detections, masks]

    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def assert_close(found, expected, **limits):
    """Of the predictions of the region proposal network and the masks."""
    limits = {"rtol": 1e-3, "atol": 1e-4, **limits}
    torch.testing.assert_close(found.rpn, expected.rpn, **limits)
    torch.testing.assert_close(found.mask_probs, expected.mask_probs, **limits)


def differ(found, other):
    if found.mask_probs.shape != other.mask_probs.shape:
        return True
    return not torch.allclose(found.mask_probs, other.mask_probs, rtol=1e-3, atol=1e-3)


def predict(model, images):
    return model.predict(images, WHOLE)


############################################################
#  What it computes
############################################################


@pytest.mark.parametrize("preset", [TorchvisionConfig, TorchvisionV2Config, Detectron2Config])
def test_other_families_and_grouped_convolutions_take_the_fast_path(preset, monkeypatch):
    sizes = TinyNetwork.own_options()
    sizes |= {"TOP_DOWN_PYRAMID_SIZE": 64, "RPN_CHANNELS": 64, "NUM_CLASSES": 3}
    sizes["BACKBONE"] = {"blocks": (1, 1, 1, 1), "width": 64, "groups": 32, "width_per_group": 4}
    model = make_model(lambda: preset(**sizes))
    assert model.fpn.C2[0].conv2.groups == 32
    images, windows = model.mold_inputs([synthetic_image(100, 128)])
    slow = []
    original = fused._one_by_one
    monkeypatch.setattr(fused, "_one_by_one", lambda *x: (slow.append(x[0]), original(*x))[1])
    found = model.predict(images, windows)
    # Small maps are not worth a transform; P2 and the ResNet always take the fast path.
    resnet = {module for stage in model._stages() for module in stage.modules()}
    assert not {*resnet, model.fpn.P2_conv1, *model.fpn.P2_conv2} & set(slow)
    expected = make_twin(model).predict(images, windows)
    torch.testing.assert_close(found.rpn, expected.rpn, rtol=1e-3, atol=1e-4)
    assert len(found.proposals.boxes) == len(expected.proposals.boxes)


@pytest.mark.parametrize("weights", ["random", "deterministic"])
def test_every_stage_of_a_resnet50(weights, request, calls):
    torch.manual_seed(0)
    model = MaskRCNN(SmallConfig()).eval()
    if weights == "random":
        randomize(model)
    else:
        model.load_weights(request.getfixturevalue("small_h5"), verbose=False)
    images = molded(model)
    expected = stages(model, images, quickly=False)
    assert calls == []
    found = stages(model, images)
    assert difference(found, expected) < 1e-4
    folded = kernel_sizes(calls)
    assert folded.count(1) == 2 * 16 + 4 + 1  # of the blocks, the shortcuts and the classifier
    # 16 blocks, P2..P4, the RPN and the mask head; P5 has 4 tiles, too few for Winograd.
    assert folded.count(3) == 16 + (3 + 1 if is_compiled() else 0) + 4


def test_detections_are_the_same(model):
    image = synthetic_image(100, 128)
    fast = model.detect([image])[0]
    model.config.CPU_WINOGRAD = False
    plain = model.detect([image])[0]
    assert len(plain["scores"]) > 5
    assert fast["class_ids"].tolist() == plain["class_ids"].tolist()
    assert abs(fast["rois"] - plain["rois"]).max() <= 1
    assert abs(fast["scores"] - plain["scores"]).max() < 1e-4
    assert (fast["masks"] != plain["masks"]).mean() < 1e-3


def test_the_first_detection_prepares_and_the_next_keeps(model, calls):
    image = synthetic_image(100, 128)
    model.detect([image])
    assert len(calls) > 20
    calls.clear()
    model.detect([image])
    assert calls == []


def test_outside_of_fast_and_without_cpu_winograd_all_is_plain(model, calls):
    images = molded(model)
    model.config.CPU_WINOGRAD = False
    x = model.normalize(images)
    with torch.no_grad():
        block, x = model.fpn.C2[0], model.fpn.C1(x)
        y = F.relu(block.bn1(block.conv1(x)))
        y = F.relu(block.bn2(block.conv2(y)))
        expected = F.relu(block.bn3(block.conv3(y)) + block.downsample[1](block.downsample[0](x)))
        predict(model, images)
        assert torch.equal(block(x), expected)
        assert calls == []
        with fast():
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
        assert len(calls) == 4
        assert torch.equal(block(x), expected)


TARGET = {
    "class_ids": torch.tensor([1]),
    "boxes": torch.tensor([[1.0, 2.0, 50.0, 60.0]]),
    "masks": torch.ones(1, 56, 56, dtype=torch.bool),
}


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("outputs", [64, 96, 40])  # the last is not for Winograd
def test_gradients_of_a_convolution_are_those_of_float64(with_norm, relu, outputs):
    torch.manual_seed(0)
    conv = nn.Conv2d(64, outputs, 3, padding=1)
    norm = randomize(nn.BatchNorm2d(outputs)) if with_norm else None
    x = torch.randn(2, 64, 21, 18, requires_grad=True)
    factors = torch.randn(2, outputs, 21, 18)

    def gradients(conv, norm, x, factors):
        inputs = [x, *conv.parameters(), *(norm.parameters() if norm else [])]
        output = convolve(conv, x, norm, relu=relu)
        return [output, *torch.autograd.grad((output * factors).sum(), inputs)]

    with fast():
        found = gradients(conv, norm, x, factors)
    exact = [copy.deepcopy(module).double() if module else None for module in (conv, norm)]
    expected = gradients(*exact, x.detach().double().requires_grad_(), factors.double())
    assert any("Winograd" in type(t.grad_fn).__name__ for t in found) == (
        is_compiled() and outputs % 16 == 0
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 4e-6 * other.abs().max()


def losses_and_gradients(model, images):
    torch.manual_seed(0)
    model.zero_grad()
    losses = model(images, [TARGET])
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return torch.stack(list(losses.values())), gradients


@pytest.mark.parametrize("layers", ["heads", "4+", "all"])
def test_a_step_of_training_is_that_of_the_plain_path(quick, layers):
    images, twin = molded(quick.train()), make_twin(quick).train()
    quick.set_trainable(layers)
    losses, gradients = losses_and_gradients(quick, images)
    expected, others = losses_and_gradients(twin, images)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() < 1e-4 * others[name].norm() + 1e-7, name


def test_stages_that_do_not_learn_run_as_in_detection(quick, calls):
    """Without a graph, and folded once for all steps."""
    images = molded(quick.train())
    quick.set_trainable("4+")
    graphs = {}
    for name in ("C1", "C2", "C3", "C4", "C5"):
        stage = getattr(quick.fpn, name)
        stage.register_forward_hook(lambda m, i, o, n=name: graphs.update({n: o.requires_grad}))
    for step in range(2):
        losses_and_gradients(quick, images)
        assert graphs == {"C1": False, "C2": False, "C3": False, "C4": True, "C5": True}
        frozen = [m for m in quick.fpn.C2.modules() if isinstance(m, nn.Conv2d)]
        frozen += [m for m in quick.fpn.C3.modules() if isinstance(m, nn.Conv2d)]
        assert [calls.count(conv) for conv in frozen] == [1] * len(frozen), step
    # A gradient to the image needs a graph everywhere.
    x = quick.normalize(images).requires_grad_()
    assert torch.autograd.grad(quick.fpn(x)[0].sum(), x)[0].abs().max() > 0


def test_backward_hooks_are_called_in_training(quick):
    quick.train()
    seen = []
    for name in ("fpn.P2_conv2.1", "fpn.C5.0.conv2", "fpn.C5.0.bn1"):
        module = quick.get_submodule(name)
        module.register_full_backward_hook(lambda m, i, o, name=name: seen.append(name))
    losses_and_gradients(quick, molded(quick))
    assert set(seen) == {"fpn.P2_conv2.1", "fpn.C5.0.conv2", "fpn.C5.0.bn1"}


def test_another_activation_in_the_stem_is_used(quick):
    x = quick.normalize(molded(quick))
    quick.fpn.C1[2] = nn.SiLU()
    with torch.no_grad():
        expected = nn.Sequential(*quick.fpn.C1)(x)
        with fast():
            assert torch.equal(quick.fpn.C1(x), expected)
            assert quick.fpn.C1[:2](x).shape[1] == 16


def test_batch_norm_that_learns_its_statistics_is_not_folded(quick):
    quick.config.TRAIN_BN = True
    quick.train()
    before = quick.fpn.C2[0].bn1.running_mean.clone()
    quick.set_trainable("heads")
    losses_and_gradients(quick, molded(quick))
    assert not torch.equal(quick.fpn.C2[0].bn1.running_mean, before)


def test_losses_do_not_depend_on_a_detection_before(model):
    images = molded(model)

    def losses():
        torch.manual_seed(0)
        with torch.no_grad():
            return model(images, [TARGET])

    expected = losses()
    model.detect([synthetic_image(100, 128)])
    assert losses() == expected


KINDS = ["double", "bfloat16", "autocast", "training", "hook", "forward", "kind", "compiling"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_plain_inference_in_float32_is_not_fused(kind, calls, monkeypatch):
    conv, norm = nn.Conv2d(256, 256, 3, padding=1).eval(), nn.BatchNorm2d(256).eval()
    x = torch.randn(1, 256, 32, 32).contiguous(memory_format=LAST)
    seen = []
    if kind in ("double", "bfloat16"):
        dtype = getattr(torch, kind.replace("double", "float64"))
        conv, norm, x = conv.to(dtype), norm.to(dtype), x.to(dtype)
    elif kind == "training":
        norm.train()
    elif kind == "hook":
        conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    elif kind == "forward":
        norm.forward = lambda x: 2 * x
    elif kind == "kind":
        conv.__class__ = type("Conv", (nn.Conv2d,), {"forward": lambda self, x: x + 1})
    elif kind == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad(), torch.autocast("cpu", enabled=kind == "autocast"), fast():
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
    with torch.no_grad(), fast():
        expected = conv(x) if norm is None else norm(conv(x))
        other = torch.randn(expected.shape).contiguous(memory_format=layout)
        torch.testing.assert_close(convolve(conv, x, norm), expected, rtol=1e-4, atol=1e-5)
        before = other.clone()
        found = convolve(conv, x, norm, relu=True, add=other)
        torch.testing.assert_close(found, (expected + other).relu(), rtol=1e-4, atol=1e-5)
        assert torch.equal(other, before)
        with fast(overwrite=True):
            found = convolve(conv, x, norm, add=other)
        torch.testing.assert_close(found, expected + before, rtol=1e-4, atol=1e-5)
        assert convolve(conv, x[:0], norm, relu=True).shape == (0, *expected.shape[1:])


def test_without_onednn_torch_has_the_same_result(monkeypatch):
    conv = nn.Conv2d(16, 32, 1).eval()
    x, other = torch.randn(2, 16, 9, 9), torch.randn(2, 32, 9, 9)
    before = other.clone()
    with torch.no_grad(), fast():
        expected = [convolve(conv, x, relu=True), convolve(conv, x, add=other)]
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        torch.testing.assert_close(convolve(conv, x, relu=True), expected[0])
        torch.testing.assert_close(convolve(conv, x, add=other), expected[1])
        assert convolve(conv, x, relu=True).min() == 0
    assert torch.equal(other, before)


############################################################
#  Edits of weights
############################################################


def in_place(model, name):
    with torch.no_grad():
        model.state_dict(keep_vars=True)[name].mul_(1.5).add_(0.1)


def data(model, name):
    model.state_dict(keep_vars=True)[name].data.mul_(1.5).add_(0.1)


def numpy(model, name):
    array = model.state_dict()[name].numpy()
    array *= 1.5
    array += 0.1


def inference_mode(model, name):
    with torch.inference_mode():
        model.state_dict()[name].mul_(1.5).add_(0.1)


def copied(model, name):
    tensor = model.state_dict()[name]
    tensor.copy_(tensor.clone() * 1.5 + 0.1)


def loaded(model, name):
    state = model.state_dict()
    model.load_state_dict({**state, name: state[name] * 1.5 + 0.1})


def assigned(model, name):
    tensor = model.state_dict(keep_vars=True)[name]
    tensor.data = tensor.data * 1.5 + 0.1


def replaced(model, name):
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, attribute).detach() * 1.5 + 0.1
    is_buffer = attribute in module._buffers
    setattr(module, attribute, tensor if is_buffer else nn.Parameter(tensor))


EDITS = [in_place, data, numpy, inference_mode, copied, loaded, assigned, replaced]
# The others do not come by convolve or dense.
FOLDED = [
    name
    for name in MaskRCNN(QuickConfig()).state_dict()
    if not name.startswith(("classifier.linear", "mask.deconv.", "mask.conv5."))
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_of_any_tensor_is_followed(quick, edit):
    twin, images = make_twin(quick), molded(quick)
    found = stages(quick, images)
    for name in FOLDED[EDITS.index(edit) :: len(EDITS)]:  # each tensor in one way
        tensor = quick.state_dict()[name].clone()
        edit(quick, name)
        before, found = found, stages(quick, images)
        expected = stages(twin, images, quickly=False)
        assert difference(found, expected) < 3e-5, name
        assert difference(before, expected) > 3e-4, name
        quick.state_dict()[name].copy_(tensor)


class Layer(nn.Module):
    """One call of convolve."""

    def __init__(self, channels, outputs, size, with_norm=True, **options):
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, size, padding=size // 2)
        self.norm = nn.BatchNorm2d(outputs) if with_norm else None
        self.options = options
        self.x = torch.rand(1, channels, 12, 12).contiguous(memory_format=LAST)

    def forward(self):
        add = torch.ones(1, self.conv.out_channels, 12, 12) if self.options.get("add") else None
        return convolve(self.conv, self.x, self.norm, **{**self.options, "add": add})


KINDS_OF_LAYERS = {
    "small": lambda: Layer(16, 64, 1, relu=True),
    "sum": lambda: Layer(64, 256, 1, add=True),
    "direct": lambda: Layer(64, 40, 3),
    "winograd": lambda: Layer(64, 64, 3, relu=True),
    "winograd without norm": lambda: Layer(64, 64, 3, with_norm=False),
    "without norm": lambda: Layer(64, 64, 1, with_norm=False, add=True),
    "large": lambda: Layer(256, 200, 3),
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("kind", KINDS_OF_LAYERS)
def test_each_kind_of_edit_of_each_tensor_of_a_layer(kind, edit):
    torch.manual_seed(0)
    layer = randomize(KINDS_OF_LAYERS[kind]())
    with torch.no_grad():
        with fast():
            found = layer()
        for name, tensor in layer.state_dict().items():
            if name == "norm.num_batches_tracked":
                continue
            for _ in range(2):  # a second time, since it may have been noticed by chance
                edit(layer, name)
                with fast():
                    before, found = found, layer()
                    again = layer()
                expected = layer()  # which forgets what was prepared
                with fast():
                    assert torch.equal(layer(), found)
                assert torch.equal(again, found)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)
            layer.state_dict()[name].copy_(tensor)


def test_every_tensor_of_a_layer_is_looked_at_alone(quick, calls):
    """After the change of one number in its last place only that layer is folded, once."""
    images = molded(quick)
    predict(quick, images)
    layers = {id(conv) for conv in calls}
    for name in FOLDED:
        tensor = quick.state_dict()[name].view(-1)
        calls.clear()
        place = len(tensor) * 2 // 3
        tensor[place] = tensor[place].nextafter(torch.tensor(torch.inf))
        predict(quick, images)
        path, _, _ = name.rpartition(".")
        # bn1 belongs to conv1, downsample.1 to downsample.0, C1.1 to C1.0.
        path = path.replace("bn", "conv").replace("downsample.1", "downsample.0")
        path = path.replace("C1.1", "C1.0")
        conv = quick.get_submodule(path)
        assert [id(module) for module in calls] == [id(conv)] * (id(conv) in layers), name
    norms = [name for name in FOLDED if name.endswith("running_mean")]
    assert len(layers) == len(norms) + (2 if is_compiled() else 0)  # P2_conv2, rpn.conv_shared


def swap_filters(weight):
    weight[[3, 40]] = weight[[40, 3]]


def swap_channels(weight):
    weight[:, [0, 1]] = weight[:, [1, 0]]


def reverse_filters(weight):
    weight.copy_(weight.flip(0))


def turn_filters(weight):
    weight.copy_(weight.roll(1, dims=0))


def turn_channels(weight):
    weight.copy_(weight.roll(2, dims=1))


def mirror(weight):
    weight.copy_(weight.flip(3) if weight.shape[3] > 1 else weight.flip(1))


def negate(weight):
    weight.neg_()


def negate_a_channel(weight):
    weight[:, 1].neg_()


def negate_odd_channels(weight):
    weight[:, 1::2].neg_()


def negate_odd_channels_of_half(weight):
    weight[: len(weight) // 2, 1::2].neg_()


def negate_two(weight):
    weight[0, 1, 0, 0].neg_()
    weight[0, 3, 0, 0].neg_()


def double(weight):
    weight.mul_(2)


def halve_a_channel(weight):
    weight[:, 3].mul_(0.5)


def clear_a_filter(weight):
    weight[7].zero_()


def shift_between_two(weight):
    weight[0, 0] += 0.25
    weight[0, 1] -= 0.25


CHANGES = [
    *(swap_filters, swap_channels, reverse_filters, turn_filters, turn_channels, mirror, negate),
    *(negate_a_channel, negate_odd_channels, negate_odd_channels_of_half, negate_two, double),
    *(halve_a_channel, clear_a_filter, shift_between_two),
]
# With filters of 4098 numbers, nearly a row of sums, and as they are in the network.
SHAPES = [(64, 64, 3, 3), (256, 256, 3, 3), (64, 4098, 1, 1), (512, 256, 1, 1), (41, 200, 1, 1)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_a_change_of_order_or_sign_is_seen(change, shape, layout):
    torch.manual_seed(0)
    weight = torch.randn(shape).contiguous(memory_format=layout)
    before = fused._fingerprint(weight)
    assert fused._fingerprint(weight.clone()) == before
    change(weight)
    assert fused._fingerprint(weight) != before


@pytest.mark.parametrize("count", [1, 7, 2 * 4099, 2 * 4099 + 1, 2 * 4099 + 2, 100_001, 1_000_000])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_every_bit_of_every_number_counts(count, offset):
    torch.manual_seed(0)
    tensor = torch.randn(count + offset)[offset:]
    before = fused._fingerprint(tensor)
    bits = tensor.view(torch.int32)
    ends = [0, 1, 2 * 4099 - 1, 2 * 4099, count - 2, count - 1]
    places = {place for place in ends if 0 <= place < count}
    places |= set(torch.randint(count, (100,)).tolist())
    for i, place in enumerate(sorted(places)):
        bit = 1 << (i % 31)
        for change in (bit, -(2**31)):
            bits[place] ^= change
            assert fused._fingerprint(tensor) != before
            bits[place] ^= change
    assert fused._fingerprint(tensor) == before


def test_shapes_and_layouts_count():
    tensor = torch.randn(4, 6, 3, 3)
    wide = torch.randn(100, 200, 1, 1)
    square = torch.randn(100, 100, 3, 3)
    views = [tensor, tensor.view(6, 4, 3, 3), tensor[:2], tensor.view(4, 6, 1, 9)]
    views += [wide, wide.view(200, 100, 1, 1), wide.view(100, 2, 100, 1), wide.flip(0)]
    # The same numbers in memory, in another order in the tensor.
    views += [square, square.transpose(0, 1), square.transpose(2, 3)]
    views += [square.view(100, 3, 3, 100).permute(0, 3, 1, 2)]
    assert len({fused._fingerprint(view) for view in views}) == len(views)


@pytest.mark.parametrize("cut", [lambda x: x[:, ::2], lambda x: x[::2, 1:], lambda x: x[..., :1]])
def test_tensors_that_are_not_dense_have_a_fingerprint_too(cut):
    tensor = cut(torch.randn(300, 200, 1, 2))
    before = fused._fingerprint(tensor)
    for place in ((0, 0), (-1, -1), (50, 60)):
        tensor[place] += 1
        assert fused._fingerprint(tensor) != before
        before = fused._fingerprint(tensor)


def test_statistics_and_eps_count(quick, calls):
    twin, images = make_twin(quick), molded(quick)
    found = stages(quick, images)
    norms = [(a, b) for a, b in zip(quick.modules(), twin.modules(), strict=True)
             if isinstance(a, modellib.BatchNorm2d)]  # fmt: skip
    for norm, other in norms[1:]:
        for change in ("mean", "eps"):
            if change == "mean":
                norm.running_mean.data.add_(0.5)
            else:
                norm.eps = other.eps = 0.5
            before, found = found, stages(quick, images)
            expected = stages(twin, images, quickly=False)
            assert difference(found, expected) < 1e-4
            assert not equal(found, before) or norm in quick.classifier.children()


@pytest.mark.parametrize("options", [TORCHVISION_RESNET, KERAS_RESNET])
def test_set_backbone_is_followed(model, options):
    images = molded(model)
    model.set_backbone({"STRIDE_IN_1X1": not options["STRIDE_IN_1X1"], "BATCH_NORM_EPS": 0.01})
    before = predict(model, images)
    model.set_backbone(options)
    found = predict(model, images)
    assert not same_prediction(found, before)
    assert same_prediction(found, predict(copy.deepcopy(model), images))


def test_load_state_dict_and_an_optimizer_are_followed(model):
    images = molded(model)
    other = randomize(MaskRCNN(WideConfig()), seed=1)
    before = stages(model, images)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        found = stages(model, images)
        assert difference(found, stages(other, images, quickly=False)) < 1e-4
        assert difference(found, before) > 1e-2
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        before = stages(model, images)
        assert difference(before, stages(make_twin(model), images, quickly=False)) < 1e-4
        assert difference(before, found) > 1e-2


def test_a_hook_may_change_weights_on_the_way(quick):
    twin, images = make_twin(quick), molded(quick)
    before = predict(quick, images)

    def louder(module, inputs):
        quick.mask.conv1.weight.data.mul_(1.5)
        quick.fpn.C3[0].bn2.running_mean.data.add_(0.3)

    handle = quick.fpn.C3.register_forward_pre_hook(louder)
    found = predict(quick, images)
    handle.remove()
    expected = predict(twin, images)
    assert_close(found, expected)
    assert differ(found, before)
    assert_close(predict(quick, images), expected)


def test_weights_shared_by_two_models(quick):
    other, images = make_model(QuickConfig), molded(quick)
    for module, source in zip(other.modules(), quick.modules(), strict=True):
        module._parameters, module._buffers = source._parameters, source._buffers
    before = predict(quick, images)
    assert same_prediction(predict(other, images), before)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    found = predict(quick, images)
    assert not same_prediction(found, before)
    assert same_prediction(predict(other, images), found)
    assert same_prediction(predict(copy.deepcopy(quick), images), found)


def test_inference_mode(quick):
    images = molded(quick)
    expected = predict(quick, images)
    with torch.inference_mode():
        assert same_prediction(predict(quick, images), expected)
        other = make_model(QuickConfig)  # of inference tensors
        assert same_prediction(predict(other, images), expected)
        for parameter in [*quick.parameters(), *other.parameters()]:
            parameter.mul_(1.1)
        found = predict(quick, images)
        assert same_prediction(predict(other, images), found)
    assert not same_prediction(found, expected)
    # What was prepared in inference mode serves outside of it too.
    assert same_prediction(predict(quick, images), found)
    assert same_prediction(predict(other, images), found)


def test_double_precision_and_back(quick):
    images = molded(quick)
    before = predict(quick, images)
    quick.double()
    twin = make_twin(quick)
    assert same_prediction(predict(quick, images), predict(twin, images))
    assert not any(module in fused._prepared for module in quick.modules())
    quick.float()
    assert same_prediction(predict(quick, images), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_back(quick, dtype):
    """The round trip rounds the weights."""
    images = molded(quick)
    before = predict(quick, images)
    quick.to(dtype)
    x = quick.normalize(images)
    with torch.no_grad():
        expected = quick.fpn(x)
        with fast():
            assert all(torch.equal(a, b) for a, b in zip(quick.fpn(x), expected, strict=True))
    quick.float()
    found = predict(quick, images)
    assert not same_prediction(found, before)
    assert same_prediction(found, predict(copy.deepcopy(quick), images))


def test_autocast(quick):
    images, twin = molded(quick), make_twin(quick)
    before = predict(quick, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_prediction(predict(quick, images), predict(twin, images))
    assert same_prediction(predict(quick, images), before)


def test_bfloat16_is_near_float32(quick, monkeypatch):
    """All convolutions are in bfloat16, emulated where the processor lacks it; results are not."""
    monkeypatch.setattr(fused, "can_use_bfloat16", lambda: True)
    images = molded(quick)
    exact = predict(quick, images)
    seen = {}
    original = fused._onednn

    def watch(conv, x, *arguments):
        seen[conv] = x.dtype
        return original(conv, x, *arguments)

    monkeypatch.setattr(fused, "_onednn", watch)
    quick.config.CPU_PRECISION = "bfloat16"
    found = predict(quick, images)
    resnet = {m for stage in quick._stages() for m in stage.modules() if isinstance(m, nn.Conv2d)}
    outputs = {quick.rpn.conv_class, quick.rpn.conv_bbox}
    assert {conv for conv, dtype in seen.items() if dtype == torch.float32} == outputs
    assert resnet < set(seen)
    for one, other in zip(found.rpn, exact.rpn, strict=True):
        assert one.dtype == torch.float32
        assert 1e-5 < (one - other).norm() / other.norm() < 0.03
    tensors = (found.proposals.boxes, found.class_probs, found.detections.boxes, found.mask_probs)
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    quick.config.CPU_PRECISION = "float32"
    assert same_prediction(predict(quick, images), exact)


def test_bfloat16_of_any_layout_and_with_a_hook(quick, monkeypatch):
    monkeypatch.setattr(fused, "can_use_bfloat16", lambda: True)
    quick.config.CPU_PRECISION = "bfloat16"
    images = molded(quick)
    expected = predict(quick, images)
    assert same_prediction(predict(quick, images.contiguous()), expected)
    for name in ("classifier.conv2", "classifier.conv1", "fpn.C2.0.conv2", "rpn.conv_class"):
        module = quick.get_submodule(name)
        hook = module.register_forward_hook(lambda module, inputs, output: None)
        found = predict(quick, images)
        hook.remove()
        for one, other in zip(found.rpn, expected.rpn, strict=True):
            assert (one - other).norm() < 0.02 * other.norm(), name
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    found = predict(quick, images)
    assert (found.rpn.logits - expected.rpn.logits).norm() < 0.02 * expected.rpn.logits.norm()
    monkeypatch.undo()
    monkeypatch.setattr(fused, "can_use_bfloat16", lambda: True)
    quick.fpn.C3[0] = Adapter(quick.fpn.C3[0], 64)
    with pytest.raises(ValueError, match="needs the layers of this library in model.fpn"):
        quick.detect([synthetic_image(64, 64)])


def test_bfloat16_in_plain_layers(monkeypatch):
    """What cannot be fused computes in float32, and what follows in bfloat16 again."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(64, 64, 3, padding=1).eval() for _ in range(3)]
    convs[1].register_forward_hook(lambda module, inputs, output: None)
    x = torch.rand(1, 64, 16, 16).contiguous(memory_format=LAST)
    with torch.no_grad():
        expected = convs[2](F.relu(convs[1](convs[0](x))))
        with fast(dtype=torch.bfloat16):
            found = convolve(convs[2], convolve(convs[1], convolve(convs[0], x), relu=True))
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_bfloat16_without_a_processor_for_it_is_an_error(quick, monkeypatch):
    monkeypatch.setattr(fused, "can_use_bfloat16", lambda: False)
    quick.config.CPU_PRECISION = "bfloat16"
    with pytest.raises(ValueError, match="needs a processor with AVX512-BF16 or AMX, .* 'float32'"):
        quick.detect([synthetic_image(64, 64)])
    quick.train()
    losses_and_gradients(quick, molded(quick))  # training does not ask for it


############################################################
#  Modules of one's own and hooks
############################################################


class Adapter(nn.Module):
    """A block with something beside it, which sees the block's input after the block has run."""

    def __init__(self, block, channels):
        super().__init__()
        self.block, self.side = block, nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.block(x) + 0.1 * self.side(x)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def swap_conv(model):
    model.fpn.C2[1].conv3 = nn.Conv2d(16, 64, 1)


def swap_for_another_kind(model):
    model.fpn.C2[1].conv3 = Doubled(16, 64, 1)


def swap_for_a_sequence(model):
    model.fpn.C2[1].conv1 = nn.Sequential(nn.Conv2d(64, 8, 1), nn.Conv2d(8, 16, 1))
    model.mask.conv2 = nn.Sequential(nn.Conv2d(64, 8, 3, padding=1), nn.Conv2d(8, 64, 1))


def swap_norm(model):
    model.fpn.C2[1].bn3 = nn.BatchNorm2d(64, eps=0.1)


def remove_norm(model):
    model.fpn.C2[1].bn2 = nn.Identity()
    model.fpn.C3[0].bn3 = nn.Identity()


def group_norm(model):
    model.fpn.C2[1].bn2 = nn.GroupNorm(4, 16)


def statistics_of_the_batch(model):
    model.mask.bn1 = nn.BatchNorm2d(64, track_running_stats=False)


def swap_block(model):
    model.fpn.C2[1] = modellib.Bottleneck(64, 16, 64)


def wrap_block(model):
    model.fpn.C2[1] = Adapter(model.fpn.C2[1], 64)


def swap_stage(model):
    class Sum(nn.Sequential):
        def forward(self, x):
            maps = [x := block(x) for block in self]
            return maps[0] + maps[1]

    model.fpn.C2 = Sum(*model.fpn.C2)


def swap_pyramid(model):
    class Twice(modellib.FPN):
        def bottom_up(self, images):
            c2, *rest = super().bottom_up(images)
            return 2 * c2, *rest

    model.fpn.__class__ = Twice


def parametrize(model):
    parametrizations.spectral_norm(model.fpn.C2[1].conv3)


def prune_conv(model):
    prune.l1_unstructured(model.fpn.C2[1].conv2, "weight", amount=0.5)


def replace_forward(model):
    block = model.fpn.C2[1]
    forward = block.forward
    block.forward = lambda x: forward(x) + x


SWAPS = [
    *(swap_conv, swap_for_another_kind, swap_for_a_sequence, swap_norm, remove_norm, group_norm),
    *(statistics_of_the_batch, swap_block, wrap_block, swap_stage, swap_pyramid, parametrize),
    *(prune_conv, replace_forward),
]


@pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.__name__)
def test_a_swapped_module_is_followed(quick, swap):
    images = molded(quick)
    before = predict(quick, images)
    torch.manual_seed(1)
    swap(quick)
    quick.eval()
    found = predict(quick, images)
    quick.config.CPU_WINOGRAD = False
    expected = predict(quick, images)
    assert_close(found, expected)
    assert differ(found, before)


def keep(record):
    """A hook that keeps what it sees, and a copy of it as it was."""

    def tensors(values):
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, torch.Tensor):
                yield value

    def hook(module, inputs, *output):
        record.extend((x, x.clone()) for x in tensors((*inputs, *output)))

    return hook


# One of each kind. C1's own nn.ReLU(inplace=True) overwrites its input, the BatchNorm's output.
WATCHED = [
    name
    for name, _ in MaskRCNN(QuickConfig()).named_modules()
    if not name.startswith(("fpn.C1.", "fpn.C4", "fpn.C5", "fpn.P3", "fpn.P4", "mask.conv2"))
]


def test_hooks_see_and_keep_the_true_values(quick):
    images, twin = molded(quick), make_twin(quick)

    def watch(model, name):
        record = []
        module = model.get_submodule(name)
        handles = [module.register_forward_pre_hook(keep(record))]
        handles += [module.register_forward_hook(keep(record))]
        return record, handles

    expected = {name: watch(twin, name)[0] for name in WATCHED}
    with torch.no_grad():
        twin(images)
        quick(images)
        for name in WATCHED:  # one at a time, since a hook changes how its layer is computed
            record, handles = watch(quick, name)
            quick(images)
            for handle in handles:
                handle.remove()
            assert len(record) == len(expected[name]), name
            for (kept, as_it_was), (plain, _) in zip(record, expected[name], strict=True):
                assert torch.equal(kept, as_it_was), name
                torch.testing.assert_close(kept, plain, rtol=1e-3, atol=1e-3, msg=name)
    assert sum(map(bool, expected.values())) > 30


def test_a_hook_for_all_modules_sees_and_keeps_the_true_values(quick):
    images, record = molded(quick), []
    predict(quick, images)
    handle = register_module_forward_hook(keep(record))
    try:
        predict(quick, images)
    finally:
        handle.remove()
    assert len(record) > 100
    changed = [kept for kept, as_it_was in record if not torch.equal(kept, as_it_was)]
    assert len(changed) == 1  # the output of C1's BatchNorm, by its own nn.ReLU(inplace=True)


def test_a_hook_may_change_an_output(quick):
    images = molded(quick)
    for name in ("fpn.C2.0", "fpn.C2.1.bn1", "fpn.C2.1.conv2", "rpn.conv_shared", "mask.bn2"):
        before = predict(quick, images)
        module = quick.get_submodule(name)
        handle = module.register_forward_hook(lambda module, inputs, output: 2 * output)
        found = predict(quick, images)
        quick.config.CPU_WINOGRAD = False
        expected = predict(quick, images)
        quick.config.CPU_WINOGRAD = True
        handle.remove()
        assert_close(found, expected)
        assert differ(found, before)


def test_sums_are_made_in_place_only_where_nobody_sees_it(quick):
    assert quick._keeps_to_itself()
    handle = quick.fpn.C4[0].conv1.register_forward_pre_hook(lambda module, inputs: None)
    assert not quick._keeps_to_itself()
    handle.remove()
    assert quick._keeps_to_itself()
    block = modellib.Bottleneck(64, 16, 64).eval()
    x = torch.rand(1, 64, 8, 8).contiguous(memory_format=LAST)
    before = x.clone()
    with torch.no_grad():
        with fast():
            expected = block(x)
        assert torch.equal(x, before)
        with fast(overwrite=True):
            found = block(x)
        assert found.data_ptr() == x.data_ptr()
        assert torch.equal(found, expected)


############################################################
#  fast(), threads, copies and memory
############################################################


def test_fast_nests_and_ends_with_an_error():
    assert fused._mode.get() is None
    with fast(overwrite=True):
        with contextlib.suppress(KeyError), fast():
            assert fused._mode.get().overwrite is False
            raise KeyError
        assert fused._mode.get().overwrite is True
    assert fused._mode.get() is None


def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_fast_is_of_its_thread():
    conv = nn.Conv2d(8, 8, 1).eval()
    norm, x = nn.BatchNorm2d(8).eval(), torch.rand(1, 8, 4, 4)

    @torch.no_grad()
    def run():
        convolve(conv, x, norm)
        return conv in fused._prepared

    with fast():
        assert run()
        assert not in_thread(run)
        assert run()


def test_two_threads_detect_at_once(quick):
    images = [synthetic_image(64, 64), synthetic_image(48, 64)]
    other = make_model(QuickConfig)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    expected = [[copy.deepcopy(m).detect([image])[0] for image in images] for m in (quick, other)]
    failures = []

    def work(model, image, result):
        for _ in range(5):
            found = model.detect([image])[0]
            if not all((found[key] == result[key]).all() for key in ("rois", "scores", "masks")):
                failures.append(found)

    threads = [
        threading.Thread(target=work, args=(model, image, result))
        for model, results in ((quick, expected[0]), (other, expected[1]))
        for image, result in zip(images, results, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


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
        for parameter in other.parameters():
            parameter.data.mul_(1.1)
        changed = other.detect([image])[0]["rois"]
        assert changed.shape != expected["rois"].shape or (changed != expected["rois"]).any()
        assert (model.detect([image])[0]["scores"] == expected["scores"]).all()


def test_memory_is_given_back(quick):
    gc.collect()
    before = len(fused._prepared)
    image, images = synthetic_image(64, 64), molded(quick)

    def train():
        losses_and_gradients(quick.train(), images)

    def compute_plainly():
        quick.config.CPU_WINOGRAD = False
        quick.detect([image])

    def convert():
        quick.double().detect([image])

    for use in (train, compute_plainly, convert):
        quick.config.CPU_WINOGRAD = True
        quick.float().eval().detect([image])
        assert len(fused._prepared) > before + 20
        use()
        # Training needs proposals, whose convolution on P2 is as in detection.
        left = before + (use is train and bool(is_compiled()))
        assert len(fused._prepared) == left, use.__name__
    quick.float().detect([image])
    assert len(fused._prepared) > before + 20


def test_memory_of_a_deleted_model_is_given_back():
    gc.collect()
    before = len(fused._prepared)
    model = make_model(QuickConfig)
    model.detect([synthetic_image(64, 64)])
    assert len(fused._prepared) > before
    del model
    gc.collect()
    assert len(fused._prepared) == before
