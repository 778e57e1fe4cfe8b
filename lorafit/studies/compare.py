"""Methods against each other, so that the result can be believed: `lorafit compare`.

recipe, --over ─> variants, learning rates ─> the runs (`lorafit.studies.running`) ─> what can be told apart
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lorafit.contracts import JsonMapping, JsonObject, Reporter, Silent
from lorafit.errors import RecipeError, UsageError
from lorafit.files.rundir import RunDir
from lorafit.kinds.metrics import applies, metrics
from lorafit.kinds.tasks import tasks
from lorafit.run.output_folder import check_output, claimed
from lorafit.run.workspace import inputs_of
from lorafit.studies.compared import Compared
from lorafit.studies.running import Comparison
from lorafit.studies.study import Study
from lorafit.studies.variants import Variant, rates_of_variant, read_variants

LEAST_SEEDS = 3
_LARGEST_RATE = 10.0
_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(s|sec|m|min|h)")


def compare(
    recipes: Sequence[Path | JsonMapping],
    *,
    over: Sequence[str] = (),
    overrides: Sequence[str] = (),
    output: Path | None = None,
    rates: int = 3,
    spread: float = 10.0,
    learning_rates: str | Sequence[float] | None = None,
    seeds: int = LEAST_SEEDS,
    metric: str = "loss",
    budget: str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Compared:
    """Trains every variant with every learning rate and seed, and says which can be told apart on the test rows.

    What the arguments mean stands at `lorafit.api.compare`; `learning_rates` may also be a text with commas.

    Raises:
        UsageError: There is nothing to compare, or the output is in the way.
        CheckpointError: The output holds another comparison.
        LorafitError: What every single variant failed of.
    """
    budget_seconds, given = _read_budget(budget), _read_rates(learning_rates)
    variants, keys = read_variants(recipes, over, overrides)
    first = next(variant.loaded for variant in variants if variant.loaded is not None)
    rates_of = _rates_of(variants, keys, given, rates, spread)
    _check_rows(variants, metric, rates=max(map(len, rates_of.values())))
    folder = Path(output) if output is not None else first.output.with_name(f"{first.output.name}-comparison")
    check_output(folder, inputs_of(first))
    own_seeds = [first.recipe.seed + number for number in range(seeds)]
    definition: JsonObject = {"metric": metric, "seeds": own_seeds, "rates": rates_of}
    definition["variants"] = {variant.name: variant.values() for variant in variants if not variant.refused}
    with claimed(RunDir(folder)):
        study = Study.open(folder, definition, resume=resume)
        comparison = Comparison(variants, rates_of, own_seeds, metric, study, reporter or Silent(), budget_seconds)
        return comparison.run()


def _rates_of(
    variants: Sequence[Variant], keys: Sequence[str], given: Sequence[float], rates: int, spread: float
) -> dict[str, list[float]]:
    """The learning rates of each variant; the recipe's alone where they are what is compared."""
    if "training.learning_rate" in keys or "training" in keys:
        given, rates = (), 1
    usable = (variant for variant in variants if not variant.refused)
    return {variant.name: rates_of_variant(variant, given, rates, spread) for variant in usable}


def _read_rates(given: str | Sequence[float] | None) -> list[float]:
    """Learning rates as a flag or a program names them.

    Raises:
        UsageError: One is no number, or none that a recipe could have.
    """
    listed = given.split(",") if isinstance(given, str) else list(given or ())
    try:
        found = [float(each) for each in listed]
    except (TypeError, ValueError):
        found = [0.0]
    if not all(0 < rate <= _LARGEST_RATE for rate in found):
        what = f"'{given}' is no list of learning rates" if isinstance(given, str) else "one is no learning rate"
        raise UsageError(what, key="--learning-rates", todo="write numbers above 0, e.g. 1e-4,3e-4")
    return found


def _read_budget(text: str | None) -> float | None:
    """Seconds of a time such as `90s`, `60min` or `1.5h`. Raises UsageError where it is none."""
    if text is None:
        return None
    found = _TIME.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise UsageError(f"'{text}' is no time", key="--budget", todo="write e.g. 90s, 60min or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2][0]]


def _check_rows(variants: Sequence[Variant], metric: str, *, rates: int) -> None:
    """Refuses a comparison whose recipes lack the rows that it needs, or have no such metric.

    Raises:
        RecipeError: There are no test rows; or several learning rates, and no validation rows to choose by.
        UsageError: The metric is none of the task's.
    """
    loaded = next(variant.loaded for variant in variants if variant.loaded is not None)
    recipe = loaded.recipe
    task = tasks.bind(recipe.task)
    if metric not in metrics.names() or not applies(metric, task.scores, writes_answers=task.writes_answers):
        known = [name for name in metrics.names() if applies(name, task.scores, writes_answers=task.writes_answers)]
        what = f"'{metric}' is no metric of the task {task.section.kind}"
        raise UsageError(what, key="--metric", todo=f"use {', '.join(known)}")
    for key, rows, why in (
        ("data.test", recipe.data.test, "methods are compared on rows that chose nothing"),
        ("data.validation", recipe.data.validation if rates > 1 else True, "learning rates are chosen on them"),
    ):
        if rows is None:
            raise RecipeError(f"is not set, and {why}", key=key, todo=f"set {key}").named_at(key, *loaded.place(key))
