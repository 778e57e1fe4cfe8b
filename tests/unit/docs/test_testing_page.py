"""docs/testing.md leads from every room to tests that exist, and tests stand where the page says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "lorafit"
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
WITHOUT_A_ROOM = {"benchmarks", "docs", "recipes"}  # of the checkout, not of the package


def rooms() -> set[str]:
    """Folders of the package that hold modules, as the page writes them, and modules beside the rooms."""
    folders = {file.parent.relative_to(PACKAGE).as_posix() + "/" for file in PACKAGE.glob("*/**/__init__.py")}
    return folders | {file.name for file in PACKAGE.glob("*.py")}


def first_cells() -> str:
    return "\n".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| "))


def test_every_room_is_on_the_page() -> None:
    named = set(re.findall(r"`([\w/]+/|\w+\.py)`", first_cells()))
    assert named == rooms()


def test_every_file_on_the_page_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/.]+)`", PAGE))
    assert len(named) > 50
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_file_that_make_names_exists() -> None:
    named = set(re.findall(r"tests/[\w/.]+\w", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_what_tests_share_is_on_the_page() -> None:
    shared = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tests" / "support").glob("*.py")}
    assert shared == set(re.findall(r"`(tests/support/\w+\.py)`", PAGE))


def test_unit_tests_mirror_the_rooms() -> None:
    unit = ROOT / "tests" / "unit"
    folders = {file.parent.relative_to(unit).as_posix() for file in unit.glob("*/**/test_*.py")}
    assert {f"{folder}/" for folder in folders - WITHOUT_A_ROOM} <= rooms()
