"""torchvision's and detectron2's weights, Mask R-CNN and ResNets, under our names.

What a network is to be like follows from the family, see presets.py, and from the shapes. What is
arranged otherwise in a file is rearranged here: deltas are (dx, dy, dw, dh) in these families and
(dy, dx, dh, dw) here, detectron2's images are BGR and its background is the last class.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import presets
from config import BACKBONE_OPTIONS, Config

# Category id of COCO's annotation files and name, in the order of the class ids 1..80.
CATEGORIES = {
    **{1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train"},
    **{8: "truck", 9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign"},
    **{14: "parking meter", 15: "bench", 16: "bird", 17: "cat", 18: "dog", 19: "horse"},
    **{20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe"},
    **{27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee"},
    **{35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat"},
    **{40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket"},
    **{44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon"},
    **{51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli"},
    **{57: "carrot", 58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair"},
    **{63: "couch", 64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet", 72: "tv"},
    **{73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard", 77: "cell phone"},
    **{78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book"},
    **{85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier"},
    **{90: "toothbrush"},
}
CATEGORY_IDS = [0, *CATEGORIES]
CLASS_NAMES = ["BG", *CATEGORIES.values()]
# torchvision's class ids are the category ids, eleven of which COCO does not use. Names of their
# own, since classes are told apart by name.
TORCHVISION_CLASS_NAMES = ["BG", *(CATEGORIES.get(i, f"N/A {i}") for i in range(1, 91))]


def class_names(config: Config) -> list[str]:
    """Names of the classes, the background's first: COCO's for as many classes without names."""
    if config.CLASS_NAMES:
        return list(config.CLASS_NAMES)
    if len(CLASS_NAMES) == config.NUM_CLASSES:
        return CLASS_NAMES
    return ["BG", *(f"class {i}" for i in range(1, config.NUM_CLASSES))]


TORCHVISION, TORCHVISION_RESNET = "torchvision Mask R-CNN", "torchvision ResNet"
DETECTRON2, DETECTRON2_RESNET = "detectron2 Mask R-CNN", "detectron2 ResNet"
CAFFE2_RESNET = "Caffe2 ResNet"  # of Detectron, before detectron2


class Refused(ValueError):
    """A network that is not read; the text goes on after the name of a file."""


class Found(NamedTuple):
    """What recognise() made of the names in a file."""

    format: str
    prefix: str  # of the names, where the model is part of another module


# --- Names ---------------------------------------------------------------------------------------

# Modules of torchvision and ours, except those of the residual blocks. Before 2022 they had names
# without the last number.
_TORCHVISION = {
    "backbone.body.conv1": "fpn.C1.0",
    "backbone.body.bn1": "fpn.C1.1",
    **{
        f"backbone.fpn.inner_blocks.{i}{old}": f"fpn.P{i + 2}_conv1"
        for i in range(4)
        for old in ("", ".0")
    },
    **{
        f"backbone.fpn.layer_blocks.{i}{old}": f"fpn.P{i + 2}_conv2.1"
        for i in range(4)
        for old in ("", ".0")
    },
    **{f"backbone.fpn.inner_blocks.{i}.1": f"fpn.P{i + 2}_bn1" for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}.1": f"fpn.P{i + 2}_bn2" for i in range(4)},
    "rpn.head.conv": "rpn.conv_shared",
    "rpn.head.conv.0.0": "rpn.conv_shared",
    **{f"rpn.head.conv.{i}.0": f"rpn.conv_shared{i + 1}" for i in range(1, 16)},
    "rpn.head.cls_logits": "rpn.conv_class",
    "rpn.head.bbox_pred": "rpn.conv_bbox",
    "roi_heads.box_head.fc6": "classifier.conv1",
    "roi_heads.box_head.fc7": "classifier.conv2",
    **{
        f"roi_heads.box_head.{i}.{j}": f"classifier.convs.{i}.{j}"
        for i in range(16)
        for j in (0, 1)
    },
    "roi_heads.box_predictor.cls_score": "classifier.linear_class",
    "roi_heads.box_predictor.bbox_pred": "classifier.linear_bbox",
    **{f"roi_heads.mask_head.mask_fcn{i}": f"mask.conv{i}" for i in range(1, 5)},
    **{f"roi_heads.mask_head.{i - 1}.0": f"mask.conv{i}" for i in range(1, 5)},
    **{f"roi_heads.mask_head.{i - 1}.1": f"mask.bn{i}" for i in range(1, 5)},
    "roi_heads.mask_predictor.conv5_mask": "mask.deconv",
    "roi_heads.mask_predictor.mask_fcn_logits": "mask.conv5",
}
# ... and of detectron2.
_DETECTRON2 = {
    "backbone.bottom_up.stem.conv1": "fpn.C1.0",
    "backbone.bottom_up.stem.conv1.norm": "fpn.C1.1",
    **{f"backbone.fpn_lateral{i}": f"fpn.P{i}_conv1" for i in range(2, 6)},
    **{f"backbone.fpn_output{i}": f"fpn.P{i}_conv2.1" for i in range(2, 6)},
    "proposal_generator.rpn_head.conv": "rpn.conv_shared",
    "proposal_generator.rpn_head.objectness_logits": "rpn.conv_class",
    "proposal_generator.rpn_head.anchor_deltas": "rpn.conv_bbox",
    "roi_heads.box_head.fc1": "classifier.conv1",
    "roi_heads.box_head.fc2": "classifier.conv2",
    "roi_heads.box_predictor.cls_score": "classifier.linear_class",
    "roi_heads.box_predictor.bbox_pred": "classifier.linear_bbox",
    **{f"roi_heads.mask_head.mask_fcn{i}": f"mask.conv{i}" for i in range(1, 5)},
    "roi_heads.mask_head.deconv": "mask.deconv",
    "roi_heads.mask_head.predictor": "mask.conv5",
}
# What a Mask R-CNN must have at least.
_PARTS = (
    *("fpn.C1.0", *(f"fpn.C{i}.0.conv3" for i in range(2, 6))),
    *(f"fpn.P{i}_{conv}" for i in range(2, 6) for conv in ("conv1", "conv2.1")),
    *("rpn.conv_shared", "rpn.conv_class", "rpn.conv_bbox", "classifier.conv1"),
    *("classifier.linear_class", "classifier.linear_bbox"),
    *(*(f"mask.conv{i}" for i in range(1, 6)), "mask.deconv"),
)
# What networks that are not read have, in the order of asking.
_OTHERS = {
    TORCHVISION: {
        r"roi_heads\.keypoint": "a Keypoint R-CNN",
        r"(backbone\.)?head\.(classification|regression)_head": "a RetinaNet, FCOS or SSD",
        r"rpn\.head\.conv\.\d+\.1\.": "a Mask R-CNN with BatchNorm in its RPN",
    },
    DETECTRON2: {
        r"sem_seg_head": "a Panoptic FPN",
        r"roi_heads\.keypoint": "a Keypoint R-CNN",
        r"roi_heads\.box_(head|predictor)\.\d": "a Cascade R-CNN",
        r"roi_heads\.res5": "a network whose heads are stage 5 of its ResNet (C4)",
        r"roi_heads\.mask_(head\.)?(coarse|point)": "a PointRend",
        r"(roi_heads|proposal_generator|backbone\.fpn_\w+)\..*norm": (
            "a network with norm layers in its pyramid or heads"
        ),
        r"backbone\.bottom_up\..*conv2_offset": "a network with deformable convolutions",
        r"head\.cls_subnet": "a RetinaNet",
        r"backbone\.(res\d|stem)": "a network without a feature pyramid (DC5)",
    },
}
# Names by which a program is known, in the order of asking: some are also those of the next.
_PROGRAMS = {
    "maskrcnn-benchmark": r"backbone\.body\.stem\.|roi_heads\.\w+\.feature_extractor\.",
    "Detectron": r"conv_rpn_|fpn_inner_res|rpn_bbox_pred_",
    DETECTRON2: r"backbone\.bottom_up\.|backbone\.(?:stem|res\d)\.|proposal_generator\.",
    TORCHVISION: r"backbone\.body\.|backbone\.fpn\.|rpn\.head\.|head\.classification_head\.",
    "MMDetection": r"neck\.|rpn_head\.|roi_head\.|bbox_head\.",
    TORCHVISION_RESNET: r"layer1\.0\.conv3\.weight$",
    DETECTRON2_RESNET: r"res2\.0\.conv3\.weight$",
    CAFFE2_RESNET: r"res2_0_branch2c_w$",
}
FORMATS = (TORCHVISION, DETECTRON2, TORCHVISION_RESNET, DETECTRON2_RESNET, CAFFE2_RESNET)


def recognise(names: Iterable[str]) -> Found | None:
    """The program whose names of tensors these are; None if none is known.

    Raises:
        Refused: it is a network that this library does not have.
    """
    names = list(names)
    for program, pattern in _PROGRAMS.items():
        start = re.compile(rf"((?:[^.]*\.)*?)(?:{pattern})")
        prefixes = Counter(match[1] for name in names if (match := start.match(name)))
        if not prefixes:
            continue
        if program not in FORMATS:
            raise Refused(
                f"holds weights of a network of {program}, which is built otherwise than this "
                f"library's Mask R-CNN and cannot be converted; run it with {program}, or start "
                "from 'coco' or 'imagenet'"
            )
        prefix = max(prefixes, key=prefixes.__getitem__)  # the first of those as frequent
        if program in _OTHERS:
            _check_network(program, [name.removeprefix(prefix) for name in names])
        return Found(program, prefix)
    return None


def _check_network(program: str, names: list[str]) -> None:
    """Raises Refused unless these are the names of a Mask R-CNN on a ResNet with a pyramid."""
    what = next(
        (
            text
            for pattern, text in _OTHERS[program].items()
            if any(re.match(pattern, name) for name in names)
        ),
        None,
    )
    if what is None:
        renamed = rename(program, names)
        modules = {ours.removesuffix(".weight") for ours in renamed.values()}
        lacking = [part for part in _PARTS if part not in modules]
        others = [name for name, ours in renamed.items() if ours == name and _OWN.match(name)]
        if not any(name.startswith("roi_heads.mask") for name in names):
            what = "a Faster R-CNN or another one without masks"
        elif not {"fpn.C1.0", "fpn.C2.0.conv1"} <= modules:
            what = "a Mask R-CNN on something else than a ResNet"
        elif "fpn.C2.0.conv3" not in modules:
            what = "a Mask R-CNN on a ResNet-18 or ResNet-34"
        elif lacking:
            what = f"a Mask R-CNN of another form, without {_theirs(program, lacking[0])}"
        elif others:
            what = f"a Mask R-CNN of another form, with {others[0]:.100}"
    if what is not None:
        home = program.partition(" ")[0]
        raise Refused(
            f"holds weights of a network of {home}, {what}, which this library does not have; of "
            f"{home} it reads Mask R-CNN on a ResNet or ResNeXt of 50 layers or more with a "
            f"feature pyramid: run it with {home}, or start from "
            + ("'torchvision'" if program == TORCHVISION else "'detectron2_r50'")
        )


_OWN = re.compile(r"(?:backbone|rpn|proposal_generator|roi_heads)\.")
_IGNORED = re.compile(r"(?:proposal_generator|rpn)\.anchor_generator\.|.*\.num_batches_tracked$")


def _theirs(program: str, module: str) -> str:
    table = _TORCHVISION if program == TORCHVISION else _DETECTRON2
    return next((theirs for theirs, ours in table.items() if ours == module), module)


def rename(kind: str, names: Iterable[str]) -> dict[str, str]:
    """Our names for those of a format; "" for what is left out, the name itself where none is."""
    names = list(names)
    # torchvision numbers the fully connected layers with what lies between them.
    found = (re.match(r"roi_heads\.box_head\.(\d{1,3})\.weight$", name) for name in names)
    dense = sorted(int(match[1]) for match in found if match)
    table = dict(_TORCHVISION if kind in (TORCHVISION, TORCHVISION_RESNET) else _DETECTRON2)
    table |= {
        f"roi_heads.box_head.{number}": f"classifier.conv{i}"
        for i, number in enumerate(dense[:2], start=1)
    }
    renamed = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if kind == CAFFE2_RESNET:
            renamed[name] = _of_caffe2(name)
        elif _IGNORED.match(name) or (
            kind in (TORCHVISION_RESNET, DETECTRON2_RESNET)
            and re.match(r"(?:stem\.)?(?:fc\w*|linear|pred)\.", name)
        ):
            renamed[name] = ""
        else:
            bare = module
            if kind == TORCHVISION_RESNET:
                bare = f"backbone.body.{module}"
            elif kind == DETECTRON2_RESNET:
                bare = f"backbone.bottom_up.{module}"
            ours = table.get(bare) or _block(bare)
            renamed[name] = name if ours is None else f"{ours}.{leaf}"
    return renamed


def _block(module: str) -> str | None:
    """Our name of a part of a residual block."""
    if match := re.fullmatch(
        r"backbone\.body\.layer([1-4])\.(\d+\.(?:conv[123]|bn[123]|downsample\.[01]))", module
    ):
        return f"fpn.C{int(match[1]) + 1}.{match[2]}"
    match = re.fullmatch(
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.(?:conv([123])|shortcut)(\.norm)?", module
    )
    if match is None:
        return None
    stage, block, number, norm = match.groups()
    part = f"{'bn' if norm else 'conv'}{number}" if number else f"downsample.{1 if norm else 0}"
    return f"fpn.C{stage}.{block}.{part}"


_CAFFE2_LEAVES = {
    **{"w": "weight", "b": "bias", "bn_s": "weight", "bn_b": "bias"},
    **{"bn_rm": "running_mean", "bn_riv": "running_var"},
}


def _of_caffe2(name: str) -> str:
    """res2_0_branch2a_bn_s -> fpn.C2.0.bn1.weight."""
    if re.match(r"(?:fc\d*|pred)_|.*_momentum$", name):
        return ""
    match = re.fullmatch(
        r"(?:res_)?(?:(conv1)|res([2-5])_(\d+)_branch(1|2[abc]))_(w|b|bn_s|bn_b|bn_rm|bn_riv)", name
    )
    if match is None:
        return name
    stem, stage, block, branch, leaf = match.groups()
    norm = leaf.startswith("bn")
    if stem:
        module = f"fpn.C1.{1 if norm else 0}"
    elif branch == "1":
        module = f"fpn.C{stage}.{block}.downsample.{1 if norm else 0}"
    else:
        part = ("bn" if norm else "conv") + str("abc".index(branch[1]) + 1)
        module = f"fpn.C{stage}.{block}.{part}"
    return f"{module}.{_CAFFE2_LEAVES[leaf]}"


# --- Arrangement ---------------------------------------------------------------------------------


def convert(
    kind: str, state: dict[str, Tensor], author: object = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under our names as our network takes them, and the options of their family.

    Args:
        kind: one of FORMATS.
        state: of that format, renamed.
        author: what the file says of who wrote it.

    Raises:
        Refused: shapes that do not belong to such a network.
    """
    state = dict(state)
    if kind == CAFFE2_RESNET:
        _add_statistics(state)
    if "fpn.C1.1.running_mean" not in state:
        raise Refused(
            "holds a ResNet without BatchNorm, perhaps with GroupNorm, which this library does not "
            "have; use one with BatchNorm, such as 'imagenet'"
        )
    if kind == TORCHVISION_RESNET:
        return state, dict(presets.TORCHVISION_RESNET)
    if kind == TORCHVISION:
        _arrange_heads(state)
        return state, _torchvision_options(state)
    if kind == DETECTRON2_RESNET and author == "torchvision":  # its converter leaves the colours
        return state, dict(presets.TORCHVISION_RESNET)
    preset = presets.Detectron2X101Config if _is_resnext(state) else presets.Detectron2Config
    options = preset.own_options()
    mean, std = _numbers(state, "pixel_mean"), _numbers(state, "pixel_std")
    # BGR, unless the network was trained on RGB: natural light has more red than blue.
    bgr = not mean or mean[0] >= mean[-1]  # as _numbers turned it round
    stem = state.get("fpn.C1.0.weight")
    if bgr and stem is not None and stem.ndim == 4:
        state["fpn.C1.0.weight"] = stem.flip(1)
    if not bgr:
        mean, std = mean[::-1], std and std[::-1]
    if kind != DETECTRON2:
        return state, {name: options[name] for name in BACKBONE_OPTIONS}
    _arrange_heads(state)
    _background_first(state)
    if std and std != (1.0,) * len(std):  # that of the MSRA networks
        options |= presets.Detectron2X101Config.own_options()
        options["STD_PIXEL"] = std
    elif std:
        options["STD_PIXEL"] = None
    if mean:
        options["MEAN_PIXEL"] = mean
    if len(state["classifier.linear_class.weight"]) == len(CLASS_NAMES):
        options["CLASS_NAMES"] = list(CLASS_NAMES)
    return state, options


def _torchvision_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    second = {"fpn.P2_bn1.weight", "classifier.convs.0.0.weight"} & state.keys()
    preset: type[Config] = presets.TorchvisionV2Config if second else presets.TorchvisionConfig
    options = preset.own_options()
    if len(state["classifier.linear_class.weight"]) == len(TORCHVISION_CLASS_NAMES):
        options["CLASS_NAMES"] = list(TORCHVISION_CLASS_NAMES)
    return options


def _arrange_heads(state: dict[str, Tensor]) -> None:
    """The deltas' order, and fully connected layers as the convolutions that they are here."""
    for module in ("rpn.conv_bbox", "classifier.linear_bbox"):
        for leaf in ("weight", "bias"):
            key = f"{module}.{leaf}"
            tensor = state.get(key)
            if tensor is None or len(tensor) % 4:
                raise Refused(f"must have four deltas a box in {key}, got {_shape(tensor)}")
            order = torch.tensor([1, 0, 3, 2])
            state[key] = tensor.unflatten(0, (-1, 4)).index_select(1, order).flatten(0, 1)
    if len(state["rpn.conv_class.weight"]) != 3 or len(state["rpn.conv_bbox.weight"]) != 12:
        raise Refused(
            "must have 3 anchors in each place, of the ratios 0.5, 1 and 2, got "
            f"{len(state['rpn.conv_class.weight'])}; use a network with those"
        )
    convolutions = [key for key in state if re.fullmatch(r"classifier\.convs\.\d+\.0\.weight", key)]
    before = convolutions[-1] if convolutions else "fpn.P2_conv2.1.weight"
    first, second = state["classifier.conv1.weight"], state.get("classifier.conv2.weight")
    channels = len(state[before])
    area = first.shape[1] // max(channels, 1) if first.ndim == 2 else 0
    side = round(area**0.5)
    if first.ndim != 2 or side < 1 or channels * side * side != first.shape[1]:
        raise Refused(
            f"must have a square of {channels} channels in the classifier's first layer, got "
            f"{_shape(first)}"
        )
    state["classifier.conv1.weight"] = first.reshape(len(first), channels, side, side)
    if second is not None:
        if second.ndim != 2:
            raise Refused(
                f"must have 2 dimensions in the classifier's layers, got {_shape(second)}"
            )
        state["classifier.conv2.weight"] = second[:, :, None, None]


def _background_first(state: dict[str, Tensor]) -> None:
    """detectron2's last class is the background, for which it has neither boxes nor masks."""
    classes = len(state["classifier.linear_class.weight"])
    for module, rows, added in (("linear_bbox", 4 * (classes - 1), 4), ("conv5", classes - 1, 1)):
        for leaf in ("weight", "bias"):
            key = f"{'classifier' if added == 4 else 'mask'}.{module}.{leaf}"
            tensor = state.get(key)
            if tensor is None or len(tensor) != rows:
                raise Refused(
                    f"must have boxes and masks of each of its {classes - 1} classes, {rows} rows "
                    f"in {key}, got {_shape(tensor)}; class-agnostic heads are not read"
                )
            state[key] = torch.cat([tensor.new_zeros(added, *tensor.shape[1:]), tensor])
    for leaf in ("weight", "bias"):
        key = f"classifier.linear_class.{leaf}"
        if key in state:
            state[key] = state[key].roll(1, 0)


def _add_statistics(state: dict[str, Tensor]) -> None:
    """Where scale and shift are all of a BatchNorm, statistics that change nothing."""
    eps = presets.MSRA_RESNET["BATCH_NORM_EPS"]
    for key, tensor in list(state.items()):
        if match := re.fullmatch(r"(fpn\.C(?:1\.1|.*\.bn\d|.*\.downsample\.1))\.weight", key):
            state.setdefault(f"{match[1]}.running_mean", torch.zeros_like(tensor))
            state.setdefault(f"{match[1]}.running_var", torch.full_like(tensor, 1 - eps))


def _is_resnext(state: Mapping[str, Tensor]) -> bool:
    inner = state.get("fpn.C2.0.conv2.weight")
    return inner is not None and inner.ndim == 4 and inner.shape[0] != inner.shape[1]


def _numbers(state: dict[str, Tensor], key: str) -> tuple[float, ...]:
    """Takes out a number per channel, in RGB. They are near their decimals of four digits."""
    tensor = state.pop(key, None)
    if tensor is None:
        return ()
    return tuple(round(number, 4) for number in tensor.flatten().tolist()[::-1])


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))
