"""The command line. Bodies import lazily, so that `--help` needs neither torch nor pydantic.

Results go to stdout, all else to stderr; `lorafit.console.exits` makes exit codes of errors.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafit.console.arguments import ARGUMENTS, FLAGS
from lorafit.console.exits import exit_code, termination_as_error
from lorafit.contracts import JsonObject, Reporter
from lorafit.machine.library_settings import set_library_defaults

_HELP = {
    "json": ("", "One JSON object on stdout, also for an error."),
    "quiet": ("", "Only errors and the result."),
    "verbose": ("", "Say more."),
    "debug": ("", "Show tracebacks and the libraries' own logs."),
    "recipe": ("RECIPE", "The recipe, a YAML file."),
    "overrides": ("KEY=VALUE", "Change one value of the recipe, e.g. training.epochs=1. Repeatable."),
    "checkpoint": ("best|last|STEP", "Which checkpoint; the saved adapter if left out."),
    "base_model": (
        "PATH_OR_ID",
        "Where the base model is: a folder, a .gguf file or a hub id. It must be the one that was trained on.",
    ),
    "train.output": ("DIR", "Run folder instead of the recipe's."),
    "resume": ("", "Go on with the run in the output folder."),
    "resume_from": ("STEP", "Go on from this checkpoint."),
    "plan_file": ("FILE", "Take the resolved values of another run's plan.json."),
    "dry_run": ("", "Plan and check, then stop before the weights are loaded."),
    "allow_inexact": ("", "Resume on another kind of device or number of ranks."),
    "measure_memory": ("", "Count live tensors in every step: slower, and exact."),
    "profile": ("", "Write where the time goes into the run folder: a table and a trace."),
    "evaluate.run": ("RUN_OR_RECIPE", "A run folder, or the recipe of one."),
    "split": ("test|validation|train", "Rows to score; test where the recipe has it."),
    "limit": ("ROWS", "Score only the first rows."),
    "merge.run": ("RUN_OR_ADAPTER", "A run folder, or an adapter folder."),
    "merge.output": ("DIR", "Where the merged model goes."),
    "base": ("dequantized|original", "Weights to merge into; what was trained on if left out."),
    "verify": ("", "Skip the check of what was written."),
    "generate.run": ("RUN_OR_MODEL", "A run, its recipe, an adapter or a model folder."),
    "generate.prompt": ("TEXT", "One prompt."),
    "generate.input_file": ("FILE", "A file of prompts: txt, one a line, or training's rows."),
    "compare_base": ("", "Answer with the base model too."),
    "temperature": ("NUMBER", "0 is greedy."),
    "top_p": ("SHARE", "Nucleus of the sampled tokens."),
    "max_new_tokens": ("TOKENS", "Longest answer, in tokens."),
    "min_new_tokens": ("TOKENS", "No answer ends before it has so many."),
    "num_beams": ("BEAMS", "Answers kept at each step of a beam search; 1 is none."),
    "length_penalty": ("NUMBER", "Of beam search: more than 0 favours long answers."),
    "no_repeat_ngram_size": ("TOKENS", "No so many tokens stand twice in an answer; 0 allows it."),
    "seed": ("NUMBER", "Of the sampling."),
    "classify.run": ("RUN_OR_MODEL", "A run, its recipe, an adapter or a merged model folder."),
    "classify.prompt": ("TEXT", "One text."),
    "classify.input_file": ("FILE", "A file of texts: txt, one a line, or training's rows."),
    "classify.output": ("FILE", "Write the labels there too: a table (.csv), or JSON lines (.jsonl)."),
    "data": ("ROWS", "A file of rows to train on: jsonl, json, csv, tsv, txt, parquet, xlsx."),
    "init.output": ("FILE", "The recipe to write; recipe.yaml where not given."),
    "init.base_model": ("PATH_OR_ID", "The base model: a folder, a .gguf file or a hub id."),
    "task": ("TASK", "What the rows teach; the first that reads them where not given."),
    "adapter": ("KIND", "The adapter; lora where not given."),
    "quantization": ("KIND", "How the frozen weights are stored."),
    "test_file": ("ROWS", "Rows that training never sees."),
    "columns": ("OURS=THEIRS", "Which columns hold the fields of a format, e.g. question=Frage,answer=Antwort."),
    "gpu": (
        "SIZE|NAME",
        "24GiB, rtx-4090 or cpu: exit 10 where it does not fit; several are compared. `list` names all cards.",
    ),
    "fit": ("SIZE|NAME", "The largest micro-batch, row and rank that fit; exit 10 if none does."),
    "headroom": ("SHARE", "Of the card's memory, what must stay free: 0.05 where not given."),
    "price_per_hour": ("PRICE", "Of the card, in any currency: what the run will cost."),
    "exact": ("", "Run the training step itself on tensors without values: up to a minute."),
    "recipes": ("RECIPE", "A recipe with --over, or several recipes of the same rows."),
    "over": ("KEY=A,B", "Values of a key that are compared, e.g. adapter=lora,dora. Repeatable: every combination."),
    "compare.output": ("DIR", "Folder of the comparison instead of RUN-comparison."),
    "rates": ("NUMBER", "Learning rates of each method, around its own."),
    "spread": ("FACTOR", "The highest of these rates is so many times the lowest."),
    "learning_rates": ("A,B,C", "These learning rates for every method instead."),
    "seeds": ("NUMBER", "Runs of each method at each rate, each with a seed of its own."),
    "metric": ("NAME", "What methods are ranked by, on the test rows."),
    "budget": ("TIME", "Most time, e.g. 60min: what it does not reach is left out, and said."),
    "trim.run": ("RUN_OR_RECIPE", "A run folder, or the recipe of one."),
    "rank": (
        "RANK",
        "The smaller rank, or auto: the smallest that validation rows cannot tell from the whole adapter.",
    ),
    "trim.output": ("DIR", "Folder of the adapter instead of RUN-rank-RANK."),
    "compare.resume": ("", "Go on with the comparison in the output folder."),
    "show": ("ROWS", "Rows to show; of many, only the first are counted then. Without: 3, or all with --json."),
}
"""What stands for a value, empty where a flag has none, and the help: by parameter, of one command or of all."""
_COMMON = ("json", "quiet", "verbose", "debug")
_DEFAULTS = {
    "temperature": 0.0,
    "top_p": 1.0,
    "seed": 0,
    "max_new_tokens": 256,
    "min_new_tokens": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "rates": 3,
    "spread": 10.0,
    "seeds": 3,
    "metric": "loss",
}
_REQUIRED = ("merge.output", "trim.rank")
_SEVERAL = ("overrides", "gpu", "over", "recipes")
_FUNCTIONS = {"eval": "evaluate", "estimate-memory": "estimate"}
"""Functions of `lorafit.pipeline` that are not called as their command."""


@dataclass
class Session:
    """The flags that every command has, and what follows from them; and whether a result was printed."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    has_result: bool = False

    @property
    def reporter(self) -> Reporter:
        """Where progress and warnings go: stderr."""
        from lorafit.console.reporting import ConsoleReporter
        from lorafit.files.cache import settle_home

        reporter = ConsoleReporter(quiet=self.quiet, verbose=self.verbose)
        if (said := settle_home()) is not None:
            reporter.warn(said)
        return reporter

    def result(self, result: Any) -> None:
        """Prints a result: `to_json()` with `--json`, else `render(console)` through rich."""
        self.has_result = True
        if self.json:
            typer.echo(json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False))
        else:
            from lorafit.console.reporting import result_console

            result.render(result_console())


_ran_with: list[Session] = []
app = typer.Typer(
    name="lorafit",
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from lorafit.machine.version import __version__

        typer.echo(f"lorafit {__version__}")
        raise typer.Exit


@app.callback()
def lorafit(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA and QLoRA from one YAML recipe."""


def _list_cards(context: typer.Context, gpus: list[str] | None) -> list[str]:
    named = [name.strip() for each in gpus or [] for name in each.split(",")]
    if "list" not in named:
        return named
    from lorafit.machine.hardware import card_lines, cards

    typer.echo(json.dumps({"cards": cards()}) if "--json" in (context.obj or ()) else "\n".join(card_lines()))
    raise typer.Exit


_MORE: dict[str, JsonObject] = {
    "gpu": {"callback": _list_cards, "is_eager": True},
    "verify": {"callback": lambda skips: not skips},
}
"""What else typer must know of a flag."""


def _parameter(command: str, name: str) -> inspect.Parameter:
    """A parameter of a command for typer: its type, its default, its flag and its help."""
    argument = ARGUMENTS[name]
    default: Any = _DEFAULTS.get(name, inspect.Parameter.empty)
    metavar, text = _HELP.get(f"{command}.{name}") or _HELP[name]
    kind: Any = next((kind for kind in (bool, str, float, int) if kind in argument.types), str)
    if os.PathLike in argument.types and name != "base_model":
        kind = Path
    kind = list[str] if name in _SEVERAL else kind
    flag, more = FLAGS.get(name, f"--{name.replace('_', '-')}"), _MORE.get(name, {})
    option: Any = typer.Option(flag, metavar=metavar or None, help=text, min=argument.least, max=argument.most, **more)
    if name in ("recipe", "run", "recipes", "data"):
        option = typer.Argument(metavar=metavar, readable=name == "run", help=text)
    elif name not in _DEFAULTS and f"{command}.{name}" not in _REQUIRED:
        kind, default = (kind, False) if kind is bool else (kind | None, None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _add_command(name: str, does: str, parameters: str, body: Callable[[Session, Any], None] | None = None) -> None:
    """Adds a command to the app, with the flags that every command has.

    Args:
        name: As it is typed.
        does: Its help.
        parameters: Names of its arguments and flags, in order.
        body: Runs it; where None, the function of `lorafit.pipeline` is called with the flags as they are.
    """
    function = _FUNCTIONS.get(name, name)

    def run(**values: Any) -> None:
        session = Session(**{name: values.pop(name) for name in _COMMON})
        _ran_with.append(session)
        if not session.debug:
            from lorafit.console.reporting import quieten_libraries

            quieten_libraries()
        given = {name: value for name, value in values.items() if value is not None}
        if body is not None:
            body(session, given)
            return
        from lorafit import pipeline

        session.result(getattr(pipeline, function)(**given, reporter=session.reporter))

    everything = [_parameter(function, parameter) for parameter in (*parameters.split(), *_COMMON)]
    run.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in everything}
    run.__name__, run.__doc__ = function, does
    app.command(name=name, short_help=does)(run)  # without, the list of commands would be cut


def _estimate_memory(session: Session, given: JsonObject) -> None:
    from lorafit import pipeline

    gpus, ask = given.pop("gpu", []), {**given, "reporter": session.reporter}
    if len(gpus) > 1:
        result: Any = pipeline.compare_cards(gpus=gpus, **ask)
    else:
        result = pipeline.estimate(gpu=gpus[0] if gpus else None, **ask)
    session.result(result)
    result.raise_unless_fits()


def _validate(session: Session, given: JsonObject) -> None:
    from lorafit import pipeline

    valid = pipeline.validate(**given)
    if session.json:
        session.result(valid)
    else:
        typer.echo(valid.line())


def _preview(session: Session, given: JsonObject) -> None:
    from lorafit import pipeline

    rows = given.pop("show", None)
    shown = rows if rows is not None or session.json else 3
    session.result(pipeline.preview(**given, show=shown, counts_all=not rows, reporter=session.reporter))


def _compare(session: Session, given: JsonObject) -> None:
    from lorafit.studies.compare import compare

    recipes = [Path(name) for name in given.pop("recipes")]
    session.result(compare(recipes, **given, reporter=session.reporter))


def _trim(session: Session, given: JsonObject) -> None:
    from lorafit.studies.trim import trim

    session.result(trim(**given, reporter=session.reporter))


def _init(session: Session, given: JsonObject) -> None:
    from lorafit.studies.first_recipe import init

    def ask(question: str, answers: Sequence[str], usual: str) -> str:
        if answers:
            typer.echo(f"({', '.join(answers)})", err=True)
        while (answer := str(typer.prompt(question, default=usual, err=True))) not in (answers or [answer]):
            typer.echo(f"'{answer}' is none of them", err=True)
        return answer

    asks = sys.stdin.isatty() and sys.stderr.isatty() and not (session.json or session.quiet)
    session.result(init(**given, ask=ask if asks else None, reporter=session.reporter))


_add_command(
    "train",
    "Plan, check, train and save.",
    "recipe overrides output resume resume_from plan_file dry_run allow_inexact measure_memory profile",
)
_add_command(
    "eval",
    "Score base and tuned model side by side on the same rows.",
    "run overrides checkpoint split limit base_model",
)
_add_command(
    "merge",
    "Merge an adapter into its base, and verify the result.",
    "run output base checkpoint base_model verify",
)
_add_command(
    "generate",
    "Answer a prompt, or a file of prompts.",
    "run prompt input_file compare_base checkpoint base_model temperature top_p max_new_tokens min_new_tokens "
    "num_beams length_penalty no_repeat_ngram_size seed",
)
_add_command(
    "classify",
    "Give labels to a text, or a file of texts.",
    "run prompt input_file output checkpoint base_model",
)
_add_command(
    "estimate-memory",
    "Itemised peak memory, time and cost, without weights and without a GPU.",
    "recipe overrides gpu fit headroom price_per_hour exact",
    _estimate_memory,
)
_add_command(
    "compare",
    "Methods against each other, with rates, seeds and intervals.",
    "recipes over overrides output rates spread learning_rates seeds metric budget resume",
    _compare,
)
_add_command(
    "trim",
    "A trained adapter with a smaller rank, and what that costs.",
    "run rank output checkpoint base_model overrides",
    _trim,
)
_add_command("validate", "Every error of a recipe at once, each with its line.", "recipe overrides", _validate)
_add_command(
    "init",
    "A commented recipe for your rows; asks what is not given.",
    "data output base_model task adapter quantization test_file columns",
    _init,
)
_add_command("preview", "Rows as the model will see them: trained, cut, dropped.", "recipe overrides show", _preview)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `lorafit` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _ran_with.clear()
    words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    set_library_defaults()
    with termination_as_error():
        code = exit_code(
            lambda: app(args=words, standalone_mode=False, obj=words),
            words[0],
            debug=lambda: bool(_ran_with and _ran_with[-1].debug),
            json_head=lambda: _json_head_of_failure(words),
        )
    sys.exit(code)


def _json_head_of_failure(words: list[str]) -> JsonObject | None:
    """What the JSON object of a failure begins with; None without `--json`, and where a result was printed."""
    wanted = _ran_with[-1].json and not _ran_with[-1].has_result if _ran_with else "--json" in words
    if not wanted:
        return None
    return {"valid": False} if words[0] == "validate" else {}
