"""Tasks: what is learnt from a row, which loss judges it, and what an answer is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lorafit.kinds.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from lorafit.contracts import Encoded, Sample


class Task(Protocol):
    """One task. What lies above kinds is handed in.

    Attributes:
        auto_class: Name of the transformers class that loads its models, e.g. `AutoModelForCausalLM`.
        loss_unit: What the loss is summed over: `tokens`, `rows` or `pairs`.
    """

    auto_class: str
    loss_unit: str

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> Encoded | None:
        """Tokens and loss positions of one row; None where nothing of it can be learnt."""

    def build_loss(
        self, model: torch.nn.Module, objective: Callable[[torch.nn.Module], torch.nn.Module]
    ) -> torch.nn.Module:
        """The module of model and loss that is trained."""

    def predict(self, prompts: Sequence[list[int]], generate: Callable[[Sequence[list[int]]], list[Any]]) -> list[Any]:
        """Answers for prompts."""


tasks: Registry[Task] = Registry("task", "lorafit.kinds.tasks")
