"""`--fit`: each answer is the last that fits, over models, lengths, ranks, cards and headrooms."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import DoesNotFitError
from lorafit.estimation import Options, RecipeEstimate, RowLengths, estimate_recipe
from lorafit.estimation.fit import Largest
from lorafit.facts import DeviceFacts, ModelShape
from lorafit.machine.devices import parse_gpu
from lorafit.machine.hardware import cards
from lorafit.machine.shipped import shipped
from lorafit.memory import find_largest
from lorafit.model.class_shape import find_shape
from lorafit.recipe.schema import LARGEST_COUNT
from tests.support.plan_cases import GIB, ROWS, card, recipe, shape_of

FILES = sorted(shipped("models").glob("*.json"))
SHIPPED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
CONFIGS = {name: facts["config"] for name, facts in SHIPPED.items() if not facts.get("is_encoder")}
CAUSAL = {name: config for name, config in CONFIGS.items() if not config.get("is_encoder_decoder")}
NAMES = [name for name, config in CAUSAL.items() if not find_shape(config).scanning_layers]  # formulas count the others


@cache
def shape_named(name: str) -> ModelShape:
    return find_shape(CONFIGS[name])


def needs(shape: ModelShape, device: DeviceFacts, headroom: float, **sections: Any) -> bool:
    """Whether another recipe fits, asked as anybody would: through the estimate with `--gpu`."""
    fits = estimate_recipe(recipe(**sections), shape, options=Options(gpu=device, headroom=headroom)).fits
    assert fits is not None
    return fits


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(NAMES)),
    length=st.integers(min_value=8, max_value=8000),
    rank=st.sampled_from([1, 8, 16, 64, 256]),
    gpu=st.sampled_from(["6GiB", "11.3GiB", "700GiB", *(str(known["names"][0]) for known in cards())]),
    headroom=st.sampled_from([0.0, 0.05, 0.2, 0.613]),
    checkpointing=st.sampled_from([True, False, "auto"]),
    quantization=st.sampled_from(["nf4", "int8", "none"]),
    dropout=st.sampled_from([0.0, 0.05]),
    asked=st.sampled_from(["auto", 3000]),
)
def test_answers_are_maximal(
    name: str, length: int, rank: int, gpu: str, headroom: float, checkpointing: bool | str, quantization: str,
    dropout: float, asked: int | str,
) -> None:  # fmt: skip
    shape, device = shape_named(name), parse_gpu(gpu)
    sections: dict[str, dict[str, Any]] = {
        "model": {"quantization": quantization},
        "data": {"max_length": length},
        "adapter": {"r": rank, "dropout": dropout},
        "training": {"gradient_checkpointing": checkpointing, "micro_batch_tokens": asked},
    }
    fit = estimate_recipe(recipe(**sections), shape, options=Options(fit=device, headroom=headroom)).fit
    assert fit is not None and fit.rank is not None

    def fits(section: str, **changes: Any) -> bool:
        changed = {**sections, section: {**sections[section], **changes}}
        return needs(shape, device, headroom, **changed)

    def check(found: Largest, most: int, holds: Any) -> None:
        if found.value is None:
            assert not holds(found.least)
            return
        assert holds(found.value)
        assert bool(found.bound) == (found.value == most)
        assert found.value == most or not holds(found.value + 1)

    batch = fit.micro_batch
    assert batch.least == fit.row_tokens == min(length, shape.max_positions)
    check(batch, LARGEST_COUNT, lambda tokens: fits("training", micro_batch_tokens=tokens))
    check(fit.rank, 4096, lambda r: fits("adapter", r=r))
    sections["training"]["micro_batch_tokens"] = "auto"
    check(fit.row, shape.max_positions, lambda tokens: fits("data", max_length=tokens))


def test_a_search_is_maximal_even_where_what_it_asks_is_not_monotone() -> None:
    assert find_largest(lambda value: 2 * value, 75, 1, 1000) == 37
    assert find_largest(lambda value: value, 1000, 1, 1000) == 1000
    assert find_largest(lambda value: value, 0, 1, 1000) is None
    holes = find_largest(lambda value: value % 100 + value // 10, 60, 1, 1000)
    assert holes is not None
    assert holes % 100 + holes // 10 <= 60 < (holes + 1) % 100 + (holes + 1) // 10
    assert find_largest(lambda value: value, 5, 5, 5) == 5


@given(
    a=st.floats(min_value=1, max_value=1e6),
    b=st.floats(min_value=0, max_value=1e3),
    limit=st.floats(min_value=0, max_value=1e15),
)
def test_a_search_takes_few_looks(a: float, b: float, limit: float) -> None:
    """Each may be a dry run: a straight line takes a handful, and nothing more than twice what halving would."""
    looks: list[int] = []

    def needed(value: int) -> int:
        looks.append(value)
        return round(a * value + b * value * value)

    found = find_largest(needed, limit, 1, 2**31 - 1)
    assert found is None or found == 2**31 - 1 or needed(found) <= limit < needed(found + 1)
    assert len(looks) <= (10 if b == 0 else 66)


def fitted(gib: float, **sections: Any) -> RecipeEstimate:
    return estimate_recipe(recipe(**sections), shape_of(), options=Options(fit=card(gib)))


def test_with_and_without_checkpointing() -> None:
    both = fitted(24).fit
    assert both is not None
    assert both.row.checkpointing and both.row.value is not None and both.row.other is not None
    assert both.row.other < both.row.value
    off = fitted(24, training={"gradient_checkpointing": False}).fit
    assert off is not None
    assert (off.row.value, off.row.checkpointing, off.row.other) == (both.row.other, False, None)
    on = fitted(24, training={"gradient_checkpointing": True}).fit
    assert on is not None
    assert (on.row.value, on.row.checkpointing, on.row.other) == (both.row.value, True, None)


def test_bounds_are_named() -> None:
    huge = fitted(10_000, data={"max_length": 64}).fit
    assert huge is not None and huge.rank is not None
    assert huge.rank.value == 4096 and "4,096" in huge.rank.bound
    assert not huge.rank.checkpointing  # where both reach the bound, the faster is named
    assert huge.row.value == 131_072 and huge.row.bound == "the model's 131,072 positions"
    gpt2 = estimate_recipe(recipe(), shape_of("openai-community/gpt2"), options=Options(fit=card(80))).fit
    assert gpt2 is not None and gpt2.row.bound == "the model's 1,024 positions"


def test_real_rows_are_what_the_micro_batch_holds() -> None:
    known = estimate_recipe(recipe(), shape_of(), RowLengths(ROWS), Options(fit=card(24))).fit
    assert known is not None
    assert (known.row_tokens, known.micro_batch.least, known.micro_batch_tokens) == (600, 600, 600)


def test_nothing_fits() -> None:
    small = fitted(3)
    assert small.fit is not None and small.fit.nothing_fits
    with pytest.raises(DoesNotFitError, match=r"--fit: nothing fits: not even a row of 8 tokens") as caught:
        small.raise_unless_fits()
    assert caught.value.exit_code == 10
    shorter = fitted(8, data={"max_length": 16_384})  # the recipe's own rows do not fit, but shorter ones do
    assert shorter.fit is not None
    assert shorter.fit.micro_batch.value is None and shorter.fit.row.value is not None
    shorter.raise_unless_fits()


def test_json_is_plain() -> None:
    plain = json.loads(json.dumps(fitted(24).to_json()))["fit"]
    assert plain["gpu"]["memory_bytes"] == 24 * GIB
    assert plain["longest_row_tokens"]["value"] > plain["longest_row_tokens"]["other"] > 0


def test_the_card_decides_the_dtype() -> None:
    old = replace(card(24), bf16=False)
    guess = estimate_recipe(recipe(model={"dtype": "auto"}), shape_of(), options=Options(gpu=old, fit=old))
    assert guess.asked.step.dtype == "fp16" and guess.fit is not None
