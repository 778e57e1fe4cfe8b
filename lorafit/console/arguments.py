"""What an argument may be, by its name: the same for a flag of the command line and a parameter of Python.

    --temperature 99 ──typer, with these ranges──┐
                                                 ├──> check_arguments ──> UsageError: --temperature: found 99, ...
    generate(run, "hi", temperature="hot") ──────┘

Whether a value goes together with the recipe and the other arguments is for whoever takes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lorafit.contracts import JsonMapping
from lorafit.errors import UsageError

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Number:
    """A number in a range, or a whole one."""

    least: float | None = None
    most: float | None = None
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Whether the value is one: no text, no truth value, not NaN; a whole one stands for a float as well."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        if not self.whole and not math.isfinite(value):
            return False
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    @property
    def expected(self) -> str:
        """In words."""
        name = "a whole number" if self.whole else "a number"
        if self.least is not None and self.most is not None:
            return f"{name} from {self.least:g} to {self.most if self.whole else f'{self.most:g}'}"
        return name if self.least is None else f"{name}, {self.least:g} or more"


@runtime_checkable
class _Run(Protocol):
    """What training gives back, as far as an argument may be one."""

    @property
    def path(self) -> Path: ...


@dataclass(frozen=True)
class Other:
    """Anything but a number: in words, and of which types. A text with a NUL character is no path."""

    expected: str
    types: tuple[type, ...]

    def holds(self, value: Any) -> bool:
        """Whether the value is one; what is in a series, is for its reader."""
        if os.PathLike in self.types and isinstance(value, str | os.PathLike) and "\0" in str(os.fspath(value)):
            return False
        if isinstance(value, bool | str | bytes | Mapping):  # to Python a number or a series as well
            return isinstance(value, tuple(one for one in self.types if one not in (int, Iterable)))
        return isinstance(value, self.types)


_PATH = Other("a path", (str, os.PathLike))
_ROWS = Other("a list of dicts, one a row", (Iterable,))
_CARD = Other('a text such as "24GiB", "rtx-4090" or "cpu"', (str,))
NUMBERS = {
    "temperature": Number(0.0, 10.0),
    "top_p": Number(0.001, 1.0),
    "max_new_tokens": Number(1, whole=True),
    "seed": Number(0, whole=True),
    "limit": Number(1, whole=True),
    "resume_from": Number(0, whole=True),
    "show": Number(0, whole=True),
    "headroom": Number(0.0, 0.9),
    "price_per_hour": Number(),
}
"""Every argument that is a number."""

_SWITCHES = ("quiet", "exact", "resume", "dry_run", "allow_inexact", "verify", "compare_base")
_KINDS: dict[str, Number | Other] = {
    **NUMBERS,
    "recipe": Other("a recipe's file, or its values as a dict", (str, os.PathLike, Mapping)),
    "run": Other("a run: what train gave back, or a path", (str, os.PathLike, _Run)),
    "output": _PATH,
    "plan_file": _PATH,
    "base_model": Other("a path or a hub id", _PATH.types),
    "rows": _ROWS,
    "validation_rows": _ROWS,
    "test_rows": _ROWS,
    "prompts": Other("a text, or a list of texts and dicts", (str, Iterable)),
    "overrides": Other('a dict such as {"training.epochs": 1}, or a list of KEY=VALUE', (Mapping, Iterable)),
    "checkpoint": Other('"best", "last" or a step', (str, int)),
    "split": Other('"test", "validation" or "train"', (str,)),
    "base": Other('"dequantized" or "original"', (str,)),
    "gpu": _CARD,
    "fit": _CARD,
    **dict.fromkeys(_SWITCHES, Other("True or False", (bool,))),
}
_NEVER_LEFT_OUT = {"recipe", "run", "prompts", "overrides", "temperature", "top_p", "max_new_tokens", "seed"}
_NEVER_LEFT_OUT.update(_SWITCHES)


def check_arguments(arguments: JsonMapping, required: Collection[str] = ()) -> None:
    """Checks each value by its argument's name.

    Args:
        arguments: Values by the names of Python's parameters.
        required: Names that may not be None here, beside those that never may.

    Raises:
        UsageError: One is of another type or out of range; its key is the flag, `--max-new-tokens`.
    """
    for name, value in arguments.items():
        kind = _KINDS[name]
        if value is None and name not in _NEVER_LEFT_OUT and name not in required:
            continue
        if not kind.holds(value):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"found {_shown(value)}", key=flag, todo=f"give {kind.expected}")


def _shown(value: Any) -> str:
    """A value as it was written, with its type where that is not plain."""
    try:
        text = repr(value)
    except Exception:  # an object of the user's, whose own code fails
        text = "a value"
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
    return text if value is None or isinstance(value, bool | int | float | str) else f"{text} ({type(value).__name__})"
