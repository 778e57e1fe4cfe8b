"""The Jinja environment of chat templates: transformers' own settings, with strings that keep their origin.

What differs from transformers' environment differs so that a rendering can be traced: filters and operators keep runs,
`~` and captures glue them, and every loop writes marks of no length. The same limits hold for every template.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
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
from lorafit.data.provenance import Typed, format_percent, glue, runs_of, shown

LOOP_TURNS_LIMIT = 2_000_000

GENERATION_START, GENERATION_END, LOOP_END, FIRST_MESSAGE = -1, -2, -3, -10


class Record(dict[str, Any]):
    """One message as the template sees it; knows its number."""

    __slots__ = ("_index",)
    _index: int


DICT_ATTRIBUTES = frozenset(dir(Record))
TEXT_METHODS = frozenset(name for name in dir(str) if name[0] != "_" and not name.startswith("format"))


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


class ChatEnvironment(ImmutableSandboxedEnvironment):
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


def _add_marks(tree: nodes.Node, environment: ChatEnvironment) -> None:
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


def _output(expressions: list[nodes.Expr], line: int, environment: ChatEnvironment) -> nodes.Output:
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
