"""How a command ends: the one place where errors become exit codes and lines on stderr.

LorafitError      its own code, `error: <file>[:line[:column]][: key]: <what>; <what to do>`
no memory         7, wherever it ran out, with what the command can do with less of
Ctrl-C, SIGTERM   128 + signal, nothing left half-written; a second Ctrl-C ends without cleaning up
closed pipe       141
our own bug       1, with the traceback in a file that is named

With `--json` the same stands as one object on stdout: `{"error": {...}, "errors": [{...}, ...]}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from lorafit.console.wording import agreed
from lorafit.contracts import JsonObject
from lorafit.errors import MESSAGE_LIMIT_CHARACTERS, LorafitError, Problems, ResourceError, StoppedBySignal, UsageError

EXIT_BROKEN_PIPE = 141
_SHORTEST_SECRET_CHARACTERS = 6
_SHOW_CURSOR = b"\x1b[?25h"
_LESS_MEMORY = {
    "train": "lower data.max_length or training.micro_batch_tokens, or set model.quantization: nf4, "
    "see lorafit estimate-memory",
    **dict.fromkeys(("eval", "evaluate"), "lower evaluation.max_new_tokens, or free what other processes hold"),
    "generate": "ask for fewer new tokens, or free what other processes hold",
}
"""What takes less memory, by command, of the command line or of Python."""
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]  # every error that typer finds in a command line
_EXTRA_WORD = re.compile(r"unexpected extra (arguments?)(?:\(s\))? \(([^)]*)")
_UNIT_OF_MEMORY = re.compile(r"[kmgt]i?b", re.IGNORECASE)
_PYDANTICS_WORDS = (
    (r"Input should be a valid number\b.*", "expected a number"),
    (r"Input should be a valid integer\b.*", "expected a whole number"),
    (r"Input should be a valid boolean\b.*", "expected true or false"),
    (r"Input should be (less than or equal to|at most) ", "must be at most "),
    (r"Input should be (greater than or equal to|at least) ", "must be at least "),
    (r"Input should be ", "must be "),
)
"""What typer has pydantic say of a flag's value, and how errors of a recipe say it."""


@contextlib.contextmanager
def termination_as_error() -> Iterator[None]:
    """Makes SIGTERM and the first Ctrl-C exceptions, so that half-written files are removed; a second Ctrl-C does not
    wait for that. Training puts its own handlers over these.
    """

    def stop(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        raise StoppedBySignal(f"stopped by {name}; nothing was left half-written", signal_number=number)

    def interrupt(number: int, frame: Any) -> None:
        signal.signal(number, end_at_once)
        raise KeyboardInterrupt

    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_at_once(number: int, frame: Any) -> None:
    """A signal's handler that ends the process where it stands; its workers end with it."""
    if sys.stderr.isatty():
        os.write(2, _SHOW_CURSOR)  # a bar hides it
    os._exit(128 + number)


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _alike_as_one(parts: Sequence[LorafitError]) -> Iterator[str]:
    """A line for each error; one that several lines of a file have in the same words is said once, with all of them."""
    alike: dict[tuple[str | None, ...], list[LorafitError]] = {}
    for part in parts:
        alike.setdefault((part.file, part.key, part.what, part.todo), []).append(part)
    for first, *others in alike.values():
        lines = [str(other.line) for other in others if other.line != first.line]
        also = f" (and {agreed(len(lines), 'line', 'lines')} {', '.join(lines)})" if lines else ""
        line = f"{first.one_line}{also}"
        yield from [line] if len(line) <= MESSAGE_LIMIT_CHARACTERS else (one.one_line for one in (first, *others))


def _report(error: LorafitError, json_head: JsonObject | None) -> int:
    """Writes an error's lines to stderr and, where `json_head` says so, its object behind that head to stdout."""
    parts = error.errors
    if json_head is not None:
        failure = {**json_head, "error": error.to_json(), "errors": [part.to_json() for part in parts]}
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(json.dumps(failure, ensure_ascii=False, allow_nan=False) + "\n")
            sys.stdout.flush()
    for line in _alike_as_one(parts) if isinstance(error, Problems) else ():
        _say(f"error: {line}")
    if error.exit_code == 128 + signal.SIGINT and sys.stderr.isatty():
        _say("")  # the terminal wrote ^C into this line
    _say(f"error: {error.one_line}")
    return error.exit_code


def _command_line_error(error: Exception) -> UsageError | None:
    """What typer found wrong in a command line, in our form; None where it printed a help page instead."""
    text = " ".join(str(getattr(error, "format_message", error.__str__)()).split())[:260]
    name, _, rest = text.partition(" (Possible options: ")
    if rest:
        text = f"{name}; did you mean {rest.rstrip(')')}?"
    for pattern, ours in _PYDANTICS_WORDS:
        text = re.sub(pattern, ours, text)
    text = text.replace(". Did you mean ", "; did you mean ").replace("'", "").rstrip(".")
    if not text:
        return None
    context = getattr(error, "ctx", None)
    command = f"lorafit {context.info_name}" if context is not None and context.parent is not None else "lorafit"
    todo = None if "did you mean" in text else f"see {command} --help"
    if (extra := _EXTRA_WORD.search(text)) is not None and (advice := _on_extra_words(extra[1], extra[2], context)):
        todo = f"{advice}, or {todo}"
    lacking, example = getattr(error, "param", None), getattr(getattr(error, "param", None), "metavar", None)
    if text.startswith("Missing option") and lacking is not None and example:
        todo = f"add {lacking.opts[0]} {example}; {todo}"
    words = () if context is None else context.command.params
    if text.startswith("No such option: -") and any(one.name == "expression" for one in words):
        todo = f'a sum that begins with a minus needs parentheses, e.g. "(-a) + b"; {todo}' if todo else None
    return UsageError(f"{text[:1].lower()}{text[1:]}", todo=todo)


def _on_extra_words(noun: str, words: str, context: Any) -> str:
    """What to do about words of a command line that no argument takes; empty where nothing is known."""
    given = getattr(context, "params", {})
    if "prompt" in given and given["prompt"] is None:
        return 'write the text behind --prompt, e.g. --prompt "What is it?"'
    if _UNIT_OF_MEMORY.fullmatch(words):
        return f"write a size as one word, e.g. 24{words}"
    is_quoted = noun == "argument" and " " in words  # one, with its blanks
    return "" if is_quoted else "quote what has blanks"


def bug(error: BaseException) -> LorafitError:
    """Writes the traceback to a file and names it."""
    import tempfile

    text = _without_secrets("".join(traceback.format_exception(error)))
    descriptor, name = tempfile.mkstemp(prefix="lorafit-traceback-", suffix=".txt", text=True)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    what = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    return LorafitError(f"a bug in lorafit ({what})", todo=f"please report it with the traceback saved in {name}")


def explain(error: Exception, command: str) -> LorafitError | None:
    """Errors that are the user's to mend, whatever room they come from: no memory left, and those of the file system.

    Args:
        error: No `LorafitError`.
        command: What was run, by its name on the command line or in Python.
    """
    from lorafit.ops.process_memory import is_out_of_memory

    if not is_out_of_memory(error):
        return _explain_os_error(error) if isinstance(error, OSError) else None
    text = str(error)
    size = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    what = f"out of memory{' of the GPU' if 'CU' in text else ''}{f', {size[1]} more were needed' if size else ''}"
    return ResourceError(what, todo=_LESS_MEMORY.get(command, "free what other processes hold"))


def _explain_os_error(error: OSError) -> LorafitError | None:
    import errno

    from lorafit.files.atomic import DISK_ERRORS

    file = str(error.filename) if error.filename is not None else None
    if error.errno == errno.ENAMETOOLONG:
        return UsageError("file name too long", file=file and f"{file[:60]}…", todo="choose a shorter name")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UsageError("permission denied", file=file, todo="change its permissions or choose another path")
    if file is not None and error.errno == errno.ENOENT and not Path(file).absolute().parent.is_dir():
        return ResourceError("its folder disappeared", file=file, todo="was it removed? start again")
    if error.errno in DISK_ERRORS:
        return ResourceError(
            DISK_ERRORS[error.errno], file=file, todo="free or change the disk; what was saved before is intact"
        )
    return None


def exit_code(
    run: Callable[[], Any], command: str, *, debug: Callable[[], bool], json_head: Callable[[], JsonObject | None]
) -> int:
    """Runs the app; every way it can end becomes an exit code and at most one last line `error: ...`.

    Args:
        run: The app.
        command: The word that names what it runs.
        debug: Whether tracebacks are shown; asked at the end.
        json_head: What the object of a failure begins with; None where no object is wanted. Asked at the end.
    """
    failure: LorafitError | None
    try:
        result = run()
        if result == 128 + signal.SIGINT:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except LorafitError as error:
        _show_traceback(debug)
        failure = error
    except _CommandLineError as error:
        failure = _command_line_error(error)
    except (KeyboardInterrupt, typer.Abort):
        failure = StoppedBySignal("stopped by SIGINT; nothing was left half-written", signal_number=signal.SIGINT)
    except (BrokenPipeError, SystemExit) as stop:  # typer and rich make exit 1 of a closed pipe
        if not isinstance(stop, BrokenPipeError) and not isinstance(stop.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains again at exit
        return EXIT_BROKEN_PIPE
    except Exception as error:
        _show_traceback(debug)
        failure = explain(error, command) or bug(error)
    return _report(failure, json_head()) if failure is not None else UsageError.exit_code


def _show_traceback(debug: Callable[[], bool]) -> None:
    """With `--debug`. Exit code and last line are the same with it."""
    if debug():
        _say(_without_secrets(traceback.format_exc()))


def _without_secrets(text: str) -> str:
    """A traceback without the tokens and keys of the environment, which libraries quote in their messages."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET_CHARACTERS and name.upper().endswith(("TOKEN", "KEY", "SECRET", "PASSWORD")):
            for form in (value, repr(value)[1:-1], repr(value.encode("utf-8", "surrogateescape"))[2:-1]):
                text = text.replace(form, f"<{name}>")
    return text
