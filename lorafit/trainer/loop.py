"""The one training loop. Read `fit` first; everything else in this file is a line of it.

    restore ─> fit: ┌─> finish_edge: evaluate, judge, save, look for a signal
                    └── take_step:   gradients, finite?, clip, optimizer, log

An *edge* is the state right after an optimizer step. Only edges are saved; an interrupted step is discarded.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from lorafit.contracts import Batch, JsonObject
from lorafit.data.batch import StepRows
from lorafit.data.packing import Cutter
from lorafit.errors import NumericsError, StoppedBySignal
from lorafit.ops.embedding_noise import with_noise
from lorafit.ops.process_memory import peak_memory_bytes, peak_reserved_bytes, release_memory
from lorafit.ops.rng import RngState, capture_rng, preserved_rng, restore_rng
from lorafit.plan import ResolvedPlan, Way
from lorafit.trainer.checkpoint import Checkpoint, CheckpointStore, Snapshot
from lorafit.trainer.executor import Executor, out_of_memory, trim_after
from lorafit.trainer.held_out import Cadence, HeldOut
from lorafit.trainer.journal import Journal
from lorafit.trainer.prefetch import StepFeed
from lorafit.trainer.signals import StopRequested, StopSignals
from lorafit.trainer.state import FitResult, TrainState, as_checkpoint_errors
from lorafit.trainer.step import (
    StepFigures,
    Update,
    accumulate_gradients,
    check_gradients,
    check_loss,
    check_metrics,
)
from lorafit.trainer.threaded_micro_batches import run_at_once
from lorafit.trainer.trials import is_over, note_trial, settle


@dataclass
class Trainer:
    """Trains one objective on fixed rows a step.

    Attributes:
        executor: Runs micro-batches through the objective, one after the other; joins the ranks.
        update: From the gradients of a step to new weights.
        step_rows: Rows of a step; a pure function.
        cutter: Makes micro-batches of them, under the attention and as many at once as the plan says for the step.
        cadence: When to evaluate, save and end.
        store: The run's checkpoints.
        snapshot: What a checkpoint holds, the plan among it: how each step is run.
        journal: Is told each step and each evaluation.
        held_out: Evaluation while training.
        embedding_noise: NEFTune's alpha; None: no noise.
        set_attention: Switches the model's, where the plan's ways differ in it.
        on_settled: Is told the plan once its first steps have shown what the others take, before the first of those.
        feed: Builds the next step's micro-batches while this one runs.
        signals: Those that ask to stop.
    """

    executor: Executor
    update: Update
    step_rows: StepRows
    cutter: Cutter
    cadence: Cadence
    store: CheckpointStore
    snapshot: Snapshot
    journal: Journal
    held_out: HeldOut | None = None
    set_attention: Callable[[str], None] = lambda name: None
    embedding_noise: float | None = None
    on_settled: Callable[[ResolvedPlan], None] = lambda plan: None
    feed: StepFeed[list[Batch]] = field(init=False)
    signals: StopSignals = field(init=False)
    _edge_rng: RngState = field(init=False)
    _saved_step: int | None = field(default=None, init=False)
    _way: Way | None = field(default=None, init=False)
    _runner: Executor = field(init=False)
    _running: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)

    def __post_init__(self) -> None:
        self.feed = StepFeed(self.build_micro_batches, self.cadence.total_steps)
        self.signals = StopSignals(self.journal.reporter.info)
        self._edge_rng, self._runner = capture_rng(), self.executor

    @property
    def plan(self) -> ResolvedPlan:
        """How each step is run, as far as that is settled."""
        return self.snapshot.resolved

    def restore(self, checkpoint: Checkpoint) -> TrainState:
        """Takes model, optimizer and random numbers to a checkpoint's edge, and the log and later checkpoints back.

        Raises:
            CheckpointError: A file of the checkpoint holds something else than a run saves.
        """
        state = checkpoint.state
        with as_checkpoint_errors(checkpoint.folder):
            self.snapshot.restore(checkpoint)
            restore_rng(state.rng[self.executor.rank % len(state.rng)])
        self._edge_rng, self._saved_step = capture_rng(), state.step
        if self.executor.rank == 0 and not self._is_complete(state):
            self.store.set_later_aside(state.step)
            self.store.note_best(state.best)
            self.journal.log.rewind(step=state.step, evaluated_step=state.evaluated_step)
        return state

    def fit(self, state: TrainState) -> FitResult:
        """Trains from `state` to the last step, or until patience runs out, and publishes the adapter.

        Raises:
            StoppedBySignal: The state at the last edge is saved.
            NumericsError: A loss or gradient was not finite, or fp16 overflowed for good; the last edge is saved.
            ResourceError: Memory or disk ran out.
        """
        was_complete = self._is_complete(state)
        if was_complete:
            self.journal.reporter.info(f"already complete: the run ended at step {state.step}")
        steps, device, resumed_step = self.cadence.total_steps, self.executor.device, state.step
        self.executor.objective.train()
        self._way = None
        if not was_complete:
            with self.signals, self.journal.tracking(steps, state.step, device), self.feed, self._running:
                try:
                    self._run_as_planned(max(1, state.step))  # an evaluation that is due belongs to that step
                    self._finish_edge(state)
                    while not state.is_complete(steps):
                        self._take_step(state)
                        self._finish_edge(state)
                except (StopRequested, NumericsError) as reason:
                    self._end_at_edge(state, reason)
        result = replace(
            FitResult.of_complete(state),
            was_complete=was_complete,
            peak_memory_bytes=peak_memory_bytes(device),
            peak_reserved_bytes=peak_reserved_bytes(device),
            live_tensors=self.journal.live_peak,
            resumed_step=resumed_step,
        )
        if self.executor.rank == 0:
            self.store.publish_adapter(result.adapter_step)
        self.executor.gather(None)  # the adapter is there for every rank
        return result

    def _take_step(self, state: TrainState) -> None:
        """One optimizer step and its line of the log. The state changes only behind the optimizer's."""
        self._run_as_planned(state.step + 1)
        for said in filter(None, (hook.news(state.step + 1) for hook in self.update.hooks)):
            self.journal.reporter.info(f"step {state.step + 1}: {said}")
        with self.journal.watching(self.executor.objective, self.update):
            began = time.perf_counter()
            step = state.step + 1
            epoch, rows = self.step_rows.rows(step)
            figures, batches, plan = self._compute_gradients(state, step, rows)
            with self.journal.profile.phase("optimizer"):
                norm = self.update.gradient_norm()
                grad_norm = self._checked_norm(state, step, norm, batches)
                learning_rate = self.update.apply(step, norm, state.plateau.factor)
            self.update.optimizer.zero_grad(set_to_none=True)
            trim_after(time.perf_counter() - began, self.executor.device)

            seconds = time.perf_counter() - began
            state.step, state.epoch = step, epoch
            state.tokens += figures.tokens
            state.padded_tokens += figures.padded_tokens
            state.trained_tokens += figures.trained_tokens
            state.seconds += seconds
            self._take_plan(plan, step)
            line = {
                "step": step,
                "epoch": epoch,
                "loss": figures.loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                "tokens": figures.tokens,
                "trained_tokens": figures.trained_tokens,
                "seconds": seconds,
            }
            if self.executor.rank == 0:
                self.journal.write(line)
        self.journal.show(line)

    def _run_as_planned(self, step: int) -> None:
        """Attention and executor of the step."""
        way = self.plan.way(step)
        if way != self._way:
            self._running.close()
            self._runner = self._running.enter_context(run_at_once(self.executor, way.micro_batches_at_once))
            self.set_attention(way.attention)
            self._way = way

    def _take_plan(self, plan: ResolvedPlan, step: int) -> None:
        """Keeps what a tried step took, and settles the plan behind the last of them: rank 0's clock decides."""
        if is_over(plan, step):
            plan = settle(plan, self.cutter, self.step_rows)
            plan = ResolvedPlan.from_json(self.executor.gather(plan.to_json())[0])
            self.on_settled(plan)
            self.feed.forget()
        self.snapshot = replace(self.snapshot, resolved=plan)

    def _compute_gradients(
        self, state: TrainState, step: int, rows: Sequence[int]
    ) -> tuple[StepFigures, list[Batch], ResolvedPlan]:
        """Gradients of the step's rows, over micro-batches and ranks; with smaller micro-batches if memory runs out.

        Returns:
            Figures, this rank's micro-batches, and the plan with what they took, where the step is a trial.
        """
        planned = self.plan.way(step).micro_batch_tokens
        while True:
            budget = state.token_budget(planned)
            with self.journal.profile.phase("data"):
                batches = self.feed.take(step, budget)
            for hook in self.update.hooks:
                hook.before_step(step)
            try:
                began = time.perf_counter()
                figures, sums = accumulate_gradients(
                    self._runner, batches, self._check_signals_of_this_rank, self.update.hooks
                )
                seconds = time.perf_counter() - began
            except MemoryError:
                self._halve(state, budget, max(int(self.cutter.examples.lengths[row]) for row in rows))
                continue
            check_loss(step, figures, sums, batches, self.cutter.examples)
            self.executor.sum_gradients()
            if self.plan.is_settled:
                return figures, batches, self.plan
            cutter = self._cutter(step)
            span = cutter.span_tokens(cutter.cut(rows, planned))
            return figures, batches, note_trial(self.plan, step, seconds if budget == planned else None, span)

    def _checked_norm(self, state: TrainState, step: int, norm: torch.Tensor, batches: Sequence[Batch]) -> float:
        """The gradient norm's value, read once; not finite only where fp16 overflowed: the update will be skipped."""
        value, scaler = float(norm), self.executor.scaler
        is_overflow = scaler.is_enabled() and not math.isfinite(value)
        if not is_overflow:
            check_gradients(step, value, self.update.named, batches, self.cutter.examples)
        state.count_overflow(is_overflow, step, scaler.get_scale() if is_overflow else 1.0)  # the host waits for it
        return value

    def build_micro_batches(self, step: int, token_budget: int) -> list[Batch]:
        """This rank's micro-batches of a step, in the host's memory; a pure function."""
        cutter = self._cutter(step)
        cut = cutter.cut(self.step_rows.rows(step)[1], token_budget)
        batches = [cutter.collate(part) for part in cutter.of_rank(cut, self.executor.rank)]
        if self.embedding_noise is not None:
            batches = [with_noise(batch, self.embedding_noise) for batch in batches]
        return [batch.pinned() for batch in batches] if self.executor.device.type == "cuda" else batches

    def _cutter(self, step: int) -> Cutter:
        way = self.plan.way(step)
        return replace(self.cutter, attention=way.attention, at_once=way.micro_batches_at_once)

    def _halve(self, state: TrainState, budget: int, longest: int) -> None:
        """Halves the token budget and goes back to the edge; every rank does, whichever ran out of memory.

        Raises:
            ResourceError: Nothing is left to halve.
        """
        problem = out_of_memory(f"at step {state.step + 1}", longest, budget)
        self.update.optimizer.zero_grad(set_to_none=True)
        release_memory(self.executor.device)
        if budget <= longest:
            raise problem
        restore_rng(self._edge_rng)
        state.lower_token_budget(budget // 2)
        self.journal.reporter.warn(f"{problem}; going on with {budget // 2}, the step is repeated")

    def _finish_edge(self, state: TrainState) -> None:
        """Evaluates and saves what is due behind the last step, then looks for a signal."""
        self._edge_rng = capture_rng()
        held_out = self._evaluation_due(state)
        is_best = held_out is not None and self._evaluate(state, held_out)
        is_due = state.step % self.cadence.save_every_steps == 0 or state.is_complete(self.cadence.total_steps)
        if is_best or (is_due and self._saved_step != state.step):
            self._save(state)
        self._check_signals_of_all_ranks()

    def _evaluation_due(self, state: TrainState) -> HeldOut | None:
        every_steps = self.cadence.evaluate_every_steps
        if every_steps is None or state.evaluated_step >= state.step:
            return None
        is_due = state.step % every_steps == 0 or state.step >= self.cadence.total_steps
        return self.held_out if is_due else None

    def _is_complete(self, state: TrainState) -> bool:
        return state.is_complete(self.cadence.total_steps) and self._evaluation_due(state) is None

    def _evaluate(self, state: TrainState, held_out: HeldOut) -> bool:
        """Writes the held-out metrics down; returns whether they are the best so far. Leaves the training as it was."""
        alone = self.executor.ranks == 1  # several ranks stop together, at the edge
        with preserved_rng(), self.signals.interrupting() if alone else contextlib.nullcontext():
            values = held_out.evaluate()
        self.executor.objective.train()
        check_metrics(state.step, values)
        state.evaluated_step = state.step
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.journal.reporter.info(f"step {state.step}: held-out {shown}")
        verdict = held_out.judge(state, values, self.cadence, self.journal.reporter)
        line: JsonObject = {"step": state.step, "evaluation": values}
        if verdict.rate_falls:
            line["rate_factor"] = state.plateau.factor
        if verdict.goes_back and state.best is not None:
            line["went_back_to"] = state.best.step
            self._go_back_to(state.best.step)
        if self.executor.rank == 0:
            self.journal.write(line)
        return verdict.is_best

    def _go_back_to(self, step: int) -> None:
        """Takes weights and optimizer of a checkpoint; steps, rows and random numbers go on as they would have."""
        checkpoint = self.store.read(step)
        with as_checkpoint_errors(checkpoint.folder):
            self.snapshot.restore_weights(checkpoint)
        self.journal.reporter.info(f"going on from the weights and the optimizer of step {step}")

    def _save(self, state: TrainState) -> None:
        """Publishes the checkpoint of the last edge, all ranks' random numbers in it."""
        state.rng = self.executor.gather(self._edge_rng)
        if self.executor.rank == 0:
            self.journal.log.sync()
            self.store.save(state.step, lambda folder: self.snapshot.write(folder, state), best=state.best)
        self._saved_step = state.step
        self.executor.gather(None)  # no rank goes on before it is there

    def _end_at_edge(self, state: TrainState, reason: StopRequested | NumericsError) -> None:
        """Drops the step in progress, saves the edge before it and raises what the user is told."""
        self.update.optimizer.zero_grad(set_to_none=True)
        restore_rng(self._edge_rng)
        if self._saved_step != state.step:
            self._save(state)
        if isinstance(reason, NumericsError):
            raise reason
        name = signal.Signals(reason.number).name
        raise StoppedBySignal(f"stopped by {name}: saved step {state.step}", signal_number=reason.number) from None

    def _check_signals_of_this_rank(self) -> None:
        """After a micro-batch; with several ranks only at the edge, where all of them stop together."""
        if self.executor.ranks == 1:
            self.signals.check()

    def _check_signals_of_all_ranks(self) -> None:
        if any(self.executor.sum([self.signals.received or 0])):  # one sum, and not a gathering at every edge
            self.signals.received = max(self.executor.gather(self.signals.received or 0))
        self.signals.check()
