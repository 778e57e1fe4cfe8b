"""A value put into a mapping for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from typing import TypeVar

V = TypeVar("V")


@contextlib.contextmanager
def holding(mapping: MutableMapping[str, V], key: str, value: V) -> Iterator[None]:
    """Within it the mapping holds a value; then what it held before, or nothing."""
    is_held = key in mapping
    before = mapping.get(key, value)
    mapping[key] = value
    try:
        yield
    finally:
        del mapping[key]
        if is_held:
            mapping[key] = before
