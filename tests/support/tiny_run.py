"""A tiny random Llama with LoRA, rows of many lengths, and a Trainer around them. No network, no files but tmp_path."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lorafit.contracts import Example, Silent
from lorafit.data.batch import StepRows
from lorafit.data.packing import Cutter
from lorafit.files.rundir import RunDir
from lorafit.kinds.optimizers import optimizers, rate_groups
from lorafit.kinds.schedules import learning_rate_at, schedules
from lorafit.kinds.tasks import tasks
from lorafit.model.attention import set_attention
from lorafit.ops.embedding_noise import take_noise
from lorafit.ops.rng import seed_rng
from lorafit.ops.step_hook import StepHook
from lorafit.plan import ResolvedPlan
from lorafit.trainer.checkpoint import CheckpointStore, Environment, Snapshot
from lorafit.trainer.executor import Executor
from lorafit.trainer.held_out import Cadence, HeldOut
from lorafit.trainer.journal import Journal, MetricsLog
from lorafit.trainer.loop import Trainer
from lorafit.trainer.profile import NO_PROFILE, NoProfile
from lorafit.trainer.ranks import OverRanks
from lorafit.trainer.step import Update
from tests.support.tiny_model import tiny_llama

CAUSAL_LM, KTO = tasks.make("causal-lm"), tasks.make("kto", beta=0.3, undesirable_weight=1.3)

VOCABULARY = 97
PAD = 0


class Rows:
    """Random rows of 5 to 40 tokens whose second half carries loss."""

    def __init__(self, count: int, seed: int = 1) -> None:
        random = np.random.default_rng(seed)
        self.ids = [random.integers(1, VOCABULARY, int(random.integers(5, 41))).tolist() for _ in range(count)]
        self.trained = [[int(i >= len(ids) // 2) for i in range(len(ids))] for ids in self.ids]
        self.lengths = [len(ids) for ids in self.ids]
        self.trained_tokens = [sum(t[1:]) for t in self.trained]
        self.source_of = [0] * count
        self.repeats = [1.0]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        return Example(index, {"tokens": self.ids[index], "trained": self.trained[index]}, "rows.jsonl", index + 1)


class VerdictRows(Rows):
    """The same rows as answers with verdicts, each beside its neighbour's answer, and with a made up reference."""

    def __init__(self, count: int, seed: int = 1) -> None:
        super().__init__(count, seed)
        self.pairs = [self._pair(row) for row in range(count)]
        self.lengths = [
            KTO.row_tokens(max(len(pair["answer_tokens"]), len(pair["mismatched_tokens"]))) for pair in self.pairs
        ]

    def __getitem__(self, index: int) -> Example:
        return Example(index, self.pairs[index], "rows.jsonl", index + 1)

    def _pair(self, row: int) -> dict[str, Any]:
        columns: dict[str, Any] = {"desirable": [row % 3 != 0]}
        asked = self.ids[row][: len(self.ids[row]) // 2]
        for side, number in (("answer", row), ("mismatched", row - 1)):
            answer = self.ids[number][len(self.ids[number]) // 2 :]
            columns |= {f"{side}_tokens": asked + answer, f"{side}_trained": [0] * len(asked) + [1] * len(answer)}
        likely = -4.7 * np.array([sum(columns[f"{side}_trained"]) for side in KTO.sides])  # the model's own is -4.6
        return {**columns, "reference": likely}


@dataclass(frozen=True)
class TinyPlan(Cadence):
    """A short run."""

    total_steps: int = 8
    save_every_steps: int = 4


def tiny_model(*, dropout: float = 0.0, seed: int = 0, quantized: bool = False, dora: bool = False) -> torch.nn.Module:
    """An untrained Llama of 2 layers with LoRA on every linear; B is random too, so that all gradients flow."""
    seed_rng(seed)
    base = tiny_llama(seed=seed, vocab_size=VOCABULARY, max_position_embeddings=128, attn_implementation="eager")
    if quantized:
        base = quantize(base.to(torch.bfloat16))
    options = {"lora_dropout": dropout, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": dora}
    lora = LoraConfig(r=8, lora_alpha=16, **options)
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def quantize(base: torch.nn.Module) -> torch.nn.Module:
    """Every linear but the head in NF4 with double quantisation: the real bitsandbytes layers."""
    import bitsandbytes as bnb

    for name, module in list(base.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            new.support_avx512bf16_for_cpu = False
            base.set_submodule(name, new.to("cpu"))
    base.is_loaded_in_4bit = True
    return base


def set_rate(trainer: Trainer, learning_rate_at: Callable[[int], float]) -> None:
    """Another learning rate; what is asked for it may do other things, too."""
    trainer.update = replace(trainer.update, learning_rate_at=learning_rate_at)


def save_adapter(model: torch.nn.Module) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(get_peft_model_state_dict(model), folder / "adapter_model.safetensors")

    return save


def load_adapter(model: torch.nn.Module) -> Callable[[Path], None]:
    def load(folder: Path) -> None:
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))

    return load


class Pulling(StepHook):
    """Freezes the first layer in odd steps, pulls the second one's B to zero, and averages what its gradients were."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.averages = {name: torch.zeros_like(p) for name, p in self.pulled}
        self.steps: list[int] = []

    @property
    def pulled(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.named if ".layers.1." in name and "lora_B" in name]

    def before_step(self, step: int) -> None:
        self.steps.append(-step)
        for name, parameter in self.named:
            parameter.requires_grad_(step % 2 == 0 or ".layers.0." not in name)

    def penalty(self) -> torch.Tensor:
        return torch.stack([0.1 * parameter.square().sum() for _, parameter in self.pulled]).sum()

    def after_optimizer_step(self, step: int) -> None:
        self.steps.append(step)
        for name, parameter in self.pulled:
            self.averages[name] = 0.9 * self.averages[name] + 0.1 * parameter.grad.abs()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, **self.averages}

    def load_state_dict(self, state: Any) -> None:
        self.steps = list(state["steps"])
        self.averages = {name: state[name] for name in self.averages}


@dataclass
class Job:
    """One run: everything that a Trainer needs, with defaults; `trainer()` builds it."""

    root: Path
    task: Any = CAUSAL_LM
    dropout: float = 0.0
    seed: int = 0
    rows: Rows = field(default_factory=lambda: Rows(44))
    batch_size: int = 16
    plan: TinyPlan = field(default_factory=TinyPlan)
    budget: int = 64
    packing: bool = False
    at_once: int = 1
    trials: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=lambda: {"kind": "adamw"})
    learning_rate: float = 1e-2
    rate_factor: Callable[[str], float] = lambda name: 1.0
    embedding_noise: float | None = None
    keep_last: int = 2
    autocast_dtype: torch.dtype | None = None
    quantized: bool = False
    held_out: HeldOut | None = None
    hooks: Callable[[torch.nn.Module], Sequence[StepHook]] = lambda model: ()
    profile: NoProfile = NO_PROFILE
    counts_memory: bool = False

    def trainer(self) -> Trainer:
        self.reporter = Silent()
        self.model = tiny_model(dropout=self.dropout, seed=self.seed, quantized=self.quantized)
        self.objective = self.task.build_objective(self.model, autocast_dtype=self.autocast_dtype)
        named = [(name, p) for name, p in self.objective.named_parameters() if p.requires_grad]
        kind = optimizers.make(self.optimizer["kind"], **self.optimizer)
        optimizer = kind.build(rate_groups(named, self.rate_factor), self.learning_rate, torch.device("cpu"))
        if self.embedding_noise is not None:
            take_noise(self.objective.base.get_input_embeddings())
        run = RunDir(self.root)
        run.root.mkdir(parents=True, exist_ok=True)
        self.store = CheckpointStore(run, keep_last=self.keep_last, reporter=self.reporter)
        schedule = schedules.make_section("cosine", warmup_steps=2)
        total = self.plan.total_steps
        seed_rng(self.seed + 1)
        accelerator, executor = Accelerator(cpu=True), Executor(self.objective, torch.device("cpu"))
        if accelerator.num_processes > 1:
            executor = OverRanks(self.objective, accelerator)
        executor.profile = self.profile
        update = Update(
            optimizer,
            named,
            lambda step: learning_rate_at(schedule, self.learning_rate, step, total),
            executor.scaler,
            hooks=self.hooks(self.model),
        )
        resolved = replace(
            ResolvedPlan(self.budget, 64, "eager", False, "fp32", "fp32", "cpu", executor.ranks, "recipe"),
            micro_batches_at_once=self.at_once,
            **self.trials,
        )
        environment = Environment.here("cpu", executor.ranks)
        log = MetricsLog(run.metrics, self.reporter)
        return Trainer(
            executor,
            update,
            StepRows(self.rows, self.seed, self.batch_size),
            Cutter(self.rows, self.task, PAD, self.packing, ranks=executor.ranks),
            self.plan,
            self.store,
            Snapshot(update, save_adapter(self.model), load_adapter(self.model), resolved, environment),
            Journal(self.reporter, log, profile=self.profile, counts_memory=self.counts_memory),
            self.held_out,
            set_attention=partial(set_attention, self.objective.base),
            embedding_noise=self.embedding_noise,
        )

    def resume(self, step: int | None = None) -> tuple[Trainer, Any]:
        """A fresh trainer at the newest whole checkpoint (or `step`'s)."""
        trainer = self.trainer()
        checkpoint = self.store.open(step)
        assert checkpoint is not None
        return trainer, trainer.restore(checkpoint)

    def lines(self) -> list[dict[str, Any]]:
        text = (self.root / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def files(self, step: int) -> dict[str, bytes]:
        """The checkpoint's tensors."""
        folder = self.root / "checkpoints" / f"step-{step:06d}"
        return {f.name: f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}
