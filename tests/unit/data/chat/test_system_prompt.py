"""A template that can do nothing with a system message is the recipe's fault, said once and before any row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit.data.chat.render import ChatRenderer
from lorafit.data.prepare import Prepared
from lorafit.errors import DataError, RecipeError
from tests.support.chat_families import FAMILIES, assistant, system, tokenizer_of, user
from tests.support.tiny_data import CHATML, chat, write_jsonl

REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
DROPPING = "{% set messages = messages if messages[0].role != 'system' else messages[1:] %}" + CHATML

Prepare = Callable[..., Prepared]


@pytest.fixture
def refused(tmp_path: Path, prepare_rows: Prepare) -> Callable[..., Exception]:
    def run(template: str, rows: list[Any] | None = None, **data: Any) -> Any:
        write_jsonl(tmp_path / "d.jsonl", rows or [chat(f"q {n}", f"a {n}") for n in range(9)])
        (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
        try:
            prepare_rows(train="d.jsonl", chat_template="t.jinja", **data)
        except Exception as error:
            return error
        return None

    return run


def test_refused_and_dropped_prompts_are_one_error_of_the_recipe(refused: Callable[..., Any]) -> None:
    for template, said in (
        (REFUSING, "refuses system messages at line 1: System role not"),
        (DROPPING, "drops system"),
    ):
        error = refused(template, system_prompt="Be kind.")
        assert isinstance(error, RecipeError) and error.exit_code == 3
        assert error.key == "data.system_prompt" and said in error.what and error.line is None
        assert "name another data.chat_template" in str(error) and len(str(error)) <= 300
        assert refused(template) is None


def test_a_dropped_prompt_may_be_a_warning_and_a_refused_one_not(refused: Callable[..., Any]) -> None:
    assert refused(DROPPING, system_prompt="Be kind.", dropped_fields="warn") is None
    assert isinstance(refused(REFUSING, system_prompt="Be kind.", dropped_fields="warn"), RecipeError)


def test_a_rows_own_system_message_stays_the_rows_error(refused: Callable[..., Any]) -> None:
    own = {"messages": [system("S"), *chat("q", "a")["messages"]]}
    error = refused(REFUSING, [chat("q", "a"), own])
    assert isinstance(error, DataError) and error.line == 2 and "System role not supported" in str(error)


def test_verbatim_rows_need_no_system_role(tmp_path: Path, prepare_rows: Prepare, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q ", "completion": "a"}])
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = REFUSING
        prepare_rows(train="d.jsonl", system_prompt="Be kind.")
    finally:
        tokenizer.chat_template = own


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_take_a_prompt_pass(name: str) -> None:
    renderer = ChatRenderer(tokenizer_of(name), system_prompt="Be kind.", dropped_fields="warn")
    renderer.check_system_prompt()
    assert "Be kind." in renderer.render([user("a?"), assistant("A.")]).text
