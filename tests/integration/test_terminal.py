"""Commands on a terminal, as a person has them: a pty of a known width, Ctrl-C sent to all of its processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.processes import PROGRAM, Process, start
from tests.support.world import World

CTRL_C = b"\x03"


@dataclass
class Terminal:
    """A command on a terminal of its own."""

    process: Process
    controller: int
    seen: bytes = field(default=b"")

    @property
    def text(self) -> str:
        """All that was written, without colours and moves of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen.decode("utf-8", "replace"))

    def read(self, until: Callable[[Terminal], bool] = lambda terminal: False, *, seconds: float = 120) -> None:
        """Reads until something is so, or until nobody has the terminal any more."""
        end = time.monotonic() + seconds
        os.set_blocking(self.controller, False)
        while not until(self):
            assert time.monotonic() < end, self.text[-2000:]
            try:
                chunk = os.read(self.controller, 65536)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            except OSError:  # Linux: the other end is closed
                return
            if not chunk:
                return
            self.seen += chunk

    def type(self, keys: bytes) -> None:
        os.write(self.controller, keys)


@contextlib.contextmanager
def on_terminal(world: World, *arguments: str, columns: int = 80) -> Iterator[Terminal]:
    controller, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in world.environment.items() if name not in ("COLUMNS", "LINES")}
    process = start(
        PROGRAM,
        *arguments,
        cwd=world.root,
        env={**environment, "TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        terminal=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, controller)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        os.close(controller)


def list_group(leader: int) -> list[str]:
    """Processes of a session that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(") ")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(stat.parent.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_while_workers_prepare_rows(world: World, presses: int) -> None:
    """It ends at once, also where it is pressed again while the first is being answered; no worker is left."""
    world.rows(60_000)
    with on_terminal(world, "preview", "r.yaml", "--rows", "0") as terminal:
        terminal.read(lambda seen: len(list_group(seen.process.pid)) > 2)
        for _ in range(presses):
            terminal.type(CTRL_C)
            time.sleep(0.05)
        pressed = time.monotonic()
        terminal.read(seconds=60)
        assert terminal.process.wait(30) in (130, -signal.SIGINT)  # a shell says 130 of both
        assert time.monotonic() - pressed < 20
        assert "Traceback" not in terminal.text and "Exception" not in terminal.text, terminal.text
        assert list_group(terminal.process.pid) == []


def test_training_on_a_terminal_of_80_columns(world: World) -> None:
    """The line shows how far it is and how long it takes; Ctrl-C is answered at once; the command to copy is whole."""
    world.recipe(("max_steps: 2", "max_steps: 50000"))
    output = f"runs/{'a-long-name-' * 6}"
    with on_terminal(world, "train", "r.yaml", "--output", output) as terminal:
        figures = r"loss [\d.]+  tok/s \d+ +(GiB [\d.]+ of est\. [\d.]+ +)?(\d+:)?\d\d:\d\d"
        terminal.read(lambda seen: re.search(rf"training [^\r]* \d\d/50000 {figures}\r", seen.text) is not None)
        terminal.type(CTRL_C)
        terminal.read()
        assert terminal.process.wait(30) == 130
    said = terminal.text.replace("\r\n", "\n")
    assert said.count("stopping: saving a checkpoint of the last whole step; press Ctrl-C again to stop at once") == 1
    (last,) = re.findall(r"^error: stopped by SIGINT: saved step .*$", said, re.MULTILINE)
    assert last.endswith(f"go on with: lorafit train r.yaml --output {output} --resume")
    assert said.index("stopping: ") < said.index("error: ")


def test_what_is_to_be_copied_stands_on_one_line(world: World) -> None:
    output = f"runs/{'a-long-name-' * 6}"
    with on_terminal(world, "train", "r.yaml", "--output", output, columns=60) as terminal:
        terminal.read()
        assert terminal.process.wait(30) == 0
    (line,) = [line for line in terminal.text.split("\r\n") if line.startswith("the adapter of step 2 is in ")]
    assert f" {output}/adapter; next: lorafit generate {output} --prompt TEXT" in line
    assert line.endswith(f"lorafit eval {output} --set data.test=FILE")
