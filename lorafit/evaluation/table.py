"""An Evaluation for a terminal, readable in 80 columns: the table, what follows from it, the worst rows in short.

metric         base   tuned  change     95 % interval  verdict   + / -
must_contain  2.5 %  77.5 %   +75.0    +60.0 to +87.5  better   30 / 0
perplexity    54.60   4.213  -50.39  -61.02 to -41.77  better   40 / 0
95 % interval of the tuned score itself: must_contain 62.5 % to 90.0 %, perplexity 4.013 to 4.442
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lorafit.console.wording import counted
from lorafit.evaluation.evaluation import Evaluation
from lorafit.evaluation.report import HEADINGS, cells_of, describe, headline, texts_of
from lorafit.evaluation.statistics import LEAST_ROWS, ROUGH_ROWS, Comparison, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WIDE_COLUMNS = 140
WORST_ROWS_SHOWN = 3
_NARROW_HEADINGS = ("metric", "base", "tuned", "change", "95 % interval", "verdict", "+ / -")
_NARROW_VERDICTS: dict[Verdict, str] = {"not distinguishable": "unclear", "too few rows": "too few"}
_STYLES: dict[Verdict, str] = {
    "better": "green",
    "worse": "red",
    "not distinguishable": "yellow",
    "too few rows": "yellow",
}
_RETENTION_WORDS: dict[Verdict, str] = {
    "better": "gained",
    "worse": "lost",
    "not distinguishable": "kept as far as can be seen",
    "too few rows": "too few rows to tell",
}


def render_evaluation(
    evaluation: Evaluation, *, columns: int, place: Callable[[str], str] = lambda file: file
) -> RenderableType:
    """Everything for a terminal.

    Args:
        evaluation: What was found.
        columns: Width of the terminal; from 140 on nothing is shortened.
        place: Makes a path that the reader can open of a row's file.
    """
    from rich.console import Group
    from rich.text import Text

    wide = columns >= WIDE_COLUMNS
    parts: list[RenderableType] = [_draw(evaluation.comparisons, "base and tuned model on the same rows", wide=wide)]
    spans = [f"{line.name} {line.tuned_span}" for line in evaluation.comparisons if line.rows >= LEAST_ROWS]
    if spans and not wide:
        parts.append(Text(f"95 % interval of the tuned score itself: {', '.join(spans)}"))
    parts += [Text(line, style=_STYLES[verdict]) for verdict, line in _conclude(evaluation.comparisons)]
    if evaluation.retention:
        title = f"\nretention: {counted(evaluation.retention_rows, 'row')} of general ability"
        parts.append(_draw(evaluation.retention, title, wide=wide))
        parts += [
            Text(line, style=_STYLES[verdict]) for verdict, line in _conclude(evaluation.retention, _RETENTION_WORDS)
        ]
    parts += [Text(line, style="dim") for line in describe(evaluation)]
    for worst in evaluation.worst[:WORST_ROWS_SHOWN]:
        parts.append(Text(f"\n{headline(worst, place(worst.row.file))}", style="bold"))
        parts += [Text(f"  {name}: {_shorten(text)}") for name, text in texts_of(worst)]
    return Group(*parts)


def _draw(comparisons: Sequence[Comparison], title: str, *, wide: bool) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in HEADINGS if wide else _NARROW_HEADINGS:
        is_word = heading in ("metric", "verdict")
        table.add_column(heading, justify="left" if is_word else "right", no_wrap=heading != "metric", overflow="fold")
    for line in comparisons:
        table.add_row(*(cells_of(line) if wide else _narrow_cells(line)), style=_STYLES[line.verdict])
    return table


def _narrow_cells(line: Comparison) -> tuple[str, ...]:
    """As in the report, points and the number of rows left out: the line below the table says it."""
    changes = (line.difference, line.low, line.high)
    change, low, high = (line.show_change(value).removesuffix(" points") for value in changes)
    return (
        line.name,
        line.show(line.base),
        line.show(line.tuned),
        change,
        f"{low} to {high}",
        _NARROW_VERDICTS.get(line.verdict, line.verdict),
        f"{line.rows_better} / {line.rows_worse}",
    )


def _conclude(
    comparisons: Sequence[Comparison], words: dict[Verdict, str] | None = None
) -> Iterator[tuple[Verdict, str]]:
    """A line for all values with the same verdict on equally many rows."""
    groups: dict[tuple[Verdict, int], list[str]] = {}
    for line in comparisons:
        groups.setdefault((line.verdict, line.rows), []).append(line.name)
    for (verdict, rows), names in groups.items():
        said = (words or {}).get(verdict) or ("too few rows to tell" if verdict == "too few rows" else verdict)
        number = counted(rows, "row")
        if verdict == "too few rows":
            note = f" ({number}; a verdict needs {LEAST_ROWS})"
        else:
            note = f" {'with' if verdict == 'not distinguishable' else 'on'} {number}"
            note += " (so few give a rough interval)" if rows < ROUGH_ROWS else ""
        yield verdict, f"{said}{note}: {', '.join(names)}"


def _shorten(text: str, characters: int = 300) -> str:
    """One line; the end of a long text is kept, since a prompt's question stands there."""
    flat = " ".join(text.split())
    return flat if len(flat) <= characters else "…" + flat[-characters:]
