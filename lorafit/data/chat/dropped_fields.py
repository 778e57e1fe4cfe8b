"""Finds what a chat template leaves out: text of a message that the rendering does not hold.

A field that is missing from the whole but appears when the chat is cut after its message is *history*: templates such
as Qwen3's show the reasoning of the last turn only. That is how the model will be prompted, so it is supported, and
counted. A field that appears in neither is lost: what should be trained, or what an answer depends on, would vanish
without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorafit.contracts import JsonMapping
from lorafit.data.chat.template import BoundChat, RenderError
from lorafit.data.chat.traced_template import ChatTemplate, Traced
from lorafit.data.chat.typed_chat import TOOLS, Leaf
from lorafit.kinds.chat_fields import REASONING_FIELDS


@dataclass(frozen=True, slots=True)
class Dropped:
    """Fields that the rendering lacks, as (message, field); message -1 is the chat's tools.

    Attributes:
        lost: Rendered nowhere.
        history: Rendered only while their message is the last one.
    """

    lost: tuple[tuple[int, str], ...] = ()
    history: tuple[tuple[int, str], ...] = ()


def find_dropped(chat: BoundChat, whole: Traced, control: re.Pattern[str]) -> Dropped:
    """Compares the strings of a chat with its rendering.

    Args:
        chat: The chat; renders it cut after a message. What is cut and reads as in the whole shows nothing more.
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
        text = chat.attempt(message + 1)
        cut = chat.trace(message + 1) if text is not None and not whole.text.startswith(text) else None
        shown = fields.keys() - _places(_missing(cut, control), message) if cut is not None else set()
        for place, name in fields.items():
            (history if place in shown else lost).append((message, name))
    return Dropped(tuple(dict.fromkeys(lost)), tuple(dict.fromkeys(history)))


def _places(leaves: Iterable[Leaf], message: int) -> set[tuple[tuple[str | int, ...], bool]]:
    return {(leaf.path, leaf.is_key) for leaf in leaves if leaf.message == message}


def _missing(traced: Traced, control: re.Pattern[str]) -> list[Leaf]:
    """The strings that count and of which something other than blanks and control strings is not in the rendering."""
    seen: dict[int, list[tuple[int, int]]] = {}
    for length, origin, start in traced.runs:
        if origin > 0 and (length or start < 0):
            seen.setdefault(origin, []).append(
                (0, len(traced.leaves[origin - 1].text)) if start < 0 else (start, start + length)
            )
    missing = [
        leaf
        for number, leaf in enumerate(traced.leaves, 1)
        if leaf.message != TOOLS and _counts(leaf) and _lacks(leaf.text, seen.get(number, ()), control)
    ]
    if traced.tool_names and not any(number in seen for number in traced.tool_names):
        missing.append(traced.leaves[traced.tool_names[0] - 1])
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


DROPS = "the chat template drops system messages"
_REASON_CHARACTERS = 120


def refusal_of_system(
    template: ChatTemplate, prompt: str, variables: JsonMapping, control: re.Pattern[str]
) -> str | None:
    """Why a chat with a system message cannot be rendered, though it can without one; None where it can."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    if BoundChat(template, chat, None, variables).attempt(len(chat)) is None:
        return None  # what it refuses is something else
    prompted = BoundChat(template, [{"role": "system", "content": prompt}, *chat], None, variables)
    try:
        lost = find_dropped(prompted, prompted.trace(), control).lost
    except RenderError as error:
        return error.what.replace("refuses this chat", "refuses system messages")[:_REASON_CHARACTERS]
    return DROPS if any(message == 0 for message, _ in lost) else None
