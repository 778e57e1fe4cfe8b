"""lorafit's training loop against a plain transformers + PEFT loop: per-step losses on the same rows.

    python benchmarks/loss_parity.py MODEL ROWS.jsonl [--rows 64] [--batch 16] [--max-length 256]

MODEL is a folder of safetensors with a chat template; ROWS holds question/answer, alpaca or messages rows. The plain
loop is written here: every row alone, the model's own loss from full logits, torch's AdamW. Prints, per step, both
losses and their relative difference in fp32, and the difference from the plain loop's own logits summed in fp64: the
fp32 sum over a vocabulary of 49,152 is off by several 1e-6. Then lorafit cut as 16x1, 4x4 and 1x16 (losses and gradient
norms), and the same in NF4 with bf16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lorafit import pipeline
from lorafit.contracts import Silent
from lorafit.data.batch import StepRows
from lorafit.job import open_job
from lorafit.kinds.schedules import learning_rate_at
from lorafit.recipe.load import load_recipe

LEARNING_RATE = 1e-3


def write_recipe(folder: Path, arguments: argparse.Namespace, **model: Any) -> Path:
    values = {
        "name": "parity",
        "model": {"base": str(Path(arguments.model).resolve()), "attention": "eager", **model},
        "adapter": {"kind": "lora", "r": 8, "alpha": 16, "dropout": 0.0},
        "data": {
            "train": [{"path": str(Path(arguments.data).resolve()), "limit": arguments.rows}],
            "max_length": arguments.max_length,
            "overlength": "truncate",
        },
        "training": {
            "epochs": 1,
            "batch_size": arguments.batch,
            "learning_rate": LEARNING_RATE,
            "optimizer": {"kind": "adamw"},
            "schedule": {"kind": "constant"},
            "gradient_checkpointing": False,
        },
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe


def run_lorafit(recipe: Path, output: Path, budget_tokens: int) -> list[dict[str, float]]:
    pipeline.train(recipe, output=output, overrides=[f"training.micro_batch_tokens={budget_tokens}"])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def run_plain(recipe: Path, start: Path, arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Losses, of the model itself and of its logits in fp64: rows and initial adapter of lorafit's run, no more."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = open_job(load_recipe(recipe), Silent())
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, str(start), is_trainable=True)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    step_rows, losses = StepRows(job.rows.train, job.recipe.seed, arguments.batch), []
    for step in range(1, step_rows.steps_per_epoch + 1):
        _, rows = step_rows.rows(step)
        examples = [job.rows.train[row] for row in rows]
        # Marks are bytes: summed as such they would start again at 256.
        counts = [int(np.sum(example["trained"], dtype=np.int64)) for example in examples]
        weight = sum(counts)
        total = exact = 0.0
        for example, count in zip(examples, counts, strict=True):
            ids = torch.tensor([[int(token) for token in example["tokens"]]])
            labels = torch.where(torch.tensor([list(example["trained"])]).bool(), ids, -100)
            result = model(input_ids=ids, labels=labels)
            loss = result.loss * count / weight
            loss.backward()
            logits = result.logits.detach()[0, :-1].double()
            exact += float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")) / weight
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(job.recipe.training.schedule, LEARNING_RATE, step, step_rows.steps_per_epoch)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total, exact))
    return losses


def largest_difference(ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str) -> float:
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, model in (
            ("fp32", {"dtype": "fp32", "quantization": "none"}),
            ("NF4, bf16", {"dtype": "bf16", "quantization": "nf4"}),
        ):
            recipe = write_recipe(folder, arguments, **model)
            longest = open_job(load_recipe(recipe), Silent()).rows.facts().longest_tokens
            budgets = {"16x1": 1, "4x4": 4 * longest, "1x16": 16 * longest}
            runs = {cut: run_lorafit(recipe, folder / f"{title}-{cut}", budget) for cut, budget in budgets.items()}
            reference = runs["16x1"]
            if title == "fp32":
                plain = run_plain(recipe, folder / f"{title}-16x1/checkpoints/step-000000/adapter", arguments)
                for step, (line, (loss, exact)) in enumerate(zip(reference, plain, strict=True), 1):
                    print(
                        f"{title} step {step}: lorafit {line['loss']:.8f}  plain {loss:.8f}  relative "
                        f"{abs(line['loss'] / loss - 1):.2e}, to its logits in fp64 {abs(line['loss'] / exact - 1):.2e}"
                    )
            for cut in ("4x4", "1x16"):
                print(
                    f"{title} {cut} against 16x1: losses {largest_difference(runs[cut], reference, 'loss'):.2e}, "
                    f"gradient norms {largest_difference(runs[cut], reference, 'grad_norm'):.2e} (relative)"
                )


if __name__ == "__main__":
    main()
