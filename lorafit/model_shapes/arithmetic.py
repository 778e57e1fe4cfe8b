"""`config.json` -> ModelShape, by arithmetic alone: no torch, no weights, well under a millisecond.

A family is a row of `families.FAMILIES`: how its class in transformers lays out a decoder layer. What is not there can
still be read, slower, through transformers' own class on the meta device (`lorafit.model.class_shape`).

Source: the modeling files of transformers 5; the tests build each class on the meta device and compare every total.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from lorafit.console.nearest import did_you_mean
from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError
from lorafit.facts import LeftOut, LinearShape, ModelShape
from lorafit.machine.shipped import shipped
from lorafit.model_shapes.families import ALIASES, DEFAULTS, FAMILIES, Family, Flag

EXPERTS = "experts"
ROUTERS_CHOOSE = "chooses experts"
_TUNINGS = {
    *("instruct", "it", "base", "pt", "chat", "hf", "thinking", "unsloth", "bnb", "4bit", "8bit", "dynamic"),
    *("gguf", "awq", "gptq", "int4", "int8", "fp8", "bf16"),
}
EXPERTS_ARE_FUSED = "no linears, but one tensor for all experts of a layer"


class _Config:
    """Reads one config.json: aliases, the class's defaults, and errors that name the key."""

    def __init__(self, config: JsonMapping) -> None:
        self.type = str(config["model_type"])
        self._values = {**DEFAULTS.get(self.type, {}), **config}

    def get(self, key: str, default: Any = None) -> Any:
        """The first of the key and its aliases that is set and not null."""
        for name in (key, *ALIASES.get(key, ())):
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
            raise _fault(key, "is missing", f"a {self.type} model's config.json needs it")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise _fault(key, f"{value!r} is not a positive whole number")
        return value

    def share(self, key: str) -> float:
        """A share from 0 to 1, e.g. of a dropout; 0 where it is not set.

        Raises:
            ModelError: It is something else.
        """
        value = self.get(key, 0.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise _fault(key, f"{value!r} is no share from 0 to 1")
        return float(value)

    def flag(self, flag: Flag) -> bool:
        """A fixed answer, or what the config's key says."""
        return flag if isinstance(flag, bool) else bool(self.get(flag, False))


def _fault(key: str, what: str, todo: str = "repair the file") -> ModelError:
    return ModelError(what, file="config.json", key=key, todo=todo)


def known_families() -> list[str]:
    """The model types that `read_shape` knows, sorted."""
    return sorted(FAMILIES)


def known_config(hub_id: str) -> JsonObject | None:
    """The config of a well-known model that lorafit ships (`configs/models`), by its hub id; None where it has none."""
    folder = shipped("models")
    first = folder / f"{hub_id.replace('/', '--')}.json"
    paths = [first] if "/" in hub_id and first.is_file() else sorted(folder.glob("*.json"))
    for path in paths:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if hub_id.lower() in (known.lower() for known in facts["ids"]):
            config: JsonObject = facts["config"]
            return config
    return None


def like_known(hub_id: str) -> str | None:
    """The hub id of a shipped config that another id likely means; None where none is alike.

    Owner, case and what tunings and copies append (`-Instruct`, `-it`, `-bnb-4bit`, a date) say nothing of a shape.
    """
    found: dict[str, str] = {}
    for path in sorted(shipped("models").glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if "quantization_config" not in facts["config"]:  # its weights are not to be trained on
            for known in facts["ids"]:
                found.setdefault(_last_part(known), known)
    for known in list(found.values()):
        found.setdefault(_without_tuning(known), known)
    return found.get(_last_part(hub_id)) or found.get(_without_tuning(hub_id))


def _last_part(hub_id: str) -> str:
    return hub_id.rpartition("/")[2].lower()


def _without_tuning(hub_id: str) -> str:
    words = _last_part(hub_id).removeprefix("meta-").split("-")
    return "-".join(word for word in words if word not in _TUNINGS and not re.fullmatch(r"2[0-9]{3}", word))


def read_shape(config: JsonMapping) -> ModelShape:
    """The shape of a causal language model from its config.json.

    Raises:
        ModelError: The model type is unknown (the message lists the known ones), or a size is missing or absurd.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        hint = did_you_mean(str(kind), FAMILIES, count=3)
        raise ModelError(
            f"model_type {kind!r} is not known" if kind else "names no model_type",
            file="config.json",
            todo=f"{hint}known: {', '.join(known_families())}",
        )
    facts, family = _Config(config), FAMILIES[str(kind)]
    return _decoder(facts, family)


def _head_counts(facts: _Config, hidden: int, family: Family) -> tuple[int, int, int]:
    heads = facts.size("num_attention_heads")
    head_dim = facts.size("head_dim", family.head_dim or max(hidden // heads, 1))
    kv_heads = facts.size("num_key_value_heads", heads)
    if facts.type in ("gpt_bigcode", "falcon") and not facts.get("new_decoder_architecture"):
        kv_heads = 1 if facts.get("multi_query") else heads
    if heads % kv_heads:
        raise _fault("num_key_value_heads", f"{heads} heads cannot share {kv_heads} key and value heads")
    return heads, kv_heads, head_dim


def _decoder(facts: _Config, family: Family) -> ModelShape:
    hidden, layers, vocabulary = facts.size("hidden_size"), facts.size("num_hidden_layers"), facts.size("vocab_size")
    heads, kv_heads, head_dim = _head_counts(facts, hidden, family)
    inner_key = "ffn_hidden_size" if facts.type == "falcon" else "intermediate_size"
    inner = facts.size(inner_key, None if family.gated else 4 * hidden)
    experts = facts.size(family.experts) if family.experts else 0
    expert_size = facts.size("moe_intermediate_size", inner) if experts else 0
    embedded = facts.size("word_embed_proj_dim", hidden) if facts.type == "opt" else hidden
    linears = _attention_linears(facts, family, hidden, layers, heads * head_dim, kv_heads * head_dim)
    linears += _mlp_linears(facts, family, hidden, layers, inner, experts)
    if embedded != hidden:  # OPT-350m: once, around the layers
        linears += (LinearShape("project_in", embedded, hidden, 1), LinearShape("project_out", hidden, embedded, 1))
    if facts.type == "falcon":  # a class of its own
        linears = tuple(replace(linear, quantizable=False) for linear in linears)
    expert_parameters = 3 * experts * expert_size * hidden * layers
    learned = family.positions is not None
    positions = (facts.size("max_position_embeddings") + (family.positions or 0)) * hidden if learned else 0
    tied = bool(facts.get("tie_word_embeddings", family.tied))
    return ModelShape(
        model_type=facts.type,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        max_positions=facts.size("max_position_embeddings", 2048),
        linears=linears,
        embedding_parameters=vocabulary * embedded,
        head_parameters=0 if tied else vocabulary * embedded,
        other_parameters=_other_parameters(facts, family, linears, experts) + positions,
        gated_mlp=family.gated,
        position_parameters=positions,
        expert_parameters=expert_parameters,
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
        math_attention=facts.type == "falcon" and kv_heads == 1 < heads,
        plain_head=_has_plain_head(facts),
        beside=_beside(facts, hidden, layers, experts, expert_parameters),
    )


def _beside(facts: _Config, hidden: int, layers: int, experts: int, expert_parameters: int) -> tuple[LeftOut, ...]:
    """What holds weights of the layers and takes no adapter."""
    if not experts:
        return ()
    routers = experts * hidden + (hidden if facts.get("shared_expert_intermediate_size") else 0)
    return (
        LeftOut("routers", routers * layers, ROUTERS_CHOOSE),
        LeftOut(EXPERTS, expert_parameters, EXPERTS_ARE_FUSED),
    )


def _has_plain_head(facts: _Config) -> bool:
    """Whether the loss from head times hidden states is the model's own: no soft-cap, no logit scale behind the
    head."""
    is_cohere = facts.type.startswith("cohere")
    scale = facts.get("logit_scale", 0.0625) if is_cohere else facts.get("logits_scaling", 1.0)
    cap = facts.get("final_logit_softcapping", 30.0 if facts.type == "gemma2" else None)
    return cap is None and scale == 1.0


def _attention_linears(
    facts: _Config, family: Family, hidden: int, layers: int, q_width: int, kv_width: int
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
    facts: _Config, family: Family, hidden: int, layers: int, inner: int, experts: int
) -> tuple[LinearShape, ...]:
    bias, transposed = facts.flag(family.mlp_bias), family.transposed
    if experts:  # the experts themselves are no linears; what every token sees beside them is
        inner = facts.get("shared_expert_intermediate_size", 0)
        if not inner:
            return ()
    joined = family.gated and len(family.up) == 1
    roles, width = (("gate_up",), 2 * inner) if joined else (("gate", "up") if family.gated else ("up",), inner)
    found = [
        LinearShape(name, hidden, width, layers, bias, transposed, role)
        for name, role in zip(family.up, roles, strict=True)
    ]
    found.append(LinearShape(family.down, inner, hidden, layers, bias, transposed, "down"))
    return tuple(found)


def _norms(facts: _Config, family: Family) -> int:
    if facts.type == "falcon":
        if facts.get("new_decoder_architecture"):
            return 1 if facts.get("num_ln_in_parallel_attn") == 1 else 2
        return 1 if facts.get("parallel_attn") else 2
    if facts.type == "stablelm" and facts.get("use_parallel_residual"):
        return 1
    return family.norms


def _other_parameters(facts: _Config, family: Family, linears: tuple[LinearShape, ...], experts: int) -> int:
    hidden, layers = facts.size("hidden_size"), facts.size("num_hidden_layers")
    norm = hidden * (2 if family.norm_bias else 1)
    heads, kv_heads, head_dim = _head_counts(facts, hidden, family)
    total = norm * (_norms(facts, family) * layers + 1)
    total += sum(linear.out_features * linear.count for linear in linears if linear.bias)
    total += experts * hidden * layers  # routers
    if experts and facts.get("shared_expert_intermediate_size"):
        total += hidden * layers  # and the shared expert's gate
    if family.qk_norm and facts.flag(family.qk_norm_if):
        per_head = family.qk_norm == "head"
        widths = 2 * (2 if family.norm_bias else 1) if per_head else heads + kv_heads
        total += widths * head_dim * layers
    if family.head_bias:
        total += facts.size("vocab_size")
    if facts.type == "opt" and (not facts.get("do_layer_norm_before") or facts.get("_remove_final_layer_norm")):
        total -= norm
    return total
