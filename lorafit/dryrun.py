"""The exact memory estimate: train's own step on fake tensors, every storage counted; no weights and no GPU.

    config ─> weightless model ─> adapter ─> objective ─> optimizer      the functions that `train` calls
           ─> two micro-batches forward and backward, clip, update       the functions that the loop calls
           ─> LiveTensors: the worst moment, its phase, operation and components

The model is transformers' own class, the adapter PEFT's, the layers bitsandbytes'; only numbers are missing. The
tensors are fake ones of a CPU, on which attention saves what CUDA's flash kernel saves. What CUDA does otherwise is put
in its place while the step runs: dropout keeps a mask of a byte a value, autocast computes its fp32 list in fp32,
optimizers update all tensors at once, and storage comes in blocks of 512 bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lorafit.contracts import Batch, Silent
from lorafit.kinds.optimizers import build_optimizer
from lorafit.kinds.tasks import tasks
from lorafit.memory import COMPONENTS, needed_bytes
from lorafit.model.load import attach_adapter, enable_checkpointing
from lorafit.model.weightless import build_weightless, fill_with_fakes
from lorafit.objective import Objective
from lorafit.ops.live_tensors import LivePeak, LiveTensors, watching
from lorafit.train.step import accumulate_gradients, gradient_norm, sum_gradients, update_parameters
from lorafit.train.tracking import build_accelerator

if TYPE_CHECKING:
    from lorafit.recipe.schema import Recipe

_CUDA_BLOCK_BYTES = 512  # what CUDA's caching allocator rounds up to (c10/cuda/CUDACachingAllocator: kMinBlockSize)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class DryRun:
    """What the step is measured with.

    Attributes:
        recipe: Model, adapter, optimizer and clipping are read from it.
        config: The base's config.json.
        dtype: `bf16`, `fp16` or `fp32`.
        compute_dtype: Of products with dequantised weights.
        attention: `eager`, `sdpa` or another that keeps no scores.
        device_kind: `cpu` or `cuda`.
        rows: Rows of a micro-batch.
        row_tokens: Padded tokens of each.
        labels: Tokens of the micro-batch that carry loss.
        micro_batches: 2 where a step has several: gradients are there while the second one runs; else 1.
    """

    recipe: Recipe
    config: Mapping[str, Any]
    dtype: str
    compute_dtype: str
    attention: str
    device_kind: str
    rows: int
    row_tokens: int
    labels: int
    gradient_checkpointing: bool
    plain_head: bool = True
    micro_batches: int = 2

    def run(self) -> ExactEstimate:
        """Takes one step that initialises the optimizer and one that is counted.

        Raises:
            ModelError: transformers cannot build the model, or its forward needs the values of its tensors.
        """
        on_cuda = self.device_kind != "cpu"
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        accelerator = build_accelerator(use_cpu=True)
        base = build_weightless(
            self.config,
            quantization=self.recipe.model.quantization,
            dtype=_DTYPES[self.dtype],
            compute_dtype=_DTYPES[self.compute_dtype],
            attention=self.attention,
            device_kind=self.device_kind,
            auto_class=tasks.get(self.recipe.task).auto_class,
        )
        fresh = self.recipe.adapter.model_copy(update={"init_from": None})
        with torch.device("meta"):
            model = attach_adapter(base, fresh, self.recipe.seed)
        with fake:
            fill_with_fakes(model)
        enable_checkpointing(model, self.gradient_checkpointing)
        objective: Any = tasks.get(self.recipe.task).build_loss(model, self._objective)
        objective.train()
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        training = self.recipe.training
        optimizer = build_optimizer(training.optimizer, trained, training.learning_rate, accelerator.device, Silent())
        for group in optimizer.param_groups:
            if on_cuda and group.get("foreach", 0) is None:
                group["foreach"] = True  # torch's own default there
        live = _LiveFakes(_CUDA_BLOCK_BYTES if on_cuda else 1)
        with fake, _taken_for_real(), _AsCuda() if on_cuda else contextlib.nullcontext():
            with _LiveFakes():
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()  # its state exists from now on
                optimizer.zero_grad(set_to_none=True)
            batches = [self._batch() for _ in range(self.micro_batches)]
            with watching(live, objective, optimizer):
                self._step(objective, optimizer, trained, batches, accelerator)
        return ExactEstimate(live.peak(), self.device_kind, self.rows * self.row_tokens, self.gradient_checkpointing)

    def _objective(self, model: torch.nn.Module) -> Objective:
        autocast = None if self.dtype == "fp32" else _DTYPES[self.dtype]
        return Objective(model, autocast_dtype=autocast, exact=not self.plain_head)

    def _batch(self) -> Batch:
        ids = torch.empty((self.rows, self.row_tokens), dtype=torch.int64)
        index, labels = (torch.empty(self.labels, dtype=torch.int64) for _ in range(2))
        return Batch(ids, index, labels, self.labels, tuple(range(self.rows)), self.rows * self.row_tokens)

    def _step(self, objective: Any, optimizer: Any, trained: list[Any], batches: list[Batch], accelerator: Any) -> None:
        """The loop's step. fp16 runs without its loss scale, which takes no memory and reads the gradients' values."""
        accumulate_gradients(objective, batches, accelerator, None, lambda: None)
        sum_gradients(trained, accelerator)
        training = self.recipe.training
        update_parameters(
            optimizer,
            trained,
            None,
            norm=gradient_norm(trained),
            max_norm=training.max_grad_norm,
            learning_rate=training.learning_rate,
        )
        optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class ExactEstimate:
    """Peak memory of a step that ran, on fake tensors.

    Attributes:
        peak: The worst moment.
        device_kind: `cpu` or `cuda`.
        micro_batch_tokens: Padded tokens of a micro-batch.
    """

    peak: LivePeak
    device_kind: str
    micro_batch_tokens: int
    gradient_checkpointing: bool

    @property
    def tensor_bytes(self) -> int:
        """Peak of live tensors: what `torch.cuda.max_memory_allocated` reports."""
        return self.peak.tensor_bytes

    @property
    def needed_bytes(self) -> int:
        """What the card must have: tensors x allocator factor + context."""
        return needed_bytes(self.tensor_bytes, self.device_kind)

    @property
    def components(self) -> dict[str, int]:
        """Bytes by component at the peak, in the order of the closed form's table."""
        found = self.peak.components
        return {name: found.get(name, 0) for name in (*COMPONENTS, *sorted(set(found) - set(COMPONENTS)))}

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, in bytes."""
        return {
            "tensor_bytes": self.tensor_bytes,
            "needed_bytes": self.needed_bytes,
            "peak_phase": self.peak.phase,
            "peak_where": self.peak.where,
            "components_bytes": self.components,
            "phases_bytes": self.peak.phases,
            "micro_batch_tokens": self.micro_batch_tokens,
            "gradient_checkpointing": self.gradient_checkpointing,
        }


class _LiveFakes(LiveTensors):
    """Counts, and answers what fake tensors cannot: the value of a number, and kernels that only write in place."""

    def call(self, function: Any, arguments: Any, options: Any) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if arguments[0].dtype.is_floating_point else 1
        if function.namespace == "bitsandbytes" and not function._schema.returns:
            return None
        return function(*arguments, **options)


@contextlib.contextmanager
def _taken_for_real() -> Iterator[None]:
    """transformers takes fake tensors for a trace and then builds masks that a run does without."""
    from transformers.utils import import_utils

    before = import_utils.is_fake_tensor
    import_utils.is_fake_tensor = lambda tensor: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = before


class _AsCuda(TorchFunctionMode):
    """What torch does otherwise on CUDA, as far as it decides what is kept.

    Source: ATen/native/Dropout.cpp (fused dropout, a bool mask) and ATen/autocast_mode.h (AT_FORALL_FP32).
    """

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function is functional.dropout:
            return _fused_dropout(*arguments, **options)
        if function in _FP32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            arguments, options = _in_fp32(arguments), {name: _in_fp32(value) for name, value in options.items()}
            with torch.autocast("cpu", enabled=False):
                return function(*arguments, **options)
        return function(*arguments, **options)


_FP32_ON_CUDA = {
    torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, torch.Tensor.rsqrt, torch.exp, torch.Tensor.exp,
    torch.log, torch.Tensor.log, functional.softplus, functional.layer_norm, functional.rms_norm, functional.group_norm,
    torch.logsumexp, torch.Tensor.logsumexp, functional.softmax, torch.softmax, torch.Tensor.softmax,
    functional.log_softmax, torch.cumsum, torch.Tensor.cumsum,
}  # fmt: skip


def _fused_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _in_fp32(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return type(value)(_in_fp32(part) for part in value) if isinstance(value, (tuple, list)) else value
