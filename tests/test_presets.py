"""The rules in which families of weights differ: each alone, and torchvision's networks as a whole.

detectron2 as a whole is in test_detectron2.py. data/detectron2_ops.npz holds what operations of
detectron2 and torchvision gave, in (x1, y1, x2, y2).
"""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, TinyNetwork, load_golden, needs_shared
from family_weights import sensible_torchvision
from PIL import Image
from reference_inputs import synthetic_image

import detections
import model as modellib
import presets
import utils
import weights
from boxed_masks import BoxedMasks
from config import Config
from dataset import collate
from losses import rpn_class_loss
from model import MaskRCNN, RPNOutput
from presets import Detectron2Config, MatterportConfig, TorchvisionConfig, TorchvisionV2Config

YXYX = [1, 0, 3, 2]
FAMILIES = (TorchvisionConfig, TorchvisionV2Config, Detectron2Config, MatterportConfig)


@pytest.fixture(scope="module")
def ops():
    return load_golden("detectron2_ops.npz")


# ------------------------------------------------------------------ presets


@pytest.mark.parametrize(
    "preset",
    [
        *(MatterportConfig, TorchvisionConfig, TorchvisionV2Config, Detectron2Config),
        presets.Detectron2X101Config,
    ],
)
def test_presets_are_valid_and_name_options_only(preset):
    preset().validate()
    own = [name for base in preset.__mro__ if base not in Config.__mro__ for name in vars(base)]
    assert not [name for name in own if name.isupper() and not Config.has_option(name)]


def test_matterports_preset_is_the_default():
    assert MatterportConfig().to_dict() == Config().to_dict()


def test_each_preset_says_what_another_one_sets():
    """Else the table that they are would have holes where they differ."""
    families = (MatterportConfig, TorchvisionConfig, Detectron2Config)
    values = {name: {} for preset in families for name in preset.own_options()}
    for preset in families:
        for name in values:
            values[name][preset] = getattr(preset, name)
    for name, found in values.items():
        for preset, value in found.items():
            if name not in vars(preset):
                # What is left out is the default.
                assert value == getattr(Config, name)


# ------------------------------------------------------------------ single rules


@pytest.mark.parametrize("family", ["d2", "torchvision"])
def test_anchors(ops, family):
    config = {"d2": Detectron2Config, "torchvision": TorchvisionConfig}[family]()
    levels = [f"p{i}" for i in range(4, 7)]  # the others would be large
    options = config.anchor_options((64, 96))
    shapes = [tuple(shape) for shape in ops["anchors/grid_sizes"]]
    assert options["feature_shapes"] == shapes
    found = utils.generate_pyramid_anchors(**options)
    start = 3 * sum(h * w for h, w in shapes[:2])
    expected = np.concatenate([ops[f"anchors/{family}/{level}"] for level in levels])
    np.testing.assert_allclose(found[start:], expected[:, YXYX], atol=1e-4)
    if family == "torchvision":
        assert config.anchor_strides((64, 96)) == [
            tuple(s) for s in ops["anchors/strides_torchvision"]
        ]
        assert config.anchor_strides((800, 800))[4] == (61, 61)


def test_deltas_are_limited(ops):
    boxes = torch.from_numpy(ops["apply_deltas/boxes"][:, YXYX])[:46]
    limit = Detectron2Config.BBOX_LOG_SCALE_LIMIT
    assert limit == pytest.approx(float(ops["apply_deltas/scale_clamp"]))
    for key, config in (("w1", "RPN_BBOX_STD_DEV"), ("w10_5", "BBOX_STD_DEV")):
        std = torch.tensor(getattr(Detectron2Config(), config))
        for i in range(3):
            deltas = torch.from_numpy(ops["apply_deltas/deltas"][:46, 4 * i : 4 * i + 4][:, YXYX])
            found = utils.apply_box_deltas(boxes, deltas * std, limit)
            expected = ops[f"apply_deltas/{key}"][:46, 4 * i : 4 * i + 4][:, YXYX]
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "preset"), [("d2", Detectron2Config), ("torchvision", TorchvisionConfig)]
)
def test_levels(ops, family, preset):
    boxes = torch.from_numpy(ops["levels/boxes"][:, YXYX])[:-1]  # without the flipped one
    found = modellib.roi_levels(boxes, (800, 800), preset())
    assert found.tolist() == ops[f"levels/{family}"][:-1].tolist()


@pytest.mark.parametrize(("family", "rule"), [("d2", "sampled"), ("torchvision", "expanded")])
def test_pasting(ops, family, rule):
    """All but the pixels whose probability is 0.5 to rounding."""
    shape = tuple(ops["paste/image_shape"].tolist())
    masks = np.unpackbits(ops[f"paste/{family}_packed"]).reshape(-1, *shape).astype(bool)
    for mask, box, expected in zip(ops["paste/masks"], ops["paste/boxes"], masks, strict=True):
        full = np.zeros(shape, dtype=bool)
        part, (y1, x1, y2, x2) = utils.paste_mask(
            torch.from_numpy(mask), box[YXYX].tolist(), shape, rule
        )
        full[y1:y2, x1:x2] = part.numpy()
        assert np.count_nonzero(full != expected) <= 2


def test_part_of_a_mask_in_a_box():
    part = np.arange(6).reshape(2, 3) > 0
    full = np.zeros((9, 9), dtype=bool)
    full[2:4, 3:6] = part
    for box in ((2, 3, 4, 6), (0, 0, 9, 9), (3, 4, 8, 5), (1, 5, 3, 9), (7, 7, 9, 9)):
        expected = full[box[0] : box[2], box[1] : box[3]]
        boxed = BoxedMasks((9, 9), [((2, 3, 4, 6), part)])
        np.testing.assert_array_equal(boxed[box[0] : box[2], box[1] : box[3]], expected[:, :, None])


@pytest.mark.parametrize(
    ("preset", "size", "expected"),
    [
        # 800 / 480 * 640 = 1066.7; 1333 / 900 * 200 = 296.2; 800 / 333 * 500 = 1201.2
        (TorchvisionConfig, (480, 640), (800, 1066)),
        (Detectron2Config, (480, 640), (800, 1067)),
        (TorchvisionConfig, (200, 900), (296, 1333)),
        (Detectron2Config, (200, 900), (296, 1333)),
        (TorchvisionConfig, (500, 333), (1201, 800)),
        (Detectron2Config, (1600, 2400), (800, 1200)),
    ],
)
def test_the_shortest_edge(preset, size, expected):
    config = preset()
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    resized = utils.resize_to_network(image, config)
    height, width = expected
    assert resized.window == (0, 0, height, width)
    assert resized.image.shape == (-(-height // 32) * 32, -(-width // 32) * 32, 3)
    assert resized.image.dtype == np.float32
    grey = resized.image[height:].reshape(-1, 3), resized.image[:, width:].reshape(-1, 3)
    for pixels in grey:
        np.testing.assert_array_equal(
            pixels, np.broadcast_to(np.float32(config.MEAN_PIXEL), pixels.shape)
        )
    inside = resized.image[:height, :width]
    if preset is Detectron2Config:
        pillow = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(inside, np.asarray(pillow))
    else:
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
        exact = F.interpolate(planes, size=expected, mode="bilinear")[0].permute(1, 2, 0)
        np.testing.assert_allclose(inside, exact.numpy(), atol=0.02)
    masks = np.ones((*size, 1), dtype=bool)
    found = utils.resize_mask(masks, resized.scale, resized.padding)[:, :, 0]
    assert found.shape == resized.image.shape[:2]
    assert found[:height, :width].all()
    assert found.sum() == height * width


def test_a_batch_of_several_sizes_is_padded_with_the_mean():
    config = Detectron2Config()
    items = []
    for size in ((40, 60), (60, 40)):
        image = utils.resize_to_network(np.zeros((*size, 3), np.uint8), config).image
        items.append((torch.from_numpy(image).permute(2, 0, 1), {"masks": torch.ones(0, 28, 28)}))
    images, _ = collate(items, config.padding_value)
    assert images.shape == (2, 3, 1216, 1216)
    corner = images[:, :, 1215, 1215]
    torch.testing.assert_close(corner, torch.tensor([config.MEAN_PIXEL] * 2), rtol=0, atol=0)


def test_levels_compete_only_with_themselves():
    config = Detectron2Config(PRE_NMS_LIMIT=2, POST_NMS_ROIS_INFERENCE=4)
    # Two levels of three anchors: of each the best two, of all the best four.
    anchors = torch.tensor(
        [
            *([0.0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60]),
            *([0, 0, 10, 10], [80, 80, 90, 90], [90, 90, 95, 95]),
        ]
    )
    logits = torch.tensor([3.0, 2, 1, 2.5, 5, 4]).view(1, 6, 1)
    rpn = RPNOutput(logits, torch.zeros(1, 6, 4))
    region = torch.tensor([[0.0, 0, 100, 85]])
    found = modellib.proposal_layer(rpn, anchors, region, [3, 3], 4, config)
    # The third anchor is not among the best two of its level, the sixth lies outside of the region
    # and has no area; the second overlaps the first, the fourth only one of another level.
    expected = [[80.0, 80, 90, 85], [0, 0, 10, 10]]
    assert found.boxes.tolist() == expected
    together = Detectron2Config(RPN_PER_LEVEL=False, RPN_MIN_SIZE=None)
    found = modellib.proposal_layer(rpn, anchors, region, [3, 3], 9, together)
    assert len(found.boxes) == 4  # of the three in one corner only the first


def test_scores_that_round_to_one_keep_the_order_of_their_logits():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    rpn = RPNOutput(torch.tensor([30.0, 40, 35]).view(1, 3, 1), torch.zeros(1, 3, 4))
    region = torch.tensor([[0.0, 0, 100, 100]])
    for preset in (TorchvisionConfig, Detectron2Config):
        found = modellib.proposal_layer(rpn, anchors, region, [3], 9, preset())
        assert found.boxes[:, 0].tolist() == [20, 40, 0]


def test_the_loss_of_one_logit_is_that_of_two_of_the_same_probability():
    torch.manual_seed(0)
    one = torch.randn(50, 1)
    match = torch.randint(-1, 2, (50,)).to(torch.int8)
    two = torch.cat([torch.zeros(50, 1), one], dim=1)  # sigmoid(x) = softmax((0, x))
    torch.testing.assert_close(rpn_class_loss(match, one), rpn_class_loss(match, two))


def test_boxes_keep_their_fractions_in_the_image():
    window = torch.tensor([0.0, 0, 800, 1067])
    boxes = torch.tensor([[80.4, 106.7, 400.2, 1067.5]])
    found = detections.unmold_boxes(boxes, window, (480, 640), Detectron2Config())
    expected = [80.4 * 0.6, 106.7 * 640 / 1067, 400.2 * 0.6, 640]
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-6)
    rounded = Detectron2Config(MASK_PASTE="rounded")
    assert detections.unmold_boxes(boxes, window, (480, 640), rounded).tolist() == [
        [48, 64, 240, 640]
    ]


# ------------------------------------------------------------------ ResNets


@pytest.mark.parametrize("name", ["resnet50", "resnet152", "resnext50_32x4d", "resnext101_32x8d"])
def test_shapes_of_resnets_are_those_of_torchvision(name):
    theirs = getattr(pytest.importorskip("torchvision").models, name)
    with torch.device("meta"):
        theirs = theirs(weights=None).state_dict()
        stages = modellib.build_backbone(Config(BACKBONE=name))
    ours = [p.shape for stage in stages for p in stage.parameters() if p.dim() == 4]
    theirs = [p.shape for p in theirs.values() if p.dim() == 4]
    assert sorted(ours) == sorted(theirs)


# ------------------------------------------------------------------ training


TINY = TinyNetwork.own_options() | {"IMAGE_MAX_DIM": 192}


# Whole masks are cut in two ways, by BOX_FRAME: MatterportConfig has one, the others the other.
@pytest.mark.parametrize(
    ("preset", "mini"),
    [
        (MatterportConfig, True),
        (TorchvisionV2Config, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(FAMILIES, (True, False))
            if case not in ((MatterportConfig, True), (TorchvisionV2Config, True))
        ),
    ],
)
def test_a_network_of_each_family_learns_an_object(preset, mini):
    """Its losses fall to a part of what they were, and it finds the object with its mask."""
    torch.manual_seed(0)
    sizes = TINY | {"NUM_CLASSES": 3, "MAX_GT_INSTANCES": 10}
    config = preset(**sizes, USE_MINI_MASK=mini, DETECTION_MIN_CONFIDENCE=0.5)
    model = MaskRCNN(config)
    image = np.full((128, 160, 3), 60, np.uint8)
    image[40:90, 30:110] = (200, 40, 40)
    image[40:60, 30:50] = 60  # a corner is missing
    resized = utils.resize_to_network(image, config)
    mask = (image[:, :, 0] == 200)[:, :, None]
    mask = utils.resize_mask(mask, resized.scale, resized.padding)
    boxes = utils.extract_bboxes(mask)
    planes = utils.minimize_mask(boxes, mask, config.MINI_MASK_SHAPE) if mini else mask
    target = {
        "class_ids": torch.tensor([2]),
        "boxes": torch.from_numpy(boxes).float(),
        "masks": torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1))),
        "window": torch.tensor(resized.window).float(),
    }
    images = torch.from_numpy(resized.image).permute(2, 0, 1)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals = []
    for _ in range(120):
        losses = model(images, [target])
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert np.mean(totals[-5:]) < 0.3 * np.mean(totals[:3])
    (found,) = model.eval().detect([image])
    assert (found["class_ids"] == 2).all()
    full = (image[:, :, 0] == 200)[:, :, None]
    overlaps = utils.compute_overlaps_masks(full, found["masks"])
    assert overlaps.max() > 0.5  # with three seeds 0.66 to 0.93: 120 steps are few


def test_train_model_with_images_of_several_sizes(tmp_path):
    """Through the loader, which pads with the mean, to a checkpoint that detects the same."""

    class Boxes(utils.Dataset):
        def __init__(self):
            super().__init__()
            self.add_class("boxes", 1, "box")
            for i in range(4):
                self.add_image("boxes", i, path=None)
            self.prepare()

        def load_image(self, image_id):
            image = np.full((60 + 20 * image_id, 100, 3), 50, np.uint8)
            image[10:40, 20:70] = 220
            return image

        def load_mask(self, image_id):
            return (self.load_image(image_id)[:, :, :1] == 220), np.array([1])

    options = TINY | {"NUM_CLASSES": 2, "NUM_WORKERS": 0, "STEPS_PER_EPOCH": 2}
    config = Detectron2Config(**options, VALIDATION_STEPS=1)
    model = MaskRCNN(config, tmp_path)
    model.train_model(Boxes(), Boxes(), 1e-3, 1, "all")
    model.eval()
    other = MaskRCNN.from_weights(model.find_last())
    assert other.config.BOX_FRAME == "network"
    image = Boxes().load_image(2)
    for name, found in other.detect([image])[0].items():
        np.testing.assert_array_equal(found, model.detect([image])[0][name])


# ------------------------------------------------------------------ torchvision as a whole


@pytest.fixture(scope="module", params=["v1", "v2"])
def pair(request, tmp_path_factory):
    """torchvision's network and ours, with the weights that it saved."""
    pytest.importorskip("torchvision")
    theirs = sensible_torchvision(request.param)
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pth"
    torch.save(theirs.state_dict(), path)
    return theirs, MaskRCNN.from_weights(path)


def expanded(boxes):
    """Boxes of masks of 28 x 28 cells with one more cell on either side."""
    middle, half = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    return np.concatenate([middle - half * (30 / 28), middle + half * (30 / 28)], axis=1)


def home_detections(network, image, noise=0.0):
    """What torchvision finds, with boxes in (y1, x1, y2, x2) and masks [N, H, W]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    pixels = (pixels + noise * torch.randn(pixels.shape)).to(next(network.parameters()).dtype)
    with torch.no_grad():
        (found,) = network([pixels])
    found = {name: x.numpy() for name, x in found.items()}
    found["boxes"] = found["boxes"][:, YXYX]
    found["masks"] = found["masks"][:, 0] >= 0.5
    return found


def partners(some, others):
    """The nearest of `others` of the same class for each of `some`, and its distance in pixels."""
    distance = np.abs(some["boxes"][:, None] - others["boxes"]).max(axis=2)
    distance[some["labels"][:, None] != others["labels"]] = np.inf
    nearest = distance.argmin(axis=1)
    return nearest, distance[np.arange(len(nearest)), nearest]


def assert_noise(network, image, missing, extra):
    """Rounding decides about these: torchvision does the same, in float64 or with other pixels.

    That is, in one of ten ways it lacks what is missing and has what is extra. Or an extra one has
    taken the place of a missing one that suppressed it: of the same score, as boxes in evenly
    coloured parts of an image are.
    """
    torch.manual_seed(0)
    lacked = np.zeros(len(missing["labels"]), bool)
    overlaps = utils.compute_overlaps(extra["boxes"], missing["boxes"])
    found = ((overlaps > 0.5) & (extra["labels"][:, None] == missing["labels"])).any(axis=1)
    for way in range(10):
        if lacked.all() and found.all():
            return
        if way == 0:
            other = home_detections(copy.deepcopy(network).double(), image)
        else:
            other = home_detections(network, image, noise=1e-6)
        lacked |= partners(missing, other)[1] >= 0.01
        found |= partners(extra, other)[1] < 0.01
    raise AssertionError(f"missing {missing} {lacked}, extra {extra} {found}")


def assert_same_detections(theirs, ours, image):
    """One list, but for detections that rounding decides about."""
    expected = home_detections(theirs, image)
    result = ours.detect([image])[0]
    result["labels"] = result["class_ids"]
    assert len(expected["scores"]) > 10
    pair, distance = partners(expected, result)
    same = distance < 0.01
    # Rounding decides what is just above the threshold, and which is the last of a full list.
    least = max(0.05, expected["scores"].min()) + 2e-4
    missing = ~same & (expected["scores"] > least)
    extra = (partners(result, expected)[1] >= 0.01) & (result["scores"] > least)
    names = ("boxes", "labels")
    missing = {name: expected[name][missing] for name in names}
    assert_noise(theirs, image, missing, {name: result[name][extra] for name in names})
    assert len(set(pair[same])) == np.count_nonzero(same)
    assert np.abs(expected["scores"] - result["scores"][pair])[same].max() < 1e-4
    # torchvision cuts the corners of a mask to whole pixels: where the noise of the box decides
    # between two, the whole mask is another one.
    cut, ours_cut = (np.trunc(expanded(x["boxes"])) for x in (expected, result))
    stable = (cut == ours_cut[pair]).all(axis=1)
    assert np.mean(~stable[same]) < 0.1
    for i in np.flatnonzero(same & stable):
        ours_i, theirs_i = result["masks"][:, :, pair[i]], expected["masks"][i]
        # Of a random mask many pixels are near one half: two pixels of a small one are noise.
        wrong = np.count_nonzero(ours_i != theirs_i)
        assert wrong <= max(2, 0.01 * np.count_nonzero(ours_i | theirs_i))


def test_torchvision_on_a_drawing(pair, monkeypatch):
    theirs, ours = pair
    # Half of the usual size, which the photographs have: a quarter of the time.
    monkeypatch.setattr(theirs.transform, "min_size", (400,))
    monkeypatch.setattr(ours.config, "IMAGE_MIN_DIM", 400)
    assert_same_detections(theirs, ours, synthetic_image(240, 320))


PHOTOS = sorted((SHARED / "data" / "coco_mini" / "val2017").glob("*.jpg"))[:20]


@pytest.mark.slow
@needs_shared("data/coco_mini/val2017")
@pytest.mark.parametrize("path", PHOTOS or ["none"], ids=lambda path: getattr(path, "stem", path))
def test_torchvision_on_photographs(pair, path):
    with Image.open(path) as image:
        assert_same_detections(*pair, np.asarray(image.convert("RGB")))


# ------------------------------------------------------------------ loading


def tiny_torchvision():
    torch.manual_seed(0)
    return MaskRCNN(TorchvisionConfig(**TINY, NUM_CLASSES=3)).eval()


def test_a_checkpoint_is_the_same_network(tmp_path):
    ours = tiny_torchvision()
    weights.save_weights(ours, tmp_path / "ours.pth")
    again = MaskRCNN.from_weights(tmp_path / "ours.pth")
    assert weights.plain(again.config.to_dict()) == weights.plain(ours.config.to_dict())
    image = synthetic_image(60, 80)
    found, expected = again.detect([image])[0], ours.detect([image])[0]
    assert len(expected["scores"]) > 0
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_options_given_win_over_those_of_the_file(tmp_path):
    ours = tiny_torchvision()
    weights.save_weights(ours, tmp_path / "ours.pth")
    options = {"BATCH_NORM_EPS": 1e-4, "MEAN_PIXEL": np.array([1.0, 2.0, 3.0])}
    model = MaskRCNN.from_weights(tmp_path / "ours.pth", **options)
    assert model.fpn.C2[0].bn1.eps == 1e-4
    assert model.mean.flatten().tolist() == [1.0, 2.0, 3.0]
    molded, _ = model.mold_inputs([np.zeros((100, 130, 3), np.uint8)])
    assert molded[0, :, -1, -1].tolist() == [1.0, 2.0, 3.0]  # padded with the same mean
    assert (model.normalize(molded)[0, :, -1, -1] == 0).all()


def test_the_mean_of_a_file_is_that_of_the_padding(tmp_path):
    ours = tiny_torchvision()
    weights.save_weights(ours, tmp_path / "ours.pth")
    config = type(ours.config)(**ours.config.to_dict() | {"MEAN_PIXEL": (9.0, 8.0, 7.0)})
    model = MaskRCNN(config)
    model.load_weights(tmp_path / "ours.pth", verbose=False)
    molded, _ = model.mold_inputs([np.zeros((100, 130, 3), np.uint8)])
    assert (model.normalize(molded)[0, :, -1, -1] == 0).all()
    assert config.MEAN_PIXEL == (9.0, 8.0, 7.0)  # another model may have it
