"""Cases for the options of methods at linears: what two steps on a tiny random Llama make of the adapter."""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lorafit.kinds.adapters import adapters
from lorafit.model.adapter import adapter_tensors, save_adapter
from lorafit.model.attach import attach_adapter
from tests.support.adapted import load, open_base
from tests.support.option_kinds import layer_cases
from tests.support.option_leaves import Case
from tests.support.option_world import OptionWorld, digest_of

TARGETS = ("all-linear", ["q_proj"], ["q_proj", "v_proj"])
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "boft": {"block_size": (4, 8), "rounds": (1, 3), "target_modules": TARGETS},
    "ia3": {"feedforward": (["down_proj"], ["up_proj"], []), "target_modules": TARGETS},
    "miss": {"r": (4, 8), "dropout": (0.0, 0.5), "target_modules": TARGETS},
    "oft": {"block_size": (8, 16), "cayley": ("exact", "neumann"), "target_modules": TARGETS},
    "peft": {"method": ("hira", "gralora"), "options": ({}, {"r": 8}), "target_modules": TARGETS},
    "vera": {
        "r": (8, 16),
        "first_d": (0.1, 0.2),
        "dropout": (0.0, 0.5),
        "projection_seed": (0, 1),
        "target_modules": TARGETS,
    },
}
"""Values of each option of a kind."""


AT_LINEARS = tuple(OPTIONS)


def linear_cases(world: OptionWorld) -> dict[str, Case]:
    """A case for each option, and for `init_from`."""
    cases = {
        f"adapter({kind}).{option}": Case(values, partial(two_steps, world.root, kind, option))
        for kind, options in OPTIONS.items()
        for option, values in options.items()
    }
    for kind in OPTIONS:
        trained = str(world.root / f"{kind}-adapter")
        cases |= layer_cases(kind)
        cases[f"adapter({kind}).init_from"] = Case((None, trained), partial(two_steps, world.root, kind, "init_from"))
    return cases


def two_steps(root: Path, kind: str, option: str = "init_from", value: Any = None) -> dict[str, str]:
    """Digests of the adapter's tensors by name after two steps of SGD, with the option at that value."""
    if option == "init_from" and value is not None and not Path(value).exists():
        Path(value).mkdir()
        save_adapter(_stepped(root, kind, {}), Path(value), base=open_base(root / "base"))
    stepped = _stepped(root, kind, {option: value})
    return {name: digest_of(tensor) for name, tensor in adapter_tensors(stepped).items()}


def _stepped(root: Path, kind: str, options: dict[str, Any]) -> Any:
    model = attach_adapter(copy.deepcopy(_base(root)), adapters.make_section(kind, **options), 0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, ids = torch.optim.SGD(parameters, lr=1.0), torch.arange(3, 40).reshape(1, -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(2):
            model.train()(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
    return model


@cache
def _base(root: Path) -> Any:
    return load(open_base(root / "base"))
