"""What tasks with a head of their own share: padded texts with a mask, and the states that a head is fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Batch, Reporter
    from lorafit.objective import Objective

_HELD_OUT_EVERY = 10


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


def fit_head(
    states: torch.Tensor,
    right: torch.Tensor,
    chosen_on: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    several: bool,
    reporter: Reporter,
    together: int = 1,
) -> Mapping[str, NDArray[np.float64]]:
    """A logistic regression over standardised states, as `weight` [classes, width] and `bias` [classes] of plain ones.

    Of the strengths that are tried, the one with the least loss on held-out rows; then fitted to all rows with it.

    Args:
        states: Of the training rows, fp64 [rows, width].
        right: 0/1 for each class, [rows, classes].
        chosen_on: The same of held-out rows; every tenth training row where None.
        several: Whether a row may have several classes.
        reporter: Gets a bar.
        together: Neighbours of which none is held out without the others.
    """
    import torch

    from lorafit.ops.logistic_regression import STRENGTHS, Rows, choose_strength, regress

    mean, scale = states.mean(0), states.std(0, correction=0).clamp(min=1e-8)
    rows = Rows((states - mean) / scale, right)
    if chosen_on is not None:
        tried, choosing = rows, Rows((chosen_on[0] - mean) / scale, chosen_on[1])
    else:
        chosen = torch.arange(len(right)) // together % _HELD_OUT_EVERY == 0
        tried, choosing = (Rows(rows.states[flags], rows.classes[flags]) for flags in (~chosen, chosen))
    with reporter.track(len(STRENGTHS) + 1, "base model, its head") as bar:
        best, start = choose_strength(tried, choosing, several=several, advance=bar.advance)
        weight, bias = regress(rows, best, start, several=several)
        bar.advance()
    values = {"weight": weight / scale, "bias": bias - (weight / scale) @ mean, "strength": torch.tensor([best])}
    return {name: value.double().cpu().numpy() for name, value in values.items()}
