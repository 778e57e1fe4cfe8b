"""Reading the fields of a row: the right type, or an error that names the field and what was found instead."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from lorafit.console.nearest import nearest
from lorafit.contracts import JsonMapping
from lorafit.errors import DataError, MissingFieldError
from lorafit.files.strict_json import JsonError, parse_json

Row = JsonMapping

MUST_CONTAIN, PARAPHRASES = "must_contain", "paraphrases"
CHECKS: Mapping[str, bool] = {MUST_CONTAIN: False, PARAPHRASES: False}
"""Fields that tell metrics over answers what to look for, as `Format.fields` has them."""
_RENAME, _OR_MAP = "rename it", ", or map it with columns: "
_COMMA_NUMBER = re.compile(r"[-+]?\d+,\d+")
_TYPE_NAMES = {dict: "object", list: "list", str: "string", bool: "boolean", int: "integer", float: "number"}


def describe(value: Any) -> str:
    """A value's type in JSON's words, with the value where it is short: `integer 1`, `null`, `list`."""
    if value is None:
        return "null"
    name = _TYPE_NAMES.get(type(value), type(value).__name__)
    if isinstance(value, str):
        return f"{name} '{shorten(value)}'"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return f"{name} {value}" if isinstance(value, int | float) else name


def shorten(text: str, length: int = 30) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= length else text[: length - 1] + "…"


def listed(names: Iterable[Any], count: int = 8) -> str:
    """Names behind each other, the first `count` of them."""
    names = [shorten(str(name)) for name in names]
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def missing_field(name: str, row: Row) -> MissingFieldError:
    """The error for a row without a field it needs; names the column that was probably meant."""
    if not row:
        return MissingFieldError(f"empty row: missing field '{name}'", key=name)
    close = nearest(name, [key for key in row if isinstance(key, str)], count=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    todo = f"{hint}{_RENAME}{_OR_MAP}{{{name}: {close[0] if close else 'THEIRS'}}}"
    return MissingFieldError(f"missing field '{name}'; found {listed(row)}", key=name, todo=todo)


def advise_renaming(error: MissingFieldError) -> None:
    """Changes the advice to what can be done with rows that no recipe names, whose columns nothing maps."""
    error.todo = error.todo and error.todo.partition(_OR_MAP)[0]


def wrong_type(name: str, expected: str, value: Any) -> DataError:
    """The error for a field of another type."""
    return DataError(f"expected {expected}, found {describe(value)}", key=name)


def as_number(value: object, name: str, expected: str = "a number") -> float:
    """A finite number, or what a table's cell writes of one.

    Raises:
        DataError: It is none.
    """
    if isinstance(value, str):
        written = value.strip()
        try:
            value = float(written)
        except ValueError:
            error = wrong_type(name, expected, value)
            if _COMMA_NUMBER.fullmatch(written):
                error.todo = f"write {written.replace(',', '.')}, with a decimal point"
            raise error from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong_type(name, expected, value)
    return float(value)


def read_string(row: Row, name: str) -> str:
    """A string that must be there and may be empty.

    Raises:
        DataError: It is missing or of another type.
    """
    if name not in row:
        raise missing_field(name, row)
    value = row[name]
    if not isinstance(value, str):
        raise wrong_type(name, "string", value)
    return value


def read_filled_string(row: Row, name: str) -> str:
    """A string that must be there and hold more than blanks.

    Raises:
        DataError: It is missing, blank or of another type.
    """
    value = read_string(row, name)
    if not value.strip():
        raise DataError("is empty", key=name)
    return value


def read_optional_string(row: Row, name: str) -> str:
    """A string that may be missing or null, and is empty then.

    Raises:
        DataError: It is of another type.
    """
    return "" if row.get(name) is None else read_string(row, name)


def read_filled_or_none(row: Row, name: str) -> str | None:
    """A string that may be missing or null; one that is there holds more than blanks.

    Raises:
        DataError: It is blank or of another type.
    """
    return None if row.get(name) is None else read_filled_string(row, name)


def read_must_contain(row: Row) -> tuple[str, ...]:
    """Strings that a right answer holds: one string, a list of them, or (from a table) a JSON list as a string.

    Raises:
        DataError: It is something else, or one of them is empty and would be met by any answer.
    """
    return _read_strings(row, MUST_CONTAIN, "holds an empty string, which every answer contains")


class Checks(TypedDict):
    """What `CHECKS` hold: strings that a right answer holds, and other ways to say the user's last words."""

    must_contain: tuple[str, ...]
    paraphrases: tuple[str, ...]


def read_checks(row: Row) -> Checks:
    """The fields of `CHECKS`; `paraphrases` is written as `must_contain` is.

    Raises:
        DataError: One is something else, or holds an empty string.
    """
    paraphrases = _read_strings(row, PARAPHRASES, "holds an empty string, which says nothing")
    return {"must_contain": read_must_contain(row), "paraphrases": paraphrases}


def _read_strings(row: Row, name: str, empty: str) -> tuple[str, ...]:
    value = row.get(name)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = read_json_list(value, name) if value.lstrip().startswith('["') else [value]
    if not isinstance(value, list):
        raise wrong_type(name, "string or list of strings", value)
    for item in value:
        if not isinstance(item, str):
            raise wrong_type(name, "list of strings", item)
        if not item.strip():
            raise DataError(empty, key=name)
    return tuple(value)


def read_json_list(text: str, name: str) -> list[Any]:
    """A JSON list that stands in a string, as tables hold it.

    Raises:
        DataError: It is no valid JSON, or no list.
    """
    value = read_json(text, name)
    if not isinstance(value, list):
        raise wrong_type(name, "list", value)
    return value


def read_json(text: str, name: str) -> Any:
    """The JSON value that stands in a string.

    Raises:
        DataError: It is no valid JSON.
    """
    try:
        return parse_json(text)
    except JsonError as error:
        todo = "write it as JSON, with double quotes" if text.lstrip().startswith(("['", "{'")) else ""
        raise DataError(error.what, key=name, todo=todo) from None
