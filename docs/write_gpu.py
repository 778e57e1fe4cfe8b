"""Writes the table of proofs in docs/gpu.md from benchmarks/gpu/*.json. `make docs` and `make prove-gpu` run it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "gpu.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "gpu"
BLOCK = re.compile(r"(<!-- proofs: generated -->\n).*?(<!-- end of proofs -->)", re.DOTALL)
HEAD = "| on | day | stages that ran whole | left out, or not reached | result |\n|---|---|---|---|---|\n"


def write_page(page: Path = PAGE, folder: Path = RESULTS) -> None:
    """Puts the proofs of a folder into the page."""
    page.write_text(page_with_proofs(page.read_text(encoding="utf-8"), folder), encoding="utf-8")


def page_with_proofs(text: str, folder: Path = RESULTS) -> str:
    """The page's text with today's proofs in the marked block."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    on_cards = sum(result["device_kind"] == "cuda" for result in results)
    said = "" if on_cards else "No card yet: nobody has run the command on one.\n\n"
    table = HEAD + "".join(map(row, results)) if results else ""
    return BLOCK.sub(lambda match: f"{match[1]}{said}{table}{match[2]}", text)


def row(result: dict[str, Any]) -> str:
    """One proof."""
    whole = [stage for stage in result["stages"] if stage not in result["left_out"]]
    where = result["where"] if result["device_kind"] == "cuda" else f"CPU, small mode: {result['where']}"
    line = result["line"] if result["device_kind"] == "cpu" else result["line"].replace(f" on {result['where']}", "")
    cells = (where, result["date"], ", ".join(whole) or "none", ", ".join(result["left_out"]) or "none", line)
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |\n"


if __name__ == "__main__":
    write_page()
