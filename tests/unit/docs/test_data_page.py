"""docs/data.md names every format with the fields that it reads."""

from __future__ import annotations

import re
from pathlib import Path

from lorafit.kinds.fields import CHECKS, MUST_CONTAIN, PARAPHRASES
from lorafit.kinds.formats import formats

DOCS = Path(__file__).parents[3] / "docs"


def test_the_table_of_formats_is_that_of_the_code() -> None:
    page = (DOCS / "data.md").read_text(encoding="utf-8")
    section = page.split("## Formats")[1].split("\n## ")[0]
    table = {
        name: (set(re.findall(r"`(\w+)`", needed)), set(re.findall(r"\w+", optional or "")))
        for name, needed, optional in re.findall(r"^\| `(\w+)` \| ([^\[|]*)(?:\[([^\]]*)\] )?\|", section, re.M)
    }
    code = {
        name: (
            {field for field, needed in kind.fields.items() if needed},
            {field for field, needed in kind.fields.items() if not needed} - CHECKS.keys(),
        )
        for name, kind in formats.items()
    }
    assert table == code
    lacking = " and ".join(f"`{name}`" for name, kind in formats.items() if MUST_CONTAIN not in kind.fields)
    assert f"`must_contain` is read everywhere but with {lacking}:" in section
    asking = " ".join(f"`{name}`" for name, kind in formats.items() if PARAPHRASES in kind.fields)
    assert f"`paraphrases` are read with {asking}:" in section
