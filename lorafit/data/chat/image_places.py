"""Images in a rendered chat: the mark that the template writes for each becomes the text that stands for it.

    template:   user⏎<image>What is it?      expanded:   user⏎<image><image><image><image>What is it?
                     └ mark                                    └───── an image's tokens ──┘

A mark that somebody typed stays text, as any other control string.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

from lorafit.console.wording import counted
from lorafit.contracts import JsonObject
from lorafit.data.chat.assistant_spans import Turn
from lorafit.data.chat.rendering import Rendering
from lorafit.data.chat.template import RenderError
from lorafit.data.chat.template_names import KEY
from lorafit.data.text_encoder import Stretch


def in_parts(chat: Sequence[JsonObject]) -> list[JsonObject]:
    """The chat with each content as a list of parts, as the templates of models that see take them."""
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if isinstance(turn.get("content"), str)
        else turn
        for turn in chat
    ]


def put_images(rendering: Rendering, mark: str, images: Sequence[str]) -> Rendering:
    """The rendering with the text of each image in the place of its mark.

    Raises:
        RenderError: The template writes more marks than there are images, or fewer.
    """
    marks = [
        (found.start(), found.end())
        for found in re.finditer(re.escape(mark), rendering.text)
        if not any(start < found.end() and found.start() < end for start, end in rendering.typed)
    ]
    if len(marks) != len(images):
        what = f"the chat template writes {counted(len(marks), 'place')} for images, and the row has {len(images)}"
        raise RenderError(what, key=KEY, todo="use a template that writes each image part")
    if not marks:
        return rendering
    pieces, stretches, place = [], list[Stretch](), 0
    for (start, end), image in zip(marks, images, strict=True):
        pieces += [rendering.text[place:start], image]
        begin = sum(map(len, pieces)) - len(image)
        stretches.append((begin, begin + len(image)))
        place = end
    text = "".join([*pieces, rendering.text[place:]])
    ends = [end for _, end in marks]
    grown = [0]
    for (start, end), image in zip(marks, images, strict=True):
        grown.append(grown[-1] + len(image) - (end - start))

    def move(character: int) -> int:
        return character + grown[bisect_right(ends, character)]

    def moved(spans: Sequence[Stretch]) -> tuple[Stretch, ...]:
        return tuple((move(start), move(end)) for start, end in spans)

    turns = tuple(_moved_turn(turn, move) for turn in rendering.turns)
    spans, typed, unsure = map(moved, (rendering.spans, rendering.typed, rendering.unsure))
    return replace(rendering, text=text, spans=spans, turns=turns, typed=typed, unsure=unsure, images=tuple(stretches))


def _moved_turn(turn: Turn, move: Callable[[int], int]) -> Turn:
    places = {name: move(getattr(turn, name)) for name in ("header", "start", "end", "answer_end")}
    return replace(turn, **places)


def tokens_of(offsets: Sequence[Stretch], stretch: Stretch) -> tuple[int, int]:
    """The first token of a stretch of text, and the one behind its last."""
    numbers = range(len(offsets))
    first = bisect_right(numbers, stretch[0], key=lambda number: offsets[number][1])
    return first, bisect_left(numbers, stretch[1], first, key=lambda number: offsets[number][0])
