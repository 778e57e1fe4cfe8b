"""How far apart two sets of logits are, and how far rounding alone may take them."""

from __future__ import annotations

from typing import Literal

import torch

LogitsUnit = Literal["spread", "size"]
ROUNDING = {None: 1e-3, torch.float16: 0.15, torch.bfloat16: 0.15}
"""Most that rounding explains, by what a forward computes in (None: fp32): another kernel or another shape of the same
micro-batch. SmolLM2-135M in NF4 and bf16: 0.04 to 0.07. What sees other tokens is nearer to 1."""


def logits_distance(ours: torch.Tensor, theirs: torch.Tensor, unit: LogitsUnit = "spread") -> float:
    """Root mean square of the difference, in units of the logits' own spread over the vocabulary, or of their size.

    Not the largest difference: where a mixture's router stands between two experts, rounding moves one token far.

    Args:
        ours: [labels, vocabulary].
        theirs: The same.
        unit: `Task.logits_unit`.
    """
    ours, theirs = ours.double(), theirs.double()
    counted = ours if unit == "size" else ours - ours.mean(-1, keepdim=True)
    return float(((ours - theirs).square().mean() / counted.square().mean()).sqrt())
