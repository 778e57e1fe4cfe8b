"""A plot as SVG text: how far each method is from the best, with its interval, against what it costs.

+0.3 │        ┃
     │        ○────── oft      filled: not distinguishable from the best
   0 │-●---┃--┃------ lora     hollow: worse
     │     ●──●────── dora     a panel for trained parameters (logarithmic), one for peak memory;
     └──────────────           the base is a line, or a word below
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 560, 340, 70, 30, 60
_NAMES = 150  # pixels for names at the right of a panel
_LINE = 13  # pixels between two names
INK, _SAME, _WORSE = "#444444", "#1f6f8b", "#b0532f"


@dataclass(frozen=True)
class Point:
    """One method.

    Attributes:
        name: Its name.
        difference: Of its metric to that of the best method; 0 for the best.
        low, high: Ends of the difference's interval.
        parameters: Trained ones; 0 of the base.
        memory_mebibytes: Peak while training; 0 of the base.
        is_same: Whether it cannot be told from the best.
    """

    name: str
    difference: float
    low: float
    high: float
    parameters: float
    memory_mebibytes: float
    is_same: bool


def draw_quality(metric: str, best: str, points: Sequence[Point]) -> str:
    """The two panels side by side.

    Args:
        metric: What is compared.
        best: The method that the others are compared with.
        points: All methods, and the base.
    """
    trained = [point for point in points if point.parameters]
    low, high = min(point.low for point in trained), max(point.high for point in trained)
    room = (high - low or 1.0) * 0.08
    ends, title = (low - room, high + room), f"{metric} minus that of {best}, the best"
    parts = [
        _panel(title, points, ends, "trained parameters", lambda each: each.parameters, 0, is_log=True),
        _panel(title, points, ends, "peak memory, MiB", lambda each: each.memory_mebibytes, _WIDTH),
    ]
    note = "bars: 95 % over seeds and test rows; filled: not distinguishable from the best; hollow: worse"
    beside = [each for each in points if not each.parameters and not ends[0] <= each.difference <= ends[1]]
    note += "".join(f"; outside of the picture: {each.name}, {each.difference:+.4g}" for each in beside)
    body = "\n".join([*parts, svg_text(_LEFT, _HEIGHT + 14, note)])
    size = f'width="{2 * _WIDTH}" height="{_HEIGHT + 24}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="{INK}">\n'
        f'<rect {size} fill="white"/>\n{body}\n</svg>\n'
    )


def _panel(
    title: str,
    points: Sequence[Point],
    ends: tuple[float, float],
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
    room = (max(costs) - min(costs)) * 0.1 or 0.5
    first, last = min(costs) - room, max(costs) + room
    left, right, bottom = offset + _LEFT, offset + _WIDTH - _NAMES, _HEIGHT - _BOTTOM

    def across(amount: float) -> float:
        return left + (scaled(max(amount, 1e-9)) - first) / (last - first) * (right - left)

    def up(value: float) -> float:
        return bottom - (value - ends[0]) / (ends[1] - ends[0]) * (bottom - _TOP)

    parts = [f'<path d="M{left} {_TOP}V{bottom}H{right}" fill="none" stroke="{INK}"/>']
    parts += [svg_text(left - 6, up(mark) + 4, f"{mark:+.3g}" if mark else "0", "end") for mark in _marks(*ends)]
    amounts = _marks_of_decades(10**first, 10**last) if is_log else _marks(first, last)
    parts += [svg_text(across(mark), bottom + 16, _short(mark), "middle") for mark in amounts]
    parts += [svg_text((left + right) / 2, bottom + 36, what, "middle"), svg_text(left, _TOP - 10, title)]
    lines = [(up(0), "")]
    lines += [(up(each.difference), each.name) for each in points if not each.parameters]
    for y, name in lines:
        if _TOP <= y <= bottom:
            parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="{INK}" stroke-dasharray="4 4" opacity="0.6"/>')
            parts += [svg_text(right - 4, y - 4, name, "end")] if name else []
    for point in trained:
        x, y, ink = across(cost(point)), up(point.difference), _SAME if point.is_same else _WORSE
        parts.append(f'<path d="M{x:.1f} {up(point.low):.1f}V{up(point.high):.1f}" stroke="{ink}"/>')
        fill = ink if point.is_same else "white"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{ink}"/>')
    places = [(across(cost(point)), up(point.difference), point.name) for point in trained]
    return "\n".join([*parts, *_names(places, right + 12, bottom)])


def _names(places: Sequence[tuple[float, float, str]], left: float, bottom: float) -> list[str]:
    """Names below each other at the right of a panel, far enough apart to be read, a line from each to its point.

    Args:
        places: x, y and name of each point.
        left: Where the names begin.
        bottom: Where the panel ends; names that have no room above it go up.
    """
    ordered = sorted(places, key=lambda place: (place[1], -place[0]))
    heights: list[float] = []
    for _, y, _ in ordered:
        heights.append(max(y, heights[-1] + _LINE) if heights else y)
    limit = bottom
    for number in reversed(range(len(heights))):
        heights[number] = min(heights[number], limit)
        limit = heights[number] - _LINE
    parts = []
    for (x, y, name), height in zip(ordered, heights, strict=True):
        ends = f"M{x + 5:.1f} {y:.1f}L{left - 3:.1f} {height:.1f}"
        parts.append(f'<path d="{ends}" stroke="{INK}" stroke-width="0.5" opacity="0.6"/>')
        parts.append(svg_text(left, height + 4, name))
    return parts


def _marks(low: float, high: float) -> list[float]:
    """Round numbers of a scale, three to seven of them."""
    power = 10 ** math.floor(math.log10((high - low) / 3))
    step = next(step for step in (5 * power, 2 * power, power) if (high - low) / step >= 3)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _marks_of_decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; powers alone where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [n * 10.0**power for power in powers for n in (1, 2, 5) if low <= n * 10.0**power <= high]
    return found if len(found) < 7 else [10.0**power for power in powers if low <= 10.0**power <= high]


def _short(amount: float) -> str:
    """A number of a scale, e.g. 1.4M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if amount >= size:
            return f"{amount / (1e3 if letter == 'k' else size):,.3g}{letter}"
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.3g}"


def svg_text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
