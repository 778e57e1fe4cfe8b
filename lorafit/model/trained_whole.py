"""Modules of the base that are trained whole beside an adapter: embeddings, output head, norms.

    frozen module ──adapter off──┐
    its copy in fp32 ──adapter on┴─> the result, in the base's dtype as before

As adapters they are trained in fp32: in bf16 most of an update would be rounded away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lorafit.errors import RecipeError
from lorafit.kinds.linear_targets import LinearsSection
from lorafit.model.targets import choose_whole

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from lorafit.kinds.adapters import AdapterSection


def ask_for_modules(config: PeftConfig, model: PreTrainedModel | PeftModel, section: AdapterSection) -> list[str]:
    """Writes into PEFT's config which modules the recipe trains whole, beside those that are there, and that an
    embedding which is the output head stays that.

    Returns:
        Paths of the modules.

    Raises:
        RecipeError: The method's PEFT config cannot say that.
    """
    names = section.modules_to_save if isinstance(section, LinearsSection) else None
    whole = choose_whole(model, names or ())
    if not whole:
        return []
    if len({id(module.weight) for module in whole.values()}) < len(whole):
        if not hasattr(config, "ensure_weight_tying"):
            what = f"{section.kind} cannot train a weight whole that is embedding and output head: PEFT would part them"
            raise RecipeError(what, key="adapter.modules_to_save", todo="leave it out, or use adapter lora")
        config.ensure_weight_tying = True
    config.modules_to_save = [*(config.modules_to_save or ()), *whole]  # whole paths: PEFT matches the ends of names
    return [*whole]


def widen(model: PeftModel, paths: list[str]) -> None:
    """Makes the trained copies of these modules fp32."""
    base = model.get_base_model()
    for path in paths:
        for parameter in base.get_submodule(path).modules_to_save.parameters():
            parameter.data = parameter.data.float()


def keep_dtypes(model: PeftModel, name: str) -> None:
    """Lets the trained copies of single modules give results in the base's dtype, whatever their own is."""
    from peft.utils import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.modules_to_save:
            trained: Any = wrapper.modules_to_save[name]
            if not hasattr(trained, "weight") or hasattr(trained, "base_layer"):
                continue  # a head or a projector of several layers: tasks compute those as they are
            trained.register_forward_pre_hook(_widen_input)
            base: Any = wrapper.original_module  # whose dtype may change yet, as where two models are compared in fp32
            trained.register_forward_hook(lambda _, __, result, base=base: _in_dtype(result, base.weight.dtype))


def _widen_input(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """torch's own layers want one dtype where autocast does not care for that."""
    first = arguments[0]
    if not first.is_floating_point() or torch.is_autocast_enabled(first.device.type):
        return None
    is_torchs = type(module).__module__.startswith("torch.nn")
    return (first.to(module.weight.dtype), *arguments[1:]) if is_torchs else None


def _in_dtype(result: Any, dtype: torch.dtype) -> Any:
    is_wider = isinstance(result, torch.Tensor) and result.dtype == torch.float32
    return result.to(dtype) if is_wider else result
