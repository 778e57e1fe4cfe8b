"""What `compare` runs, in which order, what it writes down and looks at: with a training made of arithmetic."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorafit.errors import CheckpointError, ModelError, NumericsError, RecipeError, StoppedBySignal, UsageError
from lorafit.evaluation.rows import Row
from lorafit.files.rundir import RunDir
from lorafit.kinds.metrics import RowScore
from lorafit.studies import running
from lorafit.studies.compare import compare
from lorafit.studies.compared import Compared
from lorafit.studies.study import Record, plan_budget, seconds_left
from tests.support.tiny_data import Listener
from tests.support.tiny_recipe import make_recipe

ROWS = 30


@dataclass
class Pretended:
    """A pipeline whose runs are arithmetic: loss on validation rows is smallest at a learning rate of 0.02.

    Attributes:
        trained: Runs by the end of their folder, in order.
        tested: The same of those that test rows were scored by.
        raises: Asked with the number of the training and its run, before it does anything.
        on_test: Added to the loss of a test row, by method and rate.
    """

    trained: list[str] = field(default_factory=list)
    tested: list[str] = field(default_factory=list)
    raises: Callable[[int, str], Exception | None] = lambda number, run: None
    on_test: Callable[[str, float], float] = lambda kind, rate: 0.0
    data: str = "rows"
    plans: list[Path | None] = field(default_factory=list)

    def train(self, recipe: Any, *, overrides: Any, output: Path, plan_file: Path | None, **_: Any) -> Any:
        run, name = RunDir(output), "/".join(output.parts[-3:])
        kind, rate, seed = name.split("/")[0], float(name.split("/")[1][3:]), int(name[-1])
        assert {f"seed={seed}", f"training.learning_rate={rate!r}", "evaluation.every_steps=1000000"} <= {*overrides}
        self.trained.append(name)
        self.plans.append(plan_file)
        if (error := self.raises(len(self.trained), name)) is not None:
            raise error
        run.adapter.mkdir(parents=True, exist_ok=True)
        run.checkpoints.mkdir(exist_ok=True)
        (run.adapter / "adapter_model.safetensors").write_bytes(b"x" * 100)
        value = 2.0 + (np.log(rate / 0.02)) ** 2 + 0.01 * seed
        result = {"best": {"metric": "loss", "value": value, "step": 4}, "steps": 4, "seconds": 1.5}
        result["peak_memory_bytes"] = 100 << 20
        run.result.write_text(json.dumps(result), encoding="utf-8")
        run.plan.write_text(json.dumps({"format": 1}), encoding="utf-8")
        run.manifest.write_text(json.dumps({"format": 1, "data": self.data}), encoding="utf-8")
        pretended = {"kind": kind, "rate": rate, "seed": seed}
        (output / "pretended.json").write_text(json.dumps(pretended), encoding="utf-8")
        return SimpleNamespace(plan=SimpleNamespace(trainable_parameters=10))

    def evaluate(self, folder: Path, *, split: str, **_: Any) -> Any:
        assert split == "test"
        self.tested.append("/".join(folder.parts[-3:]))
        study = json.loads((folder.parents[2] / "study.json").read_text(encoding="utf-8"))
        assert study["chosen"]  # written down before
        was = json.loads((folder / "pretended.json").read_text(encoding="utf-8"))
        random = np.random.default_rng(was["seed"])
        noise = random.normal(0, 0.01) + random.normal(0, 0.05, ROWS)
        rows = []
        for number in range(ROWS):
            loss = 2 + number / ROWS + noise[number] + self.on_test(was["kind"], was["rate"])
            tuned = RowScore({"loss": (loss * 5,), "weight": (5.0,), "tokens": (5.0,)})
            base = RowScore({"loss": (25.0,), "weight": (5.0,), "tokens": (5.0,)})
            rows.append(Row("test.jsonl", number + 1, base=base, tuned=tuned))
        return SimpleNamespace(evaluation=SimpleNamespace(rows=rows, signatures={"perplexity": ""}))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    from lorafit.studies import compared
    from lorafit.studies import running as module

    made = Pretended()
    monkeypatch.setattr(compared, "stand", partial(compared.stand, resamples=50))
    monkeypatch.setattr(module.gc, "collect", lambda: 0)  # slow beside all that other tests have loaded
    monkeypatch.setattr(module.pipeline, "train", made.train)
    monkeypatch.setattr(module.pipeline, "evaluate", made.evaluate)
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path)


OVER = ["adapter=lora,dora,prompt_tuning"]


def ask(recipe: Path, **options: Any) -> Compared:
    return compare([recipe], **{"over": OVER, **options})


def table(folder: Path) -> str:
    return (folder / "report.md").read_text(encoding="utf-8")


def test_each_method_gets_the_same_rates_and_seeds_and_the_validation_rows_choose(
    recipe: Path, pretended: Pretended
) -> None:
    pretended.on_test = lambda kind, rate: abs(float(np.log(rate / 0.001)))  # test rows would choose the lowest
    result = ask(recipe, learning_rates="0.001,0.02,0.5")
    assert len(pretended.trained) == len(set(pretended.trained)) == 3 * 3 * 3
    methods = [line for line in result.lines if line.method != "base"]
    assert [line.rate for line in methods] == [0.02] * 3
    assert {line.rates for line in methods} == {(0.001, 0.02, 0.5)}
    assert [line.edge for line in methods] == ["", "", ""]


def test_test_rows_are_scored_once_by_the_runs_of_the_chosen_rates_alone(recipe: Path, pretended: Pretended) -> None:
    ask(recipe, learning_rates="0.001,0.02")
    expected = [f"{kind}/lr-0.02/seed-{seed}" for kind in ("lora", "dora", "prompt_tuning") for seed in range(3)]
    assert pretended.tested == expected
    ask(recipe, learning_rates="0.001,0.02", resume=True)
    assert pretended.tested == expected
    assert len(pretended.trained) == 18


def test_the_first_seed_of_every_method_comes_first_and_its_plan_is_that_of_all(
    recipe: Path, pretended: Pretended
) -> None:
    ask(recipe, rates=1)
    assert [name.split("/")[0] for name in pretended.trained[:3]] == ["lora", "dora", "prompt_tuning"]
    plan = recipe.parent / "run-comparison" / "plans" / "lora.json"
    assert pretended.plans == [None, *[plan] * 8]


@pytest.mark.parametrize("at", [1, 4, 11])
def test_what_is_stopped_and_resumed_gives_the_same_table_and_runs_nothing_twice(
    recipe: Path, pretended: Pretended, at: int
) -> None:
    ask(recipe, rates=2, output=recipe.parent / "whole")
    whole = list(pretended.trained)
    pretended.trained.clear()
    stop = StoppedBySignal("stopped by SIGINT", signal_number=signal.SIGINT)
    pretended.raises = lambda number, run: stop if number == at else None
    other = recipe.parent / "stopped"
    with pytest.raises(StoppedBySignal, match="--resume"):
        ask(recipe, rates=2, output=other)
    pretended.raises = lambda number, run: None
    ask(recipe, rates=2, output=other, resume=True)
    assert len(pretended.trained) == len(whole) + 1  # the one that was stopped
    assert set(pretended.trained) == set(whole)
    assert table(other) == table(recipe.parent / "whole")


def test_what_is_left_is_steps_and_what_later_runs_take_besides() -> None:
    """The first run of a method has its memory measured, for half a minute; no other has."""
    runs: list[Any] = [SimpleNamespace(variant=SimpleNamespace(folder=folder)) for folder in ("dora", "dora", "oft")]
    done = {"lora/a": Record(seconds=10, wall_seconds=25), "dora/a": Record(seconds=30, wall_seconds=75)}
    assert seconds_left({}, runs) == 0 and seconds_left(done, runs) == 30 + 30 + 20 + 3 * 15
    done |= {"dora/b": Record(seconds=30, wall_seconds=38), "oft/a": Record(failed="NaN", wall_seconds=3)}
    assert seconds_left(done, runs) == pytest.approx(30 + 30 + 70 / 3 + 3 * 8)


def test_a_stop_between_test_rows_scores_none_of_them_twice(recipe: Path, pretended: Pretended) -> None:
    real, calls = pretended.evaluate, list[int]()

    def stopping(folder: Path, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise StoppedBySignal("stopped by SIGTERM", signal_number=signal.SIGTERM)
        return real(folder, **options)

    from lorafit.studies import running as module

    module.pipeline.evaluate = stopping  # put back by the fixture
    with pytest.raises(StoppedBySignal):
        ask(recipe, rates=1)
    ask(recipe, rates=1, resume=True)
    assert len(pretended.tested) == len(set(pretended.tested)) == 9


def test_a_ctrl_c_anywhere_says_how_to_go_on(recipe: Path, pretended: Pretended) -> None:
    from lorafit.studies import running as module

    def interrupted(folder: Path, **options: Any) -> Any:
        raise KeyboardInterrupt

    module.pipeline.evaluate = interrupted  # put back by the fixture
    with pytest.raises(StoppedBySignal, match="--resume") as raised:
        ask(recipe, rates=1)
    assert raised.value.exit_code == 130


def test_a_folder_that_holds_a_comparison_is_gone_on_with_only_where_asked_and_only_with_the_same(
    recipe: Path, pretended: Pretended
) -> None:
    ask(recipe, rates=1)
    with pytest.raises(UsageError, match="holds a comparison already"):
        ask(recipe, rates=1)
    for change, said in (
        (
            {"rates": 2},
            "--learning-rates of lora: [0.01] was changed to [0.00316, 0.0316], and --learning-rates of dora",
        ),
        ({"seeds": 4}, "--seeds: [0, 1, 2] was changed to [0, 1, 2, 3]"),
        ({"metric": "perplexity"}, "--metric: loss was changed to perplexity"),
        ({"over": ["adapter=lora,dora"]}, "--over"),
        ({"overrides": ["training.batch_size=2"]}, "training.batch_size of lora: 4 was changed to 2"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"would not be the same comparison: {said}")):
            ask(recipe, **{"rates": 1, "resume": True, **change})
    with pytest.raises(CheckpointError, match=r"--over: it was [^{]*lora.* and is [^{]*lora, [^{]*dora now; change"):
        ask(recipe, rates=1, resume=True, over=["adapter=lora,dora"])
    assert len(pretended.trained) == 9


def test_a_run_says_what_it_does_and_what_is_left_behind_it(
    recipe: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading and rehearsing were silent for a minute and more."""
    shown = list[dict[str, Any]]()

    class Telling(Listener):
        def advance(self, amount: int = 1, **fields: Any) -> None:
            shown.append(fields)

    def train(*arguments: Any, reporter: Any, **options: Any) -> Any:
        for message in ("loading base (nf4)", "rehearsing: proofs", "micro-batches of 512 tokens"):
            reporter.info(message)
        with reporter.track(2, "training") as bar:
            bar.advance(1, loss=1.0)
        return pretended.train(*arguments, **options)

    listener = Telling()
    monkeypatch.setattr(running.pipeline, "train", train)
    monkeypatch.setattr(running, "seconds_left", lambda done, runs: 60.0 * len(runs))
    ask(recipe, rates=1, over=["adapter=lora,dora"], reporter=listener)
    assert listener.infos.count("  loading base (nf4)") == listener.infos.count("  rehearsing: proofs") == 6
    assert not any("micro-batches" in message for message in listener.infos)
    later = [fields.get("later_runs") for fields in shown]
    assert later == [None, None, "3:00", "2:00", "1:00", None] and all(fields["loss"] == 1.0 for fields in shown)


def test_a_folder_of_somebody_elses_is_left_alone(recipe: Path, pretended: Pretended) -> None:
    theirs = recipe.parent / "mine"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="holds no comparison"):
        ask(recipe, output=theirs)
    assert [entry.name for entry in theirs.iterdir()] == ["notes.txt"]


def test_a_method_that_fails_is_a_line_with_its_reason_and_the_others_go_on(recipe: Path, pretended: Pretended) -> None:
    pretended.raises = lambda number, run: ModelError("has no such layers") if run.startswith("dora") else None
    result = ask(recipe, rates=2)
    (line,) = [line for line in result.lines if line.left_out]
    assert (line.method, line.left_out) == ("dora", "has no such layers")
    assert len([name for name in pretended.trained if name.startswith("dora")]) == 1
    assert "dora is left out: has no such layers" in str(result)
    assert len(result.standings["loss"]) == 3  # two methods and the base


def test_an_error_of_a_library_leaves_its_method_out_too(recipe: Path, pretended: Pretended) -> None:
    pretended.raises = lambda number, run: ValueError("odd shapes") if run.startswith("dora") else None
    result = ask(recipe, rates=1)
    (why,) = [line.left_out for line in result.lines if line.left_out]
    assert "ValueError: odd shapes" in why
    assert "Traceback" in Path(why.rsplit(" ", 1)[1]).read_text(encoding="utf-8")


def test_a_rate_at_which_numbers_fail_is_not_chosen(recipe: Path, pretended: Pretended) -> None:
    pretended.raises = lambda number, run: NumericsError("loss is not finite") if "lr-0.02" in run else None
    result = ask(recipe, learning_rates="0.001,0.02")
    assert {line.rate for line in result.lines if line.method != "base"} == {0.001}
    assert result.lines[0].validation["0.02"] is None
    assert "failed" in table(result.folder)


def test_where_no_method_can_be_run_the_reason_is_the_error(recipe: Path, pretended: Pretended) -> None:
    pretended.raises = lambda number, run: ModelError("there is no such base")
    with pytest.raises(UsageError, match=r"no method could be run .*there is no such base"):
        ask(recipe)


def test_rows_that_change_between_two_calls_are_found(recipe: Path, pretended: Pretended) -> None:
    def stop(number: int, run: str) -> Exception | None:
        return StoppedBySignal("stopped", signal_number=15) if number == 5 else None

    pretended.raises = stop
    with pytest.raises(StoppedBySignal):
        ask(recipe)
    pretended.data = "other rows"
    with pytest.raises(UsageError, match="its rows are not those of"):
        ask(recipe, resume=True)


def test_a_rate_at_the_edge_is_told(recipe: Path, pretended: Pretended) -> None:
    result = ask(recipe, learning_rates="0.001,0.002")
    assert {line.edge for line in result.lines if line.method != "base"} == {"highest"}
    assert "lora: the highest learning rate was the best, so that a higher one may be better" in result.sentences


def test_what_is_needed_to_choose_and_to_compare_is_asked_for_first(recipe: Path, pretended: Pretended) -> None:
    with pytest.raises(RecipeError, match=r"data\.test: is not set"):
        ask(recipe, overrides=["data.test=null"])
    with pytest.raises(RecipeError, match=r"data\.validation: is not set"):
        ask(recipe, overrides=["data.validation=null"])
    with pytest.raises(UsageError, match="'accuracy' is no metric of the task causal-lm"):
        ask(recipe, metric="accuracy")
    for budget in ("an hour", "0min", "60"):
        with pytest.raises(UsageError, match="is no time"):
            ask(recipe, budget=budget)
    with pytest.raises(UsageError, match="no list of learning rates"):
        ask(recipe, learning_rates="1e-4;2e-4")
    assert pretended.trained == []
    assert not (recipe.parent / "run-comparison").exists()


def test_adapters_of_other_rates_and_checkpoints_do_not_stay(recipe: Path, pretended: Pretended) -> None:
    folder = ask(recipe, learning_rates="0.001,0.02").folder
    assert not list(folder.rglob("checkpoints"))
    assert len(list(folder.rglob("adapter_model.safetensors"))) == 9


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1000, (False, 4)),  # 4 of 10 s; all of it: 10 * (3 * 3 + 3) * 4 = 480
        (480, (False, 4)),
        (479, (True, 4)),  # rates on the first seed: 40 + 40 * (3 + 2 * 3 - 2) = 320
        (320, (True, 4)),
        (319, (True, 3)),
        (100, (True, 0)),
    ],
)
def test_a_budget_first_saves_runs_of_rates_then_methods(budget: float, expected: tuple[bool, int]) -> None:
    assert plan_budget([10.0] * 4, 40.0, budget, rates=3, seeds=3) == expected


def test_what_a_budget_leaves_out_is_said_before_it_is_left_out(
    recipe: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.studies import running as module

    ticks = iter(range(0, 10**6, 30))  # a run takes 30 s
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    listener = Listener()
    result = ask(recipe, budget="10min", reporter=listener)  # 90 s are spent; 7 more runs of each of two methods: 510 s
    assert any("tried with the first seed alone" in text for text in listener.warnings)
    assert "prompt_tuning is left out: the budget of 10:00 does not reach it" in listener.warnings
    assert len(pretended.trained) == 3 + 2 * 4
    assert result.searches_once
    assert "learning rates were chosen on the first seed alone, as the budget wanted" in result.sentences
    assert [line.left_out for line in result.lines if line.left_out] == ["the budget of 10:00 does not reach it"]


def test_a_budget_that_an_error_advises_is_enough(
    recipe: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.studies import running as module

    ticks = iter(range(0, 10**6, 30))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    with pytest.raises(UsageError, match="two methods alone take about 8:30") as error:
        ask(recipe, budget="5min")
    found = re.search(r"--resume --budget (\w+),", str(error.value))
    assert found is not None
    result = ask(recipe, budget=found[1], resume=True)
    assert [line.method for line in result.lines if not line.left_out] == ["lora", "dora", "base"]
