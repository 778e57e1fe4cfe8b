"""Proof before step 1 that the loss which would be trained is the model's own, on one small batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorafit.errors import NumericsError
from lorafit.ops.isolation import in_mode

if TYPE_CHECKING:
    from lorafit.contracts import Batch, Reporter
    from lorafit.objective import Objective

_TOLERANCE = {None: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # relative; logits are rounded to the dtype


def prove_objective(objective: Objective, batch: Batch, reporter: Reporter) -> None:
    """Compares the objective with the model's own loss, on one small batch (on the model's device).

    Where the fast path differs (soft-caps, logit scales, unusual heads) the objective goes over to the exact one, and
    says so. Modes and random numbers are left as they were.

    Raises:
        ModelError: The model cannot run on such a batch, or is none for this task.
        NumericsError: The exact path differs too, or the model's own loss is not finite.
    """
    with in_mode(objective, training=False):
        own = float(objective.reference_loss(batch))
        if not torch.isfinite(torch.tensor(own)):
            raise NumericsError(
                f"the model's own loss on one row is {own}",
                todo="check the base model's weights, or use another model.dtype",
            )
        tolerance = _TOLERANCE[objective.autocast_dtype] * max(abs(own), 1.0)
        ours = float(objective.score(batch)["loss"].sum())
        if abs(ours - own) > tolerance and not objective.exact:
            reporter.warn(
                f"the chunked loss ({ours:.6g}) is not this model's own ({own:.6g}): something stands behind its "
                "head; going on with the exact path, which is slower"
            )
            objective.exact = True
            ours = float(objective.score(batch)["loss"].sum())
        if abs(ours - own) > tolerance or ours != ours:
            raise NumericsError(
                f"the loss that would be trained ({ours:.6g}) is not the model's own ({own:.6g})",
                todo="this architecture is not supported; please report it",
            )
