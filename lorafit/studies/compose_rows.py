"""Rows for `compose`: losses of the adapters, of their sum and of the result, and weights that fit rows best.

    base + [B_1 | B_2 | ...] diag(w, by part) [A_1 ; A_2 ; ...]          one adapter in memory stands for every w

Each weight is one number that the loss has an exact gradient for; a sum of a few adapters has so few of them that
BFGS over all rows at once, which draws nothing, finds the least loss in some ten passes.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorafit.answering.evaluation_rows import open_evaluation, open_file
from lorafit.answering.tuned import Tuned
from lorafit.contracts import Examples, Reporter
from lorafit.data.batch import cut_step
from lorafit.errors import DataError, NumericsError
from lorafit.evaluation.runner import score_examples
from lorafit.evaluation.statistics import compare
from lorafit.job import Job, build_objective, prove, refer
from lorafit.kinds.metrics import RowScore, metrics
from lorafit.model.adapter import ADAPTER_NAME
from lorafit.model.compose import Part, Recipe, compose_layers
from lorafit.model.composed_adapter import write_composed
from lorafit.ops.isolation import adapter_off, evaluating
from lorafit.ops.quasi_newton import minimise
from lorafit.run.workspace import OpenedRun
from lorafit.studies.composed import Fitted, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.answering.engine import Engine
    from lorafit.objective import Objective

_TOKENS = 2048
_GAIN_SEEN, _GAIN_SEEN_IN_HALF = 1e-5, 5e-4  # nats a label that are more than rounding
_RESULT, _WHOLE_SUM = "result", "the exact sum"


@dataclass(frozen=True)
class RowSet:
    """Prepared rows.

    Attributes:
        name: What they are called.
        job: Their task, with all that renders them.
        split: Which rows of it.
    """

    name: str
    job: Job
    split: str

    @property
    def examples(self) -> Examples:
        """The rows."""
        return self.job.rows.splits[self.split]


def open_row_file(
    tuned: Tuned, file: Path, known: Sequence[Mapping[str, str]], flag: str, reporter: Reporter
) -> RowSet:
    """A file of rows, read as the lead's runs read theirs. Raises DataError where that cannot be."""
    if not file.exists():
        raise DataError("no such file", file=str(file), key=flag, todo="name a file of rows")
    return RowSet(file.name, open_file(tuned, file, known, reporter), "test")


def open_validation(name: str, opened: OpenedRun, tuned: Tuned, reporter: Reporter) -> RowSet:
    """The validation rows of a run."""
    return RowSet(f"validation rows of {name}", open_evaluation(opened, tuned, "validation", reporter), "validation")


class Mixture:
    """A base in memory with all parts on it, whose weights can be changed between forwards.

    Args:
        tuned: The lead's card and base.
        parts: The adapters. Those whose new weight is no sum, or that adapt embeddings, are not mixed.
        tokenizer: Of the rows.
        reporter: Gets bars.

    Attributes:
        names: Of the parts that are mixed.
        weights: Of them, fp64.
    """

    def __init__(
        self, tuned: Tuned, parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, reporter: Reporter
    ) -> None:
        mixed = [part for part in parts if part.why_no_product is None and not part.embeddings]
        self._reporter, self._dtype = reporter, tuned.card.dtype
        self._objectives: dict[int, Objective] = {}
        self.names = [part.name for part in mixed]
        self.weights = torch.ones(len(mixed), dtype=torch.float64)
        self._engine_of_result: Callable[[Path], Engine] = lambda folder: self._load(tuned, tokenizer, folder)
        self._result = ADAPTER_NAME
        if not mixed:
            return
        self._result = _RESULT
        with tempfile.TemporaryDirectory(prefix="lorafit-") as place:
            one = Recipe(dict.fromkeys(self.names, 1.0))
            layers = {path: product for path, product, _ in compose_layers(mixed, one)}
            write_composed(Path(place), mixed, layers, patterns=True, note={})
            self._engine = self._load(tuned, tokenizer, Path(place))
        for path in layers:
            ranks = [part.layers[path].tensors["A"].shape[0] if path in part.layers else 0 for part in mixed]
            owner = torch.repeat_interleave(torch.tensor(ranks))
            module = self._engine.model.get_submodule(f"base_model.model.{path}.lora_A.{ADAPTER_NAME}")
            module.register_forward_hook(lambda _, __, out, owner=owner: self._scaled(out, owner))

    def _load(self, tuned: Tuned, tokenizer: PreTrainedTokenizerBase, adapter: Path) -> Engine:
        return replace(tuned, adapter=adapter).load(tokenizer, self._reporter)

    def _scaled(self, out: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return out.float() * self.weights.float().to(out.device)[owner.to(out.device)]  # in bf16 0.7 is 0.699

    def add_result(self, folder: Path) -> None:
        """The composed adapter, as it is written."""
        if self.names:
            self._engine.add_adapter(_RESULT, folder, self._reporter)
        else:
            self._engine = self._engine_of_result(folder)

    @contextlib.contextmanager
    def _at(self, weights: Mapping[str, float]) -> Iterator[None]:
        before = self.weights
        self.weights = torch.tensor([weights.get(name, 0.0) for name in self.names], dtype=torch.float64)
        try:
            with self._engine.using(ADAPTER_NAME):
                yield
        finally:
            self.weights = before

    def _objective(self, rows: RowSet) -> Objective:
        """Of the rows' task, proven on one of them; what it asks of the base is asked."""
        if id(rows.job) not in self._objectives:
            objective = build_objective(rows.job, self._engine.model, self._dtype)
            prove(rows.job, objective, rows.examples, self._reporter)
            if rows.job.task.reference_columns:
                with adapter_off(self._engine.model):
                    refer(rows.job, objective, (rows.split,), self._reporter)
            self._objectives[id(rows.job)] = objective
        return self._objectives[id(rows.job)]

    def score(
        self, rows: RowSet, weights: Mapping[str, float], started: Mapping[str, float], *, is_sum: bool
    ) -> Scored:
        """Loss of the base, of each adapter alone, of the exact sum and of the result.

        Args:
            rows: The rows.
            weights: Of the result.
            started: Weights before they were fitted; the same where they were not.
            is_sum: Whether the result is a sum, or near one.
        """
        objective = self._objective(rows)
        found: dict[str, list[RowScore]] = {}
        with evaluating(objective):
            with self._engine.using(None):
                found["the base"] = self._losses(rows, objective, "the base")
            for name in self.names:
                with self._at({name: 1.0}):
                    found[f"{name} alone"] = self._losses(rows, objective, name)
            sums = {"with the weights before": started} if started != weights else {}
            if is_sum and weights.keys() <= set(self.names):
                sums[_WHOLE_SUM] = weights
            for who, each in sums.items():
                with self._at(each):
                    found[who] = self._losses(rows, objective, who)
            with self._engine.using(self._result):
                result = self._losses(rows, objective, "the result")
        seed, loss = rows.job.recipe.seed, metrics.get("loss")
        return Scored(rows.name, {who: compare("loss", loss, one, result, seed=seed)[0] for who, one in found.items()})

    def _losses(self, rows: RowSet, objective: Objective, what: str) -> list[RowScore]:
        return score_examples(
            objective,
            rows.examples,
            micro_batch_tokens=_TOKENS,
            pad_id=rows.job.pad_id,
            reporter=self._reporter,
            what=f"scoring {what}",
        )

    def fit(self, rows: RowSet, started: Mapping[str, float]) -> Fitted:
        """The weights of least loss on the rows, from a start.

        Raises:
            DataError: The rows' task has no loss that is a sum over rows.
            NumericsError: The loss is not finite.
        """
        objective = self._objective(rows)
        if objective.task.pools:
            what = "the loss of this task depends on all rows at once, and has no gradient row by row"
            raise DataError(what, file=rows.name, key="--fit", todo="write the weights yourself")
        batches = cut_step(range(len(rows.examples)), rows.examples.lengths, _TOKENS)
        seen: list[tuple[float, list[float]]] = []

        def look(point: torch.Tensor) -> tuple[float, torch.Tensor]:
            self.weights = point.clone().requires_grad_()
            total, weight = 0.0, 0
            for members in batches:
                batch = objective.task.collate([[rows.examples[row]] for row in members], rows.job.pad_id)
                loss = objective(batch.to(objective.device))
                loss.loss_sum.backward()
                total, weight = total + float(loss.loss_sum.detach()), weight + loss.weight
            if not math.isfinite(total):
                todo = "start from smaller weights"
                raise NumericsError("the loss with these weights is not finite", key="--fit", todo=todo)
            assert self.weights.grad is not None
            seen.append((total / weight, point.tolist()))
            bar.advance(1, loss=total / weight)
            return total / weight, self.weights.grad / weight

        with (
            evaluating(objective),
            torch.enable_grad(),
            self._engine.using(ADAPTER_NAME),
            self._reporter.track(None, "fitting weights") as bar,
        ):
            start = torch.tensor([started[name] for name in self.names], dtype=torch.float64)
            minimise(look, start, tolerance=_GAIN_SEEN if self._dtype == "fp32" else _GAIN_SEEN_IN_HALF)
        after, best = min(seen)
        self.weights = torch.tensor(best, dtype=torch.float64)
        found = dict(zip(self.names, best, strict=True))
        return Fitted(rows.name, len(rows.examples), dict(started), found, seen[0][0], after, len(seen))
