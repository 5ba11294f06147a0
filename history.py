"""What a run of training leaves besides checkpoints: a history, pictures of it, and events."""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch

import distributed
import utils
import weights
from config import Config

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def read_history(folder: Path) -> list[Record]:
    """The records of a run's finished epochs."""
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}; correct or remove it") from error


def in_words(error: BaseException) -> str:
    """Why a file could not be written; torch names a line of its C++ instead."""
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    text = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
    return text or type(error).__name__


class History:
    """The records of a run's epochs, and the files in its folder that show them.

    These are history.jsonl, config.json, loss.png, best.pth and TensorBoard events. Only the main
    process writes; all processes know the records.

    Args:
        folder: made if it is not there.
        config: written to config.json.
        epochs: that the run has finished; records of later ones are dropped.
        steps: that the run has made; later events are dropped.
    """

    def __init__(self, folder: Path, config: Config, epochs: int, steps: int) -> None:
        self.folder = folder
        self.path = folder / "history.jsonl"
        self.writer: Any = None
        self.records = [r for r in read_history(folder) if r["epoch"] <= epochs]
        if not distributed.is_main():
            return
        values = {"version": weights.VERSION, "torch": torch.__version__}
        values |= weights.plain(config.to_dict())
        text = json.dumps(values, indent=1)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write()
            utils.write_atomic(folder / "config.json", lambda file: file.write(text.encode()))
        except OSError as error:
            raise OSError(
                f"the logs of a run could not be written to {folder}: {in_words(error)}; make room"
                " there, or choose another folder"
            ) from error
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("no TensorBoard events: pip install tensorboard")
        else:
            self.writer = SummaryWriter(folder, purge_step=steps)

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):  # events are lost on a full disk, and nothing else
                self.writer.close()

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Adds events to TensorBoard's, as long as they can be written."""
        if self.writer is None:
            return
        try:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        except OSError as error:
            logger.error("no more TensorBoard events: %s", in_words(error))
            self.writer = None

    def add(self, record: Record, checkpoint: Path, step: int) -> None:
        """Appends the record of an epoch.

        Its checkpoint becomes best.pth if its score is above all before, or if no epoch has one.
        """
        self.records.append(record)
        if not distributed.is_main():
            return
        try:
            self._write()
            self.add_scalars({f"epoch/{k}": v for k, v in record.items() if k != "epoch"}, step)
            if self._epochs_since_best() == 0 and checkpoint.is_file():
                link(checkpoint, self.folder / "best.pth")
            if len(self.records) > 1:
                self._plot()
        except OSError as error:  # as on a full disk; the next epoch writes all records anew
            message = "the logs of epoch %d could not be written: %s"
            logger.error(message, record["epoch"], in_words(error))

    def is_stale(self, epochs: int) -> bool:
        """Whether the last epoch has a score and the best one was at least so many epochs ago."""
        scores = self._scores()
        return bool(scores) and scores[-1] > -math.inf and self._epochs_since_best() >= epochs

    def _epochs_since_best(self) -> int:
        scores = self._scores()
        best = max(scores)
        return 0 if best == -math.inf else len(scores) - 1 - scores.index(best)

    def _scores(self) -> list[float]:
        """The segm_AP of each epoch, or minus the val_loss if none has one; -inf for no score."""
        if any("segm_AP" in record for record in self.records):
            return [record.get("segm_AP", -math.inf) for record in self.records]
        return [-record.get("val_loss", math.inf) for record in self.records]

    def _write(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        utils.write_atomic(self.path, lambda file: file.write(lines.encode()))

    def _plot(self) -> None:
        import visualize  # matplotlib is not needed to train

        names = [n for n in self.records[-1] if n.endswith("loss") and not n.startswith("val_")]
        train, valid = (
            [[record.get(prefix + name, math.nan) for name in names] for record in self.records]
            for prefix in ("", "val_")
        )
        visualize.plot_loss(train, valid, log_dir=self.folder, names=names)


def link(source: Path, target: Path) -> None:
    """Makes target another name of a file, or a copy of it where the file system has no links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
