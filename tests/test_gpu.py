"""The CUDA kernels and what is made of boxes and masks on a real GPU, beside the CPU's."""

import numpy as np
import pytest
import torch
from test_cuda import align_boxes, both_dtypes, both_layouts
from test_nms import random_boxes
from test_roialign import align_sample, sample, samplings

import utils
from nms import batched_nms, is_compiled, nms
from nms.ops import _nms as plain_nms
from roialign import crop_and_resize, roi_align
from roialign.align import _forward as plain_align
from roialign.ops import _forward as plain_forward

if not (torch.cuda.is_available() and "cuda" in is_compiled()):
    pytest.skip("there is no GPU, or no compiled CUDA kernel", allow_module_level=True)

NAN = float("nan")


@both_dtypes
@pytest.mark.parametrize("count", [0, 1, 64, 65, 1000, 100_000])
def test_nms(dtype, count):
    boxes, scores = random_boxes(count, side=4 + count)
    boxes = boxes.to(dtype)
    boxes[3::17] = NAN
    scores[5::23] = NAN
    keep = nms(boxes.cuda(), scores.cuda(), 0.3)
    assert keep.is_cuda
    assert torch.equal(keep.cpu(), nms(boxes, scores, 0.3))
    group = torch.arange(count) % 7
    keep = batched_nms(boxes.cuda(), scores.cuda(), group.cuda(), 0.3)
    assert torch.equal(keep.cpu(), batched_nms(boxes, scores, group, 0.3))


@both_dtypes
@both_layouts
@pytest.mark.parametrize("size", [(7, 7), (1, 3)])
def test_crop_and_resize(dtype, layout, size):
    image, boxes, index = sample(dtype, layout, boxes=200)
    boxes[::5, 2:] = 1
    boxes[::11, 1] = NAN
    on_gpu = image.cuda().requires_grad_()
    crops = crop_and_resize(on_gpu, boxes.cuda(), index.cuda(), *size, 0.5)
    expected = crop_and_resize(image.requires_grad_(), boxes, index, *size, 0.5)
    assert torch.equal(crops.cpu(), expected)
    assert crops.stride() == expected.stride()
    grad = torch.randn_like(expected)
    crops.backward(grad.cuda())
    expected.backward(grad)
    torch.testing.assert_close(on_gpu.grad.cpu(), image.grad, rtol=1e-5, atol=1e-5)


@both_dtypes
@both_layouts
@samplings
@pytest.mark.parametrize("size", [(7, 7), (1, 3)])
def test_roi_align(dtype, layout, sampling, size):
    features, _, _ = align_sample(dtype, layout)
    boxes, index = align_boxes(dtype)
    on_gpu = features.cuda().requires_grad_()
    crops = roi_align(on_gpu, boxes.cuda(), index.cuda(), *size, *sampling)
    expected = roi_align(features.requires_grad_(), boxes, index, *size, *sampling)
    torch.testing.assert_close(crops.cpu(), expected, rtol=1e-5, atol=2e-6)
    assert crops.stride() == expected.stride()
    by_plain_torch = plain_align(on_gpu.detach(), boxes.cuda(), index.cuda(), *size, *sampling)
    torch.testing.assert_close(by_plain_torch.cpu(), expected, rtol=1e-5, atol=2e-6)
    grad = torch.randn_like(expected)
    crops.backward(grad.cuda())
    expected.backward(grad)
    torch.testing.assert_close(on_gpu.grad.cpu(), features.grad, rtol=1e-5, atol=1e-5)


def test_plain_torch_has_the_same_bits():
    image, boxes, index = sample(boxes=200)
    boxes[::5, 2:] = 1
    crops = plain_forward(image.cuda(), boxes.cuda(), index.cuda(), 7, 7, 0.5)
    assert torch.equal(crops.cpu(), crop_and_resize(image, boxes, index, 7, 7, 0.5))
    boxes, scores = random_boxes(1000)
    assert torch.equal(plain_nms(boxes.cuda(), scores.cuda(), 0.5).cpu(), nms(boxes, scores, 0.5))


def test_index_out_of_range_is_outside():
    image, boxes, index = sample()
    index[::2] = torch.tensor([-1, 3, 2**40, -(2**40), 3, -1])
    crops = crop_and_resize(image.cuda(), boxes.cuda(), index.cuda(), 2, 2, 5.0).cpu()
    assert (crops[::2] == 5).all()
    assert torch.equal(crops[1::2], crop_and_resize(image, boxes[1::2], index[1::2], 2, 2, 5.0))
    crops = roi_align(image.cuda(), boxes.cuda(), index.cuda(), 2, 2).cpu()
    assert (crops[::2] == 0).all()


def test_autocast_computes_in_float32():
    image, boxes, index = (tensor.cuda() for tensor in sample())
    with torch.autocast("cuda", dtype=torch.float16):
        crops = crop_and_resize(image.half(), boxes, index, 3, 3)
        aligned = roi_align(image.half(), boxes, index, 3, 3)
    assert torch.equal(crops, crop_and_resize(image.half().float(), boxes, index, 3, 3))
    assert torch.equal(aligned, roi_align(image.half().float(), boxes, index, 3, 3))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
def test_opcheck():
    boxes, scores = random_boxes(70)
    torch.library.opcheck(torch.ops.nms.nms.default, (boxes.cuda(), scores.cuda(), 0.5))
    image, boxes, index = (tensor.cuda() for tensor in sample())
    arguments = (image.requires_grad_(), boxes, index, 3, 2, 0.5)
    torch.library.opcheck(torch.ops.roialign.crop_and_resize.default, arguments)
    arguments = (image, boxes, index, 3, 2, 0, True)
    torch.library.opcheck(torch.ops.roialign.roi_align.default, arguments)


def test_boxes_and_masks_of_utils():
    boxes, _ = random_boxes(50)
    overlaps = utils.compute_overlaps(boxes.cuda(), boxes.numpy())
    assert overlaps.is_cuda
    torch.testing.assert_close(overlaps.cpu(), utils.compute_overlaps(boxes, boxes))
    mask = torch.from_numpy(np.random.default_rng(3).random((28, 28))).float()
    pasted = utils.paste_mask(mask.cuda(), (0, 0, 90, 57), (90, 57))[0]
    assert (pasted.cpu() == utils.paste_mask(mask, (0, 0, 90, 57), (90, 57))[0]).all()
