"""What the exact engine (`lorafit.estimation.dry_run`) answers, in the terms of the closed form beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorafit.memory.estimate import COMPONENTS, CONTEXT_BYTES, needed_bytes

if TYPE_CHECKING:
    from lorafit.ops.live_tensors import LivePeak


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
    def context_bytes(self) -> int:
        """What the process takes before any tensor."""
        return CONTEXT_BYTES[self.device_kind]

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
