"""How a function of the Python API becomes a call of its command: arguments, warnings, and errors in its words."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lorafit.console.arguments import check_arguments
from lorafit.console.exits import explain
from lorafit.console.reporting import ConsoleReporter
from lorafit.contracts import JsonMapping, Silent
from lorafit.data.sources.memory_rows import keep_rows
from lorafit.errors import LorafitError, UsageError
from lorafit.files.cache import settle_home
from lorafit.machine.library_settings import set_library_defaults

T = TypeVar("T")
StrPath = str | os.PathLike[str]
Recipe = StrPath | JsonMapping
"""A recipe's file, or its values: a dict as the YAML would hold it, its paths relative to the working folder."""
Rows = Sequence[JsonMapping]
"""Training rows in memory, in any of the formats that files may have, e.g. `[{"question": ..., "answer": ...}]`."""
Overrides = JsonMapping | Sequence[str]
"""Values over the recipe's: `{"training.epochs": 1}`, or `["training.epochs=1"]` as behind `--set`."""

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
_OTHERWISE = {"set": "overrides", "plan": "plan_file", "no_verify": "verify", "prompt": "prompts", "input": "prompts"}
"""Parameters that are not called as their flag."""


def call(
    command: Callable[..., T], arguments: JsonMapping, *, rows: str = "data.train", required: Sequence[str] = ()
) -> T:
    """Runs a command of `lorafit.pipeline`: the libraries are quiet, our warnings Python's where nothing else is shown.

    Args:
        command: The command.
        arguments: All of the function that was called, by name; those that the command calls so as well.
        rows: The recipe's key that `rows` stand for.
        required: Those that may not be None, beside those that never may.
    """
    silent = Silent()
    runs = {name: arguments[name] for name in ("run", "compare") if name in arguments}
    arguments = {**arguments, **{name: getattr(run, "path", run) for name, run in runs.items()}}  # what training gave
    try:
        check_arguments(arguments, required)
        set_library_defaults()
        if (said := settle_home()) is not None:
            silent.warn(said)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = {name: _READ[name](value) if name in _READ else value for name, value in arguments.items()}
            if (is_quiet := given.pop("quiet", None)) is not None:
                given["reporter"] = silent if is_quiet else ConsoleReporter()
            for name, key in {"rows": rows, "validation_rows": "data.validation", "test_rows": "data.test"}.items():
                if (several := given.pop(name, None)) is not None:
                    given["overrides"] = [*given["overrides"], keep_rows(several, name, key)]
            if "prompts" in given:
                prompts = given.pop("prompts")
                given["prompt" if isinstance(prompts, str) else "rows"] = prompts
            return command(**given)
    except LorafitError as error:
        _name_as_parameters(error)
        raise
    except Exception as error:
        if (told := explain(error, command.__name__)) is None:
            raise
        raise told from error
    finally:
        for message in dict.fromkeys(silent.warnings):
            warnings.warn(_with_parameters(message), stacklevel=3)  # at the line that called the function


def _path(path: Recipe | None) -> Path | JsonMapping | None:
    """Files and folders as paths; a recipe's values stay what they are."""
    return Path(path) if isinstance(path, str | os.PathLike) else path


def _paths(recipes: Recipe | Sequence[Recipe]) -> list[Path | JsonMapping | None]:
    """One recipe or several as a list."""
    if isinstance(recipes, str | os.PathLike | Mapping):
        return [_path(recipes)]
    return [_path(each) for each in recipes]


def _listed(over: Mapping[str, Sequence[Any]] | Sequence[str]) -> list[str]:
    """What is compared as `KEY=A,B`; words stay bare, all else is JSON, which is YAML that means the same."""
    if not isinstance(over, Mapping):
        return list(over)
    worded = {
        key: [one if isinstance(one, str) else json.dumps(one, default=os.fspath) for one in values]
        for key, values in over.items()
    }
    return [f"{key}={','.join(values)}" for key, values in worded.items()]


def _named_paths(adapters: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Adapters as `NAME=DIR`; what training gave back as its folder."""
    if not isinstance(adapters, Mapping):
        return [str(each) for each in adapters]
    return [f"{name}={_text(getattr(path, 'path', path))}" for name, path in adapters.items()]


def _joined(numbers: str | Sequence[float] | None) -> str | None:
    """Numbers as behind a flag, with commas."""
    return numbers if numbers is None or isinstance(numbers, str) else ",".join(map(str, numbers))


def _text(value: object | None) -> str | None:
    return None if value is None else os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _flags(overrides: Overrides) -> list[str]:
    """Overrides as `KEY=VALUE`; JSON is YAML that means the same."""
    if not isinstance(overrides, Mapping):
        for number, flag in enumerate(overrides):
            if not isinstance(flag, str):
                todo = 'give a text such as "training.epochs=1"'
                raise UsageError(f"found {type(flag).__name__}", key=f"overrides[{number}]", todo=todo)
        return list(overrides)
    try:
        return [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in overrides.items()]
    except (TypeError, ValueError, RecursionError) as error:
        what = str(error).splitlines()[0]
        raise UsageError(f"holds what no recipe can hold ({what})", key="overrides", todo="give plain values") from None


def _name_as_parameters(error: LorafitError) -> None:
    """Calls what is a flag on the command line by its parameter: `--top-p` is `top_p`, `--set a=1` is an override."""
    for part in error.errors:
        if part.key is not None and part.key.startswith("--"):
            part.key = _parameter(part.key)
        if part.file is not None and part.file.startswith("--set"):
            part.file = f"overrides{part.file.removeprefix('--set')}"
        if isinstance(part, UsageError) and part.todo is not None:
            part.todo = _with_parameters(part.todo)


def _with_parameters(text: str) -> str:
    """The text with parameters for flags, unless it quotes a command."""
    return text if "lorafit " in text else _FLAG.sub(lambda flag: _parameter(flag[0]), text)


def _parameter(flag: str) -> str:
    name = flag.removeprefix("--").replace("-", "_")
    return _OTHERWISE.get(name, name)


_READ: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("recipe", "run", "compare", "output", "plan_file", "data", "test_file"), _path),
    **dict.fromkeys(("feedback", "fit_rows", "eval_rows"), _path),
    **dict.fromkeys(("checkpoint", "base_model"), _text),
    "overrides": _flags,
    "recipes": _paths,
    "over": _listed,
    "adapters": _named_paths,
    "weights": _joined,
}
"""What an argument becomes for the command, by its name."""
