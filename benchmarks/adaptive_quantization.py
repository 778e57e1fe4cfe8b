"""What `quantization: {kind: adaptive}` is worth: does its forecast hold, and do its choices beat others as large?

    python benchmarks/adaptive_quantization.py MODEL TRAIN.jsonl TEST.jsonl [--bits 4.6 5.5] [--rows 64] [...]

Forecast: 20 linears, drawn at random, are stored in NF4 one at a time; the change of the loss, of the calibration rows
and of held-out ones, is set against what one backward pass over the calibration rows foretold (Spearman).
Choices: the base as it is loaded for training, no adapter trained, scored on held-out rows. At each budget: adaptive;
random kinds for linears in random order until the budget is spent, five times; 8 bits for the linears of the outermost
layers, from both ends inwards. NF4 alone and plain weights are the two ends. Intervals are those of `lorafit eval`,
rows drawn in pairs. What was scored is kept in DIR, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lorafit
from lorafit.contracts import Silent
from lorafit.evaluation.runner import score_examples
from lorafit.evaluation.statistics import compare
from lorafit.job import build_objective, open_job
from lorafit.kinds.metrics import RowScore, metrics
from lorafit.kinds.quantizations import Sensitivity, quantizations
from lorafit.kinds.quantizations.adaptive import AdaptiveSection
from lorafit.model.load import load_model
from lorafit.objective import Objective
from lorafit.ops.isolation import evaluating
from lorafit.recipe.load import load_recipe
from lorafit.run.calibration import calibration_batches, open_linears
from lorafit.trainer.sensitivity import measure_changes

SEED = 0
ENDS = ("nf4", "none")
CHECKED = 20
RANDOM = 5


class Study:
    """One base with its rows; everything that was scored is remembered in a file.

    Plain weights are counted as 16 bits, and computed in fp32 as all else is: a card's bf16 rounds besides.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.file = options.out / "scores.json"
        self.known: dict[str, Any] = json.loads(self.file.read_text("utf-8")) if self.file.exists() else {}
        self.recipe: dict[str, Any] = {
            "name": "adaptive",
            "model": {"base": options.model, "quantization": {"kind": "adaptive"}, "dtype": "fp32"},
            "data": {
                "train": str(options.train.absolute()),
                "test": str(options.test.absolute()),
                "max_length": 128,
                "overlength": "drop",
            },
            "output": str(options.out / "run"),
        }
        self.job = open_job(load_recipe(self.recipe), Silent())
        self.test = self.job.rows.splits["test"].first(options.rows)
        self.shapes = open_linears(self.job)
        self.kinds = quantizations.make("adaptive").candidates()

    def load(self, kind: str, **section: Any) -> Objective:
        """The base, its linears stored so."""
        model = load_model(
            self.job.base,
            quantization=quantizations.make_section(kind, **section),
            dtype=torch.float32,
            compute_dtype=torch.float32,
            attention="sdpa",
            device="cpu",
            reporter=Silent(),
        )
        objective = build_objective(self.job, model, "fp32")
        objective.eval()
        return objective

    def remember(self, name: str, find: Any) -> Any:
        """What was found before, else now."""
        if name not in self.known:
            print(f"... {name}", flush=True)
            self.known[name] = find()
            self.file.write_text(json.dumps(self.known), encoding="utf-8")
        return self.known[name]

    def score(self, objective: Objective, rows: Any) -> list[list[float]]:
        """Loss sum and weight of each row."""
        with evaluating(objective):
            found = score_examples(objective, rows, micro_batch_tokens=1024, pad_id=self.job.pad_id, reporter=Silent())
        return [[row.value("loss"), row.value("weight")] for row in found]

    def forecast(self) -> list[Sensitivity]:
        """What one backward pass says of each linear."""

        def ask() -> dict[str, dict[str, float]]:
            tried = {
                path: {name: kind for name, kind in self.kinds.items() if kind.is_quantized} for path in self.shapes
            }
            return measure_changes(
                self.load("none"), calibration_batches(self.job, self.options.calibration_rows), tried
            )

        changes = self.remember(f"forecast {self.options.calibration_rows}", ask)
        return [Sensitivity(path, shape, {"none": 0.0, **changes[path]}) for path, shape in self.shapes.items()]

    def check(self, forecast: Sequence[Sensitivity]) -> None:
        """Prints how the forecast agrees with what is measured, in NF4, one linear at a time."""
        count = min(self.options.calibration_rows, len(self.job.rows.train))
        train = [self.job.rows.train[number * len(self.job.rows.train) // count] for number in range(count)]
        objective = None
        sets = {"calibration": Listed(train), "held-out": self.test.first(self.options.rows // 2)}
        lines = []
        for one in [None, *random.Random(SEED).sample(list(forecast), CHECKED)]:
            for name, rows in sets.items():
                key = f"check {name} {count} {one.path if one else '-'}"
                if key not in self.known:
                    objective = objective or self.load("none")
                    weight = objective.base.get_submodule(one.path).weight if one else torch.empty(0)
                    kept = weight.data
                    weight.data = self.kinds["nf4"].rounded(kept) if one else kept
                    self.remember(key, partial(self.score, objective, rows))
                    weight.data = kept
            if one:
                measured = [
                    mean(self.known[f"check {name} {count} {one.path}"]) - mean(self.known[f"check {name} {count} -"])
                    for name in sets
                ]
                lines.append([one.changes["nf4"], *measured])
                print(f"| {one.path} | {' | '.join(f'{value:+.5f}' for value in lines[-1])} |")
        told, *found = np.array(lines).T
        for name, values in zip(sets, found, strict=True):
            print(
                f"Spearman with the {name} rows: {spearman(told, values):.3f}; of sizes without sign: "
                f"{spearman(abs(told), abs(values)):.3f}"
            )

    def choices(self, bits: float, forecast: Sequence[Sensitivity]) -> Iterator[tuple[str, dict[str, str]]]:
        """Name and kinds of every way to spend a budget."""
        quantization = quantizations.make("adaptive", bits=bits)
        yield "adaptive", dict(zip(self.shapes, quantization.allot(forecast, 2), strict=True))
        sizes = [replace(one, changes={kind: abs(change) for kind, change in one.changes.items()}) for one in forecast]
        yield "changes without sign", dict(zip(self.shapes, quantization.allot(sizes, 2), strict=True))
        for number in range(RANDOM):
            dice = random.Random(number)
            order = dice.sample(list(self.shapes), len(self.shapes))
            yield f"random {number + 1}", self.spend(bits, order, partial(dice.sample, ["int8", "none"], 2))
        numbers = {path: int(re.findall(r"\d+", path)[0]) for path in self.shapes}
        inwards = sorted(self.shapes, key=lambda path: min(numbers[path], max(numbers.values()) - numbers[path]))
        yield "outermost layers in int8", self.spend(bits, inwards, lambda: ["int8"])

    def spend(self, bits: float, order: Sequence[str], wish: Any) -> dict[str, str]:
        """Better kinds for linears in an order, as long as the budget has room for them."""
        linears = dict.fromkeys(self.shapes, "nf4")
        left = bits * self.weights / 8 - self.size(linears)
        for path in order:
            for kind in wish():
                more = self.bytes_of(path, kind) - self.bytes_of(path, "nf4")
                if more <= left:
                    linears[path], left = kind, left - more
                    break
        return linears

    def train(self, bits: float, forecast: Sequence[Sensitivity]) -> None:
        """Prints what is left of it once an adapter was trained on each base: same rows, rate and steps."""
        print(f"\n| {bits} bits, {self.options.steps} steps | loss | adaptive - that, 95 % |\n|---|---|---|")
        ways = {name: linears for name, linears in self.choices(bits, forecast) if not name.startswith("random")}
        ways |= {f"uniform {kind}": dict.fromkeys(self.shapes, kind) for kind in ENDS}
        scored: dict[str, list[list[float]]] = {}
        for name, linears in ways.items():
            scored[name] = self.remember(f"trained {bits} {name}", partial(self.score_trained, linears))
            print(f"| {name} | {mean(scored[name]):.4f} | {against(scored[name], scored['adaptive'])} |", flush=True)

    def score_trained(self, linears: Mapping[str, str]) -> list[list[float]]:
        """Loss sum and weight of each row, of an adapter on a base with these kinds."""
        recipe = {
            **self.recipe,
            "model": {
                **self.recipe["model"],
                "quantization": {"kind": "adaptive", "bits": 16, "linears": dict(linears)},
            },
            "adapter": {"r": 16, "alpha": 32, "dropout": 0.0},
            "training": {"max_steps": self.options.steps, "batch_size": 8, "learning_rate": 1e-3, "optimizer": "adamw"},
            "evaluation": {"final": ["loss"]},
        }
        with tempfile.TemporaryDirectory() as folder:
            run = lorafit.train({**recipe, "output": f"{folder}/run"}, quiet=True)
            found = lorafit.evaluate(run, limit=self.options.rows, quiet=True).evaluation.rows
        return [[row.tuned.value("loss"), row.tuned.value("weight")] for row in found]

    @property
    def weights(self) -> int:
        return sum(shape.weight_parameters for shape in self.shapes.values())

    def bytes_of(self, path: str, kind: str) -> int:
        single, shape = self.kinds[kind], self.shapes[path]
        return single.weight_bytes(shape, 2) + single.constant_bytes(shape)

    def size(self, linears: Mapping[str, str]) -> int:
        """Bytes of all linears."""
        return sum(self.bytes_of(path, kind) for path, kind in linears.items())

    def run(self) -> None:
        """Everything, printed."""
        forecast = self.forecast()
        ends = {kind: self.remember(kind, lambda kind=kind: self.score(self.load(kind), self.test)) for kind in ENDS}
        labels = sum(row[1] for row in ends["none"])
        print(
            f"{len(self.test)} held-out rows, {labels:.0f} labels; {len(self.shapes)} linears, {self.weights:,} weights"
        )
        for kind, rows in ends.items():
            stored = 8 * self.size(dict.fromkeys(self.shapes, kind)) / self.weights
            print(f"uniform {kind}: {stored:.3f} bits, loss {mean(rows):.4f}")
        for bits in self.options.bits:
            print(f"\n| {bits} bits | stored bits | nf4 / int8 / none | loss | adaptive - that, 95 % |")
            print("|---|---|---|---|---|")
            scored: dict[str, list[list[float]]] = {}
            for name, linears in self.choices(bits, forecast):
                load = partial(self.load, "adaptive", bits=16, linears=linears)
                key = (
                    f"{bits} {name}"
                    if name.startswith(("random", "outer"))
                    else f"{bits} {name} {self.options.calibration_rows}"
                )
                scored[name] = self.remember(key, lambda load=load: self.score(load(), self.test))
                counts = " / ".join(str(list(linears.values()).count(kind)) for kind in self.kinds)
                line = f"{name} | {8 * self.size(linears) / self.weights:.3f} | {counts} | {mean(scored[name]):.4f}"
                print(f"| {line} | {against(scored[name], scored['adaptive'])} |", flush=True)
            drawn = np.array([scored[f"random {number + 1}"] for number in range(RANDOM)]).mean(0)
            for name, rows in {
                "mean of the random ones": drawn.tolist(),
                "uniform nf4": ends["nf4"],
                "uniform none": ends["none"],
            }.items():
                print(f"| {name} | | | {mean(rows):.4f} | {against(rows, scored['adaptive'])} |")
        print()
        self.check(forecast)
        if self.options.steps:
            self.train(self.options.bits[0], forecast)


class Listed(list[Any]):
    """Examples by number, with their lengths."""

    @property
    def lengths(self) -> list[int]:
        return [len(row["tokens"]) for row in self]


def mean(rows: Sequence[Sequence[float]]) -> float:
    """Loss a label."""
    return sum(row[0] for row in rows) / sum(row[1] for row in rows)


def against(other: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> str:
    """The paired difference with its interval."""
    sides = [[RowScore({"loss": (loss,), "weight": (weight,)}) for loss, weight in rows] for rows in (other, ours)]
    found = compare("loss", metrics.get("loss"), *sides, seed=SEED)[0]
    return f"{found.show_change(found.difference)} ({found.span})"


def spearman(one: Any, other: Any) -> float:
    """Correlation of ranks."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    """Asks, stores, scores and prints."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.6, 5.5])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--calibration-rows", type=int, default=AdaptiveSection().calibration_rows)
    parser.add_argument("--steps", type=int, default=0, help="train so long on each base of the first budget, too")
    parser.add_argument("--out", type=Path, default=Path("adaptive"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    Study(options).run()


if __name__ == "__main__":
    main()
