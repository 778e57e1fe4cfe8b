"""Every adapter on the kinds of models that are no Llama: encoders, GPT-2 as DialoGPT is, encoders with a decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from lorafit.contracts import Silent
from lorafit.errors import LorafitError
from lorafit.estimation.dry_run import DryRun
from lorafit.facts import CAUSAL_MODEL, SEQ2SEQ_MODEL, ModelClass
from lorafit.kinds.adapters import adapters
from lorafit.kinds.quantizations import quantizations
from lorafit.model.adapter import save_adapter
from lorafit.model.attach import attach_adapter, check_plan, open_adapter
from lorafit.model.base import resolve_base
from lorafit.model.class_shape import read_class_shape
from lorafit.model.load import load_model
from lorafit.model.merge import merge_adapter
from lorafit.plan.recipe_step import recipe_step
from tests.support.plan_cases import card, recipe
from tests.support.tiny_seq2seq import tiny_seq2seq

CLASSIFIER = ModelClass("AutoModelForSequenceClassification", {"num_labels": 3}, has_new_head=True, peft_task="SEQ_CLS")
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 96,
    "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
DISTILLED = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 96, "num_labels": 3}
GPT = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 96,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def encoder(name: str, **changes: Any) -> Callable[[], Any]:
    config, model = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForSequenceClassification")
    return lambda: model(config(**(DISTILLED if name == "DistilBert" else SIZES) | changes))


MODELS: dict[str, tuple[Callable[[], Any], ModelClass, str]] = {
    "bert": (encoder("Bert"), CLASSIFIER, "sequence-classification"),
    "roberta": (encoder("Roberta"), CLASSIFIER, "sequence-classification"),
    "distilbert": (encoder("DistilBert"), CLASSIFIER, "sequence-classification"),
    "albert": (encoder("Albert", embedding_size=32), CLASSIFIER, "sequence-classification"),
    "deberta-v2": (encoder("DebertaV2"), CLASSIFIER, "sequence-classification"),
    "modernbert": (encoder("ModernBert", **IDS), CLASSIFIER, "sequence-classification"),
    "dialogpt": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT)), CAUSAL_MODEL, "causal-lm"),
    "t5": (lambda: tiny_seq2seq("t5"), SEQ2SEQ_MODEL, "seq2seq-lm"),
    "bart": (lambda: tiny_seq2seq("bart"), SEQ2SEQ_MODEL, "seq2seq-lm"),
}
TARGETS = {
    "bert": {"query", "key", "value", "dense"},
    "roberta": {"query", "key", "value", "dense"},
    "distilbert": {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"},
    "albert": {"query", "key", "value", "dense", "ffn", "ffn_output", "embedding_hidden_mapping_in", "pooler"},
    "deberta-v2": {"query_proj", "key_proj", "value_proj", "dense"},
    "modernbert": {"Wqkv", "Wo", "Wi"},
    "dialogpt": {"c_attn", "c_proj", "c_fc"},
    "t5": {"q", "k", "v", "o", "wi", "wo"},
    "bart": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
}
"""What `all-linear` means there."""
TRANSPOSED = "at weights that lie [out, in]"
NO_CACHE = "takes no keys and values"
REFUSED: dict[tuple[str, str], str] = {
    **{("dialogpt", kind): TRANSPOSED for kind in ("oft", "boft", "miss", "peft")},
    **{(name, "prefix_tuning"): NO_CACHE for name in ("distilbert", "albert")},
    ("albert", "miss"): "more than the 32 inputs",
}
"""What is refused, and the reason that is given."""


WITH_EVERY_ADAPTER = "distilbert", "albert", "dialogpt"
"""Those that differ most from what the adapters' own tests have; the others are tried with two."""


def outputs(model: Any, model_class: ModelClass) -> torch.Tensor:
    ids = torch.arange(3, 35).reshape(2, 16)
    decoder = {"decoder_input_ids": ids[:, :8]} if model_class is SEQ2SEQ_MODEL else {}
    logits: torch.Tensor = model(input_ids=ids, **decoder).logits
    return logits.float()


@pytest.mark.parametrize("name", MODELS)
def test_every_adapter_is_planned_and_trained_or_refused_with_a_reason(name: str) -> None:
    make, model_class, _ = MODELS[name]
    torch.manual_seed(0)
    shape = read_class_shape(make().config.to_dict(), model_class)
    assert {linear.name for linear in shape.linears if not linear.left_out} == TARGETS[name]
    for kind in adapters.names() if name in WITH_EVERY_ADAPTER else ("lora", "dora"):
        method = adapters.bind(adapters.make_section(kind))
        try:
            sites = method.sites(shape)
            model = attach_adapter(make(), method.section, 0, model_class=model_class)
        except LorafitError as error:
            assert REFUSED.get((name, kind), "nothing") in str(error), f"{kind}: {error}"
            continue
        assert (name, kind) not in REFUSED, f"{kind} is not refused any more"
        check_plan(model, sites, sum(site.parameters for site in sites) + shape.new_head_parameters)
        outputs(model, model_class).square().sum().backward()
        still = [path for path, value in model.named_parameters() if value.requires_grad and value.grad is None]
        assert not still, f"{kind}: {still[:2]} get no gradient"


@pytest.mark.parametrize(("name", "kind"), [*((name, "lora") for name in MODELS), ("dialogpt", "dora"), ("t5", "dora")])
def test_it_opens_elsewhere_and_is_merged(name: str, kind: str, tmp_path: Path) -> None:
    make, model_class, _ = MODELS[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    auto = getattr(transformers, model_class.auto_class)
    asked: Any = SimpleNamespace(base=str(tmp_path / "base"), revision=None)
    base, folder, kept = resolve_base(asked, tmp_path, Silent()), tmp_path / "adapter", model_class.whole()

    def fresh() -> Any:
        options: Any = {"quantization": quantizations.make_section("none"), "attention": "eager", "device": "cpu"}
        wide = {"dtype": torch.float32, "compute_dtype": torch.float32}
        return load_model(base, **options, **wide, model_class=kept, reporter=Silent()).eval()

    def plain(place: Path) -> Any:
        return auto.from_pretrained(place, attn_implementation="eager").eval()

    model = attach_adapter(fresh(), adapters.make_section(kind, r=4, dropout=0.0), 0, model_class=model_class)
    torch.manual_seed(2)
    for path, value in model.named_parameters():
        if "lora_B" in path:
            value.data = torch.randn_like(value) * 0.2
    folder.mkdir()
    save_adapter(model.eval(), folder, base=base)
    with torch.no_grad():
        told = outputs(model, model_class)
        assert torch.equal(outputs(open_adapter(fresh(), folder).eval(), model_class), told)
        theirs = outputs(PeftModel.from_pretrained(plain(base.path), folder).eval(), model_class)
        assert torch.allclose(theirs, told, atol=1e-5)
        assert float((outputs(fresh(), model_class) - told).abs().max()) > 1e-4
        report = merge_adapter(base, folder, tmp_path / "merged", kind="original", quantization=None, reporter=Silent())
        merged = plain(report.output)
        assert report.verified and float((outputs(merged, model_class) - told).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", ["distilbert", "t5"])
def test_its_memory_is_estimated(name: str) -> None:
    make, model_class, task = MODELS[name]
    config = make().config.to_dict()
    asked = recipe(adapter={"r": 4}, task={"kind": task}, data={"max_length": 32})
    step = recipe_step(asked, read_class_shape(config, model_class), None, card(24.0)).step
    found = DryRun(step, config).run(64, False)
    assert found.fixed["adapter"] >= 4 * (step.trainable_parameters - step.model.new_head_parameters)
    assert {phase.name for phase in found.phases} >= {"forward", "loss", "backward", "update"}
    assert all(phase.total_bytes > 0 for phase in found.phases if phase.name in ("forward", "backward"))
