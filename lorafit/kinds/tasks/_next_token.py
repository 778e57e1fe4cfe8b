"""What tasks on the next tokens of a causal model share, whatever they make of the tokens' losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.kinds.registry import S_co
from lorafit.kinds.tasks import Task

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Batch
    from lorafit.objective import Objective


class NextTokenTask(Task[S_co]):
    """A task whose labels are tokens: its logits are those of the vocabulary, and its models write answers."""

    writes_answers = True

    def build_objective(
        self, model: torch.nn.Module, *, autocast_dtype: torch.dtype | None = None, exact: bool = False
    ) -> Objective:
        """The module of model and loss; on the exact path where the fast one would compute something else."""
        from lorafit.objective.next_token import has_fast_path

        objective = super().build_objective(model, autocast_dtype=autocast_dtype, exact=exact)
        objective.exact = exact or not has_fast_path(model)
        return objective

    def logits(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """Logits of the labelled tokens, [labels, vocabulary]."""
        from lorafit.objective.next_token import labelled_logits

        return labelled_logits(objective, batch)

    def reference_loss(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """The model's own cross-entropy of the labelled tokens, from full logits.

        Raises:
            ModelError: The model runs on no text alone, or a token's logits depend on the tokens behind it.
        """
        from lorafit.objective.next_token import own_loss

        return own_loss(objective, batch)
