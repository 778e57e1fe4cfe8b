"""What `fused` attention holds: the closed form against the dry run, and the dry run against a real step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit.model.attention import register_fused_attention
from lorafit.model.known_models import known_config
from tests.unit.estimation.test_dry_run import ask, exact_both, measure_both
from tests.unit.memory.test_estimate import MODELS, one_thread  # noqa: F401

FUSED = {"model__attention": "fused"}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama fp32": {"model__dtype": "fp32"},
    "llama without dropout": {"adapter__dropout": 0.0},
    "llama with frozen outputs": {"adapter__target_modules": "[q_proj, v_proj]"},
    "qwen3": {},
}


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_holds_what_a_real_step_holds(case: str, tmp_path: Path) -> None:
    config = MODELS[case.split()[0]]
    register_fused_attention()
    question = ask(config, tmp_path, **CASES[case], **FUSED)
    real, dry = measure_both(question, config), exact_both(question, config)
    for checkpointing in (False, True):
        assert dry[checkpointing].tensor_bytes == pytest.approx(real[checkpointing].tensor_bytes, rel=0.02)


@pytest.mark.parametrize(("tokens", "dropout"), [(225, 0.0), pytest.param(1024, 0.05, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", pytest.param("Qwen/Qwen2.5-7B", marks=pytest.mark.slow)])
def test_closed_form_meets_the_dry_run(model: str, tokens: int, dropout: float, tmp_path: Path) -> None:
    config = {**(known_config(model) or {}), "num_hidden_layers": 4}
    question = ask(config, tmp_path, tokens=tokens, model__quantization="nf4", adapter__dropout=dropout, **FUSED)
    for checkpointing, dry in exact_both(question, config).items():
        assert question.at(2 * tokens, checkpointing).tensor_bytes == pytest.approx(dry.tensor_bytes, rel=0.02)


@pytest.mark.parametrize("rows", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_where_attention_is_the_worst_moment(rows: int, tmp_path: Path) -> None:
    """Many heads, long rows, a narrow MLP and few words."""
    config = {
        **MODELS["llama"],
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 2048,
    }
    question = ask(config, tmp_path, tokens=1500, adapter__dropout=0.0, **FUSED)
    for checkpointing, dry in exact_both(question, config, rows).items():
        closed = question.at(rows * 1500, checkpointing)
        assert closed.peak_phase.name == dry.peak_phase.name == "backward"
        assert closed.peak_phase.where.endswith("attention")
        assert closed.tensor_bytes == pytest.approx(dry.tensor_bytes, rel=0.02)


def test_it_keeps_less_than_the_others_and_nothing_else_where_sdpa_runs(tmp_path: Path) -> None:
    config = MODELS["llama"]

    def kept(attention: str, **changes: Any) -> int:
        question = ask(config, tmp_path, model__attention=attention, **changes)
        return question.at(1024, False).components["kept_activations"]

    assert kept("fused") < kept("sdpa") < kept("eager")
    assert kept("fused", device_kind="cuda") == kept("sdpa", device_kind="cuda")
    assert kept("fused", data__packing="true") == kept("sdpa", data__packing="true")
