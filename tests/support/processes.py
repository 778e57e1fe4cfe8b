"""Commands in processes of their own, without paying for the import of torch each time.

`start` and `finish` are what tests use in place of `subprocess.Popen` and `subprocess.run`. One process (`warm_server`)
has imported the libraries and forks a child for each command. The child has its own arguments, folder, environment,
streams, session, signals and exit status. What it shares with its siblings is what an interpreter decides once: the
libraries' settings of import time and the seed of hashes. A command whose environment could change one of those, or
that runs behind another one (`unshare`, `bash`), is started for real, and so is whatever asks for `fresh=True`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO, Any

from lorafit.console.reporting import _QUIET_SETTINGS
from lorafit.machine.library_settings import LIBRARY_SETTINGS

PROGRAM = Path(sys.executable).with_name("lorafit")
SERVER = Path(__file__).with_name("warm_server.py")
READ_LATE = {  # variables that no library reads while it is imported
    *(
        "LORAFIT_CACHE",
        "LORAFIT_API_KEY",
        "PROMPT_TOOLKIT_NO_CPR",
        "TORCHINDUCTOR_CACHE_DIR",
        "COLUMNS",
        "LINES",
        "TERM",
        "TZ",
        "PWD",
        "OLDPWD",
        "_",
    ),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"),
    *("PYTEST_CURRENT_TEST", "PYTEST_VERSION", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"),
    *("PYTEST_XDIST_TESTRUNUID",),
}
ENVIRONMENT = dict(os.environ) | {"OMP_NUM_THREADS": "1"}  # of the session, before any test has changed it


class ForkedProcess:
    """What tests use of `subprocess.Popen`, for a process that is the child of another one."""

    def __init__(self, pid: int, status: int, streams: Sequence[IO[Any] | None]) -> None:
        self.pid, self._status = pid, status
        self.stdout, self.stderr = streams
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return code

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            (status,) = struct.unpack("i", os.read(self._status, 4))
            os.close(self._status)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its status is still on its way
                os.kill(self.pid, number)

    def kill(self) -> None:
        import signal

        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Both streams to their ends; a process that takes longer is killed."""
        end = None if timeout is None else time.monotonic() + timeout
        with ThreadPoolExecutor(2) as pool:
            read = [pool.submit(stream.read) if stream else None for stream in (self.stdout, self.stderr)]
            try:
                if end is not None:
                    for waiting in filter(None, read):
                        waiting.exception(max(0, end - time.monotonic()))
                self.wait(None if end is None else max(0, end - time.monotonic()))
            except (TimeoutError, subprocess.TimeoutExpired):
                self.kill()
                raise
            said = tuple(waiting.result() if waiting else None for waiting in read)
        for stream in filter(None, (self.stdout, self.stderr)):
            stream.close()
        return said  # type: ignore[return-value]


Process = subprocess.Popen[str] | ForkedProcess


class WarmPython:
    """A process that has imported the libraries in an environment, and forks commands."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER), str(theirs.fileno())],
            env=self.environment,
            stdin=subprocess.PIPE,  # pipes, as for a file the interpreter would note a position
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether a command in this environment would import the libraries with the same settings."""
        mine, theirs = ({**LIBRARY_SETTINGS, **_QUIET_SETTINGS, **given} for given in (self.environment, environment))
        return not [
            name for name in mine.keys() | theirs.keys() if name not in READ_LATE and mine.get(name) != theirs.get(name)
        ]

    def start(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: int | None = None,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        encoding: str | None = "utf-8",
        session: bool = False,
        terminal: bool = False,
        prepare: Callable[[], None] | None = None,
    ) -> ForkedProcess:
        """Forks `lorafit ...`, `-c CODE ...` or `FILE.py ...`; for the rest see `start` below."""
        ours: list[IO[Any] | None] = []
        given: list[int] = [os.open(os.devnull, os.O_RDONLY) if stdin is None else os.dup(stdin)]
        for wanted in (stdout, stderr):
            if wanted == subprocess.PIPE:
                reading, writing = os.pipe()
                ours.append(os.fdopen(reading, "r" if encoding else "rb", encoding=encoding))
                given.append(writing)
            else:
                ours.append(None)
                given.append(os.open(os.devnull, os.O_WRONLY) if wanted == subprocess.DEVNULL else os.dup(wanted))
        status, writing = os.pipe()
        given.append(writing)
        request = {
            "argv": [str(word) for word in argv],
            "cwd": str(cwd),
            "env": dict(env),
            "session": session,
            "terminal": terminal,
            "prepare": f"{prepare.__module__}:{prepare.__qualname__}" if prepare else None,
        }
        socket.send_fds(self._control, [json.dumps(request).encode()], given)
        for descriptor in given:
            os.close(descriptor)
        answer = self._control.recv(8)
        assert answer, self._server.communicate()[1]
        return ForkedProcess(struct.unpack("q", answer)[0], status, ours)

    def close(self) -> None:
        self._control.close()
        self._server.wait(30)


@cache
def standing() -> WarmPython:
    """The one of this test process."""
    return WarmPython(ENVIRONMENT)


def can_fork() -> bool:
    """Whether a forked process is like a fresh one here: only on Linux, and never beside CUDA."""
    return sys.platform == "linux" and not Path("/dev/nvidiactl").exists()


def start(
    *argv: str | Path,
    cwd: Path,
    env: Mapping[str, str],
    fresh: bool = False,
    warm: WarmPython | None = None,
    before: Sequence[str] = (),
    prepare: Callable[[], None] | None = None,
    terminal: bool = False,
    encoding: str | None = "utf-8",
    **streams: Any,
) -> Process:
    """Starts a process and leaves it running.

    Args:
        argv: `PROGRAM ...`, `-c CODE ...` or `FILE.py ...`.
        cwd: Its folder.
        env: Its whole environment.
        fresh: Start a new interpreter whatever that costs.
        warm: What to fork from; that of this test process unless said.
        before: A command that runs it.
        prepare: Called in it first; a function at the top of a module.
        terminal: It leads a session of its own, whose terminal is its standard input.
        encoding: Of its pipes; None for bytes.
        streams: `stdin`, `stdout`, `stderr` as for `subprocess.Popen`; the latter two are pipes unless said.
    """
    words = [str(word) for word in argv]
    if can_fork() and not (fresh or before or "--debug" in words) and (warm := warm or standing()).fits(env):
        return warm.start(
            words, cwd=cwd, env=env, session=terminal, terminal=terminal, prepare=prepare, encoding=encoding, **streams
        )

    def first() -> None:
        if terminal:
            import fcntl
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if prepare is not None:
            prepare()

    program = [] if words[0] == str(PROGRAM) else [sys.executable]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    options: dict[str, Any] = {"preexec_fn": first} if terminal or prepare else {}
    return subprocess.Popen(
        [*before, *program, *words],
        cwd=cwd,
        env=dict(env),
        encoding=encoding,
        start_new_session=terminal,
        **pipes,
        **options,
    )


def finish(*argv: str | Path, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """`start`, and waits for the end."""
    process = start(*argv, **options)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        raise
    assert process.returncode is not None
    return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)
