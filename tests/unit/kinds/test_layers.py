"""Which layers get an adapter, and of what rank: plan, model, plain PEFT, merge and estimate tell the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from lorafit.contracts import Silent
from lorafit.errors import RecipeError
from lorafit.estimation.dry_run import DryRun
from lorafit.facts import SEQ2SEQ_MODEL
from lorafit.kinds.adapters import adapters
from lorafit.kinds.quantizations import quantizations
from lorafit.memory import covers
from lorafit.model.adapter import save_adapter
from lorafit.model.attach import attach_adapter, check_plan, open_adapter
from lorafit.model.class_shape import find_shape, read_class_shape
from lorafit.model.inspect import describe_quantization
from lorafit.model.layer_numbers import layer_of, layer_paths
from lorafit.model.merge import merge_adapter
from lorafit.plan.recipe_step import recipe_step
from tests.support.adapted import load, logits, lora, make_gpt2, make_llama, open_base, randomise
from tests.support.plan_cases import card, recipe
from tests.support.tiny_seq2seq import tiny_seq2seq


def make_deep(folder: Path) -> Path:
    return make_llama(folder, num_hidden_layers=6)


def planned(method: Any, shape: Any, model: Any) -> None:
    """Raises where plan and model disagree."""
    sites = method.sites(shape)
    check_plan(model, sites, sum(site.parameters for site in sites))


def adapted(model: Any) -> dict[int, int]:
    """Rank by number of the layer, of the layers that have an adapter."""
    numbers = layer_paths(model.get_base_model())
    return {
        layer_of(name.removeprefix("base_model.model."), numbers): parameter.shape[0]
        for name, parameter in model.named_parameters()
        if "lora_A" in name
    }


@pytest.mark.parametrize(
    ("layers", "numbers", "kind"),
    [
        ({"first": 2}, [0, 1], "lora"),
        ({"last": 4}, [2, 3, 4, 5], "dora"),
        ({"list": [4, 0]}, [0, 4], "lora"),
        (None, [0, 1, 2, 3, 4, 5], "lora"),
    ],
)
def test_the_chosen_layers_and_no_others_get_an_adapter(
    tmp_path: Path, kind: str, layers: Any, numbers: list[int]
) -> None:
    base = open_base(make_deep(tmp_path / "base"))
    section = adapters.make_section(kind, r=4, layers=layers)
    model = attach_adapter(load(base), section, 0)
    planned(adapters.bind(section), find_shape(base.config), model)
    assert sorted(adapted(model)) == numbers
    named = adapters.make_section(kind, r=4, layers=layers, target_modules=["q_proj", "down_proj"])
    planned(adapters.bind(named), find_shape(base.config), attach_adapter(load(base), named, 0))


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_an_encoders_layers_come_before_its_decoders(family: str) -> None:
    """Of 2 and 2 the last 3 are one of the encoder and both of the decoder."""
    model = tiny_seq2seq(family)
    shape = read_class_shape(model.config.to_dict(), SEQ2SEQ_MODEL)
    assert shape.layer_count == 4
    section = lora(layers={"last": 3}, ranks=[2, 3, 5])
    tuned = attach_adapter(model, section, 0, model_class=SEQ2SEQ_MODEL)
    planned(adapters.bind(section), shape, tuned)
    assert adapted(tuned) == {1: 2, 2: 3, 3: 5}
    sides = [path.removeprefix("model.").split(".")[0] for path in layer_paths(model)]
    assert sides == ["encoder", "encoder", "decoder", "decoder"]


def test_unequal_stacks_are_numbered_through() -> None:
    model = tiny_seq2seq("bart", decoder_layers=3)
    assert [*layer_paths(model)][1:3] == ["model.encoder.layers.1", "model.decoder.layers.0"]
    shape = read_class_shape(model.config.to_dict(), SEQ2SEQ_MODEL)
    planned(adapters.bind(lora(layers={"list": [4]})), shape, attach_adapter(model, lora(layers={"list": [4]}), 0))
    with pytest.raises(RecipeError, match="asks for layer 5; the model has 5"):
        adapters.bind(lora(layers={"list": [5]})).sites(shape)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({}, "one of first, last and list; none"),
        ({"first": 1, "last": 1}, "first and last are given"),
        ({"list": [1, 1]}, "layer 1 twice"),
        ({"first": 0}, "greater than or equal to 1"),
        ({"list": []}, "at least 1 item"),
        ({"list": [-1]}, "greater than or equal to 0"),
    ],
)
def test_a_choice_of_layers_is_one_of_three(layers: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        lora(layers=layers)


def test_layers_that_are_not_there_are_refused_with_the_models_own_number(tmp_path: Path) -> None:
    shape = find_shape(open_base(make_deep(tmp_path / "base")).config)
    for layers, said in (({"first": 7}, "asks for 7 layers; the model has 6"), ({"list": [0, 6]}, "asks for layer 6")):
        with pytest.raises(RecipeError, match=said) as caught:
            adapters.bind(lora(layers=layers)).sites(shape)
        assert caught.value.key == "adapter.layers"


def test_a_linear_that_stands_in_none_of_them_is_refused() -> None:
    """BERT's pooler is in no layer at all."""
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 64, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    }  # fmt: skip
    shape = read_class_shape(config, type(SEQ2SEQ_MODEL)("AutoModel", has_new_head=False))
    outside = [shape.layers_of(linear) for linear in shape.linears if -1 in shape.layers_of(linear)]
    assert outside == [(0, 1, -1)], "attention's output in each layer, and the pooler"
    counts = {site.name: site.count for site in adapters.bind(lora(layers={"list": [0]})).sites(shape)}
    assert counts["query"] == 1 and sum(counts.values()) < sum(linear.count for linear in shape.linears) / 2


RANKS: dict[str, tuple[Any, dict[int, int]]] = {
    "thirds": ({"early": 2, "middle": 4, "late": 8}, {0: 2, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8}),
    "one third": ({"late": 8}, {0: 4, 1: 4, 2: 4, 3: 4, 4: 8, 5: 8}),
    "a list": ([1, 2, 3, 4, 5, 6], {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6}),
}


@pytest.mark.parametrize(("form", "kind"), [*((form, "lora") for form in RANKS), ("thirds", "dora")])
def test_ranks_by_layer_are_planned_and_scaled_alike(tmp_path: Path, kind: str, form: str) -> None:
    base = open_base(make_deep(tmp_path / "base"))
    section = adapters.make_section(kind, r=4, alpha=6, ranks=RANKS[form][0])
    model = attach_adapter(load(base), section, 0)
    planned(adapters.bind(section), find_shape(base.config), model)
    assert adapted(model) == RANKS[form][1]
    scales = {layer.scaling["default"] for layer in model.modules() if hasattr(layer, "lora_A")}
    assert {round(scale, 9) for scale in scales} == {1.5}, "alpha / r in every layer"


def test_ranks_by_linear_and_in_some_layers(tmp_path: Path) -> None:
    base = open_base(make_deep(tmp_path / "base"))
    section = lora(ranks={"q_proj": 2, "down_proj": 16}, layers={"first": 2}, target_modules=["q_proj", "k_proj"])
    with pytest.raises(RecipeError, match="'down_proj' is no linear that gets an adapter"):
        adapters.bind(section).sites(find_shape(base.config))
    with pytest.raises(RecipeError, match=r"did you mean early\? available: early, middle, late, down_proj"):
        adapters.bind(lora(ranks={"earl": 4})).sites(find_shape(base.config))
    section = lora(ranks={"q_proj": 2, "down_proj": 16}, layers={"first": 2})
    model = attach_adapter(load(base), section, 0)
    planned(adapters.bind(section), find_shape(base.config), model)
    found = {name.split(".")[-4]: value.shape[0] for name, value in model.named_parameters() if "lora_A" in name}
    assert found == {"q_proj": 2, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 16}
    with pytest.raises(RecipeError, match="has 6 ranks for 2 layers"):
        adapters.bind(lora(ranks=[1] * 6, layers={"first": 2})).sites(find_shape(base.config))


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ({}, "names no rank"),
        ([], "names no rank"),
        ({"early": 2, "q_proj": 4}, "keep one of the two"),
        ([0], "equal to 1"),
    ],
)
def test_ranks_are_of_one_form(ranks: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        lora(ranks=ranks)


@pytest.mark.parametrize(
    ("family", "kind", "quantization"),
    [(make_deep, "lora", "none"), (make_deep, "dora", "nf4"), (make_gpt2, "lora", "nf4")],
)
def test_it_opens_in_plain_peft_and_is_merged(tmp_path: Path, family: Any, kind: str, quantization: str) -> None:
    base, folder = open_base(family(tmp_path / "base")), tmp_path / "adapter"
    section = adapters.make_section(kind, r=4, alpha=8, dropout=0.0, ranks={"late": 8, "early": 2}, layers={"last": 2})
    model = attach_adapter(load(base, quantization), section, 0)
    randomise(model)
    used = None
    if quantization != "none":
        used = describe_quantization(model, quantizations.make_section(quantization), dtype=torch.float32)
    folder.mkdir()
    save_adapter(model, folder, base=base, quantization=used)
    told = logits(model)
    assert torch.equal(logits(open_adapter(load(base, quantization), folder, base=base)), told)
    assert torch.equal(logits(PeftModel.from_pretrained(load(base, quantization), folder)), told)
    merge = "original" if used is None else "dequantized"
    report = merge_adapter(base, folder, tmp_path / "merged", kind=merge, quantization=used, reporter=Silent())
    assert report.verified
    merged = AutoModelForCausalLM.from_pretrained(report.output, attn_implementation="eager")
    assert float((logits(merged) - told).abs().max()) <= 1e-4
    again = attach_adapter(load(base, quantization), section.model_copy(update={"init_from": str(folder)}), 0)
    assert torch.equal(logits(again), told)
    other = adapters.make_section(kind, r=4, alpha=8, ranks={"late": 8}, layers={"last": 2}, init_from=str(folder))
    with pytest.raises(RecipeError, match=re.escape(f"no plain {kind} adapter (rank_pattern, alpha_pattern)")):
        attach_adapter(load(base, quantization), other, 0)


@pytest.mark.parametrize("layers", [{"list": [3]}, {"list": [0, 5]}])
def test_few_layers_stand_for_all_where_some_have_no_adapter(tmp_path: Path, layers: Any) -> None:
    """Before the first trained layer nothing is kept, behind it everything: they are no layers of one sort."""
    config = open_base(make_deep(tmp_path / "base")).config
    asked = recipe(adapter={"layers": layers, "dropout": 0.0}, data={"train": "a.jsonl", "max_length": 32})
    step = recipe_step(asked, find_shape(config), None, card(24.0)).step
    assert not covers(step) and covers(recipe_step(recipe(), find_shape(config), None, card(24.0)).step)
    dry = DryRun(step, config)
    few, whole = (dry.run(64, False, few_layers=few) for few in (True, False))
    assert few.fixed["adapter"] == 4 * step.trainable_parameters
    kept = [[phase.parts.get("kept_activations", 0) for phase in found.phases] for found in (few, whole)]
    assert kept[0] == pytest.approx(kept[1], rel=1e-3) and few.fixed == whole.fixed
