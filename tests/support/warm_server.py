"""The process behind `tests.support.processes`: imports once what commands import, then forks one process a request.

A request is one message on a socket: `{"argv", "cwd", "env", "session", "terminal", "prepare"}`, and with it four file
descriptors: standard input, output and error, and the pipe that gets the exit status. The answer is the process id.
The forked process comes back from `serve`, runs to the end of this file, joins its threads and calls what is registered
for its exit, all as any other; only the interpreter is not taken down piece by piece: that takes longer than commands.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

os.fsync = lambda descriptor: None  # type: ignore[assignment]  # as in tests/conftest.py
LARGEST_MESSAGE_BYTES = 1 << 20
LIBRARIES = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
    "transformers.generation",
    "peft",
    "bitsandbytes",
    "rich.progress",
)


def import_all() -> None:
    """What a command imports on its way to a trained model, under the settings that commands make before that."""
    import lorafit
    from lorafit.console.reporting import quieten_libraries
    from lorafit.machine.library_settings import set_library_defaults

    set_library_defaults()
    quieten_libraries()
    modules = (module.name for module in pkgutil.walk_packages(lorafit.__path__, "lorafit."))
    for name in (*LIBRARIES, *modules):
        if not name.endswith("__main__"):
            importlib.import_module(name)


def serve(control: socket.socket) -> dict[str, Any]:
    """Answers requests until nobody can send one any more, which ends the process; in a forked process: its request."""
    waking, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    running: dict[int, int] = {}  # the pipe for the exit status, by process id
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(waking, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is waking:
                os.read(waking, 4096)
                report_ends(running)
                continue
            message, descriptors, _, _ = socket.recv_fds(control, LARGEST_MESSAGE_BYTES, 4)
            if not message:
                for process in running:
                    os.kill(process, signal.SIGKILL)
                os._exit(0)
            process = os.fork()
            if process == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                selector.close()
                control.close()
                for inherited in (waking, woken, descriptors[3], *running.values()):
                    os.close(inherited)
                request: dict[str, Any] = json.loads(message)
                take_over(request, descriptors[:3])
                return request
            running[process] = descriptors[3]
            for stream in descriptors[:3]:
                os.close(stream)
            control.send(struct.pack("q", process))


def report_ends(running: dict[int, int]) -> None:
    """Writes the exit status of every process that ended."""
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        pipe = running.pop(process)
        os.write(pipe, struct.pack("i", status))
        os.close(pipe)


def take_over(request: dict[str, Any], streams: list[int]) -> None:
    """Makes the forked process what was asked for: streams, session, folder, environment, seeds, arguments."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    if request["session"]:
        os.setsid()
    if request["terminal"]:
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()  # as that of every new process; `random` sees to itself
    if request["prepare"]:
        module, _, function = request["prepare"].partition(":")
        sys.path.insert(0, str(Path(__file__).parents[2]))
        getattr(importlib.import_module(module), function)()
        del sys.path[0]


def run(argv: list[str]) -> None:
    """`lorafit ...`, `-c CODE ...` or `FILE.py ...`, as the interpreter would."""
    sys.orig_argv = [sys.executable, *argv]
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    elif argv[0].endswith(".py"):
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")
    else:
        from lorafit.__main__ import main

        sys.argv = argv
        main()


class End:
    """The last thing that a forked process does: registered first, it is called last."""

    code = 0

    def __call__(self) -> None:
        sys.stdout.flush()  # where that fails, the interpreter's own end goes on and says so
        sys.stderr.flush()
        if self.code < 0:
            signal.signal(-self.code, signal.SIG_DFL)
            os.kill(os.getpid(), -self.code)
        os._exit(self.code)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    end = End()
    atexit.register(end)
    gc.disable()  # it takes a second of the imports
    import_all()
    gc.collect()
    gc.freeze()  # or each child's collections touch, and so copy, all that was imported
    gc.enable()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        run(request["argv"])
    except SystemExit as stop:
        end.code = stop.code & 0xFF if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except KeyboardInterrupt:
        end.code = -signal.SIGINT
        raise
    except BaseException:
        end.code = 1
        raise
