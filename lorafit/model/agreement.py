"""After the adapter is attached: is it the one that was planned?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafit.errors import ModelError

if TYPE_CHECKING:
    import torch

    from lorafit.kinds.adapters import Site

_SHOWN = 3


def check_plan(model: torch.nn.Module, planned: Sequence[Site], trainable_parameters: int) -> None:
    """Compares adapted layers and trainable parameters of a PEFT model with the plan's.

    Args:
        model: With its adapter.
        planned: Where the method was to train what.
        trainable_parameters: The plan's count.

    Raises:
        ModelError: They differ; the message names each kind of layer that does.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted: Counter[str] = Counter()
    for site in planned:
        if site.linear is not None:
            wanted[site.name] += site.count
    found: Counter[str] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[path.removesuffix(".base_layer").rsplit(".", 1)[-1]] += 1
    differences = [
        f"{name}: {wanted[name]} layers planned, {found[name]} adapted"
        for name in sorted(wanted | found)
        if wanted[name] != found[name]
    ]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trainable != trainable_parameters:
        differences.append(f"{trainable_parameters:,} trainable parameters planned, {trainable:,} found")
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ModelError(
            f"plan and model disagree: {'; '.join(differences[:_SHOWN])}{more}",
            key="adapter.target_modules",
            todo="name the linears to adapt, and please report it with the model's config.json",
        )
