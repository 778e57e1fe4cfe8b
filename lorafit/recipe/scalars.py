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
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MOST_DIGITS = 40
_FIRST_ZEROS = re.compile(r"^([-+]?)0+(?=[0-9])")
_UNCLEAR = (  # the form of a word, why it is ambiguous, what to write instead: `{}` is its digits in base 10
    (re.compile(r"[-+]?0[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?"), "octal to YAML 1.1", "{}"),
    (re.compile(r"[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?"), "a base-60 number to YAML 1.1", "a number"),
    (
        re.compile(
            r"[-+]?([0-9]+_[0-9_]*(\.[0-9_]*)?|[0-9]+\.[0-9]*_[0-9_]*|0x[0-9a-fA-F]*_[0-9a-fA-F_]*)([eE][-+]?[0-9]+)?"
        ),
        "a number to YAML 1.1, text to 1.2",
        "{}",
    ),
    (re.compile(r"[-+]?0([bB][01_]+|[oO][0-7_]+|X[0-9a-fA-F_]+)"), "YAML 1.1 and 1.2 disagree", "a decimal number"),
)


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
    return _read_float(text) if _FLOAT.fullmatch(text) else text


def _refuse_unclear(text: str) -> None:
    reading = _YAML11_BOOL.get(text.lower())
    if reading is not None:
        what = f"'{text}' is ambiguous (YAML 1.1 reads {reading})"
        raise UnclearScalarError(what, f'quote it ("{text}") or write {reading}')
    short = text[:_MOST_DIGITS]
    for form, why, instead in _UNCLEAR:
        if form.fullmatch(text):
            digits = _FIRST_ZEROS.sub(r"\1", text.replace("_", ""))[:_MOST_DIGITS]
            todo = f'quote it ("{short}") or write {instead.format(digits)}'
            raise UnclearScalarError(f"'{short}' is ambiguous ({why})", todo)
    if _NOT_FINITE.fullmatch(text):
        raise UnclearScalarError(f"'{text}' is not a finite number", "write a number, or quote it if it is text")


def _read_float(text: str) -> float:
    number = float(text)
    mantissa = re.split("[eE]", text)[0]
    if number in (float("inf"), float("-inf")) or (number == 0 and re.search("[1-9]", mantissa)):
        what = f"'{text}' is outside the numbers a computer holds"
        raise UnclearScalarError(what, "write a number, or quote it if it is text")
    return number
