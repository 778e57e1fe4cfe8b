"""Modules trained whole beside an adapter: one tie stays one weight, and what was trained is opened and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorafit.contracts import Batch, Silent
from lorafit.errors import RecipeError
from lorafit.estimation.dry_run import DryRun
from lorafit.kinds.adapters import adapters
from lorafit.kinds.linear_targets import whole_parameters
from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.tasks import tasks
from lorafit.model.adapter import save_adapter
from lorafit.model.attach import attach_adapter, check_plan, open_adapter
from lorafit.model.class_shape import find_shape
from lorafit.model.fuse import fuse_layers
from lorafit.model.inspect import describe_quantization
from lorafit.model.merge import merge_adapter
from lorafit.objective.next_token import label_tokens
from lorafit.ops.isolation import adapter_off
from lorafit.plan.recipe_step import recipe_step
from tests.support.adapted import load, logits, lora, make_gpt2, make_llama, open_base
from tests.support.plan_cases import card, recipe
from tests.support.tiny_seq2seq import tiny_seq2seq

TIED = "tied", "gpt2"


def make(family: str, folder: Path) -> Path:
    return make_gpt2(folder) if family == "gpt2" else make_llama(folder, tied=family == "tied")


def names_of(family: str) -> list[str]:
    return ["wte", "ln_f"] if family == "gpt2" else ["lm_head", "embed_tokens", "norm"]


def change(model: Any) -> None:
    """Other values for all that is trained."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += torch.randn_like(parameter) * 0.05


@pytest.mark.parametrize(("family", "kind"), [("untied", "lora"), ("tied", "lora"), ("gpt2", "lora"), ("tied", "dora")])
def test_the_plan_counts_them_once_and_they_begin_as_the_base(tmp_path: Path, kind: str, family: str) -> None:
    base = open_base(make(family, tmp_path / "base"))
    section, shape = adapters.make_section(kind, r=4, modules_to_save=names_of(family)), find_shape(base.config)
    plain = load(base, dtype=torch.bfloat16)
    before = logits(plain)
    model = attach_adapter(plain, section, 0)
    sites = adapters.bind(section).sites(shape)
    whole = whole_parameters(section, shape)
    check_plan(model, sites, sum(site.parameters for site in sites) + whole)
    matrix, width = shape.vocabulary * shape.hidden_size, shape.hidden_size
    bias = 2 if family == "gpt2" else 1
    assert whole == matrix * (1 if family in TIED else 2) + bias * width
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    after = logits(model)
    assert torch.equal(after, before) if kind == "lora" else float((after - before).abs().max()) < 0.05
    change(model)
    assert float((logits(model) - before).abs().max()) > 0.1
    with adapter_off(model):
        assert torch.equal(logits(model), before)
    wide = logits(model.float())
    assert float((wide - wide.to(torch.bfloat16)).abs().max()) > 0, "in fp32 nothing is rounded on the way"


@pytest.mark.parametrize(("family", "quantization"), [("untied", "none"), ("tied", "nf4"), ("gpt2", "none")])
def test_they_are_saved_once_opened_in_plain_peft_and_merged(tmp_path: Path, family: str, quantization: str) -> None:
    base, folder = open_base(make(family, tmp_path / "base")), tmp_path / "adapter"
    section = lora(modules_to_save=names_of(family))
    model, used = attach_adapter(load(base, quantization), section, 0), None
    change(model)
    if quantization != "none":
        used = describe_quantization(model, quantizations.make_section(quantization), dtype=torch.float32)
    folder.mkdir()
    save_adapter(model, folder, base=base, quantization=used)
    told, saved = logits(model), load_file(folder / "adapter_model.safetensors")
    matrices = [value for name, value in saved.items() if "lora" not in name and value.dim() == 2]
    assert len(matrices) == 2 and torch.equal(*matrices) == (family in TIED)
    assert torch.equal(logits(open_adapter(load(base, quantization), folder, base=base)), told)
    assert torch.equal(logits(PeftModel.from_pretrained(load(base, quantization), folder)), told)
    again = attach_adapter(load(base, quantization), section.model_copy(update={"init_from": str(folder)}), 0)
    assert torch.equal(logits(again), told)
    merge: Any = "original" if used is None else "dequantized"
    report = merge_adapter(base, folder, tmp_path / "merged", kind=merge, quantization=used, reporter=Silent())
    assert report.verified
    merged = AutoModelForCausalLM.from_pretrained(report.output, attn_implementation="eager")
    assert float((logits(merged) - told).abs().max()) <= 1e-4
    one = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert one == (family in TIED)


def test_every_trained_module_gets_a_gradient_under_autocast(tmp_path: Path) -> None:
    """Also a norm, whose fused forward takes its weight for frozen."""
    base = open_base(make("tied", tmp_path / "base"))
    names = ["embed_tokens", "norm", "input_layernorm"]
    model = attach_adapter(load(base, dtype=torch.bfloat16), lora(modules_to_save=names), 0)
    fuse_layers(model)
    task = tasks.bind(tasks.make_section("causal-lm"))
    objective = task.build_objective(model, autocast_dtype=torch.bfloat16)
    objective.train()
    rows = [[([*range(3, 19)], [1] * 16)], [([*range(20, 36)], [1] * 16)]]
    objective(Batch(label_tokens(rows, 0), 30, (0, 1), 32)).loss_sum.backward()
    grads = {name: value.grad for name, value in model.named_parameters() if "modules_to_save" in name}
    assert len(grads) == 4 and all(grad is not None and grad.dtype == torch.float32 for grad in grads.values())
    assert all(float(grad.abs().max()) > 0 for grad in grads.values())


def test_the_estimate_counts_copy_gradient_and_state(tmp_path: Path) -> None:
    config = open_base(make("tied", tmp_path / "base")).config
    found = {}
    for names in (None, ["embed_tokens"]):
        asked = recipe(adapter={"modules_to_save": names}, training={"optimizer": "adamw"})
        asked = asked.model_copy(update={"data": asked.data.model_copy(update={"max_length": 32})})
        step = recipe_step(asked, find_shape(config), None, card(24.0)).step
        found[names is None] = step.trainable_parameters, DryRun(step, config).run(64, False).fixed
    (less, plain), (more, whole) = found[True], found[False]
    matrix = config["vocab_size"] * config["hidden_size"]
    assert more - less == matrix
    for part, size in {"adapter": 4, "gradients": 4, "optimizer_state": 8}.items():
        assert whole[part] - plain[part] == pytest.approx(size * matrix, rel=0.02), part


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("q_proj", "'q_proj' is a linear of the layers, which an adapter is for; available: embed_tokens"),
        ("embed_token", "'embed_token' is no module that can be trained whole; did you mean embed_tokens"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused_by_name(tmp_path: Path, name: str, said: str) -> None:
    shape = find_shape(open_base(make("tied", tmp_path / "base")).config)
    with pytest.raises(RecipeError, match=said) as caught:
        whole_parameters(lora(modules_to_save=[name]), shape)
    assert caught.value.key == "adapter.modules_to_save"


def test_a_weight_of_more_than_embedding_and_head_is_refused() -> None:
    from lorafit.facts import SEQ2SEQ_MODEL
    from lorafit.model.class_shape import read_class_shape

    shape = read_class_shape(tiny_seq2seq("bart").config.to_dict(), SEQ2SEQ_MODEL)
    with pytest.raises(RecipeError, match="one weight with 3 other modules"):
        whole_parameters(lora(modules_to_save=["shared"]), shape)
    norms = whole_parameters(lora(modules_to_save=["final_layer_norm"]), shape)
    assert norms == 4 * 2 * 64
