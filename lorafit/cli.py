"""The command line. Bodies import lazily, so that `--help` needs neither torch nor pydantic.

Results go to stdout, all else to stderr; `lorafit.console.exits` makes exit codes of errors.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from lorafit.console.arguments import ARGUMENTS
from lorafit.console.exits import exit_code, termination_as_error
from lorafit.contracts import JsonObject, Reporter
from lorafit.machine.library_settings import set_library_defaults

_COMMON_FLAGS = {
    "json": "One JSON object on stdout, also for an error.",
    "quiet": "Only errors and the result.",
    "verbose": "Say more.",
    "debug": "Show tracebacks and the libraries' own logs.",
}


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


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags that every command has.

    One that takes a Session has a body. Any other is only its flags: they are the arguments of the function of
    `lorafit.pipeline` that is called as it is.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())
    has_body = hints.get(parameters[0].name) is Session
    named = inspect.Parameter.KEYWORD_ONLY
    flags = [
        inspect.Parameter(name, named, default=False, annotation=Annotated[bool, typer.Option(f"--{name}", help=text)])
        for name, text in _COMMON_FLAGS.items()
    ]

    def run(**values: Any) -> None:
        session = Session(**{name: values.pop(name) for name in _COMMON_FLAGS})
        _ran_with.append(session)
        if not session.debug:
            from lorafit.console.reporting import quieten_libraries

            quieten_libraries()
        if has_body:
            function(session, **values)
            return
        from lorafit import pipeline

        given = {name: value for name, value in values.items() if value is not None}
        session.result(getattr(pipeline, function.__name__)(**given, reporter=session.reporter))

    everything = [p.replace(annotation=hints[p.name], kind=named) for p in parameters[has_body:]] + flags
    run.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in everything}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


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


def _number(parameter: str, metavar: str, said: str) -> Any:
    """An option for a number, in the range of Python's parameter."""
    number = ARGUMENTS[parameter]
    return typer.Option(metavar=metavar, min=number.least, max=number.most, help=said)


_ROWS_SHOWN = "Rows to show; of many, only the first are counted then. Without: 3, or all with --json."
_HEADROOM = "Of the card's memory, what must stay free: 0.05 where not given."
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", readable=False, help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one value of the recipe, e.g. training.epochs=1. Repeatable."
    ),
]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="best|last|STEP", help="Which checkpoint; the saved adapter if left out.")
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="PATH_OR_ID",
        help="Where the base model is: a folder, a .gguf file or a hub id. It must be the one that was trained on.",
    ),
]


@app.command()
@_command
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Run folder instead of the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    resume_from: Annotated[int | None, _number("resume_from", "STEP", "Go on from this checkpoint.")] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Take the resolved values of another run's plan.json.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan and check, then stop before the weights are loaded.")
    ] = False,
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Resume on another kind of device or number of ranks.")
    ] = False,
    measure_memory: Annotated[
        bool, typer.Option("--measure-memory", help="Count live tensors in every step: slower, and exact.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write where the time goes into the run folder: a table and a trace.")
    ] = False,
) -> None:
    """Plan, check, train and save."""


@app.command(name="eval")
@_command
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN_OR_RECIPE", help="A run folder, or the recipe of one.")],
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    split: Annotated[
        str | None, typer.Option(metavar="test|validation", help="Rows to score; test where the recipe has it.")
    ] = None,
    limit: Annotated[int | None, _number("limit", "ROWS", "Score only the first rows.")] = None,
    base_model: BaseModel = None,
) -> None:
    """Score base and tuned model side by side on the same rows."""


@app.command()
@_command
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder, or an adapter folder.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the merged model goes.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="dequantized|original", help="Weights to merge into; what was trained on if left out."),
    ] = None,
    checkpoint: Checkpoint = None,
    base_model: BaseModel = None,
    verify: Annotated[
        bool,
        typer.Option("--no-verify", callback=lambda skips: not skips, help="Skip the check of what was written."),
    ] = False,
) -> None:
    """Merge an adapter into its base, and verify the result."""


@app.command()
@_command
def generate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run, its recipe, an adapter or a model folder.")
    ],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="One prompt.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="A file of prompts: txt, one a line, or training's rows."),
    ] = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Answer with the base model too.")] = False,
    checkpoint: Checkpoint = None,
    base_model: BaseModel = None,
    temperature: Annotated[float, _number("temperature", "NUMBER", "0 is greedy.")] = 0.0,
    top_p: Annotated[float, _number("top_p", "SHARE", "Nucleus of the sampled tokens.")] = 1.0,
    max_new_tokens: Annotated[int, _number("max_new_tokens", "TOKENS", "Longest answer, in tokens.")] = 256,
    seed: Annotated[int, _number("seed", "NUMBER", "Of the sampling.")] = 0,
) -> None:
    """Answer a prompt, or a file of prompts."""


@app.command()
@_command
def classify(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run, its recipe, an adapter or a merged model folder.")
    ],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="One text.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="A file of texts: txt, one a line, or training's rows."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the labels there too, a JSON object a line.")
    ] = None,
    checkpoint: Checkpoint = None,
    base_model: BaseModel = None,
) -> None:
    """Give labels to a text, or a file of texts."""


def _list_cards(context: typer.Context, gpus: list[str] | None) -> list[str]:
    named = [name.strip() for each in gpus or [] for name in each.split(",")]
    if "list" not in named:
        return named
    from lorafit.machine.hardware import card_lines, cards

    typer.echo(json.dumps({"cards": cards()}) if "--json" in (context.obj or ()) else "\n".join(card_lines()))
    raise typer.Exit


@app.command(name="estimate-memory")
@_command
def estimate_memory(
    session: Session,
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE|NAME",
            callback=_list_cards,
            is_eager=True,
            help="24GiB, rtx-4090 or cpu: exit 10 where it does not fit; several are compared. `list` names all cards.",
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="SIZE|NAME", help="The largest micro-batch, row and rank that fit; exit 10 if none does."),
    ] = None,
    headroom: Annotated[float | None, _number("headroom", "SHARE", _HEADROOM)] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="PRICE", help="Of the card, in any currency: what the run will cost.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Run the training step itself on tensors without values: up to a minute.")
    ] = False,
) -> None:
    """Itemised peak memory, time and cost, without weights and without a GPU."""
    from lorafit import pipeline

    ask: JsonObject = {"overrides": overrides or [], "headroom": headroom, "fit": fit, "exact": exact}
    ask |= {"price_per_hour": price_per_hour, "reporter": session.reporter}
    several = gpu is not None and len(gpu) > 1
    one = gpu[0] if gpu else None
    result = pipeline.compare_cards(recipe, gpu or [], **ask) if several else pipeline.estimate(recipe, gpu=one, **ask)
    session.result(result)
    result.raise_unless_fits()


@app.command()
@_command
def validate(session: Session, recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Every error of a recipe at once, each with its line."""
    from lorafit import pipeline

    valid = pipeline.validate(recipe, overrides=overrides or [])
    if session.json:
        session.result(valid)
    else:
        typer.echo(valid.line())


@app.command()
@_command
def preview(
    session: Session,
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int | None, _number("show", "ROWS", _ROWS_SHOWN)] = None,
) -> None:
    """Rows as the model will see them: trained, cut, dropped."""
    from lorafit import pipeline

    shown = rows if rows is not None or session.json else 3
    found = pipeline.preview(
        recipe, overrides=overrides or [], show=shown, counts_all=not rows, reporter=session.reporter
    )
    session.result(found)


for _entry in app.registered_commands:  # the list of commands wraps what is said so, and cuts what is not
    _entry.short_help = inspect.getdoc(_entry.callback)


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
