"""What is told of a run while it trains: metrics.jsonl, trackers, the bar, and what watches over a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lorafit.contracts import JsonMapping
from lorafit.ops.live_tensors import LivePeak, LiveTensors, watching
from lorafit.ops.peak_memory import peak_memory_bytes
from lorafit.trainer.profile import NO_PROFILE, NoProfile

if TYPE_CHECKING:
    from lorafit.contracts import Progress, Reporter
    from lorafit.trainer.metrics_log import MetricsLog
    from lorafit.trainer.tracking import Trackers

_GIB = 2**30
_SMOOTHING = 0.9  # share of the old tokens/s in the shown one


@dataclass
class Journal:
    """Tells everybody who listens what a run does.

    Attributes:
        reporter: The console.
        log: metrics.jsonl.
        trackers: accelerate's; None: none.
        profile: Times the parts of a step.
        counts_memory: Live tensors are counted in every step, which makes each slower.
        estimate_bytes: Estimated peak memory, shown beside the measured one.
        live_peak: The worst moment of live tensors so far, where they are counted.
    """

    reporter: Reporter
    log: MetricsLog
    trackers: Trackers | None = None
    profile: NoProfile = NO_PROFILE
    counts_memory: bool = False
    estimate_bytes: int | None = None
    live_peak: LivePeak | None = field(default=None, init=False)
    _bar: Progress = field(init=False)
    _device: torch.device = field(init=False)
    _tokens_per_second: float | None = field(default=None, init=False)

    @contextlib.contextmanager
    def tracking(self, steps: int, done: int, device: torch.device) -> Iterator[None]:
        """The training bar: `training 12/240  loss 1.23  lr 1e-04  grad 0.5  812 tok/s  1.2 of 1.5 GiB`."""
        if 0 < done < steps:
            self.reporter.info(f"resumed at step {done}")
        self._device, self._tokens_per_second = device, None
        with self.reporter.track(steps, "training", done) as self._bar:
            yield

    @contextlib.contextmanager
    def watching(self, objective: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Around an optimizer step: profiles it, and keeps the worst moment of live tensors, where asked for."""
        live = LiveTensors() if self.counts_memory else None
        with self.profile.step(), watching(live, objective, optimizer) if live else contextlib.nullcontext():
            yield
        if live is not None and (self.live_peak is None or live.peak().tensor_bytes > self.live_peak.tensor_bytes):
            self.live_peak = live.peak()

    def write(self, values: JsonMapping) -> None:
        """Into metrics.jsonl, and to the trackers; of several ranks the first one writes."""
        self.log.write(values)
        if self.trackers is not None:
            self.trackers.log(values)

    def show(self, line: JsonMapping) -> None:
        """Takes a step's line of metrics.jsonl to the bar."""
        now = line["tokens"] / max(line["seconds"], 1e-9)
        before = self._tokens_per_second
        self._tokens_per_second = now if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * now
        memory = f"{peak_memory_bytes(self._device) / _GIB:.2f}"
        if self.estimate_bytes is not None:
            memory += f" of est. {self.estimate_bytes / _GIB:.2f}"
        self._bar.advance(
            1,
            loss=line["loss"],
            lr=line["learning_rate"],
            grad="overflow" if line["grad_norm"] is None else line["grad_norm"],
            **{"tok/s": f"{self._tokens_per_second:.0f}", "GiB": memory},
        )
