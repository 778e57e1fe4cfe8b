"""What people see: bars on a terminal, lines elsewhere, nothing with --quiet; ASCII where the terminal has no more."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from lorafit.reporting import ConsoleReporter

PROGRAM = """
from lorafit.reporting import ConsoleReporter
reporter = ConsoleReporter()
with reporter.track(3, "training") as bar:
    for step in range(3):
        bar.advance(1, loss=1.25, grad="overflow")
        reporter.info(f"said [{step}]")
reporter.warn("look out")
"""


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    with reporter.track(100, "training") as bar:
        for _ in range(100):
            bar.advance(1, loss=1.23456, tokens_seen=7)
    reporter.warn("look [out]")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 3  # the first, the last, the warning
    assert lines[0].startswith("training 1/100  loss 1.235  tokens seen 7") and lines[0].endswith("left")
    assert lines[1].startswith("training 100/100") and lines[2] == "warning: look [out]"


def test_a_bar_goes_on_where_an_earlier_process_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    """What is left is reckoned from this process's units alone: 80 of them in the time of the first."""
    reporter = ConsoleReporter(verbose=True)
    with reporter.track(100, "training", 19) as bar:
        time.sleep(0.1)
        for _ in range(81):
            bar.advance(1, loss=1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training 20/100") and lines[-1].startswith("training 100/100")
    assert re.search(r"0:0[89] left|0:1\d left", lines[0])


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
