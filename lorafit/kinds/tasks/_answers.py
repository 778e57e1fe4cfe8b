"""What tasks share that learn the trained tokens of a row, each of them alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lorafit.contracts import Batch, TaskRow
from lorafit.kinds.registry import S_co
from lorafit.kinds.tasks._next_token import NextTokenTask

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorafit.contracts import Encoded, Example, LossSum
    from lorafit.objective import Objective


def answer_row(encoded: Encoded | None) -> TaskRow | None:
    """A rendered row; None where no token is trained (the first cannot be: nothing stands before it).

    The last stretch of trained tokens is the answer; a first token alone before it asks nothing.
    """
    if encoded is None or not any(encoded.trained[1:]):
        return None
    ids, trained = encoded.input_ids, [False, *encoded.trained[1:]]
    end = len(trained) - trained[::-1].index(True)
    start = next((place for place in range(end, 0, -1) if not trained[place - 1]), 0)
    start = start if start > 1 else 0
    return TaskRow({"tokens": ids, "trained": trained}, len(ids), sum(trained), ids[:start], ids[start:])


class AnswerTask(NextTokenTask[S_co]):
    """The loss is the cross-entropy of the trained tokens; an answer is generated text."""

    final_metrics = ("perplexity", "rouge", "exact_match")

    @property
    def scores(self) -> Mapping[str, int]:
        """Summed loss, its weight, which is the trained tokens, and those whose most likely prediction was right."""
        return {"loss": 1, "weight": 1, "tokens": 1, "correct": 1}

    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open."""
        import torch

        ids = torch.empty((rows, tokens), dtype=torch.int64)
        index, targets = (torch.empty(labels, dtype=torch.int64) for _ in range(2))
        tensors = {"input_ids": ids, "label_index": index, "label_ids": targets}
        tensors |= {"position_ids": torch.empty_like(ids)} if packed else {}
        return Batch(tensors, labels, tuple(range(rows)), ids.numel())

    def collate_whole(self, example: Example, pad_id: int) -> Batch:
        """One row with all of its tokens as labels, of which those that are trained count."""
        import torch

        flags = [int(flag) for flag in example["trained"]]
        whole = replace(example, columns={**example.columns, "trained": [1] * len(flags)})
        batch = self.collate([[whole]], pad_id)
        return replace(batch, tensors={**batch.tensors, "counted": torch.tensor(flags[1:])})

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """Nats summed over the trained tokens."""
        from lorafit.objective.next_token import sum_cross_entropy

        return sum_cross_entropy(objective, batch)

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each row: summed loss, trained tokens, and those whose most likely prediction was right, [rows]."""
        from lorafit.objective.next_token import score_rows

        return score_rows(objective, batch)
