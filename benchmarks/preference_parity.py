"""lorafit's DPO against TRL's DPOTrainer on the same pairs, and what the reference costs and is worth.

    python benchmarks/preference_parity.py MODEL PAIRS.jsonl HELD_OUT.jsonl [--batch 8] [--steps 10] [--tune-steps 20]
        [--loss sigmoid|hinge|ipo] [--label-smoothing 0.1] [--sft-weight 0.5] [--parts parity,step-0,held-out]

MODEL is what `model.base` takes; both files hold prompt, chosen and rejected. TRL (`pip install trl`) starts from
lorafit's own adapter of step 0 and gets lorafit's tokens in lorafit's order; forward, loss, reference and optimizer are
its own. Without TRL that part is left out. Prints, per step, both losses in fp32; the distance of the loss at step 0
from ln 2, by how a step is cut, from a fresh and from a trained adapter, and in NF4 with bf16; how many pairs were
passed through the model for the reference; and reward accuracy on held-out pairs, lorafit's with its interval. TRL
calls a sigmoid loss with label smoothing `robust`. Its `sft` loss is a mean over all tokens of a device batch: with
--batch 1 it is ours.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml

from lorafit import pipeline
from lorafit.contracts import Example, Silent
from lorafit.data.batch import StepRows
from lorafit.job import Job, open_job
from lorafit.kinds.tasks import tasks
from lorafit.recipe.load import load_recipe

LEARNING_RATE, BETA = 2e-4, 0.1
HAS_TRL = find_spec("trl") is not None


def write_recipe(folder: Path, arguments: argparse.Namespace) -> Path:
    """LoRA without dropout in fp32."""
    base = arguments.model if "://" in arguments.model else str(Path(arguments.model).resolve())
    values = {
        "name": "dpo-parity",
        "task": {
            "kind": "dpo",
            "beta": BETA,
            "loss": arguments.loss,
            "label_smoothing": arguments.label_smoothing,
            "sft_weight": arguments.sft_weight,
        },
        "model": {"base": base, "dtype": "fp32", "quantization": "none", "attention": "sdpa"},
        "adapter": {"kind": "lora", "r": 8, "alpha": 16, "dropout": 0.0},
        "data": {
            "train": [{"path": str(Path(arguments.pairs).resolve()), "limit": arguments.batch * arguments.steps}],
            "test": [{"path": str(Path(arguments.held_out).resolve()), "limit": arguments.held_out_pairs}],
            "chat_template": "chatml",
            "max_length": 256,
            "overlength": "drop",
        },
        "training": {
            "max_steps": arguments.steps,
            "batch_size": arguments.batch,
            "micro_batch_tokens": 1,
            "learning_rate": LEARNING_RATE,
            "optimizer": "adamw",
            "schedule": "constant",
            "gradient_checkpointing": False,
        },
        "evaluation": {"final": ["reward_accuracy", "reward_margin", "loss"]},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe


class Runs:
    """Trains with changes, and counts the pairs that the model was asked for as a reference."""

    def __init__(self, recipe: Path) -> None:
        self.recipe, self.referred = recipe, 0
        self._made = 0

    def losses(self, output: str = "", **changes: Any) -> list[float]:
        """The loss of each step; keys have `__` for their dots."""
        self._made += 1
        folder = self.recipe.parent / (output or f"run-{self._made}")
        overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        own, self.referred = tasks.get("dpo").refer, 0

        def refer(task: Any, objective: Any, batch: Any) -> Any:
            self.referred += len(batch.rows)
            return own(task, objective, batch)

        with patch.object(tasks.get("dpo"), "refer", refer):
            pipeline.train(self.recipe, output=folder, overrides=overrides)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines]


def run_trl(
    job: Job, start: Path, arguments: argparse.Namespace, folder: Path, steps: int
) -> tuple[list[float], Callable[[], dict[str, float]]]:
    """TRL's trainer over the same tokens, from the same adapter: each step's loss, and its scores of the test rows."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    order = StepRows(job.rows.train, job.recipe.seed, arguments.batch)
    found: list[float] = []

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *inputs: Any, **options: Any) -> Any:
            loss = super().compute_loss(*inputs, **options)
            found.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
            return loss

    def pair(example: Example) -> dict[str, list[int]]:
        ids = {}
        for side in ("chosen", "rejected"):
            tokens, trained = (np.asarray(example[f"{side}_{part}"]) for part in ("tokens", "trained"))
            first, last = np.flatnonzero(trained)[[0, -1]]
            ids |= {"prompt_ids": tokens[:first].tolist(), f"{side}_ids": tokens[first : last + 1].tolist()}
        return ids

    rows = [pair(job.rows.train[row]) for step in range(1, steps + 1) for row in order.rows(step)[1]]
    test = job.rows.splits["test"]
    held_out = [pair(test[row]) for row in range(len(test))]
    base = AutoModelForCausalLM.from_pretrained(job.base.path, dtype=torch.float32, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(base, str(start), is_trainable=True)
    options = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        loss_type=["robust" if arguments.label_smoothing else arguments.loss, "sft"],
        loss_weights=[1.0, arguments.sft_weight],
        label_smoothing=arguments.label_smoothing,
        max_length=None,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=1,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        args=options,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=job.tokenizer,
    )
    trainer.train()
    return found[:steps], trainer.evaluate


def compare_with_trl(runs: Runs, arguments: argparse.Namespace) -> None:
    """Each step's loss, beside TRL's where that is installed; and the pairs that were asked as a reference."""
    folder = runs.recipe.parent
    ours = runs.losses("first")
    pairs = arguments.batch * arguments.steps
    print(f"reference: {runs.referred} pairs passed once for {pairs} pairs of training", flush=True)
    if not HAS_TRL:
        return
    job = open_job(load_recipe(runs.recipe), Silent())
    start = folder / "first/checkpoints/step-000000/adapter"
    theirs, _ = run_trl(job, start, arguments, folder / "trl", arguments.steps)
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"fp32 step {step}: lorafit {one:.7f}  TRL {other:.7f}  difference {abs(one - other):.1e}")


def show_step_0(runs: Runs, arguments: argparse.Namespace, longest: int) -> None:
    """How far the first loss is from ln 2, by start, cut and precision."""
    runs.losses("begun", training__max_steps=2)
    trained = str(runs.recipe.parent / "begun" / "adapter")
    quantised = {"model__quantization": "nf4", "model__dtype": "bf16"}
    for precision, options in (("fp32", {}), ("NF4 with bf16", quantised)):
        for start, adapter in (("fresh", None), ("trained", trained)):
            for cut, budget in {"each pair alone": 1, "4 at once": 4 * longest, "all at once": 99 * longest}.items():
                changes = {**options, "adapter__init_from": adapter, "training__micro_batch_tokens": budget}
                off = runs.losses(training__max_steps=1, **changes)[0] - math.log(2)
                shown = f"step 0 in {precision}, {start} adapter, {cut}: ln 2 {off:+.1e}"
                print(f"{shown}; {runs.referred} pairs passed for it", flush=True)


def score_held_out(runs: Runs, arguments: argparse.Namespace, longest: int) -> None:
    """Held-out pairs after some training, by lorafit and by TRL."""
    steps, folder = arguments.tune_steps, runs.recipe.parent
    more = [{"path": str(Path(arguments.pairs).resolve()), "limit": arguments.batch * steps}]
    runs.losses("tuned", data__train=more, training__max_steps=steps, training__micro_batch_tokens=4 * longest)
    for line in pipeline.evaluate(folder / "tuned").evaluation.comparisons:
        print(f"{steps} steps, held out: {line.sentence}; tuned 95 %: {line.tuned_span}", flush=True)
    if HAS_TRL:
        job = open_job(load_recipe(folder / "tuned/recipe.yaml"), Silent())
        start = folder / "tuned/checkpoints/step-000000/adapter"
        _, evaluate = run_trl(job, start, arguments, folder / "trl", steps)
        names = ("rewards/accuracies", "rewards/margins", "loss")
        scores = evaluate()
        shown = ", ".join(f"{name} {scores[f'eval_{name}']:.4f}" for name in names)
        print(f"{steps} steps, held out, TRL: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("held_out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tune-steps", type=int, default=20, help="0: no held-out pairs are scored")
    parser.add_argument("--held-out-pairs", type=int, default=100)
    parser.add_argument("--loss", choices=["sigmoid", "hinge", "ipo"], default="sigmoid")
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--sft-weight", type=float, default=0.0)
    parser.add_argument("--parts", default="parity,step-0,held-out")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if not HAS_TRL:
        print("TRL is not installed: its half is left out (pip install trl)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LORAFIT_CACHE"] = str(folder / "cache")  # nobody's reference is known yet
        recipe = write_recipe(folder, arguments)
        runs = Runs(recipe)
        longest = open_job(load_recipe(recipe), Silent()).rows.facts().longest_tokens
        if "parity" in parts:
            compare_with_trl(runs, arguments)
        if "step-0" in parts:
            show_step_0(runs, arguments, longest)
        if "held-out" in parts and arguments.tune_steps:
            score_held_out(runs, arguments, longest)


if __name__ == "__main__":
    main()
