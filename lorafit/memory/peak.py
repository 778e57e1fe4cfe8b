"""`MemoryEstimate`: the answer of either engine, what stays and what comes and goes, and whether a device has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorafit.contracts import JsonObject
from lorafit.machine.devices import CUDA_CONTEXT_BYTES
from lorafit.ops.recomputed_layers import Checkpointing

ALLOCATOR_FACTOR = {"cuda": 1.10, "cpu": 1.40}
"""Reserved beside allocated: torch's caching allocator rounds and fragments. Source: the published fms-hf-tuning
benchmark, fused-loss rows, (nvidia-smi - context) / max_memory_allocated = 1.10; lower with short, equal rows, higher
with full logits. On a CPU: resident memory less context over live tensors, 0.9 to 1.5 in the 24 runs of
benchmarks/memory_measured.py (the C library keeps what was freed, oneDNN its buffers, loading its copies)."""

CONTEXT_BYTES = {"cuda": CUDA_CONTEXT_BYTES, "cpu": 600 * 2**20}
"""What a process takes before any tensor. On a CPU: interpreter and libraries, as resident
memory: 410 MiB measured with torch, transformers, peft, bitsandbytes and accelerate; datasets, arrow and the tokenizer
are the rest."""

PHASES = ("forward", "loss", "backward", "update")
FIXED = ("base_weights", "quantization_constants", "unpacked_weights", "adapter", "gradients", "optimizer_state")
MADE_BY_STEPS = ("unpacked_weights", "gradients", "optimizer_state")
"""Of those, what is not there before the first step."""
COMPONENTS = (*FIXED, "kept_activations", "recomputation", "loss", "workspace")
"""Everything that is a tensor, in the order of the table."""


@dataclass(frozen=True, slots=True)
class Phase:
    """The worst moment of one part of a step.

    Attributes:
        name: `forward`, `loss`, `backward` or `update`; `start`: the adapter's first values, before all of them.
        where: The operation of that moment; empty where there is but one.
        parts: Bytes by component, beside the fixed ones; casts of the adapter's weights are part of `adapter`.
    """

    name: str
    where: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak memory of one training process, itemised at its worst moment.

    Attributes:
        fixed: Components that stay for the whole step, in bytes.
        phases: forward, loss, backward, update; before them `start`, where that takes more than any of them.
        device_kind: `cpu` or `cuda`.
        micro_batch_tokens: Padded tokens of the forward that was estimated.
        gradient_checkpointing: With what it was estimated.
        paged_bytes: Optimizer state among the fixed that a paged optimizer can move to host memory.
        unquantized_expert_bytes: Experts of a mixture among the base weights: no quantisation touches them.
        counts_all: Whether every layer's activations are counted; else the estimate is too low.
        counts_pictures: Whether what is made of images before the language model is counted.
    """

    fixed: Mapping[str, int]
    phases: tuple[Phase, ...]
    device_kind: str
    micro_batch_tokens: int
    gradient_checkpointing: Checkpointing
    paged_bytes: int = 0
    unquantized_expert_bytes: int = 0
    counts_all: bool = True
    counts_pictures: bool = False

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    @property
    def components(self) -> dict[str, int]:
        """Bytes by component at the peak, in the order of the table; they add up to `tensor_bytes`."""
        parts = self.peak_phase.parts
        return {name: self.fixed.get(name, 0) + parts.get(name, 0) for name in COMPONENTS}

    @property
    def tensor_bytes(self) -> int:
        """Peak of live tensors: what `torch.cuda.max_memory_allocated` reports."""
        return sum(self.fixed.values()) + self.peak_phase.total_bytes

    @property
    def context_bytes(self) -> int:
        """What the process takes before any tensor."""
        return CONTEXT_BYTES[self.device_kind]

    @property
    def needed_bytes(self) -> int:
        """What the card must have: tensors x allocator factor + context."""
        return round(self.tensor_bytes * ALLOCATOR_FACTOR[self.device_kind]) + self.context_bytes

    def to_json(self) -> JsonObject:
        """Plain numbers, in bytes."""
        return {
            "components_bytes": self.components,
            "phases_bytes": {phase.name: phase.total_bytes + sum(self.fixed.values()) for phase in self.phases},
            "peak_phase": self.peak_phase.name,
            "peak_where": self.peak_phase.where,
            "tensor_bytes": self.tensor_bytes,
            "allocator_factor": ALLOCATOR_FACTOR[self.device_kind],
            "context_bytes": self.context_bytes,
            "needed_bytes": self.needed_bytes,
            "device_kind": self.device_kind,
            "micro_batch_tokens": self.micro_batch_tokens,
            "gradient_checkpointing": self.gradient_checkpointing,
            "paged_bytes": self.paged_bytes,
            "unquantized_expert_bytes": self.unquantized_expert_bytes,
        }


def fits(estimate: MemoryEstimate, device_bytes: int, headroom: float = 0.05) -> bool:
    """Tensors x allocator factor + context <= usable memory x (1 - headroom)."""
    return estimate.needed_bytes <= device_bytes * (1.0 - headroom)
