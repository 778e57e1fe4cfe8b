"""The arithmetic of quantisations and LoRA equals what the libraries allocate."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from pydantic import ValidationError

from lorafit.errors import RecipeError
from lorafit.facts import LinearShape, ModelShape
from lorafit.kinds.adapters import adapters
from lorafit.kinds.quantizations import kind_of_codes, quantizations
from lorafit.model.attach import attach_adapter
from tests.support.adapted import load, lora, make_llama, open_base


def linear(name: str, inputs: int, outputs: int, count: int = 2) -> LinearShape:
    return LinearShape(name, inputs, outputs, count)


def stored_bytes(weight: Any) -> tuple[int, int]:
    """(codes, constants) of one bitsandbytes weight, by its tensors."""
    if getattr(weight, "SCB", None) is not None:
        return weight.CB.nbytes, weight.SCB.nbytes
    state = weight.quant_state
    constants = state.absmax.nbytes + state.code.nbytes
    if state.nested:
        constants += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
    return weight.data.nbytes, constants


@pytest.mark.parametrize("shape", [(576, 1536), (64, 64), (100, 33), (31, 8)])
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", None)])
def test_bytes_are_those_of_the_tensors(shape: tuple[int, int], kind: str, double: bool | None) -> None:
    inputs, outputs = shape
    member = quantizations.make(kind, **({} if double is None else {"double_quant": double}))
    weight = torch.randn(outputs, inputs)
    if kind == "int8":
        packed: Any = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
    else:
        packed = bnb.nn.Params4bit(weight, quant_type=kind, compress_statistics=bool(double)).to("cpu")
    codes, constants = stored_bytes(packed)
    one = linear("x", inputs, outputs, count=3)
    assert member.weight_bytes(one, 2) == 3 * codes
    assert member.constant_bytes(one) == 3 * constants


def test_plain_weights_have_their_dtype_and_no_constants() -> None:
    member = quantizations.make("none")
    one = linear("x", 10, 20)
    assert member.weight_bytes(one, 4) == 1600
    assert member.constant_bytes(one) == member.workspace_bytes(one, 4) == 0
    assert quantizations.make("nf4").workspace_bytes(one, 2) == 400


SHAPE = ModelShape(
    model_type="llama", hidden_size=128, layers=2, heads=4, kv_heads=2, head_dim=32,
    vocabulary=96, max_positions=64, embedding_parameters=96 * 128, head_parameters=96 * 128,
    other_parameters=5 * 128,
    linears=(
        linear("q_proj", 128, 128), linear("k_proj", 128, 64), linear("v_proj", 128, 64), linear("o_proj", 128, 128),
        linear("gate_proj", 128, 192), linear("up_proj", 128, 192), linear("down_proj", 192, 128),
    ),
)  # fmt: skip


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
def test_lora_counts_are_pefts(tmp_path: Any, targets: Any) -> None:
    section = lora(r=3, target_modules=targets)
    member = adapters.bind(section)
    counted = sum(site.parameters for site in member.sites(SHAPE))
    model = attach_adapter(load(open_base(make_llama(tmp_path / "base"))), section, 0)
    assert model.get_nb_trainable_parameters()[0] == counted and member.rank() == 3


def test_targets_that_match_nothing_say_what_exists() -> None:
    with pytest.raises(RecipeError, match="'q_pro' matches no linear") as caught:
        adapters.bind(lora(target_modules=["q_pro"])).sites(SHAPE)
    assert "did you mean q_proj?" in str(caught.value) and "down_proj" in str(caught.value)
    with pytest.raises(RecipeError, match="'nope_proj' matches no linear") as caught:  # only `_proj` is known of it
        adapters.bind(lora(target_modules=["nope_proj"])).sites(SHAPE)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("target_modules", [], "no trainable parameters"),
        ("target_modules", ["self_attn.q_proj"], "is no linear's name"),
        ("target_modules", [" "], "is no linear's name"),
        ("r", 0, "greater than or equal to 1"),
        ("alpha", 0, "greater than 0"),
        ("alpha", float("inf"), "finite|less than"),
        ("dropout", 1.0, "less than 1"),
        ("rank", 8, "Extra inputs"),
    ],
)
def test_sections_refuse_nonsense(field: str, value: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        lora(**{field: value})


def test_alpha_and_dropout_reach_the_model(tmp_path: Any) -> None:
    base = open_base(make_llama(tmp_path / "base"))
    model = attach_adapter(load(base), lora(r=4, alpha=6.5, dropout=0.25), 0)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 6.5 / 4 and layer.lora_dropout["default"].p == 0.25


def plant(codes: torch.Tensor, weight: torch.Tensor) -> list[int]:
    """Gives blocks of zeros the code that CUDA writes there; their numbers."""
    blocks = [number for number, block in enumerate(weight.reshape(-1).split(64)) if not block.any()]
    for block in blocks:
        codes.view(-1)[32 * block : 32 * (block + 1)] = 0
    return blocks


@pytest.mark.parametrize("double", [True, False])
def test_blocks_of_zeros_get_the_code_of_zero_and_no_other_block_does(double: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 96) * 0.02
    weight[3] = 0
    weight[-2:] = 0
    weight.view(-1)[64:128] = -0.02  # all its codes are the lowest too
    layer = bnb.nn.Linear4bit(96, 300, bias=False, quant_type="nf4", compress_statistics=double)
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=double, requires_grad=False).to(
        "cpu"
    )
    right = layer.weight.data.clone()
    kind = kind_of_codes(layer)
    assert kind is not None
    kind.settle(layer)
    assert torch.equal(layer.weight.data, right)
    assert len(plant(layer.weight.data, weight)) == 4 and not torch.equal(layer.weight.data, right)
    kind.settle(layer)
    assert torch.equal(layer.weight.data, right)
