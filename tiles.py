"""An image seen in parts, at several scales or mirrored, and one list of objects from all of it.

`views` says what the network is shown, `View.cut` and `View.place` lead from the image to a view
and from what was found in it back to the image, `merge` makes one list. MaskRCNN.detect does all
of it. Boxes are (y1, x1, y2, x2), frames and masks those of detections.Objects.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from boxed_masks import Part, common_box, shared_pixels, within_box
from config import Config
from detections import Objects

Box = tuple[int, int, int, int]

# Masks of one object that two windows or views show: at least so much in common.
SAME_IOU = 0.5
# A cut object is part of a whole one that holds so much of it.
PART_SHARE = 0.7
# An object is cut where its box ends so close to its window's border: a share of the window.
CUT_MARGIN = 1 / 32
# Views that vote may doubt what most of them see: each looks for objects of at least this score.
VIEW_CONFIDENCE = 0.05

FLIPS: dict[str, tuple[slice, slice]] = {
    "none": (slice(None), slice(None)),
    "horizontal": (slice(None), slice(None, None, -1)),
    "vertical": (slice(None, None, -1), slice(None)),
    "both": (slice(None, None, -1), slice(None, None, -1)),
}


class View(NamedTuple):
    """What the network is shown of an image: a window, how large, and mirrored or not."""

    window: Box
    scale: float  # times the size that the config gives an image
    flip: str  # one of FLIPS

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The view of an image [H, W, C], without a copy."""
        y1, x1, y2, x2 = self.window
        return image[y1:y2, x1:x2][FLIPS[self.flip]]

    def place(self, objects: Objects) -> Objects:
        """Objects found in the view, in the frame of the image."""
        y1, x1, y2, x2 = self.window
        if (y1, x1, self.flip) == (0, 0, "none"):
            return objects  # whose masks may be pasted one by one, as they are needed
        down, across = (step.step == -1 for step in FLIPS[self.flip])

        def corners(box: Sequence[float]) -> list[float]:
            top, left, bottom, right = box
            if down:
                top, bottom = y2 - y1 - bottom, y2 - y1 - top
            if across:
                left, right = x2 - x1 - right, x2 - x1 - left
            return [top + y1, left + x1, bottom + y1, right + x1]

        boxes = np.array([corners(box) for box in objects.boxes.tolist()], np.float32)
        parts: list[Part] = []
        for box, part in objects.parts:
            a, b, c, d = map(int, corners(box))
            parts.append(((a, b, c, d), part[FLIPS[self.flip]]))
        return objects._replace(boxes=boxes.reshape(-1, 4), parts=parts)


def views(
    image_shape: Sequence[int],
    config: Config,
    tile: Sequence[int] | int | None = None,
    overlap: float | None = None,
) -> list[View]:
    """The views of an image (height, width, ...); one of the whole, unless the config has others.

    Args:
        tile: (height, width) of the windows, or the side of squares; None for the config's
            DETECTION_TILE.
        overlap: None for the config's DETECTION_OVERLAP.

    Raises:
        ValueError: sizes that cannot be.
    """
    tile = config.DETECTION_TILE if tile is None else tile
    overlap = config.DETECTION_OVERLAP if overlap is None else overlap
    size = (image_shape[0], image_shape[1])
    cut = [(0, 0, *size)] if tile is None else windows(size, tile, overlap)
    flips = ["none", *config.DETECTION_FLIPS]
    return [View(*view) for view in itertools.product(cut, config.DETECTION_SCALES, flips)]


def windows(image_shape: Sequence[int], tile: Sequence[int] | int, overlap: float) -> list[Box]:
    """Windows of one size, evenly spaced, that cover an image (height, width, ...).

    Args:
        tile: (height, width) of the windows, or the side of squares; less where the image is
            smaller.
        overlap: what neighbours share at least: pixels or, below 1, that part of a window's side.

    Raises:
        ValueError: sizes that cannot be.
    """
    sides = tuple(tile) if isinstance(tile, Sequence | np.ndarray) else (tile, tile)
    if len(sides) != 2 or not all(isinstance(n, int | np.integer) and n >= 1 for n in sides):
        raise ValueError(f"tile must be (height, width) in whole pixels, got {tile!r:.100}")
    tile = sides
    if not (overlap >= 0 and (overlap < 1 or overlap < min(tile))):
        raise ValueError(
            f"overlap must be a share below 1 or pixels, fewer than the tile {tuple(tile)} has,"
            f" got {overlap}"
        )
    axes = []
    for length, side in zip(image_shape[:2], map(int, tile), strict=True):
        shared = round(overlap * side) if overlap < 1 else int(overlap)
        side, step = min(side, length), max(1, side - shared)
        count = 1 + max(0, -(-(length - side) // step))
        axes.append(
            [(int(start), int(start) + side) for start in np.linspace(0, length - side, count)]
        )
    return [(y1, x1, y2, x2) for (y1, y2), (x1, x2) in itertools.product(*axes)]


def merge(
    found: Sequence[tuple[View, Objects]], image_shape: Sequence[int], config: Config
) -> Objects:
    """One list of the objects of an image, from those of each view in the frame of the image.

    Views of one window vote; then windows are joined at their seams.
    """
    if len(found) == 1:
        return found[0][1]
    by_window = defaultdict(list)
    for view, objects in found:
        by_window[view.window].append(objects)
    voted = [(window, vote(objects, config)) for window, objects in by_window.items()]
    return voted[0][1] if len(voted) == 1 else stitch(voted, image_shape)


def vote(found: Sequence[Objects], config: Config) -> Objects:
    """What several views of one window agree on.

    Masks of one class and of different views that overlap by SAME_IOU are one object. Its score is
    the mean over all views, 0 for one that misses it; what falls below DETECTION_MIN_CONFIDENCE is
    dropped, and so is what exceeds DETECTION_MAX_INSTANCES. Its box is the mean, and its mask what
    the views set in the majority, both weighted by score: of two views, that of the higher one.
    """
    if len(found) == 1:
        return found[0]
    every = _flatten(found)
    view = np.repeat(np.arange(len(found)), [len(objects.scores) for objects in found])
    parts = list(every.parts)
    areas = [_area(part) for part in parts]
    neighbours = _neighbours(every, np.arange(len(parts)), np.arange(len(parts)))
    free = np.ones(len(parts), bool)
    boxes, class_ids, scores, masks = [], [], [], []
    for head in np.argsort(-every.scores, kind="stable").tolist():
        if not free[head]:
            continue
        best = {int(view[head]): (1.0, head)}  # of each view the mask that is most like this one
        for other in neighbours.get(head, ()):
            if free[other] and view[other] != view[head]:
                iou = _iou(parts[head], parts[other], areas[head], areas[other])
                if iou >= max(SAME_IOU, best.get(int(view[other]), (0.0, 0))[0]):
                    best[int(view[other])] = iou, other
        members = np.array([other for _, other in best.values()])
        free[members] = False
        score = every.scores[members].sum() / len(found)
        if score < config.DETECTION_MIN_CONFIDENCE:
            continue
        weights = every.scores[members] / every.scores[members].sum()
        boxes.append(weights @ every.boxes[members])
        class_ids.append(every.class_ids[head])
        scores.append(score)
        masks.append(_majority([parts[i] for i in members], weights))
    voted = _best_first(boxes, class_ids, scores, masks)
    most = config.DETECTION_MAX_INSTANCES
    return _choose(voted, np.arange(len(voted.scores))[:most])


def stitch(found: Sequence[tuple[Box, Objects]], image_shape: Sequence[int]) -> Objects:
    """The objects of windows that overlap, each object once, and whole where possible.

    Cut objects of two windows are joined if they agree where both windows show them. Then, of the
    objects of one class, one goes whose mask is like another's (SAME_IOU), or which is cut and
    lies in another (PART_SHARE): whole ones stay before cut ones, and higher scores before lower.
    """
    every = _flatten([objects for _, objects in found])
    parts = list(every.parts)
    window = np.repeat(np.arange(len(found)), [len(objects.scores) for _, objects in found])
    frames = np.array([frame for frame, _ in found]).reshape(-1, 4)
    cut = _are_cut(every.boxes, frames[window], image_shape)
    neighbours: dict[int, set[int]] = defaultdict(set)
    group = list(range(len(parts)))  # union-find

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = i = group[group[i]]
        return i

    for first, second in _overlapping(frames):
        both = (*np.maximum(frames[first, :2], frames[second, :2]).tolist(),)
        both += (*np.minimum(frames[first, 2:], frames[second, 2:]).tolist(),)
        members = [_within(every.boxes, (window == w).nonzero()[0], both) for w in (first, second)]
        for i, others in _neighbours(every, *members).items():
            for j in others:
                neighbours[i].add(j)
                neighbours[j].add(i)
                if cut[i] and cut[j] and _agree(parts[i], parts[j], both):
                    group[root(i)] = root(j)

    joined = defaultdict(list)
    for i in range(len(parts)):
        joined[root(i)].append(i)
    boxes, scores = every.boxes.copy(), every.scores.copy()
    for i, pieces in joined.items():
        if len(pieces) > 1:
            own = every.boxes[pieces]
            boxes[i] = np.concatenate([own[:, :2].min(axis=0), own[:, 2:].max(axis=0)])
            scores[i] = every.scores[pieces].max()
            parts[i] = _majority([parts[piece] for piece in pieces], None)
    areas = [_area(part) for part in parts]
    keep: set[int] = set()
    for i in sorted(joined, key=lambda i: (bool(cut[i]), -scores[i])):
        near = {root(j) for piece in joined[i] for j in neighbours[piece]} & keep
        if not any(
            _iou(parts[i], parts[j], areas[i], areas[j]) >= SAME_IOU
            or (cut[i] and shared_pixels(parts[i], parts[j]) >= PART_SHARE * max(1, areas[i]))
            for j in near
        ):
            keep.add(i)
    order = sorted(keep)
    chosen = [parts[i] for i in order]
    return _best_first(boxes[order], every.class_ids[order], scores[order], chosen)


def _flatten(found: Sequence[Objects]) -> Objects:
    """All objects in one list, in the order of the lists."""
    return Objects(
        np.concatenate([objects.boxes.reshape(-1, 4) for objects in found]),
        np.concatenate([objects.class_ids for objects in found]),
        np.concatenate([objects.scores for objects in found]),
        [part for objects in found for part in objects.parts],
    )


def _best_first(
    boxes: Sequence[np.ndarray] | np.ndarray,
    class_ids: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    parts: Sequence[Part],
) -> Objects:
    objects = Objects(
        np.asarray(boxes, np.float32).reshape(-1, 4),
        np.asarray(class_ids, np.int32),
        np.asarray(scores, np.float32),
        parts,
    )
    return _choose(objects, np.argsort(-objects.scores, kind="stable"))


def _choose(objects: Objects, members: np.ndarray) -> Objects:
    parts = list(objects.parts)
    chosen = [parts[i] for i in members]
    return Objects(
        objects.boxes[members], objects.class_ids[members], objects.scores[members], chosen
    )


def _overlapping(frames: np.ndarray) -> Iterator[tuple[int, int]]:
    """The pairs of windows [W, 4] that share pixels, each once."""
    for first, frame in enumerate(frames):
        later = frames[first + 1 :]
        shared = (later[:, :2] < frame[2:]) & (frame[:2] < later[:, 2:])
        for second in shared.all(axis=1).nonzero()[0]:
            yield first, first + 1 + int(second)


def _within(boxes: np.ndarray, members: np.ndarray, frame: Sequence[int]) -> np.ndarray:
    """The members whose boxes reach into a frame."""
    own = boxes[members]
    inside = (own[:, :2] < frame[2:]) & (own[:, 2:] > frame[:2])
    return members[inside.all(axis=1)]


def _neighbours(objects: Objects, first: np.ndarray, second: np.ndarray) -> dict[int, list[int]]:
    """For members of `first`, those of `second` of the same class whose boxes meet theirs."""
    a, b = objects.boxes[first], objects.boxes[second]
    near = objects.class_ids[first][:, None] == objects.class_ids[second]
    for axis in (0, 1):
        near &= a[:, None, axis] < b[:, axis + 2]
        near &= a[:, None, axis + 2] > b[:, axis]
    found = defaultdict(list)
    for i, j in zip(*near.nonzero(), strict=True):
        found[int(first[i])].append(int(second[j]))
    return found


def _are_cut(boxes: np.ndarray, frames: np.ndarray, image_shape: Sequence[int]) -> np.ndarray:
    """Whether each box [N, 4] ends at a border of its window [N, 4] that is not the image's."""
    size = np.tile(frames[:, 2:] - frames[:, :2], 2)
    inner = frames != np.array([0, 0, *image_shape[:2]])
    return (inner & (np.abs(boxes - frames) <= 1 + CUT_MARGIN * size)).any(axis=1)


def _area(part: Part) -> int:
    return int(np.count_nonzero(part[1]))


def _iou(first: Part, second: Part, area1: int, area2: int) -> float:
    """Intersection over union of two masks of these areas; 0 where it must be below SAME_IOU."""
    y1, x1, y2, x2 = common_box(first[0], second[0])
    if (y2 - y1) * (x2 - x1) < SAME_IOU * max(area1, area2):
        return 0.0  # before any pixel is looked at
    shared = shared_pixels(first, second)
    return shared / max(1, area1 + area2 - shared)


def _agree(first: Part, second: Part, frame: Box) -> bool:
    """Whether two masks are the same, as far as a frame shows them."""
    boxes = [common_box(part[0], frame) for part in (first, second)]
    first, second = (
        (box, within_box(p, box)) for box, p in zip(boxes, (first, second), strict=True)
    )
    return _iou(first, second, _area(first), _area(second)) >= SAME_IOU


def _majority(parts: Sequence[Part], weights: np.ndarray | None) -> Part:
    """The pixels that masks set with at least half of the weights; all of them without weights."""
    corners = np.array([box for box, _ in parts])
    y1, x1 = corners[:, :2].min(axis=0).tolist()
    y2, x2 = corners[:, 2:].max(axis=0).tolist()
    total = np.zeros((y2 - y1, x2 - x1), np.float32)
    shares = np.ones(len(parts)) if weights is None else weights
    for ((top, left, bottom, right), mask), share in zip(parts, shares, strict=True):
        total[top - y1 : bottom - y1, left - x1 : right - x1] += mask * np.float32(share)
    # The last digit of a sum of weights must not decide where all agree by halves.
    return (y1, x1, y2, x2), total > 0 if weights is None else total >= 0.5 - 1e-4
