"""What an unquoted word of a recipe means. Words that YAML 1.1 and 1.2 read differently are refused instead of guessed.

Source: YAML 1.2.2, section 10.3 (core schema), and the YAML 1.1 type repository (yaml.org/type: bool, int, float).
"""

from __future__ import annotations

import re

Scalar = str | int | float | bool | None

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_YAML11_BOOL = {"y": "true", "yes": "true", "on": "true", "n": "false", "no": "false", "off": "false"}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?")
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?")
_UNDERSCORES = re.compile(
    r"[-+]?([0-9]+_[0-9_]*(\.[0-9_]*)?|[0-9]+\.[0-9]*_[0-9_]*|0x[0-9a-fA-F]*_[0-9a-fA-F_]*)([eE][-+]?[0-9]+)?"
)
_OTHER_BASE = re.compile(r"[-+]?0([bB][01_]+|[oO][0-7_]+|X[0-9a-fA-F_]+)")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MOST_DIGITS = 40


class UnclearScalarError(Exception):
    """An unquoted word that could mean two things, or no number at all.

    Attributes:
        what: What is wrong with it.
        todo: What to write instead.
    """

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(what)
        self.what, self.todo = what, todo


def read_scalar(text: str) -> Scalar:
    """The value of an unquoted word: null, a boolean, a finite number, or text. `2e-4` is a number; dates are text.

    Raises:
        UnclearScalarError: YAML 1.1 and 1.2 disagree about it, or it is a number that no computer holds.
    """
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    _refuse_unclear(text)
    if len(text) > _MOST_DIGITS and _FLOAT.fullmatch(text):
        raise UnclearScalarError(f"a number of {len(text)} digits", "write a shorter number, or quote it")
    if _INTEGER.fullmatch(text):
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return _read_float(text)
    return text


def _refuse_unclear(text: str) -> None:
    reading = _YAML11_BOOL.get(text.lower())
    if reading is not None:
        raise UnclearScalarError(
            f"'{text}' is ambiguous (YAML 1.1 reads {reading})", f'quote it ("{text}") or write {reading}'
        )
    short = text[:_MOST_DIGITS]
    if _LEADING_ZERO.fullmatch(text):
        plain = text.replace("_", "").lstrip("+-0") or "0"
        raise UnclearScalarError(
            f"'{short}' is ambiguous (octal to YAML 1.1)", f'quote it ("{short}") or write {plain[:_MOST_DIGITS]}'
        )
    if _BASE_60.fullmatch(text):
        raise UnclearScalarError(
            f"'{short}' is ambiguous (a base-60 number to YAML 1.1)", f'quote it ("{short}") or write a number'
        )
    if _UNDERSCORES.fullmatch(text):
        plain = text.replace("_", "")[:_MOST_DIGITS]
        raise UnclearScalarError(
            f"'{short}' is ambiguous (a number to YAML 1.1, text to 1.2)", f'quote it ("{short}") or write {plain}'
        )
    if _OTHER_BASE.fullmatch(text):
        raise UnclearScalarError(
            f"'{short}' is ambiguous (YAML 1.1 and 1.2 disagree)", f'quote it ("{short}") or write a decimal number'
        )
    if _NOT_FINITE.fullmatch(text):
        raise UnclearScalarError(f"'{text}' is not a finite number", "write a number, or quote it if it is text")


def _read_float(text: str) -> float:
    number = float(text)
    mantissa = re.split("[eE]", text)[0]
    if number in (float("inf"), float("-inf")) or (number == 0 and re.search("[1-9]", mantissa)):
        raise UnclearScalarError(
            f"'{text}' is outside the numbers a computer holds", "write a number, or quote it if it is text"
        )
    return number
