"""Which decoder layers run forward again in the backward pass, instead of keeping what their forward pass made.

layer    0 1 2 3 4 5        half: every second one. The last keeps its own: its backward pass comes first, while the
off      . . . . . .        most is kept, and would be recomputed beside all that
half     x . x . x .
on       x x x x x x
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Checkpointing = bool | Literal["half"]
CHECKPOINTING: Mapping[Checkpointing, str] = {False: "off", "half": "half", True: "on"}
"""Its values and what people read, the fastest first; each holds less than the one before."""


def recomputed_layers(checkpointing: Checkpointing, layers: int) -> range:
    """Numbers of those that are recomputed, of so many layers."""
    return range(layers % 2, layers - 1, 2) if checkpointing == "half" else range(layers if checkpointing else 0)


def more_than(checkpointing: Checkpointing) -> list[Checkpointing]:
    """What recomputes more layers, the fewest first."""
    values = list(CHECKPOINTING)
    return values[values.index(checkpointing) + 1 :]
