"""All options of the library, as class attributes of `Config`.

Sub-class `Config`, or pass options by name, to change some of them:

    class CellConfig(Config):
        NAME = "cells"
        NUM_CLASSES = 1 + 1

    config = CellConfig(DETECTION_MIN_CONFIDENCE=0.5)

Names and defaults are those of matterport/Mask_RCNN and multimodallearning/pytorch-mask-rcnn.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Config:
    """Options of one experiment. Lengths are pixels of the padded network input."""

    # Names the experiment; log folders and checkpoints are called after it.
    NAME: str = "maskrcnn"

    # ---------------------------------------------------------------- hardware and batches
    # Matterport's. detect() takes GPU_COUNT times IMAGES_PER_GPU images at once (0 counts as 1). A
    # model lives where model.to(device) puts it, and torchrun trains on several GPUs.
    GPU_COUNT: int = 1
    # Images in a batch, of each process in training.
    IMAGES_PER_GPU: int = 2

    # ---------------------------------------------------------------- input images
    # none   no resizing: sides must be multiples of IMAGE_SIZE_DIVISOR
    # square scale to IMAGE_MIN_DIM / IMAGE_MAX_DIM, pad to IMAGE_MAX_DIM x IMAGE_MAX_DIM
    # pad64  scale up to IMAGE_MIN_DIM / IMAGE_MIN_SCALE, pad both sides to multiples of 64
    # crop   training only: scale up, then a random IMAGE_MIN_DIM x IMAGE_MIN_DIM crop
    # shortest_edge  scale, up or down, to IMAGE_MIN_DIM for the shorter side and at most
    #        IMAGE_MAX_DIM for the longer; pad below and to the right, with MEAN_PIXEL, to
    #        multiples of IMAGE_SIZE_DIVISOR
    IMAGE_RESIZE_MODE: str = "square"
    # The shorter side is scaled up to at least IMAGE_MIN_DIM, unless that makes the longer
    # one exceed IMAGE_MAX_DIM, which wins in mode "square". None: do not scale.
    IMAGE_MIN_DIM: int | None = 800
    IMAGE_MAX_DIM: int | None = 1024
    # In the modes "none" and "shortest_edge" sides of the network input are multiples of it: 64,
    # P6's stride, or 32. Elsewhere they are multiples of 64.
    IMAGE_SIZE_DIVISOR: int = 64
    # In mode "shortest_edge": "pillow", bilinear over all pixels that a new one covers, rounded to
    # whole numbers; "float", bilinear between the four nearest pixels, not rounded.
    IMAGE_INTERPOLATION: str = "pillow"
    # ... and whether the scaled sides are rounded to the "nearest" pixel or to the "floor".
    IMAGE_SIDE_ROUNDING: str = "nearest"
    # Least scale factor, e.g. 2 to see small objects; IMAGE_MAX_DIM wins in mode "square".
    IMAGE_MIN_SCALE: float = 0
    # Colour channels: 3 RGB, 1 grey, 4 RGB-D, ...; MEAN_PIXEL needs as many numbers.
    IMAGE_CHANNEL_COUNT: int = 3
    MEAN_PIXEL: Sequence[float] = (123.7, 116.8, 103.9)
    # What pixels are divided by once MEAN_PIXEL is subtracted, a number per channel; None: nothing.
    STD_PIXEL: Sequence[float] | None = None
    # How values of more than 8 bits become 0..255. None: all that 16 bits can hold. 8 to 16: only
    # so many bits are used, e.g. 12 of a camera's. "auto": from the image's 0.1st to its 99.9th
    # percentile, each image for itself.
    IMAGE_BIT_DEPTH: int | str | None = None

    # ---------------------------------------------------------------- backbone and pyramid
    # "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"; a dict for other
    # depths and widths of the same network, e.g. {"blocks": (2, 2, 2, 2), "width": 32}, and with
    # "groups" and "width_per_group" of a ResNeXt; or a callable that is given the config and
    # returns five modules C1..C5, each fed with the output of the one before.
    BACKBONE: str | dict | Callable = "resnet101"
    # For a callable BACKBONE whose map sizes are not ceil(image / BACKBONE_STRIDES): given
    # (height, width) of the network input it returns five (height, width), P2 to P6.
    COMPUTE_BACKBONE_SHAPE: Callable | None = None
    # What a pretrained ResNet wants, besides MEAN_PIXEL and STD_PIXEL. load_weights sets all five
    # in the model, as the file needs them; here is where a new model starts.
    # Whether the first block of C3, C4 and C5 has its stride in the 1x1 convolution or in the 3x3.
    STRIDE_IN_1X1: bool = True
    # What BatchNorm adds to the variance.
    BATCH_NORM_EPS: float = 1e-3
    # Border of the pooling after C1's convolution: "same" as TensorFlow, an odd pixel on the far
    # side; "symmetric", a pixel on all sides.
    STEM_POOL_PADDING: str = "same"
    # Channels of P2..P6, and of the mask head.
    TOP_DOWN_PYRAMID_SIZE: int = 256
    # Whether the pyramid's convolutions have a BatchNorm.
    FPN_BATCH_NORM: bool = False
    # Where load_weights("imagenet") reads; None finds or downloads torchvision's file.
    IMAGENET_MODEL_PATH: str | None = None

    # ---------------------------------------------------------------- region proposals
    # Channels and number of the 3x3 convolutions that the RPN's two outputs share.
    RPN_CHANNELS: int = 512
    RPN_CONV_LAYERS: int = 1
    # What ranks anchors: "softmax", the probability from two logits, background and foreground;
    # "sigmoid", that from one; "logit", the one itself, which tells apart what rounds to 1.
    RPN_SCORE: str = "softmax"
    # Sides of the square anchor of each pyramid level, and width / height of its variants.
    RPN_ANCHOR_SCALES: Sequence[float] = (32, 64, 128, 256, 512)
    RPN_ANCHOR_RATIOS: Sequence[float] = (0.5, 1, 2)
    # 1: anchors in each cell of a feature map, 2: in every other one.
    RPN_ANCHOR_STRIDE: int = 1
    # Whether the corners of an anchor around 0 are rounded to whole pixels.
    RPN_ANCHOR_ROUNDING: bool = False
    # Pixels from one anchor to the next: "stride", that of the level; "grid", the side of the input
    # over that of the map, rounded down, which is less on maps that hang over the edge.
    RPN_ANCHOR_SPACING: str = "stride"
    # What deltas are divided by, so that the network learns numbers around 1.
    RPN_BBOX_STD_DEV: Sequence[float] = (0.1, 0.1, 0.2, 0.2)
    # The largest log(dh) and log(dw), of the heads too; larger ones count as it. None: no limit.
    BBOX_LOG_SCALE_LIMIT: float | None = None
    # Anchors that non-maximum suppression begins with, the best by score; the IoU from which on the
    # lesser of two goes; and how many proposals it leaves. RPN_PER_LEVEL: PRE_NMS_LIMIT anchors of
    # each pyramid level, and only those of one level compete.
    RPN_PER_LEVEL: bool = False
    PRE_NMS_LIMIT: int = 6000
    RPN_NMS_THRESHOLD: float = 0.7
    POST_NMS_ROIS_TRAINING: int = 2000
    POST_NMS_ROIS_INFERENCE: int = 1000
    # Proposals end at the edge of the image, or (False) at that of the padded network input.
    CLIP_TO_IMAGE: bool = False
    # Proposals and detections whose sides do not exceed these are dropped before they compete, in
    # units of the BOX_FRAME. None: all are kept.
    RPN_MIN_SIZE: float | None = None
    DETECTION_MIN_SIZE: float | None = None

    # ---------------------------------------------------------------- rois
    # "crop_and_resize", Matterport's: one sample per bin, the outer ones in the corners of the box,
    # which is in the unit frame. "roi_align": ROI_SAMPLING_RATIO samples per bin and axis (0: as
    # many as it has cells) in a box of network pixels, shifted by half a cell (ROI_ALIGNED) or not.
    ROI_ALIGN: str = "crop_and_resize"
    ROI_SAMPLING_RATIO: int = 0
    ROI_ALIGNED: bool = True
    # A roi is cropped from level floor(4 + log2(side / 224) + this), 2 to 5: 0.5 rounds to the
    # nearest level, as Matterport; 0 is the paper's rule.
    ROI_LEVEL_OFFSET: float = 0.5

    # ---------------------------------------------------------------- heads and detections
    # Classes, background included.
    NUM_CLASSES: int = 1
    # Their names, the background's first. Training takes them from the data set, so that
    # checkpoints know them.
    CLASS_NAMES: Sequence[str] | None = None
    # Sides of the crops that the classifier and the mask head see.
    POOL_SIZE: int = 7
    MASK_POOL_SIZE: int = 14
    # The classifier's 3x3 convolutions of TOP_DOWN_PYRAMID_SIZE channels, the fully connected
    # layers after them, 1 or 2, and the channels of those.
    CLASSIFIER_CONV_LAYERS: int = 0
    CLASSIFIER_FC_LAYERS: int = 2
    FPN_CLASSIF_FC_LAYERS_SIZE: int = 1024
    # Whether the heads' convolutions, and their fully connected layers, have a BatchNorm, and what
    # that and the pyramid's add to the variance.
    HEAD_CONV_BATCH_NORM: bool = True
    HEAD_FC_BATCH_NORM: bool = True
    HEAD_BATCH_NORM_EPS: float = 1e-3
    # As RPN_BBOX_STD_DEV, for the classifier.
    BBOX_STD_DEV: Sequence[float] = (0.1, 0.1, 0.2, 0.2)
    # Most detections of an image, their least score, and the IoU above which the lesser of two of a
    # class goes.
    DETECTION_MAX_INSTANCES: int = 100
    DETECTION_MIN_CONFIDENCE: float = 0.7
    DETECTION_NMS_THRESHOLD: float = 0.3
    # False, as Matterport: a proposal becomes an object of its likeliest class, or none if that
    # is the background. True, as the paper: of each class that has DETECTION_MIN_CONFIDENCE, which
    # finds more where that is low, and raises AP a bit.
    DETECTION_PER_CLASS: bool = False
    # (height, width) in pixels of the image: detect() looks at an image in windows of this size,
    # each resized as an image is, and joins what it finds; DETECTION_MAX_INSTANCES is then the most
    # of a window. None: at the image as a whole.
    DETECTION_TILE: Sequence[int] | None = None
    # What neighbouring windows share, at least the size of an object: pixels or, below 1, that part
    # of a window's side.
    DETECTION_OVERLAP: float = 0.25
    # How large the network sees an image or window, times what the options above make of it: above
    # 1 for objects that are too small for it, below 1 for those that are too large. Of several
    # scales, and of DETECTION_FLIPS, the results are averaged (test-time augmentation).
    DETECTION_SCALES: Sequence[float] = (1.0,)
    # Mirror images that are looked at, too: "horizontal", "vertical", "both".
    DETECTION_FLIPS: Sequence[str] = ()
    # How a mask comes into the image: "rounded", resized to the box in whole pixels; "expanded",
    # torchvision's, with a border of a mask pixel around it and corners cut to whole pixels;
    # "sampled", detectron2's, read at the centre of each pixel of the image.
    MASK_PASTE: str = "rounded"
    # True: in float32 on a CPU, BatchNorm that does not learn is folded into the convolutions, and
    # those of 3 x 3 are computed with a quarter of the multiplications; the largest difference of
    # a layer is about 2e-6 of its largest output. False: in plain torch, which second derivatives,
    # torch.func and activation checkpointing need.
    CPU_WINOGRAD: bool = True
    # In what detection computes: "float32", or "bfloat16" whatever CPU_WINOGRAD is, which rounds to
    # 3 digits and is for processors that have it (AVX512-BF16 or AMX), an error on others. Boxes,
    # scores and masks are float32. CUDA also has "float16".
    CPU_PRECISION: str = "float32"
    CUDA_PRECISION: str = "float32"

    # ---------------------------------------------------------------- training
    # Steps, that is changes of the weights, from one checkpoint to the next. This need not be the
    # size of the data set, which is read again and again.
    STEPS_PER_EPOCH: int = 1000
    # Batches for the validation losses after each epoch, always the same ones; 0 for none.
    VALIDATION_STEPS: int = 50
    # Batches whose mean gradient makes one step: batches larger than the memory.
    GRADIENT_ACCUMULATION: int = 1
    # "sgd", as Matterport, or "adamw", which gets further in a short training of a new network.
    OPTIMIZER: str = "sgd"
    # What coco.py gives to train_model, which takes a rate for each stage.
    LEARNING_RATE: float = 0.001
    # The learning rate rises linearly in the first WARMUP_STEPS of a stage. Then it is "constant",
    # falls to 0 as a "cosine", or to a tenth at each of LR_STEPS, shares of the stage ("step").
    WARMUP_STEPS: int = 0
    LR_SCHEDULE: str = "constant"
    LR_STEPS: Sequence[float] = (2 / 3, 8 / 9)
    # Momentum of SGD, first beta of AdamW.
    LEARNING_MOMENTUM: float = 0.9
    WEIGHT_DECAY: float = 0.0001
    # The norm that the gradient of a step is cut down to.
    GRADIENT_CLIP_NORM: float = 5.0
    # Computing in 16 bits where that is good enough: "bf16", "fp16", or None for 32 bits.
    AMP: str | None = None
    # True compiles the backbone and the pyramid with torch.compile, whose first steps take minutes.
    COMPILE: bool = False
    # Newest checkpoints to keep, besides the best one.
    KEEP_CHECKPOINTS: int = 5
    # Epochs from one evaluation of train_model(evaluate=...) to the next.
    EVALUATE_EVERY: int = 1
    # Epochs without a better segm_AP (or val_loss, without evaluation) that end a stage; without
    # either of the two nothing does.
    EARLY_STOPPING: int | None = None
    # What each loss is multiplied with; 1 for those that are not there.
    LOSS_WEIGHTS: dict[str, float] = {  # noqa: RUF012 - an option, replaced and never changed
        "rpn_class_loss": 1.0,
        "rpn_bbox_loss": 1.0,
        "mrcnn_class_loss": 1.0,
        "mrcnn_bbox_loss": 1.0,
        "mrcnn_mask_loss": 1.0,
    }
    # False keeps BatchNorm frozen, right for the small batches of this kind of network.
    TRAIN_BN: bool = False
    # An anchor is an object from this IoU with one on, and background below that with all of them.
    RPN_POSITIVE_IOU: float = 0.7
    RPN_NEGATIVE_IOU: float = 0.3
    # Anchors sampled per image to train the region proposal network.
    RPN_TRAIN_ANCHORS_PER_IMAGE: int = 256
    # A proposal is an object from this IoU with one on, and background below it.
    ROI_POSITIVE_IOU: float = 0.5
    # Anchors and proposals that overlap a crowd this much are not taken for background.
    CROWD_IOU: float = 0.001
    # Proposals sampled per image to train the heads, and the share of positive ones.
    TRAIN_ROIS_PER_IMAGE: int = 200
    ROI_POSITIVE_RATIO: float = 0.33
    # False: the heads learn from the `rois` of the targets instead of from proposals. For a loop of
    # your own, since TorchDataset gives none.
    USE_RPN_ROIS: bool = True
    # Most objects of a training image; others are left out at random.
    MAX_GT_INSTANCES: int = 100
    # True: targets hold masks cut to their boxes and resized, instead of at the image's size.
    USE_MINI_MASK: bool = True
    MINI_MASK_SHAPE: Sequence[int] = (56, 56)
    # False: an image without objects is a negative, all of it background. True: another image
    # takes its place, as Matterport does.
    SKIP_EMPTY_IMAGES: bool = False
    # True: an image or annotation that cannot be read is logged, and another takes its place,
    # since one bad file should not end a run of days; False: it is an error, so that it is seen.
    SKIP_UNREADABLE_IMAGES: bool = False
    # Processes that load images. None: as many as there are CPUs, at most 4, and none on Windows,
    # where each has to import torch anew and scripts need a __main__ guard; 0: none.
    NUM_WORKERS: int | None = None
    # Order of the images and their augmentation depend on it, and not on NUM_WORKERS.
    SEED: int = 0

    def __init__(self, **options: Any) -> None:
        """Takes options by name, e.g. `Config(NUM_CLASSES=4)`.

        Raises:
            TypeError: an option that does not exist.
        """
        for name, value in options.items():
            if name in _DERIVED:
                raise TypeError(f"{name} is not an option: it follows from {_DERIVED[name]}")
            if name in REPLACED:
                raise TypeError(f"{name} is no longer an option; use {REPLACED[name]}")
            if not self.has_option(name):
                raise TypeError(f"{name} is not an option of Config{_did_you_mean(name)}")
            setattr(self, name, value)

    @classmethod
    def has_option(cls, name: str) -> bool:
        """Whether there is an option of this name, which may be one that a sub-class adds."""
        return _is_option(name) and hasattr(cls, name)

    @classmethod
    def own_options(cls) -> dict[str, Any]:
        """What a sub-class of Config sets itself."""
        names = [name for base in cls.__mro__ if base not in Config.__mro__ for name in vars(base)]
        return {name: getattr(cls, name) for name in names if cls.has_option(name)}

    @classmethod
    def unset(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some options that exist, and that no sub-class of Config sets itself."""
        own = cls.own_options()
        return {n: v for n, v in options.items() if cls.has_option(n) and n not in own}

    # ------------------------------------------------------------------ derived values
    @property
    def BATCH_SIZE(self) -> int:
        return self.IMAGES_PER_GPU * max(self.GPU_COUNT, 1)

    @property
    def IMAGE_SHAPE(self) -> tuple[int, int, int]:
        """Height, width, channels of the network input in the modes "square" and "crop"."""
        mode = self.IMAGE_RESIZE_MODE
        side = {"square": self.IMAGE_MAX_DIM, "crop": self.IMAGE_MIN_DIM}.get(mode)
        if side is None:
            raise ValueError(
                f"IMAGE_SHAPE exists in the modes square and crop, IMAGE_RESIZE_MODE is {mode!r};"
                " there each image has a shape of its own"
            )
        return (side, side, self.IMAGE_CHANNEL_COUNT)

    @property
    def BACKBONE_STRIDES(self) -> tuple[int, int, int, int, int]:
        """Strides of P2..P6."""
        return (4, 8, 16, 32, 64)

    @property
    def BOX_FRAME(self) -> str:
        """Frame of proposals and detections: "unit", or "network"; see docs/conventions.md."""
        return "unit" if self.ROI_ALIGN == "crop_and_resize" else "network"

    @property
    def MASK_SHAPE(self) -> tuple[int, int]:
        """Height and width of a mask that the network gives."""
        return (2 * self.MASK_POOL_SIZE, 2 * self.MASK_POOL_SIZE)

    @property
    def resize_options(self) -> dict[str, Any]:
        """Arguments of utils.resize_image."""
        return {
            "min_dim": self.IMAGE_MIN_DIM,
            "max_dim": self.IMAGE_MAX_DIM,
            "min_scale": self.IMAGE_MIN_SCALE,
            "mode": self.IMAGE_RESIZE_MODE,
            "divisor": self.IMAGE_SIZE_DIVISOR,
            "interpolation": self.IMAGE_INTERPOLATION,
            "side_rounding": self.IMAGE_SIDE_ROUNDING,
            "padding_value": self.padding_value,
        }

    @property
    def padding_value(self) -> Sequence[float] | None:
        """What images are padded with, a number per channel; None for zeros."""
        return self.MEAN_PIXEL if self.IMAGE_RESIZE_MODE == "shortest_edge" else None

    def backbone_shapes(self, image_shape: Sequence[int]) -> list[tuple[int, int]]:
        """Sizes of P2..P6 for a network input of (height, width, ...) pixels."""
        compute = self.option("COMPUTE_BACKBONE_SHAPE")
        if compute is not None:
            return [(int(h), int(w)) for h, w in compute(image_shape)]
        height, width = image_shape[:2]
        return [(math.ceil(height / s), math.ceil(width / s)) for s in self.BACKBONE_STRIDES]

    def anchor_strides(self, image_shape: Sequence[int]) -> list[tuple[int, int]]:
        """Network pixels from one cell of P2..P6 to the next, down and across."""
        if self.RPN_ANCHOR_SPACING == "stride":
            return [(stride, stride) for stride in self.BACKBONE_STRIDES]
        height, width = image_shape[:2]
        return [(height // h, width // w) for h, w in self.backbone_shapes(image_shape)]

    def anchor_options(self, image_shape: Sequence[int]) -> dict[str, Any]:
        """Arguments of utils.generate_pyramid_anchors, for a network input of (height, width)."""
        return {
            "scales": self.RPN_ANCHOR_SCALES,
            "ratios": self.RPN_ANCHOR_RATIOS,
            "feature_shapes": self.backbone_shapes(image_shape),
            "feature_strides": self.anchor_strides(image_shape),
            "anchor_stride": self.RPN_ANCHOR_STRIDE,
            "rounding": self.RPN_ANCHOR_ROUNDING,
        }

    def option(self, name: str) -> Any:
        """The value of an option; a function without the `self` that a class attribute binds."""
        return inspect.getattr_static(self, name)

    # ------------------------------------------------------------------ looking and checking
    def to_dict(self) -> dict[str, Any]:
        """All options and their values, those that a sub-class adds included."""
        names = [name for name in dir(self) if _is_option(name)]
        return {name: getattr(self, name) for name in names}

    def display(self) -> None:
        """Prints a table of all options."""
        print("\nConfigurations:")
        for name, value in self.to_dict().items():
            print(f"{name:30} {value}")
        print()

    def validate(self) -> None:
        """Checks each option and how they go together.

        Raises:
            ValueError: names the option, its value and what to do.
        """
        for name, source in _DERIVED.items():
            if not isinstance(inspect.getattr_static(type(self), name), property):
                raise ValueError(f"{name} is not an option: it follows from {source}; leave it out")
        for name in self.to_dict():
            if name in REPLACED:
                raise ValueError(f"{name} is no longer an option; use {REPLACED[name]}")
            if not hasattr(Config, name) and _did_you_mean(name):
                raise ValueError(f"{name} is not an option of Config{_did_you_mean(name)}")
        self._validate_values()
        self._validate_image()
        self._validate_network()

    def _validate_values(self) -> None:
        for rule in RULES:
            for name in rule.names.split():
                value = getattr(self, name)
                try:
                    holds = rule.holds(value)
                except (TypeError, ValueError, AttributeError, OverflowError):
                    holds = False  # no number, or no list, where one belongs
                if not holds:
                    raise ValueError(f"{name} must be {rule.expectation}, got {value!r:.200}")

    def _validate_image(self) -> None:
        modes = ("none", "square", "pad64", "crop", "shortest_edge")
        mode = self.IMAGE_RESIZE_MODE
        if mode not in modes:
            raise ValueError(f"IMAGE_RESIZE_MODE must be one of {', '.join(modes)}, got {mode!r}")
        name = {"square": "IMAGE_MAX_DIM", "crop": "IMAGE_MIN_DIM"}.get(mode)
        if name is not None:
            side = getattr(self, name)
            if side is None or not are_network_sides(64, side):
                below = max(64, (side or 0) // 64 * 64)
                raise ValueError(
                    f"{name} must be a multiple of 64 in mode {mode!r}, got {side};"
                    f" use {below} or {below + 64}"
                )
        smallest, largest = self.IMAGE_MIN_DIM, self.IMAGE_MAX_DIM
        if mode == "shortest_edge" and self.IMAGE_MIN_SCALE:
            raise ValueError(
                "IMAGE_MIN_SCALE must be 0 in mode 'shortest_edge', which scales by IMAGE_MIN_DIM"
                f" and IMAGE_MAX_DIM alone, got {self.IMAGE_MIN_SCALE}"
            )
        if mode == "shortest_edge" and (smallest is None or largest is None):
            raise ValueError(
                "IMAGE_MIN_DIM and IMAGE_MAX_DIM must be numbers in mode 'shortest_edge', got"
                f" {smallest} and {largest}"
            )
        if (
            mode in ("square", "shortest_edge")
            and smallest is not None
            and largest is not None
            and smallest > largest
        ):
            raise ValueError(
                f"IMAGE_MIN_DIM must not exceed IMAGE_MAX_DIM, got {smallest} and {largest}"
            )
        if mode == "none" and [*self.DETECTION_SCALES] != [1.0]:
            raise ValueError(
                "DETECTION_SCALES must be (1.0,) in mode 'none', which does not resize, got"
                f" {self.DETECTION_SCALES}"
            )
        overlap, tile = self.DETECTION_OVERLAP, self.DETECTION_TILE
        if tile is not None and overlap >= 1 and overlap >= min(tile):
            raise ValueError(
                "DETECTION_OVERLAP must be a share below 1 or pixels, fewer than DETECTION_TILE"
                f" {tuple(tile)} has, got {overlap}"
            )
        for option in ("MEAN_PIXEL", "STD_PIXEL"):
            numbers = getattr(self, option)
            if numbers is not None and len(numbers) != self.IMAGE_CHANNEL_COUNT:
                raise ValueError(
                    f"{option} must have one number per channel: IMAGE_CHANNEL_COUNT is"
                    f" {self.IMAGE_CHANNEL_COUNT}, got {len(numbers)} numbers"
                )

    def _validate_network(self) -> None:
        if isinstance(self.BACKBONE, dict):
            sizes = dict(self.BACKBONE)
            blocks = sizes.pop("blocks", None)
            numbers = [*blocks, *sizes.values()] if isinstance(blocks, Sequence) else []
            whole = all(isinstance(number, int) and 1 <= number <= 1000 for number in numbers)
            known = {"width"} <= sizes.keys() <= {"width", "groups", "width_per_group"}
            fits = known and whole and sizes["width"] * sizes.get("width_per_group", 64) % 64 == 0
            if not fits or len(numbers) != 4 + len(sizes):
                raise ValueError(
                    "BACKBONE as a dict must be {'blocks': (four numbers in 1..1000), 'width':"
                    " channels of C1 in 1..1000}, and may have 'groups' and 'width_per_group', of"
                    " which width / 64 times is a whole number, got"
                    f" {self.BACKBONE!r:.200}"
                )
        elif not (self.BACKBONE in RESNETS or callable(self.BACKBONE)):
            raise ValueError(
                f"BACKBONE must be one of {', '.join(RESNETS)}, a dict such as {{'blocks':"
                f" (2, 2, 2, 2), 'width': 32}} or a callable, got {self.BACKBONE!r}"
            )
        if self.TRAIN_BN and not (self.BATCH_NORM_EPS and self.HEAD_BATCH_NORM_EPS):
            raise ValueError(
                "BATCH_NORM_EPS and HEAD_BATCH_NORM_EPS must be above 0 where TRAIN_BN trains"
                f" BatchNorm, got {self.BATCH_NORM_EPS} and {self.HEAD_BATCH_NORM_EPS}; use 1e-5"
            )
        if self.CLASS_NAMES is not None and len(self.CLASS_NAMES) != self.NUM_CLASSES:
            raise ValueError(
                f"CLASS_NAMES must be None or a list of NUM_CLASSES = {self.NUM_CLASSES} names,"
                f" got {self.CLASS_NAMES!r:.200}"
            )
        if self.RPN_NEGATIVE_IOU > self.RPN_POSITIVE_IOU:
            raise ValueError(
                "RPN_NEGATIVE_IOU must not exceed RPN_POSITIVE_IOU, got"
                f" {self.RPN_NEGATIVE_IOU} and {self.RPN_POSITIVE_IOU}"
            )


# Blocks of C2 to C5, groups and width per group of the networks that have a name.
RESNETS: dict[str, dict[str, Any]] = {
    "resnet50": {"blocks": (3, 4, 6, 3), "width": 64},
    "resnet101": {"blocks": (3, 4, 23, 3), "width": 64},
    "resnet152": {"blocks": (3, 8, 36, 3), "width": 64},
    "resnext50_32x4d": {"blocks": (3, 4, 6, 3), "width": 64, "groups": 32, "width_per_group": 4},
    "resnext101_32x8d": {"blocks": (3, 4, 23, 3), "width": 64, "groups": 32, "width_per_group": 8},
}

# What load_weights sets in a model, as the ResNet of the file needs it.
BACKBONE_OPTIONS = (
    "MEAN_PIXEL",
    "STD_PIXEL",
    "STRIDE_IN_1X1",
    "BATCH_NORM_EPS",
    "STEM_POOL_PADDING",
)


def are_network_sides(divisor: int, *sides: int) -> bool:
    """Whether these may be sides of a network input: multiples of IMAGE_SIZE_DIVISOR."""
    return all(side > 0 and side % divisor == 0 for side in sides)


def _whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, (int, np.integer)) and least <= int(v) <= most


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda v: v in values


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: v is None or holds(v)


def _all_positive(values: Any) -> bool:
    return all(0 < number < math.inf for number in values)


class Rule(NamedTuple):
    """What each of some options must be."""

    names: str  # with spaces between
    expectation: str
    holds: Callable[[Any], bool]


# What a network is made of has an upper bound, since a checkpoint brings options that someone else
# chose, and the memory for ten times as much is not to be had.
RULES = (
    Rule("NAME", "a name, not empty", lambda v: isinstance(v, str) and v != ""),
    Rule("GPU_COUNT SEED VALIDATION_STEPS WARMUP_STEPS", "a whole number from 0", _whole(0)),
    Rule("NUM_WORKERS", "a whole number in 0..1000, or None", _or_none(_whole(0, 1000))),
    Rule(
        "STEPS_PER_EPOCH GRADIENT_ACCUMULATION KEEP_CHECKPOINTS EVALUATE_EVERY",
        "a whole number from 1",
        _whole(1),
    ),
    Rule("EARLY_STOPPING", "a whole number from 1, or None", _or_none(_whole(1))),
    Rule("RPN_ANCHOR_STRIDE", "a whole number in 1..64", _whole(1, 64)),
    Rule("POOL_SIZE MASK_POOL_SIZE", "a whole number in 1..256", _whole(1, 256)),
    Rule("IMAGE_CHANNEL_COUNT", "a whole number in 1..1000", _whole(1, 1000)),
    Rule(
        "TOP_DOWN_PYRAMID_SIZE RPN_CHANNELS FPN_CLASSIF_FC_LAYERS_SIZE",
        "a whole number in 1..16384",
        _whole(1, 16384),
    ),
    Rule("NUM_CLASSES IMAGES_PER_GPU", "a whole number in 1..100000", _whole(1, 100_000)),
    Rule(
        "PRE_NMS_LIMIT POST_NMS_ROIS_TRAINING POST_NMS_ROIS_INFERENCE MAX_GT_INSTANCES"
        " DETECTION_MAX_INSTANCES RPN_TRAIN_ANCHORS_PER_IMAGE TRAIN_ROIS_PER_IMAGE",
        "a whole number in 1..10000000",
        _whole(1, 10_000_000),
    ),
    Rule(
        "IMAGE_MIN_DIM IMAGE_MAX_DIM",
        "a whole number in 1..16384, or None",
        _or_none(_whole(1, 16384)),
    ),
    Rule(
        "RPN_NMS_THRESHOLD DETECTION_NMS_THRESHOLD DETECTION_MIN_CONFIDENCE"
        " RPN_POSITIVE_IOU RPN_NEGATIVE_IOU ROI_POSITIVE_IOU CROWD_IOU",
        "in 0..1",
        lambda v: 0 <= v <= 1,
    ),
    Rule("ROI_POSITIVE_RATIO", "above 0 and at most 1", lambda v: 0 < v <= 1),
    Rule("LEARNING_MOMENTUM", "from 0 and below 1", lambda v: 0 <= v < 1),
    Rule("LEARNING_RATE", "above 0 and finite", lambda v: 0 < v < math.inf),
    Rule("GRADIENT_CLIP_NORM", "above 0", lambda v: v > 0),
    Rule("WEIGHT_DECAY", "0 or more, and finite", lambda v: 0 <= v < math.inf),
    Rule("IMAGE_MIN_SCALE", "in 0..100", lambda v: 0 <= v <= 100),
    Rule(
        "TRAIN_BN USE_RPN_ROIS USE_MINI_MASK COMPILE DETECTION_PER_CLASS CPU_WINOGRAD"
        " SKIP_EMPTY_IMAGES SKIP_UNREADABLE_IMAGES STRIDE_IN_1X1 FPN_BATCH_NORM RPN_PER_LEVEL"
        " RPN_ANCHOR_ROUNDING CLIP_TO_IMAGE ROI_ALIGNED HEAD_CONV_BATCH_NORM HEAD_FC_BATCH_NORM",
        "True or False",
        _one_of(True, False),
    ),
    Rule("OPTIMIZER", "'sgd' or 'adamw'", _one_of("sgd", "adamw")),
    Rule("LR_SCHEDULE", "'constant', 'cosine' or 'step'", _one_of("constant", "cosine", "step")),
    Rule("LR_STEPS", "numbers between 0 and 1", lambda v: all(0 < n < 1 for n in v)),
    Rule("AMP", "'bf16', 'fp16' or None", _one_of("bf16", "fp16", None)),
    Rule("CPU_PRECISION", "'float32' or 'bfloat16'", _one_of("float32", "bfloat16")),
    Rule(
        "CUDA_PRECISION",
        "'float32', 'bfloat16' or 'float16'",
        _one_of("float32", "bfloat16", "float16"),
    ),
    Rule("IMAGE_SIZE_DIVISOR", "32 or 64", _one_of(32, 64)),
    Rule("IMAGE_INTERPOLATION", "'pillow' or 'float'", _one_of("pillow", "float")),
    Rule("IMAGE_SIDE_ROUNDING", "'nearest' or 'floor'", _one_of("nearest", "floor")),
    Rule("STEM_POOL_PADDING", "'same' or 'symmetric'", _one_of("same", "symmetric")),
    Rule("RPN_SCORE", "'softmax', 'sigmoid' or 'logit'", _one_of("softmax", "sigmoid", "logit")),
    Rule("RPN_ANCHOR_SPACING", "'stride' or 'grid'", _one_of("stride", "grid")),
    Rule(
        "ROI_ALIGN",
        "'crop_and_resize' or 'roi_align'",
        _one_of("crop_and_resize", "roi_align"),
    ),
    Rule(
        "MASK_PASTE",
        "'rounded', 'expanded' or 'sampled'",
        _one_of("rounded", "expanded", "sampled"),
    ),
    Rule("ROI_SAMPLING_RATIO", "a whole number in 0..16", _whole(0, 16)),
    Rule("ROI_LEVEL_OFFSET", "in -4..4", lambda v: -4 <= v <= 4),
    Rule("RPN_CONV_LAYERS", "a whole number in 1..16", _whole(1, 16)),
    Rule("CLASSIFIER_CONV_LAYERS", "a whole number in 0..16", _whole(0, 16)),
    Rule("CLASSIFIER_FC_LAYERS", "1 or 2", _one_of(1, 2)),
    Rule("BATCH_NORM_EPS HEAD_BATCH_NORM_EPS", "in 0..1", lambda v: 0 <= v <= 1),
    Rule(
        "BBOX_LOG_SCALE_LIMIT RPN_MIN_SIZE DETECTION_MIN_SIZE",
        "0 or more and finite, or None",
        _or_none(lambda v: 0 <= v < math.inf),
    ),
    Rule(
        "DETECTION_TILE",
        "(height, width), whole numbers from 1, or None",
        _or_none(lambda v: len(v) == 2 and all(map(_whole(1, 10_000_000), v))),
    ),
    Rule("DETECTION_OVERLAP", "0 or more, and finite", lambda v: 0 <= v < math.inf),
    Rule(
        "DETECTION_SCALES",
        "1 to 100 numbers above 0 and at most 100, each once",
        lambda v: 1 <= len({*v}) == len(v) <= 100 and all(0 < n <= 100 for n in v),
    ),
    Rule(
        "DETECTION_FLIPS",
        "some of 'horizontal', 'vertical' and 'both', each once",
        lambda v: (
            not isinstance(v, str)
            and {*v} <= {"horizontal", "vertical", "both"}
            and len({*v}) == len(v)
        ),
    ),
    Rule("STD_PIXEL", "a number above 0 per channel, or None", _or_none(_all_positive)),
    Rule(
        "IMAGE_BIT_DEPTH",
        "a whole number from 8 to 16, 'auto' or None",
        lambda v: v in (None, "auto") or _whole(8, 16)(v),
    ),
    Rule(
        "RPN_BBOX_STD_DEV BBOX_STD_DEV",
        "four numbers above 0, and finite",
        lambda v: len(v) == 4 and _all_positive(v),
    ),
    Rule(
        "MINI_MASK_SHAPE",
        "(height, width), whole numbers in 1..4096",
        lambda v: len(v) == 2 and all(map(_whole(1, 4096), v)),
    ),
    Rule(
        "RPN_ANCHOR_SCALES",
        "five numbers above 0, and finite",
        lambda v: len(v) == 5 and _all_positive(v),
    ),
    Rule(
        "RPN_ANCHOR_RATIOS",
        "1 to 100 numbers above 0, and finite",
        lambda v: 1 <= len(v) <= 100 and _all_positive(v),
    ),
    Rule(
        "MEAN_PIXEL",
        "a finite number per channel",
        lambda v: len(v) >= 1 and all(map(math.isfinite, v)),
    ),
    Rule("COMPUTE_BACKBONE_SHAPE", "a function or None", _or_none(callable)),
    Rule(
        "LOSS_WEIGHTS",
        f"a dict of finite weights of 0 or more for some of {', '.join(Config.LOSS_WEIGHTS)}",
        lambda v: set(v) <= set(Config.LOSS_WEIGHTS) and all(0 <= w < math.inf for w in v.values()),
    ),
)

# Options of Matterport's and the port's Config, and what took their place.
REPLACED = {
    "BACKBONE_STYLE": "STRIDE_IN_1X1, BATCH_NORM_EPS, STEM_POOL_PADDING, MEAN_PIXEL and STD_PIXEL",
    "IMAGE_PADDING": "IMAGE_RESIZE_MODE",
    "BACKBONE_SHAPES": "COMPUTE_BACKBONE_SHAPE",
    "IMAGE_META_SIZE": "nothing: there is no image_meta",
}
# What follows from options, and from which.
_DERIVED = {
    "BATCH_SIZE": "IMAGES_PER_GPU and GPU_COUNT",
    "IMAGE_SHAPE": "IMAGE_RESIZE_MODE and IMAGE_MAX_DIM or IMAGE_MIN_DIM",
    "BACKBONE_STRIDES": "the network, whose strides are 4, 8, 16, 32 and 64",
    "BOX_FRAME": "ROI_ALIGN",
    "MASK_SHAPE": "MASK_POOL_SIZE, of which it is twice",
}


def _is_option(name: str) -> bool:
    return name.isupper() and not name.startswith("_") and name not in _DERIVED


def _did_you_mean(name: str) -> str:
    options = [option for option in vars(Config) if _is_option(option)]
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.85)
    return f"; did you mean {close[0]}?" if close else ""
