"""What an argument may be, by its name: the same for a flag of the command line and a parameter of Python.

    --temperature 99 ──typer, with these ranges──┐
                                                 ├──> check_arguments ──> UsageError: --temperature: found 99, ...
    generate(run, "hi", temperature="hot") ──────┘

Whether a value goes together with the recipe and the other arguments is for whoever takes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.contracts import JsonMapping
from lorafit.errors import UsageError

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Argument:
    """What an argument may be.

    Attributes:
        expected: That in words.
        types: Of its value. A truth value is no number here, and neither a text nor a mapping is a series.
        least, most: Of a number, both included.
    """

    expected: str
    types: tuple[type, ...]
    least: float | None = None
    most: float | None = None

    def holds(self, value: Any) -> bool:
        """Whether the value is one; what is in a series, is for its reader. A text with a NUL character is no path."""
        types = self.types
        if isinstance(value, bool | str | bytes | Mapping):  # to Python a number or a series as well
            types = tuple(one for one in types if one not in (int, float, Iterable))
        is_one = isinstance(value, types)
        if not is_one or (isinstance(value, float) and not math.isfinite(value)):
            return False
        if os.PathLike in types and isinstance(value, str | os.PathLike) and "\0" in str(os.fspath(value)):
            return False
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def _number(least: float | None = None, most: float | None = None, *, whole: bool = False) -> Argument:
    name = "a whole number" if whole else "a number"
    if least is not None:
        name += f" from {least:g} to {most:g}" if most is not None else f", {least:g} or more"
    return Argument(name, (int,) if whole else (int, float), least, most)


_PATH = Argument("a path", (str, os.PathLike))
_ROWS = Argument("a list of dicts, one a row", (Iterable,))
_CARD = Argument('a text such as "24GiB", "rtx-4090" or "cpu"', (str,))
_OF_SUMS = ("mean", "scores", "convert", "patterns")
_OF_RUNS = ("resume", "dry_run", "allow_inexact", "verify", "compare_base")
_SWITCHES = ("quiet", "allow_loading", "drift", "exact", *_OF_RUNS, *_OF_SUMS)
_FLAGS_ALONE = ("measure_memory", "profile", "json", "verbose", "debug")
ARGUMENTS = {
    "temperature": _number(0.0, 10.0),
    "top_p": _number(0.001, 1.0),
    "max_new_tokens": _number(1, whole=True),
    "min_new_tokens": _number(0, whole=True),
    "num_beams": _number(1, 64, whole=True),
    "length_penalty": _number(-10.0, 10.0),
    "no_repeat_ngram_size": _number(0, whole=True),
    "seed": _number(0, whole=True),
    "limit": _number(1, whole=True),
    "resume_from": _number(0, whole=True),
    "show": _number(0, whole=True),
    "headroom": _number(0.0, 0.9),
    "price_per_hour": _number(),
    "port": _number(0, 65_535, whole=True),
    "max_running": _number(1, 4_096, whole=True),
    "max_waiting": _number(1, 65_536, whole=True),
    "max_batch_tokens": _number(16, whole=True),
    "timeout": _number(0.1, 86_400.0),
    "grace": _number(0.0, 3_600.0),
    "route": _number(0.5, 0.999),
    "host": Argument("an address or a host's name", (str,)),
    "ab_split": Argument('a text such as "a=0.9,b=0.1", or a dict', (str, Mapping)),
    "feedback": _PATH,
    "adapters": Argument('a dict such as {"shop": "runs/shop"}, or a list of NAME=DIR', (Mapping, Iterable)),
    "system": Argument("a text", (str,)),
    "density": _number(0.001, 1.0),
    "rates": _number(1, 99, whole=True),
    "spread": _number(1.0, 1e6),
    "seeds": _number(3, 99, whole=True),
    "learning_rates": Argument("a list of numbers, such as 1e-4,3e-4", (str, Iterable)),
    "rank": Argument("a rank, or auto", (str, int)),
    "metric": Argument("the name of a metric", (str,)),
    "ablate": Argument('"layers", "modules" or "none"', (str,)),
    "compare": Argument("a run: what train gave back, or a path", _PATH.types),
    "expression": Argument('a sum such as "0.7*a + 0.3*b"', (str,)),
    "method": Argument('"sum", "ties" or "dare"', (str,)),
    "weights": Argument('numbers such as 0.2,0.8, or "rows"', (str, Iterable)),
    "fit_rows": Argument("a path of a file of rows", _PATH.types),
    "eval_rows": Argument("a path of a file of rows", _PATH.types),
    "budget": Argument('a time such as "60min" or "2h"', (str,)),
    "over": Argument('a dict such as {"adapter": ["lora", "dora"]} or a list of KEY=A,B', (Mapping, Iterable)),
    "recipes": Argument(
        "a recipe's file, its values as a dict, or a list of such", (str, os.PathLike, Mapping, Iterable)
    ),
    "recipe": Argument("a recipe's file, or its values as a dict", (str, os.PathLike, Mapping)),
    "run": Argument("a run: what train gave back, or a path", _PATH.types),
    "output": _PATH,
    "plan_file": _PATH,
    "base_model": Argument("a path or a hub id", _PATH.types),
    "rows": _ROWS,
    "validation_rows": _ROWS,
    "test_rows": _ROWS,
    "prompts": Argument("a text, or a list of texts and dicts", (str, Iterable)),
    "overrides": Argument('a dict such as {"training.epochs": 1}, or a list of KEY=VALUE', (Mapping, Iterable)),
    "checkpoint": Argument('"best", "last" or a step', (str, int)),
    "split": Argument('"test", "validation" or "train"', (str,)),
    "base": Argument('"dequantized" or "original"', (str,)),
    "to": Argument("the name of a target", (str,)),
    "dtype": Argument('"f32", "f16", "bf16" or "q8_0"', (str,)),
    "from_base": Argument("a model of Ollama's, or a GGUF file", (str,)),
    "base_id": Argument("a model of the hub, OWNER/NAME", (str,)),
    "repo": Argument("a repository, OWNER/NAME", (str,)),
    "license": Argument("the hub's name of a licence", (str,)),
    "gpu": _CARD,
    "fit": _CARD,
    "prompt": Argument("a text", (str,)),
    "input_file": _PATH,
    "data": Argument("a path of a file of rows", _PATH.types),
    "test_file": _PATH,
    "columns": Argument('columns by field, {"question": "Frage"}', (str, Mapping)),
    **dict.fromkeys(("task", "adapter", "quantization"), Argument("the name of a kind", (str,))),
    **dict.fromkeys((*_SWITCHES, *_FLAGS_ALONE, "private"), Argument("True or False", (bool,))),
}
FLAGS = {
    "overrides": "--set",
    "plan_file": "--plan",
    "merge.verify": "--no-verify",
    "input_file": "--input",
    "show": "--rows",
    "test_file": "--test",
    "adapters": "--adapter",
    "ab_split": "--split",
    "fit_rows": "--fit",
    "eval_rows": "--eval",
    "scores": "--no-eval",
}
"""Flags that are not called as their parameter, of one command or of all."""
_SEARCH = ("temperature", "top_p", "num_beams", "length_penalty", "no_repeat_ngram_size")
_NEVER_LEFT_OUT = {
    "recipe",
    "run",
    "data",
    "prompts",
    "overrides",
    "max_new_tokens",
    "min_new_tokens",
    "seed",
    *_SEARCH,
}
_NEVER_LEFT_OUT.update((*_SWITCHES, "recipes", "over", "rates", "spread", "seeds", "metric", "method"))


def check_arguments(arguments: JsonMapping, required: Collection[str] = ()) -> None:
    """Checks each value by its argument's name.

    Args:
        arguments: Values by the names of Python's parameters.
        required: Names that may not be None here, beside those that never may.

    Raises:
        UsageError: One is of another type or out of range; its key is the flag, `--max-new-tokens`.
    """
    for name, value in arguments.items():
        kind = ARGUMENTS[name]
        if value is None and name not in _NEVER_LEFT_OUT and name not in required:
            continue
        if not kind.holds(value):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"found {_shown(value)}", key=flag, todo=f"give {kind.expected}")


def check_search(search: JsonMapping) -> None:
    """Refuses ways to choose tokens that do not go together.

    Raises:
        UsageError: A beam search is asked for with a temperature, its penalty without it, a nucleus without a
            temperature, or no length is long enough.
    """
    if search["num_beams"] > 1 and search["temperature"] > 0:
        what, todo = "a beam search draws nothing", "leave out --num-beams or --temperature"
        raise UsageError(what, key="--num-beams", todo=todo)
    if search["num_beams"] == 1 and search["length_penalty"] != 1:
        todo = "add --num-beams 4, or leave it out"
        raise UsageError("only a beam search reads it", key="--length-penalty", todo=todo)
    if search["temperature"] == 0 and search["top_p"] < 1:
        todo = "leave it out" if search["num_beams"] > 1 else "add --temperature 0.7, or leave it out"
        raise UsageError("only sampled tokens read it", key="--top-p", todo=todo)
    least, most = search["min_new_tokens"], search["max_new_tokens"]
    if least > most:
        what, todo = f"{least} is more than the longest answer, {most}", "lower it, or raise --max-new-tokens"
        raise UsageError(what, key="--min-new-tokens", todo=todo)


def read_adapters(given: Sequence[str] | Mapping[str, str | os.PathLike[str]]) -> dict[str, Path]:
    """Folders by name. Raises UsageError for what is no `NAME=DIR`, and for a name that comes twice."""
    pairs = list(given.items()) if isinstance(given, Mapping) else [tuple(each.partition("=")[::2]) for each in given]
    read: dict[str, Path] = {}
    for name, folder in pairs:
        if not name or not os.fspath(folder):
            todo = "write NAME=DIR, e.g. shop=runs/shop"
            raise UsageError(f"'{name}{folder}' names no adapter and its folder", key="--adapter", todo=todo)
        if name in read:
            raise UsageError(f"two adapters are called '{name}'", key="--adapter", todo="give each a name of its own")
        read[name] = Path(folder).expanduser()
    return read


def _shown(value: Any) -> str:
    """A value as it was written, with its type where that is not plain."""
    try:
        text = repr(value)
    except Exception:  # an object of the user's, whose own code fails
        text = "a value"
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
    return text if value is None or isinstance(value, bool | int | float | str) else f"{text} ({type(value).__name__})"
