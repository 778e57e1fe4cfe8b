"""A plot as SVG text: each method's quality with its interval against what it costs, in parameters and in memory.

value │   ┃          ┃
      │ ┃ ●    ┃     ●      filled: not distinguishable from the best
      │ ●      ○            hollow: worse
      └──────────────────   a panel for trained parameters (logarithmic), one for peak memory;
                            the base is a line, or a word below
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 340, 70, 30, 60
_LINE = 13  # pixels between two names
INK, _SAME, _WORSE = "#444444", "#1f6f8b", "#b0532f"


@dataclass(frozen=True)
class Point:
    """One method.

    Attributes:
        name: Its name.
        value: Its metric, with the ends of the interval behind it.
        parameters: Trained ones; 0 of the base.
        memory_mebibytes: Peak while training; 0 of the base.
        is_same: Whether it cannot be told from the best.
    """

    name: str
    value: float
    low: float
    high: float
    parameters: float
    memory_mebibytes: float
    is_same: bool


def draw_quality(metric: str, points: Sequence[Point]) -> str:
    """The two panels side by side."""
    trained = [point for point in points if point.parameters]
    low, high = min(point.low for point in trained), max(point.high for point in trained)
    room = (high - low or abs(high) or 1.0) * 0.08
    low, high = low - room, high + room
    parts = [
        _panel(metric, points, (low, high), "trained parameters", lambda each: each.parameters, 0, is_log=True),
        _panel(metric, points, (low, high), "peak memory, MiB", lambda each: each.memory_mebibytes, _WIDTH),
    ]
    note = "bars: 95 % over seeds and test rows; filled: not distinguishable from the best; hollow: worse"
    beside = [
        f"{each.name}: {each.value:.4g}" for each in points if not each.parameters and not low <= each.value <= high
    ]
    note += "".join(f"; outside of the picture: {name}" for name in beside)
    body = "\n".join([*parts, svg_text(_LEFT, _HEIGHT + 14, note)])
    size = f'width="{2 * _WIDTH}" height="{_HEIGHT + 24}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="{INK}">\n'
        f'<rect {size} fill="white"/>\n{body}\n</svg>\n'
    )


def _panel(
    metric: str,
    points: Sequence[Point],
    values: tuple[float, float],
    what: str,
    cost: Callable[[Point], float],
    offset: int,
    *,
    is_log: bool = False,
) -> str:
    """One panel, `offset` pixels from the left."""
    scaled: Callable[[float], float] = math.log10 if is_log else float
    trained = [point for point in points if point.parameters]
    costs = [scaled(max(cost(point), 1e-9)) for point in trained]
    first, last = min(costs), max(costs)
    room = (last - first) * 0.15 or 0.5
    first, last = first - room, last + room
    left, right, bottom = offset + _LEFT, offset + _WIDTH - 20, _HEIGHT - _BOTTOM

    def across(amount: float) -> float:
        return left + (scaled(max(amount, 1e-9)) - first) / (last - first) * (right - left)

    def up(value: float) -> float:
        return bottom - (value - values[0]) / (values[1] - values[0]) * (bottom - _TOP)

    parts = [f'<path d="M{left} {_TOP}V{bottom}H{right}" fill="none" stroke="{INK}"/>']
    for number in range(5):
        value = values[0] + (values[1] - values[0]) * number / 4
        parts.append(svg_text(left - 6, up(value) + 4, f"{value:.4g}", "end"))
        mark = first + (last - first) * number / 4
        amount = 10**mark if is_log else mark
        parts.append(svg_text(left + (right - left) * number / 4, bottom + 16, _short(amount), "middle"))
    parts += [svg_text((left + right) / 2, bottom + 36, what, "middle"), svg_text(left, _TOP - 10, metric)]
    for point in points:
        if not point.parameters:
            if values[0] <= point.value <= values[1]:
                y = up(point.value)
                parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="{INK}" stroke-dasharray="4 4"/>')
                parts.append(svg_text(right, y - 4, point.name, "end"))
            continue
        x, y, ink = across(cost(point)), up(point.value), _SAME if point.is_same else _WORSE
        parts.append(f'<path d="M{x:.1f} {up(point.low):.1f}V{up(point.high):.1f}" stroke="{ink}"/>')
        fill = ink if point.is_same else "white"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{ink}"/>')
    places = [(across(cost(point)), up(point.value), point.name) for point in trained]
    middle = (left + right) / 2  # a name on the other side would run into the next panel
    parts += _names([place for place in places if place[0] <= middle], 1, bottom)
    parts += _names([place for place in places if place[0] > middle], -1, bottom)
    return "\n".join(parts)


def _names(places: Sequence[tuple[float, float, str]], side: int, bottom: float) -> list[str]:
    """Names beside their points, far enough apart to be read; a line leads to a point whose name had to move.

    Args:
        places: x, y and name of each point.
        side: 1: to the right of it; -1: to the left.
        bottom: Where the panel ends; names that have no room above it go up.
    """
    ordered = sorted(places, key=lambda place: place[1])
    heights: list[float] = []
    for _, y, _ in ordered:
        heights.append(max(y, heights[-1] + _LINE) if heights else y)
    limit = bottom
    for number in reversed(range(len(heights))):
        heights[number] = min(heights[number], limit)
        limit = heights[number] - _LINE
    parts = []
    for (x, y, name), height in zip(ordered, heights, strict=True):
        reach = 7 if abs(height - y) < 1 else 26
        if reach > 7:
            ends = f"M{x + 5 * side:.1f} {y:.1f}L{x + (reach - 3) * side:.1f} {height:.1f}"
            parts.append(f'<path d="{ends}" stroke="{INK}" stroke-width="0.5"/>')
        parts.append(svg_text(x + reach * side, height + 4, name, "start" if side > 0 else "end"))
    return parts


def _short(amount: float) -> str:
    """A number of a scale, e.g. 1.4M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if amount >= size:
            return f"{amount / (1e3 if letter == 'k' else size):,.3g}{letter}"
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.3g}"


def svg_text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
