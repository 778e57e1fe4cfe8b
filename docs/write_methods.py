"""Writes the tables of docs/methods.md: from the kinds themselves, and from what benchmarks/method_matrix.py found.

`make docs` runs it. A kind that has no row there yet is named as such.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.method_matrix import QUANTIZATIONS, Row, cases, in_order, table
from lorafit.errors import LorafitError
from lorafit.kinds.adapters import adapters
from lorafit.model.class_shape import find_shape
from lorafit.model.known_models import known_config

PAGE = Path(__file__).parent / "methods.md"
RESULTS = Path(__file__).parents[1] / "benchmarks"
MODEL = "meta-llama/Llama-3.1-8B"
HEAD = "| method | what it is | parameters | memory | merge | quantised bases |\n|---|---|---|---|---|---|\n"


def write_page(page: Path = PAGE) -> None:
    """Puts both tables into the page."""
    page.write_text(page_with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


def page_with_tables(text: str) -> str:
    """The page's text with today's tables in the marked blocks."""
    rows = [Row(**json.loads(line)) for line in (RESULTS / "methods.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, made in (("methods", methods_table(rows)), ("matrix", table(in_order(rows)) + not_yet(rows))):
        block = re.compile(rf"(<!-- {name}: generated -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text = block.sub(lambda match, made=made: f"{match[1]}{made}{match[2]}", text)  # type: ignore[misc]
    return text


def methods_table(rows: list[Row]) -> str:
    """A line for each kind."""
    memory = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    shape = find_shape(known_config(MODEL) or {})
    lines = [HEAD]
    for name in adapters.names():
        method = adapters.make(name)
        try:
            parameters = f"{sum(site.parameters for site in method.sites(shape)):,}"
        except LorafitError as error:
            parameters = f"- ({error.what})"
        needs = memory.get(name)
        share = f"{needs / memory['lora']:.2f}" if isinstance(needs, int) else "-"
        refused = [kind for kind in QUANTIZATIONS if method.refuses(kind) is not None]
        stored = "any" if not refused else f"not {' or '.join(refused)}"
        cells = (f"[`{name}`](recipe.md#adapter)", what(method), parameters, share, merges(rows, name), stored)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(lines)


def what(method: Any) -> str:
    """The first sentence of a kind's file, with its papers."""
    module = inspect.getmodule(type(method))
    text = inspect.cleandoc(getattr(module, "__doc__", "") or "")
    first = re.split(r"(?<=\.)\s|\n\n", text, maxsplit=1)[0].replace("\n", " ")
    links = dict.fromkeys(re.findall(r"https://arxiv\.org/abs/([\d.]*\d)", text))
    papers = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in links)
    return f"{first} {papers}".strip()


def merges(rows: list[Row], name: str) -> str:
    """Whether what was trained went into a plain model."""
    found = [row.cells["merge"] for row in rows if row.case == name and "merge" in row.cells]
    return "?" if not found else "yes" if all(cell.startswith("yes") for cell in found) else "no"


def not_yet(rows: list[Row]) -> str:
    """What is registered, and has not been run."""
    known = {(row.case, row.quantization) for row in rows}
    lacking = [case.name for case in cases() if any((case.name, kind) not in known for kind in QUANTIZATIONS)]
    return f"\nNot run yet: {', '.join(lacking)}.\n" if lacking else ""


if __name__ == "__main__":
    write_page()
