"""From utils.Dataset to batches of tensors: augmentation, items, collate and the loader.

An augmentation is any callable(image, masks, rng) -> (image, masks):
    image: [H, W, C] uint8; masks: [H, W, N] bool, one per instance, crowds included.
    rng: a numpy Generator, the only source of chance that keeps runs reproducible.
It may change height and width, but not the number of instances: one that leaves the image gets an
empty mask and is dropped later. It must not write into its arguments, and a lambda cannot be sent
to the worker processes of Windows and macOS.
"""

import copy
import itertools
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.distributed import DistributedSampler

import utils
from config import Config

logger = logging.getLogger(__name__)

Augmentation = Callable[
    [np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]
]
Pair = tuple[np.ndarray, np.ndarray]


# --- Augmentation --------------------------------------------------------------------------------


def augment(
    augmentation: Augmentation, image: np.ndarray, masks: np.ndarray, rng: np.random.Generator
) -> Pair:
    """Calls an augmentation and checks what it returns.

    Raises:
        ValueError: other shapes, dtypes or number of masks than this module's text asks for.
    """
    # Contiguous, since torch and OpenCV do not take the views that flips return.
    result = augmentation(np.ascontiguousarray(image), np.ascontiguousarray(masks), rng)
    pair = result if isinstance(result, tuple) else (result,)
    form = [(x.dtype, x.shape) if isinstance(x, np.ndarray) else type(x) for x in pair]
    size = pair[0].shape[:2] if isinstance(pair[0], np.ndarray) else ()
    channels, count = image.shape[2], masks.shape[2]
    if form != [(np.uint8, (*size, channels)), (np.bool_, (*size, count))] or 0 in size:
        name = getattr(augmentation, "__qualname__", type(augmentation).__qualname__)
        got = ", ".join(f"{f[0]} {list(f[1])}" if isinstance(f, tuple) else str(f) for f in form)
        raise ValueError(
            f"augmentation {name} must return (image, masks), uint8 [H, W, {channels}] and bool"
            f" [H, W, {count}], got {got}"
        )
    return result


class Compose:
    """Augmentations one after the other."""

    def __init__(self, *augmentations: Augmentation) -> None:
        self.augmentations = augmentations

    def __call__(self, image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Pair:
        for augmentation in self.augmentations:
            image, masks = augment(augmentation, image, masks, rng)
        return image, masks


def horizontal_flip(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Pair:
    """Left becomes right, in every other case."""
    return (image[:, ::-1], masks[:, ::-1]) if rng.random() < 0.5 else (image, masks)


def vertical_flip(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Pair:
    """Top becomes bottom, in every other case."""
    return (image[::-1], masks[::-1]) if rng.random() < 0.5 else (image, masks)


def rot90(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Pair:
    """Turns by 0, 90, 180 or 270 degrees."""
    quarters = int(rng.integers(4))
    return np.rot90(image, quarters), np.rot90(masks, quarters)


@dataclass(frozen=True)
class ScaleJitter:
    """Zooms by a random factor at a random place; the image keeps its size, black around it."""

    smallest: float = 0.5
    largest: float = 2.0

    def __call__(self, image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Pair:
        size = image.shape[:2]
        # Uniform in the logarithm: as often twice as large as half as large.
        scale = np.exp(rng.uniform(np.log(self.smallest), np.log(self.largest)))
        if scale >= 1:
            part = _random_part(size, 1 / scale, rng)
            return _resize(image[part], masks[part], size)
        part = _random_part(size, scale, rng)
        canvas = np.zeros_like(image), np.zeros_like(masks)
        shape = canvas[0][part].shape[:2]
        canvas[0][part], canvas[1][part] = _resize(image, masks, shape)
        return canvas


@dataclass(frozen=True)
class RandomCrop:
    """Cuts out a part with sides of `smallest` to 1 of the image's.

    Ten parts are tried for one that shows a bit of an object; if none does, the last is taken.
    """

    smallest: float = 0.5

    def __call__(self, image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Pair:
        for _ in range(10):
            part = _random_part(image.shape, rng.uniform(self.smallest, 1), rng)
            if masks[part].any():
                break
        return image[part], masks[part]


@dataclass(frozen=True)
class ColorJitter:
    """Scales brightness, contrast and (of RGB) saturation by factors of 1 - x to 1 + x each."""

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __call__(self, image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Pair:
        brightness, contrast, saturation = (
            np.float32(rng.uniform(1 - x, 1 + x))
            for x in (self.brightness, self.contrast, self.saturation)
        )
        pixels = image.astype(np.float32) * brightness
        mean = pixels.mean()
        pixels = mean + (pixels - mean) * contrast
        if image.shape[2] == 3:
            gray = pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
            pixels = gray + (pixels - gray) * saturation
        return pixels.round().clip(0, 255).astype(np.uint8), masks


def _random_part(
    shape: Sequence[int], share: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Rows and columns of a part whose sides are `share` of the image's, anywhere in it."""
    lengths = [max(1, round(side * share)) for side in shape[:2]]
    starts = [int(rng.integers(side - n + 1)) for side, n in zip(shape[:2], lengths, strict=True)]
    rows, columns = (slice(y, y + n) for y, n in zip(starts, lengths, strict=True))
    return rows, columns


def _resize(image: np.ndarray, masks: np.ndarray, shape: Sequence[int]) -> Pair:
    """Both about half-pixel centres: the image antialiased, the masks by the nearest pixel."""
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    planes = F.interpolate(planes, tuple(shape[:2]), mode="bilinear", antialias=True)
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip(shape[:2], masks.shape[:2], strict=True)
    )
    return planes[0].permute(1, 2, 0).numpy(), masks[rows[:, None], columns]


# --- Items ---------------------------------------------------------------------------------------


class _PackedList(Sequence[Any]):
    """A read-only list, pickled item by item into one object that forked workers share.

    To look at a Python object writes its reference count, so that in the end each worker would
    hold a copy of all annotations (pytorch/pytorch#13246).
    """

    def __init__(self, items: Sequence[Any]) -> None:
        pickles = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self.ends = np.cumsum([0, *map(len, pickles)])
        self.data = b"".join(pickles)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        return pickle.loads(self.data[self.ends[index] : self.ends[index + 1]])


class TorchDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Images and instances of a utils.Dataset as tensors, resized as the config says.

    Item i is image i as a dict:
        image: [C, H, W] uint8.
        window: [4] float32, network pixels, the part of it that is not padding.
        class_ids: [N] int64; negative is a crowd.
        boxes: [N, (y1, x1, y2, x2)] float32, network pixels, tight around the masks.
        masks: [N, h, w] bool, the part in the box at MINI_MASK_SHAPE; without USE_MINI_MASK
            [N, H, W] bool.
        active_class_ids: [K] bool, the classes that the image's source annotates.
        image_id: int, of the utils.Dataset, see describe().
    What is left to chance depends on (config.SEED, epoch, i) alone.

    Args:
        dataset: prepared. Each image of its image_info is kept packed, so changes made later
            are not seen.
        config: resizing, masks, seed, and what to do with images that are empty or unreadable.
        augmentation: see this module's text; applied before resizing. None for validation.

    Raises:
        ValueError: no images, or NUM_CLASSES is not that of the data set. On access: an image or
            annotation that cannot be used (unless SKIP_UNREADABLE_IMAGES), or an augmentation
            that fails, with the image's id and path.
    """

    def __init__(
        self, dataset: utils.Dataset, config: Config, augmentation: Augmentation | None = None
    ) -> None:
        config.validate()
        if dataset.num_images == 0:
            raise ValueError("a data set must have images to train on, got none; add_image first")
        if dataset.num_classes != config.NUM_CLASSES:
            raise ValueError(
                f"NUM_CLASSES must be {dataset.num_classes} as in the data set, background"
                f" included, got {config.NUM_CLASSES}"
            )
        self.dataset = copy.copy(dataset)
        self.dataset.image_info = _PackedList(dataset.image_info)  # type: ignore[assignment]
        self.config = config
        self.augmentation = augmentation
        # Shared, because workers that outlive an epoch have their own copy of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._logged = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return self.dataset.num_images

    def set_epoch(self, epoch: int) -> None:
        """Changes what is left to chance; to be called between two runs through a loader."""
        self._epoch.fill_(epoch)

    def describe(self, image_id: int) -> str:
        """How messages name an image: its source, id and path."""
        info = self.dataset.image_info[image_id]
        path = "" if info["path"] is None else f" ({info['path']})"
        return f"{info['source']}.{info['id']}{path}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_id = range(len(self))[index]
        rng = np.random.default_rng((self.config.SEED, int(self._epoch), image_id))
        for _ in range(100):
            item = self._load(image_id, rng)
            if item is not None:
                return item
            # Anywhere, not the next one: data sets may hold their empty images in a row.
            image_id = int(rng.integers(len(self)))
        raise ValueError(
            "a data set must have images that can be used, but 100 were skipped in a row, the"
            f" last {self.describe(image_id)}; check SKIP_EMPTY_IMAGES and the log"
        )

    def _load(self, image_id: int, rng: np.random.Generator) -> dict[str, Any] | None:
        """The item of an image, or None if the config says to skip it."""
        config = self.config
        try:
            image, masks, class_ids = self._read(image_id)
        except Exception as error:  # whatever a decoder or the user's load_mask stumbles over
            message = f"image {self.describe(image_id)} cannot be used: {error!r}"
            if not config.SKIP_UNREADABLE_IMAGES:
                remedy = "correct or remove it, or set SKIP_UNREADABLE_IMAGES"
                raise ValueError(f"{message}; {remedy}") from error
            self._log_once(image_id, logging.WARNING, f"{message}; another takes its place")
            return None
        if self.augmentation is not None:
            try:
                image, masks = augment(self.augmentation, image, masks, rng)
            except Exception as error:
                raise ValueError(f"image {self.describe(image_id)}: {error!r}") from error

        image, window, scale, padding, crop = utils.resize_image(
            image,
            min_dim=config.IMAGE_MIN_DIM,
            max_dim=config.IMAGE_MAX_DIM,
            min_scale=config.IMAGE_MIN_SCALE,
            mode=config.IMAGE_RESIZE_MODE,
            rng=rng,
        )
        height, width = image.shape[:2]
        if height % 64 or width % 64:
            raise ValueError(
                f"image sides must be multiples of 64 in mode 'none', got {height} x {width} of"
                f" {self.describe(image_id)}; use IMAGE_RESIZE_MODE 'pad64'"
            )
        masks = utils.resize_mask(masks, scale, padding, crop)
        boxes = utils.extract_bboxes(masks)
        keep = self._choose(image_id, boxes, class_ids, rng)
        if len(keep) < len(class_ids):
            masks, boxes, class_ids = masks[:, :, keep], boxes[keep], class_ids[keep]
        if config.SKIP_EMPTY_IMAGES and not (class_ids > 0).any():
            return None

        if config.USE_MINI_MASK:
            masks = utils.minimize_mask(boxes, masks, config.MINI_MASK_SHAPE)
        active = np.zeros(config.NUM_CLASSES, dtype=bool)
        active[self.dataset.source_class_ids[self.dataset.image_info[image_id]["source"]]] = True
        return {
            "image": _planes(image),
            "window": torch.tensor(window, dtype=torch.float32),
            "class_ids": torch.from_numpy(class_ids),
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "masks": _planes(masks),
            "active_class_ids": torch.from_numpy(active),
            "image_id": image_id,
        }

    def _read(self, image_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image [H, W, C] uint8, masks [H, W, N] bool and class ids [N] int64, checked."""
        image = self.dataset.load_image(image_id)
        image = utils.as_uint8_image(image, self.config.IMAGE_CHANNEL_COUNT)
        masks, class_ids = self.dataset.load_mask(image_id)
        class_ids = np.array(class_ids, dtype=np.int64)
        if class_ids.ndim != 1 or masks.shape != (*image.shape[:2], len(class_ids)):
            raise ValueError(
                f"load_mask must return masks [{image.shape[0]}, {image.shape[1]}, N], as large"
                f" as the upright image, and class ids [N], got {list(masks.shape)} and"
                f" {list(class_ids.shape)}"
            )
        wrong = (class_ids == 0) | (abs(class_ids) >= self.config.NUM_CLASSES)
        if wrong.any():
            raise ValueError(
                f"class ids must be in 1..{self.config.NUM_CLASSES - 1}, or negative for crowds,"
                f" got {class_ids[wrong].tolist()}"
            )
        return image, masks.astype(bool, copy=False), class_ids

    def _choose(
        self, image_id: int, boxes: np.ndarray, class_ids: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Indices of the instances to keep: those with pixels, at most MAX_GT_INSTANCES."""
        visible = boxes[:, 2] > 0
        if not visible.all():
            lost = f"{np.count_nonzero(~visible)} of {len(visible)} objects"
            message = f"image {self.describe(image_id)}: {lost} have no pixels left, dropped"
            # An augmentation that cuts parts out is expected to lose some.
            level = logging.INFO if self.augmentation is None else logging.DEBUG
            self._log_once(image_id, level, message)
        objects = np.flatnonzero(visible & (class_ids > 0))
        if len(objects) > self.config.MAX_GT_INSTANCES:
            objects = rng.choice(objects, self.config.MAX_GT_INSTANCES, replace=False)
        # All crowds: what lies in one that is left out would be taught as background.
        return np.sort(np.concatenate([objects, np.flatnonzero(visible & (class_ids < 0))]))

    def _log_once(self, image_id: int, level: int, message: str) -> None:
        if not self._logged[image_id]:
            self._logged[image_id] = True
            logger.log(level, message)


def _planes(array: np.ndarray) -> Tensor:
    """[H, W, N] as a tensor [N, H, W] in memory of its own."""
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))


# --- Batches -------------------------------------------------------------------------------------


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of the items of TorchDataset, images of several sizes included.

    Returns:
        images: [B, C, H, W] uint8, smaller ones padded with zeros below and to the right, so
            that boxes and windows stay right; full masks are padded alike.
        windows: [B, 4] float32, network pixels. active_class_ids: [B, K] bool.
        class_ids, boxes, masks, image_ids: lists of length B.
    """
    images = [item["image"] for item in items]
    masks = [item["masks"] for item in items]
    if len({image.shape for image in images}) > 1:
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))

        def pad(x: Tensor) -> Tensor:
            return F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]))

        # Mini masks are all of one shape, so here they cannot all be as large as their images.
        if all(m.shape[1:] == image.shape[1:] for m, image in zip(masks, images, strict=True)):
            masks = [pad(m) for m in masks]
        images = [pad(image) for image in images]
    return {
        "images": torch.stack(images),
        "windows": torch.stack([item["window"] for item in items]),
        "active_class_ids": torch.stack([item["active_class_ids"] for item in items]),
        "class_ids": [item["class_ids"] for item in items],
        "boxes": [item["boxes"] for item in items],
        "masks": masks,
        "image_ids": [item["image_id"] for item in items],
    }


class EpochSampler(DistributedSampler[Any]):
    """The share that a process has of an epoch: all images in an order from seed and epoch alone.

    Unlike torch's RandomSampler it forgets nothing when a run is resumed.

    Attributes:
        start: how many images of the share to leave out at its beginning, for a run that is
            resumed amid an epoch.
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(super().__iter__(), self.start, None)


def make_loader(
    dataset: torch.utils.data.Dataset[dict[str, Any]],
    config: Config,
    shuffle: bool,
    sampler: Sampler[Any] | None = None,
) -> DataLoader[dict[str, Any]]:
    """Batches of IMAGES_PER_GPU images, the last one smaller; call set_epoch before each run.

    Args:
        dataset: a TorchDataset, or another one with such items.
        config: IMAGES_PER_GPU, NUM_WORKERS and SEED.
        shuffle: a new order in each epoch, from SEED and epoch alone; False for validation.
        sampler: what else decides on the order and the share of a process, e.g. an EpochSampler of
            several processes; shuffle is not looked at then.
    """
    if sampler is None:
        sampler = EpochSampler(dataset, 1, 0, shuffle=shuffle, seed=config.SEED)
    workers = config.NUM_WORKERS
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        workers = 0 if sys.platform == "win32" else min(4, len(affinity(0)))
    return DataLoader(
        dataset,
        batch_size=config.IMAGES_PER_GPU,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_set_signals,
        # Seeds the workers' global generators, and leaves that of the training alone.
        generator=torch.Generator().manual_seed(config.SEED),
        persistent_workers=workers > 0,
    )


def set_epoch(loader: DataLoader[dict[str, Any]], epoch: int) -> None:
    """Gives the next run through a loader the order and the augmentation of this epoch."""
    for part in (loader.dataset, loader.sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def _set_signals(worker: int) -> None:
    # Ctrl-C reaches the workers too; the training decides what is still needed of them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # forked workers have the training's handler
