"""Stage memory: what the steps took of the card against both engines of the memory estimate, and what it reserved.

On a CPU the storages that are alive in the steps are counted instead, as `benchmarks/memory_measured.py` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.memory_measured import MIB, Case, measure, write_recipe
from benchmarks.prove_gpu.verdicts import Check, Lack, at_most, worst
from benchmarks.prove_gpu.world import World

TENSOR_ERROR = 0.03
RESERVED_ERROR = 0.12
FILLED = 0.9  # of the card at most


def prove_memory(world: World) -> Iterator[Check | Lack]:
    """Three budgets, quantised or not, checkpointed or not; two budgets in the small mode."""
    shapes = ((1, 256), (4, 128)) if world.is_small else ((1, 1024), (2, 1024), (4, 2048))
    from lorafit import pipeline
    from lorafit.machine.devices import read_device

    errors: list[float] = []
    card_bytes = read_device().memory_bytes
    whole = itertools.product(("nf4", "none"), (False, True), shapes)
    for quantization, checkpointing, (rows, tokens) in (*whole, ("nf4", "half", shapes[-1])):
        case = Case("", str(world.large()), quantization, "bf16", 16, checkpointing, rows, tokens)
        folder = world.folder / case.name.strip().replace(" ", "-")
        folder.mkdir()
        recipe = write_recipe(case, folder)
        if not world.is_small and (needed := pipeline.estimate(recipe).memory.needed_bytes) > FILLED * card_bytes:
            yield Lack(f"{case.name.strip()} needs {needed / MIB:,.0f} MiB: more than this card has")
            continue
        found = measure(recipe)
        world.forget()
        taken = found["measured_bytes"] if world.is_small else found["allocated_bytes"]
        off = {engine: found[f"{engine}_bytes"] / taken - 1 for engine in ("closed", "exact")}
        errors.append(worst(off.values()))
        shown = f"{taken / MIB:,.1f} MiB; closed form {off['closed']:+.1%}, exact {off['exact']:+.1%}"
        yield Check(case.name.strip(), shown, f"within {TENSOR_ERROR:.0%}", errors[-1] <= TENSOR_ERROR)
        if not world.is_small:
            reserved = found["needed_bytes"] / found["reserved_bytes"] - 1
            shown = f"{found['reserved_bytes'] / MIB:,.0f} MiB; estimate {reserved:+.1%}"
            yield Check(
                f"{case.name.strip()}, reserved", shown, f"within {RESERVED_ERROR:.0%}", abs(reserved) <= RESERVED_ERROR
            )
    yield at_most("largest error of an estimate", worst(errors), TENSOR_ERROR, "{:.1%}")
    if world.is_small:
        yield Lack("a CPU's allocator tells nothing: storages alive in the steps were counted, and nothing reserved")
