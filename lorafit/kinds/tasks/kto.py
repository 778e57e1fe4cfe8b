"""Kahneman-Tversky optimisation: single answers with a verdict. A desirable answer becomes likelier, an undesirable one
less likely, measured against a reference point that moves with the model.

    reward = ln p(y|x) - ln p_ref(y|x)                                                 sums over an answer's tokens
    z0     = max(0, mean over the step's rows of ln p(y'|x) - ln p_ref(y'|x))           y' answers another prompt
    loss   = desirable_weight   * (1 - sigmoid(beta * (reward - z0)))                   of a desirable answer
             undesirable_weight * (1 - sigmoid(beta * (z0 - reward)))                   of an undesirable one

The mean over rows. z0 has no gradient: it stands for the KL divergence to the reference, and only says where a reward
is neither gain nor loss. y' is fixed when rows are prepared: the k-th row of a prompt takes the k-th answer to the
prompt before it.

Source: Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization
(https://arxiv.org/abs/2402.01306), equation 7; of how weights should go with counts: equation 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lorafit.contracts import Batch, Column, LossSum, Message, PlacedSample, Sample, ShownSequence, TaskRow
from lorafit.errors import DataError
from lorafit.kinds.chat_fields import assistant_turn
from lorafit.kinds.tasks import TaskSection, tasks
from lorafit.kinds.tasks._pairs import BETWEEN, Answer, TwoAnswers, sum_by_sequence

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Encoded, Example
    from lorafit.objective import Objective

VERDICTS = ("undesirable", "desirable")
_USUAL_RATIOS = (1.0, 4 / 3)
_ROUNDING = 1e-9


class KtoSection(TaskSection):
    """Kahneman-Tversky optimisation."""

    kind: Literal["kto"] = "kto"
    """Kahneman-Tversky optimisation."""
    beta: float = Field(default=0.1, gt=0.0, le=100.0)
    """How soon a reward, in nats, counts as won or lost: a larger one is content with smaller changes, and so keeps the
    model nearer to the reference."""
    desirable_weight: float = Field(default=1.0, gt=0.0, le=1e6)
    """What a desirable answer counts."""
    undesirable_weight: float = Field(default=1.0, gt=0.0, le=1e6)
    """What an undesirable answer counts. Both weights times the rows of their kind should stand as 1:1 to 4:3."""


@tasks.register(KtoSection)
class Kto(TwoAnswers[KtoSection]):
    """A row is its own sequence, which is learnt, and the prompt with y', of which only the log-probability is read."""

    row_format = "unpaired_preference"
    sides = ("answer", "mismatched")
    reference_columns = (Column("reference", "<f8", 2),)
    pools = 2
    unread: ClassVar[Mapping[str, str]] = {
        **TwoAnswers.unread,
        "data.augment": "matches each row with another prompt's answer, for which copies would be prompts of their own",
    }
    during_metrics = ("loss", "desirable_margin")
    final_metrics: ClassVar[tuple[str, ...]] = ("desirable_margin", "loss", "reference_point", "ref_log_ratio")

    @property
    def scores(self) -> Mapping[str, int]:
        """Loss, its weight, beta times the reward, whether the answer is desirable, what y' gained over the reference,
        what the answer did, and its tokens."""
        names = ("loss", "weight", "reward", "desirable", "mismatched", "log_ratio", "answer_tokens")
        return dict.fromkeys(names, 1)

    @property
    def columns(self) -> tuple[Column, ...]:
        """Tokens and flags of both sequences, and the verdict."""
        own, (ids, flags) = super().columns[:2], super().columns[2:]
        return (*own, replace(ids, is_bounded=True), replace(flags, is_bounded=True), Column("desirable", "|u1", 1))

    def arrange(self, samples: Iterable[PlacedSample]) -> Iterator[PlacedSample]:
        """Each row with the answer of a row of the prompt before its own; the first prompt takes from the second.

        Rows of one prompt that follow each other, as pairs do, are one run, so that none of them is another's mate. A
        set of a single prompt has no mates.
        """
        runs = (list(run) for _, run in groupby(samples, key=lambda placed: _part(placed[2])[0]))
        waiting = before = next(runs, [])
        for run in runs:
            yield from _match(waiting, run)
            yield from _match(run, before)
            waiting, before = [], run
        yield from waiting

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """Both sequences with one prompt, that of the row; None where nothing of the answer is trained."""
        if sample.labels not in [(name,) for name in VERDICTS] or sample.text is not None:
            todo = "give rows prompt, completion and label (true, false); format: unpaired_preference reads them"
            raise DataError("a row without a verdict is not for task kto", todo=todo)
        own = Answer.of(render(sample))
        if own is None:
            return None
        if sample.mismatched is None:
            what = "all rows ask the same, and the reference point is told from an answer to another prompt"
            raise DataError(what, key="prompt", todo="add rows of other prompts")
        other = Answer.of(render(sample.mismatched))
        if other is None:
            return None
        found: dict[str, Sequence[float]] = {}
        for name, side in zip(self.sides, (own, replace(other, prompt=own.prompt)), strict=True):
            found |= {f"{name}_tokens": side.input_ids, f"{name}_trained": side.trained}
        desirable = VERDICTS.index(sample.labels[0])
        return TaskRow(
            {**found, "desirable": [desirable]},
            tokens=len(own.input_ids),
            weight=1,
            asked=[*own.prompt, BETWEEN, *own.answer],  # with the other verdict: a contradiction
            answered=[desirable],
            trained_tokens=sum(own.trained),
        )

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """The answer by its verdict, and y', no token of which carries loss."""
        own, other = super().show(example)
        name = VERDICTS[int(example["desirable"][0])]
        return replace(own, name=name), replace(other, trained=[0] * len(other.trained))

    def count_classes(self, read: Callable[[str], Iterator[NDArray[Any]]]) -> Mapping[str, int]:
        """Rows of each verdict."""
        counts = [(int(part.sum(dtype=int)), len(part)) for part in read("desirable")]
        desirable, rows = (sum(column) for column in zip((0, 0), *counts, strict=True))
        return {"desirable": desirable, "undesirable": rows - desirable}

    def check_classes(self, rows_of: Mapping[str, int], rows: int) -> list[str]:
        """Weights that do not go with the counts as the paper's equation 8 advises."""
        section, counts = self.section, (rows_of["desirable"], rows_of["undesirable"])
        if 0 in counts:
            missing = VERDICTS[bool(counts[1])]
            return [f"no training row is {missing}: KTO learns from both kinds of answers"]
        ratio = section.desirable_weight * counts[0] / (section.undesirable_weight * counts[1])
        low, high = _USUAL_RATIOS
        if low - _ROUNDING <= ratio <= high + _ROUNDING:
            return []
        fitting = [bound * section.undesirable_weight * counts[1] / counts[0] for bound in _USUAL_RATIOS]
        said = (
            f"{counts[0]:,} desirable rows of weight {section.desirable_weight:g} stand to {counts[1]:,} undesirable "
            f"ones of weight {section.undesirable_weight:g} as {ratio:.3g} to 1, and 1 to 1.33 is usual; that takes a "
            f"task.desirable_weight of {fitting[0]:.3g} to {fitting[1]:.3g}"
        )
        return [said]

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """Answers, then y', padded to one length; their labels apart, as only the answers' carry loss."""
        import numpy as np
        import torch

        batch = super().collate(rows, pad_id)
        own = sum(int(np.count_nonzero(np.asarray(row[0]["answer_trained"])[1:])) for row in rows)
        verdicts = torch.tensor([float(row[0]["desirable"][0]) for row in rows], dtype=torch.float64)
        return _parted(batch, own, verdicts)

    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open; y' has as many labels as the answers."""
        import torch

        batch = super().shape_batch(rows, tokens, 2 * labels, packed=packed)
        return _parted(batch, labels, torch.empty(rows, dtype=torch.float64))

    def refer(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Log-probabilities of the answer and of y' in nats, [rows, 2]."""
        import torch

        both = torch.stack([self._log_probs(objective, _half(batch, number)) for number in (0, 1)], dim=1)
        return {"reference": both.cpu().numpy()}

    def pool(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """The sum of what the y' gained over the reference, and rows."""
        import torch

        with torch.no_grad():
            gains = self._log_probs(objective, _half(batch, 1)) - batch["reference"][:, 1]
            return torch.stack([gains.sum(), torch.ones_like(gains).sum()])

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """The loss summed over rows. A batch that no step pooled over is a step of its own."""
        import torch

        from lorafit.objective.next_token import label_losses

        pooled = batch.tensors.get("pooled")
        gain, rows = self.pool(objective, batch) if pooled is None else pooled
        own = _half(batch, 0)
        rewards = sum_by_sequence(label_losses(objective, own), own) - batch["reference"][:, 0]
        away = (2.0 * batch["desirable"] - 1.0) * (rewards - (gain / rows).clamp(min=0.0))
        losses = self._weights(batch["desirable"]) * torch.sigmoid(-self.section.beta * away)
        return LossSum(losses.sum().float(), batch.weight)

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each row what `scores` names, [rows], the batch's own z0 in the loss."""
        import torch

        own, other = _half(batch, 0), _half(batch, 1)
        gains = self._log_probs(objective, own) - batch["reference"][:, 0]
        lengths = sum_by_sequence(-torch.ones_like(own["label_ids"], dtype=torch.float64), own)
        found = {
            "weight": torch.ones_like(gains),
            "reward": self.section.beta * gains,
            "desirable": batch["desirable"],
            "mismatched": self._log_probs(objective, other) - batch["reference"][:, 1],
            "log_ratio": gains,
            "answer_tokens": lengths,
        }
        return self.finish({name: values.double().cpu().numpy() for name, values in found.items()})

    def finish(self, scores: Mapping[str, NDArray[np.float64]]) -> Mapping[str, NDArray[np.float64]]:
        """The scores with the loss by the z0 of all these rows."""
        import numpy as np

        point = max(0.0, float(scores["mismatched"].mean())) if len(scores["mismatched"]) else 0.0
        away = (2.0 * scores["desirable"] - 1.0) * (scores["reward"] - self.section.beta * point)
        missed = 0.5 * (1.0 - np.tanh(0.5 * away))  # 1 - sigmoid, which overflows nowhere so
        return {**scores, "loss": self._weights(scores["desirable"]) * missed}

    def _weights(self, desirable: Any) -> Any:
        """What each row counts, from 1 where it is desirable and 0 where not; an array or a tensor."""
        section = self.section
        return desirable * section.desirable_weight + (1.0 - desirable) * section.undesirable_weight

    def _log_probs(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """Of each answer in nats, fp64 [rows]; without a gradient."""
        from lorafit.objective.next_token import score_labels

        return sum_by_sequence(score_labels(objective, batch)[0], batch)


def _parted(batch: Batch, own_labels: int, verdicts: torch.Tensor) -> Batch:
    """The batch with the labels of its second half under names of their own, counted from where that begins."""
    index, ids, begin = batch["label_index"], batch["label_ids"], batch["input_ids"].numel() // 2
    tensors = {
        **batch.tensors,
        "label_index": index[:own_labels],
        "label_ids": ids[:own_labels],
        "mismatched_index": index[own_labels:] - begin,
        "mismatched_ids": ids[own_labels:],
        "desirable": verdicts,
    }
    return replace(batch, tensors=tensors, trained_tokens=own_labels)


def _half(batch: Batch, number: int) -> Batch:
    """The answers (0) or the y' (1) of a batch, as a batch of next tokens."""
    names = ("mismatched_index", "mismatched_ids") if number else ("label_index", "label_ids")
    tensors = {"input_ids": batch["input_ids"].chunk(2)[number]}
    tensors |= {name: batch[source] for name, source in zip(("label_index", "label_ids"), names, strict=True)}
    return replace(batch, tensors=tensors)


def _part(sample: Sample) -> tuple[str | tuple[Message, ...], tuple[Message, ...]]:
    """What is asked, and the answer as turns."""
    if sample.messages is None:
        return sample.prompt, (assistant_turn(sample.completion or ""),)
    is_answer = [turn["role"] == "assistant" and turn.get("weight", 1) != 0 for turn in sample.messages]
    begin = is_answer.index(True) if True in is_answer else len(is_answer)
    return sample.messages[:begin], sample.messages[begin:]


def _match(run: Sequence[PlacedSample], others: Sequence[PlacedSample]) -> Iterator[PlacedSample]:
    """The rows of one prompt, each with one of the answers to another."""
    for number, (source, line, sample) in enumerate(run):
        asked, answer = _part(sample)[0], _part(others[number % len(others)][2])[1]
        if isinstance(asked, str):
            mate = replace(sample, completion=str(answer[-1].get("content", "")))
        else:
            mate = replace(sample, messages=(*asked, *answer))
        yield source, line, replace(sample, mismatched=mate)
