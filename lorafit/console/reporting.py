"""What a person sees: messages, warnings and bars on stderr, results on stdout. rich is imported when first needed."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from abc import ABC, abstractmethod
from io import StringIO
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonObject, Silent

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from rich.console import Console

    from lorafit.contracts import Progress
    from lorafit.facts import Bar

_LINE_EVERY_SECONDS = 10.0
_TELLING_SHARE, _TELLING_SECONDS = 0.05, 60.0
_BAR_CHARACTERS = 40
_PRINTED_COLUMNS = 100  # of a result's text outside of a terminal
_QUIET_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "critical",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def quieten_libraries() -> None:
    """Keeps the libraries' bars and advice off the terminal; ours say what matters. `--debug` leaves them on."""
    for name, value in _QUIET_SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "transformers", "datasets", "huggingface_hub", "torch", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _console(**options: Any) -> Console:
    """A console that shows texts as they are: `sms.csv:100:` is a line of a file, and no emoji of rich."""
    from rich.console import Console

    return Console(highlight=False, emoji=False, **options)


def result_console() -> Console:
    """Where results go: stdout."""
    return _console(soft_wrap=not sys.stdout.isatty())


def _stderr() -> Console:
    return _console(stderr=True)


class Printed(ABC):
    """A result that `str()` turns into what its command prints, so that scripts and notebooks may `print` it."""

    @abstractmethod
    def render(self, console: Console) -> None:
        """Prints the result for people."""

    def __str__(self) -> str:
        text = StringIO()
        self.render(_console(file=text, width=_PRINTED_COLUMNS))
        return text.getvalue().rstrip()


class ConsoleReporter:
    """contracts.Reporter for people. On a terminal bars are drawn; elsewhere a line is written now and then.

    Args:
        quiet: Keep quiet; the result and errors are somebody else's.
        verbose: Write a line for each step of a bar where no bar is drawn.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._bar: _DrawnBar | None = None
        self._warned: set[str] = set()
        self._done: set[str] = set()

    def info(self, message: str) -> None:
        """One line."""
        self._write(message)

    def warn(self, message: str) -> None:
        """One line that stands out; the same one is not said again."""
        if message not in self._warned:
            self._warned.add(message)
            self._write(f"warning: {message}", style="yellow")

    def show(self, renderable: Any) -> None:
        """A table or text for rich."""
        if not self._quiet:
            _stderr().print(renderable)

    def track(self, total: int | None, what: str, done: int = 0) -> Progress:
        """A bar of `total` units (None: nobody knows), drawn or written; an earlier process did `done` of them."""
        if self._quiet:
            return Silent()
        if sys.stderr.isatty() and self._bar is None:
            return _DrawnBar(self, total, what, done)
        return _WrittenBar(total, what, done, 0.0 if self._verbose else _LINE_EVERY_SECONDS, self._done)

    def _write(self, message: str, style: str = "") -> None:
        if self._quiet:
            return
        if self._bar is not None:  # above the bar, which is drawn anew
            self._bar.print(message, style)
        elif style and sys.stderr.isatty():
            _stderr().print(message, style=style, markup=False, soft_wrap=True)
        else:
            _write_line(message)


class _DrawnBar:
    """A live bar. While one is drawn, other bars are written."""

    def __init__(self, reporter: ConsoleReporter, total: int | None, what: str, done: int) -> None:
        from lorafit.console.live_line import LiveLine

        self._reporter = reporter
        self._line = LiveLine(_stderr(), what, total, done)

    def __enter__(self) -> _DrawnBar:
        self._line.start()
        self._reporter._bar = self
        return self

    def __exit__(self, *exc: object) -> None:
        self._reporter._bar = None
        self._line.stop()

    def advance(self, amount: int = 1, **shown: Any) -> None:
        self._line.step(amount, _worded(shown))

    def print(self, message: str, style: str) -> None:
        self._line.console.print(message, style=style or None, markup=False, soft_wrap=True)


class _WrittenBar:
    """Lines instead of a bar: the first, one every few seconds, and the last.

    The time left goes by the units behind the first, which often waits for what all of them need: a file that is
    opened, kernels that are chosen. None is said until they are a share of all, or took a while: the first tensors of a
    merge are its largest.

    Args:
        total: Units; None where nobody knows.
        what: The job.
        done: Units that an earlier process did.
        every_seconds: Between two lines.
        said: What jobs without figures said at their end; the same line is not said again.
    """

    def __init__(self, total: int | None, what: str, done: int, every_seconds: float, said: set[str]) -> None:
        self._total, self._what, self._every_seconds, self._all_said = total, what, every_seconds, said
        self._done = self._said = done
        self._began = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._written: float | None = None
        self._shown: dict[str, str] = {}

    def __enter__(self) -> _WrittenBar:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None and self._said < self._done:
            self._write("")  # nobody knew that the last one was the last

    def advance(self, amount: int = 1, **shown: Any) -> None:
        self._done += amount
        if self._total is not None and self._done > self._total:
            self._total = None  # more than was thought, and nobody knows how much
        now = time.monotonic()
        began, before = self._first = self._first or (now, self._done)
        is_last = self._done == self._total
        self._shown = _worded(shown) or self._shown
        if self._written is not None and now - self._written < self._every_seconds and not is_last:
            return
        if self._written is None and not shown and not is_last and now - self._began < self._every_seconds:
            return  # quick jobs say only that they are done
        self._written = now
        left = ""
        if self._total is not None and not is_last and self._done > before:
            share = (self._done - before) / (self._total - before)
            if share >= _TELLING_SHARE or now - began >= _TELLING_SECONDS:
                left = f"  {clock((now - began) * (1 - share) / share)} left"
        self._write(left)

    def _write(self, left: str) -> None:
        self._said = self._done
        count = str(self._done) if self._total is None else f"{self._done}/{self._total}"
        words = "  ".join(f"{name.replace('_', ' ')} {value}" for name, value in self._shown.items())
        line = f"{self._what} {count}  {words}{left}".rstrip()
        if not words and not left:
            if line in self._all_said:
                return
            self._all_said.add(line)
        _write_line(line)


def _write_line(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _worded(shown: JsonObject) -> dict[str, str]:
    """Values as they are shown."""
    return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in shown.items()}


def clock(seconds: float) -> str:
    """`1:05`, `2:03:00`: minutes and seconds, hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def say(console: Console, text: str, style: str = "") -> None:
    """Prints the text as it is: nothing in it is taken for markup, coloured or wrapped."""
    console.print(printable(console, text), style=style, markup=False, highlight=False, soft_wrap=True)


def can_show(console: Console, text: str) -> bool:
    """Whether the console's encoding has these characters."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        return False
    return True


def printable(console: Console, text: str) -> str:
    """The text without control characters, which could steer a terminal, and in what the terminal can show."""
    plain = _UNPRINTABLE.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
    return plain.encode(console.encoding, "backslashreplace").decode(console.encoding)


def full_block(console: Console) -> str:
    """What bars are drawn with."""
    return "█" if can_show(console, "█") else "#"


def show_table(
    console: Console, headings: Sequence[str], lines: Sequence[Sequence[str]], *, words: Collection[int] = (0,)
) -> None:
    """A table without lines. No figure is cut: where the screen is too narrow, headings wrap, then the first column.

    Args:
        console: Where to.
        headings: Of the columns.
        lines: Cells of each line.
        words: Numbers of the columns that hold words; figures stand at the right.
    """
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    cells = [max((len(line[at]) for line in lines), default=0) for at in range(len(headings))]
    widths = [max(cell, len(heading)) for cell, heading in zip(cells, headings, strict=True)]
    room = console.width - 2 * (len(headings) - 1)
    if sum(widths) > room:
        longest = [max(map(len, heading.split())) for heading in headings]
        widths[1:] = list(map(max, cells[1:], longest[1:]))
        widths[0] = max(longest[0], min(widths[0], room - sum(widths[1:])))
    for number, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        table.add_column(heading, justify="left" if number in words else "right", width=width, overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def draw_histogram(bars: Sequence[Bar], block: str) -> list[str]:
    """Lines of text, one a bar that has rows: lengths from-to, rows, a bar as long as their share of the largest."""
    most = max((bar.rows for bar in bars), default=1)
    width = len(str(bars[-1].high)) if bars else 1
    lines = []
    for bar in (bar for bar in bars if bar.rows):
        length = max(round(bar.rows / most * _BAR_CHARACTERS), 1)
        lines.append(f"  {bar.low:>{width}}-{bar.high:<{width}} {bar.rows:>7} {block * length}".rstrip())
    return lines
