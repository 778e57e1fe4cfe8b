"""A run's model, rows and device before step 1, for a rehearsal: after each try all is as it was before.

Tried are attention, how large micro-batches are, and how many run at once. Of attention implementations the fastest is
taken that computes on the loaded model what the others do:

candidate ─> packed documents kept apart? ─> logits of eager attention? ─> gradients of sdpa? ─> tokens a second

Of sizes of micro-batches, and on a CPU of their number at once, what gives the most tokens a second.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from lorafit.contracts import Batch, Examples, JsonObject, Reporter
from lorafit.data.batch import StepRows
from lorafit.data.packing import Cutter
from lorafit.errors import NumericsError
from lorafit.model.attention import FUSED_ATTENTION, set_attention, takes_fused_attention
from lorafit.objective import Objective, choose_probe
from lorafit.ops.isolation import in_mode
from lorafit.ops.logits_distance import ROUNDING, logits_distance
from lorafit.ops.process_memory import is_out_of_memory, release_memory
from lorafit.ops.rng import preserved_rng
from lorafit.plan import ResolvedPlan
from lorafit.trainer.executor import Executor, time_micro_batches, trim_after
from lorafit.trainer.startup_proofs import prove_separation
from lorafit.trainer.threaded_micro_batches import may_run_in_threads, run_at_once

_SAMPLED_STEPS = 4  # what a candidate would need for the first ones is compared
_TIMED_STEPS = 3  # a candidate; the first sets threads and caches up, the best of the others counts
_EAGER_PAYS = 1.1  # times the best other rate: less is not worth the scores that eager attention keeps
_PROBE_TOKENS = 128  # of the row, at most where there is one so short
CLOSE_ENOUGH = {"cpu": 0.95, "gpu": 0.97}  # of the best rate: the smaller budget is taken
_FIRST_BUDGET_TOKENS = 640  # below this, what every micro-batch costs outweighs its products
_MOST_CORE_TOKENS = 640  # on a CPU: beyond, products gain little and the other operations leave the caches


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
        ranks = self.executor.ranks
        return Cutter(self.examples, self.objective.task, self.pad_id, self.packing, self.attention, ranks=ranks)

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


def fastest_attention(stage: Stage, budget: int, checkpointing: bool) -> str:
    """The fastest candidate on one typical micro-batch; eager, which every model has, where none is left.

    Left out is what the model does not support, what gives other logits than eager attention, and, when packing,
    what lets documents of a row see each other. Eager keeps all scores: it is taken only where it is more than
    10 % faster than any other, and tried only where it fits by the estimate.
    """
    base = stage.objective.base
    if not base._can_set_attn_implementation():  # it computes its attention by itself: there is nothing to choose
        return str(base.config._attn_implementation)
    rates: dict[str, float] = {}
    expected = _logits(stage, "eager")
    for name in _open_candidates(stage, budget, checkpointing):
        try:
            stage.set_attention(name)
            if far := _disagreement(stage, name, expected):
                stage.reporter.warn(f"{name} attention is left out: {far}")
                continue
            rates[name] = stage.rate(budget)
        except (ValueError, ImportError):
            continue
        except NumericsError as error:
            stage.reporter.info(f"{name} attention is left out: {error.what}")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            stage.clear()
    stage.measured["attention_tokens_per_second"] = {name: round(rate, 1) for name, rate in rates.items()}
    return max(rates, key=lambda name: rates[name] / (_EAGER_PAYS if name == "eager" else 1.0), default="eager")


def _open_candidates(stage: Stage, budget: int, checkpointing: bool) -> list[str]:
    """Those that may serve this run. Eager holds all scores in memory, `fused` is made for CPUs and hands packed rows
    to sdpa, which is tried anyway: both are tried on a CPU only.
    """
    if stage.device.type == "cuda":
        from transformers.utils import is_flash_attn_2_available

        return ["sdpa", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]
    takes_fused = not stage.packing and takes_fused_attention(stage.objective.base)
    takes_eager = stage.fits(budget, checkpointing, "eager")
    return ["sdpa", *([FUSED_ATTENTION] if takes_fused else []), *(["eager"] if takes_eager else [])]


def _disagreement(stage: Stage, name: str, eager_logits: torch.Tensor) -> str:
    """How far an implementation is from its references, in words; empty where it is within rounding.

    Leaves the implementation and the mode that ran last.

    Args:
        stage: The run's.
        name: The implementation.
        eager_logits: `_logits(stage, "eager")`.
    """
    rounding = ROUNDING[stage.objective.autocast_dtype]
    distance = logits_distance(eager_logits, _logits(stage, name))
    if not distance <= rounding:
        return f"its logits are {distance:.2g} from eager's"
    if name != FUSED_ATTENTION:
        return ""
    expected, found = _gradients(stage, "sdpa"), _gradients(stage, name)  # `fused` differs in training mode only
    distance = float((found - expected).norm() / expected.norm())
    return "" if distance <= rounding else f"its gradients are {distance:.2g} from sdpa's"


@torch.no_grad()
def _logits(stage: Stage, name: str) -> torch.Tensor:
    """Of one row under an implementation, [labels, vocabulary], in eval mode."""
    set_attention(stage.objective.base, name)
    stage.objective.eval()
    return stage.objective.logits(_probe(stage))


def _gradients(stage: Stage, name: str) -> torch.Tensor:
    """Of the row's loss in training mode, all behind each other, fp64; dropout is drawn alike each time."""
    set_attention(stage.objective.base, name)
    stage.objective.train()
    with preserved_rng():
        stage.objective(_probe(stage)).loss_sum.backward()
    trained = [parameter for parameter in stage.objective.parameters() if parameter.grad is not None]
    gradients = torch.cat([parameter.grad.flatten().double() for parameter in trained])  # type: ignore[union-attr]
    for parameter in trained:
        parameter.grad = None
    return gradients


def _probe(stage: Stage) -> Batch:
    row = choose_probe(stage.examples.lengths, most_tokens=_PROBE_TOKENS)
    return stage.objective.batch_of(stage.examples[row], stage.pad_id)


def fastest_number(stage: Stage, least: int, most: int, checkpointing: bool) -> tuple[int, dict[int, float]]:
    """A micro-batch a core, as many as the step has and memory holds; or one at a time on all cores.

    Args:
        stage: The run's.
        least: Padded tokens that one micro-batch has at least.
        most: Those of a whole step.
        checkpointing: Whether it is on.

    Returns:
        How many, and what is known of it: tokens a second by budget.
    """
    at_once = min(torch.get_num_threads(), most // least)
    if at_once > 1 and not stage.may_run_at_once(checkpointing):
        at_once = 1
    budget = max(least, min(most // max(at_once, 1), _FIRST_BUDGET_TOKENS))
    while at_once > 1 and not stage.fits(budget * at_once, checkpointing, stage.attention):
        at_once -= 1
    if at_once <= 1:
        return 1, {}
    tried = {number: stage.rate_if_it_fits(budget, number) for number in (1, at_once)}
    rates = {number: rate for number, rate in tried.items() if rate is not None}
    stage.measured["at_once_tokens_per_second"] = {str(number): round(rate, 1) for number, rate in rates.items()}
    fastest = max(rates, key=lambda number: rates[number], default=1)
    return fastest, {budget: rates[fastest]} if rates else {}


def fastest_budget(
    stage: Stage, least: int, most: int, checkpointing: bool, until: float, at_once: int, known: dict[int, float]
) -> int:
    """Doubles the budget while that pays; the smallest that is close enough to the fastest.

    It begins at a size that is never far from the best, so that a machine too slow to try more is not left with
    the smallest.

    Args:
        stage: The run's.
        least: The smallest budget.
        most: The largest.
        checkpointing: Whether it is on.
        until: No further candidate is begun after this reading of `time.perf_counter`.
        at_once: Micro-batches at a time.
        known: Tokens a second of budgets that were measured before.
    """
    rates: dict[int, float] = {}
    close_enough = CLOSE_ENOUGH["cpu" if stage.device.type == "cpu" else "gpu"]
    if stage.device.type == "cpu":
        cores = torch.get_num_threads() if at_once == 1 else 1  # a micro-batch
        most = min(most // at_once, max(least, _MOST_CORE_TOKENS * cores))
    budget = max(least, min(most, _FIRST_BUDGET_TOKENS))
    while budget > least and not stage.fits(budget * at_once, checkpointing, stage.attention):
        budget = max(least, budget // 2)
    first = budget
    while budget <= most and stage.fits(budget * at_once, checkpointing, stage.attention):
        best = max(rates.values(), default=0.0)
        rate = known.get(budget) or stage.rate_if_it_fits(budget, at_once)
        if rate is None:
            break
        rates[budget] = rate
        if rates[budget] * close_enough < best or budget == most or time.perf_counter() > until:
            break
        budget = min(2 * budget, most)
    stage.measured["budget_tokens_per_second"] = {str(b): round(rate, 1) for b, rate in rates.items()}
    return next((b for b, rate in rates.items() if rate >= close_enough * max(rates.values())), first)
