"""Which updates of an adapter stand out from its others, and where in the model each of them lies.

    dead       nothing, or less than a hundredth of the median of ||update|| / ||weight||
    exploded   more than five times the median, and a modified z-score above 3.5 among the logarithms:
               0.6745 (ln x - median) / median |ln x - median|

Source of the score and of 3.5: Iglewicz and Hoaglin (1993), "How to Detect and Handle Outliers", section 3.3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from statistics import median

from lorafit.model.layer_numbers import OUTSIDE

DEAD_SHARE = 0.01
EXPLODED_FACTOR = 5.0
EXPLODED_SCORE = 3.5
LEAST_MODULES = 4
"""Fewer say nothing of what is usual: then only zeros are dead, and nothing is exploded."""
_NUMBER = re.compile(r"^(?P<layer>.+?\.\d+)\.(?P<rest>.+)$")
_MATRIX = re.compile(r"\[\d+\]$")


def find_dead(ratios: Mapping[str, float]) -> list[str]:
    """Modules that do next to nothing."""
    alive = [ratio for ratio in ratios.values() if ratio > 0]
    least = DEAD_SHARE * median(alive) if len(alive) >= LEAST_MODULES else 0.0
    return [name for name, ratio in ratios.items() if ratio <= 0 or ratio < least]


def find_exploded(ratios: Mapping[str, float]) -> list[str]:
    """Modules that do far more than the others."""
    logs = {name: math.log(ratio) for name, ratio in ratios.items() if ratio > 0}
    if len(logs) < LEAST_MODULES:
        return []
    middle = median(logs.values())
    spread = median(abs(value - middle) for value in logs.values())
    far = {name: value - middle for name, value in logs.items() if value - middle > math.log(EXPLODED_FACTOR)}
    return [name for name, distance in far.items() if 0.6745 * distance > EXPLODED_SCORE * spread]


def layer_of(module: str) -> str:
    """Path of the layer that a module lies in: up to the first number."""
    match = _NUMBER.match(module)
    return match["layer"] if match else OUTSIDE


def name_layers(layers: Iterable[str]) -> dict[str, str]:
    """Short names of layers by path: `3`; where there are several stacks, `encoder 3`."""
    numbered = [layer for layer in layers if layer != OUTSIDE]
    stacks = [layer.rpartition(".")[0].split(".") for layer in numbered]
    common = set.intersection(*map(set, stacks)) if stacks else set()
    names = {
        layer: " ".join([*(part for part in stack if part not in common), layer.rpartition(".")[2]])
        for layer, stack in zip(numbered, stacks, strict=True)
    }
    return {layer: names.get(layer, "-") for layer in layers}


def name_modules(modules: Iterable[str]) -> dict[str, str]:
    """Short names of modules by path: `3.mlp.up_proj`."""
    layers = {module: layer_of(module) for module in modules}
    short = name_layers(dict.fromkeys(layers.values()))
    return {
        module: module if layer == OUTSIDE else f"{short[layer]}{module.removeprefix(layer)}"
        for module, layer in layers.items()
    }


def name_linears(modules: Iterable[str]) -> dict[str, str]:
    """What modules are called within their layer: `q_proj`; with more of the path where two would be called so.

    Experts, whose paths differ in a number alone, are called the same.
    """
    inside = {}
    for module in modules:
        match = _NUMBER.match(module)
        rest = _MATRIX.sub("", match["rest"] if match else module).split(".")
        inside[module] = ".".join(part for part in rest if not part.isdigit())
    by_last: dict[str, set[str]] = {}
    for path in inside.values():
        by_last.setdefault(path.rpartition(".")[2], set()).add(path)
    return {
        module: last if len(by_last[last := path.rpartition(".")[2]]) == 1 else path for module, path in inside.items()
    }
