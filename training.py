"""Training: optimizer, steps, epochs, validation, and `fit`, which makes a stage of them.

Nothing here knows the network: any module will do that maps (images, targets) to a dict of losses.

A step is one change of the weights, from GRADIENT_ACCUMULATION batches of IMAGES_PER_GPU images in
each process. An epoch is STEPS_PER_EPOCH steps, whatever the size of the data set, which is read
again and again in orders that depend on SEED alone.
"""

import contextlib
import itertools
import logging
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

import utils
from checkpoints import Run, Stage, chance_of_its_own, make_folder
from config import Config
from dataset import Augmentation, Batch, EpochSampler, TorchDataset, make_loader, set_epoch
from distributed import average, from_main, is_main, world_size
from history import History, Record

logger = logging.getLogger(__name__)

Callback = Callable[[Record], Any]
AMP_DTYPES = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DataWorkerError(ChildProcessError):
    """A process that loads data was killed, mostly by the system because memory ran out."""


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient became NaN or infinite; the message names the loss and the images."""


@dataclass(frozen=True)
class Data:
    """What a stage learns from, and what it is validated on."""

    train: utils.Dataset
    val: utils.Dataset | None = None
    augmentation: Augmentation | None = None


@dataclass(frozen=True)
class Hooks:
    """What is done with the model and the record of each epoch; see MaskRCNN.train_model."""

    evaluate: Callable[[Any], dict[str, float]] | None = None
    callbacks: Sequence[Callback] = field(default=())


# --- Optimizer -----------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """OPTIMIZER for what is trainable; BatchNorm's scales and shifts do not decay."""
    norms = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for parameter in module.parameters()
    }
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in chosen if p not in norms], "weight_decay": config.WEIGHT_DECAY},
        {"params": [p for p in chosen if p in norms], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.OPTIMIZER == "adamw":
        return torch.optim.AdamW(groups, betas=(config.LEARNING_MOMENTUM, 0.999))
    return torch.optim.SGD(groups, lr=config.LEARNING_RATE, momentum=config.LEARNING_MOMENTUM)


def rate_factor(step: int, steps: int, config: Config) -> float:
    """The factor on the learning rate in step `step` of the `steps` of a stage, from 0."""
    factor = min(1.0, (step + 1) / (config.WARMUP_STEPS + 1))
    if config.LR_SCHEDULE == "cosine":
        factor *= (1 + math.cos(math.pi * step / steps)) / 2
    elif config.LR_SCHEDULE == "step":
        factor *= 0.1 ** sum(step >= share * steps for share in config.LR_STEPS)
    return factor


# --- Steps ---------------------------------------------------------------------------------------


def endless(loader: DataLoader[Any], start: int) -> Iterator[Batch]:
    """The batches of a run from number `start` on: one pass through the data after the other.

    torch calls the passes epochs; they are not those of the run.
    """
    length, sampler = len(loader), loader.sampler
    assert isinstance(sampler, EpochSampler)
    for number in itertools.count(start // length):
        set_epoch(loader, number)
        sampler.start = start % length * (loader.batch_size or 1)
        yield from loader
        start = 0


@contextlib.contextmanager
def explaining_killed_workers() -> Iterator[None]:
    """Turns what torch raises anywhere when a worker was killed into a DataWorkerError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        reason = str(error).partition("\n")[0].strip(" .")
        raise DataWorkerError(
            f"a process that loads data was killed, probably because memory ran out ({reason}); use"
            " fewer of them (--workers, NUM_WORKERS) or smaller batches, and go on from the last"
            " checkpoint"
        ) from error


def autocast(device: torch.device, config: Config) -> torch.autocast:
    """Inside, the network computes in 16 bits if config.AMP asks for it."""
    return torch.autocast(device.type, AMP_DTYPES[config.AMP], enabled=config.AMP is not None)


class Trainer:
    """Makes the steps of a stage.

    Args:
        model: maps (images, targets) to a dict of losses.
        batches: endless.
        describe: names the image of an image id, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        batches: Iterator[Batch],
        describe: Callable[[int], str],
    ) -> None:
        self.config, self.batches, self.describe = config, batches, describe
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.AMP == "fp16")
        self.network = model
        if world_size() > 1:
            device_ids = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(model, device_ids)

    def step(self, learning_rate: float) -> tuple[dict[str, float], int]:
        """Changes the weights once.

        Returns:
            The losses, averaged over accumulated batches and processes, and how many images this
            process has seen.

        Raises:
            NonFiniteLossError: before the weights are changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        count = self.config.GRADIENT_ACCUMULATION
        names: list[str] = []
        rows, image_ids = [], []
        for i in range(count):
            images, targets = next(self.batches)
            with contextlib.ExitStack() as context:
                if i < count - 1 and isinstance(self.network, DistributedDataParallel):
                    context.enter_context(self.network.no_sync())  # one exchange per step
                with autocast(self.device, self.config):
                    losses = self.network(images, targets)
                names, values = list(losses), torch.stack(list(losses.values()))
                self.scaler.scale(values.sum() / count).backward()
            rows.append(values.detach())
            image_ids.append([target["image_id"] for target in targets])
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.parameters, self.config.GRADIENT_CLIP_NORM)
        if self.scaler.is_enabled():  # it skips steps whose gradients overflow, and learns from it
            norm = torch.zeros_like(norm)
        values = torch.stack(rows)
        *mean, norm = average(torch.cat([values.mean(dim=0), norm[None]])).tolist()
        if not all(map(math.isfinite, [*mean, norm])):
            raise NonFiniteLossError(self._explain(names, values.tolist(), image_ids))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return dict(zip(names, mean, strict=True)), sum(map(len, image_ids))

    def _explain(
        self, names: list[str], rows: list[list[float]], image_ids: list[list[int]]
    ) -> str:
        """Which loss is not finite, and in which images."""
        remedy = "look at them, lower the learning rate or raise WARMUP_STEPS"
        what, members = "", [image_id for batch in image_ids for image_id in batch]
        for row, batch in zip(rows, image_ids, strict=True):
            wrong = [f"{n} is {v}" for n, v in zip(names, row, strict=True) if not math.isfinite(v)]
            if wrong:
                what, members = ", ".join(wrong), batch
                break
        images = ", ".join(map(self.describe, members))
        if not what and world_size() > 1:
            return f"a loss or gradient of a process is not finite; images of this one: {images}"
        return f"{what or 'a gradient is not finite'} for the images {images}; {remedy}"

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if AMP was not "fp16"
            self.scaler.load_state_dict(state["scaler"])


class Interrupts:
    """Notes the first SIGINT or SIGTERM; the second raises KeyboardInterrupt."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        logger.warning("interrupted: saving a checkpoint after this step; once more to leave now")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def anywhere(self) -> bool:
        """Whether any process was interrupted, so that all of them stop at the same step."""
        return bool(average(torch.tensor(float(self.count), device=self.device)) > 0)


# --- Validation ----------------------------------------------------------------------------------


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader[Any], config: Config) -> Record:
    """Mean losses, as val_*, of the first VALIDATION_STEPS batches; the same samples each time."""
    device = next(model.parameters()).device
    totals: Counter[str] = Counter()
    count = 0
    with utils.evaluating(model), chance_of_its_own(config.SEED), autocast(device, config):
        for images, targets in itertools.islice(loader, config.VALIDATION_STEPS):
            losses = model(images, targets)
            mean = average(torch.stack(list(losses.values()))).tolist()
            totals.update(dict(zip(losses, mean, strict=True)))
            count += 1
    record = {f"val_{name}": value / count for name, value in totals.items()}
    return {"val_loss": sum(record.values()), **record} if record else {}


# --- Stages --------------------------------------------------------------------------------------


@explaining_killed_workers()
def fit(model: Any, run: Run, stage: Stage, data: Data, hooks: Hooks) -> None:
    """Trains a stage to its end; MaskRCNN.train_model, which calls this, says more.

    Args:
        model: maps (images, targets) to a dict of losses, and has `config` and `model_dir`. What
            the stage trains has been made trainable.
        run: what has been done before.

    Raises:
        OSError: the checkpoint of the last epoch could not be written, nor that of two in a row;
            its subclasses BlockingIOError, another process trains this run, and DataWorkerError.
    """
    config = model.config
    run.record = from_main(run.record)
    if run.is_past(stage):
        logger.info("epoch %d of %d is done: nothing to train", run.epoch, stage.epochs)
        return

    train_set = TorchDataset(data.train, config, data.augmentation)
    train_loader = make_loader(train_set, config, shuffle=True)
    val_loader = None
    if data.val is not None:
        val_loader = make_loader(TorchDataset(data.val, config), config, shuffle=False)
    batches = endless(train_loader, run.steps(config) * config.GRADIENT_ACCUMULATION)
    trainer = Trainer(model, config, batches, train_set.describe)
    stage = run.enter(stage, trainer)
    if run.log_dir is None:
        run.log_dir = from_main(make_folder(model.model_dir, config.NAME) if is_main() else None)

    fault = ""
    with (
        run.alone(),
        History(run.log_dir, config, run.epoch, run.steps(config)) as history,
    ):
        if run.record:  # stopped after an epoch was trained and saved, before it was judged
            over = judge(model, run, stage, history, val_loader, hooks)
        else:
            over = has_lost_patience(run, stage, history, config)
        while run.epoch < stage.epochs and not over:
            run.state = None
            with Interrupts(trainer.device) as interrupts:
                train_epoch(trainer, run, stage, history, interrupts)
                fault = run.save(model, config, stage, trainer.state_dict())
            if interrupts.anywhere():
                if fault:
                    raise OSError(fault)
                raise KeyboardInterrupt(f"saved {run.checkpoint_path(config)}")
            over = judge(model, run, stage, history, val_loader, hooks)
    run.leave(stage)
    if fault:
        raise OSError(fault)


def train_epoch(
    trainer: Trainer, run: Run, stage: Stage, history: History, interrupts: Interrupts
) -> None:
    """Trains to the end of the epoch, or until an interrupt."""
    config, steps = trainer.config, trainer.config.STEPS_PER_EPOCH
    first, last = stage.start * steps, stage.epochs * steps
    title = f"epoch {run.epoch + 1}/{stage.epochs}"
    with utils.progress(total=steps, initial=run.step, desc=title, disable=not is_main()) as bar:
        while run.step < steps:
            factor = rate_factor(run.steps(config) - first, last - first, config)
            rate = stage.learning_rate * factor
            start = time.perf_counter()
            losses, images = trainer.step(rate)
            run.add_step(losses, images * world_size(), time.perf_counter() - start)

            speed = run.totals["images"] / run.totals["seconds"]
            scalars = {**losses, "learning_rate": rate, "images/s": speed}
            history.add_scalars(scalars, run.steps(config))
            means = (
                f"{name.removesuffix('_loss')} {value:.3f}"
                for name, value in run.mean_losses().items()
            )
            bar.set_postfix_str(f"{speed:.1f} images/s, " + ", ".join(means), refresh=False)
            bar.update()
            if run.step < steps and interrupts.anywhere():
                return
    run.finish_epoch(rate)


def judge(
    model: Any,
    run: Run,
    stage: Stage,
    history: History,
    val_loader: DataLoader[Any] | None,
    hooks: Hooks,
) -> bool:
    """Validates and evaluates the model after an epoch, and adds its record to the history.

    Returns:
        Whether the stage ends here, by a callback or for lack of progress.
    """
    config, record = model.config, run.record
    if val_loader is not None:
        record |= validate(model, val_loader, config)
    due = run.epoch % config.EVALUATE_EVERY == 0 or run.epoch >= stage.epochs
    if hooks.evaluate is not None and due:
        with chance_of_its_own(config.SEED):
            scores = from_main(hooks.evaluate(model))
        record |= {name: float(value) for name, value in scores.items()}
    # An AP is NaN where there are no objects, and JSON has no word for that.
    record = {name: value for name, value in record.items() if math.isfinite(value)}
    run.record = {}
    history.add(record, run.checkpoint_path(config), run.steps(config))
    answers = [callback(record) for callback in hooks.callbacks] if is_main() else []
    return from_main(True in answers or has_lost_patience(run, stage, history, config))


def has_lost_patience(run: Run, stage: Stage, history: History, config: Config) -> bool:
    """Whether EARLY_STOPPING ends a stage, whose patience begins with it."""
    patience = config.EARLY_STOPPING
    if patience is None or run.epoch - stage.start < patience or not history.is_stale(patience):
        return False
    logger.info("no improvement in %d epochs: the stage ends", patience)
    return True
