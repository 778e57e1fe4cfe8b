"""A model without its weights: transformers' own class and bitsandbytes' own layers, every tensor fake.

    config --class on the meta device--> skeleton --transformers' replacement--> Linear4bit, Linear8bitLt
           --attach_adapter, still on the meta device--> what is trained
           --each parameter and buffer once (tied stay tied)--> fake tensors of the size that loading would give

What runs on it is the code that runs on the loaded model; nothing is computed and nothing takes memory.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lorafit.contracts import Silent
from lorafit.kinds.quantizations import quantizations
from lorafit.model.attention import register_fused_attention, set_attention
from lorafit.model.classes import build_empty, find_auto_class, read_settings
from lorafit.model.quiet import quiet_libraries
from lorafit.model.targets import FOUR_BIT_KINDS, leave_narrow, unquantised_names

if TYPE_CHECKING:
    import torch

_CODE_VALUES = {"nf4": 16, "fp4": 16}
_BLOCK_WEIGHTS, _NESTED_BLOCK, _NESTED_CODE_VALUES = 64, 256, 256


def build_weightless(
    config: Mapping[str, Any],
    *,
    quantization: Any,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    attention: str,
    device_kind: str,
    auto_class: str = "AutoModelForCausalLM",
) -> Any:
    """The base model, frozen, as `load_model` would give it, on the meta device.

    Args:
        config: What config.json holds.
        quantization: The recipe's section, of any kind.
        dtype: Of weights that are not quantised.
        compute_dtype: Of products with dequantised weights.
        attention: `eager`, `sdpa`, ...
        device_kind: What the run would be on; on a CPU 4-bit layers of odd widths stay unquantised.
        auto_class: The transformers class of the task.

    Raises:
        ModelError: transformers cannot build the model from this config.
    """
    kind = quantizations.bind(quantization)
    with quiet_libraries():
        register_fused_attention()
        model = build_empty(read_settings(config), find_auto_class(config, auto_class), dtype=dtype)
        if model._can_set_attn_implementation():
            set_attention(model, attention)
        plain = unquantised_names(model)
        if quantization.kind in FOUR_BIT_KINDS and device_kind == "cpu":
            plain += leave_narrow(model, Silent())
        converted = kind.transformers_config(compute_dtype, plain)
        if converted is not None:
            from transformers.integrations.bitsandbytes import replace_with_bnb_linear

            replace_with_bnb_linear(model, modules_to_not_convert=plain, quantization_config=converted)
            model.is_loaded_in_4bit = quantization.kind in FOUR_BIT_KINDS
            model.is_loaded_in_8bit = not model.is_loaded_in_4bit
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def fill_with_fakes(model: torch.nn.Module) -> None:
    """Puts fake tensors of a CPU in the place of meta ones; call it under a FakeTensorMode, when the adapter is on.

    A tensor that two modules share stays one.
    """
    import bitsandbytes as bnb
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
            if name == "weight" and isinstance(module, bnb.nn.Linear4bit):
                module._parameters[name] = _four_bit_weight(module)
            elif name == "weight" and isinstance(module, bnb.nn.Linear8bitLt):
                module._parameters[name] = _eight_bit_weight(module)
            else:
                module._parameters[name] = real(parameter)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = real(buffer)


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


def _unpacked(linear: Any) -> torch.Tensor:
    """[out, in] of a layer's weight, which may have codes or not even those."""
    import bitsandbytes as bnb
    import torch

    if isinstance(linear, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
        state = getattr(linear.weight, "quant_state", None)
        if state is not None:
            unpacked: torch.Tensor = bnb.functional.dequantize_4bit(linear.weight, state)
            return unpacked
        return torch.empty(linear.out_features, linear.in_features, device=linear.weight.device)
    weight: torch.Tensor = linear.weight
    return weight


def _four_bit_weight(linear: Any) -> Any:
    """Packed codes and their constants, as `quantize_4bit` leaves them on a loaded layer."""
    import torch
    from bitsandbytes.functional import QuantState

    old = linear.weight
    shape = torch.Size((linear.out_features, linear.in_features))
    blocks = -(-shape.numel() // _BLOCK_WEIGHTS)
    weight = torch.nn.Parameter(torch.empty(((shape.numel() + 1) // 2, 1), dtype=torch.uint8), requires_grad=False)
    nested = None
    if old.compress_statistics:
        nested = QuantState(
            absmax=torch.empty(-(-blocks // _NESTED_BLOCK)),
            code=torch.empty(_NESTED_CODE_VALUES),
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.float32 if nested is None else torch.uint8),
        shape=shape,
        code=torch.empty(_CODE_VALUES[old.quant_type]),
        blocksize=_BLOCK_WEIGHTS,
        quant_type=old.quant_type,
        dtype=linear.compute_dtype,
        offset=None if nested is None else torch.empty(()),
        state2=nested,
    )
    for name, value in {
        "quant_state": state,
        "bnb_quantized": True,
        "compress_statistics": old.compress_statistics,
        "quant_type": old.quant_type,
        "quant_storage": old.quant_storage,
        "blocksize": _BLOCK_WEIGHTS,
    }.items():
        setattr(weight, name, value)
    linear.quant_state = state
    return weight


def _eight_bit_weight(linear: Any) -> Any:
    """Codes and a scale a row; the layer's state holds them from its first forward on."""
    import torch

    codes = torch.empty((linear.out_features, linear.in_features), dtype=torch.int8)
    weight: Any = torch.nn.Parameter(codes, requires_grad=False)
    weight.CB = weight.SCB = None
    linear.state.CB, linear.state.SCB = codes, torch.empty(linear.out_features)
    return weight
