"""What lorafit does on cards of five capabilities, as far as tensors without values show it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fake_card.card import ask_card
from tests.fake_card.cases import LOOPS, STEPS, recipe_steps
from tests.fake_card.launches import show

TOLERANCE = 0.01
TOLERANCES = {("int8", "closed form"): 0.03}
MOST_WAITS = 2
Seen = dict[str, list[dict[str, Any]]]


def ask_steps(capability: tuple[int, int], steps: dict[str, Any]) -> Seen:
    """By name what was seen of each run."""
    return dict(zip(steps, ask_card(capability, "step", list(steps.values())), strict=True))


@pytest.fixture(scope="session")
def seen(capability: tuple[int, int]) -> Seen:
    return ask_steps(capability, STEPS)


@pytest.fixture(scope="session")
def seen_of_recipes(capability: tuple[int, int]) -> Seen:
    return ask_steps(capability, recipe_steps())


def test_no_shipped_recipe_meets_math_attention(seen_of_recipes: Seen) -> None:
    """In the dtype that `auto` takes on the card, whole and packed rows."""
    kernels = {name: {kernel for run in runs for kernel in run["kernels"]} for name, runs in seen_of_recipes.items()}
    print(kernels)
    assert {name: found for name, found in kernels.items() if not found or "math" in found} == {}


def test_torch_takes_the_kernel_that_the_estimate_expects(seen: Seen, seen_of_recipes: Seen) -> None:
    """One asks for none, and flash takes no bias as T5's: the kernel that does keeps no more."""
    apart = {"plain attention", "summarise_t5"}
    wrong = [
        (name, run)
        for name, runs in {**seen, **seen_of_recipes}.items()
        for run in runs
        if set(run["kernels"]) != {run["expected kernel"]} and name not in apart
    ]
    assert wrong == []


@pytest.mark.parametrize("engine", ["closed form", "--exact"])
def test_memory_is_what_was_estimated(seen: Seen, engine: str) -> None:
    errors = {
        (name, str(run["run"]), run["where"]): run["estimates"][engine] / run["bytes"] - 1
        for name, runs in seen.items()
        for run in runs
    }
    worst = {name: max((e for (n, *_), e in errors.items() if n == name), key=abs) for name in seen}
    shown = ", ".join(f"{name} {worst[name]:+.2%}" for name in sorted(worst, key=lambda name: -abs(worst[name]))[:4])
    print(f"{engine}, {len(errors)} steps, the worst: {shown}")
    off = [case for case, error in errors.items() if abs(error) > TOLERANCES.get((case[0], engine), TOLERANCE)]
    assert {case: f"{errors[case]:+.2%}" for case in off} == {}


def test_attention_kernels_are_those_of_the_table(capability: tuple[int, int]) -> None:
    """Alone, with what transformers and lorafit's own attention never ask for as well."""
    found = ask_card(capability, "attention", [64, 128])
    assert len(found) == 24
    assert [case for case in found if case["torch"] != case["lorafit"]] == []


def test_a_layer_launches_fewer_kernels_than_pefts_own_forward() -> None:
    found = ask_card((9, 0), "launches", [])
    show(found)
    assert sum(found["lorafit"].values()) < sum(found["PEFT"].values())


@pytest.fixture(scope="module")
def waits() -> dict[str, dict[str, Any]]:
    """Of the real loop; where the host waits is the same on every card."""
    return dict(zip(LOOPS, ask_card((9, 0), "loop", list(LOOPS.values())), strict=True))


def test_the_host_waits_twice_a_step(waits: dict[str, dict[str, Any]]) -> None:
    """With fused AdamW, however many micro-batches there are."""
    fused = {name: found for name, found in waits.items() if name.startswith("adamw ")}
    assert len({found["micro-batches"] for found in fused.values()}) > 1
    too_many = {name: found for name, found in fused.items() if sum(found["waits"].values()) > MOST_WAITS}
    assert too_many == {}


def test_waits_of_other_optimizers_are_what_the_plan_says(waits: dict[str, dict[str, Any]]) -> None:
    """Those of bitsandbytes wait at each tensor, those whose state is paged once more; others as AdamW does."""
    from lorafit.kinds.optimizers import optimizers

    for name, found in waits.items():
        kind = optimizers.make(name.split()[0])
        own = found["parameters"] + kind.is_paged if kind.waits_at_each_tensor else 0
        skips = " fp16" in name and not name.startswith("adamw ")  # torch's loss scale asks whether to skip the step
        total = sum(found["waits"].values())
        print(f"{name}: {found['micro-batches']} micro-batches, {found['parameters']} tensors, {total} waits")
        assert total <= MOST_WAITS + own + skips, (name, found)
        assert total >= own, (name, found)
