"""Every registered task whole: trained by its own metric, resumed to the bit, scored, inspected, merged, opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import lorafit
from lorafit.estimation import measured
from lorafit.kinds.tasks import tasks
from tests.support.every_task import EVERY_TASK
from tests.support.tiny_recipe import write_rows
from tests.support.world import stop_after


@pytest.mark.parametrize("kind", tasks.names())
def test_a_task_is_trained_resumed_scored_and_merged(
    kind: str, tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kind in EVERY_TASK, f"task {kind} owes a row to tests/support/every_task.py"
    monkeypatch.setenv("LORAFIT_CACHE", str(shared_cache))
    monkeypatch.setattr(measured, "covers", lambda step: True)  # a dry run takes ten times as long as this training
    taught = EVERY_TASK[kind]
    for name, count, first in (("train", 8, 0), ("valid", 4, 40), ("test", 6, 60)):
        write_rows(tmp_path / f"{name}.jsonl", taught.rows(count, first, tmp_path))
    during = list(dict.fromkeys(["loss", taught.metric]))
    recipe: dict[str, Any] = {
        "name": "taught",
        "task": {"kind": kind, **taught.options},
        "model": {
            "base": str(taught.base(tmp_path / "base")),
            "dtype": "fp32",
            "attention": "eager",
            "quantization": "none",
        },
        "adapter": {"r": 4, "dropout": 0.1},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl", "test": "test.jsonl", "max_length": 128},
        "training": {
            "max_steps": 2,
            "batch_size": 4,
            "micro_batch_tokens": 256,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
        },
        "evaluation": {
            "every_steps": 1,
            "during": during,
            "final": during,
            "early_stopping": {"metric": taught.metric, "patience": 2},
            **({"max_new_tokens": 3} if tasks.get(kind).writes_answers else {}),
        },
        "checkpoints": {"every_steps": 1},
        "output": str(tmp_path / "run"),
    }
    monkeypatch.chdir(tmp_path)
    assert lorafit.preview(recipe, show=1, quiet=True).to_json()["rows"]
    run = lorafit.train(recipe, quiet=True).path
    weights = run / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    assert taught.metric in json.loads((run / "best.json").read_text())["metric"]
    stop_after(run, 1)
    lorafit.train(recipe, resume=True, quiet=True)
    assert weights.read_bytes() == whole
    scored = lorafit.evaluate(run, quiet=True).to_json()["metrics"]
    assert set(scored) >= set(during) - {"rouge"}
    worth = lorafit.inspect_adapter(run, quiet=True).ablation
    assert worth is not None and worth.tuned_loss == pytest.approx(scored["loss"]["tuned"], rel=1e-6)
    assert sum(part.value for part in worth.parts) == pytest.approx(worth.gain, abs=1e-6)
    merged = lorafit.merge(run, tmp_path / "merged", quiet=True)
    assert merged.parity is not None and merged.parity.max_logit_difference < 1e-4
    opened = getattr(transformers, tasks.get(kind)(tasks.make_section(kind)).model_class.auto_class)
    _, found = opened.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(found.values())
