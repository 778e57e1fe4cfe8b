"""The text of an answer as its tokens come: whole characters only, and nothing that a stop string may begin with.

tokens ──Pieces──> characters ──held back while they may begin a stop string──> text that is certain
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafit.answering.pieces import Pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerText:
    """One answer's text, piece by piece.

    Args:
        tokenizer: Decodes; control tokens are left out.
        stop_strings: What ends the answer and is no part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer, self._pieces = tokenizer, Pieces(tokenizer)
        self._stops = [text for text in stop_strings if text]
        self._tokens: list[int] = []
        self._held, self.is_stopped = "", False

    def add(self, token: int) -> str:
        """The text that a token makes certain; `is_stopped` afterwards where a stop string is complete."""
        self._tokens.append(token)
        return self._take(self._pieces.step(token))

    def finish(self) -> str:
        """What was held back, where no more tokens come; half a character is the sign that stands for one."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        certain = self._take(whole[len(self._pieces.text) :])
        if not self.is_stopped:
            certain, self._held = certain + self._held, ""
        return certain

    def _take(self, piece: str) -> str:
        text = self._held + piece
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.is_stopped, self._held = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
