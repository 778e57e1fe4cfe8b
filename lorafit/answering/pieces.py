"""An answer's text as its tokens come: whole characters, which together are what decoding all tokens at once gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF_A_CHARACTER = "\ufffd"


class Pieces:
    """Decodes one answer token by token, without its control tokens.

    Attributes:
        text: All that was given so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._ids, self.text = tokenizer, list[int](), ""
        self._backend = getattr(tokenizer, "backend_tokenizer", None)  # Marian's tokenizer, and others, have none
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        """What the token adds; empty where it waits for the rest of a character, or is a control token."""
        if self._backend is not None:
            piece = self._stream.step(self._backend, token) or ""
        else:
            self._ids.append(token)
            whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            goes_on = whole.startswith(self.text) and not whole.endswith(_HALF_A_CHARACTER)
            piece = whole[len(self.text) :] if goes_on else ""
        self.text += piece
        return piece
