"""Which linears take an adapter, told from the model alone; and that plan and model never disagree without a word."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorafit.contracts import Silent
from lorafit.errors import ModelError, RecipeError
from lorafit.kinds.adapters import adapters
from lorafit.model import targets
from lorafit.model.attach import attach_adapter, check_plan
from lorafit.model.attention import set_attention
from lorafit.model.class_shape import find_shape, read_class_shape
from lorafit.model.classes import _cannot_build, build_empty, find_auto_class, read_settings
from lorafit.model.targets import (
    CHOICE,
    MOVED,
    OTHER,
    OUTSIDE,
    READ,
    RENAMED,
    ROUTER,
    SHARED,
    choose_targets,
    head_names,
    left_out_names,
    output_head,
    unquantised_names,
)
from tests.support.adapted import lora
from tests.support.tiny_model import tiny_llama
from tests.support.zoo_models import tiny_config

CAUSAL = "AutoModelForCausalLM"


def empty(architecture: str) -> tuple[Any, dict[str, Any]]:
    """The model on the meta device, and what its config.json holds."""
    config = tiny_config(architecture).to_dict()
    return build_empty(read_settings(config), find_auto_class(config, CAUSAL)), config


def reasons(architecture: str) -> dict[str, str]:
    """Why a linear takes no adapter, by the last part of its path."""
    return {name.rsplit(".", 1)[-1]: why for name, why in left_out_names(empty(architecture)[0]).items()}


@pytest.mark.parametrize(
    ("architecture", "adapted", "left_out"),
    [
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}, {}),
        ("qwen2_moe", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
         {"shared_expert_gate": ROUTER}),
        ("qwen3_next", {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"},
         {"shared_expert_gate": ROUTER, "gate_proj": MOVED, "up_proj": MOVED, "down_proj": MOVED}),
        ("mamba", {"in_proj"}, {"x_proj": READ, "dt_proj": READ, "out_proj": READ}),
        ("zamba", {"in_proj", "out_proj", "linear"},
         dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), SHARED)),
        ("glm_moe_dsa", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
         {"wq_b": CHOICE, "wk": CHOICE, "weights_proj": CHOICE,
          "gate_proj": MOVED, "up_proj": MOVED, "down_proj": MOVED}),
        ("jetmoe", {"kv_proj"}, {"layer": ROUTER}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}, {}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, {}),
    ],
)  # fmt: skip
def test_all_linear_takes_every_linear_that_can_carry_an_adapter(
    architecture: str, adapted: set[str], left_out: dict[str, str]
) -> None:
    assert {name.rsplit(".", 1)[-1] for name in choose_targets(empty(architecture)[0], "all-linear")} == adapted
    assert reasons(architecture) == left_out


def test_towers_beside_the_language_model_get_no_adapter_and_stay_unquantised() -> None:
    model, config = empty("gemma3")
    chosen = choose_targets(model, ["q_proj"])
    assert chosen == [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.q_proj",
    ]
    assert left_out_names(model)["model.vision_tower.encoder.layers.0.self_attn.q_proj"] == OUTSIDE
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in unquantised_names(model, None, Silent())
    assert {part.name for part in find_shape(config).left_out} == {"vision_tower", "multi_modal_projector"}


@pytest.mark.parametrize(
    ("architecture", "target", "why"),
    [("deepseek_v4", "o_a_proj", OTHER), ("blt", "lm_head", CHOICE), ("rwkv", "output", READ),
     ("inkling2_text", "weight_proj", RENAMED), ("phi4_multimodal", "img_projection_up", OUTSIDE),
     ("qwen3_next", "gate_proj", MOVED), ("mamba", "dt_proj", READ), ("zamba", "q_proj", SHARED),
     ("qwen2_moe", "shared_expert_gate", ROUTER)],
)  # fmt: skip
def test_a_target_that_takes_no_adapter_is_refused_with_the_reason(architecture: str, target: str, why: str) -> None:
    """By the plan, before anything is loaded, and by the loaded model."""
    model, config = empty(architecture)
    with pytest.raises(RecipeError, match=target) as caught:
        choose_targets(model, [target])
    assert why in str(caught.value)
    with pytest.raises(RecipeError, match=target):
        adapters.bind(lora(target_modules=[target])).sites(read_class_shape(config))


def test_what_peft_moves_is_seen_before_step_1() -> None:
    """PEFT itself turns these names into the experts' parameters: nobody's plan has them."""
    model, config = empty("qwen3_next")
    with torch.device("meta"):
        moved = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]))
    section = lora(target_modules=["q_proj"], r=4)
    kind, shape = adapters.bind(section), find_shape(config)
    planned = kind.sites(shape)
    with pytest.raises(ModelError, match=r"plan and model disagree: experts: 0 layers planned, \d+ adapted") as caught:
        check_plan(moved, planned, sum(site.parameters for site in planned))
    assert "trainable parameters planned" in str(caught.value)


@pytest.mark.parametrize(
    "architecture",
    [
        "deepseek_v3",
        "qwen3_next",
        "qwen3_5",
        "gemma3",
        "gemma4_text",
        "llama4_text",
        "falcon",
        "gpt2",
        "mamba",
        "zamba2",
    ],
)
def test_the_plan_counts_what_is_attached(architecture: str) -> None:
    """Dense layers before mixtures, shared experts, linear attention, latent attention, towers: all by the class."""
    model, config = empty(architecture)
    section, shape = lora(r=4), find_shape(config)
    kind = adapters.bind(section)
    planned = kind.sites(shape)
    trainable = sum(site.parameters for site in planned)
    with torch.device("meta"):
        adapted = attach_adapter(model, section, 0)
    check_plan(adapted, planned, trainable)
    assert trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad) > 0
    assert shape.total_parameters == sum(p.numel() for p in empty(architecture)[0].parameters())


def test_layers_without_experts_among_mixtures_are_counted_by_the_class() -> None:
    config = {**tiny_config("qwen3_moe").to_dict(), "mlp_only_layers": [0]}
    model = build_empty(read_settings(config), CAUSAL)
    assert find_shape(config).total_parameters == sum(p.numel() for p in model.parameters())


def test_the_class_is_chosen_by_the_config() -> None:
    chosen = {
        name: find_auto_class({"model_type": name}, CAUSAL) for name in ("llama", "gemma3", "qwen3_5", "mistral3")
    }
    assert chosen == {"llama": CAUSAL, "gemma3": CAUSAL, "qwen3_5": CAUSAL, "mistral3": "AutoModelForImageTextToText"}
    with pytest.raises(ModelError, match="'t5' is an encoder-decoder"):
        find_auto_class({"model_type": "t5", "is_encoder_decoder": True}, CAUSAL)
    with pytest.raises(ModelError, match="'bart' is an encoder-decoder"):  # its decoder alone, as transformers saves it
        find_auto_class({"model_type": "bart", "is_encoder_decoder": False}, CAUSAL)
    unbounded = read_settings({"model_type": "bamba", "time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert unbounded.time_step_limit == (0.0, float("inf"))


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("pi0", "PI0ForConditionalGeneration generates no text token by token"),
        ("kyutai_speech_to_text", "has no table of token embeddings"),
        ("gemma4_assistant", "drafts tokens for another model"),
    ],
)
def test_what_is_no_language_model_is_told_from_its_config(architecture: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        find_shape({"model_type": architecture})


def test_a_package_that_a_class_needs_is_named() -> None:
    """As transformers says it, and as Python does."""
    asked = ImportError("\nTimmWrapperModel requires the timm library but it was not found in your environment.")
    absent = ModuleNotFoundError("No module named 'scipy'", name="scipy")
    for error, package in ((asked, "timm"), (absent, "scipy")):
        told = _cannot_build("gemma3n", error)
        assert str(told) == (
            f"config.json: transformers needs the package {package} to build this model (gemma3n); "
            f"pip install {package}"
        )


def test_a_head_inside_of_the_language_model_is_found() -> None:
    model, _ = empty("nemotron_h_omni")
    assert model.get_output_embeddings() is None
    assert output_head(model) is model.language_model.lm_head and head_names(model) == ["language_model.lm_head"]


def test_a_file_of_code_is_parsed_once_for_all_of_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a first use of a model that is a tenth of a second instead of one."""
    parsed: list[str] = []
    real = ast.parse
    monkeypatch.setattr(ast, "parse", lambda code, *rest, **more: parsed.append(code) or real(code, *rest, **more))
    targets._named_in_code.cache_clear()
    targets._code_of_classes.cache_clear()
    left_out_names(tiny_llama())
    assert parsed and len(parsed) == len(set(parsed))


def test_towers_that_do_not_know_an_attention_are_loaded_without_it() -> None:
    """As training switches it: the run's attention is what `eval` loads the model with."""
    assert set_attention(empty("vibevoice_asr")[0], "sdpa") == {"text_config": "sdpa"}
    assert set_attention(empty("qwen2")[0], "sdpa") == "sdpa"
