"""A weighted sum as a person writes it, `0.7*a + 0.3*(b - c)`, read into a weight for each name.

sum      term  (+ | -) term ...
term     factor * factor ...            at most one of them holds names: a product of two adapters is none
factor   number | name | (sum) | + factor | - factor
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from lorafit.console.nearest import did_you_mean
from lorafit.errors import UsageError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
"""What an adapter may be called in a sum: no `-`, which takes one from another."""
_NUMBER = re.compile(r"(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_DEEPEST = 50


@dataclass(frozen=True)
class _Value:
    """What a part of the text stands for: a number, or a sum of names."""

    number: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)

    def times(self, factor: float) -> _Value:
        return _Value(self.number * factor, {name: weight * factor for name, weight in self.weights.items()})


def read_sum(text: str, known: Collection[str]) -> dict[str, float]:
    """The weight of each name of the sum, in the order in which they are written first.

    Args:
        text: The sum.
        known: Names of the adapters.

    Raises:
        UsageError: It is none; says where, and the nearest name where one is unknown.
    """
    reader = _Reader(text, known)
    value = reader.sum()
    if reader.at < len(text):
        raise reader.error("an operator is missing" if reader.begins_factor() else f"'{text[reader.at]}' is not read")
    if not all(math.isfinite(number) for number in (value.number, *value.weights.values())):
        raise reader.error("a weight is too large", 0)
    if value.number or not value.weights:
        raise reader.error("a number alone is no adapter", 0)
    return value.weights


class _Reader:
    """Reads from left to right.

    Attributes:
        at: Where it is.
    """

    def __init__(self, text: str, known: Collection[str]) -> None:
        self._text, self._known, self.at, self._depth = text, known, 0, 0
        self._skip_blanks()

    def error(self, what: str, at: int | None = None, todo: str = "") -> UsageError:
        """With the place, counted from 1."""
        place = (self.at if at is None else at) + 1
        todo = todo or 'write names, numbers, + - * and parentheses, e.g. "0.7*a + 0.3*b - c"'
        return UsageError(f"character {place}: {what}", key="SUM", todo=todo)

    def begins_factor(self) -> bool:
        """Whether a number, a name or a parenthesis stands here."""
        here = self._text[self.at : self.at + 1]
        return here == "(" or bool(_NUMBER.match(self._text, self.at) or NAME.match(self._text, self.at))

    def sum(self) -> _Value:
        """Terms with their signs."""
        total = self._term()
        while sign := self._take("+-"):
            term = self._term().times(-1.0 if sign == "-" else 1.0)
            weights = dict(total.weights)
            for name, weight in term.weights.items():
                weights[name] = weights.get(name, 0.0) + weight
            total = _Value(total.number + term.number, weights)
        return total

    def _term(self) -> _Value:
        product = self._factor()
        while True:
            at = self.at
            if not self._take("*"):
                return product
            factor = self._factor()
            if product.weights and factor.weights:
                raise self.error("two adapters cannot be multiplied, only summed", at)
            product = factor.times(product.number) if factor.weights else product.times(factor.number)

    def _factor(self) -> _Value:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self.error("it is nested too deep")
        at = self.at
        if sign := self._take("+-"):
            value = self._factor().times(-1.0 if sign == "-" else 1.0)
        elif self._take("("):
            value = self.sum()
            if not self._take(")"):
                raise self.error("a ) is missing")
        elif number := self._match(_NUMBER):
            value = _Value(number=float(number))
            if not math.isfinite(value.number):
                raise self.error("a number is too large", at)
        elif name := self._match(NAME):
            if name not in self._known:
                todo = f"{did_you_mean(name, self._known)}known: {', '.join(self._known)}; add --adapter {name}=DIR"
                raise self.error(f"no adapter is called '{name}'", at, todo)
            value = _Value(weights={name: 1.0})
        else:
            raise self.error("a number, a name or ( is missing")
        self._depth -= 1
        return value

    def _match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self.at)
        if found is None:
            return ""
        self.at = found.end()
        self._skip_blanks()
        return found[0]

    def _take(self, signs: str) -> str:
        """The sign that stands here, if it is one of these; empty where not."""
        here = self._text[self.at : self.at + 1]
        if not here or here not in signs:
            return ""
        self.at += 1
        self._skip_blanks()
        return here

    def _skip_blanks(self) -> None:
        while self._text[self.at : self.at + 1].isspace():
            self.at += 1
