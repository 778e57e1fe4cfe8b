"""Next-token prediction: chats, prompts with completions, and plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from lorafit.kinds.tasks import Task, TaskSection, tasks

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Batch, Encoded, Example, LossSum, Sample
    from lorafit.objective import Objective


class CausalLmSection(TaskSection):
    """Next-token prediction."""

    kind: Literal["causal-lm"] = "causal-lm"


@tasks.register(CausalLmSection)
class CausalLm(Task[CausalLmSection]):
    """The loss is the cross-entropy of the trained tokens; an answer is generated text."""

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> Encoded | None:
        """The rendered row; None where no token is trained (the first cannot be: nothing stands before it)."""
        encoded = render(sample)
        return encoded if encoded is not None and any(encoded.trained[1:]) else None

    def build_objective(
        self, model: torch.nn.Module, *, autocast_dtype: torch.dtype | None = None, exact: bool = False
    ) -> Objective:
        """The module of model and loss; on the exact path where the head is not a plain linear layer."""
        from lorafit.objective.next_token import has_plain_head

        objective = super().build_objective(model, autocast_dtype=autocast_dtype, exact=exact)
        objective.exact = exact or not has_plain_head(objective.base)
        return objective

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """Nats summed over the trained tokens."""
        from lorafit.objective.next_token import sum_cross_entropy

        return sum_cross_entropy(objective, batch)

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each row: summed loss, trained tokens, and those whose most likely prediction was right, [rows]."""
        import numpy as np
        import torch

        from lorafit.objective.next_token import score_labels

        losses, correct = score_labels(objective, batch)
        rows = batch["label_index"] // batch["input_ids"].shape[1]
        values = torch.stack([losses.double(), torch.ones_like(losses).double(), correct.double()]).cpu().numpy()
        owners = rows.cpu().numpy()
        return {
            name: np.bincount(owners, weights, minlength=len(batch.rows)).astype(np.float64)
            for name, weights in zip(("loss", "weight", "correct"), values, strict=True)
        }

    def logits(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """Logits of the trained tokens, [labels, vocabulary]."""
        from lorafit.objective.next_token import labelled_logits

        return labelled_logits(objective, batch)

    def reference_loss(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """The model's own loss from full logits.

        Raises:
            ModelError: The model runs on no text alone, or a token's logits depend on the tokens behind it.
        """
        from lorafit.objective.next_token import own_loss

        return own_loss(objective, batch)

    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """The row up to its last trained token, and of that the last `most_tokens`, at least 2."""
        trained = [place for place, flag in enumerate(example.trained) if flag]
        end = trained[-1] + 1 if trained else len(example.trained)
        kept = slice(max(0, end - max(2, most_tokens)), end)
        return replace(example, input_ids=example.input_ids[kept], trained=example.trained[kept])
