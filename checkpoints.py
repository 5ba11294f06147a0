"""Checkpoints: where a run of training stands, what is saved of it, and how it is found again.

All that a run depends on is in its checkpoints, so that a run that was killed and resumed ends, on
a CPU, with the bits of one that was not.
"""

import contextlib
import dataclasses
import datetime
import errno
import logging
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

import distributed
import weights
from config import Config
from history import Record, in_words, read_history

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

# A checkpoint of an interrupted epoch has the number of its steps, too.
FILE_NAME = re.compile(r"mask_rcnn_.*_(\d{4,})(?:-(\d+))?\.pth")
# What utils.write_atomic and history.link write to first: with the number of the process.
TEMPORARY_NAME = re.compile(r"\..+\.(\d+)\.tmp")


# --- Files ---------------------------------------------------------------------------------------


def make_folder(model_dir: str | Path, name: str) -> Path:
    """A new folder for the checkpoints and logs of a run, named after it and the time."""
    while True:
        now = datetime.datetime.now().strftime("%Y%m%dT%H%M%S")
        folder = Path(model_dir) / f"{name.lower()}{now}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # of another run that began in this second
            time.sleep(0.2)


def find_checkpoints(model_dir: str | Path, name: str) -> list[Path]:
    """Checkpoints of the run of this name that was written last, the newest first.

    Raises:
        FileNotFoundError: there is none.
    """
    # Not by the time in the folder's name, which is local, and wrong after the clock was.
    found = [paths for folder in find_runs(model_dir, name) if (paths := checkpoints_in(folder))]
    if not found:
        raise FileNotFoundError(
            f"no checkpoint of a run named {name.lower()!r} in {model_dir}; train first, or give"
            " the folder that holds its logs"
        )
    return max(found, key=lambda paths: (max(map(written_at, paths)), paths[0].parent.name))


def find_runs(model_dir: str | Path, name: str) -> list[Path]:
    """The folders of the runs of this name."""
    pattern = re.compile(re.escape(name.lower()) + r"\d{8}T\d{4,6}")
    folders = Path(model_dir).iterdir() if Path(model_dir).is_dir() else ()
    return [path for path in folders if pattern.fullmatch(path.name) and path.is_dir()]


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest first."""
    found = [
        (int(match[1]), int(match[2] or 0), path)
        for path in folder.iterdir()
        if (match := FILE_NAME.fullmatch(path.name))
    ]
    return [path for _, _, path in sorted(found, reverse=True)]


def written_at(path: Path) -> int:
    """When a checkpoint was written, in nanoseconds; 0 if it has been removed meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def mark_as_newest(path: Path, name: str) -> None:
    """Sees to it that a checkpoint is the one that was written last, whatever the clock says."""
    folders = {path.parent, *find_runs(path.parent.parent, name)}
    others = [other for folder in folders for other in checkpoints_in(folder) if other != path]
    latest = max(map(written_at, others), default=0)
    if written_at(path) <= latest:
        with contextlib.suppress(OSError):
            os.utime(path, ns=(latest + 10**9,) * 2)


def read_last(model_dir: str | Path, name: str) -> weights.WeightFile:
    """The newest checkpoint of a run of this name that can be read; warns about those after it.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: none can be read.
    """
    paths = find_checkpoints(model_dir, name)
    for path in paths:
        try:
            return weights.read_state_dict(path)
        except ValueError as error:
            logger.warning("%s; trying the checkpoint before", error)
    raise ValueError(f"none of the checkpoints can be read: {', '.join(map(str, paths))}")


@contextlib.contextmanager
def kept_alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from training a run, and removes what killed ones left half-written.

    When the process ends, however it does, the system lets go of the folder.

    Raises:
        BlockingIOError: another process is training the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise BlockingIOError(
                    f"another process is training the run in {folder}; wait for its end or stop it"
                ) from error
            logger.warning("%s cannot be locked (%s): train it once at a time", folder, error)
        for path in folder.iterdir():
            match = TEMPORARY_NAME.fullmatch(path.name)
            if match and not _is_running(int(match[1])):
                with contextlib.suppress(OSError):  # as on Windows, where it is in use
                    path.unlink()
        yield


def _lock(file: BinaryIO) -> None:
    """Locks a file for this process alone: workers that it forks do not have the lock."""
    if sys.platform == "win32":
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_running(pid: int) -> bool:
    if sys.platform == "win32":  # where os.kill would end it
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


# --- Chance --------------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """The states of all generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Sets what random_states gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])


@contextlib.contextmanager
def chance_of_its_own(seed: int) -> Iterator[None]:
    """Inside, torch draws from a seed; afterwards all goes on as if nothing had been drawn."""
    states = random_states()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_states(states)


# --- Runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A stretch of a run that trains one choice of layers.

    Attributes:
        layers: as in MaskRCNN.set_trainable.
        learning_rate: at the beginning, see LR_SCHEDULE.
        epochs: finished at its end, counted from the beginning of the run.
        start: epochs finished at its beginning.
    """

    layers: str
    learning_rate: float
    epochs: int
    start: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """What tells the stages of a run apart."""
        return self.layers, self.epochs


@dataclass
class Run:
    """The training of a model: where it stands, and what its last checkpoint holds.

    Attributes:
        log_dir: folder of checkpoints and logs; None before the first step.
        epoch: finished epochs.
        step: finished steps of the epoch that follows.
        totals: sums of losses, images and seconds over these steps.
        record: of the last finished epoch, as long as it has not been judged; else empty.
        saved: whether the last checkpoint that was due could be written.
        last: the key of the stage that came to its end last, in this process.
        ended: the keys of stages that came to an end, maybe early, before another one began.
        state: of a run that was resumed or interrupted, all that its checkpoint holds besides the
            weights: the above, stage, optimizer and random states.
        found: the checkpoints in the folder when the run was resumed, and when they were written.
    """

    log_dir: Path | None = None
    epoch: int = 0
    step: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    record: Record = field(default_factory=dict)
    saved: bool = False
    last: tuple[str, int] | None = None
    ended: list[tuple[str, int]] = field(default_factory=list)
    state: dict[str, Any] | None = None
    found: dict[Path, int] | None = None

    @property
    def stage(self) -> Stage | None:
        """The stage that the checkpoint was saved in."""
        return None if self.state is None else Stage(**self.state["stage"])

    def is_past(self, stage: Stage) -> bool:
        """Whether nothing of a stage is left to do."""
        judged = not self.record
        trained = self.epoch > stage.epochs or (self.epoch == stage.epochs and judged)
        return trained or stage.key in self.ended

    def continues(self, stage: Stage) -> bool:
        """Whether a stage is the one that the run was stopped in the middle of."""
        stopped = self.stage
        return (
            stopped is not None and stopped.layers == stage.layers and self.epoch < stopped.epochs
        )

    def enter(self, stage: Stage, trainer: Any) -> Stage:
        """Lets a trainer go on where the run stopped.

        Args:
            trainer: a training.Trainer.

        Returns:
            The stage with its first epoch.

        Raises:
            ValueError: an interrupted epoch has more steps than the config gives to one.
        """
        steps = trainer.config.STEPS_PER_EPOCH
        if self.step >= steps:
            raise ValueError(
                f"STEPS_PER_EPOCH must be above {self.step}, the steps that the interrupted epoch"
                f" has, got {steps}; go on with as many as before"
            )
        if self.last is not None and self.last != stage.key:
            self.ended.append(self.last)
        start = self.epoch
        if self.state is not None:
            set_random_states(self.state["random"])
            if self.stage is not None and self.continues(stage):
                trainer.load_state_dict(self.state)
                start = self.stage.start
        return dataclasses.replace(stage, start=start)

    def leave(self, stage: Stage) -> None:
        """Ends a stage; what its checkpoints hold besides the weights is of no more use."""
        self.state, self.last = None, stage.key

    def steps(self, config: Config) -> int:
        """Steps made since the beginning."""
        return self.epoch * config.STEPS_PER_EPOCH + self.step

    def add_step(self, losses: dict[str, float], images: int, seconds: float) -> None:
        """Counts a step of the epoch."""
        self.step += 1
        totals = Counter(self.totals)
        totals.update({"images": images, "seconds": seconds, **losses})
        self.totals = dict(totals)

    def mean_losses(self) -> dict[str, float]:
        """Means over the steps of the epoch."""
        sums = {k: v for k, v in self.totals.items() if k not in ("images", "seconds")}
        return {name: total / self.step for name, total in sums.items()}

    def finish_epoch(self, learning_rate: float) -> None:
        """Begins the next epoch; `record` tells of the one that ends."""
        means = self.mean_losses()
        self.record = {
            "epoch": self.epoch + 1,
            "steps": self.step,
            "images": round(self.totals["images"]),
            "seconds": round(self.totals["seconds"], 3),
            "learning_rate": learning_rate,
            "loss": sum(means.values()),
            **means,
        }
        self.epoch, self.step, self.totals = self.epoch + 1, 0, {}

    def checkpoint_path(self, config: Config) -> Path:
        """The file of the checkpoint that tells where the run stands now."""
        assert self.log_dir is not None
        step = f"-{self.step:06d}" if self.step else ""
        return self.log_dir / f"mask_rcnn_{config.NAME.lower()}_{self.epoch:04d}{step}.pth"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process trains this run; see kept_alone.

        Raises:
            BlockingIOError: one does, or has done so since this one was resumed.
        """
        with contextlib.ExitStack() as stack:
            fault = ""
            if distributed.is_main():
                assert self.log_dir is not None
                try:
                    stack.enter_context(kept_alone(self.log_dir))
                except BlockingIOError as error:
                    fault = str(error)
                if not fault and self.found is not None and self.found != self._checkpoints():
                    fault = (
                        f"another process has trained the run in {self.log_dir} since its"
                        " checkpoint was loaded; load the last one and go on with that"
                    )
            if fault := distributed.from_main(fault):
                raise BlockingIOError(fault)
            self.found = None  # from here on they are this process's own
            yield

    def _checkpoints(self) -> dict[Path, int]:
        assert self.log_dir is not None
        return {path: written_at(path) for path in checkpoints_in(self.log_dir)}

    def save(self, model: nn.Module, config: Config, stage: Stage, trainer_state: Record) -> str:
        """Writes a checkpoint, and removes those that KEEP_CHECKPOINTS does not keep.

        Returns:
            What went wrong, as on a full disk: training goes on, since the next one may be saved.

        Raises:
            OSError: it went wrong, and so did the last one, or there is none.
        """
        self.state = {
            "epoch": self.epoch,
            "step": self.step,
            "totals": self.totals,
            "record": self.record,
            "stage": dataclasses.asdict(stage),
            "ended": self.ended,
            "random": random_states(),
            **trainer_state,
        }
        fault = distributed.from_main(self._write(model, config) if distributed.is_main() else "")
        hopeless = fault and not self.saved
        self.saved = not fault
        if hopeless:
            raise OSError(fault)
        return fault

    def _write(self, model: nn.Module, config: Config) -> str:
        path = self.checkpoint_path(config)
        try:
            weights.save_weights(model, path, training=self.state)
        except (OSError, RuntimeError) as error:
            kept = checkpoints_in(path.parent)
            remedy = f"go on from {kept[0]}" if kept else "start anew: nothing of this run is saved"
            fault = f"the checkpoint {path} could not be written: {in_words(error)}"
            logger.error("%s", fault)
            return f"{fault}; make room and {remedy}"
        mark_as_newest(path, config.NAME)
        found = checkpoints_in(path.parent)
        place = found.index(path)
        for later in found[:place]:  # of a continuation that this one replaces
            later.replace(later.with_suffix(".old"))
        for old in found[place + config.KEEP_CHECKPOINTS :]:
            old.unlink(missing_ok=True)
        return ""

    def resume(self, model: nn.Module, file: weights.WeightFile) -> None:
        """Loads a checkpoint, so that the next training goes on from it."""
        weights.load_weights(model, file, verbose=False)
        state = file.training
        self.log_dir, self.step, self.totals, self.record = file.path.parent, 0, {}, {}
        self.state, self.saved, self.found = state, True, self._checkpoints()
        if state is None:
            match = FILE_NAME.fullmatch(file.path.name)
            self.epoch = int(match[1]) if match else 0
            logger.warning("%s holds weights alone: the optimizer starts anew", file.path)
            return
        self.epoch, self.step, self.totals = state["epoch"], state["step"], state["totals"]
        self.last, self.ended = None, list(state.get("ended", []))
        # An epoch is judged when it is in the history.
        if self.epoch not in (record["epoch"] for record in read_history(self.log_dir)):
            self.record = state["record"]
