"""What weight files hold, and files that are damaged, hostile, or no weight files at all."""

import gzip
import math
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, zipped
from tiny_weights import LAYERS, assert_state, copy_of, keras_arrays, tiny, write_keras

import weights
from downloads import printable
from model import MaskRCNN


def refused(path, message):
    """Reading must fail with one printable line that names the file."""
    with pytest.raises(ValueError, match=message) as caught:
        weights.describe(path)
    text = str(caught.value)
    assert path.name in text
    assert text.isprintable()
    assert len(text) < 1000
    return text


# --- Keras ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])
def test_arrays_of_batchnorm_are_found_by_their_names(tmp_path, source, target, order):
    """TensorFlow's and Keras' forks list beta first, or all in the order of the alphabet."""
    write_keras(tmp_path / "model.h5", source)
    with h5py.File(tmp_path / "model.h5", "a") as file:
        for layer in LAYERS:
            if "bn" in layer:
                names = file[layer].attrs["weight_names"]
                file[layer].attrs["weight_names"] = names[order]
    weights.load_weights(target, tmp_path / "model.h5")
    assert_state(target, source.state_dict())


def test_batchnorm_without_scale_or_shift(tmp_path, source, target, capsys):
    write_keras(tmp_path / "model.h5", source)
    with h5py.File(tmp_path / "model.h5", "a") as file:
        for layer, leaf in (("bn_conv1", "gamma"), ("mrcnn_mask_bn1", "beta")):
            del file[layer][layer][f"{leaf}:0"]
            names = [n for n in file[layer].attrs["weight_names"] if leaf not in str(n)]
            file[layer].attrs["weight_names"] = names
    report = weights.load_weights(target, tmp_path / "model.h5")
    expected = copy_of(source)
    expected["fpn.C1.1.weight"].fill_(1)
    expected["mask.bn1.bias"].fill_(0)
    assert_state(target, expected)
    assert (report.unscaled, report.zeroed) == (["fpn.C1.1.weight"], ["mask.bn1.bias"])
    assert "1 unscaled: fpn.C1.1.weight" in capsys.readouterr().out


def change_h5(path, source, change):
    """A Keras file in which `change` did something to the first convolution."""
    write_keras(path, source, layers=["conv1", "bn_conv1", "mrcnn_class_logits"])
    with h5py.File(path, "a") as file:
        change(file["conv1/conv1"])
    return path


def replaced(**options):
    """A change of the kernel into a dataset with these options."""

    def change(group):
        del group["kernel:0"]
        group.create_dataset("kernel:0", **options)

    return change


def linked(link):
    def change(group):
        del group["kernel:0"]
        group["kernel:0"] = link

    return change


def circle(group):
    group["inner"] = group


def virtual(group):
    layout = h5py.VirtualLayout((7, 7, 3, 4), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "secret", (7, 7, 3, 4), np.float32)
    del group["kernel:0"]
    group.create_virtual_dataset("kernel:0", layout)


SHAPE = (7, 7, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (virtual, "'conv1/conv1/kernel:0' is stored in another file"),
        (
            replaced(shape=SHAPE, dtype="f4", external=[("secret", 0, 4 * 588)]),
            "'conv1/conv1/kernel:0' is stored in another file",
        ),
        (linked(h5py.ExternalLink("other.h5", "secret")), r"is a link \(ExternalLink\)"),
        (linked(h5py.SoftLink("/conv1/conv1/kernel:0")), r"is a link \(SoftLink\)"),
        (circle, "groups that hold each other"),
        (replaced(shape=(7, 7, 3, 10**8), dtype="f4"), "20 times .* declared and not written"),
        (
            replaced(shape=SHAPE, dtype="f4", chunks=(7, 7, 3, 10**6), maxshape=(7, 7, 3, None)),
            "20 times as large as the file",
        ),
        (
            replaced(data=np.zeros((7, 7, 3, 10**5), "f4"), compression="gzip"),
            "20 times as large as the file",
        ),
        (replaced(data=np.zeros(SHAPE, np.int8)), "floating-point numbers, got int8"),
        (replaced(data=np.zeros(SHAPE, bool)), "floating-point numbers, got bool"),
        (replaced(data=np.zeros(SHAPE, np.complex64)), "floating-point numbers, got complex64"),
        (replaced(data="text"), "floating-point numbers, got object"),
        (replaced(data=np.float32(1)), r"floating-point numbers, got float32 \(\)"),
        (replaced(data=np.full(SHAPE, 1e300)), "NaN or infinity in fpn.C1.0.weight"),
        (lambda group: group.move("kernel:0", "weights_1:0"), "must be called kernel, bias"),
        (
            lambda group: group.create_dataset("second/W", data=np.zeros(SHAPE, "f4")),
            "two different arrays for 'fpn.C1.0.weight'",
        ),
    ],
)
def test_h5_files_that_are_not_plain_arrays_are_refused(tmp_path, source, change, message):
    change_h5(tmp_path / "model.h5", source, change)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.zeros(SHAPE, np.float32)
    (tmp_path / "secret").write_bytes(bytes(4 * 588))
    refused(tmp_path / "model.h5", message)


@pytest.mark.parametrize("names", [3, [1.5], ["nothing/of:0"], "conv1", [b"\xff\xfe"], ["../x"]])
def test_odd_weight_names_do_not_matter(tmp_path, source, names):
    path = change_h5(tmp_path / "model.h5", source, lambda group: None)
    expected = weights.read_state_dict(path).state_dict
    with h5py.File(path, "a") as file:
        file["conv1"].attrs["weight_names"] = names
    read = weights.read_state_dict(path).state_dict
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in read)


def test_half_precision_packed_and_counters_are_read(tmp_path, source):
    arrays = dict(keras_arrays(source, "conv1"))

    def change(group):
        replaced(data=arrays["kernel"].astype(np.float16), compression="gzip")(group)
        group.file["dropout/seed_generator/state"] = np.zeros(2, np.uint32)  # of Keras 3

    state = weights.read_state_dict(change_h5(tmp_path / "m.h5", source, change)).state_dict
    assert torch.equal(state["fpn.C1.0.weight"], source.fpn.C1[0].weight.detach().half().float())
    assert not any("dropout" in key for key in state)


def test_free_space_in_a_circle_is_not_followed(tmp_path, source):
    """Found by damaging files at random: HDF5 takes memory until there is none."""
    path = change_h5(tmp_path / "model.h5", source, lambda group: None)
    content = bytearray(path.read_bytes())
    heap = content.index(b"HEAP")
    block, start = (int.from_bytes(content[heap + i : heap + i + 8], "little") for i in (16, 24))
    content[start + block : start + block + 8] = block.to_bytes(8, "little")
    path.write_bytes(content)
    refused(path, "its free space leads back into itself")


def test_declared_memory_is_not_taken(tmp_path, source):
    change = replaced(shape=(7, 7, 3, 10**7), dtype="f8")  # 12 GB
    path = change_h5(tmp_path / "model.h5", source, change)
    tracemalloc.start()
    refused(path, "not written")
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/100", "byteorder"])
def test_a_flipped_bit_is_found(tmp_path, source, record):
    path = tmp_path / "model.pth"
    weights.save_weights(source, path)
    with zipfile.ZipFile(path) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith(record))
        content = archive.read(member)
    whole = path.read_bytes()
    where = whole.index(content, member.header_offset) + len(content) // 2
    path.write_bytes(whole[:where] + bytes([whole[where] ^ 2]) + whole[where + 1 :])
    refused(path, f"is damaged: '.*{record}' does not have the checksum")


def test_files_saved_without_checksums_are_read(tmp_path, source, target):
    torch.serialization.set_crc32_options(False)
    try:
        weights.save_weights(source, tmp_path / "model.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    weights.load_weights(target, tmp_path / "model.pth")
    assert_state(target, source.state_dict())


def repacked(path, **options):
    """The members of a zip archive in another one."""
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", **options) as new:
        for name, content in members:
            new.writestr(name, content)


@pytest.mark.parametrize("how", ["packed", "encrypted", "unknown method", "overlapping"])
def test_zip_archives_as_torch_does_not_write_them(tmp_path, source, how):
    path = tmp_path / "model.pth"
    weights.save_weights(source, path)
    repacked(path, compression=zipfile.ZIP_DEFLATED if how == "packed" else zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\x01\x02")  # the entry of the first member in the directory
    if how == "encrypted":
        content[first + 8] |= 1
    elif how == "unknown method":
        content[first + 10] = 77
    elif how == "overlapping":
        content[first + 20 : first + 28] = (10**8).to_bytes(4, "little") * 2
    path.write_bytes(content)
    refused(path, "more bytes than it has" if how == "overlapping" else "packed or encrypted")


def quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")  # torch deprecates most of these
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t.to(torch.int8), "got int8 for mask.conv5.bias"),
        (lambda t: t > 1, "got bool for mask.conv5.bias"),
        (lambda t: t.to(torch.complex64), "got complex64 for mask.conv5.bias"),
        (lambda t: t.to(torch.float8_e5m2), "got float8_e5m2 for mask.conv5.bias"),
        (lambda t: t.to_sparse(), "dense tensors, got a sparse_coo one for mask.conv5.bias"),
        (quantised, "dense tensors, got a quantised one for mask.conv5.bias"),
        (lambda t: torch.nested.nested_tensor([t, t[:1]]), "nested|damaged"),
        (lambda t: t.to("meta"), "dense tensors, got a meta one|damaged"),
        (lambda t: t.sum(), "got a single number for mask.conv5.bias"),
        (lambda t: t[:1].expand(10**9), "more than 20 times its size, with .1000000000,."),
        (lambda t: t.double() * 1e200, "NaN or infinity in mask.conv5.bias"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(tmp_path, source, make, message):
    state = copy_of(source)
    state["mask.conv5.bias"] = make(state["mask.conv5.bias"])
    torch.save(state, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", message)


def test_parameters_doubles_and_unknown_counters_are_read(tmp_path, source, target):
    state = source.state_dict(keep_vars=True)
    assert isinstance(state["fpn.C1.0.weight"], torch.nn.Parameter)
    state["fpn.C1.0.bias"] = state["fpn.C1.0.bias"].detach().double()
    state["n_averaged"] = torch.tensor(3)
    torch.save(state, tmp_path / "model.pth")
    report = weights.load_weights(target, tmp_path / "model.pth")
    assert_state(target, source.state_dict())
    assert report.unexpected == ["n_averaged"]


@pytest.mark.parametrize(
    "name", ["model_state_dict", "model_state", "state_dict", "model", "net", "weights"]
)
@pytest.mark.parametrize("prefix", ["", "model.", "net.module.", "module._orig_mod.", "a.b.c."])
def test_state_dicts_are_found_wherever_programs_put_them(tmp_path, source, target, name, prefix):
    state = {prefix + key: tensor for key, tensor in copy_of(source).items()}
    other = {"pytorch-lightning_version": "2.4", "optimizer_states": [{"lr": 1}], "epoch": 3}
    torch.save(other | {name: state}, tmp_path / "last.ckpt")
    report = weights.load_weights(target, tmp_path / "last.ckpt")
    assert_state(target, source.state_dict())
    assert (report.format, report.unexpected) == ("pytorch", [])


def test_compiled_parts_and_a_resnet_inside_a_model(tmp_path, source, target):
    state = {key.replace("fpn.", "fpn._orig_mod."): t for key, t in copy_of(source).items()}
    torch.save(state, tmp_path / "compiled.pth")
    weights.load_weights(target, tmp_path / "compiled.pth")
    assert_state(target, source.state_dict())
    resnet = pytest.importorskip("torchvision").models.resnet50(weights=None)
    state = {f"model.encoder.{key}": tensor for key, tensor in resnet.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "resnet.pth")
    assert weights.read_state_dict(tmp_path / "resnet.pth").format == "torchvision ResNet"
    described = weights.describe(tmp_path / "resnet.pth")
    assert "(resnet50), stride in the 3x3 convolution, BatchNorm epsilon 1e-05" in described


def test_two_models_under_the_same_names_are_refused(tmp_path, source):
    state = {f"module.{key}": tensor for key, tensor in copy_of(source).items()}
    torch.save(state | {"mask.conv5.bias": torch.zeros(4)}, tmp_path / "model.pth")
    refused(
        tmp_path / "model.pth", "two tensors for mask.conv5.bias, one of them 'mask.conv5.bias'"
    )


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (
            "Detectron",
            ["conv1_w", "res2_0_branch2c_w", "conv_rpn_fpn2_w", "fpn_inner_res2_2_sum_w"],
        ),
        (
            "MMDetection",
            [
                "backbone.layer1.0.conv3.weight",
                "backbone.conv1.weight",
                "neck.lateral_convs.0.conv.weight",
                "rpn_head.rpn_conv.weight",
                "roi_head.bbox_head.fc_cls.weight",
            ],
        ),
        (
            "maskrcnn-benchmark",
            ["module.backbone.body.stem.conv1.weight", "module.rpn.head.conv.weight"],
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_networks_of_other_programs_are_named(tmp_path, capsys, program, names, suffix):
    state = {name: torch.ones(2) for name in names}
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"model": state, "iteration": 9}, path)
    else:
        safetensors.torch.save_file(state, path)
    refused(path, f"of a network of {program}, .* run it with {program}, or start from 'coco'")
    assert weights.main(["convert", str(path), str(tmp_path / "out.pth")]) == 2
    assert not (tmp_path / "out.pth").exists()


def test_a_name_in_common_makes_no_mask_rcnn(tmp_path):
    state = {f"layers.{i}.weight": torch.ones(2) for i in range(9)}
    torch.save(state | {"classifier.conv1.weight": torch.ones(2)}, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "holds neither Mask R-CNN weights nor")


def test_a_torchscript_program_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"model/{name}", b"")
    refused(tmp_path / "model.pt", "TorchScript program; open it with torch.jit.load and save")


def test_heads_alone_have_no_backbone(tmp_path, source):
    heads = {k: t for k, t in copy_of(source).items() if not k.startswith("fpn.")}
    torch.save(heads, tmp_path / "heads.pth")
    assert "backbone: none" in weights.describe(tmp_path / "heads.pth")


@pytest.mark.parametrize("name", ["a\x1b[2Jb.weight", "\ud800.weight", "a\nb.weight", "x" * 10**5])
def test_names_reach_the_terminal_as_text(tmp_path, source, target, capsys, name):
    torch.save({name: torch.ones(2)}, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", "holds neither Mask R-CNN weights")
    torch.save({name: 1}, tmp_path / "none.pth")
    refused(tmp_path / "none.pth", "must hold a state_dict")
    torch.save(copy_of(source) | {name: torch.ones(2)}, tmp_path / "model.pth")
    weights.load_weights(target, tmp_path / "model.pth")
    printed = capsys.readouterr().out
    assert "1 unexpected" in printed
    assert all(line.isprintable() and len(line) < 1000 for line in printed.splitlines())
    assert_state(target, source.state_dict())


def test_printable():
    assert printable("fpn.C1 é") == "fpn.C1 é"
    assert printable("a\x1b\ud800\n") == r"a\x1b\ud800\n"


# --- Checkpoints ---------------------------------------------------------------------------------


def in_itself():
    config = {"NAME": "a"}
    config["SELF"] = config
    return config


def doubled(levels):
    value = "a"
    for _ in range(levels):
        value = [value] * 10
    return {"NAME": value}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"config": ["NAME"]}, "config of plain values"),
        ({"config": {1: 2}}, "config of plain values"),
        ({"config": {"NAME": torch.zeros(1)}}, "config of plain values"),
        ({"config": in_itself()}, "config of plain values"),
        ({"config": doubled(7)}, "config of plain values"),
        ({"config": {"BACKBONE_STYLE": "\x1b[2J"}}, "BACKBONE_STYLE of keras or torchvision"),
        ({"config": {"BACKBONE_STYLE": ["keras"]}}, "BACKBONE_STYLE of keras or torchvision"),
        ({"training": [1]}, "a dict under 'training', got list"),
    ],
)
def test_checkpoints_with_odd_parts_are_refused(tmp_path, source, parts, message):
    data = {"model": copy_of(source), "config": {}, "training": None}
    torch.save(data | parts, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", message)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BACKBONE", {"blocks": [1, 1, 400_000, 1], "width": 4}),
        ("BACKBONE", {"blocks": 5}),
        ("BACKBONE", "resnet50"),
        ("NUM_CLASSES", 80_000),
        ("RPN_CHANNELS", "many"),
        ("TOP_DOWN_PYRAMID_SIZE", 10_000),
        ("FPN_CLASSIF_FC_LAYERS_SIZE", 10_000),
    ],
)
def test_options_must_fit_the_tensors_before_a_model_is_built(tmp_path, source, name, value):
    weights.save_weights(source, tmp_path / "model.pth")
    data = torch.load(tmp_path / "model.pth", weights_only=True)
    data["config"][name] = value
    torch.save(data, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=f"holds a model of {name} .*, but its config says"):
        MaskRCNN.from_weights(tmp_path / "model.pth")


# --- safetensors ---------------------------------------------------------------------------------


def test_safetensors_are_read(tmp_path, source, target):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({f"model.{k}": t for k, t in copy_of(source).items()}, path)
    report = weights.load_weights(target, path)
    assert_state(target, source.state_dict())
    assert report.format == "safetensors"
    assert report.missing == report.unexpected == []
    assert weights.read_options(path)["NUM_CLASSES"] == 4
    assert weights.main(["convert", str(path), str(tmp_path / "model.pth")]) == 0
    weights.load_weights(tiny(seed=3), tmp_path / "model.pth")


def test_safetensors_stay_when_the_file_goes(tmp_path, source):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(copy_of(source), path)
    state = weights.read_state_dict(path).state_dict
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(state[key], tensor) for key, tensor in source.state_dict().items())


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_damaged_safetensors(tmp_path, source, share):
    path = tmp_path / "model.safetensors"
    content = safetensors.torch.save(copy_of(source))
    path.write_bytes(content[: int(share * len(content))])
    refused(path, r"model\.safetensors is damaged or truncated \([\d,]+ bytes\): .*download")


# --- What is taken for weights -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.h5", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git lfs pull"),
        ("a.h5", b"\n<html>", "is a web page.*download the file itself"),
        ("a.h5", b"", r"is empty \(0 bytes\); download"),
        ("a.h5", bytes(5000), r"nothing but zeros \(5,000 bytes\); download"),
        ("a.h5", gzip.compress(b"a" * 99), "packed archive; unpack it"),
        ("a.pth", bytes(range(1, 256)) + b"..ustar\0", "packed archive; unpack it"),
        ("a.pkl", pickle.dumps({"a": 1}), "must hold arrays, .*, got a; save"),
        ("a.pkl", pickle.dumps([1], protocol=0), "must hold arrays, .*, got list; save"),
        ("saved_model.pb", b"\x08\x01", r"another program's model .*model\.save\('model\.h5'\)"),
        ("a.ckpt.data-00000-of-00001", b"\x08\x01", "another program's model"),
        ("a.h5", b"\x01text of another kind", "neither HDF5 .* nor safetensors .*: 21 bytes"),
        ("a.keras", zipped(**{"config.json": "{}", "model.weights.h5": "H"}), r"format \.keras"),
        ("a.zip", zipped(**{"b/mask_rcnn_coco.h5": "H"}), "holds b/mask_rcnn_coco.h5; unpack it"),
        ("a.zip", zipped(**{"\x1b.png": "H"}), r"without weights: it holds \\x1b\.png"),
        ("a.zip", zipped(), "a zip archive without weights: it holds nothing"),
    ],
)
def test_other_containers_are_named_with_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, message)


@pytest.mark.parametrize("folder", ["layers/conv2d_5/vars", "_layer_checkpoint/conv1/vars"])
def test_the_format_of_keras_3_is_named(tmp_path, folder):
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        file[f"{folder}/0"] = np.zeros((7, 7, 3, 64), np.float32)
    refused(tmp_path / "model.weights.h5", r"format of Keras 3, .*model\.save\('model\.h5'\)")


def test_folders_are_no_weight_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder, no weight file; give a file in it$"):
        weights.read_state_dict(tmp_path)
    (tmp_path / "epoch_3.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"give a file in it, such as epoch_3\.pth"):
        weights.read_state_dict(tmp_path)
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(FileNotFoundError, match=r"SavedModel folder .*model\.save\('model\.h5'\)"):
        weights.read_state_dict(tmp_path)


# --- Loading -------------------------------------------------------------------------------------


def test_a_first_convolution_of_other_channels_is_not_left_at_random(tmp_path, source, target):
    state = copy_of(source)
    state["fpn.C1.0.weight"] = torch.rand(4, 4, 7, 7)
    torch.save(state, tmp_path / "rgbd.pth")
    before = copy_of(target)
    for options in ({}, {"skip_mismatched": True}):
        with pytest.raises(ValueError, match="1 tensor has another shape") as caught:
            weights.load_weights(target, tmp_path / "rgbd.pth", **options)
        assert "is for images of 4 channels: set IMAGE_CHANNEL_COUNT" in str(caught.value)
        assert "skip_mismatched" not in str(caught.value)
        assert_state(target, before)
    report = weights.load_weights(target, tmp_path / "rgbd.pth", exclude=["conv1"])
    assert report.excluded == ["fpn.C1.0.weight", "fpn.C1.0.bias"]


def test_other_widths_are_not_skipped_but_built(tmp_path, source):
    state = copy_of(source)
    state["rpn.conv_shared.bias"] = torch.rand(9)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"MaskRCNN\.from_weights\(file\) builds") as caught:
        weights.load_weights(tiny(seed=2), tmp_path / "model.pth")
    assert "skip_mismatched" not in str(caught.value)


# --- Damaged at random ---------------------------------------------------------------------------


def fuzz(seed, count, folder):
    command = [sys.executable, str(Path(__file__).parent / "fuzz_weights.py")]
    done = subprocess.run(
        [*command, str(seed), str(count), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, [str(ROOT), *sys.path]))},
        timeout=60 + count / 10,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr)
    assert lines[-1] == f"seed {seed + count - 1}"
    assert done.stderr == ""
    assert [line for line in lines if not line.startswith("seed ")] == []


def test_files_damaged_at_random_are_read_or_refused(tmp_path):
    fuzz(0, 400, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10_000, 40_000, 5_000))
def test_many_files_damaged_at_random(tmp_path, seed):
    fuzz(seed, 5_000, tmp_path)


def test_the_check_of_damaged_files_can_fail(tmp_path, monkeypatch):
    import fuzz_weights

    path = tmp_path / "a.h5"
    path.write_bytes(b"text")
    assert fuzz_weights.check(path) is None
    monkeypatch.setattr(weights, "describe", lambda path: math.sqrt("a"))
    assert "TypeError" in fuzz_weights.check(path)
