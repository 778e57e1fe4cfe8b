"""The operations that `lorafit train --profile` recorded of a run: counted, and told apart by what they lie in."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

STEPS = 2  # that a profile records: the second and the third
_OPTIMIZER = "Optimizer.step#"
_PHASE = "lorafit: "
VARIABLE_LENGTH = "flash by lengths"
_KERNELS = {  # operations by what they mean: those of a forward
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash for CPUs",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_flash_attention_forward": "flash",
    "_efficient_attention_forward": "efficient",
    "_varlen_attn": VARIABLE_LENGTH,
    "_CausalAttention": "lorafit's blocks",
    "_scaled_dot_product_attention_math": "math",
}


class Trace:
    """Of one run folder.

    Attributes:
        counts: Calls by name, over the recorded steps.
    """

    def __init__(self, run: Path) -> None:
        with gzip.open(run / "trace.json.gz", "rt", encoding="utf-8") as file:
            recorded = json.load(file)["traceEvents"]
        self._events: list[dict[str, Any]] = [event for event in recorded if event.get("ph") == "X"]
        self.counts = Counter(event["name"] for event in self._events)

    def attention(self) -> list[str]:
        """The attention kernels that ran, by their names among people; `math` keeps the scores."""
        bare = {name.removeprefix("aten::").removeprefix("torch_attn::") for name in self.counts}
        return sorted({_KERNELS[name] for name in bare if name in _KERNELS})

    def host_waits(self, device: str) -> float:
        """How often a step made the host wait for the device.

        On a card: `cudaStreamSynchronize`, and inside of the optimizer `cudaDeviceSynchronize` (elsewhere that is the
        profile's own). On a CPU, where nobody waits: reads of a number out of a tensor, which would wait on a card. The
        optimizer's are left out there: its count of steps is a tensor on the host on either device.
        """
        if device == "cpu":
            return (self.counts["aten::_local_scalar_dense"] - self._in_optimizer("aten::_local_scalar_dense")) / STEPS
        return (self.counts["cudaStreamSynchronize"] + self._in_optimizer("cudaDeviceSynchronize")) / STEPS

    def copies_to_host(self) -> float:
        """Of a step, from a card."""
        return sum(number for name, number in self.counts.items() if name.startswith("Memcpy DtoH")) / STEPS

    def launches(self) -> float:
        """Kernels launched a step."""
        return sum(number for name, number in self.counts.items() if "LaunchKernel" in name) / STEPS

    def device_share(self) -> float:
        """Share of the steps' time in which a kernel ran on the card, the host waiting at each phase's end."""
        busy = sum(event["dur"] for event in self._events if event.get("cat") == "kernel")
        phases = [event for event in self._events if event["name"].startswith(_PHASE) and "tid" in event]
        began, ended = min(e["ts"] for e in phases), max(e["ts"] + e["dur"] for e in phases)
        return float(busy / max(1e-9, ended - began))

    def micro_batches(self) -> float:
        """Of a step."""
        return self.counts[f"{_PHASE}forward"] / STEPS

    def _in_optimizer(self, name: str) -> int:
        updates = [event for event in self._events if event["name"].startswith(_OPTIMIZER)]

        def lies_in(event: dict[str, Any], update: dict[str, Any]) -> bool:
            same = event["tid"] == update["tid"]
            return bool(same and update["ts"] <= event["ts"] <= update["ts"] + update["dur"])

        asked = [event for event in self._events if event["name"] == name]
        return sum(any(lies_in(event, update) for update in updates) for event in asked)
