"""From a checked plan to a published adapter: finds the checkpoint to go on from, loads, proves, rehearses, trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from lorafit.contracts import JsonMapping, JsonObject, Reporter
from lorafit.errors import StoppedBySignal
from lorafit.evaluation.base_side import start_head
from lorafit.files.atomic import atomic_dir, write_json
from lorafit.files.cache import keep, key_of_code
from lorafit.files.rundir import RunDir
from lorafit.job import Job, build_objective, prove, refer
from lorafit.kinds.adapters import adapters, begins_as_base
from lorafit.model.adapter import finish_adapter, save_adapter
from lorafit.model.attach import attach_adapter, check_plan, load_adapter_weights
from lorafit.model.content import Content, reading_content, require_recorded
from lorafit.model.fuse import fuse_layers
from lorafit.model.inspect import (
    coverage,
    coverage_table,
    describing_quantization,
    recorded_linears,
)
from lorafit.model.load import load_model
from lorafit.model.shippable import check_shippable
from lorafit.model.towers import check_towers, count_towers, tower_table
from lorafit.objective import Objective, choose_probe
from lorafit.ops.dtypes import dtype_named
from lorafit.ops.kernels import Kernels
from lorafit.ops.process_memory import forget_peak_memory, peak_memory_bytes
from lorafit.ops.rng import seed_rng
from lorafit.plan import Plan, ResolvedPlan, plan, require_fit, show_plan
from lorafit.run.assembly import Assembly
from lorafit.run.calibration import Choice, choose_linears
from lorafit.run.card import RunCard
from lorafit.run.curriculum import find_difficulty, keep_difficulty
from lorafit.run.resumption import Resumption
from lorafit.run.trained import Trained, describe_resolved
from lorafit.run.workspace import describe_run
from lorafit.trainer.checkpoint import CheckpointStore
from lorafit.trainer.executor import Executor
from lorafit.trainer.first_values import give_first_values
from lorafit.trainer.journal import Journal, MetricsLog, Trackers, build_accelerator
from lorafit.trainer.loop import Trainer
from lorafit.trainer.profile import StepProfile
from lorafit.trainer.ranks import OverRanks, check_same_rows, leave_together
from lorafit.trainer.rehearsal import resolve_plan
from lorafit.trainer.startup_proofs import prove_gradients
from lorafit.trainer.state import FitResult, TrainState

_GRADIENT_TOKENS = 64
_SEED_STRIDE = 7919  # torch's CPU generator reads the low 32 bits of a seed


@dataclass(frozen=True)
class Training:
    """One call of `lorafit train`, its recipe opened and its plan accepted."""

    job: Job
    where: RunDir
    plan: Plan
    reporter: Reporter
    resume_command: str
    counts_memory: bool = False
    profiles: bool = False
    choice: Choice | None = None
    shown: Plan | None = None

    def run(self, *, resume: bool, resume_from: int | None, given: ResolvedPlan | None, allow_inexact: bool) -> Trained:
        """Finds the checkpoint to go on from, loads, proves, rehearses, trains."""
        job, recipe = self.job, self.job.recipe
        has_held_out = recipe.data.test is not None or recipe.data.validation is not None
        kept, reporter = self.plan.keep_last, self.reporter
        store = CheckpointStore(self.where, keep_last=kept, reporter=reporter, finish=finish_adapter)
        begun = Resumption(job, self.where, self.plan, self.reporter)
        begun = begun.found_in(store, resume_from) if resume else begun
        checkpoint = begun.checkpoint
        kernels, events = begun.choose_kernels(given, allow_inexact)
        if checkpoint is not None and begun.is_complete:
            self.reporter.info(f"already complete: the run ended at step {checkpoint.state.step}")
            complete = FitResult.of_complete(checkpoint.state)
            return Trained(self.where, self.plan, None, complete, has_held_out_rows=has_held_out)
        show_plan(self.plan, self.reporter, self.shown)
        require_fit(self.plan)
        accelerator = build_accelerator(
            use_cpu=job.device.kind == "cpu", tracking=recipe.tracking, folder=self.where.root
        )
        check_same_rows(accelerator, job.rows.digest)
        forget_peak_memory(accelerator.device)  # of another run in this process
        choice = choose_linears(job, self.plan, accelerator, self.reporter)
        if choice is not None:  # from here on as if the recipe had said it
            told = self._with(choice)
            return told.run(resume=resume, resume_from=resume_from, given=given, allow_inexact=allow_inexact)
        job, objective, content, describe = self._prove_loaded(accelerator, begun, kernels)
        model = objective.model
        one = accelerator.num_processes == 1
        executor = Executor(objective, accelerator.device) if one else OverRanks(objective, accelerator)
        difficulty = find_difficulty(job, objective, executor, self.where.curriculum, self.reporter, begun.checkpoint)
        assembly = Assembly(job, self.plan, executor, difficulty)
        # a profile and counted memory both look at one thread
        stage = assembly.stage(self.reporter, one_by_one=self.profiles or self.counts_memory)
        cache_name = f"plans/{key_of_code([job.facts(), job.device.name, job.device.count, kernels.name])}.json"
        resolved = resolve_plan(self.plan, stage, resumed=begun.resolved_plan(), given=given, cache_name=cache_name)
        resolved = replace(resolved, linears=dict(job.linears))
        used = begun.check_quantization(describe()) if describe is not None else {}
        before_bytes = peak_memory_bytes(executor.device)
        told_apart = forget_peak_memory(executor.device)  # the rehearsal tries what the steps do not take
        card = job.card(resolved)
        expected = assembly.memory_of(resolved)
        self.reporter.info(describe_resolved(resolved))
        seed_rng(recipe.seed + _SEED_STRIDE * executor.rank)  # dropout; each rank drops other inputs
        write = partial(save_adapter, model, base=job.base, quantization=used, companions=job.companions(card))
        save = partial(_save_as_settled, objective, write)
        if self.profiles and executor.rank == 0:
            executor.profile = StepProfile(self.where.profile, self.where.trace, executor.device)
        trackers = Trackers(accelerator, self.reporter)
        log = MetricsLog(self.where.metrics, self.reporter)
        profile, needed_bytes = executor.profile, expected.needed_bytes
        journal = Journal(self.reporter, log, trackers, profile, self.counts_memory, needed_bytes)
        facts = {"plan": self.plan.to_json(), "memory": expected.to_json()}
        trainer = assembly.build_trainer(stage, resolved, store, journal, partial(save, card=card))
        trainer.on_settled = partial(self._keep_settled, job, trainer, save, facts, cache_name)
        state = trainer.restore(checkpoint) if checkpoint is not None else TrainState()
        objective.task = begun.settled_task()
        state.events += events
        if content is not None:  # nothing is written before all is loaded, compared and proven
            hashes = {self.where.base: content.to_json(), self.where.quantization: used}
            hashes |= {} if self.choice is None else {self.where.sensitivity: self.choice.to_json()}
            self._describe(job, card, {**resolved.to_json(), **facts}, hashes, begins=checkpoint is None)
            if checkpoint is None:
                self._keep_first_adapter(model)
                keep_difficulty(self.where.curriculum, difficulty)
        trackers.start(recipe.name, recipe.model_dump(mode="json"), step=state.step)
        try:
            result = replace(trainer.fit(state), peak_before_steps_bytes=before_bytes if told_apart else None)
        except StoppedBySignal as stopped:
            stopped.todo = stopped.todo or f"go on with: {self.resume_command}"
            raise
        finally:
            measured = journal.profile.finish()
        leave_together(accelerator)
        trackers.finish()
        speed = assembly.measure_speed(result)
        trained = Trained(self.where, self.plan, trainer.plan, result, expected, speed, measured, has_held_out)
        if executor.rank == 0:
            write_json(self.where.result, trained.summary())
        return trained

    def _with(self, choice: Choice) -> Training:
        """The same with a kind for each linear, and the plan that follows from them."""
        job = replace(self.job, linears=choice.linears)
        exact = plan(job.recipe, job.shape, job.rows.facts(), job.device, self.plan.step.engine)
        return replace(self, job=job, plan=exact, choice=choice, shown=self.plan)

    def _prove_loaded(
        self, accelerator: Accelerator, begun: Resumption, kernels: Kernels
    ) -> tuple[Job, Objective, Content | None, Callable[[], JsonObject] | None]:
        """The job, its objective, proven; on rank 0 also what the base holds, and what tells how it was quantised."""
        job, begins = self.job, begun.checkpoint is None
        with reading_content(job.base.path) if accelerator.is_main_process else nullcontext() as reading:
            model = self._load(accelerator, begun.quantization(), kernels)
            content = reading.result() if reading is not None else None
        describe = None
        if content is not None:
            job = replace(job, base=job.base.known_as(content=content.digest))
            if not begins:
                require_recorded(job.base.path, self.where.base, content)
            describe = describing_quantization(model, job.recipe.model.quantization, dtype=dtype_named(self.plan.dtype))
        objective = build_objective(job, model, self.plan.dtype, kernels)
        prove(job, objective, job.rows.train, self.reporter)
        self._refer(objective, begins=begins)
        probe = choose_probe(job.rows.train.lengths, most_tokens=_GRADIENT_TOKENS, shows=job.shows(job.rows.train))
        prove_gradients(objective, objective.batch_of(job.rows.train[probe], job.pad_id))
        return job, objective, content, describe

    def _load(self, accelerator: Accelerator, begun: JsonMapping | None, kernels: Kernels) -> Any:
        """The base with its adapter, in the precision of the plan; both can be merged and loaded again."""
        plan, job, recipe = self.plan, self.job, self.job.recipe
        base = load_model(
            job.base,
            quantization=recipe.model.quantization,
            dtype=dtype_named(plan.dtype),
            compute_dtype=dtype_named(plan.compute_dtype),
            attention=plan.attention,
            device=accelerator.device,
            model_class=job.task.model_class.padded_with(job.pad_id),
            quantised=recorded_linears(begun),
            reporter=self.reporter,
        )
        model = attach_adapter(
            base, recipe.adapter, recipe.seed, folder=job.loaded.folder, model_class=job.task.model_class
        )
        check_plan(model, adapters.bind(recipe.adapter).sites(job.shape), plan.trainable_parameters)
        check_shippable(model, job.base, job.task.model_class)
        fuse_layers(model, kernels)
        self.reporter.show(coverage_table(coverage(model)))
        if job.task.reads_pictures:
            towers = count_towers(model)
            check_towers(towers, trains_projector=job.task.model_class.trains_projector)
            self.reporter.show(tower_table(towers))
        return model

    def _describe(
        self, job: Job, card: RunCard, plan: JsonMapping, hashes: Mapping[Path, Any], *, begins: bool
    ) -> None:
        """Everything that the run folder says of the run. Hashes of its base stay those that it was begun with."""
        where = self.where
        describe_run(where, job.loaded, {**job.origin(), "threads": torch.get_num_threads()})
        for file, values in hashes.items():
            if begins or not file.exists():
                write_json(file, values)
        write_json(where.card, card.to_json())
        write_json(where.comparison, job.rows_to_compare())
        if (prompts := job.prompts()) is not None:
            write_json(where.prompts, prompts)
        write_json(where.data, job.rows.report.to_json())
        write_json(where.plan, plan)

    def _keep_settled(
        self,
        job: Job,
        trainer: Trainer,
        save: Callable[..., None],
        facts: JsonMapping,
        cache_name: str,
        plan: ResolvedPlan,
    ) -> None:
        """Writes down what the steps behind the first ones take, before one of them is made."""
        card = job.card(plan)
        trainer.snapshot = replace(trainer.snapshot, save_adapter=partial(save, card=card))
        if trainer.executor.rank == 0:
            write_json(self.where.card, card.to_json())
            write_json(self.where.plan, {**plan.to_json(), **facts})
            keep(cache_name, plan.to_json())
        self.reporter.info(f"tried in steps 1 to {len(plan.first_steps)}: {describe_resolved(plan)}")

    def _refer(self, objective: Objective, *, begins: bool) -> None:
        """What the task asks of the model as it was at step 0, before the values of a checkpoint are taken;
        and the adapter and the head as they begin.
        """
        job, first = self.job, self.where.first_adapter
        if begins:
            give_first_values(
                objective, job.recipe.adapter, job.base, job.rows.splits, job.recipe.seed, job.pad_id, self.reporter
            )
            start_head(objective, job.task, job.rows.train, job.rows.validation, job.pad_id, self.reporter)
        if not begins and first.exists():
            load_adapter_weights(objective.model, first)  # whatever init_from has become since
        refer(job, objective, ("train", "validation"), self.reporter)

    def _keep_first_adapter(self, model: PeftModel) -> None:
        """Saves what the task refers to, where that is not the base: an evaluation and a resume need it again."""
        job = self.job
        if job.task.reference_columns and not begins_as_base(job.recipe.adapter):
            with atomic_dir(self.where.first_adapter, replace=True) as folder:
                save_adapter(model, folder, base=job.base)


def _save_as_settled(objective: Objective, write: Callable[..., None], folder: Path, *, card: RunCard) -> None:
    """Writes the adapter with its card, in which the task is as evaluations have settled it."""
    write(folder, card=card.model_copy(update={"task": objective.task.section}))
