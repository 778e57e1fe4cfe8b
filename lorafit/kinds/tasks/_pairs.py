"""What tasks on pairs share: two answers to one prompt, of which one is chosen, whatever is learnt from them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from lorafit.contracts import Batch, Column, ShownSequence, TaskRow
from lorafit.errors import DataError
from lorafit.kinds.registry import S_co
from lorafit.kinds.tasks import Task
from lorafit.kinds.tasks._next_token import NextTokenTask

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Encoded, Example, LossSum, Sample
    from lorafit.objective import Objective

SIDES = ("chosen", "rejected")
BETWEEN = -1
"""Stands between prompt and answers where a row is hashed; no token has that id."""
_UNREAD = {**Task.unread, "data.train_on=all": "learns from answers alone, and all would train prompts"}


class PairTask(Task[S_co]):
    """A row is a pair of sequences with one prompt; it weighs 1, however long its answers are."""

    row_format = "preference"
    sequences = 2
    during_metrics = ("loss", "reward_accuracy")
    final_metrics: ClassVar[tuple[str, ...]] = ("reward_accuracy", "reward_margin", "loss")
    unread: ClassVar[Mapping[str, str]] = _UNREAD

    @property
    def scores(self) -> Mapping[str, int]:
        """The loss, its weight, whether the chosen answer has more reward (1; a tie 0.5), and by how much."""
        return {"loss": 1, "weight": 1, "preferred": 1, "margin": 1}

    @abstractmethod
    def tie(self) -> float:
        """A difference of rewards that rounding may make: a smaller one is a tie."""

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """Both sides; None where one of them has nothing that is trained, or a cut left no difference.

        Where one side was cut, both take the shorter prompt: what they answer stays the same.
        """
        if sample.rejected is None:
            todo = "give rows prompt, chosen and rejected; format: preference reads them where others would do too"
            what = f"a row of one answer is not for task {self.section.kind}, which compares two"
            raise DataError(what, todo=todo)
        sides = render(sample), render(sample.rejected)
        chosen, rejected = (Answer.of(side) for side in sides)
        if chosen is None or rejected is None:
            return None
        is_cut = any(side is not None and side.is_cut for side in sides)
        if is_cut:
            prompt = min(chosen.prompt, rejected.prompt, key=len)
            chosen, rejected = replace(chosen, prompt=prompt), replace(rejected, prompt=prompt)
        if chosen == rejected:
            if is_cut:
                return None
            raise DataError("chosen and rejected have the same tokens", key="rejected")
        found: dict[str, Sequence[float]] = {}
        for name, side in zip(SIDES, (chosen, rejected), strict=True):
            found |= {f"{name}_tokens": side.input_ids, f"{name}_trained": side.trained}
        both = sorted([chosen.answer, rejected.answer])
        return TaskRow(
            {column.name: found[column.name] for column in self.columns},
            tokens=max(len(chosen.input_ids), len(rejected.input_ids)),
            weight=1,
            asked=[*chosen.prompt, BETWEEN, *both[0], BETWEEN, *both[1]],  # the other way round: a contradiction
            answered=[int(chosen.answer == both[0])],
            trained_tokens=sum(chosen.trained) + sum(rejected.trained),
        )

    def scored(self, losses: torch.Tensor, margins: torch.Tensor) -> Mapping[str, NDArray[np.float64]]:
        """What `score` gives.

        Args:
            losses: Of each pair.
            margins: By how much the chosen answer's reward is the larger one.
        """
        import torch

        preferred = 0.5 * (1.0 + margins.sign().masked_fill(margins.abs() < self.tie(), 0.0))
        found = {"loss": losses, "weight": torch.ones_like(losses), "margin": margins, "preferred": preferred}
        return {name: values.double().cpu().numpy() for name, values in found.items()}


class TwoAnswers(NextTokenTask[S_co]):
    """Rows of two sequences, a prompt with two answers: how they are stored, cut and collated."""

    sides: ClassVar[tuple[str, str]] = SIDES
    """What its columns call the two."""
    sequences = 2
    # A CPU's bf16 products over attention's keys round the last few, which fill no block of 16, otherwise. With none
    # such, a sequence has the same log-probabilities in every micro-batch, to the last bit.
    pads_to = 16
    unread: ClassVar[Mapping[str, str]] = _UNREAD

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of each side token ids, and 0/1 for each: whether it is of the answer."""
        return tuple(
            column
            for side in self.sides
            for column in (Column(f"{side}_tokens", "<i4", holds_tokens=True), Column(f"{side}_trained", "|u1"))
        )

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """First sides, then second ones, padded to one length, a multiple of `pads_to`."""
        import numpy as np
        import torch

        from lorafit.objective.next_token import label_tokens

        pairs = [row[0] for row in rows]
        sides = [(pair[f"{side}_tokens"], pair[f"{side}_trained"]) for side in self.sides for pair in pairs]
        tensors = label_tokens([[side] for side in sides], pad_id, self.pads_to)
        for column in self.reference_columns:
            if column.name in pairs[0].columns:
                tensors[column.name] = torch.from_numpy(np.stack([np.asarray(pair[column.name]) for pair in pairs]))
        lengths, rows_of = tuple(len(ids) for ids, _ in sides), tuple(pair.index for pair in pairs)
        trained_tokens = len(tensors["label_ids"])
        return Batch(tensors, len(pairs), rows_of, sum(lengths), trained_tokens=trained_tokens, lengths=lengths)

    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open."""
        import torch

        ids = torch.empty((2 * rows, tokens // 2), dtype=torch.int64)
        index, targets = (torch.empty(labels, dtype=torch.int64) for _ in range(2))
        tensors = {"input_ids": ids, "label_index": index, "label_ids": targets}
        for column in self.reference_columns:
            tensors[column.name] = torch.empty((rows, column.width or 1), dtype=torch.float64)
        return Batch(tensors, rows, tuple(range(rows)), ids.numel(), trained_tokens=labels)

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """Both sides, and which of their tokens carry loss."""
        return tuple(
            ShownSequence([*map(int, example[f"{side}_tokens"])], [*map(int, example[f"{side}_trained"])], side)
            for side in self.sides
        )

    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """Each side up to its last trained token, and of that the last half of `most_tokens`, at least 2."""
        columns = dict(example.columns)
        for side in self.sides:
            flags = [bool(flag) for flag in example[f"{side}_trained"]]
            end = len(flags) - flags[::-1].index(True) if any(flags) else len(flags)
            kept = slice(max(0, end - max(2, most_tokens // 2)), end)
            for name in (f"{side}_tokens", f"{side}_trained"):
                columns[name] = columns[name][kept]
        return replace(example, columns=columns)

    def probed_loss(self, objective: Objective, batch: Batch) -> float:
        """Minus the log-probabilities of the labels, which need no reference."""
        from lorafit.objective.next_token import score_labels

        return float(score_labels(objective, batch)[0].double().sum())


class LikelihoodPairs(PairTask[S_co], TwoAnswers[S_co]):
    """Pairs whose loss is a function of both answers' log-probabilities."""

    @abstractmethod
    def compare(self, log_probs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each pair's loss and by how much the chosen answer's reward is the larger one, fp64 [pairs] each.

        Args:
            log_probs: Of both answers in nats, sums over their tokens, fp64 [pairs, 2].
        """

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """The loss summed over pairs."""
        from lorafit.contracts import LossSum
        from lorafit.objective.next_token import label_losses

        losses, _ = self.compare(_per_pair(label_losses(objective, batch), batch), batch)
        return LossSum(losses.sum().float(), batch.weight)

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each pair: loss, 1, which answer has more reward, and by how much, [pairs]."""
        return self.scored(*self.compare(self.log_probs(objective, batch), batch))

    def log_probs(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """Of both answers in nats, sums over their tokens, fp64 [pairs, 2]; without a gradient."""
        from lorafit.objective.next_token import score_labels

        return _per_pair(score_labels(objective, batch)[0], batch)


def answer_lengths(batch: Batch) -> torch.Tensor:
    """Trained tokens of both answers, fp64 [pairs, 2]."""
    import torch

    return _per_pair(-torch.ones_like(batch["label_ids"], dtype=torch.float64), batch)


def sum_by_sequence(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Minus the sums of the labels' losses over each sequence, fp64 [sequences]: log-probabilities of its answer."""
    import torch

    sequences, width = batch["input_ids"].shape
    owners = batch["label_index"] // width
    return -torch.zeros(sequences, dtype=torch.float64, device=losses.device).index_add(0, owners, losses.double())


def _per_pair(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The same over each side of each pair, fp64 [pairs, 2]."""
    return sum_by_sequence(losses, batch).view(2, -1).T


@dataclass(frozen=True, slots=True)
class Answer:
    """One side of a pair.

    Attributes:
        prompt: Tokens before the first that carries loss.
        answer: All from there on.
        flags: Which of those carry loss: in an answer of several turns not what others say.
    """

    prompt: list[int]
    answer: list[int]
    flags: list[bool]

    @classmethod
    def of(cls, encoded: Encoded | None) -> Answer | None:
        """A rendered side; None where nothing of it is trained."""
        if encoded is None or not any(encoded.trained):
            return None
        begin = encoded.trained.index(True)
        return cls(encoded.input_ids[:begin], encoded.input_ids[begin:], encoded.trained[begin:])

    @property
    def input_ids(self) -> list[int]:
        """The whole sequence."""
        return [*self.prompt, *self.answer]

    @property
    def trained(self) -> list[bool]:
        """Which of its tokens carry loss."""
        return [*([False] * len(self.prompt)), *self.flags]
