"""A bad row at the command line: the last line says file, line and key, the exit code is 4, and nothing is written."""

from __future__ import annotations

import json

import pytest

from lorafit.kinds.tasks import tasks
from tests.support.bad_rows import BAD_ROWS
from tests.support.tiny_data import write_jsonl
from tests.support.world import World, say_all

SHOWN = [
    ("messages", "an answer that is empty", "causal-lm"),
    ("preference", "chosen is rejected", "dpo"),
    ("text_label", "a label that is none of them", "sequence-classification"),
    ("word_labels", "a tag too few", "token-classification"),
]


@pytest.mark.parametrize(("name", "what", "kind"), SHOWN)
def test_every_command_that_reads_rows_names_it(world: World, name: str, what: str, kind: str) -> None:
    rows = BAD_ROWS[name]
    changes, key = rows.bad[what]
    write_jsonl(world.root / "d.jsonl", [rows.good, {**rows.good, **changes}])
    options = {option: value for option, value in rows.task.items() if option in tasks.section(kind).model_fields}
    world.recipe(
        ("name: tiny\n", f"name: tiny\ntask: {json.dumps({'kind': kind, **options})}\n"),
        ("evaluation:\n  final: [perplexity]\n  max_new_tokens: 8\n", ""),
    )
    before = world.digests()
    for command in (["train"], ["train", "--dry-run"], ["preview"]):
        outcome = world.run(*command, "r.yaml")
        say_all(outcome, 4, f"error: d.jsonl:2: {key}: ")
        told = world.run(*command, "r.yaml", "--json").json["error"]
        assert (told["file"], told["line"], told["key"]) == ("d.jsonl", 2, key)
    assert world.digests() == before
