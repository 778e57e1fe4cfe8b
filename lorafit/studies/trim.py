"""`lorafit trim`: a trained adapter with a smaller rank, and what that costs on the validation rows.

    each rank that is tried ──> adapter folder ──> opened beside the whole one, scored on the same rows ──> interval

`auto` tries 1, 2, 3, ... and keeps the first whose loss is not distinguishably worse than the whole adapter's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.reporting import Printed, say, show_table
from lorafit.console.wording import near
from lorafit.contracts import Examples, JsonObject, Reporter, Silent
from lorafit.errors import DataError, UsageError
from lorafit.run.output_folder import check_output
from lorafit.run.workspace import OpenedRun, open_run

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.answering.engine import Engine
    from lorafit.evaluation.statistics import Comparison
    from lorafit.kinds.adapters import AdapterSection
    from lorafit.kinds.metrics import RowScore
    from lorafit.model.products import LayerError
    from lorafit.model.trim import Trimming
    from lorafit.objective import Objective

_SPLIT = "validation"
_SHOWN_LAYERS = 8


@dataclass(frozen=True)
class Tried:
    """One rank.

    Attributes:
        rank: It.
        errors: What each layer loses of its update; nothing of first ranks, whose scale is not that of the whole.
        loss: Held-out loss, of the whole adapter as `base` and of this rank as `tuned`.
    """

    rank: int
    errors: tuple[LayerError, ...]
    loss: Comparison

    @property
    def share(self) -> float | None:
        """Norm of what all layers lose over that of all updates; None of first ranks."""
        if not self.errors:
            return None
        from lorafit.model.products import share_of_all

        return share_of_all(self.errors)

    def to_json(self) -> JsonObject:
        """Plain values."""
        layers = [{**asdict(error), "share": error.share} for error in self.errors]
        return {"rank": self.rank, "share": self.share, "loss": self.loss.to_json(), "layers": layers}


@dataclass(frozen=True)
class Trimmed(Printed):
    """A run's adapter with a smaller rank.

    Attributes:
        rank: Of the result.
        whole_rank: Of the run's adapter.
        how: `first ranks` of an adapter that was trained for that, else `SVD`.
        tried: Every rank that was scored.
        output: The adapter's folder; None where no smaller rank will do, and none was written.
    """

    rank: int
    whole_rank: int
    how: str
    tried: tuple[Tried, ...]
    output: Path | None

    def to_json(self) -> JsonObject:
        """Plain values."""
        return {
            "rank": self.rank,
            "whole_rank": self.whole_rank,
            "how": self.how,
            "tried": [one.to_json() for one in self.tried],
            "output": None if self.output is None else str(self.output),
        }

    def render(self, console: Console) -> None:
        """A line for each rank, the layers that lose most, and what follows."""
        last = self.tried[-1]
        rows: list[tuple[str, ...]] = [
            (str(one.rank), _percent(one.share), one.loss.show(one.loss.tuned), one.loss.span, one.loss.verdict)
            for one in self.tried
        ]
        rows.append((str(self.whole_rank), "0", last.loss.show(last.loss.base), "", "the run's adapter"))
        worst = sorted(last.errors, key=lambda error: -error.share)[:_SHOWN_LAYERS]
        layers: list[tuple[str, ...]] = [(e.layer, f"{e.error:.4g}", _percent(e.share)) for e in worst]
        headings: tuple[str, ...] = (
            "rank",
            "update lost",
            "validation loss",
            "95 % interval of the difference",
            "verdict",
        )
        lost: tuple[str, ...] = (f"layers that lose most at rank {last.rank}", "Frobenius norm", "of their update")
        tables = [(headings, rows), (lost, layers)]
        if not last.errors:
            tables = [(headings[:1] + headings[2:], [row[:1] + row[2:] for row in rows])]
        for names, lines in tables:
            words = [at for at, name in enumerate(names) if name == "verdict" or (names is lost and at == 0)]
            show_table(console, names, lines, words=words)
            console.print()
        if self.output is None:
            say(
                console,
                f"rank {self.whole_rank} stays: every smaller one is distinguishably worse; nothing was written",
            )
        else:
            say(console, f"rank {self.rank} of {self.whole_rank} by {self.how}: {near(self.output)}")


def trim(
    run: Path,
    *,
    rank: int | str,
    output: Path | None = None,
    checkpoint: str | None = None,
    base_model: str | None = None,
    overrides: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Trimmed:
    """Writes a run's adapter with a smaller rank, and scores both on its validation rows."""
    reporter, wanted = reporter or Silent(), _read_rank(rank)
    opened = open_run(run, overrides)
    opened.adapter(checkpoint)
    if wanted is not None:
        output = output or _usual_output(opened, wanted)
    if output is not None:
        _check_new(output, opened)
    if opened.loaded.recipe.data.validation is None:
        todo = "add --set data.validation=FILE"
        raise DataError(
            "a smaller rank is judged on validation rows, and the recipe has none", key="data.validation", todo=todo
        )
    from lorafit.answering.evaluation_rows import open_evaluation, refer_as_begun, settle_evaluation
    from lorafit.answering.tuned import open_tuned
    from lorafit.files.atomic import atomic_dir
    from lorafit.job import build_objective, prove
    from lorafit.kinds.adapters import adapters
    from lorafit.model.adapter import read_adapter
    from lorafit.model.trim import Trimming

    opened = settle_evaluation(opened, overrides, reporter)
    tuned = open_tuned(opened, checkpoint, base_model, reporter)
    least = adapters.bind(tuned.card.adapter).nested_from()
    trimming = Trimming(read_adapter(tuned.adapter), nested=least is not None)
    ranks = _ranks_to_try(wanted, trimming.rank, least or 1, tuned.card.adapter)
    for one_rank in ranks if output is None else ():
        _check_new(_usual_output(opened, one_rank), opened)
    job = open_evaluation(opened, tuned, _SPLIT, reporter)
    engine = tuned.load(job.tokenizer, reporter)
    objective = build_objective(job, engine.model, tuned.card.dtype)
    prove(job, objective, job.rows.splits[_SPLIT], reporter)
    refer_as_begun(job, objective, opened, tuned, _SPLIT, reporter)
    scoring = _Scoring(engine, objective, job.rows.splits[_SPLIT], opened, job.recipe.seed, reporter)
    tried: list[Tried] = []
    for one in scoring.try_ranks(trimming, ranks):
        tried.append(one)
        if one.loss.verdict != "worse":
            break
    last, how = tried[-1], "its first ranks" if least is not None else "SVD"
    if wanted is None and last.loss.verdict == "too few rows":
        raise DataError(last.loss.sentence, key="data.validation", todo="give more rows, or name a rank")
    if wanted is None and last.loss.verdict == "worse":
        return Trimmed(trimming.rank, trimming.rank, how, tuple(tried), None)
    output = output or _usual_output(opened, last.rank)
    with atomic_dir(output) as folder:
        trimming.write(last.rank, folder)
    return Trimmed(last.rank, trimming.rank, how, tuple(tried), output)


def _percent(share: float | None) -> str:
    return f"{100 * share:.2f} %" if share is not None else ""


def _usual_output(opened: OpenedRun, rank: int) -> Path:
    return opened.run.root.with_name(f"{opened.run.root.name}-rank-{rank}")


def _check_new(output: Path, opened: OpenedRun) -> None:
    """Refuses a folder that cannot be made, before anything is loaded. Raises UsageError."""
    check_output(output, [opened.run.root])
    if output.exists():
        raise UsageError("exists already", file=str(output), key="output", todo="choose another --output")


class _Scoring:
    """Scores smaller adapters beside the whole one, over one base in memory.

    Args:
        engine: The base with the whole adapter.
        objective: Over the engine's model.
        examples: The rows.
        opened: The run.
        seed: Of the intervals.
        reporter: Gets bars.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        examples: Examples,
        opened: OpenedRun,
        seed: int,
        reporter: Reporter,
    ) -> None:
        from lorafit.evaluation.runner import find_pad_id

        self._engine, self._objective, self._examples = engine, objective, examples
        self._tokens = opened.resolved().evaluation_micro_batch_tokens
        self._pad_id = find_pad_id(engine.tokenizer, engine.embedding_rows)
        self._seed, self._reporter = seed, reporter

    def try_ranks(self, trimming: Trimming, ranks: Sequence[int]) -> Iterator[Tried]:
        """Each rank as it would be shipped: written, opened and scored."""
        from lorafit.evaluation.statistics import compare
        from lorafit.kinds.metrics import metrics

        (own,), loss = self._engine.adapters, metrics.get("loss")
        whole = self._score(own, "the whole adapter")
        for rank in ranks:
            name = f"rank{rank}"
            with tempfile.TemporaryDirectory() as folder:
                errors = trimming.write(rank, Path(folder))
                self._engine.add_adapter(name, Path(folder), self._reporter)
            smaller = self._score(name, f"rank {rank}")
            self._engine.remove_adapter(name)
            yield Tried(rank, tuple(errors), compare("loss", loss, whole, smaller, seed=self._seed)[0])

    def _score(self, adapter: str, what: str) -> list[RowScore]:
        from lorafit.evaluation.runner import score_examples
        from lorafit.ops.isolation import evaluating

        with evaluating(self._objective), self._engine.using(adapter):
            return score_examples(
                self._objective,
                self._examples,
                micro_batch_tokens=self._tokens,
                pad_id=self._pad_id,
                reporter=self._reporter,
                what=f"scoring {what}",
            )


def _read_rank(rank: int | str) -> int | None:
    """A rank from 1; None for `auto`."""
    text = str(rank)
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"'{text}' is no rank", key="--rank", todo="give a whole number from 1, or auto")
    return int(text)


def _ranks_to_try(wanted: int | None, whole: int, least: int, section: AdapterSection) -> Sequence[int]:
    """What is scored, in order."""
    from lorafit.kinds.adapters import adapters

    if wanted is None:
        if whole <= least:
            raise UsageError(f"the adapter has rank {whole}, and nothing smaller was trained for", key="--rank")
        return range(least, whole)
    if wanted >= whole:
        begun, why = adapters.bind(section).initialisation(), ""
        if begun is not None and begun.corrects:
            why = f" (twice its r: half takes out what adapter.init: {begun.section.kind} began with)"
        what = f"{wanted} is no smaller rank than the adapter's own, {whole}{why}"
        raise UsageError(what, key="--rank", todo="name a smaller one")
    if wanted < least:
        what = f"ranks below {least} were not trained for (adapter.r_min)"
        raise UsageError(what, key="--rank", todo=f"name one from {least} to {whole - 1}")
    return [wanted]
