"""`lorafit generate --input`: the files that training reads, asked as training asked."""

from __future__ import annotations

import json
from typing import Any

from tests.integration.conftest import World, say_all
from tests.integration.tiny_world import make_rows


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

    system = {"instruction": "what opens", "input": "on monday", "system": "the shop", "output": ""}
    (world.root / "alpaca.jsonl").write_text(json.dumps(system) + "\n", encoding="utf-8")
    only = answers(world, "alpaca.jsonl")[0]["messages"]
    assert [turn["content"] for turn in only] == ["the shop", "what opens\n\non monday"]
    (world.root / "other.csv").write_text("Titel,Text\na,b\n", encoding="utf-8")
    refused = world.run("generate", "run", "--input", "other.csv")
    say_all(refused, 4, "other.csv:2", "Titel, Text", "question")
