"""Keys that people know from other tools, and ours for them: `configs/foreign_names.yaml`, read when one is met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from lorafit.machine.shipped import shipped

_FEWEST_KEYS = 3  # of one tool, by which a recipe is taken for that tool's

Answer = str | Mapping[bool | str, str]
"""Our key, and words behind `: ` that say what differs; or the words alone. By the value where that decides."""


@cache
def _table() -> Mapping[str, Any]:
    import yaml

    table: Mapping[str, Any] = yaml.safe_load(shipped("foreign_names.yaml").read_text(encoding="utf-8"))
    return table


def foreign_names() -> Mapping[str, Answer]:
    """What to say to a key of another tool, anywhere in a recipe."""
    names: Mapping[str, Answer] = _table()["anywhere"]
    return names


def names_in_a_source() -> Mapping[str, str]:
    """Our key for another tool's, inside a source of rows."""
    names: Mapping[str, str] = _table()["in_a_source"]
    return names


def is_not_yet(family: str, kind: str) -> bool:
    """Whether a kind is known of other tools and does not exist here yet, e.g. the adapter `dora`."""
    return kind.strip().lower().replace("-", "_") in _table()["not_yet"].get(family, ())


def tool_of(keys: Iterable[str]) -> str | None:
    """The tool whose recipe has such keys; None where they do not tell."""
    held = set(keys)
    known = {tool: len(held & set(marks)) for tool, marks in _table()["tools"].items()}
    tool = max(known, key=lambda name: known[name])
    return tool if known[tool] >= _FEWEST_KEYS else None
