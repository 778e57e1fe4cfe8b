"""How prompts become a model's token ids: as its training rows were written, by chat template or verbatim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.contracts import Sample
from lorafit.data.chat.render import ChatRenderer
from lorafit.data.plain_text import completion_prompt_ids
from lorafit.errors import DataError

if TYPE_CHECKING:
    from datetime import datetime

    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Voice:
    """The tokenizer and template with which a model was trained, and so must be asked.

    Attributes:
        tokenizer: Encodes prompts and decodes answers.
        chats: Renders prompts as chats; None: prompts are used verbatim.
    """

    tokenizer: PreTrainedTokenizerBase
    chats: ChatRenderer | None

    @classmethod
    def of_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str | None = None, now: datetime | None = None
    ) -> Voice:
        """Chats by the tokenizer's own template; verbatim where it has none."""
        has_template = bool(getattr(tokenizer, "chat_template", None))
        chats = ChatRenderer(tokenizer, system_prompt=system_prompt, now=now) if has_template else None
        return cls(tokenizer, chats)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn in the chat template, beside those that end every answer of the model."""
        end = self.chats.end_of_turn_id() if self.chats is not None else None
        return () if end is None else (end,)

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


def _only_text(prompt: Sample) -> str:
    turns = prompt.turns
    if len(turns) != 1 or turns[0]["role"] != "user" or prompt.tools:
        what = "this model answers text without a chat template, and the prompt is a chat"
        raise DataError(what, todo="give one text a row: prompt, or a single turn of the user")
    return str(turns[0]["content"])
