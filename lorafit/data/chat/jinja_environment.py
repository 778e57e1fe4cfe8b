"""The Jinja environments of chat templates: transformers' own settings, with limits.

`ChatEnvironment` renders plain strings. `TracingEnvironment` differs so that a rendering can be traced: filters and
operators keep runs, `~` and captures glue them, and every loop writes marks of no length.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

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

    def ask(self, make: Callable[..., str], value: Any, *options: Any) -> str:
        """`make(value, *options)`, made once for values that are kept."""
        if id(value) not in self._values:
            return self._behind.ask(make, value, *options) if self._behind is not None else make(value, *options)
        try:
            known = self._known.get((id(value), *options))
        except TypeError:  # an option that cannot be hashed
            return make(value, *options)
        if known is None:
            known = make(value, *options)
            if len(self._known) < _TEXTS_A_VALUE * len(self._values):
                self._known[id(value), *options] = known
        return known


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: marks where the template's author says that the model writes."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

    def _between_marks(self, caller: Callable[[], str]) -> str:
        if not isinstance(self.environment, TracingEnvironment):
            return caller()
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
    """Writes `a ~ b` so that it is limited, and the commonest lookups without a call: they are half of a rendering."""

    def visit_Getattr(self, node: nodes.Getattr, frame: Frame) -> None:  # noqa: N802
        if node.attr in _LOOP_ATTRIBUTES:
            self._write_lookup(node, frame, "is LoopContext", f"own.{node.attr}", "getattr")
        elif node.attr in DICT_ATTRIBUTES:
            super().visit_Getattr(node, frame)
        else:
            self._write_lookup(node, frame, f"is dict and {node.attr!r} in own", f"own[{node.attr!r}]", "getattr")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        key = node.arg.value if isinstance(node.arg, nodes.Const) else None
        if isinstance(key, str):
            self._write_lookup(node, frame, f"is dict and {key!r} in own", f"own[{key!r}]", "getitem")
        else:
            super().visit_Getitem(node, frame)

    def _write_lookup(self, node: Any, frame: Frame, test: str, found: str, else_ask: str) -> None:
        key = node.attr if isinstance(node, nodes.Getattr) else node.arg.value
        self.write(f"({found} if type(own := ")
        self.visit(node.node, frame)
        self.write(f") {test} else environment.{else_ask}(own, {key!r}))")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.join_shown((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Renders as transformers does, and stops what runs or grows without end.

    Attributes:
        loop_turns: Turns that loops have taken in this rendering.
        memo: JSON that was made before.
    """

    code_generator_class: type[CodeGenerator] = _CodeGenerator
    intercepted_binops = frozenset({"%", "*", "**"})

    def __init__(self, finalize: Callable[[Any], str] | None = None) -> None:
        extensions = [_GenerationTag, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=finalize, extensions=extensions)
        self.loop_turns = 0
        self.memo = JsonMemo([])
        self.concat = _join_limited  # type: ignore[method-assign]
        self.filters |= {"tojson": self._tojson, "lorafit_turns": self._count_turns}
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
        self._mark_loops(tree)
        return tree

    def _mark_loops(self, tree: nodes.Template) -> None:
        """Counts the turns of every loop: those of a loop that calls itself one by one, of others when they start."""
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                one = nodes.Filter(nodes.Const((None,)), "lorafit_turns", [], [], None, None)
                loop.body.insert(0, _located(nodes.ExprStmt(one), loop.lineno, self))
            else:
                loop.iter = nodes.Filter(loop.iter, "lorafit_turns", [], [], None, None)

    @jinja2.pass_context  # so that the compiler does not take it for a constant
    def _count_turns(self, _context: Any, values: Any) -> Any:
        if hasattr(values, "__len__"):
            self.count_turns(len(values))
            return values
        return self._each_counted(values)

    def _each_counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.count_turns(1)
            yield value

    def count_turns(self, turns: int) -> None:
        """So many turns of loops more.

        Raises:
            TemplateLimitError: There were too many.
        """
        self.loop_turns += turns
        if self.loop_turns > LOOP_TURNS_LIMIT:
            raise TemplateLimitError(f"time limit: more than {LOOP_TURNS_LIMIT:,} turns of its loops")

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return self.memo.ask(self.make_json, value, ensure_ascii, indent, separators, sort_keys)

    @staticmethod
    def make_json(value: Any, ensure_ascii: bool, indent: Any, separators: Any, sort_keys: bool) -> str:
        """What transformers gives to templates as `tojson`."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    @staticmethod
    def join_shown(parts: Iterable[Any]) -> str:
        """`a ~ b`."""
        return _join_limited(map(str, parts))

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
            return self.text_method(obj, attribute)
        return super().getattr(obj, attribute)

    @staticmethod
    def text_method(text: str, name: str) -> Any:
        """A method of a string."""
        return getattr(text, name)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
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


class _TracingCodeGenerator(_CodeGenerator):
    """What is printed is neither copied nor made plain: `finalize` gives a string already."""

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> None:
        self.write("environment.finalize(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> None:
        self.write(")")


class TracingEnvironment(ChatEnvironment):
    """Renders strings that keep their origin, and marks what is written for which message."""

    code_generator_class = _TracingCodeGenerator

    def __init__(self) -> None:
        super().__init__(finalize=shown)
        self.concat = limited_glue  # type: ignore[method-assign]
        own = self.filters["tojson"]
        self.filters = {name: followed(plain) for name, plain in self.filters.items()} | {"tojson": own}
        self.filters |= {"join": join, "replace": replace, "format": format_filter}
        self.filters |= {"lorafit_mark": self._mark, "lorafit_loop_end": _loop_end}

    make_json = staticmethod(tojson)

    def _mark_loops(self, tree: nodes.Template) -> None:
        """Puts a mark at the start of each loop's body and one behind the loop."""
        for number, loop in enumerate(list(tree.find_all(nodes.For))):
            targets = [loop.target, *loop.target.find_all(nodes.Name)]
            names = [target for target in targets if isinstance(target, nodes.Name)]
            marks: list[nodes.Expr] = [
                nodes.Filter(nodes.Name(name.name, "load"), "lorafit_mark", [nodes.Const(number)], [], None, None)
                for name in names
            ]
            loop.body.insert(0, _located(nodes.Output(marks), loop.lineno, self))
            # The `else` of a loop is no place for the end: it runs only where the loop did not.
            end = nodes.Filter(nodes.Const(None), "lorafit_loop_end", [nodes.Const(number)], [], None, None)
            loop.end_mark = _located(nodes.Output([end]), loop.lineno, self)  # type: ignore[attr-defined]
        _place_ends(tree)

    def _mark(self, value: Any, loop: int) -> str:
        """What the mark at the start of a loop's body prints: nothing, or which message the loop stands at."""
        self.count_turns(1)
        return _mark(FIRST_MESSAGE - value._index, loop) if type(value) is Record else ""

    @staticmethod
    def join_shown(parts: Iterable[Any]) -> str:
        """`a ~ b`."""
        return limited_glue(shown(part) for part in parts)

    @staticmethod
    def text_method(text: str, name: str) -> Any:
        """A method of a string, of which the result keeps its origin."""
        return getattr(text if type(text) is Typed else Typed(text, runs_of(text)), name)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return format_percent(left, right)
        return super().call_binop(context, operator, left, right)


def _join_limited(pieces: Iterable[str]) -> str:
    text = "".join(pieces)
    check_size(len(text))
    return text


def _mark(code: int, loop: int = 0) -> Typed:
    return Typed("", ((0, code, loop),))


@jinja2.pass_context  # so that the compiler does not take it for a constant
def _loop_end(_context: Any, _value: Any, loop: int) -> str:
    return _mark(LOOP_END, loop)


def _located(node: nodes.Stmt, line: int, environment: ChatEnvironment) -> nodes.Stmt:
    node.set_lineno(line, override=True)
    node.set_environment(environment)
    return node


def _place_ends(node: nodes.Node) -> None:
    for name in node.fields:
        value = getattr(node, name)
        if isinstance(value, list):
            setattr(node, name, [part for item in value for part in _with_end(item)])
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, nodes.Node):
                _place_ends(child)


def _with_end(item: Any) -> Iterator[Any]:
    yield item
    if isinstance(item, nodes.For) and hasattr(item, "end_mark"):
        yield item.end_mark


def _raise_exception(message: str) -> None:
    raise TemplateError(str.__str__(message))
