"""Counts of what became of the rows of one split, and the rule for the bad ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from lorafit.console.wording import agreed, counted
from lorafit.contracts import JsonObject
from lorafit.data.chat.template_names import KEY as TEMPLATE_KEY
from lorafit.errors import DataError, LorafitError, Problems, UnusableImageError
from lorafit.recipe.schema import BadRowsSection

NOTES_KEPT = 1000
OVERLONG = "overlong"
_REASON_CHARACTERS = 300
LINES_SHOWN = 3
_MOST_SKIPPED = 0.5  # where more are bad, columns or labels are meant otherwise, and nobody wants the few that are left
DROPS_ROWS = "the chat template drops"
"""How an error of a row begins that holds what the template renders nowhere."""
ERRORS_SHOWN = 5


def raise_first(errors: Sequence[LorafitError], count: int, *, file: str, todo: str | None = None) -> None:
    """Raises nothing for no error, the error itself for one, and for several the first five with the count of all.

    The last line says what to do: as the first error does, else `todo`.
    """
    if count == 1:
        errors[0].todo = errors[0].todo or todo
        raise errors[0]
    if errors:
        problems = Problems(errors[:ERRORS_SHOWN], file=file)
        problems.todo = None if errors[0].todo else todo  # its own stands in the line already
        problems.what = problems.what.replace(f"{len(problems.errors)} errors", f"{count} errors", 1)
        raise problems


@dataclass(slots=True)
class SourceCounts:
    """What became of the rows of one source.

    Attributes:
        read: Rows read.
        kept: Examples made of them (`split` makes several of one row).
        bad: Malformed, empty and untrainable rows.
        dropped: Rows left out for their length.
        cut: Rows shortened to the longest length.
        split: Rows cut into several examples.
        copies: Changed copies that were made of rows; those that are kept are examples.
        unread: Columns that the format does not read, with the number of rows that hold them.
    """

    file: str
    format: str
    read: int = 0
    kept: int = 0
    bad: int = 0
    dropped: int = 0
    cut: int = 0
    split: int = 0
    copies: int = 0
    unread: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Noted:
    """What happened to one row.

    Attributes:
        fate: `bad`: it cannot be trained on; `dropped`, `cut` or `split` for its length; `overlong`: it is too long
            where the recipe says that this is an error.
        source: Number of its source.
        why: The reason, with the row's place.
    """

    fate: str
    source: int
    why: DataError

    @property
    def reason(self) -> str:
        """The reason without the place."""
        return (f"{self.why.key}: {self.why.what}" if self.why.key else self.why.what)[:_REASON_CHARACTERS]


class Ledger:
    """Counts and notes of one pass over the sources of a split.

    Args:
        sources: Name and format of each source.

    Attributes:
        sources: Counts, one for each source.
        notes: The first `NOTES_KEPT` rows of each fate.
        seen: Other things worth a number, e.g. fields that a template drops, by what they are.
        unusable: Files of images for which a row is bad, with the time when each was last written to; None where it is
            not there.
    """

    def __init__(self, sources: Sequence[tuple[str, str]], bad_rows: BadRowsSection) -> None:
        self.sources = [SourceCounts(name, kind) for name, kind in sources]
        self.notes: list[Noted] = []
        self.seen: Counter[str] = Counter()
        self.unusable: dict[str, int | None] = {}
        self._bad_rows = bad_rows
        self._fates: Counter[str] = Counter()

    def note(self, noted: Noted) -> None:
        """Something happened to a row."""
        counts, fate = self.sources[noted.source], noted.fate
        if fate != OVERLONG:
            setattr(counts, fate, getattr(counts, fate) + 1)
        if isinstance(noted.why, UnusableImageError):
            self.unusable[noted.why.path] = noted.why.changed_at_ns
        self._fates[fate] += 1
        if self._fates[fate] <= NOTES_KEPT:
            self.notes.append(noted)

    def sort(self) -> None:
        """Puts notes and errors into the order of the rows: rows are read ahead of those that are made."""
        self.notes.sort(key=lambda note: (note.source, note.why.line or 0))

    def _why(self, fate: str) -> list[LorafitError]:
        return [note.why for note in self.notes if note.fate == fate]

    def judge(self, *, may_skip: bool = False) -> None:
        """Applies the recipe's rules once all rows are read.

        Args:
            may_skip: Whether the rule is one of a recipe, which may leave bad rows out.

        Raises:
            DataError: Rows are bad and the policy is `error`, or more of a source are than may be, or rows are too
                long; several as `Problems`, which shows the first five and counts all.
        """
        errors: list[LorafitError] = []
        count = 0
        if self._bad_rows.policy == "error":
            errors, count = self._why("bad"), self._fates["bad"]
        else:
            for number, source in enumerate(self.sources):
                if source.bad > self._bad_rows.max_fraction * source.read:
                    errors.append(self._too_many(number))
                    count += 1
        are_bad = bool(errors) and self._bad_rows.policy == "error"
        errors, count = _with_drops_as_one(errors, count)
        errors += self._why(OVERLONG)
        count += self._fates[OVERLONG]
        file = errors[0].file or "data" if errors else "data"
        raise_first(errors, count, file=file, todo=self._advise() if are_bad and may_skip else None)

    def _advise(self) -> str:
        """What may be done about bad rows: to leave them out too, where enough of each source is left."""
        share = max(source.bad / source.read for source in self.sources if source.read)
        if share > _MOST_SKIPPED:
            return "correct such rows"
        raised = f", max_fraction: {math.ceil(100 * share) / 100:g}" if share > self._bad_rows.max_fraction else ""
        return f"correct such rows, or leave them out with data.bad_rows: {{policy: skip{raised}}}"

    def _too_many(self, number: int) -> DataError:
        source = self.sources[number]
        limit = f"the limit bad_rows.max_fraction is {self._bad_rows.max_fraction:g}"
        firsts = (f"; first: line {note.why.line}: {note.reason}" for note in self.notes if note.source == number)
        first = next(firsts, "")
        what = f"{source.bad} of {counted(source.read, 'row')} {agreed(source.bad, 'is', 'are')} bad, {limit}{first}"
        return DataError(what, file=source.file, todo="correct them, or raise the limit")

    def to_json(self) -> JsonObject:
        """Everything that a cached copy must be able to say again."""
        notes = [
            (note.fate, note.source, note.why.line, note.why.column, note.why.key, note.why.what, note.why.todo)
            for note in self.notes
        ]
        sources = [asdict(source) for source in self.sources]
        counts = {"fates": dict(self._fates), "seen": dict(self.seen)}
        return {"sources": sources, "notes": notes, **counts, "unusable": self.unusable}

    @classmethod
    def from_json(cls, value: JsonObject, names: Sequence[str], bad_rows: BadRowsSection) -> Ledger:
        """The ledger of a cached split; files are called what the recipe calls them now."""
        ledger = cls([], bad_rows)
        ledger.sources = [
            SourceCounts(**{**counts, "file": name}) for counts, name in zip(value["sources"], names, strict=True)
        ]
        for fate, source, line, column, key, what, todo in value["notes"]:
            why = DataError(what, file=names[source], line=line, column=column, key=key, todo=todo)
            ledger.notes.append(Noted(fate, source, why))
        ledger.seen, ledger._fates = Counter(value["seen"]), Counter(value["fates"])
        ledger.unusable = dict(value["unusable"])
        return ledger


def _with_drops_as_one(errors: list[LorafitError], count: int) -> tuple[list[LorafitError], int]:
    """The errors, where those of a template that drops what rows hold became one: it is the template's fault.

    Args:
        errors: Of rows; where there are very many, the first of them.
        count: Of all.
    """
    alike = [error for error in errors if error.key == TEMPLATE_KEY and error.what.startswith(DROPS_ROWS)]
    if len(alike) < 2:
        return errors, count
    number = count if len(alike) == len(errors) else len(alike)
    first = alike[0]
    lines = [str(error.line) for error in alike if error.file == first.file][:LINES_SHOWN]
    what = f"in {number:,} rows, lines {', '.join(lines)}{' ...' if number > len(lines) else ''}, {first.what}"
    one = DataError(what, file=first.file, line=first.line, key=first.key, todo=first.todo)
    return [one, *(error for error in errors if error not in alike)], count - number + 1
