"""What pyproject promises, what `make test-oldest` installs, and what the page says are one set of versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def named(text: str) -> str:
    return text.lower().replace("_", "-")


def bounds() -> dict[str, str]:
    """pyproject's lower bounds by name, of what every command needs and of the extras of `chat` and `serve`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["chat"], *extras["serve"]]
    found = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", entry).groups() for entry in needed)
    return {named(name): version for name, version in found.items()}


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {named(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    oldest = pins("constraints-oldest.txt")
    assert oldest.keys() == bounds().keys()
    for name, bound in bounds().items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", oldest[name]), (name, bound, oldest[name])


def test_the_usual_versions_are_within() -> None:
    usual = pins("constraints.txt")
    for name, bound in bounds().items():
        assert [int(part) for part in usual[name].split(".")] >= [int(part) for part in bound.split(".")], name


def test_the_page_shows_them() -> None:
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", page, re.MULTILINE))
    assert {named(name): version for name, version in rows.items()} == pins("constraints-oldest.txt")
