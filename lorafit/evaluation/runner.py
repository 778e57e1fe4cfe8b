"""Scores rows: loss over trained tokens by the objective that training uses, then answers where a metric reads them.

    examples --cut by length--> micro-batches --objective.score--> losses of labels --summed by row--> RowScore
    prompts  --generate_answers-----------------------------------------------------> its answer

Base (adapter off) and tuned (adapter on) see the same micro-batches and the same prompts, in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lorafit.answering.engine import Engine
from lorafit.answering.generate import Answer, Request
from lorafit.answering.sampling import Sampling
from lorafit.data.batch import cut_step, deal
from lorafit.errors import DataError, NumericsError
from lorafit.evaluation.evaluation import About, Evaluation, Speed
from lorafit.evaluation.further import Asking, FurtherQuestions, Replies, as_asked
from lorafit.evaluation.rows import (
    compare_rows,
    fill_text,
    find_worst,
    join_rows,
    probe_rows,
    show_metrics,
    with_vectors,
)
from lorafit.kinds.metrics import RowScore, metrics, with_companions
from lorafit.ops.isolation import evaluating
from lorafit.ops.process_memory import forget_peak_memory, peak_memory_bytes, run_or_halve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.contracts import Batch, Examples, GenerationRow, Progress, Reporter
    from lorafit.kinds.tasks import Task, TaskSection

Scores = Mapping[str, NDArray[np.float64]]
"""What a task scores of the rows of a micro-batch, by name."""

Side = tuple[list[RowScore], list[Answer], list[RowScore], list[Replies]]
"""Of one of the two models: scores of the rows, answers, scores of the retention rows, what metrics asked beside."""


class Ranks(Protocol):
    """Several processes that share the rows of an evaluation, each its part of the micro-batches: an executor is one.

    Attributes:
        rank: Number of this process, from 0.
        ranks: Their number.
    """

    rank: int
    ranks: int

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value, added over all of them."""


def score_examples(
    objective: Any,
    examples: Examples,
    *,
    micro_batch_tokens: int,
    pad_id: int,
    reporter: Reporter,
    ranks: Ranks | None = None,
    what: str = "scoring",
) -> list[RowScore]:
    """What the task scores of each example, in order.

    The caller puts the model into eval mode (`evaluating`).

    Args:
        objective: On its device.
        examples: Prepared rows.
        micro_batch_tokens: Padded tokens of one forward; fewer where memory runs out.
        pad_id: Fills up shorter rows.
        reporter: Gets a bar.
        ranks: Set where several processes share the work.
        what: Name of the bar.

    Raises:
        NumericsError: A row's loss is not finite.
    """
    first, every = (ranks.rank, ranks.ranks) if ranks is not None else (0, 1)
    cut = cut_step(range(len(examples)), examples.lengths, micro_batch_tokens)
    padded = [len(members) * int(examples.lengths[members[0]]) for members in cut]  # the longest comes first
    micro_batches = [cut[number] for number in deal(padded, every)[first]]
    with reporter.track(sum(map(len, micro_batches)), what) as bar:
        (sums,) = _sum_rows(objective, examples, micro_batches, pad_id, bar, 1, lambda batch: [objective.score(batch)])
    if ranks is not None and every > 1:
        sums = np.asarray(ranks.sum(sums.flatten().tolist())).reshape(sums.shape)
    return _score_rows(objective, examples, sums)


def score_in_ways(
    objective: Any,
    examples: Examples,
    ways: int,
    score: Callable[[Batch], Iterable[Scores]],
    *,
    micro_batch_tokens: int,
    pad_id: int,
    reporter: Reporter,
    what: str,
) -> list[list[RowScore]]:
    """What the task scores of each example, in order, in each of several ways to compute a micro-batch.

    Args:
        objective: See `score_examples`.
        examples: Likewise.
        ways: Their number.
        score: The scores of a micro-batch on the objective's device, one for each way.
        micro_batch_tokens: See `score_examples`.
        pad_id: Likewise.
        reporter: Gets a bar.
        what: Its name.

    Raises:
        NumericsError: A row's loss is not finite.
    """
    micro_batches = cut_step(range(len(examples)), examples.lengths, micro_batch_tokens)
    with reporter.track(ways * len(examples), what) as bar:
        sums = _sum_rows(objective, examples, micro_batches, pad_id, bar, ways, score)
    return [_score_rows(objective, examples, each) for each in sums]


def _sum_rows(
    objective: Any,
    examples: Examples,
    micro_batches: Sequence[Sequence[int]],
    pad_id: int,
    bar: Progress,
    ways: int,
    score: Callable[[Batch], Iterable[Scores]],
) -> NDArray[np.float64]:
    """The scores of each row side by side, `[ways, rows, values]`; zeros of rows in no micro-batch."""
    widths = objective.task.scores
    sums = np.zeros((ways, len(examples), sum(widths.values())))

    def run(members: Sequence[int]) -> list[NDArray[np.float64]]:
        batch = objective.task.collate([[examples[row]] for row in members], pad_id)
        found = []
        for scores in score(batch.to(objective.device)):
            found.append(np.column_stack([scores[name] for name in widths]))
            bar.advance(len(members))
        return found

    for members, found in run_or_halve(run, micro_batches, objective.device):
        sums[:, np.asarray(members)] = np.stack(found)
    return sums


def _score_rows(objective: Any, examples: Examples, sums: NDArray[np.float64]) -> list[RowScore]:
    """Scores by name, finished over the whole set. Raises NumericsError where a row's loss is not finite."""
    widths = objective.task.scores
    ends = np.cumsum(list(widths.values()))
    parts = objective.task.finish(dict(zip(widths, np.split(sums, ends[:-1], axis=1), strict=True)))
    for row in np.flatnonzero(~np.isfinite(parts["loss"][:, 0])):
        example = examples[int(row)]
        todo = "check the adapter and the compute dtype (fp16 overflows where bf16 does not)"
        raise NumericsError("the loss of this row is not finite", file=example.file, line=example.line, todo=todo)
    found = [{name: tuple(map(float, part[row])) for name, part in parts.items()} for row in range(len(examples))]
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


def evaluate_pair(
    engine: Engine,
    objective: Any,
    examples: Examples,
    generation_rows: Sequence[GenerationRow],
    metric_names: Sequence[str],
    *,
    sampling: Sampling,
    stop_ids: Sequence[int],
    micro_batch_tokens: int,
    seed: int,
    reporter: Reporter,
    retention: Examples | None = None,
    about: About | None = None,
    base_scorer: Any = None,
    base_note: str = "",
    base_once: Callable[[Callable[[], Side]], Side] = lambda score: score(),
    asking: Asking | None = None,
) -> Evaluation:
    """Base (adapter off) and tuned model on the same rows, with intervals and verdicts.

    Args:
        engine: The base with one trained adapter.
        objective: The objective around its model.
        examples: Held-out rows, prepared as for training.
        generation_rows: Rows to answer; joined with the examples by file and line.
        metric_names: Registered metrics, in the order of the report.
        sampling: How answers are made.
        stop_ids: Tokens that end an answer, beside the model's own.
        micro_batch_tokens: Padded tokens of one scoring forward.
        seed: Of the bootstrap.
        reporter: Gets bars and warnings.
        retention: Prepared rows of general ability; scored by loss, perplexity and token accuracy.
        about: What goes into the report's head.
        base_scorer: Scores the base's rows in the place of the objective (`FittedBase`), its adapter off.
        base_note: What the base is scored with, where that is not the base alone.
        base_once: Gives what scoring the base gives, by that or from an earlier evaluation of the same.
        asking: What metrics are given that read more than the rows' own answers; None where none does.

    Raises:
        DataError: There are no rows.
        NumericsError: A row's loss is not finite.
    """
    started, metric_names = time.perf_counter(), with_companions(metric_names)
    forget_peak_memory(engine.device, of_process=False)
    _require_rows(examples, generation_rows)
    asked = find_asked(generation_rows, metric_names)
    questions = FurtherQuestions.of(asked, metric_names, asking, generation_rows[:1], sampling)
    questions.tell(reporter)
    pad_id = find_pad_id(engine.tokenizer, engine.embedding_rows)
    score = partial(score_examples, micro_batch_tokens=micro_batch_tokens, pad_id=pad_id, reporter=reporter)
    run = partial(_run_side, engine, examples, retention, questions, stop_ids, score, reporter)
    with evaluating(objective):
        base, base_answers, base_kept, base_further = base_once(lambda: run("base", None, base_scorer or objective))
        tuned, answers, kept, further = run("tuned", engine.adapters[0], objective)
    rows = join_rows(examples, base, tuned, asked, base_answers, answers, base_further, further)
    rows = with_vectors(rows, metric_names, asking, reporter)
    own = probe_rows(base_further[-1], further[-1])
    comparisons, unscored = compare_rows(rows, metric_names, seed=seed, own=own)
    retained = join_rows(retention, base_kept, kept) if retention is not None else ()
    return Evaluation(
        about=about or About(),
        comparisons=comparisons,
        unscored=unscored,
        rows=rows,
        worst=fill_text(find_worst(rows, comparisons), examples, objective.task, engine.tokenizer),
        signatures={name: metrics.get(name).signature() for name in metric_names},
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(engine.device),
        seed=seed,
        sampling=sampling,
        retention=compare_rows(retained, _scored(objective.task), seed=seed)[0] if retained else (),
        retention_rows=len(retained),
        base_speed=Speed.of(base_answers) if asked else None,
        tuned_speed=Speed.of(answers) if asked else None,
        base_note=base_note,
        tables=objective.task.tables([row.tuned.sums for row in rows]),
        base_tables=(base_scorer or objective).task.tables([row.base.sums for row in rows]),
        metric_tables=show_metrics(rows, metric_names, own),
    )


def _run_side(
    engine: Engine,
    examples: Examples,
    retention: Examples | None,
    questions: FurtherQuestions,
    stop_ids: Sequence[int],
    score: Callable[..., list[RowScore]],
    reporter: Reporter,
    side: str,
    adapter: str | None,
    scorer: Any,
) -> Side:
    """One of the two models: its scores, its answers, and what metrics ask beside."""
    with engine.using(adapter):
        kept = score(scorer, retention, what=f"retention, {side} model") if retention is not None else []
        losses = score(scorer, examples, what=f"scoring, {side} model")
    requests = [Request.of_row(row, adapter, questions.sampling, stop_ids) for row in questions.rows]
    answers = engine.answer(requests, reporter=reporter, what=f"answers, {side} model")
    return losses, answers, kept, questions.ask(engine, adapter, stop_ids, reporter, side)


def _scored(task: Task[TaskSection]) -> list[str]:
    """Metrics that read what a task scores, and no answers."""
    return [name for name, metric in metrics.items() if metric.needs == "scores" and task.can_score(name)]


def _require_rows(examples: Examples, generation_rows: Sequence[GenerationRow]) -> None:
    if not len(examples) and not generation_rows:
        raise DataError("no rows to evaluate on", todo="set data.test or data.validation")


def find_pad_id(tokenizer: PreTrainedTokenizerBase, embedding_rows: int | None = None) -> int:
    """What fills up rows: the pad token, else the end token, else 0. No loss stands there, so that any will do.

    A token that the embedding has no row for, as tokenizers with a pad token added to them have, is passed over.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (embedding_rows is None or token < embedding_rows):
            return int(token)
    return 0


def require_measurable(generation_rows: Sequence[GenerationRow], metric_names: Sequence[str]) -> None:
    """Refuses an evaluation none of whose metrics has a row, or a prompt of its own, that it can score.

    Where no rows are answered it says nothing: what a task predicts may be what is read.

    Raises:
        DataError: None has one.
    """
    names = with_companions(metric_names)
    wanted = [metrics.get(name) for name in names]
    if (
        not generation_rows
        or any(metric.needs == "scores" or metric.probes() for metric in wanted)
        or find_asked(generation_rows, names)
    ):
        return
    needs = "; ".join(f"{name} needs {metrics.get(name).condition}" for name in metric_names)
    raise DataError(f"no row can be scored: {needs}", todo="add such rows, or name other metrics in evaluation.final")


def find_asked(generation_rows: Sequence[GenerationRow], metric_names: Sequence[str]) -> list[GenerationRow]:
    """Rows whose answer some metric would read; others are not worth generating."""
    readers = [metrics.get(name) for name in metric_names if metrics.get(name).needs != "scores"]
    asked = []
    for row in generation_rows:
        probe = as_asked(RowScore(answer="", written=""), row)
        if any(metric.usable(probe) for metric in readers if metric.needs == "calls" or not row.is_inner):
            asked.append(row)
    return asked
