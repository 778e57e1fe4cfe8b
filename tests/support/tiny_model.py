"""The tests' one model: a random Llama that fits into a test, and its tokenizer of bytes with a ChatML template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

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


def tiny_llama(*, seed: int | None = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama in fp32, of 2 layers and a width of 64 unless said.

    Args:
        seed: Of the weights; None: whatever torch's generator gives.
        changes: Keys of its config.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if seed is not None:
        torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 64,  # a multiple of 64, which 4-bit weights on a CPU need
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def make_base(folder: Path, *, seed: int = 0, layers: int = 2, **changes: Any) -> Path:
    """A folder with the tiny Llama, about 100 thousand parameters, and its tokenizer."""
    fast = make_tokenizer()
    model = tiny_llama(
        seed=seed,
        vocab_size=len(fast),
        num_hidden_layers=layers,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        **changes,
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
