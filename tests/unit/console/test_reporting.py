"""What people see: bars on a terminal, lines elsewhere, nothing with --quiet; ASCII where the terminal has no more."""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import lorafit
from lorafit.console.live_line import LiveLine
from lorafit.console.reporting import ConsoleReporter

PROGRAM = """
from lorafit.console.reporting import ConsoleReporter
reporter = ConsoleReporter()
with reporter.track(3, "training") as bar:
    for step in range(3):
        bar.advance(1, loss=1.25, grad="overflow")
        reporter.info(f"said [{step}]")
reporter.warn("look out")
"""


def test_every_console_is_made_in_one_place() -> None:
    """Which leaves `:100:` of a line's place as it is."""
    sources = sorted(Path(lorafit.__file__).parent.rglob("*.py"))
    assert [file.name for file in sources for _ in re.findall(r"\bConsole\(", file.read_text("utf-8"))] == [
        "reporting.py"
    ]


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    with reporter.track(100, "training") as bar:
        for _ in range(100):
            bar.advance(1, loss=1.23456, tokens_seen=7)
    reporter.warn("look [out]")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 3  # the first, the last, the warning
    assert lines[0] == "training 1/100  loss 1.235  tokens seen 7"  # nobody knows yet how long the others take
    assert lines[1].startswith("training 100/100") and lines[2] == "warning: look [out]"


def test_a_bar_goes_on_where_an_earlier_process_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is reckoned from this process's units alone, and not from the first of them."""
    reporter, seconds = ConsoleReporter(verbose=True), itertools.chain([0.0, 100.0], itertools.count(100.5, 0.5))
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))  # the first waits for weights that are read, say
    with reporter.track(100, "training", 19) as bar:
        for _ in range(81):
            bar.advance(1, loss=1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training 20/100  loss 1" and lines[-1].startswith("training 100/100")
    assert lines[3] == "training 23/100  loss 1" and lines[4].endswith("  0:38 left")  # 5 %; 76 of half a second


def test_quick_jobs_of_one_name_say_once_that_they_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    for units in (2, 2, 3, 2):
        with reporter.track(units, "dry run") as bar:
            for _ in range(units):
                bar.advance(1)
    for _ in range(2):
        with reporter.track(2, "evaluation") as bar:
            bar.advance(2, loss=1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["dry run 2/2", "dry run 3/3", *2 * ["evaluation 2/2  loss 1"]]


def test_verbose_writes_each_step_and_quiet_none(capsys: pytest.CaptureFixture[str]) -> None:
    for reporter, wanted in ((ConsoleReporter(verbose=True), 6), (ConsoleReporter(quiet=True), 0)):
        with reporter.track(5, "x") as bar:
            for _ in range(5):
                bar.advance(1, loss=1.0)
        reporter.info("hello")
        assert len(capsys.readouterr().err.splitlines()) == wanted


def test_a_bar_on_an_ascii_terminal_shows_messages_above_it() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # Linux: the other end is closed
        pass
    assert child.wait(timeout=60) == 0
    text = seen.decode("ascii")  # nothing else was written
    assert "said [0]" in text and "said [2]" in text and "warning: look out" in text
    assert "training" in text and "loss 1.25" in text and "3/3" in text


FIGURES = {"loss": "2.79", "lr": "0.001866", "grad": "1.787", "tok/s": "62", "GiB": "1.43 of est. 1.78"}
BY_WIDTH = {
    30: [],
    45: ["loss"],
    60: ["loss", "tok/s"],
    80: ["loss", "tok/s", "GiB"],
    100: ["loss", "lr", "tok/s", "GiB"],
    130: ["loss", "lr", "grad", "tok/s", "GiB"],
}


@pytest.mark.parametrize("columns", BY_WIDTH)
def test_a_narrow_terminal_keeps_how_far_and_how_long(columns: int) -> None:
    """The count and the time left always stand in the line, figures leave it one by one, and it is one line."""
    console = Console(file=io.StringIO(), width=columns, force_terminal=True, color_system=None)
    line = LiveLine(console, "training", 5000, 0)
    for number in range(3):
        line.tasks[0].get_time = lambda now=float(number): now
        line.get_time = lambda now=float(number): now
        line.step(1, FIGURES)
    shown = [text for text in ("".join(part.text for part in each) for each in console.render_lines(line)) if text]
    assert len(shown) == 1 and len(shown[0].rstrip()) < columns
    assert "training" in shown[0] and "   3/5000" in shown[0]
    assert re.search(r"\d:\d\d:\d\d$|\d\d:\d\d$", shown[0].rstrip())
    wanted = {name: value for name, value in FIGURES.items() if name in BY_WIDTH[columns]}
    assert [name for name in FIGURES if name in shown[0]] == list(wanted)
    assert "  ".join(f"{name} {value}" for name, value in wanted.items()) in shown[0]


def test_more_than_was_thought_has_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither line ever says `32/14`, and the last one says how many there were."""
    with ConsoleReporter(verbose=True).track(14, "preparing") as bar:
        for _ in range(3):
            bar.advance(16)
    assert capsys.readouterr().err.splitlines() == ["preparing 16", "preparing 32", "preparing 48"]
    with ConsoleReporter().track(None, "preparing") as bar:
        bar.advance(7)
    assert capsys.readouterr().err.splitlines() == ["preparing 7"]
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    line = LiveLine(console, "preparing", 14, 0)
    line.step(16, {})
    (text,) = ["".join(part.text for part in each).rstrip() for each in console.render_lines(line)]
    assert text.startswith("preparing") and text.endswith(" 16") and "14" not in text
