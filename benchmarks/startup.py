"""Time until something happens: `--help`, `validate`, and from the command to the first optimizer step.

    python benchmarks/startup.py [--repeats 5] [--recipe recipes/quickstart.yaml] [--only help|validate|step]

Every contestant that is installed runs as a process of its own, all of them in turn, and again, so that a disturbance
hits them alike; medians are printed, and each as a ratio to lorafit's. Peers' helps are those of the command that
trains. No peer checks a recipe without loading a model, so `validate` has nobody beside it.

The first step is that of the quickstart: NF4, rank 32 on all linears, 16 rows. lorafit runs it cold (rows and plan are
made anew, the base is converted) and a second time (rows and plan come from the cache); TRL's SFTTrainer gets the same
base, rows, adapter, optimizer and rows a step, micro-batches as its defaults have them, and its data set's cache is
warm as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("lorafit", "torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "llamafactory", "litgpt")
PEER_HELPS = {
    "trl": ["trl", "sft", "--help"],
    "accelerate": ["accelerate", "launch", "--help"],
    "llamafactory": ["llamafactory-cli", "train", "--help"],
    "litgpt": ["litgpt", "finetune_lora", "--help"],
    "torchtune": ["tune", "run", "--help"],
    "axolotl": ["axolotl", "train", "--help"],
}
POLL_SECONDS = 0.02
LIMIT_SECONDS = 900


@dataclass(frozen=True)
class Contestant:
    """Something that is timed: what it is called, and a run of it, which gives its seconds."""

    name: str
    run: Callable[[], float]


def find_command(name: str) -> str | None:
    """A console script beside this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def seconds_of(command: Sequence[str]) -> float:
    """Seconds until a command that must end well has ended."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return seconds


def seconds_until(command: Sequence[str], mark: Path) -> float:
    """Seconds until a command has written something to `mark`; it is awaited to its end."""
    mark.unlink(missing_ok=True)
    began, seconds = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(command, stdout=messages, stderr=messages)
        while process.poll() is None:
            if seconds is None and mark.is_file() and mark.stat().st_size:
                seconds = time.perf_counter() - began
            time.sleep(POLL_SECONDS)
        if process.returncode or seconds is None:
            messages.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{messages.read()[-2000:]}")
    return seconds


def race(title: str, contestants: Sequence[Contestant], repeats: int, yardstick: str) -> dict[str, Any]:
    """Runs all in turn, `repeats` times, and prints medians and ratios to the contestant called `yardstick`."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(repeats):
        for contestant in contestants:
            seconds[contestant.name].append(contestant.run())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    unit = medians[yardstick]
    print(f"\n{title}")
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"  {name:<32} {median:>8.2f} s  ({low:.2f} to {high:.2f})  {median / unit:>6.2f} x", flush=True)
    return {"seconds": seconds, "medians": medians, "ratios": {name: m / unit for name, m in medians.items()}}


def help_contestants(lorafit: str) -> list[Contestant]:
    found = [Contestant("lorafit train --help", lambda: seconds_of([lorafit, "train", "--help"]))]
    found.append(Contestant("lorafit --help", lambda: seconds_of([lorafit, "--help"])))
    for words in PEER_HELPS.values():
        program = find_command(words[0])
        if program is not None:
            found.append(Contestant(" ".join(words), partial(seconds_of, [program, *words[1:]])))
    return found


def step_contestants(lorafit: str, recipe: Path, folder: Path) -> list[Contestant]:
    """lorafit for the second time, lorafit cold, TRL; all have run once before, but for what cold means."""
    cache, output = Path(os.environ["LORAFIT_CACHE"]), folder / "run"
    flags = ["--set", "training.epochs=null", "--set", "training.max_steps=1", "--quiet", "--output", str(output)]
    command = [lorafit, "train", str(recipe), *flags]

    def second_run() -> float:
        shutil.rmtree(output, ignore_errors=True)
        return seconds_until(command, output / "metrics.jsonl")

    def cold() -> float:
        for part in ("data", "plans"):
            shutil.rmtree(cache / part, ignore_errors=True)
        return second_run()

    second_run()
    # Cold runs first and leaves what the second run finds.
    found = [Contestant("lorafit, cold", cold), Contestant("lorafit, second run", second_run)]
    try:
        version("trl")
    except PackageNotFoundError:
        return found
    [base] = [place.parent for place in (cache / "bases").glob("*/config.json")]
    rows, mark = recipe.parent / "data" / "support_train.jsonl", folder / "trl-step"
    trl = [sys.executable, __file__, "--trl-child", str(base), str(rows), str(mark)]
    seconds_until(trl, mark)
    return [*found, Contestant("trl SFTTrainer, second run", lambda: seconds_until(trl, mark))]


def train_with_trl(base: str, rows: str, mark: str) -> None:
    """The quickstart's first step with TRL; `mark` is written behind it."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Mark(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            Path(mark).write_text("done", encoding="utf-8")

    def as_chat(row: dict[str, str]) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    dataset = load_dataset("json", data_files=rows, split="train")
    with tempfile.TemporaryDirectory() as output:
        settings = SFTConfig(
            output_dir=output,
            use_cpu=not torch.cuda.is_available(),
            max_length=128,
            max_steps=1,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            optim="adamw_bnb_8bit",
            learning_rate=2e-3,
            report_to="none",
            save_strategy="no",
            model_init_kwargs={"dtype": torch.bfloat16, "quantization_config": nf4},
        )
        SFTTrainer(
            model=base,
            args=settings,
            train_dataset=dataset.map(as_chat, remove_columns=dataset.column_names),
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Mark()],
        ).train()


def installed() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    if sys.argv[1:2] == ["--trl-child"]:
        train_with_trl(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.yaml")
    parser.add_argument("--only", choices=("help", "validate", "step"))
    arguments = parser.parse_args()
    lorafit = find_command("lorafit")
    if lorafit is None:
        raise SystemExit("lorafit is not installed")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["LORAFIT_CACHE"] = str(Path(place) / "cache")
        recipe = arguments.recipe.resolve()
        if arguments.only in (None, "help"):
            results["help"] = race("--help", help_contestants(lorafit), arguments.repeats, "lorafit train --help")
        if arguments.only in (None, "validate"):
            check = Contestant("lorafit validate", lambda: seconds_of([lorafit, "validate", str(recipe)]))
            results["validate"] = race("validate", [check], arguments.repeats, check.name)
        if arguments.only in (None, "step"):
            contestants = step_contestants(lorafit, recipe, Path(place))
            title = "from the command to the first optimizer step"
            results["step"] = race(title, contestants, arguments.repeats, "lorafit, second run")
    machine = {"cores": len(os.sched_getaffinity(0)), "cpu": platform.processor() or platform.machine()}
    print(json.dumps({"results": results, "versions": installed(), "machine": machine}))


if __name__ == "__main__":
    main()
