"""The shape of a model, read from transformers' own class on the meta device: no weights, no memory.

    config of `configs/models`   its shape is shipped                               at once, no torch
    any other, the first time    the class is built and looked at                   three seconds: it imports torch
                   from then on  the cache has it, by config, libraries and code    at once, no torch

What may carry an adapter is asked of `lorafit.model.targets`, as training does: plan and model count the same.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.facts import CAUSAL_MODEL, SEQ2SEQ_MODEL, LeftOut, LinearShape, ModelClass, ModelShape, ModuleShape
from lorafit.files.cache import keep, kept, key_of_code
from lorafit.model.classes import build_empty, find_auto_class, read_settings, untie_head, with_task
from lorafit.model.known_models import known_shape
from lorafit.model.language_modules import holder_shapes
from lorafit.model.layer_numbers import layer_list, layer_of, layer_paths
from lorafit.model.targets import (
    EXPERT_COUNTS,
    OUTSIDE,
    ROUTER,
    ROUTER_NAMES,
    config_number,
    find_linears,
    left_out_names,
    whole_modules,
    wide_names,
)
from lorafit.model.towers import projector_names
from lorafit.ops.output_head import outer_modules, output_head, text_part

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")
_ROLES = {
    "q": ("q_proj", "query", "q_lin", "q_b_proj"),
    "k": ("k_proj", "key", "k_lin"),
    "v": ("v_proj", "value", "v_lin"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "kv_b_proj", "in_proj_qkv", "in_proj_qkvz"),
    "o": ("o_proj", "out_proj", "dense", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w3"),
    "gate_up": ("gate_up_proj", "input_linear"),
    "down": ("down_proj", "output_linear", "fc2", "fc_out", "dense_4h_to_h", "w2", "c_proj"),
}

_CHOSEN_COUNTS = ("num_experts_per_tok", "top_k_experts")
_QUERY_NORMS = ("q_norm", "query_layernorm", "q_layernorm")
_EXPERT_SIZES = ("moe_intermediate_size", "intermediate_size")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_HIDDEN_DROPOUTS = ("hidden_dropout", "resid_pdrop", "residual_dropout", "resid_dropout", "dropout")
_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop")
_POSITIONS = re.compile(r"wpe$|pos")  # tables of learned positions
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_EXPERTS = "experts"
_EXPERTS_ARE_FUSED = "no linears, but one tensor for all experts of a layer"


def find_shape(config: JsonMapping, model_class: ModelClass = CAUSAL_MODEL) -> ModelShape:
    """The shape of a model: shipped, kept by an earlier command, or read from the class.

    Raises:
        ModelError: A size is missing or none, or transformers does not know the model as a causal language model.
    """
    own_class = SEQ2SEQ_MODEL if config.get("is_encoder_decoder") else CAUSAL_MODEL
    shipped = known_shape(config) if model_class == own_class else None
    if shipped is not None:
        return shipped
    name = f"shapes/{key_of_code([config, asdict(model_class)])}.json"
    with contextlib.suppress(KeyError, TypeError):  # not there, or something else
        return ModelShape.from_json(kept(name))
    shape = read_class_shape(config, model_class)
    keep(name, shape.to_json())
    return shape


def read_class_shape(config: JsonMapping, model_class: ModelClass = CAUSAL_MODEL) -> ModelShape:
    """Counts what the class holds. Activations are those of a decoder layer with the linears that were found.

    Raises:
        ModelError: transformers knows no language model of this type, or cannot build it from this config.
    """
    from torch import nn

    _check_counts(config, (key for key in _SIZES if config.get(key) == 0))  # transformers divides by some
    auto_class = find_auto_class(config, model_class.auto_class)
    settings = with_task(read_settings(config), model_class)
    _check_sizes(config, settings)
    model = build_empty(settings, auto_class)
    untie_head(model, config)
    text = model.config.get_text_config()
    embeddings, head = _token_embedding(model, generates=model_class.generates), output_head(model)
    outer = [*outer_modules(model).values()] if model_class.has_new_head else []
    if model_class.trains_projector:
        inner = getattr(model, model.base_model_prefix, model)
        outer = [inner.get_submodule(name) for name in projector_names(model)]
    left_out = left_out_names(model)
    layer_count = config_number(text, "num_hidden_layers", 1)
    linears, beside = _linear_shapes(model, left_out, layer_count), _beside(model, left_out)
    experts = sum(part.parameters for part in beside if part.name == _EXPERTS)
    tied = head is None or head.weight is embeddings.weight
    outside = embeddings.weight.numel() + (0 if tied else head.weight.numel())
    total = sum(parameter.numel() for parameter in model.parameters())
    inside = sum(linear.weight_parameters for linear in linears) + experts
    hidden = config_number(text, "hidden_size", embeddings.weight.shape[1])
    heads = config_number(text, "num_attention_heads", 1)
    inner = max((x.in_features for x in linears if x.role == "down"), default=4 * hidden)
    roles, language = {linear.role for linear in linears}, text_part(model) or model
    kv_heads, head_dim = _head_sizes(text, linears, heads, hidden)
    (norm, norms_per_layer), scanning_layers = _norms(language, hidden), _scanning_layers(language)
    side_by_side = any(getattr(text, key, False) for key in ("use_parallel_residual", "parallel_attn"))
    positions = [part for name, part in language.named_modules()
                 if isinstance(part, nn.Embedding) and part is not embeddings and _POSITIONS.search(name)]  # fmt: skip
    return ModelShape(
        model_type=str(settings.model_type),
        hidden_size=hidden,
        layers=layer_count,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=embeddings.weight.shape[0],
        max_positions=config_number(text, "max_position_embeddings", 2048),
        linears=linears,
        embedding_parameters=embeddings.weight.numel(),
        head_parameters=0 if tied else head.weight.numel(),
        other_parameters=total - inside - outside,
        gated_mlp=bool(roles & {"gate", "gate_up"}),
        position_parameters=sum(part.weight.numel() for part in positions) if model_class.generates else 0,
        expert_parameters=experts,
        experts=_first_number(text, EXPERT_COUNTS, 0) if experts else 0,
        experts_per_token=_first_number(text, _CHOSEN_COUNTS, 2) if experts else 0,
        expert_size=_first_number(text, _EXPERT_SIZES, inner) if experts else 0,
        norm=norm,
        norms_per_layer=norms_per_layer,
        qk_norm=any(name.endswith(_QUERY_NORMS) for name, _ in language.named_modules()),
        activation=_first(text, _ACTIVATIONS, "silu"),
        parallel=side_by_side or (norms_per_layer == 1 and {"o", "down"} <= roles and not scanning_layers),
        plain_norm=not str(settings.model_type).startswith("gemma"),
        plain_head=_has_plain_head(text),
        hidden_dropout=_first(text, _HIDDEN_DROPOUTS, 0.0),
        attention_dropout=_first(text, _ATTENTION_DROPOUTS, 0.0),
        math_attention=text.model_type == "falcon" and kv_heads == 1 < heads,  # its one key is broadcast
        softcap=getattr(text, "attn_logit_softcapping", None) is not None,
        no_sdpa=not model._supports_sdpa,
        beside=beside,
        new_head_parameters=sum(part.numel() for module in outer for part in module.parameters()),
        decoder_parameters=_decoder_parameters(model),
        scanning_layers=scanning_layers,
        has_sinks=any(name.endswith(".sinks") for name, _ in language.named_parameters()),
        modules=_module_shapes(model),
        holders=holder_shapes(model, [*outer_modules(model)] if model_class.has_new_head else ()),
    )


def _module_shapes(model: PreTrainedModel) -> tuple[ModuleShape, ...]:
    """What may be trained whole, by name; a weight that several of a name share counts once."""
    weights: dict[str, dict[int, int]] = {}
    counts, shares = Counter[str](), Counter(id(module.weight) for module in whole_modules(model).values())
    most = Counter[str]()
    for path, module in whole_modules(model).items():
        name = path.rsplit(".", 1)[-1]
        counts[name] += 1
        most[name] = max(most[name], shares[id(module.weight)])
        weights.setdefault(name, {}).update({id(part): part.numel() for part in module.parameters()})
    return tuple(ModuleShape(name, counts[name], sum(own.values()), most[name]) for name, own in weights.items())


def _decoder_parameters(model: PreTrainedModel) -> int:
    """Weights of the linears on the side of an encoder-decoder that writes. Those that make keys and values of the
    source are among them, though its tokens go through them too."""
    decoder = model.get_decoder() if model.config.is_encoder_decoder else None
    inside = set() if decoder is None else {id(module) for module in decoder.modules()}
    return sum(module.weight.numel() for _, module in find_linears(model) if id(module) in inside)


def _head_sizes(text: PretrainedConfig, linears: tuple[LinearShape, ...], heads: int, hidden: int) -> tuple[int, int]:
    """Heads of keys and values, and a head's size; where those differ by layer, of a layer as wide as the mean."""
    widths = {role: [(x.out_features, x.count) for x in linears if x.role == role] for role in ("q", "k")}
    if len({width for width, _ in widths["q"]}) > 1 and widths["k"]:
        query, key = (sum(w * n for w, n in found) / sum(n for _, n in found) for found in widths.values())
        head_dim = max(round(query / heads), 1)
        return min(max(round(key / head_dim), 1), heads), head_dim
    shares_one = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
    kv_heads = 1 if shares_one else _first_number(text, _KEY_HEADS, heads)
    return kv_heads, config_number(text, "head_dim", max(hidden // heads, 1))


def _norms(model: PreTrainedModel, hidden: int) -> tuple[str, int]:
    """Kind of the norms over the stream, and how many the layer has that has most: 1, 2 or 4."""
    found = [
        [type(part).__name__ for part in layer.children()
         if getattr(getattr(part, "weight", None), "shape", None) == (hidden,)]
        for layer in layer_list(model)
    ]  # fmt: skip
    names = max(found, key=len, default=[])
    kind = "layer" if any("LayerNorm" in name and "RMS" not in name for name in names) else "rms"
    return kind, 4 if len(names) >= 4 else min(len(names), 2) or 2


def _scanning_layers(model: PreTrainedModel) -> int:
    """Layers that carry a state along the row: Mamba, linear attention. Each begins with a convolution."""
    import torch

    return sum(any(isinstance(part, torch.nn.Conv1d) for part in layer.modules()) for layer in layer_list(model))


def _has_plain_head(text: PretrainedConfig) -> bool:
    """Whether the logits are the head's product itself, neither capped nor scaled."""
    scales = [getattr(text, key, None) for key in ("logits_scaling", "logit_scale")]
    return getattr(text, "final_logit_softcapping", None) is None and all(scale in (None, 1) for scale in scales)


def _token_embedding(model: PreTrainedModel, *, generates: bool) -> Any:
    """The layer that turns token ids into states.

    Raises:
        ModelError: The model has none that is a table of tokens, or generates nothing.
    """
    import torch

    name, why = type(model).__name__, ""
    if generates and not model.can_generate():
        why = "generates no text token by token"
    else:
        with contextlib.suppress(NotImplementedError):
            if isinstance(embedding := model.get_input_embeddings(), torch.nn.Embedding):
                return embedding
        why = "has no table of token embeddings: it reads more than one stream of tokens"
    raise ModelError(f"{name} {why}; it is no language model", file="config.json", todo="use a decoder-only model")


def _linear_shapes(model: PreTrainedModel, left_out: Mapping[str, str], layers: int) -> tuple[LinearShape, ...]:
    """Linears of the language model by name and size, output head and routers apart; a shared weight counts once."""
    import torch
    from transformers.pytorch_utils import Conv1D

    found: dict[LinearShape, list[int]] = {}
    seen, wide, numbers = set[int](), set(wide_names(model)), layer_paths(model)
    for name, module in find_linears(model):
        why = left_out.get(name, "")
        if id(module.weight) in seen or why in (ROUTER, OUTSIDE):
            continue
        seen.add(id(module.weight))
        last = name.rsplit(".", 1)[-1]
        is_conv = isinstance(module, Conv1D)
        reads, writes = (module.nx, module.nf) if is_conv else (module.in_features, module.out_features)
        role = next((role for role, names in _ROLES.items() if last in names), "")
        if role == "down" and "attn" in name.split(".")[-2]:  # GPT-2 calls both alike
            role = "o"
        is_plain = is_conv or type(module) is torch.nn.Linear  # transformers replaces no class derived from it
        quantizable = is_plain and name not in wide
        kind = LinearShape(last, reads, writes, 1, module.bias is not None, is_conv, role, why, quantizable)
        found.setdefault(kind, []).append(layer_of(name, numbers))
    everywhere = [*range(layers)]
    return tuple(
        replace(kind, count=len(own), layers=None if own == everywhere else tuple(own)) for kind, own in found.items()
    )


def _beside(model: PreTrainedModel, left_out: Mapping[str, str]) -> tuple[LeftOut, ...]:
    """What holds weights of the layers and is no linear that could be adapted."""
    import torch

    text = text_part(model)
    inside = {id(module) for module in (text or model).modules()} | {id(model)}
    parameters: Counter[tuple[str, str]] = Counter()
    for path, module in model.named_modules():
        is_linear = isinstance(module, torch.nn.Linear)
        is_outside = left_out.get(path) == OUTSIDE if is_linear else id(module) not in inside
        if left_out.get(path) == ROUTER or _routes(path, module):
            part = "routers", ROUTER
        elif is_outside:
            part = _tower(path), OUTSIDE
        elif not is_linear and _holds_experts(path, module):
            part = _EXPERTS, _EXPERTS_ARE_FUSED
        elif isinstance(module, torch.nn.Conv1d):
            part = path.rsplit(".", 1)[-1], "a convolution"
        else:
            continue
        parameters[part] += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return tuple(LeftOut(name, count, why) for (name, why), count in parameters.items() if count)


def _routes(path: str, module: nn.Module) -> bool:
    """Whether it is a router that holds its weight itself; those that are linears are told by their width."""
    is_named = path.rsplit(".", 1)[-1] in ROUTER_NAMES or "router" in type(module).__name__.lower()
    return is_named and hasattr(module, "weight") and not hasattr(module, "in_features")


def _tower(path: str) -> str:
    """`vision_tower` of `model.vision_tower.encoder.layers.0.fc1`."""
    parts = path.split(".")
    return parts[1] if parts[0] == "model" and len(parts) > 1 else parts[0]


def _holds_experts(path: str, module: nn.Module) -> bool:
    """Whether a module keeps the weights of all its experts in parameters of its own."""
    is_named = "expert" in path.rsplit(".", 1)[-1].lower() or "expert" in type(module).__name__.lower()
    return is_named and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _check_counts(config: JsonMapping, keys: Iterable[str]) -> None:
    """Raises ModelError where one of the values, if it is there, counts nothing."""
    for key in keys:
        value = config.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise _fault(key, f"{value!r} is not a positive whole number")


def _check_sizes(config: JsonMapping, settings: PretrainedConfig) -> None:
    """Raises ModelError where a size of a language model's config is none, or is not there: the class would take its
    own, and count another model; or where heads cannot be grouped."""
    defaults = type(settings)()
    for key in _SIZES if not settings.sub_configs and hasattr(settings, "hidden_size") else ():
        own = settings.attribute_map.get(key, key)
        names = {key, own} | {name for name, other in settings.attribute_map.items() if other == key}
        _check_counts(config, names)
        is_there = any(name in config for name in names)
        if not is_there and own in vars(settings) and getattr(settings, key) == getattr(defaults, key):
            raise _fault(key, "is missing", f"a {settings.model_type} model's config.json needs it")
    heads, groups = (getattr(settings, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups:
        raise _fault("num_key_value_heads", f"{heads} heads cannot share {groups} key and value heads")


def _fault(key: str, what: str, todo: str = "repair the file") -> ModelError:
    return ModelError(what, file="config.json", key=key, todo=todo)


def _first(config: PretrainedConfig, keys: tuple[str, ...], default: T) -> T:
    """The first of the keys that holds a value of the default's type."""
    values = (getattr(config, key, None) for key in keys)
    return next((value for value in values if isinstance(value, type(default))), default)


def _first_number(config: PretrainedConfig, keys: tuple[str, ...], default: int) -> int:
    """The first of the keys that holds one."""
    return next((found for key in keys if (found := config_number(config, key, 0))), default)
