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
from typing import Any

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


@dataclass(frozen=True)
class Text:
    """A text, or a whole number where `or_number`."""

    expected: str
    or_number: bool = False

    def holds(self, value: Any) -> bool:
        """Whether the value is one."""
        return isinstance(value, str) or (self.or_number and isinstance(value, int) and not isinstance(value, bool))


@dataclass(frozen=True)
class Switch:
    """True or False."""

    expected: str = "True or False"

    def holds(self, value: Any) -> bool:
        """Whether the value is one."""
        return isinstance(value, bool)


@dataclass(frozen=True)
class Place:
    """A path; or, where `what` says so, a recipe's values or a finished run."""

    expected: str
    or_values: bool = False
    or_run: bool = False

    def holds(self, value: Any) -> bool:
        """Whether the value is one."""
        if self.or_values and isinstance(value, Mapping):
            return True
        if self.or_run and isinstance(getattr(value, "path", None), Path):
            return True
        return isinstance(value, str | os.PathLike) and "\0" not in str(os.fspath(value))


@dataclass(frozen=True)
class Several:
    """A list or another series; a text, or a dict, where that is a form of it."""

    expected: str
    or_text: bool = False
    or_dict: bool = False

    def holds(self, value: Any) -> bool:
        """Whether the value is one; what is in it, is for its reader."""
        if isinstance(value, str):
            return self.or_text
        if isinstance(value, Mapping):
            return self.or_dict
        return isinstance(value, Iterable) and not isinstance(value, bytes)


Kind = Number | Text | Switch | Place | Several

_ROWS = Several("a list of dicts, one a row")
_CARD = Text('a text such as "24GiB", "rtx-4090" or "cpu"')
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

_KINDS: dict[str, Kind] = {
    **NUMBERS,
    "recipe": Place("a recipe's file, or its values as a dict", or_values=True),
    "run": Place("a run: what train gave back, or a path", or_run=True),
    "output": Place("a path"),
    "plan_file": Place("a path"),
    "base_model": Place("a path or a hub id"),
    "rows": _ROWS,
    "validation_rows": _ROWS,
    "test_rows": _ROWS,
    "prompts": Several("a text, or a list of texts and dicts", or_text=True),
    "overrides": Several('a dict such as {"training.epochs": 1}, or a list of KEY=VALUE', or_dict=True),
    "checkpoint": Text('"best", "last" or a step', or_number=True),
    "split": Text('"test", "validation" or "train"'),
    "base": Text('"dequantized" or "original"'),
    "gpu": _CARD,
    "fit": _CARD,
    **dict.fromkeys(
        ("quiet", "exact", "resume", "dry_run", "allow_inexact", "verify", "compare_base"),
        Switch(),
    ),
}
_NEVER_LEFT_OUT = {"recipe", "run", "prompts", "overrides", "temperature", "top_p", "max_new_tokens", "seed"}
_NEVER_LEFT_OUT |= {name for name, kind in _KINDS.items() if isinstance(kind, Switch)}


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
            raise UsageError(f"found {_shown(value)}", key=as_flag(name), todo=f"give {kind.expected}")


def as_flag(parameter: str) -> str:
    """`--max-new-tokens` of `max_new_tokens`."""
    return f"--{parameter.replace('_', '-')}"


def _shown(value: Any) -> str:
    """A value as it was written, with its type where that is not plain."""
    try:
        text = repr(value)
    except Exception:  # an object of the user's, whose own code fails
        text = "a value"
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
    return text if value is None or isinstance(value, bool | int | float | str) else f"{text} ({type(value).__name__})"
