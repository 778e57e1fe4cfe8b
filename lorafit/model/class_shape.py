"""The shape of a model whose family `lorafit.model_shapes` does not know, read from transformers' own class on the
meta device. Seconds instead of microseconds, and it imports torch; no weights, no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorafit.errors import ModelError
from lorafit.model_shapes import known_families, read_shape
from lorafit.shapes import LinearShape, ModelShape

if TYPE_CHECKING:
    from torch import nn

_ROLES = {
    "q": ("q_proj", "query", "q_lin"),
    "k": ("k_proj", "key", "k_lin"),
    "v": ("v_proj", "value", "v_lin"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv"),
    "o": ("o_proj", "out_proj", "dense", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w3"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "c_proj"),
}


def find_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape by arithmetic where the family is known, else from the class.

    Raises:
        ModelError: transformers does not know the model as a causal language model either.
    """
    if config.get("model_type") in known_families():
        return read_shape(config)
    return read_class_shape(config)


def read_class_shape(config: Mapping[str, Any]) -> ModelShape:
    """Counts what the class holds. Activations are those of a decoder layer with the linears that were found.

    Raises:
        ModelError: transformers knows no causal language model of this type, or cannot build it from this config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    kind = str(values.pop("model_type", ""))
    try:
        settings = AutoConfig.for_model(kind, **values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # the classes raise whatever their arithmetic meets in a foreign config
        raise ModelError(
            f"transformers cannot build a causal language model from model_type '{kind}': {error}",
            file="config.json",
            todo=f"known without transformers: {', '.join(known_families())}",
        ) from error
    text = settings.get_text_config()
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    linears = _layer_linears(model, {id(head)})
    experts = _expert_parameters(model)
    tied = head is None or head.weight is embeddings.weight
    outside = embeddings.weight.numel() + (0 if tied else head.weight.numel())
    total = sum(parameter.numel() for parameter in model.parameters())
    inside = sum(linear.weight_parameters for linear in linears) + experts
    heads = int(text.num_attention_heads)
    hidden = int(text.hidden_size)
    roles = {linear.role for linear in linears}
    return ModelShape(
        model_type=kind,
        hidden_size=hidden,
        intermediate_size=max(
            (x.in_features for x in linears if x.role == "down"),
            default=int(getattr(text, "intermediate_size", 4 * hidden)),
        ),
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
        vocabulary=int(text.vocab_size),
        max_positions=int(getattr(text, "max_position_embeddings", 2048)),
        tied_embeddings=tied,
        linears=linears,
        embedding_parameters=embeddings.weight.numel(),
        head_parameters=0 if tied else head.weight.numel(),
        other_parameters=total - inside - outside,
        gated_mlp=bool(roles & {"gate", "gate_up"}),
        expert_parameters=experts,
        experts=int(getattr(text, "num_local_experts", None) or getattr(text, "num_experts", 0) or 0) if experts else 0,
        experts_per_token=int(getattr(text, "num_experts_per_tok", None) or 2) if experts else 0,
        expert_size=int(getattr(text, "moe_intermediate_size", None) or text.intermediate_size) if experts else 0,
        plain_norm=not kind.startswith("gemma"),
        quantizable=_is_quantizable(model),
        plain_head=getattr(text, "final_logit_softcapping", None) is None,
        softcap=getattr(text, "attn_logit_softcapping", None) is not None,
    )


def _layer_linears(model: nn.Module, apart: set[int]) -> tuple[LinearShape, ...]:
    """Linears by name and size, the output head apart; a list of layers is known by a number in the name."""
    import torch
    from transformers.pytorch_utils import Conv1D

    found: Counter[LinearShape] = Counter()
    for name, module in model.named_modules():
        parts = name.split(".")
        if id(module) in apart or not any(part.isdigit() for part in parts):
            continue
        if isinstance(module, torch.nn.Linear):
            sizes, transposed = (module.in_features, module.out_features), False
        elif isinstance(module, Conv1D):
            sizes, transposed = (module.nx, module.nf), True
        else:
            continue
        role = next((role for role, names in _ROLES.items() if parts[-1] in names), "")
        found[LinearShape(parts[-1], *sizes, 1, module.bias is not None, transposed, role)] += 1
    return tuple(
        LinearShape(x.name, x.in_features, x.out_features, count, x.bias, x.transposed, x.role)
        for x, count in found.items()
    )


def _is_quantizable(model: Any) -> bool:
    """transformers replaces `Linear` and `Conv1D` themselves, and no class derived from them."""
    import torch

    head = model.get_output_embeddings()
    derived = [x for x in model.modules() if isinstance(x, torch.nn.Linear) and type(x) is not torch.nn.Linear]
    return all(module is head for module in derived)


def _expert_parameters(model: nn.Module) -> int:
    """Weights of fused experts: 3-D parameters, which no quantisation touches."""
    return sum(p.numel() for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name)
