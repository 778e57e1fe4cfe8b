"""`fused` among transformers' attention implementations: the same losses and gradients, and sdpa for all the rest; and
`sdpa` itself on cards where shared keys and values would cost every score.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lorafit.contracts import Silent
from lorafit.errors import ModelError
from lorafit.kinds.quantizations import quantizations
from lorafit.model import attention
from lorafit.model.attention import check_attention, register_attention, takes_fused_attention
from lorafit.model.load import load_model
from lorafit.ops import causal_attention as operation
from tests.support.adapted import make_llama, open_base
from tests.support.tiny_model import tiny_llama

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts calls of the operation."""
    register_attention()
    seen: list[int] = []
    real = operation.causal_attention

    def count(*arguments: Any) -> torch.Tensor:
        seen.append(1)
        return real(*arguments)

    monkeypatch.setattr(operation, "causal_attention", count)
    return seen


def llama(key_heads: int = 2, **more: Any) -> Any:
    torch.manual_seed(0)
    model = tiny_llama(seed=None, **SIZES, num_key_value_heads=key_heads, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # attention matters
    return model.train()


def learn(model: Any, name: str, ids: torch.Tensor, **inputs: Any) -> tuple[float, torch.Tensor]:
    """Loss and all gradients."""
    model.set_attn_implementation(name)
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", [(1, 37), (3, 24), (2, 150)])
def test_losses_and_gradients_are_those_of_eager_and_sdpa(
    rows: tuple[int, int], key_heads: int, calls: list[int]
) -> None:
    model, ids = llama(key_heads), torch.randint(3, 97, rows)
    loss, gradients = learn(model, "fused", ids)
    assert len(calls) == 2
    for name in ("eager", "sdpa"):
        expected, wanted = learn(model, name, ids)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert float((gradients - wanted).norm() / wanted.norm()) < 1e-5
    assert len(calls) == 2


def test_right_padding_without_a_mask(calls: list[int]) -> None:
    """As the objective gives rows: padding at the end, no mask, no label there."""
    model, ids = llama(), torch.randint(3, 97, (2, 40))
    labels = ids.clone()
    labels[0, 25:] = -100
    ids[0, 25:] = 0
    found = []
    for name in ("fused", "sdpa"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert calls and float((found[0] - found[1]).norm() / found[1].norm()) < 1e-5


def test_checkpointing_and_autocast(calls: list[int]) -> None:
    model, ids = llama(), torch.randint(3, 97, (2, 40))
    _, gradients = learn(model, "fused", ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, again = learn(model, "fused", ids)
    assert torch.equal(gradients, again) and len(calls) == 6
    narrow = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, ours = learn(narrow, "fused", ids)
        assert len(calls) == 10
        _, theirs = learn(narrow, "sdpa", ids)
    assert float((ours - theirs).float().norm() / theirs.float().norm()) < 0.1


UNUSUAL: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "evaluation": lambda model, ids: model.eval()(input_ids=ids, use_cache=False),
    "no gradients": lambda model, ids: torch.no_grad()(model)(input_ids=ids, use_cache=False),
    "a padding mask": lambda model, ids: model(
        input_ids=ids, attention_mask=(torch.arange(ids.shape[1]) > 2).long().repeat(2, 1), use_cache=False
    ),
    "packed rows": lambda model, ids: model(input_ids=ids, position_ids=torch.arange(12).repeat(2, 2), use_cache=False),
    "a cache": lambda model, ids: model(
        input_ids=ids[:, 20:], past_key_values=model.eval()(input_ids=ids[:, :20], use_cache=True).past_key_values
    ),
    "generation": lambda model, ids: SimpleNamespace(
        logits=model.eval().generate(ids, max_new_tokens=4, do_sample=False).float()
    ),
}


@pytest.mark.parametrize("ask", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_the_unusual_goes_to_sdpa(ask: Callable[[Any, torch.Tensor], Any], calls: list[int]) -> None:
    ids = torch.randint(3, 97, (2, 24))
    results = []
    for name in ("fused", "sdpa"):
        model = llama()
        model.set_attn_implementation(name)
        results.append(ask(model, ids).logits)
    assert torch.equal(*results) and not calls


def test_dropout_on_attention_goes_to_sdpa(calls: list[int]) -> None:
    model, ids = llama(attention_dropout=0.4), torch.randint(3, 97, (2, 24))
    (one, gradients), (other, wanted) = (learn(model, name, ids) for name in ("fused", "sdpa"))
    assert one == other and torch.equal(gradients, wanted) and not calls


def test_a_window_shorter_than_the_row_goes_to_sdpa(calls: list[int]) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16)).train()
    ids = torch.randint(3, 97, (2, 24))
    (one, gradients), (other, wanted) = (learn(model, name, ids) for name in ("fused", "sdpa"))
    assert one == other and torch.equal(gradients, wanted) and not calls
    learn(model, "fused", ids[:, :12])
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"is_causal": False},
        {"position_bias": torch.zeros(1, 4, 6, 6)},
        {"attention_mask": torch.zeros(1, 1, 6, 6)},
        {"key": torch.randn(1, 2, 9, 8), "value": torch.randn(1, 2, 9, 8)},
    ],
    ids=["both ways", "bias", "mask", "longer keys"],
)
def test_a_layer_that_asks_for_more_gets_sdpa(change: dict[str, Any], calls: list[int]) -> None:
    torch.manual_seed(0)
    module = SimpleNamespace(training=True, is_causal=True, num_key_value_groups=2)
    usual = {
        "query": torch.randn(1, 4, 6, 8, requires_grad=True),
        "key": torch.randn(1, 2, 6, 8),
        "value": torch.randn(1, 2, 6, 8),
        "attention_mask": None,
        "scaling": 0.3,
    }
    attention._attention_forward(module, **usual)  # type: ignore[arg-type]
    assert len(calls) == 1
    found, _ = attention._attention_forward(module, **{**usual, **change})  # type: ignore[arg-type]
    expected, _ = sdpa_attention_forward(module, **{**usual, **change})  # type: ignore[arg-type]
    assert torch.equal(found, expected) and len(calls) == 1


def test_a_model_that_looks_nothing_up_is_refused() -> None:
    falcon = FalconForCausalLM(FalconConfig(**{**SIZES, "num_hidden_layers": 1}))
    assert not takes_fused_attention(falcon) and takes_fused_attention(llama())
    with pytest.raises(ModelError, match=r"FalconForCausalLM cannot run with fused attention.*auto"):
        check_attention("fused", falcon)
    check_attention("sdpa", falcon)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Of each call of torch's attention: whether keys are shared, and for how many heads there are keys."""
    register_attention()
    seen: list[tuple[bool, int]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def note(query: torch.Tensor, key: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append((options.get("enable_gqa", False), key.shape[1]))
        return real(query, key, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    return seen


@pytest.mark.parametrize("capability", [(7, 5), (8, 9), (9, 0)])
def test_on_a_card_without_a_kernel_for_shared_keys_they_are_repeated(
    capability: tuple[int, int], asked: list[tuple[bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32, and on capability 7.5 all: torch would keep every score. The same loss and gradients come out."""
    model, ids = llama(), torch.randint(3, 97, (2, 24))
    loss, gradients = learn(model, "sdpa", ids)
    assert asked == [(True, 2)] * 2  # a CPU's kernel shares
    monkeypatch.setattr(attention, "_capability_of", lambda tensor: capability)
    again, found = learn(model, "sdpa", ids)
    assert asked[2:] == [(False, 4)] * 2
    assert again == pytest.approx(loss, rel=1e-5)
    assert float((found - gradients).norm() / gradients.norm()) < 1e-5


@pytest.mark.parametrize(
    ("capability", "dtype", "shares"),
    [
        ((8, 0), torch.bfloat16, True),
        ((12, 0), torch.float16, True),
        ((7, 5), torch.float16, False),
        ((7, 5), torch.bfloat16, True),  # no kernel without scores either way: copies would come on top
    ],
)
def test_autocast_decides_what_the_kernel_gets(
    capability: tuple[int, int],
    dtype: torch.dtype,
    shares: bool,
    asked: list[tuple[bool, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_capability_of", lambda tensor: capability)
    with torch.autocast("cpu", dtype=dtype):
        learn(llama(), "sdpa", torch.randint(3, 97, (2, 24)))
    assert asked == [(shares, 2 if shares else 4)] * 2


@pytest.mark.parametrize("ask", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_what_is_asked_beside_training_is_the_same_on_such_a_card(
    ask: Callable[[Any, torch.Tensor], Any], asked: list[tuple[bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, results = torch.randint(3, 97, (2, 24)), []
    for capability in (None, (7, 5)):
        monkeypatch.setattr(attention, "_capability_of", lambda tensor, found=capability: found)
        model = llama()
        model.set_attn_implementation("sdpa")
        results.append(ask(model, ids).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert asked and not any(shares for shares, _ in asked[len(asked) // 2 :])


def test_heads_with_keys_of_their_own_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    register_attention()
    ids, found = torch.randint(3, 97, (2, 24)), []
    for capability in (None, (7, 5)):
        monkeypatch.setattr(attention, "_capability_of", lambda tensor, found=capability: found)
        found.append(learn(llama(4), "sdpa", ids))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_a_loaded_model_runs_so_and_never_by_cudnn(name: str, tmp_path: Path, asked: list[tuple[bool, int]]) -> None:
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register("sdpa", sdpa_attention_forward)  # as in a new process
    torch.backends.cuda.enable_cudnn_sdp(True)
    model = load_model(
        open_base(make_llama(tmp_path / "base")),
        quantization=quantizations.make_section("none"),
        dtype=torch.float32,
        compute_dtype=torch.float32,
        attention=name,
        device="cpu",
        reporter=Silent(),
    )
    assert model.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention._sdpa_forward
    assert not torch.backends.cuda.cudnn_sdp_enabled()
