"""The sources of a recipe as one: their rows in order, with what is no sample counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from lorafit.contracts import Reporter, Sample
from lorafit.data.augment import Augmenter
from lorafit.data.row_counts import Ledger, Noted
from lorafit.data.sources.files import find_files
from lorafit.data.sources.source import AnyTask, Source
from lorafit.errors import DataError, LorafitError, raise_all
from lorafit.recipe.schema import BadRowsSection, SourceSection


class SampleSet:
    """The samples of several sources, read lazily, one at a time and in order.

    Attributes:
        sources: The opened sources.
    """

    def __init__(self, sources: Sequence[Source], bad_rows: BadRowsSection, reporter: Reporter) -> None:
        self.sources, self._bad_rows, self._reporter = tuple(sources), bad_rows, reporter

    def new_ledger(self) -> Ledger:
        """An empty ledger for one pass over these sources."""
        return Ledger([(source.name, source.format) for source in self.sources], self._bad_rows)

    def first(self, rows: int) -> SampleSet:
        """The first rows of each source."""
        return SampleSet([source.first(rows) for source in self.sources], self._bad_rows, self._reporter)

    def guess_rows(self) -> int:
        """About how many rows there are."""
        return sum(source.guess_rows() for source in self.sources)

    def count_for_bar(self) -> int | None:
        """How many rows there are, but for some; None where that cannot be told before they are read."""
        return self.guess_rows() if all(source.has_a_line_a_row() for source in self.sources) else None

    def rows(self, augmenter: Augmenter | None = None) -> Iterator[tuple[int, int, Sample | DataError]]:
        """Every row as (number of its source, line, sample or error), with what an augmenter makes of it behind it."""
        for number, source in enumerate(self.sources):
            source.unread.clear()
            copies = None if augmenter is None else partial(augmenter.copies, number)
            for line, row in source.read(copies):
                yield number, line, row

    def numbers(self, column: str) -> Iterator[tuple[int, int, float | DataError]]:
        """What every row has in a column of numbers, as (number of its source, line, number or error)."""
        for number, source in enumerate(self.sources):
            yield from ((number, line, value) for line, value in source.numbers(column))

    def first_of_each(self) -> Iterator[tuple[Source, Sample]]:
        """Each source with its first usable row; all rows of a source have one form."""
        for source in self.sources:
            yield from ((source, row) for row in islice(_usable(source), 1))

    def first_samples(self) -> Iterator[Sample]:
        """The first usable row of each source."""
        return (sample for _, sample in self.first_of_each())

    def usable(self, ledger: Ledger, augmenter: Augmenter | None = None) -> Iterator[tuple[int, int, Sample]]:
        """Every sample as (number of its source, line, sample), copies behind it; what is none goes to the ledger."""
        for number, line, row in self.rows(augmenter):
            is_copy = isinstance(row, Sample) and row.copy > 0
            ledger.sources[number].copies += is_copy
            ledger.sources[number].read += not is_copy
            if isinstance(row, DataError):
                ledger.note(Noted("bad", number, row))
            else:
                yield number, line, row

    def __iter__(self) -> Iterator[Sample]:
        """Every sample; at the end the recipe's rule for bad rows is applied, and what warns of columns is said."""
        ledger = self.new_ledger()
        yield from (sample for *_, sample in self.usable(ledger))
        ledger.judge()
        for warning in (warning for source in self.sources for warning in source.warnings()):
            self._reporter.warn(warning)


def read_sources(
    sources: Sequence[SourceSection],
    folder: Path,
    bad_rows: BadRowsSection,
    reporter: Reporter,
    task: AnyTask = None,
) -> SampleSet:
    """Opens every source, so that a missing or unreadable one is an error before anything heavy starts.

    A source whose path is a pattern is opened as one for each of its files.

    Args:
        folder: The recipe's folder, which paths are relative to.
        task: What learns the rows; None for any.

    Raises:
        DataError: One source cannot be opened; several of them as `Problems`.
        SafetyError: One is or ships a script.
    """
    opened, errors = [], []
    for section in sources:
        try:
            for name in find_files(section.path, folder):
                opened.append(Source(section.model_copy(update={"path": name}), folder, reporter, task=task))
        except LorafitError as error:
            errors.append(error)
    raise_all(errors, file="data")
    return SampleSet(opened, bad_rows, reporter)


def _usable(source: Source) -> Iterator[Sample]:
    return (row for _, row in source.read() if not isinstance(row, DataError))
