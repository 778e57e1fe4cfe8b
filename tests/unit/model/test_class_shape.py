"""Shapes against published parameter counts and against transformers' own classes on the meta device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import ModelError
from lorafit.facts import SEQ2SEQ_CLASS, ModelClass
from lorafit.kinds.tasks import tasks
from lorafit.machine.shipped import shipped
from lorafit.model.class_shape import find_shape, read_class_shape
from lorafit.model.classes import build_empty, build_whole, read_settings, usual_class
from lorafit.model.known_models import known_config, known_shape
from tests.support.zoo_models import tiny_config

SHIPPED = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(shipped("models").glob("*.json"))}
PAIRS = {name: facts for name, facts in SHIPPED.items() if facts["config"].get("is_encoder_decoder")}
ENCODERS = {name: facts for name, facts in SHIPPED.items() if facts.get("is_encoder")}
FACTS = {name: facts for name, facts in SHIPPED.items() if name not in PAIRS and name not in ENCODERS}
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


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
    total = find_shape(facts["config"], usual_class(facts["config"])).total_parameters + sum(
        facts.get("published_beside", {}).values()
    )
    published = facts["published_parameters"]
    if facts.get("published_rounded"):  # where the hub's page shows three digits
        assert abs(total / published - 1) < 0.002
    else:
        assert total == published


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_the_published_counts_beside_a_tasks_head(name: str) -> None:
    facts = ENCODERS[name]
    shape = find_shape(facts["config"], tasks.make("sequence-classification", labels=["a", "b"]).model_class)
    assert shape.new_head_parameters == 2 * facts["config"]["hidden_size"] + 2
    assert shape.total_parameters - shape.new_head_parameters == facts["published_parameters"]


@pytest.mark.parametrize("name", PAIRS)
def test_encoder_decoders_have_the_published_counts_for_their_task_and_no_other(name: str) -> None:
    facts = PAIRS[name]
    assert find_shape(facts["config"], ModelClass(SEQ2SEQ_CLASS)).total_parameters == facts["published_parameters"]
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        find_shape(facts["config"])


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
    assert find_shape(config).total_parameters == 134_515_008  # the tied head is counted once
    assert find_shape(config).head_parameters == 0
    assert known_shape({**config, "num_hidden_layers": 31}) is None
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


def test_shipped_shapes_are_what_the_classes_tell() -> None:
    """Of each family the smallest model; `docs/write_shapes.py` writes them all."""
    smallest: dict[str, dict[str, Any]] = {}
    for facts in sorted(FACTS.values(), key=lambda facts: facts["published_parameters"]):
        smallest.setdefault(facts["config"]["model_type"], facts["config"])
    assert len(smallest) > 30
    for config in smallest.values():
        assert known_shape(config) == read_class_shape(config, usual_class(config)), config


def test_a_shape_is_kept_and_comes_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from lorafit.model.class_shape import find_shape\n"
        f"print(find_shape({ {'model_type': 'llama', **SIZES} }).total_parameters, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "LORAFIT_CACHE": str(tmp_path)}
    said = [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
            for _ in range(2)]  # fmt: skip
    first, second = (done.stdout.split() for done in said)
    assert first == [str(class_parameters({"model_type": "llama", **SIZES})), "True"]
    assert second == [first[0], "False"]


def test_what_is_not_shipped_is_read_from_its_class() -> None:
    config = {"model_type": "glm4", **SIZES, "head_dim": 16}
    shape = find_shape(config)
    assert shape.total_parameters == class_parameters(config)
    assert {linear.role for linear in shape.linears} == {"q", "k", "v", "o", "gate_up", "down"}
    with pytest.raises(ModelError, match="knows no model_type"):
        find_shape({"model_type": "no-such-model"})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama"}, "hidden_size: is missing"),
        ({"model_type": "llama", **SIZES, "vocab_size": -1}, "vocab_size: -1 is not a positive"),
        ({"model_type": "llama", **SIZES, "num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"model_type": "llama", **SIZES, "hidden_size": True}, "hidden_size"),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "vocab_size": 9}, "num_attention_heads: is missing"),
    ],
)
def test_a_bad_config_names_what_is_wrong(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_shape(config)
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
        ("openai-community--gpt2", {"norm": "layer", "position_parameters": 1024 * 768, "hidden_dropout": 0.1,
                                    "attention_dropout": 0.1, "activation": "gelu_new", "gated_mlp": False}),
        ("facebook--opt-125m", {"norm": "layer", "position_parameters": 2050 * 768, "hidden_dropout": 0.1}),
        ("tiiuae--falcon-7b", {"norm": "layer", "kv_heads": 1, "math_attention": True, "parallel": True,
                               "norms_per_layer": 1, "activation": "gelu", "quantizable": False}),
        ("EleutherAI--pythia-160m", {"norm": "layer", "parallel": True, "norms_per_layer": 2, "gated_mlp": False}),
        ("microsoft--phi-2", {"norm": "layer", "parallel": True, "norms_per_layer": 1, "hidden_dropout": 0.1}),
        ("CohereForAI--c4ai-command-r-v01", {"norm": "layer", "parallel": True, "plain_head": False}),
        ("google--gemma-2-2b", {"norm": "rms", "softcap": True, "plain_head": False, "norms_per_layer": 4}),
        ("meta-llama--Llama-3.2-1B", {"norm": "rms", "parallel": False, "head_parameters": 0}),
    ],
)  # fmt: skip
def test_what_a_class_tells_of_its_layers(name: str, facts: dict[str, Any]) -> None:
    shape = find_shape(FACTS[name]["config"])
    assert {key: getattr(shape, key) for key in facts} == facts


def test_a_size_that_the_class_derives_may_be_left_out() -> None:
    config = json.loads(tiny_config("nemotron_h").to_json_string())
    assert "num_hidden_layers" not in config
    assert read_class_shape(config).layers == len(config["layers_block_type"])


def test_roles_tell_equal_names_apart() -> None:
    """GPT-2 calls the last linear of both blocks `c_proj`."""
    linears = read_class_shape(FACTS["openai-community--gpt2"]["config"]).linears
    assert [(x.name, x.role, x.in_features, x.transposed) for x in linears] == [
        ("c_attn", "qkv", 768, True),
        ("c_proj", "o", 768, True),
        ("c_fc", "up", 768, True),
        ("c_proj", "down", 3072, True),
    ]
