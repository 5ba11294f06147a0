"""The operators beside torchvision's, on two CPU threads: `python benchmarks/ops.py`.

Each row runs both in turn and compares the medians. The boxes of nms are clustered like proposals,
and both have to keep the same ones. crop_and_resize and roi_align(sampling_ratio=1) take as many
samples, one per bin, at slightly different places. Both roi_aligns pool the same boxes from the
same pyramid, and have to agree; the last rows are on one thread.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor

from nms import is_compiled, nms
from roialign import crop_and_resize, roi_align

IOU_THRESHOLD = 0.7
CHANNELS, HEIGHT, WIDTH, ROIS, POOL = 256, 200, 272, 1000, 7
IMAGE_HEIGHT, IMAGE_WIDTH, STRIDES = 800, 1216, (4, 8, 16, 32)


def clustered_boxes(count: int) -> tuple[Tensor, Tensor]:
    """Boxes (y1, x1, y2, x2) in pixels around one object per 20 boxes, and scores."""
    objects = torch.randint(count // 20, (count,))
    centre = torch.rand(count // 20, 2)[objects] * torch.tensor([800.0, 1000.0])
    size = (16 + 240 * torch.rand(count // 20, 2))[objects]
    centre += 0.1 * size * torch.randn(count, 2)
    size *= torch.exp(0.1 * torch.randn(count, 2))
    return torch.cat([centre - size / 2, centre + size / 2], dim=1), torch.rand(count)


def report(
    name: str, rounds: int, ours: Callable[[], object], theirs: Callable[[], object]
) -> None:
    """Prints the medians of both, called in turn; the first round only warms up."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for function, milliseconds in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            function()
            milliseconds.append(1e3 * (time.perf_counter() - start))
    own, other = (statistics.median(milliseconds[1:]) for milliseconds in times)
    print(f"| {name} | {own:.2f} | {other:.2f} | {other / own:.1f} |", flush=True)


def compare_nms(count: int, rounds: int) -> None:
    boxes, scores = clustered_boxes(count)
    xyxy = boxes[:, [1, 0, 3, 2]].contiguous()
    ours = partial(nms, boxes, scores, IOU_THRESHOLD)
    theirs = partial(torchvision.ops.nms, xyxy, scores, IOU_THRESHOLD)
    keep = ours()
    assert torch.equal(keep, theirs()), "torchvision keeps other boxes"
    report(f"nms, {count:,} boxes, {len(keep):,} kept", rounds, ours, theirs)


def compare_crops(layout: torch.memory_format, rounds: int = 11) -> None:
    """torchvision gets contiguous tensors, which are its best case."""
    centre, size = torch.rand(ROIS, 2), torch.exp(3.2 * torch.rand(ROIS, 2) - 3.7)
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1).clamp(0, 1)
    index = torch.zeros(ROIS, dtype=torch.int64)
    pixels = boxes[:, [1, 0, 3, 2]] * torch.tensor([WIDTH - 1, HEIGHT - 1, WIDTH - 1, HEIGHT - 1])
    rois = torch.cat([index.unsqueeze(1), pixels], dim=1)
    image = torch.randn(1, CHANNELS, HEIGHT, WIDTH, requires_grad=True)
    own_image = image.detach().to(memory_format=layout).requires_grad_()

    ours = partial(crop_and_resize, own_image, boxes, index, POOL, POOL)
    theirs = partial(torchvision.ops.roi_align, image, rois, POOL, sampling_ratio=1)
    name = f"{str(layout).removeprefix('torch.')}, {ROIS} x {CHANNELS} x {POOL} x {POOL}"
    with torch.no_grad():
        report(f"crop_and_resize forward, {name}", rounds, ours, theirs)
    crops, aligned = ours(), theirs()
    grad = torch.randn_like(aligned)
    our_grad = partial(torch.autograd.grad, crops, own_image, grad.to(memory_format=layout), True)
    their_grad = partial(torch.autograd.grad, aligned, image, grad, True)
    report(f"crop_and_resize backward, {name}", rounds, our_grad, their_grad)


def pyramid_boxes(count: int) -> list[Tensor]:
    """Boxes of 15 to 730 pixels in the cells of their level, by the rule of the FPN paper."""
    centre = torch.rand(count, 2) * torch.tensor([IMAGE_HEIGHT, IMAGE_WIDTH])
    size = torch.exp(3.9 * torch.rand(count, 1) + 2.7) * torch.exp(0.4 * torch.randn(count, 2))
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([IMAGE_HEIGHT, IMAGE_WIDTH] * 2))
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    level = (2 + torch.log2(area.sqrt() / 224)).floor().clamp(0, 3)
    return [boxes[level == k] / stride for k, stride in enumerate(STRIDES)]


@torch.no_grad()
def compare_align(layout: torch.memory_format, rounds: int = 11) -> None:
    """torchvision gets contiguous tensors, which are its best case."""
    sides = [(IMAGE_HEIGHT // stride, IMAGE_WIDTH // stride) for stride in STRIDES]
    levels = [torch.randn(1, CHANNELS, *side) for side in sides]
    own_levels = [level.to(memory_format=layout) for level in levels]
    for count, pool in ((ROIS, POOL), (100, 14)):
        boxes = pyramid_boxes(count)
        index = [torch.zeros(len(members), dtype=torch.int64) for members in boxes]
        rois = [
            torch.cat([torch.zeros(len(members), 1), members[:, [1, 0, 3, 2]]], dim=1)
            for members in boxes
        ]
        for ratio, aligned in ((2, False), (0, True)):
            our_call = partial(
                roi_align, height=pool, width=pool, sampling_ratio=ratio, aligned=aligned
            )
            their_call = partial(
                torchvision.ops.roi_align, output_size=pool, sampling_ratio=ratio, aligned=aligned
            )
            ours = partial(lambda *each: list(map(*each)), our_call, own_levels, boxes, index)
            theirs = partial(lambda *each: list(map(*each)), their_call, levels, rois)
            for own, other in zip(ours(), theirs(), strict=True):
                torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5, check_stride=False)
            name = f"{str(layout).removeprefix('torch.')}, {count} x {CHANNELS} x {pool} x {pool}"
            samples = f"{ratio} x {ratio}" if ratio else "adaptive"
            report(f"roi_align forward, {name}, {samples} samples", rounds, ours, theirs)


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {is_compiled()=}\n")
    print("| operator | here, ms | torchvision, ms | ratio |\n| --- | ---: | ---: | ---: |")
    compare_nms(1_000, rounds=51)
    compare_nms(6_000, rounds=21)
    compare_nms(50_000, rounds=3)
    compare_crops(torch.contiguous_format)
    compare_crops(torch.channels_last)
    compare_align(torch.contiguous_format, rounds=5)
    compare_align(torch.channels_last)
    torch.set_num_threads(1)
    compare_align(torch.channels_last)


if __name__ == "__main__":
    main()
