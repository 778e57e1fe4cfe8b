"""A whole small world on disk: a tiny random Llama with a chat tokenizer, rows, and a recipe that trains quickly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = [
    *("what", "does", "the", "shop", "sell", "open", "close", "red", "blue", "green", "mug", "plate", "bowl"),
    *("on", "monday", "friday", "it", "opens", "at", "nine", "ten", "costs"),
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> Any:
    """A byte-level tokenizer of at most 320 tokens, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def make_base(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """A random Llama of about 100 thousand parameters in fp32, with a byte-level tokenizer and a ChatML template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Questions and answers of different lengths; each row differs from the others."""
    rows = []
    for number in range(first, first + count):
        words = [WORDS[(number * 7 + k * 3) % len(WORDS)] for k in range(3 + number % 5)]
        answer = [WORDS[(number * 5 + k * 2) % len(WORDS)] for k in range(2 + number % 4)]
        rows.append({"question": f"{' '.join(words)} {number}", "answer": f"{' '.join(answer)} {number}"})
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def make_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe in `folder` over `base/` beside it; keyword arguments replace keys of its sections."""
    import yaml

    write_rows(folder / "train.jsonl", make_rows(24))
    write_rows(folder / "valid.jsonl", make_rows(4, first=100))
    write_rows(folder / "test.jsonl", [{**row, "must_contain": ["opens"]} for row in make_rows(6, first=200)])
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"base": "base", "dtype": "fp32", "attention": "eager", "quantization": "none"},
        "adapter": {"kind": "lora", "r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl", "test": "test.jsonl", "max_length": 128},
        "training": {
            "max_steps": 4,
            "batch_size": 4,
            "micro_batch_tokens": 256,
            "learning_rate": 1e-2,
            "optimizer": "adamw",
            "gradient_checkpointing": False,
        },
        "evaluation": {"final": ["perplexity", "must_contain"], "max_new_tokens": 8},
        "checkpoints": {"every_steps": 2},
        "output": "run",
    }
    for section, changes in sections.items():
        values[section] = {**values[section], **changes} if isinstance(changes, dict) else changes
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe
