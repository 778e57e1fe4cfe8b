"""What attention holds: `fused`, the closed form against the dry run and that against a real step; sdpa on cards, the
closed form against the dry run, and that against what torch chose on a pretended card.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorafit.memory import StepMemory
from lorafit.model.attention import register_attention
from lorafit.model.known_models import known_config
from lorafit.ops.recomputed_layers import CHECKPOINTING
from tests.unit.estimation.test_dry_run import ask, exact_each, measure_each
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
    register_attention()
    question = ask(config, tmp_path, **CASES[case], **FUSED)
    real, dry = measure_each(question, config), exact_each(question, config)
    for checkpointing in CHECKPOINTING:
        assert dry[checkpointing].tensor_bytes == pytest.approx(real[checkpointing].tensor_bytes, rel=0.02)


@pytest.mark.parametrize(("tokens", "dropout"), [(225, 0.0), pytest.param(1024, 0.05, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", pytest.param("Qwen/Qwen2.5-7B", marks=pytest.mark.slow)])
def test_closed_form_meets_the_dry_run(model: str, tokens: int, dropout: float, tmp_path: Path) -> None:
    config = {**(known_config(model) or {}), "num_hidden_layers": 4}
    question = ask(config, tmp_path, tokens=tokens, model__quantization="nf4", adapter__dropout=dropout, **FUSED)
    for checkpointing, dry in exact_each(question, config).items():
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
    for checkpointing, dry in exact_each(question, config, rows).items():
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


ON_CARDS: dict[str, tuple[tuple[int, int], str, dict[bool, float]]] = {
    # MiB at the peak without checkpointing and with it; torch 2.13's own CUDA build on fake tensors, capability
    # pretended: the peak of plain products, which it took for shared keys on 7.5 whatever the dtype; adapters were cast
    # where they are used then, and now once a step: up to 5 MiB more
    "bf16 on 7.5: plain products": ((7, 5), "bf16", {False: 4727.4, True: 3956.5}),
    "fp16 on 7.5: keys repeated": ((7, 5), "fp16", {}),
    "fp32 on 9.0: keys repeated": ((9, 0), "fp32", {}),
    "bf16 on 8.0: flash": ((8, 0), "bf16", {}),
}


@pytest.mark.parametrize("case", ON_CARDS)
def test_scores_are_kept_only_where_a_card_has_no_other_kernel(case: str, tmp_path: Path) -> None:
    config = {**(known_config("meta-llama/Llama-3.1-8B") or {}), "num_hidden_layers": 2}
    capability, dtype, pretended = ON_CARDS[case]
    options = {"model__dtype": dtype, "model__quantization": "nf4", "adapter__dropout": 0.0}
    asked = ask(config, tmp_path, device_kind="cuda", tokens=2048, **options)
    asked = StepMemory(replace(asked.step, capability=capability))
    assert asked.step.keeps_scores is bool(pretended)
    for checkpointing, dry in exact_each(asked, config, 1).items():
        assert asked.at(2048, checkpointing).tensor_bytes == pytest.approx(dry.tensor_bytes, rel=0.005)
        if checkpointing in pretended:
            assert dry.tensor_bytes / 2**20 == pytest.approx(pretended[checkpointing] + 2.5, abs=2.6)
