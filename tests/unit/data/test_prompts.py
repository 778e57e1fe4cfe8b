"""Prompts are read as training reads its rows, and rendered to the ids that stood before training's answers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lorafit.answering.opening import Voice
from lorafit.contracts import Sample, Silent
from lorafit.data.plain_text import PlainText
from lorafit.data.prepare import Prepared
from lorafit.data.prompts import column_names, read_prompt_file, read_prompt_rows
from lorafit.errors import DataError, LorafitError
from lorafit.kinds.formats import formats, required_fields
from lorafit.recipe.schema import SourceSection
from tests.support.chat_families import QWEN
from tests.support.tiny_data import CHATML, make_tokenizer, write_jsonl

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "required": ["city"]}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo \\"N\\""}'}}
ROWS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "cold?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "-3"},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": [TOOL],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "cold?"}, {"from": "gpt", "value": "Yes."}],
        "system": "Be brief.",
    },
    "alpaca": {
        "instruction": "Translate into French.",
        "input": "good day",
        "system": "Be brief.",
        "history": [["a", "b"]],
        "output": "bonjour",
    },
    "question_answer": {"question": "cold?", "answer": "Yes.", "system": "Be brief."},
}
FLAT = ("alpaca", "question_answer")  # formats whose answer is a column of its own


class Embedded(torch.nn.Module):
    """As much of a model as a prompt's ids are compared with: its embedding."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(tokens, 1)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding


def read(file: Path, *sources: SourceSection) -> list[Sample]:
    return read_prompt_file(file, column_names(sources), Silent())


def refusal(file: Path, *sources: SourceSection) -> str:
    with pytest.raises(LorafitError) as caught:
        read(file, *sources)
    assert caught.value.exit_code == 4
    return str(caught.value)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def write_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


WRITERS: dict[str, Callable[[Path, Sequence[Mapping[str, Any]]], Path]] = {
    "d.jsonl": write_jsonl,
    "d.ndjson": write_jsonl,
    "lines.json": write_jsonl,
    "d.json": write_json,
    "d.csv": write_csv,
    "d.parquet": write_parquet,
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", WRITERS)
def test_the_prompt_of_a_training_row_is_what_training_shows_before_its_answer(
    tmp_path: Path, prepare_rows: Callable[..., Prepared], name: str, kind: str
) -> None:
    """The same ids as evaluation's, and as transformers' own rendering with a generation prompt."""
    tokenizer = make_tokenizer(vocabulary=400, chat_template=QWEN)
    row = ROWS[name]
    WRITERS[kind](tmp_path / kind, [row, row])
    prepared = prepare_rows(using=tokenizer, train=kind)
    shown = prepared.generation_rows("train")
    voice = Voice(tokenizer, prepared._renderer.chats)
    prompts = read(tmp_path / kind)
    assert [voice.prompt_ids(prompt) for prompt in prompts] == [row.prompt_ids for row in shown]
    assert [(prompt.file, prompt.line) for prompt in prompts] == [(str(tmp_path / kind), row.line) for row in shown]
    official = tokenizer.apply_chat_template(
        list(prompts[0].turns), tools=prompts[0].tools, add_generation_prompt=True, return_dict=False
    )
    assert voice.prompt_ids(prompts[0]) == official


@pytest.mark.parametrize("name", ROWS)
def test_a_row_without_its_answer_is_the_same_prompt(tmp_path: Path, name: str) -> None:
    whole = ROWS[name]
    field = next(iter(whole))
    without = {k: v for k, v in whole.items() if k != formats.get(name).answer}
    without[field] = whole[field] if name in FLAT else whole[field][:-1]
    write_jsonl(tmp_path / "whole.jsonl", [whole])
    write_jsonl(tmp_path / "without.jsonl", [without])
    expected, found = read(tmp_path / "whole.jsonl")[0], read(tmp_path / "without.jsonl")[0]
    assert found.turns == expected.turns and found.tools == expected.tools
    if name in FLAT:
        write_jsonl(tmp_path / "empty.jsonl", [{**whole, str(formats.get(name).answer): ""}])
        assert read(tmp_path / "empty.jsonl")[0].turns == expected.turns


def test_every_format_says_what_asks() -> None:
    asking = {name: sorted(required_fields(kind, prompts=True)) for name, kind in formats.items()}
    assert asking == {
        "word_labels": ["words"],
        "alpaca": ["instruction"],
        "image_messages": ["messages"],
        "messages": ["messages"],
        "preference": ["rejected"],
        "prompt_completion": ["prompt"],
        "question_answer": ["question"],
        "sharegpt": ["conversations"],
        "source_target": ["source"],
        "text": [],
        "text_label": ["label", "text"],
        "text_score": ["score", "text"],
        "unpaired_preference": ["label", "prompt"],
    }


def test_where_a_chat_is_cut() -> None:
    def cut(*turns: tuple[str, int]) -> int:
        messages = [{"role": role, "content": "x", **({"weight": 0} if not w else {})} for role, w in turns]
        return len(formats.get("messages").read_prompt({"messages": messages}, "d", 1).turns)

    user, answer, untrained = ("user", 1), ("assistant", 1), ("assistant", 0)
    assert cut(user) == 1
    assert cut(user, answer) == 1
    assert cut(user, answer, user) == 3
    assert cut(user, answer, user, answer) == 3
    assert cut(user, answer, user, untrained) == 1
    assert cut(user, untrained, user, untrained) == 3
    for turns in ([answer], [("system", 1)], [("system", 1), answer]):
        with pytest.raises(DataError, match="no turn to answer"):
            cut(*turns)


def test_text_is_a_prompt_a_line_and_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    strange = "form\x0cfeed next\x85line line\u2028separator \x1c"
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + f"{strange}\r\n \n  kept  \nlast".encode())
    found = read(tmp_path / "p.txt")
    assert [(prompt.line, prompt.prompt) for prompt in found] == [(1, strange), (3, "  kept  "), (4, "last")]
    for name, content in {
        "p.jsonl": json.dumps({"question": strange}, ensure_ascii=False) + "\n",
        "p.csv": f'question\n"{strange}"\n',
    }.items():
        (tmp_path / name).write_bytes(content.encode())
        assert [prompt.turns[-1]["content"] for prompt in read(tmp_path / name)] == [strange]


def test_columns_are_called_as_in_the_recipe(tmp_path: Path) -> None:
    sources = [
        SourceSection(path="a.jsonl"),
        SourceSection(path="b.csv", columns={"question": "Frage", "answer": "Antwort"}),
    ]
    bare = SourceSection(path="c.tsv", columns={"prompt": "2", "completion": "1"})
    (tmp_path / "german.csv").write_text('Frage,Antwort\n"Hi, you",x\n', encoding="utf-8")
    (tmp_path / "asks.csv").write_text('Frage\n"Hi, you"\n', encoding="utf-8")
    (tmp_path / "own.csv").write_text('question,Antwort\n"Hi, you",x\n', encoding="utf-8")
    for name in ("german.csv", "asks.csv", "own.csv"):
        found = read(tmp_path / name, *sources)
        assert [(p.line, p.turns) for p in found] == [(2, ({"role": "user", "content": "Hi, you"},))], name
    (tmp_path / "bare.tsv").write_text("ham\thello\n", encoding="utf-8")
    assert [p.prompt for p in read(tmp_path / "bare.tsv", bare)] == ["hello"]
    assert "bare.tsv" in refusal(tmp_path / "bare.tsv", bare, *sources)  # a header might be taken for a row
    assert "german.csv:2: no prompt among the columns Frage, Antwort" in refusal(tmp_path / "german.csv")
    (tmp_path / "other.csv").write_text("Titel,Text\na,b\n", encoding="utf-8")
    assert "as the run's recipe does: columns: {question: Frage" in refusal(tmp_path / "other.csv", *sources)


def test_a_column_by_another_name_is_told_what_to_call_it(tmp_path: Path) -> None:
    (tmp_path / "de.csv").write_text("Frage,Antwort\nkalt?,ja\n", encoding="utf-8")
    assert "call Frage question; or call the one that asks" in refusal(tmp_path / "de.csv")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("d.csv", b"Frage,Antwort\na,b\n", ["d.csv:2", "no prompt", "Frage, Antwort", "question"]),
        ("d.csv", b"question,answer\n", ["d.csv", "no prompts"]),
        ("d.csv", b"question,answer\na\n", ["d.csv:2", "1 fields"]),
        ("d.jsonl", b'{"text": "all of it"}\n', ["d.jsonl:1", "no prompt", "text"]),
        ("d.jsonl", b'{"question": "a"}\n{oops}\n', ["d.jsonl:2", "invalid JSON"]),
        ("d.jsonl", b'{"question": "a"}\n{"question": ""}\n', ["d.jsonl:2", "question", "is empty"]),
        ("d.jsonl", b'{"question": "a"}\n"b"\n', ["d.jsonl:2", "expected an object"]),
        ("d.jsonl", b'{"question": "a"}\n{"prompt": "a"}\n', ["question_answer (line 1)", "(line 2)"]),
        ("d.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}\n', ["d.jsonl:1", "no turn to answer"]),
        ("d.jsonl", b'{"questoin": "a"}\n', ["d.jsonl:1", "did you mean 'questoin'"]),
        ("d.json", b'[{"question": "a"}, 3]', ["d.json:1", "expected an object"]),
        ("d.txt", b"caf\xe9\n", ["d.txt:1", "UTF-8"]),
        ("d.txt", b" \n", ["d.txt", "no prompts"]),
        ("d.txt", b"", ["d.txt", "no rows"]),
        ("d.md", b"# A title\n", ["d.md", "not read"]),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    said = refusal(tmp_path / name)
    assert [part for part in parts if part not in said] == [], said


def test_duplicate_keys_in_the_arguments_of_a_call_are_named(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "order", "arguments": '{"id": 1, "id": 2}'}}
    called = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": ""}]
    write_jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "q"}, *called]}])
    said = refusal(tmp_path / "d.jsonl")
    assert "d.jsonl:1: messages[1].tool_calls[0].arguments: duplicate key 'id'" in said


def test_no_hub_is_asked_for_prompts(tmp_path: Path) -> None:
    assert "no such file" in refusal(Path("nobody/nothing"))
    assert "paths are relative to the working folder" in refusal(tmp_path / "nothing.txt")


def test_a_field_that_the_template_drops_is_refused_with_its_place(tmp_path: Path) -> None:
    from lorafit.data.chat.render import ChatRenderer

    tokenizer = make_tokenizer(chat_template=CHATML)
    voice = Voice(tokenizer, ChatRenderer(tokenizer))
    write_jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "q"}], "tools": [TOOL]}])
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*drops the tools"):
        voice.prompt_ids(read(tmp_path / "d.jsonl")[0])


def test_a_model_of_verbatim_text_gets_one_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    voice = Voice(tokenizer, None)
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Once upon", "completion": " a time"}])
    write_jsonl(tmp_path / "q.jsonl", [{"question": "Once upon"}])
    write_jsonl(tmp_path / "s.jsonl", [{"question": "Once upon", "system": "s"}])
    (tmp_path / "p.txt").write_text("Once upon\n", encoding="utf-8")
    expected = tokenizer("Once upon", add_special_tokens=True)["input_ids"]
    assert [voice.prompt_ids(read(tmp_path / name)[0]) for name in ("p.jsonl", "q.jsonl", "p.txt")] == [expected] * 3
    with pytest.raises(DataError, match=r"s\.jsonl:1: .*the prompt is a chat"):
        voice.prompt_ids(read(tmp_path / "s.jsonl")[0])


def test_rows_of_a_program_may_differ(tmp_path: Path) -> None:
    known = column_names([SourceSection(path="b.csv", columns={"question": "Frage", "answer": "Antwort"})])
    rows = ["a text", {"Frage": "b", "Antwort": "x"}, {"question": "c"}, {"messages": ROWS["messages"]["messages"][:2]}]
    assert [prompt.turns[-1]["content"] for prompt in read_prompt_rows(rows, known)] == ["a text", "b", "c", "cold?"]
    refused = [([], "none"), ([{"text": "x"}], "no prompt"), ([3], "expected a text"), ([{"question": 3}], "string")]
    for bad, part in refused:
        with pytest.raises(DataError, match=part):
            read_prompt_rows(bad, known)


def test_a_tokenizer_that_fills_up_and_cuts_by_itself_does_neither_to_rows() -> None:
    """As those of sentence encoders, whose tokenizer.json asks for 128 tokens: what stands around a text is kept."""
    tokenizer = make_tokenizer(chat_template=None)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[(word, backend.token_to_id(word)) for word in ("<|im_start|>", "<|im_end|>")],
    )
    text = "A text of some words, and of more words."
    wanted = tokenizer(text)["input_ids"]
    backend.enable_padding(length=64)
    backend.enable_truncation(max_length=8)
    assert len(wanted) > 8 and PlainText(tokenizer).labelled(Sample("", 0, text=text), 256).input_ids == wanted
