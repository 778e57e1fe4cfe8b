"""The first steps of one recipe by what its adapter begins with, and what beginning costs.

    python benchmarks/initialisations.py RECIPE [--steps 10] [--set KEY=VALUE] [--over kaiming,pissa,olora,eva]

Every run has the same rows in the same order, the same rate and rank. Prints, for each initialisation, the seconds
that it took before step 1, trained and saved parameters, the training loss of some steps, and that of the held-out
rows before the first step and after the last one, where the recipe names any. Nothing is tuned for any of them: one
rate and one seed tell how each begins, and nothing of which ends best.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors import safe_open

from lorafit import pipeline, training
from lorafit.contracts import Silent

SHOWN = 1, 2, 3, 5, 10, 20


def train(arguments: argparse.Namespace, init: str, folder: Path) -> dict[str, Any]:
    """What a run left, by column."""
    seconds = list[float]()
    begin = training.give_first_values

    def timed(*given: Any) -> None:
        started = time.perf_counter()
        begin(*given)
        seconds.append(time.perf_counter() - started)

    fixed = {
        "adapter.init": init,
        "training.max_steps": arguments.steps,
        "training.epochs": None,
        "training.gradient_checkpointing": False,
        "training.micro_batch_tokens": 1024,
        "evaluation.every_steps": arguments.steps,
        "output": str(folder),
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in fixed.items()]
    with patch.object(training, "give_first_values", timed):
        done = pipeline.train(Path(arguments.recipe), overrides=[*overrides, *arguments.set], reporter=Silent())
    lines = [json.loads(line) for line in done.run.metrics.read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line and "evaluation" not in line}
    held_out = [line["evaluation"]["loss"] for line in lines if "evaluation" in line]
    with safe_open(done.run.adapter / "adapter_model.safetensors", "pt") as file:
        saved = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    shown = {f"step {step}": f"{losses[step]:.3f}" for step in SHOWN if step in losses}
    return {
        "init": init,
        "begins in s": f"{seconds[0]:.1f}",
        "trained": f"{done.plan.trainable_parameters:,}",
        "saved": f"{saved:,}",
        **shown,
        "held-out at the end": f"{held_out[-1]:.3f}" if held_out else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--over", default="kaiming,pissa,olora,eva,loftq,corda")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for number, init in enumerate(arguments.over.split(",")):
            row = train(arguments, init, Path(root) / init)
            if number == 0:
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}", flush=True)
            print(f"| {' | '.join(row.values())} |", flush=True)


if __name__ == "__main__":
    main()
