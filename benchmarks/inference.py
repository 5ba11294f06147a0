"""Seconds and memory of detection in one 1024 x 1024 image, beside torchvision's Mask R-CNN.

    python benchmarks/inference.py [--backbone resnet101] [--runs 7] [--threads 1 2]
    python benchmarks/inference.py --preset torchvision_v2 [--images FOLDER]

All networks have a ResNet-FPN, 81 classes, 1000 proposals and 100 detections. Ours, with and
without CPU_WINOGRAD, has the deterministic weights of the tests, torchvision's has random ones. The
runs alternate, so that a machine that slows down slows down all. GFLOP/s count the operations of
the definition, of which Winograd needs a quarter; that of a product of 2048 x 2048 matrices in the
same run is the scale. Peak memory is that of a process of its own for each.

With --preset both networks are torchvision's maskrcnn_resnet50_fpn or _v2, have the same weights,
and give the same detections in the same photographs: those of a folder, or three of scikit-image.
"""

import argparse
import contextlib
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import family_weights  # noqa: E402 - of the tests
import keras_weights  # noqa: E402
import reference_inputs  # noqa: E402

import fused  # noqa: E402
import model as modellib  # noqa: E402
import utils  # noqa: E402
from coco import CocoConfig  # noqa: E402

NAMES = ("ours", "plain", "torchvision")


def build_ours(backbone: str = "resnet101", fast: bool = True) -> modellib.MaskRCNN:
    config = CocoConfig(DETECTION_MIN_CONFIDENCE=0.0, BACKBONE=backbone, CPU_WINOGRAD=fast)
    model = modellib.MaskRCNN(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "coco.h5")
        keras_weights.write_h5("coco", path)
        # A ResNet-50 has only the first blocks of C4.
        exclude = [r"fpn\.C4\.([6-9]|\d\d)\..*"] if backbone == "resnet50" else []
        model.load_weights(path, verbose=False, exclude=exclude)
    return model.eval()


def build_torchvision(backbone: str) -> torch.nn.Module:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    features = resnet_fpn_backbone(backbone_name=backbone, weights=None)
    for name, norm in features.named_modules():
        if name.endswith("bn3"):  # keeps the activations of 33 random blocks finite
            norm.weight.fill_(0.2)
    sizes = {"min_size": 1024, "max_size": 1024}
    return MaskRCNN(features, 81, **sizes, box_score_thresh=0.0).eval()


def read_images(args: argparse.Namespace) -> list[np.ndarray]:
    if not args.preset:
        return [reference_inputs.synthetic_image(1024, 1024)]
    if args.images:
        paths = sorted(args.images.glob("*.jpg"))
        if not paths:
            raise SystemExit(f"--images must be a folder of .jpg files, got {args.images}")
        return [utils.load_image(path) for path in paths]
    return [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]


def build_pair(preset: str, fast: bool) -> tuple[torch.nn.Module, modellib.MaskRCNN]:
    """torchvision's own network, and ours with its weights."""
    rival = family_weights.sensible_torchvision("v2" if preset == "torchvision_v2" else "v1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "torchvision.pth")
        torch.save(rival.state_dict(), path)
        return rival, modellib.MaskRCNN.from_weights(path, CPU_WINOGRAD=fast)


def make_run(name: str, args: argparse.Namespace) -> Callable[[], int]:
    """A function that detects in the images, one by one, and returns the number of objects."""
    images = read_images(args)
    if name == "torchvision":
        rival = (
            build_pair(args.preset, fast=True)[0]
            if args.preset
            else build_torchvision(args.backbone)
        )
        tensors = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in images]

        def run() -> int:
            with torch.inference_mode():
                results = [rival([tensor])[0] for tensor in tensors]
                # As ours: masks thresholded, and in numpy.
                return sum(len((r["masks"][:, 0] >= 0.5).numpy()) for r in results)
    else:
        fast = name == "ours"
        ours = build_pair(args.preset, fast)[1] if args.preset else build_ours(args.backbone, fast)

        def run() -> int:
            return sum(ours.detect([image])[0]["masks"].shape[2] for image in images)

    return run


@torch.no_grad()
def stage_seconds(model: modellib.MaskRCNN, image: np.ndarray) -> dict[str, float]:
    """One run of detect(), taken apart."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[stage], start = now - start, now

    images, windows = model.mold_inputs([image])
    shape, config = images.shape[2:], model.config
    lap("resize")
    *features, p6 = model.fpn(model.normalize(images))
    lap("fpn")
    rpn, proposals = model.propose([*features, p6], shape, windows)
    lap("proposals")
    logits, deltas = model.classifier(features, proposals, shape)
    probs = logits.softmax(dim=1)
    detections = modellib.refine_detections(proposals, probs, deltas, windows, config)
    lap("heads")
    rois = modellib.Rois(detections.boxes, detections.image_index)
    masks = model.mask(features, rois, detections.class_ids, shape).sigmoid()
    lap("masks")
    prediction = modellib.Prediction(rpn, proposals, probs, deltas, detections, masks)
    modellib.unmold_detections(prediction, 0, image.shape, windows[0], "full", config)
    lap("paste")
    return seconds


def peak_gigabytes(name: str, args: argparse.Namespace, threads: int) -> float:
    command = [sys.executable, __file__, "--peak", name, "--backbone", args.backbone]
    command += ["--threads", str(threads)]
    command += ["--preset", args.preset] if args.preset else []
    command += ["--images", str(args.images)] if args.images else []
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def large_image_peak() -> None:
    """Peak memory of 100 detections in 6000 x 4000 pixels as run-length codes."""
    model = build_ours()
    image = utils.resize(reference_inputs.synthetic_image(400, 600), (4000, 6000)).astype(np.uint8)
    count = len(model.detect([image], masks="rle")[0]["masks"])
    print(f"{count} detections in 6000 x 4000")


def compare(args: argparse.Namespace, threads: int) -> None:
    """Prints the tables for a number of threads."""
    torch.set_num_threads(threads)
    what, rounds = args.preset or args.backbone, args.runs
    print(f"\n{what}, {threads} threads, medians of {rounds} alternating runs\n")
    # First, since a process counts the memory of the one that started it.
    peaks = {name: peak_gigabytes(name, args, threads) for name in NAMES}
    runs: dict[str, Callable[[], Any]] = {name: make_run(name, args) for name in NAMES}
    counts = {name: run() for name, run in runs.items()}  # warm
    work = {}
    for name in ("plain", "torchvision"):
        with FlopCounterMode(display=False) as counter:
            runs[name]()
        work[name] = counter.get_total_flops()
    work["ours"] = work["plain"]
    left, right = torch.randn(2, 2048, 2048)
    runs["GEMM"], work["GEMM"] = lambda: left @ right, 2 * 2048**3

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print("| | seconds (min .. max) | of ours | detections | GFLOP/s | peak GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in NAMES:
        values = seconds[name]
        median = statistics.median(values)
        pairs = [value / ours for ours, value in zip(seconds["ours"], values, strict=True)]
        cells = [name, f"{median:.2f} ({min(values):.2f} .. {max(values):.2f})"]
        cells += [f"{statistics.median(pairs):.2f}", str(counts[name])]
        cells += [f"{work[name] / median / 1e9:.0f}", f"{peaks[name]:.2f}"]
        print("| " + " | ".join(cells) + " |")
    print(f"\nGEMM: {work['GEMM'] / statistics.median(seconds['GEMM']) / 1e9:.0f} GFLOP/s")


def compare_stages(backbone: str, threads: int, rounds: int) -> None:
    """Prints where the time goes."""
    torch.set_num_threads(threads)
    image = reference_inputs.synthetic_image(1024, 1024)
    models = {"ours": build_ours(backbone), "plain": build_ours(backbone, fast=False)}
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            fast = fused.inference(overwrite=True) if name == "ours" else contextlib.nullcontext()
            with fast:
                laps[name].append(stage_seconds(model, image))
    print(f"\n{backbone}, {threads} threads\n\n| stage | ours | plain |\n| --- | --- | --- |")
    for stage in laps["ours"][0]:
        medians = [statistics.median(lap[stage] for lap in laps[name][1:]) for name in models]
        print(f"| {stage} | " + " | ".join(f"{value:.3f}" for value in medians) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=["resnet50", "resnet101"], default="resnet101")
    text = "compare with torchvision's own network, with its weights"
    parser.add_argument("--preset", choices=["torchvision", "torchvision_v2"], help=text)
    parser.add_argument("--images", type=Path, help="with --preset: a folder of .jpg files")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--peak", choices=[*NAMES, "large"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        torch.set_num_threads(args.threads[0])
        if args.peak == "large":
            large_image_peak()
        else:
            make_run(args.peak, args)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return

    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    for threads in args.threads:
        compare(args, threads)
        gc.collect()
    if args.preset:
        return
    large = peak_gigabytes("large", args, args.threads[-1])
    compare_stages(args.backbone, args.threads[-1], args.runs)
    print(f'\n100 detections in 6000 x 4000 pixels, masks="rle": peak {large:.2f} GB')


if __name__ == "__main__":
    main()
