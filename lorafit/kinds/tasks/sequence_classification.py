"""Sequence classification: texts into classes, by a new head on an encoder or on a causal model.

    one label a row      softmax over the classes, cross-entropy
    labels: several      a sigmoid a class, binary cross-entropy summed over the classes

The head is drawn anew, trained whole, and saved with the adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lorafit.console.nearest import did_you_mean
from lorafit.console.wording import counted
from lorafit.contracts import Batch, Column, LossSum, ReportTable, ShownSequence, TaskRow
from lorafit.errors import DataError
from lorafit.facts import ModelClass
from lorafit.kinds.fields import listed
from lorafit.kinds.tasks import tasks
from lorafit.kinds.tasks._class_tables import by_class, confusion, reliability
from lorafit.kinds.tasks._head_start import Rows, start_head
from lorafit.kinds.tasks._heads import (
    LabellingTask,
    LabelsSection,
    fit_head,
    head_inputs,
    head_logits,
    order_labels,
    warn_of_absent,
)
from lorafit.kinds.tasks._texts import TextSection, TextTask
from lorafit.kinds.tasks._thresholds import DEFAULT_THRESHOLD, choose_thresholds

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Encoded, Example, JsonObject, Reporter, Sample
    from lorafit.objective import Objective
    from lorafit.ops.logits_distance import LogitsUnit


_Rows = Sequence[Mapping[str, tuple[float, ...]]]


class SequenceClassificationSection(LabelsSection, TextSection):
    """Texts into classes."""

    kind: Literal["sequence-classification"] = "sequence-classification"
    """Sequence classification."""
    multi_label: bool = False
    """Whether a row may belong to several classes, or to none; else to exactly one."""
    class_weights: Literal["none", "balanced"] | list[Annotated[float, Field(gt=0.0)]] = Field(default="none")
    """What the loss of a row counts while training, by its class, in the order of `labels`. `balanced`: rows / (classes
    x rows of the class), so that all classes count alike and the mean row 1; with `multi_label` what a yes counts:
    rows without / rows with. Held-out losses are plain."""

    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] | Literal["f1", "f1_each"] = Field(default=0.5)
    """With `multi_label`: a class is given above this probability. `f1`: one for all classes, with the best micro-F1 on
    the validation rows; `f1_each`: each class its own, with its best F1 there, 0.5 where no such row has it. Chosen at
    each evaluation, and kept with the adapter."""
    thresholds: list[Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(default=[])
    """Of each class, in the order of `labels`; empty: `threshold` for all. What is chosen stands here."""

    @model_validator(mode="after")
    def _has_thresholds_for_several_labels(self) -> Self:
        if not self.multi_label and (self.threshold != DEFAULT_THRESHOLD or self.thresholds):
            option = "thresholds" if self.thresholds else "threshold"
            raise ValueError(f"{option} is for rows of several labels; set multi_label: true, or leave it out")
        if self.thresholds and len(self.thresholds) != len(self.labels):
            raise ValueError(self._say_count("thresholds", len(self.thresholds)))
        return self

    @model_validator(mode="after")
    def _weigh_each(self) -> Self:
        if isinstance(self.class_weights, list) and len(self.class_weights) != len(self.labels):
            raise ValueError(self._say_count("class_weights", len(self.class_weights)))
        return self

    def _say_count(self, option: str, count: int) -> str:
        """That an option with a value for each class has another number of them."""
        if not self.labels:
            return f"{option} gives classes values in the order of task.labels, which is not set; name them there"
        many = f"{counted(count, 'value')} for {len(self.labels)} classes that are named"
        return f"{option} has {many}; name the classes in labels, and give each of them one"


@tasks.register(SequenceClassificationSection)
class SequenceClassification(TextTask[SequenceClassificationSection], LabellingTask[SequenceClassificationSection]):
    """The loss is the cross-entropy of a row's class, or of each class where a row may have several."""

    fitted_base = (
        "the frozen model with a head trained on the same rows: a logistic regression over the mean of its last "
        "states, its strength chosen on held-out rows"
    )
    row_format = classified_format = "text_label"
    during_metrics = ("loss", "accuracy")
    final_metrics = ("accuracy", "macro_f1", "loss")

    def settle(self, samples: Iterable[Sample]) -> SequenceClassification:
        """The task with the labels of its training rows, numbers in their order, where the recipe names none; and with
        what balances its classes, where it asks for that.

        Raises:
            DataError: There are fewer than two.
        """
        section = self.section
        if section.labels and section.class_weights != "balanced":
            return self
        rows, rows_of = 0, Counter[str]()
        for sample in samples:
            rows += 1
            rows_of.update(sample.labels or ())
        names = section.labels or order_labels(rows_of, "label")
        settled: dict[str, Any] = {"labels": names}
        if section.class_weights == "balanced":
            settled["class_weights"] = [
                _balance(rows_of[name], rows, len(names), section.multi_label) for name in names
            ]
        return SequenceClassification(section.model_copy(update=settled))

    @property
    def model_class(self) -> ModelClass:
        """A model with a head of one output a class, which is new."""
        kind = "multi_label_classification" if self.section.multi_label else "single_label_classification"
        outputs = {**self.outputs, "problem_type": kind}
        return ModelClass("AutoModelForSequenceClassification", outputs, has_new_head=True, peft_task="SEQ_CLS")

    @property
    def columns(self) -> tuple[Column, ...]:
        """The text, and 0/1 for each class."""
        return (*self.text_columns, Column("classes", "|u1", width=len(self.labels)))

    @property
    def logits_unit(self) -> LogitsUnit:
        """Of several labels each has two: no and yes."""
        return "size" if self.section.multi_label else super().logits_unit

    @property
    def scores(self) -> Mapping[str, int]:
        """The loss, its weight (1 a row), the row's classes, those that the model gives it, and how likely that one is,
        or each of several."""
        count = len(self.labels)
        likely = {"shares": count} if self.section.multi_label else {"confidence": 1}
        return {"loss": 1, "weight": 1, "classes": count, "predicted": count, **likely}

    @property
    def chosen_options(self) -> tuple[str, ...]:
        return ("threshold",) if isinstance(self.section.threshold, str) else ()

    @property
    def thresholds(self) -> list[float]:
        """Above which probability each class is given; 0.5 where nothing has been chosen yet."""
        threshold = self.section.threshold
        usual = DEFAULT_THRESHOLD if isinstance(threshold, str) else threshold
        return self.section.thresholds or [usual] * len(self.labels)

    def _with_thresholds(self, chosen: list[float]) -> SequenceClassification:
        return SequenceClassification(self.section.model_copy(update={"thresholds": chosen}))

    def choose(self, rows: _Rows) -> tuple[SequenceClassification, _Rows]:
        """The task with the thresholds that it is asked to choose, and the classes that are given by them."""
        import numpy as np

        if not isinstance(self.section.threshold, str):
            return self, rows
        shares, classes = (np.array([row[name] for row in rows]) for name in ("shares", "classes"))
        chosen = choose_thresholds(shares, classes, each=self.section.threshold == "f1_each")
        given = (shares > np.array(chosen)).astype(float).tolist()
        decided = [{**row, "predicted": tuple(flags)} for row, flags in zip(rows, given, strict=True)]
        return self._with_thresholds(chosen), decided

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """The text and its classes.

        Raises:
            DataError: The row has no label, one that is not known, or another number of them than it may.
        """
        if sample.labels is None or sample.text is None:
            raise DataError(
                "has no text with a label", key="label", todo="map them with columns: {text: .., label: ..}"
            )
        known = {name: number for number, name in enumerate(self.labels)}
        for name in sample.labels:
            if name not in known:
                todo = f"{did_you_mean(name, known)}correct it, or name all classes in task.labels as the rows do"
                raise DataError(f"label '{name}' is none of {listed(self.labels)}", key="label", todo=todo)
        if not self.section.multi_label and len(sample.labels) != 1:
            what = f"has {len(sample.labels)} labels, and belongs to one class"
            raise DataError(what, key="label", todo="give it one, or set task.multi_label: true")
        return self._row(sample, render, [known[name] for name in sample.labels])

    def ask(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """The text, of no class yet."""
        return self._row(sample, render, [])

    def _row(
        self, sample: Sample, render: Callable[[Sample], Encoded | None], classes: Sequence[int]
    ) -> TaskRow | None:
        flags = [int(number in classes) for number in range(len(self.labels))]
        return self.text_row(sample, render, {"classes": flags}, classes)

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """Padded texts with a mask, and what is right: each row's class, or a 0 or 1 for each class of each row."""
        import numpy as np
        import torch

        examples = [example for (example,) in rows]
        flags = np.array([example["classes"] for example in examples], dtype=np.int64)
        right = flags.reshape(-1) if self.section.multi_label else flags.argmax(axis=-1)
        return self.text_batch(examples, pad_id, {"label_ids": torch.from_numpy(right)})

    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open."""
        import torch

        ids = torch.empty((rows, tokens), dtype=torch.int64)
        right = torch.empty(rows * (len(self.labels) if self.section.multi_label else 1), dtype=torch.int64)
        tensors = {"input_ids": ids, "attention_mask": torch.empty_like(ids), "label_ids": right}
        return Batch(tensors, rows, tuple(range(rows)), ids.numel())

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """The text, and its label."""
        return self.show_text(example, self._name(example["classes"]))

    @property
    def class_weights(self) -> Mapping[str, float]:
        """By class; of several labels what a yes counts."""
        weights = self.section.class_weights
        return {} if isinstance(weights, str) else dict(zip(self.labels, weights, strict=True))

    def count_classes(self, read: Callable[[str], Iterator[NDArray[Any]]]) -> Mapping[str, int]:
        """Rows of each class, in the order of the model's outputs."""
        counts = sum((part.sum(axis=0, dtype=int) for part in read("classes")), start=[0] * len(self.labels))
        return dict(zip(self.labels, map(int, counts), strict=True))

    def check_classes(self, rows_of: Mapping[str, int], rows: int) -> list[str]:
        """Classes that no training row has.

        Raises:
            DataError: All rows have the same classes.
        """
        absent = [name for name, count in rows_of.items() if not count]
        if len(absent) + sum(count == rows for count in rows_of.values()) == len(rows_of):
            shared = ", ".join(name for name in rows_of if name not in absent) or "none of them"
            what = f"all {counted(rows, 'training row')} have one label, {shared}: there is nothing to tell apart"
            raise DataError(what, key="data.train", todo="add rows of other classes")
        return warn_of_absent(absent, "class", "classes")

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """Nats summed over the rows, by the weights of their classes."""
        import torch
        from torch.nn import functional

        logits, right = self.logits(objective, batch), batch["label_ids"]
        if isinstance(self.section.class_weights, str):
            return LossSum(functional.cross_entropy(logits, right, reduction="sum"), batch.weight)
        by_class = torch.tensor(self.section.class_weights, device=logits.device)
        weights = by_class[right] if not self.section.multi_label else by_class.repeat(len(batch.rows)) ** right
        return LossSum((functional.cross_entropy(logits, right, reduction="none") * weights).sum(), batch.weight)

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each row: its loss, 1, its classes, and those that the model gives it."""
        return self._score(self.logits(objective, batch), batch)

    def decide_base(self, outputs: torch.Tensor, right: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The base's own thresholds, where they are chosen."""
        import torch

        if not isinstance(self.section.threshold, str):
            return {}
        each = self.section.threshold == "f1_each"
        return {"thresholds": torch.tensor(choose_thresholds(outputs.sigmoid().numpy(), right.numpy(), each=each))}

    def settle_base(self, fitted: Mapping[str, NDArray[np.float64]]) -> SequenceClassification:
        """With the base's own thresholds, where they are chosen."""
        return self._with_thresholds(fitted["thresholds"].tolist()) if "thresholds" in fitted else self

    def start_head(
        self, objective: Objective, train: Iterable[Batch], held_out: Iterable[Batch] | None, reporter: Reporter
    ) -> None:
        """With the logistic regression over what the head reads."""

        def fit(rows: Rows, chosen_on: Rows | None) -> Mapping[str, NDArray[np.float64]]:
            return fit_head(*rows, chosen_on, several=self.section.multi_label, reporter=reporter)

        start_head(objective, len(self.labels), self.right_labels, train, held_out, fit)

    def right_labels(self, batch: Batch) -> torch.Tensor:
        """Of each row."""
        return self._flags(batch["label_ids"], len(batch.rows))

    def score_outputs(self, outputs: torch.Tensor, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """What `score` gives."""
        return self._score(self._as_labels(outputs), batch)

    def tables(self, rows: Sequence[Mapping[str, tuple[float, ...]]]) -> tuple[ReportTable, ...]:
        """Each class; of rows with one label also which are given for which, and how often what is likely is right."""
        if self.section.multi_label:
            return (by_class(self.labels, rows, self.thresholds),)
        return (by_class(self.labels, rows), confusion(self.labels, rows), reliability(rows))

    def label(self, objective: Objective, batch: Batch) -> list[JsonObject]:
        """The classes of each row, and the probability of every class."""
        import numpy as np

        shares = self.logits(objective, batch).double().softmax(-1).cpu().numpy()
        if self.section.multi_label:
            shares = shares[:, 1].reshape(len(batch.rows), -1)
            flags = shares > np.array(self.thresholds)
        else:
            flags = shares.argmax(-1, keepdims=True) == np.arange(len(self.labels))
        return [
            {
                "labels": [name for name, flag in zip(self.labels, row_flags, strict=True) if flag],
                "probabilities": dict(zip(self.labels, row.tolist(), strict=True)),
            }
            for row, row_flags in zip(shares, flags, strict=True)
        ]

    def predict(self, sums: Mapping[str, tuple[float, ...]]) -> str | None:
        """The names of the classes that the model gives the row."""
        return self._name(sums["predicted"])

    def reference_loss(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """The model's own loss, which is a mean over rows, or over rows and classes."""
        right = batch["label_ids"]
        labels = right.view(len(batch.rows), -1).float() if self.section.multi_label else right
        loss: torch.Tensor = objective.model(**head_inputs(batch), labels=labels).loss.double()
        return loss * labels.numel()

    def logits(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """[rows, classes]; of several labels no and yes for each class of each row, [rows * classes, 2]; fp32."""
        return self._as_labels(head_logits(objective, batch))

    def _as_labels(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of each class [rows, classes] as the logits of the labels."""
        import torch

        if not self.section.multi_label:
            return logits
        yes = logits.reshape(-1)
        return torch.stack([torch.zeros_like(yes), yes], dim=-1)

    def _flags(self, labels: torch.Tensor, rows: int) -> torch.Tensor:
        """0/1 for each class [rows, classes], from `label_ids` or what was chosen in their place."""
        from torch.nn import functional

        return labels.view(rows, -1) if self.section.multi_label else functional.one_hot(labels, len(self.labels))

    def _score(self, logits: torch.Tensor, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """What `score` gives, of logits."""
        import numpy as np
        import torch
        from torch.nn import functional

        rows, right = len(batch.rows), batch["label_ids"]
        losses = functional.cross_entropy(logits, right, reduction="none").view(rows, -1).sum(-1)
        found = {"loss": losses, "classes": self._flags(right, rows)}
        if self.section.multi_label:
            yes = (logits[:, 1] - logits[:, 0]).double().view(rows, -1)
            limits = torch.tensor(self.thresholds, dtype=torch.float64, device=yes.device).logit()
            found |= {"shares": yes.sigmoid(), "predicted": yes > limits}
        else:
            confidence = logits.double().softmax(-1).amax(-1)
            found |= {"confidence": confidence, "predicted": self._flags(logits.argmax(-1), rows)}
        arrays = {name: values.double().cpu().numpy() for name, values in found.items()}
        return {**arrays, "weight": np.ones(rows)}

    def _name(self, flags: Sequence[float]) -> str:
        names = [name for name, flag in zip(self.labels, flags, strict=True) if flag]
        return ", ".join(names) or "none of them"


def _balance(with_it: int, rows: int, classes: int, several: bool) -> float:
    """What a row of a class counts, see `SequenceClassificationSection`; 1 of a class that no row has."""
    if not with_it:
        return 1.0
    return max(1, rows - with_it) / with_it if several else rows / (classes * with_it)
