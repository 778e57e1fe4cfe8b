"""Tiny random models of the architectures that transformers registers, made from their classes' own defaults.

    defaults of the config class --sizes by field name (SIZES)--> tiny config --(EXCEPTIONS)--> random model

Layers of different kinds all stay: one of each pair of attention and MLP, so that a hybrid is one. Widths are multiples
of 64, which 4-bit weights on a CPU need.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

VOCABULARY, LAYERS = 320, 2
_SIZE_NAMES = {
    64: "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size projection_dim hidden_dim out_hidden_size "
    "output_dim projector_hidden_size projection_hidden_size text_hidden_size vision_hidden_size word_embed_proj_dim "
    "backbone_hidden_size encoder_hidden_size image_text_hidden_size width q_lora_rank kv_lora_rank o_lora_rank "
    "attention_hidden_size alignment_intermediate_size input_dim merged_hidden_size prompt_mid_dim lru_width conv_dim "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size intermediate_multiple_size hc_lowrank "
    "sliding_window window_size sliding_window_size attention_chunk_size local_attention hidden_size_per_layer_input "
    "laurel_rank adapter_in_dim adapter_out_dim adapter_input_size downsample_hidden_size output_proj_dims chunk_size "
    "local_attention_window_len mamba_chunk_size audio_hidden_size num_position_embeddings",
    128: "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dim_ff dff "
    "intermediate_size_mlp mlp_hidden_size dense_intermediate_size text_intermediate_size feed_forward_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "swa_num_attention_heads index_n_heads linear_num_value_heads linear_num_heads num_encoder_attention_heads "
    "num_decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_key_value_heads n_kv_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads kv_n_heads "
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_blocks num_decoder_layers "
    "num_encoder_layers resampler_depth num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k "
    "num_mem_blocks",
    16: "head_dim kv_channels attention_head_dim dim_head swa_head_dim linear_key_head_dim linear_value_head_dim "
    "v_head_dim index_head_dim linear_head_dim resampler_dim_head mamba_d_head mamba_head_dim qk_head_dim "
    "mamba_d_state state_size ssm_state_size attention_head_size adapter_rank index_topk",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim",
    1: "n_group topk_group first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts "
    "moe_num_shared_experts mm_tokens_per_image",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    1024: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions",
    28: "image_size",
    14: "patch_size",
}
SIZES = {name: size for size, names in _SIZE_NAMES.items() for name in names.split()}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LAYER_KINDS = ("layer_types", "mlp_layer_types")
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_TOKEN = re.compile(r"(token_id|token_index|_id)$")


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary angles of three axes; the sections share half of a head."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}}


EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 300,
        "encoder_hash_byte_group_size": [3],
        "patching_threshold": 6.0,  # above any entropy of 320 tokens: softmax over a patch of one has no gradient
        "max_patch_length": 4,
        "vocab_size": VOCABULARY,
    },
    "blt_local_encoder": {"hidden_size_global": 128, "vocab_size": VOCABULARY},
    "blt_local_decoder": {"hidden_size_global": 128, "vocab_size": VOCABULARY},
    "blt_patcher": {"vocab_size": VOCABULARY},
    "blt_global_transformer": {"hidden_size": 128},
    "chameleon": {"vocabulary_map": {"<image>": 30}},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1], "resolution": 32, "num_embeddings": 16},
    "diffusion_gemma_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "deepseek_v4": {
        "o_groups": 2,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots3_note_text": {
        "index_topk": 64,  # all of a row: among the many scores of 0 any rounding picks others
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 64,
        "swa_kv_lora_rank": 64,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "emu3": {"vocabulary_map": {"<image>": 30}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1], "codebook_size": 16, "num_res_blocks": 1},
    "gemma4_unified_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
    },
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [], "spatial_target_layers": []},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1], "num_embeddings": 16, "latent_channels": 32},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "muse_spark_audio": {"num_hidden_layers": 2, "patch_sizes": [2, 2], "hidden_sizes": [32, 64], "depths": [1, 1]},
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _mrope(4, 2, 2)["rope_parameters"]),
    },
    "cosmos3_edge_text": _mrope(4, 2, 2),
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [64, 64], **_mrope(3, 3, 2)},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "global_head_dim": 16,
        "num_kv_shared_layers": 1,
    },
    "glm46v_text": _mrope(4, 2, 2),
    "glm4v_moe_text": _mrope(2, 1, 1, partial_rotary_factor=0.5),
    "glm4v_text": _mrope(4, 2, 2),
    "glm_ocr_text": _mrope(4, 2, 2),
    "glmga_text": _mrope(4, 2, 2),
    "hy_v4": {"index_topk": 64},  # as dots3_note_text's
    "inkling_vision": {"num_hidden_layers": 8},  # fewer are chosen by scipy
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16, **_mrope(2, 2, 2, 2)},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2, "qk_head_dim": 16, "head_dim": 8, "num_layers": 1},
    "mimi": {"upsample_groups": 64},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl_text": _mrope(4, 2, 2),
    "qwen2_5_omni_text": _mrope(4, 2, 2),
    "qwen2_5_vl_text": _mrope(4, 2, 2),
    "qwen2_vl_text": _mrope(4, 2, 2),
    "qwen3_omni_moe": {"talker_config": {"text_config": {"shared_expert_intermediate_size": 64}}},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "ngram_vocab_size_base": 300,
        "heads_per_ngram": 2,
        "split_ngram_parts": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 64},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 64]},
    "step3p5": {"share_expert_dim": 64, "sliding_window": 64, "num_sliding_attention_heads": 4},
    "xlstm": {"hidden_size": 128},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "num_mem_blocks": 1},
}
"""What the rule by names does not make, by the model type of a config or of a part of one."""


_ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod"
)
_AUDIO = (
    "fun_asr_nano glmasr granite_speech granite_speech_plus kyutai_speech_to_text moshi moss_transcribe_diarize "
    "musicgen musicgen_melody nemo_speechlm qwen2_audio qwen2_5_omni qwen3_asr qwen3_omni_moe vibevoice_asr voxtral "
    "voxtral_realtime whisper"
)
_DECODERS_OF_A_PAIR = ("trocr", "blip")
"""Beside those whose config says so: they attend to what an encoder has read."""


def architectures() -> list[str]:
    """Every model type that transformers registers as a causal language model, or as one of several modalities."""
    from transformers.models.auto import modeling_auto

    tables = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    return sorted({kind for table in tables for kind in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")})


def group_of(architecture: str) -> str:
    """`text`, `multimodal`, or what is counted apart: `encoder-decoder`, `audio`, `encoder`."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if architecture in _AUDIO.split():
        return "audio"
    if architecture in _ENCODERS.split():  # they see both ways unless their config says `is_decoder`
        return "encoder"
    declared = getattr(CONFIG_MAPPING[architecture], "is_encoder_decoder", False)
    seq2seq = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if declared or architecture in seq2seq or architecture in _DECODERS_OF_A_PAIR:
        return "encoder-decoder"
    whole = {
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    return "multimodal" if architecture in whole else "text"


def tiny_config(architecture: str) -> Any:
    """The config of a model type, shrunk; `architecture` is a key of transformers' CONFIG_MAPPING."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrink(CONFIG_MAPPING[architecture], {})


def _shrink(kind: Any, changes: dict[str, Any]) -> Any:
    changes = {**EXCEPTIONS.get(kind.model_type, {}), **changes}
    try:
        usual = kind()
    except Exception:  # a class whose own defaults contradict each other
        usual = kind(**changes)
    fields = {field.name: field.default for field in dataclasses.fields(kind) if field.name not in kind.sub_configs}
    values = {name: value for name, default in fields.items() if (value := _small(name, default)) is not None}
    if "kv_lora_rank" in values and "num_key_value_heads" in values:  # latent attention has as many as heads
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in kind.sub_configs:
        part = getattr(usual, name, None)
        if hasattr(type(part), "sub_configs"):
            own = changes.pop(name, None)
            values[name] = _shrink(type(part), own if isinstance(own, dict) else {})
    if not {*_LAYER_KINDS, "layers_block_type"} & set(changes):
        values.update(_one_layer_of_each_kind(usual, fields))
    elif "layer_types" in changes:
        values["num_hidden_layers"] = len(changes["layer_types"])
    return kind(**{**values, **changes})


def _small(name: str, default: Any) -> Any:
    if name in _SPECIAL_TOKENS:
        return _SPECIAL_TOKENS[name]
    if name == "initializer_range":
        return 0.05
    if not isinstance(default, int) or isinstance(default, bool) or default <= 0:
        return None
    if _TOKEN.search(name):
        return 20 + sum(map(ord, name)) % 200
    return min(default, SIZES[name]) if name in SIZES else None


def _one_layer_of_each_kind(usual: Any, fields: dict[str, Any]) -> dict[str, Any]:
    lists = {name: found for name in _LAYER_KINDS if isinstance(found := getattr(usual, name, None), list) and found}
    if not lists:
        return {}
    pairs = list(dict.fromkeys(zip(*lists.values(), strict=False)))
    pairs += [pairs[-1]] * (LAYERS - len(pairs))
    values: dict[str, Any] = {name: len(pairs) for name in _LAYER_COUNTS if name in fields}
    return values | {
        name: list(kinds) for name, kinds in zip(lists, zip(*pairs, strict=True), strict=True) if name in fields
    }


def make_base(architecture: str, folder: Path, tokenizer: Any, *, seed: int = 0) -> Any:
    """A random model of an architecture as a folder with a tokenizer; gives the model.

    What a class starts as zeros is drawn too: with a zero in its way an adapter would never learn.
    """
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

    if architecture in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        auto = transformers.AutoModelForImageTextToText
    elif architecture in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        auto = transformers.AutoModelForMultimodalLM
    else:
        auto = transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(tiny_config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
