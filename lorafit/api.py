"""Python API: every command of lorafit as a function for scripts and notebooks.

    run = lorafit.train("recipe.yaml")                        a recipe's file, or its values as a dict
    run = lorafit.train(recipe, rows=[{"question": ...}])     rows from memory instead of files
    lorafit.evaluate(run), lorafit.merge(run, "merged"), lorafit.generate(run, "a prompt")

A function does what its command does, raises the error that the command would end with (`LorafitError`; its
`exit_code` says which kind), and gives back what `--json` prints: `print(result)` shows it, `result.to_json()` is plain
values. Progress goes to stderr; with `quiet=True` only warnings are left, as Python warnings.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorafit import pipeline
from lorafit.console.arguments import check_arguments
from lorafit.console.exits import explain
from lorafit.console.reporting import ConsoleReporter
from lorafit.contracts import JsonMapping, Silent
from lorafit.data.sources.memory_rows import keep_rows
from lorafit.errors import LorafitError, UsageError
from lorafit.files.cache import settle_home
from lorafit.machine.library_settings import set_library_defaults

if TYPE_CHECKING:
    from lorafit.data.preview import Preview
    from lorafit.estimation import RecipeEstimate
    from lorafit.run.answered import Classified, Generated
    from lorafit.run.results import Evaluated, Merged, Validated
    from lorafit.run.trained import Trained

__all__ = ["LorafitError", "classify", "estimate", "evaluate", "generate", "merge", "preview", "train", "validate"]

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


def _call(
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
    if "run" in arguments:  # what training gave back, or where it is
        arguments = {**arguments, "run": getattr(arguments["run"], "path", arguments["run"])}
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


def validate(recipe: Recipe, *, overrides: Overrides = ()) -> Validated:
    """Checks a recipe alone; files, rows and models are not opened.

    Raises:
        LorafitError: The recipe is wrong; `Problems` holds all errors where there are several.
    """
    return _call(pipeline.validate, locals())


def preview(
    recipe: Recipe,
    *,
    show: int | None = 3,
    rows: Rows | None = None,
    overrides: Overrides = (),
    quiet: bool = False,
) -> Preview:
    """Rows as the model will see them, with the tokens that carry loss, and what became of all rows.

    Args:
        recipe: The recipe.
        show: How many rows to look at; all of them where None.
        rows: Training rows instead of the recipe's `data.train`.
        overrides: Values over the recipe's.
        quiet: No progress.
    """
    return _call(pipeline.preview, locals())


def estimate(
    recipe: Recipe,
    *,
    gpu: str | None = None,
    fit: str | None = None,
    headroom: float | None = None,
    price_per_hour: float | None = None,
    exact: bool = False,
    overrides: Overrides = (),
    quiet: bool = False,
) -> RecipeEstimate:
    """Peak memory, time and price of a recipe, without weights and without a GPU.

    Args:
        recipe: The recipe.
        gpu: A card's size or name, or `cpu`: the estimate says whether the run fits.
        fit: A card: how large micro-batch, row and rank can be on it.
        headroom: Share of the card's memory that must stay free; 0.05 where None.
        price_per_hour: Of the card, in any currency.
        exact: Run the training step on fake tensors besides; the verdict goes by that.
        overrides: Values over the recipe's.
        quiet: No progress.
    """
    return _call(pipeline.estimate, locals())


def train(
    recipe: Recipe,
    *,
    rows: Rows | None = None,
    validation_rows: Rows | None = None,
    test_rows: Rows | None = None,
    overrides: Overrides = (),
    output: StrPath | None = None,
    resume: bool = False,
    resume_from: int | None = None,
    plan_file: StrPath | None = None,
    dry_run: bool = False,
    allow_inexact: bool = False,
    quiet: bool = False,
) -> Trained:
    """Plans, checks, trains and saves a run; or goes on with one. `trained.path` is its folder.

    Args:
        recipe: The recipe.
        rows: Training rows instead of the recipe's `data.train`. They are kept in lorafit's cache by their content, so
            that a resume with the same rows is the same run.
        validation_rows: The same for `data.validation`.
        test_rows: The same for `data.test`.
        overrides: Values over the recipe's.
        output: A run folder instead of the recipe's.
        resume: Go on with the run in that folder.
        resume_from: From the checkpoint of this step; implies `resume`.
        plan_file: Another run's `plan.json`, whose resolved values are taken.
        dry_run: Stop before the weights are loaded.
        allow_inexact: Resume on another kind of device or number of processes.
        quiet: No progress.

    Raises:
        LorafitError: As the command; `exit_code` says which kind. Ctrl-C saves the last step first and raises
            `StoppedBySignal`.
    """
    return _call(pipeline.train, locals())


def evaluate(
    run: StrPath | Trained,
    *,
    rows: Rows | None = None,
    checkpoint: str | int | None = None,
    split: str | None = None,
    limit: int | None = None,
    base_model: StrPath | None = None,
    overrides: Overrides = (),
    quiet: bool = False,
) -> Evaluated:
    """Scores base and tuned model on the same held-out rows. `evaluated.metrics` holds the figures by name.

    Args:
        run: What `train` gave back, a run folder, or the recipe of one.
        rows: Test rows instead of the recipe's `data.test`.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        split: `test`, `validation` or `train`; `test` where the recipe has it, else `validation`.
        limit: Only the first rows.
        base_model: Folder or hub id of the base, where it is not found by itself.
        overrides: Values over the run's recipe, e.g. `{"evaluation.final": ["rouge"]}`.
        quiet: No progress.
    """
    split = split or ("test" if rows is not None else None)
    return _call(pipeline.evaluate, locals(), rows="data.test")


def merge(
    run: StrPath | Trained,
    output: StrPath,
    *,
    base: str | None = None,
    checkpoint: str | int | None = None,
    base_model: StrPath | None = None,
    verify: bool = True,
    quiet: bool = False,
) -> Merged:
    """Merges an adapter into its base, and compares the result with the adapter.

    Args:
        run: What `train` gave back, a run folder, its recipe, or an adapter folder.
        output: Where the merged model goes.
        base: `dequantized` or `original`; what was trained on where None.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        base_model: Folder or hub id of the base, where it is not found by itself.
        verify: Whether what was written is read back and compared.
        quiet: No progress.
    """
    return _call(pipeline.merge, locals(), required=("output",))


def generate(
    run: StrPath | Trained,
    prompts: str | Sequence[str | JsonMapping],
    *,
    compare_base: bool = False,
    checkpoint: str | int | None = None,
    base_model: StrPath | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    seed: int = 0,
    quiet: bool = False,
) -> Generated:
    """Answers prompts. `generated.texts` are the answers, in the prompts' order.

    Args:
        run: What `train` gave back, a run folder, its recipe, an adapter folder, or a model folder such as a merge.
        prompts: One prompt, or several: texts, or rows as training has them (`{"messages": ...}`, with tools too).
        compare_base: Answer with the adapter off too; needs a run.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        base_model: Folder or hub id of the base, where it is not found by itself.
        temperature: 0 is greedy.
        top_p: Nucleus of the sampled tokens, 0 to 1.
        max_new_tokens: Longest answer.
        min_new_tokens: No answer ends before it has so many tokens.
        num_beams: Answers that are kept at each step of a beam search, which takes no temperature; 1: no such search.
        length_penalty: Of beam search: more than 0 favours long answers.
        no_repeat_ngram_size: No sequence of so many tokens stands twice in an answer; 0: any may.
        seed: Of the sampling.
        quiet: No progress.
    """
    return _call(pipeline.generate, locals())


def classify(
    run: StrPath | Trained,
    prompts: str | Sequence[str | JsonMapping],
    *,
    checkpoint: str | int | None = None,
    base_model: StrPath | None = None,
    quiet: bool = False,
) -> Classified:
    """Gives labels to texts, or numbers. `classified.labels` and `classified.values` are those of each text, in order.

    Args:
        run: What `train` gave back, a run folder, its recipe, an adapter folder, or a merged model's.
        prompts: One text, or several: texts, or rows as training has them.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        base_model: Folder or hub id of the base, where it is not found by itself.
        quiet: No progress.
    """
    return _call(pipeline.classify, locals())


def _path(path: Recipe | None) -> Path | JsonMapping | None:
    """Files and folders as paths; a recipe's values stay what they are."""
    return Path(path) if isinstance(path, str | os.PathLike) else path


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
    **dict.fromkeys(("recipe", "run", "output", "plan_file"), _path),
    **dict.fromkeys(("checkpoint", "base_model"), _text),
    "overrides": _flags,
}
"""What an argument becomes for the command, by its name."""
