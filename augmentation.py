"""Augmentation of training images: what may happen to an image and its masks.

An augmentation is any callable(image, masks, rng) -> (image, masks):
    image: [H, W, C] uint8; masks: [H, W, N] bool, one per instance, crowds included.
    rng: a numpy Generator, the only source of chance that keeps runs reproducible.
It may change height and width, but not the number of instances: one that leaves the image gets an
empty mask and is dropped later. It must not write into its arguments, and a lambda cannot be sent
to the worker processes of Windows and macOS.

Hundreds of objects in a large image are gigabytes as an array. The augmentations here get them as
BoxedMasks, which are sliced like arrays; so does a function or class of yours that is marked with
@takes_boxed_masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from boxed_masks import BoxedMasks

# BoxedMasks slice as arrays do.
Masks = Any
Pair = tuple[np.ndarray, Masks]
Augmentation = Callable[[np.ndarray, Masks, np.random.Generator], Pair]
Marked = TypeVar("Marked")


def takes_boxed_masks(augmentation: Marked) -> Marked:
    """Marks a function or class that takes masks as an array or as BoxedMasks."""
    augmentation.takes_boxed_masks = True  # type: ignore[attr-defined]
    return augmentation


def augment(
    augmentation: Augmentation, image: np.ndarray, masks: Masks, rng: np.random.Generator
) -> Pair:
    """Calls an augmentation, with the masks in the form that it takes, and checks what it returns.

    Raises:
        ValueError: other shapes, dtypes or number of masks than the module's docstring asks for.
    """
    boxed = isinstance(masks, BoxedMasks) and hasattr(augmentation, "takes_boxed_masks")
    # Contiguous, since torch and OpenCV do not take the views that flips return.
    masks = masks if boxed else np.ascontiguousarray(masks)
    result = augmentation(np.ascontiguousarray(image), masks, rng)
    pair = result if isinstance(result, tuple) else (result,)
    form = [(x.dtype, x.shape) if isinstance(x, np.ndarray | BoxedMasks) else type(x) for x in pair]
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


@takes_boxed_masks
class Compose:
    """Augmentations one after the other."""

    def __init__(self, *augmentations: Augmentation) -> None:
        self.augmentations = augmentations

    def __call__(self, image: np.ndarray, masks: Masks, rng: np.random.Generator) -> Pair:
        for augmentation in self.augmentations:
            image, masks = augment(augmentation, image, masks, rng)
        return image, masks


@takes_boxed_masks
def horizontal_flip(image: np.ndarray, masks: Masks, rng: np.random.Generator) -> Pair:
    """Swaps left and right, with probability 1/2."""
    return (image[:, ::-1], masks[:, ::-1]) if rng.random() < 0.5 else (image, masks)


@takes_boxed_masks
def vertical_flip(image: np.ndarray, masks: Masks, rng: np.random.Generator) -> Pair:
    """Swaps top and bottom, with probability 1/2."""
    return (image[::-1], masks[::-1]) if rng.random() < 0.5 else (image, masks)


@takes_boxed_masks
def rot90(image: np.ndarray, masks: Masks, rng: np.random.Generator) -> Pair:
    """Turns by 0, 90, 180 or 270 degrees."""
    quarters = int(rng.integers(4))
    return _turn(image, quarters), _turn(masks, quarters)


@takes_boxed_masks
@dataclass(frozen=True)
class ScaleJitter:
    """Zooms by a random factor at a random place; the image keeps its size, black around it."""

    smallest: float = 0.5
    largest: float = 2.0

    def __call__(self, image: np.ndarray, masks: Masks, rng: np.random.Generator) -> Pair:
        size = image.shape[:2]
        # Uniform in the logarithm: as often twice as large as half as large.
        scale = np.exp(rng.uniform(np.log(self.smallest), np.log(self.largest)))
        if scale >= 1:
            part = _random_part(size, 1 / scale, rng)
            return _resize(image[part], masks[part], size)
        part = _random_part(size, scale, rng)
        shape = [s.stop - s.start for s in part]
        padding = [(s.start, length - s.stop) for s, length in zip(part, size, strict=True)]
        image, masks = _resize(image, masks, shape)
        return np.pad(image, [*padding, (0, 0)]), _pad(masks, padding)


@takes_boxed_masks
@dataclass(frozen=True)
class RandomCrop:
    """Cuts out a part with sides of `smallest` to 1 of the image's.

    Ten parts are tried for one that shows a bit of an object; if none does, the last is taken.
    """

    smallest: float = 0.5

    def __call__(self, image: np.ndarray, masks: Masks, rng: np.random.Generator) -> Pair:
        for _ in range(10):
            part = _random_part(image.shape, rng.uniform(self.smallest, 1), rng)
            if masks[part].any():
                break
        return image[part], masks[part]


@takes_boxed_masks
@dataclass(frozen=True)
class ColorJitter:
    """Scales brightness, contrast and (of RGB) saturation by factors of 1 - x to 1 + x each."""

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __call__(self, image: np.ndarray, masks: Masks, rng: np.random.Generator) -> Pair:
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


def _turn(x: Any, quarters: int) -> Any:
    """np.rot90 of an array or BoxedMasks."""
    turned = x[::-1, ::-1] if quarters >= 2 else x
    return turned.swapaxes(0, 1)[::-1] if quarters % 2 else turned


def _pad(masks: Masks, padding: Sequence[tuple[int, int]]) -> Masks:
    boxed = isinstance(masks, BoxedMasks)
    return masks.pad(padding) if boxed else np.pad(masks, [*padding, (0, 0)])


def _random_part(
    shape: Sequence[int], share: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Rows and columns of a part whose sides are `share` of the image's, anywhere in it."""
    lengths = [max(1, round(side * share)) for side in shape[:2]]
    starts = [int(rng.integers(side - n + 1)) for side, n in zip(shape[:2], lengths, strict=True)]
    rows, columns = (slice(y, y + n) for y, n in zip(starts, lengths, strict=True))
    return rows, columns


def _resize(image: np.ndarray, masks: Masks, shape: Sequence[int]) -> Pair:
    """Both about half-pixel centres: the image antialiased, the masks by the nearest pixel."""
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    planes = F.interpolate(planes, tuple(shape[:2]), mode="bilinear", antialias=True)
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip(shape[:2], masks.shape[:2], strict=True)
    )
    return planes[0].permute(1, 2, 0).numpy(), masks[rows[:, None], columns]
