"""Fields that hold a name out of a list, and how a name that is not in it was probably meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pydantic_core import core_schema

from lorafit.console.nearest import nearest
from lorafit.recipe.foreign import fold, foreign, is_not_yet

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue

LARGEST_COUNT = 2**31 - 1
"""Whole numbers up to this fit the counters of every library below."""


def same_word(word: str, known: Iterable[str]) -> str:
    """The word among `known` that is `word`, written differently or as another tool has it; empty where none is."""
    known = list(known)
    words = foreign()["words"]
    ours = words.get(fold(word), words.get(word.strip().lower(), ""))
    return next((name for name in known if fold(name) == fold(word)), ours if ours in known else "")


def suggest_word(word: str, known: Iterable[str]) -> str:
    """`did you mean lora? ` for a word that is not among `known`, or nothing."""
    known = list(known)
    same = same_word(word, known)
    close = [same] if same else nearest(word.strip(), known, count=2)
    return f"did you mean {' or '.join(close)}? " if close else ""


class OneNameOf:
    """Annotation of text that must be one of `names()`; its error lists the nearest and all of them."""

    def __init__(self, what: str, names: Callable[[], list[str]]) -> None:
        self.what, self.names = what, names

    def __call__(self, value: str) -> str:
        """The name itself.

        Raises:
            ValueError: It is none of them.
        """
        known = self.names()
        if value in known:
            return value
        if is_not_yet(self.what, value):
            raise ValueError(f"{self.what} '{value}' does not exist yet; available: {', '.join(known)}")
        raise ValueError(f"unknown {self.what} '{value}'; {suggest_word(value, known)}available: {', '.join(known)}")

    def __get_pydantic_core_schema__(self, source: type[str], handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": self.names()}
