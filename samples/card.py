"""The json beside weights that ship, which tells how they were made and how good they are."""

import argparse
import datetime
import json
from typing import Any

import torch

import weights
from evaluation import CocoEvaluation
from history import read_history
from model import MaskRCNN


def write_card(
    args: argparse.Namespace, model: MaskRCNN, result: CocoEvaluation, **facts: Any
) -> None:
    """Writes it beside the weights.

    Args:
        args: of the command that trained: output, epochs, steps and seed.
        model: as it is saved.
        result: of images that it was not trained on.
        facts: what else there is to tell.
    """
    history = read_history(model.log_dir) if model.log_dir else []
    options = f"--epochs {args.epochs} --steps {args.steps} --seed {args.seed}"
    card = {
        "class_names": model.config.CLASS_NAMES,
        "config": weights.plain(model.config.to_dict()),
        "command": f"python samples/{model.config.NAME}.py train {options}",
        "seed": args.seed,
        **{name: round(value, 4) for name, value in result.metrics.items()},
        **facts,
        "version": weights.VERSION,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "minutes": round(sum(record["seconds"] for record in history) / 60, 1),
    }
    args.output.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
