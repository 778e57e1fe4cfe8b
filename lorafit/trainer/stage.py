"""A run's model, rows and device before step 1, for a rehearsal: after each try all is as it was before.

What a step may be run with is told here; which of it is fastest the first steps show (`lorafit.trainer.trials`).
Of attention implementations those may serve that compute on the loaded model what the others do:

candidate ─> packed documents kept apart? ─> logits of eager attention? ─> gradients of sdpa?
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from lorafit.contracts import Batch, Example, Examples, JsonObject, Reporter
from lorafit.data.batch import StepRows
from lorafit.data.packing import Cutter
from lorafit.errors import NumericsError
from lorafit.model.attention import FUSED_ATTENTION, set_attention, takes_fused_attention, takes_varlen_attention
from lorafit.objective import Objective, choose_probe
from lorafit.ops.attention_kernels import VARLEN
from lorafit.ops.isolation import in_mode
from lorafit.ops.logits_distance import ROUNDING, logits_distance
from lorafit.ops.process_memory import is_out_of_memory, release_memory
from lorafit.ops.recomputed_layers import Checkpointing
from lorafit.ops.rng import preserved_rng
from lorafit.plan import Plan, ResolvedPlan, Way
from lorafit.trainer.executor import Executor
from lorafit.trainer.startup_proofs import prove_separation
from lorafit.trainer.threaded_micro_batches import may_run_in_threads

_Rows = list[list[Example]]
_PROBE_TOKENS = 128  # of the row, at most where there is one so short
_NORM_NUMBERS = 2**20  # in fp64 at once
_FIRST_BUDGET_TOKENS = {"cpu": 640, "gpu": 2560}  # below, what every micro-batch costs outweighs its products
_MOST_CORE_TOKENS = 640  # on a CPU: beyond, products gain little and the other operations leave the caches


@dataclass
class Stage:
    """What candidates are tried on.

    Attributes:
        executor: Runs micro-batches one by one.
        validation: Rows that are scored while training; None: none.
        set_checkpointing: Sets which layers of the model are recomputed.
        keep_unpacked: Makes dequantised copies of adapted 4-bit weights, or lets go of them.
        fits: Whether so many tokens a micro-batch, with such checkpointing and under an attention, fit by the estimate.
        kept_bytes: State of optimizer and step hooks from the first step on; held while the heaviest batch runs.
        packing: Whether several documents share a row; None: under attention that is made for it. Proven for every
            attention that is set.
        takes_varlen: Whether card, dtype and model have a kernel for `varlen` attention.
        one_by_one: One micro-batch at a time, whatever is faster.
        attention: Implementation that the model has been given last.
        measured: Figures to keep with the plan: peak bytes, seconds.
    """

    executor: Executor
    examples: Examples
    validation: Examples | None
    step_rows: StepRows
    pad_id: int
    reporter: Reporter
    set_checkpointing: Callable[[Checkpointing], None]
    keep_unpacked: Callable[[bool], object] = lambda wanted: None
    fits: Callable[[int, Checkpointing, str], bool] = lambda tokens, checkpointing, attention: True
    kept_bytes: int = 0
    packing: bool | None = False
    takes_varlen: bool = False
    one_by_one: bool = False
    attention: str = field(default="sdpa", init=False)
    measured: JsonObject = field(default_factory=dict)
    _masks_documents: dict[str, bool] = field(default_factory=dict, init=False)

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

    def may_run_at_once(self, checkpointing: Checkpointing) -> bool:
        """Whether several micro-batches may run at once in threads."""
        return not self.one_by_one and may_run_in_threads(
            self.executor, self.shortest_batch(), checkpointing=bool(checkpointing)
        )

    def set_attention(self, name: str) -> None:
        """Changes the attention implementation of the loaded model; for the first time it is proven to pack.

        Raises:
            NumericsError: Packing is asked for, and documents in a row see each other under this implementation.
        """
        set_attention(self.objective.base, name)
        self.attention = name
        if not self.cutter.packs:
            return
        if name not in self._masks_documents:
            rows = [self.examples[row] for row in (0, min(1, len(self.examples) - 1))]
            prove_separation(self.objective, rows, self.pad_id, one_row=self.cutter.one_row)
            self._masks_documents[name] = self.objective.masks_documents
        self.objective.masks_documents = self._masks_documents[name]

    def apply(self, choice: ResolvedPlan) -> None:
        """Makes the model run as chosen; every attention that the run takes is proven to pack, the first step's last.

        Raises:
            NumericsError: One of them cannot pack.
        """
        for way in reversed(choice.ways):
            self.set_attention(way.attention)
        self.objective.loss_chunk_bytes = choice.loss_chunk_bytes
        self.set_checkpointing(choice.gradient_checkpointing)
        self.keep_unpacked(choice.keeps_unpacked)

    def runs_out(self, run: Callable[[], None]) -> bool:
        """Runs something on every rank; whether memory ran out on one of them, so that all of them know."""
        ran_out = False
        try:
            run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        # Outside of the except block, whose traceback holds the activations.
        return any(self.executor.sum([float(ran_out)]))

    def agreed(self, choice: ResolvedPlan | None) -> ResolvedPlan | None:
        """Rank 0's, on every rank: each has looked at its own memory."""
        if self.executor.ranks == 1:
            return choice
        told = self.executor.gather(None if choice is None else choice.to_json())[0]
        return None if told is None else ResolvedPlan.from_json(told)

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


def right_attentions(stage: Stage, budget: int, checkpointing: Checkpointing) -> Iterator[str]:
    """Implementations that may serve the run, the one expected to be fastest first; each is proven when asked for.

    Left out is what the model does not support, what gives other logits than eager attention, and, when packing,
    what lets documents of a row see each other. Eager, which keeps all scores, is last, and only where it fits by the
    estimate or no other is left.
    """
    base = stage.objective.base
    if not base._can_set_attn_implementation():  # it computes its attention by itself: there is nothing to choose
        yield str(base.config._attn_implementation)
        return
    expected, found = _logits(stage, "eager", [[_probe(stage)]]), False
    for name in _open_candidates(stage, budget, checkpointing):
        ran_out = False
        try:
            stage.set_attention(name)
            if name != "eager" and (far := _disagreement(stage, name, expected)):
                stage.reporter.warn(f"{name} attention is left out: {far}")
                continue
        except (ValueError, ImportError):
            continue
        except NumericsError as error:
            stage.reporter.info(f"{name} attention is left out: {error.what}")
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        if ran_out:
            stage.clear()  # outside of the except block, whose traceback holds the activations
            continue
        found = True
        yield name
    if not found:
        yield "eager"


def _open_candidates(stage: Stage, budget: int, checkpointing: Checkpointing) -> list[str]:
    """Those that may serve this run. Eager holds all scores in memory, `fused` is made for CPUs and hands packed rows
    to sdpa, which is tried anyway: both are tried on a CPU only.
    """
    if stage.device.type == "cuda":
        from transformers.utils import is_flash_attn_2_available

        flash = ["flash_attention_2"] if is_flash_attn_2_available() else []
        may_pack = stage.takes_varlen and stage.packing is not False
        varlen = [VARLEN] if may_pack and takes_varlen_attention(stage.objective.base) else []
        return [*varlen, *flash, "sdpa"] if stage.packing else [*varlen, "sdpa", *flash]
    takes_fused = not stage.packing and takes_fused_attention(stage.objective.base)
    takes_eager = stage.fits(budget, checkpointing, "eager")
    return [*([FUSED_ATTENTION] if takes_fused else []), "sdpa", *(["eager"] if takes_eager else [])]


def _disagreement(stage: Stage, name: str, eager_logits: torch.Tensor) -> str:
    """How far an implementation is from its references, in words; empty where it is within rounding.

    Leaves the implementation and the mode that ran last.

    Args:
        stage: The run's.
        name: The implementation.
        eager_logits: `_logits(stage, "eager", ...)` of the probe alone.
    """
    rounding, row = ROUNDING[stage.objective.autocast_dtype], [_probe(stage)]
    twice = 2 if stage.cutter.one_row else 1
    alone, together = [row] * twice, [row * twice]
    unit = stage.objective.task.logits_unit
    distance = logits_distance(eager_logits.repeat(twice, 1), _logits(stage, name, together), unit)
    if not distance <= rounding:
        return f"its logits are {distance:.2g} from eager's"
    if name not in (FUSED_ATTENTION, VARLEN):
        return ""
    # `fused` differs in training mode only; dropout would be drawn otherwise for other shapes
    training = name == FUSED_ATTENTION
    try:
        _add_gradients(stage, "sdpa", alone, 1.0, training=training)
        expected = _norm_of_gradients(stage)
        _add_gradients(stage, name, together, -1.0, training=training)
        distance = _norm_of_gradients(stage) / expected if expected else math.nan
    finally:
        for parameter in stage.objective.parameters():
            parameter.grad = None
    return "" if distance <= rounding else f"its gradients are {distance:.2g} from sdpa's"


@torch.no_grad()
def _logits(stage: Stage, name: str, rows: _Rows) -> torch.Tensor:
    """Of a micro-batch under an implementation, [labels, vocabulary], in eval mode."""
    set_attention(stage.objective.base, name)
    stage.objective.eval()
    return stage.objective.logits(_collate(stage, rows))


def _add_gradients(stage: Stage, name: str, rows: _Rows, sign: float, *, training: bool) -> None:
    """Of a micro-batch's loss, to those that are there: where all is trained, a second set would be as large as the
    model. Dropout is drawn alike each time.
    """
    set_attention(stage.objective.base, name)
    stage.objective.train(training)
    with preserved_rng():
        (sign * stage.objective(_collate(stage, rows)).loss_sum).backward()


def _norm_of_gradients(stage: Stage) -> float:
    """Of all that are there, summed in fp64, few numbers at once."""
    found = (parameter.grad for parameter in stage.objective.parameters() if parameter.grad is not None)
    parts = (part.double() for gradient in found for part in torch.split(gradient.flatten(), _NORM_NUMBERS))
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


def _probe(stage: Stage) -> Example:
    return stage.examples[choose_probe(stage.examples.lengths, most_tokens=_PROBE_TOKENS)]


def _collate(stage: Stage, rows: _Rows) -> Batch:
    return stage.objective.task.collate(rows, stage.pad_id).to(stage.objective.device)


def open_ways(stage: Stage, plan: Plan, attentions: Iterator[str], checkpointing: Checkpointing) -> Iterator[Way]:
    """What the steps may be run with: first a way that is never far from the best, then what may gain the most.

        on a CPU of several cores    a micro-batch a core ─> one on all, large ─> other attentions ─> one on all, small
        elsewhere                    a usual budget ─> twice that ─> other attentions ─> four times that, ...

    Args:
        stage: The run's.
        plan: With the bounds.
        attentions: `right_attentions`, or the one that the recipe names.
        checkpointing: Which layers are recomputed.
    """
    attention = next(attentions)
    stage.set_attention(attention)
    if plan.micro_batch_tokens is not None:
        yield from (Way(name, plan.micro_batch_tokens) for name in chain([attention], attentions))
        return
    least, most = plan.min_micro_batch_tokens, plan.max_micro_batch_tokens
    on_cpu, cores = stage.device.type == "cpu", torch.get_num_threads()
    usual = _FIRST_BUDGET_TOKENS["cpu" if on_cpu else "gpu"]
    at_once = min(cores, most // least) if on_cpu else 1
    if at_once > 1 and not stage.may_run_at_once(checkpointing):
        at_once = 1
    while at_once > 1 and not stage.fits(_between(least, usual, most // at_once) * at_once, checkpointing, attention):
        at_once -= 1
    most_alone = min(most, max(least, _MOST_CORE_TOKENS * cores)) if on_cpu else most
    alone = [_between(least, usual, most_alone)]
    while alone[0] > least and not stage.fits(alone[0], checkpointing, attention):
        alone[0] = max(least, alone[0] // 2)
    while alone[-1] < most_alone:
        alone.append(min(2 * alone[-1], most_alone))
    first = Way(attention, alone[0])
    others = [Way(attention, tokens) for tokens in alone[1:]]
    if at_once > 1:
        first = Way(attention, _between(least, usual, most // at_once), at_once)
        others = [Way(attention, tokens) for tokens in dict.fromkeys((alone[-1], alone[0]))]
    yield first
    yield from (way for way in others[:1] if stage.fits(way.tokens_at_once, checkpointing, attention))
    for name in attentions:
        if stage.fits(first.tokens_at_once, checkpointing, name):
            yield replace(first, attention=name)
    yield from (way for way in others[1:] if stage.fits(way.tokens_at_once, checkpointing, attention))


def _between(least: int, wanted: int, most: int) -> int:
    return max(least, min(wanted, most))
