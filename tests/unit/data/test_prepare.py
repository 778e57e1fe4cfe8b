"""Preparation of all splits: what is kept, cut, dropped and said, and a cache that is right or not used."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from lorafit.contracts import Examples, Sample
from lorafit.data import cache as cache_module
from lorafit.data import encode_rows as encoding
from lorafit.data import truncate
from lorafit.data.prepare import Prepared, hold_out
from lorafit.data.sources.source import Source
from lorafit.errors import DataError, LorafitError, ModelError, Problems, ResourceError
from lorafit.kinds.tasks import tasks
from lorafit.recipe.schema import SourceSection
from tests.support.tiny_data import CHATML, Listener, chat, make_tokenizer, write_jsonl

Prepare = Callable[..., Prepared]


def rows_of(examples: Any) -> list[tuple[list[int], list[int], str, int]]:
    found = (examples[index] for index in range(len(examples)))
    return [(list(map(int, e["tokens"])), list(map(int, e["trained"])), e.file, e.line) for e in found]


def failure(prepare_rows: Prepare, **data: Any) -> LorafitError:
    with pytest.raises(LorafitError) as caught:
        prepare_rows(**data)
    return caught.value


def test_rows_are_what_the_template_and_the_tokenizer_make(
    tmp_path: Path, prepare_rows: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [chat("Capital of France?", "Paris."), chat("2+2?", "4"), {"messages": chat("a", "b")["messages"] * 2}]
    write_jsonl(tmp_path / "d.jsonl", rows)
    prepared = prepare_rows(train="d.jsonl")
    found = rows_of(prepared.train)
    for (ids, trained, file, line), row in zip(found, rows, strict=True):
        assert ids == tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        assert tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t]) == "".join(
            f"{m['content']}<|im_end|>" for m in row["messages"] if m["role"] == "assistant"
        )
        assert file == "d.jsonl" and rows[line - 1] is row
    examples: Examples = prepared.train
    assert list(examples.lengths) == [len(ids) for ids, *_ in found]
    assert list(examples.trained_tokens) == [sum(trained) for _, trained, *_ in found]
    facts = prepared.facts()
    assert facts.rows == 3 and facts.longest_tokens == max(examples.lengths)
    assert facts.tokens == sum(examples.lengths) and facts.trained_tokens == sum(examples.trained_tokens)


def test_tokens_stay_on_disk(tmp_path: Path) -> None:
    """All of 64 MB of tokens read, and hashed, in a process that grows by less than a quarter of that."""
    code = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from lorafit.contracts import TaskRow
        from lorafit.kinds.tasks import tasks
        from lorafit.data.store import ExampleSet, StoreWriter, pack_chunk
        folder = Path(sys.argv[1])
        columns = tasks.make("causal-lm").columns
        with StoreWriter(folder, columns) as writer:
            for part in range(16):
                ids = [np.arange(n, n + 1000) for n in range(800)]
                made = [TaskRow({"tokens": row, "trained": np.arange(1000) > 0}, 1000, 999, [], row) for row in ids]
                rows = [(0, n, row) for n, row in enumerate(made)]
                writer.write(pack_chunk(rows, columns))
        examples = ExampleSet(folder, columns, ["d.jsonl"], [1.0])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        digest = examples.digest()
        total = sum(int(examples[n]["tokens"][-1]) + int(np.sum(examples[n]["trained"])) for n in range(len(examples)))
        print(len(examples), total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    rows, total, grown_kib = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert (rows, total) == (12_800, 16 * sum(n + 999 + 999 for n in range(800)))
    assert grown_kib < 16 * 1024


def test_rows_are_counted_from_zero(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a"), chat("q", "b")])
    train = prepare_rows(train="d.jsonl").train
    for index in (2, -1):
        with pytest.raises(IndexError):
            train[index]


def test_the_form_of_rows_is_known_from_one_of_each_source(
    tmp_path: Path, prepare_rows: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": 1}, *({"text": f"row {n}"} for n in range(50))])
    write_jsonl(tmp_path / "b.jsonl", [chat("q", "a")] * 50)
    prepared = prepare_rows(train=["a.jsonl", "b.jsonl"], bad_rows={"policy": "skip"})
    read: list[int] = []
    real = Source._read_row
    monkeypatch.setattr(Source, "_read_row", lambda *given: read.append(given[1]) or real(*given))
    found = list(prepared.samples("train").first_samples())
    assert [(sample.file, sample.line) for sample in found] == [("a.jsonl", 2), ("b.jsonl", 1)]
    assert read == [1, 2, 1]


def test_kinds_of_rows(tmp_path: Path, prepare_rows: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    write_jsonl(tmp_path / "pc.jsonl", [{"prompt": "two words", "completion": " and more"}])
    write_jsonl(tmp_path / "qa.jsonl", [{"question": "two words", "answer": " and more"}])
    write_jsonl(tmp_path / "t.jsonl", [{"text": "two words"}])

    def texts(name: str, **data: Any) -> tuple[str, str]:
        [(ids, trained, *_)] = rows_of(prepare_rows(train=name, **data).train)
        return tokenizer.decode(ids), tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t])

    assert texts("pc.jsonl") == ("two words and more<|im_end|>", " and more<|im_end|>")
    asked = "<|im_start|>user\ntwo words<|im_end|>\n<|im_start|>assistant\n and more<|im_end|>\n"
    assert texts("qa.jsonl") == (asked, " and more<|im_end|>")
    assert texts("pc.jsonl", chat_template="chatml")[1] == " and more<|im_end|>"
    assert texts("pc.jsonl", chat_template="chatml")[0].startswith("<|im_start|>user\ntwo words")
    assert texts("t.jsonl")[0] == "two words<|im_end|>"
    [(ids, trained, *_)] = rows_of(prepare_rows(train="t.jsonl").train)
    assert trained == [0] + [1] * (len(ids) - 1)  # nothing stands before the first


def test_rows_that_pass_the_template_by_are_said(
    tmp_path: Path, prepare_rows: Prepare, listener: Listener, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_jsonl(tmp_path / "pc.jsonl", [{"prompt": "two words", "completion": " and more"}])
    prepare_rows(train="pc.jsonl", system_prompt="be brief")
    assert any("pc.jsonl" in warning and "system_prompt is not used" in warning for warning in listener.warnings)
    assert any("no chat template" in warning and "question: prompt" in warning for warning in listener.warnings)
    listener.warnings.clear()
    prepare_rows(train="pc.jsonl", system_prompt="be brief", chat_template="chatml")
    prepare_rows(train="pc.jsonl", using=base_tokenizer)
    prepare_rows(train="pc.jsonl", train_on="completion")
    assert listener.warnings == []


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("dpo", {"prompt": "two words", "chosen": " and more", "rejected": " and less"}),
        ("reward", {"prompt": "two words", "chosen": " and more", "rejected": " and less"}),
        ("kto", {"prompt": "two words", "completion": " and more", "label": True}),
    ],
)
def test_preferences_that_pass_the_template_by_are_said_with_what_helps(
    tmp_path: Path, prepare_rows: Prepare, listener: Listener, kind: str, row: dict[str, Any]
) -> None:
    """Their answers alone are learnt from, so that `train_on: completion` changes nothing of it."""
    write_jsonl(tmp_path / "p.jsonl", [row, {**row, "prompt": "three words"}])
    for options in ({}, {"train_on": "completion"}):
        listener.warnings.clear()
        prepare_rows(train="p.jsonl", task=tasks.make(kind), **options)
        [warning] = [each for each in listener.warnings if "no chat template" in each]
        assert warning.endswith("data.chat_template: chatml, or write the answers as turns")


def test_all_files_that_pass_the_template_by_are_named_as_seen_from_here(
    tmp_path: Path, prepare_rows: Prepare, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt": f"two {name}", "completion": " and more"}])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    prepare_rows(train="a.jsonl", test="b.jsonl")
    [warning] = [each for each in listener.warnings if "no chat template" in each]
    assert warning.startswith("../a.jsonl, ../b.jsonl: ")
    assert warning.endswith("else set train_on: completion")


def test_a_template_from_a_file(tmp_path: Path, prepare_rows: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a")])
    (tmp_path / "own.jinja").write_text(CHATML.replace("assistant\\n", "assistant:\\n"), encoding="utf-8")
    prepared = prepare_rows(train="d.jsonl", chat_template="own.jinja")
    assert tokenizer.decode(list(prepared.train[0]["tokens"])).startswith("<|im_start|>user\nq<|im_end|>")
    error = failure(prepare_rows, train="d.jsonl", chat_template="chatlm")
    assert error.exit_code == 5 and "did you mean chatml" in str(error)


def test_base_models_need_a_named_template_for_chats_only(
    tmp_path: Path, prepare_rows: Prepare, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_jsonl(tmp_path / "c.jsonl", [chat("q", "a")])
    write_jsonl(tmp_path / "pc.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(ModelError, match="chatml") as caught:
        prepare_rows(train="c.jsonl", using=base_tokenizer)
    assert caught.value.exit_code == 5
    assert len(prepare_rows(train="pc.jsonl", using=base_tokenizer).train) == 1
    assert len(prepare_rows(train="c.jsonl", using=base_tokenizer, chat_template="chatml").train) == 1


def test_untrainable_rows(tmp_path: Path, prepare_rows: Prepare) -> None:
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a"), {"messages": [{"role": "user", "content": "q"}]}, silent])
    error = failure(prepare_rows, train="d.jsonl")
    said = [str(e) for e in error.errors]  # type: ignore[attr-defined]
    assert error.exit_code == 4 and "2 errors" in str(error)
    assert "d.jsonl:2" in said[0] and "assistant" in said[0]
    assert "d.jsonl:3" in said[1] and "no trainable tokens" in said[1]
    prepared = prepare_rows(train="d.jsonl", bad_rows={"policy": "skip", "max_fraction": 0.7})
    assert [line for *_, line in rows_of(prepared.train)] == [1]
    assert len(prepare_rows(train="d.jsonl", train_on="all").train) == 3
    assert len(prepare_rows(train="d.jsonl", train_on="all").train[2]["tokens"]) > 5


LONG = " ".join(["words"] * 60)


def test_overlong_rows(tmp_path: Path, prepare_rows: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a"), chat(LONG, "end"), chat("q", LONG)])
    error = failure(prepare_rows, train="d.jsonl", max_length=60)
    assert error.exit_code == 4 and "2 errors" in str(error)
    assert "d.jsonl:2" in str(error) and "max_length is 60" in str(error)
    dropped = prepare_rows(train="d.jsonl", max_length=60, overlength="drop")
    assert [line for *_, line in rows_of(dropped.train)] == [1]
    counts = dropped.report.splits["train"].sources[0]
    assert (counts.read, counts.kept, counts.dropped, counts.bad) == (3, 1, 2, 0)
    cut = prepare_rows(train="d.jsonl", max_length=60, overlength="truncate")
    assert cut.report.splits["train"].sources[0].cut == 2
    assert all(length <= 60 for length in cut.train.lengths)
    ids, trained, *_ = rows_of(cut.train)[1]
    assert tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t]) == "end<|im_end|>"
    assert [(n.what, n.line) for n in cut.report.splits["train"].notes] == [("cut", 2), ("cut", 3)]
    assert "only plain text can be split" in str(
        failure(prepare_rows, train="d.jsonl", max_length=60, overlength="split")
    )


def test_text_is_split(tmp_path: Path, prepare_rows: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "d.txt").write_text(LONG + "\n", encoding="utf-8")
    prepared = prepare_rows(train="d.txt", max_length=16, overlength="split")
    found = rows_of(prepared.train)
    assert len(found) > 3 and all(len(ids) <= 16 for ids, *_ in found)
    assert tokenizer.decode([i for ids, *_ in found for i in ids]) == LONG + "<|im_end|>"
    assert all(trained == [0] + [1] * (len(trained) - 1) for _, trained, *_ in found)
    counts = prepared.report.splits["train"].sources[0]
    assert (counts.read, counts.kept, counts.split) == (1, len(found), 1)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sequence-classification", {"text": LONG, "label": "x"}),
        ("token-classification", {"words": LONG.split(), "labels": ["x"] * 60}),
        ("causal-lm", {"text": LONG}),
    ],
)
def test_only_what_can_be_split_is_offered_that(
    kind: str, row: dict[str, Any], tmp_path: Path, prepare_rows: Prepare
) -> None:
    write_jsonl(tmp_path / "d.jsonl", [row])
    task = tasks.make(kind, **({} if kind == "causal-lm" else {"labels": ["x", "y"]}))
    offered = "split, truncate or drop" if kind == "causal-lm" else "truncate or drop"
    error = failure(prepare_rows, train="d.jsonl", max_length=60, task=task)
    assert str(error).endswith(f"set data.overlength: {offered}")


def test_words_of_each_label_are_counted_and_labels_that_none_has_are_told(
    tmp_path: Path, prepare_rows: Prepare, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where held-out rows lie between those that stay, and more rows than are read at once."""
    monkeypatch.setattr("lorafit.data.store._READ_ROWS", 3)
    rows = [{"words": ["w"] * (n % 4 + 1), "labels": ["O", "B-X", "I-X", "O"][: n % 4 + 1]} for n in range(40)]
    write_jsonl(tmp_path / "d.jsonl", rows)
    task = tasks.make("token-classification", labels=["O", "B-X", "I-X", "B-Y", "I-Y"])
    prepared = prepare_rows(train="d.jsonl", validation={"fraction": 0.25}, task=task)
    train, held_out = (prepared.report.splits[split].classes for split in ("train", "validation"))
    assert {name: train[name] + held_out[name] for name in train} == {"O": 50, "B-X": 30, "I-X": 20, "B-Y": 0, "I-Y": 0}
    kept = [rows[int(line) - 1]["labels"] for line in prepared.train.lines]
    assert train["B-X"] == sum(row.count("B-X") for row in kept) and len(kept) == 30
    assert "no training row has labels B-Y, I-Y; add such rows, or leave them out" in listener.warnings


def test_nothing_left(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a")] * 3)
    error = failure(prepare_rows, train="d.jsonl", max_length=8, overlength="drop")
    assert error.exit_code == 4 and "no rows left: 3 of 3" in str(error) and "max_length" in str(error)
    (tmp_path / "e.jsonl").write_text("\n", encoding="utf-8")
    assert "no rows" in str(failure(prepare_rows, train={"path": "e.jsonl", "format": "text"}))


def test_bad_rows_are_told_with_the_rule_that_leaves_them_out(tmp_path: Path, prepare_rows: Prepare) -> None:
    """What the last line names is taken by the recipe, and the run goes on; one bad row is told so too."""
    good = '{"question": "q", "answer": "a"}\n'
    for bad in (1, 3):
        (tmp_path / "d.jsonl").write_text(good * 97 + '{"question": "q", "answer": ""}\n' * bad, encoding="utf-8")
        error = failure(prepare_rows, train="d.jsonl").one_line
        assert "d.jsonl:98" in error and "answer: is empty" in error and len(error) <= 292
        rule = re.search(r"data\.bad_rows: (\{.*\})$", error)
        assert rule is not None, error
        prepared = prepare_rows(train="d.jsonl", bad_rows=yaml.safe_load(rule[1]))
        assert len(prepared.splits["train"]) == 97


def test_a_template_that_drops_what_rows_hold_is_told_once(
    tmp_path: Path, prepare_rows: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    """One error with the count and the first lines, and the template that shows tools; other faults beside it stay."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    more = {"messages": [*turns, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "a"}]}
    rows = [plain, {"messages": turns}, plain, more, {"messages": turns}, *[more] * 7]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    error = failure(prepare_rows, train="d.jsonl")
    assert not isinstance(error, Problems) and (error.exit_code, error.file, error.line) == (4, "d.jsonl", 2)
    assert "in 10 rows, lines 2, 4, 5 ..." in str(error) and "tool_calls" in str(error)
    assert str(error).endswith("use data.chat_template: hermes, or data.dropped_fields: warn")
    rows[2] = {"messages": []}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    both = failure(prepare_rows, train="d.jsonl")
    assert isinstance(both, Problems) and "2 errors" in str(both)
    assert sorted(each.line or 0 for each in both.errors) == [2, 3]


def test_bad_rows_of_several_sources_count_apart(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(95)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": 1}, {"text": "b"}])
    error = failure(prepare_rows, train=["a.jsonl", "b.jsonl"], bad_rows={"policy": "skip", "max_fraction": 0.05})
    assert "b.jsonl" in str(error) and "1 of 2" in str(error)


def test_validation_is_drawn_by_the_seed(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"text": f"row number {n}"} for n in range(40)])
    first = prepare_rows(train="d.jsonl", validation={"fraction": 0.25}, seed=1)
    again = prepare_rows(train="d.jsonl", validation={"fraction": 0.25}, seed=1)
    other = prepare_rows(train="d.jsonl", validation={"fraction": 0.25}, seed=2)
    assert first.validation is not None and other.validation is not None
    held = [line for *_, line in rows_of(first.validation)]
    stayed = [line for *_, line in rows_of(first.train)]
    assert len(held) == 10 and sorted(held + stayed) == list(range(1, 41))
    assert first.digest == again.digest != other.digest
    assert first.report.overlaps == ()
    assert first.facts().validation_rows == 10 and first.facts().rows == 30
    write_jsonl(tmp_path / "one.jsonl", [{"text": "row"}])
    assert "too few" in str(failure(prepare_rows, train="one.jsonl", validation={"fraction": 0.5}))
    with pytest.raises(DataError):
        hold_out(prepare_rows(train="one.jsonl").train, 0.1, 0)


def test_overlaps_are_counted_and_warned_about(tmp_path: Path, prepare_rows: Prepare, listener: Listener) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(5)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": f"row {n}"} for n in (7, 3, 8, 1)])
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": "row", "completion": " 8"}])  # the same tokens in another form
    prepared = prepare_rows(
        train="a.jsonl", validation="b.jsonl", test="c.jsonl", retention=[SourceSection(path="b.jsonl")]
    )
    found = {(o.first, o.second): (o.rows, o.places) for o in prepared.report.overlaps}
    assert found["train", "validation"] == (2, (("a.jsonl:4", "b.jsonl:2"), ("a.jsonl:2", "b.jsonl:4")))
    assert found["validation", "test"] == (1, (("b.jsonl:3", "c.jsonl:1"),))
    assert ("train", "test") not in found
    assert found["validation", "retention"][0] == 4
    assert any("2 rows of validation occur in train" in warning for warning in listener.warnings)
    assert any("1 row of test occurs in validation" in warning for warning in listener.warnings)


def test_repeats_count_in_the_facts(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(4)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": f"other {n}"} for n in range(4)])
    prepared = prepare_rows(train=[{"path": "a.jsonl", "repeats": 2.5}, {"path": "b.jsonl", "repeats": 0.5}])
    assert prepared.facts().rows == 10 + 2
    lengths = list(prepared.train.lengths)
    assert prepared.facts().tokens == round(2.5 * sum(lengths[:4]) + 0.5 * sum(lengths[4:]))


def test_generation_rows(tmp_path: Path, prepare_rows: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    several = [*chat("one", "first")["messages"], *chat("two", "second")["messages"], {"role": "user", "content": "x"}]
    rows = [{**chat("q", "a"), "must_contain": ["a"]}, {"messages": several}]
    write_jsonl(tmp_path / "d.jsonl", rows)
    write_jsonl(tmp_path / "v.jsonl", [{"prompt": "q ", "completion": "c"}, {"prompt": "r ", "completion": "d"}])
    prepared = prepare_rows(train="d.jsonl", validation="v.jsonl")
    one, two = prepared.generation_rows("train")
    assert (one.reference, one.must_contain, one.line) == ("a", ("a",), 1)
    assert one.prompt_text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert one.prompt_ids == tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert two.reference == "second" and "first<|im_end|>" in two.prompt_text and "x" not in two.prompt_text
    assert [(r.prompt_text, r.reference) for r in prepared.generation_rows("validation")] == [("q ", "c"), ("r ", "d")]
    assert len(prepared.generation_rows("validation", limit=1)) == 1
    assert prepared.generation_rows("test") == []
    held = prepare_rows(train="v.jsonl", validation={"fraction": 0.5})
    assert held.validation is not None
    assert [r.line for r in held.generation_rows("validation")] == [held.validation[0].line]


def test_hit_and_miss_say_why(tmp_path: Path, prepare_rows: Prepare, listener: Listener) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("Capital of France?", "Paris."), chat("q", "a")])

    def said(**data: Any) -> str:
        listener.infos.clear()
        prepare_rows(train="d.jsonl", **data)
        return listener.infos[-1]

    assert "cache miss: not prepared before" in said()
    cold = prepare_rows(train="d.jsonl")
    assert "cache hit" in listener.infos[-1]
    assert "cache miss: max_length changed" in said(max_length=1024)
    assert "cache miss: train_on, max_length changed" in said(train_on="last_turn")
    assert "cache miss: chat template, train_on changed" in said(chat_template="chatml")
    assert "cache miss: tokenizer, chat template changed" in said(using=make_tokenizer(300))
    assert "cache hit" in said()
    assert prepare_rows(train="d.jsonl").digest == cold.digest
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a")])
    assert "cache miss: data of d.jsonl changed" in said()
    assert len(prepare_rows(train="d.jsonl").train) == 1


def test_rows_are_known_by_their_content_wherever_they_lie(
    tmp_path: Path, prepare_rows: Prepare, listener: Listener
) -> None:
    """A run's copy of its recipe spells paths from its own folder; errors and notes name files as this recipe does."""
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a"), {"messages": []}])
    (tmp_path / "run").mkdir()
    skip = {"policy": "skip", "max_fraction": 0.5}
    cold = prepare_rows(train="d.jsonl", bad_rows=skip)
    for name in ("run/../d.jsonl", str(tmp_path / "d.jsonl")):
        again = prepare_rows(train=name, bad_rows=skip)
        assert "cache hit" in listener.infos[-1] and again.train.folder == cold.train.folder
        [note] = again.report.splits["train"].notes
        assert (again.train[0].file, note.file, note.line) == (name, name, 2)
        assert again.digest == cold.digest
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "b")])
    prepare_rows(train="run/../d.jsonl")
    assert "cache miss: data of run/../d.jsonl" in listener.infos[-1]
    assert "run/../d.jsonl:1" in str(failure(prepare_rows, train="run/../d.jsonl", max_length=8))


def test_the_same_bytes_in_another_format_are_other_rows(tmp_path: Path, prepare_rows: Prepare) -> None:
    for name in ("d.jsonl", "d.txt"):
        write_jsonl(tmp_path / name, [{"text": "two words"}])
    as_object, as_line = (prepare_rows(train={"path": name, "format": "text"}) for name in ("d.jsonl", "d.txt"))
    assert as_object.digest != as_line.digest


def test_another_tokenizer_never_gets_cached_ids(tmp_path: Path, prepare_rows: Prepare, listener: Listener) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("What is the capital of France?", "Paris, of some words.")])
    small, large = make_tokenizer(270), make_tokenizer(400)
    prepare_rows(train="d.jsonl", using=large)
    switched = rows_of(prepare_rows(train="d.jsonl", using=small).train)
    assert "cache miss" in listener.infos[-1]
    [(ids, *_)] = switched
    row = chat("What is the capital of France?", "Paris, of some words.")["messages"]
    assert ids == small.apply_chat_template(row, tokenize=True, return_dict=False)
    assert ids != large.apply_chat_template(row, tokenize=True, return_dict=False)


def test_changed_code_is_a_miss(
    tmp_path: Path, prepare_rows: Prepare, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a")])
    prepare_rows(train="d.jsonl")
    monkeypatch.setattr(cache_module, "_LIBRARIES", ("pytest",))
    cache_module.code_version.cache_clear()
    try:
        prepare_rows(train="d.jsonl")
    finally:
        cache_module.code_version.cache_clear()
    assert "cache miss: code changed" in listener.infos[-1]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_copy_is_not_used(tmp_path: Path, prepare_rows: Prepare, listener: Listener, damage: str) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a"), chat("r", "b")])
    cold = prepare_rows(train="d.jsonl")
    victim = cold.train.folder / ("MANIFEST" if damage == "manifest" else "tokens.int32")
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[0] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-4])
    else:
        victim.unlink()
    again = prepare_rows(train="d.jsonl")
    assert "cache miss: the cached copy is damaged" in listener.infos[-1]
    assert again.digest == cold.digest
    prepare_rows(train="d.jsonl")
    assert "cache hit" in listener.infos[-1]


def test_what_was_counted_is_said_again_from_the_cache(
    tmp_path: Path, prepare_rows: Prepare, listener: Listener
) -> None:
    rows = [
        {"instruction": "a", "output": "b", "inputs": "c"},
        {"instruction": LONG, "output": LONG},
        {"instruction": 1},
    ]
    write_jsonl(tmp_path / "d.jsonl", [*rows[:2], *rows[:1] * 20, rows[2]])
    data = {"train": "d.jsonl", "max_length": 40, "overlength": "truncate", "bad_rows": {"policy": "skip"}}
    cold = prepare_rows(**data)
    said = sorted(listener.warnings)
    listener.warnings.clear()
    warm = prepare_rows(**data)
    assert "cache hit" in listener.infos[-1]
    assert sorted(listener.warnings) == said and any("'inputs'" in warning for warning in said)
    before, after = (p.report.to_json()["splits"]["train"] for p in (cold, warm))
    assert {**before, "cache": ""} == {**after, "cache": ""}
    assert before["sources"][0]["unread"] == {"inputs": 21}
    assert [(note["what"], note["line"]) for note in before["notes"]] == [("cut", 2), ("bad", 23)]


def test_workers_give_what_one_process_gives(
    tmp_path: Path, prepare_rows: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same rows, same order, same notes, with a bad row and a long one among them."""
    rows: list[dict[str, Any]] = [chat(f"question {n}", f"answer {n}") for n in range(900)]
    rows[300], rows[700] = {"messages": [{"role": "user", "content": "q"}]}, chat("q", LONG)
    write_jsonl(tmp_path / "d.jsonl", rows)
    data = {"train": "d.jsonl", "max_length": 60, "overlength": "drop", "bad_rows": {"policy": "skip"}}
    inline = prepare_rows(**data)
    started: list[float] = []
    monkeypatch.setattr(encoding, "count_workers", lambda seconds: started.append(seconds) or 3)
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 64)
    subprocess.run(["rm", "-r", str(tmp_path / "cache")], check=True)
    parallel = prepare_rows(**data)
    assert len(started) == 1 and started[0] > 0
    assert parallel.digest == inline.digest
    one, other = (p.report.to_json()["splits"]["train"] for p in (inline, parallel))
    assert one == other
    assert [(n["what"], n["line"]) for n in one["notes"]] == [("bad", 301), ("dropped", 701)]


@pytest.mark.parametrize(
    ("seconds", "cores", "workers"), [(0.5, 8, 0), (1.3, 8, 0), (1.5, 8, 2), (99.0, 2, 2), (99.0, 1, 0), (9e9, 99, 16)]
)
def test_processes_start_where_seconds_of_work_are_left(
    monkeypatch: pytest.MonkeyPatch, seconds: float, cores: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert encoding.count_workers(seconds) == workers


def test_long_rows_are_cut_into_small_chunks_and_the_first_ones_are_smaller() -> None:
    def lengths(characters: int, rows: int) -> list[int]:
        samples = ((0, number, Sample("f", number, text="x" * characters)) for number in range(rows))
        return [len(chunk) for chunk in encoding.cut_chunks(samples)]

    assert lengths(10, 600) == [32, 32, 256, 256, 24]
    assert lengths(50_000, 20) == [1, 1, 8, 8, 2]
    tools = ({"type": "function", "function": {"name": "f", "description": "y" * 60_000}},)
    chats = ((0, n, Sample("f", n, messages=({"role": "user", "content": "ab"},), tools=tools)) for n in range(9))
    assert [len(chunk) for chunk in encoding.cut_chunks(chats)] == [1, 1, 7]
    assert lengths(0, 0) == []


def test_a_few_hundred_long_chats_get_workers_and_one_liners_none(
    tmp_path: Path, prepare_rows: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides is measured: the same number of rows, short and then long, on two cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    asked: list[float] = []
    real = encoding.count_workers
    monkeypatch.setattr(encoding, "count_workers", lambda seconds: asked.append(seconds) or real(seconds))
    started = []
    start = encoding.ProcessPoolExecutor
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", lambda *a, **k: started.append(a[0]) or start(*a, **k))
    monkeypatch.setattr(encoding, "SECONDS_A_WORKER", 0.2)
    for name, words in (("short", 1), ("long", 3_000)):
        write_jsonl(tmp_path / f"{name}.jsonl", [chat(f"q {n}", "word " * words) for n in range(120)])
        prepare_rows(train=f"{name}.jsonl", max_length=20_000)
        assert started == ([] if name == "short" else [2]), (name, asked)


def test_a_killed_preparation_leaves_nothing_that_is_used(
    tmp_path: Path, prepare_rows: Prepare, listener: Listener
) -> None:
    """SIGKILL while tokens are written: no entry, no orphan; the next run removes the rest and makes the same ids."""
    write_jsonl(tmp_path / "d.jsonl", [{"text": f"row {n}"} for n in range(6000)])
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from tests.support.tiny_data import make_tokenizer, Listener
        from lorafit.data.prepare import build_renderer, prepare
        from lorafit.kinds.tasks import tasks
        from lorafit.recipe.schema import DataSection
        folder, section = Path(sys.argv[1]), DataSection(train="d.jsonl")
        prepare(section, folder=folder, renderer=build_renderer(make_tokenizer(), section, folder),
                task=tasks.make("causal-lm"), seed=0, cache_dir=folder / "cache", reporter=Listener())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(Path(__file__).parents[3])]
    process = subprocess.Popen(command)
    data = tmp_path / "cache"
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in data.glob(".tmp-*/tokens.int32")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(data.glob(".tmp-*")) and not list(data.glob("*/MANIFEST"))
    warm = prepare_rows(train="d.jsonl")
    assert "cache miss" in listener.infos[-1]
    assert not list(data.glob(".tmp-*"))
    subprocess.run(["rm", "-r", str(tmp_path / "cache")], check=True)
    assert prepare_rows(train="d.jsonl").digest == warm.digest
    assert not [p for p in _processes() if str(tmp_path) in p]


ORPHAN = """
import os, sys, time
from lorafit.data.encode_rows import _start_worker
parent, dies = os.getpid(), sys.argv[1] == "killed"
if os.fork() == 0:
    while dies and os.getppid() == parent:
        time.sleep(0.005)
    _start_worker(None, parent)
    os.write(1, b"works")
    os._exit(0)
if not dies:
    os.wait()
os._exit(0)
"""


@pytest.mark.parametrize(("parent", "said"), [("there", "works"), ("killed", "")])
def test_a_worker_whose_parent_was_killed_before_it_began_ends(parent: str, said: str) -> None:
    """It would hold the entry's lock, and the next preparation would wait for ever."""
    command = [sys.executable, "-c", ORPHAN, parent]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == said


def test_who_waits_for_another_preparation_is_told(
    tmp_path: Path, prepare_rows: Prepare, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a")])
    prepare_rows(train="d.jsonl")
    assert not any("waiting" in info for info in listener.infos)
    lock = next((tmp_path / "cache" / "locks").iterdir()).open()
    fcntl.flock(lock, fcntl.LOCK_EX)
    info = listener.info

    def release(message: str) -> None:
        info(message)
        if "another process prepares them" in message:
            lock.close()

    monkeypatch.setattr(listener, "info", release)
    prepare_rows(train="d.jsonl")
    assert lock.closed and "cache hit" in listener.infos[-1]


def _processes() -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def test_two_processes_build_once(tmp_path: Path, prepare_rows: Prepare) -> None:
    """The second waits for the first and then finds its rows."""
    write_jsonl(tmp_path / "d.jsonl", [{"text": f"row {n}"} for n in range(1500)])
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from tests.support.tiny_data import make_tokenizer, Listener
        from lorafit.data.prepare import build_renderer, prepare
        from lorafit.kinds.tasks import tasks
        from lorafit.recipe.schema import DataSection
        folder, section, listener = Path(sys.argv[1]), DataSection(train="d.jsonl"), Listener()
        renderer = build_renderer(make_tokenizer(), section, folder)
        prepared = prepare(section, folder=folder, renderer=renderer, task=tasks.make("causal-lm"), seed=0,
                           cache_dir=folder / "cache", reporter=listener)
        print(prepared.digest, listener.infos[-1])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(Path(__file__).parents[3])]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert all(process.returncode == 0 for process in both)
    assert len({line.split()[0] for line in said}) == 1
    assert sum("cache miss" in line for line in said) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a")])
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="LORAFIT_CACHE"):
        prepare_rows(train="d.jsonl")


def test_a_cache_where_a_file_is_in_the_way(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("q", "a")])
    (tmp_path / "cache").write_text("", encoding="utf-8")
    with pytest.raises(ResourceError, match="LORAFIT_CACHE"):
        prepare_rows(train="d.jsonl")


def test_a_file_that_is_written_to_meanwhile(
    tmp_path: Path, prepare_rows: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [chat("q", "a")])
    real = encoding.Encoder.encode_chunk

    def slow(self: encoding.Encoder, samples: Any) -> Any:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(chat("late", "row")) + "\n")
        return real(self, samples)

    monkeypatch.setattr(encoding.Encoder, "encode_chunk", slow)
    assert "was written to while it was read" in str(failure(prepare_rows, train="d.jsonl"))
    assert not list((tmp_path / "cache").glob("*/MANIFEST"))


def test_the_digest_is_of_rows_alone(tmp_path: Path, prepare_rows: Prepare) -> None:
    rows = [chat("q", "a"), chat("r", "b")]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=3), encoding="utf-8")
    digests = [prepare_rows(train=name).digest for name in ("a.jsonl", "b.json")]
    assert digests[0] == digests[1] and len(bytes.fromhex(digests[0])) == hashlib.sha256().digest_size
    assert prepare_rows(train="a.jsonl", train_on="all").digest != digests[0]


def test_what_happened_to_rows_is_said_and_reported(tmp_path: Path, prepare_rows: Prepare, listener: Listener) -> None:
    rows: list[Any] = [chat(f"question {number}", "answer") for number in range(40)]
    rows[4], rows[16] = {"messages": 5}, {"messages": [{"role": "user", "content": "x"}]}
    rows[7] = chat("long " * 60, "answer")
    write_jsonl(tmp_path / "d.jsonl", rows)
    prepared = prepare_rows(
        train="d.jsonl", max_length=64, overlength="truncate", bad_rows={"policy": "skip", "max_fraction": 0.1}
    )
    said = "\n".join(listener.warnings)
    assert "train: 2 rows skipped, since they cannot be trained on (d.jsonl:5, d.jsonl:17)" in said
    assert "train: 1 row cut to max_length 64 (d.jsonl:8); raise data.max_length" in said
    assert tuple(listener.warnings) == prepared.report.warnings
    listener.warnings.clear()
    prepare_rows(train="d.jsonl", max_length=64, overlength="drop", bad_rows={"policy": "skip", "max_fraction": 0.1})
    dropped = "train: 1 row dropped, longer than max_length 64 (d.jsonl:8)"
    assert any(dropped in warning for warning in listener.warnings)
    listener.warnings.clear()  # the cache's copy says the same
    prepare_rows(train="d.jsonl", max_length=64, overlength="drop", bad_rows={"policy": "skip", "max_fraction": 0.1})
    assert any("2 rows skipped" in warning for warning in listener.warnings)


def test_questions_with_different_answers_are_found(tmp_path: Path, prepare_rows: Prepare, listener: Listener) -> None:
    tools = chat("a", "1")["messages"] + chat("again", "2")["messages"]
    rows = [
        *(chat(f"unlike {number}", "yes") for number in range(3)),
        chat("Is it open?", "Yes."),
        chat("Is it open?", "Yes."),  # the same row twice contradicts nothing
        chat("Where?", "Here."),
        chat("Is it open?", "No."),
        {"messages": tools},
        {"messages": [*tools[:-1], {"role": "assistant", "content": "3"}]},
        chat("a", "4"),  # as the first turn above, which is not the last answer there
        chat("Where?", "There."),
    ]
    write_jsonl(tmp_path / "d.jsonl", rows)
    found = prepare_rows(train="d.jsonl").report.contradictions
    assert found is not None
    assert (found.prompts, found.rows) == (3, 7)
    assert found.places == (
        ("d.jsonl:4", "d.jsonl:7"),
        ("d.jsonl:6", "d.jsonl:11"),
        ("d.jsonl:8", "d.jsonl:9"),
    )
    said = [warning for warning in listener.warnings if "different answers" in warning]
    assert len(said) == 1 and "train: 3 questions with different answers, e.g. d.jsonl:4 and d.jsonl:7" in said[0]
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "one text"}, {"text": "another"}])
    write_jsonl(tmp_path / "alike.jsonl", [chat("q", "a"), chat("q", "a"), chat("r", "a")])
    assert prepare_rows(train="texts.jsonl").report.contradictions is None
    assert prepare_rows(train="alike.jsonl").report.contradictions is None


LONG = "What is the capital of France? Paris. " * 900


@pytest.mark.parametrize(
    "row",
    [
        {"text": LONG},
        {"prompt": LONG, "completion": "Paris."},
        {"prompt": "q", "completion": LONG},
        chat(LONG, "Paris."),
        chat("q", LONG),
        {
            "messages": [
                {"role": "system", "content": LONG},
                *chat(LONG, LONG)["messages"],
                *chat(LONG, "a")["messages"],
            ]
        },
        {"messages": [*chat("a", "b")["messages"], *chat(LONG, LONG)["messages"]]},
    ],
)
def test_what_is_cut_is_the_same_whether_all_of_it_was_tokenised(
    tmp_path: Path, prepare_rows: Prepare, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]
) -> None:
    write_jsonl(tmp_path / "d.jsonl", [row])
    monkeypatch.setattr(truncate, "CHARACTERS_PER_TOKEN", 10**9)
    whole = prepare_rows(train="d.jsonl", max_length=48, overlength="truncate")
    assert "max_length is 48" in whole.report.splits["train"].notes[0].reason
    monkeypatch.setattr(truncate, "CHARACTERS_PER_TOKEN", 16)
    shutil.rmtree(tmp_path / "cache")
    stretches = prepare_rows(train="d.jsonl", max_length=48, overlength="truncate")
    assert rows_of(stretches.train) == rows_of(whole.train)
    assert "over 96 tokens, max_length is 48" in stretches.report.splits["train"].notes[0].reason


def test_no_row_that_fits_is_taken_for_too_long(tmp_path: Path, prepare_rows: Prepare) -> None:
    """Blanks that the template trims, words that are one unknown token: far more characters than tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    trims = CHATML.replace("message['content']", "message['content'] | trim")
    write_jsonl(tmp_path / "d.jsonl", [chat(" " * 9000 + "q", "a" + "\n" * 9000)])
    assert len(prepare_rows(using=make_tokenizer(chat_template=trims), train="d.jsonl", max_length=32).train) == 1
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", pad_token="</s>")
    write_jsonl(tmp_path / "w.jsonl", [{"text": f"a {'x' * 90_000} a"}])
    assert list(prepare_rows(using=fast, train="w.jsonl", max_length=8).train.lengths) == [4]


def test_a_row_of_megabytes_is_refused_at_once(tmp_path: Path, prepare_rows: Prepare) -> None:
    write_jsonl(tmp_path / "d.jsonl", [chat("capital of France " * 400_000, "Paris."), chat("q", "a")])
    began = time.process_time()
    assert "d.jsonl:1: over 128 tokens, max_length is 64" in str(failure(prepare_rows, train="d.jsonl", max_length=64))
    assert time.process_time() - began < 5  # all of its tokens take half a minute, and a gigabyte


@pytest.mark.parametrize(
    ("rows", "refused", "said", "mended"),
    [
        (
            [
                chat("a?", "b."),
                {"messages": []},
                {"messages": chat("a?", "")["messages"][:1]},
                chat("c?", "d."),
            ],
            {},
            ["2 errors", "d.jsonl:2"],
            {"bad_rows": {"policy": "skip", "max_fraction": 0.5}},
        ),
        (
            [chat("a?", "b."), {"messages": []}],
            {"bad_rows": {"policy": "skip", "max_fraction": 0.1}},
            ["1 of 2 rows is bad", "0.1"],
            {"bad_rows": {"policy": "skip", "max_fraction": 0.5}},
        ),
        ([chat("a? " * 90, "b."), chat("c?", "d.")], {"max_length": 64}, ["d.jsonl:1", "max_length is 64"], None),
        (
            [chat("a? " * 90, "b.")] * 2,
            {"max_length": 64, "overlength": "drop"},
            ["no rows left: 2 of 2 are longer"],
            None,
        ),
    ],
)
def test_a_pass_that_failed_is_not_made_again(
    tmp_path: Path,
    prepare_rows: Prepare,
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    refused: dict[str, Any],
    said: list[str],
    mended: dict[str, Any] | None,
) -> None:
    write_jsonl(tmp_path / "d.jsonl", rows)
    first = failure(prepare_rows, train="d.jsonl", **refused)
    assert all(part in str(first) for part in said) and "cache miss" in listener.infos[-1]

    def encode_chunk(*_: Any) -> Any:
        raise AssertionError("rows are prepared again")

    monkeypatch.setattr(encoding.Encoder, "encode_chunk", encode_chunk)
    again = failure(prepare_rows, train="d.jsonl", **refused)
    assert again.to_json() == first.to_json() and type(again) is type(first) and "cache hit" in listener.infos[-1]
    if mended is not None:  # the rule for bad rows decides what is said of them, and not what the others become
        assert len(prepare_rows(train="d.jsonl", **mended).train) == sum(bool(row["messages"][1:]) for row in rows)
