"""What tasks with a head of their own share: padded texts with a mask, and the states that a head is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Batch
    from lorafit.objective import Objective


def pad_texts(texts: Sequence[Sequence[float]], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, [texts, longest], padded on the right."""
    import numpy as np
    import torch

    ids = np.full((len(texts), max(map(len, texts))), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def head_inputs(batch: Batch) -> dict[str, torch.Tensor | bool]:
    """Arguments of a forward. Causal models read the last token of a row, which they find by the config's pad token."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "return_dict": True}


def mean_states(objective: Objective, batch: Batch) -> torch.Tensor:
    """Mean over a text's tokens of the last states of the model behind the head, [texts, width], fp64."""
    states = objective.base.base_model(**head_inputs(batch)).last_hidden_state.double()
    mask = batch["attention_mask"].unsqueeze(-1).double()
    mean: torch.Tensor = (states * mask).sum(1) / mask.sum(1)
    return mean
