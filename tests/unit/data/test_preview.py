"""What a preview shows: exactly what is trained on, readable with and without colours, and safe for a terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from lorafit.console.reporting import draw_histogram, result_console
from lorafit.data.prepare import Prepared, build_renderer, prepare
from lorafit.data.preview import Preview, preview
from lorafit.data.report import count_lengths
from lorafit.errors import DataError
from lorafit.kinds.tasks import tasks
from lorafit.recipe.schema import DataSection
from tests.support.tiny_data import Listener, chat, make_tokenizer, write_jsonl

Prepare = Callable[..., Prepared]


@pytest.fixture
def look(tmp_path: Path, prepare_rows: Prepare, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Preview]:
    def run(rows: int | None = None, **data: Any) -> Preview:
        return preview(prepare_rows(**data), build_renderer(tokenizer, DataSection(**data), tmp_path), rows)

    return run


def printed(found: Preview, encoding: str = "utf-8", **console: Any) -> str:
    class Stream(io.StringIO):
        pass

    stream = Stream()
    Stream.encoding = property(lambda self: encoding)  # type: ignore[assignment]
    found.render(Console(file=stream, width=140, **console))
    return stream.getvalue()


def test_json_holds_what_is_trained_on(
    tmp_path: Path, look: Callable[..., Preview], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [chat("Capital of France? é", "Paris \U0001f600."), chat("q", "a")]
    write_jsonl(tmp_path / "d.jsonl", rows)
    found = json.loads(json.dumps(look(train="d.jsonl").to_json()))
    assert [(row["file"], row["line"], row["split"]) for row in found["rows"]] == [
        ("d.jsonl", 1, "train"),
        ("d.jsonl", 2, "train"),
    ]
    for shown, row in zip(found["rows"], rows, strict=True):
        assert shown["rendering"] == tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert shown["input_ids"] == tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        trained = [label for label in shown["labels"] if label != -100]
        assert tokenizer.decode(trained) == row["messages"][1]["content"] + "<|im_end|>"
        assert all(label in (-100, token) for label, token in zip(shown["labels"], shown["input_ids"], strict=True))
    train = found["report"]["splits"]["train"]
    share = sum(label != -100 for row in found["rows"] for label in row["labels"]) / train["tokens"]
    assert found["report"]["trained_share"] == pytest.approx(share)
    assert train["sources"][0]["read"] == 2 and len(found["digest"]) == 64


def test_a_cut_row_shows_what_is_left(tmp_path: Path, look: Callable[..., Preview]) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("words " * 50, "the end")])
    found = look(train="d.jsonl", max_length=40, overlength="truncate")
    assert len(found.rows[0].input_ids) <= 40
    assert found.rows[0].rendering.endswith("the end<|im_end|>")
    assert len(found.rows[0].rendering) < 250
    assert "d.jsonl:1: cut:" in printed(found)


def test_rows_of_each_class_are_shown_and_judged_where_all_are_counted(
    tmp_path: Path, listener: Listener, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"text": f"row {n}", "label": "ham" if n < 600 else "spam"} for n in range(640)]
    write_jsonl(tmp_path / "d.jsonl", rows)
    write_jsonl(tmp_path / "one.jsonl", rows[:2])
    task = tasks.make("sequence-classification", labels=["egg", "ham", "spam"])

    def look(train: str, glance: int | None = None) -> str:
        section = DataSection(train=train)
        renderer, cache = build_renderer(tokenizer, section, tmp_path), tmp_path / "cache"
        place = {"folder": tmp_path, "renderer": renderer, "task": task, "cache_dir": cache, "reporter": listener}
        return printed(preview(prepare(section, seed=0, glance=glance, **place), renderer))

    assert "rows of each class: egg 0, ham 256, spam 0" in look("d.jsonl", 1)
    assert not any("class" in warning for warning in listener.warnings), "a part says nothing of the whole"
    assert "rows of each class: egg 0, ham 600, spam 40" in look("d.jsonl")
    assert "no training row has class egg; add such rows, or leave it out" in listener.warnings
    with pytest.raises(DataError, match="nothing to tell apart"):
        look("one.jsonl")


def test_rows_come_from_every_source_and_split(tmp_path: Path, look: Callable[..., Preview]) -> None:
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"row {name} {n}"} for n in range(3)])
    data = {"train": ["a.jsonl", "b.jsonl"], "test": "c.jsonl"}
    places = [(row.split, row.file, row.line) for row in look(3, **data).rows]
    assert places == [("train", "a.jsonl", 1), ("train", "a.jsonl", 2), ("train", "b.jsonl", 1)]
    assert len(look(None, **data).rows) == 9
    assert [row.split for row in look(8, **data).rows] == ["train"] * 6 + ["test"] * 2
    assert look(0, **data).rows == []


def test_readable_without_colours(tmp_path: Path, look: Callable[..., Preview]) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q [bold]é", "a")])
    found = look(train="d.jsonl")
    text = printed(found)
    assert "<|im_start|>user\nq [bold]é<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n" in text
    assert "\x1b" not in text
    ascii_text = printed(found, encoding="ascii")
    assert "q [bold]\\xe9<|im_end|>" in ascii_text and "[[a<|im_end|>]]" in ascii_text
    ascii_text.encode("ascii")


def test_colours_tell_trained_from_untrained(tmp_path: Path, look: Callable[..., Preview]) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a")])
    text = printed(look(train="d.jsonl"), force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;32ma<|im_end|>" in text and "⟦" not in text


def test_rows_cannot_steer_the_terminal(tmp_path: Path, look: Callable[..., Preview]) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q\x1b[2J\x07\x9b", "a\rb")])
    text = printed(look(train="d.jsonl"))
    assert "q\\x1b[2J\\x07\\x9b" in text and "a\\x0db" in text
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(text)


def test_texts_and_places_become_no_emoji(
    tmp_path: Path, look: Callable[..., Preview], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*[{"text": f"row {number}"} for number in range(99)], {"text": ":smile: " * 90}]
    write_jsonl(tmp_path / "d:heart:.jsonl", rows)
    found = look(100, train="d:heart:.jsonl", overlength="truncate", max_length=40)
    found.render(result_console())
    for text in (str(found), capsys.readouterr().out):
        assert "d:heart:.jsonl:100: cut: " in text and ":smile: :smile:" in text
        assert not any(emoji in text for emoji in "💯😄❤")


def test_the_report_is_printed(tmp_path: Path, look: Callable[..., Preview]) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"text": "row", "mood": 1}, {"text": 5}, {"text": "words " * 90}, {"text": "b"}])
    write_jsonl(tmp_path / "t.jsonl", [{"text": "b"}])
    rules = {"bad_rows": {"policy": "skip", "max_fraction": 0.5}, "overlength": "drop", "max_length": 40}
    text = printed(look(1, train={"path": "d.jsonl", "repeats": 1.5}, test="t.jsonl", **rules))
    table = next(line.split() for line in text.splitlines() if line.split()[:2] == ["train", "d.jsonl"])
    assert table == ["train", "d.jsonl", "text", "4", "2", "1", "1", "1.5"]
    assert "d.jsonl:2: bad: text: expected string" in text
    assert "d.jsonl:3: dropped:" in text
    assert "columns that are not read: mood (1)" in text
    assert "1 row of test occurs in train as well: t.jsonl:1 = d.jsonl:4" in text
    assert "tokens that carry loss:" in text


def test_histogram() -> None:
    bars = count_lengths([1, 5, 10, 11, 20, 95, 120])
    assert [(bar.low, bar.high, bar.rows) for bar in bars][:2] == [(1, 10, 3), (11, 20, 2)]
    assert sum(bar.rows for bar in bars) == 7 and len(bars) == 12
    for longest in (1, 2, 11, 12, 13, 99, 100, 101, 4096, 131_072):
        bars = count_lengths([1, longest])
        assert len(bars) <= 12 and sum(bar.rows for bar in bars) == (2 if longest >= 1 else 0)
        assert bars[-1].low <= longest <= bars[-1].high
    assert count_lengths([]) == ()
    assert all("#" in line for line in draw_histogram(count_lengths([1, 500]), "#"))
    assert len(draw_histogram(count_lengths([1, 500]), "#")) == 2 < len(count_lengths([1, 500]))
    lines = draw_histogram(count_lengths([1] * 40 + [2]), "#")
    assert lines[0].endswith("#" * 40) and lines[1].endswith(" #")


def test_segments_join_to_the_text_of_sentencepiece_like_tokenizers(tmp_path: Path, prepare_rows: Prepare) -> None:
    """A decoder that drops the blank before the first word must not lose blanks between stretches."""
    from tokenizers import decoders

    own = make_tokenizer()
    own.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": " some", "completion": " words"}])
    section = DataSection(train="d.jsonl")
    found = preview(prepare_rows(train="d.jsonl", using=own), build_renderer(own, section, tmp_path), None)
    assert [text for text, _ in found.rows[0].segments] == ["some", " words<|im_end|>"]
    assert found.rows[0].rendering == "some words<|im_end|>"
