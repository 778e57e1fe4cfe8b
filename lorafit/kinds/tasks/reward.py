"""Reward model: one number for a prompt with its answer, by a new head; a chosen answer gets more than a rejected one.

    loss = -ln sigmoid(reward(chosen) - reward(rejected)) + centering * (reward(chosen) + reward(rejected))^2

The mean over pairs. The head is drawn anew, trained whole, and saved with the adapter.

Source: Ouyang et al. 2022, Training language models to follow instructions with human feedback
(https://arxiv.org/abs/2203.02155), equation 1 for pairs; of `centering`: Eisenstein et al. 2023, Helping or Herding?
(https://arxiv.org/abs/2312.09244), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lorafit.contracts import Batch, Column, LossSum, ShownSequence, TaskRow
from lorafit.errors import DataError
from lorafit.facts import ModelClass
from lorafit.kinds.tasks import WRITES_NONE, TaskSection, tasks
from lorafit.kinds.tasks._heads import fit_head, head_logits, mean_states, pad_texts
from lorafit.kinds.tasks._pairs import SIDES, PairTask

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Encoded, Example, JsonObject, Reporter, Sample
    from lorafit.objective import Objective

_TIE = 1e-6


class RewardSection(TaskSection):
    """A reward model over pairs of answers."""

    kind: Literal["reward"] = "reward"
    """A reward model."""
    centering: float = Field(default=0.0, ge=0.0, le=100.0)
    """What the squared sum of a pair's rewards counts beside: pairs alone leave open where zero is, and this puts it
    between good and bad answers (0.01 is usual)."""


@tasks.register(RewardSection)
class Reward(PairTask[RewardSection]):
    """A pair is one choice between two classes, whose logits are both rewards; the chosen answer is the first."""

    model_class = ModelClass(
        "AutoModelForSequenceClassification",
        {"num_labels": 1, "id2label": {0: "reward"}, "label2id": {"reward": 0}},
        has_new_head=True,
        peft_task="SEQ_CLS",
    )
    fitted_base = (
        "the frozen model with a head trained on the same pairs: a logistic regression over the difference of the "
        "means of both answers' last states, its strength chosen on held-out pairs"
    )
    unread: ClassVar[Mapping[str, str]] = {**PairTask.unread, **WRITES_NONE}
    labels_rows = classifies_answers = True
    loss_unit = "pair"
    logits_unit = "size"
    final_metrics = ("reward_accuracy", "loss")  # margins of the base's head, a regression, are of another scale
    columns = tuple(Column(f"{side}_tokens", "<i4", holds_tokens=True) for side in SIDES)

    def tie(self) -> float:
        return _TIE

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """Both whole sequences: no token of them carries loss."""
        row = super().encode(sample, render)
        return None if row is None else TaskRow(row.columns, row.tokens, row.weight, row.asked, row.answered)

    def ask(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """One prompt with its answer.

        Raises:
            DataError: The row holds no answer.
        """
        if sample.messages is None and sample.completion is None:
            todo = "give prompt and completion, prompt, chosen and rejected, or messages"
            raise DataError("holds no prompt with its answer", todo=todo)
        encoded = render(sample)
        if encoded is None:
            return None
        return TaskRow({"tokens": encoded.input_ids}, len(encoded.input_ids), 1, encoded.input_ids, [])

    def label(self, objective: Objective, batch: Batch) -> list[JsonObject]:
        """The reward of each answer."""
        rewards = head_logits(objective, batch).double().view(-1)
        return [{"values": {"reward": reward}} for reward in rewards.tolist()]

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """Both sides."""
        sides = [(side, [*map(int, example[f"{side}_tokens"])]) for side in SIDES]
        return tuple(ShownSequence(ids, [0] * len(ids), side) for side, ids in sides)

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """Chosen sides, then rejected ones, padded to one length; or single answers, as they are asked."""
        import torch

        pairs = [row[0] for row in rows]
        names = [name for name in (*(f"{side}_tokens" for side in SIDES), "tokens") if name in pairs[0].columns]
        texts = [pair[name] for name in names for pair in pairs]
        tensors = {**pad_texts(texts, pad_id), "label_ids": torch.zeros(len(pairs), dtype=torch.int64)}
        return Batch(tensors, len(pairs), tuple(pair.index for pair in pairs), sum(map(len, texts)))

    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open."""
        import torch

        ids = torch.empty((2 * rows, tokens // 2), dtype=torch.int64)
        tensors = {"input_ids": ids, "attention_mask": torch.empty_like(ids)}
        tensors["label_ids"] = torch.empty(rows, dtype=torch.int64)
        return Batch(tensors, rows, tuple(range(rows)), ids.numel())

    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """The ends of both sides: their rewards are those of any text."""
        return self.cut(example, most_tokens)

    def logits(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """Rewards of both answers, fp32 [pairs, 2]."""
        return head_logits(objective, batch).view(2, -1).T

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """The loss summed over pairs."""
        return LossSum(self._losses(self.logits(objective, batch)).sum(), batch.weight)

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each pair: loss, 1, which answer has more reward, and by how much, [pairs]."""
        return self._score(self.logits(objective, batch))

    def reference_loss(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """From the model's own rewards, each text alone and without padding."""
        import torch

        lengths = batch["attention_mask"].sum(-1).tolist()
        texts = [ids[:length] for ids, length in zip(batch["input_ids"], lengths, strict=True)]
        rewards = torch.cat([objective.model(input_ids=text[None]).logits for text in texts])
        return self._losses(rewards.double().view(2, -1).T).sum()

    def fit_base(
        self, objective: Objective, train: Iterable[Batch], held_out: Iterable[Batch] | None, reporter: Reporter
    ) -> Mapping[str, NDArray[np.float64]]:
        """A direction in the frozen model's mean last states, [1, states]: the one that tells chosen from rejected.

        Each pair is seen both ways round, side by side, so that what is fitted has no bias.
        """
        import torch

        def both_ways(batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
            found = self._read_differences(objective, batches)
            states = torch.stack([found, -found], dim=1).flatten(0, 1)
            return states, torch.tensor([[1.0], [0.0]], dtype=torch.float64).to(states.device).repeat(len(found), 1)

        chosen_on = None if held_out is None else both_ways(held_out)
        return fit_head(*both_ways(train), chosen_on, several=True, reporter=reporter, together=2)

    def score_base(
        self, objective: Objective, batch: Batch, fitted: Mapping[str, NDArray[np.float64]]
    ) -> Mapping[str, NDArray[np.float64]]:
        """What `score` gives, of that direction."""
        import torch

        states = mean_states(objective, batch)
        return self._score((states @ torch.from_numpy(fitted["weight"][0]).to(states.device)).view(2, -1).T)

    def _read_differences(self, objective: Objective, batches: Iterable[Batch]) -> torch.Tensor:
        """Mean states of the chosen answers less those of the rejected ones, fp64 [pairs, width]."""
        import torch

        found = []
        for batch in batches:
            with objective.autocast(batch):
                chosen, rejected = mean_states(objective, batch).chunk(2)
            found.append(chosen - rejected)
        return torch.cat(found)

    def _losses(self, rewards: torch.Tensor) -> torch.Tensor:
        """Of each pair, from the rewards of both answers [pairs, 2]."""
        from torch.nn import functional

        losses = -functional.logsigmoid(rewards[:, 0] - rewards[:, 1])
        return losses + self.section.centering * rewards.sum(-1).square() if self.section.centering else losses

    def _score(self, rewards: torch.Tensor) -> Mapping[str, NDArray[np.float64]]:
        return self.scored(self._losses(rewards), rewards[:, 0] - rewards[:, 1])
