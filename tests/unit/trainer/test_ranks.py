"""Two gloo ranks with unequal numbers of micro-batches train the run of one process; a signal to one stops both."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from lorafit.contracts import Silent
from lorafit.errors import CheckpointError
from lorafit.facts import DeviceFacts
from lorafit.trainer.checkpoint import Environment, check_continuity
from lorafit.trainer.state import TrainState, read_dataclass
from tests.support.processes import ENVIRONMENT, start
from tests.support.tiny_run import Job

PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from tests.support.tiny_run import Job, set_rate
from lorafit.errors import StoppedBySignal
from lorafit.trainer.state import TrainState, read_dataclass

whole = Job(Path({root!r}) / "two")
trainer = whole.trainer()
counts = [len(trainer.build_micro_batches(step, whole.budget)) for step in range(1, 9)]
say = Path({root!r}, "rank" + os.environ["RANK"])
say.write_text(str(counts))
trainer.fit(TrainState())

stopped = Job(Path({root!r}) / "stopped")
trainer = stopped.trainer()
inner = trainer.update.learning_rate_at
def lr_at(step):
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return inner(step)
set_rate(trainer, lr_at)
try:
    trainer.fit(TrainState())
except StoppedBySignal as reason:
    say.with_suffix(".stopped").write_text(str(reason.exit_code) + " " + str(reason))
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    program = root / "program.py"
    program.write_text(PROGRAM.format(here=str(Path(__file__).parents[3]), root=str(root)), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    ranks = [start(program, cwd=root, env={**ENVIRONMENT, **shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    ended = [(*rank.communicate(timeout=300), rank.returncode) for rank in ranks]
    assert [code for _, _, code in ended] == [0, 0], ended
    return root


def test_two_ranks_equal_one_process(two_ranks: Path, job: Callable[..., Job]) -> None:
    first, second = (json.loads((two_ranks / f"rank{rank}").read_text()) for rank in (0, 1))
    assert any(a != b for a, b in zip(first, second, strict=True))  # unequal, as real steps are
    alone = job("one")
    alone.trainer().fit(TrainState())
    together = Job(two_ranks / "two").lines()
    assert [line["step"] for line in together] == list(range(1, 9))
    for ours, theirs in zip(together, alone.lines(), strict=True):
        for field in ("loss", "grad_norm"):
            assert ours[field] == pytest.approx(theirs[field], rel=1e-5)
        assert (ours["tokens"], ours["trained_tokens"]) == (theirs["tokens"], theirs["trained_tokens"])


def test_a_signal_to_one_rank_stops_both_at_the_same_edge(two_ranks: Path) -> None:
    root = two_ranks
    for rank in (0, 1):
        assert "143 stopped by SIGTERM: saved step 3" in (root / f"rank{rank}.stopped").read_text()
    assert (root / "stopped" / "checkpoints" / "step-000003" / "MANIFEST").is_file()
    state = json.loads((root / "stopped" / "checkpoints" / "step-000003" / "state.json").read_text())
    assert len(state["train"]["rng"]) == 2 and state["environment"]["ranks"] == 2


def test_another_number_of_ranks_or_device_is_refused_unless_allowed() -> None:
    was, now = Environment("cpu", 2, {"torch": "1"}), Environment("cuda", 1, {"torch": "1"})
    with pytest.raises(CheckpointError, match=r"device was cpu and is cuda and ranks were 2 and are 1.*not be bitwise"):
        check_continuity(was, now, allow_inexact=False, reporter=Silent(), where="x")
    reporter = Silent()
    events = check_continuity(was, now, allow_inexact=True, reporter=reporter, where="x")
    assert len(events) == len(reporter.warnings) == 2


def test_other_versions_are_warned_about_and_recorded() -> None:
    reporter = Silent()
    was, now = (
        Environment("cpu", 1, {"torch": "2.1", "peft": "1"}),
        Environment("cpu", 1, {"torch": "2.2", "peft": "1"}),
    )
    events = check_continuity(was, now, allow_inexact=False, reporter=reporter, where="x")
    assert reporter.warnings == [
        "versions changed (torch was 2.1 and is 2.2): the rest of the run is not guaranteed bitwise the same"
    ]
    assert events == [{"kind": "inexact_resume", "what": "versions changed (torch was 2.1 and is 2.2)"}]
    assert check_continuity(now, now, allow_inexact=False, reporter=reporter, where="x") == []


def test_another_card_is_warned_about_and_recorded() -> None:
    """Kernels are chosen by the card. A checkpoint of an earlier lorafit does not say which it was, and goes on."""
    reporter = Silent()
    was, now = (
        Environment.here("cuda", 1, DeviceFacts("cuda", name, 2**34, True, capability=capability).card)
        for name, capability in (("NVIDIA L4", (8, 9)), ("NVIDIA H200", (9, 0)))
    )
    events = check_continuity(was, now, allow_inexact=False, reporter=reporter, where="x")
    said = "the card was NVIDIA L4, capability 8.9 and is NVIDIA H200, capability 9.0"
    assert reporter.warnings == [f"{said}: the rest of the run is not guaranteed bitwise the same"]
    assert events == [{"kind": "inexact_resume", "what": said}]
    older = {name: value for name, value in asdict(was).items() if name != "card"}
    for before in (read_dataclass(Environment, older, "environment"), now):
        assert check_continuity(before, now, allow_inexact=False, reporter=reporter, where="x") == []
