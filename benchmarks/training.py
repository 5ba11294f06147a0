"""Images per second of a training step, beside torchvision's Mask R-CNN.

    python benchmarks/training.py [--backbone resnet50] [--size 512] [--batch 2] [--layers all]
    python benchmarks/training.py --images DIR --annotations FILE    # any COCO json

A step is forward, backward, gradient clipping and SGD, on a batch that is in memory: ours with
mini masks, as dataset.py makes it, torchvision's with masks at the image's size, as it wants them.
Both have the same images, backbone, pyramid, anchors, classes, frozen BatchNorm and trainable
stages, 2000 proposals after non-maximum suppression, and 200 rois per image for the heads. Random
weights propose few objects, so once the proposals are there both sample from the same 2000 boxes
around the objects: a third of the 200 are objects, as in a network that has learnt something.
What differs is the networks' own: torchvision's RPN has 256 channels, ours the reference's 512
(--rpn-channels); torchvision's RoIAlign takes four samples per bin, ours one. The steps alternate,
so that a machine that slows down slows down both.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import reference_inputs  # noqa: E402 - of the tests

import model as modellib  # noqa: E402
import utils  # noqa: E402
from config import Config  # noqa: E402
from dataset import TorchDataset, collate  # noqa: E402
from targets import build_rpn_targets, sample_rois  # noqa: E402

CLASSES = 81
# Trainable stages of torchvision's backbone, C5 first.
STAGES = {"heads": 0, "5+": 1, "4+": 2, "3+": 3, "all": 5}


class Ellipses(utils.Dataset):
    """Generated photographs, each with some ellipses."""

    def __init__(self, folder: str, count: int = 8, objects: int = 8) -> None:
        super().__init__()
        for class_id in range(1, CLASSES):
            self.add_class("ellipses", class_id, f"class {class_id}")
        rng = np.random.default_rng(0)
        for i in range(count):
            path = Path(folder, f"{i}.jpg")
            photo = utils.resize(reference_inputs.synthetic_image(120, 160), (480, 640))
            Image.fromarray(photo.astype(np.uint8)).save(path)
            # Centre, radii, class.
            shapes = rng.uniform((40, 40, 10, 10, 1), (440, 600, 90, 90, CLASSES), (objects, 5))
            self.add_image("ellipses", i, path, shapes=shapes)
        self.prepare()

    def load_mask(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        cy, cx, ry, rx, class_ids = self.image_info[image_id]["shapes"].T
        y, x = np.ogrid[:480, :640]
        masks = ((y[..., None] - cy) / ry) ** 2 + ((x[..., None] - cx) / rx) ** 2 <= 1
        return masks, class_ids.astype(np.int32)


def scale_down(network: nn.Module) -> None:
    """Keeps the activations of random residual blocks with frozen BatchNorm finite."""
    for name, norm in network.named_modules():
        if name.endswith("bn3"):
            nn.init.constant_(norm.weight, 0.2)


def boxes_around(objects: Tensor, size: int, count: int = 2000) -> Tensor:
    """Objects moved and scaled at random, [count, 4] network pixels: about half overlap well."""
    generator = torch.Generator().manual_seed(0)
    boxes = objects[torch.randint(len(objects), (count,), generator=generator)]
    extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + 0.15 * extent * torch.randn(count, 4, generator=generator)
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:] - 1), boxes[:, 2:]], dim=1)
    return boxes.clamp(0, size)


def make_ours(
    args: argparse.Namespace, config: Config, batches: list[dict[str, Any]]
) -> tuple[modellib.MaskRCNN, Callable[[int], Tensor]]:
    """The model, and a function that gives the loss of batch i."""
    torch.manual_seed(0)
    model = modellib.MaskRCNN(config)
    scale_down(model.fpn)
    model.set_trainable(args.layers)
    for part in (model.fpn, model.rpn, model.mask):  # as train_model does
        part.to(memory_format=torch.channels_last)

    def loss(i: int) -> Tensor:
        batch = batches[i]
        return torch.stack(list(model(batch["images"], batch["targets"]).values())).sum()

    return model, loss


def make_torchvision(
    args: argparse.Namespace, batches: list[dict[str, Any]], layout: torch.memory_format
) -> tuple[nn.Module, Callable[[int], Tensor]]:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    # Its BatchNorm is torchvision.ops.FrozenBatchNorm2d unless asked for another.
    backbone = resnet_fpn_backbone(
        backbone_name=args.backbone, weights=None, trainable_layers=STAGES[args.layers]
    )
    scale_down(backbone)
    model = MaskRCNN(
        backbone,
        CLASSES,
        min_size=args.size,
        max_size=args.size,
        rpn_post_nms_top_n_train=2000,
        rpn_batch_size_per_image=256,
        box_batch_size_per_image=200,
        box_positive_fraction=0.33,
    )
    rois: list[Tensor] = []
    # The proposals have been made; the heads get others.
    model.rpn.register_forward_hook(lambda module, inputs, output: (rois, output[1]))

    def loss(i: int) -> Tensor:
        targets = batches[i]["rival_targets"]
        rois[:] = [target["rois"] for target in targets]
        return torch.stack(list(model(batches[i]["rival_images"], targets).values())).sum()

    return model.train().to(memory_format=layout), loss


def make_step(model: nn.Module, loss: Callable[[int], Tensor]) -> Callable[[int], float]:
    """A function that trains on batch i and returns the loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9, weight_decay=1e-4)

    def step(i: int) -> float:
        optimizer.zero_grad()
        total = loss(i)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        return total.item()

    return step


def make_batches(
    dataset: utils.Dataset, config: Config, full: Config, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Batches of images with objects, in the form of each of the two."""
    ours, theirs = TorchDataset(dataset, config), TorchDataset(dataset, full)
    pairs = []
    for i in range(len(ours)):
        item = ours[i]
        if (item[1]["class_ids"] > 0).any():
            pairs.append((item, theirs[i]))
        if len(pairs) == args.batch * args.batches:
            break
    batches = []
    for start in range(0, len(pairs) - args.batch + 1, args.batch):
        members = pairs[start : start + args.batch]
        rival_images, rival_targets = [], []
        for (_, target), (image, whole) in members:
            objects = target["class_ids"] > 0
            target["rois"] = boxes_around(target["boxes"][objects], args.size)
            flip = [1, 0, 3, 2]  # x1, y1, x2, y2
            rival_images.append(image / 255)
            rival_targets.append(
                {
                    "boxes": whole["boxes"][objects][:, flip],
                    "labels": whole["class_ids"][objects],
                    "masks": whole["masks"][objects].to(torch.uint8),
                    "rois": target["rois"][:, flip],
                }
            )
        images, targets = collate([item for item, _ in members])
        batch = {"images": images, "targets": targets}
        batches.append({**batch, "rival_images": rival_images, "rival_targets": rival_targets})
    if not batches:
        raise ValueError(f"a data set must have {args.batch} images with objects or more")
    return batches


def seconds_of(function: Callable[[], object], runs: int) -> float:
    """Median seconds of a call."""
    function()
    laps = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        laps.append(time.perf_counter() - start)
    return statistics.median(laps)


def build_targets(model: modellib.MaskRCNN, batch: dict[str, Any]) -> None:
    """All targets of a batch."""
    image_shape = batch["images"].shape[2:]
    anchors, _ = model._all_anchors(image_shape)
    for target in batch["targets"]:
        class_ids, boxes = target["class_ids"], target["boxes"]
        build_rpn_targets(anchors, class_ids, boxes, model.config)
        rois, unit = (utils.norm_boxes(x, image_shape) for x in (target["rois"], boxes))
        sample_rois(rois, class_ids, unit, target["masks"], model.config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=["resnet50", "resnet101"], default="resnet50")
    parser.add_argument("--size", type=int, default=512, help="side of the network input")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", choices=STAGES, default="all")
    parser.add_argument("--rpn-channels", type=int, default=512)
    parser.add_argument("--images", help="folder of photographs; default: generated images")
    parser.add_argument("--annotations", help="COCO json")
    parser.add_argument("--batches", type=int, default=4, help="different batches")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.images:
            from coco import CocoDataset

            photographs = CocoDataset()
            photographs.load_annotations(args.images, args.annotations)
            photographs.prepare()
            dataset: utils.Dataset = photographs
        else:
            dataset = Ellipses(folder)
        compare(args, dataset)


def compare(args: argparse.Namespace, dataset: utils.Dataset) -> None:
    options = {
        "BACKBONE": args.backbone,
        "NUM_CLASSES": dataset.num_classes,
        "IMAGE_MIN_DIM": args.size,
        "IMAGE_MAX_DIM": args.size,
        "RPN_CHANNELS": args.rpn_channels,
        "IMAGES_PER_GPU": args.batch,
        "USE_RPN_ROIS": False,
    }
    config, full = Config(**options), Config(**options, USE_MINI_MASK=False)
    batches = make_batches(dataset, config, full, args)
    model, loss = make_ours(args, config, batches)
    steps = {
        "ours": make_step(model, loss),
        "torchvision": make_step(*make_torchvision(args, batches, torch.contiguous_format)),
        "its channels_last": make_step(*make_torchvision(args, batches, torch.channels_last)),
    }
    losses = {name: step(0) for name, step in steps.items()}  # warm
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.runs):
        for name, step in steps.items():
            start = time.perf_counter()
            losses[name] = step(i % len(batches))
            seconds[name].append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.runs} alternating steps")
    print(f"{args.backbone}, {args.batch} x {args.size} x {args.size}, layers {args.layers}\n")
    print("| | seconds per step (min .. max) | images/s | of ours | loss |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{median:.2f} ({min(values):.2f} .. {max(values):.2f})"
        pairs = zip(values, seconds["ours"], strict=True)
        ratio = statistics.median(value / ours for value, ours in pairs)
        speed = f"{args.batch / median:.3f} | {ratio:.2f}"
        print(f"| {name} | {spread} | {speed} | {losses[name]:.2f} |")

    torch_dataset = TorchDataset(dataset, config)
    indices = iter(range(10**9))
    targets = seconds_of(lambda: build_targets(model, batches[0]), args.runs) / args.batch
    loading = seconds_of(lambda: torch_dataset[next(indices) % len(torch_dataset)], args.runs)
    step = statistics.median(seconds["ours"]) / args.batch
    print("\n| seconds per image | | of a step |\n| --- | --- | --- |")
    for name, value in {"targets, in the step": targets, "loading, in a worker": loading}.items():
        print(f"| {name} | {value:.4f} | {value / step:.1%} |")


if __name__ == "__main__":
    main()
