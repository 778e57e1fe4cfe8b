"""A model that answers prompts as its training rows were written: with chat template and system prompt, or verbatim."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.contracts import Message
from lorafit.data.plain_text import completion_prompt_ids
from lorafit.data.render import ChatRenderer
from lorafit.errors import DataError, ModelError, UsageError

_PROMPT_FIELDS = ("messages", "prompt", "question", "instruction")


@dataclass(frozen=True)
class Speaker:
    """A loaded model with what turns prompts into its token ids.

    Attributes:
        model: A causal model, or a PeftModel around one.
        tokenizer: Its tokenizer.
        chats: Renders prompts as chats; None: prompts are used verbatim.
        autocast_dtype: Compute in it; None: as the weights are.
    """

    model: Any
    tokenizer: Any
    chats: ChatRenderer | None
    autocast_dtype: torch.dtype | None = None

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a turn in the chat template."""
        end = self.chats.end_of_turn_id() if self.chats is not None else None
        return [] if end is None else [end]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, the header of the answer included.

        Raises:
            UsageError: Several turns for a model without a chat template.
        """
        if self.chats is not None:
            return self.chats.prompt_ids(list(messages))
        if len(messages) != 1:
            raise UsageError("this model has no chat template, so a prompt is one text", key="--input")
        return completion_prompt_ids(str(messages[0]["content"]), self.tokenizer)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the model was trained in."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.model.get_input_embeddings().weight.device.type, dtype=self.autocast_dtype)


def chats_of(tokenizer: Any, *, chat_template: str | None, system_prompt: str | None) -> ChatRenderer | None:
    """The renderer of prompts; None where neither the recipe nor the tokenizer has a chat template."""
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        return None
    return ChatRenderer(tokenizer, chat_template=chat_template, system_prompt=system_prompt)


def read_prompts(prompt: str | None, file: Path | None) -> list[list[Message]]:
    """Prompts as chats: one from the command line, or those of a file (text: one a line; jsonl: one a row).

    Raises:
        UsageError: Both or neither are given.
        DataError: The file is missing, empty, or a row has no prompt.
    """
    if (prompt is None) == (file is None):
        raise UsageError("needs a prompt", key="--prompt", todo="give either --prompt TEXT or --input FILE")
    if file is None:
        if not str(prompt).strip():
            raise UsageError("the prompt is empty", key="--prompt", todo="give it a text")
        return [_chat(str(prompt))]
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise DataError("no such file", file=str(file), todo="check the path of --input") from error
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"cannot be read ({type(error).__name__})", file=str(file), todo="give a UTF-8 text file"
        ) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError("no prompts", file=str(file))
    if file.suffix not in (".jsonl", ".json"):
        return [_chat(line) for _, line in numbered]
    return [_read_row(line, str(file), number) for number, line in numbered]


def _chat(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _read_row(line: str, file: str, number: int) -> list[Message]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("invalid JSON", file=file, line=number) from error
    field = next((name for name in _PROMPT_FIELDS if isinstance(row, dict) and row.get(name)), None)
    if field is None:
        raise DataError("has no prompt", file=file, line=number, todo=f"give one of {', '.join(_PROMPT_FIELDS)}")
    if field != "messages":
        text = f"{row[field]}\n{row['input']}" if field == "instruction" and row.get("input") else row[field]
        return _chat(str(text))
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
        raise DataError(
            "messages is no list of turns", file=file, line=number, todo='give [{"role": ..., "content": ...}]'
        )
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError("holds no turn to answer", file=file, line=number)
    return messages


def load_plain_model(folder: Path) -> tuple[Any, Any]:
    """A model folder (a merge, say) and its tokenizer, through transformers.

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorafit.model.base import load_config

    load_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype="auto",
            device_map={"": device},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot be loaded: {str(error).splitlines()[0]}", file=str(folder)) from error
    return model, tokenizer
