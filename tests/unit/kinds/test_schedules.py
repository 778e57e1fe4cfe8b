"""Learning rates: transformers' shapes behind the warm-up, finite and above zero at every step."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from transformers import optimization

from lorafit.kinds.schedules import learning_rate_at, schedules, warmup_steps

TOTAL = 40


def theirs(name: str, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = {
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warmup, TOTAL),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, TOTAL),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
        "inverse_sqrt": lambda: optimization.get_inverse_sqrt_schedule(optimizer, warmup),
        "polynomial": lambda: optimization.get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, TOTAL, lr_end=0.0, power=2.0
        ),
    }[name]()
    rates = []
    for _ in range(TOTAL):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "inverse_sqrt", "polynomial"])
def test_equals_transformers_behind_the_warmup(name: str, warmup: int) -> None:
    options = {"power": 2.0} if name == "polynomial" else {}
    section = schedules.make_section(name, warmup_steps=warmup, **options)
    ours = [learning_rate_at(section, 1.0, step, TOTAL) for step in range(1, TOTAL + 1)]
    assert ours[warmup:] == pytest.approx(theirs(name, warmup)[warmup:], abs=1e-12)
    assert ours[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)])


@pytest.mark.parametrize("name", schedules.names())
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 1), (3, 3), (5, 9)])
def test_never_zero_never_infinite(name: str, total: int, warmup: int) -> None:
    section = schedules.make_section(name, warmup_steps=warmup)
    for step in range(1, total + 1):
        rate = learning_rate_at(section, 2e-4, step, total)
        assert math.isfinite(rate) and 0 < rate <= 2e-4


def test_options_change_the_rate() -> None:
    def last(name: str, **options: float) -> float:
        return learning_rate_at(schedules.make_section(name, **options), 1.0, TOTAL, TOTAL)

    for name in ("cosine", "linear", "polynomial"):
        assert last(name, min_ratio=0.5) > 0.5 > last(name)
    assert last("polynomial", power=3.0) < last("polynomial")
    assert last("inverse_sqrt", timescale_steps=10) == pytest.approx(1 / math.sqrt(1 + 39 / 10))


def test_warmup_of_a_ratio_is_rounded_up_and_ends_with_the_run() -> None:
    cosine = schedules.section("cosine")
    assert warmup_steps(cosine(warmup_ratio=0.1), 11) == 2
    assert warmup_steps(cosine(warmup_ratio=1.0), 4) == 4
    assert warmup_steps(cosine(), 4) == 0
    with pytest.raises(ValidationError, match="keep one"):
        cosine(warmup_ratio=0.1, warmup_steps=3)
