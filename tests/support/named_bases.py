"""Tiny random models whose files name or cut their tensors otherwise than their classes do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from tests.support.adapted import make_gpt2, make_llama

_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip


def _save(model: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # what starts at zero would hide what is put there
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def change_file(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Writes a folder's single weight file anew."""
    file = folder / "model.safetensors"
    save_file(
        {name: value.contiguous().clone() for name, value in change(load_file(file)).items()}, file, {"format": "pt"}
    )
    return folder


def gemma3_text(folder: Path) -> Path:
    return _save(tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=64)), folder)


def gemma3(folder: Path) -> Path:
    """Text and vision: `language_model.model.` in the file, `model.language_model.` in the class."""
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = tf.Gemma3Config(
        text_config={**_SIZES, "head_dim": 16, "sliding_window": 64}, vision_config=vision, mm_tokens_per_image=4
    )
    return _save(tf.Gemma3ForConditionalGeneration(config), folder)


def qwen3_5(folder: Path) -> Path:
    """Text and vision in the file; the causal class has the text alone, under other names."""
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    text = {**_SIZES, "num_hidden_layers": 4, **_LINEAR_ATTENTION, "head_dim": 16}
    config = tf.Qwen3_5Config(text_config=text, vision_config={**vision, "patch_size": 14})
    return _save(tf.Qwen3_5ForConditionalGeneration(config), folder)


def qwen3_next(folder: Path) -> Path:
    """With a head that predicts further tokens (MTP), which the class leaves out."""
    config = tf.Qwen3NextConfig(
        **{**_SIZES, "num_hidden_layers": 4}, **_EXPERTS, **_LINEAR_ATTENTION, shared_expert_intermediate_size=64,
        head_dim=16,
    )  # fmt: skip
    _save(tf.Qwen3NextForCausalLM(config), folder)

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        layer = "model.layers.3.self_attn."
        extra = {name.replace(layer, "mtp.layers.0.self_attn."): value for name, value in tensors.items()}
        return tensors | {name: value + 1 for name, value in extra.items() if name.startswith("mtp.")}

    return change_file(folder, add)


def qwen2_moe(folder: Path) -> Path:
    """Each expert's matrices apart in the file, all in one tensor in the class."""
    return _save(
        tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**_SIZES, **_EXPERTS, shared_expert_intermediate_size=64)), folder
    )


def mixtral(folder: Path) -> Path:
    """The same under other names, `block_sparse_moe.experts.0.w1`."""
    return _save(tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)), folder)


def gpt2_bare(folder: Path) -> Path:
    """As the first checkpoints: no `transformer.` before the names, masks among the tensors."""

    def strip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        return bare | {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}

    return change_file(make_gpt2(folder), strip)


def hrm(folder: Path) -> Path:
    """Queries, keys, values and gates in one tensor of the file, four linears of the class."""
    config = tf.HrmTextConfig(**{**_SIZES, "num_key_value_heads": 4}, head_dim=16)
    return _save(tf.HrmTextForCausalLM(config), folder)


def zamba2(folder: Path) -> Path:
    """One attention block used at two depths: two layers of the class share each of its tensors."""
    config = tf.Zamba2Config(
        vocab_size=96, hidden_size=64, num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2,
        num_mem_blocks=1, num_attention_heads=4, attention_head_dim=32, intermediate_size=128, mamba_d_state=16,
        mamba_headdim=16, n_mamba_heads=8, chunk_size=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _save(tf.Zamba2ForCausalLM(config), folder)


def laguna(folder: Path) -> Path:
    """A shared expert beside the routed ones, renamed while loading."""
    config = tf.LagunaConfig(
        **{**_SIZES, **_EXPERTS}, shared_expert_intermediate_size=64, head_dim=16, sliding_window=32
    )  # fmt: skip
    return _save(tf.LagunaForCausalLM(config), folder)


def transposed_llama(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whose up projections lie the other way round in the file, with a class that turns them while loading."""
    change_file(make_llama(folder), lambda t: {n: v.t() if "up_proj" in n else v for n, v in t.items()})
    own = {"llama": [WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [Transpose(0, 1)])]}
    real = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping, "get_checkpoint_conversion_mapping", lambda kind: own.get(kind) or real(kind)
    )
    return folder


BASES: dict[str, Callable[[Path], Path]] = {
    made.__name__: made
    for made in (gemma3_text, gemma3, qwen3_5, qwen3_next, qwen2_moe, mixtral, gpt2_bare, hrm, zamba2)
}
