"""What is published is on the disk first: every file and folder is synced, then renamed, then the folder around it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import UsageError
from lorafit.files.atomic import MANIFEST, atomic_dir, atomic_file


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was synced and what renamed, in order."""
    found: list[tuple[str, str]] = []

    def watched(name: str) -> None:
        real = getattr(Path, name)

        def move(self: Path, target: Any) -> Path:
            found.append(("renamed", str(self)))
            moved: Path = real(self, target)
            return moved

        monkeypatch.setattr(Path, name, move)

    monkeypatch.setattr(
        os, "fsync", lambda number: found.append(("synced", str(Path(f"/proc/self/fd/{number}").readlink())))
    )
    watched("rename")
    watched("replace")
    return found


def test_a_file(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    with atomic_file(tmp_path / "a.json") as temporary:
        temporary.write_text("{}")
    assert events == [("synced", str(temporary)), ("renamed", str(temporary)), ("synced", str(tmp_path))]


def test_a_folder(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    with atomic_dir(tmp_path / "run") as temporary:
        (temporary / "inner").mkdir()
        for name in ("a", "inner/b"):
            (temporary / name).write_text(name)
    order = [what for what, _ in events]
    assert order.count("renamed") == 1 and events[-1] == ("synced", str(tmp_path))
    before = {path for _, path in events[: order.index("renamed")]}
    assert before == {str(temporary / name) for name in ("", "a", "inner", "inner/b", MANIFEST)}


@pytest.mark.parametrize("atomic", [atomic_file, atomic_dir])
def test_a_place_where_the_system_makes_nothing(atomic: Any) -> None:
    """As root too, who may write everywhere: the folder did not disappear, and nothing is lorafit's own bug."""
    refused = pytest.raises(UsageError, match=r"/proc/x\.gguf: cannot be written: .*; choose another place")
    with refused, atomic(Path("/proc/x.gguf")) as temporary:
        temporary.write_bytes(b"x")
