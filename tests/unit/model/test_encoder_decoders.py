"""What models of an encoder and a decoder are found to be: class, linears, head, and what is kept wide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM

from lorafit import pipeline
from lorafit.contracts import Silent
from lorafit.errors import ModelError
from lorafit.facts import CAUSAL_MODEL, SEQ2SEQ_MODEL
from lorafit.kinds.quantizations import quantizations
from lorafit.model.base import resolve_base
from lorafit.model.class_shape import find_shape
from lorafit.model.classes import usual_class
from lorafit.model.load import build_weightless, load_model
from lorafit.model.targets import choose_targets, left_out_names
from lorafit.plan import count_flops
from lorafit.recipe.schema import ModelSection
from tests.support.tiny_seq2seq import FAMILIES, make_base, make_recipe, tiny_seq2seq

T5_LINEARS = {"q", "k", "v", "o", "wi", "wo"}
BART_LINEARS = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
BERT_LINEARS = {"query", "key", "value", "dense"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_both_sides_may_carry_an_adapter(family: str) -> None:
    model = tiny_seq2seq(family)
    wanted = {"t5": T5_LINEARS, "encoder-decoder": BERT_LINEARS}.get(family, BART_LINEARS)
    assert wanted <= {name.rsplit(".", 1)[-1] for name in choose_targets(model, "all-linear")}
    assert left_out_names(model) == {}
    shape = find_shape(model.config.to_dict(), SEQ2SEQ_MODEL)
    assert wanted <= {linear.name for linear in shape.linears} and shape.beside == ()
    assert shape.total_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_task_gets_models_of_its_own_kind() -> None:
    t5 = tiny_seq2seq("t5").config.to_dict()
    llama = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    assert (usual_class(t5), usual_class(llama)) == (SEQ2SEQ_MODEL, CAUSAL_MODEL)
    with pytest.raises(ModelError, match="task: seq2seq-lm"):
        find_shape(t5)
    with pytest.raises(ModelError, match="no encoder that reads"):
        find_shape(llama, SEQ2SEQ_MODEL)


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_stays_wide_is_planned_as_it_is_loaded(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """T5's wo is never quantised, and stays in fp32 where the rest is fp16."""
    make_base(tmp_path / "base")
    base = resolve_base(ModelSection(base="base"), tmp_path, Silent())
    asked: dict[str, Any] = {
        "quantization": quantizations.make(kind).section,
        "dtype": dtype,
        "compute_dtype": dtype,
        "attention": "sdpa",
        "model_class": SEQ2SEQ_MODEL,
    }
    found = []
    for model in (
        load_model(base, device="cpu", reporter=Silent(), **asked),
        build_weightless(base.config, device_kind="cpu", **asked),
    ):
        linears = [part for name, part in model.named_modules() if name.endswith(".wo")]
        found.append({(type(linear), linear.weight.dtype) for linear in linears})
    wide = torch.float32 if dtype is torch.float16 else dtype
    assert found == [{(torch.nn.Linear, wide)}] * 2
    shape = find_shape(base.config, SEQ2SEQ_MODEL)
    assert [linear.name for linear in shape.linears if not linear.quantizable] == ["wo"]


def test_a_head_beside_the_embedding_counts_though_the_class_ties_it(tmp_path: Path) -> None:
    """As the files of T5 1.1 and Flan-T5 hold it."""
    make_base(tmp_path / "base", feed_forward_proj="gated-gelu")
    file, config = tmp_path / "base" / "model.safetensors", tmp_path / "base" / "config.json"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"] * 0.5}, file, metadata={"format": "pt"})
    config.write_text(config.read_text("utf-8").replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    base = resolve_base(ModelSection(base="base"), tmp_path, Silent())
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    shape = find_shape(base.config, SEQ2SEQ_MODEL)
    assert shape.total_parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert shape.head_parameters == loaded.lm_head.weight.numel()


def test_flops_of_each_side_are_those_of_its_own_tokens() -> None:
    """A forward by torch's own counter; half of what attention counts is masked there and computed all the same."""
    model, tokens = tiny_seq2seq("bart", d_model=256).eval(), torch.randint(3, 128, (1, 24))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens, decoder_input_ids=tokens)
    shape = find_shape(model.config.to_dict(), SEQ2SEQ_MODEL)
    sizes = {"adapter_parameters": 0, "squared_tokens": 2 * 24**2, "checkpointing": False}
    found = count_flops(shape, tokens=48, labelled_tokens=24, **sizes)
    assert found.frozen // 2 + found.head // 2 == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert 0 < shape.decoder_parameters < shape.linear_parameters
    more = count_flops(shape, tokens=72, labelled_tokens=24, **sizes)
    assert more.frozen - found.frozen == 4 * 24 * (shape.linear_parameters - shape.decoder_parameters)


def test_fp16_of_a_model_that_keeps_weights_wide_is_warned_of(tmp_path: Path, memory_by_formula: None) -> None:
    make_base(tmp_path / "base")
    reporter = Silent()
    recipe = make_recipe(tmp_path, model={"dtype": "fp16"})
    warnings = pipeline.train(recipe, dry_run=True, reporter=reporter).plan.warnings
    assert any("t5 overflows in fp16, for which wo stays in fp32" in said for said in warnings)
