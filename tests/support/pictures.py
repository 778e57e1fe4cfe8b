"""Drawn squares and chats about them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30)}


def draw_square(file: Path, colour: str, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    """A square of about that colour somewhere on a dark ground."""
    from PIL import Image

    chance = random.Random(seed)
    width, height = size
    side = round(0.7 * min(size))
    image = Image.new("RGB", size, (chance.randrange(60),) * 3)
    left, top = chance.randrange(width - side + 1), chance.randrange(height - side + 1)
    shade: Any = tuple(value + chance.randrange(-20, 20) for value in COLOURS[colour])
    image.paste(shade, (left, top, left + side, top + side))
    image.save(file)
    return file


def ask_colour(path: str, colour: str) -> dict[str, Any]:
    """A row that asks what colour the square in an image has."""
    asked = [{"type": "image", "path": path}, {"type": "text", "text": "what"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]}


def draw_rows(folder: Path, count: int, name: str = "p", **options: Any) -> list[dict[str, Any]]:
    """Rows with an image each, in the folder; every colour as often as the others."""
    colours = [list(COLOURS)[number % len(COLOURS)] for number in range(count)]
    for number, colour in enumerate(colours):
        draw_square(folder / f"{name}{number}.png", colour, seed=number, **options)
    return [ask_colour(f"{name}{number}.png", colour) for number, colour in enumerate(colours)]
