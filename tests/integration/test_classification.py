"""A classifier from training to plain transformers: head and labels included, and no text asked of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lorafit
from lorafit.errors import ModelError
from tests.support.tiny_model import make_base

ROWS = [{"text": f"{word} number {n}", "label": word} for n in range(6) for word in ("red", "green", "blue")]


def test_a_classifier_is_trained_scored_merged_and_asked(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    recipe = {
        "name": "colours",
        "task": "sequence-classification",
        "model": {"base": str(base), "quantization": "none", "dtype": "fp32"},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"train": "unused.jsonl", "max_length": 32},
        "training": {"max_steps": 3, "batch_size": 6, "learning_rate": 1.0e-2, "optimizer": "adamw"},
        "output": str(tmp_path / "run"),
    }
    run = lorafit.train(recipe, rows=ROWS, quiet=True)

    evaluated = lorafit.evaluate(run, rows=ROWS, quiet=True).to_json()
    assert set(evaluated["metrics"]) == {"accuracy", "macro_f1", "loss"}
    assert evaluated["metrics"]["accuracy"]["base"] == 1.0, "words alone tell the classes of these rows"
    assert "logistic regression" in evaluated["base_note"]
    confusion = evaluated["tables"]["tuned"]["confusion"]["lines"]
    assert sum(count for line in confusion for count in line[1:]) == len(ROWS)

    worst = evaluated["worst_rows"][0]
    assert worst["base"]["answer"] == worst["reference"] and worst["tuned"]["answer"] in ("blue", "green", "red")

    merged = lorafit.merge(run, tmp_path / "merged", quiet=True)
    assert merged.parity is not None and merged.parity.max_logit_difference < 1e-4
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.id2label == {0: "blue", 1: "green", 2: "red"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = ["a red one", "something blue, and longer"]
    for by in (run.path, run.path / "adapter", tmp_path / "merged"):
        found = lorafit.classify(by, asked, quiet=True).to_json()["labels"]
        for text, row in zip(asked, found, strict=True):
            with torch.no_grad():
                shares = plain(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
            assert list(row["probabilities"].values()) == pytest.approx(shares, abs=1e-5)
            assert row["labels"] == [plain.config.id2label[max(range(3), key=shares.__getitem__)]]
        with pytest.raises(ModelError, match="writes no text"):
            lorafit.generate(by, "hello", quiet=True)
    notes = json.loads((tmp_path / "run" / "adapter" / "lorafit.json").read_text())
    assert notes["head"]["tensors"] == ["score.weight"]
