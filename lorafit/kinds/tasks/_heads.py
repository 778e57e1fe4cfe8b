"""What tasks with a head of their own share: padded texts, named labels, and what the base is scored with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Protocol, TypeVar

from pydantic import Field, field_validator

from lorafit.console.wording import agreed, list_names
from lorafit.contracts import JsonObject
from lorafit.errors import DataError
from lorafit.kinds.tasks import WRITES_NONE, Task, TaskSection

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Batch, Reporter
    from lorafit.objective import Objective
    from lorafit.ops.logits_distance import LogitsUnit

_OUTSIDE = "O"  # of words that belong to no entity
_NO_CHATS = "reads what is labelled, which goes through no chat template"
NO_TOKENS: Mapping[str, str] = {
    **Task.unread,
    "data.chat_template": _NO_CHATS,
    "data.system_prompt": _NO_CHATS,
    "data.dropped_fields": _NO_CHATS,
    "data.train_on": "learns labels, and predicts no token",
    **WRITES_NONE,
}
"""Options that say nothing where no token is learnt and none is written."""
_HELD_OUT_EVERY = 10


class LabelsSection(TaskSection):
    """What the section of every task has that names labels."""

    labels: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Names of the labels, in the order of the model's outputs; empty: those of the training rows, sorted."""

    @field_validator("labels")
    @classmethod
    def _are_different(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a label is named twice")
        if len(value) == 1:
            raise ValueError("one label alone is nothing to tell apart; name two at least")
        return value


L_co = TypeVar("L_co", bound=LabelsSection, covariant=True)


class LabellingTask(Task[L_co]):
    """A task whose model has an output a label; its base is scored with a logistic regression over frozen states."""

    unread: ClassVar[Mapping[str, str]] = NO_TOKENS

    @property
    def labels(self) -> list[str]:
        """Names of the labels; two without names where neither recipe nor rows have said."""
        return self.section.labels or ["0", "1"]

    @property
    def logits_unit(self) -> LogitsUnit:
        """Two labels may be nearly as likely."""
        return "size" if len(self.labels) <= 2 else "spread"

    @property
    def outputs(self) -> JsonObject:
        """What the model's config gets of them."""
        names = self.labels
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }

    @abstractmethod
    def states(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """The frozen states that a head is fitted to, fp64 [labelled, width]."""

    @abstractmethod
    def right_labels(self, batch: Batch) -> torch.Tensor:
        """0/1 for each label, [labelled, labels]."""

    @abstractmethod
    def score_outputs(self, outputs: torch.Tensor, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """What `score` gives, of a number for each label, [labelled, labels]."""

    def fit_base(
        self, objective: Objective, train: Iterable[Batch], held_out: Iterable[Batch] | None, reporter: Reporter
    ) -> Mapping[str, NDArray[np.float64]]:
        """A logistic regression over those states: `weight` [labels, width] and `bias`."""
        import torch

        chosen_on = None if held_out is None else read_states(self, objective, held_out)
        several = getattr(self.section, "multi_label", False)
        fitted = fit_head(*read_states(self, objective, train), chosen_on, several=several, reporter=reporter)
        if chosen_on is None:
            return fitted
        states, right = chosen_on
        weight, bias = (torch.from_numpy(fitted[name]).to(states.device) for name in ("weight", "bias"))
        decided = self.decide_base((states @ weight.T + bias).cpu(), right.cpu())
        return {**fitted, **{name: values.double().numpy() for name, values in decided.items()}}

    def decide_base(self, outputs: torch.Tensor, right: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What held-out rows decide beside the strength, from the regression's outputs and what is right."""
        return {}

    def score_base(
        self, objective: Objective, batch: Batch, fitted: Mapping[str, NDArray[np.float64]]
    ) -> Mapping[str, NDArray[np.float64]]:
        """What `score` gives, of that regression."""
        import torch

        states = self.states(objective, batch)
        weight, bias = (torch.from_numpy(fitted[name]).to(states.device) for name in ("weight", "bias"))
        return self.score_outputs(states @ weight.T + bias, batch)


def order_labels(found: Iterable[str], key: str) -> list[str]:
    """Labels of training rows in the order of the model's outputs: numbers by value, then `O`, then names.

    Args:
        found: May repeat.
        key: The column that they come from.

    Raises:
        DataError: There are fewer than two.
    """
    names = set(found)
    if len(names) < 2:
        what = f"the training rows have {len(names)} labels; two at least can be told apart"
        raise DataError(what, key=key, todo="add rows with other labels, or set task.labels")
    return sorted(names, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, name != _OUTSIDE, name))


def warn_of_absent(absent: Sequence[str], one: str, many: str) -> list[str]:
    """A sentence where no training row has some of what the task names: `one` of them is a class, or a label."""
    if not absent:
        return []
    named = f"{agreed(len(absent), one, many)} {list_names(absent)}"
    return [f"no training row has {named}; add such rows, or leave {agreed(len(absent), 'it', 'them')} out"]


class ReadsStates(Protocol):
    """A task whose base gets a head that is fitted to frozen states."""

    def states(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """Those states, fp64 [labelled, width]."""

    def right_labels(self, batch: Batch) -> torch.Tensor:
        """What the head is to give of them, [labelled, outputs]."""


def read_states(task: ReadsStates, objective: Objective, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of all batches, and what a head is to give of them, both fp64."""
    import torch

    states, right = [], []
    for batch in batches:
        with objective.autocast(batch):
            states.append(task.states(objective, batch))
        right.append(task.right_labels(batch))
    return torch.cat(states), torch.cat(right).double()


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
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch.tensors]
    return {**{name: batch[name] for name in names}, "return_dict": True}


def head_logits(objective: Objective, batch: Batch) -> torch.Tensor:
    """What the head gives, fp32: [texts, outputs], or of each token [texts, tokens, outputs]."""
    import torch

    from lorafit.ops.virtual_tokens import placed_vectors

    inputs = head_inputs(batch)
    with placed_vectors(objective.model) as (model, count):
        for name, values in batch.tensors.items() if count else ():
            if name in inputs:  # a row's first token stands for each vector: it is real, and of the first text
                inputs[name] = torch.cat([values[:, :1].expand(-1, count), values], dim=1)
        logits: torch.Tensor = model(**inputs).logits.float()
    return logits[:, count:] if logits.ndim > 2 else logits


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
