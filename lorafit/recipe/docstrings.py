"""Docstrings of recipe sections and their fields, read from the source: importing a schema does not pay for them."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

from pydantic import BaseModel


@cache
def _docs_in_module(file: str) -> dict[str, dict[str, str]]:
    """Field docstrings of a module, by class and field: the text under each annotated name."""
    found: dict[str, dict[str, str]] = {}
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found[node.name] = docs = {}
            for field, text in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                    docs[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return found


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The docstring of each field of a section, its bases' included."""
    docs: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if issubclass(cls, BaseModel) and cls is not BaseModel:
            docs |= _docs_in_module(inspect.getfile(cls)).get(cls.__name__, {})
    return docs


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())
