"""The three families of published Mask R-CNN weights, side by side.

Each preset sets what the network must be, and how images and boxes are treated, so that weights of
the family give the detections of their home. What is not named here is the same in all of them, or
has to do with training only. `MaskRCNN.from_weights(file)` chooses the preset by the file.

    MatterportConfig     matterport/Mask_RCNN, the defaults of Config
    TorchvisionConfig    torchvision.models.detection.maskrcnn_resnet50_fpn
    TorchvisionV2Config  torchvision.models.detection.maskrcnn_resnet50_fpn_v2
    Detectron2Config     detectron2's COCO-InstanceSegmentation/mask_rcnn_*_FPN_3x

Sources: the code of these libraries, each rule checked against their own outputs by
tests/test_presets.py.
"""

import math
from collections.abc import Sequence

from config import BACKBONE_OPTIONS, Config


class MatterportConfig(Config):
    """Matterport's Mask R-CNN in Keras: the defaults, written out for comparison."""

    # Images
    IMAGE_RESIZE_MODE = "square"
    IMAGE_MAX_DIM = 1024
    IMAGE_SIZE_DIVISOR = 64
    MEAN_PIXEL = (123.7, 116.8, 103.9)
    STD_PIXEL = None
    # Network
    BACKBONE = "resnet101"
    STRIDE_IN_1X1 = True
    BATCH_NORM_EPS = 1e-3
    STEM_POOL_PADDING = "same"
    FPN_BATCH_NORM = False
    RPN_CHANNELS = 512
    RPN_CONV_LAYERS = 1
    CLASSIFIER_CONV_LAYERS = 0
    CLASSIFIER_FC_LAYERS = 2
    HEAD_CONV_BATCH_NORM = True
    HEAD_FC_BATCH_NORM = True
    HEAD_BATCH_NORM_EPS = 1e-3
    # Region proposals
    RPN_SCORE = "softmax"
    RPN_ANCHOR_RATIOS = (0.5, 1, 2)
    RPN_ANCHOR_ROUNDING = False
    RPN_ANCHOR_SPACING = "stride"
    RPN_BBOX_STD_DEV = (0.1, 0.1, 0.2, 0.2)
    BBOX_LOG_SCALE_LIMIT = None
    RPN_PER_LEVEL = False
    PRE_NMS_LIMIT = 6000
    RPN_MIN_SIZE = None
    CLIP_TO_IMAGE = False
    # Rois
    ROI_ALIGN = "crop_and_resize"
    ROI_LEVEL_OFFSET = 0.5
    # Detections
    DETECTION_PER_CLASS = False
    DETECTION_MIN_CONFIDENCE = 0.7
    DETECTION_NMS_THRESHOLD = 0.3
    DETECTION_MIN_SIZE = None
    MASK_PASTE = "rounded"


class TorchvisionConfig(Config):
    """torchvision's maskrcnn_resnet50_fpn with its published weights."""

    # Images
    IMAGE_RESIZE_MODE = "shortest_edge"
    IMAGE_MAX_DIM = 1333
    IMAGE_SIZE_DIVISOR = 32
    IMAGE_INTERPOLATION = "float"
    IMAGE_SIDE_ROUNDING = "floor"
    MEAN_PIXEL = (123.675, 116.28, 103.53)
    STD_PIXEL = (58.395, 57.12, 57.375)
    # Network
    BACKBONE = "resnet50"
    STRIDE_IN_1X1 = False
    BATCH_NORM_EPS = 0.0
    STEM_POOL_PADDING = "symmetric"
    RPN_CHANNELS = 256
    HEAD_CONV_BATCH_NORM = False
    HEAD_FC_BATCH_NORM = False
    # Region proposals
    RPN_SCORE = "sigmoid"
    RPN_ANCHOR_RATIOS = (2, 1, 0.5)
    RPN_ANCHOR_ROUNDING = True
    RPN_ANCHOR_SPACING = "grid"
    RPN_BBOX_STD_DEV = (1.0, 1.0, 1.0, 1.0)
    BBOX_LOG_SCALE_LIMIT = math.log(1000 / 16)
    RPN_PER_LEVEL = True
    PRE_NMS_LIMIT = 1000
    RPN_MIN_SIZE = 1e-3
    CLIP_TO_IMAGE = True
    # Rois
    ROI_ALIGN = "roi_align"
    ROI_SAMPLING_RATIO = 2
    ROI_ALIGNED = False
    ROI_LEVEL_OFFSET = 1e-6
    # Detections
    DETECTION_PER_CLASS = True
    DETECTION_MIN_CONFIDENCE = 0.05
    DETECTION_NMS_THRESHOLD = 0.5
    DETECTION_MIN_SIZE = 1e-2
    MASK_PASTE = "expanded"


class TorchvisionV2Config(TorchvisionConfig):
    """torchvision's maskrcnn_resnet50_fpn_v2: a deeper RPN and classifier, BatchNorm all over."""

    BATCH_NORM_EPS = 1e-5
    FPN_BATCH_NORM = True
    RPN_CONV_LAYERS = 2
    CLASSIFIER_CONV_LAYERS = 4
    CLASSIFIER_FC_LAYERS = 1
    HEAD_CONV_BATCH_NORM = True
    HEAD_BATCH_NORM_EPS = 1e-5


class Detectron2Config(Config):
    """detectron2's mask_rcnn_R_50_FPN_3x, and R_101, which differs in BACKBONE alone."""

    # Images
    IMAGE_RESIZE_MODE = "shortest_edge"
    IMAGE_MAX_DIM = 1333
    IMAGE_SIZE_DIVISOR = 32
    IMAGE_INTERPOLATION = "pillow"
    IMAGE_SIDE_ROUNDING = "nearest"
    MEAN_PIXEL = (123.675, 116.28, 103.53)
    STD_PIXEL: Sequence[float] | None = None
    # Network
    BACKBONE = "resnet50"
    STRIDE_IN_1X1 = True
    BATCH_NORM_EPS = 1e-5
    STEM_POOL_PADDING = "symmetric"
    RPN_CHANNELS = 256
    HEAD_CONV_BATCH_NORM = False
    HEAD_FC_BATCH_NORM = False
    # Region proposals
    RPN_SCORE = "logit"
    RPN_ANCHOR_RATIOS = (2, 1, 0.5)
    RPN_BBOX_STD_DEV = (1.0, 1.0, 1.0, 1.0)
    BBOX_LOG_SCALE_LIMIT = math.log(1000 / 16)
    RPN_PER_LEVEL = True
    PRE_NMS_LIMIT = 1000
    RPN_MIN_SIZE = 0.0
    CLIP_TO_IMAGE = True
    # Rois
    ROI_ALIGN = "roi_align"
    ROI_SAMPLING_RATIO = 0
    ROI_ALIGNED = True
    ROI_LEVEL_OFFSET = 0.0
    # Detections
    DETECTION_PER_CLASS = True
    DETECTION_MIN_CONFIDENCE = 0.05
    DETECTION_NMS_THRESHOLD = 0.5
    MASK_PASTE = "sampled"


class Detectron2X101Config(Detectron2Config):
    """detectron2's mask_rcnn_X_101_32x8d_FPN_3x, whose ResNeXt came from elsewhere."""

    STD_PIXEL = (58.395, 57.12, 57.375)
    BACKBONE = "resnext101_32x8d"
    STRIDE_IN_1X1 = False


# What ResNets alone need, pretrained on ImageNet: torchvision's, the MSRA ones that detectron2
# starts from, and Keras', whose mean is the user's own.
TORCHVISION_RESNET, MSRA_RESNET, KERAS_RESNET = (
    {name: getattr(preset, name) for name in BACKBONE_OPTIONS}
    for preset in (TorchvisionV2Config, Detectron2Config, MatterportConfig)
)
del KERAS_RESNET["MEAN_PIXEL"]
