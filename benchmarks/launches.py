"""Kernels that a training step launches for each layer: PEFT's own forward, and lorafit's with each table of kernels.

    python benchmarks/launches.py [--model meta-llama/Llama-3.1-8B] [--quantization nf4] [--r 16] [--rows 2]

No card is needed: train's own step (`lorafit.estimation.dry_run`) runs on tensors without values, and each operation
that would launch a kernel on a card is counted once; views and allocations are left out. A layer's share is what a
third layer adds to two. Gradients are added to those of an earlier micro-batch; clipping and the update are left out.

What runs on a card alone, torch's fused norm and Liger's kernels, is counted by `LAUNCHES`: for Liger as its source
launches them, which `tests/liger` compares with its code. bitsandbytes' product of a 4-bit weight, which PEFT's forward
takes, counts as one: on most cards it is one for small micro-batches, and four beyond 1,536 tokens.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from lorafit.estimation import dry_run
from lorafit.facts import DeviceFacts
from lorafit.model.class_shape import find_shape
from lorafit.model.known_models import known_config
from lorafit.ops.kernels import Kernels
from lorafit.plan.recipe_step import recipe_step
from lorafit.recipe.schema import Recipe

LAUNCHES = {
    "none": {"norm": 1, "norm_backward": 1},
    "liger": {  # beside the copies that a rotation is made in, which are counted as they run
        "norm": 1, "norm_backward": 2, "multiply_silu": 1, "differentiate_silu": 1, "rotate": 1, "logit_errors": 2,
    },
}  # fmt: skip
"""Of one call of a table's operation that a dry run only sizes; Liger's backward of a norm fills its
result first, and losses are summed."""
_CARD = DeviceFacts("cuda", "a card", 80 * 2**30, True, capability=(9, 0))
_NO_LAUNCH = {
    "view", "detach", "alias", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
    "split", "split_with_sizes", "chunk", "unbind", "reshape", "_unsafe_view", "_reshape_alias", "as_strided",
    "narrow", "diagonal", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "device", "sym_size",
}  # fmt: skip
_ROW_TOKENS = 512


class _Counter:
    """Launches by phase, `forward` and `backward`, while it is on."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.is_on = False

    def add(self, phase: str, launches: int) -> None:
        if self.is_on:
            self.counts[phase] += launches

    def table(self, kernels: Kernels) -> Kernels:
        """The table, each call counted."""
        counted = {name: self._counted(getattr(kernels, name), n) for name, n in LAUNCHES[kernels.name].items()}
        return replace(kernels, **counted)

    def _counted(self, operation: Any, launches: int) -> Any:
        def run(*arguments: Any) -> Any:
            self.add(self.live.phase, launches)
            return operation(*arguments)

        return run


def launches_on_a_card(function: Any) -> bool:
    """Whether an operation of torch's is no mere view or allocation."""
    name = function._schema.name.split("::")[1]
    return not {name, name.rstrip("_")} & _NO_LAUNCH


def launches_a_layer(
    how: str, *, model: str = "meta-llama/Llama-3.1-8B", quantization: str = "nf4", r: int = 16, rows: int = 2
) -> dict[str, int]:
    """Forward and backward with checkpointing, without dropout or kept copies.

    Args:
        how: `peft`, `none` or `liger`.
        model: One of configs/models.
        quantization: A kind.
        r: Rank of the adapters, on all linears.
        rows: Of 512 tokens.
    """
    two, three = (_count(how, layers, model, quantization, r, rows) for layers in (2, 3))
    return {phase: three[phase] - two[phase] for phase in ("forward", "backward")}


def _count(how: str, layers: int, model: str, quantization: str, r: int, rows: int) -> Counter[str]:
    known = known_config(model)
    assert known is not None, f"{model} is not in configs/models"
    config = {**known, "num_hidden_layers": layers}
    recipe = Recipe.model_validate(
        {
            "name": "launches",
            "model": {"base": model, "quantization": quantization, "dtype": "bf16", "kernels": "none"},
            "adapter": {"r": r, "dropout": 0.0},
            "data": {"train": "rows.jsonl", "max_length": _ROW_TOKENS},
            "training": {"optimizer": "adamw"},
        }
    )
    asked = recipe_step(recipe, find_shape(config), None, _CARD).step
    step = replace(asked, kernels="liger" if how == "liger" else "none", keeps_unpacked=False)
    counter = _Counter()
    with _counting(counter, fuses=how != "peft"):
        dry = dry_run.DryRun(step, config)
        dry._executor.sum_gradients = lambda: setattr(counter, "is_on", False)  # type: ignore[method-assign]
        counter.is_on = True
        dry.run(rows * _ROW_TOKENS, checkpointing=True)
    return counter.counts


@contextmanager
def _counting(counter: _Counter, *, fuses: bool) -> Iterator[None]:
    class Counting(dry_run.LiveFakes):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            counter.live = self

        def call(self, function: Any, arguments: Any, options: Any) -> Any:
            counter.add(self.phase, int(launches_on_a_card(function)))
            return super().call(function, arguments, options)

    with (
        patch.object(dry_run, "LiveFakes", Counting),
        patch.object(dry_run, "SIZED_FUSED", counter.table(dry_run.SIZED_FUSED)),
        patch.object(dry_run, "SIZED_LIGER", counter.table(dry_run.SIZED_LIGER)),
        patch.object(dry_run, "fuse_layers", dry_run.fuse_layers if fuses else lambda *_: {}),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2)
    options = vars(parser.parse_args())
    print("| a layer of " + options["model"] + " | forward | backward, recomputing | together | fewer |")
    print("|---|---|---|---|---|")
    pefts = 0
    for how, name in (("peft", "PEFT's own forward"), ("none", "kernels: none"), ("liger", "kernels: liger")):
        found = launches_a_layer(how, **options)
        together = sum(found.values())
        pefts = pefts or together
        print(f"| {name} | {found['forward']} | {found['backward']} | {together} | {1 - together / pefts:.1%} |")


if __name__ == "__main__":
    main()
