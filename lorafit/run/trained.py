"""What `lorafit train` gives back: how a run ended, or what it would do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.reporting import Printed, say
from lorafit.console.wording import counted, near
from lorafit.contracts import JsonObject
from lorafit.files.atomic import read_object
from lorafit.ops.recomputed_layers import CHECKPOINTING

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.files.rundir import RunDir
    from lorafit.kinds.adapter_parts import Outcome
    from lorafit.memory import MemoryEstimate
    from lorafit.plan import Plan, ResolvedPlan
    from lorafit.trainer.profile import Speed
    from lorafit.trainer.state import FitResult

_MIB = 1 << 20


@dataclass(frozen=True)
class Trained(Printed):
    """A finished run, or only its plan after a dry run (`fit` and `resolved` are None then).

    Attributes:
        has_held_out_rows: Whether its recipe names rows to score it on.
        resumes: Whether a dry run was asked where it would go on.
    """

    run: RunDir
    plan: Plan
    resolved: ResolvedPlan | None
    fit: FitResult | None
    estimate: MemoryEstimate | None = None
    speed: Speed | None = None
    profile: str | None = None
    has_held_out_rows: bool = True
    resumes: bool = False

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.run.root

    @cached_property
    def outcome(self) -> Outcome | None:
        """What became of the adapter, where its recipe does not say it."""
        from lorafit.model.adapter import CONFIG

        file = self.run.adapter / CONFIG
        if self.fit is None or not file.exists():
            return None
        adapter, config = self.plan.step.step.adapter, read_object(file)
        return adapter.outcome(config, self.fit.adapter_step, self.plan.total_steps)

    def summary(self) -> JsonObject:
        """How training ended, for `result.json`: memory as estimated and as measured among it."""
        from dataclasses import asdict

        if self.fit is None:
            return {}
        return {
            **asdict(self.fit),
            "estimated_tensor_bytes": self.estimate.tensor_bytes if self.estimate else None,
            "estimated_memory_bytes": self.estimate.needed_bytes if self.estimate else None,
            "speed": self.speed.to_json() if self.speed else None,
            "adapter": asdict(self.outcome) if self.outcome else None,
        }

    def to_json(self) -> JsonObject:
        """Plan, resolved plan and how training ended."""
        return {
            "run": self.run.root.name,
            "plan": self.plan.to_json(),
            "resolved": self.resolved.to_json() if self.resolved else None,
            "result": self.summary() or None,
        }

    def render(self, console: Console) -> None:
        """How it ended, where the time went, memory beside its estimate, and what to do next."""
        if self.fit is None:
            say(console, f"dry run: nothing was loaded or written{self._where_it_would_go_on()}")
            return
        fit = self.fit
        if not fit.was_complete:
            if self.profile is not None:
                say(console, self.profile)
                say(console, f"profile: {near(self.run.profile)}, {near(self.run.trace)}\n")
            rate = f": {self.speed.describe(self.plan.step.step.task.loss_unit)}" if self.speed else ""
            before, after = "", ""
            if fit.resumed_step:
                before, after = f", {fit.resumed_step:,} of them before this resume,", " altogether"
            say(console, f"trained {counted(fit.steps, 'step')}{before} in {_clock(fit.seconds)}{after}{rate}")
            say(console, self._memory_line(fit))
        if self.outcome is not None:
            say(console, self.outcome.told)
            if self.outcome.warning:
                say(console, f"warning: {self.outcome.warning}")
        which = f"the adapter of step {fit.adapter_step}"
        if fit.best is not None and fit.best.step == fit.adapter_step:
            which += f" (best {fit.best.metric}: {fit.best.value:.4g})"
        shown = near(self.run.root)
        after = f"lorafit eval {shown}"
        if not self.has_held_out_rows:
            task = self.plan.step.step.task
            command = "classify" if task.classified_format is not None else "generate" if task.writes_answers else None
            asked = f"lorafit {command} {shown} --prompt TEXT, or " if command else ""
            after = f"{asked}{after} --set data.test=FILE"
        say(console, f"{which} is in {shown}/adapter; next: {after}")

    def _where_it_would_go_on(self) -> str:
        """Of a dry run with `--resume`: from which checkpoint, or that there is none."""
        if not self.resumes:
            return ""
        found = max(self.run.steps(), default=None)
        none = f"; nothing to resume in {near(self.run.root)}: the run would start at step 0"
        return none if found is None else f"; the last checkpoint is of step {found:,}"

    def _memory_line(self, fit: FitResult) -> str:
        """Peak memory as measured, beside the estimate of the same quantity."""
        tensors, needed = (self.estimate.tensor_bytes, self.estimate.needed_bytes) if self.estimate else (0, 0)

        def beside(measured: int, what: str, estimated: int) -> str:
            return f"{measured / _MIB:,.0f} MiB {what}" + (f" ({estimated / _MIB:,.0f} estimated)" if estimated else "")

        if fit.peak_reserved_bytes is not None:
            parts = [beside(fit.peak_memory_bytes, "of tensors", tensors)]
            parts += [beside(fit.peak_reserved_bytes, "reserved", 0), f"{needed / _MIB:,.0f} MiB of the card estimated"]
        else:
            parts = [beside(fit.peak_memory_bytes, "resident", needed)]
        if (before := fit.peak_before_steps_bytes) is not None and before > fit.peak_memory_bytes:
            parts.append(f"{before / _MIB:,.0f} MiB before its first step")
        if fit.live_tensors is not None:
            parts.append(beside(fit.live_tensors.tensor_bytes, "of live tensors counted", tensors))
        return f"peak memory {'in training' if before is not None else 'of the whole run'}: {', '.join(parts)}"


def describe_resolved(resolved: ResolvedPlan) -> str:
    """What `auto` became, and where that comes from."""
    at_once = f", {resolved.micro_batches_at_once} at once" if resolved.micro_batches_at_once > 1 else ""
    cost = resolved.micro_batch_cost_tokens
    started = f" (starting one counts as {cost:,})" if cost else ""
    tried = ""
    if not resolved.is_settled:
        ways = len(set(resolved.first_steps))
        tried = f"; steps 1 to {len(resolved.first_steps)} try {ways} ways, the rest take the fastest"
    kernels = "" if resolved.kernels == "none" else f"{resolved.kernels} kernels, "
    return (
        f"micro-batches of {resolved.micro_batch_tokens} tokens{started}{at_once}, {resolved.attention} attention, "
        f"{kernels}checkpointing {CHECKPOINTING[resolved.gradient_checkpointing]} (from the {resolved.source}){tried}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
