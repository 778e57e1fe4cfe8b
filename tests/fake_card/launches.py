"""Kernels that a layer launches on the pretended card, PEFT's own forward against lorafit's layers.

    .venv-cuda/bin/python -m tests.fake_card.launches

Llama-3.1-8B in NF4, r 16, checkpointed, forward and backward of a micro-batch; what a third layer adds to two. Each
operation that torch runs on the card counts once, views and allocations left out. Kernels of Triton's cannot run on
tensors without values: `benchmarks/` counts Liger's from its source.
"""

from __future__ import annotations

from typing import Any

from tests.fake_card.card import ask_card
from tests.fake_card.cases import RECIPE
from tests.fake_card.step import CardStep, Path

PHASES = ("forward", "backward")


def answer(question: list[str]) -> dict[str, dict[str, int]]:
    """For PEFT's forward and lorafit's the launches of a layer by phase; the question holds overrides of the recipe."""
    return {"PEFT": _count(question, fuses=False), "lorafit": _count(question, fuses=True)}


def _count(overrides: list[str], *, fuses: bool) -> dict[str, int]:
    seen = []
    for layers in (2, 3):
        step = CardStep(Path(RECIPE), overrides, model=None, layers=layers, row_tokens=512, fuses=fuses)
        seen.append(step.run(rows=2, checkpointing=True).operations)
    return {phase: seen[1][phase].total() - seen[0][phase].total() for phase in PHASES}


def show(found: Any) -> None:
    """A table."""
    print(f"{'a layer launches':20}{'forward':>10}{'backward':>10}{'together':>10}")
    for name, counts in found.items():
        print(f"{name:20}{counts['forward']:10}{counts['backward']:10}{sum(counts.values()):10}")


if __name__ == "__main__":
    show(ask_card((9, 0), "launches", []))
