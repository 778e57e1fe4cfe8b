"""The closed form against the exact engine over the models of configs/models: LoRA and QLoRA, checkpointed or not.

    python benchmarks/memory_engines.py                    every model, whole (about an hour on two cores)
    python benchmarks/memory_engines.py --layers 4         cut to 4 layers: minutes; what stands beside them shows
    python benchmarks/memory_engines.py --models Llama-3.1 Mixtral

Prints both numbers and the error of the closed form for each case, and the largest error by family.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError
from lorafit.estimation.dry_run import DryRun
from lorafit.machine.shipped import shipped
from lorafit.model.class_shape import find_shape
from lorafit.plan import MemoryQuestion
from lorafit.plan.step_memory import estimated_attention
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


def compare(config: dict[str, Any], quantization: str, checkpointing: bool, tokens: int) -> tuple[int, int]:
    """Tensor bytes by the closed form and by the exact engine."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(RECIPE.format(quantization=quantization), encoding="utf-8")
        recipe = load_recipe(file).recipe
    shape = find_shape(config)
    longest = min(tokens, shape.max_positions)
    question = MemoryQuestion(recipe, shape, longest, longest, "bf16", estimated_attention(recipe, shape), "cuda")
    exact = DryRun(question, config, tokens, checkpointing).run()
    return question.at(tokens, checkpointing).tensor_bytes, exact.tensor_bytes


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
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--models", nargs="*", default=[], help="parts of file names")
    options = parser.parse_args()
    worst: dict[str, tuple[float, str]] = {}
    failed: list[str] = []
    print(f"{'model':44} {'case':14} {'closed GiB':>10} {'exact GiB':>10} {'error':>7} {'s':>5}")
    for file in sorted(shipped("models").glob("*.json")):
        if options.models and not any(part in file.stem for part in options.models):
            continue
        config = cut(json.loads(file.read_text(encoding="utf-8"))["config"], options.layers)
        if "quantization_config" in config:
            continue
        for quantization in ("none", "nf4"):
            for checkpointing in (False, True):
                began = time.perf_counter()
                case = f"{quantization}{' ckpt' if checkpointing else ''}"
                try:
                    closed, exact = compare(config, quantization, checkpointing, options.tokens)
                except (RuntimeError, ModelError) as error:
                    failed.append(f"{file.stem} {case}: {(str(error).splitlines() or [''])[0][:120]}")
                    continue
                error = closed / exact - 1
                kind = "dense Llama-likes" if config["model_type"] in LLAMA_LIKES else "others"
                worst[kind] = max(worst.get(kind, (0.0, "")), (abs(error), f"{file.stem} {case}"))
                seconds = time.perf_counter() - began
                print(
                    f"{file.stem:44} {case:14} {closed / GIB:10.3f} {exact / GIB:10.3f} {error:+7.1%} {seconds:5.1f}",
                    flush=True,
                )
    for kind, (error, case) in worst.items():
        print(f"largest error, {kind}: {error:.1%} ({case})")
    print(*(f"cannot run {case}" for case in failed), sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
