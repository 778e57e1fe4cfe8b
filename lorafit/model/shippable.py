"""Whether what a run is about to train can be shipped: merged into the base's files, and loaded by PEFT.

Both are answered before the first step, from names and shapes alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorafit.console.wording import first_line, list_names
from lorafit.errors import ModelError
from lorafit.facts import CAUSAL_MODEL, ModelClass
from lorafit.files.safetensors import read_index
from lorafit.kinds.adapters import AdapterSection
from lorafit.kinds.quantizations import kind_of_codes
from lorafit.model.adapter import adapter_config, adapter_tensors
from lorafit.model.attach import attach_adapter, wrap_model
from lorafit.model.base import Base
from lorafit.model.check_weights import check_weights
from lorafit.model.homes import Home, find_homes
from lorafit.model.load import build_class
from lorafit.model.names import TensorNames, keep_names, names_of
from lorafit.model.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_shippable(model: PreTrainedModel, base: Base, model_class: ModelClass = CAUSAL_MODEL) -> None:
    """Plans the merge of a fresh adapter, and lets PEFT load it onto the class without values.

    Args:
        model: The loaded base with its adapter, or both on the meta device.
        base: Its files.
        model_class: What PEFT's users load it as.

    Raises:
        ModelError: An adapted or quantised layer has no rows in the files that it could be merged into, or PEFT would
            not find the adapter's tensors again.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names = names_of(model)
    if names is None:
        raise ValueError("the model was not loaded by load_model")
    homes, kind = _check_merge(model, base, names), model.get_base_model().config.model_type
    if homes and get_checkpoint_conversion_mapping(kind) is not None:  # else PEFT takes adapters by their names
        _check_peft(model, base, model_class)


def check_shippable_unloaded(base: Base, section: AdapterSection, seed: int, model_class: ModelClass) -> None:
    """The same before any weight is loaded, of the adapter that a recipe asks for; what is quantised is not asked.

    Args:
        base: The model's files.
        section: The recipe's adapter.
        seed: The recipe's.
        model_class: As in `check_shippable`.

    Raises:
        ModelError: As in `check_shippable`, or the files do not belong to the class.
        RecipeError: A target matches nothing.
    """
    skeleton = build_class(base, model_class=model_class)
    keep_names(
        skeleton, check_weights(skeleton, read_index(base.path), base.path, has_new_head=model_class.has_new_head)
    )
    with torch.device("meta"):
        model = attach_adapter(skeleton, section.model_copy(update={"init_from": None}), seed, model_class=model_class)
    check_shippable(model, base, model_class)


def _check_merge(model: PreTrainedModel, base: Base, names: TensorNames) -> dict[str, Home]:
    """Homes of the adapted layers."""
    try:
        homes = find_homes(model, names)
    except ModelError as error:
        raise ModelError(
            f"this run could not be merged: {error.what}",
            file=base.shown,
            key="adapter.target_modules",
            todo=error.todo or "name other target_modules",
        ) from error
    layers = [path.replace(".base_layer", "") for path, layer in model.get_base_model().named_modules()
              if kind_of_codes(layer) is not None]  # fmt: skip
    lost = [path for path in layers if not names.parts.get(f"{path}.weight")]
    if lost:
        raise ModelError(
            f"this run could not be merged: {len(lost)} layers would be quantised whose rows are in none of the files "
            f"({list_names(lost)})",
            file=base.shown,
            key="model.quantization",
            todo="use quantization: none",
        )
    return homes


def _check_peft(model: PreTrainedModel, base: Base, model_class: ModelClass) -> None:
    """Loads the adapter's names and shapes with PEFT's own code onto a fresh model of the class."""
    from peft import set_peft_model_state_dict

    ours = {name: torch.empty(value.shape, device="meta") for name, value in adapter_tensors(model).items()}
    fresh = wrap_model(
        build_class(base, model_class=model_class),
        adapter_config(model, *base.reference),
        ours,
        base.path,
        empty=True,
    )
    theirs = {name: tuple(value.shape) for name, value in adapter_tensors(fresh).items()}
    with quiet_libraries():
        try:
            told = set_peft_model_state_dict(fresh, dict(ours), low_cpu_mem_usage=True)
            prefix = str(getattr(fresh.base_model, "prefix", ""))
            lost = [name for name in told.missing_keys if prefix and prefix in name] + list(told.unexpected_keys)
        except (RuntimeError, ValueError, KeyError) as error:
            lost = [first_line(error)]
    unlike = [name for name, value in ours.items() if theirs.get(name) != tuple(value.shape)]
    if lost or unlike:
        raise ModelError(
            f"PEFT renames the layers of this class while it loads an adapter, and would not find "
            f"{len(lost or unlike)} tensors of this one again ({list_names(lost or unlike)})",
            file=base.shown,
            key="adapter.target_modules",
            todo="name other target_modules",
        )
