"""Where a step's time goes: `lorafit train --profile`. And how fast a run was, against what the machine can do.

    step 1              not counted: the libraries set themselves up
    steps 2 and 3       every operation recorded, into a trace for Perfetto (ui.perfetto.dev) or chrome://tracing
    the other steps     only the phases timed; shorter runs take what they have

    data        waiting for the step's micro-batches (they are built while the step before runs)
    forward     hidden states and loss, and the loss's gradient of the hidden states, which is computed there
    backward    the rest of the gradients
    optimizer   norm, clipping, update
    waiting     what is left: ranks for each other, the host for the device, the log

On a GPU the host waits for the device at every phase's end, so that times are the device's: a profiled run is slower.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import profile

from lorafit.console.wording import counted
from lorafit.contracts import JsonObject
from lorafit.files.atomic import atomic_file
from lorafit.files.cache import keep, kept, key_of_code
from lorafit.ops.matmul_peak import measure_matmul_peak, wait_for
from lorafit.trainer.state import FitResult

_LEAST_SECONDS = 2.0  # of training, below which its utilisation says nothing and the peak is not measured
PHASES = ("data", "forward", "backward", "optimizer", "waiting")
_TRACED_STEPS = (2, 3)
_SHOWN_OPERATIONS = 15


@dataclass(frozen=True)
class Speed:
    """Of a whole run, over its optimizer steps.

    Attributes:
        tokens_per_second: Real tokens.
        trained_tokens_per_second: Labels: tokens that carry loss, or a classifier's rows.
        padding_share: Of all tokens that went through the model (0 to 1).
        peak_flops_per_second: The fastest square product seen, over all devices; None: the run was too short to ask.
        model_flops_utilisation: Share of that peak that the model's own operations took (0 to 1).
    """

    tokens_per_second: float
    trained_tokens_per_second: float
    padding_share: float
    peak_flops_per_second: float | None
    model_flops_utilisation: float | None

    def to_json(self) -> JsonObject:
        """Plain values."""
        return asdict(self)

    def describe(self, loss_unit: str) -> str:
        """One line for people; what carries loss is the task's `loss_unit`."""
        rate = self.trained_tokens_per_second
        trained = counted(rate if rate < 10 else round(rate), loss_unit)
        parts = [
            f"{self.tokens_per_second:,.0f} tokens/s ({trained}/s)",
            f"{self.padding_share:.1%} padding",
        ]
        if self.model_flops_utilisation is not None and self.peak_flops_per_second:
            peak = self.peak_flops_per_second / 1e9
            parts.append(f"{self.model_flops_utilisation:.0%} of the measured peak of {peak:,.0f} GFLOP/s")
        return ", ".join(parts)


def measure_speed(
    fit: FitResult, *, model_flops: int, device: torch.device, devices: int, dtype: torch.dtype
) -> Speed | None:
    """Figures of a run; None where it took no time.

    Args:
        fit: Tokens and seconds.
        model_flops: Of all its steps, recomputation left out.
        device: This process's.
        devices: Processes that trained together.
        dtype: What products are computed in.
    """
    if fit.seconds <= 0:
        return None
    peak = find_peak(device, dtype) * devices if fit.seconds >= _LEAST_SECONDS else None
    return Speed(
        tokens_per_second=fit.tokens / fit.seconds,
        trained_tokens_per_second=fit.trained_tokens / fit.seconds,
        padding_share=1 - fit.tokens / fit.padded_tokens if fit.padded_tokens else 0.0,
        peak_flops_per_second=peak,
        model_flops_utilisation=model_flops / fit.seconds / peak if peak else None,
    )


def find_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The device's flops a second in square products, measured once for a machine, number of threads and this code."""
    name = f"peaks/{key_of_code([_name(device), str(dtype), torch.get_num_threads()])}.json"
    known = kept(name)
    if isinstance(known, float) and 0 < known < math.inf:
        return known
    peak = measure_matmul_peak(device, dtype)
    keep(name, peak)
    return peak


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        import platform

        return f"{platform.machine()} {platform.processor()}"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


class NoProfile:
    """Measures nothing."""

    def step(self) -> AbstractContextManager[None]:
        """Around an optimizer step."""
        return contextlib.nullcontext()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a part of it."""
        return contextlib.nullcontext()

    def finish(self) -> str | None:
        """Nothing to say."""
        return None


NO_PROFILE = NoProfile()


class StepProfile(NoProfile):
    """Times phases and records operations.

    Args:
        table_file: Gets the table, as text.
        trace_file: Gets the chrome trace, `.json.gz`.
        device: What the host waits for.
    """

    def __init__(self, table_file: Path, trace_file: Path, device: torch.device) -> None:
        self._table_file, self._trace_file, self._device = table_file, trace_file, device
        self._steps: list[dict[str, float]] = []
        self._seconds: dict[str, float] = {}
        self._operations = ""
        self._recorder: profile | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Times a step, and records its operations where it is one of the traced ones."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        number = len(self._steps) + 1
        if number == _TRACED_STEPS[0]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._recorder = torch.profiler.profile(activities=activities)
            self._recorder.start()
        began = self._now()
        yield
        seconds = self._now() - began
        self._seconds["waiting"] = seconds - sum(self._seconds.values())
        self._steps.append(self._seconds)
        if number == _TRACED_STEPS[-1]:
            self._stop_recording()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to a phase of this step."""
        with torch.profiler.record_function(f"lorafit: {name}"):
            began = self._now()
            yield
            self._seconds[name] += self._now() - began

    def finish(self) -> str | None:
        """Writes the table; returns it, or None where no step was taken."""
        self._stop_recording()
        if not self._steps:
            return None
        table = self._table()
        with atomic_file(self._table_file) as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
        return table

    def _now(self) -> float:
        wait_for(self._device)
        return time.perf_counter()

    def _stop_recording(self) -> None:
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        recorder.stop()
        with atomic_file(self._trace_file) as temporary, tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            recorder.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(temporary, "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target)
        kind = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        ranked = sorted(recorder.key_averages(), key=lambda event: getattr(event, kind), reverse=True)
        operations = [event for event in ranked if not event.key.startswith("lorafit: ")]
        total = sum(getattr(event, kind) for event in operations) or 1.0
        self._operations = "\n".join(
            f"{event.key[:48]:<48} {getattr(event, kind) / 1e3:>10.1f} ms {getattr(event, kind) / total:>6.1%}"
            f" {event.count:>8} calls"
            for event in operations[:_SHOWN_OPERATIONS]
        )

    def _table(self) -> str:
        taken = [s for number, s in enumerate(self._steps, 1) if number > 1 and number not in _TRACED_STEPS]
        taken = taken or self._steps[1:] or self._steps
        mean = {name: sum(step[name] for step in taken) / len(taken) for name in PHASES}
        whole = sum(mean.values()) or 1.0
        lines = [f"phase       seconds a step   share   (mean of {counted(len(taken), 'step')})"]
        lines += [f"{name:<11} {mean[name]:>14.4f} {mean[name] / whole:>7.1%}" for name in PHASES]
        lines.append(f"{'step':<11} {whole:>14.4f}")
        if self._operations:
            lines += ["", f"operations of steps {_TRACED_STEPS[0]} and {_TRACED_STEPS[-1]}, their own time", ""]
            lines += self._operations.splitlines()
        return "\n".join(lines)
