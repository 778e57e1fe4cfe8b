"""Rows that are no chats: a prompt with its completion, and plain text.

    <bos> prompt completion <eos>        <bos> text <eos>
                 └─ loss ──────┘         └──── loss ────┘

They are taken verbatim: no template, no blanks added or removed. BOS is what the tokenizer adds by itself; control
strings inside are text, as in chats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from lorafit.contracts import Encoded
from lorafit.data.text_encoder import TextEncoder
from lorafit.data.truncate import cut_tokens
from lorafit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last_turn", "completion", "all"]

_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, TextEncoder] = WeakKeyDictionary()


def encode_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn = "assistant"
) -> Encoded:
    """Prompt, completion and end token. The loss lies on completion and end token, or on everything (`all`).

    The prompt's tokens are always those that a model is given when it is asked: where one token would straddle the
    border, both sides are encoded apart.

    Raises:
        ModelError: If the tokenizer has no end token.
    """
    encoder = _encoder(tokenizer)
    asked, whole = _typed_ids(encoder, prompt), _typed_ids(encoder, prompt + completion)
    answer = whole[len(asked) :] if whole[: len(asked)] == asked else _continuation(encoder, completion)
    asked = [*encoder.prefix, *asked]
    answer = [*answer, _end_token(tokenizer)]
    return Encoded([*asked, *answer], [train_on == "all"] * len(asked) + [True] * len(answer))


def completion_prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a model is given to complete: the prompt as `encode_completion` encodes it."""
    encoder = _encoder(tokenizer)
    return [*encoder.prefix, *_typed_ids(encoder, prompt)]


def truncate_completion(
    prompt: str,
    completion: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    train_on: TrainOn = "assistant",
) -> Encoded | None:
    """`encode_completion` cut to `max_length` tokens: the prompt from its left, then the completion from its right,
    which then carries no end token.

    Returns:
        None where nothing of the completion fits.
    """
    encoded = encode_completion(prompt, completion, tokenizer, train_on=train_on)
    asked = len(completion_prompt_ids(prompt, tokenizer))
    return cut_tokens(encoded, asked, max_length, bos=_encoder(tokenizer).bos)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Plain text with its end token, every token of it trained.

    Raises:
        ModelError: If the tokenizer has no end token.
    """
    encoder = _encoder(tokenizer)
    ids = [*encoder.prefix, *_typed_ids(encoder, text), _end_token(tokenizer)]
    return Encoded(ids, [True] * len(ids))


def split_text(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Plain text in rows of `max_length` tokens one behind the other, of which only the last has the end token."""
    ids = encoded.input_ids
    ends = [*range(max_length, len(ids), max_length), len(ids)]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1 and max_length > 2:
        ends[-2] -= 1  # one token alone predicts nothing
    return [Encoded(ids[start:end], [True] * (end - start)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def encode_labelled(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """A text that is classified, none of its tokens trained: between what the tokenizer itself puts around a text.

    Args:
        max_length: In tokens; the end of a longer text is cut off.
    """
    encoder = _encoder(tokenizer)
    ids = _typed_ids(encoder, text)[: max(1, max_length - len(encoder.prefix) - len(encoder.suffix))]
    ids = [*encoder.prefix, *ids, *encoder.suffix]
    return Encoded(ids, [False] * len(ids))


def _encoder(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    encoder = _encoders.get(tokenizer)
    if encoder is None:
        encoder = _encoders[tokenizer] = TextEncoder(tokenizer)
    return encoder


def _typed_ids(encoder: TextEncoder, text: str) -> list[int]:
    return encoder.encode(text, [(0, len(text))] if text else [])[0]


def _continuation(encoder: TextEncoder, text: str) -> list[int]:
    """Ids of a text that goes on behind another one: without the blank that some tokenizers put in front of a text."""
    for anchor in ("\n", ".", "a", "0"):
        ids, before = _typed_ids(encoder, anchor + text), _typed_ids(encoder, anchor)
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return _typed_ids(encoder, text)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end token", key="eos_token", todo="use a model whose tokenizer has one")
    return int(tokenizer.eos_token_id)
