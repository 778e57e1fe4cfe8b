"""The table that tutorials show: full fine-tuning, LoRA and QLoRA by precision, here computed for one recipe.

Full fine-tuning is nothing that lorafit does: it is described as transformers' Trainer does it with a model of that
dtype: weights, gradients and AdamW's two moments all in it, every linear's input kept, gradients made as the backward
pass goes, and the same chunked loss. `benchmarks/memory_published.py` holds that description against measured runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorafit.kinds.quantizations import quantizations
from lorafit.memory import labels_of
from lorafit.memory.estimate import ALLOCATOR_FACTOR, CONTEXT_BYTES, loss_bytes, step_phases
from lorafit.memory.layer_inputs import Numerics, Work
from lorafit.plan.step_memory import DTYPE_BYTES, MemoryQuestion

if TYPE_CHECKING:
    from lorafit.facts import DeviceFacts
    from lorafit.memory import MemoryEstimate


@dataclass(frozen=True, slots=True)
class Method:
    """One row.

    Attributes:
        name: `full`, `LoRA` or `QLoRA`.
        precision: Of the base weights.
        weights_bytes: Base, its constants and the adapter.
        temporary_bytes: What comes and goes, at its most: activations, logits, workspace, or the update's copies.
        fits: On the card that was named; None: none was.
    """

    name: str
    precision: str
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    temporary_bytes: int
    needed_bytes: int
    fits: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


def compare_methods(
    question: MemoryQuestion, tokens: int, checkpointing: bool, device: DeviceFacts | None, headroom: float
) -> tuple[Method, ...]:
    """Every method that has a meaning, with the recipe's rows, micro-batch, checkpointing, adapter and optimizer."""
    half = "bf16" if question.dtype == "fp32" else question.dtype
    found = [full_fine_tuning(question, dtype, tokens, checkpointing) for dtype in ("fp32", half)]
    adapted = (("LoRA", "none", "fp32"), ("LoRA", "none", half), ("QLoRA", "int8", half), ("QLoRA", "nf4", half))
    for name, kind, dtype in adapted:
        memory = with_quantization(question, kind, dtype).at(tokens, checkpointing)
        found.append(_row(name, dtype if kind == "none" else kind, memory))
    if device is None:
        return tuple(found)
    limit = device.memory_bytes * (1.0 - headroom)
    return tuple(replace(method, fits=method.needed_bytes <= limit) for method in found)


def with_quantization(question: MemoryQuestion, kind: str, dtype: str) -> MemoryQuestion:
    """The same recipe on a base stored otherwise."""
    asked = question.recipe.model.quantization
    section = asked if asked.kind == kind else quantizations.make_section(kind)
    model = question.recipe.model.model_copy(update={"quantization": section})
    return replace(question, recipe=question.recipe.model_copy(update={"model": model}), dtype=dtype)


def full_fine_tuning(question: MemoryQuestion, dtype: str, tokens: int, checkpointing: bool) -> Method:
    """All weights trained with AdamW, everything in one dtype."""
    shape, width = question.shape, DTYPE_BYTES[dtype]
    numerics = Numerics(
        stream_bytes=width,
        compute_bytes=width,
        adapter_bytes=width,
        autocast=False,
        device_kind="cpu" if question.device_kind == "cpu" else "cuda",
        keeps_inputs=True,
        fused=False,
    )
    work = Work(question.longest_tokens, (), 0, 0.0, question.attention, lambda _: 0, numerics)
    labels = labels_of(tokens, question.longest_tokens, question.longest_trained_tokens)
    parameters = shape.total_parameters
    phases = step_phases(shape, work, tokens, loss_bytes(shape, numerics, labels), checkpointing, parameters)
    weights = gradients = width * parameters
    moments = 2 * width * parameters
    # at the start of the backward pass there are no gradients yet; at the update they stand beside foreach AdamW's
    # denominators
    moving = max([2 * gradients, *(phase.total_bytes for phase in phases if phase.name != "update")])
    needed = round((weights + moments + moving) * ALLOCATOR_FACTOR[numerics.device_kind])
    return Method(
        "full", dtype, weights, gradients, moments, moving - gradients, needed + CONTEXT_BYTES[numerics.device_kind]
    )


def _row(name: str, precision: str, memory: MemoryEstimate) -> Method:
    parts = dict(memory.components)
    weights = sum(map(parts.pop, ("base_weights", "quantization_constants", "unpacked_weights", "adapter")))
    gradients, moments = parts.pop("gradients"), parts.pop("optimizer_state")
    return Method(name, precision, weights, gradients, moments, sum(parts.values()), memory.needed_bytes)
