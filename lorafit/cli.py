"""The command line. Bodies import lazily, so that `--help` needs neither torch nor pydantic.

Results go to stdout, all else to stderr; `lorafit.console.exits` makes exit codes of errors.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafit.console.exits import exit_code, termination_as_error
from lorafit.console.flags import COMMON, parameter
from lorafit.contracts import JsonObject, Reporter
from lorafit.machine.library_settings import set_library_defaults

_FUNCTIONS = {"eval": "evaluate", "estimate-memory": "estimate", "inspect": "inspect_adapter"}
"""Functions that are not called as their command."""


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
    **{key: {"callback": lambda skips: not skips} for key in ("merge.verify", "scores")},
}
"""What else typer must know of a flag, of one command or of all."""


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
        session = Session(**{name: values.pop(name) for name in COMMON})
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

    everything = [parameter(function, each, _MORE) for each in (*parameters.split(), *COMMON)]
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


def _serve(session: Session, given: JsonObject) -> None:
    from lorafit.serving.serve import serve

    served = serve(given.pop("run"), **given, reporter=session.reporter)
    session.result(served)
    served.raise_if_interrupted()


def _inspect(session: Session, given: JsonObject) -> None:
    from lorafit.studies.inspection import inspect_adapter

    session.result(inspect_adapter(**given, reporter=session.reporter))


def _chat(session: Session, given: JsonObject) -> None:
    from lorafit.chatting.chat import chat

    session.result(chat(given.pop("run"), **given, shows=not session.json, reporter=session.reporter))


def _compose(session: Session, given: JsonObject) -> None:
    from lorafit.studies.compose import compose

    session.result(compose(given.pop("expression", None), **given, reporter=session.reporter))


def _export(session: Session, given: JsonObject) -> None:
    from lorafit.exporting.export import export

    session.result(export(**given, reporter=session.reporter))


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
_add_command(
    "serve",
    "A base and its adapters behind HTTP, in OpenAI's forms.",
    "run adapters ab_split feedback route drift checkpoint base_model host port allow_loading max_new_tokens "
    "max_running max_waiting max_batch_tokens timeout grace",
    _serve,
)
_add_command(
    "inspect",
    "What an adapter changes, module by module, and what each layer is worth.",
    "run ablate split limit compare output checkpoint base_model overrides",
    _inspect,
)
_add_command(
    "chat",
    "Talk with a model and its adapters, on a terminal or through a pipe.",
    "run adapters system checkpoint base_model temperature top_p max_new_tokens min_new_tokens no_repeat_ngram_size "
    "seed",
    _chat,
)
_add_command(
    "compose",
    "Several adapters of one base made one.",
    "expression adapters output rank method density seed mean weights fit_rows eval_rows scores convert patterns "
    "base_model",
    _compose,
)
_add_command(
    "export",
    "A trained adapter for PEFT, llama.cpp, Ollama, vLLM or the hub.",
    "run to output checkpoint base_model base_id base dtype from_base repo private license dry_run verify",
    _export,
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
