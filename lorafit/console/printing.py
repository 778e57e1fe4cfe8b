"""Plain text on a rich console."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def say(console: Console, text: str, style: str = "") -> None:
    """Prints the text as it is: nothing in it is taken for markup, coloured or wrapped."""
    console.print(printable(console, text), style=style, markup=False, highlight=False, soft_wrap=True)


def can_show(console: Console, text: str) -> bool:
    """Whether the console's encoding has these characters."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        return False
    return True


def printable(console: Console, text: str) -> str:
    """The text without control characters, which could steer a terminal, and in what the terminal can show."""
    plain = _UNPRINTABLE.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
    return plain.encode(console.encoding, "backslashreplace").decode(console.encoding)
