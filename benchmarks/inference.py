"""Seconds and memory of detection in one 1024 x 1024 image, beside torchvision's Mask R-CNN.

    python benchmarks/inference.py [--runs 7] [--threads 2]

Both networks have a ResNet-101-FPN, 81 classes, 1000 proposals and 100 detections. Ours has the
deterministic weights of the tests, torchvision's has random ones. The runs alternate, so that a
machine that slows down slows down both. Peak memory is that of a process of its own for each.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import keras_weights  # noqa: E402 - of the tests
import reference_inputs  # noqa: E402

import model as modellib  # noqa: E402
import utils  # noqa: E402
from coco import CocoConfig  # noqa: E402


def build_ours() -> modellib.MaskRCNN:
    model = modellib.MaskRCNN(CocoConfig(DETECTION_MIN_CONFIDENCE=0.0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "coco.h5")
        keras_weights.write_h5("coco", path)
        model.load_weights(path, verbose=False)
    return model.eval()


def build_torchvision() -> torch.nn.Module:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet101", weights=None)
    for name, norm in backbone.named_modules():
        if name.endswith("bn3"):  # keeps the activations of 33 random blocks finite
            norm.weight.fill_(0.2)
    sizes = {"min_size": 1024, "max_size": 1024}
    return MaskRCNN(backbone, 81, **sizes, box_score_thresh=0.0).eval()


def make_run(name: str) -> Callable[[], int]:
    """A function that detects in one image and returns the number of objects."""
    image = reference_inputs.synthetic_image(1024, 1024)
    if name == "torchvision":
        rival = build_torchvision()
        tensor = torch.from_numpy(image).permute(2, 0, 1) / 255

        def run() -> int:
            with torch.inference_mode():
                result = rival([tensor])[0]
                # As ours: masks thresholded, and in numpy.
                return len((result["masks"][:, 0] >= 0.5).numpy())
    else:
        ours = build_ours()

        def run() -> int:
            return ours.detect([image])[0]["masks"].shape[2]

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
    rpn = modellib.RPNOutput(
        *(torch.cat(x, dim=1) for x in zip(*map(model.rpn, [*features, p6]), strict=True))
    )
    lap("rpn")
    anchors = model.get_anchors(shape)
    proposals = modellib.proposal_layer(rpn, anchors, config.POST_NMS_ROIS_INFERENCE, config)
    lap("proposals")
    logits, deltas = model.classifier(features, proposals, shape)
    probs = logits.softmax(dim=1)
    detections = modellib.refine_detections(proposals, probs, deltas, windows, config)
    lap("heads")
    rois = modellib.Rois(detections.boxes, detections.image_index)
    masks = model.mask(features, rois, detections.class_ids, shape).sigmoid()
    lap("masks")
    prediction = modellib.Prediction(rpn, proposals, probs, deltas, detections, masks)
    modellib.unmold_detections(prediction, 0, image.shape, windows[0], "full")
    lap("paste")
    return seconds


def peak_gigabytes(name: str, threads: int) -> float:
    command = [sys.executable, __file__, "--peak", name, "--threads", str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def large_image_peak() -> None:
    """Peak memory of 100 detections in 6000 x 4000 pixels as run-length codes."""
    model = build_ours()
    image = utils.resize(reference_inputs.synthetic_image(400, 600), (4000, 6000)).astype(np.uint8)
    count = len(model.detect([image], masks="rle")[0]["masks"])
    print(f"{count} detections in 6000 x 4000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=["ours", "torchvision", "large"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        if args.peak == "large":
            large_image_peak()
        else:
            make_run(args.peak)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return

    names = ("ours", "torchvision")
    # First, since a process counts the memory of the one that started it.
    peaks = {name: peak_gigabytes(name, args.threads) for name in (*names, "large")}
    runs = {name: make_run(name) for name in names}
    counts = {name: run() for name, run in runs.items()}  # warm
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.runs):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(theirs / ours for ours, theirs in zip(*seconds.values(), strict=True))
    print(f"torch {torch.__version__}, {args.threads} threads, {args.runs} alternating runs\n")
    print("| | seconds (min .. max) | detections | peak GB |\n| --- | --- | --- | --- |")
    for name, values in seconds.items():
        median = f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"
        print(f"| {name} | {median} | {counts[name]} | {peaks[name]:.2f} |")
    print(f"\ntorchvision / ours, median of the pairs: {ratio:.2f}")

    image = reference_inputs.synthetic_image(1024, 1024)
    model = build_ours()
    laps = [stage_seconds(model, image) for _ in range(args.runs + 1)][1:]
    medians = {stage: statistics.median(lap[stage] for lap in laps) for stage in laps[0]}
    total = sum(medians.values())
    print("\n| stage | seconds | share |\n| --- | --- | --- |")
    for stage, value in medians.items():
        print(f"| {stage} | {value:.3f} | {value / total:.1%} |")
    print(f'\n100 detections in 6000 x 4000 pixels, masks="rle": peak {peaks["large"]:.2f} GB')


if __name__ == "__main__":
    main()
