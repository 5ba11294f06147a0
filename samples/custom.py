"""Fine-tunes on photographs of your own, annotated as COCO json or with VIA or labelme.

python samples/custom.py train --images photos --annotations photos.json
python samples/custom.py train --images photos --annotations via_project.json --format via
python samples/custom.py train --images photos --annotations photos --format labelme --model last
python samples/custom.py evaluate --images new --annotations new.json --model last

Without --val-annotations a fifth of the images, chosen by --seed, is kept for validation.
"""

import argparse
import copy
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as modellib
import training
import utils
import weights
from coco import CocoDataset
from config import Config
from dataset import ColorJitter, Compose, ScaleJitter, horizontal_flip
from evaluation import evaluate_coco, evaluator
from samples.annotations import LabelmeDataset, ViaDataset


class CustomConfig(Config):
    NAME = "custom"


AUGMENTATION = Compose(horizontal_flip, ScaleJitter(0.7, 1.4), ColorJitter())


def load(
    args: argparse.Namespace, annotations: str, class_names: Sequence[str] = ()
) -> utils.Dataset:
    if args.format == "coco":
        data: Any = CocoDataset()
        data.load_annotations(args.images, annotations)
    else:
        data = ViaDataset() if args.format == "via" else LabelmeDataset()
        data.load_annotations(args.images, annotations, args.class_attribute, class_names)
    data.prepare()
    if class_names and data.class_names[1:] != list(class_names):
        raise ValueError(f"{annotations} must have {class_names}, got {data.class_names[1:]}")
    return data


def split(data: utils.Dataset, seed: int) -> tuple[utils.Dataset, utils.Dataset]:
    """A data set of four fifths of the images, and one of the others."""
    order = np.random.default_rng(seed).permutation(data.num_images)
    count = math.ceil(len(order) / 5)
    if len(order) < 2:
        raise ValueError(f"there must be two images or more to train on, got {len(order)}")
    parts = copy.copy(data), copy.copy(data)
    for part, chosen in zip(parts, (order[count:], order[:count]), strict=True):
        part.image_info = [data.image_info[i] for i in np.sort(chosen)]
        part.prepare()
    return parts


def make_model(args: argparse.Namespace, **options: Any) -> modellib.MaskRCNN:
    """A model that fits the weight file; options of the config win over those of the file."""
    file = None
    if args.model not in ("none", "imagenet"):
        file = (
            training.first_readable(training.find_checkpoints(args.logs, CustomConfig.NAME))
            if args.model == "last"
            else weights.read_state_dict(weights.find_weights(args.model))
        )
        known = {k: v for k, v in weights.read_options(file).items() if hasattr(CustomConfig, k)}
        options = {**known, "NAME": CustomConfig.NAME, **options}
    model = modellib.MaskRCNN(CustomConfig(**options), args.logs)
    if args.model != "none":
        # The last layers of a network for other classes do not fit; here they start anew.
        weights.load_weights(model, file or args.model, skip_mismatched=True)
    return model


def train(args: argparse.Namespace, device: torch.device) -> utils.Dataset:
    data = load(args, args.annotations)
    if args.val_annotations:
        val = load(args, args.val_annotations, data.class_names[1:])
    else:
        data, val = split(data, args.SEED)
    batch = max(args.IMAGES_PER_GPU, 1) * training.world_size()  # Config refuses what is less
    options = {k: v for k, v in vars(args).items() if k.isupper() and v is not None}
    if args.image_dim is not None:
        options |= {"IMAGE_MIN_DIM": args.image_dim, "IMAGE_MAX_DIM": args.image_dim}
    model = make_model(
        args,
        NUM_CLASSES=data.num_classes,
        CLASS_NAMES=data.class_names,
        STEPS_PER_EPOCH=math.ceil(data.num_images / batch),
        VALIDATION_STEPS=math.ceil(val.num_images / batch),
        **options,
    ).to(device)
    if args.model == "last":
        model.resume()
    heads, rest = args.epochs
    judge = evaluator(val)
    model.train_model(data, val, args.lr, heads, "heads", AUGMENTATION, evaluate=judge)
    model.train_model(data, val, args.lr / 10, heads + rest, "all", AUGMENTATION, evaluate=judge)
    if model.log_dir is None:
        raise ValueError(f"--epochs must ask for one epoch or more, got {heads} and {rest}")
    args.model = str(model.log_dir / "best.pth")
    return val


def evaluate(args: argparse.Namespace, device: torch.device, data: utils.Dataset | None) -> None:
    model = make_model(args).to(device)
    data = data or load(args, args.annotations, (model.config.CLASS_NAMES or [])[1:])
    result = evaluate_coco(model, data, min_confidence=0.0)
    if training.is_main():
        print(f"{args.model}: {result}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["train", "evaluate"])
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder of the images")
    parser.add_argument("--annotations", required=True, help="a json; for labelme their folder")
    parser.add_argument("--val-annotations", help="of other images in the same folder")
    parser.add_argument("--format", choices=["coco", "via", "labelme"], default="coco")
    parser.add_argument("--class-attribute", help="VIA's region attribute that holds the class")
    parser.add_argument(
        "--model", default="coco", help='"coco", "imagenet", "none", "last" or a weight file'
    )
    parser.add_argument("--epochs", type=int, nargs=2, default=[10, 20], metavar=("HEADS", "ALL"))
    parser.add_argument("--lr", type=float, default=0.001, help="of the heads; a tenth for all")
    parser.add_argument("--batch", dest="IMAGES_PER_GPU", type=int, default=2)
    parser.add_argument("--backbone", dest="BACKBONE", choices=["resnet50", "resnet101"])
    parser.add_argument("--image-dim", type=int, help="side of the network input, a multiple of 64")
    parser.add_argument("--workers", dest="NUM_WORKERS", type=int)
    parser.add_argument("--seed", dest="SEED", type=int, default=0)
    parser.add_argument("--logs", default="logs")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with training.distributed(args.device) as device:
            evaluate(args, device, train(args, device) if args.command == "train" else None)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        print(f"custom.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        reason = str(interrupt) or "interrupted"
        print(f"custom.py: {reason}; go on with --model last", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
