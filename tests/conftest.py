"""What several test files share: the reference's numbers, models, zip files, quiet plotting."""

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from keras_weights import write_h5
from tiny_weights import tiny

from config import Config

os.environ.setdefault("MPLBACKEND", "agg")

# Starts processes by forking one that has imported these and done nothing: they take longer to
# import than most such processes to do the rest.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch.utils.tensorboard", "pytest", "scipy.ndimage", "pycocotools.cocoeval"]
)


def free_port() -> int:
    """A port of this machine that nobody uses, for processes to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def kill_all(pid: int) -> list[int]:
    """Kills a process and those that it has started, which are returned, as if the power failed."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, other in parents.items() if other == parent]
    for each in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return found[1:]


ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"
# Tests of files in ../shared, which a clone of the repository lacks: @needs_shared, or
# @needs_shared("golden/photo1.jpg"). `pytest -m needs_shared` runs them alone.
needs_shared = pytest.mark.needs_shared


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in item.iter_markers("needs_shared"):
            missing = [path for path in mark.args or [""] if not (SHARED / path).exists()]
            if missing:
                path = Path("../shared", missing[0])
                item.add_marker(pytest.mark.skip(reason=f"{path} of the reference is not there"))


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


@functools.cache
def load_golden(name: str, folder: Path = DATA) -> dict[str, np.ndarray]:
    """Arrays of the Keras reference, e.g. of "training_side.npz".

    The part in tests/data is all that a test may ask for, so that no test depends on where it
    runs; those marked needs_shared have the whole file in SHARED / "golden".
    """
    with np.load(folder / name) as file:
        return dict(file)


def zipped(**members):
    """The bytes of a zip file with these contents by name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def one_thread():
    """So small a network is slower on several, ten times where they wait for other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def source():
    """A small model of random weights; `target` is one of others, to load them into."""
    return tiny(seed=1)


@pytest.fixture
def target():
    return tiny(seed=2)


@pytest.fixture(scope="session")
def small_h5(tmp_path_factory):
    """The deterministic weights of the small configuration as a Keras .h5."""
    path = tmp_path_factory.mktemp("weights") / "small.h5"
    write_h5("small", path)
    return path


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A weight file of a network that runs in milliseconds, with random weights."""
    from test_model import TinyConfig

    import weights
    from model import MaskRCNN

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.pth"
    weights.save_weights(MaskRCNN(TinyConfig()), path)
    return path
