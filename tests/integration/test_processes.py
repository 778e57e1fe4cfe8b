"""A forked command is to a test what a fresh one is: the tests of kills, terminals and exit statuses rest on that."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ENVIRONMENT, PROGRAM, ForkedProcess, can_fork, finish, standing, start

TELL = """
import json, os, signal, sys
print(json.dumps({"arguments": sys.argv, "folder": os.getcwd(), "columns": os.environ.get("COLUMNS"),
    "threads": len(os.listdir("/proc/self/task")), "files": sorted(os.listdir("/proc/self/fd"))[:3],
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler, "typed": sys.stdin.read()}))
"""
pytestmark = pytest.mark.skipif(not can_fork(), reason="commands are started for real here")


def told(tmp_path: Path, *, fresh: bool) -> Any:
    done = finish("-c", TELL, "a b", cwd=tmp_path, env={**ENVIRONMENT, "COLUMNS": "33"}, fresh=fresh)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_it_finds_itself_where_a_fresh_one_does(tmp_path: Path) -> None:
    assert told(tmp_path, fresh=False) == told(tmp_path, fresh=True)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('what')", 1),
        ("1 / 0", 1),
        ("import os; os._exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import atexit, os; atexit.register(os._exit, 5)", 5),
        ("import threading, time, os; threading.Thread(target=lambda: (time.sleep(0.1), os._exit(6))).start()", 6),
    ],
)
def test_it_ends_as_a_fresh_one_does(tmp_path: Path, code: str, status: int) -> None:
    done = finish("-c", code, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == status
    assert ("ZeroDivisionError" in done.stderr) == ("/" in code)


def test_a_signal_reaches_it(tmp_path: Path) -> None:
    process = start("-c", "import time; print('up', flush=True); time.sleep(60)", cwd=tmp_path, env=ENVIRONMENT)
    assert isinstance(process, ForkedProcess)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM


def test_one_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    with pytest.raises((TimeoutError, subprocess.TimeoutExpired)):
        finish("-c", "import time; time.sleep(60)", cwd=tmp_path, env=ENVIRONMENT, timeout=0.2)


@pytest.mark.parametrize(
    ("setting", "forked"),
    [({}, True), ({"LORAFIT_CACHE": "x"}, True), ({"HF_HOME": "x"}, False), ({"OMP_NUM_THREADS": "2"}, False)],
)
def test_what_libraries_read_while_they_are_imported_starts_a_fresh_one(setting: dict[str, str], forked: bool) -> None:
    assert standing().fits({**ENVIRONMENT, **setting}) is forked


def test_the_program_is_the_installed_one(tmp_path: Path) -> None:
    versions = {
        finish(PROGRAM, "--version", cwd=tmp_path, env=ENVIRONMENT, fresh=fresh).stdout for fresh in (True, False)
    }
    assert len(versions) == 1 and versions.pop().startswith("lorafit ")
