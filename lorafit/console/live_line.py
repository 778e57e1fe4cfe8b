"""The line that lives on a terminal while a job goes on. Imports rich: loaded where a line is drawn.

training ━━━━━━━━━╸━━━━━━━━━━━━━━  12/240  loss 1.23  lr 1e-04  grad 0.5  tok/s 812  GiB 1.2 of est. 1.5  0:01:23
what     bar, 24 to 8 columns      never   fields, left out one by one where the terminal is narrow        never
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import Progress, Task, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_WIDEST_BAR, _NARROWEST_BAR = 24, 8
_LEFT_OUT_FIRST = ("grad", "lr", "GiB", "tok/s")  # then whatever comes last
_GAP = "  "
_SPEED_SECONDS = 600.0  # the time left goes by the speed of the last ones; two steps at least are in that


def fit_fields(fields: Mapping[str, str], columns: int) -> str:
    """The fields as `loss 1.23  lr 1e-04`, without those that do not fit into so many columns."""
    kept = dict(fields)
    leaving = [*(name for name in _LEFT_OUT_FIRST if name in kept)]
    leaving += [name for name in reversed(kept) if name not in leaving]
    while kept and len(text := in_words(kept)) > columns:
        del kept[leaving.pop(0)]
    return text if kept else ""


def in_words(fields: Mapping[str, str]) -> str:
    """Fields one behind the other."""
    return _GAP.join(f"{name.replace('_', ' ')} {value}" for name, value in fields.items())


class LiveLine(Progress):
    """One job: what it is, how much is done, its latest fields and the time left, always within the terminal's width.

    Args:
        console: Where it is drawn.
        what: The job.
        total: Its units; None where nobody knows.
        done: Units that were done before.
    """

    def __init__(self, console: Console, what: str, total: int | None, done: int) -> None:
        self._left = TimeRemainingColumn(compact=True)
        super().__init__(console=console, transient=True, speed_estimate_period=_SPEED_SECONDS)
        self._job = self.add_task(what, total=total, completed=done, fields={})

    def step(self, amount: int, fields: Mapping[str, str]) -> None:
        """Some more units are done; fields replace those of before where there are any."""
        task = self.tasks[0]
        if task.total is not None and task.completed + amount > task.total:
            task.total = None  # more than was thought, and nobody knows how much
        shown = dict(fields) or task.fields["fields"]
        self.update(self._job, advance=amount, fields=shown)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The line, as wide as the terminal is at this moment."""
        for task in self.tasks:
            yield self._draw(task)

    def _draw(self, task: Task) -> Table:
        count, left, given = _count(task), self._left(task), task.fields["fields"]
        room = self.console.width - 1 - len(f"{task.description} {count} {left}")  # a full line could begin another
        fields = fit_fields(given, room - 1 - _NARROWEST_BAR - 1) or fit_fields(given, room - 1)
        bar_columns = min(_WIDEST_BAR, room - 1 - len(fields) - 1)
        cells: list[RenderableType] = [Text(task.description)]
        if bar_columns >= _NARROWEST_BAR:
            cells.append(ProgressBar(task.total, task.completed if task.total else 0, width=bar_columns))
        cells += [Text(count, style="progress.download"), Text(fields), left]
        line = Table.grid(padding=(0, 1, 0, 0))
        for cell in cells:
            columns = len(cell) if isinstance(cell, Text) and cell is not cells[0] else None
            line.add_column(no_wrap=True, min_width=columns)
        line.add_row(*cells)
        return line


def _count(task: Task) -> str:
    """`12/240`, or `12` of nobody knows how many."""
    if task.total is None:
        return str(int(task.completed))
    return f"{int(task.completed):{len(str(int(task.total)))}}/{int(task.total)}"
