"""Shapes against published parameter counts and against transformers' own classes on the meta device."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorafit.errors import ModelError
from lorafit.machine.shipped import shipped
from lorafit.model.class_shape import find_shape, read_class_shape
from lorafit.model.classes import build_empty, build_whole, read_settings
from lorafit.model_shapes import known_config, known_families, read_shape

FACTS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(shipped("models").glob("*.json"))}
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TINY: list[dict[str, Any]] = [
    {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    {"model_type": "llama", **SIZES, "head_dim": 24, "tie_word_embeddings": True},
    {"model_type": "qwen3_moe", **SIZES, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 16},
    {"model_type": "phi", **SIZES, "qk_layernorm": True},
    {"model_type": "stablelm", **SIZES, "use_qkv_bias": True, "qk_layernorm": True},
    {"model_type": "stablelm", **SIZES, "use_parallel_residual": True},
    {"model_type": "cohere", **SIZES, "use_qk_norm": True},
    {"model_type": "cohere2", **SIZES},
    {"model_type": "exaone4", **SIZES},
    {"model_type": "gpt_neox", **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
     "attention_bias": False},
    {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 80, "vocab_size": 100,
     "n_positions": 32},
    {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
     "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
     "multi_query": False, "parallel_attn": False},
    {"model_type": "opt", "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
     "vocab_size": 100, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
]  # fmt: skip


def class_parameters(config: dict[str, Any]) -> int:
    import torch
    import transformers

    settings = read_settings(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", FACTS)
def test_totals_are_the_published_counts(name: str) -> None:
    facts = FACTS[name]
    total = find_shape(facts["config"]).total_parameters + sum(facts.get("published_beside", {}).values())
    published = facts["published_parameters"]
    if facts.get("published_rounded"):  # where the hub's page shows three digits
        assert abs(total / published - 1) < 0.002
    else:
        assert total == published


SAVED_BUFFERS = ("layer_scalar", "std_bias", "std_scale", "e_score_correction_bias")


def part_of_the_files(part: str, config: dict[str, Any]) -> int:
    """What published files hold beside the parameters of the model that is trained."""
    text: dict[str, Any] = config.get("text_config", config)
    hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
    if part == "towers":  # where the class trains text alone
        whole = build_whole(read_settings(config))
        return int(sum(parameter.numel() for parameter in whole.parameters())) - class_parameters(config)
    if part == "buffers":
        model = build_empty(read_settings(config), "AutoModelForCausalLM")
        return int(sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(SAVED_BUFFERS)))
    if part == "shared_kv":  # projections, and a norm, of layers that take keys and values from below
        kinds = text["layer_types"][layers - text["num_kv_shared_layers"] :]
        sizes = [int(text["global_head_dim" if kind == "full_attention" else "head_dim"]) for kind in kinds]
        return sum(2 * int(text["num_key_value_heads"]) * size * hidden + size for size in sizes)
    if part == "fp8_scales":  # of what each linear multiplies: weights and input
        return 2 * 7 * layers
    assert part == "mtp"  # one layer more, for the token after the next: two norms and a product before it, one behind
    beside = 2 * hidden * hidden + 3 * hidden
    if text["model_type"] == "glm4_moe":  # with embeddings, head and buffer of its own
        beside += 2 * int(text["vocab_size"]) * hidden + int(text["n_routed_experts"])
        return beside + class_parameters(text) - class_parameters({**text, "num_hidden_layers": layers - 1})
    few = [{**text, "layer_types": ["full_attention"] * count, "num_hidden_layers": count} for count in (1, 2)]
    return beside + class_parameters(few[1]) - class_parameters(few[0])


@pytest.mark.parametrize("name", [name for name, facts in FACTS.items() if "published_beside" in facts])
def test_what_files_hold_beside_is_accounted_for(name: str) -> None:
    facts = FACTS[name]
    for part, count in facts["published_beside"].items():
        assert part_of_the_files(part, facts["config"]) == count, part


def test_known_totals_and_what_is_known() -> None:
    config = known_config("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert config is not None
    assert read_shape(config).total_parameters == 134_515_008  # the tied head is counted once
    assert read_shape(config).head_parameters == 0
    assert known_config("meta-llama/llama-3.1-8b-instruct") == known_config("meta-llama/Llama-3.1-8B")
    assert known_config("nobody/nothing") is None
    assert len(FACTS) >= 120
    assert {
        "gpt2",
        "opt",
        "falcon",
        "mixtral",
        "gemma2",
        "gemma3_text",
        "phi3",
        "qwen3",
        "gemma4",
        "apertus",
        "seed_oss",
        "gpt_oss",
        "qwen3_5",
        "qwen3_5_moe",
        "smollm3",
        "granitemoehybrid",
        "mistral3",
    } <= {facts["config"]["model_type"] for facts in FACTS.values()}


def test_totals_are_those_of_the_classes() -> None:
    """One shipped model of each family, its smallest, and configs with what those leave out."""
    smallest: dict[str, dict[str, Any]] = {}
    known = [facts for facts in FACTS.values() if facts["config"]["model_type"] in known_families()]
    for facts in sorted(known, key=lambda facts: facts["published_parameters"]):
        smallest.setdefault(facts["config"]["model_type"], facts["config"])
    for config in [*smallest.values(), *TINY]:
        assert read_shape(config).total_parameters == class_parameters(config), config
    tried = set(smallest) | {config["model_type"] for config in TINY} | {"ministral"}
    assert tried >= set(known_families())


def test_linears_are_the_classes_linears() -> None:
    """By name, size, number and whether it is quantised; and what takes no adapter."""
    for name in ("meta-llama--Llama-3.2-1B", "openai-community--gpt2", "microsoft--phi-2", "Qwen--Qwen1.5-MoE-A2.7B",
                 "facebook--opt-350m", "tiiuae--falcon-7b", "mistralai--Mixtral-8x7B-v0.1"):  # fmt: skip
        config = FACTS[name]["config"]
        ours, theirs = read_shape(config), read_class_shape(config)
        sizes = [
            sorted((x.name, x.in_features, x.out_features, x.count, x.bias, x.transposed, x.quantizable)
                   for x in shape.linears if not x.left_out)
            for shape in (ours, theirs)
        ]  # fmt: skip
        assert sizes[0] == sizes[1]
        assert ours.expert_parameters == theirs.expert_parameters
        assert ours.total_parameters == theirs.total_parameters
        assert set(ours.left_out) == set(theirs.left_out)


def test_an_unknown_family_is_read_from_its_class() -> None:
    config = {"model_type": "glm4", **SIZES, "head_dim": 16}
    shape = find_shape(config)
    assert shape.total_parameters == class_parameters(config)
    assert {linear.role for linear in shape.linears} == {"q", "k", "v", "o", "gate_up", "down"}
    with pytest.raises(ModelError, match="knows no model_type"):
        find_shape({"model_type": "no-such-model"})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "lama"}, "did you mean llama"),
        ({}, "names no model_type"),
        ({"model_type": "llama"}, "hidden_size: is missing"),
        ({"model_type": "llama", **SIZES, "vocab_size": -1}, "vocab_size: -1 is not a positive"),
        ({"model_type": "llama", **SIZES, "num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"model_type": "llama", **SIZES, "hidden_size": True}, "hidden_size"),
    ],
)
def test_a_bad_config_names_what_is_wrong(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_shape(config)
    assert said in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("unsloth--gpt-oss-20b-BF16", {"experts": 32, "experts_per_token": 4, "expert_size": 2880, "has_sinks": True}),
        ("google--gemma-4-26B-A4B", {"experts": 128, "experts_per_token": 8, "expert_size": 704}),
        ("ibm-granite--granite-4.0-h-small",
         {"experts": 72, "experts_per_token": 10, "expert_size": 768, "scanning_layers": 36, "plain_head": False}),
        ("zai-org--GLM-4.5-Air", {"experts": 128, "experts_per_token": 8, "expert_size": 1408}),
        # 50 layers of 32 heads of 256 over 16, 10 of 512 over 4: widths 8192 and 4096, 16384 and 2048
        ("google--gemma-4-31B", {"heads": 32, "head_dim": 299, "kv_heads": 13, "norms_per_layer": 4, "qk_norm": True}),
        ("google--gemma-3-4b-pt", {"head_dim": 256, "kv_heads": 4, "norms_per_layer": 4, "qk_norm": True,
                                   "activation": "gelu_pytorch_tanh", "plain_norm": False}),
        ("allenai--Olmo-3-1025-7B", {"norms_per_layer": 2, "qk_norm": True}),
        ("ByteDance-Seed--Seed-OSS-36B-Base", {"hidden_dropout": 0.1, "attention_dropout": 0.1, "norms_per_layer": 2}),
        ("swiss-ai--Apertus-8B-2509", {"activation": "xielu", "gated_mlp": False, "qk_norm": True}),
        ("Qwen--Qwen3.5-4B", {"scanning_layers": 24, "layers": 32}),
        ("mistralai--Mistral-Small-3.1-24B-Base-2503", {"scanning_layers": 0, "plain_head": True}),
    ],
)  # fmt: skip
def test_what_a_class_tells_of_its_layers(name: str, facts: dict[str, Any]) -> None:
    shape = find_shape(FACTS[name]["config"])
    assert {key: getattr(shape, key) for key in facts} == facts


def test_the_facts_of_a_class_are_those_of_the_arithmetic() -> None:
    """Of families that are known both ways."""
    names = ("Qwen--Qwen3-0.6B", "google--gemma-3-1b-pt", "allenai--OLMo-2-1124-7B", "mistralai--Mixtral-8x7B-v0.1",
             "HuggingFaceTB--SmolLM3-3B", "ibm-granite--granite-3.3-2b-base")  # fmt: skip
    for name in names:
        config = FACTS[name]["config"]
        ours, theirs = read_shape(config), read_class_shape(config)
        for key in ("norms_per_layer", "qk_norm", "activation", "head_dim", "kv_heads", "experts", "experts_per_token",
                    "expert_size", "plain_head", "plain_norm", "scanning_layers", "attention_dropout"):  # fmt: skip
            assert getattr(ours, key) == getattr(theirs, key), (name, key)
