"""Before step 1: the run's real shapes, tried out, and everything as it was afterwards.

    what is open?   attention            each candidate on one typical micro-batch, the fastest is kept
                    micro_batch_tokens   doubled from one longest row while it pays; smallest within 3 % of the best
                    checkpointing        off, unless memory says otherwise
    always          the heaviest training micro-batch forward and backward, the heaviest evaluation micro-batch forward

No optimizer step is taken, gradients are cleared, random numbers and modes are put back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lorafit.data.batch import collate, cut_step
from lorafit.ops.rng import preserved_rng
from lorafit.train.out_of_memory import is_out_of_memory, out_of_memory, release_memory
from lorafit.train.progress import peak_memory_bytes

if TYPE_CHECKING:
    from lorafit.contracts import Batch, Examples, Reporter
    from lorafit.data.batch import StepRows
    from lorafit.objective import Objective

CLOSE_ENOUGH = 0.97  # of the best rate: the smaller budget is taken
_FIRST_BUDGET_TOKENS = 256  # on a CPU, below this the weights' dequantisation outweighs the products
_SAMPLED_STEPS = 4  # typical micro-batches come from the rows of the first steps
_MOST_SECONDS = 12.0  # no further candidate is begun after this
_REPEATS_ON_GPU = 3


@dataclass(frozen=True)
class Choice:
    """What a rehearsal settles, or is given."""

    micro_batch_tokens: int
    evaluation_micro_batch_tokens: int
    attention: str
    gradient_checkpointing: bool


@dataclass
class Rehearsal:
    """The stage: objective, rows and device.

    Attributes:
        objective: On its device; not wrapped.
        validation: Rows that are scored while training; None: none.
        set_checkpointing: Turns gradient checkpointing of the model on or off.
        fits: Whether so many tokens a micro-batch, with or without checkpointing, fit by the estimate.
        optimizer_bytes: State that the optimizer will allocate at its first step; held while the heaviest batch runs.
        measured: Figures to keep with the plan: tokens a second by candidate, peak bytes, seconds.
    """

    objective: Objective
    examples: Examples
    validation: Examples | None
    step_rows: StepRows
    pad_id: int
    device: torch.device
    reporter: Reporter
    set_checkpointing: Callable[[bool], None]
    fits: Callable[[int, bool], bool] = lambda tokens, checkpointing: True
    optimizer_bytes: int = 0
    measured: dict[str, Any] = field(default_factory=dict)

    def choose(
        self,
        *,
        attention: str,
        gradient_checkpointing: bool | str,
        micro_batch_tokens: int | str,
        least_tokens: int,
        most_tokens: int,
    ) -> Choice:
        """Settles what is `auto`, then tries the heaviest micro-batches.

        Raises:
            ResourceError: Not even the smallest candidate fits into memory.
        """
        began = time.perf_counter()
        with self._rolled_back():
            budget = least_tokens if isinstance(micro_batch_tokens, str) else micro_batch_tokens
            checkpointing = gradient_checkpointing is True or (
                gradient_checkpointing == "auto" and not self.fits(budget, False)
            )
            self.set_checkpointing(checkpointing)
            self._warm_up(attention == "auto" or micro_batch_tokens == "auto")
            if attention == "auto":
                attention = self._fastest_attention(budget)
            self.set_attention(attention)
            if isinstance(micro_batch_tokens, str):
                budget = self._fastest_budget(least_tokens, most_tokens, checkpointing, began + _MOST_SECONDS)
            choice = self._heaviest_that_fits(
                budget,
                attention,
                checkpointing,
                may_checkpoint=gradient_checkpointing == "auto",
                may_shrink_to=least_tokens if micro_batch_tokens == "auto" else budget,
            )
        self.measured["seconds"] = round(time.perf_counter() - began, 3)
        return choice

    def try_heaviest(self, choice: Choice) -> None:
        """Runs the heaviest micro-batches of a choice that was made elsewhere. Raises ResourceError."""
        with self._rolled_back():
            self.apply(choice)
            self._try(choice)

    def apply(self, choice: Choice) -> None:
        """Makes the model run as chosen."""
        self.set_attention(choice.attention)
        self.set_checkpointing(choice.gradient_checkpointing)

    def set_attention(self, name: str) -> None:
        """Changes the attention implementation of the loaded model."""
        self.objective.base.set_attn_implementation(name)

    @contextlib.contextmanager
    def _rolled_back(self) -> Iterator[None]:
        was_training = self.objective.training
        try:
            with preserved_rng():
                yield
        finally:
            self._clear()
            self.objective.train(was_training)

    def _clear(self) -> None:
        for parameter in self.objective.parameters():
            parameter.grad = None
        release_memory(self.device)

    def _warm_up(self, will_measure: bool) -> None:
        """The first forward and backward pays for lazy set-up, which no candidate should."""
        if will_measure:
            shortest = min(self._sample(), key=lambda row: int(self.examples.lengths[row]))
            self._run(self._collate([shortest]))

    def _fastest_attention(self, budget: int) -> str:
        """Each candidate on one typical micro-batch; one that the model does not support is left out."""
        rates: dict[str, float] = {}
        for name in _attention_candidates(self.device):
            try:
                self.set_attention(name)
                rates[name] = self._rate(budget)
            except (ValueError, ImportError):
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._clear()
        self.measured["attention_tokens_per_second"] = {name: round(rate, 1) for name, rate in rates.items()}
        return max(rates, key=lambda name: rates[name], default="sdpa")

    def _fastest_budget(self, least: int, most: int, checkpointing: bool, until: float) -> int:
        """Doubles the budget while that pays; the smallest within 3 % of the fastest.

        It begins at a size that is never far from the best, so that a machine too slow to try more is not left with
        the smallest.
        """
        rates: dict[int, float] = {}
        budget = max(least, min(most, _FIRST_BUDGET_TOKENS))
        while budget > least and not self.fits(budget, checkpointing):
            budget = max(least, budget // 2)
        first = budget
        while budget <= most and self.fits(budget, checkpointing):
            try:
                rates[budget] = self._rate(budget)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._clear()
                break
            if rates[budget] < max(rates.values()) or time.perf_counter() > until:
                break
            if budget > first and rates[budget] * CLOSE_ENOUGH < rates[budget // 2]:
                break
            budget *= 2
        self.measured["budget_tokens_per_second"] = {str(b): round(rate, 1) for b, rate in rates.items()}
        return next((b for b, rate in rates.items() if rate >= CLOSE_ENOUGH * max(rates.values())), first)

    def _rate(self, budget: int) -> float:
        """Real tokens a second of the middle one of the micro-batches that the first steps are cut into."""
        cut = cut_step(self._sample(), self.examples.lengths, budget)
        batch = self._collate(cut[len(cut) // 2])
        repeats = _REPEATS_ON_GPU if self.device.type == "cuda" else 1
        return batch.tokens / min(self._run(batch) for _ in range(repeats))

    def _heaviest_that_fits(
        self, budget: int, attention: str, checkpointing: bool, *, may_checkpoint: bool, may_shrink_to: int
    ) -> Choice:
        """Halves the budget, then turns checkpointing on, until the heaviest micro-batches run."""
        while True:
            choice = self._choice(budget, attention, checkpointing)
            try:
                self._try(choice)
                return choice
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = out_of_memory("before step 1", max(self.examples.lengths), budget)
            self._clear()  # outside of the except block, whose traceback holds the activations
            if budget > may_shrink_to:
                budget = max(may_shrink_to, budget // 2)
            elif may_checkpoint and not checkpointing:
                checkpointing = True
                self.set_checkpointing(True)
            else:
                raise problem

    def _choice(self, budget: int, attention: str, checkpointing: bool) -> Choice:
        longest = max(self.validation.lengths, default=1) if self.validation is not None else 1
        return Choice(budget, max(budget, int(longest)), attention, checkpointing)

    def _try(self, choice: Choice) -> None:
        """The heaviest micro-batches of training and of evaluation, with the optimizer's state in memory."""
        ballast = torch.empty(
            self.optimizer_bytes if self.device.type == "cuda" else 0, dtype=torch.uint8, device=self.device
        )
        self._run(self._collate(_heaviest(self.examples, choice.micro_batch_tokens)))
        if self.validation is not None and len(self.validation):
            rows = _heaviest(self.validation, choice.evaluation_micro_batch_tokens)
            batch = collate([self.validation[row] for row in rows], self.pad_id)
            self.objective.eval()
            self.objective.score(batch.to(self.device))
            self.objective.train()
        del ballast
        self.measured["peak_memory_bytes"] = peak_memory_bytes(self.device)

    def _sample(self) -> list[int]:
        return [row for step in range(1, _SAMPLED_STEPS + 1) for row in self.step_rows.rows(step)[1]]

    def _collate(self, rows: Sequence[int]) -> Batch:
        return collate([self.examples[row] for row in rows], self.pad_id)

    def _run(self, batch: Batch) -> float:
        """Seconds of one forward and backward in training mode; the gradients are dropped."""
        self.objective.train()
        _wait(self.device)
        began = time.perf_counter()
        loss_sum, weight, _ = self.objective(batch.to(self.device))
        (loss_sum / max(1, weight)).backward()
        _wait(self.device)
        seconds = time.perf_counter() - began
        for parameter in self.objective.parameters():
            parameter.grad = None
        return seconds


def _heaviest(examples: Examples, budget: int) -> list[int]:
    """The longest rows, as many as the budget takes; at least one."""
    import numpy

    lengths = numpy.asarray(examples.lengths)
    longest = int(lengths.max())
    count = min(len(lengths), max(1, budget // longest))
    return [int(row) for row in numpy.argpartition(lengths, -count)[-count:]]


def _attention_candidates(device: torch.device) -> list[str]:
    """Eager holds all scores in memory: tried on a CPU only, where it is often the fastest for short rows."""
    if device.type != "cuda":
        return ["sdpa", "eager"]
    from transformers.utils import is_flash_attn_2_available

    return ["sdpa", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
