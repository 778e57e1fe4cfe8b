"""What a preparation found, as plain numbers: counts by source, lengths, overlaps, rows with their fate; and what is
said of it before training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorafit.console.wording import agreed, counted
from lorafit.contracts import JsonObject
from lorafit.data.row_counts import Ledger, SourceCounts
from lorafit.data.sample_renderer import Renderer
from lorafit.data.sources.sample_set import SampleSet
from lorafit.data.store import NO_PROMPT, ExampleSet
from lorafit.errors import row_place
from lorafit.facts import Bar
from lorafit.kinds.row_limits import Limit
from lorafit.kinds.tasks import Task, TaskSection
from lorafit.recipe.schema import DataSection, ValidationFraction

HISTOGRAM_BARS = 12
PLACES_SHOWN = 20
ROWS_NAMED = 3
_PREFERRED_AS_CHATS = "for chats name a template, such as data.chat_template: chatml, or write the answers as turns"
_TO_CHATS = {
    "prompt_completion": "for chats map them, columns: {question: prompt, answer: completion}; "
    "else set train_on: completion",
    "preference": _PREFERRED_AS_CHATS,
    "unpaired_preference": _PREFERRED_AS_CHATS,
}
"""Formats of prompts with their answers as verbatim text, and what to do for chats."""


@dataclass(frozen=True, slots=True)
class RowNote:
    """One row that was `bad`, `dropped`, `cut` or `split`, and why."""

    what: str
    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Overlap:
    """Rows that two splits share.

    Attributes:
        first, second: The splits.
        rows: Rows of `second` that occur in `first`.
        places: The first of them, as (place in `first`, place in `second`), each `file:line`.
    """

    first: str
    second: str
    rows: int
    places: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Contradictions:
    """Training rows that ask the same and answer differently, so that no model can learn all of them.

    Attributes:
        prompts: Prompts with more than one answer.
        rows: Rows with one of these prompts.
        places: For the first of the prompts, two rows with different answers, each `file:line`.
    """

    prompts: int
    rows: int
    places: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One split after preparation.

    Attributes:
        rows: Its examples.
        trained_tokens: Of its `tokens`, those that carry loss.
        histogram: Rows by their length.
        sources: What became of the rows of each source; empty for rows held out of the training sources.
        notes: The first rows that something happened to.
        seen: What the template did with fields, with the number of rows.
        cache: Hit or miss, and why.
        of_rows: About how many rows the sources hold, where only their first ones were prepared; else None.
        classes: Rows, or words, of each class; empty where the task has none.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    histogram: tuple[Bar, ...]
    sources: tuple[SourceCounts, ...]
    notes: tuple[RowNote, ...]
    seen: dict[str, int]
    cache: str
    of_rows: int | None = None
    classes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataReport:
    """All splits after preparation."""

    splits: dict[str, SplitReport]
    overlaps: tuple[Overlap, ...] = ()
    contradictions: Contradictions | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def trained_share(self) -> float:
        """Share of the training tokens that carry loss (0 to 1)."""
        train = self.splits["train"]
        return train.trained_tokens / train.tokens

    def to_json(self) -> JsonObject:
        """Plain data."""
        return {**asdict(self), "trained_share": self.trained_share}


def report_split(
    examples: ExampleSet,
    ledger: Ledger | None,
    cache: str,
    task: Task[TaskSection],
    of_rows: int | None = None,
) -> SplitReport:
    """The report of a split; without a ledger for rows that were held out of another one."""
    lengths = np.asarray(examples.lengths)
    notes = ledger.notes if ledger else []
    return SplitReport(
        rows=len(examples),
        tokens=int(lengths.sum()),
        trained_tokens=int(np.asarray(examples.trained_tokens).sum()),
        longest_tokens=int(lengths.max(initial=0)),
        histogram=count_lengths(lengths),
        sources=tuple(ledger.sources) if ledger else (),
        notes=tuple(RowNote(note.fate, examples.files[note.source], note.why.line or 0, note.reason) for note in notes),
        seen=dict(ledger.seen) if ledger else {},
        cache=cache,
        of_rows=of_rows,
        classes=task.count_classes(examples.read_column),
    )


def count_lengths(lengths: Sequence[int] | NDArray[np.int64]) -> tuple[Bar, ...]:
    """A histogram of at most `HISTOGRAM_BARS` bars of equal, round width."""
    values = np.asarray(lengths)
    if not len(values):
        return ()
    longest = int(values.max())
    rough = longest / HISTOGRAM_BARS
    unit = 10 ** math.floor(math.log10(rough)) if rough >= 1 else 1
    width = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * HISTOGRAM_BARS >= longest)
    counts = np.bincount((values - 1) // width)
    return tuple(Bar(place * width + 1, (place + 1) * width, int(rows)) for place, rows in enumerate(counts))


def find_contradictions(train: ExampleSet) -> Contradictions | None:
    """Rows with the same tokens before their last answer and other tokens behind; None where there are none."""
    asked, whole = np.asarray(train.prompt_hashes), np.asarray(train.hashes)
    order = np.lexsort((whole, asked))
    asked, whole = asked[order], whole[order]
    begins = np.flatnonzero(np.append(True, asked[1:] != asked[:-1])) if len(asked) else np.empty(0, np.int64)
    ends = np.append(begins[1:], len(asked))
    found = (asked[begins] != NO_PROMPT) & (whole[begins] != whole[ends - 1])
    pairs = sorted(
        (min(order[begin:end]), int(next(row for row in sorted(order[begin:end]) if train.hashes[row] != first)))
        for begin, end in zip(begins[found].tolist(), ends[found].tolist(), strict=True)
        for first in [train.hashes[min(order[begin:end])]]
    )
    if not pairs:
        return None
    places = tuple((_place(train, int(one)), _place(train, other)) for one, other in pairs[:PLACES_SHOWN])
    return Contradictions(len(pairs), int((ends - begins)[found].sum()), places)


def describe_fates(split: str, report: SplitReport, limits: Sequence[Limit]) -> list[str]:
    """A sentence for each thing that happened to rows of a split so that they are not learnt, or not whole."""
    said = []
    longest = " or ".join(f"{limit.name} {limit.most}" for limit in limits)
    options = " or ".join(limit.option for limit in limits)
    for fate, what, todo in (
        ("bad", "skipped, since they cannot be trained on", "correct or remove them"),
        ("dropped", f"dropped, longer than {longest}", f"raise {options}, or shorten them"),
        ("cut", f"cut to {longest}", f"raise {options} to learn them whole"),
    ):
        count = sum(getattr(counts, fate) for counts in report.sources)
        places = [row_place(note.file, note.line) for note in report.notes if note.what == fate]
        if count:
            shown = ", ".join(places[:ROWS_NAMED]) + (" ..." if count > ROWS_NAMED else "")
            said.append(f"{split}: {counted(count, 'row')} {what} ({shown}); {todo}")
    return said


def find_overlaps(splits: dict[str, ExampleSet]) -> tuple[Overlap, ...]:
    """Rows with the same tokens in two splits."""
    found = []
    names = list(splits)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            one, other = splits[first], splits[second]
            shared = np.flatnonzero(np.isin(other.hashes, one.hashes))
            if len(shared):
                order = np.argsort(one.hashes, kind="stable")
                there = order[np.searchsorted(one.hashes, other.hashes[shared[:PLACES_SHOWN]], sorter=order)]
                places = zip(there.tolist(), shared[:PLACES_SHOWN].tolist(), strict=True)
                pairs = tuple((_place(one, a), _place(other, b)) for a, b in places)
                found.append(Overlap(first, second, len(shared), pairs))
    return tuple(found)


def _place(examples: ExampleSet, index: int) -> str:
    example = examples[index]
    return row_place(example.file, example.line)


_FILES_NAMED = 5


def finish_report(
    reports: dict[str, SplitReport],
    sets: dict[str, ExampleSet],
    sources: dict[str, SampleSet],
    data: DataSection,
    renderer: Renderer,
    task: Task[TaskSection],
    *,
    is_decided: bool,
) -> DataReport:
    """The report of all splits, with a sentence for each thing that somebody should know of before training.

    Args:
        is_decided: How rows are written was settled when a run was trained: it is not said again.

    Raises:
        DataError: The training rows are all of one class.
    """
    overlaps = find_overlaps(sets)
    warnings = [_warn_of_glance(split, report, data) for split, report in reports.items() if report.of_rows is not None]
    for overlap in overlaps:
        one, other = overlap.places[0]
        warnings.append(
            f"{counted(overlap.rows, 'row')} of {overlap.second} {agreed(overlap.rows, 'occurs', 'occur')} in "
            f"{overlap.first} as well, the first at {other} and {one}"
        )
    train = reports.get("train")
    if train is not None and train.of_rows is None and not is_decided:
        warnings += task.check_classes(train.classes, train.rows)
    contradictions = find_contradictions(sets["train"]) if "train" in sets else None
    if contradictions is not None:
        one, other = contradictions.places[0]
        told = f"train: {counted(contradictions.prompts, 'question')} with different answers, e.g. {one} and {other}"
        warnings.append(f"{told}: the model learns to guess between them; keep one answer each")
    for split, report in reports.items():
        warnings += describe_fates(split, report, task.limits(data.max_length))
        for what, count in sorted(report.seen.items()):
            if not what.startswith("history: "):
                warnings.append(f"{split}: {what} in {counted(count, 'row')}")
    for samples in sources.values():
        warnings += [warning for source in samples.sources for warning in source.warnings()]
    warnings += [] if is_decided else _warn_of_verbatim(sources, data, renderer)
    warnings += _warn_of_date(sources, renderer)
    return DataReport(reports, overlaps, contradictions, tuple(warnings))


def _warn_of_glance(split: str, report: SplitReport, data: DataSection) -> str:
    """That only a part was looked at, and what shows with all of it."""
    read = counted(sum(counts.read for counts in report.sources), "row")
    draws = split == "train" and isinstance(data.validation, ValidationFraction)
    shows = "counts all, and draws those that are held out" if draws else "counts all"
    some = f"{split}: only the first {read} of about {report.of_rows:,} are prepared and counted"
    return f"{some}; lorafit preview without --rows {shows}"


def _warn_of_verbatim(sources: dict[str, SampleSet], data: DataSection, renderer: Renderer) -> list[str]:
    """What a recipe may expect of rows that go through no template, told by the first row of each source."""
    found: dict[str, dict[str, None]] = {}
    for samples in sources.values():
        for source, first in samples.first_of_each():
            if not renderer.is_chat(first):
                found.setdefault(source.format, {})[source.shown] = None
    warnings = []
    for kind, names in sorted(found.items()):
        files = list(names)
        more = f" and {len(files) - _FILES_NAMED} more" if len(files) > _FILES_NAMED else ""
        named = f"{', '.join(files[:_FILES_NAMED])}{more}"
        if data.system_prompt is not None:
            warnings.append(f"{named}: rows of {kind} are verbatim: data.system_prompt is not used")
        is_meant = kind == "prompt_completion" and data.train_on == "completion"  # of preferences it says nothing
        if kind in _TO_CHATS and renderer.template and not is_meant:
            warnings.append(f"{named}: prompts and their answers go through no chat template; {_TO_CHATS[kind]}")
    return warnings


def _warn_of_date(sources: dict[str, SampleSet], renderer: Renderer) -> list[str]:
    """What the template writes of the present moment: the only thing in a run's rows that nobody gave it."""
    written = renderer.written_date
    first = (sample for samples in sources.values() for sample in samples.first_samples())
    if written is None or not any(renderer.is_chat(sample) for sample in first):
        return []
    pinned = f"the chat template writes the date: pinned to {written} when the run begins, for its resumes and answers"
    return [f"{pinned}; to train without, set data.chat_template to a copy without strftime_now"]
