"""torchvision's and detectron2's weights, under our names and in our arrangement."""

import importlib.util
import pickle

import family_weights as fw
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import SHARED, needs_shared
from torch import nn

import families
import presets
import weights
from config import Config
from families import CATEGORIES, CLASS_NAMES, TORCHVISION_CLASS_NAMES

FPN, V2 = "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"
RESNET50 = ((3, 4, 6, 3), 64, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def r50(folder):
    """A file of detectron2 and its arrays."""
    path = folder / "model_final_f10217.pkl"
    return path, fw.write_detectron2(path, "r50")


def shapes_of(state):
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


class Network(nn.Module):
    """A module with the keys of the network, which takes what load_weights gives it."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes
        self.tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
        self.options = None

    def state_dict(self):
        return self.tensors

    def set_backbone(self, options):
        self.options = options


def load(path, *shapes, **sizes):
    """Loads all tensors of the file into a network of these shapes; returns it and the options."""
    network = Network(fw.expected_shapes(*shapes, **sizes))
    file = weights.read_state_dict(path)
    report = weights.load_weights(network, file, verbose=False)
    assert report.missing == report.unexpected == report.mismatched == []
    assert set(report.loaded) == set(network.shapes)
    assert network.options == {name: file.config[name] for name in presets.BACKBONE_OPTIONS}
    return network.tensors, weights.read_options(file), report


def assert_preset(options, preset, **others):
    """The options are those of the preset and no more, but for what shapes tell."""
    expected = preset.own_options() | others
    told = {"TOP_DOWN_PYRAMID_SIZE": 256, "FPN_CLASSIF_FC_LAYERS_SIZE": 1024, "POOL_SIZE": 7}
    for name, value in options.items():
        default = getattr(Config, name)
        assert value == expected.get(name, told.get(name, default)), name
    assert expected.keys() <= options.keys()
    Config(**options).validate()


# --- torchvision ---------------------------------------------------------------------------------


def swapped(tensor):
    """(dx, dy, dw, dh) -> (dy, dx, dh, dw) in each group of four rows."""
    rows = []
    for start in range(0, len(tensor), 4):
        rows += [tensor[start + 1], tensor[start], tensor[start + 3], tensor[start + 2]]
    return torch.stack(rows)


def test_the_first_mask_rcnn_of_torchvision(folder):
    state = fw.torchvision_state(FPN)
    torch.save(state, folder / "v1.pth")
    tensors, options, report = load(folder / "v1.pth", *RESNET50, 91)
    assert report.format == "torchvision Mask R-CNN"
    assert all(key.startswith("fpn.C") for key in report.zeroed)
    assert len(report.zeroed) == 53
    assert_preset(
        options,
        presets.TorchvisionConfig,
        NUM_CLASSES=91,
        CLASS_NAMES=TORCHVISION_CLASS_NAMES,
    )
    assert options["BATCH_NORM_EPS"] == 0.0
    for ours, theirs in (
        ("fpn.C1.0.weight", "backbone.body.conv1.weight"),
        ("fpn.C1.1.running_var", "backbone.body.bn1.running_var"),
        ("fpn.C4.5.bn2.bias", "backbone.body.layer3.5.bn2.bias"),
        ("fpn.C3.0.downsample.1.weight", "backbone.body.layer2.0.downsample.1.weight"),
        ("fpn.P5_conv1.bias", "backbone.fpn.inner_blocks.3.0.bias"),
        ("fpn.P2_conv2.1.weight", "backbone.fpn.layer_blocks.0.0.weight"),
        ("rpn.conv_shared.weight", "rpn.head.conv.0.0.weight"),
        ("rpn.conv_class.bias", "rpn.head.cls_logits.bias"),
        ("classifier.conv1.bias", "roi_heads.box_head.fc6.bias"),
        ("classifier.linear_class.weight", "roi_heads.box_predictor.cls_score.weight"),
        ("mask.conv3.weight", "roi_heads.mask_head.2.0.weight"),
        ("mask.deconv.weight", "roi_heads.mask_predictor.conv5_mask.weight"),
        ("mask.conv5.bias", "roi_heads.mask_predictor.mask_fcn_logits.bias"),
    ):
        assert torch.equal(tensors[ours], state[theirs]), ours
    for ours, theirs in (
        ("rpn.conv_bbox.weight", "rpn.head.bbox_pred.weight"),
        ("rpn.conv_bbox.bias", "rpn.head.bbox_pred.bias"),
        ("classifier.linear_bbox.weight", "roi_heads.box_predictor.bbox_pred.weight"),
    ):
        assert torch.equal(tensors[ours], swapped(state[theirs])), ours


def test_layers_that_become_convolutions_compute_the_same(folder):
    model = fw.torchvision_network(FPN)
    torch.save(fw.torchvision_state(FPN), folder / "v1.pth")
    state = weights.read_state_dict(folder / "v1.pth").state_dict
    crops = torch.rand(2, 256, 7, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.roi_heads.box_head(crops)
        x = F.conv2d(crops, state["classifier.conv1.weight"], state["classifier.conv1.bias"])
        x = F.conv2d(x.relu(), state["classifier.conv2.weight"], state["classifier.conv2.bias"])
    torch.testing.assert_close(x.relu()[:, :, 0, 0], expected, rtol=1e-4, atol=0)


def test_the_second_mask_rcnn_of_torchvision(folder):
    state = fw.torchvision_state(V2)
    assert any(key.endswith("num_batches_tracked") for key in state)
    torch.save(state, folder / "v2.pth")
    tensors, options, report = load(folder / "v2.pth", *RESNET50, 91, second=True)
    assert_preset(
        options,
        presets.TorchvisionV2Config,
        NUM_CLASSES=91,
        CLASS_NAMES=TORCHVISION_CLASS_NAMES,
    )
    others = [key for key in report.zeroed if not key.startswith("fpn.C")]
    assert len(others) == 8 + 4 + 4
    for ours, theirs in (
        ("fpn.P3_bn1.running_mean", "backbone.fpn.inner_blocks.1.1.running_mean"),
        ("fpn.P4_bn2.weight", "backbone.fpn.layer_blocks.2.1.weight"),
        ("rpn.conv_shared2.weight", "rpn.head.conv.1.0.weight"),
        ("classifier.convs.3.0.weight", "roi_heads.box_head.3.0.weight"),
        ("classifier.convs.3.1.running_var", "roi_heads.box_head.3.1.running_var"),
        ("classifier.conv1.bias", "roi_heads.box_head.5.bias"),
        ("mask.bn4.bias", "roi_heads.mask_head.3.1.bias"),
    ):
        assert torch.equal(tensors[ours], state[theirs]), ours
    first = state["roi_heads.box_head.5.weight"].view(1024, 256, 7, 7)
    assert torch.equal(tensors["classifier.conv1.weight"], first)


def test_batchnorm_that_was_trained_has_its_epsilon(folder):
    state = fw.torchvision_network(FPN).state_dict()
    assert "backbone.body.bn1.num_batches_tracked" in state
    torch.save(state, folder / "trained.pth")
    assert weights.read_state_dict(folder / "trained.pth").config["BATCH_NORM_EPS"] == 1e-5


@pytest.fixture(scope="module")
def tiny_state():
    return fw.tiny_torchvision().state_dict()


TINY = ((1, 1, 2, 1), 64, 1, 5)


@pytest.mark.parametrize("form", ["new", "old", "DataParallel", "Lightning", "safetensors"])
def test_names_and_containers_of_all_times(tmp_path, tiny_state, form):
    path = tmp_path / "model.pth"
    if form == "old":
        old = {fw.old_torchvision_name(key): tensor for key, tensor in tiny_state.items()}
        assert "roi_heads.mask_head.mask_fcn4.bias" in old
        assert {"rpn.head.conv.bias", "backbone.fpn.layer_blocks.3.bias"} <= old.keys()
        torch.save(old, path, _use_new_zipfile_serialization=False)
    elif form == "DataParallel":
        torch.save({"model": {f"module.{k}": t for k, t in tiny_state.items()}, "epoch": 3}, path)
    elif form == "Lightning":
        state = {f"model.net.{k}": t for k, t in tiny_state.items()}
        torch.save({"state_dict": state}, path)
    elif form == "safetensors":
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file({k: t.contiguous() for k, t in tiny_state.items()}, path)
    else:
        torch.save(tiny_state, path)
    tensors, options, report = load(path, *TINY, pyramid=16, fully=32)
    assert report.format == "torchvision Mask R-CNN"
    assert torch.equal(tensors["mask.conv2.weight"], tiny_state["roi_heads.mask_head.1.0.weight"])
    assert options["BACKBONE"] == {"blocks": (1, 1, 2, 1), "width": 64}
    assert (options["NUM_CLASSES"], "CLASS_NAMES" in options) == (5, False)
    assert options["FPN_CLASSIF_FC_LAYERS_SIZE"] == 32


def test_old_and_new_names_at_once_are_refused(tmp_path, tiny_state):
    state = {**tiny_state, "rpn.head.conv.bias": torch.zeros(16)}
    torch.save(state, tmp_path / "model.pth")
    message = r"two tensors for rpn\.conv_shared\.bias, one of them 'rpn\.head\.conv\.bias'"
    with pytest.raises(ValueError, match=message):
        weights.read_state_dict(tmp_path / "model.pth")


def test_conversion_keeps_all_that_is_known(tmp_path, tiny_state, capsys):
    torch.save(tiny_state, tmp_path / "model.pth")
    assert weights.main(["info", str(tmp_path / "model.pth")]) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[0]
        .startswith(f"{tmp_path}/model.pth: format torchvision Mask R-CNN, ")
    )
    assert weights.main(["convert", f"{tmp_path}/model.pth", f"{tmp_path}/ours.pth"]) == 0
    before, after = (weights.read_state_dict(tmp_path / f"{n}.pth") for n in ("model", "ours"))
    assert after.format == "checkpoint"
    options = weights.read_options(after)
    assert weights.plain(options) == weights.plain(weights.read_options(before))
    assert all(torch.equal(after.state_dict[k], t) for k, t in before.state_dict.items())


def test_unknown_tensors_beside_the_model_are_reported(tmp_path, tiny_state):
    torch.save({**tiny_state, "criterion.weight": torch.ones(3)}, tmp_path / "model.pth")
    network = Network(fw.expected_shapes(*TINY, pyramid=16, fully=32))
    report = weights.load_weights(network, tmp_path / "model.pth", verbose=False)
    assert report.unexpected == ["criterion.weight"]
    assert not report.missing


@pytest.mark.parametrize("how", ["exclude", "skip_mismatched"])
def test_heads_of_other_classes_start_anew(tmp_path, tiny_state, how):
    torch.save(tiny_state, tmp_path / "model.pth")
    network = Network(fw.expected_shapes(*TINY[:-1], 3, pyramid=16, fully=32))
    modules = sorted(weights.CLASS_MODULES)
    kept = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    choice = {"exclude": modules} if how == "exclude" else {"skip_mismatched": True}
    report = weights.load_weights(network, tmp_path / "model.pth", verbose=False, **choice)
    assert set(report.excluded) | set(report.mismatched) == kept
    assert set(report.loaded) == network.shapes.keys() - kept
    with pytest.raises(ValueError, match="use skip_mismatched=True or exclude="):
        weights.load_weights(network, tmp_path / "model.pth")


def test_class_names_are_those_of_the_category_ids():
    assert len(TORCHVISION_CLASS_NAMES) == len(set(TORCHVISION_CLASS_NAMES)) == 91
    torchvision = pytest.importorskip("torchvision")
    meta = torchvision.models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta
    for number, (ours, theirs) in enumerate(
        zip(TORCHVISION_CLASS_NAMES, meta["categories"], strict=True)
    ):
        unused = number not in CATEGORIES
        assert ours == ("BG" if number == 0 else f"N/A {number}" if unused else theirs)
        assert (theirs in ("N/A", "__background__")) == unused


# --- detectron2 ----------------------------------------------------------------------------------


def test_detectron2_files_arrive_at_their_places(r50):
    path, arrays = r50
    tensors, options, report = load(path, *RESNET50, 81)
    assert report.format == "detectron2 Mask R-CNN"
    assert len(report.zeroed) == 53
    assert_preset(options, presets.Detectron2Config, NUM_CLASSES=81, CLASS_NAMES=CLASS_NAMES)
    theirs = {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
    body = "backbone.bottom_up"
    assert torch.equal(tensors["fpn.C1.0.weight"][:, 0], theirs[f"{body}.stem.conv1.weight"][:, 2])
    assert torch.equal(tensors["fpn.C1.0.weight"][:, 2], theirs[f"{body}.stem.conv1.weight"][:, 0])
    for ours, name in (
        ("fpn.C1.1.running_mean", f"{body}.stem.conv1.norm.running_mean"),
        ("fpn.C4.5.conv2.weight", f"{body}.res4.5.conv2.weight"),
        ("fpn.C4.5.bn3.running_var", f"{body}.res4.5.conv3.norm.running_var"),
        ("fpn.C2.0.downsample.0.weight", f"{body}.res2.0.shortcut.weight"),
        ("fpn.C2.0.downsample.1.bias", f"{body}.res2.0.shortcut.norm.bias"),
        ("fpn.P4_conv1.weight", "backbone.fpn_lateral4.weight"),
        ("fpn.P4_conv2.1.bias", "backbone.fpn_output4.bias"),
        ("rpn.conv_shared.bias", "proposal_generator.rpn_head.conv.bias"),
        ("rpn.conv_class.weight", "proposal_generator.rpn_head.objectness_logits.weight"),
        ("mask.conv1.weight", "roi_heads.mask_head.mask_fcn1.weight"),
        ("mask.deconv.weight", "roi_heads.mask_head.deconv.weight"),
    ):
        assert torch.equal(tensors[ours], theirs[name]), ours
    deltas = theirs["proposal_generator.rpn_head.anchor_deltas.weight"]
    assert torch.equal(tensors["rpn.conv_bbox.weight"], swapped(deltas))
    for leaf in ("weight", "bias"):
        scores = theirs[f"roi_heads.box_predictor.cls_score.{leaf}"]
        assert torch.equal(tensors[f"classifier.linear_class.{leaf}"][0], scores[80])
        assert torch.equal(tensors[f"classifier.linear_class.{leaf}"][1:], scores[:80])
        boxes = tensors[f"classifier.linear_bbox.{leaf}"]
        assert torch.equal(boxes[4:], swapped(theirs[f"roi_heads.box_predictor.bbox_pred.{leaf}"]))
        masks = tensors[f"mask.conv5.{leaf}"]
        assert torch.equal(masks[1:], theirs[f"roi_heads.mask_head.predictor.{leaf}"])
        assert not boxes[:4].any()
        assert not masks[0].any()


@pytest.mark.parametrize("name", ["r101", "x101"])
def test_deeper_and_wider_networks_of_detectron2(tmp_path, name):
    fw.write_detectron2(tmp_path / "model.pkl", name)
    _, options, _ = load(tmp_path / "model.pkl", *fw.DETECTRON2[name], 81)
    if name == "r101":
        others = {"BACKBONE": "resnet101"}
        preset = presets.Detectron2Config
    else:
        others, preset = {}, presets.Detectron2X101Config
    assert_preset(options, preset, NUM_CLASSES=81, CLASS_NAMES=CLASS_NAMES, **others)
    backbone = {"r101": "resnet101", "x101": "resnext101_32x8d"}[name]
    assert f"({backbone})" in weights.describe(tmp_path / "model.pkl")


def tiny_detectron2(**changes):
    """A checkpoint as detectron2's trainer writes it."""
    shapes = fw.detectron2_shapes("tiny", classes=3, pyramid=8, fully=16)
    found = {k: torch.from_numpy(a.copy()) for k, a in fw.arrays(shapes).items()}
    found = {**found, **changes}
    return {"model": {k: t for k, t in found.items() if t is not None}, "iteration": 7}


TINY_DETECTRON2 = ((1, 1, 1, 1), 64, 1, 4)


def test_checkpoints_of_detectron2(tmp_path):
    data = tiny_detectron2(pixel_mean=None, pixel_std=None)
    torch.save({**data, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "model.pth")
    _, options, _ = load(tmp_path / "model.pth", *TINY_DETECTRON2, pyramid=8, fully=16)
    assert (options["NUM_CLASSES"], "CLASS_NAMES" in options) == (4, False)
    assert options["MEAN_PIXEL"] == presets.Detectron2Config.MEAN_PIXEL
    assert options["STD_PIXEL"] is None


def test_mean_and_deviation_of_the_file_come_in_rgb(tmp_path):
    mean, std = torch.tensor([1.0, 2.0, 3.5]), torch.tensor([4.0, 5.0, 6.5])
    changes = {"pixel_mean": mean.view(3, 1, 1), "pixel_std": std.view(3, 1, 1)}
    torch.save(tiny_detectron2(**changes), tmp_path / "model.pth")
    _, options, _ = load(tmp_path / "model.pth", *TINY_DETECTRON2, pyramid=8, fully=16)
    assert (options["MEAN_PIXEL"], options["STD_PIXEL"]) == ((3.5, 2.0, 1.0), (6.5, 5.0, 4.0))
    assert options["STRIDE_IN_1X1"] is False  # those of a deviation are not MSRA's
    assert options["BACKBONE"] == {"blocks": (1, 1, 1, 1), "width": 64}


@needs_shared("golden/detectron2/make_weights_detectron2.py")
@pytest.mark.parametrize("name", ["r50", "r101"])
def test_names_and_shapes_are_those_of_the_reference(name):
    script = SHARED / "golden" / "detectron2" / "make_weights_detectron2.py"
    spec = importlib.util.spec_from_file_location("make_weights_detectron2", script)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    table = {key: shape for key, _, shape in reference.table(name)}
    assert table == fw.detectron2_shapes(name)


# --- ResNets -------------------------------------------------------------------------------------


RESNETS = {
    "resnet50": ((3, 4, 6, 3), 64, 1),
    "resnet101": ((3, 4, 23, 3), 64, 1),
    "resnet152": ((3, 8, 36, 3), 64, 1),
    "resnext50_32x4d": ((3, 4, 6, 3), 128, 32),
    "resnext101_32x8d": ((3, 4, 23, 3), 256, 32),
}


def backbone_shapes(*sizes):
    shapes = fw.expected_shapes(*sizes, classes=2)
    return {key: shape for key, shape in shapes.items() if key.startswith("fpn.C")}


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_of_torchvision(tmp_path, name):
    models = pytest.importorskip("torchvision").models
    resnet = models.get_model(name, weights=None)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    file = weights.read_state_dict(tmp_path / "resnet.pth")
    assert shapes_of(file.state_dict) == backbone_shapes(*RESNETS[name])
    assert (file.format, file.config) == ("torchvision ResNet", presets.TORCHVISION_RESNET)
    assert f"({name})" in weights.describe(tmp_path / "resnet.pth")


def caffe2_name(name):
    """stem.conv1.norm.weight -> res_conv1_bn_s, as Detectron wrote it."""
    branch = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}
    leaf = {"weight": "s", "bias": "b"}
    parts = name.split(".")
    end = f"bn_{leaf[parts[-1]]}" if "norm" in parts else "w"
    if parts[0] == "stem":
        return f"{'res_' if end != 'w' else ''}conv1_{end}"
    return f"{parts[0]}_{parts[1]}_branch{branch[parts[2]]}_{end}"


@pytest.mark.parametrize("style", ["detectron2", "caffe2"])
@pytest.mark.parametrize(
    ("name", "protocol"), [("resnet50", 2), ("resnet50", 4), ("resnext101_32x8d", 4)]
)
def test_imagenet_starts_of_detectron2(tmp_path, name, style, protocol):
    found = fw.arrays(fw.resnet_shapes(*RESNETS[name]))
    stem, shift = found["stem.conv1.weight"], found["res3.0.conv2.norm.bias"]
    if style == "caffe2":
        found = {caffe2_name(k): a for k, a in found.items() if "running" not in k}
        assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch2a_bn_b"} <= found.keys()
        found |= {"fc1000_w": np.ones((9, 2), np.float32), "conv1_b": np.zeros(64, np.float32)}
        data = {"blobs": found | {"conv1_w_momentum": np.ones(3, np.float32)}, "cfg": "MODEL: {}"}
    else:
        found["stem.fc.weight"] = np.ones((9, 2), np.float32)
        data = {"model": found, "__author__": "MSRA", "matching_heuristics": True}
    (tmp_path / "R.pkl").write_bytes(pickle.dumps(data, protocol=protocol))
    file = weights.read_state_dict(tmp_path / "R.pkl")
    assert shapes_of(file.state_dict) == backbone_shapes(*RESNETS[name])
    np.testing.assert_array_equal(file.state_dict["fpn.C1.0.weight"], stem[:, ::-1])
    np.testing.assert_array_equal(file.state_dict["fpn.C3.0.bn2.bias"], shift)
    preset = presets.Detectron2Config if name == "resnet50" else presets.Detectron2X101Config
    assert file.config == {option: getattr(preset, option) for option in presets.BACKBONE_OPTIONS}
    if style == "caffe2":  # scale and shift alone, to the last digit
        spread = file.state_dict["fpn.C5.1.bn1.running_var"] + file.config["BATCH_NORM_EPS"]
        assert torch.equal(spread, torch.ones_like(spread))
        assert not file.state_dict["fpn.C1.1.running_mean"].any()
    assert file.format == ("Caffe2 ResNet" if style == "caffe2" else "detectron2 ResNet")


def test_resnets_that_detectron2_took_from_torchvision_stay_rgb(tmp_path):
    found = fw.arrays(fw.resnet_shapes((1, 1, 1, 1), 64, 1))
    data = {"model": found, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R.pkl").write_bytes(pickle.dumps(data))
    file = weights.read_state_dict(tmp_path / "R.pkl")
    assert torch.equal(
        file.state_dict["fpn.C1.0.weight"], torch.from_numpy(found["stem.conv1.weight"].copy())
    )
    assert file.config == presets.TORCHVISION_RESNET


# --- Networks that are not read ------------------------------------------------------------------


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        weights.read_state_dict(path)
    text = str(caught.value)
    assert path.name in text
    assert text.isprintable()
    assert len(text) < 600


def meta(name, **options):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        network = getattr(models.detection, name)(weights=None, weights_backbone=None, **options)
    return dict.fromkeys(network.state_dict(), torch.ones(2))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("fasterrcnn_resnet50_fpn", "a Faster R-CNN or another one without masks"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "a Faster R-CNN or another one without masks"),
        ("keypointrcnn_resnet50_fpn", "a Keypoint R-CNN"),
        ("retinanet_resnet50_fpn", "a RetinaNet, FCOS or SSD"),
        ("fcos_resnet50_fpn", "a RetinaNet, FCOS or SSD"),
        ("ssd300_vgg16", "a RetinaNet, FCOS or SSD"),
    ],
)
def test_other_networks_of_torchvision_are_named(tmp_path, name, what):
    torch.save(meta(name), tmp_path / "model.pth")
    refused(tmp_path / "model.pth", rf"torchvision, {what}, which .* start from 'torchvision'")


def test_mask_rcnn_on_other_backbones_is_refused(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    build = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    body = build(backbone_name="resnet18", weights=None)
    state = torchvision.models.detection.MaskRCNN(body, 3).state_dict()
    torch.save(state, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "a Mask R-CNN on a ResNet-18 or ResNet-34")
    state = {k.replace("body.layer", "body.features."): t for k, t in state.items()}
    torch.save(state, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "a Mask R-CNN on something else than a ResNet")


WITHOUT_MASKS = {
    f"roi_heads.mask_head.{name}.{leaf}": None
    for name in ("mask_fcn1", "mask_fcn2", "mask_fcn3", "mask_fcn4", "deconv", "predictor")
    for leaf in ("weight", "bias")
}
ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (WITHOUT_MASKS, "a Faster R-CNN or another one without masks"),
        ({"sem_seg_head.predictor.weight": ONE}, "a Panoptic FPN"),
        ({"roi_heads.keypoint_head.conv_fcn1.weight": ONE}, "a Keypoint R-CNN"),
        ({"roi_heads.box_head.0.fc1.weight": ONE}, "a Cascade R-CNN"),
        ({"roi_heads.res5.0.conv1.weight": ONE}, "a network whose heads are stage 5"),
        ({"backbone.res2.0.conv1.weight": ONE}, r"a network without a feature pyramid \(DC5\)"),
        ({"roi_heads.mask_head.mask_fcn1.norm.weight": ONE}, "a network with norm layers"),
        ({"backbone.fpn_lateral2.norm.weight": ONE}, "a network with norm layers"),
        (
            {"backbone.bottom_up.res3.0.conv2_offset.weight": ONE},
            "a network with deformable convolutions",
        ),
        ({"roi_heads.mask_head.point_head.fc1.weight": ONE}, "a PointRend"),
        (
            {"backbone.fpn_output5.weight": None},
            r"a Mask R-CNN of another form, without backbone\.fpn_output5",
        ),
        (
            {"backbone.top_block.p6.weight": ONE},
            r"a Mask R-CNN of another form, with backbone\.top_block\.p6\.weight",
        ),
    ],
)
def test_other_networks_of_detectron2_are_named(tmp_path, changes, what):
    torch.save(tiny_detectron2(**changes), tmp_path / "model.pth")
    refused(tmp_path / "model.pth", rf"detectron2, {what}.*, which .* start from 'detectron2_r50'")


def test_resnets_with_groupnorm_are_refused(tmp_path):
    data = tiny_detectron2()
    data["model"] = {k: t for k, t in data["model"].items() if "running" not in k}
    torch.save(data, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "a ResNet without BatchNorm, perhaps with GroupNorm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox_pred.weight": (4, 16)}, "each of its 3 classes, 12 rows in .*got .4, 16.*agnostic"),
        ({"mask_head.predictor.bias": (1,)}, r"3 rows in mask\.conv5\.bias, got \(1,\)"),
        ({"bbox_pred.bias": (13,)}, r"four deltas a box in classifier.linear_bbox.bias, got"),
        ({"cls_score.weight": (3,)}, "each of its 2 classes, 8 rows in"),
        ({"box_head.fc1.weight": (16, 390)}, r"a square of 8 channels .* got \(16, 390\)"),
        ({"box_head.fc1.weight": (16,)}, r"a square of 8 channels .* got \(16,\)"),
        ({"box_head.fc2.weight": (16, 16, 1)}, r"2 dimensions .* got \(16, 16, 1\)"),
        (
            {"objectness_logits.weight": (5, 8, 1, 1), "anchor_deltas.weight": (20, 8, 1, 1)},
            "3 anchors in each place, .* got 5",
        ),
    ],
)
def test_shapes_that_fit_no_network_are_refused(tmp_path, changes, message):
    data = tiny_detectron2()
    for end, shape in changes.items():
        (key,) = (key for key in data["model"] if key.endswith(end))
        data["model"][key] = torch.ones(shape)
    torch.save(data, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", message)


def test_wide_tensors_are_not_rearranged_before_they_are_checked(tmp_path):
    data = tiny_detectron2()
    key = "roi_heads.box_predictor.bbox_pred.weight"
    data["model"][key] = torch.ones(12, 1).expand(12, 10**9)
    torch.save(data, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "more than 20 times its size")


def test_all_names_are_recognised_in_time():
    names = ["a." * 50_000 + "b", "x" * 100_000, "roi_heads." * 10_000]
    assert families.recognise(names) is None
