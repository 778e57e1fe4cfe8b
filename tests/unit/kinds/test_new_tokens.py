"""New tokens: ids for them, rows that alone are trained, a small adapter, and a merge with all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.contracts import Batch, Silent
from lorafit.errors import RecipeError
from lorafit.estimation.dry_run import DryRun
from lorafit.facts import SEQ2SEQ_MODEL
from lorafit.kinds.adapters import adapters
from lorafit.kinds.linear_targets import check_new_tokens, new_tokens, row_parameters
from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.tasks import tasks
from lorafit.model.adapter import save_adapter
from lorafit.model.attach import attach_adapter, check_plan, open_adapter
from lorafit.model.base import Base
from lorafit.model.class_shape import find_shape, read_class_shape
from lorafit.model.inspect import coverage, describe_quantization
from lorafit.model.load import load_tokenizer
from lorafit.model.merge import merge_adapter
from lorafit.model.new_tokens import keep_tokenizer, with_rows
from lorafit.model.tokenizer_files import Companions, TokenizerFolder
from lorafit.objective.next_token import label_tokens
from lorafit.ops.isolation import adapter_off
from lorafit.plan.recipe_step import recipe_step
from tests.support.adapted import load, logits, make_gpt2, make_llama, open_base, randomise
from tests.support.plan_cases import card, recipe
from tests.support.tiny_model import make_tokenizer
from tests.support.tiny_seq2seq import tiny_seq2seq

TOKENS = {"<call>": "red mug", "<answer>": ""}
KNOWN = len(make_tokenizer())
FAMILIES = "untied", "tied", "gpt2", "padded"
IDS = torch.tensor([[5, KNOWN, 30, 7, KNOWN + 1, 9, 8, KNOWN]])


def make(family: str, folder: Path) -> Base:
    """A base that knows the tokens; the embedding of `padded` has rows to spare for them."""
    if family == "gpt2":
        make_gpt2(folder, vocab_size=KNOWN)
    else:
        rows = KNOWN + 8 if family == "padded" else KNOWN
        make_llama(folder, tied=family != "untied", vocab_size=rows)
    make_tokenizer().save_pretrained(folder)
    return replace(open_base(folder), new_tokens=TOKENS)


def section_of(kind: str = "lora", **fields: Any) -> Any:
    return adapters.make_section(kind, **({"r": 4, "alpha": 8, "dropout": 0.0, "new_tokens": TOKENS} | fields))


def matrices(model: Any) -> list[torch.Tensor]:
    own = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    return own[:1] if own[0] is own[1] else own


def change(model: Any) -> None:
    randomise(model)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += torch.randn_like(parameter) * 0.3


@pytest.mark.parametrize(("family", "kind"), [*((family, "lora") for family in FAMILIES), ("tied", "dora")])
def test_rows_begin_as_means_and_are_all_that_is_trained_of_a_matrix(tmp_path: Path, kind: str, family: str) -> None:
    base = make(family, tmp_path / "base")
    before = [weight.clone() for weight in matrices(load(replace(base, new_tokens={})))]
    plain = load(base)
    told = load_tokenizer(replace(base, new_tokens={}))("red mug").input_ids
    for old, weight in zip(before, matrices(plain), strict=True):
        assert len(weight) == (len(old) if family == "padded" else KNOWN + 2) and not weight.requires_grad
        assert torch.equal(weight[:KNOWN], old[:KNOWN])
        assert torch.allclose(weight[KNOWN], old[told].mean(0), atol=1e-6)
        assert torch.allclose(weight[KNOWN + 1], old[:KNOWN].mean(0), atol=1e-6)
    alone = logits(plain, IDS)
    section = section_of(kind)
    shape = with_rows(find_shape(base.config), section, load_tokenizer(base))
    assert shape.vocabulary == len(matrices(plain)[0]) and shape.total_parameters == coverage(plain).total_parameters
    model = attach_adapter(plain, section, 0)
    sites = adapters.bind(section).sites(shape)
    rows = row_parameters(section, shape)
    assert rows == 2 * len(before) * shape.hidden_size
    check_plan(model, sites, sum(site.parameters for site in sites) + rows)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    assert float((logits(model, IDS) - alone).abs().max()) < 1e-5
    change(model)
    assert float((logits(model, IDS) - alone).abs().max()) > 0.05
    with adapter_off(model):
        assert torch.equal(logits(model, IDS), alone)


@pytest.mark.parametrize(("family", "quantization"), [*((family, "none") for family in FAMILIES), ("tied", "nf4")])
def test_the_adapter_is_small_opens_in_plain_peft_and_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, quantization: str
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    base, folder, used = make(family, tmp_path / "base"), tmp_path / "adapter", None
    model = attach_adapter(load(base, quantization), section_of(), 0)
    change(model)
    if quantization != "none":
        used = describe_quantization(model, quantizations.make_section(quantization), dtype=torch.float32)
    folder.mkdir()
    taught = TokenizerFolder(keep_tokenizer(load_tokenizer(base), "taught"))
    save_adapter(model, folder, base=base, quantization=used, companions=Companions(taught, {}, None))
    saved = [value for name, value in load_file(folder / "adapter_model.safetensors").items() if "lora" not in name]
    assert {len(value) for value in saved} == {2} and len(saved) == (2 if family == "untied" else 1)
    told = logits(model, IDS)
    assert torch.equal(logits(open_adapter(load(base, quantization), folder, base=base), IDS), told)
    again = attach_adapter(load(base, quantization), section_of(init_from=str(folder)), 0)
    assert torch.equal(logits(again, IDS), told)
    foreign, tokenizer = load(replace(base, new_tokens={}), quantization), AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a<call>b").input_ids[1] == KNOWN
    if family != "padded":
        foreign.resize_token_embeddings(len(tokenizer))  # what the note beside the adapter says
    assert torch.equal(logits(PeftModel.from_pretrained(foreign, folder), IDS), told)
    merge: Any = "original" if used is None else "dequantized"
    report = merge_adapter(base, folder, tmp_path / "merged", kind=merge, quantization=used, reporter=Silent())
    assert report.verified
    merged = AutoModelForCausalLM.from_pretrained(report.output, attn_implementation="eager")
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight)
    assert float((logits(merged, IDS) - told).abs().max()) <= 1e-4
    assert AutoTokenizer.from_pretrained(report.output)("a<call>b").input_ids[1] == KNOWN


def test_rows_that_do_not_fit_the_base_are_not_merged(tmp_path: Path) -> None:
    from lorafit.errors import ModelError

    base, folder = make("tied", tmp_path / "base"), tmp_path / "adapter"
    folder.mkdir()
    save_adapter(attach_adapter(load(base), section_of(), 0), folder, base=base)
    notes = folder / "lorafit.json"
    notes.write_text(notes.read_text().replace(f"      {KNOWN},", f"      {KNOWN + 50},"))
    with pytest.raises(ModelError, match="do not fit"):
        merge_adapter(base, folder, tmp_path / "merged", kind="original", quantization=None, reporter=Silent())


def test_rows_get_gradients_and_no_other_does(tmp_path: Path) -> None:
    model = attach_adapter(load(make("untied", tmp_path / "base"), dtype=torch.bfloat16), section_of(), 0)
    objective = tasks.bind(tasks.make_section("causal-lm")).build_objective(model, autocast_dtype=torch.bfloat16)
    objective.train()
    row = IDS[0].tolist()
    objective(Batch(label_tokens([[(row, [1] * len(row))]], 0), len(row) - 1, (0,), len(row))).loss_sum.backward()
    rows = {name: value.grad for name, value in model.named_parameters() if "trainable_tokens_delta" in name}
    assert len(rows) == 2 and all(grad is not None and grad.abs().amax(1).min() > 0 for grad in rows.values())
    assert all(value.grad is None for name, value in model.named_parameters() if name.endswith("base_layer.weight"))


def test_the_estimate_is_a_dry_run_with_rows(tmp_path: Path) -> None:
    config = make("untied", tmp_path / "base").config
    asked = recipe(adapter={"new_tokens": ["<a>", "<b>", "<c>"]}, data={"max_length": 32})
    step = recipe_step(asked, find_shape(config), None, card(24.0)).step
    plain = recipe_step(recipe(data={"max_length": 32}), find_shape(config), None, card(24.0)).step
    assert step.trainable_parameters - plain.trainable_parameters == 2 * 3 * config["hidden_size"]
    found, alone = DryRun(step, config).run(64, False), DryRun(plain, config).run(64, False)
    assert found.fixed["adapter"] - alone.fixed["adapter"] >= 4 * 2 * 3 * config["hidden_size"]
    assert found.needed_bytes > alone.needed_bytes, "PEFT writes the rows into copies of both matrices"


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "names no token"),
        ([""], "'' is empty"),
        (["<a>", " <b>"], "' <b>' is empty, or begins or ends with a blank"),
        (["<a>", "<b>", "<a>"], "'<a>' twice"),
    ],
)
def test_what_is_no_token_is_refused_by_name(tokens: list[str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        section_of(new_tokens=tokens)


def test_what_a_base_knows_or_cannot_learn_is_refused(tmp_path: Path) -> None:
    base = make("tied", tmp_path / "base")
    with pytest.raises(RecipeError, match=r"has '<\|im_end\|>' already") as caught:
        load_tokenizer(replace(base, new_tokens={"<x>": "", "<|im_end|>": ""}))
    assert caught.value.key == "adapter.new_tokens"
    with pytest.raises(RecipeError, match=r"modules_to_save trains .* whole"):
        attach_adapter(load(base), section_of(modules_to_save=["embed_tokens"]), 0)
    model = load(base)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(KNOWN + 2))
    with pytest.raises(RecipeError, match="has a bias, which PEFT drops"):
        attach_adapter(model, section_of(), 0)
    with pytest.raises(RecipeError, match="4 modules of this model have the embedding's weight"):
        row_parameters(section_of(), read_class_shape(tiny_seq2seq("bart").config.to_dict(), SEQ2SEQ_MODEL))
    with pytest.raises(RecipeError, match="reads images"):
        check_new_tokens(section_of(), reads_pictures=True)
    assert new_tokens(section_of(new_tokens=["<a>"])) == {"<a>": ""}
