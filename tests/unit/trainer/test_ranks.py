"""Four gloo ranks, and two and eight in slow tests, train the run of one process; what befalls one, all meet."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorafit.contracts import Silent
from lorafit.errors import CheckpointError
from lorafit.facts import DeviceFacts
from lorafit.kinds.adapters import adapters
from lorafit.kinds.tasks import tasks
from lorafit.model.adapter import adapter_tensors
from lorafit.model.attach import attach_adapter
from lorafit.trainer import ranks as over_ranks
from lorafit.trainer.checkpoint import Environment, check_continuity
from lorafit.trainer.state import TrainState, read_dataclass
from tests.support.processes import ENVIRONMENT, start
from tests.support.rank_program import OF_ONE, SHORT
from tests.support.tiny_model import tiny_llama
from tests.support.tiny_run import Job

PROGRAM = Path(__file__).parents[2] / "support" / "rank_program.py"


@dataclass(frozen=True)
class Trained:
    """What so many ranks left behind."""

    root: Path
    ranks: int
    codes: list[int | None]
    errors: list[str]

    def notes(self, name: str) -> list[dict[str, Any]]:
        """How a run went, by rank."""
        return [json.loads((self.root / f"{name}.{rank}").read_text()) for rank in range(self.ranks)]


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Trained:
    """Of four ranks some have more than others and some nothing; `tests/integration/test_two_ranks.py` has two."""
    root, count = tmp_path_factory.mktemp("ranks"), request.param
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"ACCELERATE_USE_CPU": "true"}
    processes = [
        start(PROGRAM, root, cwd=root, env={**ENVIRONMENT, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Trained(root, count, [process.returncode for process in processes], errors)


@pytest.mark.parametrize("name", OF_ONE)
def test_ranks_equal_one_process(trained: Trained, job: Callable[..., Job], name: str) -> None:
    notes = trained.notes(name)
    assert [note["said"] for note in notes] == ["done"] * trained.ranks
    alone = job("one", plan=SHORT, **OF_ONE[name])
    alone.trainer().fit(TrainState())
    together, apart = Job(trained.root / name).lines(), alone.lines()
    if name == "falling":
        assert [line.get("went_back_to") for line in together if "evaluation" in line] == [None, 1, 1, None]
    together, apart = ([line for line in lines if "loss" in line] for lines in (together, apart))
    assert [line["step"] for line in together] == [1, 2, 3, 4]
    for ours, theirs in zip(together, apart, strict=True):
        for field in ("loss", "grad_norm"):
            assert ours[field] == pytest.approx(theirs[field], rel=1e-5)
        assert (ours["tokens"], ours["trained_tokens"]) == (theirs["tokens"], theirs["trained_tokens"])


def test_shares_are_unequal_and_may_be_nothing(trained: Trained) -> None:
    assert [note["shares"] for note in trained.notes("one-row")] == [[1] * 4] + [[0] * 4] * (trained.ranks - 1)
    assert len({tuple(note["shares"]) for note in trained.notes("uneven")}) > 1


def test_memory_that_runs_out_on_one_rank_halves_the_budget_of_all(trained: Trained) -> None:
    small, ran_out = Job(trained.root / "small"), Job(trained.root / "ran-out")
    for note in trained.notes("ran-out"):
        assert note["said"] == "done"
        assert note["events"] == [{"kind": "out_of_memory", "step": 1, "micro_batch_tokens": 80}]
        assert len(note["warnings"]) == 1 and "going on with 80, the step is repeated" in note["warnings"][0]
    assert ran_out.files(4) == small.files(4)  # as if it had been planned so, each rank's random numbers too


def test_memory_that_runs_out_for_good_ends_all_with_the_same_words(trained: Trained) -> None:
    said = [note["said"] for note in trained.notes("exhausted")]
    assert said[0].startswith("7 out of memory at step 1: seq length ") and set(said) == {said[0]}


def test_memory_that_runs_out_before_step_1_on_one_rank_makes_micro_batches_of_all_smaller(trained: Trained) -> None:
    whole, short, none = (
        [note["said"] for note in trained.notes(name)] for name in ("rehearsed", "short-of-memory", "no-memory")
    )
    assert {plan["micro_batch_tokens"] for plan in whole} == {320}
    assert {plan["micro_batch_tokens"] for plan in short} == {160}
    assert none[0].startswith("7 out of memory before step 1: seq length 40") and set(none) == {none[0]}


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_at_the_same_edge(trained: Trained) -> None:
    said = [note["said"] for note in trained.notes("not-finite")]
    assert all(text.startswith("9 step 2: non-finite loss (nan) ") for text in said)
    assert [rank for rank, text in enumerate(said) if "on another rank" not in text] == [1]  # which names its rows
    assert (trained.root / "not-finite" / "checkpoints" / "step-000001" / "MANIFEST").is_file()


def test_a_signal_to_one_rank_stops_all_at_the_same_edge(trained: Trained) -> None:
    for note in trained.notes("stopped"):
        assert note["said"] == "143 stopped by SIGTERM: saved step 3"
    folder = trained.root / "stopped" / "checkpoints" / "step-000003"
    state = json.loads((folder / "state.json").read_text())
    assert (folder / "MANIFEST").is_file()
    assert len(state["train"]["rng"]) == state["environment"]["ranks"] == trained.ranks


def test_a_rank_that_fails_by_itself_takes_the_others_with_it(trained: Trained) -> None:
    assert [rank for rank, code in enumerate(trained.codes) if code] == [1]
    assert "ValueError: an error of its own" in trained.errors[1]
    for rank in {*range(trained.ranks)} - {1}:
        note = json.loads((trained.root / f"gone.{rank}").read_text())
        assert note["said"].startswith("7 lost another process of the run; its own message says why")


def test_gradients_are_summed_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_ranks, "_BUCKET_BYTES", 64)
    sizes = [(4, torch.float32), (12, torch.float32), (1, torch.float32), (40, torch.float32), (2, torch.float32)]
    sizes += [(2, torch.bfloat16), (2, torch.bfloat16)]
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in sizes]
    buckets = over_ranks._in_buckets(parameters)
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[4, 12], [1], [40], [2], [2, 2]]


def test_what_an_adapter_holds_beside_what_is_trained_becomes_rank_0_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves that are held, and an A that is frozen: values that each rank has computed by itself."""
    monkeypatch.setattr(over_ranks, "broadcast", lambda tensor: torch.full_like(tensor, 7.0))
    for kind, init in (("lora", "pissa"), ("lora_fa", "kaiming")):
        section = adapters.make_section(kind, r=2, dropout=0.0, init={"kind": init})
        model = attach_adapter(tiny_llama(), section, 0)
        objective = tasks.make("causal-lm").build_objective(model)
        accelerator: Any = SimpleNamespace(device=torch.device("cpu"), process_index=1, num_processes=2)
        over_ranks.OverRanks(objective, accelerator)
        assert all((tensor == 7.0).all() for tensor in adapter_tensors(model).values())
        assert not (model.get_base_model().get_input_embeddings().weight == 7.0).all()


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
