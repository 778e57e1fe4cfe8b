"""The module of model and loss that training and evaluation share; which loss, the task says.

loop, proofs, evaluation ──batch──> Objective ──under autocast──> task.sum_loss | task.score | task.logits
                                    model, precision              everything that knows a label

Before step 1 `prove_objective` compares that loss with the model's own, on one small batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lorafit.contracts import Batch, Example, Examples, LossSum, Reporter, ReportTable, ShownSequence
from lorafit.errors import NumericsError
from lorafit.ops.embedding_noise import noise_of
from lorafit.ops.isolation import in_mode
from lorafit.ops.kernels import PLAIN
from lorafit.ops.logits_distance import LogitsUnit
from lorafit.ops.masks import known_documents

_PROBED_ROWS = 64
_TOLERANCE = {None: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # relative; logits are rounded to the dtype


class TrainedTask(Protocol):
    """What an objective, and whoever trains or scores one, asks of its task (`lorafit.kinds.tasks.Task`).

    Losses, scores and logits are asked for inside of the objective's precision. What each is, stands there.
    """

    @property
    def section(self) -> object: ...

    @property
    def scores(self) -> Mapping[str, int]: ...

    @property
    def pools(self) -> int: ...

    @property
    def logits_unit(self) -> LogitsUnit: ...

    def can_score(self, metric: str) -> bool: ...

    def predict(self, sums: Mapping[str, tuple[float, ...]]) -> str | None: ...

    def choose(
        self, rows: Sequence[Mapping[str, tuple[float, ...]]]
    ) -> tuple[TrainedTask, Sequence[Mapping[str, tuple[float, ...]]]]: ...

    def tables(self, rows: Sequence[Mapping[str, tuple[float, ...]]]) -> tuple[ReportTable, ...]: ...

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch: ...

    def collate_whole(self, example: Example, pad_id: int) -> Batch: ...

    def cut(self, example: Example, tokens: int) -> Example: ...

    def image_tokens(self, examples: Examples) -> Sequence[int]: ...

    def show(self, example: Example) -> tuple[ShownSequence, ...]: ...

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum: ...

    def pool(self, objective: Objective, batch: Batch) -> torch.Tensor: ...

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]: ...

    def finish(self, scores: Mapping[str, NDArray[np.float64]]) -> Mapping[str, NDArray[np.float64]]: ...

    def logits(self, objective: Objective, batch: Batch) -> torch.Tensor: ...

    def reference_loss(self, objective: Objective, batch: Batch) -> torch.Tensor: ...

    def probed_loss(self, objective: Objective, batch: Batch) -> float: ...


class Objective(nn.Module):
    """A model with its loss: what the loop trains, the proofs try and evaluation scores.

    Args:
        model: The base model or a PEFT model around it.
        task: Makes its batches and gives its loss.
        autocast_dtype: What the forward computes in; None: as the weights are (fp32).
        exact: Start on the exact path: the model's own forward, where the task has a faster one.

    Attributes:
        exact: Whether the exact path is taken. It changes the model while it runs: one micro-batch at a time.
        loss_chunk_bytes: Of fp32 logits that the loss holds at once; None: as many as are usual on the device.
        masks_documents: Whether packed rows get a mask beside their positions, for models that do not build one from
            positions alone. `lorafit.trainer.startup_proofs` finds out.
        kernels: What computes the loss of a chunk; the table that the model's layers were given.
    """

    def __init__(
        self, model: nn.Module, task: TrainedTask, *, autocast_dtype: torch.dtype | None = None, exact: bool = False
    ) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.autocast_dtype = autocast_dtype
        self.exact = exact
        self.masks_documents = False
        self.loss_chunk_bytes: int | None = None
        self.kernels = PLAIN
        if autocast_dtype is not None:
            # Adapters leave their input's dtype alone: autocast casts their fp32 weights instead, which are far
            # smaller. PEFT would cast every input up to fp32 before autocast casts it down again.
            for module in model.modules():
                if hasattr(module, "cast_input_dtype_enabled"):
                    module.cast_input_dtype_enabled = False  # type: ignore[assignment]
            _keep_results_narrow(model)

    def forward(self, batch: Batch) -> LossSum:
        """The loss summed over a micro-batch."""
        with self.autocast(batch), noise_of(batch):
            return self.task.sum_loss(self, batch)

    @torch.no_grad()
    def pool(self, batch: Batch) -> torch.Tensor:
        """The task's sums over a micro-batch that a whole step is pooled of, fp64 [pools]."""
        with self.autocast(batch):
            return self.task.pool(self, batch)

    @torch.no_grad()
    def score(self, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Sums over each row by name, on the host; `loss` and `weight` among them."""
        with self.autocast(batch):
            return self.task.score(self, batch)

    def logits(self, batch: Batch) -> torch.Tensor:
        """What the loss is computed of, [labels, classes]."""
        with self.autocast(batch):
            return self.task.logits(self, batch)

    @torch.no_grad()
    def reference_loss(self, batch: Batch) -> torch.Tensor:
        """The model's own loss, summed over the labels in fp64: what `probed_loss` must agree with."""
        with self.autocast(batch):
            return self.task.reference_loss(self, batch)

    @torch.no_grad()
    def probed_loss(self, batch: Batch) -> float:
        """The losses of the labels as they are trained, summed."""
        with self.autocast(batch):
            return self.task.probed_loss(self, batch)

    @property
    def base(self) -> Any:
        """The transformers model, the PEFT model around it taken off."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        device: torch.device = self.base.get_input_embeddings().weight.device
        return device

    def batch_of(self, row: Example, pad_id: int) -> Batch:
        """A micro-batch of one row, on the model's device."""
        return self.task.collate([[row]], pad_id).to(self.device)

    @contextlib.contextmanager
    def autocast(self, batch: Batch) -> Iterator[None]:
        """The precision in which the objective computes; only rows of several documents have positions of their own."""
        kind, dtype = batch["input_ids"].device.type, self.autocast_dtype
        precision = torch.autocast(kind, dtype=dtype, enabled=dtype is not None)
        with precision, known_documents(one_a_row="position_ids" not in batch.tensors):
            yield


def _keep_results_narrow(model: nn.Module) -> None:
    """CUDA's autocast computes LayerNorm and `pow` in fp32 and leaves the result so: cast back to the input's dtype.

    Else everything behind a norm is twice as wide, and with bitsandbytes' layers, which take no part in autocast and
    give back the dtype they got, the whole residual stream. On a CPU nothing is cast.
    """

    def narrow(module: nn.Module, arguments: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        return result.to(arguments[0].dtype)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or "GELU" in type(module).__name__:
            module.register_forward_hook(narrow)


def choose_probe(lengths: Sequence[int], *, most_tokens: int, shows: Callable[[int], bool] = lambda row: True) -> int:
    """The row that proofs look at: of the first ones the longest that is no longer than that, else the shortest.

    Those alone are looked at that show what is to be proven, where there are any.
    """
    first = range(min(len(lengths), _PROBED_ROWS))
    rows = [row for row in first if shows(row)] or first
    return max(rows, key=lambda row: lengths[row] if lengths[row] <= most_tokens else -lengths[row])


def prove_objective(objective: Objective, batch: Batch, reporter: Reporter) -> None:
    """Compares the objective with the model's own loss, on one small batch (on the model's device).

    Where the fast path differs (soft-caps, logit scales, unusual heads) the objective goes over to the exact one, and
    says so. Modes and random numbers are left as they were.

    Raises:
        ModelError: The model cannot run on such a batch, or is none for this task.
        NumericsError: The exact path differs too, or the model's own loss is not finite.
    """
    with in_mode(objective, training=False):
        own = float(objective.reference_loss(batch))
        if not torch.isfinite(torch.tensor(own)):
            raise NumericsError(
                f"the model's own loss on one row is {own}",
                todo="check the base model's weights, or use another model.dtype",
            )
        tolerance = _TOLERANCE[objective.autocast_dtype] * max(abs(own), 1.0)
        ours = objective.probed_loss(batch)
        if abs(ours - own) > tolerance and not objective.exact:
            reporter.warn(
                f"the chunked loss ({ours:.6g}) is not this model's own ({own:.6g}): something stands behind its "
                "head; going on with the exact path, which is slower"
            )
            objective.exact = True
            ours = objective.probed_loss(batch)
        if abs(ours - own) > tolerance or ours != ours:
            raise NumericsError(
                f"the loss that would be trained ({ours:.6g}) is not the model's own ({own:.6g})",
                todo="this architecture is not supported; please report it",
            )
