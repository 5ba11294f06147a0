"""Finds nuclei in fluorescence microscopy with a small network, trained on the CPU in an hour.

python samples/nuclei.py train --dataset data/nuclei
python samples/nuclei.py evaluate --dataset data/nuclei  # the weights that ship with the library

The folder holds images/, instances_train.json and instances_val.json, in COCO's format. The data
are of the 2018 Data Science Bowl (BBBC038, Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7).
"""

import argparse
import datetime
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import coco
import dataset as datalib
import model as modellib
import training
import weights
from config import Config

WEIGHTS = Path(__file__).with_suffix(".pth")


class NucleiConfig(Config):
    """For whole images, which are shown at 512 pixels: nuclei of 12 pixels are too small for P2."""

    NAME = "nuclei"
    NUM_CLASSES = 1 + 1
    GPU_COUNT = 0
    IMAGE_MIN_DIM = 512
    IMAGE_MAX_DIM = 512
    BACKBONE = {"blocks": (2, 2, 2, 2), "width": 16}  # noqa: RUF012
    TOP_DOWN_PYRAMID_SIZE = 64
    RPN_CHANNELS = 64
    RPN_ANCHOR_SCALES = (16, 32, 64, 128, 256)
    RPN_ANCHOR_RATIOS = (1,)
    PRE_NMS_LIMIT = 1000
    POST_NMS_ROIS_INFERENCE = 500
    FPN_CLASSIF_FC_LAYERS_SIZE = 256
    DETECTION_MAX_INSTANCES = 256  # an image shows up to 100
    DETECTION_MIN_CONFIDENCE = 0.5
    DETECTION_NMS_THRESHOLD = 0.5  # nuclei touch
    DETECTION_PER_CLASS = True


class TrainingConfig(NucleiConfig):
    """For the crops that it learns from, at the scale of the whole images."""

    IMAGE_MIN_DIM = 256
    IMAGE_MAX_DIM = 256
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


@dataclass(frozen=True)
class Crop:
    """Cuts out a part with sides of `smallest` to `largest` of the image's, with a nucleus in it.

    Its scale varies, since TorchDataset resizes it to the network's input.
    """

    smallest: float = 0.4
    largest: float = 0.65

    def __call__(
        self, image: np.ndarray, masks: np.ndarray, rng: np.random.Generator
    ) -> datalib.Pair:
        share = math.exp(rng.uniform(math.log(self.smallest), math.log(self.largest)))
        side = round(share * min(image.shape[:2]))
        for _ in range(10):
            y, x = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
            part = slice(y, y + side), slice(x, x + side)
            if masks[part].any():
                break
        return image[part], masks[part]


def expose(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> datalib.Pair:
    """Another exposure: brightness times 0.6 to 1.65, and a gamma from the same range."""
    gamma, gain = np.exp(rng.uniform(-0.5, 0.5, 2))
    table = 255 * (gain * (np.arange(256) / 255) ** gamma).clip(0, 1)
    return table.round().astype(np.uint8)[image], masks


AUGMENTATION = datalib.Compose(
    Crop(), datalib.horizontal_flip, datalib.vertical_flip, datalib.rot90, expose
)


def load(folder: str, subset: str) -> coco.CocoDataset:
    data = coco.CocoDataset()
    data.load_annotations(Path(folder) / "images", Path(folder) / f"instances_{subset}.json")
    data.prepare()
    return data


def train(args: argparse.Namespace, device: torch.device) -> None:
    config = TrainingConfig(SEED=args.seed, STEPS_PER_EPOCH=args.steps)
    torch.manual_seed(args.seed)
    model = modellib.MaskRCNN(config, args.logs).to(device)
    if args.model == "last":
        model.resume()
    val, evaluator = load(args.dataset, "val"), NucleiConfig()

    def evaluate(model: modellib.MaskRCNN) -> dict[str, float]:
        model.config = evaluator  # for whole images
        try:
            return coco.evaluator(val)(model)
        finally:
            model.config = config

    model.train_model(
        load(args.dataset, "train"),
        None,
        config.LEARNING_RATE,
        args.epochs,
        "all",
        AUGMENTATION,
        evaluate=evaluate,
    )
    # Checkpoints are for training on crops; this file is for whole images.
    model.config = evaluator
    evaluator.CLASS_NAMES = val.class_names
    output = Path(args.output)
    weights.save_weights(model, output)
    result = coco.evaluate_coco(model, val, min_confidence=0.0)
    if result is not None:
        history = training.read_history(model.log_dir) if model.log_dir else []
        card = {
            "class_names": val.class_names,
            "config": weights.plain(evaluator.to_dict()),
            "command": f"python samples/nuclei.py train --epochs {args.epochs} --steps {args.steps}"
            f" --seed {args.seed}",
            "data": "BBBC038, 2018 Data Science Bowl, fluorescence images, CC0;"
            f" AP of {result.images} validation images",
            "seed": args.seed,
            **{name: round(value, 4) for name, value in result.metrics.items()},
            "version": weights.VERSION,
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "minutes": round(sum(record["seconds"] for record in history) / 60, 1),
        }
        output.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
        print(f"{output}: {result}")


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    data = load(args.dataset, "val")
    path: Path = WEIGHTS if args.model is None else Path(args.model)
    if args.model == "last":
        checkpoints = training.find_checkpoints(args.logs, NucleiConfig.NAME)
        path = training.first_readable(checkpoints).path
    side = {name: getattr(NucleiConfig, name) for name in ("IMAGE_MIN_DIM", "IMAGE_MAX_DIM")}
    model = modellib.MaskRCNN.from_weights(path, **side).to(device)
    print(coco.evaluate_coco(model, data, min_confidence=0.0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["train", "evaluate"])
    parser.add_argument("--dataset", required=True, metavar="DIR", help="holds images/ and jsons")
    parser.add_argument(
        "--model",
        help='"last" goes on after a stop; evaluate: also a file; default: the one shipped',
    )
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--steps", type=int, default=500, help="of an epoch; default: 500")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", default="logs")
    parser.add_argument("--output", default="nuclei.pth", help="the trained weights")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with training.distributed(args.device) as device:
            (train if args.command == "train" else evaluate)(args, device)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        print(f"nuclei.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"nuclei.py: interrupted: {interrupt}".rstrip(": "), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
