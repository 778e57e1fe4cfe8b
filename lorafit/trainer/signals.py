"""Signals that ask a run to stop. They set a flag; the loop reads it where its state is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lorafit.errors import StoppedBySignal

_WATCHED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # those that this platform has; SIGUSR1 is Slurm's early warning


class StopRequested(Exception):  # noqa: N818 - a wish, not an error
    """A signal asked to stop. Raised by `StopSignals.check`, handled by the loop, never shown."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """While entered, signals set `received` instead of ending the process; afterwards the handlers are as before.

    A second SIGINT ends at once, without saving. Outside the main thread Python takes no handlers, and none are set.

    Args:
        says: Gets one sentence when the first signal comes; a step can be long, and a person waits.
    """

    def __init__(self, says: Callable[[str], None] = lambda sentence: None) -> None:
        self._says = says
        self._saying: threading.Thread | None = None
        self.received: int | None = None
        self._may_interrupt = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for name in _WATCHED:
                if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._saying is not None:
            self._saying.join()
            self._saying = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise StoppedBySignal("stopped by a second SIGINT: the last steps are not saved", signal_number=number)
        if self.received is None:
            again = "; press Ctrl-C again to stop at once, without it" if number == signal.SIGINT else ""
            sentence = f"stopping: saving a checkpoint of the last whole step{again}"
            # From a thread: a handler that writes may have come in the midst of a write.
            self._saying = threading.Thread(target=self._says, args=(sentence,), daemon=True)
            self._saying.start()
        self.received = number
        if self._may_interrupt:
            raise StopRequested(number)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """What runs inside changes nothing that is kept, so a signal may end it anywhere: an evaluation can be long."""
        self.check()
        self._may_interrupt = True
        try:
            yield
        finally:
            self._may_interrupt = False

    def check(self) -> None:
        """Raises StopRequested where a signal came."""
        if self.received is not None:
            raise StopRequested(self.received)
