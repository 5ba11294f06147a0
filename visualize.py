"""Pictures of images, boxes, masks, training curves and weights.

Images are RGB, [H, W, 3] uint8 or what utils.as_uint8_image makes that of. Boxes are
[N, (y1, x1, y2, x2)] in image pixels, half-open; an instance with an empty box is not drawn. Masks
are [H, W, N] bool or a list of N run-length dicts, drawn inside their boxes only.

draw_instances, paint_instances and the draw_*_stage functions return a uint8 picture and touch no
global state. The others draw on the given `ax` or on a figure of their own. Only display_* show
that figure, and only on a backend that can: headless, they draw, save to `save_path` and return all
the same.
"""

import colorsys
import functools
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import find_contours
from torch import Tensor, nn

import utils
from config import Config

Masks = np.ndarray | Sequence[dict[str, Any]] | Sequence[np.ndarray]
Colors = Sequence[Any] | np.ndarray | str | None

MOST_LABELS = 100  # more of them hide the picture
LINE_WIDTH = 1.6  # points; the dpi of a picture follows its size, so lines and letters do too
FONT_SIZE = 9.0
LABEL_PADDING = 0.22  # of the font size
LABEL_STYLE = f"round,pad={LABEL_PADDING},rounding_size=0.25"
DOTTED = (0, (1.5, 1))
FILE_BACKENDS = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}
LOSS_NAMES = (
    "loss",
    "rpn_class_loss",
    "rpn_bbox_loss",
    "mrcnn_class_loss",
    "mrcnn_bbox_loss",
    "mrcnn_mask_loss",
)


# --- Colours and pixels --------------------------------------------------------------------------


def hue_color(index: int, start: float = 0.0, bright: bool = True) -> tuple[float, float, float]:
    """The RGB colour in 0..1 of class or object number `index`; `start` is the hue of number 0."""
    # Steps of the golden ratio spread hues evenly however many there are; two saturations tell
    # apart those that come close after some steps.
    saturation = (0.85, 0.6)[index // 5 % 2]
    return colorsys.hsv_to_rgb((start + index * 0.618034) % 1, saturation, 1.0 if bright else 0.7)


def random_colors(
    N: int, bright: bool = True, seed: int | None = None
) -> list[tuple[float, float, float]]:
    """N distinct RGB colours in 0..1, neighbours far apart; the same ones for the same `seed`."""
    start = np.random.default_rng(seed).random()
    return [hue_color(i, start, bright) for i in range(N)]


def _ink(color: np.ndarray) -> str:
    """Of letters on this colour."""
    return "black" if color @ (0.299, 0.587, 0.114) > 0.55 else "white"


def _instance_colors(colors: Colors, class_ids: np.ndarray) -> np.ndarray:
    """[N, 3] RGB: the given colours, or fixed ones per class id ("class") or position (None)."""
    if colors is None:
        colors = random_colors(len(class_ids), seed=0)
    elif isinstance(colors, str):
        if colors != "class":
            raise ValueError(f'colors must be "class" or one colour per instance, got "{colors}"')
        colors = [hue_color(abs(int(class_id))) for class_id in class_ids]
    elif len(colors) != len(class_ids):
        raise ValueError(f"colors must hold one per instance, {len(class_ids)}, got {len(colors)}")
    return np.array([to_rgb(color) for color in colors]).reshape(-1, 3)


def apply_mask(
    image: np.ndarray, mask: np.ndarray, color: Sequence[float] | np.ndarray, alpha: float = 0.5
) -> np.ndarray:
    """Blends `color` (RGB in 0..1) into `image` [H, W, 3] where `mask` [H, W] is set, in place."""
    where = mask.astype(bool)
    for channel in range(3):
        values = image[..., channel]
        blend = values * np.float32(1 - alpha) + np.float32(alpha * 255 * color[channel])
        if image.dtype.kind in "iu":
            blend = np.rint(blend)
        np.copyto(values, blend, where=where, casting="unsafe")
    return image


def draw_box(image: np.ndarray, box: np.ndarray, color: Sequence[int]) -> np.ndarray:
    """Paints the two outermost pixels inside `box` in `color` (RGB in 0..255), in place."""
    y1, x1, y2, x2 = _pixel_box(np.asarray(box), image.shape)
    inside = image[y1:y2, x1:x2]
    inside[:2] = inside[-2:] = inside[:, :2] = inside[:, -2:] = color
    return image


def _pixel_box(box: np.ndarray, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The whole pixels that `box` touches, inside an image of this shape."""
    y1, x1 = np.floor(box[:2]).clip(0, shape[:2]).astype(int)
    y2, x2 = np.ceil(box[2:4]).clip(0, shape[:2]).astype(int)
    return y1, x1, y2, x2


def _boxed_mask(
    box: np.ndarray, masks: Masks, i: int, shape: Sequence[int]
) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """The whole pixels that a box touches, and what a mask has there."""
    y1, x1, y2, x2 = _pixel_box(box, shape)
    mask: Any = masks[y1:y2, x1:x2, i] if isinstance(masks, np.ndarray) else masks[i]
    if isinstance(mask, dict):
        (top, left, _, _), part = utils.rle_decode_part(mask)
        mask = np.zeros((y2 - y1, x2 - x1), dtype=bool)
        low, right = max(top, y1), max(left, x1)
        piece = part[low - top : max(y2 - top, 0), right - left : max(x2 - left, 0)]
        mask[low - y1 :, right - x1 :][: piece.shape[0], : piece.shape[1]] = piece
    return (y1, x1, y2, x2), np.ascontiguousarray(mask)


def _by_area(boxes: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Indices of the boxes that are not empty inside the image, largest first."""
    sides = boxes[:, 2:4].clip(0, shape[:2]) - boxes[:, :2].clip(0, shape[:2])
    valid = np.flatnonzero((sides > 0).all(axis=1))
    return valid[np.argsort(-sides[valid].prod(axis=1), kind="stable")]


def _check_counts(
    boxes: np.ndarray, masks: Masks | None, class_ids: np.ndarray, captions: Sequence[str] | None
) -> None:
    counts = {"boxes": len(boxes), "class_ids": len(class_ids)}
    if masks is not None:
        counts["masks"] = masks.shape[-1] if isinstance(masks, np.ndarray) else len(masks)
    if captions is not None:
        counts["captions"] = len(captions)
    if len(set(counts.values())) > 1:
        raise ValueError(f"each must hold one entry per instance, got {counts}")


def _captions(
    class_ids: np.ndarray, class_names: Sequence[str], scores: np.ndarray | None
) -> list[str]:
    """Class name and score; a negative class id is a COCO crowd. None where they would hide all."""
    if len(class_ids) > MOST_LABELS:
        return [""] * len(class_ids)
    names = [class_names[abs(i)] + (" (crowd)" if i < 0 else "") for i in class_ids]
    return names if scores is None else [f"{n} {s:.2f}" for n, s in zip(names, scores, strict=True)]


# --- Figures -------------------------------------------------------------------------------------


def _figure(figsize: tuple[float, float], show: bool = True) -> Figure:
    """pyplot's figure where a window or a notebook can show it, else one that nobody else holds."""
    if show and plt.get_backend().lower() not in FILE_BACKENDS:
        return plt.figure(figsize=figsize)
    figure = Figure(figsize=figsize)
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Any, show: bool, save_path: str | Path | None) -> None:
    if save_path is not None:
        figure.canvas.figure.savefig(save_path, bbox_inches="tight")
    if show and figure.canvas.manager is not None:
        plt.show()


def _canvas(height: int, width: int, dpi: float) -> Figure:
    # Rounded up: matplotlib 3.7 truncates the product with dpi, which must not fall below a whole.
    figure = Figure((math.nextafter(width / dpi, width), math.nextafter(height / dpi, height)), dpi)
    FigureCanvasAgg(figure)
    return figure


def _render(figure: Figure) -> np.ndarray:
    assert isinstance(figure.canvas, FigureCanvasAgg)
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    return np.asarray(renderer.buffer_rgba())[..., :3].copy()


def _picture_dpi(image: np.ndarray) -> float:
    height, width = image.shape[:2]
    return float(np.clip(math.sqrt(height * width) / 8, 80, 600))


def _picture_axes(image: np.ndarray) -> Axes:
    """Axes that fill a picture of the image's size."""
    height, width = image.shape[:2]
    return _canvas(height, width, _picture_dpi(image)).add_axes((0, 0, 1, 1))


def _render_picture(ax: Axes) -> np.ndarray:
    """_render for _picture_axes, copying the image: imshow takes its time to resample it."""
    figure, (background,) = ax.figure, ax.images
    assert isinstance(figure, Figure)
    assert isinstance(figure.canvas, FigureCanvasAgg)
    pixels = np.asarray(background.get_array())
    rgba = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    renderer = figure.canvas.get_renderer()
    renderer.draw_image(renderer.new_gc(), 0, 0, rgba[::-1])  # the bottom row comes first
    background.set_visible(False)
    figure.patch.set_visible(False)
    return _render(figure)


def _sheet(height: int, width: int, rows: int, cols: int) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, cols] of [height, width] pixels, with room for titles on top."""
    gap, head = 8, 28
    total_h, total_w = head + rows * (height + gap), gap + cols * (width + gap)
    figure = _canvas(total_h, total_w, dpi=100)
    axes = np.empty((rows, cols), dtype=object)
    for row, col in np.ndindex(rows, cols):
        x, y = gap + col * (width + gap), gap + (rows - 1 - row) * (height + gap)
        place = (x / total_w, y / total_h, width / total_w, height / total_h)
        axes[row, col] = figure.add_axes(place)
    return figure, axes


# --- What pictures are made of -------------------------------------------------------------------


def _draw_image(ax: Axes, image: np.ndarray, title: str = "", **options: Any) -> None:
    ax.imshow(image, **options)
    ax.set_axis_off()
    ax.set_title(title)


def _draw_masks(
    ax: Axes,
    image: np.ndarray,
    boxes: np.ndarray,
    masks: Masks,
    colors: np.ndarray,
    alpha: float = 0.5,
) -> None:
    """Blends masks into `image` in place, large ones first, and draws their contours on `ax`."""
    contours, contour_colors = [], []
    for i in _by_area(boxes, image.shape):
        (y1, x1, y2, x2), mask = _boxed_mask(boxes[i], masks, i, image.shape)
        apply_mask(image[y1:y2, x1:x2], mask, colors[i], alpha)
        step = 1 + max(mask.shape) // 1500  # finer than the line is wide, and quick when huge
        padded = np.pad(mask[::step, ::step], 1).astype(np.float32)
        for contour in find_contours(padded, 0.5):
            contours.append(((contour - 1) * step + (y1, x1))[:, ::-1])
            contour_colors.append(colors[i])
    lines = LineCollection(contours, colors=contour_colors, linewidths=LINE_WIDTH)
    ax.add_collection(lines, autolim=False)


def _draw_boxes(
    ax: Axes,
    boxes: np.ndarray,
    colors: np.ndarray,
    linestyles: Any = "solid",
    linewidths: float = LINE_WIDTH,
) -> None:
    y1, x1, y2, x2 = boxes.T[:4] - 0.5  # imshow puts the centre of the first pixel at 0
    corners = np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1).reshape(-1, 4, 2)
    style = {"linestyles": linestyles, "linewidths": linewidths, "joinstyle": "miter"}
    outlines = PolyCollection(list(corners), facecolors="none", edgecolors=colors, **style)
    ax.add_collection(outlines, autolim=False)


def _draw_joins(
    ax: Axes, boxes: np.ndarray, refined: np.ndarray, colors: np.ndarray, width: float = LINE_WIDTH
) -> None:
    ends = np.stack([boxes[:, 1::-1], refined[:, 1::-1]], axis=1) - 0.5
    ax.add_collection(LineCollection(list(ends), colors=colors, linewidths=width), autolim=False)


def _draw_labels(
    ax: Axes,
    boxes: np.ndarray,
    captions: Sequence[str],
    colors: np.ndarray,
    order: np.ndarray,
    below: bool = False,
) -> None:
    """Captions at the top left of their boxes, or elsewhere near by where others are in the way.

    They stay inside the image and off smaller objects. `below` prefers the bottom left.
    """
    ax.apply_aspect()
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    scale = (right - left) / ax.get_window_extent().width  # image pixels per canvas pixel
    letter = FONT_SIZE * ax.figure.dpi / 72 * scale
    padding = LABEL_PADDING * letter
    edges = boxes[order, :4] - 0.5
    taken = edges[edges[:, 2] - edges[:, 0] < 2 * letter]
    for i, (y1, x1, y2, x2) in zip(order, edges, strict=True):
        if not captions[i]:
            continue
        ink = _ink(colors[i])
        patch = {"boxstyle": LABEL_STYLE, "facecolor": colors[i], "edgecolor": "none"}
        text = ax.text(0, 0, captions[i], size=FONT_SIZE, color=ink, va="bottom", bbox=patch)
        text.set(parse_math=False, clip_on=True)
        extent = text.get_window_extent()
        h, w = extent.height * scale + 2 * padding, extent.width * scale + 2 * padding
        above = [(y1 - h, x1), (y1, x1), (y1 - h, x2 - w)]
        under = [(y2, x1), (y2 - h, x1), (y2, x2 - w)]
        steps = [(y1 + k * h, x1) for k in (-2, 1, -3, 2, -4, 3)]
        corners = np.array((under + above if below else above + under) + steps)
        corners = np.maximum(np.minimum(corners, (bottom - h, right - w)), (top, left))
        places = np.concatenate([corners, corners + np.array((h, w))], axis=1)
        inner = np.maximum(places[:, None, :2], taken[:, :2])
        outer = np.minimum(places[:, None, 2:], taken[:, 2:])
        place = places[(outer - inner).clip(0).prod(axis=2).sum(axis=1).argmin()]
        text.set_position((place[1] + padding, place[2] - padding))
        taken = np.vstack([taken, place])


# --- Instances -----------------------------------------------------------------------------------


def draw_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: Masks | None,
    class_ids: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    *,
    colors: Colors = None,
    captions: Sequence[str] | None = None,
    show_mask: bool = True,
    show_bbox: bool = True,
    alpha: float = 0.5,
) -> np.ndarray:
    """Draws instances as detect() returns them: the last of the four stages.

    Args:
        image: [H, W, 3] uint8.
        boxes: [N, (y1, x1, y2, x2)], image pixels.
        masks: [H, W, N] bool, N run-length dicts, N arrays of the boxes' sizes, or None.
        class_ids: [N] int.
        class_names: one name per class id.
        scores: [N], shown after the class name.
        colors: one matplotlib colour per instance, or "class" for a fixed colour per class id.
        captions: [N] texts instead of class name and score, which more than MOST_LABELS objects do
            not get; an empty one draws no label.
        show_mask: whether to draw masks and their contours.
        show_bbox: whether to draw boxes.
        alpha: opacity of the masks.

    Returns:
        [H, W, 3] uint8, the image's own size.

    Raises:
        ValueError: the image is none, or the numbers of instances differ.
    """
    ax = _picture_axes(image)
    display_instances(
        image,
        boxes,
        masks,
        class_ids,
        class_names,
        scores,
        ax=ax,
        show_mask=show_mask,
        show_bbox=show_bbox,
        colors=colors,
        captions=captions,
        alpha=alpha,
    )
    return _render_picture(ax)


def paint_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: Masks | None,
    class_ids: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    *,
    colors: Colors = None,
    captions: Sequence[str] | None = None,
    alpha: float = 0.5,
) -> np.ndarray:
    """draw_instances for the frames of a video: several times as fast, and labels stay in place.

    Lines are whole pixels, and a label is always above its box, or inside where there is no room.
    Arguments and result are those of draw_instances.
    """
    _check_counts(boxes, masks, class_ids, captions)
    image = utils.as_uint8_image(image).copy()
    rgb = _instance_colors(colors, class_ids)
    order = _by_area(boxes, image.shape)
    solid, dpi = np.rint(255 * rgb).astype(np.uint8), _picture_dpi(image)
    line = max(1, round(LINE_WIDTH * dpi / 72))
    for i in order:
        if masks is None:
            break
        (y1, x1, y2, x2), mask = _boxed_mask(boxes[i], masks, i, image.shape)
        inside = image[y1:y2, x1:x2]
        apply_mask(inside, mask, rgb[i], alpha)
        inside[_edge(mask, line)] = solid[i]
    for i in order:
        y1, x1, y2, x2 = _pixel_box(boxes[i], image.shape)
        inside = image[y1:y2, x1:x2]
        inside[:line] = inside[-line:] = inside[:, :line] = inside[:, -line:] = solid[i]
    captions = _captions(class_ids, class_names, scores) if captions is None else captions
    for i in order:
        if captions[i]:
            y1, x1, _, _ = _pixel_box(boxes[i], image.shape)
            label = _label(captions[i], rgb[i], FONT_SIZE * dpi / 72)[: image.shape[0]]
            height, width = label.shape[:2]
            y1, x1 = y1 - height if y1 >= height else y1, max(0, min(x1, image.shape[1] - width))
            place = image[y1 : y1 + height, x1 : x1 + width]
            place[:] = label[: place.shape[0], : place.shape[1]]
    return image


def _label(caption: str, color: np.ndarray, size: float) -> np.ndarray:
    """[h, w, 3] uint8: letters `size` pixels high on a patch of this colour."""
    font = _font(max(8, round(size)))
    padding = round(LABEL_PADDING * size)
    width = math.ceil(font.getlength(caption)) + 2 * padding
    red, green, blue = np.rint(255 * color).astype(int).tolist()
    patch = Image.new("RGB", (width, sum(font.getmetrics()) + padding), (red, green, blue))
    ImageDraw.Draw(patch).text((padding, padding // 2), caption, fill=_ink(color), font=font)
    return np.asarray(patch)


@functools.lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib."""
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _edge(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask [H, W] from which a step of `width` pixels leads out of it."""
    padded = np.pad(mask.astype(bool, copy=False), width)
    inner, outer = slice(width, -width), (slice(None, -2 * width), slice(2 * width, None))
    beside = [padded[side, inner] for side in outer] + [padded[inner, side] for side in outer]
    return padded[inner, inner] & ~np.logical_and.reduce(beside)


def display_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: Masks | None,
    class_ids: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    title: str = "",
    figsize: tuple[float, float] = (16, 16),
    ax: Axes | None = None,
    show_mask: bool = True,
    show_bbox: bool = True,
    colors: Colors = None,
    captions: Sequence[str] | None = None,
    *,
    alpha: float = 0.5,
    show: bool = True,
    save_path: str | Path | None = None,
) -> Axes:
    """Draws instances on `ax`, or shows them on a figure of `figsize`; see draw_instances."""
    _check_counts(boxes, masks, class_ids, captions)
    show = show and ax is None
    ax = ax or _figure(figsize, show).add_subplot()
    image = utils.as_uint8_image(image).copy()
    rgb = _instance_colors(colors, class_ids)
    order = _by_area(boxes, image.shape)
    if masks is not None and show_mask:
        _draw_masks(ax, image, boxes, masks, rgb, alpha)
    _draw_image(ax, image, title)
    if show_bbox:
        _draw_boxes(ax, boxes[order], rgb[order])
    if captions is None:
        captions = _captions(class_ids, class_names, scores)
    _draw_labels(ax, boxes, captions, rgb, order)
    _finish(ax.figure, show, save_path)
    return ax


def display_differences(
    image: np.ndarray,
    gt_box: np.ndarray,
    gt_class_id: np.ndarray,
    gt_mask: np.ndarray,
    pred_box: np.ndarray,
    pred_class_id: np.ndarray,
    pred_score: np.ndarray,
    pred_mask: np.ndarray,
    class_names: Sequence[str],
    title: str = "",
    ax: Axes | None = None,
    show_mask: bool = True,
    show_box: bool = True,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.5,
    **options: Any,
) -> Axes:
    """Draws ground truth in green and predictions in red, captioned score / IoU.

    The IoU is that with the matched object, or the best one where nothing matched. Masks are
    [H, W, N] bool. Predictions below `score_threshold` are left out. `options` go to
    display_instances: show, save_path, figsize, alpha.
    """
    # The order in which compute_matches counts: best score first, without padding.
    gt = np.flatnonzero(gt_box.any(axis=1))
    pred = np.flatnonzero(pred_box.any(axis=1) & (pred_score >= score_threshold))
    pred = pred[np.argsort(-pred_score[pred], kind="stable")]
    truth = gt_box[gt], gt_class_id[gt], gt_mask[..., gt]
    found = pred_box[pred], pred_class_id[pred], pred_score[pred], pred_mask[..., pred]
    _, pred_match, overlaps = utils.compute_matches(*truth, *found, iou_threshold)
    captions = [""] * len(gt)
    for score, match, ious in zip(pred_score[pred], pred_match, overlaps, strict=True):
        iou = ious[int(match)] if match > -1 else ious.max(initial=0)
        captions.append(f"{score:.2f} / {iou:.2f}")
    return display_instances(
        image,
        np.concatenate([truth[0], found[0]]),
        np.concatenate([truth[2], found[3]], axis=-1),
        np.concatenate([truth[1], found[1]]),
        class_names,
        title=title or "Ground truth (green) and detections (red), captions: score / IoU",
        ax=ax,
        show_mask=show_mask,
        show_bbox=show_box,
        colors=[(0, 0.8, 0)] * len(gt) + [(1, 0, 0)] * len(pred),
        captions=captions,
        **options,
    )


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray | None = None,
    refined_boxes: np.ndarray | None = None,
    masks: Masks | None = None,
    captions: Sequence[str] | None = None,
    visibilities: Sequence[int] | np.ndarray | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draws boxes dotted and what they were refined to solid, joined at the top left corner.

    `visibilities` are 0 (grey, without refinement), 1 (dotted, the default) or 2 (solid).
    """
    if boxes is None and refined_boxes is None:
        raise ValueError("draw_boxes needs boxes, refined_boxes or both, got neither")
    before = np.asarray(refined_boxes if boxes is None else boxes)[:, :4]
    after = np.asarray(boxes if refined_boxes is None else refined_boxes)[:, :4]
    visible = np.ones(len(before)) if visibilities is None else np.asarray(visibilities)
    rgb = _instance_colors(None, visible)
    rgb[visible == 0] = 0.5
    ax = ax or _figure((12, 12)).add_subplot()
    image = utils.as_uint8_image(image).copy()
    order = _by_area(before, image.shape)
    joined = boxes is not None and refined_boxes is not None
    if masks is not None:
        around = [np.minimum(before, after)[:, :2], np.maximum(before, after)[:, 2:]]
        _draw_masks(ax, image, np.hstack(around), masks, rgb)
    _draw_image(ax, image, title)
    if boxes is not None:
        styles = ["solid" if visible[i] == 2 else DOTTED for i in order]
        _draw_boxes(ax, before[order], rgb[order], styles)
    if refined_boxes is not None:
        shown = order[visible[order] > 0]
        _draw_boxes(ax, after[shown], rgb[shown])
        if joined:
            _draw_joins(ax, before[shown], after[shown], rgb[shown])
    if captions is not None:
        _draw_labels(ax, after, captions, rgb, order, below=joined)  # the joins stay in sight
    return ax


def draw_rois(
    image: np.ndarray,
    rois: np.ndarray,
    refined_rois: np.ndarray,
    mask: np.ndarray,
    class_ids: np.ndarray,
    class_names: Sequence[str],
    limit: int = 10,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draws up to `limit` RoIs picked at random: positive ones with class and mask, others grey.

    `mask` [R, h, w] float are relative to `rois` [R, 4]; class id 0 is a negative RoI.
    """
    picked = np.random.default_rng(0).permutation(len(rois))[:limit]
    pasted = np.zeros((*image.shape[:2], len(picked)), dtype=bool)
    for n, i in enumerate(picked):
        if class_ids[i] > 0:
            box = _pixel_box(rois[i], image.shape)
            pasted[..., n] = utils.unmold_mask(mask[i], box, image.shape)
    return draw_boxes(
        image,
        rois[picked],
        refined_rois[picked],
        pasted,
        captions=[class_names[i] if i > 0 else "" for i in class_ids[picked]],
        visibilities=class_ids[picked] > 0,
        title=f"{len(picked)} of {len(rois)} RoIs, {(class_ids > 0).sum()} of them positive",
        ax=ax,
    )


def display_images(
    images: Sequence[np.ndarray],
    titles: Sequence[str] | None = None,
    cols: int = 4,
    cmap: Any = None,
    norm: Any = None,
    interpolation: str | None = None,
    *,
    show: bool = True,
    save_path: str | Path | None = None,
) -> Figure:
    """Shows images ([H, W] or [H, W, 3]) in `cols` columns."""
    titles = titles if titles is not None else [""] * len(images)
    rows = max(1, math.ceil(len(images) / cols))
    figure = _figure((14, 14 * rows / cols), show)
    figure.set_layout_engine("compressed")
    for n, (image, title) in enumerate(zip(images, titles, strict=True)):
        ax = figure.add_subplot(rows, cols, n + 1)
        _draw_image(ax, image, title, cmap=cmap, norm=norm, interpolation=interpolation)
    _finish(figure, show, save_path)
    return figure


def display_top_masks(
    image: np.ndarray,
    mask: np.ndarray,
    class_ids: np.ndarray,
    class_names: Sequence[str],
    limit: int = 4,
    **options: Any,
) -> Figure:
    """Shows the image and the masks [H, W, N] of the `limit` classes that cover most of it.

    `options` go to display_images: show, save_path.
    """
    pixels = mask.sum(axis=(0, 1))
    areas = {i: pixels[class_ids == i].sum() for i in np.unique(class_ids)}
    top = sorted((i for i in areas if areas[i]), key=lambda i: -areas[i])[:limit]
    images, titles = [image], [f"H x W = {image.shape[0]} x {image.shape[1]}"]
    for class_id in top:
        instances = mask[..., class_ids == class_id]
        # Numbered, so that the instances of a class differ in shade.
        images.append((instances * np.arange(1, instances.shape[-1] + 1)).max(axis=-1))
        titles.append(class_names[class_id])
    return display_images(images, titles, len(images), "Blues_r", **options)


# --- What training sees --------------------------------------------------------------------------


def draw_annotations(dataset: utils.Dataset, image_id: int, **options: Any) -> np.ndarray:
    """Draws an image of a data set with its objects, crowds included; options as draw_instances."""
    masks, class_ids = dataset.load_mask(image_id)
    boxes = utils.extract_bboxes(masks)
    image = dataset.load_image(image_id)
    return draw_instances(image, boxes, masks, class_ids, dataset.class_names, **options)


def draw_target(image: Tensor, target: Mapping[str, Any], class_names: Sequence[str]) -> np.ndarray:
    """Draws an item of dataset.TorchDataset: what the network is shown, and what it should say.

    Args:
        image: [3, H, W], network input.
        target: its boxes, class_ids and masks, mini masks or [N, H, W], as TorchDataset gives them.
        class_names: one name per class id.

    Returns:
        [H, W, 3] uint8. Mini masks are drawn at the size of their boxes, with what they lost.
    """
    pixels = image.permute(1, 2, 0).numpy().round().clip(0, 255).astype(np.uint8)
    boxes, masks = target["boxes"].numpy().round().astype(int), target["masks"].numpy()
    masks = masks.transpose(1, 2, 0)
    if masks.shape[:2] != pixels.shape[:2]:
        masks = utils.expand_mask(boxes, masks, pixels.shape)
    return draw_instances(pixels, boxes, masks, target["class_ids"].numpy(), class_names)


def draw_anchor_levels(image: np.ndarray, config: Config) -> np.ndarray:
    """Draws the anchors of each pyramid level: where they stand, and in the middle how large.

    Args:
        image: [H, W, 3] uint8, a network input: sides as the config's resizing leaves them.

    Returns:
        A titled panel for each of P2 to P6 side by side, uint8.
    """
    shapes, strides = config.backbone_shapes(image.shape), config.anchor_strides(image.shape)
    scale = np.clip(max(image.shape), 192, 320) / max(image.shape)
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    figure, axes = _sheet(height, width, 1, 5)
    for n, (ax, size) in enumerate(zip(axes[0], config.RPN_ANCHOR_SCALES, strict=True)):
        anchors = utils.generate_anchors(
            size,
            config.RPN_ANCHOR_RATIOS,
            shapes[n],
            strides[n],
            config.RPN_ANCHOR_STRIDE,
            config.RPN_ANCHOR_ROUNDING,
        )
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        middle = np.abs(centers - np.divide(image.shape[:2], 2)).sum(axis=1)
        nearest = anchors[middle < middle.min() + 0.5]
        _draw_image(ax, _dimmed(image), f"P{n + 2}: {len(anchors)} of {size:g} pixels")
        ax.plot(*(centers[:, ::-1].T - 0.5), ",", color="white")
        _draw_boxes(ax, nearest, np.array([hue_color(n)] * len(nearest)), linewidths=1.2)
        ax.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    return _render(figure)


# --- The four stages of the pipeline; the fourth is draw_instances -------------------------------


def _dimmed(image: np.ndarray) -> np.ndarray:
    """The image at two thirds of its brightness, to let thin lines stand out."""
    image = utils.as_uint8_image(image)
    return image - image // 3


def draw_anchor_stage(
    image: np.ndarray,
    anchors: np.ndarray,
    refined_anchors: np.ndarray,
    kept: np.ndarray,
    limit: int = 100,
) -> np.ndarray:
    """Stage 1, RPN: the best anchors (dotted), refined and clipped (solid), and NMS's choice.

    Args:
        image: [H, W, 3] uint8.
        anchors: [A, 4] boxes, image pixels, best score first; the best are drawn brightest.
        refined_anchors: [A, 4] boxes, image pixels, of the same anchors.
        kept: [P, 4] boxes, image pixels: the proposals, best score first.
        limit: how many boxes each panel shows at most.

    Returns:
        Three titled panels side by side, uint8.
    """
    before, after, kept = (boxes[:limit][::-1] for boxes in (anchors, refined_anchors, kept))
    by_rank = plt.get_cmap("plasma")(np.linspace(1, 0.3, limit))[:, :3]
    rgb, kept_rgb = by_rank[: len(before)][::-1], by_rank[: len(kept)][::-1]
    scale = np.clip(max(image.shape), 320, 720) / max(image.shape)
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    figure, ((left, middle, right),) = _sheet(height, width, 1, 3)
    _draw_image(left, _dimmed(image), f"Top {len(before)} anchors")
    _draw_boxes(left, before, rgb, DOTTED, 1)
    _draw_image(middle, _dimmed(image), "Refined and clipped")
    _draw_boxes(middle, before, rgb, DOTTED, 0.5)
    _draw_boxes(middle, after, rgb, linewidths=1)
    _draw_joins(middle, before, after, rgb, 1)
    _draw_image(right, _dimmed(image), f"Top {len(kept)} after NMS")
    _draw_boxes(right, kept, kept_rgb, linewidths=1)
    return _render(figure)


def draw_refinement_stage(
    image: np.ndarray,
    proposals: np.ndarray,
    boxes: np.ndarray,
    class_ids: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """Stage 2, box head: proposals [N, 4] (dotted) and the detections [N, 4] they became (solid).

    Arguments: see draw_instances.

    Returns:
        [H, W, 3] uint8.
    """
    ax = _picture_axes(image)
    captions = _captions(class_ids, class_names, scores)
    draw_boxes(_dimmed(image), proposals, boxes, captions=captions, ax=ax)
    return _render_picture(ax)


def draw_mask_stage(
    image: np.ndarray,
    mask_probs: np.ndarray,
    boxes: np.ndarray,
    class_ids: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    limit: int = 8,
) -> np.ndarray:
    """Stage 3, mask head: each object, its mask as predicted, and that resized and thresholded.

    Args:
        mask_probs: [N, h, w] float in 0..1, for each instance's class.
        limit: how many instances are shown at most.
        Others: see draw_instances.

    Returns:
        One column per instance, uint8; the image itself if there is none.
    """
    image = utils.as_uint8_image(image)
    shown = np.sort(_by_area(boxes, image.shape))[:limit]
    if not len(shown):
        return image.copy()
    captions, rgb = _captions(class_ids, class_names, scores), _instance_colors(None, class_ids)
    side = int(np.clip(image.shape[1] // len(shown), 112, 224))
    figure, axes = _sheet(side, side, 3, len(shown))
    for (top, middle, bottom), i in zip(axes.T, shown, strict=True):
        center, reach = (boxes[i, :2] + boxes[i, 2:4]) / 2, np.ptp(boxes[i].reshape(2, 2), 0).max()
        window = np.concatenate([center - 0.55 * reach, center + 0.55 * reach])
        y1, x1, y2, x2 = _pixel_box(window, image.shape)
        crop = image[y1:y2, x1:x2].copy()
        box = np.subtract(_pixel_box(boxes[i], image.shape), (y1, x1, y1, x1))
        mask = utils.unmold_mask(mask_probs[i], box.tolist(), crop.shape)
        _draw_image(top, crop, captions[i])
        top.title.set_fontsize(FONT_SIZE)
        _draw_image(middle, mask_probs[i], cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        _draw_masks(bottom, crop, box[None], mask[..., None], rgb[[i]])
        _draw_image(bottom, crop)
        _draw_boxes(bottom, box[None], rgb[[i]])
    return _render(figure)


# --- Plots ---------------------------------------------------------------------------------------


def plot_precision_recall(
    AP: float, precisions: np.ndarray, recalls: np.ndarray, *, ax: Axes | None = None
) -> Axes:
    """Plots the precision-recall curve that utils.compute_ap returns at IoU 0.5."""
    ax = ax or _figure((6.4, 4.8)).add_subplot()
    ax.plot(recalls, precisions)
    ax.set(xlim=(0, 1.1), ylim=(0, 1.1), xlabel="recall", ylabel="precision")
    ax.set_title(f"Precision-recall curve, AP@50 = {AP:.3f}")
    return ax


def plot_overlaps(
    gt_class_ids: np.ndarray,
    pred_class_ids: np.ndarray,
    pred_scores: np.ndarray,
    overlaps: np.ndarray,
    class_names: Sequence[str],
    threshold: float = 0.5,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plots the IoU `overlaps` [P, G] of predictions (rows) and objects (columns).

    Pairs above `threshold` are called match, or wrong where their classes differ. Class ids of 0
    are padding at the end.
    """
    gt_class_ids, pred_class_ids = (
        gt_class_ids[gt_class_ids != 0],
        pred_class_ids[pred_class_ids != 0],
    )
    ax = ax or _figure((12, 10)).add_subplot()
    overlaps = overlaps[: len(pred_class_ids), : len(gt_class_ids)]
    if overlaps.size:
        ax.imshow(overlaps, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    rows = _captions(pred_class_ids, class_names, pred_scores[: len(pred_class_ids)])
    ax.set_yticks(range(len(rows)), rows)
    cols = _captions(gt_class_ids, class_names, None)
    ax.set_xticks(range(len(cols)), cols, rotation=90)
    for (row, col), iou in np.ndenumerate(overlaps):
        verdict = "match" if gt_class_ids[col] == pred_class_ids[row] else "wrong"
        text = f"{iou:.3f}\n{verdict if iou > threshold else ''}"
        color = "white" if iou > 0.5 else "black" if iou > 0 else "grey"
        ax.text(col, row, text, ha="center", va="center", fontsize=FONT_SIZE, color=color)
    ax.set(xlabel="ground truth", ylabel="predictions")
    return ax


def plot_loss(
    loss: Any,
    val_loss: Any,
    save: bool = True,
    log_dir: str | Path | None = None,
    names: Sequence[str] = LOSS_NAMES,
) -> Figure:
    """Plots training and validation losses per epoch, [E] or [E, K], and saves log_dir/loss.png."""
    if save and log_dir is None:
        raise ValueError("plot_loss needs log_dir to save loss.png, got None; or pass save=False")
    count = 1 if np.ndim(loss) < 2 else np.shape(loss)[1]
    cols, rows = min(3, count), math.ceil(count / 3)
    figure = _figure((4.5 * cols, 3.4 * rows), show=not save)
    figure.set_layout_engine("constrained")
    for n in range(count):
        ax = figure.add_subplot(rows, cols, n + 1)
        for curve, label in ((loss, "train"), (val_loss, "valid")):
            values = np.reshape(curve, (len(curve), count))[:, n]
            ax.plot(range(1, len(curve) + 1), values, marker=".", label=label)
        ax.set(xlabel="epoch", title=names[n])
        ax.legend()
    if log_dir is not None and save:
        figure.savefig(Path(log_dir) / "loss.png")
    return figure


def plot_history(records: Sequence[Mapping[str, float]]) -> Figure:
    """Plots a run by epoch, from the records of history.read_history: its losses and its AP."""
    panels = {"loss": ("loss", "val_loss"), "AP": ("segm_AP50", "segm_AP", "bbox_AP50", "bbox_AP")}
    known = {name for record in records for name in record}
    panels = {title: names for title, names in panels.items() if known.intersection(names)}
    figure = _figure((5 * max(1, len(panels)), 3.4))
    figure.set_layout_engine("constrained")
    for n, (title, names) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(1, len(panels), n)
        for name in filter(known.__contains__, names):
            points = [(record["epoch"], record[name]) for record in records if name in record]
            ax.plot(*zip(*points, strict=True), marker=".", label=name)
        ax.set(xlabel="epoch", title=title)
        ax.set_ylim(bottom=0, top=1 if title == "AP" else None)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend()
    return figure


def plot_weights(model: nn.Module, pattern: str = r".*\.weight", limit: int = 12) -> Figure:
    """Plots histograms of the weights whose names match a regular expression, the first `limit`.

    Numbers that are not finite are left out; see display_weight_stats.

    Raises:
        ValueError: no name matches.
    """
    found = {name: t for name, t in model.state_dict().items() if re.fullmatch(pattern, name)}
    if not found:
        names = ", ".join(list(model.state_dict())[:3])
        raise ValueError(f"pattern must match names such as {names}, got {pattern!r}")
    chosen = list(found.items())[:limit]
    rows = math.ceil(len(chosen) / 4)
    figure = _figure((14, 2.6 * rows))
    figure.set_layout_engine("constrained")
    for n, (name, tensor) in enumerate(chosen, start=1):
        ax = figure.add_subplot(rows, min(4, len(chosen)), n)
        values = tensor.detach().float().cpu().numpy().ravel()
        ax.hist(values[np.isfinite(values)], bins=60)
        ax.set_title(f"{name}\n{' x '.join(map(str, tensor.shape))}", size=FONT_SIZE)
        ax.set_yticks([])
        ax.locator_params(axis="x", nbins=4)
    return figure


def display_activations(
    activations: Mapping[str, Tensor | np.ndarray], channels: int = 6, **options: Any
) -> Figure:
    """Shows feature maps, a row for each: the `channels` that vary most, each in its own range.

    Args:
        activations: maps [C, h, w] by name.
        options: go to display_images: show, save_path.
    """
    images, titles = [], []
    for name, activation in activations.items():
        maps = np.asarray(torch.as_tensor(activation).detach().cpu().float())
        order = np.argsort(-maps.std(axis=(1, 2)), kind="stable")[:channels]
        images += [maps[i] for i in order]
        titles += [f"{name}, channel {i}" for i in order]
        for _ in range(channels - len(order)):  # rows stay rows
            images.append(np.ones((*maps.shape[1:], 3)))
            titles.append("")
    return display_images(images, titles, channels, "viridis", interpolation="bilinear", **options)


# --- Tables --------------------------------------------------------------------------------------


def display_table(table: Sequence[Sequence[Any]]) -> None:
    """Shows rows of cells as HTML in a notebook, and prints them aligned elsewhere."""
    cells = [[str(cell) for cell in row] for row in table]
    if utils.in_notebook():
        from IPython.display import HTML, display

        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in cells)
        display(HTML("<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"))
        return
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def display_weight_stats(model: nn.Module) -> list[list[str]]:
    """Shows, and returns as rows, the shape, range and spread of each weight and what is odd in it.

    "dead?" is a tensor of zeros other than a bias or a running mean, "overflow?" one with values
    beyond 1000 other than a running variance, "not finite" one with inf or nan.
    """
    table = [["weight", "shape", "min", "max", "std", "alert"]]
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high, std = (x.item() for x in (tensor.min(), tensor.max(), tensor.std(correction=0)))
        alert = ""
        if not math.isfinite(high - low):
            alert = "not finite"
        elif max(-low, high) > 1000 and not name.endswith("running_var"):
            alert = "overflow?"
        elif low == high == 0 and not name.endswith(("bias", "running_mean")):
            alert = "dead?"
        numbers = [f"{number:+9.4f}" for number in (low, high, std)]
        table.append([name, str(tuple(tensor.shape)), *numbers, alert])
    display_table(table)
    return table
