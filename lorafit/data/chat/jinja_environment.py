"""The Jinja environment of chat templates: transformers' own settings, with limits, and so that a rendering can be
traced: filters and operators keep runs, `~` and captures glue them, and every loop writes marks of no length.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.data.chat.jinja_filters import (
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
from lorafit.data.chat.traced_text import Typed, format_percent, glue, runs_of, shown

LOOP_TURNS_LIMIT = 2_000_000
_METHODS = frozenset([types.MethodType, types.BuiltinMethodType])
_TEXTS_A_VALUE = 4  # JSON of one value with other options; more only a template would want that fills memory

GENERATION_START, GENERATION_END, LOOP_END, FIRST_MESSAGE = -1, -2, -3, -10


class Record(JsonObject):
    """One message as the template sees it; knows its number."""

    __slots__ = ("_index",)
    _index: int


DICT_ATTRIBUTES = frozenset(dir(Record))
_LOOP_ATTRIBUTES = frozenset(name for name in dir(LoopContext) if name[0] != "_")
TEXT_METHODS = frozenset(name for name in dir(str) if name[0] != "_" and not name.startswith("format"))


class JsonMemo:
    """Remembers the JSON of values that many renderings write: a chat's tools and the arguments of its calls.

    Templates cannot change the values: the sandbox forbids it.

    Args:
        values: Lists and dicts, kept here so that no other value can get their place in memory.
        behind: Is asked about other values.
    """

    def __init__(self, values: Iterable[Any], behind: JsonMemo | None = None) -> None:
        self._values = {id(value): value for value in values}
        self._behind = behind
        self._known: dict[Any, str] = {}

    def write(self, value: Any, *args: Any, **kwargs: Any) -> str:
        """`tojson(value, ...)`, made once for values that are kept."""
        if id(value) not in self._values:
            return (self._behind.write if self._behind is not None else tojson)(value, *args, **kwargs)
        key = (id(value), args, tuple(kwargs.items()))
        try:
            known = self._known.get(key)
        except TypeError:  # an option that cannot be hashed
            return tojson(value, *args, **kwargs)
        if known is None:
            known = tojson(value, *args, **kwargs)
            if len(self._known) < _TEXTS_A_VALUE * len(self._values):
                self._known[key] = known
        return known


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


class _CodeGenerator(CodeGenerator):
    """Writes `a ~ b` so that it is traced; what is printed is neither copied nor made plain: `finalize` gives a string
    already.
    """

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.join_shown((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> None:
        self.write("environment.finalize(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> None:
        self.write(")")


class _LoopMarker(NodeTransformer):
    """Puts a mark at the start of each loop's body and one behind the loop, whose `else` is no place for it: that runs
    only where the loop did not.
    """

    def __init__(self, environment: ChatEnvironment) -> None:
        self._environment = environment
        self._loops = 0

    def visit_For(self, loop: nodes.For) -> list[nodes.Node]:  # noqa: N802
        number = nodes.Const(self._loops)
        self._loops += 1
        names = [node for node in (loop.target, *loop.target.find_all(nodes.Name)) if isinstance(node, nodes.Name)]
        self.generic_visit(loop)
        loaded = [nodes.Name(name.name, "load") for name in names]
        loop.body.insert(0, self._print("lorafit_mark", loaded, number, loop.lineno))
        return [loop, self._print("lorafit_loop_end", [nodes.Const(None)], number, loop.lineno)]

    def _print(self, name: str, values: Sequence[nodes.Expr], number: nodes.Const, line: int) -> nodes.Node:
        marks: list[nodes.Expr] = [nodes.Filter(value, name, [number], [], None, None) for value in values]
        return nodes.Output(marks).set_lineno(line, override=True).set_environment(self._environment)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Renders as transformers does strings that keep their origin, and marks what is written for which message. Stops
    what runs or grows without end.

    Attributes:
        loop_turns: Turns that loops have taken in this rendering.
        memo: JSON that was made before.
    """

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"%", "*", "**"})

    def __init__(self) -> None:
        extensions = [_GenerationTag, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=shown, extensions=extensions)
        self.loop_turns = 0
        self.memo = JsonMemo([])
        self.concat = limited_glue  # type: ignore[method-assign]
        self.filters = {name: followed(plain) for name, plain in self.filters.items()}
        self.filters |= {"join": join, "replace": replace, "format": format_filter}
        self.filters |= {"tojson": lambda *args, **kwargs: self.memo.write(*args, **kwargs)}
        self.filters |= {"lorafit_mark": self._mark, "lorafit_loop_end": _loop_end}
        self.globals |= {
            "raise_exception": _raise_exception,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
        }

    def run(self, template: jinja2.Template, variables: JsonMapping) -> str:
        """Renders a template of this environment. An error does not say in which line it arose."""
        self.loop_turns = 0
        context = template.new_context({**self.globals, **variables}, shared=True)
        return self.concat(template.root_render_func(context))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _LoopMarker(self).visit(tree)
        return tree

    def _mark(self, value: Any, loop: int) -> str:
        """What the mark at the start of a loop's body prints: nothing, or which message the loop stands at."""
        self.loop_turns += 1
        if self.loop_turns > LOOP_TURNS_LIMIT:
            raise TemplateLimitError(f"time limit: more than {LOOP_TURNS_LIMIT:,} turns of its loops")
        return _mark(FIRST_MESSAGE - value._index, loop) if type(value) is Record else ""

    @staticmethod
    def join_shown(parts: Iterable[Any]) -> str:
        """`a ~ b`."""
        return limited_glue(shown(part) for part in parts)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # The sandbox's own checks take half of a rendering's time; all that these types hold is the template's to read.
        kind = type(obj)
        if kind is Record or kind is dict:
            if attribute not in DICT_ATTRIBUTES:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif kind is _Namespace:
            stored = object.__getattribute__(obj, "_Namespace__attrs")
            if attribute in stored:
                return stored[attribute]
        elif kind is LoopContext and attribute in _LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        elif (kind is Typed or kind is str) and attribute in TEXT_METHODS:
            return getattr(Typed(obj, runs_of(obj)) if kind is str else obj, attribute)
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
        if type(__obj) in _METHODS:  # whether it may be called was asked when the template got hold of it
            kwargs.pop("_loop_vars", None)  # Jinja's own, for functions that look at the context
            kwargs.pop("_block_vars", None)
            return __obj(*args, **kwargs)
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


def _raise_exception(message: str) -> None:
    raise TemplateError(str.__str__(message))
