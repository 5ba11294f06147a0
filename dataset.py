"""From utils.Dataset to the batches that the network trains on: items, collate and the loader.

train = TorchDataset(dataset, config, horizontal_flip)
for images, targets in make_loader(train, config, shuffle=True):
    losses = model(images, targets)
"""

import copy
import functools
import itertools
import logging
import os
import pickle
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import distributed
import utils
from augmentation import Augmentation, augment
from augmentation import ColorJitter as ColorJitter
from augmentation import Compose as Compose
from augmentation import RandomCrop as RandomCrop
from augmentation import ScaleJitter as ScaleJitter
from augmentation import horizontal_flip as horizontal_flip
from augmentation import rot90 as rot90
from augmentation import vertical_flip as vertical_flip
from boxed_masks import BoxedMasks, read_masks
from config import Config, are_network_sides

logger = logging.getLogger(__name__)

# The annotations of an image as tensors, see TorchDataset.
Target = dict[str, Any]
# Images [B, C, H, W], see TorchDataset, and a target for each.
Batch = tuple[Tensor, list[Target]]


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


class TorchDataset(torch.utils.data.Dataset[tuple[Tensor, Target]]):
    """Images and instances of a utils.Dataset as tensors, resized as the config says.

    Item i is (image, target) of image i: image [C, H, W] uint8, or float32 in the mode
    "shortest_edge", and target a dict of
        class_ids: [N] int64; negative is a crowd.
        boxes: [N, (y1, x1, y2, x2)] float32, network pixels, tight around the masks.
        masks: [N, h, w] bool, the part in the box at MINI_MASK_SHAPE; without USE_MINI_MASK
            [N, H, W] bool.
        active_class_ids: [K] bool, the classes that the image's source annotates.
        window: [4] float32, network pixels, the part of the image that is not padding.
        image_id: int, of the utils.Dataset, see describe().
    What is left to chance depends on (config.SEED, epoch, i) alone.

    Args:
        dataset: prepared. Each image of its image_info is kept packed, so changes made later
            are not seen.
        config: resizing, masks, seed, and what to do with images that are empty or unreadable.
        augmentation: see augmentation.py; applied before resizing. None for validation.

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
        self.dataset = copy.copy(dataset.at_bit_depth(config.IMAGE_BIT_DEPTH))
        self.dataset.image_info = _PackedList(dataset.image_info)  # type: ignore[assignment]
        self.config = config
        self.augmentation = augmentation
        # Shared, because workers that outlive an epoch have their own copy of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._logged = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return self.dataset.num_images

    def set_epoch(self, epoch: int) -> None:
        """Changes what is left to chance; to be called between two passes through a loader."""
        self._epoch.fill_(epoch)

    def describe(self, image_id: int) -> str:
        """How messages name an image: its source, id and path."""
        info = self.dataset.image_info[image_id]
        path = "" if info["path"] is None else f" ({info['path']})"
        return f"{info['source']}.{info['id']}{path}"

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
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

    def _load(self, image_id: int, rng: np.random.Generator) -> tuple[Tensor, Target] | None:
        """The item of an image, or None if the config says to skip it."""
        config = self.config
        try:
            image, masks, class_ids = self._read(image_id)
        except Exception as error:  # whatever a decoder or the user's load_mask stumbles over
            message = f"image {self.describe(image_id)} cannot be used: {error!r}"
            if not config.SKIP_UNREADABLE_IMAGES:
                remedy = "correct or remove it, or set SKIP_UNREADABLE_IMAGES (--skip-unreadable)"
                raise ValueError(f"{message}; {remedy}") from error
            self._log_once(image_id, logging.WARNING, f"{message}; another takes its place")
            return None
        try:
            if self.augmentation is not None:
                image, masks = augment(self.augmentation, image, masks, rng)
            image, window, scale, padding, crop = utils.resize_to_network(image, config, rng)
        except Exception as error:  # whatever a user's augmentation stumbles over
            raise ValueError(f"image {self.describe(image_id)}: {error!r}") from error
        if not isinstance(masks, BoxedMasks):
            masks = BoxedMasks.from_array(masks)
        masks = masks.resize(scale, padding, crop).tight()
        keep = self._choose(image_id, masks.boxes, class_ids, rng)
        masks, class_ids = masks.select(keep), class_ids[keep]
        if config.SKIP_EMPTY_IMAGES and not (class_ids > 0).any():
            return None

        boxes = masks.boxes.astype(np.float32)
        mini = config.USE_MINI_MASK
        planes = masks.minimize(config.MINI_MASK_SHAPE) if mini else np.asarray(masks)
        active = np.zeros(config.NUM_CLASSES, dtype=bool)
        active[self.dataset.source_class_ids[self.dataset.image_info[image_id]["source"]]] = True
        return _planes(image), {
            "class_ids": torch.from_numpy(class_ids),
            "boxes": torch.from_numpy(boxes),
            "masks": _planes(planes),
            "active_class_ids": torch.from_numpy(active),
            "window": torch.tensor(window, dtype=torch.float32),
            "image_id": image_id,
        }

    def _read(self, image_id: int) -> tuple[np.ndarray, BoxedMasks, np.ndarray]:
        """Image [H, W, C] uint8, masks and class ids [N] int64, checked."""
        image = self.dataset.load_image(image_id)
        image = utils.as_uint8_image(
            image, self.config.IMAGE_CHANNEL_COUNT, self.config.IMAGE_BIT_DEPTH
        )
        masks, class_ids = read_masks(self.dataset, image_id)
        class_ids = class_ids.astype(np.int64)
        if masks.size != image.shape[:2]:
            raise ValueError(
                f"masks must be as large as the upright image, {image.shape[0]} x"
                f" {image.shape[1]}, got {masks.size[0]} x {masks.size[1]}"
            )
        wrong = (class_ids == 0) | (abs(class_ids) >= self.config.NUM_CLASSES)
        if wrong.any():
            raise ValueError(
                f"class ids must be in 1..{self.config.NUM_CLASSES - 1}, or negative for crowds,"
                f" got {class_ids[wrong].tolist()}"
            )
        return image, masks, class_ids

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


def collate(
    items: Sequence[tuple[Tensor, Target]], padding_value: Sequence[float] | None = None
) -> Batch:
    """A batch of the items of TorchDataset, as MaskRCNN.forward takes it.

    Images of several sizes are padded below and to the right, so that boxes stay right; full masks
    are padded alike.

    Args:
        padding_value: a number per channel; None for zeros.

    Returns:
        images [B, C, H, W], and the targets.
    """
    images = [image for image, _ in items]
    targets = [target for _, target in items]
    if len({image.shape for image in images}) > 1:
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))

        def pad(x: Tensor) -> Tensor:
            return F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]))

        # Full masks are as large as their images; mini masks, all of one shape, cannot be, as these
        # images are of several.
        if all(target["masks"].shape[1:] == image.shape[1:] for image, target in items):
            targets = [{**target, "masks": pad(target["masks"])} for target in targets]
        canvas = images[0].new_empty(len(images), len(images[0]), height, width)
        value = 0 if padding_value is None else padding_value
        canvas[:] = torch.as_tensor(value).to(canvas).view(-1, 1, 1)
        for plane, image in zip(canvas, images, strict=True):
            plane[:, : image.shape[1], : image.shape[2]] = image
        return canvas, targets
    return torch.stack(images), targets


def check_batch(
    images: Tensor, targets: Sequence[Mapping[str, Any]] | None, config: Config
) -> None:
    """Raises TypeError or ValueError unless MaskRCNN.forward can use images and targets."""
    dtype = torch.float32 if config.IMAGE_RESIZE_MODE == "shortest_edge" else torch.uint8
    _check_tensor("images", images, dtype, ("B", config.IMAGE_CHANNEL_COUNT, "H", "W"))
    height, width = images.shape[2:]
    if len(images) == 0 or not are_network_sides(config.IMAGE_SIZE_DIVISOR, height, width):
        raise ValueError(
            f"images must be one or more with sides that are multiples of"
            f" {config.IMAGE_SIZE_DIVISOR}, got shape"
            f" {list(images.shape)}; resize them with utils.resize_image"
        )
    if targets is None:
        return
    if len(targets) != len(images):
        raise ValueError(
            f"targets must have a dict for each image, got {len(targets)} for {len(images)} images"
        )
    mask_shape = config.MINI_MASK_SHAPE if config.USE_MINI_MASK else (height, width)
    for i, target in enumerate(targets):
        _check_target(f"targets[{i}]", target, mask_shape, config)


def _check_target(
    name: str, target: Mapping[str, Any], mask_shape: Sequence[int], config: Config
) -> None:
    classes = config.NUM_CLASSES
    needed = {"class_ids", "boxes", "masks"} | (set() if config.USE_RPN_ROIS else {"rois"})
    missing = needed - target.keys()
    if missing:
        raise ValueError(f"{name} must have {', '.join(sorted(needed))}, lacks {missing}")
    class_ids, boxes = target["class_ids"], target["boxes"]
    _check_tensor(f"{name} class_ids", class_ids, torch.int64, ("N",))
    count = len(class_ids)
    _check_tensor(f"{name} boxes", boxes, torch.float32, (count, 4))
    _check_tensor(f"{name} masks", target["masks"], torch.bool, (count, *mask_shape))
    if "active_class_ids" in target:
        active = target["active_class_ids"]
        _check_tensor(f"{name} active_class_ids", active, torch.bool, (classes,))
    if not config.USE_RPN_ROIS:
        _check_tensor(f"{name} rois", target["rois"], torch.float32, ("M", 4))
    strange = class_ids[(class_ids == 0) | (class_ids.abs() >= classes)]
    if len(strange):
        raise ValueError(
            f"{name} class_ids must be 1..{classes - 1}, or negative for crowds, got"
            f" {strange[0].item()}; NUM_CLASSES counts the background too"
        )
    good = boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if not good.all():
        raise ValueError(
            f"{name} boxes must be finite with y1 < y2 and x1 < x2, got"
            f" {boxes[~good][0].tolist()}; drop objects without pixels"
        )


def _check_tensor(
    name: str, tensor: object, dtype: torch.dtype, shape: Sequence[int | str]
) -> None:
    """A letter in a shape stands for any number."""
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of {dtype}, got {kind}")
    sides = zip(shape, tensor.shape, strict=False)
    if len(shape) != tensor.dim() or any(isinstance(n, int) and n != m for n, m in sides):
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{expected}], got {list(tensor.shape)}")


class EpochSampler(DistributedSampler[Any]):
    """The share that this process has of a pass through the data.

    All images come in an order from seed and number of the pass (torch: epoch) alone. Unlike
    torch's RandomSampler it forgets nothing when a run is resumed.

    Attributes:
        start: how many images of the share to leave out at its beginning, for a run that is
            resumed in the middle of a pass.
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(super().__iter__(), self.start, None)


def make_loader(
    dataset: torch.utils.data.Dataset[tuple[Tensor, Target]], config: Config, shuffle: bool
) -> DataLoader[Any]:
    """Batches of IMAGES_PER_GPU images, the last one smaller; call set_epoch before each pass.

    Under torchrun each process gets its share of the images.

    Args:
        dataset: a TorchDataset, or another one with such items.
        config: IMAGES_PER_GPU, NUM_WORKERS and SEED.
        shuffle: a new order in each pass, from SEED and its number alone; False for validation.
    """
    several = distributed.world_size(), distributed.rank()
    sampler = EpochSampler(dataset, *several, shuffle=shuffle, seed=config.SEED)
    workers = config.NUM_WORKERS
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        workers = 0 if sys.platform == "win32" else min(4, len(affinity(0)))
    return DataLoader(
        dataset,
        batch_size=config.IMAGES_PER_GPU,
        sampler=sampler,
        num_workers=workers,
        collate_fn=functools.partial(collate, padding_value=config.padding_value),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_set_signals,
        # Seeds the workers' global generators, and leaves that of the training alone.
        generator=torch.Generator().manual_seed(config.SEED),
        persistent_workers=workers > 0,
    )


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Gives the next pass through a loader the order and the augmentation of this number."""
    for part in (loader.dataset, loader.sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def _set_signals(worker: int) -> None:
    # Ctrl-C reaches the workers too; the training decides what is still needed of them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # forked workers have the training's handler
