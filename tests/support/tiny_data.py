"""Pieces that tests of data share: a tiny real tokenizer, a reporter that listens, rows and files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorafit.contracts import Silent

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "What is the capital of France? Paris.",
    "A text of some words, and of more words.",
    "user assistant system\n",
]


class Listener(Silent):
    """A Reporter that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.infos: list[str] = []

    def info(self, message: str) -> None:
        self.infos.append(message)


def make_tokenizer(vocabulary: int = 400, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on three sentences."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=sorted(alphabet))
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    """A chat of one turn each."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
