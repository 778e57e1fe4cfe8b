"""Linears of several kinds in one model: stored, counted and refused as each kind alone would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lorafit.errors import RecipeError
from lorafit.kinds.quantizations import kind_of_codes, quantizations
from lorafit.memory.closed_form import layer_of
from lorafit.model.class_shape import find_shape
from lorafit.model.inspect import quantized_hashes
from tests.support.adapted import load, make_gpt2, make_llama, open_base
from tests.unit.estimation.test_dry_run import ask, exact_each
from tests.unit.memory.test_estimate import MODELS

LINEARS = {"down_proj": "int8", "q_proj": "fp4", "o_proj": "none"}


def by_last_part(hashes: dict[str, Any], name: str) -> dict[str, Any]:
    return {path: proof for path, proof in hashes.items() if path.endswith(f".{name}")}


@pytest.mark.parametrize("others", ["nf4", "int8", "none"])
def test_each_linear_is_stored_as_its_kind_alone_stores_it(others: str, tmp_path: Path) -> None:
    base = open_base(make_llama(tmp_path / "base"))
    found = quantized_hashes(load(base, "mixed", linears=LINEARS, others=others))
    for name, kind in {**LINEARS, "gate_proj": others, "k_proj": others}.items():
        alone = {} if kind == "none" else by_last_part(quantized_hashes(load(base, kind)), name)
        assert by_last_part(found, name) == alone


def test_a_transposed_weight_is_too(tmp_path: Path) -> None:
    base = open_base(make_gpt2(tmp_path / "base"))
    found = by_last_part(quantized_hashes(load(base, "mixed", linears={"c_fc": "int8"})), "c_fc")
    assert found and found == by_last_part(quantized_hashes(load(base, "int8")), "c_fc")


def test_a_head_and_a_name_that_ends_alike_are_left_alone(tmp_path: Path) -> None:
    model = load(open_base(make_llama(tmp_path / "base")), "mixed", linears={"proj": "int8", "lm_head": "int8"})
    kinds = {name.rsplit(".", 1)[-1]: kind_of_codes(module) for name, module in model.named_modules()}
    assert kinds["lm_head"] is None and kinds["up_proj"] is quantizations.get("nf4")


def test_the_closed_form_meets_the_dry_run(tmp_path: Path) -> None:
    mixed = "{kind: mixed, linears: {down_proj: int8, q_proj: none, v_proj: fp4}}"
    config = {**MODELS["llama"], "num_hidden_layers": 4}
    question = ask(config, tmp_path, model__quantization=mixed)
    stored = ("base_weights", "quantization_constants")  # a dry run counts int8 codes among the constants
    for checkpointing, dry in exact_each(question, config).items():
        closed = question.at(dry.micro_batch_tokens, checkpointing)
        assert closed.tensor_bytes == pytest.approx(dry.tensor_bytes, rel=0.03)
        assert sum(closed.fixed[name] for name in stored) == pytest.approx(
            sum(dry.fixed[name] for name in stored), rel=0.01
        )


def test_names_that_no_linear_has_are_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.quantization\.linears: 'down_pro' matches no linear") as caught:
        ask(MODELS["llama"], tmp_path, model__quantization="{kind: mixed, linears: {down_pro: int8}}")
    assert "did you mean down_proj?" in str(caught.value)
    quantizations.make("mixed", linears={"c_attn": "int8"}).check(find_shape(MODELS["gpt2"]))


@pytest.mark.parametrize("options", [{"linears": {"q_proj": "nf5"}}, {"others": "nf5"}, {"others": "mixed"}])
def test_kinds_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"is no kind of a linear; .*known: fp4, int8, nf4, none"):
        quantizations.make("mixed", **options)


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_what_one_of_several_readers_keeps_of_their_input_is_counted(name: str, tmp_path: Path) -> None:
    """LLM.int8() keeps it, and q, k and v read the same; nobody but v may be in 8 bits."""
    question = ask(MODELS["llama"], tmp_path, model__quantization=f"{{kind: mixed, linears: {{{name}: int8}}}}")
    assert layer_of(question.step).leaked_bytes() == 2 * MODELS["llama"]["hidden_size"]
