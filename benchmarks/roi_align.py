"""Which RoIAlign trains the better network of nuclei: crop_and_resize, or roi_align.

    python benchmarks/roi_align.py --dataset data/nuclei [--steps 1000] [--rule roi_align]

The network and the training are those of samples/nuclei.py, but short. It learns from four fifths
of the training images and is judged by the others, since what is chosen by the validation images
cannot be judged by them. To compare in the same time, run both rules at once, with --threads 1.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation import evaluate_coco
from model import MaskRCNN
from samples.nuclei import AUGMENTATION, NucleiConfig, TrainingConfig, load

RULES: dict[str, dict[str, Any]] = {
    "crop_and_resize": {"ROI_ALIGN": "crop_and_resize"},
    "roi_align": {"ROI_ALIGN": "roi_align", "ROI_SAMPLING_RATIO": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rule", choices=RULES, help="one alone; default: one after the other")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    learned, held_out = load(args, "train").split(0.2)
    for rule in [args.rule] if args.rule else RULES:
        torch.manual_seed(args.seed)
        options = RULES[rule]
        config = TrainingConfig(SEED=args.seed, STEPS_PER_EPOCH=args.steps, **options)
        with TemporaryDirectory() as logs:
            model = MaskRCNN(config, logs)
            start = time.perf_counter()
            model.train_model(
                learned, None, config.LEARNING_RATE, 1, "all", augmentation=AUGMENTATION
            )
        minutes = (time.perf_counter() - start) / 60
        model.config = NucleiConfig(**options)
        result = evaluate_coco(model, held_out, min_confidence=0.0)
        print(f"{rule}, seed {args.seed}, {args.steps} steps, {minutes:.1f} minutes: {result}")


if __name__ == "__main__":
    main()
