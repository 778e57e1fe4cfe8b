"""lorafit's DPO, KTO and ORPO against TRL's on the same answers, and what the reference costs and is worth.

    python benchmarks/preference_parity.py MODEL PAIRS.jsonl HELD_OUT.jsonl [--batch 8] [--steps 10] [--tune-steps 20]
        [--task dpo|kto|orpo] [--loss sigmoid|hinge|ipo] [--label-smoothing 0.1] [--sft-weight 0.5]
        [--undesirable-weight 0.2] [--learning-rate 2e-4]
        [--parts parity,step-0,held-out]

MODEL is what `model.base` takes; both files hold prompt, chosen and rejected. TRL (`pip install trl`) starts from
lorafit's own adapter of step 0 and gets lorafit's tokens in lorafit's order; forward, loss, reference and optimizer are
its own. Without TRL that part is left out. Prints, per step, both losses in fp32; the distance of the loss at step 0
from ln 2, by how a step is cut, from a fresh and from a trained adapter, and in NF4 with bf16; how many pairs were
passed through the model for the reference; and reward accuracy on held-out pairs, lorafit's with its interval. TRL
calls a sigmoid loss with label smoothing `robust`. Its `sft` loss is a mean over all tokens of a device batch: with
--batch 1 it is ours.

`--task kto` makes two rows with a verdict of each pair. TRL's trainer takes the answers to other prompts that lorafit
chose, and the whole step as its device batch. `--task orpo` trains by lorafit, and compares what each says of the
held-out pairs: the log odds ratio by TRL's own functions, and the paper's loss of it; TRL's first term takes the prompt
in, and is left out.
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
from types import SimpleNamespace
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

BETA = 0.1
HAS_TRL = find_spec("trl") is not None


def write_recipe(folder: Path, arguments: argparse.Namespace) -> Path:
    """LoRA without dropout in fp32."""
    base = arguments.model if "://" in arguments.model else str(Path(arguments.model).resolve())
    options = {"loss": arguments.loss, "label_smoothing": arguments.label_smoothing, "sft_weight": arguments.sft_weight}
    task = {
        "dpo": {"beta": BETA, **options},
        "kto": {"beta": BETA, "undesirable_weight": arguments.undesirable_weight},
        "orpo": {"odds_weight": BETA},
    }[arguments.task]
    margin = (
        ["desirable_margin", "reference_point"] if arguments.task == "kto" else ["reward_accuracy", "reward_margin"]
    )
    values = {
        "name": "preference-parity",
        "task": {"kind": arguments.task, **task},
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
            "learning_rate": arguments.learning_rate,
            "optimizer": "adamw",
            "schedule": "constant",
            "gradient_checkpointing": False,
        },
        "evaluation": {"final": [*margin, "loss"]},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe


def part_pairs(file: str, target: Path) -> str:
    """A file of both answers to each prompt one by one, with their verdicts."""
    pairs = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    rows = (
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    )
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(target)


class Runs:
    """Trains with changes, and counts the rows that the model was asked for as a reference."""

    def __init__(self, recipe: Path, kind: str) -> None:
        self.recipe, self.kind, self.referred = recipe, kind, 0
        self._made = 0

    def losses(self, output: str = "", **changes: Any) -> list[float]:
        """The loss of each step; keys have `__` for their dots."""
        self._made += 1
        folder = self.recipe.parent / (output or f"run-{self._made}")
        overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        own, self.referred = tasks.get(self.kind).refer, 0

        def refer(task: Any, objective: Any, batch: Any) -> Any:
            self.referred += len(batch.rows)
            return own(task, objective, batch)

        with patch.object(tasks.get(self.kind), "refer", refer):
            pipeline.train(self.recipe, output=folder, overrides=overrides)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines]


def run_trl(
    job: Job, start: Path, arguments: argparse.Namespace, folder: Path, steps: int
) -> tuple[list[float], list[float], Callable[[], dict[str, float]]]:
    """TRL's trainer over the same tokens, from the same adapter: each step's loss, KTO's reference points, and what
    scores the test rows."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    is_kto = arguments.task == "kto"
    base_trainer: Any = KTOTrainer if is_kto else DPOTrainer
    order = StepRows(job.rows.train, job.recipe.seed, arguments.batch)
    found: list[float] = []

    class Trainer(base_trainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *inputs: Any, **options: Any) -> Any:
            loss = super().compute_loss(*inputs, **options)
            found.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
            return loss

    def pair(example: Example) -> dict[str, Any]:
        ids: dict[str, Any] = {"label": bool(example["desirable"][0])} if is_kto else {}
        theirs = {"answer": "completion", "mismatched": "KL_completion"}
        for side in tasks.get(arguments.task).sides:
            prompt, answer = split_answer(example, side)
            ids |= {"prompt_ids": prompt, f"{theirs.get(side, side)}_ids": answer}
        return ids

    rows = [pair(job.rows.train[row]) for step in range(1, steps + 1) for row in order.rows(step)[1]]
    test = job.rows.splits["test"]
    held_out = [pair(test[row]) for row in range(len(test))]
    base = AutoModelForCausalLM.from_pretrained(job.base.path, dtype=torch.float32, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(base, str(start), is_trainable=True)
    loss = {
        "loss_type": ["robust" if arguments.label_smoothing else arguments.loss, "sft"],
        "loss_weights": [1.0, arguments.sft_weight],
        "label_smoothing": arguments.label_smoothing,
    }
    options = (KTOConfig if is_kto else DPOConfig)(
        output_dir=str(folder),
        beta=BETA,
        **({"undesirable_weight": arguments.undesirable_weight, "logging_steps": 1} if is_kto else loss),
        max_length=None,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=len(held_out) if is_kto else 1,  # KTO's reference point is that of all rows
        max_steps=steps,
        learning_rate=arguments.learning_rate,
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
    points = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    return found[:steps], points, trainer.evaluate


def split_answer(example: Example, side: str) -> tuple[list[int], list[int]]:
    """Tokens before the answer of a side, and those of it."""
    tokens, trained = (np.asarray(example[f"{side}_{part}"]) for part in ("tokens", "trained"))
    first, last = np.flatnonzero(trained)[[0, -1]]
    return tokens[:first].tolist(), tokens[first : last + 1].tolist()


def compare_odds(runs: Runs, arguments: argparse.Namespace) -> None:
    """Log odds ratios and losses of the held-out pairs after some steps, beside TRL's functions."""
    import torch
    from peft import PeftModel
    from torch.nn import functional
    from transformers import AutoModelForCausalLM
    from trl.experimental.orpo import ORPOTrainer

    folder = runs.recipe.parent
    runs.losses("first")
    pipeline.evaluate(folder / "first")
    job = open_job(load_recipe(folder / "first/recipe.yaml"), Silent())
    rows = [json.loads(line) for line in (folder / "first/report.jsonl").read_text(encoding="utf-8").splitlines()]
    base = AutoModelForCausalLM.from_pretrained(job.base.path, dtype=torch.float32, attn_implementation="sdpa")
    model = PeftModel.from_pretrained(base, str(folder / "first/adapter")).eval()
    known = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    odds, losses = [], []
    for number, row in enumerate(rows):
        means = []
        for side in ("chosen", "rejected"):
            prompt, answer = split_answer(job.rows.splits["test"][number], side)
            labels = torch.tensor([[-100] * len(prompt) + answer])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits
            means.append(ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True))
        ratio = ORPOTrainer.odds_ratio_loss(known, *means)[-1]
        odds.append(abs(float(ratio) - row["tuned"]["margin"]))
        losses.append(abs(float(-means[0] - BETA * functional.logsigmoid(ratio)) - row["tuned"]["loss"]))
    print(f"{len(rows)} pairs: largest difference of the log odds ratio {max(odds):.1e}, of the loss {max(losses):.1e}")


def compare_with_trl(runs: Runs, arguments: argparse.Namespace) -> None:
    """Each step's loss, beside TRL's where that is installed; and the pairs that were asked as a reference."""
    folder = runs.recipe.parent
    ours = runs.losses("first")
    pairs = arguments.batch * arguments.steps
    print(f"reference: {runs.referred} rows passed once for {pairs} rows of training", flush=True)
    if not HAS_TRL:
        return
    job = open_job(load_recipe(runs.recipe), Silent())
    start = folder / "first/checkpoints/step-000000/adapter"
    theirs, points, _ = run_trl(job, start, arguments, folder / "trl", arguments.steps)
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        point = f"  TRL's z0 {points[step - 1]:.4f}" if points else ""
        print(f"fp32 step {step}: lorafit {one:.7f}  TRL {other:.7f}  difference {abs(one - other):.1e}{point}")


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
        *_, evaluate = run_trl(job, start, arguments, folder / "trl", steps)
        scores = evaluate()
        names = (
            ("rewards/margins", "loss", "kl")
            if runs.kind == "kto"
            else ("rewards/accuracies", "rewards/margins", "loss")
        )
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
    parser.add_argument("--task", choices=["dpo", "kto", "orpo"], default="dpo")
    parser.add_argument("--loss", choices=["sigmoid", "hinge", "ipo"], default="sigmoid")
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--sft-weight", type=float, default=0.0)
    parser.add_argument("--undesirable-weight", type=float, default=1.0, help="of KTO; with less z0 rises above 0")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--parts", default="parity,step-0,held-out")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if not HAS_TRL:
        print("TRL is not installed: its half is left out (pip install trl)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LORAFIT_CACHE"] = str(folder / "cache")  # nobody's reference is known yet
        if arguments.task == "kto":
            arguments.pairs = part_pairs(arguments.pairs, folder / "pairs.jsonl")
            arguments.held_out = part_pairs(arguments.held_out, folder / "held_out.jsonl")
        recipe = write_recipe(folder, arguments)
        runs = Runs(recipe, arguments.task)
        if arguments.task == "orpo":
            compare_odds(runs, arguments)
            return
        longest = open_job(load_recipe(recipe), Silent()).rows.facts().longest_tokens
        if "parity" in parts:
            compare_with_trl(runs, arguments)
        if "step-0" in parts and arguments.task == "dpo":
            show_step_0(runs, arguments, longest)
        if "held-out" in parts and arguments.tune_steps:
            score_held_out(runs, arguments, longest)


if __name__ == "__main__":
    main()
