"""Stage speed: tokens a second beside TRL, TRL with Liger and packing, and Unsloth, where they are installed.

All train the same adapter on the same token ids; packing puts them into other steps. Each contender is a process of its
own, in turns. The first steps are not counted. In the small mode the contenders are tried, and nothing is judged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.prove_gpu.verdicts import Check, Lack, at_least, at_most
from benchmarks.prove_gpu.world import LARGE_LAYERS, ROOT, World, has_package, make_rows, read_shape

OURS, DEFAULTS, PACKED, UNSLOTH = "lorafit", "trl", "trl-liger-packing", "unsloth"
NEEDED = {DEFAULTS: ["trl"], PACKED: ["trl", "liger_kernel"], UNSLOTH: ["trl", "unsloth"]}
LEAST_OF_BEST, LEAST_OF_DEFAULTS, LOSS_ERROR = 0.95, 1.2, 0.01
STEPS, WARM, ROUNDS = 25, 5, 2
# rows a step; and of a row's tokens the median, the spread of its logarithm, the least and the most
SETS: dict[str, tuple[int, tuple[int, float, int, int]]] = {
    "short": (16, (90, 0.6, 20, 512)),
    "chats": (16, (400, 0.8, 50, 2040)),
    "long": (4, (2040, 0.0, 2040, 2040)),
}
SMALL = {"short": (4, (40, 0.6, 20, 100))}
SMALL_STEPS, SMALL_WARM = 3, 1

Rates = dict[str, float]


def prove_speed(world: World) -> Iterator[Check | Lack]:
    """Every set by every contender that is here, twice."""
    contenders = [OURS]
    for name, packages in NEEDED.items():
        absent = [package for package in packages if not has_package(package)]
        if absent:
            yield Lack(f"{name} is left out: {', '.join(absent)} not installed", is_whole=name != DEFAULTS)
        else:
            contenders.append(name)
    work = prepare(world)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(1 if world.is_small else ROUNDS):
        for name in contenders if number % 2 == 0 else [OURS, *reversed(contenders[1:])]:
            output = work / f"{name}-{number}.result"
            if fault := run_contender(name, work, output):
                if name == OURS:
                    raise RuntimeError(fault)
                yield Lack(f"{name} did not run: {fault}", is_whole=name != DEFAULTS)
                contenders = [other for other in contenders if other != name]
                results.pop(name, None)
            elif name in results:
                results[name].append(json.loads(output.read_text()))
    warm = SMALL_WARM if world.is_small else WARM
    if world.is_small:
        yield Lack("rates of tiny shapes on a CPU say nothing, and are held against nothing")
    yield from judge(results, sets(world), warm, judged=not world.is_small)


def judge(
    results: Mapping[str, list[dict[str, Any]]], names: Mapping[str, Any], warm: int, *, judged: bool = True
) -> Iterator[Check]:
    """Rates, ratios and losses by set; then the worst ratio, and what the rate means for the whole 8B.

    Args:
        results: By contender: for each round the figures by set.
        names: The sets.
        warm: Steps that are not counted.
        judged: Whether ratios are held against their bounds.
    """
    least = float("inf")
    rates: Rates = {}
    for name in names:
        rates = {contender: rate([one[name] for one in many], warm) for contender, many in results.items()}
        shown = ", ".join(f"{contender} {value:,.0f}" for contender, value in rates.items())
        yield Check(f"{name}: tokens/s", shown)
        peers = {contender: value for contender, value in rates.items() if contender != OURS}
        if not peers or not judged:
            continue
        best = max(peers, key=lambda contender: peers[contender])
        least = min(least, rates[OURS] / peers[best])
        yield at_least(f"{name}: against the best ({best})", rates[OURS] / peers[best], LEAST_OF_BEST, "{:.2f}")
        if DEFAULTS in peers:
            times = rates[OURS] / peers[DEFAULTS]
            yield at_least(f"{name}: against TRL's defaults", times, LEAST_OF_DEFAULTS, "{:.2f}")
            losses = [loss([one[name] for one in results[contender]], warm) for contender in (OURS, DEFAULTS)]
            yield at_most(f"{name}: loss beside TRL's", abs(losses[0] / losses[1] - 1), LOSS_ERROR, "{:.2%}")
    if least < float("inf"):
        yield Check("tokens/s against the best", f"{least:.2f} x")
        yield Check("8B at this rate", f"{rates[OURS] * share_of_whole():,.0f} tokens/s of rows of 2048 tokens")


def rate(rounds: list[dict[str, list[float]]], warm: int) -> float:
    """Tokens a second behind the warm steps, over all rounds."""
    return sum(sum(one["tokens"][warm:]) for one in rounds) / sum(sum(one["seconds"][warm:]) for one in rounds)


def loss(rounds: list[dict[str, list[float]]], warm: int) -> float:
    """The mean over the steps behind the warm ones, of the first round."""
    counted = rounds[0]["loss"][warm:]
    return sum(counted) / max(1, len(counted))


def share_of_whole() -> float:
    """Of the products of all of Llama-3.1-8B's layers and its head, those of the layers that are left and the head."""
    config = read_shape("meta-llama--Llama-3.1-8B")
    wide, inner = config["hidden_size"], config["intermediate_size"]
    keys = wide * config["num_key_value_heads"] // config["num_attention_heads"]
    layer, head = 2 * wide * wide + 2 * wide * keys + 3 * wide * inner, wide * config["vocab_size"]
    return float((LARGE_LAYERS * layer + head) / (config["num_hidden_layers"] * layer + head))


def sets(world: World) -> dict[str, tuple[int, tuple[int, float, int, int]]]:
    """Those of the device."""
    return SMALL if world.is_small else SETS


def prepare(world: World) -> Path:
    """The folder that the contenders work in."""
    work, steps = world.folder / "speed", SMALL_STEPS if world.is_small else STEPS
    work.mkdir()
    task: dict[str, Any] = {"base": str(world.large()), "steps": steps, "sets": {}}
    for name, (batch, lengths) in sets(world).items():
        recipe = world.recipe(
            world.large(),
            rows_of(lengths, steps * batch),
            model={"attention": "auto"},
            data={"max_length": 2048},
            training={
                "max_steps": steps, "batch_size": batch, "micro_batch_tokens": "auto", "gradient_checkpointing": "auto",
            },
            checkpoints={"every_steps": steps},
        )  # fmt: skip
        task["sets"][name] = {"recipe": str(recipe), "batch": batch}
    (work / "task.json").write_text(json.dumps(task), encoding="utf-8")
    return work


def rows_of(lengths: tuple[int, float, int, int], count: int) -> list[dict[str, str]]:
    """Rows whose lengths have this distribution."""
    random, (median, spread, least, most) = Random(0), lengths
    drawn = [min(most, max(least, round(random.lognormvariate(0.0, spread) * median))) for _ in range(count)]
    return [row for number, length in enumerate(drawn) for row in make_rows(1, (length, length), number)]


def run_contender(name: str, work: Path, output: Path) -> str:
    """What went wrong; empty where nothing did."""
    command = [sys.executable, "-m", "benchmarks.prove_gpu.contender", name, str(work), str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode == 0 and output.is_file():
        return ""
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"it ended with {done.returncode}"
