"""Before step 1: the run's real shapes, tried out, and everything as it was afterwards.

    what is open?   attention            each candidate on one typical micro-batch; the fastest is kept that gives the
                                         logits of eager attention and, when packing, keeps documents apart; eager,
                                         which keeps all scores, only where it is more than 10 % faster
                    micro_batch_tokens   doubled from one longest row while it pays; smallest within 3 % of the best
                                         (5 % on a CPU), on a CPU at most 640 tokens a core
                    at once              on a CPU a micro-batch a core, where that is faster than one on all cores
                    checkpointing        off, unless memory says otherwise
    always          the heaviest training micro-batches forward and backward, the heaviest evaluation micro-batch
                    forward

No optimizer step is taken, gradients are cleared, random numbers and modes are put back.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from lorafit.data.packing import Cutter
from lorafit.errors import NumericsError
from lorafit.model.attention import FUSED_ATTENTION, register_fused_attention, set_attention, takes_fused_attention
from lorafit.ops.memory_errors import is_out_of_memory
from lorafit.ops.peak_memory import peak_memory_bytes
from lorafit.ops.rng import preserved_rng
from lorafit.trainer.attention_probe import AttentionProbe
from lorafit.trainer.out_of_memory import out_of_memory, release_memory, trim_after
from lorafit.trainer.packing_isolation import prove_separation
from lorafit.trainer.threaded_micro_batches import abreast_of, threads_abreast, time_micro_batches
from lorafit.trainer.worst_case_batches import fill_rows, heaviest_shapes

if TYPE_CHECKING:
    from lorafit.contracts import Examples, Reporter
    from lorafit.data.batch import StepRows
    from lorafit.objective import Objective

CLOSE_ENOUGH = {"cpu": 0.95, "gpu": 0.97}  # of the best rate: the smaller budget is taken
_EAGER_PAYS = 1.1  # times the best other rate: less is not worth the scores that eager attention keeps
_FIRST_BUDGET_TOKENS = 640  # below this, what every micro-batch costs outweighs its products
_MOST_CORE_TOKENS = 640  # on a CPU: beyond, products gain little and the other operations leave the caches
_SAMPLED_STEPS = 4  # what a candidate would need for the first ones is compared
_MOST_SECONDS = 15.0  # no further candidate is begun after this
_TIMED_STEPS = 3  # a candidate; the first sets threads and caches up, the best of the others counts


@dataclass(frozen=True)
class Choice:
    """What a rehearsal settles, or is given."""

    micro_batch_tokens: int
    evaluation_micro_batch_tokens: int
    attention: str
    gradient_checkpointing: bool
    micro_batches_at_once: int = 1


@dataclass
class Rehearsal:
    """The stage: objective, rows and device.

    Attributes:
        objective: On its device; not wrapped.
        validation: Rows that are scored while training; None: none.
        set_checkpointing: Turns gradient checkpointing of the model on or off.
        fits: Whether so many tokens a micro-batch, with or without checkpointing and under an attention, fit by the
            estimate.
        optimizer_bytes: State that the optimizer will allocate at its first step; held while the heaviest batch runs.
        packing: Whether several documents share a row; proven for every attention that is set.
        ranks: Processes that train together.
        one_by_one: One micro-batch at a time, whatever is faster.
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
    fits: Callable[[int, bool, str], bool] = lambda tokens, checkpointing, attention: True
    optimizer_bytes: int = 0
    packing: bool = False
    ranks: int = 1
    one_by_one: bool = False
    measured: dict[str, Any] = field(default_factory=dict)
    _attention: str = field(default="sdpa", init=False)
    _untimed_steps: Iterator[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._untimed_steps = (self.step_rows.rows(step)[1] for step in itertools.count(1))

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
            NumericsError: Packing is asked for, and documents in a row see each other.
            ResourceError: Not even the smallest candidate fits into memory.
        """
        began = time.perf_counter()
        with self._rolled_back():
            budget = least_tokens if isinstance(micro_batch_tokens, str) else micro_batch_tokens
            checkpointing = gradient_checkpointing is True or (
                gradient_checkpointing == "auto"
                and not self.fits(budget, False, self._attention if attention == "auto" else attention)
            )
            self.set_checkpointing(checkpointing)
            self._warm_up(attention == "auto" or micro_batch_tokens == "auto")
            if attention == "auto":
                attention = self._fastest_attention(budget, checkpointing)
                self.reporter.info(f"rehearsal: {attention} attention is taken")
            self.set_attention(attention)
            at_once = 1
            if isinstance(micro_batch_tokens, str):
                until = began + _MOST_SECONDS
                at_once, rates = self._fastest_number(least_tokens, most_tokens, checkpointing)
                budget = self._fastest_budget(least_tokens, most_tokens, checkpointing, until, at_once, rates)
            choice = self._heaviest_that_fits(
                self._choice(budget, attention, checkpointing, at_once),
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
        """Changes the attention implementation of the loaded model.

        Raises:
            NumericsError: Packing is asked for, and documents in a row see each other under this implementation.
        """
        register_fused_attention()
        set_attention(self.objective.base, name)
        self._attention = name
        if self.packing:
            rows = [self.examples[row] for row in (0, min(1, len(self.examples) - 1))]
            prove_separation(self.objective, rows, self.pad_id, one_row=self._cutter.one_row)

    @property
    def _cutter(self) -> Cutter:
        return Cutter(self.examples, self.objective.task, self.pad_id, self.packing, self._attention)

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
            shortest = min(self.step_rows.rows(1)[1], key=lambda row: int(self.examples.lengths[row]))
            time_micro_batches(
                self.objective, [self.objective.task.collate([[self.examples[shortest]]], self.pad_id)], self.device
            )

    def _fastest_attention(self, budget: int, checkpointing: bool) -> str:
        """The fastest candidate on one typical micro-batch; eager, which every model has, where none is left.

        Left out is what the model does not support, what gives other logits than eager attention, and, when packing,
        what lets documents of a row see each other. Eager keeps all scores: it is taken only where it is more than
        10 % faster than any other, and tried only where it fits by the estimate.
        """
        base = self.objective.base
        if not base._can_set_attn_implementation():  # it computes its attention by itself: there is nothing to choose
            return str(base.config._attn_implementation)
        rates: dict[str, float] = {}
        probe = AttentionProbe(self.objective, self.examples, self.pad_id, self.device)
        expected = probe.logits("eager")
        for name in self._open_candidates(budget, checkpointing):
            try:
                self.set_attention(name)
                far = probe.disagreement(name, expected)
                if far:
                    self.reporter.warn(f"{name} attention is left out: {far}")
                    continue
                rates[name] = self._rate(budget)
            except (ValueError, ImportError):
                continue
            except NumericsError as error:
                self.reporter.info(f"{name} attention is left out: {error.what}")
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._clear()
        self.measured["attention_tokens_per_second"] = {name: round(rate, 1) for name, rate in rates.items()}
        return max(rates, key=lambda name: rates[name] / (_EAGER_PAYS if name == "eager" else 1.0), default="eager")

    def _open_candidates(self, budget: int, checkpointing: bool) -> list[str]:
        """Those of the device that may serve this run. `fused` hands packed rows to sdpa, which is tried anyway."""
        takes_fused = not self.packing and takes_fused_attention(self.objective.base)
        return [
            name
            for name in _attention_candidates(self.device)
            if (name != FUSED_ATTENTION or takes_fused) and (name != "eager" or self.fits(budget, checkpointing, name))
        ]

    def _fastest_number(self, least: int, most: int, checkpointing: bool) -> tuple[int, dict[int, float]]:
        """A micro-batch a core, as many as the step has and memory holds; or one at a time on all cores.

        Returns:
            How many, and what is known of it: tokens a second by budget.
        """
        at_once = threads_abreast(self.objective, self.device, self.ranks, checkpointing=checkpointing)
        at_once = 1 if self.one_by_one else at_once
        at_once = min(at_once, most // least)
        budget = max(least, min(most // max(at_once, 1), _FIRST_BUDGET_TOKENS))
        while at_once > 1 and not self.fits(budget * at_once, checkpointing, self._attention):
            at_once -= 1
        if at_once <= 1:
            return 1, {}
        tried = {number: self._rate_if_it_fits(budget, number) for number in (1, at_once)}
        rates = {number: rate for number, rate in tried.items() if rate is not None}
        self.measured["at_once_tokens_per_second"] = {str(number): round(rate, 1) for number, rate in rates.items()}
        fastest = max(rates, key=lambda number: rates[number], default=1)
        return fastest, {budget: rates[fastest]} if rates else {}

    def _fastest_budget(
        self, least: int, most: int, checkpointing: bool, until: float, at_once: int, known: dict[int, float]
    ) -> int:
        """Doubles the budget while that pays; the smallest that is close enough to the fastest.

        It begins at a size that is never far from the best, so that a machine too slow to try more is not left with
        the smallest.
        """
        rates: dict[int, float] = {}
        close_enough = CLOSE_ENOUGH["cpu" if self.device.type == "cpu" else "gpu"]
        if self.device.type == "cpu":
            cores = torch.get_num_threads() if at_once == 1 else 1  # a micro-batch
            most = min(most // at_once, max(least, _MOST_CORE_TOKENS * cores))
        budget = max(least, min(most, _FIRST_BUDGET_TOKENS))
        while budget > least and not self.fits(budget * at_once, checkpointing, self._attention):
            budget = max(least, budget // 2)
        first = budget
        while budget <= most and self.fits(budget * at_once, checkpointing, self._attention):
            best = max(rates.values(), default=0.0)
            rate = known.get(budget) or self._rate_if_it_fits(budget, at_once)
            if rate is None:
                break
            rates[budget] = rate
            if rates[budget] * close_enough < best or budget == most or time.perf_counter() > until:
                break
            budget = min(2 * budget, most)
        self.measured["budget_tokens_per_second"] = {str(b): round(rate, 1) for b, rate in rates.items()}
        return next((b for b, rate in rates.items() if rate >= close_enough * max(rates.values())), first)

    def _rate_if_it_fits(self, budget: int, at_once: int) -> float | None:
        """`_rate`; None where memory runs out."""
        try:
            return self._rate(budget, at_once)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._clear()  # outside of the except block, whose traceback holds the activations
        return None

    def _rate(self, budget: int, at_once: int = 1) -> float:
        """Real tokens a second of the first steps as this budget cuts them, told from the middle ones of some steps.

        What is not measured is how well a step fills all cores, and its padding: both are counted. Each micro-batch is
        new and timed once, as in the run: what has run before finds its products' shapes prepared.
        """
        cutter = replace(self._cutter, at_once=at_once)
        seconds_a_token: list[float] = []
        with abreast_of(self.objective, at_once) as abreast:
            for rows in itertools.islice(self._untimed_steps, _TIMED_STEPS):
                parts = cutter.cut(rows, budget)
                first = max(0, (len(parts) - at_once) // 2)
                group = parts[first : first + at_once]
                batches = [cutter.collate(part) for part in group]
                seconds = time_micro_batches(self.objective, batches, self.device, abreast)
                seconds_a_token.append(seconds / cutter.span_tokens(group))
                del batches
                trim_after(seconds, self.device)  # as behind a step of the run; a GPU keeps its blocks
        steps = [self.step_rows.rows(step)[1] for step in range(1, _SAMPLED_STEPS + 1)]
        tokens = sum(int(self.examples.lengths[row]) for rows in steps for row in rows)
        span_tokens = sum(cutter.span_tokens(cutter.cut(rows, budget)) for rows in steps)
        return tokens / (min(seconds_a_token[1:]) * span_tokens)

    def _heaviest_that_fits(self, choice: Choice, *, may_checkpoint: bool, may_shrink_to: int) -> Choice:
        """Halves the budget, then turns checkpointing on, until the heaviest micro-batches run."""
        while True:
            self._clear()  # what the candidates left would stand beside the heaviest
            try:
                self._try(choice)
                return choice
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = out_of_memory("before step 1", max(self.examples.lengths), choice.micro_batch_tokens)
            # Outside of the except block, whose traceback holds the activations.
            budget, checkpointing = choice.micro_batch_tokens, choice.gradient_checkpointing
            if choice.micro_batches_at_once > 1:
                choice = replace(choice, micro_batches_at_once=1)
            elif budget > may_shrink_to:
                budget = max(may_shrink_to, budget // 2)
                choice = self._choice(budget, choice.attention, checkpointing)
            elif may_checkpoint and not checkpointing:
                choice = replace(choice, gradient_checkpointing=True)
                self.set_checkpointing(True)
            else:
                raise problem

    def _choice(self, budget: int, attention: str, checkpointing: bool, at_once: int = 1) -> Choice:
        longest = max(self.validation.lengths, default=1) if self.validation is not None else 1
        return Choice(budget, max(budget, int(longest)), attention, checkpointing, at_once)

    def _try(self, choice: Choice) -> None:
        """The heaviest micro-batches of training and of evaluation, with the optimizer's state in memory."""
        ballast = torch.empty(
            self.optimizer_bytes if self.device.type == "cuda" else 0, dtype=torch.uint8, device=self.device
        )
        for rows, width in heaviest_shapes(
            self.examples.lengths, choice.micro_batch_tokens, self.step_rows.batch_size, one_row=self._cutter.one_row
        ):
            filled = fill_rows(self.objective.task, self.examples, rows, width, packing=self.packing)
            batches = [self.objective.task.collate(filled, self.pad_id)] * choice.micro_batches_at_once
            with abreast_of(self.objective, choice.micro_batches_at_once) as abreast:
                time_micro_batches(self.objective, batches, self.device, abreast)
        if self.validation is not None and len(self.validation):
            count = len(self.validation)
            for rows, width in heaviest_shapes(
                self.validation.lengths, choice.evaluation_micro_batch_tokens, count, one_row=False
            ):
                filled = fill_rows(self.objective.task, self.validation, rows, width, packing=False)
                batch = self.objective.task.collate(filled, self.pad_id)
                self.objective.eval()
                self.objective.score(batch.to(self.device))
                self.objective.train()
        del ballast
        self.measured["peak_memory_bytes"] = peak_memory_bytes(self.device)


def _attention_candidates(device: torch.device) -> list[str]:
    """Eager holds all scores in memory, `fused` is made for CPUs: both are tried on a CPU only."""
    if device.type != "cuda":
        return ["sdpa", FUSED_ATTENTION, "eager"]
    from transformers.utils import is_flash_attn_2_available

    return ["sdpa", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]
