"""Every error text that the troubleshooting page quotes is one that the code can say, and its links lead somewhere."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"\*\*`([^`]+)`\*\*", PAGE)  # bold code is an error's text; an ellipsis stands for what differs


@cache
def said_texts() -> tuple[str, ...]:
    """Every string in the package's code but docstrings, an f-string with an ellipsis for each of its values."""
    texts: list[str] = []
    for file in sorted((ROOT / "lorafit").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                texts.append(node.value)
    return tuple(texts)


def is_said(quoted: str) -> bool:
    """Whether some string of the code holds the quoted pieces in their order."""
    pattern = re.compile(".*?".join(re.escape(piece.strip()) for piece in quoted.split("…")), re.DOTALL)
    return any(pattern.search(text) for text in said_texts())


def heading_anchor(heading: str) -> str:
    """The anchor that GitHub and MkDocs give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_the_page_quotes_errors() -> None:
    assert len(QUOTED) > 40


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_text_is_said_by_the_code(quoted: str) -> None:
    assert len(re.sub(r"\W", "", quoted)) >= 7, "too little text to be looked for"
    assert is_said(quoted)


def test_a_text_that_nobody_says_is_noticed() -> None:
    assert not is_said("the flux … of the … is inverted")


@pytest.mark.parametrize("name", ["troubleshooting.md", "quickstart.md"])
def test_links_lead_to_pages_and_headings(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([\w/-]+\.md)?(?:#([\w-]+))?\)", text)
    assert any(anchor for _, anchor in links)
    for target, anchor in links:
        page = (ROOT / "docs" / target).read_text(encoding="utf-8") if target else text
        anchors = {heading_anchor(line.lstrip("#")) for line in page.splitlines() if line.startswith("#")}
        assert not anchor or anchor in anchors, (target, anchor)


def test_what_people_look_for_is_found() -> None:
    answers = PAGE.partition("\n## How do I\n")[2].partition("\n## ")[0]
    for word in ("--resume", "tensorboard", "chat_template", "from the hub", "PEFT", "Ollama", "convert_hf_to_gguf.py"):
        assert word in answers, word
