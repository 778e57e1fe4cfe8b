"""lorafit's own attention among transformers' implementations: `fused`, `varlen`, and `sdpa` with a step before it.

`fused` is for training on a CPU. Whatever else it is asked for goes to transformers' sdpa: evaluation, generation with
a cache, packed or padded rows with a mask, windows shorter than the row, dropout, another device.

`sdpa` is transformers' own, but for one case. Of a model whose query heads share keys and values it asks torch to
share them too, where no mask is given; on a CUDA device without a flash kernel (fp32, and all before Ampere) torch then
takes plain products in fp32 and keeps every score. There keys and values are repeated first, for the kernel that needs
as little memory as flash.

`varlen` is for packed rows on a CUDA device with a flash kernel: torch computes each document of a row by itself, with
no mask. What it cannot take goes to `sdpa`, packed rows with a mask of their documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafit.errors import ModelError
from lorafit.model.targets import tower_names
from lorafit.ops.attention_kernels import VARLEN, Capability, kernel_of, takes_documents

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FUSED_ATTENTION = "fused"
_UNUSUAL = ("position_bias", "softcap", "s_aux", "cache")  # what some models hand over besides


def register_attention() -> None:
    """Makes transformers know lorafit's `fused`, `varlen` and `sdpa`, and torch leave cuDNN's kernel alone.

    The masks of `fused` are sdpa's: none where causal attention suffices. Those of `varlen` too, but for rows that are
    known to hold several documents: their bounds are handed to each layer. cuDNN, which torch prefers on capability 9.0
    and 10.0, makes a plan for every new shape, and the shapes of micro-batches hardly repeat. Both hold for the process
    and for good: torch and transformers have one such switch for all models, and those handed out go on running.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register("sdpa", _sdpa_forward)
    AttentionInterface.register(FUSED_ATTENTION, _attention_forward)
    AttentionInterface.register(VARLEN, _varlen_forward)
    AttentionMaskInterface.register(FUSED_ATTENTION, sdpa_mask)
    AttentionMaskInterface.register(VARLEN, _varlen_mask)


def takes_fused_attention(model: PreTrainedModel) -> bool:
    """Whether a transformers model looks its attention up by name, and sdpa, which the rest falls back to, is right.

    Not where towers stand beside its language model: some have tables of their own, which know transformers' names.
    """
    return bool(model._can_set_attn_implementation() and model._supports_sdpa) and not tower_names(model)


def takes_varlen_attention(model: PreTrainedModel) -> bool:
    """Whether such a model besides tells its attention of sliding windows, as all do that run with flash-attn, and its
    values are as wide as its keys.
    """
    is_equally_wide = getattr(model.config.get_text_config(), "v_head_dim", None) is None
    return takes_fused_attention(model) and bool(model._supports_flash_attn) and is_equally_wide


def check_attention(name: str, model: PreTrainedModel) -> None:
    """Refuses `fused` and `varlen` for models that compute attention by themselves, and flash-attn where it is missing.

    Raises:
        ModelError: It is asked for, and the model would run another one without a word, or one fetched from the hub.
    """
    from transformers.utils import is_flash_attn_2_available

    if name == "flash_attention_2" and not is_flash_attn_2_available():
        todo = "install flash-attn, or write model.attention: auto"
        raise ModelError("flash_attention_2 needs the package flash-attn and a card that it runs on", todo=todo)
    takes = {FUSED_ATTENTION: takes_fused_attention, VARLEN: takes_varlen_attention}.get(name)
    if takes is not None and not takes(model):
        raise ModelError(
            f"{type(model).__name__} cannot run with {name} attention: it does not look its attention up by name",
            todo="write model.attention: auto",
        )


def set_attention(model: PreTrainedModel, name: str) -> str | dict[str, str]:
    """Switches the attention of a transformers model; of one with towers that do not know it, the language model's.

    Returns:
        What was switched to, as `from_pretrained` takes it.

    Raises:
        ValueError: The language model does not know it either.
    """
    register_attention()
    try:
        model.set_attn_implementation(name)
        return name
    except ValueError:
        if "text_config" not in model.config.sub_configs:
            raise
    option = {"text_config": name}
    model.set_attn_implementation(option)
    return option


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface: [batch, heads, seq, head_dim] in, [batch, seq, heads, value_dim] out."""
    from lorafit.ops.causal_attention import causal_attention

    is_usual = (
        attention_mask is None
        and dropout == 0.0
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and all(options.get(name) is None for name in _UNUSUAL)
    )
    if is_usual and _trains_here(module, query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, scale), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
    )
    return result


def _varlen_mask(batch_size: int, *arguments: Any, **options: Any) -> torch.Tensor | None:
    from transformers.masking_utils import sdpa_mask

    from lorafit.ops.masks import holds_documents

    return None if batch_size == 1 and holds_documents() else sdpa_mask(batch_size, *arguments, **options)


def _varlen_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface, with the keywords it has for flash-attn: `cu_seq_lens_q` are a packed row's bounds."""
    from lorafit.ops.masks import documents_mask

    bounds = options.get("cu_seq_lens_q")
    if bounds is not None and attention_mask is None:
        is_usual = dropout == 0.0 and all(options.get(name) is None for name in _UNUSUAL)
        if is_usual and _takes_documents(query, value):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return _attend_documents(query, key, value, bounds, options["max_length_q"], scale, sliding_window), None
        attention_mask = documents_mask(bounds, query.shape[2], sliding_window)
    return _sdpa_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)


def _takes_documents(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's variable-length attention runs where they are, in the dtype that attention is computed in."""
    from lorafit.ops.dtypes import word_of

    capability, head_dim = _capability_of(query), query.shape[-1]
    if capability is None or value.shape[-1] != head_dim:
        return False
    return takes_documents(capability, word_of(_computed_dtype(query)), head_dim)


def _attend_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention inside each document of one row, [1, heads, seq, head_dim] in, [1, seq, heads, head_dim] out."""
    from torch.nn.attention.varlen import varlen_attn

    dtype = _computed_dtype(query)  # autocast does not know the operation
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    behind = -1 if window is None else window - 1  # tokens that are seen before a token itself
    attended: Any = varlen_attn(
        query,
        key,
        value,
        *(bounds, bounds, longest, longest),
        scale=scale,
        window_size=(behind, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    result: torch.Tensor = attended.unsqueeze(0)
    return result


def _sdpa_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa, given keys and values for every query head where torch would keep scores otherwise."""
    from torch import nn
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if _sharing_costs_scores(module, query) and attention_mask is None and options.get("cache") is None:
        groups: Any = module.num_key_value_groups
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        module = nn.Module()  # one without groups: nothing else is read from it
    result: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, is_causal=is_causal, **options
    )
    return result


def _sharing_costs_scores(module: torch.nn.Module, query: torch.Tensor) -> bool:
    """Whether query heads share keys and values, and torch has a kernel that keeps no scores only if they do not."""
    from lorafit.ops.dtypes import word_of

    capability = _capability_of(query)
    if capability is None or getattr(module, "num_key_value_groups", 1) == 1:
        return False
    dtype = word_of(_computed_dtype(query))
    shared, repeated = (kernel_of(capability, dtype, grouped=grouped, masked=False) for grouped in (True, False))
    return shared == "math" != repeated


def _capability_of(tensor: torch.Tensor) -> Capability | None:
    """Of the CUDA device that holds a tensor; None for others."""
    import torch

    return torch.cuda.get_device_capability(tensor.device) if tensor.device.type == "cuda" else None


def _computed_dtype(query: torch.Tensor) -> torch.dtype:
    """What attention is computed in: autocast's dtype, else the query's own."""
    import torch

    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _trains_here(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether whole rows train on a CPU, all operands in the dtype that products are computed in."""
    import torch

    if not (module.training and torch.is_grad_enabled()) or query.device.type != "cpu":
        return False
    heads, key_heads = query.shape[1], key.shape[1]
    return (
        query.dtype == key.dtype == value.dtype == _computed_dtype(query)
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[2] == key.shape[2] == value.shape[2]
        and key_heads == value.shape[1]
        and heads == key_heads * getattr(module, "num_key_value_groups", 1)
    )
