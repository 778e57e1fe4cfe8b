"""Python API: every command of lorafit as a function for scripts and notebooks.

    run = lorafit.train("recipe.yaml")                        a recipe's file, or its values as a dict
    run = lorafit.train(recipe, rows=[{"question": ...}])     rows from memory instead of files
    lorafit.evaluate(run), lorafit.merge(run, "merged"), lorafit.generate(run, "a prompt")

A function does what its command does, raises the error that the command would end with (`LorafitError`; its
`exit_code` says which kind), and gives back what `--json` prints: `print(result)` shows it, `result.to_json()` is plain
values. Progress goes to stderr; with `quiet=True` only warnings are left, as Python warnings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorafit import pipeline
from lorafit.console.python_calls import Overrides, Recipe, Rows, StrPath, call
from lorafit.contracts import JsonMapping
from lorafit.errors import LorafitError
from lorafit.studies import first_recipe

if TYPE_CHECKING:
    from lorafit.data.preview import Preview
    from lorafit.estimation import RecipeEstimate
    from lorafit.run.answered import Classified, Generated
    from lorafit.run.results import Evaluated, Merged, Validated
    from lorafit.run.trained import Trained
    from lorafit.studies.compared import Compared
    from lorafit.studies.first_recipe import FirstRecipe
    from lorafit.studies.trim import Trimmed

__all__ = [
    "LorafitError",
    "classify",
    "compare",
    "estimate",
    "evaluate",
    "generate",
    "init",
    "merge",
    "preview",
    "train",
    "trim",
    "validate",
]


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


def evaluate(
    run: StrPath | Trained,
    *,
    rows: Rows | None = None,
    checkpoint: str | int | None = None,
    split: str | None = None,
    limit: int | None = None,
    base_model: StrPath | None = None,
    overrides: Overrides = (),
    quiet: bool = False,
) -> Evaluated:
    """Scores base and tuned model on the same held-out rows. `evaluated.metrics` holds the figures by name.

    Args:
        run: What `train` gave back, a run folder, or the recipe of one.
        rows: Test rows instead of the recipe's `data.test`.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        split: `test`, `validation` or `train`; `test` where the recipe has it, else `validation`.
        limit: Only the first rows.
        base_model: Folder or hub id of the base, where it is not found by itself.
        overrides: Values over the run's recipe, e.g. `{"evaluation.final": ["rouge"]}`.
        quiet: No progress.
    """
    split = split or ("test" if rows is not None else None)
    return call(pipeline.evaluate, locals(), rows="data.test")


def merge(
    run: StrPath | Trained,
    output: StrPath,
    *,
    base: str | None = None,
    checkpoint: str | int | None = None,
    base_model: StrPath | None = None,
    verify: bool = True,
    quiet: bool = False,
) -> Merged:
    """Merges an adapter into its base, and compares the result with the adapter.

    Args:
        run: What `train` gave back, a run folder, its recipe, or an adapter folder.
        output: Where the merged model goes.
        base: `dequantized` or `original`; what was trained on where None.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        base_model: Folder or hub id of the base, where it is not found by itself.
        verify: Whether what was written is read back and compared.
        quiet: No progress.
    """
    return call(pipeline.merge, locals(), required=("output",))


def generate(
    run: StrPath | Trained,
    prompts: str | Sequence[str | JsonMapping],
    *,
    compare_base: bool = False,
    checkpoint: str | int | None = None,
    base_model: StrPath | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    seed: int = 0,
    quiet: bool = False,
) -> Generated:
    """Answers prompts. `generated.texts` are the answers, in the prompts' order.

    Args:
        run: What `train` gave back, a run folder, its recipe, an adapter folder, or a model folder such as a merge.
        prompts: One prompt, or several: texts, or rows as training has them (`{"messages": ...}`, with tools too).
        compare_base: Answer with the adapter off too; needs a run.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        base_model: Folder or hub id of the base, where it is not found by itself.
        temperature: 0 is greedy.
        top_p: Nucleus of the sampled tokens, 0 to 1.
        max_new_tokens: Longest answer.
        min_new_tokens: No answer ends before it has so many tokens.
        num_beams: Answers that are kept at each step of a beam search, which takes no temperature; 1: no such search.
        length_penalty: Of beam search: more than 0 favours long answers.
        no_repeat_ngram_size: No sequence of so many tokens stands twice in an answer; 0: any may.
        seed: Of the sampling.
        quiet: No progress.
    """
    return call(pipeline.generate, locals())


def classify(
    run: StrPath | Trained,
    prompts: str | Sequence[str | JsonMapping],
    *,
    checkpoint: str | int | None = None,
    base_model: StrPath | None = None,
    quiet: bool = False,
) -> Classified:
    """Gives labels to texts, or numbers. `classified.labels` and `classified.values` are those of each text, in order.

    Args:
        run: What `train` gave back, a run folder, its recipe, an adapter folder, or a merged model's.
        prompts: One text, or several: texts, or rows as training has them.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        base_model: Folder or hub id of the base, where it is not found by itself.
        quiet: No progress.
    """
    return call(pipeline.classify, locals())


def trim(
    run: StrPath | Trained,
    *,
    rank: int | str,
    output: StrPath | None = None,
    checkpoint: str | int | None = None,
    base_model: StrPath | None = None,
    overrides: Overrides = (),
    quiet: bool = False,
) -> Trimmed:
    """Writes a run's adapter with a smaller rank, and scores both on its validation rows.

    Args:
        run: What `train` gave back, a run folder or its recipe.
        rank: The smaller rank; "auto": the smallest that these rows cannot tell from the whole adapter.
        output: The adapter's folder instead of the run's with `-rank-RANK` behind it.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        base_model: Folder or hub id of the base, where it is not found by itself.
        overrides: Values over the recipe's, such as `{"data.validation": "more.jsonl"}`.
        quiet: No progress.
    """
    from lorafit.studies.trim import trim

    return call(trim, {name: value for name, value in locals().items() if name != "trim"})


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
