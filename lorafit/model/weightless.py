"""A model without its weights: transformers' own class and bitsandbytes' own layers, every tensor fake.

    config --class on the meta device--> skeleton --transformers' replacement--> Linear4bit, Linear8bitLt
           --attach_adapter, still on the meta device--> what is trained
           --each parameter and buffer once (tied stay tied)--> fake tensors of the size that loading would give

What runs on it is the code that runs on the loaded model; nothing is computed and nothing takes memory.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonMapping, Silent
from lorafit.facts import CAUSAL_MODEL, ModelClass
from lorafit.kinds.quantizations import QuantizationSection, kind_of_codes, quantizations
from lorafit.model.attention import register_fused_attention, set_attention
from lorafit.model.classes import build_empty, find_auto_class, read_settings, with_task
from lorafit.model.quiet import quiet_libraries
from lorafit.model.targets import leave_narrow, unquantised_names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def build_weightless(
    config: JsonMapping,
    *,
    quantization: QuantizationSection,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    attention: str,
    device_kind: str,
    model_class: ModelClass = CAUSAL_MODEL,
) -> PreTrainedModel:
    """The base model, frozen, as `load_model` would give it, on the meta device.

    Args:
        config: What config.json holds.
        quantization: The recipe's section, of any kind.
        dtype: Of weights that are not quantised.
        compute_dtype: Of products with dequantised weights.
        attention: `eager`, `sdpa`, ...
        device_kind: What the run would be on; on a CPU 4-bit layers of odd widths stay unquantised.
        model_class: The task's.

    Raises:
        ModelError: transformers cannot build the model from this config.
    """
    kind = quantizations.bind(quantization)
    with quiet_libraries():
        register_fused_attention()
        settings = with_task(read_settings(config), model_class)
        model = build_empty(settings, find_auto_class(config, model_class.auto_class), dtype=dtype)
        if model._can_set_attn_implementation():
            set_attention(model, attention)
        plain = unquantised_names(model)
        if device_kind == "cpu":
            plain += leave_narrow(model, kind, Silent())
        kind.replace_linears(model, compute_dtype, plain)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def fill_with_fakes(model: torch.nn.Module) -> None:
    """Puts fake tensors of a CPU in the place of meta ones; call it under a FakeTensorMode, when the adapter is on.

    A tensor that two modules share stays one.
    """
    import torch

    made: dict[int, Any] = {}

    def real(tensor: Any) -> Any:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="cpu")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            kind = kind_of_codes(module) if name == "weight" else None
            module._parameters[name] = real(parameter) if kind is None else kind.fake(module)
        held = [values for name, values in vars(module).items() if isinstance(values, dict) and name[0] != "_"]
        for values in (module._buffers, *held):  # PEFT keeps the numbers of its prompts in a plain dict
            for name, tensor in list(values.items()):
                if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                    values[name] = real(tensor)


@contextlib.contextmanager
def unpacking_fakes() -> Iterator[None]:
    """Lets PEFT's layers that compute with dequantised weights run on a model without values."""
    from peft.utils import integrations

    own, name = integrations.dequantize_module_weight, "dequantize_module_weight"
    holders = [module for path, module in sys.modules.items() if path.startswith("peft") and hasattr(module, name)]
    for module in holders:
        setattr(module, name, _unpacked)
    try:
        yield
    finally:
        for module in holders:
            setattr(module, name, own)


def _unpacked(linear: torch.nn.Module) -> torch.Tensor:
    """[out, in] of a layer's weight, which may have codes or not even those."""
    kind = kind_of_codes(linear)
    weight: Any = linear.weight
    unpacked: torch.Tensor = weight if kind is None else kind.unpack(linear)
    return unpacked
