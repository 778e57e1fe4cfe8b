"""Which layers are recomputed, that loss and gradients stay to the bit, and what a layer keeps for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafit.errors import ModelError
from lorafit.model import checkpointing
from lorafit.model.attach import attach_adapter
from lorafit.model.base import Base
from lorafit.model.checkpointing import set_checkpointing
from lorafit.model.fuse import fuse_layers
from lorafit.ops.recomputed_layers import CHECKPOINTING, Checkpointing, more_than, recomputed_layers
from tests.support.adapted import load, lora, make_llama, open_base, randomise

IDS = torch.arange(3, 35).reshape(1, -1)


def adapted(base: Base, kind: str = "none", *, dropout: float = 0.0) -> Any:
    model = attach_adapter(load(base, kind), lora(dropout=dropout), 0)
    randomise(model)
    fuse_layers(model)
    return model.train()


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and adapter gradients of one row; what is dropped is the same each time."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def layers(model: Any) -> Any:
    return model.get_base_model().model.layers


def test_the_last_layer_of_half_keeps_its_own() -> None:
    half = [list(recomputed_layers("half", count)) for count in range(1, 6)]
    assert half == [[], [0], [1], [0, 2], [1, 3]]
    assert list(recomputed_layers(False, 4)) == [] and list(recomputed_layers(True, 4)) == [0, 1, 2, 3]
    assert [more_than(value) for value in CHECKPOINTING] == [["half", True], [True], []]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "count"), [("none", 3), ("none", 4), ("nf4", 2)])
def test_loss_and_gradients_stay_to_the_bit(tmp_path: Path, kind: str, count: int, dropout: float) -> None:
    model = adapted(open_base(make_llama(tmp_path / "base", num_hidden_layers=count)), kind, dropout=dropout)
    loss, plain = step(model)
    calls: list[int] = []
    for number, layer in enumerate(layers(model)):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    values: tuple[Checkpointing, ...] = ("half", True, False)
    for value in values:
        set_checkpointing(model, value)
        for _ in range(2):  # the second time it is known whether a layer draws
            calls.clear()
            again, found = step(model)
            assert sorted(calls) == sorted([*range(count), *recomputed_layers(value, count)])
            assert torch.equal(loss, again) and plain.keys() == found.keys() and "layers.0" in next(iter(plain))
            assert all(torch.equal(plain[name], found[name]) and plain[name].abs().sum() > 0 for name in plain)


def test_generators_are_kept_only_where_a_layer_draws(llama: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    real = checkpointing.checkpoint

    def look(*arguments: Any, preserve_rng_state: bool, **options: Any) -> Any:
        assert options == {"use_reentrant": False}
        kept.append(preserve_rng_state)
        return real(*arguments, preserve_rng_state=preserve_rng_state, **options)

    monkeypatch.setattr(checkpointing, "checkpoint", look)
    model = adapted(llama)
    set_checkpointing(model, True)
    for _ in range(3):
        step(model)
    assert kept == [True, True] + 2 * [False, False]
    layers(model)[1].mlp.forward = lambda x: torch.nn.functional.dropout(x, 0.1)
    kept.clear()
    set_checkpointing(model, True)
    for _ in range(3):
        step(model)
    assert kept == [True, True] + 2 * [False, True]


def test_a_card_s_generator_is_looked_at_too(llama: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    offset = torch.zeros(1, dtype=torch.uint8)
    model = adapted(llama)

    def draw(*_: Any) -> None:
        offset.add_(4)

    layers(model)[0].self_attn.register_forward_hook(draw)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [offset.clone()])
    set_checkpointing(model, True)
    model(input_ids=IDS, use_cache=False)
    assert [layer._gradient_checkpointing_func._draws for layer in layers(model)] == [True, False]


def test_the_embeddings_are_never_differentiated(llama: Base) -> None:
    """transformers' switch hooks them, and one more hook each time, for reentrant checkpointing; none went again."""
    model = adapted(llama)
    embed = model.get_base_model().get_input_embeddings()
    for value in (True, "half", False):
        set_checkpointing(model, value)
        assert not embed(IDS).requires_grad


class Part(GradientCheckpointingLayer):
    def __init__(self, *inside: torch.nn.Module) -> None:
        super().__init__()
        self.inside = torch.nn.ModuleList(inside)


def test_a_layer_inside_of_a_layer_is_part_of_it() -> None:
    """Zamba's: each would be recomputed once more while its outer layer is."""
    inner = Part()
    model: Any = torch.nn.ModuleList([Part(inner), Part()])
    model.config = SimpleNamespace(model_type="zamba")
    set_checkpointing(model, True)
    assert [part.gradient_checkpointing for part in (*model, inner)] == [True, True, False]
    set_checkpointing(model, "half")
    assert [part.gradient_checkpointing for part in model] == [True, False]


def test_a_model_whose_layers_cannot_is_said() -> None:
    model: Any = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="gpt_neox_japanese")
    set_checkpointing(model, False)
    with pytest.raises(
        ModelError, match=r"gradient_checkpointing: transformers cannot recompute the layers of gpt_neo"
    ):
        set_checkpointing(model, "half")
