"""`--over` makes recipes that validate, says what they cannot keep, and refuses what cannot be compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorafit.errors import LorafitError, RecipeError, UsageError
from lorafit.recipe.schema import Recipe
from lorafit.studies.variants import Variant, rates_of_variant, read_variants


def write(folder: Path, name: str = "r.yaml", **changes: object) -> Path:
    values = {
        "name": name.removesuffix(".yaml"),
        "model": {"base": "base"},
        "adapter": {"kind": "lora", "r": 4, "alpha": 8.0, "target_modules": ["q_proj"]},
        "data": {"train": "a.jsonl", "validation": "b.jsonl", "test": "c.jsonl"},
        "training": {"learning_rate": 2e-4, "optimizer": {"kind": "adamw", "betas": [0.9, 0.95]}},
        **changes,
    }
    file = folder / name
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def made(recipe: Path, *over: str) -> list[Variant]:
    return read_variants([recipe], over, [])[0]


def recipe_of(variant: Variant) -> Recipe:
    assert variant.loaded is not None, variant.refused
    return variant.loaded.recipe


def test_a_method_keeps_the_options_that_it_has_and_says_which_it_has_not(tmp_path: Path) -> None:
    lora, dora, prompt = made(write(tmp_path), "adapter=lora,dora,prompt_tuning")
    written = {"r": 4, "alpha": 8.0, "target_modules": ["q_proj"]}
    for variant, kind in ((lora, "lora"), (dora, "dora")):
        section = recipe_of(variant).adapter.model_dump()
        assert section["kind"] == kind
        assert {key: section[key] for key in written} == written
    assert recipe_of(prompt).adapter.model_dump()["kind"] == "prompt_tuning"
    assert [variant.notes for variant in (lora, dora, prompt)] == [
        (),
        (),
        ("prompt_tuning takes no target_modules, r, alpha",),
    ]


def test_options_of_a_value_win_over_those_that_are_kept(tmp_path: Path) -> None:
    variants = made(write(tmp_path), "adapter={kind: dora, r: 2},{kind: lora, alpha: 1}")
    assert [v.name for v in variants] == ["dora r=2", "lora alpha=1"]
    assert [(recipe_of(v).adapter.model_dump()["r"], recipe_of(v).adapter.model_dump()["alpha"]) for v in variants] == [
        (2, 8.0),
        (4, 1.0),
    ]


def test_any_key_can_be_compared_and_several_give_every_combination(tmp_path: Path) -> None:
    variants = made(write(tmp_path), "training.optimizer=adamw,sgd", "adapter.r=4,8")
    assert [v.name for v in variants] == ["adamw r=4", "adamw r=8", "sgd r=4", "sgd r=8"]
    assert [recipe_of(v).adapter.model_dump()["r"] for v in variants] == [4, 8, 4, 8]
    assert recipe_of(variants[0]).training.optimizer.model_dump(mode="json")["betas"] == [0.9, 0.95]
    assert variants[2].notes == ("sgd takes no betas",)


def test_one_method_under_two_names_is_two_methods(tmp_path: Path) -> None:
    variants = made(write(tmp_path), "adapter=lora,lora")
    assert [v.name for v in variants] == ["lora", "lora (2)"]
    assert len({v.folder for v in variants}) == 2
    assert variants[0].values() == variants[1].values()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("adapter=lora,dorra", r"^--over: adapter\.kind: unknown adapter 'dorra'; did you mean dora\?"),
        ("adapter=lora,{kind: dora, rr: 8}", r"adapter\.rr: unknown key"),
        ("adapter.r=4,0", r"adapter\.r: must be between 1 and"),
        ("training.learning_rate=1e-4,fast", r"training\.learning_rate"),
    ],
)
def test_a_value_that_no_recipe_can_have_is_an_error_however_many_others_there_are(
    tmp_path: Path, over: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        made(write(tmp_path), over, "seed=1,2")


def test_what_the_rest_of_the_recipe_refuses_is_a_line_with_the_reason(tmp_path: Path) -> None:
    quantised = write(tmp_path, model={"base": "base", "quantization": "nf4"})
    lora, dora, full = made(quantised, "adapter=lora,dora,full")
    assert not lora.refused and not dora.refused
    assert full.refused.startswith("adapter.kind: ") and full.loaded is None
    with pytest.raises(UsageError, match=r"lora is left alone, since others are refused \(full: adapter\.kind: "):
        made(quantised, "adapter=lora,full")


def test_where_all_are_refused_the_recipe_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(LorafitError) as raised:
        made(write(tmp_path), "adapter.rr=4,8")
    assert isinstance(raised.value.errors[0], RecipeError)


@pytest.mark.parametrize("over", ["adapter", "=lora,dora", "adapter=", "adapter=lora,,dora"])
def test_what_is_no_list_of_values_is_refused(tmp_path: Path, over: str) -> None:
    with pytest.raises(UsageError, match="KEY=A,B"):
        made(write(tmp_path), over)


def test_one_method_alone_is_no_comparison(tmp_path: Path) -> None:
    for over in ([], ["adapter=lora"]):
        with pytest.raises(UsageError, match="one method alone"):
            made(write(tmp_path), *over)
    with pytest.raises(UsageError, match=r"adapter\.r is named twice"):
        made(write(tmp_path), "adapter.r=4,8", "adapter.r=2,16")


def test_recipes_of_the_same_rows_are_compared_and_those_of_others_refused(tmp_path: Path) -> None:
    one, two = write(tmp_path), write(tmp_path, "two.yaml", adapter={"kind": "dora"})
    variants, _ = read_variants([one, two], [], [])
    assert [v.name for v in variants] == ["r", "two"]
    other = write(tmp_path, "other.yaml", data={"train": "a.jsonl", "validation": "b.jsonl", "test": "d.jsonl"})
    with pytest.raises(UsageError, match=r"r and other differ in data\.test"):
        read_variants([one, other], [], [])
    longer = write(tmp_path, "longer.yaml", training={"batch_size": 4})
    with pytest.raises(UsageError, match=r"differ in training\.batch_size"):
        read_variants([one, longer], [], [])


def test_rows_to_train_on_may_differ_where_they_are_what_is_compared(tmp_path: Path) -> None:
    assert len(made(write(tmp_path), "data.train=a.jsonl,d.jsonl")) == 2
    with pytest.raises(UsageError, match=r"differ in data\.test"):
        made(write(tmp_path), "data.test=c.jsonl,d.jsonl")


@pytest.mark.parametrize(
    ("given", "rates", "spread", "expected"),
    [
        ([], 3, 10.0, [6.32e-5, 2e-4, 6.32e-4]),
        ([], 1, 10.0, [2e-4]),
        ([], 2, 4.0, [1e-4, 4e-4]),
        ([3e-4, 1e-4, 1e-4], 5, 10.0, [1e-4, 3e-4]),
    ],
)
def test_learning_rates_are_a_grid_around_the_methods_own(
    tmp_path: Path, given: list[float], rates: int, spread: float, expected: list[float]
) -> None:
    (variant, _) = made(write(tmp_path), "adapter=lora,dora")
    assert rates_of_variant(variant, given, rates, spread) == pytest.approx(expected)


def test_an_adapter_that_wants_another_rate_gets_its_grid_there(tmp_path: Path) -> None:
    lora, vera = made(write(tmp_path), "adapter=lora,vera")
    assert rates_of_variant(lora, [], 3, 10.0)[1] == pytest.approx(2e-4)
    assert rates_of_variant(vera, [], 3, 10.0)[1] == pytest.approx(4e-3)  # as its paper has it, beside LoRA's 2e-4
    vera, lora = made(write(tmp_path, adapter={"kind": "vera", "r": 64}), "adapter=vera,lora")
    assert rates_of_variant(vera, [], 1, 10.0) == [2e-4]  # the recipe's own is taken as it is
    assert rates_of_variant(lora, [], 1, 10.0) == pytest.approx([1e-5])
    plain, pissa = made(write(tmp_path), "adapter.init=kaiming,pissa")
    assert rates_of_variant(plain, [], 1, 10.0) + rates_of_variant(pissa, [], 1, 10.0) == pytest.approx([2e-4, 2e-5])
