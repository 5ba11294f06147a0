"""Exported networks in ONNX Runtime and torch find what MaskRCNN.detect finds."""

import json
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
import torch
from comparison import assert_same_objects, build_model, read_image
from conftest import ROOT, SHARED, load_golden, needs_shared
from lively import LIVELY, lively
from PIL import Image
from test_graph import photographs
from test_structure import NAMES

import export
import utils
import weights
from model import MaskRCNN
from samples.scenes import scene

pytestmark = pytest.mark.usefixtures("one_thread")
ORDER = ("boxes", "class_ids", "scores", "masks", "image_index")
COINS = utils.as_uint8_image(skimage.data.coins())


def load(path):
    """A function from images to outputs, computed by ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert tuple(output.name for output in session.get_outputs()) == ORDER
    return lambda images: session.run(None, {"images": np.stack(images)})


def exported(model, folder):
    pytest.importorskip("onnxscript")
    path = folder / "network.onnx"
    export.export(model, path)
    return path


@pytest.fixture(scope="module")
def shapes():
    return MaskRCNN.from_weights("shapes")


@pytest.fixture(scope="module")
def shapes_file(tmp_path_factory):
    """By the command line, as a user exports it."""
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("onnx") / "shapes.onnx"
    command = [sys.executable, "weights.py", "export", "shapes", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"{path}: ")
    return path


def test_coins_and_shapes(shapes, shapes_file):
    network = load(shapes_file)
    assert assert_same_objects(network([COINS]), shapes, [COINS]) == 24
    for number in (1, 2):
        image = scene(number).image
        assert assert_same_objects(network([image]), shapes, [image]) > 5


def test_any_number_and_size_of_images(shapes, shapes_file):
    network = load(shapes_file)
    for images in (
        [COINS, COINS[::-1].copy()],
        [COINS[100:250, :200].copy(), COINS[50:200, 90:290].copy(), COINS[:150, :200].copy()],
        [COINS[:90, :31].copy()],
    ):
        assert_same_objects(network(images), shapes, images)


def test_nothing_to_find(shapes_file):
    outputs = load(shapes_file)([np.zeros((50, 60, 3), np.uint8)] * 2)
    assert [output.shape for output in outputs] == [(0, 4), (0,), (0,), (0, 20, 20), (0,)]


def test_the_file_has_standard_operators_only(shapes, shapes_file):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(shapes_file)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert not model.functions
    kinds = {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} == {""}
    assert {"NonMaxSuppression", "RoiAlign", "TopK"} <= kinds
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["class_names"]) == list(shapes.config.CLASS_NAMES)
    assert about["mask_paste"] == "rounded"
    sides = [
        dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim
    ]
    assert sides == ["batch", "height", "width", 3]
    assert shapes_file.stat().st_size < 10e6


# A new process in which what is listed cannot be imported.
ALONE = """
import runpy, sys
blocked = set({blocked!r})

class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
sys.argv = {arguments!r}
runpy.run_path(sys.argv[0], run_name="__main__")
assert not blocked & set(sys.modules)
"""


def run_alone(folder, blocked, *arguments):
    code = ALONE.format(blocked=sorted(blocked), arguments=[str(a) for a in arguments])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False
    )
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    return run.stdout


def test_the_sample_needs_neither_torch_nor_the_library(shapes, shapes_file, tmp_path):
    Image.fromarray(COINS).save(tmp_path / "coins.png")
    sample = ROOT / "samples" / "onnx_detect.py"
    assert len(sample.read_text().splitlines()) <= 60
    output = run_alone(tmp_path, {*NAMES, "torch"}, sample, shapes_file, "coins.png")
    expected = shapes.detect([COINS])[0]
    names = [shapes.config.CLASS_NAMES[i] for i in expected["class_ids"]]
    lines = output.splitlines()
    assert len(lines) == 24
    for line, name, score, box in zip(
        lines, names, expected["scores"], expected["rois"], strict=True
    ):
        y1, x1, y2, x2 = box
        found, _, place = line.partition(", ")
        assert found.startswith(f"coins.png: {name} ")
        assert abs(float(found.split()[-1]) - score) < 1e-3
        assert place == f"y1 {y1} x1 {x1} y2 {y2} x2 {x2}"
    picture = np.asarray(Image.open(tmp_path / "coins_detections.png"))
    changed = (picture != COINS).any(axis=2)
    masks = expected["masks"].any(axis=2)
    assert changed[masks].mean() > 0.99
    assert changed[~masks].mean() < 0.1  # the outlines of the boxes


@pytest.mark.parametrize("rule", ["rounded", "expanded", "sampled"])
def test_the_sample_pastes_masks_as_the_library(rule):
    pytest.importorskip("onnxruntime")
    from samples.onnx_detect import paste

    generator = np.random.default_rng(0)
    for _ in range(50):
        corners = generator.random((2, 2)) * (90, 120)
        box = np.concatenate([corners.min(0), corners.max(0) + 1]).astype(np.float32)
        box = box.round() if rule == "rounded" else box
        mask = generator.random((28, 28)).astype(np.float32) ** generator.choice([0.1, 1, 3])
        part, (y1, x1, y2, x2) = utils.paste_mask(
            torch.from_numpy(mask), box.tolist(), (90, 120), rule
        )
        expected = np.zeros((90, 120), bool)
        expected[y1:y2, x1:x2] = part.numpy()
        differ = paste(mask, box, (90, 120, 3), rule) != expected
        assert differ.sum() <= 1  # where rounding decides


# ------------------------------------------------------------------ what cannot be exported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes", "shapes.tflite"], "OUT must end in .onnx or .pt2, got shapes.tflite"),
        (["shapes", "nowhere/x.onnx"], "nowhere/x.onnx must be in a folder that exists"),
        (["nothing.pth", "x.onnx"], "nothing.pth"),
        (["shapes", "x.onnx", "--min-confidence", "2"], "must be a number from 0 to 1"),
    ],
)
def test_wrong_arguments_get_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    try:
        status = weights.main(["export", *arguments])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert weights.main(["export", "shapes", str(tmp_path / "x.onnx")]) == 2
    assert 'pip install -e ".[onnx]"' in capsys.readouterr().err


def test_a_network_that_cannot_be_followed_is_an_error_and_leaves_files_alone(tmp_path):
    class Stubborn(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) if float(x.sum()) > 0 else self.inner(-x)

    model = MaskRCNN(lively("matterport").config, mode="inference")
    model.fpn.C1 = Stubborn(model.fpn.C1)
    path = tmp_path / "x.pt2"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"torch\.export can follow"):
        export.export(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt2"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"IMAGE_RESIZE_MODE": "crop"}, "for training"),
        ({"DETECTION_SCALES": (1.0, 2.0)}, "sees an image once"),
        ({"DETECTION_FLIPS": ("horizontal",)}, "sees an image once"),
    ],
)
def test_what_no_file_can_hold_is_refused(option, message, tmp_path):
    model = MaskRCNN(lively("matterport").config)
    model.config = type(model.config)(**vars(model.config) | option)
    with pytest.raises(ValueError, match=message):
        export.export(model, tmp_path / "x.pt2")


# ------------------------------------------------------------------ minutes long


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVELY)
def test_every_preset(name, tmp_path):
    model = lively(name)
    network = load(exported(model, tmp_path))
    found = 0
    for shape in ((128, 192), (320, 192)):
        images = photographs(*shape)
        found += assert_same_objects(network(images), model, images)
        found += assert_same_objects(network(images[:1]), model, images[:1])
    assert found > 100


@pytest.mark.slow
def test_the_small_configuration_of_the_reference(small_h5, tmp_path):
    model = build_model("small", small_h5)
    network = load(exported(model, tmp_path))
    image = read_image("small", "synth")
    outputs = network([image])
    assert assert_same_objects(outputs, model, [image]) > 50
    golden = load_golden("inference_small.npz")
    np.testing.assert_array_equal(outputs[0], golden["synth/result_rois"])
    np.testing.assert_array_equal(outputs[1], golden["synth/result_class_ids"])
    np.testing.assert_allclose(outputs[2], golden["synth/result_scores"], rtol=0, atol=1e-4)
    if (SHARED / "golden" / "photo1.jpg").exists():
        photo = read_image("small", "photo1")
        assert assert_same_objects(network([photo]), model, [photo]) > 50


@pytest.mark.slow
@needs_shared("data/nuclei")
def test_nuclei(tmp_path):
    model = MaskRCNN.from_weights("nuclei")
    network = load(exported(model, tmp_path))
    paths = sorted((SHARED / "data" / "nuclei").rglob("*.png"))
    photos = [path for path in paths if "images" in path.parts][:6]
    assert photos
    for path in photos:
        image = utils.load_image(path)
        assert_same_objects(network([image]), model, [image])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["matterport", "torchvision_v2", "detectron2"])
def test_pt2_needs_torch_and_two_operators(name, tmp_path):
    model = lively(name)
    export.export(model, tmp_path / "network.pt2")
    images = photographs(128, 192)
    np.save(tmp_path / "images.npy", np.stack(images))
    (tmp_path / "alone.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import numpy, torch\n"
        "import nms, roialign\n"
        "network = torch.export.load('network.pt2').module()\n"
        "images = torch.from_numpy(numpy.load('images.npy'))\n"
        "for count in (1, 3):\n"
        "    outputs = network(images[:count])\n"
        "    numpy.savez(f'{count}.npz', *(output.numpy() for output in outputs))\n"
    )
    run_alone(tmp_path, NAMES - {"nms", "roialign", "operators"}, "alone.py")
    for count in (1, 3):
        with np.load(tmp_path / f"{count}.npz") as file:
            assert assert_same_objects(list(file.values()), model, images[:count]) > 30
