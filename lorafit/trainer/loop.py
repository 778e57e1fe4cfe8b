"""The one training loop. Read `fit` first; everything else in this file is a line of it.

    restore ─> fit: ┌─> finish_edge: evaluate, judge, save, look for a signal
                    └── take_step:   gradients, finite?, clip, optimizer, log

An edge is the state behind an optimizer step; only edges are saved. A step that is cut off never was.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafit.errors import NumericsError, StoppedBySignal
from lorafit.kinds.metrics import metrics
from lorafit.ops.live_tensors import LivePeak, LiveTensors, watching
from lorafit.ops.memory_errors import is_out_of_memory
from lorafit.ops.peak_memory import peak_memory_bytes
from lorafit.ops.rng import capture_rng, preserved_rng, restore_rng
from lorafit.trainer.checkpoint import ADAPTER_FOLDER, Checkpoint, CheckpointStore, Environment, write_state
from lorafit.trainer.metrics_log import MetricsLog
from lorafit.trainer.optimizer_state import load_optimizer, save_optimizer
from lorafit.trainer.out_of_memory import out_of_memory, release_memory, trim_after
from lorafit.trainer.prefetch import StepFeed
from lorafit.trainer.profile import NO_PROFILE, NoProfile
from lorafit.trainer.progress import StepProgress, peak_reserved_bytes
from lorafit.trainer.signals import StopRequested, StopSignals
from lorafit.trainer.state import FitResult, TrainState
from lorafit.trainer.step import (
    StepFigures,
    accumulate_gradients,
    check_gradients,
    check_loss,
    check_metrics,
    gradient_norm,
    sum_gradients,
    update_parameters,
)
from lorafit.trainer.threaded_micro_batches import Abreast
from lorafit.trainer.tracking import Trackers

if TYPE_CHECKING:
    from lorafit.contracts import Batch, Examples, Reporter, StepHook
    from lorafit.data.batch import StepRows
    from lorafit.data.packing import Cutter
    from lorafit.objective import Objective
    from lorafit.plan import Plan, ResolvedPlan
    from lorafit.recipe.schema import EarlyStoppingSection


class Trainer:
    """Trains one objective on fixed rows a step.

    Args:
        objective: Model and loss, on the accelerator's device; proven already.
        optimizer: Over the objective's trainable parameters.
        lr_at: Learning rate of a step, from 1; a pure function.
        step_rows: Rows of a step; a pure function.
        examples: The training rows.
        plan: Steps, evaluations, saves.
        resolved: Token budget and dtype; saved with each checkpoint.
        store: The run's checkpoints.
        accelerator: accelerate's, without mixed precision: autocast and loss scale are torch's own, here.
        cutter: Makes micro-batches of a step's rows.
        save_adapter: Writes the adapter in PEFT's layout into a folder.
        evaluate: Held-out metrics by name; None: no evaluation while training.
        early_stopping: Metric, patience and min_delta.
        max_grad_norm: Gradients are scaled down to this norm; None: no clipping.
        hooks: What a method does between steps.
        estimate_bytes: Estimated peak memory, shown beside the measured one.
        counts_memory: Live tensors are counted in every step, which makes each slower.
        profile: Times the parts of a step.
        resume_command: What goes on after a stop.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        lr_at: Callable[[int], float],
        step_rows: StepRows,
        examples: Examples,
        plan: Plan,
        resolved: ResolvedPlan,
        store: CheckpointStore,
        accelerator: Any,
        reporter: Reporter,
        *,
        cutter: Cutter,
        save_adapter: Callable[[Path], None],
        evaluate: Callable[[], dict[str, float]] | None = None,
        early_stopping: EarlyStoppingSection | None = None,
        max_grad_norm: float | None = 1.0,
        hooks: Sequence[StepHook] = (),
        estimate_bytes: int | None = None,
        counts_memory: bool = False,
        profile: NoProfile = NO_PROFILE,
        resume_command: str = "lorafit train RECIPE --resume",
    ) -> None:
        self.objective = accelerator.prepare(objective, device_placement=[False])
        self.optimizer, self.lr_at, self.step_rows, self.examples = optimizer, lr_at, step_rows, examples
        self.plan, self.resolved, self.store = plan, resolved, store
        self.accelerator, self.reporter = accelerator, reporter
        self.cutter, self.save_adapter, self.evaluate = cutter, save_adapter, evaluate
        self.early_stopping, self.max_grad_norm, self.hooks = early_stopping, max_grad_norm, hooks
        self.estimate_bytes, self.resume_command = estimate_bytes, resume_command
        self.counts_memory, self.profile = counts_memory, profile
        self.live_peak: LivePeak | None = None

        self.named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self.named]
        is_fp16 = objective.autocast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if is_fp16 else None
        self.log = MetricsLog(store.run.metrics, reporter, enabled=accelerator.is_main_process)
        self.environment = Environment.here(accelerator.device.type, accelerator.num_processes)
        self.trackers = Trackers(accelerator, reporter)
        self.signals = StopSignals(self.reporter.info)
        at_once = resolved.micro_batches_at_once
        self.abreast = Abreast(at_once, self.parameters) if at_once > 1 else None
        self.feed = StepFeed(self._micro_batches, plan.total_steps)
        self.edge_rng = capture_rng()
        self.saved_step: int | None = None

    def restore(self, checkpoint: Checkpoint, load_adapter: Callable[[Path], None]) -> TrainState:
        """Takes model, optimizer, hooks and random numbers to a checkpoint's edge, and the log and later ones back."""
        state = checkpoint.state
        load_adapter(checkpoint.adapter)
        load_optimizer(checkpoint.folder, self.optimizer, dict(self.named))
        for hook, saved in zip(self.hooks, state.hooks, strict=True):
            hook.load_state_dict(saved)
        if self.scaler is not None and state.scaler:
            self.scaler.load_state_dict(state.scaler)
        restore_rng(state.rng[self.accelerator.process_index % len(state.rng)])
        self.edge_rng, self.saved_step = capture_rng(), state.step
        if self.accelerator.is_main_process and not self._is_complete(state):
            self.store.set_later_aside(state.step)
            self.store.note_best(asdict(state.best) if state.best else None)
            self.log.rewind(step=state.step, evaluated_step=state.evaluated_step)
        return state

    def fit(self, state: TrainState) -> FitResult:
        """Trains from `state` to the plan's last step, or until patience runs out, and publishes the adapter.

        Raises:
            StoppedBySignal: The state at the last edge is saved.
            NumericsError: A loss or gradient was not finite, or fp16 overflowed for good; the last edge is saved.
            ResourceError: Memory or disk ran out.
        """
        was_complete = self._is_complete(state)
        if was_complete:
            self.reporter.info(f"already complete: the run ended at step {state.step}")
        steps, device = self.plan.total_steps, self.accelerator.device
        progress = StepProgress(
            self.reporter, steps=steps, done=state.step, device=device, estimate_bytes=self.estimate_bytes
        )
        self.objective.train()
        if not was_complete:
            with self.signals, progress, self.feed, self.abreast or contextlib.nullcontext():
                try:
                    self._finish_edge(state)
                    while not state.is_complete(self.plan.total_steps):
                        with self._counting_memory(), self.profile.step():
                            line = self._take_step(state)
                        progress.show(line)
                        self._finish_edge(state)
                except (StopRequested, NumericsError) as reason:
                    self._end_at_edge(state, reason)
        adapter_step = state.best.step if self.plan.select_metric and state.best else state.step
        if self.accelerator.is_main_process:
            self.store.publish_adapter(adapter_step)
        self.accelerator.wait_for_everyone()
        return replace(
            FitResult.of_complete(state),
            adapter_step=adapter_step,
            was_complete=was_complete,
            peak_memory_bytes=peak_memory_bytes(device),
            peak_reserved_bytes=peak_reserved_bytes(device),
            live_tensors=self.live_peak,
        )

    @contextlib.contextmanager
    def _counting_memory(self) -> Iterator[None]:
        """Keeps the worst moment of the steps so far, where that was asked for."""
        if not self.counts_memory:
            yield
            return
        live = LiveTensors()
        with watching(live, self.accelerator.unwrap_model(self.objective), self.optimizer):
            yield
        peak = live.peak()
        if self.live_peak is None or peak.tensor_bytes > self.live_peak.tensor_bytes:
            self.live_peak = peak

    def _take_step(self, state: TrainState) -> dict[str, Any]:
        """One optimizer step. The state changes only behind the optimizer's. Returns its line of the log."""
        began = time.perf_counter()
        step = state.step + 1
        epoch, rows = self.step_rows.rows(step)
        figures, batches = self._compute_gradients(state, step, rows)
        learning_rate = self.lr_at(step)
        with self.profile.phase("optimizer"):
            grad_norm = self._apply_gradients(state, step, learning_rate, batches)
        for hook in self.hooks:
            hook.after_optimizer_step(step)
        self.optimizer.zero_grad(set_to_none=True)
        trim_after(time.perf_counter() - began, self.accelerator.device)

        seconds = time.perf_counter() - began
        state.step, state.epoch = step, epoch
        state.tokens += figures.tokens
        state.padded_tokens += figures.padded_tokens
        state.trained_tokens += figures.trained_tokens
        state.seconds += seconds
        line = {
            "step": step,
            "epoch": epoch,
            "loss": figures.loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": figures.tokens,
            "trained_tokens": figures.trained_tokens,
            "seconds": seconds,
        }
        self._record(line)
        return line

    def _compute_gradients(self, state: TrainState, step: int, rows: Sequence[int]) -> tuple[StepFigures, list[Batch]]:
        """Gradients of the step's rows, over micro-batches and ranks; with smaller micro-batches if memory runs out."""
        while True:
            budget = state.token_budget(self.resolved.micro_batch_tokens)
            with self.profile.phase("data"):
                batches = self.feed.take(step, budget)
            try:
                figures, sums = accumulate_gradients(
                    self.objective,
                    batches,
                    self.accelerator,
                    self.scaler,
                    self._check_signals_of_this_rank,
                    self.profile,
                    self.abreast,
                )
                check_loss(step, figures, sums, batches, self.examples)
                sum_gradients(self.parameters, self.accelerator)
                return figures, batches
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = out_of_memory(f"at step {step}", self._longest(rows), budget)
            # Outside of the except block: the traceback holds the activations.
            self._halve(state, budget, self._longest(rows), problem)

    def _apply_gradients(
        self, state: TrainState, step: int, learning_rate: float, batches: Sequence[Batch]
    ) -> float | None:
        """Clips and steps. Returns the gradient norm before clipping; None where fp16 overflowed: skipped."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters)
        is_overflow = self.scaler is not None and not torch.isfinite(norm)
        if not is_overflow:
            check_gradients(step, float(norm), self.named, batches, self.examples)
        state.count_overflow(is_overflow, step, self.scaler.get_scale() if self.scaler is not None else 1.0)
        update_parameters(
            self.optimizer,
            self.parameters,
            self.scaler,
            norm=norm,
            max_norm=self.max_grad_norm,
            learning_rate=learning_rate,
        )
        return None if is_overflow else float(norm)

    def _micro_batches(self, step: int, token_budget: int) -> list[Batch]:
        """This rank's micro-batches of a step, on the CPU; a pure function."""
        cut = self.cutter.cut(self.step_rows.rows(step)[1], token_budget)
        share = cut[self.accelerator.process_index :: self.accelerator.num_processes]
        return [self.cutter.collate(part) for part in share]

    def _longest(self, rows: Sequence[int]) -> int:
        return max(int(self.examples.lengths[row]) for row in rows)

    def _halve(self, state: TrainState, budget: int, longest: int, problem: Exception) -> None:
        """Halves the token budget and goes back to the edge; raises `problem` where nothing is left to halve."""
        self.optimizer.zero_grad(set_to_none=True)
        release_memory(self.accelerator.device)
        # Several ranks cannot tell each other: the others wait in a reduction already.
        if self.accelerator.num_processes > 1 or budget <= longest:
            raise problem
        restore_rng(self.edge_rng)
        state.lower_token_budget(budget // 2)
        self.reporter.warn(f"{problem}; going on with {budget // 2}, the step is repeated")

    def _finish_edge(self, state: TrainState) -> None:
        """Evaluates and saves what is due behind the last step, then looks for a signal."""
        self.edge_rng = capture_rng()
        is_best = self._evaluation_due(state) and self._evaluate(state)
        is_due = state.step % self.plan.save_every_steps == 0 or state.is_complete(self.plan.total_steps)
        if is_best or (is_due and self.saved_step != state.step):
            self._save(state)
        self._check_signals_of_all_ranks()

    def _evaluation_due(self, state: TrainState) -> bool:
        every_steps = self.plan.evaluate_every_steps
        if self.evaluate is None or every_steps is None or state.evaluated_step >= state.step:
            return False
        return state.step % every_steps == 0 or state.step >= self.plan.total_steps

    def _is_complete(self, state: TrainState) -> bool:
        return state.is_complete(self.plan.total_steps) and not self._evaluation_due(state)

    def _evaluate(self, state: TrainState) -> bool:
        """Writes the held-out metrics down; returns whether they are the best so far. Leaves the training as it was."""
        assert self.evaluate is not None
        alone = self.accelerator.num_processes == 1  # several ranks stop together, at the edge
        with preserved_rng(), self.signals.interrupting() if alone else contextlib.nullcontext():
            values = self.evaluate()
        self.objective.train()
        check_metrics(state.step, values)
        state.evaluated_step = state.step
        self._record({"step": state.step, "evaluation": values})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.reporter.info(f"step {state.step}: held-out {shown}")
        name = self.plan.select_metric
        if name is None:
            return False
        stopping = self.early_stopping
        is_best: bool = state.judge(
            values[name],
            name,
            lower_is_better=metrics.get(name).better == "lower",
            min_delta=stopping.min_delta if stopping else 0.0,
        )
        if stopping and state.evaluations_without_improvement >= stopping.patience:
            state.stopped_early = True
            self.reporter.info(
                f"stopped early at step {state.step}: {stopping.patience} evaluations without a better {name}"
            )
        return is_best

    def _save(self, state: TrainState) -> None:
        """Publishes the checkpoint of the last edge, all ranks' random numbers in it."""
        from accelerate.utils import gather_object

        state.rng = gather_object([self.edge_rng])
        state.hooks = [dict(hook.state_dict()) for hook in self.hooks]
        state.scaler = dict(self.scaler.state_dict()) if self.scaler is not None else {}

        def fill(folder: Path) -> None:
            self.save_adapter(folder / ADAPTER_FOLDER)
            save_optimizer(folder, self.optimizer, dict(self.named))
            write_state(folder, state, self.resolved.to_json(), self.environment)

        if self.accelerator.is_main_process:
            self.log.sync()
            self.store.save(state.step, fill, best=asdict(state.best) if state.best else None)
        self.saved_step = state.step
        self.accelerator.wait_for_everyone()

    def _end_at_edge(self, state: TrainState, reason: StopRequested | NumericsError) -> None:
        """Drops the step in progress, saves the edge before it and raises what the user is told."""
        self.optimizer.zero_grad(set_to_none=True)
        restore_rng(self.edge_rng)
        if self.saved_step != state.step:
            self._save(state)
        if isinstance(reason, NumericsError):
            raise reason
        raise StoppedBySignal(
            f"stopped by {signal.Signals(reason.number).name}: saved step {state.step}",
            signal_number=reason.number,
            todo=f"go on with: {self.resume_command}",
        ) from None

    def _check_signals_of_this_rank(self) -> None:
        """After a micro-batch; with several ranks only at the edge, where all of them stop together."""
        if self.accelerator.num_processes == 1:
            self.signals.check()

    def _check_signals_of_all_ranks(self) -> None:
        if self.accelerator.num_processes > 1:
            number = torch.tensor([self.signals.received or 0], device=self.accelerator.device)
            self.signals.received = int(self.accelerator.gather(number).max()) or None
        self.signals.check()

    def _record(self, values: dict[str, Any]) -> None:
        """Into metrics.jsonl, and to the trackers that were asked for."""
        self.log.write(values)
        self.trackers.log(values)
