"""Classification of texts beside the same frozen model with a logistic regression: each metric with a paired interval.

    python benchmarks/classification.py MODEL DATA [DATA ...] [--epochs N] [--learning-rate X] [--head H] [--dtype D]
        [--runs DIR]

MODEL is a folder with an encoder, DATA a folder with train.jsonl and test.jsonl (text, label). Settings are by data set
(`SETTINGS`), chosen on validation rows, as is the step whose adapter is taken. The baseline is what
`lorafit eval` scores the base with: a logistic regression over the mean of the frozen model's last states, its strength
chosen on held-out rows. Of each run, the logits of the merged model in plain transformers, in a process of its own, are
compared with those that lorafit gives. A run that is there already goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import lorafit

SETTINGS: dict[str, dict[str, float]] = {
    "banking77": {"epochs": 10, "learning_rate": 2.0e-3},
}
"""What differs from `USUAL`: many classes with few rows each take more passes and larger steps."""
USUAL = {"epochs": 4, "learning_rate": 1.0e-3}
METRICS = "macro_f1", "accuracy", "calibration_error"
BATCH_SIZE = 32
MAX_LENGTH = 64
VALIDATION_SHARE = 0.1

PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.stdin.read())
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    print(json.dumps([model(**tokenizer(t, return_tensors="pt", truncation=True, max_length=64)).logits.softmax(-1)[0]
                      .tolist() for t in texts]))
"""


def measure(model: str, data: Path, options: argparse.Namespace) -> None:
    """Trains, scores, merges, asks plain transformers, and prints a line a metric."""
    folder = Path(options.runs) / data.name
    given = {name: value for name in ("epochs", "learning_rate") if (value := getattr(options, name)) is not None}
    used = {**USUAL, **SETTINGS.get(data.name, {}), **given}
    with (data / "train.jsonl").open("rb") as file:
        steps_an_epoch = math.ceil(sum(1 for _ in file) * (1 - VALIDATION_SHARE) / BATCH_SIZE)
    recipe = {
        "name": data.name,
        "task": {"kind": "sequence-classification", "head": options.head},
        "model": {"base": model, "quantization": "none", "dtype": options.dtype},
        "adapter": {"r": 16, "alpha": 32, "dropout": 0.1, "target_modules": "all-linear"},
        "data": {
            "train": str(data / "train.jsonl"),
            "validation": {"fraction": VALIDATION_SHARE},
            "test": str(data / "test.jsonl"),
            "max_length": MAX_LENGTH,
            "overlength": "truncate",
        },
        "training": {
            "epochs": used["epochs"],
            "batch_size": BATCH_SIZE,
            "learning_rate": used["learning_rate"],
            "optimizer": "adamw",
            "schedule": {"kind": "linear", "warmup_ratio": 0.06},
        },
        "evaluation": {
            "every_steps": steps_an_epoch,
            "during": ["macro_f1"],
            "final": list(METRICS),
            "early_stopping": {"metric": "macro_f1", "patience": 1000},  # never stops; it chooses the best step
        },
        "checkpoints": {"every_steps": steps_an_epoch},
        "output": str(folder / "run"),
    }
    run = lorafit.train(recipe, resume=(folder / "run").exists())
    metrics = lorafit.evaluate(run).metrics
    merged = folder / "merged"
    if not merged.exists():
        lorafit.merge(run, merged)
    texts = [json.loads(line)["text"] for line in (data / "test.jsonl").read_text("utf-8").splitlines()[:32]]
    ours = [list(row["probabilities"].values()) for row in lorafit.classify(run, texts).found]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(merged)], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    apart = max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
    for name in METRICS:
        found = metrics[name]
        base, tuned, tuned_low, tuned_high, low, high = (
            f"{100 * found[key]:.1f}" for key in ("base", "tuned", "tuned_low", "tuned_high", "low", "high")
        )
        span, gain = f"{tuned_low} to {tuned_high}", f"{low} to {high}"
        print(f"{data.name} | {found['rows']} | {name} | {base} % | {tuned} % | {span} | {gain} | {apart:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--epochs", type=int, help="in place of the data set's own")
    parser.add_argument("--learning-rate", type=float, help="in place of the data set's own")
    parser.add_argument("--head", default="drawn", help="where the new head begins: drawn or fitted")
    parser.add_argument("--dtype", default="fp32", help="of the frozen weights and of products: fp32 or bf16")
    parser.add_argument("--runs", default="runs/classification")
    options = parser.parse_args()
    print("data | rows | metric | logistic regression | LoRA | its 95 % | difference, 95 % | apart in transformers")
    for data in options.data:
        measure(options.model, data, options)
