"""Finds what a chat template leaves out: text of a message that the rendering does not hold.

A field that is missing from the whole but appears when the chat is cut after its message is *history*: templates such
as Qwen3's show the reasoning of the last turn only. That is how the model will be prompted, so it is supported, and
counted. A field that appears in neither is lost: what should be trained, or what an answer depends on, would vanish
without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorafit.data.sandbox import REASONING_FIELDS, Leaf, Traced

TOOLS = -1


@dataclass(frozen=True, slots=True)
class Dropped:
    """Fields that the rendering lacks, as (message, field); message -1 is the chat's tools.

    Attributes:
        lost: Rendered nowhere.
        history: Rendered only while their message is the last one.
    """

    lost: tuple[tuple[int, str], ...] = ()
    history: tuple[tuple[int, str], ...] = ()


def find_dropped(whole: Traced, cut_after: Callable[[int], Traced | None], control: re.Pattern[str]) -> Dropped:
    """Compares the strings of a chat with its rendering.

    Args:
        whole: The rendering.
        cut_after: Renders the chat cut after a message; None where the template refuses that.
        control: Matches control strings. Templates may eat them when they parse reasoning out of a content.
    """
    missing = _missing(whole, control)
    if not missing:
        return Dropped()
    lost: list[tuple[int, str]] = []
    history: list[tuple[int, str]] = []
    for message in sorted({leaf.message for leaf in missing}):
        fields = {(leaf.path, leaf.is_key): str(leaf.path[0]) for leaf in missing if leaf.message == message}
        if message == TOOLS:
            lost.append((TOOLS, "tools"))
            continue
        cut = cut_after(message)
        still = (
            None
            if cut is None
            else {(leaf.path, leaf.is_key) for leaf in _missing(cut, control) if leaf.message == message}
        )
        for place, name in fields.items():
            (history if still is not None and place not in still else lost).append((message, name))
    return Dropped(tuple(dict.fromkeys(lost)), tuple(dict.fromkeys(history)))


def _missing(traced: Traced, control: re.Pattern[str]) -> list[Leaf]:
    """The strings that count and of which something other than blanks and control strings is not in the rendering."""
    seen: dict[int, list[tuple[int, int]]] = {}
    for length, origin, start in traced.runs:
        if origin > 0 and (length or start < 0):
            seen.setdefault(origin, []).append(
                (0, len(traced.leaves[origin - 1].text)) if start < 0 else (start, start + length)
            )
    missing = []
    tool_names = []
    for number, leaf in enumerate(traced.leaves, 1):
        if leaf.message == TOOLS:
            if leaf.path[-1] == "name" and not leaf.is_key and "parameters" not in leaf.path:
                tool_names.append((leaf, number in seen))
        elif _counts(leaf) and _lacks(leaf.text, seen.get(number, []), control):
            missing.append(leaf)
    if tool_names and not any(rendered for _, rendered in tool_names):
        missing.append(tool_names[0][0])
    return missing


def _counts(leaf: Leaf) -> bool:
    """Whether a string carries meaning: contents, reasoning, names, calls and their arguments; not ids and types."""
    first, last = leaf.path[0], leaf.path[-1]
    if first in ("content", "name", *REASONING_FIELDS):
        return not leaf.is_key and last not in ("type", "id")
    if first in ("tool_calls", "function_call"):
        return "arguments" in leaf.path[:-1] or (not leaf.is_key and last in ("name", "arguments"))
    return False


def _lacks(text: str, seen: Sequence[tuple[int, int]], control: re.Pattern[str]) -> bool:
    if not seen:
        return bool(control.sub("", text).strip())
    place, rest = 0, []
    for start, end in sorted(seen):
        rest.append(text[place:start])
        place = max(place, end)
    rest.append(text[place:])
    return any(piece.strip() and control.sub("", piece).strip() for piece in rest)
