"""Runs a chat template as transformers does, but so that the rendering knows who wrote each character.

`ChatTemplate(source).render(...)` gives the text, the runs of `lorafit.data.provenance`, and the stretch of text that
the template wrote while its loop stood at each message:

    <|im_start|>user⏎hi<|im_end|>⏎<|im_start|>assistant⏎hello<|im_end|>⏎
    └────── message 0 ──────────┘ └──────────── message 1 ──────────────┘

For that, every `for` of the template gets two invisible outputs: a mark at the start of its body and one behind its
end. A template is foreign code: it runs in Jinja's immutable sandbox, and one that runs or grows without end is
stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jinja2.nodes as nodes

from lorafit.data.jinja_environment import (
    FIRST_MESSAGE,
    GENERATION_END,
    GENERATION_START,
    LOOP_END,
    ChatEnvironment,
    Record,
)
from lorafit.data.provenance import Run, runs_of, typed_leaf
from lorafit.prelude import has_dates

KNOWN_ROLES = frozenset(
    ["system", "developer", "user", "assistant", "tool", "function", "ipython", "model", "environment", "observation"]
)
CLOCK = "strftime_now"
# transformers fills the first two from any of them
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One string of the chat: `message` (-1 for tools), the path to it there, its text; a key has the path of its
    value.
    """

    message: int
    path: tuple[str | int, ...]
    text: str
    is_key: bool = False


@dataclass(slots=True)
class Traced:
    """A rendering with its origins.

    Attributes:
        text: The rendering.
        runs: Who wrote it; `(length, leaf, start)`, marks left out. `leaves[leaf - 1]` is the string.
        regions: For each message the stretches that were written for it, in order, none of them empty.
        generation: Stretches inside `{% generation %}`.
        tail: Where the template's last loop over messages ended; 0 without one.
    """

    text: str
    runs: list[Run]
    leaves: list[Leaf]
    regions: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    generation: list[tuple[int, int]] = field(default_factory=list)
    tail: int = 0


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: The Jinja text.

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
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        variables: Mapping[str, Any],
        add_generation_prompt: bool = False,
    ) -> Traced:
        """Renders a chat and traces every character.

        Raises:
            jinja2.TemplateError, TypeError, ...: Whatever the template raises for this chat.
        """
        leaves: list[Leaf] = []
        chat = [_typed_message(message, index, leaves) for index, message in enumerate(messages)]
        typed_tools = _typed(list(tools), -1, (), leaves) if tools is not None else None
        result = self._run(chat, typed_tools, variables, add_generation_prompt)
        return _trace(result, leaves)

    def render_plain(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        variables: Mapping[str, Any],
        add_generation_prompt: bool = False,
    ) -> str:
        """The same text without the tracing."""
        chat = [_with_reasoning_names(message) for message in messages]
        return str.__str__(self._run(chat, tools, variables, add_generation_prompt))

    def _run(self, chat: Any, tools: Any, variables: Mapping[str, Any], add_generation_prompt: bool) -> str:
        self._environment.loop_turns = 0
        return self._template.render(
            messages=chat, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **variables
        )


@lru_cache(maxsize=32)
def compile_template(source: str) -> ChatTemplate:
    """`ChatTemplate(source)`, compiled once a process."""
    return ChatTemplate(source)


def _with_reasoning_names(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without its null fields, its reasoning under the names that templates read (as transformers does)."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in REASONING_FIELDS if plain.get(name) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _typed_message(message: Mapping[str, Any], index: int, leaves: list[Leaf]) -> Record:
    record = Record()
    record._index = index
    for key, value in message.items():
        if value is None:
            continue
        known = key == "role" and value in KNOWN_ROLES
        record[key] = value if known else _typed(value, index, (key,), leaves)
    named = _with_reasoning_names(record)
    if len(named) != len(record):
        record.update(named)
    return record


def _typed(value: Any, message: int, path: tuple[str | int, ...], leaves: list[Leaf], is_key: bool = False) -> Any:
    """The value with every string in it, keys too, as a leaf."""
    if isinstance(value, str):
        leaves.append(Leaf(message, path, value, is_key))
        return typed_leaf(value, len(leaves))
    if isinstance(value, Mapping):
        return {
            _typed(key, message, (*path, key), leaves, True): _typed(item, message, (*path, key), leaves)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_typed(item, message, (*path, place), leaves) for place, item in enumerate(value)]
    return value


def _trace(result: str, leaves: list[Leaf]) -> Traced:
    """Reads the marks out of a rendering: a stack of loops says for which message each character was written."""
    traced = Traced(str.__str__(result), [], leaves)
    stack: list[tuple[int, int]] = []  # (loop, message)
    generation_start = place = 0
    for length, origin, start in runs_of(result):
        if length:
            traced.runs.append((length, origin, start))
            if stack:
                stretches = traced.regions.setdefault(stack[-1][1], [])
                if stretches and stretches[-1][1] == place:
                    stretches[-1] = (stretches[-1][0], place + length)
                else:
                    stretches.append((place, place + length))
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
