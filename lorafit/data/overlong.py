"""Rows that are surely too long, told from stretches of their texts: a row of 15 MB would take gigabytes as tokens.

The tokens of a stretch are those of the whole text but for a few at its ends. So texts whose stretches hold twice the
tokens that a row may have are too long; and of a text that is cut anyway, what lies further from the cut plays no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 16
"""Texts of at most this many times the limit are not looked at: they are cheap as tokens, and most of them fit."""
SURE_FACTOR = 2
_SURE_TOKENS = 64
_LEAST_STRETCH_CHARACTERS = 1024


def is_surely_longer(texts: Sequence[str], limit_tokens: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts have more than twice as many tokens together as a row may have.

    Args:
        texts: Parts of a row that its rendering holds whole.
        limit_tokens: Longest row.
        tokenizer: A fast one.
    """
    if sum(map(len, texts)) <= CHARACTERS_PER_TOKEN * limit_tokens:
        return False
    ends = _ends(texts, limit_tokens, tokenizer)
    return any(tokens >= _sure_tokens(limit_tokens) for _, tokens in ends)


def keep_head(text: str, limit_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of a text that holds all of its first `limit_tokens` tokens, and some more."""
    if len(text) <= CHARACTERS_PER_TOKEN * limit_tokens:
        return text
    for end, tokens in _ends([text], limit_tokens, tokenizer):
        if tokens >= _sure_tokens(limit_tokens):
            return text[:end]
    return text


def keep_tail(text: str, limit_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The end of a text that holds all of its last `limit_tokens` tokens, and some more."""
    if len(text) <= CHARACTERS_PER_TOKEN * limit_tokens:
        return text
    size, tokens = _stretch_characters(limit_tokens), 0
    for end in range(len(text), 0, -size):
        tokens += _count(text[max(0, end - size) : end], tokenizer)
        if tokens >= _sure_tokens(limit_tokens):
            return text[max(0, end - size) :]
    return text


def _ends(texts: Iterable[str], limit_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Where each stretch ends in its text, and the tokens of all stretches up to there."""
    size, tokens = _stretch_characters(limit_tokens), 0
    for text in texts:
        for start in range(0, len(text), size):
            tokens += _count(text[start : start + size], tokenizer)
            yield min(start + size, len(text)), tokens


def _sure_tokens(limit_tokens: int) -> int:
    return SURE_FACTOR * limit_tokens + _SURE_TOKENS


def _stretch_characters(limit_tokens: int) -> int:
    return max(_LEAST_STRETCH_CHARACTERS, 4 * limit_tokens)


def _count(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a stretch, those left out that stand for what the vocabulary lacks: one may stand for any length."""
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    unknown = tokenizer.unk_token_id
    return len(ids) - (ids.count(unknown) if unknown is not None else 0)
