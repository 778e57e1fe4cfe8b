"""What each task is taught on in the test that takes every one all the way: a new task joins by its row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import tiny_model, tiny_seq2seq
from tests.support.pictures import draw_rows
from tests.support.tiny_recipe import make_pairs, make_rows
from tests.support.tiny_vision import make_llava

Row = dict[str, Any]


@dataclass(frozen=True)
class Taught:
    """A task with what it learns from.

    Attributes:
        metric: Its own, by which a run is stopped.
        rows: How many, the number of the first, and a folder for files that they name.
        base: Makes a base in a folder.
        options: Of the task's section.
    """

    metric: str
    rows: Callable[[int, int, Path], list[Row]]
    base: Callable[[Path], Path] = tiny_model.make_base
    options: Mapping[str, Any] = field(default_factory=dict)


def _each(make: Callable[[Row, int], Row]) -> Callable[[int, int, Path], list[Row]]:
    """Rows made of questions and answers, and of their numbers."""
    return lambda count, first, _: [make(row, first + n) for n, row in enumerate(make_rows(count, first=first))]


EVERY_TASK = {
    "causal-lm": Taught("rouge", _each(lambda row, _: row)),
    "dpo": Taught("reward_accuracy", lambda count, first, _: make_pairs(count, first=first)),
    "orpo": Taught("reward_accuracy", lambda count, first, _: make_pairs(count, first=first)),
    "reward": Taught("reward_accuracy", lambda count, first, _: make_pairs(count, first=first)),
    "kto": Taught(
        "loss", _each(lambda row, n: {"prompt": row["question"], "completion": row["answer"], "label": n % 2 == 0})
    ),
    "sequence-classification": Taught(
        "macro_f1", _each(lambda row, n: {"text": row["question"], "label": ("red", "blue")[n % 2]})
    ),
    "sequence-regression": Taught("pearson", _each(lambda row, n: {"text": row["question"], "score": n % 3})),
    "token-classification": Taught(
        "entity_f1",
        _each(lambda row, n: {"words": ["a", "red", row["answer"].split()[0]], "labels": ["O", "B-COLOUR", "O"]}),
    ),
    "seq2seq-lm": Taught(
        "rouge", _each(lambda row, _: {"source": row["question"], "target": row["answer"]}), tiny_seq2seq.make_base
    ),
    "image-text-to-text": Taught(
        "exact_match", lambda count, first, to: draw_rows(to, count, f"p{first}-"), make_llava
    ),
}
