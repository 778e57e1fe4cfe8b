"""What is said of columns that no format has: the likely format first, and a mapping that works as written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafit.contracts import Sample, Silent
from lorafit.data.sources.sample_set import read_sources
from lorafit.errors import LorafitError, RecipeError
from lorafit.kinds.tasks import tasks
from lorafit.recipe.schema import BadRowsSection, SourceSection

MAPPING = re.compile(r"columns: (\{[^}]*\})")


def read(
    folder: Path, row: dict[str, Any], reporter: Silent | None = None, task: str = "causal-lm", **section: Any
) -> Sample:
    (folder / "d.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    sources = [SourceSection(path="d.jsonl", **section)]
    return next(iter(read_sources(sources, folder, BadRowsSection(), reporter or Silent(), tasks.make(task))))


def refusal(folder: Path, row: dict[str, Any], **section: Any) -> str:
    with pytest.raises(LorafitError) as caught:
        read(folder, row, **section)
    assert len(f"error: {caught.value.one_line}") <= 300
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "likely"),
    [
        ({"instruction": "q", "response": "a"}, "likely alpaca, a chat"),
        ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, "likely alpaca, a chat"),
        ({"prompt": "q", "response": "a"}, "likely question_answer, a chat"),
        ({"input": "q", "output": "a"}, "likely question_answer, a chat"),
        ({"Frage": "q", "Antwort": "a"}, "likely question_answer, a chat"),
        ({"question": "q", "query": "a", "db_id": "x"}, "likely question_answer, a chat"),
        ({"sql_prompt": "q", "sql_context": "c", "sql": "a", "id": 1}, "likely alpaca, a chat"),
        ({"dialog": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "likely chats"),
        ({"conversation": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "likely chats"),
        ({"chat": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, "likely chats"),
    ],
)
def test_the_mapping_that_is_proposed_makes_the_chat(tmp_path: Path, row: dict[str, Any], likely: str) -> None:
    said = refusal(tmp_path, row)
    assert "d.jsonl:1" in said and likely in said
    columns = yaml.safe_load(MAPPING.findall(said)[0])
    sample = read(tmp_path, row, columns=columns)
    context = "\n\nc" if "c" in row.values() else ""
    assert [turn["content"] for turn in sample.messages or ()] == [f"q{context}", "a"]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("task", "row", "needs"),
    [
        ("dpo", {"question": "q", "accepted": "a", "bad": "b"}, "{prompt: question, chosen: accepted, rejected: bad}"),
        ("dpo", {"q": "q", "yes": "a", "no": "b"}, "{prompt: THEIRS, chosen: THEIRS, rejected: THEIRS}"),
        ("dpo", {"question": "q", "answer": "a"}, "{prompt: question, chosen: THEIRS, rejected: THEIRS}"),
        ("kto", {"prompt": "q", "answer": "a", "liked": True}, "{completion: answer, label: liked}"),
        ("kto", {"prompt": "q", "completion": "a", "labels": True}, "{label: labels}"),
        ("sequence-classification", {"review": "a", "stars": 3}, "{text: review, label: THEIRS}"),
        ("sequence-classification", {"text": "a", "class": "x"}, "{label: class}"),
    ],
)
def test_rows_of_another_form_are_told_the_columns_of_their_task(
    tmp_path: Path, task: str, row: dict[str, Any], needs: str
) -> None:
    fields = {"dpo": "prompt, chosen, rejected", "kto": "prompt, completion, label"}.get(task, "text, label")
    said = refusal(tmp_path, row, task=task)
    assert said.endswith(f"task {task} needs {fields}: columns: {needs}") and "prompt_completion learns" not in said
    assert read(tmp_path, {"question": "q", "answer": "a", **PAIR}, task="dpo").rejected is not None


@pytest.mark.parametrize(
    ("task", "row", "learners"),
    [
        ("kto", PAIR, "dpo, orpo or reward"),
        ("dpo", {"prompt": "q", "completion": "a", "label": True}, "kto"),
        ("sequence-classification", PAIR, "dpo, orpo or reward"),
    ],
)
def test_rows_that_another_task_learns_are_sent_to_it(
    tmp_path: Path, task: str, row: dict[str, Any], learners: str
) -> None:
    """No mapping of columns would make rows of the other form of them."""
    said = refusal(tmp_path, row, task=task)
    assert said.endswith(f"; those are rows for task {learners}") and "THEIRS" not in said and "needs" in said


@pytest.mark.parametrize("row", [{"prompt": "q", "response": "a"}, {"input": "q", "output": "a"}])
def test_verbatim_text_is_proposed_beside_the_chat(tmp_path: Path, row: dict[str, Any]) -> None:
    said = refusal(tmp_path, row)
    _, verbatim = MAPPING.findall(said)
    sample = read(tmp_path, row, columns=yaml.safe_load(verbatim))
    assert (sample.prompt, sample.completion, sample.messages) == ("q", "a", None)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"sentence": "a", "label": "x"}, ["likely text_label", "columns: {text: sentence}"]),
        ({"review": "a", "sentiment": "x"}, ["likely text_label", "columns: {text: review, label: sentiment}"]),
        ({"prompt": "q", "completion": "a", "labels": "False"}, ["kto", "{label: labels}", "prompt_completion learns"]),
        ({"question": "q"}, ["missing field 'answer' of question_answer", "generate --input"]),
        ({"title": "t", "body": "b"}, ["likely text, verbatim text: columns: {text: body}"]),
        ({"a": 1, "b": 2}, ["columns a, b", "{question: THEIRS, answer: THEIRS}", "{text: THEIRS}"]),
        ({"question": "q", "answers": "a"}, ["missing field 'answer'", "did you mean 'answers'"]),
    ],
)
def test_what_else_is_said(tmp_path: Path, row: dict[str, Any], parts: list[str]) -> None:
    said = refusal(tmp_path, row)
    assert [part for part in parts if part not in said] == [], said


def test_a_text_with_a_label_is_one_to_classify_and_a_text_where_the_recipe_says_so(tmp_path: Path) -> None:
    row = {"text": "a", "label": "spam"}
    assert (read(tmp_path, row).text, read(tmp_path, row).labels) == ("a", ("spam",))
    alone = read(tmp_path, row, format="text")
    assert (alone.text, alone.labels) == ("a", None)
    written = read(tmp_path, row, columns={"prompt": "text", "completion": "label"})
    assert (written.prompt, written.completion) == ("a", "spam")


def test_mapped_fields_decide_the_format(tmp_path: Path) -> None:
    """Not what other columns would make of the row."""
    row = {"question": "q", "answer": "a", "body": "b", "sql": "s"}
    sample = read(tmp_path, row, columns={"prompt": "body", "completion": "sql"})
    assert (sample.prompt, sample.completion, sample.messages) == ("b", "s", None)
    with pytest.raises(RecipeError, match="no format has completion and question together"):
        read(tmp_path, row, columns={"question": "body", "completion": "sql"})


def test_columns_that_are_not_read_are_warned_about(tmp_path: Path) -> None:
    row = {"question": "q", "context": "c", "answer": "a", "id": 7}
    reporter = Silent()
    read(tmp_path, row, reporter)
    list(read_sources([SourceSection(path="d.jsonl")], tmp_path, BadRowsSection(), reporter))
    assert len(reporter.warnings) == 1
    assert "column 'context' (1 row) is not read" in reporter.warnings[0]
    columns = yaml.safe_load(MAPPING.findall(reporter.warnings[0])[0])
    assert [turn["content"] for turn in read(tmp_path, row, columns=columns).messages or ()] == ["q\n\nc", "a"]
    reporter = Silent()
    sources = [SourceSection(path="d.jsonl", columns={"system": "contxt"})]
    list(read_sources(sources, tmp_path, BadRowsSection(), reporter))
    assert any("'contxt', which none of the first rows has" in warning for warning in reporter.warnings)


def test_images_beside_a_task_that_reads_text_name_the_task_that_reads_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
    reporter = Silent()
    read(tmp_path, row := {"messages": turns, "images": ["a.png"]}, reporter)
    list(read_sources([SourceSection(path="d.jsonl")], tmp_path, BadRowsSection(), reporter))
    assert reporter.warnings[0].endswith("'images' (1 row) is not read; task image-text-to-text reads it")
    assert read(tmp_path, row, task="image-text-to-text").pictures


def test_a_label_that_is_no_verdict_leaves_prompts_and_completions_alone(tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": "q", "completion": "a", "label": "spam"}).completion == "a"
    judged = {"prompt": "q", "completion": "a", "label": True}
    assert read(tmp_path, judged, format="prompt_completion").completion == "a"
    mapped = yaml.safe_load(MAPPING.findall(refusal(tmp_path, {"sentence": "a", "label": "x"}))[0])
    assert read(tmp_path, {"sentence": "a", "label": "x"}, columns=mapped).labels == ("x",)


def test_what_stands_inside_of_an_object_is_mapped_by_its_path(tmp_path: Path) -> None:
    row = {"id": 1, "translation": {"en": "red", "de": "rot", "more": {"fr": "rouge"}}}
    for target, found in (("translation.de", "rot"), ("translation.more.fr", "rouge")):
        columns = {"source": "translation.en", "target": target}
        sample = read(tmp_path, row, task="seq2seq-lm", columns=columns)
        assert (sample.prompt, sample.completion) == ("red", found)
    said = refusal(tmp_path, row, task="seq2seq-lm", columns={"source": "translation.en", "target": "translation.it"})
    assert "d.jsonl:1: columns: 'translation.it' is not a column of the rows; there are id, translation.en, " in said
    flat = {"a.b": "red", "c": "rot"}  # a name with a dot of its own
    assert read(tmp_path, flat, task="seq2seq-lm", columns={"source": "a.b", "target": "c"}).prompt == "red"


def test_the_mapping_that_is_proposed_for_translations_works(tmp_path: Path) -> None:
    row = {"translation": {"en": "red", "de": "rot"}}
    said = refusal(tmp_path, row, task="seq2seq-lm")
    columns = yaml.safe_load(MAPPING.findall(said)[0])
    sample = read(tmp_path, row, task="seq2seq-lm", columns=columns)
    assert (sample.prompt, sample.completion) == ("red", "rot")
