"""Memory of this process: the most it held, of a GPU as torch allocated it, of a CPU as the system counts resident
pages; what was freed, given back; telling that there was none left, and going on with half as much at once."""

from __future__ import annotations

import ctypes
import errno
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

_OF_SELF = Path("/proc/self")
_RAN_OUT = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_cpu",
    "bad_alloc",
    "_status_alloc_failed",  # of cuBLAS, cuDNN, cuSOLVER, cuSPARSE: their workspaces on a nearly full card
)

Member = TypeVar("Member")
Made = TypeVar("Made")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held since the start or `forget_peak_memory`: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux" and (high := _high_water_bytes()) is not None:
        return high
    import resource

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def peak_reserved_bytes(device: torch.device) -> int | None:
    """Most memory that CUDA's caching allocator took from the card; None on a CPU."""
    import torch

    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def forget_peak_memory(device: torch.device, *, of_process: bool = True) -> bool:
    """Lets the peak begin anew at what is held now; whether that could be done.

    Args:
        device: Whose peak.
        of_process: On a CPU too, where it is that of all the process does.

    Source: proc_pid_clear_refs(5): writing 5 resets the peak resident set size. Other systems have no such thing.
    """
    if device.type == "cuda":
        import torch

        release_memory(device)  # else what the allocator keeps for later counts as taken
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if not of_process:
        return False
    try:
        (_OF_SELF / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _high_water_bytes() -> int | None:
    """VmHWM. Not ru_maxrss: that begins with the peak of the process which started this one, and cannot begin anew."""
    try:
        lines = (_OF_SELF / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)


def trim_heap() -> None:
    """Returns free pages of the C library's heap, whose arenas keep what was freed between blocks still in use.

    Source: malloc_trim(3) of the GNU C library; other allocators are left to themselves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def release_memory(device: torch.device) -> None:
    """Gives cached blocks back, so that the next try starts from an unbroken pool."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    else:
        trim_heap()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory; torch's CPU allocator and CUDA's libraries raise a plain
    RuntimeError, the system an OSError.
    """
    torch = sys.modules.get("torch")  # where nobody imported it, no error is torch's
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _RAN_OUT)


def run_or_halve(
    run: Callable[[Sequence[Member]], Made], groups: Iterable[Sequence[Member]], device: torch.device
) -> Iterator[tuple[Sequence[Member], Made]]:
    """Each group with what `run` makes of it; one that memory does not hold is cut in two, and both halves are run.

    Raises:
        Exception: What `run` raised for a group of one, or for another reason than memory.
    """
    waiting = list(groups)[::-1]
    while waiting:
        group = waiting.pop()
        try:
            made = run(group)
        except (RuntimeError, MemoryError) as error:
            if len(group) == 1 or not is_out_of_memory(error):
                raise
        else:
            yield group, made
            continue
        release_memory(device)  # outside of the except block, whose traceback holds the activations
        waiting += [group[len(group) // 2 :], group[: len(group) // 2]]
