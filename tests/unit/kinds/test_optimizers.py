"""Every optimizer trains, brings only options that take effect, and holds the state that it says it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lorafit.kinds.optimizers import optimizers, rate_groups, set_rates

CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {  # for each option another value than its default
    "betas": {"betas": (0.5, 0.6)},
    "eps": {"eps": 0.1},
    "weight_decay": {"weight_decay": 0.5},
    "momentum": {"momentum": 0.3},
    "nesterov": {"nesterov": True},
    "alpha": {"alpha": 0.5},
    "centered": {"centered": True},
    "decay_rate": {"decay_rate": -0.3},
    "clip_threshold": {"clip_threshold": 0.1},
    "beta1": {"beta1": 0.8},
    "scale_parameter": {"scale_parameter": True},
    "min_8bit_size": {"min_8bit_size": 10**6},
}


def trained(name: str, **options: Any) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A [128, 64] matrix after five steps on a noisy quadratic."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(128, 64))
    optimizer = optimizers.make(name, **options).build([weight], 1e-2, CPU)
    for _ in range(5):
        (weight - 1 + 0.1 * torch.randn(128, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach(), optimizer


def options() -> list[tuple[str, str]]:
    return [
        (name, field)
        for name in optimizers.names()
        for field in optimizers.section(name).model_fields
        if field != "kind"
    ]


@pytest.mark.parametrize("name", optimizers.names())
def test_trains_and_holds_the_bytes_it_says(name: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(128, 64)
    weight, optimizer = trained(name)
    assert (weight - 1).norm() < (start - 1).norm()
    (state,) = optimizer.state.values()
    held = {
        k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.numel() > 1 and not k.startswith("qmap")
    }
    said = optimizers.make(name).state_bytes(weight.numel())
    held_bytes = sum(v.numel() * v.element_size() for v in held.values())
    if name == "adafactor":  # 1/r of the matrix, counted for r = 8
        assert held_bytes <= said
    else:
        assert held_bytes == pytest.approx(said, rel=0.01)
    assert any(v.dtype == torch.uint8 for v in held.values()) == ("8bit" in name)


@pytest.mark.parametrize(("name", "field"), options())
def test_every_option_takes_effect(name: str, field: str) -> None:
    plain, _ = trained(name)
    changed, _ = trained(name, **OPTIONS[field])
    assert not torch.equal(plain, changed)


def test_the_default_decays_nothing_and_uses_the_betas_of_language_models() -> None:
    for name in optimizers.names():
        options = optimizers.make_section(name).model_dump()
        assert options["weight_decay"] == 0.0
        if "adamw" in name:
            assert options["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_torchs_adam_is_one_kernel_on_a_gpu_and_as_ever_on_a_cpu(name: str) -> None:
    kind, weight = optimizers.make(name), torch.nn.Parameter(torch.ones(4, 4))
    assert kind.options(torch.device("cuda"))["fused"] is True
    assert kind.build([weight], 1e-3, torch.device("cuda")).defaults["fused"] is True  # its class knows the word
    assert kind.build([weight], 1e-3, CPU).defaults["fused"] is None


@pytest.mark.parametrize("name", optimizers.names())
def test_paged_runs_unpaged_on_a_cpu(name: str, recwarn: pytest.WarningsRecorder) -> None:
    weight = torch.nn.Parameter(torch.ones(128, 64))
    optimizer = optimizers.make(name).build([weight], 1e-3, CPU)
    weight.sum().backward()
    optimizer.step()
    assert getattr(optimizer, "is_paged", False) is False
    assert (weight < 1).all()
    assert not [w for w in recwarn if "aged" in str(w.message)]


@pytest.mark.parametrize("name", optimizers.names())
def test_a_group_moves_as_under_an_optimizer_of_its_own_rate(name: str) -> None:
    """Two matrices at rates of 1 to 16, bit for bit as each by itself; the section's decay stays that of both."""
    torch.manual_seed(0)
    values, gradients = torch.randn(2, 128, 64), torch.randn(3, 2, 128, 64)
    together, apart = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
    kind, factors = optimizers.make(name, weight_decay=0.5), {"a": 1.0, "b": 16.0}
    groups = rate_groups(zip(factors, together, strict=True), factors.__getitem__)
    optimizer = kind.build(groups, 1e-3, CPU)
    alone = [kind.build([p], 1e-3 * factor, CPU) for p, factor in zip(apart, factors.values(), strict=True)]
    for step, pair in enumerate(gradients, start=1):
        set_rates(optimizer, 1e-3 / step)
        for one, factor in zip(alone, factors.values(), strict=True):
            set_rates(one, 1e-3 / step * factor)
        for parameter, gradient in zip([*together, *apart], [*pair, *pair], strict=True):
            parameter.grad = gradient.clone()
        for one in (optimizer, *alone):
            one.step()
    assert all(torch.equal(*pair) for pair in zip(together, apart, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3 / 3, 1e-3 / 3 * 16.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert [group["rate_factor"] for group in optimizer.param_groups] == [1.0, 16.0]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("adamw", {"momentum": 0.9}),
        ("sgd", {"betas": (0.9, 0.9)}),
        ("adamw", {"betas": (0.9, 1.0)}),
        ("lion_8bit", {"eps": 1e-8}),
        ("sgd", {"nesterov": True, "momentum": 0.0}),
        ("adamw_bnb_32bit", {"min_8bit_size": 1}),
    ],
)
def test_options_of_other_kinds_and_bad_values_are_refused(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        optimizers.make_section(name, **bad)
