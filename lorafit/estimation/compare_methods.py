"""The table that tutorials show: full fine-tuning, LoRA and QLoRA by precision, here computed for one recipe.

Full fine-tuning is described as transformers' Trainer does it with a model of that dtype, not as the adapter `full`,
which keeps the base beside what is trained: weights, gradients and AdamW's two moments all in it, every linear's input
kept, gradients made as the backward pass goes, and the same chunked loss.
`benchmarks/memory_published.py` holds that description against measured runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafit.facts import DeviceFacts
from lorafit.kinds.adapters import refusal
from lorafit.kinds.quantizations import quantizations
from lorafit.memory import MemoryEstimate, Phase, StepMemory, StepShape
from lorafit.memory.closed_form import loss_bytes, step_phases
from lorafit.memory.layer import Layer
from lorafit.memory.peak import FIXED
from lorafit.memory.step_shape import DTYPE_BYTES
from lorafit.ops.recomputed_layers import Checkpointing


@dataclass(frozen=True, slots=True)
class Method:
    """One row.

    Attributes:
        name: `full`; `LoRA` or `QLoRA`, or `adapter` and the kind of any other method.
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


def compare_methods(
    memory: StepMemory, tokens: int, checkpointing: Checkpointing, device: DeviceFacts | None, headroom: float
) -> tuple[Method, ...]:
    """Every method that has a meaning, with the recipe's rows, micro-batch, checkpointing, adapter and optimizer.

    Full fine-tuning is left out where formulas do not count all layers: nobody's dry run is of that.
    """
    step = memory.step
    half = "bf16" if step.dtype == "fp32" else step.dtype
    found = []
    if not step.model.scanning_layers:
        found += [_row("full", dtype, full_fine_tuning(step, dtype, tokens, checkpointing)) for dtype in ("fp32", half)]
    adapted = [("none", "fp32"), ("none", half), ("int8", half), ("nf4", half)]
    own, method = step.quantization.section.kind, step.adapter.section.kind
    adapted += [(own, half)] if own not in [kind for kind, _ in adapted] else []
    for kind, dtype in adapted:
        lora = "LoRA" if kind == "none" else "QLoRA"
        if kind != own and refusal(step.adapter.section, quantizations.make(kind)) is not None:
            continue
        stored = replace(memory, step=_stored_as(step, kind, dtype)).at(tokens, checkpointing)
        found.append(_row(lora if method == "lora" else f"adapter {method}", dtype if kind == "none" else kind, stored))
    if device is None:
        return tuple(found)
    limit = device.memory_bytes * (1.0 - headroom)
    return tuple(replace(method, fits=method.needed_bytes <= limit) for method in found)


def _stored_as(step: StepShape, kind: str, dtype: str) -> StepShape:
    """The same step over a base in another precision."""
    quantization = step.quantization if step.quantization.section.kind == kind else quantizations.make(kind)
    compute_dtype = step.compute_dtype if dtype == step.dtype else dtype
    return replace(step, quantization=quantization, dtype=dtype, compute_dtype=compute_dtype)


def full_fine_tuning(step: StepShape, dtype: str, tokens: int, checkpointing: Checkpointing) -> MemoryEstimate:
    """All weights trained with AdamW, everything in one dtype."""
    shape, width, device_kind = step.model, DTYPE_BYTES[dtype], step.device_kind
    layer = Layer(
        shape=shape,
        row_tokens=step.row_tokens,
        adapted=(),
        rank=0,
        dropout=0.0,
        attention=step.attention,
        dequantised_bytes=lambda linear: 0,
        compute_bytes=width,
        autocast=False,
        device_kind=device_kind,
        keeps_input=lambda linear: True,
        fused=False,
    )
    loss = loss_bytes(layer, replace(step, packing=False).labels_at(tokens), step.chunk_labels)
    parameters = shape.total_parameters
    weights = gradients = width * parameters
    # at the start of the backward pass there are no gradients yet; at the update they stand beside foreach AdamW's
    # denominators
    phases = step_phases(layer, tokens, loss, checkpointing, parameters)
    moving = max([2 * gradients, *(phase.total_bytes for phase in phases if phase.name != "update")])
    return MemoryEstimate(
        fixed={"base_weights": weights, "gradients": gradients, "optimizer_state": 2 * width * parameters},
        phases=(Phase("update", "", {"workspace": moving - gradients}),),
        device_kind=device_kind,
        micro_batch_tokens=tokens,
        gradient_checkpointing=checkpointing,
    )


def _row(name: str, precision: str, memory: MemoryEstimate) -> Method:
    parts = memory.components
    weights = sum(parts[part] for part in FIXED if part not in ("gradients", "optimizer_state"))
    gradients, moments = parts["gradients"], parts["optimizer_state"]
    temporary = memory.tensor_bytes - weights - gradients - moments
    return Method(name, precision, weights, gradients, moments, temporary, memory.needed_bytes)
