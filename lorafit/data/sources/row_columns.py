"""What the columns of a row say: which format it has, or which it probably has and how they are mapped to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lorafit.console.nearest import nearest
from lorafit.console.wording import alternatives
from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import DataError, MissingFieldError
from lorafit.kinds.fields import listed, missing_field
from lorafit.kinds.formats import Format, formats, required_fields
from lorafit.kinds.tasks import Task, TaskSection, tasks

Columns = Mapping[str, str]
"""`{ours: theirs}`: which of a source's columns holds a field of its format."""
Row = JsonMapping

_ANSWER_MISSING = "a training row holds its answer; prompts are for generate --input"

NO_PROMPT = "no prompt among the columns"
NO_FORMAT = "no known format has the columns"
_LABELS, _THEIRS = "labels", "THEIRS"
_VERDICTS = ("true", "false")
_TURNS = {"messages": "role", "conversations": "from"}
"""Fields that hold lists of turns, and the key that tells whose turns they are."""


def by_priority() -> list[tuple[str, Format]]:
    """The formats, those first that are asked first."""
    return sorted(formats.items(), key=lambda item: item[1].priority)


def unnest(row: JsonObject, names: Collection[str]) -> JsonObject:
    """The row with what stands inside of an object as columns of their own, where `object.key` is one of the names."""
    for name in names if any("." in name for name in names) else ():
        while name not in row:
            outer = next((key for key in row if name.startswith(f"{key}.") and isinstance(row[key], dict)), None)
            if outer is None:
                break
            inner = {f"{outer}.{key}": value for key, value in row[outer].items()}
            row = {**{key: value for key, value in row.items() if key != outer}, **inner}
    return row


def rename(row: Row, columns: Columns) -> JsonObject:
    """The row with our names for the mapped columns; a name of ours that was taken gives way."""
    if not columns:
        return dict(row)
    row = unnest(dict(row), columns.values())
    renamed = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    renamed.update({ours: row[theirs] for ours, theirs in columns.items() if theirs in row})
    return renamed


def find_format(
    row: Row, mapped: Iterable[str] = (), *, prompts: bool = False, wanted: str | None = None
) -> str | None:
    """The format that a row looks like; None for no known one.

    Args:
        row: Its columns, named as the formats name them.
        mapped: Fields that the recipe maps: the format must read all of them.
        prompts: Whether it is a prompt: one that is a whole training row besides is read as that.
        wanted: The format that is asked first; by priority where None.
    """
    in_order = sorted(by_priority(), key=lambda item: item[0] != wanted)
    kinds = [(name, kind) for name, kind in in_order if set(mapped) <= kind.fields.keys()]
    if prompts:
        asked = {name: required_fields(kind, prompts=True) for name, kind in kinds}
        kinds = [(name, kind) for name, kind in kinds if asked[name] and asked[name] <= row.keys()]
    if wanted in dict(kinds) and required_fields(formats.get(wanted)) <= row.keys():  # its reader says what is wrong
        return wanted
    whole = next((name for name, kind in kinds if kind.matches(row)), None)
    return whole or (kinds[0][0] if prompts and kinds else None)


def check_task(row: Row, name: str, task: Task[TaskSection] | None) -> None:
    """Refuses rows of another task: what they would teach it would be lost.

    Args:
        row: A row, named as the formats name them.
        name: Its format.
        task: What is to learn it; None for any.

    Raises:
        DataError: It is not of the task's format, or an answer with a verdict on it that is not read.
    """
    needs = None if task is None or task.row_format in (None, name) else _say_needs(task, row)
    learners = [other for other in tasks.names() if tasks.get(other).row_format == name]
    if needs is not None and learners and _THEIRS in needs:  # no mapping makes other rows of them
        needs = f"{needs.partition(': ')[0]}; those are rows for task {alternatives(learners)}"
    if name == "prompt_completion" and str(row.get(_LABELS)).lower() in _VERDICTS:
        todo = f"set task: kto and columns: {{label: {_LABELS}}}; format: prompt_completion learns every answer"
        raise DataError("says of each answer whether it is wanted, and is not read", key=_LABELS, todo=needs or todo)
    if needs is not None:
        raise DataError(f"rows of {name}, with the columns {listed(row)}", todo=needs)


def guess_columns(row: Row, kind: Format) -> dict[str, str] | None:
    """Which columns of a row hold the fields of a format, by names that others use; None where a field must be
    guessed in vain.
    """
    found = _find_columns(row, kind)
    return None if required_fields(kind) - found.keys() else found


def _find_columns(row: Row, kind: Format) -> dict[str, str]:
    """The columns of a row that hold fields of a format by names that others use."""
    folded = {str(key).lower(): str(key) for key in row}
    found: dict[str, str] = {}
    for field in sorted(kind.fields, key=lambda field: not kind.fields[field]):
        names = [field, *kind.known_as.get(field, ())]
        column = next((folded[name] for name in names if name in folded and folded[name] not in found.values()), None)
        if column is not None:
            found[field] = column
    return {field: found[field] for field in kind.fields if field in found}


def _say_needs(task: Task[TaskSection], row: Row) -> str | None:
    """The fields of a task's own format, and how a row's columns are mapped to them; None where it reads several."""
    if task.row_format is None:
        return None
    kind = formats.get(task.row_format)
    found = _find_columns(row, kind)
    named = [field for field in kind.known_as if field in found or field not in kind.rare]
    for field in [field for field in named if field not in found]:
        close = nearest(field, [str(column) for column in row if column not in found.values()], count=1)
        found[field] = close[0] if close else _THEIRS
    needed = written({field: found[field] for field in named})
    is_mapped = any(ours != theirs for ours, theirs in found.items())
    return f"task {task.section.kind} needs {', '.join(named)}" + (f": {needed}" if is_mapped else kind.form)


def written(columns: Columns) -> str:
    """Mapped columns as a recipe has them: `columns: {output: response}`. Those that need no mapping are left out."""
    pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items() if ours != theirs)
    return f"columns: {{{pairs}}}"


def unknown_columns(row: Row, task: Task[TaskSection] | None, *, is_table: bool) -> DataError:
    """The error for a training row of no known format: names the likely one first, and how columns are mapped to it.

    Args:
        task: What is to learn it; None for any.
        is_table: Whether it may come from a table without a header.
    """
    if not row:
        return missing_field("messages", row)
    if task is not None and (needs := _say_needs(task, row)):
        return DataError(f"{NO_FORMAT} {listed(row)}", todo=needs)
    chats = [written({field: column}) for column in row if (field := _turns_field(row[column])) is not None]
    chat, text = _guess_format(row, verbatim=False), _guess_format(row, verbatim=True)
    if not chats and chat is None and (typo := _find_typo(row)):
        return missing_field(typo, row)
    asked = find_format(row, prompts=True)
    if chats:
        todo = f"likely chats: {chats[0]}"
    elif chat is not None:
        todo = f"likely {chat[0]}, a chat: {written(chat[1])}"
        if text is not None and len(text[1]) >= len(chat[1]):
            todo += f"; {text[0]}, verbatim text: {written(text[1])}"
    elif text is not None:
        todo = f"likely {text[0]}, verbatim text: {written(text[1])}"
    elif asked is not None:
        answer = formats.get(asked).answer
        return DataError(f"missing field '{answer}' of {asked}; found {listed(row)}", key=answer, todo=_ANSWER_MISSING)
    else:
        verbatim = "{prompt: THEIRS, completion: THEIRS} or {text: THEIRS}"
        todo = f"map a chat's columns: {{question: THEIRS, answer: THEIRS}}; verbatim text's: {verbatim}"
        todo += "; numbers where there is no header: {text: '1'}" if is_table else ""
    return DataError(f"{NO_FORMAT} {listed(row)}", todo=todo)


def absent_columns(absent: Collection[str], columns: Columns, row: Row) -> DataError:
    """The error for mapped columns that the rows do not have, which therefore have no format.

    Args:
        absent: Those of the mapped `columns`.
        row: The columns of one of them, as the file names them.
    """
    names = " and ".join(f"'{name}'" for name in sorted(absent))
    are_none = "is not a column" if len(absent) == 1 else "are not columns"
    what = f"{names} {are_none} of the rows; there are {listed(row)}"
    free = [column for column in row if column not in columns.values()]
    close = [near[0] for name in sorted(absent) if (near := nearest(name, free, count=1))]
    todo = f"did you mean {' and '.join(repr(name) for name in close)}?" if close else "correct columns in the recipe"
    return DataError(what, key="columns", todo=todo)


def several_formats(found: Mapping[str, tuple[int, Row]]) -> DataError:
    """The error for rows of several formats; where one only lacks a column of another, it is that row's.

    Args:
        found: Of each format the first row, with its line, named as the formats name them.
    """
    for name, (line, row) in found.items():
        for whole, (_, other) in found.items():
            missing = sorted(required_fields(formats.get(whole)) - row.keys())
            if missing and row.keys() < other.keys():
                what = f"missing field '{missing[0]}' of {whole}, which other rows have; alone it looks like {name}"
                todo = f"correct the row, or set format: {whole}, and bad_rows: {{policy: skip}} to leave it out"
                return MissingFieldError(what, line=line, key=missing[0], todo=todo)
    seen = " and ".join(f"{name} (line {line})" for name, (line, _) in found.items())
    return DataError(
        f"rows look like different formats: {seen}",
        todo="name one with format:, or split the file into two sources",
    )


def _find_typo(row: Row) -> str | None:
    """The field of a format whose missing fields all look like columns that are there."""
    for _, kind in by_priority():
        missing = sorted(required_fields(kind) - row.keys())
        close = [nearest(field, row, count=1) for field in missing]
        # a whole row is not read as text because one of its columns is called much like that: Kontext
        if kind.verbatim and len(row) > 1 and any(abs(len(name[0]) - len(missing[0])) > 1 for name in close if name):
            continue
        if missing and all(close):
            return missing[0]
    return None


def _turns_field(value: Any) -> str | None:
    """The field that a list of turns is read from, by how its turns are written; None for another value."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # a list that a table holds as text
        return next((field for field, name in _TURNS.items() if f'"{name}"' in value), None)
    first = value[0] if isinstance(value, list) and value else None
    return next((field for field, name in _TURNS.items() if isinstance(first, dict) and name in first), None)


def _guess_format(row: Row, *, verbatim: bool) -> tuple[str, dict[str, str]] | None:
    """The format of chats, or of verbatim text, that reads the most columns of a row, and those; None for none."""
    kinds = [(name, kind) for name, kind in reversed(by_priority()) if kind.verbatim == verbatim]  # plain ones first
    guesses = [(name, columns) for name, kind in kinds if (columns := guess_columns(row, kind)) is not None]
    return max(guesses, key=lambda guess: (len(guess[1]), sum(a == b for a, b in guess[1].items())), default=None)


def explain_unread(column: str, row: Row, kind: Format) -> str | None:
    """What to do about a column that a format does not read, where it seems to belong to what is asked.

    Args:
        row: The columns that the rows have, named as the format names them.

    Returns:
        None where nothing speaks for it.
    """
    optional = [field for field, needed in kind.fields.items() if not needed]
    close = nearest(column, optional, count=1)
    if close:
        return f"did you mean '{close[0]}'?"
    for name, other in by_priority():
        for field, needed in other.fields.items():
            if needed or field in kind.fields or column.lower() not in (field, *other.known_as.get(field, ())):
                continue
            columns = guess_columns(row, other)
            if columns is not None and columns.get(field) == column:
                readers = [task for task in tasks.names() if tasks.get(task).row_format == name]
                if readers:
                    return f"task {alternatives(readers)} reads it"
                return f"to ask with it, map {written(columns)}"
    return None


def no_prompt(row: Row) -> DataError:
    """The error for a row that no format takes for a prompt."""
    asking = sorted({kind.asks for _, kind in by_priority() if kind.asks})
    close = next((near[0] for field in asking if (near := nearest(field, row, count=1))), None)
    folded = {str(column).lower(): column for column in row}
    aliases = [(name, kind.asks) for _, kind in by_priority() if kind.asks for name in kind.known_as.get(kind.asks, ())]
    meant = next((f"call {folded[name]} {field}; or " for name, field in aliases if name in folded), "")
    todo = f"did you mean '{close}'? " if close else meant
    todo += f"call the one that asks {alternatives(asking)}"
    return DataError(f"{NO_PROMPT} {listed(row)}", todo=todo)
