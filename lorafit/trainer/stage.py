"""A run's model, rows and device before step 1, for a rehearsal: after each try all is as it was before."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from lorafit.contracts import JsonObject
from lorafit.data.packing import Cutter
from lorafit.model.attention import register_fused_attention, set_attention
from lorafit.ops.isolation import in_mode
from lorafit.ops.process_memory import is_out_of_memory
from lorafit.trainer.executor import time_micro_batches
from lorafit.trainer.out_of_memory import release_memory, trim_after
from lorafit.trainer.startup_proofs import prove_separation
from lorafit.trainer.threaded_micro_batches import may_run_in_threads, run_at_once

if TYPE_CHECKING:
    from lorafit.contracts import Batch, Examples, Reporter
    from lorafit.data.batch import StepRows
    from lorafit.objective import Objective
    from lorafit.plan import ResolvedPlan
    from lorafit.trainer.executor import Executor

_SAMPLED_STEPS = 4  # what a candidate would need for the first ones is compared
_TIMED_STEPS = 3  # a candidate; the first sets threads and caches up, the best of the others counts


@dataclass
class Stage:
    """What candidates are tried on.

    Attributes:
        executor: Runs micro-batches one by one.
        validation: Rows that are scored while training; None: none.
        set_checkpointing: Turns gradient checkpointing of the model on or off.
        fits: Whether so many tokens a micro-batch, with or without checkpointing and under an attention, fit by the
            estimate.
        optimizer_bytes: State that the optimizer will allocate at its first step; held while the heaviest batch runs.
        packing: Whether several documents share a row; proven for every attention that is set.
        one_by_one: One micro-batch at a time, whatever is faster.
        attention: Implementation that the model has been given last.
        measured: Figures to keep with the plan: tokens a second by candidate, peak bytes, seconds.
    """

    executor: Executor
    examples: Examples
    validation: Examples | None
    step_rows: StepRows
    pad_id: int
    reporter: Reporter
    set_checkpointing: Callable[[bool], None]
    fits: Callable[[int, bool, str], bool] = lambda tokens, checkpointing, attention: True
    optimizer_bytes: int = 0
    packing: bool = False
    one_by_one: bool = False
    attention: str = field(default="sdpa", init=False)
    measured: JsonObject = field(default_factory=dict)
    _untimed_steps: Iterator[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._untimed_steps = (self.step_rows.rows(step)[1] for step in itertools.count(1))

    @property
    def objective(self) -> Objective:
        """Model and loss."""
        return self.executor.objective

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.executor.device

    @property
    def cutter(self) -> Cutter:
        """Makes micro-batches as the run would under the attention that is set."""
        return Cutter(self.examples, self.objective.task, self.pad_id, self.packing, self.attention)

    def shortest_batch(self) -> Batch:
        """The shortest row of the first step, alone."""
        row = min(self.step_rows.rows(1)[1], key=lambda row: int(self.examples.lengths[row]))
        return self.objective.batch_of(self.examples[row], self.pad_id)

    def may_run_at_once(self, checkpointing: bool) -> bool:
        """Whether several micro-batches may run at once in threads."""
        return not self.one_by_one and may_run_in_threads(
            self.executor, self.shortest_batch(), checkpointing=checkpointing
        )

    def set_attention(self, name: str) -> None:
        """Changes the attention implementation of the loaded model.

        Raises:
            NumericsError: Packing is asked for, and documents in a row see each other under this implementation.
        """
        register_fused_attention()
        set_attention(self.objective.base, name)
        self.attention = name
        if self.packing:
            rows = [self.examples[row] for row in (0, min(1, len(self.examples) - 1))]
            prove_separation(self.objective, rows, self.pad_id, one_row=self.cutter.one_row)

    def apply(self, choice: ResolvedPlan) -> None:
        """Makes the model run as chosen."""
        self.set_attention(choice.attention)
        self.set_checkpointing(choice.gradient_checkpointing)

    @contextlib.contextmanager
    def rolled_back(self) -> Iterator[None]:
        """Gradients are cleared at the end, random numbers and modes as before."""
        with in_mode(self.objective, training=self.objective.training):
            try:
                yield
            finally:
                self.clear()

    def clear(self) -> None:
        """Drops gradients, and gives back memory that nothing holds."""
        for parameter in self.executor.parameters:
            parameter.grad = None
        release_memory(self.device)

    def rate_if_it_fits(self, budget: int, at_once: int = 1) -> float | None:
        """`rate`; None where memory runs out."""
        try:
            return self.rate(budget, at_once)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self.clear()  # outside of the except block, whose traceback holds the activations
        return None

    def rate(self, budget: int, at_once: int = 1) -> float:
        """Real tokens a second of the first steps as this budget cuts them, told from the middle ones of some steps.

        What is not measured is how well a step fills all cores, and its padding: both are counted. Each micro-batch is
        new and timed once, as in the run: what has run before finds its products' shapes prepared.
        """
        cutter = replace(self.cutter, at_once=at_once)
        seconds_a_token: list[float] = []
        with run_at_once(self.executor, at_once) as executor:
            for rows in itertools.islice(self._untimed_steps, _TIMED_STEPS):
                parts = cutter.cut(rows, budget)
                first = max(0, (len(parts) - at_once) // 2)
                group = parts[first : first + at_once]
                seconds = time_micro_batches(executor, [cutter.collate(part) for part in group])
                seconds_a_token.append(seconds / cutter.span_tokens(group))
                trim_after(seconds, self.device)  # as behind a step of the run; a GPU keeps its blocks
        steps = [self.step_rows.rows(step)[1] for step in range(1, _SAMPLED_STEPS + 1)]
        tokens = sum(int(self.examples.lengths[row]) for rows in steps for row in rows)
        span_tokens = sum(cutter.span_tokens(cutter.cut(rows, budget)) for rows in steps)
        return tokens / (min(seconds_a_token[1:]) * span_tokens)
