"""Stage card: whether lorafit can use the card, how fast it multiplies, and which attention kernels a run takes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from benchmarks.prove_gpu.trace import VARIABLE_LENGTH, Trace
from benchmarks.prove_gpu.verdicts import Check, Lack, is_so
from benchmarks.prove_gpu.world import World, make_rows

SIDE = 512
PRODUCT_ERROR = 2e-2  # of one in 16 bits, relative to its norm


def prove_card(world: World) -> Iterator[Check | Lack]:
    """Facts, a product, its speed, and the attention kernels of whole rows, packed rows and fp32."""
    import torch

    from lorafit.machine.devices import format_bytes, peak_flops, read_device
    from lorafit.ops.matmul_peak import measure_matmul_peak

    found = read_device("cpu" if world.is_small else "auto")
    yield is_so("device that lorafit finds", found.kind == world.device, f"{found.name}, {found.kind}", world.device)
    yield Check("memory it may use", format_bytes(found.memory_bytes))
    if not world.is_small:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        yield Check("compute capability", f"{capability}; torch is built for {' '.join(torch.cuda.get_arch_list())}")
        free, total = torch.cuda.mem_get_info()
        yield Check("free memory", f"{format_bytes(free)} of {format_bytes(total)}")
    dtype = torch.bfloat16 if found.bf16 or world.is_small else torch.float16
    error = _product_error(world.device, dtype)
    yield Check("a product in 16 bits against fp64", f"{error:.2g}", f"<= {PRODUCT_ERROR}", error <= PRODUCT_ERROR)
    peak = measure_matmul_peak(world.device, dtype)
    known = peak_flops(found)
    beside = f", {peak / known:.0%} of what the maker names" if known else ""
    yield Check("square products", f"{peak / 1e12:,.3g} TFLOP/s in {_short(dtype)}{beside}")
    for what, kind, packed, judged in (
        ("attention, whole rows", _short(dtype), False, True),
        ("attention, packed rows", _short(dtype), True, True),
        ("attention, fp32", "fp32", False, False),
    ):
        kernels = _attention(world, kind, packed)
        shown = ", ".join(kernels) or "none that is known"
        if judged:
            yield is_so(what, "math" not in kernels and bool(kernels), shown, "no math kernel")
        else:
            yield Check(what, shown)
    if found.capability is not None and found.capability >= (8, 0):
        kernels = _attention(world, _short(dtype), True, "auto")
        said = ", ".join(kernels) or "none that is known"
        yield is_so("attention, packed rows, left open", VARIABLE_LENGTH in kernels, said, VARIABLE_LENGTH)


def _product_error(device: str, dtype: object) -> float:
    import torch

    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())


def _attention(world: World, dtype: str, packed: bool, attention: str = "sdpa") -> list[str]:
    """The kernels of a short run with grouped queries."""
    run = world.train(
        world.recipe(
            world.tiny(),
            make_rows(24, (4, 90)),
            model={"dtype": dtype, "quantization": "none", "attention": attention},
            data={"max_length": 256, "packing": packed},
            training={"max_steps": 3, "micro_batch_tokens": 256},
        ),
        profile=True,
    )
    return Trace(run).attention()


def _short(dtype: object) -> str:
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}[str(dtype)]


def read_driver() -> str:
    """Of the card, as nvidia-smi names it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"
