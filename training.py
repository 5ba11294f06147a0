"""Training: optimizer, schedule, steps, validation, checkpoints, logs and several processes.

`fit` runs one stage and does not know the network: any module will do that maps (images, targets)
to a dict of losses. All that a run depends on is in its checkpoints, so that a run that was killed
and resumed ends, on a CPU, with the bits of one that was not.

A step is one change of the weights, from GRADIENT_ACCUMULATION batches of IMAGES_PER_GPU images in
each process. An epoch is STEPS_PER_EPOCH steps, whatever the size of the data set, which is read
again and again in orders that depend on SEED alone.
"""

import contextlib
import datetime
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
import weights
from config import Config
from dataset import Augmentation, EpochSampler, TorchDataset, make_loader, set_epoch

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Callback = Callable[[Record], Any]
AMP_DTYPES = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became NaN or infinite; the message names the loss and the images."""


# --- Several processes ---------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def average(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def from_main(value: Any) -> Any:
    """The value that the main process has, a plain Python object, in all processes."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def distributed(device: str | None = None) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did, and gives each one its device.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None for CUDA where there is one. Under torchrun
            "cuda" means the GPU of the process's number on its machine.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if chosen.type == "cuda":
        chosen = torch.device(
            "cuda", int(os.environ["LOCAL_RANK"]) if several else chosen.index or 0
        )
        torch.cuda.set_device(chosen)
    if several:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        if several:
            dist.destroy_process_group()


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
    """What the learning rate of a stage is multiplied with in its step 0, 1, ... steps - 1."""
    factor = min(1.0, (step + 1) / (config.WARMUP_STEPS + 1))
    if config.LR_SCHEDULE == "cosine":
        factor *= (1 + math.cos(math.pi * step / steps)) / 2
    elif config.LR_SCHEDULE == "step":
        factor *= 0.1 ** sum(step >= share * steps for share in config.LR_STEPS)
    return factor


# --- Checkpoints ---------------------------------------------------------------------------------


@dataclass
class Run:
    """Where the training of a model stands.

    Attributes:
        log_dir: folder of checkpoints and logs; None before the first step.
        epoch: finished epochs.
        step: finished steps of the epoch that follows.
        totals: sums of losses and seconds over these steps.
        record: what training tells of the last finished epoch, see fit.
        state: of a run that was resumed or interrupted, what else its checkpoint holds for the
            stage that it was in.
    """

    log_dir: Path | None = None
    epoch: int = 0
    step: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    record: Record = field(default_factory=dict)
    state: dict[str, Any] | None = None


def find_checkpoints(model_dir: str | Path, name: str) -> list[Path]:
    """Checkpoints of the newest run of this name that has any, the newest first."""
    runs = re.compile(re.escape(name.lower()) + r"(\d{8}T\d{4,6})")
    folders = {
        match[1]: path
        for path in (Path(model_dir).iterdir() if Path(model_dir).is_dir() else ())
        if (match := runs.fullmatch(path.name))
    }
    for _, folder in sorted(folders.items(), reverse=True):
        if found := checkpoints_in(folder):
            return found
    raise FileNotFoundError(
        f"no checkpoint of a run named {name.lower()!r} in {model_dir}; train first, or give the"
        " folder that holds its logs"
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest first."""
    pattern = re.compile(r"mask_rcnn_.*_(\d{4,})(?:-(\d+))?\.pth")  # -step: an interrupted epoch
    found = [
        (int(match[1]), int(match[2] or 0), path)
        for path in folder.iterdir()
        if (match := pattern.fullmatch(path.name))
    ]
    return [path for _, _, path in sorted(found, reverse=True)]


def first_readable(paths: Sequence[Path]) -> weights.WeightFile:
    """The first checkpoint that can be read; warns about those before it.

    Raises:
        ValueError: none can be read.
    """
    for path in paths:
        try:
            return weights.read_state_dict(path)
        except ValueError as error:
            logger.warning("%s; trying the checkpoint before", error)
    raise ValueError(f"none of the checkpoints can be read: {', '.join(map(str, paths))}")


def resume(model: nn.Module, run: Run, paths: Sequence[Path]) -> Path:
    """Loads the first checkpoint that can be read, and returns it."""
    file = first_readable(paths)
    weights.load_weights(model, file, verbose=False)
    path, state = file.path, file.training
    run.log_dir, run.step, run.totals, run.record, run.state = path.parent, 0, {}, {}, state
    if state is None:
        match = re.search(r"_(\d{4,})\.pth$", path.name)
        run.epoch = int(match[1]) if match else 0
        logger.warning("%s holds weights alone: the optimizer starts anew", path)
    else:
        run.epoch, run.step, run.totals = state["epoch"], state["step"], state["totals"]
        judged = {record["epoch"] for record in read_history(path.parent)}
        run.record = {} if run.epoch in judged else state["record"]
    return path


def random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
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


# --- Logs ----------------------------------------------------------------------------------------


def read_history(folder: Path) -> list[Record]:
    """The records of a run's finished epochs."""
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}; correct or remove it") from error


class Log:
    """history.jsonl, loss.png, best.pth and TensorBoard events in the folder of a run.

    Only the main process makes one that writes.

    Args:
        folder: made if it is not there.
        run: records of epochs that it has not finished are dropped.
    """

    def __init__(self, folder: Path, run: Run, config: Config) -> None:
        self.folder = folder
        self.path = folder / "history.jsonl"
        self.writer: Any = None
        self.records = [r for r in read_history(folder) if r["epoch"] <= run.epoch]
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._write()
        values = {"version": weights.VERSION, "torch": torch.__version__}
        values |= weights.plain(config.to_dict())
        text = json.dumps(values, indent=1)
        utils.write_atomic(folder / "config.json", lambda file: file.write(text.encode()))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("no TensorBoard events: pip install tensorboard")
        else:
            steps = run.epoch * config.STEPS_PER_EPOCH + run.step
            self.writer = SummaryWriter(folder, purge_step=steps)

    def _write(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        utils.write_atomic(self.path, lambda file: file.write(lines.encode()))

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def add(self, record: Record, checkpoint: Path, step: int) -> None:
        """Appends the record of an epoch; its checkpoint becomes best.pth if none was better."""
        self.records.append(record)
        if not is_main():
            return
        try:
            self._write()
            self.scalars({f"epoch/{k}": v for k, v in record.items() if k != "epoch"}, step)
            if self.epochs_since_best() == 0 and checkpoint.is_file():
                link(checkpoint, self.folder / "best.pth")
            if len(self.records) > 1:
                self._plot()
        except OSError as error:  # as on a full disk; the next epoch writes all records anew
            logger.error("the logs of epoch %d could not be written: %s", record["epoch"], error)

    def epochs_since_best(self) -> int:
        """Epochs since that of the highest segm_AP, or of the lowest val_loss if none has one."""
        scores = self._scores()
        best = max(scores)
        return 0 if best == -math.inf else len(scores) - 1 - scores.index(best)

    def is_judged(self) -> bool:
        """Whether the last epoch has a score, so that epochs_since_best may end the training."""
        return self._scores()[-1] > -math.inf

    def _scores(self) -> list[float]:
        """Of each epoch, the more the better; minus infinity for those without a score."""
        if any("segm_AP" in record for record in self.records):
            return [record.get("segm_AP", -math.inf) for record in self.records]
        return [-record.get("val_loss", math.inf) for record in self.records]

    def _plot(self) -> None:
        import visualize  # matplotlib is not needed to train

        names = [n for n in self.records[-1] if n.endswith("loss") and not n.startswith("val_")]
        train, valid = (
            [[record.get(prefix + name, math.nan) for name in names] for record in self.records]
            for prefix in ("", "val_")
        )
        visualize.plot_loss(train, valid, log_dir=self.folder, names=names)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


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


# --- Steps ---------------------------------------------------------------------------------------


def split_batch(batch: dict[str, Any]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images and targets as MaskRCNN.forward takes them, from a batch of dataset.collate."""
    names = ("class_ids", "boxes", "masks", "active_class_ids")
    columns = zip(*(batch[name] for name in names), strict=True)
    return batch["images"], [dict(zip(names, column, strict=True)) for column in columns]


def endless(loader: DataLoader[dict[str, Any]], start: int) -> Iterator[dict[str, Any]]:
    """The batches of a run from number `start` on: one pass through the data after the other."""
    length, sampler = len(loader), loader.sampler
    assert isinstance(sampler, EpochSampler)
    for number in itertools.count(start // length):
        set_epoch(loader, number)
        sampler.start = start % length * (loader.batch_size or 1)
        yield from loader
        start = 0


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
        batches: Iterator[dict[str, Any]],
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
            batch = next(self.batches)
            with contextlib.ExitStack() as context:
                if i < count - 1 and isinstance(self.network, DistributedDataParallel):
                    context.enter_context(self.network.no_sync())  # one exchange per step
                with autocast(self.device, self.config):
                    losses = self.network(*split_batch(batch))
                names, values = list(losses), torch.stack(list(losses.values()))
                self.scaler.scale(values.sum() / count).backward()
            rows.append(values.detach())
            image_ids.append(batch["image_ids"])
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

    def _explain(self, names: list[str], rows: list[list[float]], image_ids: list[Any]) -> str:
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader[dict[str, Any]], config: Config) -> Record:
    """Mean losses, as val_*, of the first VALIDATION_STEPS batches; the same samples each time."""
    device = next(model.parameters()).device
    totals: Counter[str] = Counter()
    count = 0
    with evaluating(model), chance_of_its_own(config.SEED), autocast(device, config):
        for batch in itertools.islice(loader, config.VALIDATION_STEPS):
            losses = model(*split_batch(batch))
            mean = average(torch.stack(list(losses.values()))).tolist()
            totals.update(dict(zip(losses, mean, strict=True)))
            count += 1
    record = {f"val_{name}": value / count for name, value in totals.items()}
    return {"val_loss": sum(record.values()), **record} if record else {}


class Interrupts:
    """Counts SIGINT and SIGTERM instead of ending the process, until the second of them."""

    def __init__(self) -> None:
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

    def anywhere(self, device: torch.device) -> bool:
        """Whether any process was interrupted, so that all of them stop at the same step."""
        return bool(average(torch.tensor(float(self.count), device=device)) > 0)


# --- Stages --------------------------------------------------------------------------------------


def train_epoch(
    trainer: Trainer, run: Run, stage: dict[str, Any], log: Log, interrupts: Interrupts
) -> None:
    """Trains to the end of the epoch, or until an interrupt."""
    config = trainer.config
    steps = config.STEPS_PER_EPOCH
    first, last = stage["start"] * steps, stage["epochs"] * steps
    totals = Counter(run.totals)
    title = f"epoch {run.epoch + 1}/{stage['epochs']}"
    with tqdm(total=steps, initial=run.step, desc=title, disable=not is_main()) as bar:
        while run.step < steps:
            start = time.perf_counter()
            done = run.epoch * steps + run.step
            rate = stage["learning_rate"] * rate_factor(done - first, last - first, config)
            losses, images = trainer.step(rate)
            seconds = time.perf_counter() - start
            run.step += 1
            totals.update({"images": images * world_size(), "seconds": seconds, **losses})
            run.totals = dict(totals)
            speed = totals["images"] / totals["seconds"]
            means = {name: totals[name] / run.step for name in losses}
            log.scalars({**losses, "learning_rate": rate, "images/s": speed}, done + 1)
            short = (f"{name.removesuffix('_loss')} {value:.3f}" for name, value in means.items())
            bar.set_postfix_str(f"{speed:.1f} images/s, " + ", ".join(short), refresh=False)
            bar.update()
            if run.step < steps and interrupts.anywhere(trainer.device):
                return
    run.record = {
        "epoch": run.epoch + 1,
        "steps": steps,
        "images": round(totals["images"]),
        "seconds": round(totals["seconds"], 3),
        "learning_rate": rate,
        "loss": sum(means.values()),
        **means,
    }
    run.epoch, run.step, run.totals = run.epoch + 1, 0, {}


def checkpoint_path(run: Run, config: Config) -> Path:
    assert run.log_dir is not None
    step = f"-{run.step:06d}" if run.step else ""
    return run.log_dir / f"mask_rcnn_{config.NAME.lower()}_{run.epoch:04d}{step}.pth"


def save_checkpoint(
    model: nn.Module, config: Config, run: Run, stage: dict[str, Any], trainer: Trainer
) -> str:
    """Writes the state of a run; returns what went wrong, as on a full disk, instead of raising."""
    path = checkpoint_path(run, config)
    run.state = {
        "epoch": run.epoch,
        "step": run.step,
        "totals": run.totals,
        "record": run.record,
        "stage": stage,
        "random": random_states(),
        **trainer.state_dict(),
    }
    if not is_main():
        return ""
    try:
        weights.save_weights(model, path, training=run.state)
    except (OSError, RuntimeError) as error:
        message = f"{path} could not be written: {error}; the checkpoint before it is still there"
        logger.error("%s", message)
        return message
    found = checkpoints_in(path.parent)
    place = found.index(path)
    for later in found[:place]:  # of a course that was given up: this one began before them
        later.replace(later.with_suffix(".old"))
    for old in found[place + config.KEEP_CHECKPOINTS :]:
        old.unlink(missing_ok=True)
    return ""


def fit(
    model: nn.Module,
    config: Config,
    run: Run,
    model_dir: Path,
    train: utils.Dataset,
    val: utils.Dataset | None,
    learning_rate: float,
    epochs: int,
    layers: str,
    augmentation: Augmentation | None = None,
    callbacks: Sequence[Callback] = (),
    evaluate: Callable[[Any], dict[str, float]] | None = None,
) -> None:
    """One stage of a run: MaskRCNN.train_model, which has made `layers` trainable, says more."""
    run.record = from_main(run.record)
    before: dict[str, Any] = (
        {"layers": None, "start": 0} if run.state is None else run.state["stage"]
    )
    # A stage that ended early is over, if the checkpoint is of one that followed it.
    over = before["start"] > 0 and before["layers"] != layers and epochs < before["epochs"]
    if over or run.epoch > epochs or (run.epoch == epochs and not run.record):
        logger.info("epoch %d of %d is done: nothing to train", run.epoch, epochs)
        return
    if run.step >= config.STEPS_PER_EPOCH:
        raise ValueError(
            f"STEPS_PER_EPOCH must be above {run.step}, the steps that the interrupted epoch has,"
            f" got {config.STEPS_PER_EPOCH}; go on with as many as before"
        )
    if run.log_dir is None:
        now = datetime.datetime.now().strftime("%Y%m%dT%H%M%S")
        run.log_dir = from_main(Path(model_dir) / f"{config.NAME.lower()}{now}")

    def loader(data: TorchDataset, shuffle: bool) -> DataLoader[dict[str, Any]]:
        sampler = EpochSampler(data, world_size(), rank(), shuffle=shuffle, seed=config.SEED)
        return make_loader(data, config, shuffle, sampler)

    data = TorchDataset(train, config, augmentation)
    train_loader = loader(data, shuffle=True)
    val_loader = None if val is None else loader(TorchDataset(val, config), shuffle=False)
    done = run.epoch * config.STEPS_PER_EPOCH + run.step
    batches = endless(train_loader, done * config.GRADIENT_ACCUMULATION)
    trainer = Trainer(model, config, batches, data.describe)
    start = run.epoch
    if run.state is not None:
        set_random_states(run.state["random"])
        if before["layers"] == layers and run.epoch < before["epochs"]:
            start = before["start"]
            trainer.load_state_dict(run.state)
    stage = {"layers": layers, "learning_rate": learning_rate, "epochs": epochs, "start": start}

    log = Log(run.log_dir, run, config)
    fault = ""
    try:
        while True:
            if run.record:  # of an epoch that is trained and saved, but not judged
                record = run.record
                if val_loader is not None:
                    record |= validate(model, val_loader, config)
                if evaluate and (run.epoch % config.EVALUATE_EVERY == 0 or run.epoch >= epochs):
                    with chance_of_its_own(config.SEED):
                        scores = from_main(evaluate(model))
                    record |= {name: float(value) for name, value in scores.items()}
                # An AP is NaN where there are no objects, and JSON has no word for that.
                record = {name: value for name, value in record.items() if math.isfinite(value)}
                run.record = {}
                log.add(record, checkpoint_path(run, config), run.epoch * config.STEPS_PER_EPOCH)
                if from_main(wants_to_stop(log, config, callbacks, run.epoch - start)):
                    break
            if run.epoch >= epochs:
                break
            run.state = None
            with Interrupts() as interrupts:
                train_epoch(trainer, run, stage, log, interrupts)
                fault = save_checkpoint(model, config, run, stage, trainer)
                interrupted = interrupts.anywhere(trainer.device)
            if interrupted:
                raise KeyboardInterrupt(fault or f"saved {checkpoint_path(run, config)}")
        run.state = None
    finally:
        log.close()
    if fault:
        raise OSError(fault)


def wants_to_stop(
    log: Log, config: Config, callbacks: Sequence[Callback], stage_epochs: int
) -> bool:
    """Whether a callback says so, or the best epoch is too old; each stage has its patience."""
    if not is_main():
        return False
    answers = [callback(log.records[-1]) for callback in callbacks]
    stale = min(log.epochs_since_best(), stage_epochs)
    if config.EARLY_STOPPING is not None and log.is_judged() and stale >= config.EARLY_STOPPING:
        logger.info("no improvement in %d epochs: the training stops", stale)
        return True
    return True in answers
