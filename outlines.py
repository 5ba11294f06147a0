"""From outlines to masks, and from masks to outlines."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import utils
from boxed_masks import BoxedMasks, Part

# What was drawn: an outline [P, (x, y)] float64 in image pixels, the first of which reaches from 0
# to 1, or the run lengths of a mask.
Drawing = np.ndarray | dict[str, Any]

# --- Outlines ------------------------------------------------------------------------------------


def rectangle(x: float, y: float, width: float, height: float) -> np.ndarray:
    """An outline of four points."""
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], float)


def ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> np.ndarray:
    """An outline of 128 points; theta, in radians, turns the x axis towards the y axis."""
    t = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    x, y, cos, sin = rx * np.cos(t), ry * np.sin(t), math.cos(theta), math.sin(theta)
    return np.stack([cx + x * cos - y * sin, cy + x * sin + y * cos], axis=1)


def draw(drawings: Sequence[Drawing], size: Sequence[int]) -> Part:
    """The pixels of an image of this size whose centres are inside of a drawing, as BoxedMasks."""
    parts = []
    for drawing in drawings:
        if isinstance(drawing, dict):
            box, part = utils.rle_decode_part(drawing)
        else:
            box = pixel_box(drawing, size)
            part = fill(drawing, np.arange(box[0], box[2]), box[1], box[3])
        if part.any():
            parts.append((box, part))
    if not parts:
        return (0, 0, 0, 0), np.zeros((0, 0), dtype=bool)
    boxes = np.array([box for box, _ in parts])
    (top, left), (bottom, right) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    union = np.zeros((bottom - top, right - left), dtype=bool)
    for (y1, x1, y2, x2), part in parts:
        union[y1 - top : y2 - top, x1 - left : x2 - left] |= part
    whole = int(top), int(left), int(bottom), int(right)
    return BoxedMasks(size, [(whole, union)]).tight().parts[0]


def pixel_box(outline: np.ndarray, size: Sequence[int]) -> tuple[int, int, int, int]:
    """The (y1, x1, y2, x2) of the pixels whose centres may be inside of an outline."""
    low = np.ceil(outline.min(axis=0) - 0.5).clip(0)
    high = np.floor(outline.max(axis=0) + 0.5).clip(low, np.maximum(low, (size[1], size[0])))
    (x1, y1), (x2, y2) = low.astype(int).tolist(), high.astype(int).tolist()
    return y1, x1, y2, x2


def fill(outline: np.ndarray, rows: np.ndarray, x1: int, x2: int) -> np.ndarray:
    """Which pixels have their centre inside of an outline, or on it.

    What is enclosed twice is outside. The same as skimage.draw.polygon, but in a time that does
    not grow with the points times the pixels.

    Args:
        outline: [P, (x, y)] in image pixels.
        rows: [R] rising numbers of rows.
        x1: the first column.
        x2: the column after the last.

    Returns:
        [R, x2 - x1] bool.
    """
    filled = np.zeros((len(rows), x2 - x1), dtype=bool)
    x, y = outline.T - 0.5  # the centres of the pixels are whole numbers then
    last_x, last_y = np.roll(x, 1), np.roll(y, 1)
    step = max(1, 2**20 // max(len(x), x2 - x1))
    for start in range(0, len(rows), step):
        block, row = filled[start : start + step], rows[start : start + step, None]
        above, below = last_y - row, y - row  # [R, P]: where edges start and end
        # To the right of a centre inside there is an odd number of crossings, and to the left,
        # too; where a centre is on an edge, on one side only.
        for side in (1, -1):
            i, edge = np.nonzero((side * above > 0) != (side * below > 0))
            dy1, dy2 = above[i, edge], below[i, edge]
            at = (last_x[edge] * dy2 - x[edge] * dy1) / (dy2 - dy1)
            # The first column, counted from the left or right, that has the crossing beyond it.
            first = np.floor(at) + 1 - x1 if side < 0 else x2 - np.ceil(at)
            first = first.clip(0, x2 - x1).astype(np.int64)
            shape = len(block), x2 - x1 + 1
            counts = np.bincount(i * shape[1] + first, minlength=shape[0] * shape[1])
            odd = np.logical_xor.accumulate(counts.reshape(shape)[:, :-1] % 2 == 1, axis=1)
            block |= odd if side < 0 else odd[:, ::-1]
    corner = (x == np.rint(x)) & (y == np.rint(y)) & (x >= x1) & (x < x2) & np.isin(y, rows)
    filled[np.searchsorted(rows, y[corner]), x[corner].astype(int) - x1] = True
    return filled


def place(patch: np.ndarray, x: int, y: int, size: Sequence[int]) -> dict[str, Any]:
    """The run lengths of a mask [h, w] bool whose first pixel is at (x, y) of an image."""
    top, left = max(0, -y), max(0, -x)
    inside = patch[top : max(top, size[0] - y), left : max(left, size[1] - x)]
    if inside.size == 0:
        return utils.rle_encode(inside[:0, :0], (0, 0, 0, 0), size)
    y1, x1 = y + top, x + left
    return utils.rle_encode(inside, (y1, x1, y1 + inside.shape[0], x1 + inside.shape[1]), size)


# --- Masks ---------------------------------------------------------------------------------------

# What simplified polygons must keep of a mask, as intersection over union. A mask of fewer pixels
# stays as it is: programs do not agree on which pixels a slanted edge takes.
LEAST_IOU = 0.97
LEAST_PIXELS = 1000

# The edges of a pixel, clockwise on the screen: the (x, y) of where each starts, by its direction.
_EDGES = {(1, 0): (0, 0), (0, 1): (1, 0), (-1, 0): (1, 1), (0, -1): (0, 1)}

Corner = tuple[int, int]


def mask_polygons(rle: dict[str, Any], tolerance: float = 1.0) -> list[list[float]]:
    """A mask as polygons [[x, y, x, y, ...], ...] in COCO's format, one for each of its parts.

    A hole is a bay of its polygon, to which a cut without width leads. Corners are left out as
    long as LEAST_IOU of a mask of LEAST_PIXELS or more is kept.

    Args:
        rle: the mask in run lengths.
        tolerance: the most that an outline may move, in pixels; 0 keeps all corners.
    """
    (top, left, _, _), part = utils.rle_decode_part(rle)
    borders = trace(part)
    limits = (tolerance, 0.75 * tolerance, 0) if part.sum() >= LEAST_PIXELS else (0,)
    for limit in limits:
        polygons = [join([simplify(ring, limit) for ring in rings]) for rings in borders]
        if not limit or _iou(polygons, part) >= LEAST_IOU:
            break
    return [np.add(polygon, (left, top)).ravel().tolist() for polygon in polygons]


def _iou(polygons: Sequence[np.ndarray], part: np.ndarray) -> float:
    filled = np.zeros_like(part)
    for polygon in polygons:
        y1, x1, y2, x2 = pixel_box(polygon, part.shape)
        filled[y1:y2, x1:x2] |= fill(polygon, np.arange(y1, y2), x1, x2)
    return float((filled & part).sum() / max(1, (filled | part).sum()))


def trace(part: np.ndarray) -> list[list[np.ndarray]]:
    """The borders of a mask [h, w] bool along the edges of its pixels.

    Returns:
        For each connected part its outer ring and those of its holes, [P, (x, y)] float64. Pixels
        that touch at a corner alone are not connected.
    """
    height, width = part.shape
    padded = np.pad(part, 1)
    # Where the edges of the border start, and where they lead: the mask is on their right.
    moves: dict[Corner, list[Corner]] = collections.defaultdict(list)
    for (dx, dy), (ox, oy) in _EDGES.items():
        left = padded[1 - dx : 1 - dx + height, 1 + dy : 1 + dy + width]
        y, x = np.nonzero(part & ~left)
        for corner in zip((x + ox).tolist(), (y + oy).tolist(), strict=True):
            moves[corner].append((dx, dy))

    from scipy import ndimage  # a quarter of a second that most commands do not need

    labels, count = ndimage.label(part)
    borders: list[list[np.ndarray]] = [[] for _ in range(count)]
    for corner in list(moves):  # row by row, so that of each part the outer ring comes first
        while moves[corner]:
            move = moves[corner].pop()
            ox, oy = _EDGES[move]
            label = labels[corner[1] - oy, corner[0] - ox]
            borders[label - 1].append(_follow(moves, corner, move))
    return borders


def _follow(moves: dict[Corner, list[Corner]], corner: Corner, move: Corner) -> np.ndarray:
    """Takes the ring that starts so out of the moves: the corners where it turns."""
    first, ring = (corner, move), []
    while True:
        corner = corner[0] + move[0], corner[1] + move[1]
        right = -move[1], move[0]
        # Where two ways go on, to the right: around the same pixel.
        ways = moves[corner]
        if corner == first[0] and (not ways or right == first[1]):
            following = first[1]
        else:
            following = right if right in ways else ways[0]
            ways.remove(following)
        if following != move:
            ring.append(corner)
        move = following
        if (corner, move) == first:
            return np.array(ring, dtype=float)


def simplify(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Some of the corners of a ring [P, (x, y)], from which none is farther away."""
    if not tolerance or len(ring) <= 8:
        return ring
    from skimage.measure import approximate_polygon  # slow to import

    simple = approximate_polygon(np.concatenate([ring, ring[:1]]), tolerance)[:-1]
    return simple if len(simple) >= 3 else ring


def join(rings: Sequence[np.ndarray]) -> np.ndarray:
    """One polygon of an outer ring and those of its holes, with a cut to and from each hole."""
    polygon, *holes = rings
    for hole in holes:
        distances = ((polygon[:, None] - hole) ** 2).sum(axis=2)
        i, j = np.unravel_index(distances.argmin(), distances.shape)
        bay = np.roll(hole, -j, axis=0)
        polygon = np.concatenate([polygon[: i + 1], bay, bay[:1], polygon[i:]])
    return polygon
