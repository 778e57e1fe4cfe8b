"""Rows that a program holds in memory, as files that a recipe can name: they lie in the cache by their content.

    rows=[{...}, {...}] ──> CACHE/rows/<sha256>/rows.jsonl ──> data.train=[{path: ...}] over the recipe

The same rows are the same file, so that a resume finds its run again. Messages call them by the parameter, `rows[2]`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from lorafit.contracts import JsonMapping
from lorafit.errors import DataError
from lorafit.files.atomic import atomic_file
from lorafit.files.cache import cache_folder, own_folder


def keep_rows(rows: Iterable[JsonMapping], name: str, key: str) -> str:
    """Writes rows into the cache.

    Args:
        name: The parameter that they were given as, one of `errors.IN_MEMORY`.
        key: What they stand in for, e.g. `data.train`.

    Returns:
        The flag that puts their file over a recipe.

    Raises:
        DataError: There are none, or one is no dict of plain values.
    """
    content = _as_lines(rows, name, key)
    file = own_folder(cache_folder() / "rows" / hashlib.sha256(content).hexdigest()) / f"{name}.jsonl"
    if not file.is_file():
        with atomic_file(file) as temporary:
            temporary.write_bytes(content)
    return f"{key}={json.dumps([{'path': str(file.absolute())}])}"


def _as_lines(rows: Iterable[JsonMapping], name: str, key: str) -> bytes:
    """Rows as jsonl."""
    lines = []
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, Mapping):
                raise TypeError(f"expected a dict, found {type(row).__name__}")
            lines.append(f"{json.dumps(dict(row), ensure_ascii=False)}\n".encode())
        except (TypeError, ValueError, RecursionError) as error:
            what = str(error).splitlines()[0]
            raise DataError(what, file=f"{name}[{number}]", key=key, todo="give dicts of plain values") from None
    if not lines:
        raise DataError("there are no rows", file=name, key=key, todo="give at least one")
    return b"".join(lines)
