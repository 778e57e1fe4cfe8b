"""Models and data sets of the hub, against a pretended one: every way in which it fails is one sentence, in seconds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.pretended_hub import (
    Fault,
    Hub,
    Repo,
    breaking_off,
    commit_of,
    dripping,
    files_in,
    gated,
    pretended_hub,
    silent,
    status,
    trickling,
)
from tests.support.processes import ENVIRONMENT, PROGRAM, Process, WarmPython, start
from tests.support.tiny_recipe import make_rows
from tests.support.world import RECIPE, World

SECRET = "hf_0123456789geheim"
MOST_SECONDS = 8.0  # that a command sleeps; the hub's own client takes 24 where nobody answers
RUN = """
import contextlib, io, json, sys, time
from pathlib import Path
from lorafit import cli
from lorafit.data.sources.hub import HubRows
from lorafit.errors import LorafitError
from lorafit.model.base import resolve_base
from lorafit.recipe.schema import ModelSection
from lorafit.console.reporting import ConsoleReporter, quieten_libraries

def fetch(kind, name, revision=None):
    quieten_libraries()
    try:
        if kind == "model":
            base = resolve_base(ModelSection(base=name, revision=revision), Path(), ConsoleReporter())
            print(base.path.name)
        else:
            rows = HubRows(name, subset=None, split="train", revision=revision, reporter=ConsoleReporter())
            print(rows.count(), rows.fingerprint())
    except LorafitError as error:
        print(f"error: {error.one_line}")
        sys.exit(error.exit_code)

def slept():
    "Seconds of this thread less those in which it ran or waited for a processor: other load does not count."
    try:
        ran, queued, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except OSError:
        return time.monotonic() - time.thread_time()
    return time.monotonic() - (int(ran) + int(queued)) / 1e9

for words in json.loads(sys.argv[1]):
    shown, code, began = io.StringIO(), 0, slept()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            fetch(*words[1:]) if words[0] == "fetch" else cli.main(words)
        except SystemExit as stop:
            code = stop.code or 0
    print(json.dumps([code, shown.getvalue(), slept() - began]), flush=True)
"""
MODELS: dict[str, tuple[Fault, list[str]]] = {
    "f/gated": (gated, ["on the hub it is gated", "accept its licence at http", "/f/gated", "set HF_TOKEN"]),
    "f/gated-at-once": (status(401, X_Error_Code="GatedRepo"), ["gated", "accept its licence"]),
    "f/unauthorised": (status(401), ["has no model of this name, or it is private and needs HF_TOKEN"]),
    "f/forbidden": (status(403), ["forbids it to you (403)", "ask its owner"]),
    "f/gone": (status(404), ["has no model of this name", "check model.base"]),
    "f/busy": (status(429, Retry_After="120"), ["too many requests (429)", "wait 120 seconds"]),
    "f/broken": (status(500), ["error 500", "start again later"]),
    "f/down": (status(503), ["error 503", "start again later"]),
    "f/silent": (silent(20), ["gave no answer for 2 seconds", "HF_HUB_ETAG_TIMEOUT"]),
    "f/slow": (trickling, ["gave no answer for 2 seconds"]),
    "f/cut": (breaking_off("model.safetensors", after_bytes=1000, times=99), ["download broke off", "start again"]),
    "f/no-hub": (status(200), ["does not answer as a hub", "HF_ENDPOINT"]),
}
DATA_SETS: dict[str, tuple[Fault, list[str]]] = {
    "f/gated": (gated, ["on the hub it is gated", "/datasets/f/gated", "set HF_TOKEN"]),
    "f/unauthorised": (status(401), ["has no data set of this name, or it is private and needs HF_TOKEN"]),
    "f/forbidden": (status(403), ["forbids it to you (403)"]),
    "f/gone": (status(404), ["no such file, and the hub has no data set of this name"]),
    "f/busy": (status(429, RateLimit='"api";r=0;t=55'), ["too many requests (429)", "wait 55 seconds"]),
    "f/down": (status(503), ["error 503", "start again later"]),
    "f/silent": (silent(20), ["gave no answer for 2 seconds"]),
    "f/cut": (breaking_off("train.jsonl", after_bytes=100, times=99), ["download broke off"]),
}


class Ended(NamedTuple):
    """How one command ended, all that it printed, and how long it took."""

    code: int
    shown: str
    seconds: float

    @property
    def last(self) -> str:
        return self.shown.strip().splitlines()[-1]


class Client:
    """Runs commands in a process that knows the hub by its environment, with an empty cache."""

    def __init__(self, folder: Path, python: WarmPython) -> None:
        self.folder, self.python = folder, python
        self.cache = Path(python.environment["HF_HOME"])
        shutil.rmtree(self.cache, ignore_errors=True)

    def start(self, *argv: str, **environment: str) -> Process:
        own = {**self.python.environment, "LORAFIT_CACHE": str(self.folder / "lorafit"), **environment}
        return start(*argv, cwd=self.folder, env=own, warm=self.python)

    def run(self, *commands: Sequence[str], processes: int = 1, **environment: str) -> list[Ended]:
        """How each command ended, in order. Several processes wait side by side for a hub that does not answer."""
        dealt = [commands[first::processes] for first in range(processes)]
        started = [self.start("-c", RUN, json.dumps(part), **environment) for part in dealt]
        ended: list[Iterator[Ended]] = []
        try:
            for process in started:
                stdout, stderr = process.communicate(timeout=280)
                assert (process.returncode, stderr) == (0, ""), stderr  # loggers write past the redirection
                ended.append(Ended(*json.loads(line)) for line in stdout.splitlines())
        finally:
            for process in started:
                process.kill()
        return [next(ended[number % processes]) for number in range(len(commands))]


def is_one_sentence(ended: Ended, code: int, *parts: str) -> None:
    """Nothing of the libraries, one line of ours that says all the parts, in time."""
    lines = [line for line in ended.shown.splitlines() if not line.startswith("asking ")]
    assert ended.code == code, ended
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) <= 300, ended
    assert [part for part in parts if part not in lines[0]] == [], ended
    assert ended.seconds < MOST_SECONDS + 5 * ("broke off" in lines[0]), ended  # the client goes on with it five times


@pytest.fixture(scope="module")
def hub(tiny_base: Path) -> Iterator[Hub]:
    files = files_in(tiny_base)
    with pretended_hub() as made:
        made.add("models/good/model", files)
        for name, (fault, _) in MODELS.items():
            made.add(f"models/{name}", files, fault=fault)
        rows = data_files(12)
        made.add("datasets/good/rows", rows)
        for name, (fault, _) in DATA_SETS.items():
            made.add(f"datasets/{name}", rows, fault=fault)
        yield made


def data_files(count: int, *, first: int = 0) -> dict[str, bytes]:
    lines = "".join(json.dumps(row) + "\n" for row in make_rows(count, first=first))
    return {"README.md": b"---\nlicense: mit\n---\n", "train.jsonl": lines.encode()}


@pytest.fixture(scope="module")
def python(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """What all of this file's processes are forked from but those whose environment the hub's libraries read."""
    kept = {key: value for key, value in ENVIRONMENT.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(tmp_path_factory.mktemp("hf") / "home"), "HF_ENDPOINT": hub.endpoint}
    made = WarmPython(kept | settings | {"HF_HUB_ETAG_TIMEOUT": "2"})
    yield made
    made.close()


@pytest.fixture
def client(tmp_path: Path, hub: Hub, python: WarmPython, tiny_base: Path) -> Client:
    (tmp_path / "r.yaml").write_text(RECIPE.format(base=tiny_base))
    World(tmp_path, tiny_base, lambda _: pytest.fail("runs in a process of its own"), {}).rows()
    hub.take_requests()
    return Client(tmp_path, python)


def fetch(kind: str, name: str, *revision: str) -> list[str]:
    """The base or the rows alone, by the function that all commands get them from: it needs no torch."""
    return ["fetch", kind, name, *revision]


def on_model(name: str, command: str = "preview", *more: str) -> list[str]:
    return [command, "r.yaml", "--set", f"model.base={name}", *more]


def on_rows(name: str, *more: str, command: str = "preview") -> list[str]:
    return [command, "r.yaml", "--set", f"data.train={name}", *more]


def test_each_fault_of_a_model_is_one_sentence(client: Client, hub: Hub) -> None:
    ended = client.run(*map(on_model, MODELS), processes=4)
    for (name, (_, parts)), one in zip(MODELS.items(), ended, strict=True):
        is_one_sentence(one, 5, f"model.base: '{name}' is not on this disk, and ", *parts)
    asked = hub.take_requests()
    for name in ("f/gone", "f/busy", "f/broken", "f/down", "f/silent", "f/slow"):
        assert len([request for request in asked if f"{name}" in request]) == 1, asked
    assert not [request for request in asked if "harness" in request or "telemetry" in request]


def test_a_name_like_a_known_one_is_told_it(client: Client) -> None:
    """An estimate needs no more than the shape, which a tuning and a copy share; training needs the weights meant."""
    like = {
        "meta-llama/Meta-Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
        "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
        "Qwen3-8B": "Qwen/Qwen3-8B",
        "unsloth/Qwen3-8B": "Qwen/Qwen3-8B",
        "unsloth/Qwen3-8B-unsloth-bnb-4bit": "Qwen/Qwen3-8B",
        "google/gemma-3-4b": "google/gemma-3-4b-pt",
        "Qwen/Qwen3-4B-Instruct-2507": "Qwen/Qwen3-4B",
        "gpt-oss-20b": "unsloth/gpt-oss-20b-BF16",
    }
    asked = [on_model(name, "estimate-memory") for name in like]
    for (name, known), one in zip(like.items(), client.run(*asked), strict=True):
        hint = f"did you mean {known}, whose shape is known? an estimate needs no more"
        is_one_sentence(one, 5, f"model.base: '{name}' is not on this disk, and ", hint)
    (estimated,) = client.run(on_model("google/gemma-3-4b-pt", "estimate-memory"))
    assert estimated.code == 0
    no_owner, other, unlike = client.run(
        on_model("Qwen3-8B"), on_model("unsloth/Qwen3-8B"), on_model("someone/Thing-8B", "estimate-memory")
    )
    is_one_sentence(no_owner, 5, "model.base: 'Qwen3-8B' is not on this disk, and ", "did you mean Qwen/Qwen3-8B? ")
    assert "did you mean" not in other.shown + unlike.shown


def test_each_fault_of_a_data_set_is_one_sentence(client: Client, hub: Hub) -> None:
    ended = client.run(*map(on_rows, DATA_SETS), processes=4)
    for (name, (_, parts)), one in zip(DATA_SETS.items(), ended, strict=True):
        is_one_sentence(one, 4, f"data.train[0].path: {name}: no such file, and ", *parts)
    assert len([request for request in hub.take_requests() if "f/down" in request]) == 1


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://no-such-name.invalid", "no address for no-such-name.invalid"),
        ("http://127.0.0.1:9", "127.0.0.1: connection refused"),
    ],
)
def test_no_network(client: Client, endpoint: str, reason: str) -> None:
    commands = [on_model("some/model", "estimate-memory"), on_model("some/model"), on_rows("some/rows")]
    estimate, model, rows = client.run(*commands, HF_ENDPOINT=endpoint)
    is_one_sentence(estimate, 5, f"the hub cannot be reached ({reason})", "connect once, or copy the model here")
    is_one_sentence(model, 5, f"the hub cannot be reached ({reason})")
    is_one_sentence(rows, 4, f"the hub cannot be reached ({reason})", "name a local file")


def test_offline_on_purpose(client: Client, hub: Hub) -> None:
    model, rows = client.run(on_model("good/model"), on_rows("good/rows"), HF_HUB_OFFLINE="1")
    is_one_sentence(model, 5, "HF_HUB_OFFLINE keeps the hub from being asked", "unset it once")
    is_one_sentence(rows, 4, "HF_HUB_OFFLINE keeps the hub from being asked", "unset it once")
    assert hub.take_requests() == []


def test_a_download_that_broke_off_is_never_taken_for_whole(client: Client, hub: Hub) -> None:
    """Tried again it comes whole, without what had come whole before; broken twice in one go, it is resumed."""
    cut = breaking_off("model.safetensors", after_bytes=1000, times=99)
    hub.add("models/cut/model", hub.repos["models/good/model"].commits[commit_of("one")], fault=cut)
    (broken,) = client.run(fetch("model", "cut/model"))
    is_one_sentence(broken, 5, "download broke off")
    assert list(client.cache.rglob("*.incomplete")) == []
    (offline,) = client.run(fetch("model", "cut/model"), HF_HUB_OFFLINE="1")
    is_one_sentence(offline, 5, "HF_HUB_OFFLINE keeps the hub from being asked")
    hub.repos["models/cut/model"].fault = breaking_off("model.safetensors", after_bytes=200_000, times=2)
    hub.take_requests()
    (whole,) = client.run(fetch("model", "cut/model"))
    assert whole.code == 0, whole
    fetched = [request for request in hub.take_requests() if request.startswith("GET") and "resolve" in request]
    assert [request.rsplit("/", 1)[1] for request in fetched] == ["model.safetensors"] * 3
    (weights,) = client.cache.rglob("model.safetensors")
    expected = hub.repos["models/cut/model"].commits[commit_of("one")]["model.safetensors"]
    assert hashlib.sha256(weights.read_bytes()).digest() == hashlib.sha256(expected).digest()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_long_download_can_be_stopped(client: Client, hub: Hub, number: signal.Signals) -> None:
    """The hub's library waits for its threads; what a killed one left is removed by the next."""
    hub.add("models/long/model", hub.repos["models/good/model"].commits[commit_of("one")], fault=dripping)
    process = client.start(str(PROGRAM), *on_model("long/model"))
    try:
        deadline = time.monotonic() + 60
        while not list(client.cache.rglob("*.incomplete")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, shown
    assert f"error: stopped by {number.name}" in shown and "Traceback" not in shown
    assert list(client.cache.rglob("*.incomplete")) == []
    left = client.cache / "hub" / "models--long--model" / "blobs" / "0123.4567.incomplete"
    left.write_bytes(b"left by a kill")
    fresh = left.with_name("0123.89ab.incomplete")
    fresh.write_bytes(b"another process is at it")
    os.utime(left, (time.time() - 7200,) * 2)
    hub.repos["models/long/model"].fault = None
    (whole,) = client.run(fetch("model", "long/model"))
    assert whole.code == 0 and (left.exists(), fresh.exists()) == (False, True), whole


def test_what_was_cached_works_without_the_hub(client: Client, hub: Hub) -> None:
    """All commands on a model and rows of the hub, once they were trained on: with the hub down, and offline."""
    both = ["r.yaml", "--set", "model.base=good/model", "--set", "data.train=good/rows"]
    (trained,) = client.run(["train", *both])
    assert trained.code == 0, trained
    assert json.loads((client.folder / "run" / "card.json").read_text())["base"]["commit"] == commit_of("one")
    commands = [
        ["validate", *both],
        ["estimate-memory", *both],
        ["preview", *both],
        ["train", *both, "--output", "again"],
        ["train", *both, "--resume"],
        ["merge", "run", "--output", "merged", "--no-verify"],
        ["generate", "run", "--prompt", "what does the shop sell", "--max-new-tokens", "4"],
    ]
    hub.take_requests()
    try:
        hub.repos["models/good/model"].fault = hub.repos["datasets/good/rows"].fault = status(503)
        down = client.run(*commands)
    finally:
        hub.repos["models/good/model"].fault = hub.repos["datasets/good/rows"].fault = None
    assert [one.code for one in down] == [0] * len(commands), down
    assert "the hub fails at the moment (error 503); good/model is used as it lies here (commit " in down[2].shown
    assert "good/rows is used as it lies here (commit " in down[2].shown
    asked = hub.take_requests()
    assert len([request for request in asked if "good/model" in request]) == 1, asked  # all these in one process
    assert len([request for request in asked if "good/rows" in request]) == 1, asked
    files = hub.repos["models/good/model"].commits[commit_of("one")]
    hub.add("models/good/model", files | {"chat_template.jinja": b"{{ messages }}"}, version="later")
    resumed, merged = client.run(["train", *both, "--resume"], ["merge", "run", "--output", "after", "--no-verify"])
    hub.add("models/good/model", files, version="one")
    assert (resumed.code, merged.code) == (0, 0), (resumed, merged)
    assert not [request for request in hub.take_requests() if "good/model" in request]  # a run keeps its commit
    (client.folder / "merged").rename(client.folder / "merged before")
    offline = client.run(*commands[:3], *commands[5:], HF_HUB_OFFLINE="1")
    assert [one.code for one in offline] == [0] * 5, offline
    warned = [line for one in offline for line in one.shown.splitlines() if "warning" in line]
    assert len(warned) == 1 and "is cut at 4 tokens" in warned[0], offline  # nothing of the hub
    assert hub.take_requests() == []


def test_a_pinned_revision_that_is_cached_asks_nothing(client: Client, hub: Hub) -> None:
    """And it stays what it was when the branch moves on."""
    files = hub.repos["models/good/model"].commits[commit_of("one")]
    model = hub.add("models/moving/model", files, version="old")
    rows = hub.add("datasets/moving/rows", data_files(6), version="old")
    pinned = [fetch("model", "moving/model", model), fetch("rows", "moving/rows", rows)]
    before = client.run(*pinned)
    assert [one.code for one in before] == [0, 0] and before[1].last.startswith("6 "), before
    hub.take_requests()
    new = hub.add("models/moving/model", files | {"chat_template.jinja": b"{{ messages }}"}, version="new")
    hub.add("datasets/moving/rows", data_files(7, first=50), version="new")
    cached = client.run(*pinned)
    assert hub.take_requests() == []
    assert [one.shown for one in cached] == [before[0].last + "\n", before[1].last + "\n"]
    moved = client.run(fetch("model", "moving/model"), fetch("rows", "moving/rows"))
    assert moved[0].last == new and moved[1].last.startswith("7 "), moved


def test_a_revision_that_is_not_there(client: Client, hub: Hub) -> None:
    """A tag that was removed on the hub: the copy of it that lies here is named, and never another one is taken."""
    hub.add("models/tagged/model", hub.repos["models/good/model"].commits[commit_of("one")])
    hub.add("datasets/tagged/rows", data_files(6))
    repos = hub.repos["models/tagged/model"], hub.repos["datasets/tagged/rows"]
    for repo in repos:
        repo.refs["v1"] = commit_of("one")
    tagged = fetch("model", "tagged/model", "v1"), fetch("rows", "tagged/rows", "v1")
    assert [one.code for one in client.run(*tagged)] == [0, 0]
    for repo in repos:
        del repo.refs["v1"]
    model, rows, never = client.run(*tagged, fetch("rows", "tagged/rows", "v2"))
    lies_here = f"lies here as {commit_of('one')}"
    is_one_sentence(model, 5, "has no revision 'v1' of it", "check model.revision", lies_here)
    is_one_sentence(rows, 4, "has no revision 'v1' of it", "check revision", lies_here)
    is_one_sentence(never, 4, "has no revision 'v2' of it")
    for repo in repos:
        repo.fault = status(503)
    down = client.run(*tagged, fetch("rows", "tagged/rows", "v2"), fetch("rows", "tagged/rows", "0" * 40))
    assert [one.code for one in down] == [0, 0, 4, 4], down


def test_a_model_that_moved_is_followed(client: Client, hub: Hub) -> None:
    hub.repos["models/old/name"] = Repo({}, {}, moved_to="good/model")
    hub.repos["models/circle/a"] = Repo({}, {}, moved_to="circle/b")
    hub.repos["models/circle/b"] = Repo({}, {}, moved_to="circle/a")
    circle, moved = client.run(fetch("model", "circle/a"), fetch("model", "old/name"))
    assert moved.code == 0, moved
    is_one_sentence(circle, 5, "is not the address of a hub")


@pytest.mark.parametrize("token", [SECRET, f"{SECRET}\tß"])
def test_a_token_is_never_shown(client: Client, hub: Hub, token: str) -> None:
    """Not in a message, and not in the libraries' own words that --debug shows."""
    hub.add(
        "models/token/refused", {}, fault=status(401, X_Error_Message="Invalid credentials in Authorization header")
    )
    names = ["token/refused", "f/gated", "f/silent"]
    asked = [on_model(name, "estimate-memory", *more) for name in names for more in ([], ["--debug"])]
    ended = client.run(*asked, processes=2, HF_TOKEN=token)
    for one in ended:
        assert (one.code == 5 and "HF_TOKEN" in one.last) or "gave no answer" in one.last, one
        assert SECRET not in one.shown, one
    assert "gated" in ended[2].last or token != SECRET
    assert ("Traceback" in ended[1].shown, "Traceback" in ended[0].shown) == (True, False)


def test_a_cache_of_single_files_is_no_model(client: Client, hub: Hub) -> None:
    """Others fill the same cache file by file; without the hub nobody knows what is missing, but weights are."""
    (estimate,) = client.run(on_model("good/model", "estimate-memory"))
    assert estimate.code == 0, estimate
    (model,) = client.run(fetch("model", "good/model"), HF_HUB_OFFLINE="1")
    is_one_sentence(model, 5, "HF_HUB_OFFLINE keeps the hub from being asked")
