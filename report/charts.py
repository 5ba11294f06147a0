"""Charts as SVG within a page, whose style.css colours them. Their texts are numbers and constants.

Lines differ by dashes and bars by hatching, so that colour is never alone in telling them apart.
"""

import html
import itertools
import math
from collections.abc import Sequence

import numpy as np

# The size of a chart, and where its axes are.
WIDTH, HEIGHT = 360, 230
LEFT, TOP, RIGHT, BOTTOM = 40, 10, 350, 200
_DASHES = ("", "6 3", "1.5 3")

Series = tuple[str, Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]


def lines(
    series: Sequence[Series], marker: float | None = None, axes: tuple[str, str] = ("", "")
) -> str:
    """Up to three curves in the unit square, with a legend of their names.

    Args:
        series: name, x and y of each, in 0..1.
        marker: an x to mark.
        axes: what x and y are.
    """
    parts = [_grid_y([(v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)])]
    parts.append(_ticks_x([(v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)]))
    if marker is not None:
        parts.append(_marker(marker))
    legend = []
    for number, (name, x, y) in enumerate(series):
        dash = f' stroke-dasharray="{_DASHES[number]}"' if _DASHES[number] else ""
        points = _path(_x(np.asarray(x, float)), _y(np.asarray(y, float)))
        parts.append(f'<path class="line l{number}" d="{points}"{dash}/>')
        swatch = f'<svg class="swatch" viewBox="0 0 26 8"><path class="line l{number}" d="M0 4H26"'
        legend.append(f"<li>{swatch}{dash}/></svg>{html.escape(name)}</li>")
    return _svg(parts, axes) + f'<ul class="legend">{"".join(legend)}</ul>'


def sparkline(y: np.ndarray) -> str:
    """A small curve in 0..1 without axes."""
    values = np.asarray(y, float)[::4]
    points = _path(1 + 58 * np.linspace(0, 1, len(values)), 17 - 16 * values)
    return f'<svg class="spark" viewBox="0 0 60 18" aria-hidden="true"><path d="{points}"/></svg>'


def mirrored(
    above: np.ndarray, below: np.ndarray, marker: float, axes: tuple[str, str] = ("", "")
) -> str:
    """Two histograms of 0..1, one upwards and one downwards, on a logarithmic scale."""
    top = max(10, *(int(c.max(initial=0)) for c in (above, below)))
    decades = math.ceil(math.log10(top + 1))
    middle = (TOP + BOTTOM) / 2
    half = middle - TOP

    def height(count: float) -> float:
        return half * math.log10(count + 1) / math.log10(10**decades + 1)

    parts = []
    for exponent in range(decades + 1):
        for sign in (-1, 1):
            y = middle + sign * height(10**exponent)
            if exponent % (1 + decades // 4) == 0:
                parts.append(_rule(y, _short(10**exponent)))
    parts.append(f'<path class="axis" d="M{LEFT} {middle:g}H{RIGHT}"/>')
    parts.append(_ticks_x([(v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)]))
    parts.append(_marker(marker))
    step = (RIGHT - LEFT) / len(above)
    for kind, counts, sign in (("true", above, -1), ("false", below, 1)):
        for n, count in enumerate(counts.tolist()):
            if count:
                tall = height(count)
                y = middle - tall if sign < 0 else middle
                title = f"{n / len(above):.2f} to {(n + 1) / len(above):.2f}: {count} {kind}"
                parts.append(_bar(LEFT + n * step + 0.5, y, step - 1, tall, kind, title))
    legend = "".join(
        f'<li><svg class="swatch" viewBox="0 0 26 8"><rect class="bar {kind}" width="26"'
        f' height="8"/></svg>{text}</li>'
        for kind, text in (("true", "true, upwards"), ("false", "false, downwards"))
    )
    return _svg(parts, axes) + f'<ul class="legend">{legend}</ul>'


def histogram(
    values: np.ndarray, edges: np.ndarray, below: float, axes: tuple[str, str] = ("", "")
) -> str:
    """How many values lie between edges that rise evenly; those below a limit are hatched."""
    counts = np.histogram(values, edges)[0]
    span = edges[-1] - edges[0]
    ticks = [(float(v - edges[0]) / span, f"{v:g}") for v in np.linspace(edges[0], edges[-1], 5)]
    kinds = ["false" if right <= below + 1e-9 else "true" for right in edges[1:]]
    titles = [f"{a:.2g} to {b:.2g}" for a, b in itertools.pairwise(edges.tolist())]
    return _bars(counts, kinds, titles, ticks, [], axes)


def log_histogram(
    values: np.ndarray, markers: Sequence[float], axes: tuple[str, str] = ("", "")
) -> str:
    """How many values lie in each of steps by the factor 2 ** 0.5, with markers to compare with."""
    positive = values[values > 0]
    known = np.concatenate([positive, markers])
    low = math.floor(math.log2(known.min())) if len(known) else 0
    high = max(low + 1, math.ceil(math.log2(known.max()) + 1e-9) if len(known) else 1)
    counts = np.histogram(np.log2(positive), 2 * (high - low), (low, high))[0]
    edges = 2 ** np.linspace(low, high, len(counts) + 1)
    ticks = [((e - low) / (high - low), f"{2.0**e:g}") for e in range(low, high + 1)]
    titles = [f"{a:.3g} to {b:.3g}" for a, b in itertools.pairwise(edges.tolist())]
    at = [(math.log2(m) - low) / (high - low) for m in markers]
    return _bars(counts, ["true"] * len(counts), titles, ticks, at, axes)


def counts(values: Sequence[int], axes: tuple[str, str] = ("", "")) -> str:
    """How often each whole number from 0 occurs, in steps of more than one where they are many."""
    most = max([*values, 1])
    step = max(1, math.ceil((most + 1) / 24))
    bins = np.bincount(np.asarray(values, dtype=np.int64) // step, minlength=most // step + 1)
    width = 1 / len(bins)
    titles = [
        f"{n * step}" if step == 1 else f"{n * step} to {(n + 1) * step - 1}"
        for n in range(len(bins))
    ]
    every = max(1, len(bins) // 6)
    ticks = [((n + 0.5) * width, f"{n * step}") for n in range(0, len(bins), every)]
    return _bars(bins, ["true"] * len(bins), titles, ticks, [], axes)


def _bars(
    counts: np.ndarray,
    kinds: Sequence[str],
    titles: Sequence[str],
    ticks: Sequence[tuple[float, str]],
    markers: Sequence[float],
    axes: tuple[str, str],
) -> str:
    top = max(1, int(counts.max(initial=0)))
    # Of 1, 2 and 5 times a power of ten the least unit that needs five lines at most.
    power = 10 ** math.floor(math.log10(top))
    unit = next(u for u in (power / 5, power / 2, power, 2 * power) if top <= 5 * u and u >= 1)
    levels = np.arange(0, top + unit, unit)
    parts = [_grid_y([(v / levels[-1], _short(v)) for v in levels.tolist()]), _ticks_x(ticks)]
    parts += [_marker(m) for m in markers]
    step = (RIGHT - LEFT) / len(counts)
    for n, count in enumerate(counts.tolist()):
        if count:
            tall = (BOTTOM - TOP) * count / levels[-1]
            title = f"{titles[n]}: {count}"
            parts.append(
                _bar(LEFT + n * step + 0.5, BOTTOM - tall, step - 1, tall, kinds[n], title)
            )
    return _svg(parts, axes)


# --- Pieces --------------------------------------------------------------------------------------


def _x(values: np.ndarray) -> np.ndarray:
    return LEFT + (RIGHT - LEFT) * values


def _y(values: np.ndarray) -> np.ndarray:
    return BOTTOM - (BOTTOM - TOP) * values


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _rule(y: float, text: str) -> str:
    label = f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
    return f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>{label}'


def _grid_y(levels: Sequence[tuple[float, str]]) -> str:
    return "".join(_rule(BOTTOM - (BOTTOM - TOP) * at, text) for at, text in levels)


def _ticks_x(ticks: Sequence[tuple[float, str]]) -> str:
    return "".join(
        f'<text x="{LEFT + (RIGHT - LEFT) * at:.1f}" y="{BOTTOM + 14}" text-anchor="middle">'
        f"{text}</text>"
        for at, text in ticks
    )


def _marker(at: float) -> str:
    return f'<path class="marker" d="M{LEFT + (RIGHT - LEFT) * at:.1f} {TOP}V{BOTTOM}"/>'


def _bar(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.5, width):.1f}" height="{height:.1f}"'
    return f'<rect class="bar {kind}" {box}><title>{title}</title></rect>'


def _short(value: float) -> str:
    for unit, sign in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{sign}"
    return f"{value:g}"


def _svg(parts: Sequence[str], axes: tuple[str, str]) -> str:
    x, y = axes
    texts = [f'<text class="axis-name" x="{RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{x}</text>']
    label = html.escape(f"{y} by {x}" if x and y else x or y)
    if y:
        texts.append(f'<text class="axis-name" x="0" y="{HEIGHT - 2}">{y}</text>')
    body = "".join([*parts, *texts])
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg class="chart" {size} role="img" aria-label="{label}">{body}</svg>'
