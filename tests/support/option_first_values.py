"""Cases for what adapters begin with: every initialisation and its options, on one base that is loaded once."""

from __future__ import annotations

from functools import partial
from typing import Any

from lorafit.model.adapter import adapter_tensors
from tests.support.adapted import begin, load
from tests.support.option_leaves import Case
from tests.support.option_world import Changes, OptionWorld, digest_of

INITIALISATIONS = "kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq", "corda"
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "pissa": {"iterations": (None, 0)},
    "loftq": {"iterations": (None, 0)},
    "eva": {"rows": (1, 4)},
    "corda": {"rows": (1, 4), "mode": ("ipm", "kpm")},
}
ROWS = {"data.train": "../rows/train.jsonl", "evaluation.retention": "../rows/more.jsonl"}


def first_value_cases(world: OptionWorld, kind: str) -> dict[str, Case]:
    """Cases of one adapter's `init`."""
    name = f"adapter({kind}).init"
    found = {name: Case(INITIALISATIONS, partial(first_values, world, kind))}
    for init, fields in OPTIONS.items():
        for field, values in fields.items():
            found[f"{name}({init}).{field}"] = Case(values, partial(with_option, world, kind, init, field))
    return found


def with_option(world: OptionWorld, kind: str, init: str, field: str, value: Any) -> dict[str, str]:
    """The first values with an option of an initialisation."""
    return first_values(world, kind, {"kind": init, field: value})


def first_values(world: OptionWorld, kind: str, init: str | Changes) -> dict[str, str]:
    """Shape and content of each tensor of the adapter that a run would begin with, on NF4."""
    job = world.remember("job", ROWS, lambda: world.job(ROWS))
    base = world.remember("base", ROWS, lambda: load(job.base, "nf4"))
    section = {"kind": kind, "r": 4, "target_modules": ["q_proj"], "init": init}
    adapter = world.load({**ROWS, "model.quantization": "nf4", "adapter": section}).recipe.adapter
    model = begin(job.base, adapter, base, job.rows.splits["train"], job.rows.splits["retention"])
    found = {name: f"{tuple(value.shape)} {digest_of(value)}" for name, value in adapter_tensors(model).items()}
    model.unload()
    return found
