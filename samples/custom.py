"""Trains on photographs of your own: copy this file and change what is different for you.

python samples/custom.py train --images photos --annotations photos.json
python samples/custom.py train --images photos --annotations via_project.json --format via
python samples/custom.py train --images photos --annotations photos --format labelme --resume
python samples/custom.py evaluate --images new --annotations new.json --model logs/.../best.pth

The commands of coco.py can do more; this shows how a program does it.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of the library

import cli
import utils
import visualize
from coco import CLASS_LAYERS, FORMATS
from config import Config
from dataset import ColorJitter, Compose, ScaleJitter, horizontal_flip
from evaluation import evaluate_coco, evaluator
from model import MaskRCNN

AUGMENTATION = Compose(horizontal_flip, ScaleJitter(0.7, 1.4), ColorJitter())


class CustomConfig(Config):
    """What differs from config.py; depth and widths are those of the weights."""

    NAME = "custom"
    IMAGES_PER_GPU = 2


def train(args: argparse.Namespace) -> None:
    """The heads first, part of which is new, and then all layers at a tenth of the rate."""
    data = load(args)
    train_set, val_set = data.split(0.2)
    if val_set.num_images == 0:
        print("with less than five images, the numbers are of those that it learns from")
        val_set = train_set
    model = MaskRCNN.from_weights(
        args.model,
        CustomConfig,
        exclude=CLASS_LAYERS,  # they are for the classes of the file
        model_dir=args.logs,
        NUM_CLASSES=data.num_classes,
        CLASS_NAMES=data.class_names,
        STEPS_PER_EPOCH=math.ceil(train_set.num_images / CustomConfig.IMAGES_PER_GPU),
    ).to(args.device)
    if args.resume:
        print(f"going on from {model.resume()}")
    heads, rest = args.epochs
    options: dict[str, Any] = {"augmentation": AUGMENTATION, "evaluate": evaluator(val_set)}
    with cli.resumable(model, "--resume"):
        model.train_model(train_set, val_set, 1e-3, heads, "heads", **options)
        model.train_model(train_set, val_set, 1e-4, heads + rest, "all", **options)
    report(model, val_set)
    print(f"checkpoints: {model.log_dir}")


def evaluate(args: argparse.Namespace) -> None:
    """On images that training has not seen."""
    model, data = MaskRCNN.from_weights(args.model).to(args.device), load(args)
    if data.class_names != model.config.CLASS_NAMES:
        raise ValueError(f"classes must be {model.config.CLASS_NAMES}, got {data.class_names}")
    report(model, data)


def load(args: argparse.Namespace) -> utils.Dataset:
    """All annotated images."""
    data = FORMATS[args.format]()
    data.load_annotations(args.images, args.annotations)
    data.prepare()
    return data


def report(model: MaskRCNN, data: utils.Dataset) -> None:
    """Prints COCO's numbers, and draws what the model finds in the first image."""
    result = evaluate_coco(model, data, min_confidence=0.0)
    if result is None:  # under torchrun, in all processes but one
        return
    print(result)
    image = data.load_image(0)
    r = model.detect([image])[0]
    instances = r["rois"], r["masks"], r["class_ids"], data.class_names, r["scores"]
    visualize.display_instances(image, *instances, show=False, save_path="custom.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = cli.Parser(prog="custom.py", description=__doc__)
    add = parser.add_argument
    add("command", choices=["train", "evaluate"], help="what to do")
    add("--images", required=True, metavar="DIR", help="the folder of the images")
    add("--annotations", required=True, metavar="FILE", help="a json; labelme: their folder")
    add("--format", choices=FORMATS, default="coco", help="of the annotations; default: coco")
    add("--model", default="coco", metavar="NAME|FILE", help="where to begin; default: coco")
    text = "of the heads, and then of all layers; default: 10 20"
    add("--epochs", type=cli.whole(0), nargs=2, default=[10, 20], metavar=("N", "M"), help=text)
    add("--resume", action="store_true", help="go on with the newest run in --logs")
    add("--logs", default="logs", metavar="DIR", help="holds the checkpoints; default: logs")
    cli.add_device(parser)
    parser.set_defaults(run=lambda args: (train if args.command == "train" else evaluate)(args))
    return cli.run(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
