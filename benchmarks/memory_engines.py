"""The memory engines against a dry run of the whole step, over configs/models: LoRA and QLoRA, checkpointed or not.

    python benchmarks/memory_engines.py                    every model, whole (about an hour on two cores)
    python benchmarks/memory_engines.py --layers 4         cut to 4 layers: minutes; what stands beside them shows
    python benchmarks/memory_engines.py --models Llama-3.1 Mixtral
    python benchmarks/memory_engines.py --measured --models Llama-3.1-8B Qwen3.5-9B --rows 1 5

Prints both numbers and the error for each case, and the largest error by family. Models that the closed form does not
cover, and all with --measured, are held against the dry run of the whole step by what few layers at two sizes say.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lorafit.contracts import Silent
from lorafit.errors import ModelError
from lorafit.estimation.dry_run import DryRun
from lorafit.estimation.measured import MeasuredSteps
from lorafit.machine.shipped import shipped
from lorafit.memory import StepShape
from lorafit.model.class_shape import find_shape
from lorafit.plan.recipe_step import recipe_step
from lorafit.recipe.load import load_recipe

GIB = 2**30
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
RECIPE = """
name: engines
model: {{base: x, quantization: {quantization}}}
adapter: {{kind: lora, r: 16, alpha: 32, dropout: 0.05, target_modules: all-linear}}
data: {{train: [{{path: none.jsonl}}]}}
training: {{optimizer: paged_adamw_8bit}}
output: none
"""
LLAMA_LIKES = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma3_text", "olmo2", "granite", "ministral"}


def ask(config: dict[str, Any], quantization: str, row_tokens: int, attention: str) -> StepShape:
    """The step of a recipe over rows of one length."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(RECIPE.format(quantization=quantization), encoding="utf-8")
        recipe = load_recipe(file, [f"data.max_length={row_tokens}", f"model.attention={attention}"]).recipe
    return recipe_step(recipe, find_shape(config), None, None).step


def cut(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The same model with fewer layers."""
    if "text_config" in config:
        return {**config, "text_config": cut(config["text_config"], layers)}
    changed = {key: min(layers, config[key]) for key in LAYER_KEYS if layers and key in config}
    if changed and "layer_types" in config:
        changed["layer_types"] = config["layer_types"][: layers or 0]
    return {**config, **changed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="cut the models to so many layers")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--models", nargs="*", default=[], help="parts of file names")
    parser.add_argument("--rows", type=int, nargs="*", default=[1], help="of a micro-batch")
    parser.add_argument("--quantizations", nargs="*", default=["none", "nf4"])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--measured", action="store_true", help="dry runs at two sizes, also where formulas would do")
    options = parser.parse_args()
    worst: dict[str, tuple[float, str]] = {}
    failed: list[str] = []
    print(f"{'model':44} {'case':24} {'GiB':>10} {'exact GiB':>10} {'error':>7} {'s':>5}")
    for file in sorted(shipped("models").glob("*.json")):
        if options.models and not any(part in file.stem for part in options.models):
            continue
        config = cut(json.loads(file.read_text(encoding="utf-8"))["config"], options.layers)
        if "quantization_config" in config or config.get("is_encoder_decoder"):  # the task asked is causal-lm
            continue
        engine = MeasuredSteps(config, Silent(), uses_formulas=not options.measured)
        for quantization in options.quantizations:
            step, dry = ask(config, quantization, options.tokens, options.attention), None
            for checkpointing, rows in itertools.product((False, True), options.rows):
                began = time.perf_counter()
                case = f"{quantization}{' ckpt' if checkpointing else ''} {rows} x {step.row_tokens}"
                try:
                    dry = dry or DryRun(step, config)
                    exact = dry.run(rows * step.row_tokens, checkpointing).tensor_bytes
                    closed = engine(step, rows * step.row_tokens, checkpointing).tensor_bytes
                except (RuntimeError, ModelError) as error:
                    failed.append(f"{file.stem} {case}: {(str(error).splitlines() or [''])[0][:120]}")
                    continue
                error = closed / exact - 1
                kind = "dense Llama-likes" if config["model_type"] in LLAMA_LIKES else "others"
                worst[kind] = max(worst.get(kind, (0.0, "")), (abs(error), f"{file.stem} {case}"))
                seconds = time.perf_counter() - began
                print(
                    f"{file.stem:44} {case:24} {closed / GIB:10.3f} {exact / GIB:10.3f} {error:+7.1%} {seconds:5.1f}",
                    flush=True,
                )
    for kind, (error, case) in worst.items():
        print(f"largest error, {kind}: {error:.1%} ({case})")
    print(*(f"cannot run {case}" for case in failed), sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
