"""Circles, squares and triangles: a small network that learns to find them in generated scenes.

Its weights, which ship with the library, find the coins of scikit-image's photograph, which they
never saw: see scenes.py.

python samples/shapes.py train                         # the weights that ship: an hour on a CPU
python samples/shapes.py train --epochs 1 --steps 50   # a quick look at how it goes
python samples/shapes.py train --resume                # goes on with the newest run
python samples/shapes.py evaluate                      # the weights that ship
python samples/shapes.py evaluate --model logs/shapes.../best.pth --limit 50
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import utils
import weights
from config import Config
from evaluation import evaluate_coco, evaluator
from model import MaskRCNN
from samples.card import write_card
from samples.scenes import CLASS_NAMES, Scene, coins, scene

WEIGHTS = Path(__file__).resolve().with_suffix(".pth")
HELD_OUT = 1_000_000  # seed of the scenes that no training uses


class ShapesConfig(Config):
    """A network of 1.7 million parameters, all of them new."""

    NAME = "shapes"
    IMAGES_PER_GPU = 4
    NUM_CLASSES = len(CLASS_NAMES)
    IMAGE_MIN_DIM = 256
    IMAGE_MAX_DIM = 256
    BACKBONE = {"blocks": (2, 2, 2, 2), "width": 16}  # noqa: RUF012
    TOP_DOWN_PYRAMID_SIZE = 64
    RPN_CHANNELS = 64
    RPN_ANCHOR_SCALES = (16, 32, 64, 128, 256)
    RPN_ANCHOR_RATIOS = (1,)  # all are about as wide as high
    PRE_NMS_LIMIT = 1000
    POST_NMS_ROIS_TRAINING = 300
    POST_NMS_ROIS_INFERENCE = 300
    FPN_CLASSIF_FC_LAYERS_SIZE = 128
    MASK_POOL_SIZE = 10
    MINI_MASK_SHAPE = (40, 40)

    STEPS_PER_EPOCH = 100
    OPTIMIZER = "adamw"
    LEARNING_RATE = 0.0015
    LR_SCHEDULE = "cosine"
    WARMUP_STEPS = 100
    WEIGHT_DECAY = 0.01
    TRAIN_BN = True  # there are no statistics to keep
    RPN_TRAIN_ANCHORS_PER_IMAGE = 128
    TRAIN_ROIS_PER_IMAGE = 96
    NUM_WORKERS = 1
    EVALUATE_EVERY = 4
    KEEP_CHECKPOINTS = 2


class ShapesDataset(utils.Dataset):
    """Scenes that are drawn when they are asked for.

    Args:
        count: of scenes.
        seed: other seeds, other scenes.
    """

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        for class_id, name in enumerate(CLASS_NAMES[1:], start=1):
            self.add_class("shapes", class_id, name)
        for i in range(count):
            self.add_image("shapes", image_id=i, path=None, seed=(seed, i))
        self.prepare()

    def load_image(self, image_id: int) -> np.ndarray:
        return scene(self.image_info[image_id]["seed"]).image

    def load_mask(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        _, masks, class_ids = scene(self.image_info[image_id]["seed"])
        return masks, class_ids


def train(args: argparse.Namespace) -> None:
    """Trains all layers from random weights."""
    config = ShapesConfig(SEED=args.seed, STEPS_PER_EPOCH=args.steps)
    torch.manual_seed(args.seed)
    model = MaskRCNN(config, args.logs).to(args.device)
    if args.resume:
        print(f"going on from {model.resume()}")
    # No scene comes twice.
    scenes = ShapesDataset(args.epochs * config.STEPS_PER_EPOCH * config.BATCH_SIZE, args.seed)
    judge = evaluator(ShapesDataset(50, HELD_OUT))
    with cli.resumable(model, "--resume"):
        model.train_model(scenes, None, config.LEARNING_RATE, args.epochs, "all", evaluate=judge)
    weights.save_weights(model, args.output)
    result = evaluate_coco(model, ShapesDataset(200, HELD_OUT), min_confidence=0.0)
    assert result is not None
    found, false, overlap = find_coins(model)
    data = f"generated scenes of seed {args.seed}; AP of {result.images} others"
    facts = {"found": found, "of": 24, "false": false, "mask_IoU": round(overlap, 4)}
    write_card(args, model, result, data=data, coins=facts)
    print(f"finished: {args.output}, {facts}, segm AP {result.segm['AP']:.4f}")


def evaluate(args: argparse.Namespace) -> None:
    """COCO's numbers for scenes, and a photograph that is none."""
    model = MaskRCNN.from_weights(args.model).to(args.device)
    found, false, overlap = find_coins(model)
    print(f"coins: {found} of 24 found, {false} false, mean mask IoU {overlap:.3f}")
    print(evaluate_coco(model, ShapesDataset(args.limit, HELD_OUT), min_confidence=0.0))


def find_coins(model: MaskRCNN) -> tuple[int, int, float]:
    """See compare."""
    photograph = coins()
    return compare(model.detect([photograph.image])[0], photograph)


def compare(result: dict[str, Any], truth: Scene) -> tuple[int, int, float]:
    """Objects found (mask IoU 0.5 and the right class), false detections and mean mask IoU.

    Args:
        result: of MaskRCNN.detect.
    """
    boxes = utils.extract_bboxes(truth.masks)
    found = tuple(result[name] for name in ("rois", "class_ids", "scores", "masks"))
    _, matches, overlaps = utils.compute_matches(boxes, truth.class_ids, truth.masks, *found)
    hit = matches >= 0
    overlap = overlaps[hit, matches[hit]].mean() if hit.any() else 0.0
    return int(hit.sum()), int((~hit).sum()), float(overlap)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = cli.Parser(prog="shapes.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="train|evaluate")
    command = commands.add_parser("train", help="train from random weights")
    add = command.add_argument
    add("--epochs", type=cli.whole(1), default=16, metavar="N", help="to train; default: 16")
    add("--steps", type=cli.whole(1), default=100, metavar="N", help="of an epoch; default: 100")
    add("--seed", type=cli.whole(0), default=0, metavar="N", help="of all chance; default: 0")
    add("--logs", default="logs", metavar="DIR", help="holds the checkpoints; default: logs")
    text = "the trained weights; default: shapes.pth"
    add("--output", type=Path, default="shapes.pth", metavar="FILE", help=text)
    add("--resume", action="store_true", help="go on with the newest run in --logs")
    cli.add_device(command)
    command.set_defaults(run=train)
    command = commands.add_parser("evaluate", help="COCO's AP of held-out scenes, and the coins")
    add = command.add_argument
    add("--model", default=WEIGHTS, metavar="FILE", help="default: the weights that ship")
    add("--limit", type=cli.whole(1), default=200, metavar="N", help="scenes; default: 200")
    cli.add_device(command)
    command.set_defaults(run=evaluate)
    return cli.run(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
