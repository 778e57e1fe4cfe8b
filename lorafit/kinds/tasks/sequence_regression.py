"""Sequence regression: numbers of texts (how good, how alike), by a new head on an encoder or on a causal model.

    loss = mean over the numbers of a row of (predicted - right)^2

The mean over rows, as of transformers' `problem_type: regression`. The head is drawn anew, trained whole, and saved
with the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from lorafit.contracts import Batch, Column, LossSum, ShownSequence, TaskRow
from lorafit.errors import DataError
from lorafit.facts import ModelClass
from lorafit.kinds.fields import listed
from lorafit.kinds.tasks import tasks
from lorafit.kinds.tasks._head_start import Rows, start_head
from lorafit.kinds.tasks._heads import head_inputs, head_logits, read_states
from lorafit.kinds.tasks._texts import TextSection, TextTask

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Encoded, Example, JsonObject, Reporter, Sample
    from lorafit.objective import Objective

_TABLE_COLUMNS = ("file", "line", "text", "text_pair")


class SequenceRegressionSection(TextSection):
    """Numbers of texts."""

    kind: Literal["sequence-regression"] = "sequence-regression"
    """Sequence regression."""
    outputs: list[Annotated[str, Field(min_length=1)]] = Field(default=["score"], min_length=1)
    """Names of the numbers of a row, in the order of the model's outputs."""

    @field_validator("outputs")
    @classmethod
    def _are_columns(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value) or set(value) & set(_TABLE_COLUMNS):
            raise ValueError(f"names are different, and none of {', '.join(_TABLE_COLUMNS)}")
        return value


@tasks.register(SequenceRegressionSection)
class SequenceRegression(TextTask[SequenceRegressionSection]):
    """What is compared of a merge is one number for each label, which no softmax tells apart."""

    fitted_base = (
        "the frozen model with a head trained on the same rows: a ridge regression over the mean of its last states, "
        "its strength chosen on held-out rows"
    )
    row_format = classified_format = "text_score"
    logits_unit = "size"
    during_metrics = ("loss", "pearson")
    final_metrics = ("mse", "mae", "pearson", "spearman")

    @property
    def model_class(self) -> ModelClass:
        """A model with a head of one output a number, which is new."""
        names = self.section.outputs
        outputs = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "regression",
        }
        return ModelClass("AutoModelForSequenceClassification", outputs, has_new_head=True, peft_task="SEQ_CLS")

    @property
    def columns(self) -> tuple[Column, ...]:
        """The text, and its numbers."""
        return (*self.text_columns, Column("numbers", "<f8", width=len(self.section.outputs)))

    @property
    def scores(self) -> Mapping[str, int]:
        """The loss, its weight (1 a row), errors, and predicted and right numbers."""
        count, means = len(self.section.outputs), ("loss", "weight", "squared_error", "absolute_error")
        return {**dict.fromkeys(means, 1), "predicted_numbers": count, "right_numbers": count}

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """The text and its numbers.

        Raises:
            DataError: The row has no number, or another number of them than there are outputs.
        """
        import numpy as np

        wanted = len(self.section.outputs)
        if sample.numbers is None or sample.text is None:
            todo = "map them with columns: {text: .., score: ..}"
            raise DataError("has no text with a number", key="score", todo=todo)
        if len(sample.numbers) != wanted:
            what = f"has {len(sample.numbers)} numbers for {wanted} outputs, {listed(self.section.outputs)}"
            raise DataError(what, key="score", todo="give it one for each, or name them in task.outputs")
        bits = np.array(sample.numbers, dtype="<f8").view("<i4").tolist()
        return self.text_row(sample, render, {"numbers": sample.numbers}, bits)

    def ask(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """The text, whose numbers are not known yet."""
        return self.text_row(sample, render, {"numbers": [0.0] * len(self.section.outputs)}, ())

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """Padded texts with a mask, and the right number of each label, fp32 [rows * outputs]."""
        import numpy as np
        import torch

        examples = [example for (example,) in rows]
        right = np.array([example["numbers"] for example in examples], dtype=np.float32).reshape(-1)
        return self.text_batch(examples, pad_id, {"label_ids": torch.from_numpy(right)})

    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open."""
        import torch

        ids = torch.empty((rows, tokens), dtype=torch.int64)
        right = torch.empty(rows * len(self.section.outputs))
        tensors = {"input_ids": ids, "attention_mask": torch.empty_like(ids), "label_ids": right}
        return Batch(tensors, rows, tuple(range(rows)), ids.numel())

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """The text, and its numbers."""
        return self.show_text(example, self._tell([float(number) for number in example["numbers"]]))

    def logits(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """The predicted number of each label, fp32 [rows * outputs, 1]."""
        return head_logits(objective, batch).reshape(-1, 1)

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """Squared errors, a mean over the numbers of a row, summed over rows."""
        errors = self.logits(objective, batch)[:, 0] - batch["label_ids"]
        return LossSum(errors.square().sum() / len(self.section.outputs), batch.weight)

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each row: its loss, 1, its errors, and predicted and right numbers."""
        return self._score(self.logits(objective, batch)[:, 0].double(), batch)

    def label(self, objective: Objective, batch: Batch) -> list[JsonObject]:
        """The numbers of each row."""
        rows = self.logits(objective, batch).double().view(len(batch.rows), -1).tolist()
        return [{"values": dict(zip(self.section.outputs, row, strict=True))} for row in rows]

    def predict(self, sums: Mapping[str, tuple[float, ...]]) -> str | None:
        """The numbers that the model gives the row."""
        return self._tell(sums["predicted_numbers"])

    def reference_loss(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """The model's own loss, which is a mean over rows and numbers."""
        labels = batch["label_ids"].view(len(batch.rows), -1)
        loss: torch.Tensor = objective.model(**head_inputs(batch), labels=labels).loss.double()
        return loss * len(batch.rows)

    def fit_base(
        self, objective: Objective, train: Iterable[Batch], held_out: Iterable[Batch] | None, reporter: Reporter
    ) -> Mapping[str, NDArray[np.float64]]:
        """A ridge regression over those states: `weight` [outputs, width] and `bias`."""
        from lorafit.ops.ridge_regression import fit_ridge

        chosen_on = None if held_out is None else read_states(self, objective, held_out)
        return fit_ridge(*read_states(self, objective, train), chosen_on)

    def start_head(
        self, objective: Objective, train: Iterable[Batch], held_out: Iterable[Batch] | None, reporter: Reporter
    ) -> None:
        """With the ridge regression over what the head reads."""
        from lorafit.ops.ridge_regression import fit_ridge

        def fit(rows: Rows, chosen_on: Rows | None) -> Mapping[str, NDArray[np.float64]]:
            return fit_ridge(*rows, chosen_on)

        start_head(objective, len(self.section.outputs), self.right_labels, train, held_out, fit)

    def right_labels(self, batch: Batch) -> torch.Tensor:
        """The right numbers of each row."""
        return batch["label_ids"].view(len(batch.rows), -1)

    def score_base(
        self, objective: Objective, batch: Batch, fitted: Mapping[str, NDArray[np.float64]]
    ) -> Mapping[str, NDArray[np.float64]]:
        """What `score` gives, of that regression."""
        import torch

        states = self.states(objective, batch)
        weight, bias = (torch.from_numpy(fitted[name]).to(states.device) for name in ("weight", "bias"))
        return self._score((states @ weight.T + bias).reshape(-1), batch)

    def _score(self, predicted: torch.Tensor, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        import numpy as np

        rows = len(batch.rows)
        values, right = (each.double().view(rows, -1).cpu().numpy() for each in (predicted, batch["label_ids"]))
        errors = values - right
        squared = np.square(errors).mean(-1)
        found = {"loss": squared, "squared_error": squared, "absolute_error": np.abs(errors).mean(-1)}
        return {**found, "predicted_numbers": values, "right_numbers": right, "weight": np.ones(rows)}

    def _tell(self, numbers: Sequence[float]) -> str:
        if len(numbers) == 1:
            return f"{numbers[0]:.6g}"
        return ", ".join(f"{name} {number:.6g}" for name, number in zip(self.section.outputs, numbers, strict=True))
