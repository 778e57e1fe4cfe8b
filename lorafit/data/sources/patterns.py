"""Paths that stand for several files: `rows/*.jsonl`, `rows/**/*.csv.gz`, `rows/part-[0-9].json`."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lorafit.errors import DataError
from lorafit.recipe.paths import is_pattern

if TYPE_CHECKING:
    from lorafit.recipe.schema import SourceSection

MOST_FILES = 10_000
AnySource = TypeVar("AnySource", bound="SourceSection")


def find_files(path: str, folder: Path, *, start: str = "the recipe's folder") -> list[str]:
    """The files that a pattern stands for, sorted by name; the path itself where it is no pattern.

    A pattern holds `*`, `?` or `[...]`, and is no file's own name; `**` stands for folders of any depth.

    Args:
        path: A path, a pattern, or a hub id.
        folder: Where relative ones start.
        start: What messages call that folder.

    Raises:
        DataError: No file matches, or more than `MOST_FILES` do.
    """
    pattern = str(Path(path).expanduser())
    if not is_pattern(path) or os.path.lexists(folder / pattern):
        return [path]
    matches = glob.iglob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207 - absolute patterns, no hidden files
    found = sorted(islice((name for name in matches if (folder / name).is_file()), MOST_FILES + 1))
    if not found:
        raise DataError("no file matches the pattern", file=path, todo=f"patterns start in {start}; ** is any folders")
    if len(found) > MOST_FILES:
        raise DataError(f"more than {MOST_FILES:,} files match", file=path, todo="put their rows into fewer files")
    return found


def expand_sources(sources: Iterable[AnySource], folder: Path) -> list[AnySource]:
    """Sources of one file each: one whose path is a pattern becomes a source for each of its files, alike but for that.

    Raises:
        DataError: As `find_files`.
    """
    return [
        source if name == source.path else source.model_copy(update={"path": name})
        for source in sources
        for name in find_files(source.path, folder)
    ]
