"""What choosing each linear's kind takes of memory: a backward pass over the unquantised base, before the run's own."""

from __future__ import annotations

from dataclasses import replace

from lorafit.errors import DoesNotFitError
from lorafit.facts import DeviceFacts
from lorafit.kinds.adapters import adapters
from lorafit.kinds.quantizations import quantizations
from lorafit.machine.devices import format_bytes
from lorafit.memory import MemoryEstimate, StepMemory, closed_form, fits
from lorafit.memory.peak import Phase

CALIBRATION_TOKENS = 512
"""Padded tokens of a forward, where the longest row has fewer: each takes every linear's errors anew."""
_FP32_COPIES = 4  # of the largest weight: in fp32, once more where it lay across, rounded, and the error


def calibration_memory(memory: StepMemory) -> MemoryEstimate | None:
    """Its peak, by formulas; None where nothing is to be chosen.

    Counted as a LoRA step of rank 1 over the plain base with every layer recomputed, which keeps the same inputs, and
    the errors of the largest linear besides.
    """
    step = memory.step
    if not step.quantization.candidates():
        return None
    plain = memory.changed(
        quantization=quantizations.make("none"),
        adapter=adapters.make("lora", r=1, alpha=1, dropout=0.0),
        keeps_unpacked=False,
        packing=False,
    )
    found = closed_form(plain.step, max(CALIBRATION_TOKENS, step.row_tokens), True)
    largest = max(step.model.linears, key=lambda linear: linear.in_features * linear.out_features)
    tokens = found.micro_batch_tokens
    errors = 4 * (_FP32_COPIES * largest.in_features * largest.out_features)
    errors += 4 * tokens * (largest.in_features + 3 * largest.out_features)
    parts = found.peak_phase.parts
    together = {**parts, "workspace": parts.get("workspace", 0) + errors}
    return replace(found, phases=(Phase("backward", "errors of the largest linear", together),))


def require_calibration_fit(memory: StepMemory, device: DeviceFacts, headroom: float) -> None:
    """Called before any weight is loaded.

    Raises:
        DoesNotFitError: The unquantised base with one small micro-batch does not fit on the device.
    """
    found = calibration_memory(memory)
    if found is None or fits(found, device.memory_bytes, headroom):
        return
    need, have = format_bytes(found.needed_bytes), format_bytes(device.memory_bytes)
    what = (
        f"choosing each linear's kind takes the unquantised base and a backward pass: {need}; {device.name} has {have}"
    )
    todo = "copy the linears of card.json of a run on a larger machine into the recipe, or write quantization: nf4"
    raise DoesNotFitError(what, key="model.quantization", todo=todo)
