"""Templates that ask for the date get the one that the run began with, and transformers agrees on every character."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.chat import clock
from lorafit.data.chat.clock import StoppedClock, find_moment, write_moment
from lorafit.data.chat.render import ChatRenderer, mask_chat
from lorafit.data.chat.template import compile_or_explain
from lorafit.data.prepare import Prepared, build_renderer
from lorafit.errors import CheckpointError, DataError
from lorafit.recipe.schema import DataSection
from tests.support.chat_families import assistant, tokenizer_of, user
from tests.support.tiny_data import CHATML, chat, write_jsonl

BEGAN = datetime(2026, 2, 5, 10, 32)
LLAMA32 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}{{- 'Today Date: ' + date_string + '\\n' }}" + CHATML
)
MINUTES = "  \n{% if true %}{{ 'It is ' ~ strftime_now('%H:%M, %A') ~ '.\\n' }}{% endif %}\n" + CHATML
CHAT = [user("When?"), assistant("Now.")]


@pytest.mark.parametrize(
    ("template", "start"), [(LLAMA32, "Today Date: 05 Feb 2026\n<|"), (MINUTES, "  \nIt is 10:32, Thursday.\n<|")]
)
def test_the_template_reads_the_pinned_moment_and_transformers_agrees(template: str, start: str) -> None:
    renderer = ChatRenderer(tokenizer_of("chatml"), chat_template=template, now=BEGAN)
    rendering = renderer.render(CHAT)  # compared with transformers' own rendering in there
    assert rendering.text.startswith(start)
    prompt = tokenizer_of("chatml").decode(renderer.prompt_ids(CHAT[:1]))
    assert rendering.text.startswith(prompt) and prompt.startswith(start)


@given(st.text("{}%'\"\\ \n-aBdHMY:é🙂", max_size=12))
def test_any_format_is_given_to_transformers_as_it_was_asked_for(text: str) -> None:
    asked = "{% set f = messages[0].content %}{{ strftime_now(f) }}" + CHATML
    try:
        expected = BEGAN.strftime(text)
    except ValueError:
        return
    assert (
        ChatRenderer(tokenizer_of("chatml"), chat_template=asked, now=BEGAN)
        .render([user(text), assistant("A.")])
        .text.startswith(expected)
    )


def test_a_format_that_somebody_typed_stays_typed() -> None:
    asked = "{{ strftime_now(messages[0].content) }}" + CHATML
    renderer = ChatRenderer(tokenizer_of("chatml"), chat_template=asked, now=BEGAN)
    encoded = renderer.encode(renderer.render([user("x"), assistant("A.")]))
    assert encoded.input_ids  # where no control string was typed, nothing hangs on who wrote it
    with pytest.raises(DataError, match=re.escape("cannot tell whether '<|im_end|>' was typed")):
        renderer.encode(renderer.render([user("<|im_end|>"), assistant("A.")]))


@pytest.mark.parametrize(
    ("source", "formats"),
    [
        ("{{ messages }}", ()),
        ("{# strftime_now('%d') #}{{ 'strftime_now' }}", ()),
        (LLAMA32, ("%d %b %Y",)),
        ("{{ strftime_now('%d') }}{{ strftime_now('%d') }}{{ strftime_now('%Y') }}", ("%d", "%Y")),
        ("{% set ask = strftime_now %}{{ ask('%d') }}", None),
        ("{{ strftime_now(messages[0].content) }}", None),
        ("{{ strftime_now('%d' ~ '%Y') }}", None),
    ],
)
def test_formats_that_stand_in_a_template(source: str, formats: tuple[str, ...] | None) -> None:
    assert compile_or_explain(source).clock_formats() == formats


def test_what_a_clock_says() -> None:
    stopped = StoppedClock(BEGAN)
    assert stopped.reading(("%d %b", "%H")) == "05 Feb, 10"
    assert stopped.reading(None) == write_moment(BEGAN) == "2026-02-05T10:32"
    assert find_moment({"template_date": write_moment(BEGAN)}, Path("manifest.json")) == BEGAN
    assert find_moment({"template_date": None}, Path("m")) is None is find_moment({}, Path("m"))
    for wrong in ("soon", 7, ["2026"]):
        with pytest.raises(CheckpointError, match="is no moment"):
            find_moment({"template_date": wrong}, Path("manifest.json"))


def test_mask_chat_asks_for_the_moment_of_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("chatml")
    monkeypatch.setattr(tokenizer, "chat_template", LLAMA32)
    said = []
    for moment in (BEGAN, datetime(2026, 2, 6, 9, 0)):
        monkeypatch.setattr("lorafit.data.chat.render.read_clock", lambda moment=moment: moment)
        said.append(tokenizer.decode(mask_chat(CHAT, None, tokenizer)[0])[:23])
    assert said == ["Today Date: 05 Feb 2026", "Today Date: 06 Feb 2026"]


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "later", "hit"),
    [
        (LLAMA32, datetime(2026, 2, 5, 23, 59), True),
        (LLAMA32, datetime(2026, 2, 6, 0, 0), False),
        (MINUTES, datetime(2026, 2, 5, 10, 33), False),
        (MINUTES, datetime(2026, 2, 12, 10, 32), True),
        (CHATML, datetime(2027, 1, 1, 0, 0), True),
    ],
)
def test_the_date_is_part_of_the_key_where_the_template_writes_it(
    prepare_rows: Callable[..., Prepared], tmp_path: Path, template: str, later: datetime, hit: bool
) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("When?", "Now."), chat("Who?", "I.")])
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    first = prepare_rows(train="d.jsonl", chat_template="t.jinja", now=BEGAN)
    second = prepare_rows(train="d.jsonl", chat_template="t.jinja", now=later)
    said = second.report.splits["train"].cache
    assert said.startswith("cache hit") == hit and (hit or "date in the chat template changed" in said)
    assert (first.digest == second.digest) == hit
    warned = [text for text in first.report.warnings if "the chat template writes the date" in text]
    assert [text.count("pinned to") for text in warned] == ([1] if template != CHATML else [])


def test_verbatim_rows_know_no_date(
    prepare_rows: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: object
) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": "When? ", "completion": "Now."}])
    monkeypatch.setattr(tokenizer, "chat_template", LLAMA32)
    assert not any("date" in text for text in prepare_rows(train="d.jsonl", now=BEGAN).report.warnings)


def test_what_a_run_must_keep(tmp_path: Path) -> None:
    kept = {}
    for name, template in {"dated": LLAMA32, "plain": CHATML, "broken": "{% if strftime_now %}"}.items():
        (tmp_path / name).write_text(template, encoding="utf-8")
        data = DataSection(train="d.jsonl", chat_template=name)
        renderer = build_renderer(tokenizer_of("chatml"), data, tmp_path, BEGAN)
        kept[name] = (renderer.template_date, renderer.written_date)
    assert kept == {"dated": ("2026-02-05T10:32", "05 Feb 2026"), "plain": (None, None), "broken": (None, None)}


def test_the_clock_is_read_to_the_minute() -> None:
    now = clock.read_clock()
    assert (now.second, now.microsecond) == (0, 0) and abs((datetime.now() - now).total_seconds()) < 120
    assert json.loads(json.dumps(write_moment(now))) == now.isoformat(timespec="minutes")
