"""3 x 3 convolutions of a ResNet-FPN Mask R-CNN beside F.conv2d.

    python benchmarks/convolution.py [--threads 1 2] [--sizes 512 800 1024] [--rounds 11]

Winograd with bias and ReLU against F.conv2d with bias and relu_, channels_last and contiguous, each
in turn, and the product of two matrices of 1024 x 1024 in the same rounds for scale. The ratio is
the median over the rounds of the better F.conv2d over Winograd. GFLOP/s count the 18 * C * K
operations per pixel of the definition: Winograd needs a quarter of them, and may exceed the GEMM.

For another processor's vectors, set for all of them: ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from winograd import conv3x3, is_compiled, is_faster, transform_weight

# Channels in and out of a layer, and the image sides per pixel of its map.
LAYERS = {
    "C2": (64, 64, 4),
    "C3": (128, 128, 8),
    "C4": (256, 256, 16),
    "C5": (512, 512, 32),
    "P2": (256, 256, 4),
    "P3": (256, 256, 8),
    "P4": (256, 256, 16),
    "P5": (256, 256, 32),
    "RPN of P2": (256, 512, 4),
    "RPN of P3": (256, 512, 8),
    "RPN of P4": (256, 512, 16),
    "RPN of P5": (256, 512, 32),
    "RPN of P6": (256, 512, 64),
}
MASKS = (256, 256, 14, 100)  # channels in and out, side, rois


def measure(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, all of them in turn; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def compare(name: str, channels: int, outputs: int, side: int, batch: int, rounds: int) -> None:
    contiguous = torch.randn(batch, channels, side, side).relu_()
    weight = torch.randn(outputs, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
    bias = torch.randn(outputs)
    last = contiguous.to(memory_format=torch.channels_last)
    weight_last = weight.to(memory_format=torch.channels_last)
    transformed = transform_weight(weight)
    left, right = torch.randn(2, 1024, 1024)
    calls = {
        "winograd": lambda: conv3x3(last, transformed, bias, relu=True),
        "last": lambda: F.conv2d(last, weight_last, bias, padding=1).relu_(),
        "contiguous": lambda: F.conv2d(contiguous, weight, bias, padding=1).relu_(),
        "gemm": lambda: left @ right,
    }
    seconds = measure(calls, rounds)
    ours = seconds["winograd"]
    best = min(("last", "contiguous"), key=lambda layout: statistics.median(seconds[layout]))
    ratio = statistics.median(b / a for a, b in zip(ours, seconds[best], strict=True))
    work = {"winograd": 18 * channels * outputs * side**2 * batch, "gemm": 2 * 1024**3}
    work[best] = work["winograd"]
    times, rates = [], []
    for call in ("winograd", best, "gemm"):
        median = statistics.median(seconds[call])
        times.append(f"{1e3 * median:.2f}")
        rates.append(f"{work[call] / median / 1e9:.0f}")
    shape = f"{batch} x {channels} -> {outputs}, {side} x {side}"
    used = "yes" if is_faster(last.shape, weight.shape) else "no"
    row = [name, shape, *times[:2], best, f"{ratio:.2f}", *rates, used]
    print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 800, 1024])
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    torch.manual_seed(0)
    capability = os.environ.get("ATEN_CPU_CAPABILITY", torch.backends.cpu.get_cpu_capability())
    print(f"torch {torch.__version__}, {capability}, {is_compiled()=}")
    names = ["layer", "shape", "ms", "F.conv2d, ms", "its layout", "ratio"]
    names += ["GFLOP/s", "F.conv2d", "GEMM", "is_faster"]
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} threads, medians of {args.rounds}\n")
        print("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|")
        with torch.inference_mode():
            for size in args.sizes:
                for layer, (channels, outputs, stride) in LAYERS.items():
                    side = -(-size // stride)
                    compare(f"{layer}, {size}", channels, outputs, side, 1, args.rounds)
            channels, outputs, side, rois = MASKS
            compare(f"mask head, {rois} rois", channels, outputs, side, rois, args.rounds)


if __name__ == "__main__":
    main()
