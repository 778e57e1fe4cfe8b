"""How fast tool chats become training rows, beside what transformers alone takes to render and tokenise them.

    python benchmarks/prepare.py ROWS.jsonl TOKENIZER [--rows 2000] [--rounds 3] [--template NAME_OR_FILE]

ROWS.jsonl holds `messages` and `tools`, and is repeated up to a number of rows; TOKENIZER is a folder with
tokenizer.json and a chat template. The contenders take turns, on one core and then on all of them; each figure is the
fastest of its rounds.

    transformers, row by row    apply_chat_template(tokenize=True) of each chat, read before
    transformers, in one call   their texts, tokenised all at once
    lorafit                     what `train` does with an empty cache: hash the tokenizer and the file, read it, render
                                and trace each chat, compare it with transformers' rendering, find the turns by two
                                methods, look for dropped fields, tokenise, mark, store, hash

At the end the ids are compared: rows that hold no typed control string have exactly those of transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lorafit.contracts import Sample, Silent
from lorafit.data.prepare import Prepared, build_renderer, prepare
from lorafit.data.sources.sample_set import read_sources
from lorafit.kinds.tasks import tasks
from lorafit.recipe.schema import DataSection

LONGEST = 1 << 20


def describe(rows: Path, template: str | None) -> DataSection:
    """The section of a recipe that leaves nothing out but what no template can render."""
    return DataSection(
        train=str(rows),
        max_length=LONGEST,
        overlength="drop",
        dropped_fields="warn",
        chat_template=template,
        bad_rows={"policy": "skip", "max_fraction": 1.0},
    )


def prepare_rows(tokenizer: Any, data: DataSection, cache: Path) -> Prepared:
    """What `train` does before its first step."""
    return prepare(
        data,
        folder=Path(),
        renderer=build_renderer(tokenizer, data, Path()),
        task=tasks.make("causal-lm"),
        seed=0,
        cache_dir=cache,
        reporter=Silent(),
    )


class Transformers:
    """What transformers alone does with the chats.

    Args:
        tokenizer: The tokenizer.
        samples: The chats.
        templates: By name, as lorafit uses them.
    """

    def __init__(self, tokenizer: Any, samples: Sequence[Sample], templates: dict[str, str]) -> None:
        self._tokenizer = tokenizer
        self._chats = [list(sample.messages or ()) for sample in samples]
        self._options = [
            {
                "tools": sample.tools,
                "chat_template": templates["tool_use" if self._has_own(sample, templates) else "default"],
            }
            for sample in samples
        ]

    @staticmethod
    def _has_own(sample: Sample, templates: dict[str, str]) -> bool:
        return bool(sample.tools) and "tool_use" in templates

    def row_by_row(self) -> list[list[int]]:
        """Ids of each chat."""
        apply = self._tokenizer.apply_chat_template
        return [
            apply(chat, return_dict=False, **options) for chat, options in zip(self._chats, self._options, strict=True)
        ]

    def in_one_call(self) -> list[list[int]]:
        """The same, tokenised together."""
        apply = self._tokenizer.apply_chat_template
        pairs = zip(self._chats, self._options, strict=True)
        texts = [apply(chat, tokenize=False, **options) for chat, options in pairs]
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]


def race(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest round of each; they take turns."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--rows", type=int, default=2000, help="the file's rows are repeated up to this number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--template", help="a shipped name or a file, instead of the tokenizer's own")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, local_files_only=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = describe(folder / "rows.jsonl", arguments.template)
        lines = arguments.file.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "rows.jsonl").write_text("".join(islice(cycle(lines), arguments.rows)), encoding="utf-8")
        made = prepare_rows(tokenizer, data, folder / "cache").train
        kept = set(made.lines.tolist())
        read = read_sources(data.train, Path(), data.bad_rows, Silent()).rows()
        samples = [row for _, line, row in read if isinstance(row, Sample) and line in kept]
        templates = build_renderer(tokenizer, data, Path()).chats.templates
        theirs = Transformers(tokenizer, samples, templates)
        expected = theirs.row_by_row()
        equal = sum(list(made[row]["tokens"]) == ids for row, ids in enumerate(expected))
        found = compare(theirs, lambda: prepare_fresh(tokenizer, data, folder), len(expected), arguments.rounds)
    tokens = sum(map(len, expected)) / len(expected)
    print(f"\n{equal} of {len(expected)} rows, {tokens:.0f} tokens each, have the ids of apply_chat_template")
    versions = {name: version(name) for name in ("lorafit", "transformers", "tokenizers", "jinja2")}
    machine = {"cores": len(os.sched_getaffinity(0)), "cpu": platform.processor() or platform.machine()}
    rows = {"rows": len(expected), "tokens_a_row": round(tokens), "with_equal_ids": equal}
    print(json.dumps({**rows, "runs": found, "versions": versions, "machine": machine}))


def prepare_fresh(tokenizer: Any, data: DataSection, folder: Path) -> None:
    """`prepare_rows` with an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        prepare_rows(tokenizer, data, Path(cache))


def compare(theirs: Transformers, ours: Callable[[], Any], rows: int, rounds: int) -> dict[str, Any]:
    """Rows a second of all contenders on one core and on all, printed."""
    contenders = {
        "transformers, row by row": theirs.row_by_row,
        "transformers, in one call": theirs.in_one_call,
        "lorafit": ours,
    }
    cores = os.sched_getaffinity(0)
    found: dict[str, Any] = {}
    for where, allowed in {"one core": {min(cores)}, f"all {len(cores)} cores": cores}.items():
        os.sched_setaffinity(0, allowed)
        seconds = race(contenders, rounds)
        print(f"{where:28} rows/s   lorafit is")
        for name, spent in seconds.items():
            print(f"  {name:26} {rows / spent:>6.0f}   {spent / seconds['lorafit']:>6.2f} x", flush=True)
        found[where] = {name: round(rows / spent, 1) for name, spent in seconds.items()}
    return found


if __name__ == "__main__":
    main()
