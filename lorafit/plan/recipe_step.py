"""From a recipe and facts to the training step whose memory is asked for; plan and estimate both begin here.

`auto` is a word of the recipe alone: from here on an open value is None.

Whether adapted 4-bit weights keep their dequantised copy for the whole run (`keep_unpacked`):

    true   always, where there is anything to keep
    auto   on a CPU whose memory has room: the copies take a quarter of it at most, and the run's smallest micro-batch
           still fits without checkpointing, or with it where the recipe wants that anyway
           on a GPU where nothing else suffers: a micro-batch of `WIDE_TOKENS` fits beside them, with checkpointing only
           where one row needs it without copies, or where the recipe wants it

Kept or not, a step computes the same to the last bit: only speed and memory differ.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

from lorafit.errors import RecipeError
from lorafit.facts import DatasetFacts, DeviceFacts, ModelShape, PictureFacts
from lorafit.kinds.adapters import adapters
from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.quantizations import QuantizationSection, quantizations
from lorafit.kinds.section import PACKED
from lorafit.kinds.tasks import tasks
from lorafit.memory import Engine, StepMemory, StepShape, closed_form, covers, fits
from lorafit.memory.closed_form import unpacked_weights_bytes
from lorafit.ops.attention_kernels import VARLEN, takes_documents
from lorafit.ops.chunk_sizes import larger_chunk_bytes
from lorafit.ops.kernel_choice import planned_kernels
from lorafit.ops.recomputed_layers import Checkpointing
from lorafit.recipe.schema import Auto, Recipe

T = TypeVar("T")

HEADROOM = 0.05
LIKELY_CAPABILITY = (8, 0)
"""Of a GPU of which only the size is known; cards that compute bf16 differ little behind it."""
MOST_OF_MEMORY = 0.25
"""Share of usable memory that `auto` gives to unpacked copies: the rest makes micro-batches larger, which is faster."""

WIDE_TOKENS = 4096
"""A micro-batch that gives a GPU all the work it can take. Unpacking costs one as much as 160 more tokens (Llama-3.1-8B
on an H100, by bytes and operations): copies gain more than a micro-batch beyond this, and less than checkpointing."""


def given(value: T | Auto) -> T | None:
    """What the recipe says; None for `auto`."""
    return None if value == "auto" else value


def recipe_step(
    recipe: Recipe,
    shape: ModelShape,
    rows: DatasetFacts | None,
    device: DeviceFacts | None,
    *,
    headroom: float = HEADROOM,
    engine: Engine = closed_form,
    pictures: PictureFacts | None = None,
) -> StepMemory:
    """The step of a recipe.

    Args:
        recipe: The recipe.
        shape: Its model.
        rows: Its real rows; None: a row of data.max_length is assumed, of which every token may carry loss.
        device: Where the run happens; None: on a GPU that computes bf16, and `auto` keeps no unpacked copies.
        headroom: Share of the device's memory that stays free.
        engine: What answers for the step's memory.
        pictures: What is assumed of the images of a row, whose length is not known.

    Raises:
        RecipeError: A name of adapter or quantisation matches nothing, or sdpa was asked of a model with a soft-cap.
    """
    task = tasks.bind(recipe.task)
    longest, labels = task.assumed_row(min(recipe.data.max_length, shape.max_positions))
    if rows:
        longest, labels = rows.longest_tokens, rows.longest_trained_tokens
    dtype = resolve_dtype(recipe.model.dtype, device)
    quantization = quantizations.bind(recipe.model.quantization)
    quantization.check(shape)
    device_kind = "cpu" if device is not None and device.kind == "cpu" else "cuda"
    step = StepShape(
        model=shape,
        quantization=quantization,
        adapter=adapters.bind(recipe.adapter),
        optimizer=optimizers.bind(recipe.training.optimizer),
        row_tokens=longest,
        row_labels=labels,
        task=task,
        dtype=dtype,
        compute_dtype=resolve_compute_dtype(recipe, dtype),
        attention=estimated_attention(recipe, shape),
        device_kind=device_kind,
        kernels=planned_kernels(recipe.model.kernels, device_kind),
        capability=(device and device.capability) or LIKELY_CAPABILITY,
        packing=given(recipe.data.packing),
        max_grad_norm=recipe.training.max_grad_norm,
        pictures=rows.pictures if rows else pictures and replace(pictures, tokens=longest),
        held_rows=2 * math.ceil(recipe.training.batch_size / (device.count if device else 1)),
    )
    _ = step.trainable_parameters  # what the model's names and widths refuse is said before any dry run
    step = _packed(step, is_open=recipe.model.attention == "auto")
    checkpointing = _checkpointing(recipe, step)
    tokens = given(recipe.training.micro_batch_tokens)
    return with_room(StepMemory(step, engine, tokens, checkpointing), device, headroom)


def with_room(asked: StepMemory, device: DeviceFacts | None, headroom: float) -> StepMemory:
    """The step with what is faster where the device has room for it: larger chunks of the loss, unpacked copies."""
    asked = _with_chunks(asked, device, headroom)
    kept = asked.changed(keeps_unpacked=True)
    return kept if _keeps_unpacked(kept, device, headroom) else asked


def _checkpointing(recipe: Recipe, step: StepShape) -> Checkpointing | None:
    """What the recipe says; none for a method that cannot."""
    return given(recipe.training.gradient_checkpointing) if step.adapter.no_checkpointing is None else False


def _packed(step: StepShape, *, is_open: bool) -> StepShape:
    """The step with the attention that packed rows take where it is open, and no packing by itself where that is not
    to be had: on a CPU, of tasks and adapters that take one row a sequence.
    """
    is_whole = PACKED in {*step.task.unread, *step.adapter.unread}
    if step.packing is None and (step.device_kind == "cpu" or is_whole):
        return replace(step, packing=False)
    takes = step.attention == "sdpa" and takes_varlen(step)
    return replace(step, attention=VARLEN) if is_open and takes and step.packing is not False else step


def takes_varlen(step: StepShape) -> bool:
    """Whether packed rows are computed by torch's variable-length attention, with no mask."""
    shape = step.model
    is_usual = not (shape.attention_dropout or shape.scanning_layers or shape.math_attention)
    return step.device_kind == "cuda" and is_usual and takes_documents(step.capability, step.dtype, shape.head_dim)


def _with_chunks(asked: StepMemory, device: DeviceFacts | None, headroom: float) -> StepMemory:
    """The step with larger chunks of the loss, where a GPU has the memory and nothing else has to make room.

    What dry runs measure at two sizes lies on a line between them; a loss that is soon one large chunk would not.
    """
    if device is None or device.kind == "cpu" or not covers(asked.step):
        return asked
    chunk_bytes = larger_chunk_bytes(device.memory_bytes)
    if chunk_bytes is None:
        return asked
    larger = asked.changed(loss_chunk_bytes=chunk_bytes)
    found, without = larger.settle(device, headroom)
    return larger if without is None and fits(found, device.memory_bytes, headroom) else asked


def _keeps_unpacked(kept: StepMemory, device: DeviceFacts | None, headroom: float) -> bool:
    """Whether copies are kept: where there are any, and they are asked for or the device has room."""
    asked = asks_to_keep(kept.step.quantization.section)
    copies = unpacked_weights_bytes(kept.step) if asked is not False else 0
    if not copies or asked:
        return copies > 0
    if device is None:
        return False
    tokens, checkpointing = kept.least_tokens, kept.checkpointing or False
    if device.kind == "cpu":
        if copies > MOST_OF_MEMORY * device.memory_bytes:
            return False
    else:
        step_tokens = kept.step.row_tokens * kept.step.held_rows // 2
        tokens = max(tokens, min(WIDE_TOKENS, step_tokens)) if kept.tokens is None else tokens
        checkpointing = kept.changed(keeps_unpacked=False).settle(device, headroom)[0].gradient_checkpointing
    return fits(kept.at(tokens, checkpointing), device.memory_bytes, headroom)


def asks_to_keep(section: QuantizationSection) -> bool | None:
    """A recipe's `keep_unpacked`; False for kinds without it."""
    asked: bool | Auto = getattr(section, "keep_unpacked", False)
    return given(asked)


def resolve_dtype(asked: str, device: DeviceFacts | None) -> str:
    """`auto`: bf16 where the device computes it at speed (and where no device is named), else fp16 on a GPU, fp32 on
    a CPU."""
    if asked != "auto":
        return asked
    if device is None or device.bf16:
        return "bf16"
    return "fp32" if device.kind == "cpu" else "fp16"


def resolve_compute_dtype(recipe: Recipe, dtype: str) -> str:
    """Of products with dequantised weights; `auto` and kinds without the choice: the model's."""
    asked = getattr(recipe.model.quantization, "compute_dtype", "auto")
    return dtype if asked == "auto" else str(asked)


def estimated_attention(recipe: Recipe, shape: ModelShape) -> str:
    """What an estimate assumes for `auto`: sdpa, or eager where the model leaves no choice.

    Raises:
        RecipeError: The model's soft-cap on attention scores needs eager attention, and the recipe names one that has
            none.
    """
    asked = recipe.model.attention
    if shape.softcap and asked in ("sdpa", "fused", VARLEN):
        raise RecipeError(
            f"{asked} cannot apply the soft-cap that {shape.model_type} puts on attention scores",
            key="model.attention",
            todo="write eager, flash_attention_2 or auto",
        )
    if asked == "auto":
        return "eager" if shape.softcap or shape.no_sdpa else "sdpa"
    return asked
