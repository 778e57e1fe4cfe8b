"""metrics.jsonl, the log of a run: a line a step and a line an evaluation, without gaps or doubles over resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.contracts import JsonMapping
from lorafit.files.atomic import atomic_file

if TYPE_CHECKING:
    from lorafit.contracts import Reporter


class MetricsLog:
    """Appends JSON objects. A write that fails is said once and tried again with the next line; training goes on."""

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self._path = path
        self._reporter = reporter
        self._unwritten = ""
        self._said = False

    def rewind(self, *, step: int, evaluated_step: int) -> None:
        """Drops what lies behind the edge at `step`, and a torn last line."""
        if not self._path.is_file():
            return
        text = self._path.read_bytes().decode("utf-8", errors="replace")
        kept = [line for line in text.splitlines(keepends=True) if _is_before(line, step, evaluated_step)]
        if (wanted := "".join(kept)) != text:
            with atomic_file(self._path) as temporary:
                temporary.write_text(wanted, encoding="utf-8")

    def write(self, values: JsonMapping) -> None:
        """Appends one object; NaN and Infinity are refused."""
        self._unwritten += json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._append(self._unwritten.encode("utf-8"))
        except OSError as error:
            if not self._said:
                self._reporter.warn(f"log write failed once ({error}): {self._path}; training goes on, and tries again")
                self._said = True
        else:
            self._unwritten = ""

    def sync(self) -> None:
        """Makes what was written last through a power cut; before each checkpoint, which says that it is there."""
        if self._path.is_file():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def _append(self, data: bytes) -> None:
        if not self._path.parent.is_dir():
            raise FileNotFoundError("its folder disappeared")
        size = self._path.stat().st_size if self._path.is_file() else 0
        try:
            with self._path.open("ab", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError("only a part of a line was written")
        except OSError:
            if self._path.is_file():
                os.truncate(self._path, size)  # never half a line
            raise


def _is_before(line: str, step: int, evaluated_step: int) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        values = json.loads(line)
        return int(values["step"]) <= (evaluated_step if "evaluation" in values else step)
    except (ValueError, KeyError, TypeError):
        return False
