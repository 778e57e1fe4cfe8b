"""A heat map as SVG text: layers down, linears across, the larger the darker; importances as bars on the right.

    q_proj  k_proj  v_proj
0   ░ 1.2   ░ 0.9   ▓ 3.1     ▬▬▬▬ +0.31
1   ░ 1.1   dead    ▓ 2.8     ▬ +0.05
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorafit.studies.plot import INK, svg_text

_CELL, _LINE, _LEFT, _TOP, _BARS = 64, 20, 90, 74, 180
_PALE, _DARK = (247, 250, 252), (17, 83, 110)
_BAR, _LOSS = "#b0532f", "#7a7a7a"
_LIGHT_TEXT = 0.55  # from this share of the scale on, text is white


@dataclass(frozen=True)
class HeatMap:
    """What is drawn, in a terminal too.

    Attributes:
        rows: Names of layers.
        columns: Names of linears.
        values: By row and column, 0 or more.
        words: What stands in a cell instead of its value, e.g. `dead`.
        bars: Importance by row; empty where none was measured.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Mapping[tuple[str, str], float]
    words: Mapping[tuple[str, str], str]
    bars: Mapping[str, float]

    @property
    def top(self) -> float:
        """Where the scale ends: the largest value that is not marked as exploded."""
        usual = [value for place, value in self.values.items() if place not in self.words]
        return max(usual, default=0.0) or max(self.values.values(), default=0.0) or 1.0

    def share(self, place: tuple[str, str]) -> float:
        """Where a value lies on the scale, 0 to 1."""
        return min(1.0, self.values.get(place, 0.0) / self.top)


def shade(share: float) -> tuple[int, int, int]:
    """Red, green and blue of a share of the scale."""
    red, green, blue = (round(pale + share * (dark - pale)) for pale, dark in zip(_PALE, _DARK, strict=True))
    return red, green, blue


def is_dark(share: float) -> bool:
    """Whether text on it is white."""
    return share >= _LIGHT_TEXT


def draw_heat_map(title: str, subtitle: str, heat: HeatMap) -> str:
    """The picture."""
    width = max(_LEFT + _CELL * len(heat.columns) + (_BARS if heat.bars else 0) + 20, _LEFT + 6 * len(subtitle))
    height = _TOP + _LINE * len(heat.rows) + 24
    parts = [svg_text(14, 20, title), svg_text(14, 38, subtitle)]
    for number, column in enumerate(heat.columns):
        parts.append(svg_text(_LEFT + _CELL * (number + 0.5), _TOP - 8, _short(column), "middle"))
    for line, row in enumerate(heat.rows):
        y = _TOP + _LINE * line
        parts.append(svg_text(_LEFT - 8, y + 14, row, "end"))
        parts += [_cell(heat, (row, column), number, y) for number, column in enumerate(heat.columns)]
    if heat.bars:
        parts += _bars(heat, _LEFT + _CELL * len(heat.columns) + 16)
    size = f'width="{width}" height="{height}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="{INK}">\n'
        f'<rect {size} fill="white"/>\n{body}\n</svg>\n'
    )


def _cell(heat: HeatMap, place: tuple[str, str], number: int, y: float) -> str:
    x, share = _LEFT + _CELL * number, heat.share(place)
    if place not in heat.values and place not in heat.words:
        return ""
    red, green, blue = shade(share)
    box = f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_LINE - 1}" fill="rgb({red},{green},{blue})"/>'
    text = svg_text(x + _CELL / 2, y + 14, heat.words.get(place) or f"{heat.values[place]:.2f}", "middle")
    fill = _BAR if place in heat.words and not is_dark(share) else "white" if is_dark(share) else INK
    return f'{box}<g fill="{fill}">{text}</g>'


def _bars(heat: HeatMap, left: float) -> list[str]:
    longest = max(map(abs, heat.bars.values())) or 1.0
    parts = [svg_text(left, _TOP - 8, "importance (loss saved)")]
    for line, row in enumerate(heat.rows):
        if row not in heat.bars:
            continue
        y, value = _TOP + _LINE * line, heat.bars[row]
        length = max(1.0, 90 * abs(value) / longest)
        fill = _BAR if value > 0 else _LOSS
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="{_LINE - 7}" fill="{fill}"/>')
        parts.append(svg_text(left + length + 6, y + 14, f"{value:+.3g}"))
    return parts


def _short(name: str) -> str:
    return name if len(name) <= 11 else f"{name[:4]}..{name[-5:]}"
