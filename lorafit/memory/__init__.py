"""Shapes + numbers -> MemoryEstimate by component.

    fixed      base weights · quantisation constants · adapter · gradients · optimizer state
    forward    every layer's kept activations + the worst moment of the last layer
    loss       every layer's kept activations + one chunk of logits
    backward   every layer's kept activations (or layer inputs) + the worst moment of a layer, recomputed or not
    update     the optimizer's temporaries
    start      the adapter's first values, in place of gradients and the optimizer's state; told where it is the largest
    peak = fixed + the largest of them

`closed_form` has formulas for LoRA's step and needs neither weights nor torch; docs/memory.md derives each term so that
one can follow it by hand. What it does not cover is measured (`lorafit.estimation.measured`), to the same answer.
"""

from __future__ import annotations

from lorafit.memory.closed_form import closed_form, covers
from lorafit.memory.peak import COMPONENTS, MemoryEstimate, Phase, fits
from lorafit.memory.step_memory import Engine, StepMemory, find_largest, with_start
from lorafit.memory.step_shape import StepShape

__all__ = [
    "COMPONENTS",
    "Engine",
    "MemoryEstimate",
    "Phase",
    "StepMemory",
    "StepShape",
    "closed_form",
    "covers",
    "find_largest",
    "fits",
    "with_start",
]
