"""The shipped recipes of sequence to sequence run, with a tiny model in the place of the hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafit import pipeline
from lorafit.evaluation.evaluation import Evaluation
from lorafit.files.atomic import read_object
from tests.support.option_world import evaluation_lines
from tests.support.tiny_seq2seq import make_base, make_marian_base

pytestmark = pytest.mark.usefixtures("memory_by_formula")

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
WORDS = (("red", "rot"), ("blue", "blau"), ("green", "grün"), ("mug", "Becher"), ("plate", "Teller"))


def run_small(folder: Path, name: str, data: dict[str, Any]) -> tuple[Evaluation, dict[str, Any]]:
    """Trains two steps on `base` and scores what came of it; the recipe's values but for model, rows and lengths."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    small = {
        "model": {"base": str(folder / "base")},
        "data": data,
        "training": {"epochs": None, "max_steps": 2},
        "evaluation": {"every_steps": 1, "max_new_tokens": 5},
        "checkpoints": {"every_steps": 1},
    }
    for section, changes in small.items():
        values[section] = {**values[section], **changes}
    values["output"] = str(folder / "run")
    trained = pipeline.train(values)
    line = evaluation_lines(trained.run)[0]["evaluation"]
    return pipeline.evaluate(trained.run.root).evaluation, {**line, "best": read_object(trained.run.best)}


def test_summaries_are_learnt_and_the_best_checkpoint_is_that_of_rouge(tmp_path: Path) -> None:
    """Its own rows of recipes/data, with longer ones allowed: the tiny tokenizer has few words."""
    counts = {"train": 16, "test": 4}
    data = {name: [{"path": str(RECIPES / "data" / f"notes_{name}.jsonl"), "limit": n}] for name, n in counts.items()}
    make_base(tmp_path / "base")
    evaluation, during = run_small(tmp_path, "summarise_t5", {**data, "max_length": 512, "overlength": "drop"})
    assert len(evaluation.rows) == 4
    assert [line.name for line in evaluation.comparisons] == [
        *("rougeL", "rouge1", "rouge2", "rougeLsum", "bleu", "chrf", "perplexity"),
    ]
    assert {"rougeL", "loss"} < during.keys() and during["best"]["metric"] == "rouge"
    assert evaluation.sampling.num_beams == 4
    assert evaluation.rows[0].prompt.startswith("summarize: ")


def test_translations_are_learnt_from_the_hubs_columns(tmp_path: Path) -> None:
    rows = [{"translation": {"en": f"the {en} {n}", "de": f"das {de} {n}"}} for n in range(8) for en, de in WORDS]
    file = tmp_path / "books.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = yaml.safe_load((RECIPES / "translate_marian.yaml").read_text(encoding="utf-8"))
    (source,) = values["data"]["train"]
    data = {"train": [{"path": str(file), "columns": source["columns"]}], "validation": {"fraction": 0.2}}
    sides = {side: [row["translation"][name] for row in rows] for side, name in (("source", "en"), ("target", "de"))}
    make_marian_base(tmp_path / "base", sides)
    evaluation, during = run_small(tmp_path, "translate_marian", data)
    assert [line.name for line in evaluation.comparisons] == ["bleu", "chrf", "loss"]
    assert evaluation.rows[0].prompt.startswith("the ") and evaluation.rows[0].tuned.reference.startswith("das ")
    assert during["best"]["metric"] == "loss"
