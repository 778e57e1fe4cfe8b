"""Writes each command's `--help` into its page under docs/commands/, in the marked fence. `make docs` runs it."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from lorafit.cli import app

PAGES = Path(__file__).parent / "commands"
BLOCK = re.compile(r"(<!-- help: generated -->\n)```text\n.*?```", re.DOTALL)


def page_with_help(page: Path) -> str:
    """The page's text with the present help of its command in the marked block."""
    shown = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}).invoke(app, [page.stem, "--help"])
    text = "\n".join(line.rstrip() for line in shown.output.strip().splitlines()).replace(
        "Usage: root", "Usage: lorafit"
    )
    return BLOCK.sub(lambda match: f"{match.group(1)}```text\n{text}\n```", page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(page_with_help(page), encoding="utf-8")
