"""Scores rows: loss over trained tokens by the objective that training uses, then answers where a metric reads them.

    examples --cut by length--> micro-batches --objective.score--> losses of labels --summed by row--> RowScore
    prompts  --generate_answers-----------------------------------------------------> its answer

Base (adapter off) and tuned (adapter on) see the same micro-batches and the same prompts, in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorafit.answering.engine import Engine, Request, Sampling
from lorafit.answering.generate import BATCH_TOKENS, Answer
from lorafit.contracts import JsonObject
from lorafit.data.batch import cut_step
from lorafit.errors import DataError, NumericsError
from lorafit.evaluation.evaluation import About, Evaluation, Speed
from lorafit.evaluation.rows import compare_rows, fill_text, find_worst, join_rows
from lorafit.kinds.metrics import RowScore, metrics, with_companions
from lorafit.ops.isolation import evaluating
from lorafit.ops.peak_memory import forget_peak_memory, peak_memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.contracts import Examples, GenerationRow, Reporter
    from lorafit.objective import TrainedTask


@dataclass(frozen=True, slots=True)
class Ranks:
    """Several processes that share the rows of an evaluation: each scores every `count`-th micro-batch.

    Attributes:
        index: This process.
        count: Processes.
        add_up: Sums a tensor over all processes, e.g. `lambda t: accelerator.reduce(t, "sum")`.
    """

    index: int = 0
    count: int = 1
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


@dataclass(frozen=True, slots=True)
class _Side:
    """What one model scored and wrote."""

    losses: list[RowScore]
    answers: list[Answer]
    retained: list[RowScore]


def score_examples(
    objective: Any,
    examples: Examples,
    *,
    micro_batch_tokens: int,
    pad_id: int,
    device: torch.device,
    reporter: Reporter,
    ranks: Ranks | None = None,
    what: str = "scoring",
) -> list[RowScore]:
    """What the task scores of each example, in order.

    The caller puts the model into eval mode (`evaluating`).

    Args:
        objective: On its device.
        examples: Prepared rows.
        micro_batch_tokens: Padded tokens of one forward.
        pad_id: Fills up shorter rows.
        device: Where the model is.
        reporter: Gets a bar.
        ranks: Set where several processes share the work.
        what: Name of the bar.

    Raises:
        NumericsError: A row's loss is not finite.
    """
    ranks = ranks or Ranks()
    rows = len(examples)
    widths = objective.task.scores
    sums = np.zeros((rows, sum(widths.values())))
    micro_batches = cut_step(range(rows), examples.lengths, micro_batch_tokens)[ranks.index :: ranks.count]
    with reporter.track(sum(map(len, micro_batches)), what) as bar:
        for members in micro_batches:
            batch = objective.task.collate([[examples[row]] for row in members], pad_id)
            scores = objective.score(batch.to(device))
            sums[np.asarray(members)] = np.column_stack([scores[name] for name in widths])
            bar.advance(len(members))
    if ranks.count > 1:
        sums = ranks.add_up(torch.from_numpy(sums).to(device)).cpu().numpy()
    ends = np.cumsum(list(widths.values()))
    parts = dict(zip(widths, np.split(sums, ends[:-1], axis=1), strict=True))
    for row in np.flatnonzero(~np.isfinite(parts["loss"][:, 0])):
        example = examples[int(row)]
        todo = "check the adapter and the compute dtype (fp16 overflows where bf16 does not)"
        raise NumericsError("the loss of this row is not finite", file=example.file, line=example.line, todo=todo)
    found = [{name: tuple(map(float, part[row])) for name, part in parts.items()} for row in range(rows)]
    return [RowScore(sums, objective.task.predict(sums)) for sums in found]


def measure(names: Sequence[str], rows: Sequence[RowScore]) -> dict[str, float]:
    """Values of several metrics over the rows that each can score."""
    found: dict[str, float] = {}
    for name in names:
        metric = metrics.get(name)
        usable = [row for row in rows if metric.usable(row)]
        if usable:
            found |= metric.values(np.asarray(metric.row_sums(usable)).sum(axis=0).tolist())
    return found


def evaluate_during(
    objective: torch.nn.Module,
    examples: Examples,
    metric_names: Sequence[str],
    *,
    micro_batch_tokens: int,
    pad_id: int,
    device: torch.device,
    reporter: Reporter,
    ranks: Ranks | None = None,
) -> Callable[[], dict[str, float]]:
    """What the training loop calls between steps: values by name, the loss always among them.

    Modes, random numbers, weights and NF4 packing are as before the call, so that evaluating does not change training.
    """
    names = ["loss", *(name for name in metric_names if name != "loss")]

    def evaluate() -> dict[str, float]:
        with evaluating(objective):
            scores = score_examples(
                objective,
                examples,
                micro_batch_tokens=micro_batch_tokens,
                pad_id=pad_id,
                device=device,
                reporter=reporter,
                ranks=ranks,
                what="evaluating",
            )
        return measure(names, scores)

    return evaluate


def evaluate_pair(
    engine: Engine,
    objective: Any,
    examples: Examples,
    generation_rows: Sequence[GenerationRow],
    metric_names: Sequence[str],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    micro_batch_tokens: int,
    seed: int,
    reporter: Reporter,
    retention: Examples | None = None,
    generation_batch_tokens: int = BATCH_TOKENS,
    about: About | None = None,
) -> Evaluation:
    """Base (adapter off) and tuned model on the same rows, with intervals and verdicts.

    Args:
        engine: The base with one trained adapter.
        objective: The objective around its model.
        examples: Held-out rows, prepared as for training.
        generation_rows: Rows to answer; joined with the examples by file and line.
        metric_names: Registered metrics, in the order of the report.
        max_new_tokens: Longest answer.
        stop_ids: Tokens that end an answer, beside the model's own.
        micro_batch_tokens: Padded tokens of one scoring forward.
        seed: Of the bootstrap.
        reporter: Gets bars and warnings.
        retention: Prepared rows of general ability; scored by loss, perplexity and token accuracy.
        generation_batch_tokens: Bound of rows x (prompt + new tokens) in a batch of answers.
        about: What goes into the report's head.

    Raises:
        DataError: There are no rows.
        NumericsError: A row's loss is not finite.
    """
    started, metric_names = time.perf_counter(), with_companions(metric_names)
    forget_peak_memory(device := engine.device, of_process=False)
    asked = find_asked(examples, generation_rows, metric_names)
    score = partial(
        score_examples,
        objective,
        micro_batch_tokens=micro_batch_tokens,
        pad_id=find_pad_id(engine.tokenizer, engine.embedding_rows),
        device=device,
        reporter=reporter,
    )
    sampling = Sampling(max_new_tokens)

    def run(side: str, adapter: str | None) -> _Side:
        requests = [Request(row.prompt_ids, adapter, sampling, tuple(stop_ids)) for row in asked]
        with engine.using(adapter):
            kept = score(retention, what=f"retention, {side} model") if retention is not None else []
            losses = score(examples, what=f"scoring, {side} model")
        answers = engine.answer(
            requests, batch_tokens=generation_batch_tokens, reporter=reporter, what=f"answers, {side} model"
        )
        return _Side(losses, answers, kept)

    (adapter,) = engine.adapters
    with evaluating(objective):
        base, tuned = run("base", None), run("tuned", adapter)
    found = _conclude(examples, retention, asked, base, tuned, metric_names, objective.task, engine.tokenizer, seed)
    return Evaluation(
        **found,
        about=about or About(),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(device),
        seed=seed,
        max_new_tokens=max_new_tokens,
    )


def _conclude(
    examples: Examples,
    retention: Examples | None,
    asked: Sequence[GenerationRow],
    base: _Side,
    tuned: _Side,
    metric_names: Sequence[str],
    task: TrainedTask,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> JsonObject:
    """The fields of an Evaluation that follow from what both models scored and wrote."""
    rows = join_rows(examples, base.losses, tuned.losses, asked, base.answers, tuned.answers)
    comparisons, unscored = compare_rows(rows, metric_names, seed=seed)
    cheap = [name for name, metric in metrics.items() if metric.during_training and task.can_score(name)]
    retained = join_rows(retention, base.retained, tuned.retained) if retention is not None else ()
    return {
        "comparisons": comparisons,
        "unscored": unscored,
        "rows": rows,
        "worst": fill_text(find_worst(rows, comparisons), examples, task, tokenizer),
        "signatures": {name: metrics.get(name).signature() for name in metric_names},
        "retention": compare_rows(retained, cheap, seed=seed)[0] if retained else (),
        "retention_rows": len(retained),
        "base_speed": Speed.of(base.answers) if asked else None,
        "tuned_speed": Speed.of(tuned.answers) if asked else None,
    }


def find_pad_id(tokenizer: PreTrainedTokenizerBase, embedding_rows: int | None = None) -> int:
    """What fills up rows: the pad token, else the end token, else 0. No loss stands there, so that any will do.

    A token that the embedding has no row for, as tokenizers with a pad token added to them have, is passed over.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (embedding_rows is None or token < embedding_rows):
            return int(token)
    return 0


def find_asked(
    examples: Examples, generation_rows: Sequence[GenerationRow], metric_names: Sequence[str]
) -> list[GenerationRow]:
    """Rows whose answer some metric would read; others are not worth generating.

    Raises:
        DataError: There are no rows at all.
    """
    if not len(examples) and not generation_rows:
        raise DataError("no rows to evaluate on", todo="set data.test or data.validation")
    readers = [metrics.get(name) for name in metric_names if metrics.get(name).needs != "scores"]
    asked = []
    for row in generation_rows:
        probe = RowScore({}, "", row.reference, row.must_contain, "", row.calls)
        if any(metric.usable(probe) for metric in readers if metric.needs == "calls" or not row.is_inner):
            asked.append(row)
    return asked
