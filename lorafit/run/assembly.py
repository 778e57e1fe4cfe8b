"""The parts of a training put together: from a job, its plan and an executor to the stage, the loop and its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lorafit.answering.engine import Engine
from lorafit.answering.plain_generation import begin_as
from lorafit.answering.sampling import Sampling
from lorafit.contracts import Reporter
from lorafit.data.batch import MICRO_BATCH_COST_TOKENS, EasyFirst, StepRows
from lorafit.data.packing import Cutter
from lorafit.evaluation.during import Questions, ask_during, evaluate_during
from lorafit.facts import RunFacts
from lorafit.job import Job
from lorafit.kinds.adapters import adapters
from lorafit.kinds.curricula import share_at
from lorafit.kinds.optimizers import optimizers, rate_groups
from lorafit.kinds.schedules import learning_rate_at
from lorafit.memory import MemoryEstimate, fits
from lorafit.model.attach import load_adapter_weights
from lorafit.model.checkpointing import set_checkpointing
from lorafit.model.fused_lora import keep_unpacked
from lorafit.model.layer_numbers import layer_paths
from lorafit.ops.dtypes import dtype_named
from lorafit.ops.embedding_noise import take_noise
from lorafit.ops.kernel_choice import describe_versions
from lorafit.ops.step_hook import StepHook
from lorafit.plan import Plan, ResolvedPlan, count_flops
from lorafit.plan.recipe_step import takes_varlen
from lorafit.trainer.checkpoint import CheckpointStore, Environment, Snapshot
from lorafit.trainer.executor import Executor
from lorafit.trainer.held_out import Cadence, HeldOut, OnPlateau
from lorafit.trainer.journal import Journal
from lorafit.trainer.loop import Trainer
from lorafit.trainer.profile import Speed, measure_speed
from lorafit.trainer.stage import Stage
from lorafit.trainer.state import FitResult
from lorafit.trainer.step import Update
from lorafit.trainer.unfreezing import Unfreezing


@dataclass(frozen=True)
class Assembly:
    """What a job, its plan and what runs micro-batches are put together to.

    Attributes:
        difficulty: Of each training row, where there is a curriculum.
    """

    job: Job
    plan: Plan
    executor: Executor
    difficulty: NDArray[np.float64] | None = None

    @cached_property
    def hooks(self) -> Sequence[StepHook]:
        """What is done between steps: by the adapter's method, and by unfreezing."""
        recipe, model = self.job.recipe, self.executor.objective.model
        own = adapters.bind(recipe.adapter).step_hook(model, RunFacts(recipe.seed, self.plan.total_steps))
        hooks: list[StepHook] = [own] if own is not None else []
        if (asked := recipe.training.unfreezing) is not None:
            layers = layer_paths(self.executor.objective.base)
            hooks.append(Unfreezing(dict(self.executor.named_parameters), layers, asked.top, asked.steps))
        return hooks

    def measure_speed(self, fit: FitResult) -> Speed | None:
        """The run's figures against what the machine can do."""
        facts = self.job.rows.facts()
        flops = count_flops(
            self.job.shape,
            adapter_parameters=self.plan.trainable_parameters,
            tokens=fit.tokens,
            labelled_tokens=fit.trained_tokens,
            squared_tokens=round(facts.squared_tokens * fit.tokens / max(1, facts.tokens)),
            checkpointing=False,
        )
        return measure_speed(
            fit,
            model_flops=flops.model_flops,
            device=self.executor.device,
            devices=self.executor.ranks,
            dtype=dtype_named(self.plan.compute_dtype),
        )

    def memory_of(self, resolved: ResolvedPlan) -> MemoryEstimate:
        """Of the heaviest micro-batch in any way that the run takes or may take."""
        checkpointing = resolved.gradient_checkpointing
        held = ("keeps_unpacked", "loss_chunk_bytes", "kernels")
        memory = self.plan.step.changed(**{name: getattr(resolved, name) for name in held})
        each = (memory.changed(attention=way.attention).at(way.tokens_at_once, checkpointing) for way in resolved.ways)
        return max(each, key=lambda estimate: estimate.needed_bytes)

    def stage(self, reporter: Reporter, *, one_by_one: bool) -> Stage:
        """What `auto` is settled on: the run's real shapes."""
        job, recipe = self.job, self.job.recipe
        memory = self.plan.step.changed(kernels=self.executor.objective.kernels.name)
        return Stage(
            self.executor,
            job.rows.train,
            job.rows.validation if self.plan.evaluate_every_steps is not None else None,
            StepRows(job.rows.train, recipe.seed, self.plan.batch_size, self._easy_first()),
            job.pad_id,
            reporter,
            set_checkpointing=partial(set_checkpointing, self.executor.objective.model),
            keep_unpacked=partial(keep_unpacked, self.executor.objective.model),
            fits=lambda tokens, on, attention: fits(
                memory.changed(attention=attention).at(tokens, on), job.device.memory_bytes
            ),
            kept_bytes=optimizers.bind(recipe.training.optimizer).state_bytes(self.plan.trainable_parameters)
            + sum(hook.state_bytes for hook in self.hooks),
            packing=self.plan.packing,
            takes_varlen=takes_varlen(self.plan.step.step),
            one_by_one=one_by_one,
        )

    def _easy_first(self) -> EasyFirst | None:
        """The curriculum, where there is one."""
        section = self.job.recipe.training.curriculum
        if section is None or self.difficulty is None:
            return None
        return EasyFirst(self.difficulty, lambda step: share_at(section, step, self.plan.total_steps))

    def build_trainer(
        self,
        stage: Stage,
        resolved: ResolvedPlan,
        store: CheckpointStore,
        journal: Journal,
        save: Callable[[Path], None],
    ) -> Trainer:
        """The loop with its parts; `save` writes an adapter into a folder."""
        job, training = self.job, self.job.recipe.training
        executor, rows = self.executor, self.job.rows
        model = executor.objective.model
        groups = rate_groups(executor.named_parameters, adapters.bind(job.recipe.adapter).rate_factor)
        update = Update(
            optimizers.bind(training.optimizer).build(groups, training.learning_rate, executor.device),
            executor.named_parameters,
            lambda step: learning_rate_at(training.schedule, training.learning_rate, step, self.plan.total_steps),
            executor.scaler,
            training.max_grad_norm,
            self.hooks,
        )
        if training.embedding_noise is not None:
            take_noise(executor.objective.base.get_input_embeddings())
        task, ranks = executor.objective.task, executor.ranks
        cost_tokens = resolved.micro_batch_cost_tokens or MICRO_BATCH_COST_TOKENS
        cutter = Cutter(rows.train, task, job.pad_id, self.plan.packing, ranks=ranks, cost_tokens=cost_tokens)
        load = partial(load_adapter_weights, model)
        versions = describe_versions(executor.objective.kernels)
        environment = Environment.here(executor.device.type, executor.ranks, job.device.card, versions)
        return Trainer(
            executor,
            update,
            stage.step_rows,
            cutter,
            Cadence(self.plan.total_steps, self.plan.save_every_steps, self.plan.evaluate_every_steps),
            store,
            Snapshot(update, save, load, resolved, environment),
            journal,
            self._held_out(resolved),
            stage.set_attention,
            training.embedding_noise,
        )

    def _held_out(self, resolved: ResolvedPlan) -> HeldOut | None:
        """Evaluation while training, where the recipe asks for one."""
        job, evaluation = self.job, self.job.recipe.evaluation
        if job.rows.validation is None or self.plan.evaluate_every_steps is None:
            return None
        evaluate = partial(
            evaluate_during,
            self.executor.objective,
            job.rows.validation,
            evaluation.during,
            micro_batch_tokens=resolved.evaluation_micro_batch_tokens,
            pad_id=job.pad_id,
            ranks=self.executor,
            questions=self._questions(),
        )
        stopping, plateau = evaluation.early_stopping, evaluation.on_plateau
        patience, min_delta = (stopping.patience, stopping.min_delta) if stopping is not None else (None, 0.0)
        follows = OnPlateau(**plateau.model_dump()) if plateau is not None else None
        return HeldOut(evaluate, self.plan.select_metric, patience, min_delta, follows)

    def _questions(self) -> Questions | None:
        """What is answered at each evaluation while training."""
        job, evaluation = self.job, self.job.recipe.evaluation
        objective, reader = self.executor.objective, job.renderer.pictures
        engine = Engine(objective.model, job.tokenizer, autocast_dtype=objective.autocast_dtype, reader=reader)
        begin_as(engine.model, {} if job.renderer.apart is None else job.renderer.apart.begins)
        rows = job.rows.generation_rows("validation", self.plan.answered_rows) if self.plan.answered_rows else []
        return ask_during(engine, rows, evaluation.during, Sampling.of_recipe(evaluation), job.stop_ids())
