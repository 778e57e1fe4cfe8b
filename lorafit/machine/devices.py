"""Where a run happens: the device of this process, or a card named on the command line.

torch is imported only where a GPU may have to be asked; sizes and names of cards need none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorafit.console.wording import first_line
from lorafit.errors import ResourceError, UsageError
from lorafit.facts import DeviceFacts
from lorafit.machine.hardware import FIRST_WITH_BF16, capability_of, choose_card, find_card, nearest_cards, usable_bytes

if TYPE_CHECKING:
    import torch

_UNITS = {
    "": 2**30,
    "g": 2**30,
    "gib": 2**30,
    "gb": 10**9,
    "m": 2**20,
    "mib": 2**20,
    "mb": 10**6,
    "t": 2**40,
    "tib": 2**40,
    "tb": 10**12,
}
_SIZE = re.compile(r"^\s*([+-]?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*$", re.IGNORECASE)
_SMALLEST_BYTES, _LARGEST_BYTES = 2**28, 2**44
_RANGE = "0.25GiB to 16384GiB"
_LARGEST_BARE_GIB = 512  # more than a card has: a number without a unit above it is a card's
CUDA_CONTEXT_BYTES = 512 * 2**20
"""CUDA context and kernels of a process: 0.4-0.6 GiB by card and driver."""
_BUILD = re.compile(r"(?P<code>sm|compute)_(?P<major>[0-9]+)(?P<minor>[0-9])(?P<only>[a-z]?)")
_SIGNS_OF_A_CARD = ((Path("/dev"), "nvidia[0-9]*"), (Path("/usr/lib/wsl/lib"), "libcuda.so.1"))
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_MEAN_THE_CPU = "put CUDA_VISIBLE_DEVICES= before the command to mean the CPU"
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86; the last is what Linux calls it on Arm


def parse_gpu(text: str, flag: str = "--gpu") -> DeviceFacts:
    """What `--gpu` means: a card's name, a size, or `cpu`, which is this machine without its GPU.

    Raises:
        UsageError: Neither; or the size is out of range, or several cards are called so.
    """
    if text.strip().lower() == "cpu":
        return read_device("cpu")
    if (card := choose_card(text, flag)) is not None:
        capability = capability_of(card)
        bf16 = capability >= FIRST_WITH_BF16
        return DeviceFacts("cuda", str(card["names"][0]), usable_bytes(card), bf16, capability=capability)
    match = _SIZE.match(text)
    if match is None or _is_no_size(match[1], match[2].lower()):
        close = nearest_cards(text)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        sizes = f"a size lies in the range {_RANGE}, e.g. 24GiB or 24GB, without a unit in GiB"
        todo = f"{hint}--gpu list names all; {sizes}"
        raise UsageError(f"'{text}' is no known card", key=flag, todo=todo)
    number, unit = float(match[1]), match[2].lower()
    if unit not in _UNITS:
        raise UsageError(f"'{text}' has no unit of memory", key=flag, todo="write for example 24GiB or 24GB")
    if not _SMALLEST_BYTES <= number * _UNITS[unit] <= _LARGEST_BYTES:
        raise UsageError(f"'{text}' is out of range", key=flag, todo=f"a size lies in the range {_RANGE}")
    size = round(number * _UNITS[unit])
    shown = format_bytes(size)
    if unit in ("gb", "mb", "tb"):  # 10^9: the label of a card, which the tables give in GiB
        shown = f"{match[1]} {match[2].upper()} = {shown}"
    elif not unit:
        shown = f"{shown} (no unit means GiB)"
    return DeviceFacts(kind="cuda", name=f"a GPU of {shown}", memory_bytes=size, bf16=True)


def _is_no_size(number: str, unit: str) -> bool:
    """Whether what is written like a size means a card: `1660`, `1080ti`, `4070 laptop`."""
    if unit:
        return unit not in _UNITS and number.isdecimal() and len(number) >= 3
    return float(number) > _LARGEST_BARE_GIB


def peak_flops(device: DeviceFacts) -> float | None:
    """Of dense products in 16 bits, a second; None where the card is not in `configs/hardware`."""
    card = find_card(device.name) if device.kind == "cuda" else None
    return None if card is None else float(card["peak_tflops"]) * 1e12


def format_bytes(size: int | float) -> str:
    """`24 GiB`, `1.5 GiB`, `310 MiB`, `12 KiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            value = size / scale
            return f"{value:.0f} {unit}" if value >= 100 or value == round(value) else f"{value:.3g} {unit}"
    return f"{size:.0f} B"


def read_device(kind: Literal["auto", "cpu"] = "auto") -> DeviceFacts:
    """The device that this process trains on: a card that torch can use where there is one, else the CPU.

    `cpu`, as an empty CUDA_VISIBLE_DEVICES, means the CPU and looks for no card.

    Raises:
        ResourceError: There is a card, and the installed torch or the driver cannot use it.
    """
    processes = max(1, int(os.environ.get("WORLD_SIZE", "1") or 1))
    note = ""
    if kind == "auto":
        import torch

        if torch.cuda.is_available():
            return _read_card(processes)
        _require_no_card()
        if torch.backends.mps.is_available():
            note = "the run takes the CPU: Apple's GPU is not supported, since no resume or merge is proven on it"
    return DeviceFacts("cpu", "cpu", cpu_memory_bytes() // processes, _cpu_has_bf16(), processes, note=note)


def own_device(kind: str) -> torch.device:
    """Of this process: its card is that of its local rank."""
    import torch

    if kind != "cuda":
        return torch.device(kind)
    local_rank = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _read_card(processes: int) -> DeviceFacts:
    """The card of this process, which is that of its local rank.

    Memory is what this process may have in all: what is free, and what it holds, its CUDA context too. A card that
    shares the host's memory counts the host's file cache as taken, which makes room when asked.
    """
    import torch

    index = own_device("cuda").index
    properties = torch.cuda.get_device_properties(index)
    capability, built_for = (properties.major, properties.minor), torch.cuda.get_arch_list()
    if not torch.version.hip and not _runs_on(capability, built_for):
        what = (
            f"{properties.name} has compute capability {properties.major}.{properties.minor}, and torch "
            f"{torch.__version__} was built for {', '.join(built_for)} alone"
        )
        raise ResourceError(what, todo=f"install a torch that was built for this card, or {_MEAN_THE_CPU}")
    if properties.is_integrated:
        free = cpu_memory_bytes()
    else:
        free = torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index) + CUDA_CONTEXT_BYTES
    bf16 = capability >= FIRST_WITH_BF16
    return DeviceFacts("cuda", properties.name, min(properties.total_memory, free), bf16, processes, capability)


def _runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a card of this capability runs one of torch's builds, e.g. `sm_80` or `compute_120`.

    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility": machine code (sm) runs on the
    same major capability from its minor one on, PTX (compute) on any later one; what ends in a letter, on its own.
    """
    for build in built_for:
        if (match := _BUILD.fullmatch(build)) is None:
            continue
        made_for = (int(match["major"]), int(match["minor"]))
        is_later = capability >= made_for and (match["code"] == "compute" or capability[0] == made_for[0])
        if capability == made_for or (is_later and not match["only"]):
            return True
    return False


def seems_to_have_card() -> bool:
    """Whether this machine has a card of NVIDIA's that nobody hid: a look at files, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    is_hidden = visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles")
    return not is_hidden and any(any(place.glob(name)) for place, name in _SIGNS_OF_A_CARD)


def _require_no_card() -> None:
    """Raises a ResourceError where this machine has a card of NVIDIA's that nobody hid and torch cannot use."""
    import torch

    if not seems_to_have_card():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        what = f"this machine has a card, and torch {torch.__version__} was built without CUDA"
        raise ResourceError(what, todo=f"install torch's build for CUDA, or {_MEAN_THE_CPU}")
    why = "it finds none"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # "The NVIDIA driver on your system is too old (found version 12020). Please ..."
        why = first_line(error).split(". ")[0]
    what = f"torch {torch.__version__} for CUDA {torch.version.cuda} cannot use this machine's card"
    if (driver := _driver_version()) is not None:
        what += f" with driver {driver}"
    todo = "look whether nvidia-smi lists it"
    if visible is not None:
        what, todo = f"{what} and CUDA_VISIBLE_DEVICES={visible}", "name one that nvidia-smi lists"
    if "driver" in why:
        todo = "update the driver, or install a torch for an older CUDA"
    raise ResourceError(f"{what}: {why}", todo=f"{todo}, or {_MEAN_THE_CPU}")


def _driver_version() -> str | None:
    """Of NVIDIA's kernel module, e.g. `535.183.01`."""
    try:
        text = _DRIVER_FILE.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return match[0] if (match := re.search(r"[0-9]+\.[0-9.]+[0-9]", text)) else None


def cpu_memory_bytes() -> int:
    """Memory this process may have in all: the smaller of available RAM, the control group's limit and `ulimit -v`.

    What the process holds already counts as available, since an estimate counts the interpreter and libraries too.
    """
    import resource

    import psutil

    process = psutil.Process()
    own = process.memory_info()
    limits = [psutil.virtual_memory().available + own.rss]
    limits += [limit - used + own.rss for limit, used in _cgroup_limits()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft - own.vms + own.rss)
    return int(max(0, min(limits)))


def _cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """(limit, use that cannot be reclaimed) in bytes of this process's control group and of each above it."""
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root if not controllers else root / "memory"
        names = ("memory.max", "memory.current", "inactive_file") if not controllers else (
            "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")  # fmt: skip
        folder = base / path.strip("/")
        for place in (folder, *folder.parents):
            if place != base and base not in place.parents:
                break
            yield from _read_cgroup(place, *names)


def _read_cgroup(folder: Path, limit_name: str, usage_name: str, reclaimable: str) -> Iterator[tuple[int, int]]:
    try:
        limit = int((folder / limit_name).read_text(encoding="ascii"))
        used = int((folder / usage_name).read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # "max" is no number: no limit here
        return
    if limit < _LARGEST_BYTES:  # version 1 writes almost 2^63 for no limit
        yield limit, max(0, used - int(statistics.get(reclaimable, 0)))


def _cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 in hardware."""
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    lines = (line for line in text.splitlines() if line.lower().startswith(("flags", "features")))
    return any(flag in line.split() for line in lines for flag in _BF16_FLAGS)
