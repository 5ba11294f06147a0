"""The network with Detectron2Config beside detectron2 itself, stage by stage.

detectron2 was run once, on deterministic weights; the bounds are twice what it differs from itself
by between kernels, numbers of threads and instruction sets. Its images are BGR, its boxes
(x1, y1, x2, y2), its background is the last class.
"""

import functools
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SHARED, load_golden, needs_shared
from PIL import Image
from reference_inputs import synthetic_image

import model as modellib
import utils
from detections import unmold_detections
from model import MaskRCNN, Rois
from presets import Detectron2Config

FOLDER = SHARED / "golden" / "detectron2"
PHOTOS = {"photo1": "000000397133.jpg", "photo2": "000000303818.jpg"}
# Root mean square of the difference over that of the values, and the largest difference.
BOUNDS = {
    "r50": {
        "res": (4.3e-6, 2.7e-5),
        "p": (5.6e-6, 7.9e-5),
        "rpn_logits": (6.3e-6, 1.2e-4),
        "rpn_deltas": (7.0e-6, 1.9e-5),
        "roi_align_box": (2.5e-5, 1.5e-3),
        "fc2": (3.1e-5, 9.1e-4),
        "class_logits": (3.3e-5, 5.4e-3),
        "box_deltas": (3.7e-5, 1.2e-3),
        "proposals": 9.6e-3,
        "boxes": 1.8e-2,
        "scores": 5.6e-4,
        "masks": 1.4e-2,
        "pixels": 40,
    },
    "r101": {
        "res": (7.4e-6, 5.7e-5),
        "p": (9.5e-6, 1.6e-4),
        "rpn_logits": (1.3e-5, 2.7e-4),
        "rpn_deltas": (1.2e-5, 4.2e-5),
        "roi_align_box": (4.8e-5, 6.2e-3),
        "fc2": (5.9e-5, 3.9e-3),
        "class_logits": (6.4e-5, 2.3e-2),
        "box_deltas": (7.1e-5, 6.8e-3),
        "proposals": 1.8e-2,
        "boxes": 4.7e-2,
        "scores": 9.1e-4,
        "masks": 1.7e-2,
        "pixels": 252,
    },
}

pytestmark = needs_shared("golden/detectron2/detectron2_r50.npz", "data/coco_mini/val2017")


@pytest.fixture(scope="module", params=["r50", pytest.param("r101", marks=pytest.mark.slow)])
def network(request, tmp_path_factory):
    """The name of a configuration, its model and detectron2's numbers."""
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pkl"
    script = FOLDER / "make_weights_detectron2.py"
    subprocess.run([sys.executable, str(script), request.param, str(path)], check=True)
    golden = load_golden(f"detectron2_{request.param}.npz", FOLDER)
    return request.param, MaskRCNN.from_weights(path), golden


@functools.cache
def read(name):
    if name == "synth":
        return synthetic_image(480, 640)
    with Image.open(SHARED / "data" / "coco_mini" / "val2017" / PHOTOS[name]) as image:
        return np.asarray(image.convert("RGB"))


def predict(model, images, windows):
    """P2..P6, what predict found, and the outputs of C2..C5, all of one run."""
    maps = {}
    hooks = [
        getattr(model.fpn, f"C{i}").register_forward_hook(
            lambda module, inputs, output, i=i: maps.update({f"res{i}": output.clone()})
        )
        for i in (2, 3, 4, 5)
    ]
    hooks.append(
        model.fpn.register_forward_hook(
            lambda module, inputs, output: maps.update(
                {f"p{i}": x for i, x in enumerate(output, start=2)}
            )
        )
    )
    try:
        return model.predict(images, windows), maps
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def runs(network):
    """The run of each image, and of two of them in a batch."""
    _, model, _ = network

    @functools.cache
    def run(name):
        if name != "batch":
            images, windows = model.mold_inputs([read(name)])
            return images, windows, *predict(model, images, windows)
        parts = [model.mold_inputs([read(photo)]) for photo in PHOTOS]
        height, width = (max(part[0].shape[axis] for part in parts) for axis in (2, 3))
        images = model.mean.repeat(2, 1, height, width).view(2, 3, height, width).clone()
        for image, (part, _) in zip(images, parts, strict=True):
            image[:, : part.shape[2], : part.shape[3]] = part[0]
        windows = torch.cat([window for _, window in parts])
        return images, windows, *predict(model, images, windows)

    return run


def assert_close(ours, golden, name, bounds):
    """Samples of a tensor."""
    theirs = golden[f"{name}.val"].astype(np.float64)
    assert tuple(golden[f"{name}.shape"]) == tuple(ours.shape), name
    found = ours.contiguous().flatten()[torch.from_numpy(golden[f"{name}.idx"]).long()].numpy()
    difference = found - theirs
    rms = np.sqrt((difference**2).mean() / (theirs**2).mean())
    print(f"{name}: rms {rms:.1e} of {bounds[0]:.1e}, worst {abs(difference).max():.1e}")
    assert rms <= bounds[0], name
    assert abs(difference).max() <= bounds[1], name


IMAGES = ["photo1", "photo2", "synth", "batch"]


@pytest.mark.parametrize("name", ["photo1", "photo2", "synth"])
def test_the_network_sees_the_pixels_of_detectron2(network, name):
    _, model, golden = network
    resized = utils.resize_to_network(read(name), model.config)
    y1, x1, y2, x2 = resized.window
    pixels = resized.image[y1:y2, x1:x2, ::-1].astype(np.uint8)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == str(golden[f"{name}/resized_sha256"])


@pytest.mark.parametrize("name", IMAGES)
def test_maps(network, runs, name):
    config, model, golden = network
    images, _, prediction, maps = runs(name)
    bounds = BOUNDS[config]
    assert_close(model.normalize(images).flip(1), golden, f"{name}/net_input", (1e-7, 2e-5))
    for key, tensor in maps.items():
        assert_close(tensor, golden, f"{name}/{key}", bounds[key[:-1]])
    sizes = [3 * x.shape[2] * x.shape[3] for key, x in maps.items() if key[0] == "p"]
    logits = prediction.rpn.logits.split(sizes, dim=1)
    deltas = prediction.rpn.deltas[:, :, [1, 0, 3, 2]].split(sizes, dim=1)
    for i, (logit, delta) in enumerate(zip(logits, deltas, strict=True), start=2):
        batch, _, height, width = maps[f"p{i}"].shape
        logit = logit.view(batch, height, width, 3).permute(0, 3, 1, 2)
        assert_close(logit, golden, f"{name}/rpn_logits_p{i}", bounds["rpn_logits"])
        delta = delta.reshape(batch, height, width, 12).permute(0, 3, 1, 2)
        assert_close(delta, golden, f"{name}/rpn_deltas_p{i}", bounds["rpn_deltas"])


def members(name):
    """The keys of the images of a run."""
    return [f"batch/{photo}" for photo in PHOTOS] if name == "batch" else [name]


@pytest.mark.parametrize("name", IMAGES)
def test_proposals(network, runs, name):
    config, _, golden = network
    proposals = runs(name)[2].proposals
    for image, key in enumerate(members(name)):
        ours = proposals.boxes[proposals.image_index == image].numpy()[:, [1, 0, 3, 2]]
        theirs = golden[f"{key}/proposals"]
        assert len(ours) == len(theirs)
        distance = np.abs(ours[:, None] - theirs).max(axis=2)
        assert distance.min(axis=0).max() <= BOUNDS[config]["proposals"]
        assert distance.min(axis=1).max() <= BOUNDS[config]["proposals"]
        assert np.count_nonzero(distance.argmin(axis=1) != np.arange(len(ours))) <= 24


@pytest.mark.parametrize("name", IMAGES)
@torch.no_grad()
def test_heads_on_the_proposals_of_detectron2(network, runs, name):
    config, model, golden = network
    images, _, _, maps = runs(name)
    features = [maps[f"p{i}"] for i in (2, 3, 4, 5)]
    boxes = [golden[f"{key}/proposals"][:, [1, 0, 3, 2]] for key in members(name)]
    index = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(x) for x in boxes]))
    rois = Rois(torch.from_numpy(np.concatenate(boxes)), index)
    shape, bounds = images.shape[2:], BOUNDS[config]
    crops = modellib.pyramid_roi_align(features, rois, 7, shape, model.config)
    assert_close(crops, golden, f"{name}/roi_align_box", bounds["roi_align_box"])
    hidden = []
    hook = model.classifier.linear_class.register_forward_pre_hook(
        lambda module, inputs: hidden.append(inputs[0])
    )
    try:
        logits, deltas = model.classifier(features, rois, shape)
    finally:
        hook.remove()
    assert_close(hidden[0], golden, f"{name}/fc2", bounds["fc2"])
    logits = torch.cat([logits[:, 1:], logits[:, :1]], dim=1)
    assert_close(logits, golden, f"{name}/class_logits", bounds["class_logits"])
    deltas = deltas[:, 1:, [1, 0, 3, 2]].flatten(1)
    assert_close(deltas, golden, f"{name}/box_deltas", bounds["box_deltas"])


@pytest.mark.parametrize("name", IMAGES)
@torch.no_grad()
def test_mask_head_on_the_boxes_of_detectron2(network, runs, name):
    config, model, golden = network
    images, _, _, maps = runs(name)
    features = [maps[f"p{i}"] for i in (2, 3, 4, 5)]
    keys = members(name)
    boxes = [golden[f"{key}/raw_boxes"][:, [1, 0, 3, 2]] for key in keys]
    index = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(x) for x in boxes]))
    rois = Rois(torch.from_numpy(np.concatenate(boxes)), index)
    shape, bounds = images.shape[2:], BOUNDS[config]
    crops = modellib.pyramid_roi_align(features, rois, 14, shape, model.config)
    assert_close(crops, golden, f"{name}/roi_align_mask", bounds["roi_align_box"])
    class_ids = np.concatenate([golden[f"{key}/pred_classes"] for key in keys]).astype(int) + 1
    probs = model.mask(features, rois, torch.from_numpy(class_ids), shape).sigmoid().numpy()
    theirs = np.concatenate([golden[f"{key}/mask_probs_u8"] for key in keys]) / 255
    assert np.abs(probs - theirs).max() <= bounds["masks"] + 0.5 / 255


@pytest.mark.parametrize("name", IMAGES)
def test_detections(network, runs, name):
    config, model, golden = network
    _, windows, prediction, _ = runs(name)
    bounds = BOUNDS[config]
    for image, key in enumerate(members(name)):
        shape = read(key.removeprefix("batch/")).shape
        found = unmold_detections(
            prediction,
            image,
            shape,
            windows[image],
            "full",
            model.config,
        )
        boxes, scores = golden[f"{key}/pred_boxes"][:, [1, 0, 3, 2]], golden[f"{key}/scores"]
        assert len(found["boxes"]) == len(boxes)
        distance = np.abs(found["boxes"][:, None] - boxes).max(axis=2)
        others = found["class_ids"][:, None] != golden[f"{key}/pred_classes"] + 1
        pair = (distance + 1e6 * others).argmin(axis=0)
        assert len(set(pair)) == len(boxes)
        rows = np.arange(len(boxes))
        print(f"{key}: boxes {distance[pair, rows].max():.1e}")
        assert (distance + 1e6 * others)[pair, rows].max() <= bounds["boxes"]
        assert np.abs(found["scores"][pair] - scores).max() <= bounds["scores"]
        chosen = (prediction.detections.image_index == image).nonzero()[:, 0]
        probs = prediction.mask_probs[chosen].numpy()[pair]
        theirs = golden[f"{key}/mask_probs_u8"] / 255
        assert np.abs(probs - theirs).max() <= bounds["masks"] + 0.5 / 255
        areas = found["masks"].sum(axis=(0, 1))[pair]
        assert np.abs(areas - golden[f"{key}/mask_area"]).max() <= bounds["pixels"]
        if f"{key}/masks_packed" in golden:
            whole = np.unpackbits(
                golden[f"{key}/masks_packed"], count=np.prod(golden[f"{key}/masks_shape"])
            )
            masks = whole.reshape(golden[f"{key}/masks_shape"]).astype(bool)
            wrong = (masks.transpose(1, 2, 0) != found["masks"][:, :, pair]).sum(axis=(0, 1))
            assert wrong.max() <= bounds["pixels"]


def test_the_preset_is_that_of_the_file(network):
    config, model, _ = network
    expected = Detectron2Config().to_dict()
    expected["BACKBONE"] = {"r50": "resnet50", "r101": "resnet101"}[config]
    same = ("CLASS_NAMES", "NUM_CLASSES", "MEAN_PIXEL", "STD_PIXEL", "NAME")
    found = model.config.to_dict()
    assert {k: v for k, v in found.items() if k not in same} == {
        k: v for k, v in expected.items() if k not in same
    }
    assert found["NUM_CLASSES"] == 81
    assert found["CLASS_NAMES"][1] == "person"
    np.testing.assert_allclose(found["MEAN_PIXEL"], expected["MEAN_PIXEL"], rtol=1e-6)
