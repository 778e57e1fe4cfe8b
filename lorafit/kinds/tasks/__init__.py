"""Tasks: what is learnt from a row. A task owns its batches, its loss and its scores; nobody else knows a label.

sample ──encode──> row ──collate──> Batch ──Objective──> sum_loss   trained on, with a gradient
                                                         score      sums over each row, for metrics
                                                         logits     what proofs compare
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from lorafit.facts import CAUSAL_MODEL, ModelClass
from lorafit.kinds.metrics import applies
from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.row_limits import Limit, TwoTexts
from lorafit.kinds.section import PACKED, KindSection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import (
        Batch,
        Column,
        Encoded,
        Example,
        Examples,
        JsonObject,
        Kept,
        LossSum,
        PlacedSample,
        Reporter,
        ReportTable,
        Sample,
        ShownSequence,
        TaskRow,
    )
    from lorafit.facts import PictureFacts
    from lorafit.objective import Objective
    from lorafit.ops.logits_distance import LogitsUnit
    from lorafit.pictures import PictureReader, PlacedPicture


_LENGTHS, _SEARCH = ("max_new_tokens", "min_new_tokens"), ("num_beams", "length_penalty", "no_repeat_ngram_size")
_AGAIN = ("draws", "draw_temperature", "encoder")
WRITES_NONE: Mapping[str, str] = {
    f"evaluation.{option}": "writes no answers" for option in (*_LENGTHS, *_SEARCH, *_AGAIN, "answered_rows")
}
"""What a task whose models write no text does not read."""


class TaskSection(KindSection):
    """What every task's section has."""


class Task(Kind[S_co]):
    """One task. Torch is imported inside of what needs it."""

    @property
    def model_class(self) -> ModelClass:
        """How its models are built: transformers' causal language models, where the task says no other."""
        return CAUSAL_MODEL

    @property
    def two_texts(self) -> TwoTexts | None:
        """How its rows become tokens where an encoder reads one text and a decoder writes another; None elsewhere."""
        return None

    def limits(self, max_length: int) -> tuple[Limit, ...]:
        """What bounds its rows, of a recipe with that `data.max_length`."""
        return (Limit("data.max_length", max_length),)

    def settle(self, samples: Iterable[Sample]) -> Task[S_co]:
        """The task with what its training rows decide, such as the names of labels; most leave that to the recipe.

        Args:
            samples: The training rows, read only where they are asked.
        """
        return self

    def seeing(self, reader: PictureReader) -> Task[S_co]:
        """The task with what makes tensors of its rows' images; one that reads none stays as it is."""
        return self

    def pictures(self, example: Example) -> tuple[PlacedPicture, ...]:
        """The images of a row."""
        return ()

    def image_tokens(self, examples: Examples) -> Sequence[int]:
        """Of each row, how many tokens stand for images; empty where the task reads none."""
        return ()

    def picture_facts(self, examples: Examples) -> PictureFacts | None:
        """What the images of these rows take in a micro-batch; None where they have none."""
        return None

    def assume_pictures(self) -> PictureFacts | None:
        """The same of rows that are not known, each as long as what stands for its images; None where the task reads
        none."""
        return None

    @property
    @abstractmethod
    def scores(self) -> Mapping[str, int]:
        """What `score` gives by name, and of how many numbers a row; `loss` and `weight` among them."""

    closed_form: ClassVar[bool] = False
    """Whether `memory` has formulas for its loss; that of any other is estimated by a dry run."""
    during_metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """`evaluation.during` where a recipe says nothing."""
    final_metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """`evaluation.final` where a recipe says nothing."""
    writes_answers: ClassVar[bool] = False
    """Whether its models answer with text, which metrics read."""
    reference_columns: ClassVar[tuple[Column, ...]] = ()
    """Columns that `refer` computes of every row before the first step; `collate` finds them in the examples."""
    fitted_base: ClassVar[str] = ""
    """What `fit_base` fits to the base, for people; empty where an evaluation scores the base as it is."""
    reads_pictures: ClassVar[bool] = False
    """Whether its rows have images, which its model's processor makes tensors of."""
    labels_rows: ClassVar[bool] = False
    """Whether a label is a row's, and no token carries loss."""
    loss_unit: ClassVar[str] = "trained token"
    """What carries loss, and is counted as `trained_tokens`."""
    classified_format: ClassVar[str | None] = None
    """The format of what its models give labels to, for `classify`; None where they give none."""
    classifies_answers: ClassVar[bool] = False
    """Whether `classify` is given prompts with their answers, in any format of rows that holds both."""
    row_format: ClassVar[str | None] = None
    """The one format of its training rows; None where it reads several."""
    sequences: ClassVar[int] = 1
    """Sequences of a row, which stay together in a micro-batch, padded to one length."""
    pools: ClassVar[int] = 0
    """How many sums over all rows of a step `pool` gives before the step's gradients; 0: no row's loss depends on the
    others."""
    pads_to: ClassVar[int] = 1
    """The padded length of sequences is a multiple of it."""
    unread: ClassVar[Mapping[str, str]] = {
        PACKED: "takes one row a sequence",
        "data.overlength=split": "takes a row whole: only plain text can be split",
    }
    """Options that it does not read, `section.option`, or values that it can do nothing with, `section.option=value`;
    each with the reason. A recipe that sets one is refused."""

    @property
    def chosen_options(self) -> tuple[str, ...]:
        """Options of the section that `choose` is asked to settle: they need an evaluation while training."""
        return ()

    def row_tokens(self, longest: int) -> int:
        """Tokens that a row takes in a micro-batch, whose longest sequence has so many."""
        return math.ceil(longest / self.pads_to) * self.pads_to * self.sequences

    @property
    def keeps(self) -> Kept:
        """What is left of a labelled text that is longer than a row may be."""
        return "head"

    def assumed_row(self, sequence_tokens: int) -> tuple[int, int]:
        """Of a row whose longest sequence has so many tokens: what it takes, and how many of them may carry loss."""
        tokens = self.row_tokens(sequence_tokens)
        return tokens, tokens

    def sequence_tokens(self, row_tokens: int, row_labels: int) -> int:
        """Tokens of the longest sequence of a row that takes so many, of which so many carry loss."""
        return row_tokens // self.sequences

    @property
    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """What its prepared rows hold: of each sequence its tokens, then what has a value for each of them."""

    def arrange(self, samples: Iterable[PlacedSample]) -> Iterable[PlacedSample]:
        """The samples of a split, none left out and in their order, where one is made of several; a pure function."""
        return samples

    @abstractmethod
    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """One row; None where nothing of the sample can be learnt.

        Args:
            sample: A row of a source.
            render: Makes tokens of it, or of another sample made of it: whole, or cut to `data.max_length`.
        """

    @abstractmethod
    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """One micro-batch on the CPU, padded on the right.

        Padding is known by length, never by `ids == pad_id`: in many tokenizers the pad token also ends a turn.

        Args:
            rows: One example each; where the task packs, also several documents that share a sequence.
            pad_id: Any valid id.
        """

    def collate_whole(self, example: Example, pad_id: int) -> Batch:
        """A row with every label that its model gives logits for: what a merge is compared on.

        `counted`, where it is there, is 0/1 for each label: whether it is trained; else all are.
        """
        return self.collate([[example]], pad_id)

    @abstractmethod
    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open: what a dry run runs on.

        Args:
            rows: Sequences.
            tokens: Of each.
            labels: Of all; what the batch weighs where a token is a label.
            packed: Whether sequences hold several documents.
        """

    def cut(self, example: Example, tokens: int) -> Example:
        """The end of a row: at most so many tokens in all of its sequences."""
        kept = max(1, tokens // self.sequences)
        ragged = {column.name for column in self.columns if column.width is None}
        columns = {name: values[-kept:] if name in ragged else values for name, values in example.columns.items()}
        return replace(example, columns=columns)

    @abstractmethod
    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """A row for people: its sequences, and which of their tokens carry loss, or which label."""

    class_unit: ClassVar[str] = "row"
    """What `count_classes` counts."""

    @property
    def class_weights(self) -> Mapping[str, float]:
        """What the loss counts of each class while training, by its name; empty where all count alike."""
        return {}

    def count_classes(self, read: Callable[[str], Iterator[NDArray[Any]]]) -> Mapping[str, int]:
        """How many rows, or words, each class has, by its name; empty where there are no classes.

        Args:
            read: Gives the values of a column, some rows at a time: [rows, width], or without width all [values].
        """
        return {}

    def check_classes(self, rows_of: Mapping[str, int], rows: int) -> list[str]:
        """What to warn of before training, told from what `count_classes` says of so many training rows.

        Raises:
            DataError: All of them are of the same class.
        """
        return []

    def build_objective(
        self, model: torch.nn.Module, *, autocast_dtype: torch.dtype | None = None, exact: bool = False
    ) -> Objective:
        """The module of model and loss.

        Args:
            model: The base model or a PEFT model around it.
            autocast_dtype: What the forward computes in; None: as the weights are (fp32).
            exact: Start on the exact path, where there is a faster one.
        """
        from lorafit.objective import Objective

        return Objective(model, self, autocast_dtype=autocast_dtype, exact=exact)

    @abstractmethod
    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """The loss summed over a micro-batch, with a gradient."""

    def pool(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """Sums over a micro-batch, fp64 [pools], without a gradient.

        `sum_loss` finds those of its whole step, over all micro-batches and ranks, as `batch["pooled"]`, on which the
        step's result then does not depend how it is cut; a batch without them is a step of its own.
        """
        raise NotImplementedError

    @abstractmethod
    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Sums over each row of a micro-batch by name, [rows] or [rows, values]; `loss` and `weight` among them."""

    def finish(self, scores: Mapping[str, NDArray[np.float64]]) -> Mapping[str, NDArray[np.float64]]:
        """Scores of a whole set, [rows, values] by name, where a row's depend on the others; else as `score` gave."""
        return scores

    def refer(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """The reference columns of a micro-batch, [rows] or [rows, width] each, of the model as it is at step 0.

        They are kept by model, rows and precision, so that no option of the section may change them.
        """
        return {}

    @property
    def starts_head(self) -> bool:
        """Whether `start_head` is to be asked before step 1."""
        return False

    def start_head(
        self, objective: Objective, train: Iterable[Batch], held_out: Iterable[Batch] | None, reporter: Reporter
    ) -> None:
        """Gives the new head the values with which it begins; the arguments are those of `fit_base`."""

    def fit_base(
        self, objective: Objective, train: Iterable[Batch], held_out: Iterable[Batch] | None, reporter: Reporter
    ) -> Mapping[str, NDArray[np.float64]]:
        """What the base, whose head is only drawn, is scored with: fitted to its frozen states of the training rows.

        Args:
            objective: Around the base, its adapter off; the caller's precision is that of `Objective.autocast`.
            train: Micro-batches of the training rows, on the model's device, to be read once.
            held_out: The same of rows that choose between fits; some of the training rows do where None.
            reporter: Gets a bar.
        """
        return {}

    def settle_base(self, fitted: Mapping[str, NDArray[np.float64]]) -> Task[S_co]:
        """The task as it scores the base, with what `fit_base` decided beside the head."""
        return self

    def score_base(
        self, objective: Objective, batch: Batch, fitted: Mapping[str, NDArray[np.float64]]
    ) -> Mapping[str, NDArray[np.float64]]:
        """What `score` gives, of the base with what was fitted to it."""
        return self.score(objective, batch)

    def choose(
        self, rows: Sequence[Mapping[str, tuple[float, ...]]]
    ) -> tuple[Task[S_co], Sequence[Mapping[str, tuple[float, ...]]]]:
        """The task with what its validation rows decide, such as a threshold, and their scores by that; most leave
        nothing to them.

        Args:
            rows: What `score` gave of each.
        """
        return self, rows

    def tables(self, rows: Sequence[Mapping[str, tuple[float, ...]]]) -> tuple[ReportTable, ...]:
        """What a report shows beside metrics, from the scores of each row."""
        return ()

    def ask(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """A row whose label is not known, as `encode` makes one whose label is; None where there is nothing to ask."""
        return None

    def label(self, objective: Objective, batch: Batch) -> list[JsonObject]:
        """Each row's labels with probabilities, for `classify`: `labels`, and `probabilities` by label."""
        return []

    def predict(self, sums: Mapping[str, tuple[float, ...]]) -> str | None:
        """What the model answers to a row, told from its scores; None where it writes its answers, or gives none."""
        return None

    @property
    def logits_unit(self) -> LogitsUnit:
        """What proofs measure a difference of logits in: their spread over the classes; or their size, where there are
        so few that they may be nearly equal, as the rewards of two answers to one prompt are."""
        return "spread"

    @abstractmethod
    def logits(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """What the loss is computed of, [labels, classes]; `label_ids` of the batch are the right ones, [labels]."""

    @abstractmethod
    def reference_loss(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """The model's own loss, summed over the labels in fp64, a scalar: what `probed_loss` must agree with.

        Raises:
            ModelError: The model is none for this task.
        """

    def probed_loss(self, objective: Objective, batch: Batch) -> float:
        """The losses of the labels as they are trained, summed; of rows without reference columns."""
        return float(self.score(objective, batch)["loss"].sum())

    @abstractmethod
    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """At most so many tokens of a row, at least 2, that carry loss: what the proof before step 1 runs on."""

    def can_score(self, metric: str) -> bool:
        """Whether a registered metric can be asked of the task."""
        return applies(metric, self.scores, writes_answers=self.writes_answers)


tasks: SectionRegistry[Task[TaskSection]] = SectionRegistry("task", "lorafit.kinds.tasks")
