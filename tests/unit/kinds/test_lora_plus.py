"""LoRA+ trains B at a multiple of A's rate (Hayou et al. 2024, section 4), step for step as PEFT's optimizer does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from peft.optimizers import create_loraplus_optimizer

from lorafit.kinds.adapters import adapters
from lorafit.kinds.optimizers import optimizers, rate_groups
from lorafit.model.adapter import read_adapter, save_adapter
from lorafit.model.attach import attach_adapter
from tests.support.adapted import load, make_llama, open_base
from tests.support.tiny_model import tiny_llama

RATE, DECAY, BETAS = 1e-3, 0.1, (0.9, 0.95)
PLAIN: dict[str, Any] = {"alpha": 32.0, "dropout": 0.0, "target_modules": ["q_proj"]}


def section(**fields: Any) -> Any:
    return adapters.make_section("lora_plus", **(PLAIN | {"r": 64} | fields))


def optimizer_of(model: torch.nn.Module, kind: str, **fields: Any) -> torch.optim.Optimizer:
    """As training builds it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = rate_groups(named, adapters.bind(section(**fields)).rate_factor)
    return optimizers.make(kind, weight_decay=DECAY).build(groups, RATE, torch.device("cpu"))


def take_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    ids = torch.randint(3, 90, (steps, 2, 12), generator=torch.Generator().manual_seed(1))
    for batch in ids:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("kind", "peft_class"), [("adamw", torch.optim.AdamW), ("adamw_8bit", AdamW8bit)])
def test_steps_are_those_of_pefts_optimizer(kind: str, peft_class: Any) -> None:
    """PEFT takes the groups' decay from `loraplus_weight_decay` alone; here it is the optimizer section's."""
    ours = attach_adapter(tiny_llama(vocab_size=96), section(), 0)
    theirs, frozen = copy.deepcopy(ours), copy.deepcopy(ours)
    decay = {"weight_decay": DECAY, "loraplus_weight_decay": DECAY}
    reference = create_loraplus_optimizer(
        theirs, peft_class, lr=RATE, loraplus_lr_ratio=16.0, betas=BETAS, eps=1e-8, **decay
    )
    optimizer = optimizer_of(ours, kind)
    found, wanted = take_steps(ours, optimizer), take_steps(theirs, reference)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert any(getattr(value, "dtype", None) == torch.uint8 for value in values) == (kind == "adamw_8bit")
    with_one_rate = take_steps(frozen, optimizer_of(frozen, kind, rate_ratio=1.0))
    assert not any(torch.equal(*pair) for pair in zip(found, with_one_rate, strict=True))


def test_a_and_b_have_two_rates_and_one_decay() -> None:
    model = attach_adapter(tiny_llama(vocab_size=96), section(rate_ratio=5.0), 0)
    groups = optimizer_of(model, "adamw", rate_ratio=5.0).param_groups
    kinds = {id(p): "lora_B" in name for name, p in model.named_parameters()}
    assert [{kinds[id(p)] for p in group["params"]} for group in groups] == [{False}, {True}]
    assert [group["lr"] for group in groups] == [RATE, 5 * RATE]
    assert [group["weight_decay"] for group in groups] == [DECAY, DECAY]
    assert adapters.bind(section()).rate_factor("model.score.modules_to_save.default.weight") == 1.0  # a task's head


def test_what_is_saved_is_a_plain_lora_that_it_goes_on_from(tmp_path: Path) -> None:
    base = open_base(make_llama(tmp_path / "base"))
    model = attach_adapter(load(base), section(r=4), 0)
    save_adapter(model, tmp_path / "adapter", base=base)
    saved = read_adapter(tmp_path / "adapter")
    assert saved.kind is adapters.get("lora")
    plain = attach_adapter(load(base), adapters.make_section("lora", **PLAIN, r=4), 0)
    save_adapter(plain, tmp_path / "plain", base=base)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    going_on = attach_adapter(load(base), section(r=4, init_from="plain"), 9, folder=tmp_path)
    assert all(torch.equal(*pair) for pair in zip(going_on.parameters(), plain.parameters(), strict=True))
