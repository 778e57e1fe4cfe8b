"""Rows, and a recipe that trains on them within a second over the tiny base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny_model import WORDS


def make_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Questions and answers of different lengths; each row differs from the others."""
    rows = []
    for number in range(first, first + count):
        words = [WORDS[(number * 7 + k * 3) % len(WORDS)] for k in range(3 + number % 5)]
        answer = [WORDS[(number * 5 + k * 2) % len(WORDS)] for k in range(2 + number % 4)]
        rows.append({"question": f"{' '.join(words)} {number}", "answer": f"{' '.join(answer)} {number}"})
    return rows


def make_pairs(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Prompts with two answers each; those that are wanted begin alike, and so do the others."""
    return [
        {"prompt": row["question"], "chosen": f" opens {row['answer']}", "rejected": f" costs {row['answer']} ten"}
        for row in make_rows(count, first=first)
    ]


def make_verdicts(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """The answers of such pairs one by one, with a verdict each."""
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in make_pairs(count, first=first)
        for side in ("chosen", "rejected")
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def make_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe in `folder` over `base/` beside it; keyword arguments replace keys of its sections."""
    import yaml

    write_rows(folder / "train.jsonl", make_rows(24))
    write_rows(folder / "valid.jsonl", make_rows(4, first=100))
    write_rows(folder / "test.jsonl", [{**row, "must_contain": ["opens"]} for row in make_rows(6, first=200)])
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"base": "base", "dtype": "fp32", "attention": "eager", "quantization": "none"},
        "adapter": {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl", "test": "test.jsonl", "max_length": 128},
        "training": {
            "max_steps": 4,
            "batch_size": 4,
            "micro_batch_tokens": 256,
            "learning_rate": 1e-2,
            "optimizer": "adamw",
            "gradient_checkpointing": False,
        },
        "evaluation": {"final": ["perplexity", "must_contain"], "max_new_tokens": 8},
        "checkpoints": {"every_steps": 2},
        "output": "run",
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe


def train_tiny(folder: Path, **rows: list[dict[str, Any]]) -> Path:
    """A finished run in `folder`, for a module's tests: `make_recipe`'s, rows of its splits as given."""
    import pytest

    import lorafit
    from tests.support.tiny_model import make_base

    make_base(folder / "base")
    recipe = make_recipe(folder, evaluation={"final": ["perplexity"]})
    for split, own in rows.items():
        write_rows(folder / f"{split}.jsonl", own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFIT_CACHE", str(folder / "cache"))
        lorafit.train(recipe, quiet=True)
    return folder / "run"
