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

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lorafit.data.filters import (
    TemplateLimitError,
    check_size,
    followed,
    format_braces,
    format_filter,
    join,
    limited_glue,
    replace,
    tojson,
)
from lorafit.data.provenance import Run, Typed, format_percent, glue, runs_of, shown, typed_leaf

LOOP_TURNS_LIMIT = 2_000_000

GENERATION_START, GENERATION_END, LOOP_END, FIRST_MESSAGE = -1, -2, -3, -10

KNOWN_ROLES = frozenset(
    ["system", "developer", "user", "assistant", "tool", "function", "ipython", "model", "environment", "observation"]
)
# transformers fills the first two from any of them
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class Record(dict[str, Any]):
    """One message as the template sees it; knows its number."""

    __slots__ = ("_index",)
    _index: int


DICT_ATTRIBUTES = frozenset(dir(Record))
TEXT_METHODS = frozenset(name for name in dir(str) if name[0] != "_" and not name.startswith("format"))


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
        self._environment = _Environment()
        self._template = self._environment.from_string(source)

    def literal_text(self) -> str:
        """Every piece of text that stands in the template, NUL between them."""
        tree = self._environment.parse(self.source)
        pieces = [node.data for node in tree.find_all(nodes.TemplateData)]
        pieces += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        return "\0".join(pieces)

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


# --- the environment: transformers' own settings, with strings that keep their origin ---


class _CodeGenerator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.join_shown((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: marks where the template's author says that the model writes."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

    def _between_marks(self, caller: Callable[[], str]) -> str:
        return glue([_mark(GENERATION_START), caller(), _mark(GENERATION_END)])


class _Namespace(Namespace):
    """A namespace that takes no underscored names, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the template's names
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not store the name {name!r}")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"%", "*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, finalize=shown, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        self.loop_turns = 0
        self.concat = limited_glue  # type: ignore[method-assign]
        self.filters = {name: followed(plain) for name, plain in self.filters.items()}
        self.filters |= {"tojson": tojson, "join": join, "replace": replace, "format": format_filter}
        self.filters |= {"lorafit_mark": self._mark, "lorafit_loop_end": _loop_end}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _add_marks(tree, self)
        return tree

    def _mark(self, value: Any, loop: int) -> str:
        """What the mark at the start of a loop's body prints: nothing, or which message the loop stands at."""
        self.loop_turns += 1
        if self.loop_turns > LOOP_TURNS_LIMIT:
            raise TemplateLimitError(f"time limit: more than {LOOP_TURNS_LIMIT:,} turns of its loops")
        return _mark(FIRST_MESSAGE - value._index, loop) if isinstance(value, Record) else ""

    def join_shown(self, parts: Sequence[Any]) -> str:
        return limited_glue(shown(part) for part in parts)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # The sandbox's own checks take half of a rendering's time; all that these types hold is the template's to read.
        kind = type(obj)
        if kind is Record or kind is dict:
            if attribute not in DICT_ATTRIBUTES:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif (kind is LoopContext or kind is _Namespace) and attribute[0] != "_":
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return super().getattr(obj, attribute)
        elif (kind is Typed or kind is str) and attribute in TEXT_METHODS:
            return getattr(obj if kind is Typed else Typed(obj, runs_of(obj)), attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return format_percent(left, right)
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(count, int):
                    check_size(len(text) * count)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_size(left.bit_length() * abs(right) // 3)  # about its digits
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if getattr(__obj, "__name__", "") in ("center", "ljust", "rjust", "zfill", "expandtabs") and args:
            check_size(args[0] if isinstance(args[0], int) else 0)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None or not isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            return wrapped
        pattern, by_map = str(value.__self__), value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:
            return format_braces(self, pattern, () if by_map else args, args[0] if by_map else kwargs)

        return formatted


def _mark(code: int, loop: int = 0) -> Typed:
    return Typed("", ((0, code, loop),))


@jinja2.pass_context  # so that the compiler does not take it for a constant
def _loop_end(_context: Any, _value: Any, loop: int) -> str:
    return _mark(LOOP_END, loop)


def _add_marks(tree: nodes.Node, environment: _Environment) -> None:
    """Puts a mark at the start of each loop's body and one behind the loop."""
    for number, loop in enumerate(list(tree.find_all(nodes.For))):
        targets = [loop.target, *loop.target.find_all(nodes.Name)]
        names = [target for target in targets if isinstance(target, nodes.Name)]
        marks: list[nodes.Expr] = [
            nodes.Filter(nodes.Name(name.name, "load"), "lorafit_mark", [nodes.Const(number)], [], None, None)
            for name in names
        ]
        loop.body.insert(0, _output(marks, loop.lineno, environment))
        # The `else` of a loop is no place for the end: it runs only where the loop did not.
        end = nodes.Filter(nodes.Const(None), "lorafit_loop_end", [nodes.Const(number)], [], None, None)
        loop.end_mark = _output([end], loop.lineno, environment)  # type: ignore[attr-defined]
    _place_ends(tree)


def _output(expressions: list[nodes.Expr], line: int, environment: _Environment) -> nodes.Output:
    output = nodes.Output(expressions)
    output.set_lineno(line, override=True)
    output.set_environment(environment)
    return output


def _place_ends(node: nodes.Node) -> None:
    for name in node.fields:
        value = getattr(node, name)
        if isinstance(value, list):
            setattr(node, name, [part for item in value for part in _with_end(item)])
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, nodes.Node):
                _place_ends(child)


def _with_end(item: Any) -> list[Any]:
    return [item, item.end_mark] if isinstance(item, nodes.For) and hasattr(item, "end_mark") else [item]


def _raise_exception(message: str) -> None:
    raise TemplateError(str.__str__(message))
