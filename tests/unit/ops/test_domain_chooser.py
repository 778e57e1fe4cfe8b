"""Who a state belongs to, on clouds whose middle is known."""

from __future__ import annotations

import math

import pytest
import torch

from lorafit.ops.domain_chooser import drift_of, fit_domains

WIDTH = 24


def cloud(place: int, rows: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    """Around 6 on one axis; around the origin where that is beyond the last one."""
    states = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread
    states[:, place % WIDTH] += 6.0 * (place < WIDTH)
    return states


NOWHERE = WIDTH
CHOOSER = fit_domains({"a": cloud(0, 120, 1), "b": cloud(1, 80, 2)}, cloud(NOWHERE, 150, 3, 2.0), 0.9)


@pytest.mark.parametrize(("place", "name"), [(0, "a"), (1, "b")])
def test_each_domain_gets_the_share_of_its_own_that_was_asked_for(place: int, name: str) -> None:
    fresh = cloud(place, 1000, 10 + place)
    for share in (0.95, 0.8):
        chosen = CHOOSER.with_share(share).choose(fresh)
        assert set(chosen) <= {name, None}
        assert chosen.count(name) / 1000 == pytest.approx(share, abs=0.1)  # of 80 states


def test_what_is_like_none_goes_to_none() -> None:
    assert CHOOSER.choose(cloud(NOWHERE, 500, 20)).count(None) / 500 > 0.97
    assert CHOOSER.choose(cloud(5, 500, 21)).count(None) / 500 > 0.97  # a domain that nobody knows


def test_a_domain_of_few_states_is_not_taken_by_a_larger_one_beside_it() -> None:
    def near(place: int, rows: int, seed: int) -> torch.Tensor:
        return cloud(place, rows, seed, 3.0)

    chooser = fit_domains({"few": near(0, 16, 1), "many": near(1, 256, 2)}, near(NOWHERE, 256, 3), 0.9)
    assert chooser.choose(near(0, 500, 70)).count("few") / 500 > 0.7


def test_one_domain_alone_is_told_from_none() -> None:
    alone = fit_domains({"a": cloud(0, 60, 1)}, cloud(NOWHERE, 100, 3, 2.0), 0.9)
    assert alone.choose(cloud(0, 200, 30)).count("a") / 200 > 0.8
    assert alone.choose(cloud(1, 200, 31)).count("a") / 200 < 0.05


def test_more_axes_than_states_change_nothing() -> None:
    """Of wide states only the axes count along which they vary."""

    def widen(states: torch.Tensor) -> torch.Tensor:
        return torch.cat([states, torch.zeros(len(states), 1000)], 1)

    wide = fit_domains(
        {"a": widen(cloud(0, 120, 1)), "b": widen(cloud(1, 80, 2))}, widen(cloud(NOWHERE, 150, 3, 2.0)), 0.9
    )
    fresh = torch.cat([cloud(place, 50, 40 + place) for place in (0, 1, 5, NOWHERE)])
    assert wide.choose(widen(fresh)) == CHOOSER.choose(fresh)


def test_drift_is_near_0_of_the_same_and_1_of_another_domain() -> None:
    def drift(states: torch.Tensor) -> float:
        return drift_of(CHOOSER.log_odds(states)[:, 0].tolist(), CHOOSER.known["a"])

    assert drift(cloud(0, 256, 50)) < 0.15
    assert drift(cloud(1, 256, 51)) > 0.95
    half = torch.cat([cloud(0, 128, 52), cloud(1, 128, 53)])
    assert 0.4 < drift(half) < 0.65


@pytest.mark.parametrize("rows", [36, 256])
def test_prompts_that_were_trained_on_are_no_drift(rows: int) -> None:
    """Though the fit that has seen them gives them more than those without them gave."""

    def wide(place: int, number: int, seed: int) -> torch.Tensor:
        noise = torch.randn(number, 100, generator=torch.Generator().manual_seed(seed))
        return torch.cat([cloud(place, number, seed), noise], 1)

    own = wide(0, rows, 60)
    chooser = fit_domains({"a": own}, wide(NOWHERE, 150, 3), 0.9)
    assert drift_of(chooser.log_odds(own)[:, 0].tolist(), chooser.known["a"]) < 0.05
    assert drift_of(chooser.log_odds(wide(1, rows, 61))[:, 0].tolist(), chooser.known["a"]) > 0.85


def test_chance_gives_no_more_drift_than_its_level() -> None:
    generator = torch.Generator().manual_seed(0)
    level = math.sqrt(math.log(20) / 2 * (1 / 32 + 1 / 36))
    beyond = 0
    for _ in range(400):
        known = torch.randn(36, generator=generator)
        beyond += drift_of(torch.randn(32, generator=generator).tolist(), known.sort().values) > level
    assert 0.01 < beyond / 400 < 0.07


def test_drift_of_numbers() -> None:
    known = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert drift_of([2.0, 4.0, 1.0, 3.0], known) == 0
    assert drift_of([0.0], known) == 1
    assert drift_of([9.0], known) == 0  # more like it than its own
    assert drift_of([2.5], known) == 0.5
