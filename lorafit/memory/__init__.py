"""Shapes + numbers -> MemoryEstimate by component: a closed form, instant, without weights and without torch.

    fixed      base weights · quantisation constants · adapter · gradients · optimizer state
    forward    every layer's kept activations + the worst moment of the last layer
    loss       every layer's kept activations + one chunk of logits
    backward   every layer's kept activations (or layer inputs) + the worst moment of a layer, recomputed or not
    update     the optimizer's temporaries
    peak = fixed + the largest of the four

docs/memory.md derives each term so that a reader can follow it by hand.
"""

from __future__ import annotations

from lorafit.memory.estimate import COMPONENTS, MemoryEstimate, Phase, estimate, fits, labels_of, needed_bytes
from lorafit.memory.exact import ExactEstimate
from lorafit.memory.layer_inputs import Numerics

__all__ = [
    "COMPONENTS",
    "ExactEstimate",
    "MemoryEstimate",
    "Numerics",
    "Phase",
    "estimate",
    "fits",
    "labels_of",
    "needed_bytes",
]
