"""What is told of whole texts and pairs of them, from training to plain transformers: numbers, several labels, cuts."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

import lorafit
from lorafit import pipeline
from lorafit.errors import RecipeError
from lorafit.files.atomic import read_object
from tests.support.tiny_model import make_base

pytestmark = pytest.mark.usefixtures("memory_by_formula")

WORDS = ["red", "green", "blue", "mug", "plate", "bowl", "very", "not", "good", "bad", "number", *map(str, range(10))]


def make_encoder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, vocab_size=5 + len(WORDS))).save_pretrained(folder)
    return folder


def recipe_of(base: Path, output: Path, task: Any, **training: Any) -> dict[str, Any]:
    usual = {"max_steps": 4, "batch_size": 8, "learning_rate": 1.0e-2, "optimizer": "adamw"}
    return {
        "name": "texts",
        "task": task,
        "model": {"base": str(base), "quantization": "none", "dtype": "fp32"},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"train": "unused.jsonl", "max_length": 24},
        "training": {**usual, **training},
        "output": str(output),
    }


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_numbers_of_pairs_are_learnt_scored_merged_and_asked(tmp_path: Path, kind: str) -> None:
    """What the second of two texts is worth: from a table, into a table."""
    base = make_encoder(tmp_path / "base") if kind == "bert" else make_base(tmp_path / "base")
    pairs = [(f"{a} mug", f"{b} bowl", 1.0 + 2 * worth) for a in WORDS[:3] for worth, b in enumerate(WORDS[:3])]
    lines = [f"{n},{one},{two},{score}" for n, (one, two, score) in enumerate(pairs)]
    (tmp_path / "pairs.csv").write_text("\n".join(["id,sentence1,sentence2,similarity", *lines]))
    recipe = recipe_of(base, tmp_path / "run", "sequence-regression", max_steps=24, learning_rate=2.0e-2)
    columns = {"text": "sentence1", "text_pair": "sentence2", "score": "similarity"}
    source = {"path": str(tmp_path / "pairs.csv"), "columns": columns}
    recipe["data"] |= {"train": source, "validation": source}
    recipe["evaluation"] = {
        "every_steps": 8,
        "during": ["mse", "pearson"],
        "early_stopping": {"metric": "mse", "patience": 9},
    }
    run = lorafit.train(recipe, quiet=True)
    steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["evaluation"]["mse"] for line in steps if "evaluation" in line}
    best = read_object(run.path / "best.json")
    assert best["step"] == min(found, key=found.__getitem__) and best["value"] == min(found.values())

    evaluated = lorafit.evaluate(run, quiet=True, split="validation").to_json()
    assert set(evaluated["metrics"]) == {"mse", "rmse", "mae", "pearson", "spearman"}
    tuned = evaluated["metrics"]["mse"]
    assert (
        tuned["tuned"] == pytest.approx(best["value"], rel=1e-4)
        and tuned["low"] <= tuned["difference"] <= tuned["high"]
    )
    assert "ridge regression" in evaluated["base_note"] and evaluated["metrics"]["mse"]["base"] < 4.0
    worst = evaluated["worst_rows"][0]
    assert worst["reference"] in ("1", "3", "5") and float(worst["tuned"]["answer"]) > -9

    merged = lorafit.merge(run, tmp_path / "merged", quiet=True)
    assert merged.parity is not None and merged.parity.max_logit_difference < 1e-4
    assert merged.parity.adapter_loss == pytest.approx(merged.parity.merged_loss, abs=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.problem_type == "regression" and plain.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for by in (run.path, run.path / "adapter", tmp_path / "merged"):
        asked = "sentence1,sentence2\nred mug,red bowl\nred mug,blue bowl\n"
        if by != run.path:
            asked = asked.replace("sentence1,sentence2", "text,text_pair")
        (tmp_path / "asked.csv").write_text(asked)
        (tmp_path / "out.csv").unlink(missing_ok=True)
        answered = pipeline.classify(by, input_file=tmp_path / "asked.csv", output=tmp_path / "out.csv")
        with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
            told = list(csv.DictReader(file))
        assert [row["text_pair"] for row in told] == ["red bowl", "blue bowl"]
        for row, values in zip(told, answered.values, strict=True):
            with torch.no_grad():
                own = plain(**tokenizer(row["text"], row["text_pair"], return_tensors="pt")).logits[0]
            assert float(row["score"]) == values["score"] == pytest.approx(float(own), abs=1e-5)
    unmapped = {**recipe, "data": {**recipe["data"], "train": str(tmp_path / "pairs.csv")}}
    with pytest.raises(lorafit.LorafitError, match=r"\{text: sentence1, text_pair: sentence2, score: similarity\}"):
        lorafit.preview(unmapped, quiet=True)


def test_thresholds_are_chosen_kept_and_used(tmp_path: Path) -> None:
    """By the run, its adapter alone and the merged model alike, and by a resume."""
    rows = [
        {"text": f"{a} {b} number {n}", "label": [word for word in ("red", "mug") if word in (a, b)]}
        for n in range(5)
        for a in ("red", "green")
        for b in ("mug", "plate")
    ]
    task = {"kind": "sequence-classification", "multi_label": True, "labels": ["red", "mug"], "threshold": "f1_each"}
    recipe = recipe_of(make_encoder(tmp_path / "base"), tmp_path / "run", task, max_steps=6)
    recipe["checkpoints"] = {"every_steps": 3}
    recipe["evaluation"] = {
        "every_steps": 2,
        "during": ["micro_f1", "macro_f1"],
        "final": ["micro_f1", "macro_f1", "loss"],
        "early_stopping": {"metric": "macro_f1", "patience": 9},
    }
    run = lorafit.train(recipe, rows=rows, validation_rows=rows, quiet=True)
    noted = json.loads((run.path / "adapter" / "lorafit.json").read_text())["card"]["task"]
    assert noted["threshold"] == "f1_each" and len(noted["thresholds"]) == 2 and noted["thresholds"] != [0.5, 0.5]

    best = read_object(run.path / "best.json")
    steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert best["value"] == max(line["evaluation"]["macro_f1"] for line in steps if "evaluation" in line)
    evaluated = lorafit.evaluate(run, rows=rows, quiet=True).to_json()
    assert evaluated["metrics"]["macro_f1"]["tuned"] == pytest.approx(best["value"])
    table = evaluated["tables"]["tuned"]["classes"]
    assert table["headings"][-1] == "given above" and [line[-1] for line in table["lines"]] == noted["thresholds"]

    texts = [row["text"] for row in rows]
    lorafit.merge(run, tmp_path / "merged", quiet=True)
    for by in (run.path, run.path / "adapter", tmp_path / "merged"):
        told = lorafit.classify(by, texts, quiet=True).to_json()["labels"]
        for row in told:
            above = zip(row["probabilities"].items(), noted["thresholds"], strict=True)
            assert row["labels"] == [name for (name, share), threshold in above if share > threshold]
    given = {tuple(row["labels"]) for row in told}
    assert len(given) > 1, "thresholds that part nothing show nothing"

    saved = sorted((run.path / "checkpoints").iterdir())
    for folder in [run.path / "adapter", *(one for one in saved if int(one.name[-6:]) > 3)]:
        shutil.rmtree(folder)
    resumed = lorafit.train(recipe, rows=rows, validation_rows=rows, resume=True, quiet=True)
    assert json.loads((resumed.path / "adapter" / "lorafit.json").read_text())["card"]["task"] == noted


def test_a_threshold_needs_rows_to_be_chosen_on(tmp_path: Path) -> None:
    task = {"kind": "sequence-classification", "multi_label": True, "threshold": "f1"}
    recipe = recipe_of(tmp_path / "base", tmp_path / "run", task)
    with pytest.raises(RecipeError, match=r"task\.threshold: is chosen on validation rows"):
        lorafit.train(recipe, rows=[{"text": "a", "label": "x"}], quiet=True)


@pytest.mark.parametrize("keep", ["head", "tail", "both"])
def test_a_preview_shows_where_a_long_text_is_cut(tmp_path: Path, keep: str) -> None:
    """And which rows were."""
    rows = [{"text": f"{' '.join('1' * 20)} {' '.join('2' * 20)} {word}", "label": word} for word in ("good", "bad")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]))
    task = {"kind": "sequence-classification", "long_texts": keep}
    recipe = recipe_of(make_encoder(tmp_path / "base"), tmp_path / "run", task)
    recipe["data"] |= {"train": str(tmp_path / "rows.jsonl"), "max_length": 14, "overlength": "truncate"}
    shown = lorafit.preview(recipe, quiet=True)
    row, text = shown.rows[0], " ".join(str(shown).split())
    assert len(row.input_ids) == 14 and row.cuts == ({"head": 13, "tail": 1, "both": 4}[keep],)
    assert row.rendering.startswith("[CLS] " + {"head": "1 1 1 1", "tail": "2 2 2", "both": "1 1 1 2 2"}[keep])
    assert row.rendering.endswith("[SEP]") and ("good" in row.rendering) is (keep != "head")
    before = {"head": "1", "tail": "[CLS]", "both": "1"}[keep]
    assert f"{before} [... cut here ...] " in text and "rows.jsonl:4: cut: 43 tokens, max_length is 14" in text
