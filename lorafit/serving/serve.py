"""`lorafit serve`: a base in memory with its adapters, behind HTTP.

base, adapters ──open──> Opened ──load──> Engine ──> BatchedEngine ──Catalog, Service──> routes on a port
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.arguments import check_arguments, read_adapters
from lorafit.console.reporting import Printed, say
from lorafit.console.wording import agreed, counted, near, quantised_as
from lorafit.contracts import JsonObject, Reporter, Silent
from lorafit.errors import StoppedBySignal, UsageError
from lorafit.serving.settings import KEY_VARIABLE, Settings, read_key
from lorafit.serving.split import NAME as SPLIT_NAME
from lorafit.serving.split import read_split

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.answering.ticket import Figures
    from lorafit.serving.catalog import Catalog

_PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")


@dataclass(frozen=True)
class ServedAll(Printed):
    """What a server has done when it ends.

    Attributes:
        address: Where it was.
        answers: How many, by the name of who answered.
        prompt_tokens: Of their prompts.
        written_tokens: Of the answers.
        signal_number: What ended it; None where no signal did.
        cut: Requests that were still running when the grace was over.
    """

    address: str
    answers: Mapping[str, int]
    prompt_tokens: int
    written_tokens: int
    signal_number: int | None
    cut: int = 0

    def to_json(self) -> JsonObject:
        """Plain values."""
        tokens = {"prompt_tokens": self.prompt_tokens, "written_tokens": self.written_tokens}
        return {
            "address": self.address,
            "answers": dict(self.answers),
            **tokens,
            "signal": self.signal_number,
            "cut": self.cut,
        }

    def render(self, console: Console) -> None:
        """One line."""
        named = ", ".join(f"{name} {number:,}" for name, number in self.answers.items())
        told = f"{counted(sum(self.answers.values()), 'answer')}{f' ({named})' if named else ''}"
        tokens = f"{counted(self.written_tokens, 'token')} written to {self.prompt_tokens:,} of prompts"
        say(console, "; ".join(filter(None, (f"{told}, {tokens}", self._told_cut()))))

    def raise_if_interrupted(self) -> None:
        """Ends as every command that Ctrl-C stops; SIGTERM is how a server is ended, and no fault."""
        if self.signal_number == signal.SIGINT:
            what = f"stopped by SIGINT; {self._told_cut() or 'running answers have ended'}"
            raise StoppedBySignal(what, signal_number=signal.SIGINT)

    def _told_cut(self) -> str:
        requests = f"{counted(self.cut, 'running request')} {agreed(self.cut, 'was', 'were')}"
        return f"{requests} cut off after --grace" if self.cut else ""


def serve(
    run: str | os.PathLike[str],
    *,
    adapters: Sequence[str] | Mapping[str, str | os.PathLike[str]] = (),
    ab_split: str | Mapping[str, float] | None = None,
    feedback: Path | None = None,
    route: float | None = None,
    drift: bool = False,
    checkpoint: str | None = None,
    base_model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_loading: bool = False,
    max_new_tokens: int = 256,
    max_running: int = 16,
    max_waiting: int = 64,
    max_batch_tokens: int = 16_384,
    timeout: float = 600.0,
    grace: float = 30.0,
    reporter: Reporter | None = None,
) -> ServedAll:
    """Serves a base with its adapters until a signal comes."""
    check_arguments(
        {
            "route": route,
            "drift": drift,
            "port": port,
            "max_new_tokens": max_new_tokens,
            "max_running": max_running,
            "max_waiting": max_waiting,
            "max_batch_tokens": max_batch_tokens,
            "timeout": timeout,
            "grace": grace,
        }
    )
    reporter, given = reporter or Silent(), read_adapters(adapters)
    settings = Settings(host, port, read_key(host), allow_loading, max_new_tokens, timeout, grace)
    split = read_split(ab_split)
    _require_packages()
    from lorafit.answering.batched import BatchedEngine, Limits
    from lorafit.serving.app import build_app
    from lorafit.serving.catalog import Catalog, open_served
    from lorafit.serving.feedback import Feedback
    from lorafit.serving.routing import Router
    from lorafit.serving.running import bind
    from lorafit.serving.running import run as run_server
    from lorafit.serving.service import Service

    with bind(host, port) as bound:
        ratings = None if feedback is None else Feedback(feedback)
        routes = route is not None
        opened = open_served(os.fspath(run), given, split, checkpoint, base_model, reporter, routes=routes)
        limits = Limits(rows=max_running, waiting=max_waiting, tokens=max_batch_tokens)
        engine = BatchedEngine(opened.first.load_base(), limits, reporter)
        try:
            router = Router(engine, opened.name, route, reporter, watches=drift) if routes or drift else None
            catalog, address = Catalog(engine, opened, split, reporter, router), _address(bound)
            service = Service(engine, catalog, settings, ratings, reporter)
            lines = _announcement(catalog, settings, address, quantised_as(opened.first.quantization))
            received = run_server(build_app(service), service, bound, lambda: reporter.info("\n".join(lines)))
        finally:
            engine.close(finish=False)
    return replace(_sum_up(address, catalog, engine.figures(), received), cut=service.cut)


def _require_packages() -> None:
    """Raises UsageError where the extra is not installed."""
    missing = next((name for name in _PACKAGES if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        todo = 'install what a server needs with: pip install "lorafit[serve]"'
        raise UsageError(f"{missing.replace('_', '-')} is not installed", todo=todo)


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _announcement(catalog: Catalog, settings: Settings, address: str, loaded: str) -> list[str]:
    """What is served, where, and how to try it."""
    lines = [f"serving at {address}, {'with the key of ' + KEY_VARIABLE if settings.key else 'for this machine alone'}"]
    everybody = catalog.all()
    width = max(len(served.name) for served in everybody)
    for served in everybody:
        asked = "chats" if served.voice.chats is not None else "verbatim text"
        what = f"base, {loaded}" if served.adapter is None else served.kind
        lines.append(f"  {served.name:{width}}  {what}, {asked}, {near(Path(served.root))}")
    if catalog.split is not None:
        lines.append(f"  {SPLIT_NAME:{width}}  of users: {catalog.split}")
    if catalog.router is not None and catalog.router.share is not None:
        lines.append(f"  {'auto':{width}}  by the prompt: {', '.join(catalog.router.names)}, or the base")
    header = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if settings.key else ""
    body = f'{{"model": "{everybody[:2][-1].name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    curl = f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{header}"
    return [*lines, f"try: {curl} -d '{body}'", "Ctrl-C ends it"]


def _sum_up(address: str, catalog: Catalog, figures: Figures, received: int | None) -> ServedAll:
    answers: dict[str, int] = {}
    for (adapter, reason), number in figures.finished.items():
        if reason in ("stop", "length"):
            name = adapter or catalog.base.name
            answers[name] = answers.get(name, 0) + number
    read, written = sum(figures.prompt_tokens.values()), sum(figures.written_tokens.values())
    return ServedAll(address, answers, read, written, received)
