import math

import numpy as np
import pytest

import coco
import config as config_module
from config import Config


def test_derived_values():
    assert Config(IMAGES_PER_GPU=3, GPU_COUNT=2).BATCH_SIZE == 6
    assert Config(IMAGES_PER_GPU=3, GPU_COUNT=0).BATCH_SIZE == 3
    assert Config().IMAGE_SHAPE == (1024, 1024, 3)
    assert Config(IMAGE_RESIZE_MODE="crop", IMAGE_MIN_DIM=512).IMAGE_SHAPE == (512, 512, 3)
    with pytest.raises(ValueError, match="IMAGE_RESIZE_MODE is 'pad64'"):
        _ = Config(IMAGE_RESIZE_MODE="pad64").IMAGE_SHAPE
    shapes = [(80, 120), (40, 60), (20, 30), (10, 15), (5, 8)]
    assert Config().backbone_shapes((320, 480, 3)) == shapes


def test_a_callable_option_of_a_class_is_called_without_self():
    class OwnConfig(Config):
        def COMPUTE_BACKBONE_SHAPE(image_shape):
            return np.full((5, 2), image_shape[0])

    assert OwnConfig().backbone_shapes((64, 32)) == [(64, 64)] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"IMAGE_MAX_DIM": 1000}, "IMAGE_MAX_DIM must be a multiple of 64 .* use 960 or 1024"),
        ({"IMAGE_RESIZE_MODE": "crop", "IMAGE_MIN_DIM": None}, "IMAGE_MIN_DIM must be a multiple"),
        ({"IMAGE_BIT_DEPTH": 7}, "IMAGE_BIT_DEPTH must be a whole number from 8 to 16, 'auto' or"),
        ({"IMAGE_BIT_DEPTH": 17}, "IMAGE_BIT_DEPTH must be .*, got 17"),
        ({"IMAGE_BIT_DEPTH": "12"}, "IMAGE_BIT_DEPTH must be .*, got '12'"),
        (
            {"IMAGE_RESIZE_MODE": "pad"},
            "one of none, square, pad64, crop, shortest_edge, got 'pad'",
        ),
        ({"IMAGE_MIN_DIM": 1100}, "IMAGE_MIN_DIM must not exceed IMAGE_MAX_DIM, got 1100 and 1024"),
        ({"IMAGE_CHANNEL_COUNT": 4}, "MEAN_PIXEL must have one number per channel.*got 3 numbers"),
        ({"BACKBONE": "resnet18"}, "BACKBONE must be one of resnet50, .*got 'resnet18'"),
        ({"BACKBONE": {"blocks": (1, 1)}}, "BACKBONE as a dict must be"),
        (
            {"IMAGE_RESIZE_MODE": "shortest_edge", "IMAGE_MAX_DIM": None},
            "must be numbers in mode 'shortest_edge'",
        ),
        ({"STD_PIXEL": (1.0, 2.0)}, "STD_PIXEL must have one number per channel.*got 2 numbers"),
        ({"STD_PIXEL": (1.0, 0.0, 1.0)}, "STD_PIXEL must be a number above 0 per channel"),
        ({"ROI_ALIGN": "pool"}, "ROI_ALIGN must be 'crop_and_resize' or 'roi_align', got 'pool'"),
        ({"MASK_PASTE": 1}, "MASK_PASTE must be 'rounded', 'expanded' or 'sampled', got 1"),
        ({"TRAIN_BN": True, "BATCH_NORM_EPS": 0.0}, "must be above 0 where TRAIN_BN .* use 1e-5"),
        ({"IMAGE_SIZE_DIVISOR": 48}, "IMAGE_SIZE_DIVISOR must be 32 or 64, got 48"),
        ({"CLASSIFIER_FC_LAYERS": 3}, "CLASSIFIER_FC_LAYERS must be 1 or 2, got 3"),
        ({"BACKBONE": {"blocks": (1, 1, 1, 1), "width": 0}}, "BACKBONE as a dict must be"),
        ({"BACKBONE": {"blocks": (1, 1, 1, 1), "groups": 2}}, "BACKBONE as a dict must be"),
        ({"RPN_ANCHOR_SCALES": (32, 64)}, "RPN_ANCHOR_SCALES must be five numbers above 0"),
        ({"RPN_ANCHOR_RATIOS": ()}, "RPN_ANCHOR_RATIOS must be"),
        ({"RPN_ANCHOR_RATIOS": (0.5, "1")}, "RPN_ANCHOR_RATIOS must be"),
        ({"COMPUTE_BACKBONE_SHAPE": "x"}, "COMPUTE_BACKBONE_SHAPE must be a function or None"),
        ({"IMAGE_MIN_DIM": "800"}, "IMAGE_MIN_DIM must be a whole number in 1..16384, or None"),
        ({"IMAGE_MIN_DIM": -5}, "IMAGE_MIN_DIM must be a whole number in 1"),
        ({"MEAN_PIXEL": 1.0}, "MEAN_PIXEL must be a finite number per channel"),
        ({"TRAIN_BN": "no"}, "TRAIN_BN must be True or False"),
        ({"ROI_POSITIVE_IOU": 1.5}, "ROI_POSITIVE_IOU must be in 0..1, got 1.5"),
        ({"NUM_CLASSES": 0}, "NUM_CLASSES must be a whole number in 1..100000, got 0"),
        ({"NUM_CLASSES": "81"}, "NUM_CLASSES must be a whole number in 1..100000, got '81'"),
        ({"DETECTION_MIN_CONFIDENCE": 70}, "DETECTION_MIN_CONFIDENCE must be in 0..1, got 70"),
        ({"DETECTION_NMS_THRESHOLD": "0.3"}, "DETECTION_NMS_THRESHOLD must be in 0..1, got '0.3'"),
        ({"LEARNING_RATE": 0}, "LEARNING_RATE must be above 0"),
        ({"BBOX_STD_DEV": (0.1, 0.1)}, "BBOX_STD_DEV must be four numbers above 0"),
        ({"LOSS_WEIGHTS": {"rpn_clas_loss": 1}}, "LOSS_WEIGHTS must be a dict of finite weights"),
        ({"LOSS_WEIGHTS": [1]}, "LOSS_WEIGHTS must be a dict"),
    ],
)
def test_contradictions_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BACKBONE", {"blocks": (3, 4, 400_000, 3), "width": 64}),
        ("BACKBONE", {"blocks": 5, "width": 64}),
        ("BACKBONE", {"blocks": (1, 1, 1, 1), "width": 1e9}),
        ("IMAGE_MAX_DIM", 6_400_000),
        ("IMAGE_MIN_DIM", 10**400),
        ("IMAGE_MIN_SCALE", math.inf),
        ("BBOX_STD_DEV", (0.1, 0.1, 0.2, math.inf)),
        ("RPN_BBOX_STD_DEV", (0.1, math.nan, 0.2, 0.2)),
        ("RPN_ANCHOR_SCALES", (32, 64, math.nan, 256, 512)),
        ("RPN_ANCHOR_RATIOS", [1.0] * 10_000),
        ("MEAN_PIXEL", (1.0, math.inf, 1.0)),
        ("LEARNING_RATE", math.inf),
        ("WEIGHT_DECAY", math.nan),
        ("LOSS_WEIGHTS", dict.fromkeys(Config.LOSS_WEIGHTS, math.nan)),
        ("NUM_WORKERS", 10**6),
        ("MINI_MASK_SHAPE", (56, 10**6)),
        ("RPN_CHANNELS", 10**9),
        ("POOL_SIZE", 10**5),
        ("MAX_GT_INSTANCES", 10**12),
        ("IMAGE_CHANNEL_COUNT", 10**9),
    ],
)
def test_what_no_machine_could_do_is_refused(name, value):
    """A checkpoint brings such options too, and must not take the memory first."""
    with pytest.raises(ValueError, match=f"^{name} ") as caught:
        Config(**{name: value}).validate()
    assert len(str(caught.value)) < 400


def test_misspelt_options_are_refused():
    with pytest.raises(TypeError, match="NUM_CLASS is not an option.*did you mean NUM_CLASSES?"):
        Config(NUM_CLASS=3)

    class Misspelt(Config):
        DETECTION_MIN_CONFIDENC = 0.5

    with pytest.raises(ValueError, match="did you mean DETECTION_MIN_CONFIDENCE?"):
        Misspelt().validate()

    class Older(Config):
        IMAGE_PADDING = False

    with pytest.raises(
        ValueError, match="IMAGE_PADDING is no longer an option; use IMAGE_RESIZE_MODE"
    ):
        Older().validate()

    class Extended(Config):
        CELL_STAIN = "DAPI"

    Extended().validate()
    assert Extended().to_dict()["CELL_STAIN"] == "DAPI"


def test_what_follows_from_options_cannot_be_set():
    with pytest.raises(
        TypeError, match="MASK_SHAPE is not an option: it follows from MASK_POOL_SIZE"
    ):
        Config(MASK_SHAPE=(28, 28))

    class Older(Config):
        BACKBONE_STRIDES = (4, 8, 16, 32, 64)

    with pytest.raises(ValueError, match="BACKBONE_STRIDES is not an option: .* leave it out"):
        Older().validate()
    assert Config(MASK_POOL_SIZE=10).MASK_SHAPE == (20, 20)
    derived = {n for n, v in vars(Config).items() if isinstance(v, property) and n.isupper()}
    assert derived == set(config_module._DERIVED)
    assert not derived & set(Config().to_dict())


def test_each_option_has_a_rule():
    listed = [name for rule in config_module.RULES for name in rule.names.split()]
    assert len(listed) == len(set(listed))
    # Checked together with others, or where they are used.
    elsewhere = {"BACKBONE", "CLASS_NAMES", "IMAGE_RESIZE_MODE", "IMAGENET_MODEL_PATH"}
    assert {*listed, *elsewhere} == set(Config().to_dict())


def test_thresholds_that_contradict_each_other():
    with pytest.raises(
        ValueError, match="RPN_NEGATIVE_IOU must not exceed RPN_POSITIVE_IOU, got 0"
    ):
        Config(RPN_NEGATIVE_IOU=0.8).validate()
    with pytest.raises(ValueError, match="ROI_POSITIVE_RATIO must be above 0"):
        Config(ROI_POSITIVE_RATIO=0).validate()
    with pytest.raises(TypeError, match="IMAGE_PADDING is no longer an option; use IMAGE_RESIZE"):
        Config(IMAGE_PADDING=True)


def test_options_of_one_config_do_not_reach_another():
    changed = Config(NUM_CLASSES=7)
    assert (changed.NUM_CLASSES, Config().NUM_CLASSES) == (7, 1)


def test_display_prints_each_option_once(capsys):
    coco.CocoConfig().display()
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0] == "Configurations:"
    assert lines[1:] == sorted(coco.CocoConfig().to_dict())
    assert "NUM_CLASSES" in lines


def test_the_defaults_are_the_references():
    config = Config()
    config.validate()
    assert config.RPN_ANCHOR_SCALES == (32, 64, 128, 256, 512)
    assert config.PRE_NMS_LIMIT == 6000
    assert config.DETECTION_NMS_THRESHOLD == 0.3
    assert config.MEAN_PIXEL == (123.7, 116.8, 103.9)
    assert (config.TRAIN_ROIS_PER_IMAGE, config.ROI_POSITIVE_RATIO) == (200, 0.33)
