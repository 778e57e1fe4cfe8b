"""The objective is the model's own loss, on either path, and its proof sees where it is not."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lorafit.contracts import Batch, Example, Silent
from lorafit.errors import ModelError, NumericsError
from lorafit.kinds.tasks import tasks
from lorafit.objective import prove_objective
from tests.support.tiny_model import tiny_llama

CAUSAL_LM = tasks.make("causal-lm")
build_objective = CAUSAL_LM.build_objective

SIZES = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama() -> torch.nn.Module:
    return tiny_llama(seed=None, **SIZES)


def gemma() -> torch.nn.Module:
    """Its logits are soft-capped behind the head."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5, sliding_window=64))


def cohere() -> torch.nn.Module:
    """Its logits are scaled behind the head."""
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))


def gpt2() -> torch.nn.Module:
    sizes = {"vocab_size": 83, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def with_lora(model: torch.nn.Module, *extra: str) -> torch.nn.Module:
    names = ["c_attn"] if isinstance(model, GPT2LMHeadModel) else ["q_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=[*names, *extra], lora_dropout=0.0, init_lora_weights=False)
    )


def batch() -> Batch:
    """Two rows, of 9 and 6 tokens; labels at the end of each."""
    ids = torch.randint(1, 83, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[1, 6:] = 0
    index = torch.tensor([3, 4, 5, 6, 7, 9 + 1, 9 + 4])
    return Batch({"input_ids": ids, "label_index": index, "label_ids": ids.flatten()[index + 1]}, 7, (0, 1), 15)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_loss_and_gradients_are_the_models_own(build: object, exact: bool) -> None:
    torch.manual_seed(0)
    model = with_lora(build())  # type: ignore[operator]
    twin = copy.deepcopy(model)
    objective = build_objective(model, exact=exact)
    assert objective.exact is exact
    loss_sum, weight = objective(batch())
    loss_sum.backward()

    rows = batch()
    labels = torch.full((18,), -100)
    labels[rows["label_index"] + 1] = rows["label_ids"]
    theirs = twin(input_ids=rows["input_ids"], labels=labels.view(2, 9), use_cache=False)
    (theirs.loss * weight).backward()
    torch.testing.assert_close(loss_sum, theirs.loss * weight, rtol=1e-5, atol=0)
    logits = theirs.logits.flatten(0, 1)[rows["label_index"]]
    compared = 0
    for ours, other in zip(model.parameters(), twin.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared >= 4
    scores = objective.score(batch())
    assert scores["loss"].sum() == pytest.approx(float(loss_sum), rel=1e-5)
    assert scores["correct"].sum() == int((logits.argmax(-1) == rows["label_ids"]).sum())
    assert scores["weight"].tolist() == [5, 2]


@pytest.mark.parametrize("build", [gemma, cohere])
def test_soft_caps_and_scales_are_seen_and_the_exact_path_is_right(build: object) -> None:
    torch.manual_seed(0)
    objective = build_objective(with_lora(build()))  # type: ignore[operator]
    assert not objective.exact
    objective.train()
    state, reporter = torch.get_rng_state(), Silent()
    prove_objective(objective, batch(), reporter)
    assert objective.exact and objective.training and torch.equal(state, torch.get_rng_state())
    assert "exact path" in reporter.warnings[0]
    torch.testing.assert_close(objective(batch())[0].double(), objective.reference_loss(batch()), rtol=1e-4, atol=1e-4)


def test_ordinary_models_stay_on_the_fast_path() -> None:
    for build in (llama, gpt2):
        objective, reporter = build_objective(with_lora(build())), Silent()
        prove_objective(objective, batch(), reporter)
        assert not objective.exact and reporter.warnings == []


def test_a_head_with_an_adapter_takes_the_exact_path_and_is_trained() -> None:
    torch.manual_seed(0)
    objective = build_objective(with_lora(llama(), "lm_head"))
    assert objective.exact
    prove_objective(objective, batch(), Silent())
    objective(batch())[0].backward()
    gradients = [p.grad for n, p in objective.named_parameters() if "lm_head" in n and p.requires_grad]
    assert len(gradients) == 2 and all(g is not None and bool(g.any()) for g in gradients)


def test_a_loss_that_is_not_the_models_own_is_refused() -> None:
    class Doubled(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            outputs = super().forward(*args, **kwargs)
            if outputs.loss is not None:
                outputs.loss = outputs.loss * 2
            return outputs

    with pytest.raises(NumericsError, match="not the model's own"):
        prove_objective(build_objective(Doubled(LlamaConfig(**SIZES))), batch(), Silent())


def test_weights_that_are_not_finite_are_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="own loss on one row is nan"):
        prove_objective(build_objective(model), batch(), Silent())


def test_autocast_computes_in_bf16_and_leaves_adapters_fp32() -> None:
    torch.manual_seed(0)
    model = with_lora(llama()).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    seen: list[torch.dtype] = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    objective = build_objective(model, autocast_dtype=torch.bfloat16)
    prove_objective(objective, batch(), Silent())
    objective(batch())[0].backward()
    assert set(seen) == {torch.bfloat16}  # not cast up to fp32 first
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("is_decoder", "refused"), [(False, True), (True, False)])
def test_a_model_that_sees_ahead_is_refused(is_decoder: bool, refused: bool) -> None:
    """BERT is registered as a causal language model; it is one only where its config says so."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    model = BertLMHeadModel(BertConfig(**sizes, is_decoder=is_decoder))
    objective = build_objective(get_peft_model(model, LoraConfig(r=4, target_modules=["query"])))
    if not refused:
        prove_objective(objective, batch(), Silent())
        return
    with pytest.raises(ModelError, match="BertLMHeadModel sees the tokens that it is to predict"):
        prove_objective(objective, batch(), Silent())


def test_a_model_that_wants_more_than_text_is_refused() -> None:
    """Git's own loss counts image tokens that a text does not have."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = GitForCausalLM(GitConfig(vision_config={**vision, "image_size": 32, "patch_size": 16}, **sizes))
    with pytest.raises(ModelError, match="GitForCausalLM does not run on text alone"):
        prove_objective(build_objective(model), batch(), Silent())


@pytest.mark.parametrize(
    ("trained", "most", "kept"),
    [
        ([0, 0, 1, 1, 0, 0], 9, [10, 11, 12, 13]),
        ([0, 0, 1, 1, 0, 0], 3, [11, 12, 13]),
        ([1, 1, 1, 1, 1, 1], 2, [14, 15]),
        ([1, 1, 1, 1, 1, 1], 1, [14, 15]),  # one token has nothing to be predicted from
    ],
)
def test_a_long_probe_is_cut_to_its_last_trained_tokens(trained: list[int], most: int, kept: list[int]) -> None:
    """The model's own loss takes logits of the whole row at once: 1 GiB for 400 tokens and a vocabulary of 262,144."""
    cut = CAUSAL_LM.cut_probe(
        Example(3, {"tokens": [10, 11, 12, 13, 14, 15], "trained": trained}, "rows.jsonl", 7), most
    )
    assert list(cut["tokens"]) == kept
    assert len(cut["trained"]) == len(kept)
    assert (cut.index, cut.line) == (3, 7)
    assert CAUSAL_LM.collate([[cut]], 0).weight >= 1


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("exact", [False, True])
def test_no_value_is_asked_of_the_device_in_a_micro_batch(
    build: object, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each the host would wait until a GPU has done all before. The device here has no values, and says so."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    rows, model = batch(), with_lora(build())  # type: ignore[operator]
    objective = build_objective(model.to("meta"), autocast_dtype=None, exact=exact)
    objective.train()
    objective(rows.to(torch.device("meta"))).loss_sum.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters() if p.requires_grad)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, 9)
    packed = replace(rows, tensors={**rows.tensors, "position_ids": positions}).to(torch.device("meta"))
    objective(packed).loss_sum.backward()
    with pytest.raises(RuntimeError, match="item"):  # transformers asks of rows that nobody knows
        model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False)
