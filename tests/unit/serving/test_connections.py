"""Clients that say nothing, never end what they say, or do not listen are cut off, and hold up nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import PlainTextResponse, StreamingResponse

from lorafit.errors import LorafitError
from lorafit.serving import app as app_module
from lorafit.serving import running
from lorafit.serving.app import Gate
from lorafit.serving.running import bind

HEAD = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n"


class Served:
    """A server whose every path answers at once but `/endless`, which writes until its client is gone."""

    def __init__(self) -> None:
        self.left = threading.Event()
        settings = SimpleNamespace(key=None, grace_seconds=0)
        self.logged: list[str] = []
        reporter = SimpleNamespace(info=self.logged.append)
        self.service: Any = SimpleNamespace(settings=settings, running=0, is_closing=False, reporter=reporter)
        self.service.drain, self.service.failed = self._drain, Future()
        self.bound, ready = bind("127.0.0.1", 0), threading.Event()
        self.port = self.bound.getsockname()[1]

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/endless":
                await StreamingResponse(self._endless())(scope, receive, send)
            else:
                await PlainTextResponse("x" * 40_000_000 if scope["path"] == "/large" else "fine")(scope, receive, send)

        def live() -> None:
            with pytest.raises(LorafitError, match="the engine failed"):
                running.run(Gate(answer, self.service), self.service, self.bound, ready.set)

        self._thread = threading.Thread(target=live)
        self._thread.start()
        assert ready.wait(20)

    def connect(self, *sent: bytes) -> socket.socket:
        """A client that has sent this."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        for part in sent:
            client.sendall(part)
        return client

    def is_well(self) -> bool:
        """Whether it answers others."""
        with self.connect(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as client:
            return read_all(client).endswith(b"fine")

    async def _endless(self) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 65_536
                await asyncio.sleep(0)
        finally:
            self.left.set()

    async def _drain(self) -> None: ...

    def close(self) -> None:
        """Has its engine fail, which ends the server with the reason."""
        self.service.failed.set_exception(LorafitError("the engine failed"))
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.bound.close()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(running, "_PATIENCE_SECONDS", 0.3, raising=False)
    monkeypatch.setattr(app_module, "_BODY_SECONDS", 0.3, raising=False)
    made = Served()
    yield made
    made.close()


def read_all(client: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65_536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("sent", [b"", b"POST / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT"])
def test_who_never_ends_a_head_is_cut_off(served: Served, sent: bytes) -> None:
    """Also behind a request that was answered; each would hold a connection, of which there are not many."""
    with served.connect(sent) as client:
        began = time.monotonic()
        assert (b"fine" in read_all(client)) == (b"localhost" in sent)
        assert time.monotonic() - began < 3
    assert served.is_well()


def test_a_body_that_never_ends_gets_an_answer(served: Served) -> None:
    """However little of it comes now and then."""
    with served.connect(HEAD + b"\r\n") as client:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for _ in range(9):
                client.sendall(b"x")
                time.sleep(0.05)
        head, _, body = read_all(client).partition(b"\r\n\r\n")
        assert time.monotonic() - began < 3
    assert head.startswith(b"HTTP/1.1 408 ")
    assert "the body was not here within 0.3 seconds" in json.loads(body)["error"]["message"]
    assert served.is_well()


@pytest.mark.parametrize("path", ["/endless", "/large"])
def test_who_reads_nothing_is_cut_off(served: Served, path: str) -> None:
    """The work of a stream ends, and a whole answer is not kept for whoever never takes it."""
    with served.connect(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) as client:
        if path == "/endless":
            assert served.left.wait(3)
        assert served.is_well()
        time.sleep(0.9)
        assert len(read_all(client)) < 40_000_000  # what the kernel had taken before


def test_who_reads_slowly_gets_all(served: Served) -> None:
    with served.connect(b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as client:
        size = 0
        while part := client.recv(1 << 20):
            size += len(part)
            time.sleep(0.03)
        assert size > 40_000_000


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("[", 403),
    ],
)
def test_a_name_that_was_bent_to_this_machine_is_refused(served: Served, host: str, status: int) -> None:
    """The page it came with would read the answers as its own."""
    with served.connect(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()) as client:
        assert read_all(client).startswith(f"HTTP/1.1 {status} ".encode())


def test_no_client_writes_lines_of_the_log_or_moves_its_cursor(served: Served) -> None:
    with served.connect(b"GET /%1b[2J%0aPOST%20/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as client:
        assert read_all(client).endswith(b"fine")
    assert [line.rpartition(",")[0] for line in served.logged] == ["GET /�[2J�POST / 200"]


def test_clients_that_ask_for_another_protocol_are_no_news(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Java's asks for HTTP/2 in every request."""
    asked = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with served.connect(asked) as client:
        assert read_all(client).endswith(b"fine")
    with served.connect(b"\x16\x03\x01") as client:
        client.sendall(b"\0" * 100 + b"\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 400 ")
    assert caplog.records == []
