"""A small Hugging Face hub on 127.0.0.1 for tests: the requests of its client, and the ways in which a hub fails.

It speaks what `huggingface_hub` asks for and no more: `/api/KIND/ID[/revision/REV]`, `/tree`, `/paths-info` and
`/resolve`. Each repository can be given a fault; every request is written down.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

Fault = Callable[["Handler"], bool]
"""Answers a request badly, and says so; False leaves it to the hub."""


def commit_of(name: str) -> str:
    """A commit's hash, by any name."""
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Repo:
    """Files by commit, and what branches and tags mean."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    fault: Fault | None = None
    moved_to: str = ""


@dataclass
class Hub:
    """Repositories by `models/ID` or `datasets/ID`, and the requests so far."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, key: str, files: dict[str, bytes], *, version: str = "one", fault: Fault | None = None) -> str:
        """Puts a new commit on `main`; gives its hash."""
        commit = commit_of(version)
        repo = self.repos.setdefault(key, Repo({}, {}))
        repo.commits[commit], repo.refs["main"], repo.fault = files, commit, fault
        return commit

    def take_requests(self) -> list[str]:
        """The requests since the last call."""
        taken, self.requests[:] = list(self.requests), []
        return taken


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
        """A whole answer. Underscores in header names are dashes."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.is_api = parts[0] == "api"
        parts = parts[1:] if self.is_api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        self.id, rest = "/".join(parts[:2]), parts[2:]
        self.key = f"{kind}/{self.id}"
        repo = self.hub.repos.get(self.key)
        if repo is None:
            self.reply(404, b'{"error":"Repository not found"}', X_Error_Code="RepoNotFound")
        elif repo.moved_to:
            self.reply(307, Location=self.path.replace(self.id, repo.moved_to))
        elif repo.fault is None or not repo.fault(self):
            self.serve(repo, rest)

    def serve(self, repo: Repo, rest: list[str]) -> None:
        what = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self.reply(404, b'{"error":"Invalid rev id"}', X_Error_Code="RevisionNotFound")
            return
        files = repo.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            self.reply_json({"id": self.id, "sha": commit, "siblings": siblings, "tags": [], "private": False})
        elif what == "tree":
            self.reply_json([entry(name, data) for name, data in files.items()])
        elif what == "paths-info":
            wanted = json.loads(self.body)["paths"]
            self.reply_json([entry(name, data) for name, data in files.items() if name in wanted])
        else:
            self.serve_file(files, "/".join(rest[2:]), commit)

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def serve_file(self, files: dict[str, bytes], name: str, commit: str) -> None:
        if name not in files:
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        data, code = files[name], 200
        headers = {"X_Repo_Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if begin := self.headers.get("Range", "").removeprefix("bytes=").rstrip("-"):
            code, headers["Content_Range"] = 206, f"bytes {begin}-{len(data) - 1}/{len(data)}"
            data = data[int(begin) :]
        self.reply(code, data, Content_Length=str(len(data)), **headers)


def entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def pretended_hub() -> Iterator[Hub]:
    """A running hub, to be used by processes that start with HF_ENDPOINT at its `endpoint`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    server.handle_error = lambda request, address: None  # clients that gave up
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def status(code: int, **headers: str) -> Fault:
    """Every request is refused."""

    def answer(request: Handler) -> bool:
        request.reply(code, b'{"error":"no"}', **headers)
        return True

    return answer


def gated(request: Handler) -> bool:
    """What the hub does: anybody sees the listing, and only who accepted the licence the files."""
    if request.is_api:
        return False
    request.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model is restricted")
    return True


def silent(seconds: float) -> Fault:
    """The connection stands, and nothing comes."""

    def answer(request: Handler) -> bool:
        time.sleep(seconds)
        return False

    return answer


def trickling(request: Handler) -> bool:
    """A byte now and then, so that no timeout of a socket is ever reached."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    try:
        for _ in range(200):
            request.wfile.write(b"x")
            request.wfile.flush()
            time.sleep(0.1)
    except OSError:
        pass
    return True


def dripping(request: Handler) -> bool:
    """The weights come, a little at a time."""
    if request.command != "GET" or not request.path.endswith("model.safetensors"):
        return False
    repo = request.hub.repos[request.key]
    data = repo.commits[repo.refs["main"]]["model.safetensors"]
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    for begin in range(0, len(data), 1000):
        request.wfile.write(data[begin : begin + 1000])
        time.sleep(0.2)
    return True


def breaking_off(name: str, *, after_bytes: int, times: int) -> Fault:
    """The connection ends in the middle of a file, so many times."""
    left = [times]

    def answer(request: Handler) -> bool:
        if request.command != "GET" or not request.path.endswith(name) or left[0] <= 0:
            return False
        left[0] -= 1
        data = next(
            files[name] for repo in request.hub.repos.values() for files in repo.commits.values() if name in files
        )
        begin = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        request.send_response(206 if begin else 200)
        if begin:
            request.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - begin))
        request.end_headers()
        request.wfile.write(data[begin : begin + after_bytes])
        request.close_connection = True
        return True

    return answer
