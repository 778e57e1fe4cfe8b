"""What a step shows: its figures, tokens a second, and peak memory beside the estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lorafit.ops.peak_memory import peak_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorafit.contracts import Progress, Reporter

_GIB = 2**30
_SMOOTHING = 0.9  # share of the old tokens/s in the shown one


def peak_reserved_bytes(device: torch.device) -> int | None:
    """Most memory that CUDA's caching allocator took from the card; None on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


class StepProgress:
    """The training bar: `training 12/240  loss 1.23  lr 1e-04  grad 0.5  812 tok/s  1.2 of 1.5 GiB`."""

    def __init__(
        self, reporter: Reporter, *, steps: int, done: int, device: torch.device, estimate_bytes: int | None
    ) -> None:
        if 0 < done < steps:
            reporter.info(f"resumed at step {done}")
        self._bar: Progress = reporter.track(steps, "training", done)
        self._device = device
        self._estimate_bytes = estimate_bytes
        self._tokens_per_second: float | None = None

    def __enter__(self) -> StepProgress:
        self._bar.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.__exit__(*exc)

    def show(self, line: Mapping[str, Any]) -> None:
        """Takes a step's line of metrics.jsonl."""
        now = line["tokens"] / max(line["seconds"], 1e-9)
        before = self._tokens_per_second
        self._tokens_per_second = now if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * now
        memory = f"{peak_memory_bytes(self._device) / _GIB:.2f}"
        if self._estimate_bytes is not None:
            memory += f" of est. {self._estimate_bytes / _GIB:.2f}"
        self._bar.advance(
            1,
            loss=line["loss"],
            lr=line["learning_rate"],
            grad="overflow" if line["grad_norm"] is None else line["grad_norm"],
            **{"tok/s": f"{self._tokens_per_second:.0f}", "GiB": memory},
        )
