"""Flops against counts made by torch, and time and price from them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lorafit.errors import UsageError
from lorafit.estimation import Options, RowLengths, estimate_recipe
from lorafit.estimation.table import format_seconds
from lorafit.machine.devices import parse_gpu, peak_flops
from lorafit.model.checkpointing import set_checkpointing
from lorafit.model.class_shape import find_shape
from lorafit.ops.recomputed_layers import CHECKPOINTING, Checkpointing
from lorafit.plan import check_price, count_flops
from lorafit.plan.flops import active_parameters, head_parameters
from lorafit.plan.run_cost import HIGH_UTILISATION, LOW_UTILISATION, UTILISATION
from tests.support.plan_cases import ROWS, card, recipe, shape_of

TINY = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 176, "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_what_torch_counts(checkpointing: Checkpointing, tied: bool) -> None:
    """One step of a real model with a real adapter. torch counts all of S x S in attention; a causal model needs half.

    The first layer's inputs need no gradient before their first adapter: that much torch counts less.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = {**TINY, "tie_word_embeddings": tied}
    shape, rows, length, rank = find_shape(values), 3, 48, 8
    kind = values.pop("model_type")
    config = AutoConfig.for_model(kind, **values, attn_implementation="eager")
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.train()
    set_checkpointing(model, checkpointing)
    ids = torch.randint(0, 320, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    adapter = sum(rank * (x.in_features + x.out_features) * x.count for x in shape.linears)
    counted = count_flops(
        shape, adapter_parameters=adapter, tokens=rows * length, labelled_tokens=rows * length,
        squared_tokens=rows * length * length, checkpointing=checkpointing,
    )  # fmt: skip
    attention = 4 * shape.heads * shape.head_dim * shape.layers * rows * length * length
    full = counted.attention * length / (length + 1) * 2
    assert full == pytest.approx(3 * attention)
    # a recomputed layer stops once all that is needed is there: its last product is not made again
    share = {False: 0, "half": 1 / 2, True: 1}[checkpointing]
    again = counted.recomputation + share * (attention - counted.attention / 3)
    expected = counted.frozen + counted.adapter + counted.head + 3 * attention + again
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.06)
    assert counter.get_total_flops() <= expected


def test_parts_by_hand() -> None:
    shape = shape_of()  # Llama-3.1-8B, a million tokens in rows of 1,000
    found = count_flops(
        shape, adapter_parameters=41_943_040, tokens=10**6, labelled_tokens=10**5, squared_tokens=10**9,
        checkpointing=True,
    )  # fmt: skip
    assert found.frozen == 4 * 6_979_321_856 * 10**6
    assert found.adapter == 6 * 41_943_040 * 10**6
    assert found.head == 4 * 128_256 * 4096 * 10**5
    assert found.attention == 12 * 4096 * 32 * (10**9 + 10**6) // 2
    assert found.recomputation == 2 * (6_979_321_856 + 41_943_040) * 10**6 + found.attention // 3
    assert found.total == found.model_flops + found.recomputation == sum(list(found.to_json().values())[:5])


def test_a_mixture_counts_the_experts_a_token_goes_to() -> None:
    shape = shape_of("mistralai/Mixtral-8x7B-v0.1")  # 12.9B of 46.7B parameters are at work in a token
    active = active_parameters(shape) + 2 * head_parameters(shape)
    assert active == pytest.approx(12.88e9, rel=0.002)
    gpt2 = shape_of("openai-community/gpt2")
    assert head_parameters(gpt2) == 50_257 * 768  # tied: a product all the same


def test_the_run_is_its_epochs() -> None:
    def cost(**training: Any) -> Any:
        return estimate_recipe(recipe(training=training), shape_of(), RowLengths(ROWS)).cost

    assert (cost().tokens, cost().is_whole_run) == (60_000, True)  # three epochs
    assert cost(epochs=0.5).tokens == 10_000
    assert cost(max_steps=14).tokens == 40_000  # of 16 rows: two epochs
    off, half, on = (cost(gradient_checkpointing=choice).flops for choice in CHECKPOINTING)
    assert (off.recomputation, on.model_flops) == (0, off.model_flops) and on.recomputation > 0
    assert on.recomputation == 2 * half.recomputation
    one = estimate_recipe(recipe(data={"max_length": 1000}), shape_of()).cost
    assert (one.tokens, one.is_whole_run) == (10**6, False)
    assert one.flops.attention == 12 * 4096 * 32 * (10**9 + 10**6) // 2


def test_time_and_price() -> None:
    options = Options(gpu=parse_gpu("L4"), price_per_hour=0.8)
    cost = estimate_recipe(recipe(), shape_of(), RowLengths(ROWS), options).cost
    expected = cost.flops.total / (121e12 * UTILISATION)
    assert cost.seconds() == pytest.approx(expected)
    assert cost.price() == pytest.approx(expected / 3600 * 0.8)
    plain = json.loads(json.dumps(cost.to_json()))
    assert plain["seconds"]["least"] < plain["seconds"]["expected"] < plain["seconds"]["most"]
    assert plain["seconds"]["most"] == pytest.approx(expected * UTILISATION / LOW_UTILISATION)
    assert plain["price"]["least"] == pytest.approx(expected * UTILISATION / HIGH_UTILISATION / 3600 * 0.8)
    for unknown in (Options(), Options(gpu=card(24))):
        guess = estimate_recipe(recipe(), shape_of(), RowLengths(ROWS), unknown).cost
        assert (guess.device, guess.seconds(), guess.price()) == (None, None, None)
    wide = estimate_recipe(recipe(model={"dtype": "fp32"}), shape_of(), RowLengths(ROWS), options).cost
    assert wide.seconds() is None  # the peak is one of 16-bit products
    fit = estimate_recipe(recipe(), shape_of(), RowLengths(ROWS), Options(fit=parse_gpu("L4"))).cost
    assert fit.device == "L4"


@pytest.mark.parametrize("price", [-3.0, math.nan, math.inf, 1e9])
def test_what_is_no_price(price: float) -> None:
    with pytest.raises(UsageError, match=r"--price-per-hour: .* out of range; a price lies in the range") as caught:
        check_price(price, parse_gpu("L4"))
    assert caught.value.exit_code == 2


def test_a_price_needs_a_card() -> None:
    for device in (None, card(24), card(24, kind="cpu")):
        with pytest.raises(UsageError, match=r"--price-per-hour: a price needs a card"):
            check_price(1.0, device)
    check_price(None, None)
    check_price(0.0, parse_gpu("rtx-4090"))


def test_published_speeds_lie_in_the_assumed_range() -> None:
    """Mistral-7B on an A100 in rows of 4,096 (fms-acceleration), Qwen-7B in rows of 1,024 (its README)."""
    mistral, qwen = shape_of("mistralai/Mistral-7B-v0.1"), shape_of("meta-llama/Llama-2-7b-hf")
    peak = peak_flops(parse_gpu("A100-80GB"))
    assert peak is not None
    for shape, length, tokens_per_second, said in (
        (mistral, 4096, 3597.6, 0.54), (mistral, 4096, 2748.9, 0.41), (mistral, 4096, 3428.6, 0.51),
        (qwen, 256, 8 * 256 / 1.2, 0.23), (qwen, 1024, 8 * 1024 / 2.8, 0.40), (qwen, 1024, 8 * 1024 / 3.5, 0.32),
        (qwen, 256, 8 * 256 / 3.0, 0.09),
    ):  # fmt: skip
        flops = count_flops(
            shape, adapter_parameters=0, tokens=length, labelled_tokens=length, squared_tokens=length**2,
            checkpointing=True,
        )  # fmt: skip
        assert flops.total / length * tokens_per_second / peak == pytest.approx(said, abs=0.03)


def test_durations_for_people() -> None:
    said = [format_seconds(seconds) for seconds in (0.75, 40, 100, 3600, 12 * 3600, 86400 * 5.1)]
    assert said == ["0.75 s", "40 s", "1.7 min", "60 min", "12 h", "5.1 days"]
