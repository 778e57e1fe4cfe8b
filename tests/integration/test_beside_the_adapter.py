"""What an adapter may have beside or instead of one rank everywhere: trained, resumed to the bit, scored, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafit
from benchmarks.method_matrix import Case, run
from lorafit.estimation import measured
from lorafit.kinds.adapters import adapters, refusal
from lorafit.kinds.quantizations import quantizations
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_rows, write_rows
from tests.support.world import stop_after

SECTIONS: dict[str, dict[str, Any]] = {
    "new tokens": {"new_tokens": {"<call>": "red mug", "<end>": ""}},
    "whole modules": {"modules_to_save": ["lm_head", "norm"]},
    "some layers": {"layers": {"last": 1}, "ranks": {"down_proj": 8}},
}


@pytest.mark.parametrize(
    ("what", "quantization"), [("new tokens", "nf4"), ("whole modules", "nf4"), ("some layers", "none")]
)
def test_it_is_trained_resumed_scored_and_merged(
    what: str, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "covers", lambda step: True)  # a dry run takes ten times as long as this training
    make_base(tmp_path / "base", tie_word_embeddings=True)
    rows = [{**row, "answer": f"<call>{row['answer']}<end>"} for row in make_rows(12)]
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    recipe: dict[str, Any] = {
        "name": "beside",
        "model": {"base": "base", "dtype": "bf16", "attention": "eager", "quantization": quantization},
        "adapter": {"r": 4, "dropout": 0.1, **SECTIONS[what]},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 128},
        "training": {
            "max_steps": 2,
            "batch_size": 4,
            "micro_batch_tokens": 256,
            "learning_rate": 1e-2,
            "gradient_checkpointing": True,
        },
        "evaluation": {"final": ["perplexity", "exact_match"], "max_new_tokens": 3},
        "checkpoints": {"every_steps": 1},
        "output": str(tmp_path / "run"),
    }
    monkeypatch.chdir(tmp_path)
    run = lorafit.train(recipe, quiet=True).path
    weights = run / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    stop_after(run, 1)
    lorafit.train(recipe, resume=True, quiet=True)
    assert weights.read_bytes() == whole
    assert lorafit.evaluate(run, quiet=True).to_json()["metrics"]
    merged = lorafit.merge(run, tmp_path / "merged", quiet=True)
    assert merged.parity is not None and merged.parity.mean_kl < 1e-3
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(found.values())
    assert lorafit.generate(tmp_path / "merged", "what", max_new_tokens=3, quiet=True)
    if what == "new tokens":
        saved = {name: value for name, value in load_file(weights).items() if "lora" not in name}
        assert [*map(len, saved.values())] == [2]
        embedding = model.get_input_embeddings().weight
        mean = AutoModelForCausalLM.from_pretrained(tmp_path / "base").get_input_embeddings().weight.mean(0)
        assert float((embedding[-1].float() - mean).abs().max()) > 5e-3, "rows hold the token, so its row was trained"
        assert len(AutoTokenizer.from_pretrained(run / "adapter")("<call>").input_ids) == 1
        assert len(embedding) == json.loads((run / "card.json").read_text())["embedding_rows"]
    if what == "some layers":
        assert {name.split(".layers.")[1][0] for name in load_file(weights)} == {"1"}


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", [kind for kind in adapters.names() if "layers" in adapters.section(kind).model_fields])
def test_every_method_beside_linears_takes_all_of_it(
    kind: str, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    base, fields = str(make_base(tmp_path / "base")), adapters.section(kind).model_fields
    options: dict[str, Any] = {
        "layers": {"last": 1},
        "ranks": {"late": 2},
        "modules_to_save": ["norm", "embed_tokens"],
        "new_tokens": ["<call>"],
    }
    for option, value in options.items():
        section = {"kind": kind, option: value}
        if option not in fields or refusal(
            adapters.make_section(kind, **{option: value}), quantizations.make(quantization)
        ):
            continue
        columns = ("train", "resume", "merge", "estimate")  # new tokens want a base that was resized before PEFT
        row = run(Case(kind, section), quantization, tmp_path / option, base, columns=columns)
        assert not row.broken and row.cells["resume"] == "to the bit", f"{option}: {row}"
        assert row.cells["merge"].startswith("yes, logits within"), f"{option}: {row}"
