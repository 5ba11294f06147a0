"""Stands in for the lead's module of this name until the merge: take theirs."""

from pathlib import Path

import training
import weights


def find_last(model_dir: str | Path, name: str) -> weights.WeightFile:
    """The newest checkpoint of a run of this name that can be read."""
    return training.first_readable(training.find_checkpoints(model_dir, name))
