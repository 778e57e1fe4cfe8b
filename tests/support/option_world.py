"""The tiny world, asked what one recipe value leads to: rows, steps, files, reports. Whatever was run is remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import yaml

from lorafit import pipeline
from lorafit.contracts import Silent
from lorafit.evaluation.evaluation import Evaluation
from lorafit.files.rundir import RunDir
from lorafit.job import Job, open_job
from lorafit.plan import Plan
from lorafit.recipe.load import LoadedRecipe, load_recipe
from tests.support.tiny_encoder import make_encoder
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_pairs, make_rows, make_verdicts, write_rows

T = TypeVar("T")
Changes = Mapping[str, Any]
"""Recipe values by dotted key: `{"training.max_steps": 2}`."""

SPLITS = {
    "data.train": "train",
    "data.validation": "validation",
    "data.test": "test",
    "evaluation.retention": "retention",
}
"""Where sources stand, and what their rows are for."""
LONG_TEXT = " ".join(f"word{number}" for number in range(60))
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {"base": "../base", "dtype": "fp32", "attention": "eager", "quantization": "none"},
    "adapter": {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.0},
    "data": {"train": "../rows/train.jsonl", "max_length": 128},
    "training": {
        "max_steps": 2,
        "batch_size": 4,
        "micro_batch_tokens": 128,
        "learning_rate": 1e-2,
        "optimizer": "adamw",
        "schedule": "constant",
        "gradient_checkpointing": False,
    },
    "evaluation": {"final": ["perplexity"], "max_new_tokens": 4},
    "output": "run",
}


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested mappings."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


class OptionWorld:
    """A folder with bases and rows; each recipe gets a folder beside them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, Any] = {}
        self._folders = 0
        make_base(root / "base")
        make_base(root / "other", seed=1)
        make_encoder(root / "encoder")
        (root / "rows").mkdir()
        for name, rows in rows_by_file().items():
            write_rows(root / "rows" / name, rows)
        with (root / "rows" / "bad.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"question": "and the answer?"}\n')

    def recipe(self, changes: Changes) -> Path:
        """A recipe file in a folder of its own."""
        values = json.loads(json.dumps(RECIPE))
        for key, value in changes.items():
            put(values, key, value)
        self._folders += 1
        folder = self.root / f"{self._folders:03}"
        folder.mkdir()
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        return file

    def load(self, changes: Changes) -> LoadedRecipe:
        """The recipe, checked."""
        return load_recipe(self.recipe(changes))

    def job(self, changes: Changes) -> Job:
        """The recipe with its base and rows opened."""
        return open_job(self.load(changes), Silent())

    def rows(self, changes: Changes, split: str = "train") -> list[tuple[list[int], list[int]]]:
        """Ids of each prepared row of a split, and the labels: -100 where nothing is learnt."""
        examples = self.job(changes).rows.splits.get(split)
        if examples is None:
            return []
        found = []
        for number in range(len(examples)):
            ids = [int(token) for token in examples[number]["tokens"]]
            trained = examples[number]["trained"]
            labels = [token if is_trained else -100 for token, is_trained in zip(ids, trained, strict=True)]
            found.append((ids, labels))
        return found

    def plan(self, changes: Changes) -> Plan:
        """What a dry run derives."""
        return pipeline.train(self.recipe(changes), dry_run=True).plan

    def train(self, changes: Changes) -> RunDir:
        """The folder of the run."""
        return self.remember("train", changes, lambda: pipeline.train(self.recipe(changes)).run)

    def evaluate(self, changes: Changes, trained: Changes | None = None) -> Evaluation:
        """What `lorafit eval` finds on the test rows, of a run that was trained with the changes in `trained`."""
        trained = {"data.test": "../rows/test.jsonl", **(trained or {})}
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]

        def run() -> Evaluation:
            return pipeline.evaluate(self.train(trained).root, overrides=overrides).evaluation

        return self.remember("evaluate", {"trained": trained, **changes}, run)

    def forget(self) -> None:
        """Lets everything be run anew."""
        self._known.clear()

    def remember(self, what: str, changes: Changes, run: Callable[[], T]) -> T:
        """What was made of these changes, once."""
        key = json.dumps([what, changes], sort_keys=True)
        if key not in self._known:
            self._known[key] = run()
        found: T = self._known[key]
        return found


TOOL = {"type": "function", "function": {"name": "hours", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "hours", "arguments": {}}}


def rows_by_file() -> dict[str, list[dict[str, Any]]]:
    """Rows for every way in which an option can matter."""
    asked = make_rows(12)
    turns = [
        {"role": "user", "content": "open?"},
        {"role": "assistant", "content": "at nine"},
        {"role": "user", "content": "and close?"},
        {"role": "assistant", "content": "at ten"},
        {"role": "assistant", "content": "on friday"},
    ]
    return {
        "train.jsonl": asked,
        "more.jsonl": make_rows(5, first=50),
        "validation.jsonl": make_rows(4, first=100),
        "test.jsonl": [{**row, "must_contain": ["opens"]} for row in make_rows(6, first=200)],
        "bad.jsonl": make_rows(9),
        "mapped.jsonl": [{"asked": r["question"], "said": r["answer"], "meant": r["question"][::-1]} for r in asked],
        "chats.jsonl": [{"messages": turns}, {"messages": [{"role": "system", "content": "be brief"}, *turns[:2]]}],
        "named.jsonl": [{"messages": [{**turns[0], "name": "zoe"}, turns[1]]}],
        "either.jsonl": [{"text": "red mug", "prompt": f"{n} mugs", "completion": "green"} for n in range(4)],
        "tools.jsonl": [
            {"messages": [turns[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [TOOL]}
        ],
        "alpaca.jsonl": [{"instruction": r["question"], "input": r["answer"], "output": r["answer"]} for r in asked],
        "numbered.jsonl": [{**row, "one": n * 5 % 12, "other": n * 7 % 12} for n, row in enumerate(asked)],
        "pairs.jsonl": make_pairs(4),
        "verdicts.jsonl": make_verdicts(2),
        "texts.jsonl": [{"text": "a short one"}, {"text": LONG_TEXT}],
    }


# What a run left, echoes of its recipe apart: recipe.yaml, plan.json and manifest.json are never looked at.


def step_lines(run: RunDir) -> list[dict[str, Any]]:
    """A line of metrics.jsonl for each step, times apart."""
    return [_timeless(line) for line in _lines(run) if "evaluation" not in line]


def evaluation_lines(run: RunDir) -> list[dict[str, Any]]:
    """A line of metrics.jsonl for each evaluation."""
    return [_timeless(line) for line in _lines(run) if "evaluation" in line]


def adapter_tensors(run: RunDir, *, step: int | None = None) -> dict[str, str]:
    """Shape and content of each tensor of the published adapter, or of that of a checkpoint."""
    from safetensors.torch import load_file

    folder = run.adapter if step is None else run.checkpoint(step) / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: f"{tuple(tensor.shape)} {digest_of(tensor)}" for name, tensor in tensors.items()}


def files_of(run: RunDir) -> set[str]:
    """Names of the files, numbers that a tracker draws cut off."""
    names = {path.relative_to(run.root).as_posix() for path in run.root.rglob("*") if path.is_file()}
    return {name.partition("events.out.tfevents")[0] + "tfevents" if "tfevents" in name else name for name in names}


def everything_of(run: RunDir) -> list[Any]:
    """All of it."""
    return [_lines_without_times(run), adapter_tensors(run), sorted(files_of(run)), run.best_step()]


def digest_of(tensor: Any) -> str:
    """A hash of a tensor's dtype and bytes."""
    import torch

    raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {hashlib.sha256(raw).hexdigest()}"


def scores_of(evaluation: Evaluation) -> list[Any]:
    """Values by metric, and the answers."""
    return [
        [(line.name, line.base, line.tuned) for line in evaluation.comparisons],
        [row.tuned.answer for row in evaluation.rows],
        [(line.name, line.base, line.tuned) for line in evaluation.retention],
    ]


def _lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]


def _lines_without_times(run: RunDir) -> list[dict[str, Any]]:
    return [_timeless(line) for line in _lines(run)]


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "seconds"}


def named_commits() -> AbstractContextManager[Any]:
    """A hub, which tests cannot reach, whose commits are called as the revisions that they are asked for by."""
    return patch("lorafit.hub.asking.Asked.find_commit", lambda asked: asked.repo.revision)
