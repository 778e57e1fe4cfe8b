"""Functions that take a recipe: it is written, checked, looked at, estimated, trained, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorafit import pipeline
from lorafit.console.python_calls import Overrides, Recipe, Rows, StrPath, call
from lorafit.studies import first_recipe

if TYPE_CHECKING:
    from lorafit.data.preview import Preview
    from lorafit.estimation import RecipeEstimate
    from lorafit.run.results import Validated
    from lorafit.run.trained import Trained
    from lorafit.studies.compared import Compared
    from lorafit.studies.first_recipe import FirstRecipe


def init(
    data: StrPath,
    *,
    output: StrPath | None = None,
    base_model: StrPath | None = None,
    task: str | None = None,
    adapter: str | None = None,
    quantization: str | None = None,
    test_file: StrPath | None = None,
    columns: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> FirstRecipe:
    """Writes a commented recipe for a file of rows. `first.path` is its file.

    Args:
        data: A file of rows to train on.
        output: The recipe to write, which must not exist; `recipe.yaml` where None.
        base_model: Folder, `.gguf` file or hub id of the base; a small one where None.
        task: What the rows teach; the first that reads them where None.
        adapter: The adapter; lora where None.
        quantization: How the frozen weights are stored; nf4 where None, none for models with an encoder.
        test_file: Rows that training never sees.
        columns: Which of the rows' columns holds a field of a format, `{ours: theirs}`, where names do not say it.
        quiet: No progress.
    """
    return call(first_recipe.init, locals())


def validate(recipe: Recipe, *, overrides: Overrides = ()) -> Validated:
    """Checks a recipe alone; files, rows and models are not opened.

    Raises:
        LorafitError: The recipe is wrong; `Problems` holds all errors where there are several.
    """
    return call(pipeline.validate, locals())


def preview(
    recipe: Recipe,
    *,
    show: int | None = 3,
    rows: Rows | None = None,
    overrides: Overrides = (),
    quiet: bool = False,
) -> Preview:
    """Rows as the model will see them, with the tokens that carry loss, and what became of all rows.

    Args:
        recipe: The recipe.
        show: How many rows to look at; all of them where None.
        rows: Training rows instead of the recipe's `data.train`.
        overrides: Values over the recipe's.
        quiet: No progress.
    """
    return call(pipeline.preview, locals())


def estimate(
    recipe: Recipe,
    *,
    gpu: str | None = None,
    fit: str | None = None,
    headroom: float | None = None,
    price_per_hour: float | None = None,
    exact: bool = False,
    overrides: Overrides = (),
    quiet: bool = False,
) -> RecipeEstimate:
    """Peak memory, time and price of a recipe, without weights and without a GPU.

    Args:
        recipe: The recipe.
        gpu: A card's size or name, or `cpu`: the estimate says whether the run fits.
        fit: A card: how large micro-batch, row and rank can be on it.
        headroom: Share of the card's memory that must stay free; 0.05 where None.
        price_per_hour: Of the card, in any currency.
        exact: Run the training step on fake tensors besides; the verdict goes by that.
        overrides: Values over the recipe's.
        quiet: No progress.
    """
    return call(pipeline.estimate, locals())


def train(
    recipe: Recipe,
    *,
    rows: Rows | None = None,
    validation_rows: Rows | None = None,
    test_rows: Rows | None = None,
    overrides: Overrides = (),
    output: StrPath | None = None,
    resume: bool = False,
    resume_from: int | None = None,
    plan_file: StrPath | None = None,
    dry_run: bool = False,
    allow_inexact: bool = False,
    quiet: bool = False,
) -> Trained:
    """Plans, checks, trains and saves a run; or goes on with one. `trained.path` is its folder.

    Args:
        recipe: The recipe.
        rows: Training rows instead of the recipe's `data.train`. They are kept in lorafit's cache by their content, so
            that a resume with the same rows is the same run.
        validation_rows: The same for `data.validation`.
        test_rows: The same for `data.test`.
        overrides: Values over the recipe's.
        output: A run folder instead of the recipe's.
        resume: Go on with the run in that folder.
        resume_from: From the checkpoint of this step; implies `resume`.
        plan_file: Another run's `plan.json`, whose resolved values are taken.
        dry_run: Stop before the weights are loaded.
        allow_inexact: Resume on another kind of device or number of processes.
        quiet: No progress.

    Raises:
        LorafitError: As the command; `exit_code` says which kind. Ctrl-C saves the last step first and raises
            `StoppedBySignal`.
    """
    return call(pipeline.train, locals())


def compare(
    recipes: Recipe | Sequence[Recipe],
    *,
    over: Mapping[str, Sequence[Any]] | Sequence[str] = (),
    output: StrPath | None = None,
    rates: int = 3,
    spread: float = 10.0,
    learning_rates: Sequence[float] | None = None,
    seeds: int = 3,
    metric: str = "loss",
    budget: str | None = None,
    resume: bool = False,
    overrides: Overrides = (),
    quiet: bool = False,
) -> Compared:
    """Trains methods with several learning rates and seeds, and says which of them can be told apart on the test rows.

    Args:
        recipes: A recipe whose values `over` varies, or several recipes of the same rows.
        over: `{"adapter": ["lora", "dora"]}`: values of a key, each a method; of several keys every combination.
        output: The comparison's folder instead of the recipe's `output` with `-comparison` behind it.
        rates: Learning rates of each method, in equal ratios around its own.
        spread: The highest of them is so many times the lowest.
        learning_rates: These for every method instead.
        seeds: Runs of each method at each learning rate; 3 at least.
        metric: What methods are ranked by on the test rows.
        budget: Most time, such as "60min"; what it does not reach is left out, and said.
        resume: Go on with the comparison in that folder.
        overrides: Values over the recipes'.
        quiet: No progress.
    """
    from lorafit.studies.compare import compare

    return call(compare, {name: value for name, value in locals().items() if name != "compare"})
