"""Masks of many objects in large images, each kept as the part in its box."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import utils

Part = tuple[tuple[int, int, int, int], np.ndarray]


def common_box(first: Sequence[int], second: Sequence[int]) -> tuple[int, int, int, int]:
    """What two boxes (y1, x1, y2, x2) share, without area where they do not meet."""
    (a, b, c, d), (e, f, g, h) = first, second
    y1, x1 = max(a, e), max(b, f)
    return y1, x1, max(y1, min(c, g)), max(x1, min(d, h))


def within_box(part: Part, box: Sequence[int]) -> np.ndarray:
    """What of a mask lies in a box, which its own box must hold."""
    (top, left, _, _), mask = part
    y1, x1, y2, x2 = box
    return mask[y1 - top : y2 - top, x1 - left : x2 - left]


def shared_pixels(first: Part, second: Part) -> int:
    """How many pixels two masks share."""
    box = common_box(first[0], second[0])
    return int(np.count_nonzero(within_box(first, box) & within_box(second, box)))


class BoxedMasks:
    """The masks of an image, [H, W, N] bool, each kept as the part in its box.

    450 objects on 12 megapixels are 5 GB as an array, and some megabytes here. Slices, index arrays
    that rise or fall throughout, swapaxes and any do what they do with an array; np.asarray makes
    one.

    Args:
        size: (H, W).
        parts: of each mask the box (y1, x1, y2, x2), inside the image, and what is in it,
            [y2 - y1, x2 - x1] bool; nothing is set outside.
    """

    dtype = np.dtype(bool)

    def __init__(self, size: Sequence[int], parts: Iterable[Part]) -> None:
        self.size = int(size[0]), int(size[1])
        self.parts = list(parts)

    @classmethod
    def from_array(cls, masks: np.ndarray) -> "BoxedMasks":
        """Of masks [H, W, N] bool."""
        parts = []
        for i, (y1, x1, y2, x2) in enumerate(utils.extract_bboxes(masks).tolist()):
            parts.append(((y1, x1, y2, x2), masks[y1:y2, x1:x2, i].copy()))
        return cls(masks.shape, parts)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.size, len(self.parts))

    def __len__(self) -> int:
        return self.size[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        masks = np.zeros(self.shape, dtype=bool)
        for i, ((y1, x1, y2, x2), part) in enumerate(self.parts):
            masks[y1:y2, x1:x2, i] = part
        return masks if dtype is None else masks.astype(dtype)

    def __getitem__(self, key: Any) -> "BoxedMasks":
        """Rows, or (rows, columns): slices, or arrays that rise or fall throughout."""
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        y, x = (
            np.arange(length)[index].ravel()
            for length, index in zip(self.size, (rows, columns), strict=True)
        )
        for index in (y, x):
            steps = np.diff(index)
            if (steps < 0).any() and (steps > 0).any():
                raise IndexError("rows and columns of masks must rise or fall throughout")
        parts = []
        for (y1, x1, y2, x2), part in self.parts:
            down, across = (
                np.flatnonzero((index >= low) & (index < high))
                for index, low, high in ((y, y1, y2), (x, x1, x2))
            )
            if len(down) == 0 or len(across) == 0:
                parts.append(((0, 0, 0, 0), np.zeros((0, 0), dtype=bool)))
                continue
            box = int(down[0]), int(across[0]), int(down[-1]) + 1, int(across[-1]) + 1
            parts.append((box, part[y[down] - y1][:, x[across] - x1]))
        return BoxedMasks((len(y), len(x)), parts)

    def swapaxes(self, axis1: int, axis2: int) -> "BoxedMasks":
        """Swaps rows and columns, which are the axes 0 and 1."""
        if {axis1, axis2} != {0, 1}:
            raise ValueError(f"axes must be 0 and 1, got {axis1} and {axis2}")
        parts = (((x1, y1, x2, y2), part.T) for (y1, x1, y2, x2), part in self.parts)
        return BoxedMasks(self.size[::-1], parts)

    def pad(self, padding: Sequence[tuple[int, int]]) -> "BoxedMasks":
        """With ((above, below), (left, right)) clear rows and columns around."""
        (top, bottom), (left, right), *_ = padding
        size = self.size[0] + top + bottom, self.size[1] + left + right
        shift = np.array((top, left, top, left))
        return BoxedMasks(size, ((tuple((shift + box).tolist()), p) for box, p in self.parts))

    def resize(
        self,
        scale: float | tuple[float, float],
        padding: Sequence[tuple[int, int]],
        crop: tuple[int, int, int, int] | None = None,
    ) -> "BoxedMasks":
        """As utils.resize_image resized their image, see utils.resize_mask."""
        return self[utils.mask_taps(self.size, scale, crop)].pad(padding)

    def any(self) -> bool:
        """Whether any pixel is set."""
        return any(part.any() for _, part in self.parts)

    def select(self, indices: Iterable[int]) -> "BoxedMasks":
        """Some of the masks."""
        return BoxedMasks(self.size, [self.parts[i] for i in indices])

    def tight(self) -> "BoxedMasks":
        """The same in the smallest boxes; (0, 0, 0, 0) where nothing is set."""
        parts = []
        for (y1, x1, _, _), part in self.parts:
            top, left, bottom, right = utils.extract_bboxes(part[:, :, None])[0].tolist()
            part = part[top:bottom, left:right]
            box = (y1 + top, x1 + left, y1 + bottom, x1 + right) if part.size else (0, 0, 0, 0)
            parts.append((box, part))
        return BoxedMasks(self.size, parts)

    @property
    def boxes(self) -> np.ndarray:
        """[N, (y1, x1, y2, x2)] int32."""
        return np.array([box for box, _ in self.parts], dtype=np.int32).reshape(-1, 4)

    def minimize(self, mini_shape: Sequence[int]) -> np.ndarray:
        """Mini masks [h, w, N] bool of these boxes, see utils.minimize_mask."""
        mini_masks = np.zeros((*mini_shape[:2], len(self.parts)), dtype=bool)
        for i, ((y1, x1, y2, x2), part) in enumerate(self.parts):
            box = np.array([[0, 0, y2 - y1, x2 - x1]])
            mini_masks[:, :, i] = utils.minimize_mask(box, part[:, :, None], mini_shape)[:, :, 0]
        return mini_masks


def read_masks(dataset: utils.Dataset, image_id: int) -> tuple[BoxedMasks, np.ndarray]:
    """Masks and class ids [N] of an image, see utils.Dataset.load_mask.

    A data set that need not make an array of all masks has a method load_boxed_masks; a sub-class
    with a load_mask of its own is asked that instead.

    Raises:
        ValueError: load_mask gives something else than masks [H, W, N] and class ids [N].
    """
    for cls in type(dataset).__mro__:
        if "load_boxed_masks" in vars(cls):
            return dataset.load_boxed_masks(image_id)
        if "load_mask" in vars(cls):
            break
    masks, class_ids = dataset.load_mask(image_id)
    class_ids = np.asarray(class_ids)
    if masks.ndim != 3 or class_ids.shape != masks.shape[2:]:
        raise ValueError(
            f"load_mask must return masks [H, W, N] and class ids [N], got {list(masks.shape)} and"
            f" {list(class_ids.shape)}"
        )
    return BoxedMasks.from_array(masks.astype(bool, copy=False)), class_ids
