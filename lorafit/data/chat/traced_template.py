"""Runs a chat template as transformers does, but so that the rendering knows who wrote each character.

`ChatTemplate(source).trace(chat, ...)` gives the text, the runs of `traced_text`, and the stretch of text
that the template wrote while its loop stood at each message:

    <|im_start|>user⏎hi<|im_end|>⏎<|im_start|>assistant⏎hello<|im_end|>⏎
    └────── message 0 ──────────┘ └──────────── message 1 ──────────────┘

For that, every `for` of the template gets two invisible outputs: a mark at the start of its body and one behind its
end. A template is foreign code: it runs in Jinja's immutable sandbox, and one that runs or grows without end is
stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import jinja2.nodes as nodes

from lorafit.contracts import JsonMapping
from lorafit.data.chat.jinja_environment import (
    FIRST_MESSAGE,
    GENERATION_END,
    GENERATION_START,
    LOOP_END,
    ChatEnvironment,
)
from lorafit.data.chat.traced_text import Run, runs_of
from lorafit.data.chat.typed_chat import Leaf, TypedChat
from lorafit.run.prelude import has_dates

CLOCK = "strftime_now"


@dataclass
class Traced:
    """A rendering with its origins.

    Attributes:
        text: The rendering.
        runs: Who wrote it; `(length, leaf, start)`, marks left out. `leaves[leaf - 1]` is the string.
        leaves: The strings of the chat.
        tool_names: Numbers of the leaves that name a tool.
        regions: For each message the stretches that were written for it, in order, none of them empty.
        generation: Stretches inside `{% generation %}`.
        tail: Where the template's last loop over messages ended; 0 without one.
    """

    text: str
    runs: list[Run]
    leaves: list[Leaf]
    tool_names: Sequence[int] = ()
    regions: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    generation: list[tuple[int, int]] = field(default_factory=list)
    tail: int = 0

    @cached_property
    def authors(self) -> list[tuple[int, int, int]]:
        """Who typed what: `(start, end, message)`, in order, neighbours of one message joined."""
        found: list[tuple[int, int, int]] = []
        place = 0
        for length, origin, _ in self.runs:
            if length and origin > 0:
                message = self.leaves[origin - 1].message
                if found and found[-1][1] == place and found[-1][2] == message:
                    found[-1] = (found[-1][0], place + length, message)
                else:
                    found.append((place, place + length, message))
            place += length
        return found

    @cached_property
    def typed_by(self) -> dict[int, list[tuple[int, int]]]:
        """The same by message."""
        found: dict[int, list[tuple[int, int]]] = {}
        for start, end, message in self.authors:
            found.setdefault(message, []).append((start, end))
        return found


def stretches(whole: Traced, wanted: Callable[[int], bool]) -> list[tuple[int, int]]:
    """Stretches of typed characters that are placed in their leaf in a wanted way."""
    ends = accumulate(length for length, _, _ in whole.runs)
    placed = zip(whole.runs, ends, strict=True)
    return join_stretches(
        (end - length, end) for (length, origin, start), end in placed if origin > 0 and wanted(start)
    )


def join_stretches(stretches: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same without empty ones, neighbours joined."""
    joined: list[tuple[int, int]] = []
    for start, end in stretches:
        _extend(joined, start, end)
    return joined


def _extend(stretches: list[tuple[int, int]], start: int, end: int) -> None:
    """Adds a stretch behind the others, joined with the last one where they touch; an empty one is left out."""
    if stretches and stretches[-1][1] == start:
        stretches[-1] = (stretches[-1][0], end)
    elif end > start:
        stretches.append((start, end))


class ChatTemplate:
    """A compiled chat template.

    Raises:
        jinja2.TemplateSyntaxError: If it is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._environment = ChatEnvironment()
        self._template = self._environment.from_string(source)

    def literal_text(self) -> str:
        """Every piece of text that stands in the template, NUL between them."""
        tree = self._environment.parse(self.source)
        pieces = [node.data for node in tree.find_all(nodes.TemplateData)]
        pieces += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        return "\0".join(pieces)

    def clock_formats(self) -> tuple[str, ...] | None:
        """The formats in which the template asks for the present moment, in order: none where it asks for none.

        None where it may ask in a format that does not stand in it.
        """
        if CLOCK not in self.source or has_dates(self.source):
            return ()
        tree = self._environment.parse(self.source)
        names = [node for node in tree.find_all(nodes.Name) if node.name == CLOCK and node.ctx == "load"]
        asked = [call for call in tree.find_all(nodes.Call) if call.node in names]
        tested = [test for test in tree.find_all(nodes.Test) if test.node in names]
        given = [call.args[0] for call in asked if call.args]
        formats = [node.value for node in given if isinstance(node, nodes.Const) and isinstance(node.value, str)]
        return tuple(dict.fromkeys(formats)) if len(formats) + len(tested) == len(names) else None

    def render(
        self, chat: TypedChat, count: int, variables: JsonMapping, *, add_generation_prompt: bool = False
    ) -> str:
        """Renders the first `count` messages of a chat; for `read_trace`.

        Raises:
            jinja2.TemplateError, TypeError, ...: Whatever the template raises for this chat.
        """
        self._environment.memo = chat.memo
        given = {"messages": chat.records[:count], "tools": chat.tools.typed, "documents": None, **variables}
        return self._environment.run(self._template, {**given, "add_generation_prompt": add_generation_prompt})

    def line_of(self, compiled_line: int) -> int:
        """The template's line that a line of its compiled form stands for."""
        return self._template.get_corresponding_lineno(compiled_line)


def read_trace(result: str, chat: TypedChat) -> Traced:
    """What `ChatTemplate.render` gave, with its marks read: a stack of loops says for which message each character was
    written.
    """
    traced = Traced(str.__str__(result), [], chat.leaves, chat.tools.names)
    stack: list[tuple[int, int]] = []  # (loop, message)
    generation_start = place = 0
    for length, origin, start in runs_of(result):
        if length:
            traced.runs.append((length, origin, start))
            if stack:
                _extend(traced.regions.setdefault(stack[-1][1], []), place, place + length)
            place += length
        elif origin <= FIRST_MESSAGE or origin == LOOP_END:
            open_loops = [loop for loop, _ in stack]
            if start in open_loops:
                del stack[open_loops.index(start) :]
            if origin != LOOP_END:
                stack.append((start, FIRST_MESSAGE - origin))
            elif start in open_loops:
                traced.tail = place
        elif origin == GENERATION_START:
            generation_start = place
        elif origin == GENERATION_END:
            traced.generation.append((generation_start, place))
        else:
            traced.runs.append((length, origin, start))
    return traced
