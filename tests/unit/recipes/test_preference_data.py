"""What recipes/data/README.md says of the pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[3] / "recipes" / "data"


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("split", "count"), [("train", 160), ("test", 40)])
def test_pairs_are_plain_and_wordy_answers_to_the_supports_questions(split: str, count: int) -> None:
    answers = {row["question"]: row["answer"] for row in read(f"support_{split}.jsonl")}
    pairs = read(f"preferences_{split}.jsonl")
    assert len(pairs) == len({pair["prompt"][0]["content"] for pair in pairs}) == count
    hidden = 0
    for pair in pairs:
        (asked,), (chosen,), (rejected,) = pair["prompt"], pair["chosen"], pair["rejected"]
        assert (asked["role"], chosen["role"], rejected["role"]) == ("user", "assistant", "assistant")
        assert chosen["content"] == answers[asked["content"]]
        assert len(rejected["content"]) > len(chosen["content"])
        hidden += chosen["content"] in rejected["content"]
    assert 0.6 * count < hidden < 0.7 * count
