"""Stage resume: a run killed with SIGKILL at a random step and resumed, twice, is the same run; and it is merged."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.merge import compare as compare_folders
from benchmarks.prove_gpu.values import take_all_memory
from benchmarks.prove_gpu.verdicts import Check, Lack, at_most, is_so, worst
from benchmarks.prove_gpu.world import World, losses_of, make_rows

STEPS = 24
MOST_NOISES = 4  # so many times as far apart as two unbroken runs are
MOST_KL = 0.005
RANK = 72  # with widths of 1536: 100,000 values a tensor and more, which bitsandbytes pages
GIVE_UP_SECONDS = 600
SPARE_BYTES = 1 << 30


def prove_resume(world: World) -> Iterator[Check | Lack]:
    """Two unbroken runs tell the noise; the third is killed twice. Then the merges."""
    base, lack = world.real()
    if lack:
        yield Lack(lack)
    recipe, random = _recipe(world, base), Random()
    kills = random.randint(3, STEPS // 2 - 2), random.randint(STEPS // 2, STEPS - 3)
    folders = {name: recipe.parent / name for name in ("unbroken", "again", "killed")}
    for name in ("unbroken", "again"):
        world.run("train", recipe, "--output", folders[name], "--quiet")
    for number, step in enumerate(kills):
        words = [recipe, "--output", folders["killed"], "--quiet", *(["--resume"] if number else [])]
        killed_at = kill_at(world, words, folders["killed"], step)
        what = f"killed, {('first', 'second')[number]} time"
        yield is_so(what, killed_at is not None, f"at step {killed_at}", "SIGKILL")
    world.run("train", recipe, "--output", folders["killed"], "--quiet", "--resume")
    losses = {name: losses_of(folder) for name, folder in folders.items()}
    yield is_so("steps in the log", len(losses["killed"]) == STEPS, str(len(losses["killed"])), str(STEPS))
    noise = difference(folders["unbroken"], folders["again"])
    off = difference(folders["unbroken"], folders["killed"])
    bound = "the same bits" if noise == 0 else f"<= {MOST_NOISES} x the noise"
    shown = f"{off:.2g}; two unbroken runs {noise:.2g}"
    yield Check("adapter of the resumed run, furthest value", shown, bound, off <= MOST_NOISES * noise)
    yield from _merges(world, folders["unbroken"])


def _merges(world: World, run: Path) -> Iterator[Check | Lack]:
    place = run.parent / "merges"
    place.mkdir()
    for name, on_cpu in (("output", False), ("peft", True)):  # as benchmarks/merge.py calls what it compares
        where = "on a CPU" if on_cpu else "on the device"
        merged = _merge(world, run, place / name, on_cpu=on_cpu)
        if merged["parity"] is None:
            yield Lack(f"a merge {where} was not compared: {merged['parity_skipped']}", is_whole=False)
            continue
        yield at_most(f"merge {where}: mean KL", merged["parity"]["mean_kl"], MOST_KL, "{:.2g}")
    apart = compare_folders(place, "")
    shown = f"{apart['equal']:.4%} the same bits; furthest {apart['furthest']:.2%}"
    yield is_so("both merges, value by value", apart["equal"] > 0.999, shown, "> 99.9% the same bits")
    shutil.rmtree(place)
    if world.is_small:
        yield Lack("a merge beside a full card needs a card")
        return
    ballast = take_all_memory(SPARE_BYTES)
    merged = _merge(world, run, run.parent / "beside-a-full-card")
    del ballast
    world.forget()
    shown = merged["parity_skipped"] or f"compared, mean KL {merged['parity']['mean_kl']:.2g}"
    yield is_so("merge beside a full card", bool(merged["proven"]), shown, "published")


def _merge(world: World, run: Path, output: Path, *, on_cpu: bool = False) -> dict[str, Any]:
    return dict(json.loads(world.run("merge", run, "--output", output, "--json", on_cpu=on_cpu)))


def kill_at(world: World, words: list[Any], run: Path, step: int) -> int | None:
    """Trains until the log has `step` steps and kills; returns the last step of the log, None where it ended before."""
    process, began = world.command("train", *words), time.monotonic()
    while process.poll() is None and time.monotonic() - began < GIVE_UP_SECONDS:
        if _logged(run) >= step:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return _logged(run) if process.returncode == -signal.SIGKILL else None


def _logged(run: Path) -> int:
    """The last whole line's step; a line that is being written counts for nothing."""
    if not (run / "metrics.jsonl").is_file():
        return 0
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return max((json.loads(line)["step"] for line in lines), default=0)


def difference(one: Path, other: Path) -> float:
    """The largest difference of a value between two runs' adapters."""
    from safetensors.torch import load_file

    left, right = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    if left.keys() != right.keys():
        return float("inf")
    return worst(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def _recipe(world: World, base: str) -> Path:
    """Dropout, so that random numbers matter, and a state that a card pages."""
    return world.recipe(
        base,
        make_rows(48, (30, 90)),
        adapter={"r": RANK, "alpha": RANK, "dropout": 0.2},
        data={"max_length": 512},
        training={"max_steps": STEPS, "optimizer": "paged_adamw_8bit", "micro_batch_tokens": 512},
        checkpoints={"every_steps": 3, "keep_last": 2},
    )
