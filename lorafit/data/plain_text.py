"""Rows that are no chats: a prompt with its completion, and plain text.

    <bos> prompt completion <eos>        <bos> text <eos>
                 └─ loss ──────┘         └──── loss ────┘

They are taken verbatim: no template, no blanks added or removed. BOS is what the tokenizer adds by itself; control
strings inside are text, as in chats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from lorafit.contracts import Encoded, Kept, Sample
from lorafit.data.text_encoder import Stretch, TextEncoder
from lorafit.data.truncate import cut_tokens
from lorafit.errors import DataError, ModelError
from lorafit.kinds.fields import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEAD_SHARE = 4  # of the room for both: Sun et al. 2019, How to Fine-Tune BERT, keep 128 and 382 of 510 tokens

TrainOn = Literal["assistant", "last_turn", "completion", "all"]


class PlainText:
    """Encodes such rows with one tokenizer.

    Raises:
        ModelError: The tokenizer cannot say where its tokens stand; or, of what needs one, it has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._encoder = tokenizer, TextEncoder(tokenizer)

    def prompt_ids(self, prompt: str) -> list[int]:
        """What a model is given to complete: the prompt as `completion` encodes it."""
        return [*self._encoder.prefix, *self._typed_ids(prompt)]

    def completion(self, prompt: str, completion: str, train_on: TrainOn = "assistant") -> Encoded:
        """Prompt, completion and end token. The loss lies on completion and end token, or on everything (`all`).

        The prompt's tokens are always those that a model is given when it is asked: where one token would straddle the
        border, both sides are encoded apart.
        """
        asked, whole = self._typed_ids(prompt), self._typed_ids(prompt + completion)
        answer = whole[len(asked) :] if whole[: len(asked)] == asked else self._continuation(completion)
        asked = [*self._encoder.prefix, *asked]
        answer = [*answer, self._end_token()]
        return Encoded([*asked, *answer], [train_on == "all"] * len(asked) + [True] * len(answer))

    def cut_completion(
        self, prompt: str, completion: str, max_length: int, train_on: TrainOn = "assistant"
    ) -> Encoded | None:
        """`completion` cut to `max_length` tokens: the prompt from its left, then the completion from its right, which
        then carries no end token.

        Returns:
            None where nothing of the completion fits.
        """
        whole, asked = self.completion(prompt, completion, train_on), len(self.prompt_ids(prompt))
        return cut_tokens(whole, asked, max_length, bos=self._encoder.bos)

    def text(self, text: str) -> Encoded:
        """Plain text with its end token, every token of it trained."""
        ids = [*self._encoder.prefix, *self._typed_ids(text), self._end_token()]
        return Encoded(ids, [True] * len(ids))

    def labelled(self, sample: Sample, max_length: int, keep: Kept = "head") -> Encoded:
        """A text, or two, that something is told of, between what the tokenizer itself puts around them. Where a text's
        words are, the first token of each is trained; else none is.

        Args:
            max_length: In tokens; what the tokenizer puts around texts stays.
            keep: What is left of a longer text.

        Raises:
            DataError: A word has no token of its own.
        """
        if sample.text_pair is not None:
            return self._labelled_pair(sample.text or "", sample.text_pair, max_length, keep)
        prefix, suffix, words = self._encoder.prefix, self._encoder.suffix, sample.words or ()
        text = " ".join(words) if words else sample.text or ""
        ids, offsets = self._encoder.encode(text, [(0, len(text))] if text else [])
        first = set(_first_tokens(words, offsets))
        kept, cuts = _choose_tokens(len(ids), max(1, max_length - len(prefix) - len(suffix)), keep)
        around = [False] * len(prefix), [False] * len(suffix)
        flags = [*around[0], *(number in first for number in kept), *around[1]]
        whole = [*prefix, *(ids[number] for number in kept), *suffix]
        return Encoded(whole, flags, is_cut=bool(cuts), cuts=tuple(len(prefix) + cut for cut in cuts))

    def _labelled_pair(self, text: str, second: str, max_length: int, keep: Kept) -> Encoded:
        """Two texts as the tokenizer itself joins them. Of a pair that is too long the longer text gives way first, as
        transformers' `longest_first` has it."""
        layout = self._encoder.pair
        texts = [self._typed_ids(each) for each in (text, second)]
        room = max(2, max_length - len(layout.prefix) - len(layout.middle) - len(layout.suffix))
        sizes = [len(ids) for ids in texts]
        shorter = min(min(sizes), room // 2)
        rooms = [room - shorter, shorter] if sizes[0] > sizes[1] else [shorter, room - shorter]
        parts, cuts = [layout.prefix], list[int]()
        for ids, room_of_it, behind in zip(texts, rooms, (layout.middle, layout.suffix), strict=True):
            kept, places = _choose_tokens(len(ids), room_of_it, keep)
            cuts += [sum(map(len, parts)) + place for place in places]
            parts += [[ids[number] for number in kept], behind]
        whole = [number for part in parts for number in part]
        types = [kind for part, kind in zip(parts, layout.types, strict=False) for _ in part]
        return Encoded(whole, [False] * len(whole), bool(cuts), types, tuple(cuts))

    def _typed_ids(self, text: str) -> list[int]:
        return self._encoder.encode(text, [(0, len(text))] if text else [])[0]

    def _continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on behind another one: without the blank that some tokenizers put in front of it."""
        for anchor in ("\n", ".", "a", "0"):
            ids, before = self._typed_ids(anchor + text), self._typed_ids(anchor)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._typed_ids(text)

    def _end_token(self) -> int:
        if self._tokenizer.eos_token_id is None:
            todo = "use a model whose tokenizer has one"
            raise ModelError("the tokenizer has no end token", key="eos_token", todo=todo)
        return int(self._tokenizer.eos_token_id)


def _choose_tokens(count: int, room: int, keep: Kept) -> tuple[Sequence[int], list[int]]:
    """Numbers of the tokens of a text that are kept, and how many of these stand before what is left out."""
    if count <= room:
        return range(count), []
    head = {"head": room, "tail": 0, "both": room // _HEAD_SHARE}[keep]
    return [*range(head), *range(count - room + head, count)], [head]


def _first_tokens(words: Sequence[str], offsets: Sequence[Stretch]) -> Iterator[int]:
    """Number of the first token of each word, of words with a blank between them.

    Raises:
        DataError: A word has none of its own: the tokenizer drops it, or joins it to the word before.
    """
    begin, number, before = 0, 0, -1
    for place, word in enumerate(words, 1):
        while number < len(offsets) and offsets[number][1] <= begin:
            number += 1
        if number == len(offsets) or not begin - 1 <= offsets[number][0] < begin + len(word) or number == before:
            what = f"word {place}, {shorten(word)!r}, has no token of its own in this model's tokenizer"
            raise DataError(what, key="words", todo="leave the word out, or join it to its neighbour")
        yield number
        before, begin = number, begin + len(word) + 1


def split_text(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Plain text in rows of `max_length` tokens one behind the other, of which only the last has the end token."""
    ids = encoded.input_ids
    ends = [*range(max_length, len(ids), max_length), len(ids)]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1 and max_length > 2:
        ends[-2] -= 1  # one token alone predicts nothing
    return [Encoded(ids[start:end], [True] * (end - start)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
