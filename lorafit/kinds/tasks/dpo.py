"""Direct preference optimisation: of two answers to one prompt the chosen one becomes likelier than the rejected one.

    margin = (ln p(chosen) - ln p_ref(chosen)) - (ln p(rejected) - ln p_ref(rejected))      sums over an answer's tokens
    loss   = -ln sigmoid(beta * margin)                                                     the mean over pairs

The reference p_ref is the model as it was at step 0. Its log-probabilities are a column of the rows, computed once
before the first step, so that no second model is held and a step costs one forward of both answers.

Source: Rafailov et al. 2023, Direct Preference Optimization (https://arxiv.org/abs/2305.18290), equation 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lorafit.contracts import Batch, Column, ShownSequence, TaskRow
from lorafit.errors import DataError
from lorafit.kinds.tasks import Task, TaskSection, tasks
from lorafit.kinds.tasks._next_token import NextTokenTask

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Encoded, Example, LossSum, Sample
    from lorafit.objective import Objective

_SIDES = ("chosen", "rejected")
_TIE_NATS = 1e-4
"""Answers whose gains differ by less gained the same: rounding alone moves a long answer so much in fp32."""
_BETWEEN = -1
"""Stands between prompt and answers where a row is hashed; no token has that id."""


class DpoSection(TaskSection):
    """Direct preference optimisation."""

    kind: Literal["dpo"] = "dpo"
    """Direct preference optimisation."""
    beta: float = Field(default=0.1, gt=0.0, le=100.0)
    """What a change of an answer's log-probability, in nats, counts in the loss: a larger one is content with smaller
    changes, and so keeps the model nearer to the reference."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """`sigmoid`: DPO; `hinge`: SLiC, no loss once beta times the margin is above 1; `ipo`: the squared distance of the
    margin, there of means over an answer's tokens, from 1 / (2 beta)."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs that are taken to be the wrong way round, which the loss is corrected for; of `sigmoid` alone."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for loss sigmoid, and loss is {self.loss}")
        return self


@tasks.register(DpoSection)
class Dpo(NextTokenTask[DpoSection]):
    """A row is a pair of sequences with one prompt; it weighs 1, however long its answers are."""

    during_metrics = ("loss", "reward_accuracy")
    final_metrics = ("reward_accuracy", "reward_margin", "loss")
    row_format = "preference"
    sequences = 2
    unread: ClassVar[Mapping[str, str]] = {
        **Task.unread,
        "data.train_on=all": "learns from answers alone, and all would train prompts",
    }
    # A CPU's bf16 products over attention's keys round the last few, which fill no block of 16, otherwise. With none
    # such, a pair has the same log-probabilities in every micro-batch, to the last bit.
    pads_to = 16
    reference_columns = (Column("reference", "<f8", 2),)

    @property
    def scores(self) -> Mapping[str, int]:
        """The loss, its weight, whether the chosen answer gained more (1; a tie 0.5), and by how much times beta."""
        return {"loss": 1, "weight": 1, "preferred": 1, "margin": 1}

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of each side token ids, and 0/1 for each: whether it is of the answer."""
        return tuple(
            column
            for side in _SIDES
            for column in (Column(f"{side}_tokens", "<i4", holds_tokens=True), Column(f"{side}_trained", "|u1"))
        )

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """Both sides; None where one of them has nothing that is trained, or a cut left no difference.

        Where one side was cut, both take the shorter prompt: what they answer stays the same.
        """
        if sample.rejected is None:
            todo = "give rows prompt, chosen and rejected; format: preference reads them where others would do too"
            raise DataError("a row of one answer is not for task dpo, which compares two", todo=todo)
        sides = render(sample), render(sample.rejected)
        chosen, rejected = (_Answer.of(side) for side in sides)
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
        columns: dict[str, Sequence[float]] = {}
        for name, side in zip(_SIDES, (chosen, rejected), strict=True):
            columns |= {f"{name}_tokens": side.input_ids, f"{name}_trained": side.trained}
        both = sorted([chosen.answer, rejected.answer])
        return TaskRow(
            columns,
            tokens=max(len(chosen.input_ids), len(rejected.input_ids)),
            weight=1,
            asked=[*chosen.prompt, _BETWEEN, *both[0], _BETWEEN, *both[1]],  # the other way round: a contradiction
            answered=[int(chosen.answer == both[0])],
            trained_tokens=sum(chosen.trained) + sum(rejected.trained),
        )

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """Chosen sides, then rejected ones, padded to one length, a multiple of `pads_to`."""
        import numpy as np
        import torch

        from lorafit.objective.next_token import label_tokens

        pairs = [row[0] for row in rows]
        sides = [(pair[f"{side}_tokens"], pair[f"{side}_trained"]) for side in _SIDES for pair in pairs]
        tensors = label_tokens([[side] for side in sides], pad_id, self.pads_to)
        if "reference" in pairs[0].columns:
            tensors["reference"] = torch.from_numpy(np.stack([np.asarray(pair["reference"]) for pair in pairs]))
        tokens, rows_of = sum(len(ids) for ids, _ in sides), tuple(pair.index for pair in pairs)
        return Batch(tensors, len(pairs), rows_of, tokens, trained_tokens=len(tensors["label_ids"]))

    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open."""
        import torch

        ids = torch.empty((2 * rows, tokens // 2), dtype=torch.int64)
        index, targets = (torch.empty(labels, dtype=torch.int64) for _ in range(2))
        reference = torch.empty((rows, 2), dtype=torch.float64)
        tensors = {"input_ids": ids, "label_index": index, "label_ids": targets, "reference": reference}
        return Batch(tensors, rows, tuple(range(rows)), ids.numel(), trained_tokens=labels)

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """Both sides, and which of their tokens carry loss."""
        return tuple(
            ShownSequence([*map(int, example[f"{side}_tokens"])], [*map(int, example[f"{side}_trained"])], side)
            for side in _SIDES
        )

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """The loss summed over pairs."""
        from lorafit.contracts import LossSum
        from lorafit.objective.next_token import label_losses

        losses, _ = self._compare(_per_pair(label_losses(objective, batch), batch), batch)
        return LossSum(losses.sum().float(), batch.weight)

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each pair: loss, 1, whether the chosen answer gained more, and beta times the margin, [pairs]."""
        import torch

        from lorafit.objective.next_token import score_labels

        losses, margins = self._compare(_per_pair(score_labels(objective, batch)[0], batch), batch)
        found = {"loss": losses, "weight": torch.ones_like(losses), "margin": margins}
        found["preferred"] = self._preferred(margins)
        return {name: values.cpu().numpy() for name, values in found.items()}

    def refer(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Log-probabilities of both answers in nats, [pairs, 2]."""
        from lorafit.objective.next_token import score_labels

        found: NDArray[np.float64] = _per_pair(score_labels(objective, batch)[0], batch).cpu().numpy()
        return {"reference": found}

    def probed_loss(self, objective: Objective, batch: Batch) -> float:
        """Minus the log-probabilities of both answers, which need no reference."""
        from lorafit.objective.next_token import score_labels

        return float(score_labels(objective, batch)[0].double().sum())

    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """Each side up to its last trained token, and of that the last half of `most_tokens`, at least 2."""
        columns = dict(example.columns)
        for side in _SIDES:
            flags = [bool(flag) for flag in example[f"{side}_trained"]]
            end = len(flags) - flags[::-1].index(True) if any(flags) else len(flags)
            kept = slice(max(0, end - max(2, most_tokens // 2)), end)
            for name in (f"{side}_tokens", f"{side}_trained"):
                columns[name] = columns[name][kept]
        return replace(example, columns=columns)

    def _preferred(self, margins: torch.Tensor) -> torch.Tensor:
        """1 where the chosen answer gained more than the rejected one, 0.5 where both gained the same."""
        tied = margins.abs() < _TIE_NATS * self.section.beta
        return 0.5 * (1.0 + margins.sign().masked_fill(tied, 0.0))

    def _compare(self, log_probs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each pair's loss and beta times its margin, fp64 [pairs].

        Source of `hinge`: Zhao et al. 2023, SLiC-HF (https://arxiv.org/abs/2305.10425); of `ipo`: Azar et al. 2023
        (https://arxiv.org/abs/2310.12036), equation 17, its log-ratios divided by the answers' lengths as its authors
        computed it; of `label_smoothing`: Chowdhury et al. 2024, Provably Robust DPO (https://arxiv.org/abs/2403.00409),
        equation 12.

        Args:
            log_probs: Of both answers, [pairs, 2].
        """
        import torch
        from torch.nn import functional

        section, ratios = self.section, log_probs - batch["reference"]
        margins = section.beta * (ratios[:, 0] - ratios[:, 1])
        if section.loss == "hinge":
            return torch.relu(1.0 - margins), margins
        if section.loss == "ipo":
            means = ratios / _per_pair(-torch.ones_like(batch["label_ids"], dtype=torch.float64), batch)
            return (means[:, 0] - means[:, 1] - 0.5 / section.beta).square(), margins
        flipped = section.label_smoothing
        right, wrong = functional.logsigmoid(margins), functional.logsigmoid(-margins)
        return (flipped * wrong - (1.0 - flipped) * right) / (1.0 - 2.0 * flipped), margins


@dataclass(frozen=True, slots=True)
class _Answer:
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
    def of(cls, encoded: Encoded | None) -> _Answer | None:
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


def _per_pair(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Minus the sums of the labels' losses over each side of each pair, fp64 [pairs, 2]."""
    import torch

    sequences, width = batch["input_ids"].shape
    owners = batch["label_index"] // width
    sums = torch.zeros(sequences, dtype=torch.float64, device=losses.device).index_add(0, owners, losses.double())
    return -sums.view(2, -1).T
