"""How the model classes of transformers lay out a decoder layer: one row a family, numbers and names alone.

Source: the modeling files of transformers 5; the tests build each class on the meta device and compare every total.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.contracts import JsonObject

Flag = bool | str
"""A fixed answer, or the config's key that holds it."""


@dataclass(frozen=True, slots=True)
class Family:
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


_LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_GPT2 = Family(
    qkv=("c_attn",), out="c_proj", up=("c_fc",), down="c_proj", gated=False, qkv_bias=True, out_bias=True,
    mlp_bias=True, norm="layer", norm_bias=True, tied=True, activation="gelu_new", positions=0, transposed=True,
)  # fmt: skip
_QWEN_MOE = Family(qk_norm="head", qkv_bias="attention_bias", out_bias="attention_bias", experts="num_experts")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(),
    "ministral": Family(),
    "mixtral": Family(experts="num_local_experts"),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias="qkv_bias", experts="num_experts"),
    "qwen3": Family(qk_norm="head", head_dim=128, qkv_bias="attention_bias", out_bias="attention_bias"),
    "qwen3_moe": _QWEN_MOE,
    "gemma": Family(tied=True, head_dim=256, activation="gelu_pytorch_tanh"),
    "gemma2": Family(tied=True, head_dim=256, norms=4, activation="gelu_pytorch_tanh", softcap=True),
    "gemma3_text": Family(tied=True, head_dim=256, norms=4, qk_norm="head", activation="gelu_pytorch_tanh"),
    "phi": Family(
        out="dense", up=("fc1",), down="fc2", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, norm="layer",
        norm_bias=True, norms=1, qk_norm="head", qk_norm_if="qk_layernorm", head_bias=True, activation="gelu_new",
        parallel=True,
    ),
    "phi3": Family(qkv=("qkv_proj",), up=("gate_up_proj",)),
    "granite": _LLAMA,
    "smollm3": Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias", tied=True),
    "olmo2": Family(qk_norm="full", qkv_bias="attention_bias", out_bias="attention_bias"),
    "olmoe": Family(qk_norm="full", qkv_bias="attention_bias", out_bias="attention_bias", experts="num_experts"),
    "starcoder2": Family(
        up=("c_fc",), down="c_proj", gated=False, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias",
        norm="layer", norm_bias=True, tied=True, activation="gelu_pytorch_tanh",
    ),
    "stablelm": Family(
        qkv_bias="use_qkv_bias", norm="layer", norm_bias=True, qk_norm="heads", qk_norm_if="qk_layernorm",
        parallel="use_parallel_residual",
    ),
    "cohere": Family(
        norm="layer", norms=1, tied=True, qk_norm="heads", qk_norm_if="use_qk_norm", qkv_bias="attention_bias",
        out_bias="attention_bias", parallel=True,
    ),
    "cohere2": Family(
        norm="layer", norms=1, tied=True, qkv_bias="attention_bias", out_bias="attention_bias", parallel=True
    ),
    "exaone4": Family(qk_norm="head"),
    "gpt2": _GPT2,
    "gpt_bigcode": Family(
        qkv=("c_attn",), out="c_proj", up=("c_fc",), down="c_proj", gated=False, qkv_bias=True, out_bias=True,
        mlp_bias=True, norm="layer", norm_bias=True, tied=True, activation="gelu_pytorch_tanh", positions=0,
    ),
    "gpt_neox": Family(
        qkv=("query_key_value",), out="dense", up=("dense_h_to_4h",), down="dense_4h_to_h", gated=False,
        qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias=True, norm="layer", norm_bias=True,
        activation="gelu", parallel="use_parallel_residual",
    ),
    "opt": Family(
        out="out_proj", up=("fc1",), down="fc2", gated=False, qkv_bias="enable_bias", out_bias="enable_bias",
        mlp_bias="enable_bias", norm="layer", norm_bias=True, tied=True, activation="relu", positions=2,
    ),
    "falcon": Family(
        qkv=("query_key_value",), out="dense", up=("dense_h_to_4h",), down="dense_4h_to_h", gated=False,
        qkv_bias="bias", out_bias="bias", mlp_bias="bias", norm="layer", norm_bias=True, tied=True, activation="gelu",
        parallel="parallel_attn",
    ),
}  # fmt: skip

# What the classes assume where an older config.json is silent.
DEFAULTS: dict[str, JsonObject] = {
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

ALIASES = {
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
