"""Tiny random models that see, each with its processor and tokenizer: a LLaVA of a CLIP and a Llama, an Idefics3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.tiny_model import make_tokenizer

IMAGE = "<image>"
PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_llava(folder: Path, *, seed: int = 0, side: int = 16, patch: int = 8) -> Path:
    """A LLaVA whose images are `side` pixels wide and become a token for each patch."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer([IMAGE])
    torch.manual_seed(seed)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=side, patch_size=patch, **vision),
            text_config=LlamaConfig(vocab_size=len(tokenizer), **_ids(tokenizer), **_TEXT),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            vision_feature_layer=-1,
        )
    )
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(**sizes),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PARTS,
    )
    return _save(model, processor, folder)


def make_idefics3(folder: Path, *, seed: int = 0, side: int = 16, patch: int = 4) -> Path:
    """An Idefics3 that cuts an image into tiles of `side` pixels, two a side at most, and sees the whole besides."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    rows = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    tokenizer = _tokenizer(["<fake_token_around_image>", IMAGE, "<end_of_utterance>", "<global-img>", *rows])
    torch.manual_seed(seed)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config={"image_size": side, "patch_size": patch, **vision},
            text_config={"model_type": "llama", "vocab_size": len(tokenizer), **_ids(tokenizer), **_TEXT},
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            scale_factor=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side})
    seen = (side // patch) ** 2 // 4
    return _save(model, Idefics3Processor(images, tokenizer, image_seq_len=seen, chat_template=PARTS), folder)


def _tokenizer(special: list[str]) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def _ids(tokenizer: Any) -> dict[str, Any]:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"bos_token_id": None, **ends}


def _save(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
