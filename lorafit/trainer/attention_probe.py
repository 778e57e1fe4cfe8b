"""Whether an attention implementation computes on the loaded model what the others do: a row's logits and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorafit.model.attention import FUSED_ATTENTION, set_attention
from lorafit.objective import choose_probe
from lorafit.ops.logits_distance import ROUNDING, logits_distance
from lorafit.ops.rng import preserved_rng

if TYPE_CHECKING:
    from lorafit.contracts import Batch, Examples
    from lorafit.objective import Objective

_PROBE_TOKENS = 128  # of the row, at most where there is one so short


@dataclass
class AttentionProbe:
    """One row, run under an implementation and its reference. Leaves the implementation and the mode it ran last."""

    objective: Objective
    examples: Examples
    pad_id: int
    device: torch.device

    def disagreement(self, name: str, eager_logits: torch.Tensor) -> str:
        """How far an implementation is from its references, in words; empty where it is within rounding.

        Args:
            name: The implementation.
            eager_logits: `logits("eager")`.
        """
        rounding = ROUNDING[self.objective.autocast_dtype]
        distance = logits_distance(eager_logits, self.logits(name))
        if not distance <= rounding:
            return f"its logits are {distance:.2g} from eager's"
        if name != FUSED_ATTENTION:
            return ""
        distance = self._gradient_distance(name, "sdpa")  # `fused` differs from it in training mode only
        return "" if distance <= rounding else f"its gradients are {distance:.2g} from sdpa's"

    @torch.no_grad()
    def logits(self, name: str) -> torch.Tensor:
        """[labels, vocabulary], in eval mode."""
        set_attention(self.objective.base, name)
        self.objective.eval()
        return self.objective.logits(self._batch())

    def _gradient_distance(self, name: str, reference: str) -> float:
        expected, found = (self._gradients(attention) for attention in (reference, name))
        return float((found - expected).norm() / expected.norm())

    def _gradients(self, name: str) -> torch.Tensor:
        """Of the row's loss in training mode, all behind each other, fp64; dropout is drawn alike each time."""
        set_attention(self.objective.base, name)
        self.objective.train()
        with preserved_rng():
            loss_sum, _, _ = self.objective(self._batch())
            loss_sum.backward()
        trained = [parameter for parameter in self.objective.parameters() if parameter.grad is not None]
        gradients = torch.cat([parameter.grad.flatten().double() for parameter in trained])  # type: ignore[union-attr]
        for parameter in trained:
            parameter.grad = None
        return gradients

    def _batch(self) -> Batch:
        row = choose_probe(self.examples.lengths, most_tokens=_PROBE_TOKENS)
        return self.objective.task.collate([[self.examples[row]]], self.pad_id).to(self.device)
