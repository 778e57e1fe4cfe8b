"""A run whose template writes the date goes on, is scored, merged and asked on another day as on its first."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_model import CHATML
from tests.support.world import World, say_all

BEGAN = datetime(2026, 2, 5, 10, 32)
WITH_MINUTES = "{{ 'Today is ' + strftime_now('%d %b %Y %H:%M') + '.\n' }}" + CHATML
DATED = "data:\n  chat_template: dated.jinja\n  validation: {fraction: 0.25}"
PINNED = "Today is 05 Feb 2026 10:32.\n"


class Days:
    """A clock that stands still until it is told to move, and a cache that is empty whenever it moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.now, self._monkeypatch, self._folder = BEGAN, monkeypatch, folder
        monkeypatch.setattr("lorafit.data.chat.clock.read_clock", lambda: self.now)
        for user in ("chat.render", "sample_renderer"):
            monkeypatch.setattr(f"lorafit.data.{user}.read_clock", lambda: self.now)
        self.move(0)

    def move(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)
        self._monkeypatch.setenv("LORAFIT_CACHE", str(self._folder / f"cache-{self.now:%d-%H-%M}"))


@pytest.fixture
def days(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Days:
    (tmp_path / "dated.jinja").write_text(WITH_MINUTES, encoding="utf-8")
    world.recipe(
        ("data:", DATED),
        ("  max_steps: 2", "  max_steps: 2\n  schedule: constant"),
        ("[perplexity]", "[perplexity, exact_match]"),
    )
    return Days(monkeypatch, tmp_path)


def manifest(world: World, run: str = "run") -> Any:
    return json.loads((world.root / run / "manifest.json").read_text())


def test_a_resume_on_another_day_is_the_same_run(world: World, days: Days) -> None:
    longer = ["--set", "training.max_steps=4"]
    say_all(world.run("train", "r.yaml", *longer, "--output", "whole"), 0)
    say_all(world.run("train", "r.yaml"), 0, "pinned to 05 Feb 2026 10:32")
    days.move(60 * 24 * 9 + 1)
    say_all(world.run("train", "r.yaml", *longer, "--resume"), 0, "pinned to 05 Feb 2026 10:32")
    assert manifest(world)["template_date"] == "2026-02-05T10:32"
    assert manifest(world)["data"] == manifest(world, "whole")["data"]
    assert world.weights() == world.weights("whole")


def test_a_run_that_begins_another_day_writes_that_day(world: World, days: Days) -> None:
    say_all(world.run("train", "r.yaml"), 0)
    days.move(1)
    say_all(world.run("train", "r.yaml", "--output", "later"), 0, "pinned to 05 Feb 2026 10:33")
    assert manifest(world, "later")["template_date"] == "2026-02-05T10:33"
    assert manifest(world, "later")["data"] != manifest(world)["data"]


def test_what_asks_a_run_asks_as_on_its_first_day(world: World, days: Days) -> None:
    from transformers import AutoTokenizer

    from lorafit.answering.opening import open_answerer
    from lorafit.contracts import Sample, Silent

    say_all(world.run("train", "r.yaml"), 0)
    days.move(60 * 24)
    voice = open_answerer(world.root / "run", None, None, Silent()).voice
    asked = voice.tokenizer.decode(voice.prompt_ids(Sample("", 0, prompt="when")))
    assert asked == f"{PINNED}<|im_start|>user\nwhen<|im_end|>\n<|im_start|>assistant\n"
    say_all(world.run("eval", "run", "--json"), 0)
    scored = [json.loads(line) for line in (world.root / "run" / "report.jsonl").read_text().splitlines()]
    assert scored and all(row["prompt"].startswith(PINNED) for row in scored)
    compared = json.loads((world.root / "run" / "comparison.json").read_text())["rows"]
    assert all(voice.tokenizer.decode(row["tokens"]).startswith(PINNED) for row in compared)
    say_all(world.run("merge", "run", "--output", "merged"), 0)
    for shipped in ("run/adapter", "merged"):  # what lies beside the weights carries the date to whoever renders it
        plain = AutoTokenizer.from_pretrained(world.root / shipped)
        chat = [{"role": "user", "content": "when"}]
        assert plain.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == asked
    voice = open_answerer(world.root / "merged", None, None, Silent()).voice
    assert voice.tokenizer.decode(voice.prompt_ids(Sample("", 0, prompt="when"))) == asked
    world.recipe((f"base: {world.base}", "base: merged"), name="again.yaml")
    assert "pinned to" not in world.run("preview", "again.yaml").stderr


def test_the_reason_is_true_where_something_changed(world: World, days: Days) -> None:
    say_all(world.run("train", "r.yaml"), 0)
    days.move(60)
    longer = ["train", "r.yaml", "--set", "training.max_steps=4", "--resume"]
    rows = (world.root / "d.jsonl").read_text()
    world.rows(first=50)
    say_all(world.run(*longer), 6, "the data changed")
    (world.root / "d.jsonl").write_text(rows)
    (world.root / "dated.jinja").write_text(WITH_MINUTES.replace("Today", "Now"))
    say_all(world.run(*longer), 6, "the chat template changed")
    (world.root / "dated.jinja").write_text(WITH_MINUTES)
    kept = manifest(world)
    (world.root / "run" / "manifest.json").write_text(json.dumps({**kept, "template_date": None}))
    say_all(world.run(*longer), 6, "writes the date", "does not say which one it was started with")
    (world.root / "run" / "manifest.json").write_text(json.dumps({**kept, "template_date": "soon"}))
    say_all(world.run(*longer), 6, "manifest.json", "template_date", "'soon' is no moment")
    (world.root / "run" / "manifest.json").write_text(json.dumps(kept))
    say_all(world.run(*longer), 0)
