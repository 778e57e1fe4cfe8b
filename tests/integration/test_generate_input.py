"""`lorafit generate --input`: the files that training reads, asked as training asked."""

from __future__ import annotations

import json
from typing import Any

from tests.support.tiny_model import CHATML
from tests.support.tiny_recipe import make_rows, write_rows
from tests.support.world import World, say_all


def answers(world: World, file: str, *flags: str) -> list[dict[str, Any]]:
    outcome = world.run("generate", "run", "--input", file, "--max-new-tokens", "4", "--json", *flags)
    assert outcome.code == 0, outcome.stderr
    found: list[dict[str, Any]] = outcome.json["answers"]
    return found


def write_german_csv(world: World, rows: list[dict[str, Any]], name: str, *, answered: bool = True) -> None:
    head = "Frage,Antwort\n" if answered else "Frage\n"
    lines = [f'"{row["question"]}"' + (f',"{row["answer"]}"' if answered else "") + "\n" for row in rows]
    (world.root / name).write_text(head + "".join(lines), encoding="utf-8")


def test_a_run_is_asked_with_the_rows_of_any_file(world: World) -> None:
    rows = make_rows(12)
    write_german_csv(world, rows, "d.csv")
    mapped = "  train: {path: d.csv, columns: {question: Frage, answer: Antwort}}"
    world.recipe(("  train: d.jsonl", mapped), ("output: run", "output: run\n"))
    say_all(world.run("train", "r.yaml"), 0)
    (world.root / "d.csv").rename(world.root / "moved.csv")  # the training file decides nothing
    (world.root / "d.csv").write_text("Frage,Antwort\nanother,one\n", encoding="utf-8")
    write_german_csv(world, rows, "asked.csv", answered=False)
    asked = [{"messages": [{"role": "user", "content": row["question"]}]} for row in rows]
    (world.root / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    (world.root / "asked.txt").write_text("".join(f"{row['question']}\n" for row in rows), encoding="utf-8")
    found = {name: answers(world, name) for name in ("moved.csv", "asked.csv", "asked.json", "asked.txt", "d.jsonl")}
    plain = [[(row["messages"], row["answer"]) for row in rows] for rows in found.values()]
    assert all(part == plain[0] for part in plain)
    assert [turns for turns, _ in plain[0]] == [row["messages"] for row in asked]
    assert [row["line"] for row in found["moved.csv"]] == list(range(2, 14))
    shown = world.run("generate", "run", "--input", "asked.csv", "--max-new-tokens", "4")
    say_all(shown, 0, *(f"> {row['question']}" for row in rows))
    assert "Antwort" not in shown.stderr  # what is to be written may be missing

    system = {"instruction": "what opens", "input": "on monday", "system": "the shop", "output": ""}
    (world.root / "alpaca.jsonl").write_text(json.dumps(system) + "\n", encoding="utf-8")
    only = answers(world, "alpaca.jsonl")[0]["messages"]
    assert [turn["content"] for turn in only] == ["the shop", "what opens\n\non monday"]
    (world.root / "other.csv").write_text("Titel,Text\na,b\n", encoding="utf-8")
    refused = world.run("generate", "run", "--input", "other.csv")
    asking = "call the one that asks conversations, instruction, messages, prompt or question"
    say_all(refused, 4, "other.csv:2", "Titel, Text", asking)


def test_other_rows_are_scored_by_the_names_of_the_runs_columns(world: World) -> None:
    """As they are asked by them; rows with names of their own are read as they are. Their path starts here, wherever
    the run is, as that of `--input` does; and a moved run says that other rows can be named.
    """
    rows = make_rows(12)
    write_german_csv(world, rows, "d.csv")
    world.recipe(("  train: d.jsonl", "  train: {path: d.csv, columns: {question: Frage, answer: Antwort}}"))
    say_all(world.run("train", "r.yaml"), 0)
    write_german_csv(world, rows[:3], "german.csv")
    write_rows(world.root / "english.jsonl", rows[:3])
    scored = []
    for name in ("german.csv", "english.jsonl"):
        outcome = world.run("eval", "run", "--set", f"data.test={name}", "--json")
        assert outcome.code == 0, outcome.stderr
        scored.append(outcome.json["metrics"]["perplexity"])
    assert scored[0]["tuned"] == scored[1]["tuned"] and scored[0]["rows"] == 3
    for flag in (
        "data.test=gone.json",
        "data.test=[gone.json]",
        "data.test[0].path=gone.json",
        "data.test.0.path=gone.json",
    ):
        command = ["eval", "run", "--set", "data.test=english.jsonl"] if "0" in flag else ["eval", "run"]
        said = world.run(*command, "--set", flag)
        say_all(said, 4, "data.test[0].path: ../gone.json: no such file", f"looked in {world.root}")
        assert "or score others" not in said.last, "the advice is what was typed"
    (world.root / "deep" / "er").mkdir(parents=True)
    (world.root / "run").rename(world.root / "deep" / "er" / "run")
    moved = world.run("eval", "deep/er/run", "--split", "train", "--base-model", str(world.base))
    say_all(moved, 4, "no such file", "--set data.test=FILE")


def test_what_cannot_be_asked_is_told_before_weights_are_loaded(world: World) -> None:
    world.rows()
    world.recipe()
    say_all(world.run("train", "r.yaml"), 0)
    say_all(world.run("merge", "run", "--output", "merged"), 0)
    with_tools = {"messages": [{"role": "user", "content": "open?"}], "tools": [{"name": "hours", "parameters": {}}]}
    (world.root / "asked.jsonl").write_text(json.dumps(make_rows(1)[0]) + "\n", encoding="utf-8")
    (world.root / "tools.jsonl").write_text(json.dumps(with_tools) + "\n", encoding="utf-8")
    world.loaded.clear()
    for name in ("run", "run/adapter", "merged"):
        refused = world.run("generate", name, "--input", "tools.jsonl")
        say_all(refused, 4, "tools.jsonl:1", "drops the tools")
    say_all(world.run("generate", "merged", "--input", "asked.jsonl", "--compare-base"), 2, "--compare-base")
    missing = world.run("generate", "package://no_such_package/x.gguf", "--prompt", "q")
    say_all(missing, 5, "error: no installed package is called 'no_such_package'")
    assert not world.loaded
    say_all(world.run("generate", "run", "--input", "asked.jsonl", "--max-new-tokens", "2"), 0)
    assert len(world.loaded) == 1


def test_rows_that_cannot_be_asked_are_told_before_an_evaluation_loads_weights(world: World) -> None:
    world.rows()
    world.rows(4, "t.jsonl", first=50)
    refusing = "{% if add_generation_prompt %}{{ raise_exception('nobody may ask') }}{% endif %}"
    (world.root / "t.jinja").write_text(refusing + CHATML, encoding="utf-8")
    world.recipe(("  train: d.jsonl", "  train: d.jsonl\n  test: t.jsonl\n  chat_template: t.jinja"))
    say_all(world.run("train", "r.yaml"), 0)
    world.loaded.clear()
    say_all(world.run("eval", "run"), 4, "t.jsonl:1: ", "nobody may ask")
    assert not world.loaded
