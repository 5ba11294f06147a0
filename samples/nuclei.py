"""Finds nuclei in fluorescence microscopy with a small network, trained on the CPU in an hour.

python samples/nuclei.py train --dataset data/nuclei
python samples/nuclei.py evaluate --dataset data/nuclei  # the weights that ship with the library

The folder holds images/, instances_train.json and instances_val.json, in COCO's format. The data
are of the 2018 Data Science Bowl (BBBC038, Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7).
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import report
import weights
from augmentation import (
    Compose,
    Masks,
    Pair,
    horizontal_flip,
    rot90,
    takes_boxed_masks,
    vertical_flip,
)
from coco_dataset import CocoDataset
from config import Config
from evaluation import evaluate_coco, evaluator
from model import MaskRCNN
from samples.card import write_card

WEIGHTS = Path(__file__).with_suffix(".pth")
# What counts in an evaluation: an image may show more than COCO's 100 objects.
ALL: dict[str, Any] = {"min_confidence": 0.0, "max_detections": 1000}


class NucleiConfig(Config):
    """For images of any size, shown twice as large: nuclei of 12 pixels are too small for P2."""

    NAME = "nuclei"
    NUM_CLASSES = 1 + 1
    IMAGE_RESIZE_MODE = "pad64"
    IMAGE_MIN_DIM: int | None = None
    IMAGE_MAX_DIM: int | None = None
    IMAGE_MIN_SCALE = 2
    DETECTION_TILE = (384, 384)
    BACKBONE = {"blocks": (2, 2, 2, 2), "width": 16}  # noqa: RUF012
    ROI_ALIGN = "roi_align"
    ROI_SAMPLING_RATIO = 2
    TOP_DOWN_PYRAMID_SIZE = 64
    RPN_CHANNELS = 64
    RPN_ANCHOR_SCALES = (16, 32, 64, 128, 256)
    RPN_ANCHOR_RATIOS = (1,)
    PRE_NMS_LIMIT = 3000
    POST_NMS_ROIS_INFERENCE = 1000
    FPN_CLASSIF_FC_LAYERS_SIZE = 256
    DETECTION_MAX_INSTANCES = 400  # of a window
    DETECTION_MIN_CONFIDENCE = 0.5
    DETECTION_NMS_THRESHOLD = 0.5  # nuclei touch
    DETECTION_PER_CLASS = True


class TrainingConfig(NucleiConfig):
    """For the crops that it learns from, which are enlarged to 256 pixels."""

    IMAGE_RESIZE_MODE = "square"
    IMAGE_MIN_DIM = 256
    IMAGE_MAX_DIM = 256
    IMAGE_MIN_SCALE = 0
    PRE_NMS_LIMIT = 1000
    IMAGES_PER_GPU = 2
    POST_NMS_ROIS_TRAINING = 300
    TRAIN_ROIS_PER_IMAGE = 64
    MAX_GT_INSTANCES = 256
    MINI_MASK_SHAPE = (28, 28)
    TRAIN_BN = True
    OPTIMIZER = "adamw"
    LEARNING_RATE = 0.0015
    WEIGHT_DECAY = 0.01
    LR_SCHEDULE = "cosine"
    WARMUP_STEPS = 200
    STEPS_PER_EPOCH = 500
    EVALUATE_EVERY = 2
    NUM_WORKERS = 1


@takes_boxed_masks
@dataclass(frozen=True)
class Crop:
    """Cuts out a part with sides of `smallest` to `largest` of the image's, with a nucleus in it.

    Its scale varies, since TorchDataset resizes it to the network's input.
    """

    smallest: float = 0.3
    largest: float = 1.0

    def __call__(self, image: np.ndarray, masks: Masks, rng: np.random.Generator) -> Pair:
        share = math.exp(rng.uniform(math.log(self.smallest), math.log(self.largest)))
        side = round(share * min(image.shape[:2]))
        for _ in range(10):
            y, x = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
            part = slice(y, y + side), slice(x, x + side)
            if masks[part].any():
                break
        return image[part], masks[part]


@takes_boxed_masks
def expose(image: np.ndarray, masks: Masks, rng: np.random.Generator) -> Pair:
    """Another exposure: brightness times 0.4 to 2.5, and a gamma of 0.6 to 1.65."""
    gain, gamma = np.exp(rng.uniform(-0.9, 0.9)), np.exp(rng.uniform(-0.5, 0.5))
    table = 255 * (gain * (np.arange(256) / 255) ** gamma).clip(0, 1)
    return table.round().astype(np.uint8)[image], masks


@takes_boxed_masks
def degrade(image: np.ndarray, masks: Masks, rng: np.random.Generator) -> Pair:
    """Another microscope, half of the time: out of focus, by up to 1.5 pixels, and noisy."""
    if rng.random() < 0.5:
        return image, masks
    blurred = gaussian_filter(image.astype(np.float32), (*[rng.uniform(0, 1.5)] * 2, 0))
    noise = rng.normal(0, rng.uniform(0, 8), (*image.shape[:2], 1))
    return (blurred + noise).clip(0, 255).round().astype(np.uint8), masks


AUGMENTATION = Compose(Crop(), horizontal_flip, vertical_flip, rot90, expose, degrade)


def train(args: argparse.Namespace) -> None:
    """Learns from crops, is judged by whole images, and leaves weights for whole images."""
    config, whole = TrainingConfig(SEED=args.seed, STEPS_PER_EPOCH=args.steps), NucleiConfig()
    torch.manual_seed(args.seed)
    model = MaskRCNN(config, args.logs).to(args.device)
    if args.model == "last":
        model.resume()
    elif args.model is not None:
        raise ValueError(f"to train, --model must be last or left out, got {args.model}")
    train_set, held_out = load(args, "train").split(0.1)

    def judge(model: MaskRCNN) -> dict[str, float]:
        model.config = whole
        try:
            return evaluator(held_out, max_detections=ALL["max_detections"])(model)
        finally:
            model.config = config

    options: dict[str, Any] = {"augmentation": AUGMENTATION, "evaluate": judge}
    with cli.resumable(model, "--model last"):
        model.train_model(train_set, None, config.LEARNING_RATE, args.epochs, "all", **options)
    model.config, val_set = whole, load(args, "val")
    whole.CLASS_NAMES = val_set.class_names
    weights.save_weights(model, args.output)
    result = evaluate_coco(model, val_set, **ALL)
    if result is not None:  # under torchrun, in the main process
        data = "BBBC038, 2018 Data Science Bowl, fluorescence images, CC0;"
        write_card(args, model, result, data=f"{data} AP of {result.images} validation images")
        print(f"{args.output}: {result}")


def evaluate(args: argparse.Namespace) -> None:
    """COCO's numbers for the validation images."""
    if args.report:
        report.check_folder(args.report)
    data = load(args, "val")
    if args.model == "last":
        model = MaskRCNN(NucleiConfig(), args.logs)
        model.resume()
    else:
        model = MaskRCNN.from_weights(args.model or WEIGHTS, NucleiConfig)
    result = evaluate_coco(model.to(args.device), data, **ALL)
    if result is None:
        return
    print(result)
    if args.report:
        report.write_evaluation(args.report, data, result, title="Nuclei, validation images")


def load(args: argparse.Namespace, subset: str) -> CocoDataset:
    """The images to train on or to validate with."""
    folder, data = Path(args.dataset), CocoDataset()
    data.load_annotations(folder / "images", folder / f"instances_{subset}.json")
    data.prepare()
    return data


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = cli.Parser(prog="nuclei.py", description=__doc__)
    add = parser.add_argument
    add("command", choices=["train", "evaluate"], help="what to do")
    add("--dataset", required=True, metavar="DIR", help="the folder of the data")
    text = "last: the newest run in --logs goes on; evaluate: or a file; default: the one shipped"
    add("--model", metavar="last|FILE", help=text)
    add("--epochs", type=cli.whole(1), default=14, metavar="N", help="to train; default: 14")
    add("--steps", type=cli.whole(1), default=500, metavar="N", help="of an epoch; default: 500")
    add("--seed", type=cli.whole(0), default=0, metavar="N", help="of all chance; default: 0")
    add("--logs", default="logs", metavar="DIR", help="holds the checkpoints; default: logs")
    text = "the trained weights; default: nuclei.pth"
    add("--output", type=Path, default="nuclei.pth", metavar="FILE", help=text)
    add("--report", metavar="DIR", help="of evaluate: write a page to look at, DIR/index.html")
    cli.add_device(parser)
    parser.set_defaults(run=lambda args: (train if args.command == "train" else evaluate)(args))
    return cli.run(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
