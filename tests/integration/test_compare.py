"""`lorafit compare` over real trainings: stopped, resumed; a hundredfold learning rate is told apart."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from tests.support.tiny_recipe import make_recipe, make_rows, write_rows
from tests.support.world import World, say_all


@pytest.mark.usefixtures("memory_by_formula")
def test_a_hundredfold_rate_loses_and_a_stop_on_the_way_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.evaluation import runner
    from lorafit.trainer.step import Update

    (world.root / "base").symlink_to(world.base)
    recipe = str(make_recipe(world.root, evaluation={"final": ["perplexity"]}, training={"max_steps": 6}))
    write_rows(world.root / "test.jsonl", make_rows(12, first=200))
    real, updates, scored = Update.apply, list[int](), list[int]()
    real_pair, real_scores, sides = runner.evaluate_pair, runner.score_examples, list[str]()

    def apply(self: Update, *arguments: Any, **options: Any) -> Any:
        updates.append(1)
        if len(updates) == 9:  # in the second run
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *arguments, **options)

    def evaluate_pair(*arguments: Any, **options: Any) -> Any:
        assert options["about"].split == "test"
        scored.append(len(updates))
        return real_pair(*arguments, **options)

    def score_examples(*arguments: Any, what: str = "", **options: Any) -> Any:
        sides.append(what)
        return real_scores(*arguments, what=what, **options)

    monkeypatch.setattr(Update, "apply", apply)
    monkeypatch.setattr(runner, "score_examples", score_examples)
    monkeypatch.setattr(runner, "evaluate_pair", evaluate_pair)
    command = ("compare", recipe, "--over", "training.learning_rate=0.03,3.0")
    say_all(world.run(*command), 130, "stopped by sigint", "--resume")
    study = json.loads((world.root / "run-comparison" / "study.json").read_text(encoding="utf-8"))
    assert len(study["runs"]) == 1
    done = world.run(*command, "--resume", "--json")
    say_all(done, 0, "run 2 of 6")
    assert len(updates) == 6 * 6  # six runs of six steps, each of them once
    assert scored == [len(updates)] * 6  # each once, behind all of the training
    assert (sides.count("scoring, base model"), sides.count("scoring, tuned model")) == (1, 6)
    kept = [json.loads(file.read_text()) for file in (world.root / "run-comparison" / "scores").iterdir()]
    bases = [{name: held["base"] for name, held in each["metrics"].items()} for each in kept]
    assert bases == [bases[0]] * 6 and all(each["metrics"]["loss"]["tuned"] != bases[0]["loss"] for each in kept)
    assert done.json["best"] == "learning_rate=0.03"
    assert done.json["worse"] == ["learning_rate=3.0"]
    methods = {line["method"]: line for line in done.json["methods"]}
    base = methods.pop("base")["metrics"]["loss"]
    assert base["verdict"] == "worse"
    for line in methods.values():
        assert line["rate"] == line["rates"][0]
        assert len(line["metrics"]["loss"]["by_seed"]) == 3
        assert line["trainable_parameters"] > 0 < line["adapter_bytes"]
    files = {path.name for path in (world.root / "run-comparison").iterdir()}
    assert {"comparison.json", "report.md", "quality.svg", "study.json"} <= files
    say_all(world.run(*command, "--resume"), 0, "worse: learning_rate=3.0", "report: run-comparison/report.md")
    assert len(scored) == 6
