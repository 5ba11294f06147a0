"""What several test files share: the reference's numbers, its weights, and quiet plotting."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
from keras_weights import write_h5

from config import Config

os.environ.setdefault("MPLBACKEND", "agg")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the reference data folder ../shared is not there"
)


class SmallConfig(Config):
    """The small configuration for which the reference was run."""

    NAME = "small"
    BACKBONE = "resnet50"
    NUM_CLASSES = 4
    IMAGE_MIN_DIM = 256
    IMAGE_MAX_DIM = 256
    RPN_ANCHOR_SCALES = (16, 32, 64, 128, 256)


class TinyNetwork(Config):
    """A network that runs in milliseconds."""

    NAME = "tiny"
    BACKBONE = {"blocks": (1, 1, 1, 1), "width": 8}  # noqa: RUF012
    TOP_DOWN_PYRAMID_SIZE = 16
    RPN_CHANNELS = 16
    FPN_CLASSIF_FC_LAYERS_SIZE = 32
    IMAGE_MIN_DIM = 128
    IMAGE_MAX_DIM = 128
    RPN_ANCHOR_SCALES = (8, 16, 32, 64, 128)


class Golden:
    """Arrays of the Keras reference: ../shared/golden where it is, else the part in tests/data.

    Looking up an array that is in neither skips the calling test.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.arrays: dict[str, np.ndarray] = {}
        for folder in (ROOT / "tests" / "data", SHARED / "golden"):
            if (folder / name).is_file():
                with np.load(folder / name) as file:  # closed: a skip keeps this object alive
                    self.arrays.update(file)

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.arrays:
            pytest.skip(f"{key} of the reference file {self.name} is not there")
        return self.arrays[key]


@functools.cache
def load_golden(name: str) -> Golden:
    """One of the reference's files, e.g. "training_side.npz"."""
    return Golden(name)


@pytest.fixture(scope="session")
def small_h5(tmp_path_factory):
    """The deterministic weights of the small configuration as a Keras .h5."""
    path = tmp_path_factory.mktemp("weights") / "small.h5"
    write_h5("small", path)
    return path
