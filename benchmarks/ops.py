"""The operators beside torchvision's, on two CPU threads: `python benchmarks/ops.py`.

Each row runs both in turn and compares the medians. The boxes of nms are clustered like proposals,
and both have to keep the same ones. crop_and_resize and roi_align(sampling_ratio=1) take as many
samples, one per bin, at slightly different places.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor

from nms import is_compiled, nms
from roialign import crop_and_resize

IOU_THRESHOLD = 0.7
CHANNELS, HEIGHT, WIDTH, ROIS, POOL = 256, 200, 272, 1000, 7


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


if __name__ == "__main__":
    main()
