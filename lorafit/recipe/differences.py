"""What differs between two recipes, leaf by leaf, in the words of a recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from lorafit.console.wording import agreed, list_names

ABSENT = object()
"""Stands for the value of a key that a recipe has not."""
_MOST_CHARACTERS = 40


def tell_differences(found: Sequence[str]) -> str:
    """The first of some differences between recipes, and the keys of those besides."""
    keys = [text.partition(": ")[0] for text in found[1:]]
    return found[0] + (f", and {list_names(keys)} {agreed(len(keys), 'differs', 'differ')} too" if keys else "")


def differences(key: str, before: Any, now: Any) -> list[str]:
    """What differs between two values of a key, item by item where both are lists of sections."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        names = dict.fromkeys([*before, *now])
        pairs = [(f"{key}.{name}", before.get(name, ABSENT), now.get(name, ABSENT)) for name in names]
        return [text for pair in pairs for text in differences(*pair)]
    if isinstance(before, list) and isinstance(now, list) and any(isinstance(item, dict) for item in before + now):
        numbered = enumerate(zip_longest(before, now, fillvalue=ABSENT))
        return [text for number, pair in numbered for text in differences(f"{key}[{number}]", *pair)]
    if before is ABSENT:
        return [f"{key}: {_as_written(now)} was added"]
    if now is ABSENT:
        return [f"{key}: {_as_written(before)} was taken away"]
    return [f"{key}: {_as_written(before)} was changed to {_as_written(now)}"]


def _as_written(value: Any) -> str:
    """A value as a recipe would hold it, in a few words."""
    if isinstance(value, dict):
        named = value.get("path", value.get("kind"))
        return _as_written(named) if named is not None else "a section"
    if isinstance(value, list):
        text = f"[{', '.join(_as_written(item) for item in value)}]"
        return text if len(text) <= _MOST_CHARACTERS else f"a list of {len(value)}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MOST_CHARACTERS else f"…{text[1 - _MOST_CHARACTERS :]}"
