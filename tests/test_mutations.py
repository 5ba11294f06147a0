"""The bounds of comparison.py bite: each change of the arithmetic breaks one of them."""

import pytest
import torch
import torch.nn.functional as F
from comparison import Case, build_model
from torch import nn

import detections
import model as modellib
import utils


@pytest.fixture(scope="module")
def model(small_h5):
    return build_model("small", small_h5)


def wrap(patch, owner, name, change):
    """Replaces a function by change(function)."""
    patch.setattr(owner, name, change(getattr(owner, name)))


def crops_half_a_pixel_off(patch, model):
    def change(crop):
        return lambda feature, boxes, *rest: crop(
            feature, boxes + 0.5 / (feature.shape[2] - 1), *rest
        )

    wrap(patch, modellib, "crop_and_resize", change)


def crops_of_bin_centres(patch, model):
    """RoIAlign as in the paper, with one sample in the middle of each bin."""

    def change(crop):
        def centred(feature, boxes, index, height, width):
            (y1, x1, y2, x2), sizes = boxes.T, (height, width)
            dy, dx = ((e - s) / (2 * n) for s, e, n in zip((y1, x1), (y2, x2), sizes, strict=True))
            return crop(feature, boxes + torch.stack([dy, dx, -dy, -dx], 1), index, *sizes)

        return centred

    wrap(patch, modellib, "crop_and_resize", change)


def levels_rounded_down(patch, model):
    patch.setattr(model.config, "ROI_LEVEL_OFFSET", 0.0)


def anchors_half_a_pixel_off(patch, model):
    wrap(patch, model, "get_anchors", lambda get: lambda shape: get(shape) + 0.5 / 255)


def anchors_over_the_sides(patch, model):
    """Divided by the sides instead of the sides less one."""
    wrap(patch, model, "get_anchors", lambda get: lambda shape: get(shape) * (255 / 256))


def std_dev_of_the_head_swapped(patch, model):
    patch.setattr(model.config, "BBOX_STD_DEV", (0.2, 0.2, 0.1, 0.1))


def std_dev_of_the_rpn_swapped(patch, model):
    patch.setattr(model.config, "RPN_BBOX_STD_DEV", (0.2, 0.2, 0.1, 0.1))


def deltas_of_x_and_y_swapped(patch, model):
    def change(apply):
        return lambda boxes, deltas, limit: apply(boxes, deltas[:, [1, 0, 3, 2]], limit)

    wrap(patch, utils, "apply_box_deltas", change)


def proposals_not_clipped(patch, model):
    def change(clip):  # to a region of each image; detections, to a window of each box
        return lambda boxes, window: boxes if window.dim() == 1 else clip(boxes, window)

    wrap(patch, utils, "clip_boxes", change)


def detections_not_clipped(patch, model):
    def change(clip):
        return lambda boxes, window: clip(boxes, window) if window.dim() == 1 else boxes

    wrap(patch, utils, "clip_boxes", change)


def eps_of_torch(patch, model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            patch.setattr(module, "eps", 1e-5)


def eps_of_torch_in_the_classifier(patch, model):
    patch.setattr(model.classifier.bn2, "eps", 1e-5)


def eps_of_torch_in_the_mask_head(patch, model):
    for norm in (model.mask.bn1, model.mask.bn2, model.mask.bn3, model.mask.bn4):
        patch.setattr(norm, "eps", 1e-5)


def mean_pixel_a_tenth_of_a_level_off(patch, model):
    wrap(patch, model, "normalize", lambda normalize: lambda images: normalize(images) - 0.1)


def blue_before_red(patch, model):
    wrap(patch, model, "normalize", lambda normalize: lambda images: normalize(images.flip(1)))


def padding_of_the_mean(patch, model):
    """Pads with what becomes zero, instead of zeros from which the mean is subtracted."""

    def change(normalize):
        def normalized(images):
            x = normalize(images)
            x[:, :, :28] = x[:, :, 228:] = 0
            return x

        return normalized

    wrap(patch, model, "normalize", change)


def pool_padded_on_both_sides(patch, model):
    patch.setattr(model.fpn.C1[3], "padding", 1)
    patch.setattr(model.fpn.C1[3], "ceil_mode", False)


def stride_in_the_3x3_convolution(patch, model):
    for module in model.modules():
        if isinstance(module, modellib.Bottleneck) and module.conv1.stride == (2, 2):
            patch.setattr(module.conv1, "stride", (1, 1))
            patch.setattr(module.conv2, "stride", (2, 2))


def pyramid_interpolated(patch, model):
    """From level to level by two linear functions instead of the nearest cell."""
    interpolate = F.interpolate
    patch.setattr(
        F,
        "interpolate",
        lambda x, scale_factor: interpolate(x, scale_factor=2.0, mode="bilinear"),
    )


def pyramid_in_half_precision(patch, model):
    def forward(*images):
        return tuple(x.half().float() for x in modellib.FPN.forward(model.fpn, *images))

    patch.setattr(model.fpn, "forward", forward)


def proposals_suppressed_from_0_71(patch, model):
    patch.setattr(model.config, "RPN_NMS_THRESHOLD", 0.71)


def detections_suppressed_from_0_31(patch, model):
    patch.setattr(model.config, "DETECTION_NMS_THRESHOLD", 0.31)


def boxes_a_pixel_larger_in_nms(patch, model):
    def change(nms):
        one = torch.tensor([0, 0, 1, 1]) / 255
        return lambda boxes, *rest: nms(boxes + one, *rest)

    wrap(patch, modellib, "nms", change)


def nms_across_classes(patch, model):
    def change(nms):
        return lambda boxes, scores, group, *rest: nms(boxes, scores, 0 * group, *rest)

    wrap(patch, detections, "batched_nms", change)


def deltas_of_the_next_class(patch, model):
    def change(forward):
        def rolled(*arguments):
            logits, deltas = forward(*arguments)
            return logits, deltas.roll(1, dims=1)

        return rolled

    wrap(patch, model.classifier, "forward", change)


def one_proposal_less(patch, model):
    patch.setattr(model.config, "POST_NMS_ROIS_INFERENCE", 999)


def a_thousand_anchors_before_nms(patch, model):
    patch.setattr(model.config, "PRE_NMS_LIMIT", 1000)


def a_higher_confidence(patch, model):
    patch.setattr(model.config, "DETECTION_MIN_CONFIDENCE", 0.8)


def masks_from_0_52(patch, model):
    def change(paste):
        return lambda mask, *size: paste(mask - 0.02, *size)

    wrap(patch, utils, "paste_mask", change)


def masks_half_a_cell_off(patch, model):
    def change(paste):
        return lambda mask, *size: paste(mask.roll(1, 1) / 2 + mask / 2, *size)

    wrap(patch, utils, "paste_mask", change)


MUTATIONS = [
    value
    for value in list(globals().values())
    if getattr(value, "__code__", None) and value.__code__.co_varnames[:2] == ("patch", "model")
]


def broken(model):
    """The first bound that does not hold, in words."""
    try:
        differences = Case(model, "synth").all()
        return next((str(difference) for difference in differences if not difference.holds), None)
    except RuntimeError as error:  # of pasting masks outside of the image
        return str(error)


def test_every_bound_holds_without_a_change(model):
    assert broken(model) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_change_of_arithmetic_breaks_a_bound(model, monkeypatch, mutation):
    mutation(monkeypatch, model)
    bound = broken(model)
    assert bound
    print(f"{mutation.__name__}: {bound}")
