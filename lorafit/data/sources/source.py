"""A source of a recipe: which file or hub data set, which format, and its rows as samples with file and line.

    SourceSection --open--> Source(name, format, columns) --read--> (line, Sample | DataError), one row at a time

Opening looks at every file before anything heavy is imported: is it there, is it data, which format have its rows.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from lorafit.console.nearest import did_you_mean, nearest
from lorafit.console.wording import counted
from lorafit.contracts import JsonMapping, JsonObject, Reporter, Sample
from lorafit.data.row_counts import raise_first
from lorafit.data.sources.files import (
    FILE_SUFFIXES,
    Fingerprint,
    check_file,
    is_packed,
    suffix_of,
    take_fingerprint,
)
from lorafit.data.sources.hub import HubRows, is_hub_id
from lorafit.data.sources.lines import RawRow, RawRows
from lorafit.data.sources.readers import read_file
from lorafit.data.sources.row_columns import (
    absent_columns,
    check_task,
    explain_unread,
    find_format,
    no_prompt,
    rename,
    several_formats,
    unknown_columns,
    unnest,
)
from lorafit.data.sources.workbook import unread_sheets
from lorafit.errors import IN_MEMORY, DataError, LorafitError, MissingFieldError, RecipeError
from lorafit.files.cache import memory_rows
from lorafit.kinds.fields import advise_renaming, as_number, listed
from lorafit.kinds.formats import formats, required_fields
from lorafit.kinds.tasks import Task, TaskSection
from lorafit.recipe.schema import SourceSection

ROWS_LOOKED_AT = 100
AnyTask = Task[TaskSection] | None
Copies = Callable[[int, JsonMapping, Collection[str]], Iterable[JsonObject]]


class Source:
    """One opened source. Reading it again gives the same rows.

    Args:
        section: The source as the recipe has it.
        folder: The recipe's folder.
        prompts: Whether its rows are prompts: what the model is to write may be missing, and is left out. A prompt's
            source is a local file.
        reporter: Told that the hub is asked, and where it gave no answer.
        task: What learns its rows; None for any.

    Attributes:
        name: The file or id as the recipe names it; `rows` and the like for rows that a program gave.
        format: Name of the rows' format.
        unread: How many rows hold each column that the format does not read; filled while reading.

    Raises:
        DataError: The file is missing or no data, or its first rows have no format, or several.
        SafetyError: It is or ships a script.
        RecipeError: `columns` names a field that no format has.
    """

    def __init__(
        self, section: SourceSection, folder: Path, reporter: Reporter, *, prompts: bool = False, task: AnyTask = None
    ) -> None:
        self.section, self._prompts, self._task = section, prompts, task
        self.name = memory_rows(folder / section.path) or section.path
        self.unread: Counter[str] = Counter()
        self._path, self._hub = _locate(section, folder, reporter, local=prompts)
        self._fingerprint: Fingerprint | None = None
        self._absent = set(section.columns.values())
        self._check_columns()
        if section.format != "auto":
            self.format, self._absent = section.format, set()
        else:
            self.format = self._find_format()
        self._reader = formats.get(self.format)
        required = required_fields(self._reader, prompts=prompts)
        self._required = {self.section.columns.get(field, field) for field in required}

    def read(self, copies: Copies | None = None) -> Iterator[tuple[int, Sample | DataError]]:
        """Every row, up to the source's `limit`, as a sample or as the error that says why it is none.

        Args:
            copies: Gives changed copies of a row, by its line and fields and those that may be changed; each follows
                its row, where that is a sample.

        Raises:
            DataError: The file cannot be read any further.
        """
        for line, row in self._raw_rows():
            read = self._read_row(line, row)
            yield line, read
            if copies is None or isinstance(read, DataError) or isinstance(row, DataError):
                continue
            changed = copies(line, rename(row, self.section.columns), self._reader.rewordable)
            for number, fields in enumerate(changed, start=1):
                yield line, replace(self._placed(self._reader.read(fields, self.name, line)), copy=number)

    def numbers(self, column: str) -> Iterator[tuple[int, float | DataError]]:
        """What every row has in a column of numbers, whether its format reads that or not; or the error of the row."""
        for line, row in self._raw_rows():
            if isinstance(row, DataError):
                yield line, row
                continue
            try:
                found = unnest(row, [column])
                if column not in found:
                    close = nearest(column, found, count=1)
                    todo = f"did you mean '{close[0]}'?" if close else "name a column of numbers"
                    raise MissingFieldError(f"missing column '{column}'; found {listed(found)}", todo=todo)
                yield line, as_number(found[column], column)
            except DataError as error:
                yield line, error.at(file=self.name, line=line)

    @property
    def has_its_columns(self) -> bool:
        """Whether the first rows have every column that `columns` names and a row must have."""
        return not self._absent & self._required

    def first(self, rows: int) -> Source:
        """The same source with a limit of so many rows, or its own where that is less."""
        shorter = copy(self)
        limit = min(rows, self.section.limit or rows)
        shorter.section, shorter.unread = self.section.model_copy(update={"limit": limit}), Counter()
        return shorter

    @property
    def place(self) -> str:
        """Where it is, however the recipe spells that: the file's path from the root, or the hub id."""
        return str(self._path.resolve()) if self._path is not None else self.name

    @property
    def shown(self) -> str:
        """What a warning calls it: a file that the recipe names by its own folder, as seen from the working folder."""
        if self._path is None or self.name in IN_MEMORY or Path(self.name).expanduser().is_absolute():
            return self.name
        return os.path.relpath(self._path)

    def key(self) -> str:
        """A hash of the bytes that the rows come from, for a cache."""
        if self._hub is not None:
            return self._hub.fingerprint()
        return self._take_fingerprint().sha256

    def changed(self) -> bool:
        """Whether the file was written to since `key` was taken."""
        before = self._fingerprint
        if before is None or self._path is None:
            return False
        now = self._path.stat()
        return (now.st_mtime_ns, now.st_size) != (before.changed_at_ns, before.size_bytes)

    def guess_rows(self) -> int:
        """About how many rows there are, for a progress bar and to judge how much work is left."""
        if self._hub is not None:
            count = self._hub.count()
        else:
            assert self._path is not None
            found = self._take_fingerprint()
            is_text = suffix_of(self._path) not in (".parquet", ".xlsx") and not is_packed(self._path)
            lines = found.lines - (suffix_of(self._path) in (".csv", ".tsv"))  # the header
            count = max(1, lines, found.size_bytes // 4000) if is_text else max(1, found.size_bytes // 500)
        return min(count, self.section.limit or count)

    def has_a_line_a_row(self) -> bool:
        """Whether `guess_rows` is a count, but for a line or two: of a hub's data set, or of lines that are rows."""
        if self._path is None:
            return True
        return suffix_of(self._path) in (".jsonl", ".ndjson", ".csv", ".tsv", ".txt") and not is_packed(self._path)

    def warnings(self) -> list[str]:
        """Columns that no one reads and that look like part of what is asked, said once all rows are read."""
        said = []
        columns = dict.fromkeys([*required_fields(self._reader, prompts=self._prompts), *self.unread])
        for column, count in sorted(self.unread.items()):
            todo = explain_unread(column, columns, self._reader)
            if todo is not None:
                said.append(f"{self.shown}: column '{column}' ({counted(count, 'row')}) is not read; {todo}")
        for column in sorted(self._absent if not self._prompts else ()):  # what a prompt must have is an error
            said.append(f"{self.shown}: columns names '{column}', which none of the first rows has; correct the recipe")
        if self._path is not None and suffix_of(self._path) == ".xlsx":
            others = unread_sheets(self._path)
            said += [f"{self.shown}: {others}"] if others else []
        return said

    def _take_fingerprint(self) -> Fingerprint:
        if self._fingerprint is None:
            assert self._path is not None
            self._fingerprint = take_fingerprint(self._path)
        return self._fingerprint

    def _raw_rows(self) -> RawRows:
        rows = self._hub.rows() if self._hub is not None else self._file_rows()
        names = list(self.section.columns.values())
        if any("." in name for name in names):
            rows = ((line, row if isinstance(row, DataError) else unnest(row, names)) for line, row in rows)
        return islice(rows, self.section.limit)

    def _file_rows(self) -> RawRows:
        assert self._path is not None
        try:
            columns = list(self.section.columns.values())
            yield from read_file(self._path, columns, self._is_row, prompts=self._prompts)
        except LorafitError as error:
            raise error.at(file=self.name) from None
        except OSError as error:
            what = f"cannot be read: {(error.strerror or type(error).__name__).lower()}"
            raise DataError(what, file=self.name) from None

    def _is_row(self, row: RawRow) -> bool:
        if self.section.format == "text" and suffix_of(self.section.path) == ".txt":
            return False  # the recipe says that these lines are a text, whatever they look like
        return self._format_of(rename(row, self.section.columns)) is not None

    def _format_of(self, renamed: RawRow) -> str | None:
        wanted = self._task.row_format if self._task is not None else None
        return find_format(renamed, self.section.columns, prompts=self._prompts, wanted=wanted)

    def _read_row(self, line: int, row: RawRow | DataError) -> Sample | DataError:
        if isinstance(row, DataError):
            row.at(file=self.name, line=line)
            return row
        try:
            self._check_mapped(row)
            mapped = rename(row, self.section.columns)
            for column in mapped.keys() - self._reader.fields.keys():
                self.unread[column] += 1
            read = self._reader.read_prompt if self._prompts else self._reader.read
            return self._placed(read(mapped, self.name, line))
        except DataError as error:
            if isinstance(error, MissingFieldError):
                self._blame_row(error, row)
                if self._prompts:
                    advise_renaming(error)
            error.at(file=self.name, line=line)
            return error

    def _placed(self, sample: Sample) -> Sample:
        """The sample, its images' paths from the root: they start in the folder of the file that names them."""
        if not sample.pictures:
            return sample
        folder = self._path.parent.absolute() if self._path is not None else Path()
        placed = (replace(one, path=str(folder / one.path)) if one.path else one for one in sample.pictures)
        return replace(sample, pictures=tuple(placed))

    def _blame_row(self, error: MissingFieldError, row: RawRow) -> None:
        """What other rows have is no question of columns: the advice is about this row then."""
        column = self.section.columns.get(error.key or "", error.key or "")
        others = frozenset[str]().union(*(columns for columns in self._columns if column in columns))
        if others:
            close = nearest(column, row.keys() - others, count=1)
            error.todo = f"other rows have it; did you mean '{close[0]}'? rename it" if close else None

    @cached_property
    def _columns(self) -> list[frozenset[str]]:
        """Columns of each of the first rows, as the file calls them."""
        rows = islice(self._raw_rows(), ROWS_LOOKED_AT)
        return [frozenset(row) for _, row in rows if not isinstance(row, DataError)]

    def _check_mapped(self, row: RawRow) -> None:
        for ours, theirs in self.section.columns.items():
            if theirs not in row and theirs in self._required:
                close = nearest(theirs, row, count=1)
                todo = f"name it so, or '{ours}'" if self._prompts else "correct columns in the recipe"
                hint = f"did you mean '{close[0]}'?" if close else todo
                raise MissingFieldError(f"missing column '{theirs}'; found {listed(row)}", key=ours, todo=hint)

    def _check_columns(self) -> None:
        chosen = [self.section.format] if self.section.format != "auto" else formats.names()
        known = {field for name in chosen for field in formats.get(name).fields}
        for ours in self.section.columns:
            if ours not in known:
                hint = did_you_mean(ours, known)
                todo = f"{hint}fields are {', '.join(sorted(known))}"
                raise RecipeError(f"columns of {self.name}: unknown field '{ours}'", key="columns", todo=todo)
        if not any(self.section.columns.keys() <= formats.get(name).fields.keys() for name in chosen):
            what = f"columns of {self.name}: no format has {' and '.join(sorted(self.section.columns))} together"
            raise RecipeError(what, key="columns", todo="map the fields of one format")

    def _find_format(self) -> str:
        """The format of the first rows, which must all have the same."""
        found: dict[str, tuple[int, RawRow]] = {}
        errors: list[DataError] = []
        first: tuple[int, RawRow] | None = None
        odd: tuple[int, RawRow] | None = None
        theirs: RawRow = {}
        for line, row in islice(self._raw_rows(), ROWS_LOOKED_AT):
            if isinstance(row, DataError):
                row.at(file=self.name, line=line)
                errors.append(row)
                continue
            mapped = rename(row, self.section.columns)
            name = self._format_of(mapped)
            self._absent -= row.keys()
            if name is not None:
                if first is None:
                    first = line, dict(mapped)
                for column in first[1].keys() - mapped.keys():
                    del first[1][column]  # what only some rows have says nothing about all of them
                found.setdefault(name, (line, mapped))
            elif odd is None:
                odd, theirs = (line, mapped), row
        if len(found) > 1:
            raise several_formats(found).at(file=self.name)
        try:
            if first is not None:
                if not self._prompts:
                    check_task(first[1], next(iter(found)), self._task)
                return next(iter(found))
            if odd is not None:
                if self._absent and not self._prompts:
                    raise absent_columns(self._absent, self.section.columns, theirs)
                is_table = self._path is not None and suffix_of(self._path) in (".csv", ".tsv", ".xlsx")
                raise no_prompt(odd[1]) if self._prompts else unknown_columns(odd[1], self._task, is_table=is_table)
        except DataError as error:
            raise error.at(file=self.name, line=(first or odd or (None,))[0]) from None
        raise_first(errors, len(errors), file=self.name)
        raise DataError("no prompts" if self._prompts else "no rows", file=self.name)


def is_local(path: str, folder: Path) -> bool:
    """Whether a recipe's path of rows means a place beside the recipe, there or not, and no data set of the hub."""
    looks_local = path.lower().endswith(FILE_SUFFIXES) or not is_hub_id(path)
    is_in_folder = "/" in path and (folder / path.split("/")[0]).is_dir()
    return looks_local or is_in_folder or os.path.lexists(folder / Path(path).expanduser())


def _locate(
    section: SourceSection, folder: Path, reporter: Reporter, *, local: bool
) -> tuple[Path | None, HubRows | None]:
    """The local file of a source, checked, or (unless it must be `local`) the hub data set that its name stands for."""
    path = folder / Path(section.path).expanduser()
    if local or is_local(section.path, folder):
        check_file(path, section.path, start="the working folder" if local else "the recipe's folder")
        return path, None
    revision, split = section.revision, section.split
    return None, HubRows(section.path, subset=section.subset, split=split, revision=revision, reporter=reporter)
