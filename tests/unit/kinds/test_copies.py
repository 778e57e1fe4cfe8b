"""Norms, biases or all weights are trained in copies of their layers: the base stays, PEFT opens the folder, a merge is
what computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lorafit.contracts import Silent
from lorafit.errors import ModelError, RecipeError
from lorafit.facts import CAUSAL_MODEL, SEQ2SEQ_MODEL, ModelClass
from lorafit.kinds.adapters import adapters
from lorafit.kinds.quantizations import quantizations
from lorafit.machine.devices import format_bytes
from lorafit.model.adapter import adapter_tensors, save_adapter
from lorafit.model.attach import attach_adapter, check_plan, load_adapter_weights, open_adapter
from lorafit.model.base import Base
from lorafit.model.class_shape import find_shape
from lorafit.model.inspect import coverage, describe_quantization
from lorafit.model.language_modules import holder_shapes
from lorafit.model.merge import merge_adapter
from lorafit.ops.isolation import adapter_off
from lorafit.plan import plan
from lorafit.plan.render import _plan_rows
from tests.support.adapted import load, logits, make_gpt2, make_llama, open_base
from tests.support.plan_cases import ROWS, card, recipe, shape_of

FAMILIES: dict[str, Any] = {
    "llama": make_llama,
    "tied llama": lambda folder, **given: make_llama(folder, tied=True, **given),
    "gpt2": make_gpt2,
}
CASES = [("layer_norm", "llama"), ("layer_norm", "gpt2"), ("bias", "gpt2"),
         ("full", "llama"), ("full", "tied llama"), ("full", "gpt2")]  # fmt: skip
each_case = pytest.mark.parametrize(("kind", "family"), CASES)


def fresh(base: Base, kind: str, stored: str = "none", *, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    return attach_adapter(
        load(base, stored, dtype=dtype), adapters.make_section(kind, **fields), 0, folder=base.path.parent
    )


def move(model: Any) -> None:
    """Other values of all that is trained, as training would give."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def saved(base: Base, model: Any, **given: Any) -> Path:
    folder = base.path.parent / "adapter"
    folder.mkdir()
    save_adapter(model, folder, base=base, **given)
    return folder


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_as_the_base_and_moves_what_the_plan_counts(
    tmp_path: Path, kind: str, family: str, dtype: torch.dtype
) -> None:
    base = open_base(FAMILIES[family](tmp_path / "base"))
    plain = load(base, dtype=dtype)
    before, total, names = logits(plain), coverage(plain).total_parameters, dict(plain.named_parameters())
    model = fresh(base, kind, dtype=dtype)
    sites = adapters.make(kind).sites(find_shape(base.config))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check_plan(model, sites, sum(site.parameters for site in sites))
    found = coverage(model)
    assert found.total_parameters == total
    assert found.trainable_parameters == sum(parameter.numel() for parameter in trained)  # a tied head's once
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    assert torch.equal(logits(model), before)
    wanted = {
        "layer_norm": lambda path: "norm" in path or ".ln_" in path,
        "bias": lambda path: path.endswith(".bias"),
        "full": lambda path: True,
    }[kind]
    assert sum(p.numel() for p in trained) == sum(value.numel() for path, value in names.items() if wanted(path))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        model(torch.arange(3, 40).reshape(1, -1), use_cache=False).logits.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in trained)
    move(model)
    assert float((logits(model) - before).abs().max()) > 1e-3
    with adapter_off(model):
        assert torch.equal(logits(model), before)


def test_small_updates_add_up_under_bf16(tmp_path: Path) -> None:
    """A gain of 1 in bf16 has a next value 0.0078 away: ten updates of 0.001 would be lost one by one."""
    base = open_base(make_llama(tmp_path / "base"))
    model = fresh(base, "layer_norm", dtype=torch.bfloat16)
    norm = model.get_base_model().model.norm.ln_tuning_layers["default"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    for _ in range(10):
        for parameter in model.parameters():
            parameter.grad = -torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    assert norm.weight.dtype == torch.bfloat16 and torch.equal(norm.weight, torch.full_like(norm.weight, 1.0078125))


@each_case
def test_peft_opens_it_and_a_resume_takes_it_back(tmp_path: Path, kind: str, family: str) -> None:
    base = open_base(FAMILIES[family](tmp_path / "base"))
    model = fresh(base, kind)
    move(model)
    folder, wanted = saved(base, model), logits(model)
    opened = open_adapter(load(base), folder, base=base)
    assert torch.allclose(logits(opened), wanted, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    with adapter_off(opened):
        assert torch.equal(logits(opened), logits(load(base)))
    theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), folder)
    assert torch.allclose(logits(theirs), wanted, atol=1e-5)
    again = fresh(base, kind)
    parameters = [parameter for parameter in again.parameters() if parameter.requires_grad]
    load_adapter_weights(again, folder)
    assert all(new is old for new, old in zip(adapter_tensors(again).values(), parameters, strict=True))
    assert torch.equal(logits(again), wanted)
    assert torch.equal(logits(fresh(base, kind, init_from="adapter")), wanted)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_a_plain_model_that_computes_what_was_trained(
    tmp_path: Path, kind: str, family: str, dtype: torch.dtype
) -> None:
    base = open_base(FAMILIES[family](tmp_path / "base", dtype=dtype))
    model = fresh(base, kind, dtype=dtype)
    move(model)
    folder = saved(base, model)
    report = merge_adapter(base, folder, tmp_path / "merged", kind="original", reporter=Silent())
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype, attn_implementation="eager")
    assert report.verified and report.largest_error == 0
    near = 1e-6 if dtype is torch.float32 else 0.02 if kind == "bias" else 0.0
    assert torch.allclose(logits(merged), logits(model), atol=near)
    assert merged.config.tie_word_embeddings is not (family == "llama")


@pytest.mark.parametrize("stored", ["nf4", "int8"])
def test_beside_quantised_linears_only_norms_change(tmp_path: Path, stored: str) -> None:
    base = open_base(make_llama(tmp_path / "base"))
    model = fresh(base, "layer_norm", stored, dtype=torch.bfloat16)
    move(model)
    used = describe_quantization(model, quantizations.make_section(stored), dtype=torch.bfloat16)
    folder = saved(base, model, quantization=used)
    opened = open_adapter(load(base, stored, dtype=torch.bfloat16), folder, base=base)
    assert torch.allclose(logits(opened), logits(model), atol=0.02)
    merge_adapter(base, folder, tmp_path / "merged", kind="dequantized", quantization=used, reporter=Silent())
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert float((logits(merged) - logits(model)).abs().max()) < 0.1


def test_a_bias_is_trained_as_the_paper_says(tmp_path: Path) -> None:
    """y = W x + b, of which b alone is other than the base's (section 3)."""
    base = open_base(make_gpt2(tmp_path / "base"))
    model = fresh(base, "bias")
    move(model)
    layer = model.get_base_model().transformer.h[0].mlp.c_fc
    states, bias = torch.randn(2, 3, 64), layer.ln_tuning_layers["default"].bias
    assert torch.allclose(layer(states), functional.linear(states, layer.base_layer.weight.t(), bias), atol=1e-6)


def test_what_cannot_be_trained_so_is_refused_by_name(tmp_path: Path) -> None:
    shape = find_shape(open_base(make_llama(tmp_path / "base")).config)
    with pytest.raises(RecipeError, match="llama has no bias vector: its linears and norms add none"):
        adapters.make("bias").sites(shape)
    why = adapters.make("full").refuses("nf4")
    assert why is not None and "those in nf4 are codes: they have no gradient" in why
    why = adapters.make("bias").refuses("int8")
    assert why is not None and "weights in int8 are codes, of which PEFT can make no copy that takes gradients" in why
    assert adapters.make("full").refuses("none") is adapters.make("layer_norm").refuses("nf4") is None


def test_a_head_of_the_task_is_trained_beside_it_once(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    sizes = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_labels=3, pad_token_id=0)
    plain: nn.Module = AutoModelForSequenceClassification.from_config(config)
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    task = ModelClass("AutoModelForSequenceClassification", has_new_head=True, peft_task="SEQ_CLS")
    model = attach_adapter(plain, adapters.make_section("full"), 0, model_class=task)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == parameters
    assert CAUSAL_MODEL.peft_task != task.peft_task and any(
        "score.modules_to_save" in n for n, _ in model.named_modules()
    )


SIZES = {"vocab_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
SIDES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "d_model": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0}
ARCHITECTURES: dict[str, Any] = {
    "Mixtral": {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4},
    "OPT": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "T5": {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    "Marian": {"vocab_size": 96, **SIDES, **HEADS},
}


def drawn(name: str, sizes: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(0)
    is_pair = config.is_encoder_decoder
    return (AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM).from_config(config).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_under_full_nothing_frozen_is_computed_with(name: str) -> None:
    """Whatever holds a weight that is read past its copy would train as if it were not there."""
    plain = drawn(name, ARCHITECTURES[name])
    counted = sum(holder.parameters for holder in holder_shapes(plain))
    task = SEQ2SEQ_MODEL if plain.config.is_encoder_decoder else CAUSAL_MODEL
    model = attach_adapter(plain, adapters.make_section("full"), 0, model_class=task).eval()
    ids = torch.arange(3, 12).reshape(1, -1)
    asked = {"input_ids": ids, **({"decoder_input_ids": ids} if plain.config.is_encoder_decoder else {})}
    before = model(**asked).logits
    before.square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert sum(parameter.numel() for parameter in trained) == counted
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if not parameter.requires_grad and "embed_positions" not in path:  # Marian's sines are computed
                parameter.add_(1.0)
        assert torch.allclose(model(**asked).logits, before, atol=1e-5)


def test_layers_that_no_copy_can_stand_for_are_left_or_refused() -> None:
    """Mamba's mixers hold parameters beside linears, and read one linear's bias past whatever stands there."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    holders = holder_shapes(drawn("Mamba", sizes))
    shape = replace(shape_of(), model_type="mamba", holders=holders)
    with pytest.raises(RecipeError, match="mamba cannot be copied: they hold parameters beside layers of their own"):
        adapters.make("full").sites(shape)
    with pytest.raises(RecipeError, match="mamba has no bias vector"):
        adapters.make("bias").sites(shape)


def test_the_plan_says_what_large_checkpoints_take_on_the_disk() -> None:
    """12 bytes a parameter under AdamW: weights and two moments in fp32."""
    asked = recipe(adapter={"kind": "full"}, model={"quantization": "none"}, checkpoints={"keep_last": 3})
    each = 12 * sum(site.parameters for site in adapters.make("full").sites(shape_of()))
    assert each == 12 * 8_030_261_248
    row = dict(_plan_rows(plan(asked, shape_of(), ROWS, card(640))))["checkpoints"]
    held = "with the best one and the one being written up to"
    assert row.endswith(f"; {format_bytes(each)} of disk each; {held} {format_bytes(5 * each)}")
    kept = recipe(checkpoints={"keep_last": 3})  # of a smaller adapter, none of 1 GiB, and all together more
    assert "480 MiB of disk each; " in dict(_plan_rows(plan(kept, shape_of(), ROWS, card(640))))["checkpoints"]
    small = recipe(adapter={"kind": "lora", "r": 1})
    assert "disk" not in dict(_plan_rows(plan(small, shape_of(), ROWS, card(640))))["checkpoints"]


def test_whole_modules_of_another_tool_are_not_merged() -> None:
    with pytest.raises(ModelError, match="saves modules whole beside its copies"):
        adapters.get("layer_norm").folding({"modules_to_save": ["embed_tokens"]})
