"""The log, the optimizer's files, the training state and the trackers by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.contracts import Silent
from lorafit.errors import CheckpointError, RecipeError
from lorafit.kinds.optimizers import optimizers, rate_groups
from lorafit.trainer import journal
from lorafit.trainer.journal import Journal, MetricsLog, Trackers, build_accelerator
from lorafit.trainer.state import Best, TrainState, load_optimizer, save_optimizer

CPU = torch.device("cpu")


def test_the_log_goes_back_to_an_edge(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, Silent())
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.1})
        log.write({"step": step, "evaluation": {"loss": 0.2}})
    with path.open("a") as file:
        file.write('not json\n{"step": 4, "loss')
    log.rewind(step=3, evaluated_step=2)  # stopped while the evaluation of step 3 was running
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], "evaluation" in line) for line in kept] == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    log.write({"step": 4})
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 4}
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"loss": float("nan")})


def test_only_one_rank_writes(tmp_path: Path) -> None:
    assert list(tmp_path.iterdir()) == []


FACTORS = {"a": 1.0, "b": 16.0, "c": 1.0}


def build(name: str, parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Over two groups where there are the three parameters."""
    return optimizers.make(name).build(rate_groups(parameters.items(), FACTORS.__getitem__), 1e-2, CPU)


def stepped(name: str, parameters: dict[str, torch.nn.Parameter], steps: int) -> torch.optim.Optimizer:
    optimizer = build(name, parameters)
    run(optimizer, parameters, steps, seed=0)
    return optimizer


def run(optimizer: Any, parameters: dict[str, torch.nn.Parameter], steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    """One large enough for 8-bit state, one that stays fp32, one bf16 where asked."""
    torch.manual_seed(1)
    return {
        "a": torch.nn.Parameter(torch.randn(128, 64)),
        "b": torch.nn.Parameter(torch.randn(128, 64)),
        "c": torch.nn.Parameter(torch.randn(8, 4).to(dtype)),
    }


@pytest.mark.parametrize("name", optimizers.names())
def test_optimizer_state_goes_round_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = parameters()
    optimizer = stepped(name, whole, 3)
    save_optimizer(tmp_path, optimizer, whole)
    again = {key: torch.nn.Parameter(value.detach().clone()) for key, value in whole.items()}
    resumed = build(name, again)
    load_optimizer(tmp_path, resumed, again)
    assert len(resumed.param_groups) == 2
    for key in whole:
        before, after = optimizer.state[whole[key]], resumed.state[again[key]]
        assert list(before) == list(after)
        for field, value in before.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == after[field].dtype and torch.equal(value, after[field])
            else:
                assert value == after[field] and type(value) is type(after[field])
    run(optimizer, whole, 2, seed=9)
    run(resumed, again, 2, seed=9)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert not [file for file in tmp_path.iterdir() if file.suffix not in (".json", ".safetensors")]


def test_fp32_moments_of_a_bf16_parameter_stay_fp32(tmp_path: Path) -> None:
    """What `Optimizer.load_state_dict` would cast."""
    some = {"c": torch.nn.Parameter(torch.randn(8, 4))}
    optimizer = stepped("adamw", some, 2)
    save_optimizer(tmp_path, optimizer, some)
    again = {"c": torch.nn.Parameter(torch.randn(8, 4).to(torch.bfloat16))}
    resumed = torch.optim.AdamW(again.values())
    load_optimizer(tmp_path, resumed, again)
    assert resumed.state[again["c"]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("fused", [True, None])
def test_the_step_counter_of_a_fused_optimizer_lies_on_the_device(fused: bool | None, tmp_path: Path) -> None:
    """As torch's kernel wants it; the device here is one without values."""
    some = {"a": torch.nn.Parameter(torch.randn(8, 4))}
    save_optimizer(tmp_path, stepped("adamw", some, 2), some)
    again = {"a": torch.nn.Parameter(torch.empty(8, 4, device="meta"))}
    resumed = torch.optim.AdamW(again.values())
    resumed.param_groups[0]["fused"] = fused
    load_optimizer(tmp_path, resumed, again)
    state = resumed.state[again["a"]]
    assert state["exp_avg"].is_meta and state["step"].is_meta is bool(fused)


def test_shared_maps_are_stored_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    some = parameters()
    save_optimizer(tmp_path, stepped("adamw_8bit", some, 1), some)
    with safe_open(tmp_path / "optimizer.safetensors", "pt") as file:
        names = list(file.keys())
    assert sum("qmap" in name for name in names) == 2 and "a/state1" in names and "b/state1" in names


def test_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    some = parameters()
    save_optimizer(tmp_path, stepped("adamw", some, 1), some)
    other = {"a": some["a"], "b": some["b"], "d": some["c"]}
    with pytest.raises(CheckpointError, match="2 differ, first c"):
        load_optimizer(tmp_path, torch.optim.AdamW(other.values()), other)


def test_bnb_state_of_another_width_is_refused(tmp_path: Path) -> None:
    some = parameters()
    save_optimizer(tmp_path, stepped("adamw_8bit", some, 1), some)
    with pytest.raises(CheckpointError, match="optimizer state has"):
        load_optimizer(tmp_path, optimizers.make("adamw_bnb_32bit").build(some.values(), 1e-2, CPU), some)


def test_state_goes_through_json() -> None:
    state = TrainState(step=3, epoch=1.5, best=Best(2, "loss", 0.5), events=[{"kind": "x"}], scaler={"scale": 2.0})
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
    with pytest.raises(ValueError, match="is missing or unknown"):
        TrainState.from_json({"step": 1})


@pytest.mark.parametrize(("values", "lower", "best"), [([3, 2, 4], True, 2), ([0.1, 0.5, 0.4], False, 0.5)])
def test_best_goes_either_way(values: list[float], lower: bool, best: float) -> None:
    state = TrainState()
    judged = []
    for step, value in enumerate(values, start=1):
        state.step = step
        judged.append(state.judge(value, "m", lower_is_better=lower))
    assert judged == [True, True, False] and state.best == Best(2, "m", best)
    assert state.evaluations_without_improvement == 1


def test_a_tracker_that_is_missing_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r'tracking: wandb is not installed; .*pip install "lorafit\[wandb\]"'):
        build_accelerator(use_cpu=True, tracking=["wandb"], folder=tmp_path)


def read_board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by name as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}


def write_board(folder: Path, steps: range, behind: int) -> None:
    reporter = Silent()
    trackers = Trackers(build_accelerator(use_cpu=True, tracking=["tensorboard"], folder=folder), reporter)
    trackers.start("project", {"seed": 0, "model": {"base": "x", "revision": None}}, step=behind)
    for step in steps:
        line = {
            "step": step,
            "epoch": 1,
            "loss": 2.5 + behind,
            "learning_rate": 0.5,
            "grad_norm": None if step == 2 else 1.0,
        }
        trackers.log({**line, "tokens": 300, "trained_tokens": 100, "seconds": 1.5})
        trackers.log({"step": step, "evaluation": {"loss": 2.25 + behind, "token_accuracy": 0.5}})
    trackers.finish()
    assert reporter.warnings == []


def test_tensorboard_gets_steps_and_evaluations_by_the_names_people_know(tmp_path: Path) -> None:
    write_board(tmp_path, range(1, 4), 0)
    found = read_board(tmp_path)
    assert found["train/loss"] == [(1, 2.5), (2, 2.5), (3, 2.5)]
    assert found["train/global_step"] == [(1, 1), (2, 2), (3, 3)]
    assert found["train/grad_norm"] == [(1, 1), (3, 1)]  # an overflow has none
    assert found["train/tokens_per_second"] == [(step, 200) for step in (1, 2, 3)]
    assert all(2**26 < value < 2**40 for _, value in found["train/peak_memory_bytes"])
    assert found["eval/loss"] == [(1, 2.25), (2, 2.25), (3, 2.25)]
    assert {"train/learning_rate", "train/epoch", "eval/token_accuracy"} <= set(found)
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.name != "tensorboard"]


def test_a_resumed_run_goes_on_in_the_same_board_without_doubled_steps(tmp_path: Path) -> None:
    """The run was killed behind step 5 and goes on behind step 3, whose checkpoint is the last."""
    write_board(tmp_path, range(1, 6), 0)
    write_board(tmp_path, range(4, 7), 3)
    found = read_board(tmp_path)
    assert found["train/loss"] == [(1, 2.5), (2, 2.5), (3, 2.5), (4, 5.5), (5, 5.5), (6, 5.5)]
    assert [step for step, _ in found["eval/loss"]] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_fails_is_said_once() -> None:
    class Broken:
        device = CPU

        def log(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionError("no network")

    reporter = Silent()
    trackers = Trackers(Broken(), reporter)
    trackers.log({"step": 1, "loss": 1.0})
    trackers.log({"step": 2, "loss": 1.0})
    assert reporter.warnings == ["a tracker failed (ConnectionError: no network); training goes on without it"]


def test_progress_shows_speed_memory_and_estimate() -> None:
    shown: list[dict[str, Any]] = []
    said: list[str] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *exc: object) -> None: ...

        def advance(self, amount: int = 1, **values: Any) -> None:
            shown.append(values)

    class Listener(Silent):
        def track(self, total: int, what: str, done: int = 0) -> Any:
            assert (total, what, done) == (33, "training", 17)
            return Bar()

        def info(self, message: str) -> None:
            said.append(message)

    line = {"loss": 1.5, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens": 100, "seconds": 0.5}
    journal = Journal(Listener(), MetricsLog(Path("metrics.jsonl"), Silent()), estimate_bytes=2**31)
    with journal.tracking(steps=33, done=17, device=CPU):
        journal.show(line)
        journal.show({**line, "grad_norm": None})
    assert shown[0]["loss"] == 1.5 and shown[0]["tok/s"] == "200" and shown[0]["GiB"].endswith(" of est. 2.00")
    assert shown[1]["grad"] == "overflow"
    assert said == ["resumed at step 17"]
