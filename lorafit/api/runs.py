"""Functions that take what was trained: it is scored, merged, asked, made smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorafit import pipeline
from lorafit.console.python_calls import Overrides, Rows, StrPath, call
from lorafit.contracts import JsonMapping

if TYPE_CHECKING:
    from lorafit.exporting.exported import Exported
    from lorafit.run.answered import Classified, Generated
    from lorafit.run.results import Evaluated, Merged
    from lorafit.run.trained import Trained
    from lorafit.studies.composed import Composed
    from lorafit.studies.inspected import Inspected
    from lorafit.studies.trim import Trimmed


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
        run: What `train` gave back, a run folder, its recipe, an adapter folder, a model folder such as a merge, a
            `.gguf` file or `package://NAME/FILE.gguf`.
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


def inspect_adapter(
    run: StrPath | Trained,
    *,
    ablate: str | None = None,
    split: str | None = None,
    limit: int | None = 12,
    compare: StrPath | Trained | None = None,
    output: StrPath | None = None,
    checkpoint: str | int | None = None,
    base_model: StrPath | None = None,
    overrides: Overrides = (),
    quiet: bool = False,
) -> Inspected:
    """Measures what an adapter changes, module by module, and what each layer is worth on held-out rows.

    Args:
        run: What `train` gave back, a run folder, its recipe, or an adapter folder.
        ablate: What is switched off one by one: `layers`, `modules`, or `none`. None: layers, and none with `compare`.
        split: Rows for that; `test` where the recipe has it.
        limit: So many of them, the first; all where None.
        compare: Another adapter on the same base, shown beside the first.
        output: A folder for inspect.json and a heat map.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        base_model: Folder or hub id of the base, where it is not found by itself.
        overrides: Values over the recipe's, such as `{"data.validation": "more.jsonl"}`.
        quiet: No progress.
    """
    from lorafit.studies import inspection

    return call(inspection.inspect_adapter, {name: value for name, value in locals().items() if name != "inspection"})


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

    return call(trim, {name: value for name, value in locals().items() if name != "trim"}, required=("rank",))


def compose(
    expression: str | None = None,
    *,
    adapters: Mapping[str, StrPath | Trained],
    output: StrPath,
    rank: int | str | None = None,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
    mean: bool = False,
    weights: str | Sequence[float] | None = None,
    fit_rows: StrPath | None = None,
    eval_rows: StrPath | None = None,
    scores: bool = True,
    convert: bool = False,
    patterns: bool = False,
    base_model: StrPath | None = None,
    quiet: bool = False,
) -> Composed:
    """Writes the weighted sum of several adapters of one base as one plain LoRA adapter. `composed.output` is it.

    Args:
        expression: The sum, such as `"0.7*a + 0.3*b - c"`; None with `mean` or `fit_rows`.
        adapters: Runs or adapter folders by their names in the sum.
        output: The adapter's folder, which must not exist.
        rank: A smaller rank; or what each layer may lose of its update, `"1%"`; all ranks where None.
        method: `sum`, `ties` or `dare`.
        density: Share of each update's values that ties and dare keep; 0.2 where None.
        seed: Of what dare drops.
        mean: The weighted mean instead of a sum.
        weights: Of the mean, in the adapters' order; `"rows"`: the training rows of the runs; equal where None.
        fit_rows: Find the weights that give the least loss on this file of rows.
        eval_rows: Score this file instead of the runs' own validation rows.
        scores: Whether anything is scored.
        convert: Take what other methods than LoRA change in their base as an update, cut to a rank.
        patterns: Keep each layer's own rank, by PEFT's `rank_pattern`, which some engines ignore.
        base_model: Folder or hub id of the base, where it is not found by itself.
        quiet: No progress.
    """
    from lorafit.studies.compose import compose

    return call(
        compose, {name: value for name, value in locals().items() if name != "compose"}, required=("adapters", "output")
    )


def export(
    run: StrPath | Trained,
    *,
    to: str,
    output: StrPath | None = None,
    checkpoint: str | int | None = None,
    base_model: StrPath | None = None,
    base_id: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    from_base: str | None = None,
    repo: str | None = None,
    private: bool = False,
    license: str | None = None,
    dry_run: bool = False,
    verify: bool = False,
    quiet: bool = False,
) -> Exported:
    """Writes a trained adapter in the form that another program reads. `exported.output` is the file or folder.

    Args:
        run: What `train` gave back, a run folder, its recipe, an adapter folder, or a whole model for gguf and ollama.
        to: `peft`, `gguf`, `gguf-lora`, `ollama`, `vllm` or `hub`.
        output: The file or folder instead of one beside the run.
        checkpoint: `best`, `last` or a step; the saved adapter where None.
        base_model: Folder or hub id of the base, where it is not found by itself.
        base_id: peft, vllm, hub: the base's hub id where the run did not have it from the hub; nothing is compared.
        base: gguf, ollama: `dequantized` or `original`, as for `merge`.
        dtype: gguf, ollama: `f32`, `f16`, `bf16` or `q8_0` for matrices; f16 where None.
        from_base: ollama: put the adapter on this model of Ollama's or GGUF file, and merge nothing.
        repo: hub: where to push to, with the token in HF_TOKEN.
        private: hub: make the repository private, where it is made.
        license: hub: the adapter's licence.
        dry_run: hub: write the folder and send nothing.
        verify: Compare logits of the target's engine with lorafit's.
        quiet: No progress.
    """
    from lorafit.exporting.export import export

    return call(export, {name: value for name, value in locals().items() if name != "export"}, required=("to",))
