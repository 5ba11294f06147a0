"""Weight files of all formats and eras, hand-written or torchvision's, in a model."""

import copy
import importlib.util
import pickle
import re
import subprocess
import sys
from pathlib import Path

import h5py
import keras_weights
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, needs_shared
from tiny_weights import ERAS, LAYERS, assert_state, copy_of, tiny, write_keras
from torch import nn

import weights
from config import BACKBONE_OPTIONS, Config
from model import MaskRCNN
from presets import KERAS_RESNET, TORCHVISION_RESNET

KEYS_FILE = Path(__file__).parent / "data" / "state_dict_keys.txt"


# Keras


@pytest.mark.parametrize("era", ERAS)
def test_keras_files_of_all_eras_load_completely(tmp_path, source, target, era):
    path = tmp_path / "model.h5"
    write_keras(path, source, era)
    report = weights.load_weights(target, path)
    assert_state(target, source.state_dict())
    assert report.format == "keras"
    assert set(report.loaded) == set(target.state_dict())
    assert not any([report.missing, report.unexpected, report.mismatched, report.zeroed])


def test_keras_kernels_compute_what_keras_computes(tmp_path, source):
    """The arrays of the file, in Keras' formulas, against the layers after loading."""
    write_keras(tmp_path / "model.h5", source)
    model = tiny(seed=3)
    weights.load_weights(model, tmp_path / "model.h5", verbose=False)
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "model.h5") as file:

        def stored(layer):
            return [np.array(file[layer][layer][name]) for name in ("kernel:0", "bias:0")]

        kernel, bias = stored("mrcnn_mask_conv1")
        x = rng.random((3, 3, 6), np.float32)  # one output pixel
        expected = np.tensordot(x, kernel, 3) + bias  # HWIO
        actual = F.conv2d(torch.from_numpy(x).permute(2, 0, 1)[None], model.mask.conv1.weight)
        actual = actual.flatten() + model.mask.conv1.bias
        np.testing.assert_allclose(actual.detach(), expected, rtol=1e-5)

        kernel, bias = stored("mrcnn_class_logits")
        x = rng.random(10, np.float32)
        actual = model.classifier.linear_class(torch.from_numpy(x)).detach()
        np.testing.assert_allclose(actual, x @ kernel + bias, rtol=1e-5)

        kernel, bias = stored("mrcnn_mask_deconv")  # [kh, kw, out, in], stride 2
        x = rng.random((2, 3, 6), np.float32)
        expected = np.einsum("yxi,hwoi->yhxwo", x, kernel).reshape(4, 6, 6) + bias
        actual = model.mask.deconv(torch.from_numpy(x).permute(2, 0, 1)[None])
        np.testing.assert_allclose(actual[0].permute(1, 2, 0).detach(), expected, rtol=1e-5)


def test_keras_convolutions_without_bias_get_zeros(tmp_path, source, target, capsys):
    write_keras(tmp_path / "model.h5", source)
    with h5py.File(tmp_path / "model.h5", "a") as file:
        for layer in ("conv1", "res2a_branch1"):
            del file[layer][layer]["bias:0"]
            file[layer].attrs["weight_names"] = [f"{layer}/kernel:0".encode()]
    report = weights.load_weights(target, tmp_path / "model.h5")
    expected = copy_of(source)
    expected["fpn.C1.0.bias"].zero_()
    expected["fpn.C2.0.downsample.0.bias"].zero_()
    assert_state(target, expected)
    assert report.zeroed == ["fpn.C1.0.bias", "fpn.C2.0.downsample.0.bias"]
    assert "2 zeroed: fpn.C1.0.bias, fpn.C2.0.downsample.0.bias" in capsys.readouterr().out


def test_keras_resnet_notop_is_a_backbone_start(tmp_path, source, target, capsys):
    backbone = [layer for layer in LAYERS if LAYERS[layer].startswith("fpn.C")]
    write_keras(tmp_path / "notop.h5", source, "keras1", backbone)
    before = copy_of(target)
    report = weights.load_weights(target, tmp_path / "notop.h5")
    expected = {
        key: source.state_dict()[key] if key.startswith("fpn.C") else before[key] for key in before
    }
    assert_state(target, expected)
    assert set(report.missing) == {key for key in before if not key.startswith("fpn.C")}
    printed = capsys.readouterr().out
    assert str(report) in printed
    assert f"{len(report.loaded)} tensors loaded" in printed
    first = report.missing[0].rpartition(".")[0]
    assert f"66 missing: {first}.{{weight,bias}}, " in printed
    assert printed.endswith(" and 21 more\n")


def test_unknown_keras_layers_are_reported(tmp_path, source, target):
    write_keras(tmp_path / "model.h5", source)
    with h5py.File(tmp_path / "model.h5", "a") as file:
        file["fc1000/fc1000/kernel:0"] = np.ones((3, 2), np.float32)
        file["fc1000"].attrs["weight_names"] = [b"fc1000/kernel:0"]
    report = weights.load_weights(target, tmp_path / "model.h5")
    assert report.unexpected == ["fc1000.weight"]
    assert_state(target, source.state_dict())


def frozen_keys():
    lines = [line.split() for line in KEYS_FILE.read_text().splitlines()]
    return {key: tuple(map(int, shape)) for key, *shape in lines}


def test_keys_and_shapes_are_those_of_the_original_port():
    with torch.device("meta"):
        model = MaskRCNN(Config(NUM_CLASSES=81))
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == frozen_keys()


def test_layout_of_mask_rcnn_coco_h5_gives_all_keys(tmp_path):
    keras_weights.write_h5("coco", tmp_path / "mask_rcnn_coco.h5", empty=True)
    read = weights.read_state_dict(tmp_path / "mask_rcnn_coco.h5")
    assert {key: tuple(t.shape) for key, t in read.state_dict.items()} == frozen_keys()


def test_formula_weights_arrive_at_their_places(tmp_path):
    layers = ["res4f_branch2b", "mrcnn_bbox_fc", "mrcnn_mask_deconv", "bn5c_branch2c"]
    layers += ["rpn_conv_shared", "rpn_class_raw", "rpn_bbox_pred", "mrcnn_mask_bn4"]
    keras_weights.write_h5("small", tmp_path / "small.h5", only=layers.__contains__)
    state = weights.read_state_dict(tmp_path / "small.h5").state_dict
    assert len(state) == 2 + 2 + 2 + 4 + 6 + 4
    shapes = dict(keras_weights.layers("small"))

    def value(layer, name):
        array = keras_weights.arrays("small", layer, shapes[layer])[name]
        return torch.from_numpy(array.astype(np.float32))

    conv = value("res4f_branch2b", "kernel")  # [3, 3, 256, 256]
    assert torch.equal(state["fpn.C4.5.conv2.weight"][7, 11], conv[:, :, 11, 7])
    dense = value("mrcnn_bbox_fc", "kernel")  # [1024, 16]
    assert torch.equal(state["classifier.linear_bbox.weight"][5], dense[:, 5])
    deconv = value("mrcnn_mask_deconv", "kernel")  # [2, 2, 256, 256]
    assert torch.equal(state["mask.deconv.weight"][3, 200], deconv[:, :, 200, 3])
    variance = value("bn5c_branch2c", "moving_variance")
    assert torch.equal(state["fpn.C5.2.bn3.running_var"], variance)
    mean = value("mrcnn_mask_bn4", "moving_mean")
    assert torch.equal(state["mask.bn4.running_mean"], mean)
    bias = value("rpn_bbox_pred", "bias")
    assert torch.equal(state["rpn.conv_bbox.bias"], bias)


@needs_shared("golden/make_weights.py")
@pytest.mark.parametrize("name", ["coco", "small"])
def test_formula_weights_are_those_of_the_reference(name):
    script = SHARED / "golden" / "make_weights.py"
    spec = importlib.util.spec_from_file_location("make_weights", script)
    make_weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_weights)
    expected = {
        key: shape for group in make_weights.weight_table(name).values() for key, *_, shape in group
    }
    assert expected == {
        f"{layer}/{weight}:0": tuple(size)
        for layer, shape in keras_weights.layers(name)
        for weight, size in keras_weights.shapes(layer, shape).items()
    }
    for layer, shape in list(keras_weights.layers(name))[-12:]:  # of every kind
        for weight, array in keras_weights.arrays(name, layer, shape).items():
            theirs = make_weights.weight(name, layer, weight, array.shape)
            np.testing.assert_array_equal(array.astype(np.float32), theirs)


# Torch files


@pytest.mark.parametrize("form", ["plain", "legacy", "DataParallel", "state_dict", "counters"])
def test_files_of_the_original_port_load(tmp_path, source, target, form):
    data = copy_of(source)
    if form == "DataParallel":
        data = {f"module.{key}": tensor for key, tensor in data.items()}
    elif form == "state_dict":
        data = {"epoch": 3, "state_dict": data}
    elif form == "counters":
        data |= {"fpn.C1.1.num_batches_tracked": torch.tensor(5)}
    path = tmp_path / "mask_rcnn_coco.pth"
    torch.save(data, path, _use_new_zipfile_serialization=form != "legacy")
    report = weights.load_weights(target, path)
    assert_state(target, source.state_dict())
    assert report.format == "pytorch"
    assert len(report.loaded) == len(target.state_dict())
    assert not any([report.missing, report.unexpected, report.mismatched])


def test_format_follows_content_not_name(tmp_path, source, target):
    write_keras(tmp_path / "really_keras.pth", source)
    assert weights.load_weights(target, tmp_path / "really_keras.pth").format == "keras"
    assert_state(target, source.state_dict())


def test_own_checkpoint_round_trip(tmp_path, source, target):
    source.set_backbone({"MEAN_PIXEL": np.array([1.5, 2.5, 3.5])})
    source.config.IMAGE_MIN_SCALE = np.float32(0.5)
    source.config.COMPUTE_BACKBONE_SHAPE = len
    path = tmp_path / "model.pth"
    weights.save_weights(source, path)
    assert [item.name for item in tmp_path.iterdir()] == ["model.pth"]
    report = weights.load_weights(target, path)
    assert_state(target, source.state_dict())
    assert report.format == "checkpoint"
    data = torch.load(path, weights_only=True)
    assert data["version"] == weights.VERSION
    config = data["config"]
    assert config["NUM_CLASSES"] == 4
    assert config["BACKBONE"] == {"blocks": [1, 1, 1, 1], "width": 4}
    assert config["MEAN_PIXEL"] == [1.5, 2.5, 3.5]
    assert config["IMAGE_MIN_SCALE"] == 0.5
    assert config["COMPUTE_BACKBONE_SHAPE"] == "len"


def test_a_failing_save_leaves_the_old_file(tmp_path, source, monkeypatch):
    path = tmp_path / "model.pth"
    weights.save_weights(source, path)
    before = path.read_bytes()

    def disk_full(data, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        weights.save_weights(source, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_dtype_of_the_model_stays(tmp_path, source):
    weights.save_weights(source, tmp_path / "model.pth")
    model = tiny(seed=2).double()
    weights.load_weights(model, tmp_path / "model.pth")
    assert model.fpn.C1[0].weight.dtype == torch.float64
    assert_state(model, {key: tensor.double() for key, tensor in copy_of(source).items()})


# torchvision


def random_torchvision(name=None):
    """The named ResNet, or one with few blocks, with random BatchNorm statistics."""
    resnet = pytest.importorskip("torchvision").models.resnet
    resnet = getattr(resnet, name)() if name else resnet.ResNet(resnet.Bottleneck, [1, 1, 2, 1])
    generator = torch.Generator().manual_seed(5)
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Small variances, for which an epsilon of 1e-3 instead of 1e-5 would show.
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.0),
                (module.bias.data, -0.1, 0.1),
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.02, 2.0),
            ):
                tensor.uniform_(low, high, generator=generator)
    return resnet.eval()


def torchvision_features(resnet, images):
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (images / 255 - mean) / std
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    maps = []
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        x = layer(x)
        maps.append(x)
    return maps


def assert_equal_features(model, resnet):
    generator = torch.Generator().manual_seed(6)
    images = torch.randint(0, 256, (1, 3, 64, 128), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        expected = torchvision_features(resnet, images)
        actual = model.eval().fpn.bottom_up(model.normalize(images))
    for level, (ours, theirs) in enumerate(zip(actual, expected, strict=True), start=2):
        assert ours.shape == theirs.shape
        scale = theirs.square().mean().sqrt()
        assert (ours - theirs).abs().max() < 1e-4 * scale, f"C{level}"


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("resnet50", 53), pytest.param("resnet101", 104, marks=pytest.mark.slow)],
)
def test_torchvision_start_gives_torchvision_features(tmp_path, name, convolutions):
    resnet = random_torchvision(name)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    model = MaskRCNN(Config(NUM_CLASSES=3, BACKBONE=name, FPN_CLASSIF_FC_LAYERS_SIZE=16))
    for key, tensor in model.state_dict().items():
        if key.endswith("bias"):
            tensor.fill_(3)  # what is not zeroed would show
    report = weights.load_weights(model, tmp_path / "resnet.pth")
    assert report.format == "torchvision ResNet"
    assert len(report.zeroed) == convolutions
    assert set(report.loaded) == {key for key in model.state_dict() if key.startswith("fpn.C")}
    assert report.unexpected == report.mismatched == []
    assert_equal_features(model, resnet)


def test_torchvision_style_survives_checkpoints_and_conversion(tmp_path):
    resnet = random_torchvision()
    config = Config(BACKBONE={"blocks": (1, 1, 2, 1), "width": 64}, FPN_CLASSIF_FC_LAYERS_SIZE=16)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    assert weights.main(["convert", f"{tmp_path}/resnet.pth", f"{tmp_path}/converted.pth"]) == 0
    model = MaskRCNN(copy.copy(config))
    weights.load_weights(model, tmp_path / "converted.pth")
    assert_equal_features(model, resnet)
    weights.save_weights(model, tmp_path / "checkpoint.pth")
    model = MaskRCNN(config)
    report = weights.load_weights(model, tmp_path / "checkpoint.pth")
    assert report.missing == report.zeroed == []
    assert_equal_features(model, resnet)


def backbone_options(model):
    return {name: getattr(model.config, name) for name in BACKBONE_OPTIONS}


def test_other_formats_bring_what_a_keras_resnet_needs(tmp_path, source, target):
    write_keras(tmp_path / "model.h5", source)
    mean = target.config.MEAN_PIXEL
    target.set_backbone(dict(TORCHVISION_RESNET, MEAN_PIXEL=mean))
    weights.load_weights(target, tmp_path / "model.h5")
    assert backbone_options(target) == {**KERAS_RESNET, "MEAN_PIXEL": mean}
    assert target.fpn.C1[1].eps == 0.001
    assert target.fpn.C3[0].conv1.stride == (2, 2)


def test_what_the_backbone_needs_stays_where_it_stays(tmp_path, source, target):
    write_keras(tmp_path / "model.h5", source)
    target.set_backbone(TORCHVISION_RESNET)
    weights.load_weights(target, tmp_path / "model.h5", exclude=[r"fpn\.C.*"])
    assert backbone_options(target) == TORCHVISION_RESNET
    assert target.fpn.C1[1].eps == 1e-5


def test_pixels_follow_the_first_convolution(tmp_path, source, target):
    source.set_backbone(TORCHVISION_RESNET)
    weights.save_weights(source, tmp_path / "model.pth")
    mean = target.config.MEAN_PIXEL
    weights.load_weights(target, tmp_path / "model.pth", exclude=["conv1"])
    expected = {**TORCHVISION_RESNET, "MEAN_PIXEL": mean, "STD_PIXEL": None}
    assert backbone_options(target) == expected


@pytest.mark.parametrize(
    ("style", "expected"), [("keras", KERAS_RESNET), ("torchvision", TORCHVISION_RESNET)]
)
def test_styles_of_old_checkpoints_are_translated(tmp_path, source, target, style, expected):
    config = {"MEAN_PIXEL": [1.5, 2.5, 3.5], "BACKBONE_STYLE": style, "NUM_CLASSES": 4}
    torch.save({"model": copy_of(source), "config": config}, tmp_path / "old.pth")
    file = weights.read_state_dict(tmp_path / "old.pth")
    assert file.config == {"NUM_CLASSES": 4, "MEAN_PIXEL": [1.5, 2.5, 3.5], **expected}
    weights.load_weights(target, file)
    assert backbone_options(target) == {"MEAN_PIXEL": [1.5, 2.5, 3.5], **expected}


@pytest.mark.parametrize("name", ["shapes", "nuclei"])
def test_shipped_weights_have_the_options_of_today(name):
    file = weights.read_state_dict(weights.find_weights(name))
    assert "BACKBONE_STYLE" not in file.config
    assert {*BACKBONE_OPTIONS} <= file.config.keys()
    assert file.config["BATCH_NORM_EPS"] == KERAS_RESNET["BATCH_NORM_EPS"]


def test_torchvision_resnet18_is_refused(tmp_path, target):
    resnet = pytest.importorskip("torchvision").models.resnet18(weights=None)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="neither Mask R-CNN weights nor a ResNet of 50 layers"):
        weights.load_weights(target, tmp_path / "resnet18.pth")


# Options


def test_options_come_from_shapes_or_from_the_checkpoint(tmp_path, source):
    write_keras(tmp_path / "model.h5", source)
    assert weights.read_options(tmp_path / "model.h5") == {
        "BACKBONE": {"blocks": (1, 1, 1, 1), "width": 4},
        "NUM_CLASSES": 4,
        "FPN_CLASSIF_FC_LAYERS_SIZE": 10,
        "TOP_DOWN_PYRAMID_SIZE": 6,
        "FPN_BATCH_NORM": False,
        "RPN_CHANNELS": 5,
        "RPN_CONV_LAYERS": 1,
        "POOL_SIZE": 3,
        "CLASSIFIER_CONV_LAYERS": 0,
        "CLASSIFIER_FC_LAYERS": 2,
        "HEAD_CONV_BATCH_NORM": True,
        "HEAD_FC_BATCH_NORM": True,
        **KERAS_RESNET,
    }
    weights.save_weights(source, tmp_path / "model.pth")
    options = weights.read_options(tmp_path / "model.pth")
    assert options.keys() == source.config.to_dict().keys()
    assert options["MASK_POOL_SIZE"] == 4
    write_keras(tmp_path / "notop.h5", source, layers=list(LAYERS)[:34])
    with pytest.raises(ValueError, match="must hold a whole model.*lacks.*classifier.linear_class"):
        weights.read_options(tmp_path / "notop.h5")


# Files that do not fit


def test_other_class_count_is_an_error_with_a_remedy_that_works(tmp_path, source):
    weights.save_weights(source, tmp_path / "model.pth")
    model = tiny(classes=7, seed=2)
    before = copy_of(model)
    with pytest.raises(ValueError, match="6 tensors have another shape") as caught:
        weights.load_weights(model, tmp_path / "model.pth")
    assert_state(model, before)
    message = str(caught.value)
    assert "classifier.linear_class.weight (4, 10) / (7, 10)" in message
    assert "skip_mismatched=True" in message
    exclude = re.findall(r"'([\w.]+)'", message.partition("exclude=")[2])
    assert exclude == ["classifier.linear_class", "classifier.linear_bbox", "mask.conv5"]
    report = weights.load_weights(model, tmp_path / "model.pth", exclude=exclude)
    assert len(report.excluded) == 6
    assert report.mismatched == report.missing == report.unexpected == []


@pytest.mark.parametrize(
    "options",
    [
        {"skip_mismatched": True},
        {"exclude": ["mrcnn_class_logits", "mrcnn_bbox_fc", "mrcnn_bbox", "mrcnn_mask"]},
    ],
)
def test_heads_of_other_classes_stay_as_they_are(tmp_path, source, options):
    write_keras(tmp_path / "model.h5", source)
    model = tiny(classes=7, seed=2)
    before = copy_of(model)
    report = weights.load_weights(model, tmp_path / "model.h5", **options)
    kept = report.excluded + report.mismatched
    assert sorted(kept) == sorted(
        f"{module}.{leaf}"
        for module in ("classifier.linear_class", "classifier.linear_bbox", "mask.conv5")
        for leaf in ("weight", "bias")
    )
    expected = {key: before[key] if key in kept else source.state_dict()[key] for key in before}
    assert_state(model, expected)


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("mask", ["mask."]),
        ("mrcnn_mask", ["mask.conv5."]),
        ("mask.conv", None),
        ("mask.conv.", ["mask.conv1.", "mask.conv2.", "mask.conv3.", "mask.conv4.", "mask.conv5."]),
        (".*bias", [".bias"]),
        ("conv1", ["fpn.C1.0."]),
        ("rpn_model", ["rpn."]),
        ("res5a_branch2c", ["fpn.C5.0.conv3."]),
        ("bn5a_branch1", ["fpn.C5.0.downsample.1."]),
        ("fpn.C5.0.bn1.running_var", ["fpn.C5.0.bn1.running_var"]),
        ("mrcnn_bbox", []),
    ],
)
def test_exclude_understands_both_kinds_of_names(tmp_path, source, target, name, prefixes):
    weights.save_weights(source, tmp_path / "model.pth")
    if prefixes is None:  # a part of a name only
        with pytest.raises(ValueError, match=r"did you mean .*mask\.conv\d"):
            weights.load_weights(target, tmp_path / "model.pth", exclude=[name])
        return
    before = copy_of(target)
    report = weights.load_weights(target, tmp_path / "model.pth", exclude=[name])
    expected = [
        key
        for key in before
        if any(key.endswith(p) if p == ".bias" else key.startswith(p) for p in prefixes)
    ]
    assert report.excluded == expected
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, (before if key in expected else source.state_dict())[key]), key


def test_exclude_takes_one_name_and_suggests_close_ones(tmp_path, source, target):
    weights.save_weights(source, tmp_path / "model.pth")
    assert len(weights.load_weights(target, tmp_path / "model.pth", exclude="rpn").excluded) == 6
    before = copy_of(target)
    with pytest.raises(ValueError, match="did you mean mrcnn_class_logits"):
        weights.load_weights(target, tmp_path / "model.pth", exclude=["mrcnn_class_logit"])
    assert_state(target, before)


@pytest.mark.parametrize(
    ("file_blocks", "model_blocks"), [((1, 1, 1, 1), (1, 1, 3, 1)), ((1, 1, 3, 1), (1, 1, 1, 1))]
)
def test_backbone_of_another_depth_is_refused(tmp_path, file_blocks, model_blocks):
    """Upstream put the ImageNet ResNet-50 into a ResNet-101 and left 17 blocks random."""
    weights.save_weights(tiny(file_blocks), tmp_path / "model.pth")
    model = tiny(model_blocks, seed=2)
    before = copy_of(model)
    of_file, of_model = "-".join(map(str, file_blocks)), "-".join(map(str, model_blocks))
    for options in ({}, {"skip_mismatched": True}):
        with pytest.raises(ValueError, match=f"{of_file} blocks.*{of_model} blocks.*BACKBONE"):
            weights.load_weights(model, tmp_path / "model.pth", **options)
        assert_state(model, before)
    report = weights.load_weights(model, tmp_path / "model.pth", exclude=["fpn.C4"])
    assert all(key.startswith("fpn.C4.") for key in report.excluded)
    assert report.missing == report.unexpected == []


def test_resnet50_file_in_a_resnet101_names_both(tmp_path):
    path = tmp_path / "resnet50.h5"
    keras_weights.write_h5("small", path, lambda x: "res" in x or "conv1" in x, empty=True)
    with torch.device("meta"):
        model = MaskRCNN(Config())
    with pytest.raises(ValueError, match=r"3-4-6-3 blocks \(resnet50\).*3-4-23-3 .*resnet101"):
        weights.load_weights(model, path)


def test_file_without_backbone_is_refused(tmp_path, source, target):
    heads = {key: t for key, t in copy_of(source).items() if not key.startswith("fpn.C")}
    torch.save(heads, tmp_path / "heads.pth")
    before = copy_of(target)
    with pytest.raises(ValueError, match=r"fills only 0 of the 102 backbone tensors"):
        weights.load_weights(target, tmp_path / "heads.pth")
    assert_state(target, before)
    report = weights.load_weights(target, tmp_path / "heads.pth", exclude=["fpn.C.*"])
    assert set(report.loaded) == set(heads)


def test_backbone_of_another_width_is_refused_though_skipping(tmp_path, source):
    weights.save_weights(source, tmp_path / "model.pth")
    model = tiny(width=8, seed=2)
    before = copy_of(model)
    with pytest.raises(ValueError, match=r"fills only 0 of the 102 backbone tensors"):
        weights.load_weights(model, tmp_path / "model.pth", skip_mismatched=True)
    assert_state(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", [".h5", ".pth"])
def test_numbers_must_be_finite(tmp_path, source, target, bad, suffix):
    with torch.no_grad():
        source.mask.bn2.running_mean[1] = bad
    path = tmp_path / f"model{suffix}"
    (write_keras if suffix == ".h5" else lambda p, m: weights.save_weights(m, p))(path, source)
    before = copy_of(target)
    with pytest.raises(ValueError, match=r"NaN or infinity in mask\.bn2\.running_mean"):
        weights.load_weights(target, path)
    assert_state(target, before)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_files_are_named_with_their_size(tmp_path, source, share):
    keras, legacy = tmp_path / "mask_rcnn_coco.h5", tmp_path / "legacy.pth"
    plain = tmp_path / "mask_rcnn_coco.pth"
    write_keras(keras, source)
    torch.save(copy_of(source), plain)
    torch.save(copy_of(source), legacy, _use_new_zipfile_serialization=False)
    for path in (keras, plain, legacy):
        size = int(path.stat().st_size * share)
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=f"{path.name} is damaged or") as caught:
            weights.read_state_dict(path)
        assert "\n" not in str(caught.value)
        assert (f"{size:,} bytes" in str(caught.value)) or path == legacy
        assert ("expected 257,557,808" in str(caught.value)) == (path == keras)


class NotATensor:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"<!DOCTYPE html><title>Sign in</title>", "a web page, .*download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer.*git lfs pull"),
        ({"model": NotATensor()}, "weights_only=True.* refuses"),
        ([1, 2], "must hold a state_dict.* got list"),
        ({"epoch": 3}, "must hold a state_dict.* got epoch"),
        ({"backbone.body.conv1.weight": torch.zeros(2)}, "torchvision, a Faster R-CNN or another"),
        ({}, "its tensors: none"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        weights.read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_plain_pickles_do_not_run(tmp_path):
    class Exploit:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    path = tmp_path / "exploit.pth"
    path.write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(ValueError, match=r"exploit\.pth"):
        weights.read_state_dict(path)
    assert not (tmp_path / "touched").exists()


def test_h5_files_without_keras_groups_are_refused(tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["images"] = np.zeros(3)
        file["annotations/boxes"] = np.zeros((2, 4))
    with pytest.raises(ValueError, match=r"neither Mask R-CNN weights .* annotations.boxes"):
        weights.read_state_dict(tmp_path / "data.h5")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_load_weights_takes_names_and_the_backbone_of_the_model(home, target, source):
    weights.save_weights(source, "mask_rcnn_coco.pth")
    weights.load_weights(target, "coco")
    assert_state(target, source.state_dict())
    with pytest.raises(ValueError, match=r"'imagenet' needs .* got \{'blocks': \(1, 1, 1, 1\)"):
        weights.load_weights(target, "imagenet")


# Command line


def test_convert_and_info(tmp_path, source, target, capsys):
    write_keras(tmp_path / "model.h5", source)
    arguments = ["convert", str(tmp_path / "model.h5"), str(tmp_path / "model.pth")]
    assert weights.main(arguments) == 0
    assert capsys.readouterr() == ("", "")
    weights.load_weights(target, tmp_path / "model.pth", verbose=False)
    assert_state(target, source.state_dict())
    assert weights.main(["info", str(tmp_path / "model.pth")]) == 0
    numbers = sum(tensor.numel() for tensor in source.state_dict().values())
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/model.pth: format checkpoint, 168 tensors, {numbers:,} numbers",
        "backbone: 1-1-1-1 blocks, stride in the 1x1 convolution, BatchNorm epsilon 0.001",
        "classes: 4",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "none.h5", "new.pth"], "no weight file none.h5"),
        (["convert", "model.pth", "model.pth"], "OUT must .* be another file than IN"),
        (["convert", "model.pth", "../work/model.pth"], "OUT must .* be another file than IN"),
        (["convert", "model.pth", "model.h5"], "OUT must end in .pth"),
        (["convert", "model.pth", "nowhere/new.pth"], "nowhere"),
        (["info", "text.pth"], "neither HDF5"),
        (["download", "vgg"], "got 'vgg'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(home, capsys, source, arguments, message):
    weights.save_weights(source, "model.pth")
    before = Path("model.pth").read_bytes()
    Path("text.pth").write_text("text")
    assert weights.main(arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(f"weights.py: .*{message}.*\n", error)
    assert Path("model.pth").read_bytes() == before
    assert sorted(item.name for item in Path().iterdir()) == ["model.pth", "text.pth"]


def test_process_status(tmp_path):
    command = [sys.executable, ROOT / "weights.py", "info", "none.pth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        weights.main(["--help"])
    example = "python weights.py convert mask_rcnn_coco.h5 mask_rcnn_coco.pth"
    assert example in capsys.readouterr().out


def test_import_stays_light():
    heavy = {"h5py", "model", "matplotlib", "pycocotools"}
    code = f"import weights, sys; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
