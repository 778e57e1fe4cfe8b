"""What training will see: rendered rows with the tokens that carry loss told apart, and what became of all rows.

With colours trained text is green and the rest dim; without, it stands between marks:

    train.jsonl:17  12 tokens, 5 trained
    <|im_start|>user
    Capital of France?<|im_end|>
    <|im_start|>assistant
    ⟦Paris.<|im_end|>⟧
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.box import ASCII2, SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorafit.console.reporting import Printed, can_show, draw_histogram, full_block, printable, say
from lorafit.console.wording import counted, in_sequences, list_classes
from lorafit.contracts import Example, JsonObject, ShownSequence
from lorafit.data.prepare import Prepared
from lorafit.data.report import SplitReport
from lorafit.data.sample_renderer import Renderer
from lorafit.data.store import ExampleSet
from lorafit.errors import row_place
from lorafit.kinds.tasks import Task, TaskSection
from lorafit.pictures import PlacedPicture

SPLITS = ("train", "validation", "test", "retention")
ROWS_SHOWN = 3
NOTES_SHOWN = 20
IGNORED_LABEL = -100
CUT = " [... cut here ...] "
"""Stands in a shown row where something was left out of it."""


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One prepared row.

    Attributes:
        split: Where it is used.
        file, line: Where it came from.
        rendering: The text of its tokens.
        input_ids: Its tokens, `[tokens]`.
        labels: The same, or -100 where nothing is learnt, `[tokens]`; not shifted.
        segments: The text of stretches of tokens that are all trained, or all not, parted where the row is cut.
        name: What tells it from the row's other sequences and changed copies; empty where there is one.
        label: What is learnt of it as a whole; empty where tokens are.
        cuts: Numbers of tokens that stand before something that was left out.
        pictures: Its images; each is a segment of its own, which says what it is.
    """

    split: str
    file: str
    line: int
    rendering: str
    input_ids: list[int]
    labels: list[int]
    segments: list[tuple[str, bool]]
    name: str = ""
    label: str = ""
    cuts: tuple[int, ...] = ()
    pictures: tuple[PlacedPicture, ...] = ()

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED_LABEL for label in self.labels)

    def to_json(self) -> JsonObject:
        """Plain data, without the segments."""
        names = ("split", "file", "line", "rendering", "input_ids", "labels")
        more = [name for name in ("name", "label", "cuts") if getattr(self, name)]
        shown = {"pictures": [asdict(one) for one in self.pictures]} if self.pictures else {}
        return {name: getattr(self, name) for name in (*names, *more)} | shown


@dataclass(frozen=True, slots=True)
class Preview(Printed):
    """Rows to look at, and the report of all of them.

    Attributes:
        curriculum: Which rows steps are drawn from, in a sentence; None where from all.
    """

    rows: list[PreviewRow]
    prepared: Prepared
    curriculum: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all rows were prepared and counted."""
        return all(part.of_rows is None for part in self.prepared.report.splits.values())

    def to_json(self) -> JsonObject:
        """Plain data."""
        report = self.prepared.report.to_json()
        digest = self.prepared.digest if self.is_whole else None
        told = {} if self.curriculum is None else {"curriculum": self.curriculum}
        return {"rows": [row.to_json() for row in self.rows], "report": report, "digest": digest, **told}

    def render(self, console: Console) -> None:
        """Prints rows and report."""
        for row in self.rows:
            _print_row(console, row)
        report = self.prepared.report
        console.print(_source_table(console, self.prepared))
        for split, part in report.splits.items():
            _print_split(console, split, part, self.prepared.task)
        for overlap in report.overlaps:
            places = ", ".join(f"{other} = {one}" for one, other in overlap.places[:3])
            occurs = f"{counted(overlap.rows, 'row')} of {overlap.second} {'occurs' if overlap.rows == 1 else 'occur'}"
            say(console, f"{occurs} in {overlap.first} as well: {places}")
        if self.curriculum is not None:
            say(console, self.curriculum)
        if self.prepared.task.labels_rows:
            return
        of_what = "the training tokens" if self.is_whole else "the tokens that were counted"
        say(console, f"tokens that carry loss: {report.trained_share:.1%} of {of_what}")


def preview(
    prepared: Prepared, renderer: Renderer, rows: int | None = ROWS_SHOWN, curriculum: str | None = None
) -> Preview:
    """The first rows of each training source in turn, then of the other splits, as they will be trained on.

    Args:
        rows: How many; all of them where None.
        curriculum: What a curriculum says of them.
    """
    found: list[PreviewRow] = []
    for split in SPLITS:
        examples = prepared.splits.get(split)
        if examples is None:
            continue
        room = len(examples) if rows is None else rows - len(found)
        for example in (examples[number] for number in _first_of_each(examples, room)):
            copy = f"copy {examples.copies[example.index]}" if examples.copies[example.index] else ""
            shown = (_show_sequence(renderer, split, example, sequence) for sequence in prepared.task.show(example))
            found += [replace(row, name=", ".join(filter(None, [copy, row.name]))) for row in shown]
    return Preview(found, prepared, curriculum)


def _first_of_each(examples: ExampleSet, count: int) -> list[int]:
    """Row numbers: the first of each source, then the second of each, ..., in all `count`."""
    source_of = np.asarray(examples.source_of)
    by_source = [np.flatnonzero(source_of == number)[:count] for number in range(len(examples.files))]
    in_turn = [(place, source, int(row)) for source, rows in enumerate(by_source) for place, row in enumerate(rows)]
    return sorted(row for _, _, row in sorted(in_turn)[: max(0, count)])


def _show_sequence(renderer: Renderer, split: str, example: Example, sequence: ShownSequence) -> PreviewRow:
    ids, trained = sequence.input_ids, [bool(flag) for flag in sequence.trained]
    labels = [token if flag else IGNORED_LABEL for token, flag in zip(ids, trained, strict=True)]
    pictures = sequence.pictures
    borders = {place for one in pictures for place in (one.start, one.end)}
    found = list(_segments(renderer, ids, trained, sequence.cuts, borders))
    place, text = (split, example.file, example.line), "".join(text for _, text, _ in found if text != CUT)
    said = {one.start: _describe(number, one) for number, one in enumerate(pictures, start=1)}
    segments = [(said.get(start, text), flag) for start, text, flag in found]
    return PreviewRow(*place, text, ids, labels, segments, sequence.name, sequence.label, sequence.cuts, pictures)


def _describe(number: int, picture: PlacedPicture) -> str:
    """An image in place of its tokens' text."""
    size = f"{picture.width}x{picture.height}"
    return f"[image {number}: {Path(picture.file).name}, {size}, {counted(picture.tokens, 'token')}]"


def _segments(
    renderer: Renderer, ids: list[int], trained: list[bool], cuts: tuple[int, ...], borders: Collection[int]
) -> Iterator[tuple[int, str, bool]]:
    """First token and text of stretches of tokens that are all trained, or all not, and `CUT` where something was left
    out; others end at the borders.

    Each text is what the decoding grows by: a token's can depend on what is before.
    """
    decoded, start = "", 0
    if 0 in cuts:
        yield 0, CUT, False
    for end in range(1, len(ids) + 1):
        if end < len(ids) and trained[end] == trained[start] and end not in cuts and end not in borders:
            continue
        longer = renderer.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        grown = str(longer)
        yield start, grown[len(decoded) :], trained[start]
        if end in cuts:
            yield end, CUT, False
        decoded, start = grown, end


def _print_row(console: Console, row: PreviewRow) -> None:
    place = row_place(row.file, row.line)
    what = f"label {row.label}" if row.label else f"{row.trained_tokens} trained"
    name = f", {row.name}" if row.name else ""
    head = f"{place}  {row.split}{name}, {counted(len(row.input_ids), 'token')}, {what}"
    say(console, head, style="bold")
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    opening, closing = ("⟦", "⟧") if can_show(console, "⟦⟧") else ("[[", "]]")
    body: Text = Text()
    for text, trained in row.segments:
        shown = printable(console, text)
        if coloured:
            body.append(shown, style="bold green" if trained else "dim")
        else:
            body.append(f"{opening}{shown}{closing}" if trained else shown)
    console.print(body, soft_wrap=True)
    console.print()


def _source_table(console: Console, prepared: Prepared) -> Table:
    """Counts by source; columns in which nothing happened are left out."""
    rows: list[list[str | Text]] = []
    for split, part in prepared.report.splits.items():
        repeats = prepared.train.repeats if split == "train" else [1.0] * len(part.sources)
        for counts, repeat in zip(part.sources, repeats, strict=True):
            fates = (counts.bad, counts.dropped, counts.cut, counts.split, counts.copies)
            cells = [str(number) if number else "" for number in fates]
            cells.append(f"{repeat:g}" if repeat != 1 else "")
            file = Text(printable(console, counts.file), overflow="fold")
            rows.append([split, file, counts.format, str(counts.read), str(counts.kept), *cells])
        if not part.sources:
            rows.append([split, "held out of train", "", "", str(part.rows), *[""] * 6])
    heads = ("split", "source", "format", "read", "examples", "bad", "dropped", "cut", "split up", "copies", "repeats")
    box = SIMPLE if can_show(console, "─") else ASCII2
    table = Table(box=box, title="rows by source", title_justify="left")
    shown = [place for place in range(len(heads)) if place < 5 or any(row[place] for row in rows)]
    for place in shown:
        table.add_column(heads[place], justify="right" if place > 2 else "left", no_wrap=place > 2 or place == 0)
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    return table


def _print_split(console: Console, split: str, part: SplitReport, task: Task[TaskSection]) -> None:
    has_labels = task.labels_rows
    share = "" if has_labels else f", {part.trained_tokens / part.tokens:.1%} carry loss"
    size = f"{counted(part.rows, 'row')}, {counted(part.tokens, 'token')}"
    name = split if part.of_rows is None else f"{split}, the first rows of about {part.of_rows:,}"
    head = f"{name}: {size}{share}, longest {part.longest_tokens}{in_sequences(part.longest_tokens, task.sequences)}"
    say(console, head, style="bold")
    for line in draw_histogram(part.histogram, full_block(console)):
        say(console, line)
    if part.classes:
        say(console, f"  {task.class_unit}s of each class: {list_classes(part.classes, task.class_unit)}")
    for what, count in sorted(part.seen.items()):
        say(console, f"  {what}: {counted(count, 'row')}")
    for counts in part.sources:
        if counts.unread:
            columns = ", ".join(f"{name} ({count})" for name, count in sorted(counts.unread.items()))
            say(console, f"  {counts.file}: columns that are not read: {columns}")
    for note in part.notes[:NOTES_SHOWN]:
        say(console, f"  {row_place(note.file, note.line)}: {note.what}: {note.reason}")
    happened = sum(counts.bad + counts.dropped + counts.cut + counts.split for counts in part.sources)
    if happened > NOTES_SHOWN:
        say(console, f"  ... and {happened - NOTES_SHOWN} more")
