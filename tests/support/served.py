"""`lorafit serve` in a process of its own: its address, clients of it, and how it ends."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.support.processes import ENVIRONMENT, PROGRAM, start
from tests.support.world import Outcome

_ADDRESS = re.compile(r"serving at (http://\S+),")
_WAIT_SECONDS = 120


class Server:
    """A running server.

    Args:
        arguments: Behind `lorafit serve`; a free port is taken.
        cwd: Its folder.
        env: Over the session's environment.
    """

    def __init__(self, *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        environment = {**ENVIRONMENT, **(env or {})}
        self._process = start(PROGRAM, "serve", *arguments, "--port", "0", cwd=cwd, env=environment)
        self._lines: list[str] = []
        self._is_up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._is_up.wait(_WAIT_SECONDS)
        found = _ADDRESS.search(self.stderr)
        assert found is not None, self.stderr
        self.url = found[1]
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return "".join(self._lines)

    def openai(self, key: str = "none") -> Any:
        """The official client."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """A request with a JSON body."""
        return self.client.post(path, json=body)

    def chat(self, model: str, text: str = "what does the shop sell", **body: Any) -> httpx.Response:
        """A question to a model, answered greedily where nothing else is said."""
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", model=model, messages=messages, **{"temperature": 0, **body})

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a figure of /metrics over all lines that have these labels."""
        lines = self.client.get("/metrics").text.splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [line for line in lines if line.startswith(f"lorafit:{name}{{") and all(w in line for w in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def signal(self, number: int) -> None:
        """Sends it one."""
        self._process.send_signal(number)

    def ended(self) -> Outcome:
        """How it ended, which it has to within a minute."""
        code = self._process.wait(60)
        self._reader.join(60)
        assert self._process.stdout is not None
        return Outcome(code, self._process.stdout.read(), self.stderr)

    def close(self) -> None:
        """Ends it, however it stands."""
        self.client.close()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(60)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            if line.startswith("Ctrl-C"):
                self._is_up.set()
        self._is_up.set()
