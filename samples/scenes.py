"""Generated scenes of circles, squares and triangles, and a photograph that looks like one.

Light, material, size and disorder of the scenes vary so much that a photograph is one more of them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import utils

CLASS_NAMES = ["BG", "circle", "square", "triangle"]

Random = np.random.Generator
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Scene(NamedTuple):
    """A picture and what is in it."""

    image: np.ndarray  # [S, S, 3] uint8
    masks: np.ndarray  # [S, S, N] bool, the visible parts
    class_ids: np.ndarray  # [N] int32, see CLASS_NAMES


@functools.lru_cache(maxsize=8)
def scene(seed: int | tuple[int, ...], size: int = 256) -> Scene:
    """Draws 1 to 30 objects of `size` x `size` pixels' space; the same seed, the same scene.

    Colours are 0..1 and grey in most scenes; lengths are pixels, from the centre of an object.
    """
    rng = np.random.default_rng(seed)
    channels = 3 if rng.random() < 0.4 else 1
    canvas = draw_background(rng, size, channels)
    angle = rng.uniform(0, 2 * np.pi)
    light = np.array([np.sin(angle), np.cos(angle)], np.float32)
    tone, variety = rng.uniform(0.35, 0.85), rng.uniform(0.02, 0.25)
    relief, shadow = rng.uniform(0, 1.2) ** 2, rng.uniform(0, 0.6)
    centers, radii = place(rng, size)
    class_ids = rng.choice([1, 2, 3], len(radii), p=rng.dirichlet([2, 2, 2])).astype(np.int32)

    top = np.full((size, size), -1, np.int8)
    for i, (center, radius, class_id) in enumerate(zip(centers, radii, class_ids, strict=True)):
        y1, x1 = np.maximum(center - 1.6 * radius - 3, 0).astype(int)
        y2, x2 = np.minimum(center + 1.6 * radius + 3, size).astype(int)
        patch = canvas[y1:y2, x1:x2]
        y, x = np.mgrid[y1:y2, x1:x2].astype(np.float32)
        distance = OUTLINES[class_id](rng, radius)(y + 0.5 - center[0], x + 0.5 - center[1])

        # The shadow falls away from the light.
        shift = tuple((-0.15 * radius * light).round().astype(int))
        cast = sigmoid(-np.roll(distance, shift, (0, 1)) / (0.08 * radius))
        patch *= 1 - shadow * cast[..., None]

        around = patch.mean()
        gap = rng.normal(tone, variety) - around
        value = around + np.copysign(max(abs(gap), rng.uniform(0.05, 0.15)), gap)
        slope = np.gradient(emboss(rng, distance, radius))
        lit = 1 + relief * (slope[0] * light[0] + slope[1] * light[1])
        surface = max(value, 0.03) * lit.clip(0.2, 1.9)
        surface *= 1 + rng.uniform(0, 0.3) * noise(rng, distance.shape, 4)
        alpha = (0.5 - distance).clip(0, 1)[..., None]
        patch += alpha * (surface[..., None] * draw_tint(rng, channels) - patch)
        top[y1:y2, x1:x2][distance < 0] = i

    image = expose(rng, canvas)
    masks = top[..., None] == np.arange(len(radii), dtype=np.int8)
    visible = masks.sum(axis=(0, 1)) >= 30
    return Scene(image, masks[..., visible], class_ids[visible])


def place(rng: Random, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [N, 2] and radii [N]: on a loose grid, as in collections, or anywhere."""
    typical = np.exp(rng.uniform(np.log(9), np.log(32)))
    variety, nearest = rng.uniform(0, 0.3), rng.choice([0.7, 1.0, 1.15])
    if rng.random() < 0.4:
        pitch = rng.uniform(2.4, 4) * typical
        line = np.arange(pitch * rng.uniform(0.2, 0.8), size, pitch)
        grid = np.stack(np.meshgrid(line, line), axis=2).reshape(-1, 2)
        spots = rng.permutation(grid) + rng.normal(0, 0.1 * pitch, grid.shape)
        count = min(30, len(spots))
    else:
        count = int(min(30, rng.uniform(0.2, 0.8) * (size / (2.6 * typical)) ** 2 + 1))
        spots = rng.uniform(0, size, (5 * count, 2))
    radii = typical * np.exp(rng.normal(0, variety, len(spots))).clip(0.6, 1.8)
    chosen: list[int] = []
    for i, spot in enumerate(spots):
        gaps = np.hypot(*(spots[chosen] - spot).T) - nearest * (radii[chosen] + radii[i])
        if len(chosen) < count and (gaps > 0).all():
            chosen.append(i)
    return spots[chosen], radii[chosen]


def circle(rng: Random, radius: float) -> Outline:
    """Distance to the edge of a disc, negative inside: dented, and one in three lost a piece."""
    order = np.arange(2, 7)
    dents = rng.normal(0, rng.uniform(0, 0.06), 5) / order
    phases, turn = rng.uniform(0, 2 * np.pi, 5), rng.uniform(0, 2 * np.pi)
    chord = rng.uniform(0.8, 1) if rng.random() < 0.3 else 2

    def distance(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        angle = np.arctan2(y, x)
        rim = 1 + sum(
            d * np.cos(k * angle + p) for k, d, p in zip(order, dents, phases, strict=True)
        )
        cut = y * np.sin(turn) + x * np.cos(turn) - radius * chord
        return np.maximum(np.hypot(y, x) - radius * rim, cut)

    return distance


def polygon(rng: Random, radius: float, sides: int, inner: float) -> Outline:
    """The same of a polygon with rounded corners; its sides are `inner` radii from the centre."""
    angles = np.arange(sides) * 2 * np.pi / sides + rng.normal(0, 0.05, sides)
    angles += rng.uniform(0, 2 * np.pi)
    offsets = inner * radius * rng.uniform(0.9, 1.1, sides)
    roundness = radius * rng.uniform(0.02, 0.08)

    def distance(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        edges = (
            (y * np.sin(a) + x * np.cos(a) - c) / roundness
            for a, c in zip(angles, offsets, strict=True)
        )
        return roundness * np.log(sum(np.exp(edge.clip(-60, 60)) for edge in edges))

    return distance


OUTLINES: dict[int, Callable[[Random, float], Outline]] = {
    1: circle,
    2: functools.partial(polygon, sides=4, inner=0.87),
    3: functools.partial(polygon, sides=3, inner=0.72),
}


def emboss(rng: Random, distance: np.ndarray, radius: float) -> np.ndarray:
    """Height of an object's surface in pixels: a rounded edge, a rim and a figure."""
    depth = -distance / radius
    height = rng.uniform(0, 3) * np.tanh(depth / rng.uniform(0.05, 0.4))
    rim, width = rng.uniform(0.08, 0.35), rng.uniform(0.03, 0.08)
    height += rng.uniform(-1, 1.5) * np.exp(-(((depth - rim) / width) ** 2))
    cells = int(rng.integers(3, 7))
    details = (1, 0.6, rng.uniform(0, 0.6))
    figure = sum(d * noise(rng, depth.shape, cells * 2**i) for i, d in enumerate(details))
    figure = np.tanh(rng.uniform(0.5, 6) * figure)
    return height + rng.uniform(0, 2) * sigmoid((depth - rim) / width) * figure


def draw_background(rng: Random, size: int, channels: int) -> np.ndarray:
    """[size, size, channels]: uneven light, and in turn textures, scratches and dust."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    plane = rng.uniform(0.03, 0.7) * (1 + rng.uniform(0, 0.8) * noise(rng, (size, size), 2))
    plane += rng.uniform(0, 0.35) * (y * np.sin(angle) + x * np.cos(angle))
    canvas = plane[..., None] * draw_tint(rng, channels)
    if rng.random() < 0.6:
        contrast = rng.uniform(0, 0.25) ** 1.5
        for cells in (8, 16, 40):
            texture = noise(rng, (size, size), cells)
            if rng.random() < 0.3:  # patches with edges
                texture = np.tanh(4 * texture)
            canvas += contrast * texture[..., None] * draw_tint(rng, channels)
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 12)):
            angle, shift_y, shift_x = rng.uniform(-0.5, 0.5, 3) * (2 * np.pi, 1, 1)
            across = (y - shift_y) * np.sin(angle) + (x - shift_x) * np.cos(angle)
            along = (y - shift_y) * np.cos(angle) - (x - shift_x) * np.sin(angle)
            scratch = abs(across) < rng.exponential(0.006)
            canvas[scratch & (abs(along) < rng.uniform(0.05, 0.6))] += rng.normal(0, 0.2)
    if rng.random() < 0.5:
        dust = rng.integers(0, size, (2, rng.integers(1, 60)))
        canvas[dust[0], dust[1]] += rng.normal(0.2, 0.3)
    return canvas.clip(0.01, 1.2)


def expose(rng: Random, canvas: np.ndarray) -> np.ndarray:
    """The photograph of a scene: vignette, frame, blur, gamma, grain and contrast."""
    size = len(canvas)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size * 2 - 1
    light = 1 + rng.uniform(0, 0.35) * noise(rng, (size, size), 2)
    canvas *= (light * (1 - rng.uniform(0, 0.3) * (y**2 + x**2)))[..., None]
    if rng.random() < 0.2:
        canvas[(abs(y) ** 12 + abs(x) ** 12) * rng.uniform(0.5, 2) > 1] = rng.uniform(0, 0.15)
    if rng.random() < 0.5:
        blur = rng.uniform(0, 0.33)
        for axis in (0, 1):
            beside = np.roll(canvas, 1, axis) + np.roll(canvas, -1, axis)
            canvas = (1 - 2 * blur) * canvas + blur * beside
    canvas = canvas.clip(0, 1.2) ** rng.uniform(0.7, 1.4)
    canvas += rng.uniform(0, 0.2) ** 2 * rng.standard_normal(canvas.shape, np.float32)
    low, high = rng.uniform(0, 0.1), rng.uniform(0.7, 1.1)
    image = ((low + (high - low) * canvas).clip(0, 1) * 255).astype(np.uint8)
    return utils.as_uint8_image(image)


def draw_tint(rng: Random, channels: int) -> np.ndarray:
    return (
        rng.uniform(0.5, 1.4, channels).astype(np.float32)
        if channels > 1
        else np.ones(1, np.float32)
    )


def noise(rng: Random, shape: tuple[int, ...], cells: int) -> np.ndarray:
    """Smooth values [H, W] float32 around 0 with about `cells` bumps along each side."""
    grid = rng.standard_normal((cells + 2, cells + 2), np.float32)
    height, width = (spread(length, cells) for length in shape)
    return height @ grid @ width.T


@functools.lru_cache(maxsize=1024)
def spread(length: int, cells: int) -> np.ndarray:
    """[length, cells + 2] float32: Gaussian weights of grid points for the pixels of a side."""
    position = (np.arange(length, dtype=np.float32) + 0.5) / length * cells + 0.5
    weights = np.exp(-2 * (position[:, None] - np.arange(cells + 2, dtype=np.float32)) ** 2)
    return weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def coins() -> Scene:
    """scikit-image's photograph of 24 coins [303, 384] and their masks, by a watershed."""
    from scipy import ndimage
    from skimage import data, filters, measure, segmentation

    grey = data.coins()
    markers = np.where(grey < 30, 1, np.where(grey > 150, 2, 0))
    coin = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(grey), markers) == 2)
    labels = measure.label(coin)
    large = [region.label for region in measure.regionprops(labels) if region.area > 400]
    masks = np.stack([labels == label for label in large], axis=2)
    return Scene(utils.as_uint8_image(grey), masks, np.ones(len(large), np.int32))
