"""Stage values: the card computes what a CPU computes, and the same in whatever way a step is run.

A gradient is read from a checkpoint behind the first step, where Adam's mean of gradients is that gradient, scaled.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.prove_gpu.verdicts import Check, Lack, at_least, at_most, is_so, worst
from benchmarks.prove_gpu.world import World, losses_of, make_rows

LOSS_ERROR = 0.02
LEAST_COSINE = 0.999
NF4 = {"quantization": "nf4", "dtype": "bf16"}
# what runs on the card, what a CPU runs beside it, and whether gradients are compared: on a card int8 layers round
# their inputs to int8 too, on a CPU they do not
PAIRS: tuple[tuple[str, dict[str, str], dict[str, str], bool], ...] = (
    ("nf4 in bf16", NF4, NF4, True),
    ("bf16", {"quantization": "none", "dtype": "bf16"}, {"quantization": "none", "dtype": "bf16"}, True),
    ("fp32", {"quantization": "none", "dtype": "fp32"}, {"quantization": "none", "dtype": "fp32"}, True),
    ("fp16", {"quantization": "none", "dtype": "fp16"}, {"quantization": "none", "dtype": "fp32"}, True),
    ("int8 in bf16", {"quantization": "int8", "dtype": "bf16"}, {"quantization": "int8", "dtype": "bf16"}, False),
)


def prove_values(world: World) -> Iterator[Check | Lack]:
    """Against a CPU by precision; against itself with checkpointing, packing and a step halved for want of memory."""
    base, lack = world.real()
    if lack:
        yield Lack(lack)
    if world.is_small:
        yield Lack("both sides are a CPU: run in this process, and by the command line in one of its own")
    references: dict[str, Path] = {}
    usual = None
    for name, here, there, compares_gradients in PAIRS:
        if world.is_small and here["dtype"] == "fp16":
            yield Lack("fp16, which a CPU computes very slowly, needs a card")
            continue
        run = world.train(_recipe(world, base, here))
        usual = usual or run
        key = json.dumps(there)
        if key not in references:
            references[key] = _run_on_cpu(world, _recipe(world, base, there))
        yield from compare(f"{name} against a CPU", run, references[key], compares_gradients)
        if name == "nf4 in bf16":
            losses = losses_of(run)
            yield is_so("the loss falls", losses[-1] < losses[0], f"{losses[0]:.3f} to {losses[-1]:.3f}", "lower")
    assert usual is not None
    budget = _budget(world)
    ways: dict[str, dict[str, dict[str, Any]]] = {
        "checkpointing": {"training": {"gradient_checkpointing": True}},
        "half checkpointing": {"training": {"gradient_checkpointing": "half"}},
        "packing": {"data": {"packing": True}},
        "small micro-batches": {"training": {"micro_batch_tokens": budget // 4}},
    }
    if not world.is_small:
        ways["packing, attention open"] = {"data": {"packing": True}, "model": {"attention": "auto"}}
    for name, sections in ways.items():
        run = world.train(_recipe(world, base, {**NF4, **sections.pop("model", {})}, **sections))
        if name == "packing":
            packed, padded = (json.loads((one / "result.json").read_text())["padded_tokens"] for one in (run, usual))
            yield is_so("packing: padded tokens of the run", packed < padded, f"{packed}, else {padded}", "fewer")
        yield from compare(f"{name} against none", run, usual, True)
    with memory_runs_out(world.device) as times:
        run = world.train(_recipe(world, base, NF4))
    state = json.loads((run / "checkpoints" / f"step-{_steps(world):06d}" / "state.json").read_text())["train"]
    events = [event["kind"] for event in state["events"]]
    yield is_so(
        "out of memory in the first step",
        times == [1] and events == ["out_of_memory"],
        ", ".join(events),
        "halved once",
    )
    yield from compare("halved against whole", run, usual, True)


def compare(what: str, run: Path, reference: Path, gradients: bool) -> Iterator[Check]:
    """Losses of all steps, and the first gradient."""
    pairs = list(zip(losses_of(run), losses_of(reference), strict=True))
    error = worst(one / other - 1 for one, other in pairs)
    yield at_most(f"{what}: loss", error, LOSS_ERROR, "{:.3%}")
    if gradients:
        cosine = cosine_of(first_gradient(run), first_gradient(reference))
        yield at_least(f"{what}: cosine of gradients", cosine, LEAST_COSINE, "{:.6f}")


def first_gradient(run: Path) -> dict[str, Any]:
    """Adam's means behind step 1, by tensor."""
    from safetensors.torch import load_file

    tensors = load_file(run / "checkpoints" / "step-000001" / "optimizer.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("/exp_avg")}


def cosine_of(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of all tensors as one vector; NaN where their names differ."""
    if one.keys() != other.keys() or not one:
        return math.nan
    inner, squares = 0.0, [0.0, 0.0]
    for name, left in one.items():
        a, b = left.double(), other[name].double()
        inner += float((a * b).sum())
        squares[0] += float((a * a).sum())
        squares[1] += float((b * b).sum())
    return inner / math.sqrt(squares[0] * squares[1]) if all(squares) else math.nan


@contextlib.contextmanager
def memory_runs_out(device: str) -> Iterator[list[int]]:
    """In the first attempt at a step; gives the number of times it did.

    On a card something else takes all of its memory while that attempt runs; on a CPU the error is raised.
    """
    from lorafit.trainer import loop

    attempt, times = loop.accumulate_gradients, [0]

    def first_without(*arguments: Any) -> Any:
        if times[0]:
            return attempt(*arguments)
        times[0] = 1
        if device == "cpu":
            raise MemoryError("pretended by a proof")
        ballast = take_all_memory()
        try:
            return attempt(*arguments)
        finally:
            del ballast

    with mock.patch.object(loop, "accumulate_gradients", first_without):
        yield times


def take_all_memory(spare_bytes: int = 8 << 20) -> list[Any]:
    """Tensors that hold all of the card's memory but a little."""
    import torch

    torch.cuda.empty_cache()
    held, size = [], torch.cuda.mem_get_info()[0] - spare_bytes
    while size > spare_bytes:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            size = torch.cuda.mem_get_info()[0] - spare_bytes
        except torch.OutOfMemoryError:
            size //= 2
    return held


def _steps(world: World) -> int:
    return 4 if world.is_small else 8


def _budget(world: World) -> int:
    """Two micro-batches a step or more, of at least two rows each."""
    return 512 if world.is_small else 2048


def _recipe(world: World, base: str, model: dict[str, str], **sections: dict[str, Any]) -> Path:
    """Eight rows, which every step sees, of lengths that packing gains by."""
    training = {"max_steps": _steps(world), "micro_batch_tokens": _budget(world), **sections.pop("training", {})}
    data = {"max_length": 512, **sections.pop("data", {})}
    kept = {"every_steps": 1, "keep_last": 20}
    return world.recipe(
        base, make_rows(8, (8, 90)), model=model, data=data, training=training, checkpoints=kept, **sections
    )


def _run_on_cpu(world: World, recipe: Path) -> Path:
    world.run("train", recipe, "--quiet", on_cpu=True)
    return recipe.parent / "run"
