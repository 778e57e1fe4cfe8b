"""`config.json` -> ModelShape, by arithmetic alone: no torch, no weights, well under a millisecond.

A family is a row of `_FAMILIES`: how its class in transformers lays out a decoder layer. Whatever is not there can
still be read, slower, through transformers' own class on the meta device (`lorafit.model.class_shape`).

Source: the modeling files of transformers 5; the tests build each class on the meta device and compare every total.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafit.errors import ModelError
from lorafit.registry import nearest
from lorafit.shapes import LinearShape, ModelShape
from lorafit.shipped import shipped

Flag = bool | str
"""A fixed answer, or the config's key that holds it."""


@dataclass(frozen=True, slots=True)
class _Family:
    """How one model class builds its decoder layer.

    Attributes:
        qkv: Names of the three projections, or of the one that holds all three.
        up: Names of the MLP's input linears: (gate, up), (gate_up,) or, without a gate, (up,).
        norms: Norms over the hidden width in a layer.
        qk_norm: `head`: one weight of the head's width; `heads`: one a head; `full`: one of the projection's width.
        positions: Rows of the learned position table beyond the config's; None where positions are rotary.
        experts: Config key of the number of experts.
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    gated: bool = True
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    norm: str = "rms"
    norm_bias: bool = False
    norms: int = 2
    qk_norm: str = ""
    qk_norm_if: Flag = True
    tied: bool = False
    head_bias: bool = False
    head_dim: int | None = None
    activation: str = "silu"
    parallel: Flag = False
    positions: int | None = None
    transposed: bool = False
    experts: str = ""
    softcap: bool = False


_LLAMA = _Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_GPT2 = _Family(
    qkv=("c_attn",), out="c_proj", up=("c_fc",), down="c_proj", gated=False, qkv_bias=True, out_bias=True,
    mlp_bias=True, norm="layer", norm_bias=True, tied=True, activation="gelu_new", positions=0, transposed=True,
)  # fmt: skip
_QWEN_MOE = _Family(qk_norm="head", qkv_bias="attention_bias", out_bias="attention_bias", experts="num_experts")

_FAMILIES: dict[str, _Family] = {
    "llama": _LLAMA,
    "mistral": _Family(),
    "ministral": _Family(),
    "mixtral": _Family(experts="num_local_experts"),
    "qwen2": _Family(qkv_bias=True),
    "qwen2_moe": _Family(qkv_bias="qkv_bias", experts="num_experts"),
    "qwen3": _Family(qk_norm="head", head_dim=128, qkv_bias="attention_bias", out_bias="attention_bias"),
    "qwen3_moe": _QWEN_MOE,
    "gemma": _Family(tied=True, head_dim=256, activation="gelu_pytorch_tanh"),
    "gemma2": _Family(tied=True, head_dim=256, norms=4, activation="gelu_pytorch_tanh", softcap=True),
    "gemma3_text": _Family(tied=True, head_dim=256, norms=4, qk_norm="head", activation="gelu_pytorch_tanh"),
    "phi": _Family(
        out="dense", up=("fc1",), down="fc2", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, norm="layer",
        norm_bias=True, norms=1, qk_norm="head", qk_norm_if="qk_layernorm", head_bias=True, activation="gelu_new",
        parallel=True,
    ),
    "phi3": _Family(qkv=("qkv_proj",), up=("gate_up_proj",)),
    "granite": _LLAMA,
    "smollm3": _Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias", tied=True),
    "olmo2": _Family(qk_norm="full", qkv_bias="attention_bias", out_bias="attention_bias"),
    "olmoe": _Family(qk_norm="full", qkv_bias="attention_bias", out_bias="attention_bias", experts="num_experts"),
    "starcoder2": _Family(
        up=("c_fc",), down="c_proj", gated=False, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias",
        norm="layer", norm_bias=True, tied=True, activation="gelu_pytorch_tanh",
    ),
    "stablelm": _Family(
        qkv_bias="use_qkv_bias", norm="layer", norm_bias=True, qk_norm="heads", qk_norm_if="qk_layernorm",
        parallel="use_parallel_residual",
    ),
    "cohere": _Family(
        norm="layer", norms=1, tied=True, qk_norm="heads", qk_norm_if="use_qk_norm", qkv_bias="attention_bias",
        out_bias="attention_bias", parallel=True,
    ),
    "cohere2": _Family(
        norm="layer", norms=1, tied=True, qkv_bias="attention_bias", out_bias="attention_bias", parallel=True
    ),
    "exaone4": _Family(qk_norm="head"),
    "gpt2": _GPT2,
    "gpt_bigcode": _Family(
        qkv=("c_attn",), out="c_proj", up=("c_fc",), down="c_proj", gated=False, qkv_bias=True, out_bias=True,
        mlp_bias=True, norm="layer", norm_bias=True, tied=True, activation="gelu_pytorch_tanh", positions=0,
    ),
    "gpt_neox": _Family(
        qkv=("query_key_value",), out="dense", up=("dense_h_to_4h",), down="dense_4h_to_h", gated=False,
        qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias=True, norm="layer", norm_bias=True,
        activation="gelu", parallel="use_parallel_residual",
    ),
    "opt": _Family(
        out="out_proj", up=("fc1",), down="fc2", gated=False, qkv_bias="enable_bias", out_bias="enable_bias",
        mlp_bias="enable_bias", norm="layer", norm_bias=True, tied=True, activation="relu", positions=2,
    ),
    "falcon": _Family(
        qkv=("query_key_value",), out="dense", up=("dense_h_to_4h",), down="dense_4h_to_h", gated=False,
        qkv_bias="bias", out_bias="bias", mlp_bias="bias", norm="layer", norm_bias=True, tied=True, activation="gelu",
        parallel="parallel_attn",
    ),
}  # fmt: skip

# What the classes assume where an older config.json is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"attention_bias": True, "use_parallel_residual": True},
    "opt": {"enable_bias": True, "do_layer_norm_before": True, "dropout": 0.1},
    "falcon": {"parallel_attn": True, "multi_query": True},
    "starcoder2": {"use_bias": True, "num_key_value_heads": 2},
    "qwen2_moe": {"qkv_bias": True, "norm_topk_prob": False},
    "qwen3_moe": {"num_key_value_heads": 4},
    "gpt_bigcode": {"multi_query": True, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8},
    "mistral": {"num_key_value_heads": 8},
    "smollm3": {"num_key_value_heads": 4},
    "gemma2": {"num_key_value_heads": 4},
    "gemma3_text": {"num_key_value_heads": 4},
}

_ALIASES = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions",),
    "hidden_act": ("activation_function", "hidden_activation", "activation"),
    "hidden_dropout": ("resid_pdrop", "residual_dropout", "resid_dropout", "dropout"),
    "attention_dropout": ("attn_pdrop",),
    "num_experts": ("num_local_experts",),
}


class _Config:
    """Reads one config.json: aliases, the class's defaults, and errors that name the key."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.type = str(config["model_type"])
        self._values = {**_DEFAULTS.get(self.type, {}), **config}

    def get(self, key: str, default: Any = None) -> Any:
        """The first of the key and its aliases that is set and not null."""
        for name in (key, *_ALIASES.get(key, ())):
            if self._values.get(name) is not None:
                return self._values[name]
        return default

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number.

        Raises:
            ModelError: It is missing, or something else.
        """
        value = self.get(key, default)
        if value is None:
            raise ModelError(
                "is missing", file="config.json", key=key, todo=f"a {self.type} model's config.json needs it"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(
                f"{value!r} is not a positive whole number", file="config.json", key=key, todo="repair the file"
            )
        return value

    def share(self, key: str) -> float:
        """A share from 0 to 1, e.g. of a dropout; 0 where it is not set.

        Raises:
            ModelError: It is something else.
        """
        value = self.get(key, 0.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ModelError(f"{value!r} is no share from 0 to 1", file="config.json", key=key, todo="repair the file")
        return float(value)

    def flag(self, flag: Flag) -> bool:
        """A fixed answer, or what the config's key says."""
        return flag if isinstance(flag, bool) else bool(self.get(flag, False))


def known_families() -> list[str]:
    """The model types that `read_shape` knows, sorted."""
    return sorted(_FAMILIES)


def known_config(hub_id: str) -> dict[str, Any] | None:
    """The config of a well-known model that lorafit ships (`configs/models`), by its hub id; None where it has none."""
    folder = shipped("models")
    first = folder / f"{hub_id.replace('/', '--')}.json"
    paths = [first] if "/" in hub_id and first.is_file() else sorted(folder.glob("*.json"))
    for path in paths:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if hub_id.lower() in (known.lower() for known in facts["ids"]):
            config: dict[str, Any] = facts["config"]
            return config
    return None


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a causal language model from its config.json.

    Raises:
        ModelError: The model type is unknown (the message lists the known ones), or a size is missing or absurd.
    """
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        close = nearest(str(kind), _FAMILIES)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ModelError(
            f"model_type {kind!r} is not known" if kind else "names no model_type",
            file="config.json",
            todo=f"{hint}known: {', '.join(known_families())}",
        )
    facts, family = _Config(config), _FAMILIES[str(kind)]
    return _decoder(facts, family)


def _head_counts(facts: _Config, hidden: int, family: _Family) -> tuple[int, int, int]:
    heads = facts.size("num_attention_heads")
    head_dim = facts.size("head_dim", family.head_dim or max(hidden // heads, 1))
    kv_heads = facts.size("num_key_value_heads", heads)
    if facts.type in ("gpt_bigcode", "falcon") and not facts.get("new_decoder_architecture"):
        kv_heads = 1 if facts.get("multi_query") else heads
    if heads % kv_heads:
        raise ModelError(
            f"{heads} heads cannot share {kv_heads} key and value heads",
            file="config.json",
            key="num_key_value_heads",
            todo="repair the file",
        )
    return heads, kv_heads, head_dim


def _decoder(facts: _Config, family: _Family) -> ModelShape:
    hidden, layers, vocabulary = facts.size("hidden_size"), facts.size("num_hidden_layers"), facts.size("vocab_size")
    heads, kv_heads, head_dim = _head_counts(facts, hidden, family)
    inner_key = "ffn_hidden_size" if facts.type == "falcon" else "intermediate_size"
    inner = facts.size(inner_key, None if family.gated else 4 * hidden)
    experts = facts.size(family.experts) if family.experts else 0
    expert_size = facts.size("moe_intermediate_size", inner) if experts else 0
    if facts.type == "opt":
        embedded = facts.size("word_embed_proj_dim", hidden)
    else:
        embedded = hidden
    linears = _attention_linears(facts, family, hidden, layers, heads * head_dim, kv_heads * head_dim)
    linears += _mlp_linears(facts, family, hidden, layers, inner, experts)
    positions = 0
    if family.positions is not None:
        positions = (facts.size("max_position_embeddings") + family.positions) * hidden
    tied = bool(facts.get("tie_word_embeddings", family.tied))
    return ModelShape(
        model_type=facts.type,
        hidden_size=hidden,
        intermediate_size=inner,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        max_positions=facts.size("max_position_embeddings", 2048),
        tied_embeddings=tied,
        linears=linears,
        embedding_parameters=vocabulary * embedded,
        head_parameters=0 if tied else vocabulary * embedded,
        other_parameters=_other_parameters(facts, family, linears, experts, embedded) + positions,
        gated_mlp=family.gated,
        position_parameters=positions,
        expert_parameters=3 * experts * expert_size * hidden * layers,
        experts=experts,
        experts_per_token=facts.size("num_experts_per_tok", 2) if experts else 0,
        expert_size=expert_size,
        norm=family.norm,
        norms_per_layer=_norms(facts, family),
        qk_norm=bool(family.qk_norm) and facts.flag(family.qk_norm_if),
        activation=str(facts.get("hidden_act", family.activation)),
        parallel=facts.flag(family.parallel),
        hidden_dropout=facts.share("hidden_dropout"),
        attention_dropout=facts.share("attention_dropout"),
        softcap=family.softcap and facts.get("attn_logit_softcapping", 50.0) is not None,
        plain_norm=not facts.type.startswith("gemma"),
        quantizable=facts.type != "falcon",
        math_attention=facts.type == "falcon" and kv_heads == 1 < heads,
        plain_head=_has_plain_head(facts),
    )


def _has_plain_head(facts: _Config) -> bool:
    """Whether the loss from head times hidden states is the model's own: no soft-cap, no logit scale behind the
    head."""
    default_cap = 30.0 if facts.type == "gemma2" else None
    default_scale = 0.0625 if facts.type in ("cohere", "cohere2") else 1.0
    scale = (
        facts.get("logit_scale", default_scale) if facts.type.startswith("cohere") else facts.get("logits_scaling", 1.0)
    )
    return facts.get("final_logit_softcapping", default_cap) is None and scale == 1.0


def _attention_linears(
    facts: _Config, family: _Family, hidden: int, layers: int, q_width: int, kv_width: int
) -> tuple[LinearShape, ...]:
    bias, transposed = facts.flag(family.qkv_bias), family.transposed
    if len(family.qkv) == 1:
        found = [LinearShape(family.qkv[0], hidden, q_width + 2 * kv_width, layers, bias, transposed, "qkv")]
    else:
        widths = zip(family.qkv, (q_width, kv_width, kv_width), ("q", "k", "v"), strict=True)
        found = [LinearShape(name, hidden, width, layers, bias, transposed, role) for name, width, role in widths]
    found.append(LinearShape(family.out, q_width, hidden, layers, facts.flag(family.out_bias), transposed, "o"))
    return tuple(found)


def _mlp_linears(
    facts: _Config, family: _Family, hidden: int, layers: int, inner: int, experts: int
) -> tuple[LinearShape, ...]:
    bias, transposed = facts.flag(family.mlp_bias), family.transposed
    found: list[LinearShape] = []
    if experts:  # the experts themselves are no linears; what every token sees beside them is
        inner = facts.get("shared_expert_intermediate_size", 0)
        if not inner:
            return ()
        found.append(LinearShape("shared_expert_gate", hidden, 1, layers))
    if family.gated and len(family.up) == 1:
        found.append(LinearShape(family.up[0], hidden, 2 * inner, layers, bias, transposed, "gate_up"))
    else:
        roles = ("gate", "up") if family.gated else ("up",)
        found += [
            LinearShape(name, hidden, inner, layers, bias, transposed, role)
            for name, role in zip(family.up, roles, strict=True)
        ]
    found.append(LinearShape(family.down, inner, hidden, layers, bias, transposed, "down"))
    return tuple(found)


def _norms(facts: _Config, family: _Family) -> int:
    if facts.type == "falcon":
        if facts.get("new_decoder_architecture"):
            return 1 if facts.get("num_ln_in_parallel_attn") == 1 else 2
        return 1 if facts.get("parallel_attn") else 2
    if facts.type == "stablelm" and facts.get("use_parallel_residual"):
        return 1
    return family.norms


def _other_parameters(
    facts: _Config, family: _Family, linears: tuple[LinearShape, ...], experts: int, embedded: int
) -> int:
    hidden, layers = facts.size("hidden_size"), facts.size("num_hidden_layers")
    norm = hidden * (2 if family.norm_bias else 1)
    heads, kv_heads, head_dim = _head_counts(facts, hidden, family)
    total = norm * (_norms(facts, family) * layers + 1)
    total += sum(linear.out_features * linear.count for linear in linears if linear.bias)
    total += experts * hidden * layers  # routers
    if family.qk_norm and facts.flag(family.qk_norm_if):
        if family.qk_norm == "head":
            total += 2 * head_dim * (2 if family.norm_bias else 1) * layers
        else:
            total += (heads + kv_heads) * head_dim * layers
    if family.head_bias:
        total += facts.size("vocab_size")
    if facts.type == "opt":
        if not facts.get("do_layer_norm_before") or facts.get("_remove_final_layer_norm"):
            total -= norm
        if embedded != hidden:
            total += 2 * embedded * hidden  # project_in, project_out: outside the layers
    return total
