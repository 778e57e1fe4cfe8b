"""The server's life: a port of its own, requests until a signal, an end that waits for running answers.

a client that sends no request, or reads no answer ──> is cut off
SIGTERM, Ctrl-C ──> new requests get 503, running ones end within the grace ──> the port is closed
the engine fails ──> what runs gets the reason, and the process ends with it
a second signal ──> the process ends at once
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorafit.console.exits import end_at_once
from lorafit.errors import UsageError
from lorafit.serving.service import Service

_BACKLOG = 512
_CLOSE_SECONDS = 2  # for connections that are idle when all answers have ended
_PATIENCE_SECONDS = 15.0
"""Without a sign of a client whose turn it is; once more at most, since that is looked at as often."""
_WATCHED = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """uvicorn's, whose handlers would close the port before running answers end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None are."""
        yield


class _Connection(H11Protocol):
    """uvicorn's, which would wait for ever for a request's head, and for a client to read what it has asked for."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio's."""
        super().connection_made(transport)
        self._seen: tuple[object, int] | None = None
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._next_look.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        """asyncio's, where the client has read."""
        self._seen = None
        super().resume_writing()

    def _look(self) -> None:
        """Ends it where the client's turn was the same at the last look, and nothing was read since."""
        unread, between = self.transport.get_write_buffer_size(), self.cycle is None or self.cycle.response_complete
        is_clients_turn = between or self.flow.write_paused
        if is_clients_turn and self._seen is not None and self._seen[0] is self.cycle and self._seen[1] <= unread:
            self.transport.abort()
        self._seen = (self.cycle, unread) if is_clients_turn else None
        self._next_look = self.loop.call_later(_PATIENCE_SECONDS, self._look)


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, on which nobody listens yet.

    Raises:
        UsageError: It is taken, not this machine's, or not for this user.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        raise _unusable(error, host, port) from error
    return bound


def _unusable(error: Exception, host: str, port: int) -> UsageError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        todo = "choose another one, or end the server that has it"
        return UsageError(f"port {port} of {host} is in use", key="--port", todo=todo)
    if number in (errno.EACCES, errno.EPERM):
        return UsageError(f"port {port} is not for this user", key="--port", todo="choose one above 1023")
    return UsageError(f"'{host}' is no address of this machine", key="--host", todo="use 127.0.0.1, or 0.0.0.0 for all")


def run(app: ASGIApp, service: Service, bound: socket.socket, ready: Callable[[], None]) -> int | None:
    """Answers until a signal comes; gives its number, None where none can come: outside of the main thread.

    Args:
        app: The server.
        service: Its state.
        bound: From `bind`; closed at the end.
        ready: Called when requests are taken.

    Raises:
        LorafitError: What ended the engine, and with it the server.
    """
    try:
        bound.listen(_BACKLOG)
    except OSError as error:  # somebody was quicker while the model was loaded
        raise _unusable(error, *bound.getsockname()[:2]) from error
    return asyncio.run(_run(app, service, bound, ready))


async def _run(app: ASGIApp, service: Service, bound: socket.socket, ready: Callable[[], None]) -> int | None:
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",  # of what is no HTTP, or asks for WebSockets as Java's client does, it would warn each time
        access_log=False,
        lifespan="off",
        loop="asyncio",
        http=_Connection,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    server, stop = _Server(config), asyncio.Event()
    loop, received = asyncio.get_running_loop(), list[int]()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if received:
            end_at_once(number, frame)
        received.append(number)
        loop.call_soon_threadsafe(stop.set)

    with _handling(ask_to_stop):
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        stopping = asyncio.create_task(stop.wait())
        service.failed.add_done_callback(lambda _: loop.call_soon_threadsafe(stop.set))
        ready()
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if received:
            again = "; press Ctrl-C again to end at once" if received[0] == signal.SIGINT else ""
            service.reporter.info(f"ending: running answers have {service.settings.grace_seconds:g} seconds{again}")
        await service.drain()
        server.should_exit = True
        await serving
    if service.failed.done():
        service.failed.result()
    return received[0] if received else None


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals go to the handler within it; elsewhere than in the main thread Python takes none."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        watched = (number for number in _WATCHED if signal.getsignal(number) != signal.SIG_IGN)
        before = {number: signal.signal(number, handler) for number in watched}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
