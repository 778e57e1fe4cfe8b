"""Training steps on the pretended card: what `train` runs, on fake tensors of cuda:0, observed.

A step is described by a recipe, and runs the model cut to a few layers: transformers' class, PEFT's adapter, lorafit's
layers, objective, executor and update. What a card would do by itself is not put in its place, as a dry run of
`estimate-memory` must: here torch decides as on a card.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

from lorafit.contracts import Batch
from lorafit.estimation.dry_run import DryRun
from lorafit.facts import DeviceFacts
from lorafit.kinds.optimizers import rate_groups
from lorafit.kinds.tasks import tasks
from lorafit.machine.hardware import FIRST_WITH_BF16
from lorafit.memory import StepMemory
from lorafit.model.attach import attach_adapter
from lorafit.model.checkpointing import set_checkpointing
from lorafit.model.class_shape import find_shape
from lorafit.model.fuse import fuse_layers
from lorafit.model.fused_lora import keep_unpacked
from lorafit.model.known_models import known_config
from lorafit.model.load import build_weightless, fill_with_fakes, unpacking_fakes
from lorafit.ops.attention_kernels import VARIABLE_LENGTH_ATTENTION
from lorafit.ops.dtypes import autocast_dtype, dtype_named
from lorafit.ops.kernels import FUSED
from lorafit.ops.live_tensors import LiveTensors, watching
from lorafit.ops.recomputed_layers import Checkpointing
from lorafit.plan.recipe_step import recipe_step
from lorafit.recipe.load import load_recipe
from lorafit.trainer.executor import Executor
from lorafit.trainer.step import Update, accumulate_gradients

CARD = torch.device("cuda", 0)
ALLOCATED_BLOCK = 512  # bytes; Source: c10/cuda/CUDACachingAllocator, kMinBlockSize
LAYER_KEYS = (
    *("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"),
)
ATTENTION_KERNELS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_varlen_attn": "flash",
}
VALUE_READERS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
"""Operations whose result the host needs, or whose size it has to learn."""
NO_KERNELS = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "_reshape_alias", "lift_fresh")
"""Operations that are no views by their signature, and launch nothing."""
IN_PLACE_KERNELS = ("_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_")
"""Of torch's loss scale: they change what they are given, and fake tensors have no rule for them."""


class Observer(LiveTensors):  # type: ignore[no-untyped-call]
    """Counts memory, kernels of attention and waits of the host; gives numbers where a step asks for some.

    Attributes:
        waits: By the place in the code: how often the host would wait for the card.
        kernels: Calls of sdpa by the kernel that torch took.
        operations: Kernels launched in each phase, views and allocations left out.
    """

    def __init__(self, *, holds_documents: bool = False) -> None:
        super().__init__(ALLOCATED_BLOCK)
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.operations: dict[str, Counter[str]] = {}
        self._holds_documents = holds_documents
        self._attention_calls = 0

    def call(self, function: Any, arguments: Any, options: Any) -> Any:
        name = function._schema.name.split("::")[1]
        if name in VALUE_READERS and arguments[0].is_cuda:
            self.note_wait(name)
        if name == "_local_scalar_dense":
            if arguments[0].dtype == torch.bool:
                return (
                    not self._holds_documents
                )  # what transformers asks of positions: does each row hold one document?
            return 0.0 if arguments[0].dtype.is_floating_point else 1  # no gradient overflowed
        if not function.is_view and name not in NO_KERNELS and function.namespace != "prim":
            self.operations.setdefault(self.phase, Counter())[name] += 1
        if name in ATTENTION_KERNELS:
            self.kernels[ATTENTION_KERNELS[name]] += 1
        if name in IN_PLACE_KERNELS or (function.namespace == "bitsandbytes" and not function._schema.returns):
            return None
        result = function(*arguments, **options)
        is_copied = name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor) and not result.is_cuda
        if is_copied and any(isinstance(value, torch.Tensor) and value.is_cuda for value in arguments):
            self.note_wait(name)
        return result

    def note_wait(self, what: str) -> None:
        """At the innermost line that is not torch's."""
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        ours = [frame for frame in frames if "fake_card" not in frame.filename and "live_tensors" not in frame.filename]
        place = ours[-1]
        self.waits[f"{what} at {Path(place.filename).name}:{place.lineno}"] += 1

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Within it every call of sdpa is counted, those that no kernel of its own computed as `math`; and waits that
        are no operation of torch's."""
        own = functional.scaled_dot_product_attention, torch.cuda.synchronize, FakeTensor.tolist

        def counted(*arguments: Any, **options: Any) -> torch.Tensor:
            before = self.kernels.total()
            result = own[0](*arguments, **options)
            if self.kernels.total() == before:
                self.kernels["math"] += 1
            return result

        def copied_at_once(tensor: torch.Tensor) -> Any:
            if not tensor.is_cuda:
                return own[2](tensor)
            self.note_wait("tolist")
            return np.zeros(tensor.shape).tolist()

        functional.scaled_dot_product_attention = counted
        torch.cuda.synchronize = lambda device=None: self.note_wait("synchronize")
        FakeTensor.tolist = copied_at_once
        try:
            yield
        finally:
            functional.scaled_dot_product_attention, torch.cuda.synchronize, FakeTensor.tolist = own


class CardStep:
    """A step of a recipe, on a model whose layers, adapter and optimizer are built once.

    Args:
        file: The recipe.
        overrides: As `--set` takes them.
        model: Hub id of a shipped shape; None: the recipe's base.
        layers: What the model is cut to.
        row_tokens: Of each row; None: the recipe's longest.
        memory_gib: Of the card.
        fuses: Whether its layers are lorafit's; else PEFT's and transformers' own.
    """

    def __init__(
        self,
        file: Path,
        overrides: list[str],
        *,
        model: str | None,
        layers: int,
        row_tokens: int | None,
        memory_gib: int = 16,
        fuses: bool = True,
    ) -> None:
        recipe = load_recipe(file, [*overrides, "model.kernels=none"]).recipe  # Triton's run on no fake tensors
        self.config = cut(dict(known_config(model or recipe.model.base) or {}), layers)
        shape = find_shape(self.config, tasks.bind(recipe.task).model_class)
        asked = recipe_step(recipe, shape, None, card_facts(memory_gib)).step
        row = {} if row_tokens is None else {"row_tokens": row_tokens, "row_labels": row_tokens - 1}
        self.step = step = replace(asked, **row)
        self._dry_runs: dict[bool, DryRun] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        base = build_weightless(
            self.config,
            quantization=step.quantization.section,
            dtype=dtype_named(step.dtype),
            compute_dtype=dtype_named(step.compute_dtype),
            attention=step.attention,
            device_kind="cuda",
            model_class=step.task.model_class.padded_with(0),
        )
        with torch.device("meta"), unpacking_fakes():
            section = step.adapter.section.model_copy(update={"init_from": None})
            self.model = attach_adapter(base, section, 0, model_class=step.task.model_class)
        if fuses:
            fuse_layers(self.model, FUSED)
        with self._fake, CARD:
            fill_with_fakes(self.model)
            if step.keeps_unpacked:
                keep_unpacked(self.model)
        objective = step.task.build_objective(
            self.model, autocast_dtype=autocast_dtype(step.dtype), exact=not step.model.plain_head
        )
        objective.loss_chunk_bytes, objective.kernels = step.loss_chunk_bytes, FUSED
        objective.train()
        self.executor = Executor(objective, CARD)
        named = self.executor.named_parameters
        optimizer = step.optimizer.build(rate_groups(named, step.adapter.rate_factor), 1e-4, CARD)
        for group in optimizer.param_groups:
            if not group.get("fused") and group.get("foreach", 0) is None:
                group["foreach"] = True  # torch's default for parameters of a card, whose class fakes have not
        self.update = Update(optimizer, named, lambda step: 1e-4, self.executor.scaler, step.max_grad_norm)
        with self.running(Observer()):
            self._make_gradients()
            optimizer.step()  # its state exists from now on
        self.update.optimizer.zero_grad(set_to_none=True)

    def run(self, *, rows: int, checkpointing: Checkpointing, packing: bool = False) -> Observer:
        """One step of a micro-batch of so many rows, its gradients there from one before."""
        set_checkpointing(self.model, checkpointing)
        observer = Observer(holds_documents=packing)
        with self.running(observer):
            self._make_gradients()
            batch = self._batch(rows, packing)
            with watching(observer, self.executor.objective, self.update.optimizer):
                accumulate_gradients(self.executor, [batch])
                self.executor.sum_gradients()
                observer.phase = "update"  # clipping is no part of the backward pass
                self.update.apply(1, self.update.gradient_norm())
            self.update.optimizer.zero_grad(set_to_none=True)
        return observer

    def estimates(self, *, rows: int, checkpointing: Checkpointing, packing: bool = False) -> dict[str, int]:
        """Bytes of tensors by the closed form and by `--exact`, without this card."""
        step = replace(self.step, packing=packing)
        tokens = rows * step.row_tokens
        closed = StepMemory(step).at(tokens, checkpointing)
        if packing not in self._dry_runs:
            self._dry_runs[packing] = DryRun(step, self.config)
        exact = self._dry_runs[packing].run(tokens, checkpointing)
        return {"closed form": closed.tensor_bytes, "--exact": exact.tensor_bytes}

    @contextmanager
    def running(self, observer: Observer) -> Iterator[None]:
        from transformers.utils import import_utils

        own = import_utils.is_fake_tensor
        import_utils.is_fake_tensor = lambda tensor: False  # it would take them for a trace, and make other masks
        try:
            with self._fake, unpacking_fakes(), observer.attending():
                yield
        finally:
            import_utils.is_fake_tensor = own

    def _batch(self, rows: int, packing: bool) -> Batch:
        """Whole rows, or as many documents: in rows of their own with a mask, or in one row with their bounds."""
        tokens, step = self.step.row_tokens, self.step
        labels = replace(step, packing=packing).labels_at(rows * tokens)
        if not (packing and step.attention in VARIABLE_LENGTH_ATTENTION):
            return step.task.shape_batch(rows, tokens, labels, packed=packing)
        batch = step.task.shape_batch(1, rows * tokens, labels, packed=True)
        bounds = torch.empty(rows + 1, dtype=torch.int32)
        return replace(batch, tensors={**batch.tensors, "bounds": bounds}, longest_document=tokens)

    def _make_gradients(self) -> None:
        for parameter in self.executor.parameters:
            parameter.grad = torch.zeros_like(parameter)


def cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same model with fewer layers."""
    return {**config, **{key: layers for key in LAYER_KEYS if key in config}}


def card_facts(memory_gib: int = 16) -> DeviceFacts:
    """The pretended card, as lorafit would describe it."""
    properties = torch.cuda.get_device_properties(CARD)
    capability = (properties.major, properties.minor)
    return DeviceFacts("cuda", properties.name, memory_gib << 30, capability >= FIRST_WITH_BF16, capability=capability)


def answer(questions: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each step all that was seen in each of its runs, beside what is estimated of it."""
    return [list(_answer(**question)) for question in questions]


def _answer(
    recipe: str, overrides: list[str], runs: list[dict[str, Any]], *, estimated: bool = True, **options: Any
) -> Iterator[dict[str, Any]]:
    step = CardStep(Path(recipe), overrides, **options)
    for run in runs:
        observer = step.run(**run)
        peak = observer.peak()
        yield {
            "run": run,
            "dtype": step.step.dtype,
            "kernels": observer.kernels,
            "expected kernel": replace(step.step, packing=run["packing"]).attention_kernel,
            "bytes": peak.tensor_bytes,
            "where": f"{peak.phase}: {peak.where}",
            "estimates": step.estimates(**run) if estimated else {},
        }
