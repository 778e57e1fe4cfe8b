"""A kind for each linear by what it costs: chosen as brute force would, stored, counted and refused as it should be."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lorafit.errors import RecipeError
from lorafit.facts import LinearShape
from lorafit.kinds.quantizations import Sensitivity, quantizations
from lorafit.kinds.quantizations._knapsack import choose
from lorafit.model.class_shape import find_shape
from lorafit.model.inspect import quantized_hashes
from tests.support.adapted import load, make_gpt2, make_llama, open_base
from tests.unit.estimation.test_dry_run import ask, exact
from tests.unit.memory.test_estimate import MODELS

KINDS = ("nf4", "int8", "none")


def items(count: int, dice: random.Random) -> tuple[list[dict[str, int]], list[dict[str, float]]]:
    costs = [dict(zip(KINDS, sorted(dice.sample(range(1, 60), 3)), strict=True)) for _ in range(count)]
    return costs, [{kind: dice.gauss(0, 1) for kind in KINDS} for _ in range(count)]


def total(of: list[Any], chosen: Any) -> Any:
    return sum(one[kind] for one, kind in zip(of, chosen, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_the_knapsack_is_that_of_brute_force(seed: int) -> None:
    dice = random.Random(seed)
    costs, values = items(dice.randint(1, 6), dice)
    budget = dice.randint(sum(min(cost.values()) for cost in costs), sum(max(cost.values()) for cost in costs))
    every = itertools.product(KINDS, repeat=len(costs))
    best = min(total(values, each) for each in every if total(costs, each) <= budget)
    chosen = choose(costs, values, budget)
    assert total(costs, chosen) <= budget
    assert total(values, chosen) == pytest.approx(best)


def test_with_few_totals_kept_it_is_near_that_and_within_the_budget() -> None:
    costs, values = items(60, random.Random(1))
    budget = sum(sorted(cost.values())[1] for cost in costs)
    exact = total(values, choose(costs, values, budget, most=10**6))
    rough = choose(costs, values, budget, most=200)
    assert total(costs, rough) <= budget
    assert exact <= total(values, rough) <= exact + 0.02 * abs(exact)


def paths_of(folder: Path, kind: str) -> list[str]:
    return list(quantized_hashes(load(open_base(folder), kind)))


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_each_linear_is_stored_as_its_kind_alone_stores_it(make: Any, tmp_path: Path) -> None:
    base = open_base(make(tmp_path / "base"))
    alone = {kind: quantized_hashes(load(base, kind)) for kind in ("nf4", "int8")}
    linears = dict(zip(alone["nf4"], itertools.cycle(KINDS), strict=False))
    found = quantized_hashes(load(base, "adaptive", bits=16, linears=linears))
    assert found == {path: alone[kind][path] for path, kind in linears.items() if kind != "none"}
    assert set(linears.values()) == set(KINDS)


def test_a_table_of_another_base_or_half_of_one_is_refused(tmp_path: Path) -> None:
    base = open_base(make_llama(tmp_path / "base"))
    linears = dict.fromkeys(quantized_hashes(load(base, "nf4")), "nf4")
    last = list(linears)[-1]
    with pytest.raises(RecipeError, match=r"'model\.layers\.9\.mlp\.down_proj' is no linear of this model"):
        load(base, "adaptive", linears={**linears, "model.layers.9.mlp.down_proj": "int8"})
    del linears[last]
    with pytest.raises(RecipeError, match=rf"says nothing of {last}; name every linear"):
        load(base, "adaptive", linears=linears)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"bits": 4.1}, "4.1 is less than NF4 alone takes: about 4.127, by the widths"),
        ({"bits": 4.4, "double_quant": False}, "4.4 is less than NF4 alone takes: about 4.500, .*; at most 16"),
        ({"bits": 16.5}, "less than or equal to 16"),
        ({"calibration_rows": 0}, "greater than or equal to 1"),
        ({"linears": {"a.q_proj": "fp4"}}, "Input should be 'nf4', 'int8' or 'none'"),
    ],
)
def test_values_that_are_none_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        quantizations.make("adaptive", **options)


def test_a_budget_below_what_the_models_linears_take_is_refused_with_what_they_do(tmp_path: Path) -> None:
    shape = find_shape(MODELS["llama"])
    least = sum(
        min(
            quantizations.make(kind).weight_bytes(linear, 2) + quantizations.make(kind).constant_bytes(linear)
            for kind in KINDS
        )
        for linear in shape.linears
    )
    bits = 8 * least / shape.linear_parameters
    with pytest.raises(RecipeError, match=rf"4\.13 bits a weight are less than the {bits:.3f} that the linears take"):
        ask(MODELS["llama"], tmp_path, model__quantization="{kind: adaptive, bits: 4.13}")
    ask(MODELS["llama"], tmp_path, model__quantization=f"{{kind: adaptive, bits: {bits + 0.001}}}")
    with pytest.raises(RecipeError, match=r"'model\.layers\.0\.mlp\.down_pro' is no linear .*did you mean down_proj"):
        quantizations.make("adaptive", linears={"model.layers.0.mlp.down_pro": "nf4"}).check(shape)


def test_memory_is_the_budget_before_the_kinds_are_known_and_theirs_after(tmp_path: Path) -> None:
    config = {**MODELS["llama"], "intermediate_size": 384}  # a CPU takes 4 bits in rows of whole blocks alone
    shape, stored = find_shape(config), ("base_weights", "quantization_constants")
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    paths = [f"model.layers.{layer}.{part}" for layer in range(shape.layers) for part in parts]
    written = ", ".join(f"{path}: {kind}" for path, kind in zip(paths, itertools.cycle(KINDS), strict=False))
    sizes = {}
    for told, text in (("open", ""), ("known", f", linears: {{{written}}}")):
        question = ask(config, tmp_path, model__quantization=f"{{kind: adaptive, bits: 6.5{text}}}")
        dry = exact(question, config, True)
        closed = question.at(dry.micro_batch_tokens, True)
        assert 0.97 * dry.tensor_bytes < closed.tensor_bytes < 1.08 * dry.tensor_bytes
        sizes[told] = [sum(each.fixed[name] for name in stored) for each in (closed, dry)]
    assert sizes["known"][0] == pytest.approx(sizes["known"][1], rel=0.01)
    plain = ask(config, tmp_path).at(1, False).fixed["base_weights"]
    assert sizes["open"][0] == plain - 2 * shape.linear_parameters + int(6.5 * shape.linear_parameters / 8)
    assert 0.96 * sizes["open"][0] < sizes["open"][1] <= sizes["open"][0]


def test_the_budget_is_kept_and_what_gains_most_gets_the_bits() -> None:
    linear = LinearShape("q_proj", 512, 512, 1)
    found = [
        Sensitivity(str(number), linear, {"nf4": change, "int8": change / 50, "none": 0.0})
        for number, change in enumerate([0.1, 3.0, -1.0, 0.2])
    ]
    assert quantizations.make("adaptive", bits=5.2).allot(found, 2) == ["nf4", "int8", "nf4", "nf4"]
    assert quantizations.make("adaptive", bits=16.0).allot(found, 2) == ["none", "none", "nf4", "none"]


def test_int8_rounds_to_what_a_loaded_layer_holds(tmp_path: Path) -> None:
    base = open_base(make_llama(tmp_path / "base"))
    path, int8 = "model.layers.0.mlp.down_proj", quantizations.make("int8")
    plain, packed = (load(base, kind).get_submodule(path) for kind in ("none", "int8"))
    assert torch.equal(int8.rounded(plain.weight.data), type(int8).unpack(packed))  # type: ignore[attr-defined]
