"""What recipes/data/README.md says of the reviews."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

DATA = Path(__file__).resolve().parents[3] / "recipes" / "data"


def read(split: str) -> list[tuple[str, str]]:
    lines = (DATA / f"reviews_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["text"], row["label"]) for row in map(json.loads, lines)]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def test_reviews_are_balanced_short_and_different() -> None:
    for split, count in (("train", 80), ("test", 40)):
        rows = read(split)
        assert Counter(label for _, label in rows) == {"positive": count // 2, "negative": count // 2}
        assert len({text for text, _ in rows}) == count and max(len(text) for text, _ in rows) < 110
    train = [words(text) for text, _ in read("train")]
    shared = [len(words(text) & other) / len(words(text) | other) for text, _ in read("test") for other in train]
    assert max(shared) < 0.4
