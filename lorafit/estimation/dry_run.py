"""The exact memory estimate: train's own step on fake tensors, every storage counted; no weights and no GPU.

    config ─> weightless model ─> adapter ─> objective ─> optimizer      the functions that `train` calls
           ─> a micro-batch forward and backward, clip, update           the functions that the loop calls
           ─> LiveTensors: the worst moment, its phase, operation and components

The model is transformers' own class, the adapter PEFT's, the layers bitsandbytes'; only numbers are missing. The
tensors are fake ones of a CPU, on which attention saves what CUDA's flash kernel saves. What CUDA does otherwise is put
in its place while the step runs: dropout keeps a mask of a byte a value, autocast computes its fp32 list in fp32,
optimizers update all tensors at once, and storage comes in blocks of 512 bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from lorafit.contracts import Batch, Reporter, Silent
from lorafit.errors import ModelError
from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.tasks import Task, TaskSection, tasks
from lorafit.memory import ExactEstimate
from lorafit.model import fuse
from lorafit.model.attach import attach_adapter
from lorafit.model.fuse import fuse_layers, keep_unpacked
from lorafit.model.load import enable_checkpointing
from lorafit.model.weightless import build_weightless, fill_with_fakes, unpacking_fakes
from lorafit.ops import cross_entropy, dropout
from lorafit.ops.chunk_sizes import chunk_labels
from lorafit.ops.dtypes import autocast_dtype, dtype_named
from lorafit.ops.live_tensors import LiveTensors, watching
from lorafit.plan.step_memory import resolve_compute_dtype
from lorafit.trainer.executor import OneByOne
from lorafit.trainer.step import Update, accumulate_gradients

if TYPE_CHECKING:
    from lorafit.estimation import RecipeEstimate
    from lorafit.plan import MemoryQuestion
    from lorafit.recipe.schema import Recipe
    from lorafit.trainer.executor import Executor

_CUDA_BLOCK_BYTES = 512  # what CUDA's caching allocator rounds up to (c10/cuda/CUDACachingAllocator: kMinBlockSize)
_attention = functional.scaled_dot_product_attention


def run_estimated(
    found: RecipeEstimate,
    estimate: Callable[[Recipe], RecipeEstimate],
    config: Mapping[str, Any],
    reporter: Reporter | None,
) -> RecipeEstimate:
    """An estimate with the exact one beside it, which then gives the verdict.

    Where checkpointing is `auto` and the card has not what the step needs without, the step with it is asked as well.

    Args:
        found: The closed form's answer.
        estimate: Makes another one of a changed recipe.
        config: The base's config.json.
        reporter: Gets the progress.
    """

    def run(found: RecipeEstimate) -> RecipeEstimate:
        memory, recipe = found.memory, found.question.recipe
        tokens = memory.micro_batch_tokens
        accumulates = recipe.training.batch_size * found.longest_tokens > tokens  # else all of a step is in one
        dry = DryRun(found.question, config, tokens, memory.gradient_checkpointing, accumulates)
        return replace(found, exact=dry.run(reporter))

    recipe, exact = found.question.recipe, run(found)
    undecided = recipe.training.gradient_checkpointing == "auto" and not found.memory.gradient_checkpointing
    if exact.fits is not False or not undecided:
        return exact
    training = recipe.training.model_copy(update={"gradient_checkpointing": True})
    with_it = estimate(recipe.model_copy(update={"training": training}))
    return replace(run(with_it), without_checkpointing=exact.exact)


@dataclass(frozen=True)
class DryRun:
    """One micro-batch of a recipe and what is there while it runs.

    Attributes:
        question: The recipe, its longest row, dtype, attention and kind of device, as the closed form gets them.
        config: The base's config.json.
        micro_batch_tokens: Padded tokens; rows of the longest length, one at least.
        accumulates: Whether a step has several micro-batches: gradients are there then while the later ones run.
    """

    question: MemoryQuestion
    config: Mapping[str, Any]
    micro_batch_tokens: int
    gradient_checkpointing: bool
    accumulates: bool = True

    def run(self, reporter: Reporter | None = None) -> ExactEstimate:
        """Takes one step of the optimizer, so that its state exists, and a whole step that is counted.

        Args:
            reporter: Gets a bar that advances with each layer of the forward; silent where None.

        Raises:
            ModelError: transformers cannot build the model, or its forward needs the values of its tensors.
        """
        recipe, dtype = self.question.recipe, self.question.dtype
        on_cuda = self.question.device_kind != "cpu"
        fake, task = FakeTensorMode(allow_non_fake_inputs=True), tasks.bind(recipe.task)
        base = build_weightless(
            self.config,
            quantization=recipe.model.quantization,
            dtype=dtype_named(dtype),
            compute_dtype=dtype_named(resolve_compute_dtype(recipe, dtype)),
            attention=self.question.attention,
            device_kind=self.question.device_kind,
            model_class=task.model_class,
        )
        fresh = recipe.adapter.model_copy(update={"init_from": None})
        with torch.device("meta"), unpacking_fakes():
            model = attach_adapter(base, fresh, recipe.seed, model_class=task.model_class)
        fuse_layers(model)
        with fake:
            fill_with_fakes(model)
            if self.question.keeps_unpacked:
                keep_unpacked(model)
        enable_checkpointing(model, self.gradient_checkpointing)
        autocast = autocast_dtype(dtype)
        objective = task.build_objective(model, autocast_dtype=autocast, exact=not self.question.shape.plain_head)
        objective.train()
        executor = OneByOne(objective, torch.device("cpu"))
        # fp16 runs without its loss scale, which takes no memory and reads the gradients' values.
        executor.scaler = torch.amp.GradScaler("cpu", enabled=False)
        rate, training = recipe.training.learning_rate, recipe.training
        optimizer = optimizers.bind(training.optimizer).build(executor.parameters, rate, executor.device)
        for group in optimizer.param_groups:
            if on_cuda and group.get("foreach", 0) is None:
                group["foreach"] = True  # torch's own default there
        live = _LiveFakes(_CUDA_BLOCK_BYTES if on_cuda else 1, holds_documents=self.question.packs_rows)
        with fake, _as_it_would_run(on_cuda), unpacking_fakes():
            with _LiveFakes():
                for parameter in executor.parameters:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()  # its state exists from now on
                if not self.accumulates:
                    optimizer.zero_grad(set_to_none=True)
            with watching(live, objective, optimizer), self._progress(base, reporter or Silent()):
                try:
                    named = list(objective.named_parameters())
                    update = Update(optimizer, named, lambda step: rate, executor.scaler, training.max_grad_norm)
                    take_step(executor, update, self._batch(task))
                except (RuntimeError, NotImplementedError) as error:
                    raise self._cannot_run(error) from error
        tokens = max(self.micro_batch_tokens, self.question.longest_tokens)
        return ExactEstimate(live.peak(), self.question.device_kind, tokens, self.gradient_checkpointing)

    def _cannot_run(self, error: Exception) -> ModelError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return ModelError(
            f"{self.question.shape.model_type} does not run on tensors without values: {lines[0]}",
            key="--exact",
            todo="leave --exact out: the closed form needs none",
        )

    @contextlib.contextmanager
    def _progress(self, base: Any, reporter: Reporter) -> Iterator[None]:
        lists = [module for module in base.modules() if isinstance(module, torch.nn.ModuleList)]
        layers: Any = next((found for found in lists if len(found) == self.question.shape.layers), [])
        passes = 2 if self.gradient_checkpointing else 1
        with reporter.track(passes * len(layers), "dry run") as bar, contextlib.ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.register_forward_hook(lambda *_: bar.advance(1)))
            yield

    def _batch(self, task: Task[TaskSection]) -> Batch:
        longest = self.question.longest_tokens
        tokens = max(self.micro_batch_tokens, longest)
        rows, labels = tokens // longest, self.question.labels_at(tokens)
        return task.shape_batch(rows, tokens // rows, labels, packed=self.question.packs_rows)


def take_step(executor: Executor, update: Update, batch: Batch) -> None:
    """The loop's step, of one micro-batch."""
    accumulate_gradients(executor, [batch])
    executor.sum_gradients()
    update.apply(1, update.gradient_norm())
    update.optimizer.zero_grad(set_to_none=True)


class _LiveFakes(LiveTensors):  # type: ignore[no-untyped-call]
    """Counts, and answers what fake tensors cannot: the value of a number, and kernels that only write in place.

    Args:
        rounding_bytes: See LiveTensors.
        holds_documents: Whether rows hold several; transformers asks their positions whether all rows hold one.
    """

    def __init__(self, rounding_bytes: int = 1, *, holds_documents: bool = False) -> None:
        super().__init__(rounding_bytes)
        self._holds_documents = holds_documents

    def call(self, function: Any, arguments: Any, options: Any) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            if arguments[0].dtype == torch.bool:
                return not self._holds_documents
            return 1.0 if arguments[0].dtype.is_floating_point else 1
        if function is torch.ops.aten._grouped_mm.default:
            return _grouped_product(*arguments[:2])
        if function.namespace == "bitsandbytes" and not function._schema.returns:
            return None
        return function(*arguments, **options)


def _grouped_product(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each token times its expert's weight: [tokens, in] x [experts, in, out]; torch's own fake takes bf16 alone."""
    return rows.new_empty((*rows.shape[:-1], weights.shape[-1]))


@contextlib.contextmanager
def _as_it_would_run(on_cuda: bool) -> Iterator[None]:
    """Puts in place what a real run does otherwise than fake tensors of a CPU, as far as it decides what is kept.

    transformers takes fake tensors for a trace, and then builds masks that a run does without. A CPU's dropout mask is
    made, not drawn. On CUDA a fused dropout keeps a mask of a byte a value, attention with dropout keeps no scores,
    autocast computes pow and LayerNorm in fp32, and the loss takes more labels at once.

    Source: ATen/native/Dropout.cpp; ATen/autocast_mode.h, AT_FORALL_FP32 (the rest of that list meets fp32 already, or
    stands in no model).
    """
    from transformers.utils import import_utils

    with contextlib.ExitStack() as stack:
        patches: list[tuple[Any, str, Any]] = [
            (import_utils, "is_fake_tensor", lambda tensor: False),
            (dropout, "draw_kept", lambda x, probability: torch.empty_like(x)),
        ]
        if on_cuda:
            patches += [
                (functional, "dropout", _fused_dropout),
                (fuse, "drop", _fused_dropout),
                (functional, "layer_norm", _computed_in_fp32(functional.layer_norm)),
                (torch, "pow", _computed_in_fp32(torch.pow)),
                (functional, "scaled_dot_product_attention", _attention_without_masks),
                (cross_entropy, "chunk_labels", lambda vocabulary, device_kind: chunk_labels(vocabulary, "cuda")),
            ]
        for owner, name, replacement in patches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def _fused_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _attention_without_masks(*arguments: Any, **options: Any) -> torch.Tensor:
    """CUDA's flash kernel draws its dropout again in the backward pass; a CPU's has none and falls back to scores."""
    return _attention(*arguments, **{**options, "dropout_p": 0.0})


def _computed_in_fp32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What autocast does with a function of its fp32 list."""

    def computed(*arguments: Any, **options: Any) -> torch.Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return function(*arguments, **options)
        wide = [_in_fp32(value) for value in arguments]
        with torch.autocast("cpu", enabled=False):
            return function(*wide, **{name: _in_fp32(value) for name, value in options.items()})

    return computed


def _in_fp32(value: Any) -> Any:
    is_narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_narrow else value
