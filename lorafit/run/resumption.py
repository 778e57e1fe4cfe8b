"""What a training goes on with: a checkpoint of its run, compared with what is there now, or nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafit.contracts import JsonMapping, JsonObject, Reporter
from lorafit.files.atomic import check_manifest, read_object
from lorafit.files.rundir import RunDir
from lorafit.job import Job
from lorafit.kinds.tasks import Task, TaskSection, tasks
from lorafit.machine.devices import own_device
from lorafit.model.adapter import read_adapter
from lorafit.model.content import require_recorded
from lorafit.model.inspect import require_same_quantization
from lorafit.ops.dtypes import dtype_named
from lorafit.ops.kernel_choice import choose_kernels, describe_versions
from lorafit.ops.kernels import Kernels
from lorafit.plan import Plan, ResolvedPlan
from lorafit.run.workspace import check_same_facts, read_base_digest
from lorafit.trainer.checkpoint import Checkpoint, CheckpointStore, Environment, check_continuity
from lorafit.trainer.state import Event


@dataclass(frozen=True)
class Resumption:
    """Where a run stands when a training takes it up.

    Attributes:
        checkpoint: What is gone on with; None: the run starts at step 0.
    """

    job: Job
    where: RunDir
    plan: Plan
    reporter: Reporter
    checkpoint: Checkpoint | None = None

    def found_in(self, store: CheckpointStore, step: int | None) -> Resumption:
        """The same with the last checkpoint of the store, or that of a step.

        Raises:
            CheckpointError: The run was started with another base, tokenizer, template or rows; or there is no valid
                checkpoint of that step.
        """
        job = self.job
        if read_base_digest(self.where) not in (None, job.base.origin.digest):
            require_recorded(job.base.path, self.where.base)  # names the tensors, where more than the config changed
        check_same_facts(self.where, job.origin())
        checkpoint = store.open(step)
        if checkpoint is None:
            self.reporter.info(f"nothing to resume in {self.where.root}: the run starts at step 0")
        return replace(self, checkpoint=checkpoint)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do: all steps taken, the last evaluation made, the adapter out."""
        if self.checkpoint is None:
            return False
        state = self.checkpoint.state
        is_evaluated = self.plan.evaluate_every_steps is None or state.evaluated_step >= state.step
        is_whole = check_manifest(self.where.adapter) is None
        return state.is_complete(self.plan.total_steps) and is_evaluated and is_whole

    def settled_task(self) -> Task[TaskSection]:
        """The task, with what evaluations up to the checkpoint have settled."""
        saved = read_adapter(self.checkpoint.adapter).card() if self.checkpoint is not None else None
        return self.job.task if saved is None or saved.task == self.job.task.section else tasks.bind(saved.task)

    def resolved_plan(self) -> ResolvedPlan | None:
        """The plan of the run that is gone on with; what its first steps settled since the checkpoint is kept."""
        saved = self._saved_plan()
        if saved is None or saved.is_settled or not self.where.plan.exists():
            return saved
        since = ResolvedPlan.from_json(read_object(self.where.plan), str(self.where.plan))
        return since if since.is_settled and since.first_steps == saved.first_steps else saved

    def _saved_plan(self) -> ResolvedPlan | None:
        if self.checkpoint is None:
            return None
        return ResolvedPlan.from_json(self.checkpoint.resolved, str(self.checkpoint.folder))

    def quantization(self) -> JsonObject | None:
        """What the run noted of its quantised base when it began: every code of it."""
        noted = self.checkpoint is not None and self.where.quantization.exists()
        return read_object(self.where.quantization) if noted else None

    def check_quantization(self, used: JsonObject) -> JsonMapping:
        """How the base is quantised: as the run noted it when it began, on whatever device, where there is a note.

        Raises:
            CheckpointError: The codes are others than then.
        """
        begun = self.quantization()
        if begun is not None:
            require_same_quantization(used, begun, file=self.where.quantization)
        return begun or used

    def choose_kernels(self, given: ResolvedPlan | None, allow_inexact: bool) -> tuple[Kernels, list[Event]]:
        """What computes norms, products and losses, and what a resume finds changed: the recipe's kernels; for `auto`
        those of the run that is gone on with, or of the given plan, where Liger's are there."""
        planned, before = self.plan.kernels, self._saved_plan() or given
        if self.job.recipe.model.kernels == "auto" and before is not None and before.kernels == "none":
            planned = "none"
        device, dtype = own_device(self.job.device.kind), dtype_named(self.plan.dtype)
        kernels = choose_kernels(planned, device, dtype, self.reporter)
        return kernels, self._check_continuity(kernels, allow_inexact)

    def _check_continuity(self, kernels: Kernels, allow_inexact: bool) -> list[Event]:
        device = self.job.device
        if self.checkpoint is None:
            return []
        return check_continuity(
            self.checkpoint.environment,
            Environment.here(device.kind, device.count, device.card, describe_versions(kernels)),
            allow_inexact=allow_inexact,
            reporter=self.reporter,
            where=str(self.checkpoint.folder),
        )
