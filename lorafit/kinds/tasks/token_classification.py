"""Token classification: a label for each word of a text, such as the names in it, by a new head on a model.

    words     Ada    Lovelace   wrote   it          a word's label is learnt at its first token, where the head
    tokens    Ada    Love ##lace wrote  it          tells the classes apart; the other tokens carry no loss
    labels    B-PER  I-PER  -    O      O

The loss is the mean over labelled words. The head is drawn anew, trained whole, and saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import eq
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from lorafit.console.nearest import did_you_mean
from lorafit.contracts import Batch, Column, LossSum, ReportTable, ShownSequence, TaskRow
from lorafit.errors import DataError
from lorafit.facts import ModelClass
from lorafit.kinds.fields import listed
from lorafit.kinds.tasks import tasks
from lorafit.kinds.tasks._class_tables import share
from lorafit.kinds.tasks._heads import (
    LabellingTask,
    LabelsSection,
    head_inputs,
    head_logits,
    order_labels,
    pad_texts,
    warn_of_absent,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Encoded, Example, JsonObject, Sample
    from lorafit.objective import Objective

_OUTSIDE = "O"
_UNLABELLED = -1


class TokenClassificationSection(LabelsSection):
    """A label for each word; rows may number them as `labels` does."""

    kind: Literal["token-classification"] = "token-classification"
    """Token classification."""


@tasks.register(TokenClassificationSection)
class TokenClassification(LabellingTask[TokenClassificationSection]):
    """A row weighs as much as it has labelled words."""

    fitted_base = (
        "the frozen model with a head trained on the same rows: a logistic regression over the last states of the "
        "labelled tokens, its strength chosen on held-out words"
    )
    unread: ClassVar[Mapping[str, str]] = {
        **LabellingTask.unread,
        "data.augment": "labels words by their places, which noise would move",
    }
    row_format = classified_format = "word_labels"
    class_unit = "word"
    loss_unit = "labelled word"
    during_metrics = ("loss", "entity_f1")
    final_metrics = ("entity_f1", "word_accuracy", "loss")
    columns = (Column("tokens", "<i4", holds_tokens=True), Column("labels", "<i2"))

    @property
    def types(self) -> list[str]:
        """Names of the entities that the labels tell of, sorted; none where labels are no `B-`, `I-` and `O`."""
        return sorted({entity.type for name in self.labels for entity in find_entities([name])})

    def settle(self, samples: Iterable[Sample]) -> TokenClassification:
        """The task with the labels of its training rows, where the recipe names none.

        Raises:
            DataError: There are fewer than two.
        """
        if self.section.labels:
            return self
        names = order_labels((name for sample in samples for name in sample.labels or ()), "labels")
        return TokenClassification(self.section.model_copy(update={"labels": names}))

    @property
    def model_class(self) -> ModelClass:
        """A model with a head of one output a label, which is new."""
        return ModelClass("AutoModelForTokenClassification", self.outputs, has_new_head=True, peft_task="TOKEN_CLS")

    @property
    def scores(self) -> Mapping[str, int]:
        """The loss, labelled words, those that are right; of each type entities that are right, given and wanted."""
        return {"loss": 1, "weight": 1, "right_words": 1, "entities": 3 * max(1, len(self.types)), "entity_types": 1}

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """Tokens, and at the first token of each word its label.

        Raises:
            DataError: The row has no words with labels, or a label that is not known.
        """
        if sample.labels is None or sample.words is None:
            todo = "map them with columns: {words: .., labels: ..}"
            raise DataError("has no words with labels", key="labels", todo=todo)
        return self._row(sample, render, [self._number(name) for name in sample.labels])

    def ask(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """The words, whose labels are not known yet: the first one of all stands for them."""
        return self._row(sample, render, [0] * len(sample.words or ()))

    def _number(self, name: str) -> int:
        """Of a label: by its name, else as the row numbers it.

        Raises:
            DataError: It is neither.
        """
        if name in self.labels:
            return self.labels.index(name)
        if name.isdecimal() and int(name) < len(self.labels):
            return int(name)
        todo = f"{did_you_mean(name, self.labels)}correct it, or name all labels in task.labels as the rows do"
        raise DataError(f"label '{name}' is none of {listed(self.labels)}", key="labels", todo=todo)

    def _row(
        self, sample: Sample, render: Callable[[Sample], Encoded | None], numbers: Sequence[int]
    ) -> TaskRow | None:
        encoded = render(sample)
        if encoded is None or not any(encoded.trained):
            return None
        left = iter(numbers)
        labels = [next(left) if is_first else _UNLABELLED for is_first in encoded.trained]
        ids = encoded.input_ids
        return TaskRow({"tokens": ids, "labels": labels}, len(ids), sum(encoded.trained), ids, labels)

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """Padded texts with a mask, where the labelled tokens stand, and their labels."""
        import numpy as np
        import torch

        examples = [example for (example,) in rows]
        tensors = pad_texts([example["tokens"] for example in examples], pad_id)
        labels = np.full(tensors["input_ids"].shape, _UNLABELLED, dtype=np.int64)
        for row, example in enumerate(examples):
            labels[row, : len(example["labels"])] = example["labels"]
        index = np.flatnonzero(labels != _UNLABELLED)
        tensors |= {"label_index": torch.from_numpy(index), "label_ids": torch.from_numpy(labels.reshape(-1)[index])}
        tokens = sum(len(example["tokens"]) for example in examples)
        return Batch(tensors, len(index), tuple(example.index for example in examples), tokens)

    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open."""
        import torch

        ids = torch.empty((rows, tokens), dtype=torch.int64)
        index, right = (torch.empty(labels, dtype=torch.int64) for _ in range(2))
        tensors = {"input_ids": ids, "attention_mask": torch.empty_like(ids), "label_index": index, "label_ids": right}
        return Batch(tensors, labels, tuple(range(rows)), ids.numel())

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """The text, which tokens carry a label, and the labels."""
        labels = [int(label) for label in example["labels"]]
        names = " ".join(self.labels[label] for label in labels if label != _UNLABELLED)
        flags = [int(label != _UNLABELLED) for label in labels]
        return (ShownSequence([int(token) for token in example["tokens"]], flags, label=names),)

    def count_classes(self, read: Callable[[str], Iterator[NDArray[Any]]]) -> Mapping[str, int]:
        """Words of each label, in the order of the model's outputs."""
        import numpy as np

        counts = np.zeros(len(self.labels), dtype=np.int64)
        for labels in read("labels"):
            counts += np.bincount(labels[labels != _UNLABELLED], minlength=len(counts))
        return dict(zip(self.labels, counts.tolist(), strict=True))

    def check_classes(self, rows_of: Mapping[str, int], rows: int) -> list[str]:
        """Labels that no training row has."""
        return warn_of_absent([name for name, count in rows_of.items() if not count], "label", "labels")

    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """The end of the row up to its last labelled token."""
        labels = [int(label) for label in example["labels"]]
        end = max(place for place, label in enumerate(labels) if label != _UNLABELLED) + 1
        columns = {name: values[max(0, end - most_tokens) : end] for name, values in example.columns.items()}
        return replace(example, columns=columns)

    def logits(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """Of the labelled tokens, fp32 [words, labels]."""
        return head_logits(objective, batch).flatten(0, 1).index_select(0, batch["label_index"])

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """Nats summed over the labelled words."""
        from torch.nn import functional

        logits = self.logits(objective, batch)
        return LossSum(functional.cross_entropy(logits, batch["label_ids"], reduction="sum"), batch.weight)

    def reference_loss(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """The model's own loss, which is a mean over the labelled words."""
        import torch
        from torch.nn import functional

        from lorafit.ops.virtual_tokens import count_leading_vectors

        labels = torch.full_like(batch["input_ids"], -100).flatten()
        labels[batch["label_index"]] = batch["label_ids"]
        vectors = (count_leading_vectors(objective.model), 0)  # before each row's tokens
        labels = functional.pad(labels.view_as(batch["input_ids"]), vectors, value=-100)
        loss: torch.Tensor = objective.model(**head_inputs(batch), labels=labels).loss
        return loss.double() * batch.weight

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each row: its loss, labelled words and those that are right, and its entities by type."""
        return self.score_outputs(self.logits(objective, batch), batch)

    def label(self, objective: Objective, batch: Batch) -> list[JsonObject]:
        """The label of each word, and how likely it is."""
        shares, given = self.logits(objective, batch).double().softmax(-1).max(-1)
        found: list[JsonObject] = []
        for numbers, likely in zip(_by_row(given, batch), _by_row(shares, batch), strict=True):
            names = [self.labels[int(number)] for number in numbers]
            entities = [entity._asdict() for entity in find_entities(names)]
            found.append({"labels": names, "probabilities": likely, "entities": entities})
        return found

    def states(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """Last ones of the labelled tokens."""
        states: torch.Tensor = objective.base.base_model(**head_inputs(batch)).last_hidden_state
        return states.flatten(0, 1).index_select(0, batch["label_index"]).double()

    def right_labels(self, batch: Batch) -> torch.Tensor:
        """Of each labelled word."""
        from torch.nn import functional

        return functional.one_hot(batch["label_ids"], len(self.labels))

    def score_outputs(self, logits: torch.Tensor, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        import numpy as np
        from torch.nn import functional

        wanted = batch["label_ids"]
        losses = functional.cross_entropy(logits, wanted, reduction="none")
        parts = zip(_by_row(losses, batch), _by_row(wanted, batch), _by_row(logits.argmax(-1), batch), strict=True)
        rows = [(sum(nats), len(right), sum(map(eq, right, given)), right, given) for nats, right, given in parts]
        entities = [self._count(right, given) for *_, right, given in rows]
        sums = np.array([row[:3] for row in rows], dtype=np.float64).T
        types = np.full(len(rows), float(len(self.types)))
        found = dict(zip(("loss", "weight", "right_words"), sums, strict=True))
        return {**found, "entities": np.array(entities), "entity_types": types}

    def predict(self, sums: Mapping[str, tuple[float, ...]]) -> str | None:
        """How many words are right."""
        return f"{sums['right_words'][0]:.0f} of {sums['weight'][0]:.0f} words right"

    def _count(self, wanted: Sequence[float], given: Sequence[float]) -> list[float]:
        """Of each type, entities of one row that are right, given and wanted."""
        there, said = (set(find_entities([self.labels[int(number)] for number in row])) for row in (wanted, given))
        counts = [
            sum(entity.type == kind for entity in entities)
            for kind in self.types
            for entities in (there & said, said, there)
        ]
        return [float(count) for count in counts] or [0.0] * 3

    def tables(self, rows: Sequence[Mapping[str, tuple[float, ...]]]) -> tuple[ReportTable, ...]:
        """Each type of entity, with its precision, recall and F1."""
        import numpy as np

        if not self.types:
            return ()
        sums = np.sum([row["entities"] for row in rows], axis=0).reshape(-1, 3)
        lines: list[tuple[str | int | float, ...]] = [
            (name, int(wanted), share(right, given), share(right, wanted), share(2 * right, given + wanted))
            for name, (right, given, wanted) in zip(self.types, sums, strict=True)
        ]
        return (ReportTable("entities", "each type", ("type", "entities", "precision", "recall", "F1"), tuple(lines)),)


class Entity(NamedTuple):
    """Words that name one thing: from `first` to before `behind`."""

    type: str
    first: int
    behind: int


def find_entities(labels: Sequence[str]) -> list[Entity]:
    """The entities of a text, in order, as seqeval reads labels: an `I-` without a beginning begins one.

    Labels are `O`, or a letter of B (begins), I (goes on), E and L (end), S and U (one word), a dash and a type; others
    tell of no entities.
    """
    found: list[Entity] = []
    begin, kind, before = 0, "", _OUTSIDE
    for place, name in enumerate([*labels, _OUTSIDE]):
        letter, _, type_now = name.partition("-")
        if not type_now or letter not in "BIELSU":
            letter, type_now = _OUTSIDE, ""
        is_inside = letter in "IEL" and before in "BI" and type_now == kind
        if kind and not is_inside:
            found.append(Entity(kind, begin, place))
            kind = ""
        if letter != _OUTSIDE and not is_inside:
            begin, kind = place, type_now
        before = letter
    return found


def _by_row(values: torch.Tensor, batch: Batch) -> list[list[float]]:
    """Values of the labelled words [words], row by row."""
    rows, width = batch["input_ids"].shape
    found: list[list[float]] = [[] for _ in range(rows)]
    for value, place in zip(values.tolist(), batch["label_index"].tolist(), strict=True):
        found[place // width].append(value)
    return found
