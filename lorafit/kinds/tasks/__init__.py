"""Tasks: what is learnt from a row. A task owns its batches, its loss and its scores; nobody else knows a label.

sample ──encode──> row ──collate──> Batch ──Objective──> sum_loss   trained on, with a gradient
                                                         score      sums over each row, for metrics
                                                         logits     what proofs compare
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from lorafit.kinds.registry import Kind, S_co, SectionRegistry
from lorafit.kinds.section import KindSection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lorafit.contracts import Batch, Encoded, Example, LossSum, Sample
    from lorafit.objective import Objective


class TaskSection(KindSection):
    """What every task's section has."""


class Task(Kind[S_co]):
    """One task. Torch is imported inside of what needs it."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    """The transformers class that loads its models."""

    @abstractmethod
    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> Encoded | None:
        """Tokens and loss positions of one row; None where nothing of it can be learnt."""

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

    @abstractmethod
    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Sums over each row of a micro-batch by name, [rows] or [rows, values]; `loss` and `weight` among them."""

    @abstractmethod
    def logits(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """What the loss is computed of, [labels, classes]."""

    @abstractmethod
    def reference_loss(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """The model's own loss, summed over the labels in fp64, a scalar: what the loss must agree with.

        Raises:
            ModelError: The model is none for this task.
        """

    @abstractmethod
    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """At most so many tokens of a row, at least 2, that carry loss: what the proof before step 1 runs on."""


tasks: SectionRegistry[Task[TaskSection]] = SectionRegistry("task", "lorafit.kinds.tasks")
