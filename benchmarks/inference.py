"""Seconds for an image and memory of detection, beside torchvision's Mask R-CNN.

    python benchmarks/inference.py [--backbone resnet101] [--size 1024] [--batch 1] [--threads 1 2]
    python benchmarks/inference.py --preset torchvision_v2 [--images FOLDER]

By default it is one image of 1024 x 1024 pixels. All networks have a ResNet-FPN, 81 classes, 1000
proposals and 100 detections. Ours, with and without CPU_WINOGRAD, has the deterministic weights of
the tests, torchvision's has random ones. The runs alternate, so that a machine that slows down
slows down all. GFLOP/s count the operations of the definition, of which Winograd needs a quarter;
that of a product of 2048 x 2048 matrices in the same run is the scale. Peak memory is that of a
process of its own for each.

With --preset both networks are torchvision's maskrcnn_resnet50_fpn or _v2, have the same weights,
and give the same detections in the same photographs: those of a folder, or three of scikit-image.

--bfloat16 adds a row for CPU_PRECISION = "bfloat16", which the processor must have, and --onnx two
for ONNX Runtime: ours, as weights.py export writes it, and torchvision's network. The peak memory
of these two is that of their export.
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

import export  # noqa: E402
import fused  # noqa: E402
import model as modellib  # noqa: E402
import utils  # noqa: E402
from coco import CocoConfig  # noqa: E402
from detections import unmold_detections  # noqa: E402

NAMES = ["ours", "plain", "torchvision"]


def build_ours(
    backbone: str = "resnet101", fast: bool = True, size: int = 1024, **options: Any
) -> modellib.MaskRCNN:
    options |= {"IMAGE_MIN_DIM": size, "IMAGE_MAX_DIM": size, "CPU_WINOGRAD": fast}
    config = CocoConfig(DETECTION_MIN_CONFIDENCE=0.0, BACKBONE=backbone, **options)
    model = modellib.MaskRCNN(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "coco.h5")
        keras_weights.write_h5("coco", path)
        # A ResNet-50 has only the first blocks of C4.
        exclude = [r"fpn\.C4\.([6-9]|\d\d)\..*"] if backbone == "resnet50" else []
        model.load_weights(path, verbose=False, exclude=exclude)
    return model.eval()


def build_torchvision(backbone: str, size: int) -> torch.nn.Module:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    features = resnet_fpn_backbone(backbone_name=backbone, weights=None)
    for name, norm in features.named_modules():
        if name.endswith("bn3"):  # keeps the activations of 33 random blocks finite
            norm.weight.fill_(0.2)
    sizes = {"min_size": size, "max_size": size}
    return MaskRCNN(features, 81, **sizes, box_score_thresh=0.0).eval()


def read_images(args: argparse.Namespace) -> list[np.ndarray]:
    if not args.preset:
        return [reference_inputs.synthetic_image(args.size, args.size)] * args.batch
    if args.images:
        paths = sorted(args.images.glob("*.jpg"))
        if not paths:
            raise SystemExit(f"--images must be a folder of .jpg files, got {args.images}")
        return [utils.load_image(path) for path in paths]
    return [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]


def build_pair(
    preset: str, fast: bool, **options: Any
) -> tuple[torch.nn.Module, modellib.MaskRCNN]:
    """torchvision's own network, and ours with its weights."""
    rival = family_weights.sensible_torchvision("v2" if preset == "torchvision_v2" else "v1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "torchvision.pth")
        torch.save(rival.state_dict(), path)
        return rival, modellib.MaskRCNN.from_weights(path, CPU_WINOGRAD=fast, **options)


def open_in_onnxruntime(network: torch.nn.Module, image: torch.Tensor) -> Any:
    """Ours or torchvision's network, exported; torchvision's for one image of any size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        if isinstance(network, modellib.MaskRCNN):
            export.export(network, path)
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        torch.onnx.export(
            network,
            ([image],),
            path,
            opset_version=17,
            dynamo=False,
            input_names=["image"],
            output_names=["boxes", "labels", "scores", "masks"],
            dynamic_axes={"image": {1: "height", 2: "width"}},
        )
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def make_run(name: str, args: argparse.Namespace) -> Callable[[], int]:
    """A function that detects in the images and returns the number of objects.

    Photographs one by one, else all of them as a batch.
    """
    images = read_images(args)
    batches = [[image] for image in images] if args.preset else [images]
    if name in ("torchvision", "onnxruntime"):
        if args.preset:
            rival, _ = build_pair(args.preset, fast=True)
        else:
            rival = build_torchvision(args.backbone, args.size)
        tensors = [
            [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in batch]
            for batch in batches
        ]
        if name == "onnxruntime":
            session = open_in_onnxruntime(rival, tensors[0][0])

            def run() -> int:
                found = [session.run(["masks"], {"image": x.numpy()}) for (x,) in tensors]
                return sum(len(masks[:, 0] >= 0.5) for (masks,) in found)

            return run

        def run() -> int:
            with torch.inference_mode():
                results = [result for batch in tensors for result in rival(batch)]
                # As ours: masks thresholded, and in numpy.
                return sum(len((r["masks"][:, 0] >= 0.5).numpy()) for r in results)
    else:
        fast = name not in ("plain", "exported")
        options = {"CPU_PRECISION": "bfloat16" if name == "bfloat16" else "float32"}
        if args.preset:
            _, ours = build_pair(args.preset, fast, **options)
        else:
            ours = build_ours(args.backbone, fast, args.size, IMAGES_PER_GPU=args.batch, **options)

        if name == "exported":
            from samples.onnx_detect import paste

            session, rule = open_in_onnxruntime(ours, torch.empty(0)), ours.config.MASK_PASTE

            def run() -> int:
                count = 0
                for batch in batches:
                    boxes, _, _, masks, _ = session.run(None, {"images": np.stack(batch)})
                    shape = batch[0].shape
                    count += len(
                        [paste(*one, shape, rule) for one in zip(masks, boxes, strict=True)]
                    )
                return count

            return run

        def run() -> int:
            results = [result for batch in batches for result in ours.detect(batch)]
            return sum(result["masks"].shape[2] for result in results)

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
    unmold_detections(prediction, 0, image.shape, windows[0], "full", config)
    lap("paste")
    return seconds


def peak_gigabytes(name: str, args: argparse.Namespace, threads: int) -> float:
    command = [sys.executable, __file__, "--peak", name, "--backbone", args.backbone]
    command += ["--threads", str(threads), "--size", str(args.size), "--batch", str(args.batch)]
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
    images = len(read_images(args))
    if not args.preset:
        what = f"{what}, {images} x {args.size} x {args.size}"
    print(f"\n{what}, {threads} threads, medians of {rounds} alternating runs\n")
    names = [*NAMES, "bfloat16"] if args.bfloat16 else NAMES
    if args.onnx:
        names = [*names, "exported", "onnxruntime"]
    # First, since a process counts the memory of the one that started it.
    peaks = {name: peak_gigabytes(name, args, threads) for name in names}
    runs: dict[str, Callable[[], Any]] = {name: make_run(name, args) for name in names}
    counts = {name: run() for name, run in runs.items()}  # warm
    work = {}
    for name in ("plain", "torchvision"):
        with FlopCounterMode(display=False) as counter:
            runs[name]()
        work[name] = counter.get_total_flops()
    work["ours"] = work["bfloat16"] = work["exported"] = work["plain"]
    work["onnxruntime"] = work["torchvision"]
    left, right = torch.randn(2, 2048, 2048)
    runs["GEMM"], work["GEMM"] = lambda: left @ right, 2 * 2048**3

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print("| | seconds per image (min .. max) | of ours | detections | GFLOP/s | peak GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in names:
        values = [value / images for value in seconds[name]]
        median = statistics.median(values)
        pairs = [x / ours for ours, x in zip(seconds["ours"], seconds[name], strict=True)]
        cells = [name, f"{median:.2f} ({min(values):.2f} .. {max(values):.2f})"]
        cells += [f"{statistics.median(pairs):.2f}", str(counts[name])]
        cells += [f"{work[name] / images / median / 1e9:.0f}", f"{peaks[name]:.2f}"]
        print("| " + " | ".join(cells) + " |")
    print(f"\nGEMM: {work['GEMM'] / statistics.median(seconds['GEMM']) / 1e9:.0f} GFLOP/s")


def compare_stages(backbone: str, size: int, threads: int, rounds: int) -> None:
    """Prints where the time goes."""
    torch.set_num_threads(threads)
    image = reference_inputs.synthetic_image(size, size)
    models = {
        "ours": build_ours(backbone, size=size),
        "plain": build_ours(backbone, fast=False, size=size),
    }
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            fast = fused.fast(overwrite=True) if name == "ours" else contextlib.nullcontext()
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
    parser.add_argument("--size", type=int, default=1024, help="side of the image")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--bfloat16", action="store_true", help='CPU_PRECISION = "bfloat16" too')
    text = "ours and torchvision's in ONNX Runtime too, one image at a time; needs the extra onnx"
    parser.add_argument("--onnx", action="store_true", help=text)
    parser.add_argument("--stages", action="store_true", help="also show where the time goes")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--peak",
        choices=[*NAMES, "bfloat16", "exported", "onnxruntime", "large"],
        help=argparse.SUPPRESS,
    )
    args = parser.parse_args()
    if args.onnx and args.batch > 1:
        parser.error("--onnx takes one image at a time")
    if args.preset and (args.size, args.batch) != (1024, 1):
        parser.error("--size and --batch do not go with --preset")
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
    if not args.stages:
        return
    large = peak_gigabytes("large", args, args.threads[-1])
    compare_stages(args.backbone, args.size, args.threads[-1], args.runs)
    print(f'\n100 detections in 6000 x 4000 pixels, masks="rle": peak {large:.2f} GB')


if __name__ == "__main__":
    main()
