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
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lorafit.console.wording import first_line
from lorafit.contracts import Batch, JsonMapping, Reporter, Silent
from lorafit.errors import ModelError
from lorafit.estimation import RecipeEstimate
from lorafit.estimation.fake_operations import LiveFakes, as_it_would_run
from lorafit.estimation.layer_list import LayerList
from lorafit.facts import RunFacts
from lorafit.kinds.optimizers import rate_groups
from lorafit.memory import MemoryEstimate, Phase, StepShape, with_start
from lorafit.memory.peak import PHASES
from lorafit.model.attach import attach_adapter
from lorafit.model.attention import set_attention
from lorafit.model.checkpointing import set_checkpointing
from lorafit.model.fuse import fuse_layers
from lorafit.model.fused_lora import keep_unpacked
from lorafit.model.load import build_weightless, fill_with_fakes, unpacking_fakes
from lorafit.ops.attention_kernels import VARIABLE_LENGTH_ATTENTION
from lorafit.ops.dtypes import autocast_dtype, dtype_named
from lorafit.ops.kernels import PLAIN, Kernels
from lorafit.ops.liger import SIZED_FUSED, SIZED_LIGER
from lorafit.ops.live_tensors import LiveTensors, watching
from lorafit.ops.recomputed_layers import Checkpointing, more_than
from lorafit.trainer.executor import Executor
from lorafit.trainer.step import Update, accumulate_gradients

_CUDA_BLOCK_BYTES = 512  # what CUDA's caching allocator rounds up to (c10/cuda/CUDACachingAllocator: kMinBlockSize)
_OF_FAKES = (RuntimeError, NotImplementedError)  # what is raised of tensors without values
_OF_TOWERS = (*_OF_FAKES, ValueError, TypeError, AssertionError)  # and where those of pixels are looked at
_LEARNING_RATE = 1e-4  # any: no value is computed
_STEPS = 1000  # any: none is taken


def run_exactly(found: RecipeEstimate, config: JsonMapping, reporter: Reporter) -> RecipeEstimate:
    """An estimate with a dry run of its whole step beside it, which then gives the verdict.

    Where checkpointing is left open and the card has not what the step needs, the step with more of it is run as well.
    """
    asked, memory = found.asked, found.memory
    step, tokens = asked.step, memory.micro_batch_tokens
    accumulates = (
        found.recipe.training.batch_size * step.row_tokens > tokens
    )  # else all of a step is in one micro-batch
    dry = DryRun(step, config)

    def run(checkpointing: Checkpointing) -> MemoryEstimate:
        return with_start(step, dry.run(tokens, checkpointing, accumulates=accumulates, reporter=reporter))

    exact = replace(found, exact=run(memory.gradient_checkpointing))
    without = found.without_checkpointing or exact.exact
    for more in more_than(memory.gradient_checkpointing) if asked.checkpointing is None else ():
        if exact.fits is not False:
            break
        exact = replace(found, memory=asked.at(tokens, more), exact=run(more), without_checkpointing=without)
    return exact


class DryRun:
    """A training step on fake tensors: one model, on which any number of micro-batches can be tried.

    Args:
        step: The model, the kinds and the rows.
        config: The base's config.json.

    Raises:
        ModelError: transformers cannot build the model.
    """

    def __init__(self, step: StepShape, config: JsonMapping) -> None:
        self.step = step
        self._on_cuda = step.device_kind != "cpu"
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        base = self._base = build_weightless(
            config,
            quantization=step.quantization.section,
            dtype=dtype_named(step.dtype),
            compute_dtype=dtype_named(step.compute_dtype),
            attention=_attention_of(step),
            device_kind=step.device_kind,
            model_class=step.task.model_class.padded_with(0),
        )
        with torch.device("meta"), unpacking_fakes():
            fresh = step.adapter.section.model_copy(update={"init_from": None})
            self._model = attach_adapter(base, fresh, 0, model_class=step.task.model_class)
        kernels = _sized_kernels(step)
        fuse_layers(self._model, kernels)
        with self._fake:
            fill_with_fakes(self._model)
            keep_unpacked(self._model, step.keeps_unpacked)
        self._layers = LayerList(base, step.model.layers)
        self._can_leave_out = self._sees = True
        self._updated: tuple[str, Mapping[str, int]] | None = None
        autocast = autocast_dtype(step.dtype)
        exact = not step.model.plain_head
        objective = step.task.build_objective(self._model, autocast_dtype=autocast, exact=exact)
        objective.train()
        objective.loss_chunk_bytes = step.chunk_bytes
        objective.kernels = kernels
        self._executor = Executor(objective, torch.device("cpu"))
        # fp16 runs without its loss scale, which takes no memory and reads the gradients' values.
        self._executor.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self._trained, named = self._executor.parameters, self._executor.named_parameters
        groups = rate_groups(named, step.adapter.rate_factor)
        self._optimizer = step.optimizer.build(groups, _LEARNING_RATE, self._executor.device)
        hook = step.adapter.step_hook(self._model, RunFacts(0, _STEPS))
        self._update = Update(
            self._optimizer,
            named,
            lambda step: _LEARNING_RATE,
            self._executor.scaler,
            step.max_grad_norm,
            [hook] if hook is not None else [],
        )
        is_fused = self._on_cuda and step.optimizer.options(torch.device("cuda")).get("fused", False)
        for group in self._optimizer.param_groups:
            if is_fused:
                group["fused"] = True
            elif self._on_cuda and group.get("foreach", 0) is None:
                group["foreach"] = True  # torch's own default there
        with self._fake, as_it_would_run(step), LiveFakes():
            self._make_gradients()
            self._update.apply(0, torch.ones(()))  # states of optimizer and method exist from now on
            self._optimizer.zero_grad(set_to_none=True)

    def take(self, step: StepShape) -> None:
        """Goes on with another step of the same kinds: other rows, another attention, with copies or without."""
        if (name := _attention_of(step)) != _attention_of(self.step) and self._base._can_set_attn_implementation():
            set_attention(self._base, name)
        if step.keeps_unpacked != self.step.keeps_unpacked:
            with self._fake:
                keep_unpacked(self._model, step.keeps_unpacked)
        self.step = step

    def run(
        self,
        tokens: int,
        checkpointing: Checkpointing,
        *,
        accumulates: bool = True,
        few_layers: bool = False,
        reporter: Reporter | None = None,
    ) -> MemoryEstimate:
        """Takes a whole step and counts what is alive in it.

        Args:
            tokens: Padded tokens of a micro-batch: rows of the longest length, one at least.
            checkpointing: Which layers keep their input alone and run forward again.
            few_layers: Run representatives of the layers, and add what all others would keep.
            accumulates: Whether a step has several micro-batches: gradients are there then while the later ones run.
            reporter: Gets a bar that advances with each layer of the forward; silent where None.

        Raises:
            ModelError: Its forward needs the values of its tensors.
        """
        reporter, tokens = reporter or Silent(), max(tokens, self.step.row_tokens)
        set_checkpointing(self._model, checkpointing)
        chosen = self._layers.representatives() if few_layers and self._can_leave_out else self._layers.all
        try:
            return self._run_layers(chosen, tokens, checkpointing, accumulates, reporter)
        except (LookupError, ModelError) as error:
            if isinstance(error, LookupError) and chosen is not self._layers.all:
                self._can_leave_out = False  # the model finds its layers by numbers that are not all left: Zamba 2
            elif self._pictures(tokens):
                self._sees = False  # a tower asks for values of pixels; the language model may not
            else:
                raise
        return self.run(tokens, checkpointing, accumulates=accumulates, few_layers=few_layers, reporter=reporter)

    def _run_layers(
        self, chosen: Sequence[int], tokens: int, checkpointing: Checkpointing, accumulates: bool, reporter: Reporter
    ) -> MemoryEstimate:
        step = self.step
        rounding_bytes, sees = _CUDA_BLOCK_BYTES if self._on_cuda else 1, bool(self._pictures(tokens))
        live = LiveFakes(rounding_bytes, holds_documents=step.packs_rows, sees=sees)
        raised = _OF_TOWERS if sees else _OF_FAKES
        with self._fake, as_it_would_run(step), unpacking_fakes():
            if accumulates:
                self._make_gradients()
            with (
                watching(live, self._executor.objective, self._optimizer, self._update.hooks),
                self._layers.only(chosen),
                self._layers.weighed(live) as kept,
                self._progress(chosen, live, reporter),
            ):
                live.phase = "forward"  # adapters are cast before the model runs
                try:
                    accumulate_gradients(self._executor, [self._batch(tokens)], hooks=self._update.hooks)
                    self._executor.sum_gradients()
                    norm = self._update.gradient_norm()
                    if not (accumulates and self._updated):
                        self._update.apply(0, norm)
                except raised as error:
                    what = f"{step.model.model_type} does not run on tensors without values: {first_line(error)}"
                    todo = "leave --exact out: the closed form needs none"
                    raise ModelError(what, key="--exact", todo=todo) from error
                finally:
                    self._optimizer.zero_grad(set_to_none=True)
        peak = live.peak()
        fixed, missing, objective = peak.parts[""], self._layers.missing(chosen, kept), self._executor.objective
        casts = self._layers.casts(chosen, objective.autocast_dtype if objective.kernels.casts_once else None)
        alive = {name: _beside(fixed, peak.parts.get(name, fixed)) for name in PHASES}
        places = dict(peak.places)
        if accumulates:  # all gradients are there, whatever ran: every update is like the first
            places["update"], update = self._updated = self._updated or (places.get("update", ""), alive["update"])
            alive["update"] = dict(update)
        held = self._held_bytes() if sees and not self._on_cuda else 0
        for name, parts in alive.items():
            more = {"kept_activations": held} | (
                {} if name == "update" else {"kept_activations": held + missing, "adapter": casts}
            )
            parts.update({part: parts.get(part, 0) + size for part, size in more.items() if size})
        phases = tuple(Phase(name, places.get(name, ""), parts) for name, parts in alive.items())
        state_bytes = fixed.get("optimizer_state", 0) if step.pages_state else 0
        experts = step.unquantized_expert_bytes
        found = MemoryEstimate(fixed, phases, step.device_kind, tokens, checkpointing, state_bytes, experts)
        return replace(found, counts_pictures=sees)

    def _make_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)

    @contextlib.contextmanager
    def _progress(self, chosen: Sequence[int], live: LiveTensors, reporter: Reporter) -> Iterator[None]:
        with reporter.track(len(chosen), "dry run") as bar, contextlib.ExitStack() as stack:
            for number in chosen:  # what runs forward again is no advance
                hook = self._layers.layers[number].register_forward_hook(
                    lambda *_: bar.advance(live.phase == "forward")
                )
                stack.enter_context(hook)
            yield

    def _batch(self, tokens: int) -> Batch:
        rows, step = tokens // self.step.row_tokens, self.step
        batch = step.task.shape_batch(rows, tokens // rows, step.labels_at(tokens), packed=step.packs_rows)
        shapes = self._pictures(tokens)
        pixels = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in shapes.items()}
        return replace(batch, tensors={**batch.tensors, **pixels}, attached=tuple(pixels))

    def _held_bytes(self) -> int:
        """Of the images that wait on the host for their turn, each row's as many as of the densest row."""
        step = self.step
        made = step.pictures.shapes(step.held_rows * step.pictures.tokens) if step.pictures and step.held_rows else {}
        return sum(math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in made.values())

    def _pictures(self, tokens: int) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of what the forward takes of images, by name."""
        pictures = self.step.pictures
        return pictures.shapes(tokens) if pictures is not None and self._sees else {}


def _attention_of(step: StepShape) -> str:
    """What the model is told; those of variable length save what sdpa saves."""
    return "sdpa" if step.attention in VARIABLE_LENGTH_ATTENTION else step.attention


def _sized_kernels(step: StepShape) -> Kernels:
    """What stands for the step's operations: a card's run on no CPU, and Triton's kernels on no fake tensors."""
    if step.device_kind == "cpu":
        return PLAIN
    return SIZED_LIGER if step.runs_liger else SIZED_FUSED


def _beside(fixed: Mapping[str, int], alive: Mapping[str, int]) -> dict[str, int]:
    """What is alive beside what stays, by component."""
    return {name: size - fixed.get(name, 0) for name, size in alive.items() if size != fixed.get(name, 0)}
