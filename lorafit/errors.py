"""Every error a user can meet, with its exit code.

    LorafitError                  1   our own bug, when nothing below fits
    ├── UsageError                2   wrong command line, or an output that is in the way
    ├── RecipeError               3   the recipe
    ├── DataError                 4   rows, files, masks
    │   ├── MissingFieldError     4   a row without a field that its format needs
    │   └── UnusableImageError    4   an image's file that is not there, or is none
    ├── ModelError                5   base model, tokenizer, chat template or adapter
    ├── CheckpointError           6   a checkpoint or run folder
    ├── ResourceError             7   out of memory or disk
    │   └── QueueFull             7   too many requests wait already
    ├── SafetyError               8   refused for safety
    ├── NumericsError             9   NaN, Inf, a proof that failed
    ├── DoesNotFitError          10   the estimate says that it does not fit
    ├── StoppedBySignal       128+n   stopped by signal n after its state was saved
    └── Problems                  ·   several errors at once; exits as its first

A message reads `<file>[:line[:column]][: key]: <what>; <what to do>`. `lorafit.console.exits` is the one place that
turns these into exit codes and prints them behind `error: `.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from lorafit.contracts import JsonObject

MESSAGE_LIMIT_CHARACTERS = 292  # with "error: " in front, and a little room, a line stays under 300

IN_MEMORY = ("rows", "validation_rows", "test_rows")
"""What sources are called whose rows a program handed over: the parameter's name."""

_LONGEST_NAME_CHARACTERS = 40


def _cut_names(message: str) -> str | None:
    """A message within the limit whose list of names at the end is cut between two of them, and their number is told;
    None where it ends in no list.
    """
    kept = message[: MESSAGE_LIMIT_CHARACTERS - len(" and 999 more")].rpartition(", ")[0]
    left_out = message[len(kept) :].split(", ")[1:]
    if kept and all(len(name) <= _LONGEST_NAME_CHARACTERS and " " not in name for name in left_out):
        return f"{kept} and {len(left_out)} more"
    return None


def row_place(file: str, line: int) -> str:
    """Where a row is: `train.jsonl:3`; of rows that a program gave, `rows[2]`."""
    return f"{file}[{line - 1}]" if file in IN_MEMORY else f"{file}:{line}"


class LorafitError(Exception):
    """Base of every error that lorafit raises on purpose.

    Args:
        what: What is wrong, in lower case, without a full stop.
        file: The file (or flag, e.g. `--set`) the error is in, as the user would name it.
        line: Line in that file, from 1.
        column: Column in that line, from 1.
        key: Dotted recipe key, row field or tensor name.
        todo: What the user can do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        file: str | None = None,
        line: int | None = None,
        column: int | None = None,
        key: str | None = None,
        todo: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.file, self.line, self.column, self.key, self.todo = what, file, line, column, key, todo

    def __str__(self) -> str:
        return self.one_line

    @property
    def one_line(self) -> str:
        """Place, what is wrong and what to do, at most `MESSAGE_LIMIT_CHARACTERS` long."""
        place = self.file or ""
        if place and self.line is not None:
            place = row_place(place, self.line) + (f":{self.column}" if self.column is not None else "")
        head = ": ".join(part for part in (place, self.key or "") if part)
        head, tail = f"{head}: " if head else "", f"; {self.todo}" if self.todo else ""
        what = " ".join(self.what.split())
        message, room = f"{head}{what}{tail}", MESSAGE_LIMIT_CHARACTERS - len(head) - len(tail)
        if len(what) > room:  # what to do is told whole, but for a list of names
            with_fewer_names = None if room > 40 else _cut_names(message)
            cut = f"{head}{what[: room - 1]}…{tail}" if room > 0 else message[: MESSAGE_LIMIT_CHARACTERS - 1] + "…"
            return with_fewer_names or cut
        return message

    @property
    def errors(self) -> tuple[LorafitError, ...]:
        """Every single error: this one, or all of `Problems`."""
        return (self,)

    def to_json(self) -> JsonObject:
        """Message and place, for `--json`."""
        names = ("what", "file", "line", "column", "key", "todo")
        return {"exit_code": self.exit_code, "message": self.one_line, **{name: getattr(self, name) for name in names}}

    def at(self, file: str | None = None, line: int | None = None, key: str | None = None) -> Self:
        """Fills in the place where the raiser could not know it; what is already known stays. Returns self."""
        self.file = self.file or file
        self.line = self.line if self.line is not None else line
        self.key = self.key or key
        return self

    def named_at(self, key: str, file: str, line: int | None = None, column: int | None = None) -> LorafitError:
        """Moves the error of a whole file to the place that names the file. Returns self."""
        if self.line is None and self.file != file:
            self.what = f"{self.file}: {self.what}" if self.file else self.what
            self.file, self.line, self.column, self.key = file, line, column, key
        return self


class UsageError(LorafitError):
    """The command line is wrong, or the output is in the way."""

    exit_code = 2


class RecipeError(LorafitError):
    """The recipe does not hold a valid run."""

    exit_code = 3


class DataError(LorafitError):
    """A data file or a row of it cannot be trained on as it is."""

    exit_code = 4


class MissingFieldError(DataError):
    """A row lacks a field that its format needs, which the key names; who knows other rows may know better advice."""


class UnusableImageError(DataError):
    """A row's image cannot be read; another file in its place would change that, and not the row.

    Args:
        path: The absolute path of the image's file.
        changed_at_ns: When it was last written to; None where it is not there.
    """

    def __init__(  # with defaults: a worker process hands it over, which calls it with `what` alone
        self,
        what: str,
        *,
        path: str = "",
        changed_at_ns: int | None = None,
        key: str | None = None,
        todo: str | None = None,
    ) -> None:
        super().__init__(what, key=key, todo=todo)
        self.path, self.changed_at_ns = path, changed_at_ns


class ModelError(LorafitError):
    """Base model, tokenizer, chat template or adapter cannot be used."""

    exit_code = 5


class CheckpointError(LorafitError):
    """A run folder or checkpoint cannot be used."""

    exit_code = 6


class ResourceError(LorafitError):
    """Memory or disk ran out, or a card cannot be used."""

    exit_code = 7


class QueueFull(ResourceError):  # noqa: N818 - a state, which passes
    """So many requests wait already that one more is not taken; its message has the numbers."""


class SafetyError(LorafitError):
    """Refused because it would run foreign code, leak a secret or leave its folder."""

    exit_code = 8


class NumericsError(LorafitError):
    """A number that must be finite or equal is not."""

    exit_code = 9


class DoesNotFitError(LorafitError):
    """The estimate says that the run does not fit into memory."""

    exit_code = 10


class StoppedBySignal(LorafitError):  # noqa: N818 - not a fault
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, what: str, *, signal_number: int, todo: str | None = None) -> None:
        super().__init__(what, todo=todo)
        self.exit_code = 128 + signal_number


class Problems(LorafitError):  # noqa: N818 - several
    """Several errors found in one go. Exits as its first.

    `errors` holds them. The command line prints one line each and a last one with the count; `str()` has the count
    first, and behind it a line each.

    Raises:
        ValueError: For an empty sequence, which would be no error at all.
    """

    def __init__(self, errors: Sequence[LorafitError], *, file: str) -> None:
        if not errors:
            raise ValueError("Problems needs at least one error")
        first, room = errors[0].one_line, MESSAGE_LIMIT_CHARACTERS - len(f"{file}: {len(errors)} errors; first: ")
        if len(first) > room and errors[0].todo:  # its own line says what to do; no list of names is cut twice
            known = errors[0]
            short = LorafitError(known.what, file=known.file, line=known.line, column=known.column, key=known.key)
            first = short.one_line
        first = first.removeprefix(f"{file}:").strip() if first.startswith(f"{file}: ") else first
        super().__init__(f"{len(errors)} errors; first: {first}", file=file)
        self._errors = tuple(errors)
        self.exit_code = errors[0].exit_code

    @property
    def errors(self) -> tuple[LorafitError, ...]:
        """Those that were found, in the order of their places."""
        return self._errors

    def __str__(self) -> str:
        return "\n".join([self.one_line, *(str(error) for error in self.errors)])


def raise_all(errors: Sequence[LorafitError], *, file: str) -> None:
    """Raises nothing for no error, the error itself for one, and `Problems` for several."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Problems(errors, file=file)
