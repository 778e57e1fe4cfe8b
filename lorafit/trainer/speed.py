"""How fast a run was, against what the machine can do: tokens a second, padding, model flops utilisation."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorafit.contracts import JsonObject
from lorafit.files.atomic import write_json
from lorafit.files.cache import own_folder
from lorafit.files.strict_json import JsonError, read_json_file
from lorafit.ops.matmul_peak import measure_matmul_peak

if TYPE_CHECKING:
    from lorafit.trainer.state import FitResult

_LEAST_SECONDS = 2.0  # of training, below which its utilisation says nothing and the peak is not measured


@dataclass(frozen=True)
class Speed:
    """Of a whole run, over its optimizer steps.

    Attributes:
        tokens_per_second: Real tokens.
        trained_tokens_per_second: Those that carry loss.
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

    def describe(self) -> str:
        """One line for people."""
        parts = [
            f"{self.tokens_per_second:,.0f} tokens/s ({self.trained_tokens_per_second:,.0f} trained)",
            f"{self.padding_share:.1%} padding",
        ]
        if self.model_flops_utilisation is not None and self.peak_flops_per_second:
            peak = self.peak_flops_per_second / 1e9
            parts.append(f"{self.model_flops_utilisation:.0%} of the measured peak of {peak:,.0f} GFLOP/s")
        return ", ".join(parts)


def measure_speed(
    fit: FitResult, *, model_flops: int, device: torch.device, devices: int, dtype: torch.dtype, cache: Path
) -> Speed | None:
    """Figures of a run; None where it took no time.

    Args:
        fit: Tokens and seconds.
        model_flops: Of all its steps, recomputation left out.
        device: This process's.
        devices: Processes that trained together.
        dtype: What products are computed in.
        cache: Folder that keeps the machine's peak.
    """
    if fit.seconds <= 0:
        return None
    peak = find_peak(device, dtype, cache) * devices if fit.seconds >= _LEAST_SECONDS else None
    return Speed(
        tokens_per_second=fit.tokens / fit.seconds,
        trained_tokens_per_second=fit.trained_tokens / fit.seconds,
        padding_share=1 - fit.tokens / fit.padded_tokens if fit.padded_tokens else 0.0,
        peak_flops_per_second=peak,
        model_flops_utilisation=model_flops / fit.seconds / peak if peak else None,
    )


def find_peak(device: torch.device, dtype: torch.dtype, cache: Path) -> float:
    """The device's flops a second in square products, measured once for a machine, torch and number of threads."""
    key = {"device": _name(device), "dtype": str(dtype), "torch": torch.__version__, "threads": torch.get_num_threads()}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = cache / "peaks" / f"{name}.json"
    try:
        kept = read_json_file(file)
        if kept["machine"] == key and 0 < kept["flops_per_second"] < math.inf:
            return float(kept["flops_per_second"])
    except (OSError, JsonError, KeyError, TypeError):
        pass  # not measured yet, or not readable: measured now
    peak = measure_matmul_peak(device, dtype)
    own_folder(file.parent)
    write_json(file, {"machine": key, "flops_per_second": peak})
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
