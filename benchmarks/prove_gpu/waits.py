"""Stage waits: how often a step makes the host wait for the device, and how many kernels it launches."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.prove_gpu.trace import Trace
from benchmarks.prove_gpu.verdicts import Check, Lack, at_most
from benchmarks.prove_gpu.world import LARGE_LAYERS, World, make_rows

MOST_WAITS = 2


def prove_waits(world: World) -> Iterator[Check | Lack]:
    """Steps of at least two micro-batches each, recorded; with torch's AdamW, and with bitsandbytes' for comparison."""
    trace = _record(world, "adamw")
    yield Check("micro-batches a step", f"{trace.micro_batches():.0f}")
    yield at_most("host waits a step", trace.host_waits(world.device), MOST_WAITS, "{:.3g}")
    if world.is_small:
        yield Lack("a CPU waits for nobody: counted are reads of a number out of a tensor, which would wait on a card")
        return
    yield Check("copies to the host a step", f"{trace.copies_to_host():.3g}")
    layers = LARGE_LAYERS * max(1.0, trace.micro_batches())
    yield Check("kernels launched a layer and micro-batch", f"{trace.launches() / layers:.0f}")
    yield Check("time in which the card computed", f"{trace.device_share():.0%}")
    yield Check("host waits a step, paged_adamw_8bit", f"{_record(world, 'paged_adamw_8bit').host_waits('cuda'):.3g}")


def _record(world: World, optimizer: str) -> Trace:
    lengths, budget = ((60, 120), 512) if world.is_small else ((200, 1000), 2048)
    run = world.train(
        world.recipe(
            world.large(),
            make_rows(24, lengths),
            training={
                "max_steps": 3, "micro_batch_tokens": budget, "optimizer": optimizer, "gradient_checkpointing": True,
            },
        ),
        profile=True,
    )  # fmt: skip
    return Trace(run)
