"""Which table of operations a run takes (`lorafit.ops.kernels`), by recipe, device and what is installed.

    none    lorafit's own, in torch's operations
    liger   those of the package liger-kernel; an operation that computes anything else on this device is left out

torch is imported only where a table is made: a plan asks which it will be.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lorafit.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Reporter
    from lorafit.ops.kernels import Kernels

KEY = "model.kernels"
_PACKAGES = ("liger_kernel", "triton")


def has_liger() -> bool:
    """Whether the packages are there; neither is imported."""
    return all(find_spec(name) is not None for name in _PACKAGES)


def planned_kernels(asked: str, device_kind: str) -> str:
    """`liger` or `none`: what a run on such a device will take, if its operations prove right there."""
    takes_liger = asked == "liger" or (asked == "auto" and device_kind == "cuda" and has_liger())
    return "liger" if takes_liger else "none"


def check_kernels(asked: str, device_kind: str) -> None:
    """Refuses what this machine cannot run.

    Raises:
        RecipeError: Liger's kernels are asked for, and there is no CUDA GPU, or they are not installed.
    """
    if asked == "liger" and device_kind != "cuda":
        raise RecipeError("Liger's kernels need a CUDA GPU", key=KEY, todo="write auto or none")
    if asked == "liger" and not has_liger():
        todo = "pip install 'lorafit[liger]', or write auto or none"
        raise RecipeError("the package liger-kernel is not installed", key=KEY, todo=todo)


def choose_kernels(planned: str, device: torch.device, dtype: torch.dtype, reporter: Reporter) -> Kernels:
    """The table, each operation compared with the plain one on the device; those that differ are left out, and named.

    Args:
        planned: `liger` or `none`.
        device: Where the model will be.
        dtype: Of its activations.
        reporter: Told what is left out.
    """
    from lorafit.ops.kernels import FUSED, PLAIN

    if device.type != "cuda":
        return PLAIN
    chosen = _proven(FUSED, PLAIN, device, dtype, reporter)
    if planned != "liger":
        return chosen
    from lorafit.ops.liger import LIGER

    return _proven(LIGER, chosen, device, dtype, reporter)


def describe_versions(kernels: Kernels) -> str:
    """The table and the versions behind it, as a checkpoint records it; empty for lorafit's own."""
    if not kernels.name.startswith("liger"):
        return ""
    from triton import __version__  # its package has other names elsewhere

    return f"{kernels.name}, liger-kernel {version('liger-kernel')}, triton {__version__}"


def _proven(
    kernels: Kernels, instead: Kernels, device: torch.device, dtype: torch.dtype, reporter: Reporter
) -> Kernels:
    from lorafit.ops.kernel_proof import prove_kernels

    proven, left_out = prove_kernels(kernels, instead, device, dtype)
    whose = "Liger's" if kernels.name == "liger" else "the card's"
    for operation, why in left_out.items():
        reporter.warn(f"{whose} {operation} is left out: {why}")
    name = f"{kernels.name} without {', '.join(left_out)}" if left_out and kernels.name == "liger" else kernels.name
    return replace(proven, name=name)
