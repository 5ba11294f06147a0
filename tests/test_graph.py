"""Detection as one graph of tensors gives what MaskRCNN.detect gives."""

import numpy as np
import pytest
import skimage.data
import torch
from comparison import assert_same_objects
from lively import LIVELY, lively

import graph
import utils
from nms import nms

pytestmark = pytest.mark.usefixtures("one_thread")
ASTRONAUT = skimage.data.astronaut()


def photographs(height, width):
    """A photograph and its mirror images."""
    image = ASTRONAUT[:height, -width:]
    return [np.ascontiguousarray(x) for x in (image, image[::-1], image[:, ::-1])]


@torch.no_grad()
def run(detector, images):
    outputs = detector(torch.from_numpy(np.stack(images)))
    return [output.numpy() for output in outputs]


@pytest.fixture(scope="module", params=LIVELY)
def pair(request):
    model = lively(request.param)
    return model, graph.DetectionGraph(model)


@pytest.mark.parametrize("shape", [(128, 192), (320, 192)])
def test_the_graph_finds_what_detect_finds(pair, shape):
    model, detector = pair
    images = photographs(*shape)
    assert assert_same_objects(run(detector, images), model, images) > 20


def test_one_image_gives_what_it_gives_in_a_batch(pair):
    _, detector = pair
    images = photographs(128, 192)
    *together, index = run(detector, images)
    alone = run(detector, images[1:2])
    for ours, theirs in zip((x[index == 1] for x in together), alone, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_there_may_be_nothing_to_find(pair):
    """Of no size in particular: outputs have all their dimensions."""
    model, _ = pair
    detector = graph.DetectionGraph(model)
    detector.config = type(model.config)(**vars(model.config) | {"DETECTION_MIN_CONFIDENCE": 1.0})
    boxes, class_ids, scores, masks, index = run(detector, photographs(128, 192))
    side = model.config.MASK_SHAPE[0]
    assert boxes.shape == (0, 4)
    assert masks.shape == (0, side, side)
    assert len(class_ids) == len(scores) == len(index) == 0


def test_the_model_stays_as_it_is(pair):
    model, detector = pair
    assert not {id(x) for x in model.parameters()} & {id(x) for x in detector.parameters()}
    assert model.classifier.conv1.weight.requires_grad


@pytest.mark.parametrize("name", ["matterport", "torchvision", "detectron2", "pad64"])
@pytest.mark.parametrize(
    "shape", [(50, 77), (77, 50), (500, 333), (31, 260), (64, 64), (128, 127), (7, 3)]
)
def test_the_network_sees_the_same_pixels(name, shape):
    """Scaled up, down, or not at all, whatever is left over."""
    model = lively(name)
    detector = graph.DetectionGraph(model)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    molded, windows = model.mold_inputs([image])
    with torch.no_grad():
        found, window, full = detector.mold(
            torch.from_numpy(image)[None], torch.tensor(shape, dtype=torch.float64)
        )
    assert tuple(full) == molded.shape[2:]
    torch.testing.assert_close(found, model.normalize(molded), rtol=0, atol=1e-5)
    assert torch.equal(detector.to_frame(window, full).float(), windows[0])


@pytest.mark.parametrize("name", ["matterport", "torchvision", "detectron2", "pad64", "scaled"])
def test_sides_are_rounded_as_in_resizing(name):
    """In thousands of sizes, of which some come to nearly a half or nearly a whole."""
    scaled = {"IMAGE_MIN_DIM": None, "IMAGE_MIN_SCALE": 1.5}
    preset, options = LIVELY["matterport" if name == "scaled" else name]
    config = preset(**options | (scaled if name == "scaled" else {}))
    detector = graph.DetectionGraph(lively("matterport"))
    detector.config = config
    generator = np.random.default_rng(0)
    for most in (50, 3000):
        for shape in generator.integers(1, most, (1000, 2)).tolist():
            # Of no channels, an image is resized in no time.
            window = utils.resize_to_network(np.zeros((*shape, 0), np.uint8), config).window
            scaled_size = detector.scaled_size(torch.tensor(shape, dtype=torch.float64))
            assert scaled_size.tolist() == [window[2] - window[0], window[3] - window[1]], shape


def test_suppress_is_nms_of_each_class_of_each_group():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 40, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 20], dim=2)
    scores = torch.rand(3, 5, 40, generator=generator).round(decimals=1)  # with ties
    scores[scores < 0.3] = -torch.inf
    keep = graph.suppress(boxes, scores, 0.4, 40)
    assert keep.shape == scores.shape
    for group in range(3):
        for class_id in range(5):
            real = (scores[group, class_id] > 0).nonzero()[:, 0]
            kept = real[nms(boxes[group, real], scores[group, class_id, real], 0.4)]
            assert keep[group, class_id].nonzero()[:, 0].tolist() == sorted(kept.tolist())
