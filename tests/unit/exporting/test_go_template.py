"""Ollama's template writes what the trained one writes, or there is none; the evaluator knows Go's words alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from lorafit.data.chat.template_names import shipped_template
from lorafit.errors import ModelError
from lorafit.exporting.go_template import render_go, translate
from lorafit.exporting.probes import chats
from tests.support import chat_families

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": 'a "b" {{ .Content }}\n'},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]


def jinja(source: str) -> Callable[[Any], str]:
    template = _compile_jinja_template(source)

    def render(chat: Any) -> str:
        told = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>", "tools": None}
        return template.render(messages=[dict(turn) for turn in chat], **told)

    return render


FAMILIES = ["CHATML", "LLAMA3", "GEMMA", "PHI", "HARMONY", "VICUNA", "GENERATION"]


@pytest.mark.parametrize("name", [*FAMILIES, "alpaca", "chatml", "hermes", "plain"])
def test_families_are_translated_by_what_they_write(name: str) -> None:
    render = jinja(getattr(chat_families, name) if name in FAMILIES else shipped_template(name))
    text, notes = translate(render, chats())
    for chat in chats():
        assert render_go(text, chat) == render(chat)
    assert ("trims contents" in " ".join(notes)) == (name in ("LLAMA3", "GEMMA"))


def test_a_system_message_that_stands_where_none_was_given_is_kept() -> None:
    render = jinja(SMOL)
    text, notes = translate(render, chats())
    asked = [{"role": "user", "content": "q"}]
    assert "Be kind." in render_go(text, asked) == render(asked)
    assert "Be kind." not in render_go(text, CHAT) == render(CHAT)
    assert not notes and "\n" not in text and '"""' not in text


def test_20_chats_are_compared_and_one_difference_is_enough() -> None:
    assert len(chats()) == 20 and all(chat[-1]["role"] == "user" for chat in chats())
    shouts = "{{ message['content'].upper() if 'Go' in message['content'] else message['content'] }}"
    source = "{% for message in messages %}<{{ message['role'] }}>" + shouts + "{% endfor %}<assistant>"
    with pytest.raises(ModelError, match="writes 3 of 20 chats otherwise than the trained one"):
        translate(jinja(source), chats())


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (chat_families.QWEN, "writes 1 of 20 chats otherwise"),  # it leaves out the reasoning of earlier turns
        (chat_families.MISTRAL, "closes a turn of the user in two ways"),
        ("{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}", "differently from place to place"),
        ("{{ messages[0]['content'] }}", "differently from place to place"),
    ],
)
def test_what_cannot_be_proven_equal_is_refused(source: str, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        translate(jinja(source), chats())


def test_no_system_message_where_the_template_refuses_one() -> None:
    source = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    )
    text, notes = translate(jinja(source), chats())
    assert "system" not in text and "takes no system message" in notes[0]


def test_go_evaluates_what_is_written_as_go_does() -> None:
    """By hand after Go's text/template: a range sets dot and $i, else belongs to the nearest if, strings are quoted."""
    template = (
        '{{ range $i, $m := .Messages }}{{ if eq $i 0 }}{{ if eq .Role "system" }}{{ "S" }}{{ else }}{{ "N" }}{{ end }}'
        '{{ end }}{{ if eq .Role "user" }}{{ "\\"u\\n" }}{{ .Content }}{{ end }}{{ end }}{{ "!" }}'
    )
    assert render_go(template, CHAT) == 'S"u\na "b" {{ .Content }}\n"u\nd!'
    assert render_go(template, CHAT[1:2]) == 'N"u\na "b" {{ .Content }}\n!'


@pytest.mark.parametrize(
    "template", ["text {{ .Content }}", "{{ trim .Content }}", '{{ if ne $i 0 }}{{ "a" }}{{ end }}']
)
def test_the_evaluator_refuses_what_is_not_ours(template: str) -> None:
    with pytest.raises(ValueError, match=r"of ours|outside of actions"):
        render_go(template, CHAT)
