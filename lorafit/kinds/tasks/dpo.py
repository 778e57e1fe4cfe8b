"""Direct preference optimisation: of two answers to one prompt the chosen one becomes likelier than the rejected one.

    margin = (ln p(chosen) - ln p_ref(chosen)) - (ln p(rejected) - ln p_ref(rejected))      sums over an answer's tokens
    loss   = -ln sigmoid(beta * margin)                                                     the mean over pairs

The reference p_ref is the model as it was at step 0. Its log-probabilities are a column of the rows, computed once
before the first step, so that no second model is held and a step costs one forward of both answers.

Source: Rafailov et al. 2023, Direct Preference Optimization (https://arxiv.org/abs/2305.18290), equation 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from lorafit.contracts import Batch, Column
from lorafit.kinds.tasks import TaskSection, tasks
from lorafit.kinds.tasks._pairs import LikelihoodPairs, answer_lengths

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.objective import Objective

_TIE_NATS = 1e-4
"""Answers whose gains differ by less gained the same: rounding alone moves a long answer so much in fp32."""


class DpoSection(TaskSection):
    """Direct preference optimisation."""

    kind: Literal["dpo"] = "dpo"
    """Direct preference optimisation."""
    beta: float = Field(default=0.1, gt=0.0, le=100.0)
    """What a change of an answer's log-probability, in nats, counts in the loss: a larger one is content with smaller
    changes, and so keeps the model nearer to the reference."""
    loss: Literal["sigmoid", "hinge", "ipo", "ipo_sum"] = "sigmoid"
    """`sigmoid`: DPO; `hinge`: SLiC, no loss once beta times the margin is above 1; `ipo`: the squared distance of the
    margin, there of means over an answer's tokens, from 1 / (2 beta); `ipo_sum`: of the margin itself, as the paper
    prints it."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs that are taken to be the wrong way round, which the loss is corrected for; of `sigmoid` alone."""
    sft_weight: float = Field(default=0.0, ge=0.0, le=100.0)
    """What the chosen answer's own loss, its nats a token, counts beside: it keeps that answer likely, whose
    log-probability may fall else as long as the rejected one's falls faster."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for loss sigmoid, and loss is {self.loss}")
        return self


@tasks.register(DpoSection)
class Dpo(LikelihoodPairs[DpoSection]):
    """An answer's reward is beta times what it gained over the reference."""

    reference_columns = (Column("reference", "<f8", 2),)
    final_metrics = (*LikelihoodPairs.final_metrics, "ref_log_ratio")

    @property
    def scores(self) -> Mapping[str, int]:
        """What pairs score; of both answers what they gained over the reference in nats, and their tokens."""
        return {**super().scores, "log_ratio": 1, "answer_tokens": 1}

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each pair what `scores` names, [pairs]."""
        log_probs = self.log_probs(objective, batch)
        found = {"log_ratio": log_probs - batch["reference"], "answer_tokens": answer_lengths(batch)}
        sums = {name: values.sum(-1).cpu().numpy() for name, values in found.items()}
        return {**self.scored(*self.compare(log_probs, batch)), **sums}

    def tie(self) -> float:
        return _TIE_NATS * self.section.beta

    def refer(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Log-probabilities of both answers in nats, [pairs, 2]."""
        found: NDArray[np.float64] = self.log_probs(objective, batch).cpu().numpy()
        return {"reference": found}

    def compare(self, log_probs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each pair's loss and beta times its margin.

        Source of `sft_weight`: Pang et al. 2024, Iterative Reasoning Preference Optimization
        (https://arxiv.org/abs/2404.19733), equation 1.
        """
        ratios = log_probs - batch["reference"]
        margins = self.section.beta * (ratios[:, 0] - ratios[:, 1])
        losses = self._losses(ratios, margins, batch)
        if self.section.sft_weight:
            losses = losses - self.section.sft_weight * log_probs[:, 0] / answer_lengths(batch)[:, 0]
        return losses, margins

    def _losses(self, ratios: torch.Tensor, margins: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The preference's own loss.

        Source of `hinge`: Zhao et al. 2023, SLiC-HF (https://arxiv.org/abs/2305.10425); of `ipo_sum`: Azar et al. 2023
        (https://arxiv.org/abs/2310.12036), equation 17; of `ipo`: the same, its log-ratios divided by the answers'
        lengths, as its authors computed it; of `label_smoothing`: Chowdhury et al. 2024, Provably Robust DPO (https://arxiv.org/abs/2403.00409),
        equation 12.
        """
        import torch
        from torch.nn import functional

        section = self.section
        if section.loss == "hinge":
            return torch.relu(1.0 - margins)
        if section.loss in ("ipo", "ipo_sum"):
            ratios = ratios / answer_lengths(batch) if section.loss == "ipo" else ratios
            return (ratios[:, 0] - ratios[:, 1] - 0.5 / section.beta).square()
        flipped = section.label_smoothing
        right, wrong = functional.logsigmoid(margins), functional.logsigmoid(-margins)
        return (flipped * wrong - (1.0 - flipped) * right) / (1.0 - 2.0 * flipped)
