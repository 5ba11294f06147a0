"""The pictures of a page: a photograph as JPEG, and what is marked in it as SVG to lay over it.

Marks that are a file of their own stay sharp at any size, and can be taken away. Their letters and
lines follow the size at which a page shows them, by media queries.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import outlines
import utils
from boxed_masks import BoxedMasks
from cli import printable

# The longer side of a photograph in pixels, at most, and of its marks in units of SVG.
PHOTO_SIDE = 800
UNITS = 1000
# Points of an outline are so many pixels of the photograph apart, where it is not straight.
STEP = 2.5
# With more objects than these, only mistakes have their names beside them, and small pictures have
# no signs.
FEW = 20

# Colours that are apart in any kind of colour blindness, each kind with a line and a sign of its
# own. A kind without a sign is what is right.
SIGNS = {
    "poor": "M-6 0A6 6 0 0 1 6 0Z M-6 0A6 6 0 0 0 6 0",
    "wrong": "M-6-3H6M-6 3H6M3-7L-3 7",
    "false": "M-5-5L5 5M-5 5L5-5",
    "missed": "M-6 0A6 6 0 1 0 6 0A6 6 0 1 0-6 0",
}
_STYLE = """
path{fill:none;stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round}
path.under{stroke:#000;stroke-opacity:.5;stroke-width:4}
path.found{stroke:#5cc8ff;fill:#5cc8ff1f}
path.poor{stroke:#5cc8ff;stroke-dasharray:7 4;fill:#5cc8ff1f}
path.wrong{stroke:#e08cff;stroke-dasharray:12 3 2 3;fill:#e08cff33}
path.false{stroke:#ffd60a;fill:#ffd60a33}
path.missed{stroke:#ff6b2c;stroke-dasharray:1 5;stroke-linecap:round;stroke-width:3;fill:#ff6b2c33}
.sign path{stroke-width:2.5;fill:none;stroke-dasharray:none}
.sign path.under{stroke-width:5.5;stroke-opacity:.75}
text{font:600 14px system-ui,sans-serif;stroke:#000c;stroke-width:3.5px;paint-order:stroke;
stroke-linejoin:round}
text.found,text.poor{fill:#bde9ff}text.wrong{fill:#f0c9ff}text.false{fill:#ffea80}
text.missed{fill:#ffbd9e}
@media(max-width:900px){.label{transform:scale(1.3)}}
@media(max-width:620px){.label{transform:scale(1.8)}}
@media(max-width:420px){.label{transform:scale(2.4)}text{display:none}path{stroke-width:1.5}
path.under{stroke-width:2.5}path.missed{stroke-width:2}}
@media(max-width:240px){.label{transform:scale(2.6)}.many .label{display:none}}
"""


@dataclass(frozen=True)
class Mark:
    """An object or a detection to mark in a picture.

    Attributes:
        kind: "found", "poor", "wrong", "false" or "missed".
        rle: its mask in run lengths.
        bbox: its box [x, y, width, height] in pixels, drawn where the mask is empty.
        text: what stands beside it.
    """

    kind: str
    rle: dict[str, Any]
    bbox: Sequence[float]
    text: str


def save_photo(image: np.ndarray, path: Path) -> None:
    """Saves an image as JPEG with sides of PHOTO_SIDE at most; of many channels the first ones.

    Args:
        image: [H, W, C] of what utils.as_uint8_image takes.
        path: of the file.
    """
    channels = 3 if image.shape[2] >= 3 else 1
    photo = Image.fromarray(utils.as_uint8_image(image[:, :, :channels]))
    photo.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    photo.save(path, quality=85)


def draw_marks(marks: Sequence[Mark], size: Sequence[int]) -> str:
    """An SVG of marks, to lay over the photograph of an image of (height, width) pixels."""
    height, width = size
    units = UNITS / max(height, width)
    scale = min(1.0, PHOTO_SIDE / max(height, width))
    masks = BoxedMasks(size, [utils.rle_decode_part(mark.rle) for mark in marks])
    if scale < 1:
        masks = masks.resize(scale, [(0, 0), (0, 0)])
    # Right ones below mistakes, and large ones below small ones.
    area = [mark.bbox[2] * mark.bbox[3] for mark in marks]
    few = len(marks) <= FEW
    order = sorted(range(len(marks)), key=lambda i: (marks[i].kind in SIGNS, -area[i]))
    lines, labels = [], []
    for i in order:
        mark, (corner, part) = marks[i], masks.parts[i]
        d = _outline(corner, part, units / scale) or _rectangle(mark.bbox, units)
        lines.append(f'<path class="under" d="{d}"/><path class="{mark.kind}" d="{d}"/>')
        if mark.kind in SIGNS or (mark.text and few):
            labels.append(_label(mark, _top(corner, part, scale) or mark.bbox[:2], units, width))
    body = "\n".join([*lines, *labels])
    view = f"0 0 {width * units:.4g} {height * units:.4g}"
    kind = "few" if few else "many"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{kind}" viewBox="{view}">'
        f"<style>{_STYLE}</style>\n{body}\n</svg>\n"
    )


def _outline(corner: Sequence[int], part: np.ndarray, units: float) -> str:
    """The path of the borders of a mask that starts at the corner (y, x, ...)."""
    y, x = corner[:2]
    rings = [ring for border in outlines.trace(part) for ring in border]
    return "".join(_path((_smooth(ring) + np.array((x, y))) * units) for ring in rings)


def _smooth(ring: np.ndarray) -> np.ndarray:
    """A ring of corners of pixels [P, (x, y)] without its stairs, and with fewer points."""
    ahead = np.roll(ring, -1, axis=0) - ring
    length = np.abs(ahead).sum(axis=1)  # edges are horizontal or vertical
    cut = np.minimum(0.5, 1 / length)[:, None]  # corners are cut by a pixel
    points = np.stack([ring + cut * ahead, ring + (1 - cut) * ahead], axis=1).reshape(-1, 2)
    start = np.cumsum(length) - length
    along = np.stack([start + cut[:, 0] * length, start + length * (1 - cut[:, 0])], axis=1)
    # Of a stretch of STEP pixels the first point; of small rings, more of them.
    step = min(STEP, length.sum() / 16)
    stretch = np.floor(along.ravel() / step)
    return points[np.diff(stretch, prepend=-1) > 0]


def _rectangle(bbox: Sequence[float], units: float) -> str:
    return _path(outlines.rectangle(*bbox) * units)


def _path(points: np.ndarray) -> str:
    numbers = (f"{x:.1f} {y:.1f}".replace(".0", "") for x, y in points.tolist())
    return f"M{'L'.join(numbers)}Z"


def _top(corner: Sequence[int], part: np.ndarray, scale: float) -> tuple[float, float] | None:
    """The middle (x, y) of the highest row of a mask, in pixels of the image; None without any."""
    if not part.any():
        return None
    row = int(part.any(axis=1).argmax())
    middle = float(np.flatnonzero(part[row]).mean())
    return (corner[1] + middle) / scale, (corner[0] + row) / scale


def _label(mark: Mark, at: Sequence[float], units: float, width: float) -> str:
    """The sign of a mistake and the text, above a point of the object or below it."""
    x, y = (value * units for value in at)
    left = at[0] < 0.5 * width
    parts = []
    if mark.kind in SIGNS:
        sign = SIGNS[mark.kind]
        parts.append(
            f'<g class="sign"><path class="under" d="{sign}"/>'
            f'<path class="{mark.kind}" d="{sign}"/></g>'
        )
    if mark.text:
        shift = 11 if parts else -6
        place = f'x="{shift}"' if left else f'x="{-shift}" text-anchor="end"'
        text = html.escape(printable(mark.text))
        parts.append(f'<text class="{mark.kind}" {place} y="5">{text}</text>')
    # The outer group moves, the inner one grows where the picture is shown small.
    x = min(max(x, 10), width * units - 10)
    place = f"translate({x:.0f} {y - 8 if y > 24 else max(y, 0) + 14:.0f})"
    return f'<g transform="{place}"><g class="label">{"".join(parts)}</g></g>'
