"""The operators beside torchvision's, on two CPU threads: `python benchmarks/ops.py`.

Each row runs both in turn and compares the medians. The boxes of nms are clustered like proposals,
and both must keep the same ones. crop_and_resize and roi_align(sampling_ratio=1) take as many
samples, one per bin, at slightly different places.
"""

import statistics
import time
from collections.abc import Callable

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


def median_times(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if round_ > 0:  # the first one warms up
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def report(name: str, ours: Callable[[], object], theirs: Callable[[], object], n: int) -> None:
    own, other = median_times([ours, theirs], n)
    print(f"| {name} | {own * 1e3:.2f} | {other * 1e3:.2f} | {other / own:.1f} |")


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {is_compiled()=}\n")
    print("| operator | here, ms | torchvision, ms | ratio |\n| --- | --- | --- | --- |")

    for count, repeats in ((1_000, 51), (6_000, 21), (50_000, 3)):
        boxes, scores = clustered_boxes(count)
        xyxy = boxes[:, [1, 0, 3, 2]].contiguous()
        keep = nms(boxes, scores, IOU_THRESHOLD)
        assert torch.equal(keep, torchvision.ops.nms(xyxy, scores, IOU_THRESHOLD))
        report(
            f"nms, {count:,} boxes, {len(keep):,} kept",
            lambda b=boxes, s=scores: nms(b, s, IOU_THRESHOLD),  # type: ignore[misc]
            lambda b=xyxy, s=scores: torchvision.ops.nms(b, s, IOU_THRESHOLD),  # type: ignore[misc]
            repeats,
        )

    centre, size = torch.rand(ROIS, 2), torch.exp(3.2 * torch.rand(ROIS, 2) - 3.7)
    unit = torch.cat([centre - size / 2, centre + size / 2], dim=1).clamp(0, 1)
    index = torch.zeros(ROIS, dtype=torch.int64)
    scale = torch.tensor([WIDTH - 1, HEIGHT - 1, WIDTH - 1, HEIGHT - 1])
    pixels = torch.cat([index[:, None], unit[:, [1, 0, 3, 2]] * scale], dim=1)

    image = torch.randn(1, CHANNELS, HEIGHT, WIDTH, requires_grad=True)
    aligned = torchvision.ops.roi_align(image, pixels, POOL, sampling_ratio=1)
    grad = torch.randn_like(aligned)
    for layout in (torch.contiguous_format, torch.channels_last):
        name = f"{str(layout).removeprefix('torch.')}, {ROIS} x {CHANNELS} x {POOL} x {POOL}"
        own_image = image.detach().contiguous(memory_format=layout).requires_grad_()
        own_grad = grad.contiguous(memory_format=layout)
        crops = crop_and_resize(own_image, unit, index, POOL, POOL)
        with torch.no_grad():
            report(
                f"crop_and_resize forward, {name}",
                lambda i=own_image: crop_and_resize(i, unit, index, POOL, POOL),  # type: ignore[misc]
                lambda: torchvision.ops.roi_align(image, pixels, POOL, sampling_ratio=1),
                11,
            )
        report(
            f"crop_and_resize backward, {name}",
            lambda i=own_image, c=crops, g=own_grad: torch.autograd.grad(c, i, g, True),  # type: ignore[misc]
            lambda: torch.autograd.grad(aligned, image, grad, retain_graph=True),
            11,
        )


if __name__ == "__main__":
    main()
