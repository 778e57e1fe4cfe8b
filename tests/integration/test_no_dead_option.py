"""No dead option: every leaf of the schema has two values that lead to two outcomes, echoes of the recipe apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import RecipeError
from lorafit.files.rundir import RunDir
from lorafit.kinds.formats import formats
from lorafit.kinds.optimizers import optimizers
from lorafit.recipe.schema import Recipe
from lorafit.recipe.schema_tree import recipe_tree, without_references
from tests.support.option_cases import all_cases, first_loss, trained_tokens
from tests.support.option_leaves import Case, every_value, faults_of, leaves, without_a_case, without_a_leaf
from tests.support.option_world import Changes, OptionWorld, adapter_tensors, everything_of, scores_of

LEAVES = leaves(recipe_tree())
SETTLED_BY_MEASURING = {"auto"}  # becomes one of the other values
FORMATS = {"auto", *formats.names()}  # each reads rows of its own, which the tests of formats show
TRACKER_EXTRAS = ("wandb", "mlflow", "trackio")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OptionWorld]:
    """One tiny world for all cases, on one thread, without a GPU and without a network."""
    import torch

    root, threads = tmp_path_factory.mktemp("options"), torch.get_num_threads()
    environment = {"LORAFIT_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr("lorafit.estimation.measured.covers", lambda step: True)  # as memory_by_formula, for a module
        torch.set_num_threads(1)
        yield OptionWorld(root)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cases(options: OptionWorld) -> dict[str, Case]:
    return all_cases(options)


def test_every_leaf_has_a_case_and_every_case_a_leaf(cases: dict[str, Case]) -> None:
    assert without_a_case(recipe_tree(), cases) == []
    assert without_a_leaf(recipe_tree(), cases) == []


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_is_alive(cases: dict[str, Case], leaf: str) -> None:
    assert leaf in cases, f"{leaf} is in the schema, and no case shows what it does"
    assert faults_of(cases[leaf]) == []


@pytest.mark.parametrize("leaf", [leaf for leaf, node in LEAVES.items() if every_value(node) - FORMATS])
def test_every_word_that_a_leaf_may_hold_is_tried(cases: dict[str, Case], leaf: str) -> None:
    tried = [*cases[leaf].values, *cases[leaf].refused]
    words = {value["kind"] if isinstance(value, dict) else value for value in tried if not isinstance(value, list)}
    assert every_value(LEAVES[leaf]) - SETTLED_BY_MEASURING <= words


def test_an_outcome_does_not_change_by_itself(options: OptionWorld) -> None:
    """Else every option would look alive."""
    seen = []
    for _ in range(2):
        options.forget()
        seen.append([everything_of(options.train({"adapter.dropout": 0.5})), scores_of(options.evaluate({}))])
    assert seen[0] == seen[1]


def test_the_seed_decides_order_initialisation_and_dropout(options: OptionWorld) -> None:
    """One leaf with three jobs: each is looked at where the other two cannot show."""

    def both(look: Callable[[RunDir], Any], changes: Changes | None = None) -> list[Any]:
        return [look(options.train({**(changes or {}), "seed": seed})) for seed in (0, 1)]

    order = both(trained_tokens)
    assert order[0] != order[1]
    start = both(partial(adapter_tensors, step=0))
    assert start[0] != start[1]
    trained = str(options.train({}).adapter)
    whole = {"adapter.init_from": trained, "training.batch_size": 12, "training.max_steps": 1}  # one order, one start
    still = both(first_loss, whole)
    assert still[0] == pytest.approx(still[1], rel=1e-6)
    dropped = both(first_loss, {**whole, "adapter.dropout": 0.5})
    assert dropped[0] != pytest.approx(dropped[1], rel=1e-4)


def test_an_echo_is_no_outcome(options: OptionWorld) -> None:
    """A name is copied into recipe.yaml, plan.json and manifest.json; where `output` is set it does nothing else."""
    case = Case(("one", "two"), lambda name: everything_of(options.train({"name": name, "output": "run"})))
    assert faults_of(case) == ["'one' and 'two' do the same"]


def test_a_leaf_without_a_case_is_named(cases: dict[str, Case]) -> None:
    class Longer(Recipe):
        forgotten: int = 0

    assert without_a_case(without_references(Longer.model_json_schema()), cases) == ["forgotten"]


def test_a_case_without_a_leaf_is_named(cases: dict[str, Case]) -> None:
    stale = {**cases, "training.warmup": cases["training.epochs"]}
    assert without_a_leaf(recipe_tree(), stale) == ["training.warmup"]


def test_an_option_that_does_nothing_is_found(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind takes eps from its section and does not hand it on."""
    kind = optimizers.get("adamw")
    real = kind.build

    def build(self: Any, *rest: Any) -> Any:
        return real(kind(self.section.model_copy(update={"eps": 1e-8})), *rest)

    assert faults_of(cases["training.optimizer(adamw).eps"]) == []
    monkeypatch.setattr(kind, "build", build)
    assert faults_of(cases["training.optimizer(adamw).eps"]) == ["1e-08 and 0.01 do the same"]
    assert faults_of(cases["training.optimizer(adamw).betas"]) == []


def test_a_value_that_should_be_refused_and_is_not_is_found(cases: dict[str, Case]) -> None:
    case = replace(cases["data.overlength"], values=("drop",), refused=("truncate",))
    assert faults_of(case) == ["'truncate' was not refused"]


def test_an_outcome_that_changes_by_itself_proves_nothing() -> None:
    outcomes = iter(range(9))
    assert faults_of(Case(("a", "b"), lambda _: next(outcomes))) == ["the outcome changes by itself"]


@pytest.mark.parametrize("tracker", TRACKER_EXTRAS)
def test_a_tracker_that_is_not_installed_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tracker: str
) -> None:
    from lorafit.trainer import journal

    monkeypatch.setattr(journal, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=rf'pip install "lorafit\[{tracker}\]"'):
        journal.build_accelerator(use_cpu=True, tracking=[tracker], folder=tmp_path)
