"""The filters and formats of chat templates, written so that strings keep their origin (`traced_text`).

Every other filter of Jinja is `followed`: where its result lost the origin of what went in, it is blurred.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any

import jinja2
from jinja2.exceptions import TemplateError
from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter

from lorafit.contracts import JsonMapping
from lorafit.data.chat.traced_text import BLURRED, TEMPLATE, WHOLE, Typed, blur, format_percent, glue, runs_of, shown

TEXT_LIMIT_CHARACTERS = 50_000_000


class TemplateLimitError(TemplateError):
    """The template ran longer, or wrote more, than any chat needs."""


def check_size(size: float) -> None:
    if size > TEXT_LIMIT_CHARACTERS:
        raise TemplateLimitError(f"size limit: more than {TEXT_LIMIT_CHARACTERS:,} characters")


def limited_glue(pieces: Iterable[str]) -> str:
    text = glue(pieces)
    check_size(len(text))
    return text


def followed(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is blurred where it lost the origin of what went in."""

    @wraps(plain)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        if isinstance(result, str) and not isinstance(result, Typed):
            return blur(result, *args, kwargs)
        return result

    return filtered


@jinja2.pass_environment
def join(environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = [environment.getitem(item, attribute) for item in value]
    return Typed(d, runs_of(d)).join(shown(item) for item in value)


def replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text = shown(value)
    return Typed(text, runs_of(text)).replace(shown(old), shown(new), -1 if count is None else count)


def format_filter(value: Any, *args: Any, **kwargs: Any) -> str:
    return format_percent(shown(value), kwargs or args)


def format_braces(environment: SandboxedEnvironment, pattern: str, args: Sequence[Any], kwargs: JsonMapping) -> str:
    """`pattern.format(...)` in the sandbox; followed for bare fields, blurred for those with a conversion or a
    format.
    """
    formatter = SandboxedFormatter(environment)
    pieces: list[str] = []
    automatic = 0
    for literal, name, specification, conversion in formatter.parse(pattern):
        pieces.append(blur(literal, pattern))
        if name is None:
            continue
        if not name or name[0] in ".[":
            name, automatic = f"{automatic}{name}", automatic + 1
        value, _ = formatter.get_field(name, args, kwargs)
        if not specification and not conversion:
            pieces.append(shown(value))
            continue
        filled = formatter.vformat(specification or "", args, kwargs)
        digits = "".join(c if c.isdigit() else " " for c in filled).split()
        check_size(max(map(int, digits), default=0))
        pieces.append(blur(formatter.format_field(formatter.convert_field(value, conversion), filled), value))
    return limited_glue(pieces)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`json.dumps` (as transformers gives it to templates) that keeps the origin of strings and keys."""
    plain = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    escape = encode_basestring_ascii if ensure_ascii else encode_basestring
    pieces: list[str] = []
    place = 0
    for text in _strings(value, sort_keys):  # in their order: no other quote stands between two of them
        begin = plain.find('"', place) + 1
        pieces.append(plain[place:begin])
        place, first = begin, 0
        for length, origin, start in runs_of(text):
            escaped = escape(str.__getitem__(text, slice(first, first + length)))[1:-1]
            start = start if len(escaped) == length or start == BLURRED else WHOLE
            pieces.append(escaped if origin == TEMPLATE else Typed(escaped, ((len(escaped), origin, start),)))
            place, first = place + len(escaped), first + length
        pieces.append('"')
        place += 1
    pieces.append(plain[place:])
    text = glue(pieces)
    return text if text == plain else blur(plain, value)


def _strings(value: Any, sort_keys: bool) -> Iterator[str]:
    """The strings of a value in the order in which its JSON has them, keys that are none (`1`, `null`) as it has
    them.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in sorted(value.items()) if sort_keys else value.items():
            yield key if isinstance(key, str) else json.loads(json.dumps({key: 0}).partition(": ")[0][1:])
            yield from _strings(item, sort_keys)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item, sort_keys)
