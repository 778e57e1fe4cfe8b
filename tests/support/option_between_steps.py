"""Cases for the options of adapters that act between steps: a few steps on a tiny model, without a run around them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lorafit.facts import RunFacts
from lorafit.kinds.adapters import adapters
from lorafit.model.attach import attach_adapter
from tests.support.option_kinds import RANKS, attached, layer_cases
from tests.support.option_leaves import Case
from tests.support.tiny_model import tiny_llama

STEPS = 6
IDS = torch.arange(8)[None]
ADALORA = {"r": 2, "init_r": 4, "warmup_steps": 1, "final_steps": 2, "interval_steps": 1, "dropout": 0.0}
ALL = {"alpha": (8.0, 64.0), "dropout": (0.0, 0.5)}
OF_KINDS: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "adalora": (
        ADALORA,
        {
            **ALL,
            "r": (2, 1),
            "init_r": (4, 5),
            "warmup_steps": (1, 2, None),
            "final_steps": (2, 1, None),
            "interval_steps": (1, 2),
            "beta1": (0.85, 0.1),
            "beta2": (0.85, 0.1),
            "orthogonality": (0.5, 0.0),
        },
    ),
    "dylora": ({"r": 8}, {**ALL, "r": (8, 4), "r_min": (1, 7), "only_last": (False, True)}),
    "growing_lora": ({"r": 8}, {**ALL, "r": (8, 4), "start_r": (1, 4, None), "raise_steps": ([2, 3], [4], None)}),
}


def between_steps_cases() -> dict[str, Case]:
    """Every option of the three kinds, `init_from` apart."""
    cases = {}
    for kind, (section, options) in OF_KINDS.items():
        for option, values in options.items():
            cases[f"adapter({kind}).{option}"] = Case(values, partial(trained, kind, section, option))
        cases |= layer_cases(kind)
        targets = ("all-linear", ["q_proj"], ["q_proj", "v_proj"])
        cases[f"adapter({kind}).target_modules"] = Case(targets, partial(attached, kind, "target_modules"))
        if kind != "adalora":
            cases[f"adapter({kind}).ranks"] = Case(RANKS, partial(attached, kind, "ranks"))
    return cases


def trained(kind: str, section: dict[str, Any], option: str, value: Any) -> list[float]:
    """What is computed behind each step; importance too, where the method keeps it."""
    made = adapters.make_section(kind, **{**section, option: value})
    model = attach_adapter(tiny_llama(), made, 0).train()
    hook = adapters.bind(made).step_hook(model, RunFacts(0, STEPS))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.SGD(parameters, 1.0), []
    assert hook is not None
    torch.manual_seed(0)
    for step in range(1, STEPS + 1):
        hook.before_step(step)
        loss = model(input_ids=IDS, labels=IDS).loss
        penalty = hook.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        hook.after_optimizer_step(step)
        optimizer.zero_grad()
        found += [float(loss.detach()), *(float(p.detach().abs().sum()) for p in parameters)]
        found += [float(v.sum()) for v in hook.state_dict().values() if isinstance(v, torch.Tensor)]
    return found
