"""A tiny chat model with two adapters, each of which answers otherwise, and ends its answers after some tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorafit.answering.engine import Engine
from lorafit.answering.opening import Voice
from lorafit.answering.sampling import Sampling
from lorafit.chatting.session import Chat, Speaker
from tests.support.tiny_model import make_tokenizer, tiny_llama

MakeChat = Callable[..., Chat]


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    return make_tokenizer()


def build(tokenizer: Any) -> Any:
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 160}
    model = tiny_llama(**sizes, initializer_range=0.3, bos_token_id=None, eos_token_id=2)
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 4))  # a random model would go on for ever
    return model


@pytest.fixture(scope="session")
def chat_adapters(chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for seed, name in enumerate(("law", "code")):
        tuned = get_peft_model(build(chat_tokenizer), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        torch.manual_seed(seed)  # behind the model's own
        for path, parameter in tuned.named_parameters():
            if "lora_B" in path:
                torch.nn.init.normal_(parameter, std=0.1)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        tuned.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def chat_engine(chat_tokenizer: Any, chat_adapters: dict[str, Path]) -> Engine:
    engine = Engine(build(chat_tokenizer), chat_tokenizer)
    for name, folder in chat_adapters.items():
        engine.add_adapter(name, folder)
    return engine


@pytest.fixture
def make_chat(chat_tokenizer: Any, chat_engine: Engine) -> MakeChat:
    def make(*, system_prompt: str | None = None, verbatim: bool = False, **sampling: Any) -> Chat:
        voice = Voice.of_tokenizer(chat_tokenizer, system_prompt=system_prompt)
        if verbatim:
            voice = Voice(chat_tokenizer, None)
        known = {"law": "law", "code": "code", "base": None}
        speakers = {name: Speaker(name, adapter, voice) for name, adapter in known.items()}
        return Chat(chat_engine, speakers, "law", Sampling(**{"max_new_tokens": 16, "min_new_tokens": 3, **sampling}))

    return make
