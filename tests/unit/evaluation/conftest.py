"""Tiny models, a byte tokenizer and a few rows for the tests of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafit.contracts import Example, GenerationRow
from tests.support.tiny_model import tiny_llama

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]


class Rows(list[Example]):
    """contracts.Examples over a list."""

    @property
    def lengths(self) -> list[int]:
        return [len(example["tokens"]) for example in self]

    @property
    def weights(self) -> list[int]:
        return [sum(example["trained"]) for example in self]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and three control tokens; pad == eos == <|im_end|>, and <|eot_id|> ends a turn without being eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")


def build_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": 259,
        "initializer_range": 0.3,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    return tiny_llama(seed=seed, **settings | changes)


def add_adapter(model: torch.nn.Module, seed: int = 1, dropout: float = 0.0, scale: float = 0.05) -> PeftModel:
    """LoRA on all linears whose B is not zero, so that base and tuned model differ."""
    torch.manual_seed(seed)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale)
    return tuned


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return build_llama().eval()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    """Learnt positions: a position beyond the last one fails."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=256, eos_token_id=257
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def tuned() -> PeftModel:
    return add_adapter(build_llama())


@pytest.fixture
def make_tuned() -> Any:
    """`make_tuned(dropout=0.1)`: another model with the same weights."""
    return lambda **options: add_adapter(build_llama(), **options)


@pytest.fixture
def attach() -> Any:
    """`attach(model)`: the same adapter on a model of the test's own."""
    return add_adapter


@pytest.fixture
def make_rows(tokenizer: PreTrainedTokenizerFast) -> Any:
    """`make_rows([("prompt", "answer"), ...])` -> (Rows, generation rows); the answer and its end token carry loss."""

    def make(
        pairs: Sequence[tuple[str, str]], must_contain: Sequence[tuple[str, ...]] = ()
    ) -> tuple[Rows, list[GenerationRow]]:
        examples, questions = Rows(), []
        for index, (prompt, answer) in enumerate(pairs):
            before = tokenizer(prompt)["input_ids"]
            after = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
            trained = [0] * len(before) + [1] * len(after)
            examples.append(Example(index, {"tokens": [*before, *after], "trained": trained}, "rows.jsonl", index + 1))
            strings = must_contain[index] if must_contain else ()
            questions.append(GenerationRow(list(before), prompt, answer, strings, "rows.jsonl", index + 1))
        return examples, questions

    return make
