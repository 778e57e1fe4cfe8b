"""`lorafit init`: rows in five forms become a recipe that is valid and trains; nothing is written over."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import lorafit
from lorafit.errors import DataError, ModelError, UsageError
from lorafit.studies.first_recipe import find_readings, init
from tests.support.tiny_data import Listener
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_pairs, make_rows, write_rows

pytestmark = pytest.mark.usefixtures("memory_by_formula", "shared_cache")


def csv_of(*lines: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        file = folder / "rows_train.csv"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    return write


def jsonl_of(rows: Sequence[dict[str, Any]]) -> Callable[[Path], Path]:
    return lambda folder: write_rows(folder / "rows_train.jsonl", list(rows))


def chat_turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


FORMS = {
    "chats": (
        jsonl_of(
            [{"messages": [chat_turn("user", f"say {n}"), chat_turn("assistant", f"it is {n}")]} for n in range(8)]
        ),
        "causal-lm",
        "messages",
        {},
    ),
    "prompts and completions": (
        jsonl_of([{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(8)]),
        "causal-lm",
        "prompt_completion",
        {},
    ),
    "instructions": (
        jsonl_of([{"instruction": f"add 1 to {n}", "input": "", "response": str(n + 1)} for n in range(8)]),
        "causal-lm",
        "alpaca",
        {"output": "response"},
    ),
    "texts with labels": (
        csv_of("sentence,category", *(f"text {n},{'good' if n % 2 else 'bad'}" for n in range(8))),
        "sequence-classification",
        "text_label",
        {"text": "sentence", "label": "category"},
    ),
    "pairs": (jsonl_of(make_pairs(8)), "dpo", "preference", {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("form", FORMS)
def test_rows_become_a_recipe_that_trains(
    form: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, task, name, columns = FORMS[form]
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path)
    first = lorafit.init(data.name, output="made/first.yaml", base_model=base, quantization="none", quiet=True)
    assert (first.reading.task, first.reading.format, first.reading.columns) == (task, name, columns)
    values = yaml.safe_load(first.path.read_text(encoding="utf-8"))
    longest = first.longest_tokens
    assert longest is not None and longest <= values["data"]["max_length"] < 1.1 * longest + 32
    lorafit.validate(first.path)
    run = lorafit.train(first.path, overrides={"training.epochs": 1, "adapter.r": 2}, quiet=True)
    assert run.path.name == "first" and (tmp_path / "made/runs/first/adapter").is_dir()


def test_files_beside_the_rows_are_the_held_out_ones(base: Path, tmp_path: Path) -> None:
    for split, count in (("train", 60), ("valid", 4), ("test", 4)):
        write_rows(tmp_path / f"rows_{split}.jsonl", make_rows(count))
    first = init(tmp_path / "rows_train.jsonl", output=tmp_path / "r.yaml", base_model=str(base))
    data = yaml.safe_load(first.text)["data"]
    assert Path(data["test"]).name == "rows_test.jsonl" and Path(data["validation"]).name == "rows_valid.jsonl"
    many = init(tmp_path / "rows_train.jsonl", output=tmp_path / "s.yaml", base_model=str(base), task="causal-lm")
    assert many.rows == 60


def test_what_is_there_stays(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(2))
    there = tmp_path / "recipe.yaml"
    there.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="exists already"):
        init(rows, output=there, base_model=str(base))
    assert there.read_text(encoding="utf-8") == "mine"


def test_rows_of_no_known_form_are_refused_with_what_they_lack(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"colour": "red", "height": 3}])
    with pytest.raises(DataError, match="no known format has the columns"):
        init(rows, output=tmp_path / "recipe.yaml")
    with pytest.raises(DataError, match="task dpo needs"):
        find_readings(write_rows(tmp_path / "chats.jsonl", make_rows(2)), "dpo")
    with pytest.raises(UsageError, match="'lroa' is none"):
        init(rows, output=tmp_path / "recipe.yaml", adapter="lroa")
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_base_that_cannot_be_opened_leaves_a_guess_that_says_so(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(3))
    first = init(rows, output=tmp_path / "recipe.yaml", base_model="nobody/no-such-model")
    assert first.longest_tokens is None and "a guess by characters" in first.text
    lorafit.validate(first.path)


def test_a_person_is_asked_for_what_is_not_given(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_pairs(4))
    asked = []

    def ask(question: str, answers: Sequence[str], usual: str) -> str:
        asked.append(question)
        return {"What": "orpo", "Adapter?": "dora"}.get(question.split()[0], usual)

    first = init(rows, output=tmp_path / "recipe.yaml", base_model=str(base), quantization="none", ask=ask)
    assert [question.split()[0] for question in asked] == ["What", "Adapter?"]
    assert yaml.safe_load(first.text)["task"] == "orpo" and yaml.safe_load(first.text)["adapter"] == "dora"
    assert json.loads(json.dumps(first.to_json()))["task"] == "orpo"


def test_a_column_that_nothing_reads_is_told_and_columns_can_be_named(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "klassen.csv"
    file.write_text("Text;Klasse\n" + "".join(f"Satz {n};{n % 2}\n" for n in range(6)), encoding="utf-8")
    said = Listener()
    init(file, output=tmp_path / "text.yaml", base_model=str(base), reporter=said)
    assert any("nothing reads Klasse" in warning for warning in said.warnings)
    columns = {"text": "Text", "label": "Klasse"}
    for given in (columns, "text=Text, label=Klasse"):
        output = tmp_path / f"{len(given)}.yaml"
        reading = init(file, output=output, base_model=str(base), columns=given).reading
        assert (reading.task, reading.columns) == ("sequence-classification", columns)
    with pytest.raises(UsageError, match="names no columns"):
        init(file, output=tmp_path / "no.yaml", columns="text")


def test_the_reading_that_takes_most_columns_comes_first(tmp_path: Path) -> None:
    scored = write_rows(tmp_path / "scores.jsonl", [{"text": f"text {n}", "score": n / 7} for n in range(4)])
    assert find_readings(scored)[0].task == "sequence-regression"
    odd = tmp_path / "odd.csv"
    odd.write_text("Aufgabe,Kontext,L\u00f6sung\nWas?,Laden,Das.\n", encoding="utf-8")
    with pytest.raises(DataError) as found:
        find_readings(odd)
    assert "--columns" in str(found.value.todo) and "text" not in str(found.value.key)
    mapped = {"question": "Aufgabe", "answer": "L\u00f6sung"}
    assert find_readings(odd, columns=mapped)[0].format == "question_answer"


def test_what_is_written_goes_with_the_adapter_and_the_rows(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(45))
    whole = init(rows, output=tmp_path / "full.yaml", base_model=str(base), adapter="full")
    values = yaml.safe_load(whole.text)
    assert values["model"]["quantization"] == "none" and float(values["training"]["learning_rate"]) == 2e-5
    assert values["training"]["epochs"] == 10  # 6 steps each: fewer teach nothing
    text = tmp_path / "book.txt"
    text.write_text("one\n\ntwo\n\n" * 20, encoding="utf-8")
    read = yaml.safe_load(init(text, output=tmp_path / "text.yaml", base_model=str(base)).text)
    assert read["data"]["overlength"] == "split"
    with pytest.raises(ModelError, match=r"config\.json"):
        init(rows, output=tmp_path / "no.yaml", base_model=str(tmp_path))
    assert not (tmp_path / "no.yaml").exists()
