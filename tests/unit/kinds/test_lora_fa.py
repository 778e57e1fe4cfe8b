"""LoRA-FA trains B alone (Zhang et al. 2023, section 3): its gradient is LoRA's, and no layer keeps its input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch.autograd.graph import saved_tensors_hooks

from lorafit.kinds.adapters import adapters
from lorafit.model.adapter import read_adapter, save_adapter
from lorafit.model.attach import attach_adapter, check_plan
from lorafit.model.class_shape import find_shape
from lorafit.model.fuse import fuse_layers
from tests.support.adapted import load, logits, make_llama, open_base, randomise
from tests.support.tiny_model import tiny_llama
from tests.unit.estimation import test_dry_run
from tests.unit.estimation.test_dry_run import ROWS, TOKENS, ask, exact, measure_each
from tests.unit.memory.test_estimate import MODELS, SIZES

WIDTH, INNER, LAYERS, ROW = 64, 128, 2, 24  # of the tiny Llama
IDS = torch.randint(3, 90, (1, ROW), generator=torch.Generator().manual_seed(1))


def adapted(kind: str, *, dropout: float = 0.0, fused: bool = False) -> Any:
    base = tiny_llama(vocab_size=96, attn_implementation="eager")
    model = attach_adapter(base, adapters.make_section(kind, r=4, alpha=8.0, dropout=dropout), 0).train()
    if fused:
        fuse_layers(model)
    return model


def loss_of(model: Any) -> torch.Tensor:
    torch.manual_seed(2)  # dropout
    loss: torch.Tensor = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    return loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model: Any) -> int:
    """What a forward pass keeps for the backward one, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model).backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_gradient_of_b_is_loras_and_a_has_none(fused: bool, dropout: float) -> None:
    """dL/dB = (alpha / r) dL/dy^T (x A^T), with A as LoRA draws it."""
    frozen, trained = (adapted(kind, dropout=dropout, fused=fused) for kind in ("lora_fa", "lora"))
    for model in (frozen, trained):
        randomise(model)
    found, whole = gradients(frozen), gradients(trained)
    assert found.keys() == {name for name in whole if "lora_B" in name} and found
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("fused", "dropout", "values"),
    [
        (False, 0.0, 3 * WIDTH + INNER),  # of q, k and v one input, of o, of gate and up one, of down
        (True, 0.0, 3 * WIDTH),  # a gated product is never kept there
        (False, 0.1, 6 * WIDTH + INNER),  # each linear drops for itself
        (True, 0.1, 6 * WIDTH + INNER),
    ],
)
def test_nothing_is_kept_for_a(fused: bool, dropout: float, values: int) -> None:
    """By exactly the inputs of the linears a layer keeps less than with LoRA, a token."""
    less = kept_bytes(adapted("lora", dropout=dropout, fused=fused))
    less -= kept_bytes(adapted("lora_fa", dropout=dropout, fused=fused))
    assert less == 4 * ROW * LAYERS * values


def test_the_estimate_saves_what_a_real_step_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live tensors of real steps in bf16, and dry runs: inputs, where a layer's own are gone at the peak, and A's
    gradient and moments.
    """
    monkeypatch.setattr(test_dry_run, "CHECKPOINTING", (False,))
    config, saved = MODELS["llama"], []
    for kind in ("lora", "lora_fa"):
        asked = ask(config, tmp_path, adapter__kind=kind)
        assert asked.step.adapter.closed_form is (kind == "lora")
        saved.append((measure_each(asked, config)[False].components, exact(asked, config, False).components))
    inputs = 2 * ROWS * TOKENS * SIZES["num_hidden_layers"] * (6 * SIZES["hidden_size"] + SIZES["intermediate_size"])
    for lora, frozen in zip(*saved, strict=True):
        less = {name: lora[name] - frozen.get(name, 0) for name in lora}
        assert 0.9 * inputs < less["kept_activations"] <= inputs
        assert less["optimizer_state"] == pytest.approx(2 * less["gradients"], rel=0.01)
        assert frozen["gradients"] < 0.6 * lora["gradients"]
        assert -less["base_weights"] == less["gradients"]  # what is frozen counts as base


def test_pefts_optimizer_projects_this_gradient() -> None:
    """Its first moment is (1 - beta1) (r / alpha)^2 G_B (A A^T)^-1; here the optimizer gets G_B itself."""
    ours = adapted("lora_fa")
    randomise(ours)
    theirs = copy.deepcopy(ours)
    optimizer: Any = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-3)
    assert {n for n, p in theirs.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }
    found = gradients(ours)
    loss_of(theirs).backward()
    optimizer.step()
    values = dict(ours.named_parameters())
    for name, gradient in found.items():
        a = values[name.replace("lora_B", "lora_A")].detach()
        projected = (4 / 8) ** 2 * gradient @ torch.linalg.inv(a @ a.t())
        moment = optimizer.state[name[: name.find("lora")] + "lora"]["exp_avg_B"]
        assert torch.allclose(moment, 0.1 * projected, rtol=0.03, atol=1e-2 * float(moment.abs().max()))  # in bf16


def test_what_is_saved_is_a_plain_lora(tmp_path: Path) -> None:
    base = open_base(make_llama(tmp_path / "base"))
    section = adapters.make_section("lora_fa", r=4, alpha=8.0)
    model = attach_adapter(load(base), section, 0)
    sites = adapters.bind(section).sites(find_shape(base.config))
    check_plan(model, sites, sum(site.parameters for site in sites))
    randomise(model)
    save_adapter(model, tmp_path / "adapter", base=base)
    assert read_adapter(tmp_path / "adapter").kind is adapters.get("lora")
    going_on = attach_adapter(load(base), section.model_copy(update={"init_from": "adapter"}), 9, folder=tmp_path)
    assert torch.equal(logits(going_on), logits(model))
    assert all(p.requires_grad == ("lora_B" in name) for name, p in going_on.named_parameters())
