"""A model that answers prompts as its training rows were written: with chat template and system prompt, or verbatim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from lorafit.contracts import Reporter, Sample
from lorafit.data.chat.render import ChatRenderer
from lorafit.data.id_range import check_ids
from lorafit.data.plain_text import completion_prompt_ids
from lorafit.errors import DataError


@dataclass(frozen=True)
class Speaker:
    """A model with what turns prompts into its token ids; weights are loaded when they are first asked for.

    Attributes:
        load: Gives a causal model, or a PeftModel around one.
        tokenizer: Its tokenizer.
        chats: Renders prompts as chats; None: prompts are used verbatim.
        autocast_dtype: Compute in it; None: as the weights are.
    """

    load: Callable[[], Any]
    tokenizer: Any
    chats: ChatRenderer | None
    autocast_dtype: torch.dtype | None = None

    @cached_property
    def model(self) -> Any:
        """The model, loaded once."""
        return self.load()

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a turn in the chat template."""
        end = self.chats.end_of_turn_id() if self.chats is not None else None
        return [] if end is None else [end]

    def prompt_ids(self, prompt: Sample) -> list[int]:
        """Token ids of a prompt, the header of the answer included, as training rendered what stood before an answer.

        Raises:
            DataError: The template refuses the prompt or drops part of it, or it is a chat of more than one text and
                this model was trained on verbatim text; with the prompt's file and line.
        """
        try:
            if self.chats is not None:
                return self.chats.prompt_ids(prompt.turns, prompt.tools)
            return completion_prompt_ids(_only_text(prompt), self.tokenizer)
        except DataError as error:
            error.at(file=prompt.file, line=prompt.line or None)
            raise

    def check_ids(self, prompts: Sequence[list[int]]) -> None:
        """Looks whether the model has a row for each token.

        Raises:
            ModelError: It has none.
        """
        rows = self.model.get_input_embeddings().weight.shape[0]
        for ids in prompts:
            check_ids(ids, self.tokenizer, rows)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the model was trained in."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.model.get_input_embeddings().weight.device.type, dtype=self.autocast_dtype)


def _only_text(prompt: Sample) -> str:
    turns = prompt.turns
    if len(turns) != 1 or turns[0]["role"] != "user" or prompt.tools:
        what = "this model answers text without a chat template, and the prompt is a chat"
        raise DataError(what, todo="give one text a row: prompt, or a single turn of the user")
    return str(turns[0]["content"])


def chats_of(tokenizer: Any, *, system_prompt: str | None = None, now: datetime | None = None) -> ChatRenderer | None:
    """The renderer of prompts; None where the tokenizer has no chat template, so that prompts are used verbatim."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    return ChatRenderer(tokenizer, system_prompt=system_prompt, now=now)


def open_plain_model(folder: Path, reporter: Reporter) -> tuple[Callable[[], Any], Any]:
    """What loads a model folder (a merge, say) in the precision of its file, by the same checks as a base; and its
    tokenizer.

    Raises:
        CheckpointError: The folder has a MANIFEST and is not what that says.
        ModelError: It cannot be loaded.
        SafetyError: It holds only pickles, or asks for foreign code.
    """
    from lorafit.files.safetensors import main_dtype, read_index, torch_dtype
    from lorafit.kinds.quantizations.none import NoneSection
    from lorafit.model.base import open_folder
    from lorafit.model.load import load_model, load_tokenizer

    base = open_folder(folder)
    tokenizer = load_tokenizer(base)
    dtype = torch_dtype(main_dtype(read_index(folder)))
    load = partial(
        load_model,
        base,
        quantization=NoneSection(),
        dtype=dtype,
        compute_dtype=dtype,
        attention="auto",
        device="cuda" if torch.cuda.is_available() else "cpu",
        reporter=reporter,
    )
    return load, tokenizer
