"""Boxes, anchors, images, masks, run-length encoding, the Dataset base class and AP metrics.

Boxes are (y1, x1, y2, x2), half-open: y2 and x2 lie one past the last pixel.
"""

import contextlib
import copy
import ctypes
import functools
import itertools
import logging
import math
import os
import platform
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, are_network_sides

# Notebooks write utils.load_image.
from image_files import as_uint8_image as as_uint8_image
from image_files import load_image as load_image

logger = logging.getLogger(__name__)


def write_atomic(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Lets `write` fill a file such that `path` never holds half of it, not even in a power cut."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def unused_name(stem: str, used: set[str]) -> str:
    """A name for what is written that is not among the used ones, of which it then is one."""
    stems = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
    name = next(stem for stem in stems if stem not in used)
    used.add(name)
    return name


def keep_memory() -> None:
    """Lets this process keep the memory of tensors that are freed, for the next ones.

    By default Linux takes large pieces back and clears them when they are asked for again, which is
    a tenth of the time of a detection on a CPU. The process then holds about what it needed at its
    peak. demo.py and coco.py do this; a notebook or server may. Elsewhere than on Linux with glibc
    it does nothing.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # M_ in malloc.h
        library = ctypes.CDLL(None)
        # glibc before 2.35 refuses more than 32 MB.
        if any(library.mallopt(mmap_threshold, size) for size in (1 << 28, 1 << 25)):
            library.mallopt(trim_threshold, 1 << 30)


def in_notebook() -> bool:
    """Whether a cell of a Jupyter notebook runs this."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any]":
    """tqdm's bar: on stderr, or in a notebook, which shows that in red, on stdout."""
    return tqdm(iterable, file=sys.stdout if in_notebook() else sys.stderr, **options)


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


# --- Boxes ---------------------------------------------------------------------------------------


def numpy_facade(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Lets a torch function take arrays: arrays alone give an array, with a tensor a tensor."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        device = next((x.device for x in values if isinstance(x, Tensor)), None)

        def convert(x: Any) -> Any:
            # The copy makes read-only and flipped arrays acceptable to torch.
            return torch.from_numpy(np.array(x)).to(device) if isinstance(x, np.ndarray) else x

        result = function(*map(convert, args), **{k: convert(v) for k, v in kwargs.items()})
        return result.numpy() if device is None else result

    return wrapper


@numpy_facade
def norm_boxes(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Boxes from pixels to the unit frame, where the last pixel's far corner is 1.

    Args:
        boxes: [..., (y1, x1, y2, x2)], pixels. Float keeps its precision until the end.
        shape: (H, W, ...) of the image the pixels belong to.

    Returns:
        [..., 4] float32, unit frame: (pixel - [0, 0, 1, 1]) / [H - 1, W - 1, H - 1, W - 1].
    """
    height, width = shape[:2]
    scale = boxes.new_tensor([height - 1, width - 1, height - 1, width - 1])
    return ((boxes - boxes.new_tensor([0, 0, 1, 1])) / scale).float()


@numpy_facade
def denorm_boxes(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Boxes from the unit frame to pixels, the inverse of norm_boxes.

    Args:
        boxes: [..., (y1, x1, y2, x2)] float, unit frame.
        shape: (H, W, ...) of the image the pixels belong to.

    Returns:
        [..., 4] int32, pixels; computed in float64, a half goes to the even neighbour.
    """
    height, width = shape[:2]
    boxes = boxes.double()
    scale = boxes.new_tensor([height - 1, width - 1, height - 1, width - 1])
    return (boxes * scale + boxes.new_tensor([0, 0, 1, 1])).round().int()


@numpy_facade
def compute_overlaps(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair of boxes.

    Args:
        boxes1: [N, (y1, x1, y2, x2)], any frame.
        boxes2: [M, (y1, x1, y2, x2)], the same frame.

    Returns:
        [N, M], float64 for integer boxes, else of the boxes' dtype. 0 where the union is empty.
    """
    # Areas of integer pixels would overflow int32 in large images.
    boxes1, boxes2 = (b if b.is_floating_point() else b.double() for b in (boxes1, boxes2))
    area1 = (boxes1[:, 2] - boxes1[:, 0]) * (boxes1[:, 3] - boxes1[:, 1])
    area2 = (boxes2[:, 2] - boxes2[:, 0]) * (boxes2[:, 3] - boxes2[:, 1])
    y1, x1, y2, x2 = boxes1[:, :, None].unbind(1)  # [N, 1] each
    height = (torch.minimum(y2, boxes2[:, 2]) - torch.maximum(y1, boxes2[:, 0])).clamp(min=0)
    width = (torch.minimum(x2, boxes2[:, 3]) - torch.maximum(x1, boxes2[:, 1])).clamp(min=0)
    intersection = height * width
    union = area1[:, None] + area2 - intersection
    return intersection / union.masked_fill(union == 0, 1)


@numpy_facade
def compute_iou(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box [4] with boxes [N, 4]; [N], see compute_overlaps."""
    return compute_overlaps(box[None], boxes)[0]


@numpy_facade
def box_refinement(box: Tensor, gt_box: Tensor) -> Tensor:
    """The deltas that turn box into gt_box; apply_box_deltas inverts it.

    Args:
        box: [..., (y1, x1, y2, x2)], any frame, of positive height and width; a box without
            area gives non-finite deltas.
        gt_box: [..., (y1, x1, y2, x2)], the same frame, of positive height and width.

    Returns:
        [..., (dy, dx, log(dh), log(dw))] float32, not divided by BBOX_STD_DEV
        (R-CNN, arXiv:1311.2524, appendix C).
    """
    y1, x1, y2, x2 = box.float().unbind(-1)
    gt_y1, gt_x1, gt_y2, gt_x2 = gt_box.float().unbind(-1)
    height, width = y2 - y1, x2 - x1
    gt_height, gt_width = gt_y2 - gt_y1, gt_x2 - gt_x1
    dy = (gt_y1 + 0.5 * gt_height - (y1 + 0.5 * height)) / height
    dx = (gt_x1 + 0.5 * gt_width - (x1 + 0.5 * width)) / width
    return torch.stack([dy, dx, (gt_height / height).log(), (gt_width / width).log()], dim=-1)


@numpy_facade
def apply_box_deltas(boxes: Tensor, deltas: Tensor, limit: float | None = None) -> Tensor:
    """Moves and scales boxes by deltas, in Matterport's order of operations.

    Args:
        boxes: [..., (y1, x1, y2, x2)], any frame.
        deltas: [..., (dy, dx, log(dh), log(dw))], already times BBOX_STD_DEV.
        limit: the largest log(dh) and log(dw), see BBOX_LOG_SCALE_LIMIT.

    Returns:
        [..., 4] float32, the frame of boxes. Without a limit, beyond log(dh) = 88 the box becomes
        (-inf, NaN), which clip_boxes turns into the window's edges.
    """
    y1, x1, y2, x2 = boxes.float().unbind(-1)
    dy, dx, dh, dw = deltas.float().unbind(-1)
    if limit is not None:
        dh, dw = dh.clamp(max=limit), dw.clamp(max=limit)
    height, width = y2 - y1, x2 - x1
    center_y = y1 + 0.5 * height + dy * height
    center_x = x1 + 0.5 * width + dx * width
    height, width = height * dh.exp(), width * dw.exp()
    y1, x1 = center_y - 0.5 * height, center_x - 0.5 * width
    return torch.stack([y1, x1, y1 + height, x1 + width], dim=-1)


@numpy_facade
def clip_boxes(boxes: Tensor, window: Tensor | Sequence[float]) -> Tensor:
    """Clips boxes [..., (y1, x1, y2, x2)] to window (y1, x1, y2, x2) or [..., 4], any frame."""
    window = torch.as_tensor(window, dtype=boxes.dtype, device=boxes.device)
    # fmin and fmax drop a NaN: the far corner of a box of infinite size (see apply_box_deltas).
    return torch.fmax(torch.fmin(boxes, window[..., [2, 3, 2, 3]]), window[..., [0, 1, 0, 1]])


def are_larger(boxes: Tensor, size: float | None) -> Tensor:
    """Which boxes [..., 4] have sides above size, [...] bool; all if it is None."""
    if size is None:
        return torch.ones(boxes.shape[:-1], dtype=torch.bool, device=boxes.device)
    return (boxes[..., 2:] - boxes[..., :2] > size).all(dim=-1)


# --- Anchors -------------------------------------------------------------------------------------


def generate_anchors(
    scales: float | Sequence[float],
    ratios: Sequence[float],
    shape: Sequence[int],
    feature_stride: int | Sequence[int],
    anchor_stride: int,
    rounding: bool = False,
) -> np.ndarray:
    """Anchors of one feature map.

    Args:
        scales: side(s) of the square anchor, network pixels.
        ratios: width / height.
        shape: (h, w) of the feature map, cells.
        feature_stride: network pixels per cell, (down, across) if they differ.
        anchor_stride: place anchors on every n-th cell.
        rounding: round half their sides, a half to the even neighbour.

    Returns:
        [A, (y1, x1, y2, x2)] float64, network pixels: cells row by row, in a cell ratio by ratio,
        for a ratio scale by scale.
    """
    ratio, scale = (x.ravel() for x in np.meshgrid(ratios, scales, indexing="ij"))
    half_sizes = 0.5 * np.stack([scale / np.sqrt(ratio), scale * np.sqrt(ratio)], axis=1)
    if rounding:
        half_sizes = half_sizes.round()
    cells = np.meshgrid(*(np.arange(0, n, anchor_stride) for n in shape), indexing="ij")
    centers = np.stack(cells, axis=2).reshape(-1, 1, 2) * np.asarray(feature_stride)
    return np.concatenate([centers - half_sizes, centers + half_sizes], axis=2).reshape(-1, 4)


def generate_pyramid_anchors(
    scales: Sequence[float],
    ratios: Sequence[float],
    feature_shapes: Sequence[Sequence[int]] | np.ndarray,
    feature_strides: Sequence[int | Sequence[int]],
    anchor_stride: int,
    rounding: bool = False,
) -> np.ndarray:
    """Anchors [A, 4] float64, network pixels, of all pyramid levels: level i has scales[i]."""
    levels = zip(scales, feature_shapes, feature_strides, strict=True)
    return np.concatenate(
        [generate_anchors(s, ratios, f, n, anchor_stride, rounding) for s, f, n in levels]
    )


# --- Images --------------------------------------------------------------------------------------


def _taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Indices and weights, [new_size] each, of the two samples beside each half-pixel centre."""
    position = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    lower = np.floor(position).astype(np.int64)
    fraction = position - lower
    lower_weight = np.where(lower >= 0, 1 - fraction, 0)
    upper_weight = np.where(lower + 1 < size, fraction, 0)
    return lower.clip(0), (lower + 1).clip(max=size - 1), lower_weight, upper_weight


def resize(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Bilinear resize about half-pixel centres, zero outside, clipped to the image's value range.

    The values of skimage.transform.resize(order=1, mode="constant", preserve_range=True,
    anti_aliasing=False) to the last bit, because callers truncate or threshold them.

    Args:
        image: [H, W, ...] of any numeric dtype or bool.
        shape: (height, width) of the result.

    Returns:
        [height, width, ...] float64.
    """
    height, width = shape[:2]
    trailing = image.shape[2:]
    if image.size == 0 or height < 1 or width < 1:
        return np.zeros((height, width, *trailing))
    low, high = float(image.min()), float(image.max())
    image = image.reshape(*image.shape[:2], -1)
    y1, y2, y1_weight, y2_weight = _taps(image.shape[0], height)
    x1, x2, x1_weight, x2_weight = _taps(image.shape[1], width)
    y1_weight, y2_weight = y1_weight[:, None], y2_weight[:, None]
    x1_weight, x2_weight = (w.repeat(image.shape[2]) for w in (x1_weight, x2_weight))
    left, right = (image.take(x, axis=1).reshape(len(image), -1) for x in (x1, x2))
    taps = (
        (left, y1, y1_weight, x1_weight),
        (right, y1, y1_weight, x2_weight),
        (left, y2, y2_weight, x1_weight),
        (right, y2, y2_weight, x2_weight),
    )
    result = np.zeros((height, left.shape[1]))
    step = max(8, 2**15 // left.shape[1])  # a block of rows that stays in the cache
    for start in range(0, height, step):
        rows = slice(start, start + step)
        for source, y, y_weight, x_weight in taps:
            # In this order, not as two passes: the last bit decides what truncation makes of it.
            product = source[y[rows]] * y_weight[rows]
            product *= x_weight
            result[rows] += product
        np.clip(result[rows], low, high, out=result[rows])
    return result.reshape(height, width, *trailing)


class ResizedImage(NamedTuple):
    """What resize_image did; resize_mask takes scale, padding and crop."""

    image: np.ndarray  # [H, W, C], the dtype of the input; float32 in mode "shortest_edge"
    window: tuple[int, int, int, int]  # the image without its padding, network pixels
    scale: float | tuple[float, float]  # a pair, down and across, in mode "shortest_edge"
    padding: list[tuple[int, int]]  # [(top, bottom), (left, right), (0, 0)]
    crop: tuple[int, int, int, int] | None  # (y, x, height, width) in the scaled image


def _scaled_shape(shape: Sequence[int], scale: float | tuple[float, float]) -> tuple[int, int]:
    down, across = scale if isinstance(scale, tuple) else (scale, scale)
    return max(1, round(shape[0] * down)), max(1, round(shape[1] * across))


def resize_image(
    image: np.ndarray,
    min_dim: int | None = None,
    max_dim: int | None = None,
    min_scale: float | None = None,
    mode: str = "square",
    rng: np.random.Generator | None = None,
    divisor: int = 64,
    interpolation: str = "pillow",
    side_rounding: str = "nearest",
    padding_value: Sequence[float] | None = None,
    zoom: float = 1.0,
) -> ResizedImage:
    """Resizes an image to the network's input, keeping its aspect ratio.

    Args:
        image: [H, W, C], image frame.
        min_dim: scale up (never down) until the shorter side has this length.
        max_dim: mode "square": the side of the result, which the longer side never exceeds.
        min_scale: scale up by at least this factor, unless max_dim forbids it.
        mode: "none" returns the image as it is; "square" pads to [max_dim, max_dim];
            "pad64" pads both sides to multiples of 64; "crop" cuts a random
            [min_dim, min_dim] piece, for training only; "shortest_edge" see scale_shortest_edge.
        rng: draws the crop; python's global `random` if None.
        divisor, interpolation, side_rounding, padding_value: of the mode "shortest_edge".
        zoom: times the size that all of this gives; the square of mode "square" changes with it.

    Returns:
        image, window, scale, padding and crop, see ResizedImage. Matterport: values are truncated
        to the image's dtype, not rounded.

    Raises:
        ValueError: an unknown mode, or a dimension that the mode needs is missing.
    """
    if mode == "shortest_edge" and min_dim and max_dim:
        min_dim, max_dim = (max(1, round(zoom * side)) for side in (min_dim, max_dim))
        scaled = scale_shortest_edge(image, min_dim, max_dim, interpolation, side_rounding)
        return _pad_behind(image.shape, scaled, divisor, padding_value)
    side = {"none": 1, "square": max_dim, "pad64": 64, "crop": min_dim}.get(mode)
    if not side:
        raise ValueError(
            "mode must be none, square with max_dim, pad64, crop with min_dim or shortest_edge "
            f"with both, got mode={mode!r}, min_dim={min_dim}, max_dim={max_dim}"
        )
    if zoom != 1 and mode in ("none", "crop"):
        raise ValueError(f"mode {mode!r} shows images at one scale alone, got zoom {zoom}")
    height, width = image.shape[:2]
    padding = [(0, 0), (0, 0), (0, 0)]
    if mode == "none":
        return ResizedImage(image, (0, 0, height, width), 1.0, padding, None)

    scale = max(1.0, min_dim / min(height, width) if min_dim else 1.0, min_scale or 1.0)
    if mode == "square" and round(max(height, width) * scale) > side:
        scale = side / max(height, width)
    scale *= zoom
    if mode == "square" and zoom != 1:
        side = max(64, -(-round(side * zoom) // 64) * 64)
    scaled = resize(image, _scaled_shape(image.shape, scale)) if scale != 1 else image
    height, width = scaled.shape[:2]

    if mode == "crop":
        below = random.randrange if rng is None else rng.integers
        y, x = int(below(height - side + 1)), int(below(width - side + 1))
        piece = scaled[y : y + side, x : x + side].astype(image.dtype)
        return ResizedImage(piece, (0, 0, side, side), scale, padding, (y, x, side, side))

    full = (side, side) if mode == "square" else (-(-height // 64) * 64, -(-width // 64) * 64)
    top, left = (full[0] - height) // 2, (full[1] - width) // 2
    padding = [(top, full[0] - height - top), (left, full[1] - width - left), (0, 0)]
    window = (top, left, top + height, left + width)
    padded = np.zeros((*full, *image.shape[2:]), dtype=image.dtype)
    padded[top : top + height, left : left + width] = scaled
    return ResizedImage(padded, window, scale, padding, None)


def scale_shortest_edge(
    image: np.ndarray, min_dim: int, max_dim: int, interpolation: str, side_rounding: str
) -> np.ndarray:
    """Scales an image so that its shorter side is min_dim, and the longer at most max_dim.

    Args:
        image: [H, W, C] uint8.
        interpolation: "pillow" or "float", see IMAGE_INTERPOLATION.
        side_rounding: "nearest", as detectron2, or "floor", as torchvision.

    Returns:
        [height, width, C] float32, 0..255.
    """
    height, width = image.shape[:2]
    shorter, longer = min(height, width), max(height, width)
    if side_rounding == "floor":
        scale = min(min_dim / shorter, max_dim / longer)
        sides = [int(height * scale), int(width * scale)]
    else:
        scale = min_dim / shorter
        lengths = [height * scale, width * scale]
        factor = min(1.0, max_dim / max(lengths))
        sides = [int(length * factor + 0.5) for length in lengths]
    sides = [max(1, side) for side in sides]
    if image.size == 0:
        return np.zeros((*sides, *image.shape[2:]), np.float32)
    if interpolation == "pillow":
        planes = [
            np.asarray(Image.fromarray(plane).resize(sides[::-1], Image.Resampling.BILINEAR))
            for plane in np.ascontiguousarray(image.transpose(2, 0, 1))
        ]
        return np.stack(planes, axis=2).astype(np.float32)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    scaled = F.interpolate(pixels, size=sides, mode="bilinear", align_corners=False)
    return scaled[0].permute(1, 2, 0).numpy()


def _pad_behind(
    shape: Sequence[int], scaled: np.ndarray, divisor: int, value: Sequence[float] | None
) -> ResizedImage:
    """Pads an image that was of this shape below and to the right, to multiples of divisor."""
    height, width = scaled.shape[:2]
    full = (-(-height // divisor) * divisor, -(-width // divisor) * divisor)
    padded = np.empty((*full, *scaled.shape[2:]), dtype=scaled.dtype)
    padded[:height, :width] = scaled
    if padded.size:
        value = (0,) if value is None else value
        padded[height:], padded[:height, width:] = value, value
    padding = [(0, full[0] - height), (0, full[1] - width), (0, 0)]
    scale = (height / shape[0], width / shape[1])
    return ResizedImage(padded, (0, 0, height, width), scale, padding, None)


def resize_to_network(
    image: np.ndarray, config: Config, rng: np.random.Generator | None = None, zoom: float = 1.0
) -> ResizedImage:
    """Resizes an image [H, W, C] as the config says, or to `zoom` times that; see resize_image.

    Raises:
        ValueError: the mode is "none" and the sides are not those of a network input.
    """
    resized = resize_image(image, **config.resize_options, rng=rng, zoom=zoom)
    height, width = resized.image.shape[:2]
    divisor = config.IMAGE_SIZE_DIVISOR
    if not are_network_sides(divisor, height, width):
        raise ValueError(
            f"image sides must be multiples of {divisor} in mode 'none', got {height} x {width};"
            " use IMAGE_RESIZE_MODE 'pad64'"
        )
    return resized


# --- Masks ---------------------------------------------------------------------------------------


def resize_mask(
    mask: np.ndarray,
    scale: float | tuple[float, float],
    padding: Sequence[tuple[int, int]],
    crop: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Resizes masks [H, W, N] as resize_image resized their image: nearest pixel, same dtype.

    Matterport: corners are mapped to corners (scipy.ndimage.zoom), while the image is resized about
    half-pixel centres, so the two can differ by up to half a pixel. A pair of scales, those of the
    mode "shortest_edge", resizes both about half-pixel centres.
    """
    y, x = mask_taps(mask.shape, scale, crop)
    resized = mask[y[:, None], x]
    return resized if crop is not None else np.pad(resized, padding)


def mask_taps(
    shape: Sequence[int],
    scale: float | tuple[float, float],
    crop: tuple[int, int, int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of masks of this shape that resize_mask takes."""
    height, width = _scaled_shape(shape, scale)
    if isinstance(scale, tuple):
        centres = (
            (np.arange(n) + 0.5) * (m / n) for m, n in zip(shape, (height, width), strict=False)
        )
        y, x = (np.floor(centre).astype(np.int64) for centre in centres)
        return y, x
    y, x = (
        np.floor(np.arange(new) * ((old - 1) / max(new - 1, 1)) + 0.5).astype(np.int64)
        for old, new in ((shape[0], height), (shape[1], width))
    )
    if crop is not None:
        y, x = y[crop[0] : crop[0] + crop[2]], x[crop[1] : crop[1] + crop[3]]
    return y, x


def extract_bboxes(mask: np.ndarray) -> np.ndarray:
    """The tight boxes [N, (y1, x1, y2, x2)] int32 of masks [H, W, N]; zeros for an empty mask."""
    if mask.size == 0:
        return np.zeros((mask.shape[-1], 4), dtype=np.int32)
    height, width = mask.shape[:2]
    rows, columns = np.any(mask, axis=1), np.any(mask, axis=0)  # [H, N], [W, N]
    y1, x1 = rows.argmax(axis=0), columns.argmax(axis=0)
    y2, x2 = height - rows[::-1].argmax(axis=0), width - columns[::-1].argmax(axis=0)
    return (np.stack([y1, x1, y2, x2], axis=1) * rows.any(axis=0)[:, None]).astype(np.int32)


def minimize_mask(bbox: np.ndarray, mask: np.ndarray, mini_shape: Sequence[int]) -> np.ndarray:
    """Cuts each mask to its box and resizes it, to save memory; expand_mask undoes it.

    Args:
        bbox: [N, (y1, x1, y2, x2)] integers, pixels of mask.
        mask: [H, W, N], bool or 0 and non-zero.
        mini_shape: (h, w) of the mini masks.

    Returns:
        [h, w, N] bool.

    Raises:
        ValueError: a box without area; drop such instances first.
    """
    mini_mask = np.zeros((*mini_shape[:2], mask.shape[-1]), dtype=bool)
    for i, (y1, x1, y2, x2) in enumerate(bbox[:, :4]):
        part = mask[y1:y2, x1:x2, i].astype(bool)
        if part.size == 0:
            raise ValueError(
                f"a box must have an area to hold a mini mask, got {bbox[i].tolist()} for "
                f"instance {i}; drop instances without pixels"
            )
        mini_mask[:, :, i] = resize(part, mini_shape) > 0.5
    return mini_mask


def expand_mask(bbox: np.ndarray, mini_mask: np.ndarray, image_shape: Sequence[int]) -> np.ndarray:
    """Puts mini masks [h, w, N] back into their boxes: [H, W, N] bool, see minimize_mask."""
    mask = np.zeros((*image_shape[:2], mini_mask.shape[-1]), dtype=bool)
    for i, (y1, x1, y2, x2) in enumerate(bbox[:, :4]):
        mask[y1:y2, x1:x2, i] = resize(mini_mask[:, :, i], (y2 - y1, x2 - x1)) > 0.5
    return mask


def paste_mask(
    mask: Tensor, box: Sequence[float], image_shape: Sequence[int], rule: str = "rounded"
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Resizes one predicted mask to its box and thresholds it, on the mask's device.

    Args:
        mask: [h, w] float, probabilities.
        box: (y1, x1, y2, x2), image frame; whole pixels inside the image for the rule "rounded".
        image_shape: (H, W, ...).
        rule: see MASK_PASTE.

    Returns:
        The part of the image that may be set, [y2 - y1, x2 - x1] bool, True where the probability
        is at least 0.5; and its corners (y1, x1, y2, x2).

    Source: skimage.transform.resize; paste_masks_in_image of torchvision; _do_paste_mask of
    detectron2.
    """
    y1, y2, rows = _paste_axis(box[0], box[2], mask.shape[0], image_shape[0], rule)
    x1, x2, columns = _paste_axis(box[1], box[3], mask.shape[1], image_shape[1], rule)
    pasted = sample_mask(mask, rows.to(mask), columns.to(mask))
    if rule == "rounded" and pasted.numel():
        # Like resize(): no value below the mask's least, so that a full mask has no faded border.
        pasted = pasted.clamp(min=mask.min())
    return pasted >= 0.5, (y1, x1, y2, x2)


def _paste_axis(
    low: float, high: float, size: int, side: int, rule: str
) -> tuple[int, int, Tensor]:
    """The first pixel of a side that a mask of `size` cells may set, the one after the last, and
    the positions of their centres in the mask, 0 and size - 1 for those of its outer cells."""
    if rule == "expanded":
        # A cell is added on either side, and the corners of that lose their fractions.
        middle, half = (high + low) / 2, (high - low) / 2 * ((size + 2) / size)
        low, high = int(middle - half), int(middle + half) + 1
        cells, border = size + 2, 1
    else:
        cells, border = size, 0
    start, stop = max(math.floor(low), 0), min(math.ceil(high), side)
    # Twice the centres: with whole corners a division of exact numbers, so that the middle of an
    # odd side lies exactly between two cells.
    odd = 2 * torch.arange(start, max(start, stop), dtype=torch.float64) + 1
    return start, max(start, stop), (odd - 2 * low) * cells / (2 * (high - low)) - 0.5 - border


def sample_mask(mask: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The bilinear values [n, m] of a mask [h, w] at rows y [n] and columns x [m], 0 outside.

    As two matrix products with triangle weights: no triangle reaches a sample outside.
    """

    def triangles(size: int, position: Tensor) -> Tensor:
        index = torch.arange(size, device=mask.device, dtype=mask.dtype)
        return (1 - (position[:, None] - index).abs()).relu()

    with torch.autocast(mask.device.type, enabled=False):  # half precision moves the outline
        return triangles(mask.shape[0], y) @ mask @ triangles(mask.shape[1], x).T


def unmold_mask(mask: np.ndarray, bbox: Sequence[int], image_shape: Sequence[int]) -> np.ndarray:
    """Puts one predicted mask into its box in the image.

    Args:
        mask: [h, w] float, probabilities.
        bbox: (y1, x1, y2, x2) integers inside the image, image frame.
        image_shape: (H, W, ...).

    Returns:
        [H, W] bool, True inside the box where the resized probability is at least 0.5.
    """
    full_mask = np.zeros(image_shape[:2], dtype=bool)
    box = [int(v) for v in bbox]
    part, (y1, x1, y2, x2) = paste_mask(torch.from_numpy(np.array(mask)), box, image_shape)
    full_mask[y1:y2, x1:x2] = part.numpy()
    return full_mask


def compute_overlaps_masks(masks1: np.ndarray, masks2: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of masks.

    Args:
        masks1: [H, W, N], set where above 0.5.
        masks2: [H, W, M], set where above 0.5.

    Returns:
        [N, M] float64; 0 for two empty masks.
    """
    area1, area2 = (np.count_nonzero(m > 0.5, axis=(0, 1)) for m in (masks1, masks2))
    intersection = torch.zeros((len(area1), len(area2)), dtype=torch.float64)
    # In blocks of rows: float32 products are fast, exact to 2**24, and their inputs small.
    for rows in (slice(y, y + 64) for y in range(0, len(masks1), 64)):
        block1, block2 = (
            torch.from_numpy(m[rows] > 0.5).flatten(0, 1).float() for m in (masks1, masks2)
        )
        intersection += block1.T @ block2
    union = area1[:, None] + area2 - intersection.numpy()
    return intersection.numpy() / np.where(union == 0, 1, union)


# --- Run-length encoding -------------------------------------------------------------------------


def rle_encode(
    mask: np.ndarray, box: Sequence[int] | None = None, size: Sequence[int] | None = None
) -> dict[str, Any]:
    """Encodes a mask in COCO's compressed run-length format.

    Args:
        mask: [H, W], bool or 0 and non-zero; with box, the piece [y2 - y1, x2 - x1] inside it.
        box: (y1, x1, y2, x2) of the piece, image frame. What lies outside is not set.
        size: (H, W) of the image; needed with box.

    Returns:
        {"size": [H, W], "counts": str}, ready for json and pycocotools.

    Raises:
        ValueError: mask, box and size do not fit together.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask must have shape [H, W], got {mask.shape}; encode one at a time")
    if box is None:
        size = mask.shape
        box = extract_bboxes(mask[:, :, None])[0]
        mask = mask[box[0] : box[2], box[1] : box[3]]
    if size is None:
        raise ValueError(f"a mask in a box needs the image's size (H, W), got box {box} alone")
    height, width = (int(v) for v in size[:2])
    y1, x1, y2, x2 = (int(v) for v in box)
    if mask.shape != (y2 - y1, x2 - x1) or not (0 <= y1 <= y2 <= height and 0 <= x1 <= x2 <= width):
        raise ValueError(
            f"a mask must fill its box inside the image, got mask {mask.shape}, box "
            f"{(y1, x1, y2, x2)}, image {(height, width)}; clip the box first"
        )
    columns = np.zeros((x2 - x1, y2 - y1 + 2), dtype=bool)  # a clear pixel above and below
    columns[:, 1:-1] = mask.T
    x, y = np.nonzero(columns[:, 1:] != columns[:, :-1])  # runs start and end in turn
    edges = (x + x1) * height + y + y1
    # A run that ends at the bottom goes on where the next column starts set at the top.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    if len(edges) == 0 or edges[-1] != height * width:
        edges = np.append(edges, height * width)
    counts = np.diff(edges, prepend=0)
    return {"size": [height, width], "counts": compress_run_lengths(counts)}


def rle_decode(rle: dict[str, Any]) -> np.ndarray:
    """Decodes COCO's run-length format, compressed (str or bytes) or a list of counts.

    Args:
        rle: {"size": [H, W], "counts": ...}.

    Returns:
        [H, W] bool.

    Raises:
        ValueError: the counts are malformed or do not add up to H * W.
    """
    height, width = rle["size"]
    counts = run_lengths(rle)
    values = np.arange(len(counts)) % 2 == 1
    return values.repeat(counts).reshape(width, height).T


def rle_decode_part(rle: dict[str, Any]) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """The tight box (y1, x1, y2, x2) of a mask in run lengths, and the part in it, [h, w] bool.

    Costs as much as the columns that the mask touches, see rle_decode; zeros and an empty part
    where nothing is set.
    """
    height, _ = rle["size"]
    starts, ends = set_runs(run_lengths(rle))
    if len(starts) == 0:
        return (0, 0, 0, 0), np.zeros((0, 0), dtype=bool)
    x1, x2 = int(starts[0]) // height, -(-int(ends[-1]) // height)
    inside = np.stack([starts, ends], axis=1).ravel() - x1 * height
    counts = np.diff(inside, prepend=0, append=(x2 - x1) * height)
    values = np.arange(len(counts)) % 2 == 1
    columns = values.repeat(counts).reshape(x2 - x1, height)
    rows = np.flatnonzero(columns.any(axis=0))
    y1, y2 = int(rows[0]), int(rows[-1]) + 1
    return (y1, x1, y2, x2), np.ascontiguousarray(columns[:, y1:y2].T)


def set_runs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of set pixels start and end, column by column, of what run_lengths returns."""
    edges = np.cumsum(counts)
    starts, ends = edges[:-1:2], edges[1::2]
    return starts[starts < ends], ends[starts < ends]


def run_lengths(rle: dict[str, Any]) -> np.ndarray:
    """The lengths [R] int64 of the runs; ValueError if they are malformed or do not add up."""
    height, width = rle["size"]
    counts = rle["counts"]
    if isinstance(counts, str):
        counts = counts.encode()
    counts = _expand_counts(counts) if isinstance(counts, bytes) else np.array(counts, np.int64)
    # The sum of floats does not overflow.
    if (counts < 0).any() or not counts.sum() == counts.sum(dtype=float) == height * width:
        raise ValueError(
            f"run lengths must be positive and add up to {height} * {width} = {height * width}, "
            f"got a sum of {counts.sum()}; the mask is damaged or its size is another image's"
        )
    return counts


def compress_run_lengths(counts: np.ndarray) -> str:
    """Five bits a character, lowest first, of the difference to the run before the last one."""
    values = counts.copy()
    values[3:] -= counts[1:-2]
    characters, used = [], []
    more = np.ones(len(values), dtype=bool)
    while more.any():
        used.append(more)
        bits = values & 31
        values = values >> 5
        more = more & (values != np.where(bits & 16, -1, 0))  # until the rest is only the sign
        characters.append(bits + 32 * more + 48)
    return np.stack(characters, 1)[np.stack(used, 1)].astype(np.uint8).tobytes().decode()


def _expand_counts(text: bytes) -> np.ndarray:
    characters = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = characters & 32 == 0
    ends = np.flatnonzero(last)
    lengths = np.diff(ends, prepend=-1)
    if len(text) == 0 or not last[-1] or characters.min() < 0 or characters.max() > 63:
        raise ValueError(f"run lengths must be in COCO's compressed format, got {text[:20]!r}")
    starts = ends - lengths + 1
    shifts = 5 * (np.arange(len(characters)) - starts.repeat(lengths))
    values = np.add.reduceat((characters & 31) << shifts, starts)
    values -= (characters[ends] & 16 != 0) * (np.int64(1) << 5 * lengths)  # the sign
    for parity in (1, 2):
        values[parity::2] = values[parity::2].cumsum()
    return values


# --- Dataset -------------------------------------------------------------------------------------


class Dataset:
    """The images and classes of a task. Subclass it, override load_mask, then call prepare().

        class Shapes(Dataset):
            def load_mask(self, image_id):
                return masks, class_ids  # [H, W, N] bool, [N] int32

        dataset = Shapes()
        dataset.add_class("shapes", 1, "square")
        dataset.add_image("shapes", image_id="a7", path="a7.png")
        dataset.prepare()

    Sources keep several data sets apart in one: a source class or image is named "source.id".
    Internal class and image ids count from 0; class 0 is the background.

    Two methods are for data sets of hundreds of objects in large images, and for annotations that
    tell more than masks: load_boxed_masks(image_id), see boxed_masks.read_masks, and
    ground_truth(image_id), see evaluation.ground_truth.
    """

    # How load_image scales files of more than 8 bits: as the option IMAGE_BIT_DEPTH.
    bit_depth: int | str | None = None

    num_classes: int
    class_ids: np.ndarray
    class_names: list[str]
    num_images: int
    image_ids: np.ndarray
    sources: list[str]
    source_class_ids: dict[str, list[int]]
    class_from_source_map: dict[str, int]
    image_from_source_map: dict[str, int]

    def __init__(self) -> None:
        self.image_info: list[dict[str, Any]] = []
        self.class_info: list[dict[str, Any]] = [{"source": "", "id": 0, "name": "BG"}]

    def __getattr__(self, name: str) -> Any:
        hint = "; call prepare() first" if name in Dataset.__annotations__ else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{hint}")

    def add_class(self, source: str, class_id: Any, class_name: str) -> None:
        """Adds a class; the same class again is ignored.

        Raises:
            ValueError: a source with a dot, an integer class_id below 1, or a second name.
        """
        if "." in source:
            raise ValueError(f"a source must not contain a dot, got {source!r}; use '_'")
        if isinstance(class_id, int | np.integer) and class_id < 1:
            raise ValueError(f"class_id must be at least 1 (0 is the background), got {class_id}")
        for info in self.class_info:
            if (info["source"], info["id"]) == (source, class_id):
                if info["name"] != class_name:
                    raise ValueError(
                        f"class {source}.{class_id} must have one name, got {class_name!r} after "
                        f"{info['name']!r}; use another class_id"
                    )
                return
        self.class_info.append({"source": source, "id": class_id, "name": class_name})

    def add_image(self, source: str, image_id: Any, path: str | Path | None, **kwargs: Any) -> None:
        """Adds an image. kwargs are kept in image_info for load_image and load_mask."""
        self.image_info.append({"id": image_id, "source": source, "path": path, **kwargs})

    def prepare(self) -> None:
        """Numbers classes and images; call it after the last add_class and add_image.

        Raises:
            ValueError: an image's source has no class, so that it could not be trained on.
        """
        self.num_classes, self.num_images = len(self.class_info), len(self.image_info)
        self.class_ids, self.image_ids = np.arange(self.num_classes), np.arange(self.num_images)
        self.class_names = [info["name"].split(",")[0] for info in self.class_info]
        self.class_from_source_map, self.image_from_source_map = (
            {f"{info['source']}.{info['id']}": i for i, info in enumerate(infos)}
            for infos in (self.class_info, self.image_info)
        )
        self.sources = list(dict.fromkeys(info["source"] for info in self.class_info))
        # The background belongs to every source.
        self.source_class_ids = {
            source: [i for i, c in enumerate(self.class_info) if i == 0 or c["source"] == source]
            for source in self.sources
        }
        for source in {info["source"] for info in self.image_info} - set(self.sources):
            raise ValueError(
                f"an image's source must have a class, got {source!r}; add_class({source!r}, ...) "
                f"or use one of {self.sources[1:]}"
            )

    def split(self, share: float, seed: int = 0) -> tuple["Dataset", "Dataset"]:
        """Two data sets of the same classes, e.g. to train on and to validate with.

            train, val = dataset.split(0.2)

        Args:
            share: of the images that the second one gets, rounded down.
            seed: chooses them.
        """
        order = np.random.default_rng(seed).permutation(self.num_images)
        count = int(share * self.num_images)
        parts = copy.copy(self), copy.copy(self)
        for part, chosen in zip(parts, (order[count:], order[:count]), strict=True):
            part.image_info = [self.image_info[i] for i in np.sort(chosen)]
            part.prepare()
        return parts

    def at_bit_depth(self, bit_depth: int | str | None) -> "Dataset":
        """This data set, as one whose files are scaled so; its own bit_depth wins."""
        if bit_depth is None or self.bit_depth is not None:
            return self
        dataset = copy.copy(self)
        dataset.bit_depth = bit_depth
        return dataset

    def map_source_class_id(self, source_class_id: str) -> int:
        """The internal id of a source class, "coco.12"; ValueError if there is none."""
        return self._look_up(self.class_from_source_map, source_class_id, "class")

    def map_source_image_id(self, source_image_id: str) -> int:
        """The internal id of a source image, "coco.139"; ValueError if there is none."""
        return self._look_up(self.image_from_source_map, source_image_id, "image")

    @staticmethod
    def _look_up(ids: dict[str, int], key: str, kind: str) -> int:
        if key not in ids:
            known = ", ".join(list(ids)[:5])
            raise ValueError(f"a source {kind} must be one of {known}, ..., got {key!r}")
        return ids[key]

    def get_source_class_id(self, class_id: int, source: str) -> Any:
        """The id in its source of an internal class; ValueError if it is of another source."""
        info = self.class_info[class_id]
        if info["source"] != source:
            raise ValueError(f"class {class_id} must be of source {source!r}, got {info}")
        return info["id"]

    def image_reference(self, image_id: int) -> str:
        """What helps a person to find the image; override it."""
        return ""

    def source_image_link(self, image_id: int) -> str | Path | None:
        """The path or address of the image."""
        return self.image_info[image_id]["path"]

    def load_image(self, image_id: int) -> np.ndarray:
        """The image [H, W, 3] uint8, RGB, see image_files.load_image."""
        return load_image(self.image_info[image_id]["path"], bit_depth=self.bit_depth)

    def load_mask(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Masks [H, W, N] bool and class ids [N] int32 of an image: none, unless overridden.

        A negative class id marks a crowd, which is neither an object nor background.
        """
        height, width = self.load_image(image_id).shape[:2]
        return np.zeros((height, width, 0), dtype=bool), np.zeros(0, dtype=np.int32)


# --- Metrics -------------------------------------------------------------------------------------


def compute_matches(
    gt_boxes: np.ndarray,
    gt_class_ids: np.ndarray,
    gt_masks: np.ndarray,
    pred_boxes: np.ndarray,
    pred_class_ids: np.ndarray,
    pred_scores: np.ndarray,
    pred_masks: np.ndarray,
    iou_threshold: float = 0.5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matches predictions, best score first, each to the free object of its class it covers best.

    Args:
        gt_boxes: [G, (y1, x1, y2, x2)]; rows of zeros are padding and left out.
        gt_class_ids: [G].
        gt_masks: [H, W, G].
        pred_boxes: [P, (y1, x1, y2, x2)]; rows of zeros are padding and left out.
        pred_class_ids: [P].
        pred_scores: [P].
        pred_masks: [H, W, P].
        iou_threshold: the least mask IoU of a match.

    Returns:
        gt_match: [G] int64, the prediction of each object, -1 for none.
        pred_match: [P] int64, the object of each prediction, -1 for none.
        overlaps: [P, G] float64, mask IoU.
        Predictions are counted by falling score.
    """
    gt = np.flatnonzero(gt_boxes.any(axis=1))
    pred = np.flatnonzero(pred_boxes.any(axis=1))
    pred = pred[np.argsort(-pred_scores[pred], kind="stable")]
    same_class = pred_class_ids[pred][:, None] == gt_class_ids[gt]
    overlaps = compute_overlaps_masks(pred_masks[:, :, pred], gt_masks[:, :, gt])
    gt_match, pred_match = np.full(len(gt), -1), np.full(len(pred), -1)
    for i in range(len(pred) if len(gt) else 0):
        free = np.where(same_class[i] & (gt_match < 0), overlaps[i], -1)
        best = free.argmax()
        if free[best] >= iou_threshold:
            gt_match[best], pred_match[i] = i, best
    return gt_match, pred_match, overlaps


def compute_ap(
    gt_boxes: np.ndarray,
    gt_class_ids: np.ndarray,
    gt_masks: np.ndarray,
    pred_boxes: np.ndarray,
    pred_class_ids: np.ndarray,
    pred_scores: np.ndarray,
    pred_masks: np.ndarray,
    iou_threshold: float = 0.5,
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Average precision of one image, all classes pooled (PASCAL VOC 2010: area under the curve).

    Not COCO's AP, which ranks the predictions of all images together, per class. Without any
    object it is 1 if nothing is predicted, else 0. Arguments: see compute_matches.

    Returns:
        ap: float.
        precisions: [P + 2], made non-increasing; entry i + 1 counts the i + 1 best predictions.
        recalls: [P + 2], from 0 to 1.
        overlaps: [P, G], see compute_matches.
    """
    gt_match, pred_match, overlaps = compute_matches(
        gt_boxes,
        gt_class_ids,
        gt_masks,
        pred_boxes,
        pred_class_ids,
        pred_scores,
        pred_masks,
        iou_threshold,
    )
    hits = np.cumsum(pred_match >= 0)
    precisions = np.concatenate([[0], hits / np.arange(1, len(hits) + 1), [0]])
    precisions = np.maximum.accumulate(precisions[::-1])[::-1]
    recalls = np.concatenate([[0], hits / max(len(gt_match), 1), [1]])
    ap = np.sum(np.diff(recalls) * precisions[1:])
    if len(gt_match) == 0:
        ap = len(pred_match) == 0
    return float(ap), precisions, recalls, overlaps


def compute_ap_range(
    gt_box: np.ndarray,
    gt_class_id: np.ndarray,
    gt_mask: np.ndarray,
    pred_box: np.ndarray,
    pred_class_id: np.ndarray,
    pred_score: np.ndarray,
    pred_mask: np.ndarray,
    iou_thresholds: Sequence[float] | np.ndarray | None = None,
    verbose: int = 1,
) -> float:
    """Mean of compute_ap over IoU thresholds, 0.5 to 0.95 by 0.05 if None; verbose logs each."""
    if iou_thresholds is None:
        # Matterport: not linspace, so an IoU of exactly 0.9 is below the ninth threshold.
        iou_thresholds = np.arange(0.5, 1.0, 0.05)
    instances = (gt_box, gt_class_id, gt_mask, pred_box, pred_class_id, pred_score, pred_mask)
    aps = [compute_ap(*instances, iou_threshold=t)[0] for t in iou_thresholds]
    if verbose:
        for threshold, ap in zip(iou_thresholds, aps, strict=True):
            logger.info("AP @%.2f: %.3f", threshold, ap)
        logger.info("AP @%.2f-%.2f: %.3f", iou_thresholds[0], iou_thresholds[-1], np.mean(aps))
    return float(np.mean(aps))


def compute_recall(
    pred_boxes: np.ndarray, gt_boxes: np.ndarray, iou: float
) -> tuple[float, np.ndarray]:
    """The share of objects that some predicted box overlaps most, by at least iou.

    Args:
        pred_boxes: [P, (y1, x1, y2, x2)], image frame.
        gt_boxes: [G, (y1, x1, y2, x2)], image frame.
        iou: the least box IoU that counts.

    Returns:
        recall: float, 1 if there is no object to find.
        positive_ids: indices of the boxes that found one.
    """
    if len(gt_boxes) == 0:
        return 1.0, np.zeros(0, dtype=np.int64)
    overlaps = compute_overlaps(pred_boxes, gt_boxes)
    positive_ids = np.flatnonzero(overlaps.max(axis=1) >= iou)
    found = np.unique(overlaps.argmax(axis=1)[positive_ids])
    return len(found) / len(gt_boxes), positive_ids
