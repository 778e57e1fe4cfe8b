"""Packed rows give the losses and gradients of rows by themselves, and models that would mix documents are refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lorafit.data.packing import Cutter, MicroBatch, cut_packed
from lorafit.errors import NumericsError
from lorafit.kinds.tasks import tasks
from lorafit.objective import Objective
from lorafit.ops.masks import block_diagonal_mask
from lorafit.ops.rng import capture_rng, seed_rng
from lorafit.trainer.startup_proofs import prove_separation
from lorafit.trainer.state import TrainState
from tests.support.tiny_run import PAD, VOCABULARY, Job, Rows, TinyPlan

CAUSAL_LM = tasks.make("causal-lm")
build_objective = CAUSAL_LM.build_objective

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FALCON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
OPT = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(kind: str, attention: str, **changes: Any) -> Objective:
    """A model of random weights, large enough that attention matters, with LoRA on every linear."""
    given = {
        "llama": SIZES,
        "qwen3": {**SIZES, "head_dim": 8},
        "mistral": SIZES,
        "gemma2": {**SIZES, "head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 5.0},
        "gpt2": {**GPT2, **STILL},
        "falcon": FALCON,
        "opt": {**OPT, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0},
        "qwen3_next": {**SIZES, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
        "jamba": {**SIZES, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
        "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    }[kind]
    seed_rng(0)
    config = transformers.AutoConfig.for_model(kind, **{**given, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    targets = ["in_proj"] if kind == "mamba" else "all-linear"
    lora = LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    return build_objective(get_peft_model(model, lora), exact=kind == "gemma2").train()


def gradients(objective: Objective, parts: list[MicroBatch], rows: Rows) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss sum and adapter gradients of micro-batches."""
    objective.zero_grad()
    total = 0.0
    for part in parts:
        batch = objective.task.collate([[rows[row] for row in documents] for documents in part], PAD)
        loss_sum, _ = objective(batch)
        loss_sum.backward()
        total += float(loss_sum.detach())
    return total, {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def same(ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]) -> None:
    """Equal to 1e-5: the loss by itself, each gradient by its largest entry."""
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) >= 8
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, attention) for kind in ("llama", "gpt2", "qwen3") for attention in ("sdpa", "eager")]
    + [("gemma2", "eager"), ("falcon", "sdpa"), ("opt", "eager")],
)
def test_packed_is_unpacked_and_cut_is_uncut(kind: str, attention: str, checkpointing: bool) -> None:
    """Also with documents longer than gemma's sliding window, and for models that need a mask of their own."""
    objective, rows = build(kind, attention), Rows(16)
    prove_separation(objective, [rows[0], rows[1]], PAD, one_row=False)
    assert objective.masks_documents == (kind in ("falcon", "opt"))
    if checkpointing:
        objective.base.gradient_checkpointing_enable({"use_reentrant": False})
    alone = gradients(objective, [[[row]] for row in range(16)], rows)
    packed = cut_packed(range(16), rows.lengths, 160, one_row=False)
    assert max(len(documents) for part in packed for documents in part) > 2 and len(packed) > 1
    same(gradients(objective, packed, rows), alone)
    same(gradients(objective, cut_packed(range(16), rows.lengths, 60, one_row=True), rows), alone)
    same(gradients(objective, [[[row] for row in range(16)]], rows), alone)  # one padded micro-batch


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_eager_is_sdpa(kind: str, packing: bool) -> None:
    rows, found = Rows(16), []
    parts = Cutter(rows, CAUSAL_LM, PAD, packing).cut(range(16), 160)
    for attention in ("eager", "sdpa"):
        found.append(gradients(build(kind, attention), parts, rows))
    same(found[0], found[1])


def test_the_loop_trains_the_same_with_packing(job: Callable[..., Job]) -> None:
    logs = []
    for name, packing in (("plain", False), ("packed", True)):
        one = job(name, packing=packing, budget=256, rows=Rows(48), plan=TinyPlan(total_steps=6, save_every_steps=100))
        trainer = one.trainer()
        batches = map(trainer.cutter.collate, trainer.cutter.cut(trainer.step_rows.rows(1)[1], 256))
        assert any("position_ids" in batch.tensors for batch in batches) is packing
        trainer.fit(TrainState())
        logs.append(one.lines())
    for field in ("loss", "grad_norm", "tokens", "trained_tokens"):
        assert [line[field] for line in logs[1]] == pytest.approx([line[field] for line in logs[0]], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "attention"), [("qwen3_next", "eager"), ("qwen3_next", "sdpa"), ("jamba", "sdpa"), ("mamba", "eager")]
)
def test_models_that_carry_a_state_along_the_row_are_refused(kind: str, attention: str) -> None:
    objective, rows = build(kind, attention), Rows(2)
    with pytest.raises(
        NumericsError, match=f"data.packing: {kind} cannot be packed .* documents see each other"
    ) as caught:
        prove_separation(objective, [rows[0], rows[1]], PAD, one_row=False)
    assert str(caught.value).endswith("; set data.packing: false") and caught.value.exit_code == 9


def test_a_model_whose_window_a_mask_would_widen_is_not_given_one() -> None:
    """GPT-OSS builds no mask of positions; one mask for all would undo its sliding windows."""
    sizes = {**SIZES, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16}
    seed_rng(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    rows = Rows(2)
    with pytest.raises(NumericsError, match="gpt_oss cannot be packed with eager attention"):
        prove_separation(build_objective(model), [rows[0], rows[1]], PAD, one_row=True)


class Faulty(transformers.GPT2LMHeadModel):
    """A GPT-2 with one fault: positions that run on, a state along the row, or something counted over the row."""

    fault = ""

    def forward(self, input_ids: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            kwargs["attention_mask"] = block_diagonal_mask(position_ids, torch.float32)
        if self.fault == "positions":
            position_ids = None
        states = self.transformer.wte(input_ids)
        if self.fault == "state":
            states = states + 0.1 * states.cumsum(1)
        if self.fault == "count":
            states = states + input_ids.cumsum(1).unsqueeze(-1) / 100 * torch.linspace(-1, 1, 32)
        return super().forward(inputs_embeds=states, position_ids=position_ids, **kwargs)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize(
    ("fault", "said"),
    [("", None), ("positions", "other logits there than alone"), ("state", "each other"), ("count", "each other")],
)
def test_the_proof_sees_each_fault_and_leaves_no_trace(fault: str, said: str | None, one_row: bool) -> None:
    seed_rng(0)
    model = Faulty(transformers.GPT2Config(**GPT2, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    model.fault = fault
    objective, rows = build_objective(model, exact=True).train(), Rows(2)
    before, state = copy.deepcopy(model.state_dict()), capture_rng()
    with contextlib.nullcontext() if said is None else pytest.raises(NumericsError, match=said):
        prove_separation(objective, [rows[0], rows[1]], PAD, one_row=one_row)
    assert objective.training and capture_rng() == state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_row_of_data_is_enough_for_the_proof() -> None:
    rows = Rows(1)
    prove_separation(build("llama", "sdpa"), [rows[0], rows[0]], PAD, one_row=False)


def test_the_mask_is_additive_and_keeps_documents_apart() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    mask = block_diagonal_mask(positions, torch.bfloat16)
    least = torch.finfo(torch.bfloat16).min
    assert mask.dtype == torch.bfloat16 and mask.shape == (2, 1, 5, 5)
    assert set(mask.unique().tolist()) == {0.0, least}
    seen = [(row, key) for row in range(5) for key in range(5) if mask[0, 0, row, key] == 0]
    assert seen == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 3), (4, 3), (4, 4)]
