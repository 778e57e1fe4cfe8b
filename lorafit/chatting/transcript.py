"""Conversations in files that `lorafit train` reads: JSON lines, one added for each that is saved."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path

from lorafit.console.wording import counted
from lorafit.contracts import JsonObject
from lorafit.errors import DataError, UsageError
from lorafit.files.atomic import atomic_file


class Transcript:
    """Remembers what it saved, so that a conversation that goes on replaces its own lines."""

    def __init__(self) -> None:
        self._saved: dict[Path, str] = {}

    def forget(self) -> None:
        """What was saved so far stays as it is: another conversation begins."""
        self._saved.clear()

    def save(self, file: Path, rows: Sequence[JsonObject]) -> str:
        """Adds rows to a file, which is made where it is not there. Gives what to tell the user.

        Raises:
            UsageError: The file is none of JSON lines, or there is nothing to train on.
            DataError: It cannot be read.
        """
        if file.suffix != ".jsonl" or file.is_dir():
            raise UsageError("is no file of JSON lines", file=str(file), todo="name one that ends in .jsonl")
        if not rows:
            raise UsageError("there is no whole answer to train on yet", key="/save", todo="write a message first")
        if not file.parent.is_dir():
            here = next(folder for folder in file.absolute().parents if folder.is_dir())
            raise UsageError(f"no such folder; {here} is the nearest", file=str(file.parent), todo="make it first")
        try:
            before = file.read_text(encoding="utf-8") if file.exists() else ""
        except UnicodeDecodeError:
            raise DataError("is no text in UTF-8", file=str(file), todo="name another file") from None
        for number, line in enumerate(before.split("\n"), 1):
            if line.strip() and not _is_row(line):
                todo = "name another file: lorafit train could not read this one"
                raise DataError(f"line {number} is no JSON object", file=str(file), todo=todo)
        own = self._saved.get(file.resolve())
        before = before.removesuffix(own) if own else before
        if before and not before.endswith("\n"):
            before += "\n"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        mode = file.stat().st_mode if file.exists() else None
        with atomic_file(file) as made:
            made.write_text(before + lines, encoding="utf-8")
        if mode is not None:  # who may read it stays as it was
            file.chmod(stat.S_IMODE(mode))
        self._saved[file.resolve()] = lines
        return f"{counted(len(rows), 'row')} in {file}" + (
            f", behind {counted(before.count(chr(10)), 'line')} that stood there" if before else ""
        )


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
