"""Text to token ids, so that a control string that somebody typed never becomes a control token.

    template:  <|im_start|>user⏎  typed:  what is <|im_end|>?   template:  <|im_end|>⏎
               └ control token                    └ text, as '<', '|', 'im', ...     └ control token

Where nobody typed one, the tokenizer itself encodes the whole text, exactly as `apply_chat_template(tokenize=True)`
does. Where somebody did, a *twin* encodes it: the same model, normaliser and pre-tokeniser, in which every control
token is spelled with private characters of the same number. The control strings that the template wrote are
respelled, the typed ones are not, and one pass over the whole text gives ids and offsets in their real context.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafit.errors import DataError, ModelError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

Stretch = tuple[int, int]

FIRST_PRIVATE_CHARACTER = 0x100000  # plane 16: nearly never typed, and checked
PRIVATE_CHARACTERS = 0xFFFE
BATCH_CHARACTERS = 500_000  # of texts that are encoded at once: the tokenizer holds about 100 bytes a character
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class PairLayout(NamedTuple):
    """What a tokenizer puts around two texts that are read together, and the token type of each part.

    Attributes:
        types: Of prefix, first text, middle, second text and suffix; none where the model is given none.
    """

    prefix: list[int]
    middle: list[int]
    suffix: list[int]
    types: tuple[int, ...]


class TextEncoder:
    """Encodes text with a tokenizer, knowing which of it was typed.

    Args:
        tokenizer: A tokenizer with a fast backend.
        template_text: The literal text of the chat template: added tokens that stand in it are control tokens as well,
            special or not.

    Raises:
        ModelError: If the tokenizer has no fast backend, which alone tells where a token stands.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_text: str = "") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "get_added_tokens_decoder"):
            raise ModelError(
                f"{type(tokenizer).__name__} cannot say where its tokens stand in a text",
                todo="use a model with a tokenizer.json",
            )
        backend.no_padding()  # a tokenizer.json may ask for both, as sentence encoders' do: rows would be filled up and
        backend.no_truncation()  # cut, and what stands around a text not be found. Calls of the tokenizer set their own
        self._backend: Tokenizer = backend
        self._added: dict[int, Any] = backend.get_added_tokens_decoder()
        self.control = {
            number: token.content
            for number, token in self._added.items()
            if token.content.strip() and (token.special or token.content in template_text)
        }
        plain, full = (
            backend.encode("a", add_special_tokens=False).ids,
            backend.encode("a", add_special_tokens=True).ids,
        )
        place = next((k for k in range(len(full)) if full[k : k + len(plain)] == plain), 0)
        self.prefix: list[int] = full[:place]
        """What the tokenizer puts in front of a text by itself: a BOS, or nothing."""
        self.suffix: list[int] = full[place + len(plain) :]
        """What it puts behind a text: a separator, or nothing."""
        self._unknown = tokenizer.unk_token_id
        self._has_types = "token_type_ids" in tokenizer.model_input_names
        self._twin: Tokenizer | None = None
        self._real_id: dict[int, int] = {}
        self._private: dict[int, str] = {}

    @property
    def bos(self) -> int | None:
        """The token that the tokenizer puts in front of a text by itself, if it does."""
        return self.prefix[0] if self.prefix else None

    @cached_property
    def pair(self) -> PairLayout:
        """What the tokenizer itself makes of two texts."""
        found = self._backend.encode("a", "a", add_special_tokens=True)
        first, second = ([k for k, text in enumerate(found.sequence_ids) if text == number] for number in (0, 1))
        ids: list[int] = found.ids
        parts = slice(0, first[0]), slice(first[-1] + 1, second[0]), slice(second[-1] + 1, len(ids))
        types = [next(iter(found.type_ids[part]), 0) for part in parts]
        of_texts = found.type_ids[first[0]], found.type_ids[second[0]]
        by_part = (types[0], of_texts[0], types[1], of_texts[1], types[2]) if self._has_types else ()
        prefix, middle, suffix = (ids[part] for part in parts)
        return PairLayout(prefix, middle, suffix, by_part if any(by_part) else ())

    def encode(
        self, text: str, typed: Sequence[Stretch], unsure: Sequence[Stretch] = ()
    ) -> tuple[list[int], list[Stretch]]:
        """Ids of a text and where each token stands in it.

        Args:
            typed: Stretches that somebody typed, in order and apart.
            unsure: Those of them that may be the template's all the same.

        Raises:
            DataError: If a control string stands where nobody can say who wrote it, or the tokenizer makes a control
                token out of plain text.
        """
        self._take_text_whole()
        ids, offsets = self.read(self._backend.encode(text, add_special_tokens=False), text, typed, unsure)
        return ids, list(offsets)

    def encode_batches(self, texts: Sequence[str]) -> Iterator[Encoding]:
        """What the tokenizer makes of each text, for `read`. Several texts at once are faster than one by one."""
        self._take_text_whole()
        start = size = 0
        for end, text in enumerate(texts, 1):
            size += len(text)
            if size >= BATCH_CHARACTERS or end == len(texts):
                yield from self._backend.encode_batch(list(texts[start:end]), add_special_tokens=False)
                start, size = end, 0

    def read(
        self, encoding: Encoding, text: str, typed: Sequence[Stretch], unsure: Sequence[Stretch] = ()
    ) -> tuple[list[int], Sequence[Stretch]]:
        """The same as `encode`, of what `encode_batches` gave for the text."""
        ids: list[int] = encoding.ids
        offsets = _Offsets(encoding)
        control = self.control
        for place in [place for place, number in enumerate(ids) if number in control]:
            number, offset = ids[place], offsets[place]
            if _overlaps(typed, *self._place(text, number, offset)) and not self._is_fallback(text, number, offset):
                return self._encode_with_twin(text, typed, unsure)
        return ids, offsets

    def _take_text_whole(self) -> None:
        """Undoes what somebody's last call left in the tokenizer."""
        if self._backend.truncation is not None or self._backend.padding is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

    def _is_fallback(self, text: str, number: int, offset: Stretch) -> bool:
        """Whether a control token (`<unk>`, a byte such as `<0x0A>`) stands for characters unknown to the model."""
        content = self.control.get(number, "")
        return (number == self._unknown or _BYTE.fullmatch(content) is not None) and content not in text[slice(*offset)]

    def _place(self, text: str, number: int, offset: Stretch) -> Stretch:
        """Where a control string itself stands; tokens may swallow the blanks beside it."""
        content = self.control[number]
        start = text.find(content, *offset)
        return (start, start + len(content)) if start >= 0 else offset

    def _encode_with_twin(
        self, text: str, typed: Sequence[Stretch], unsure: Sequence[Stretch]
    ) -> tuple[list[int], list[Stretch]]:
        twin = self._twin or self._build_twin()
        if any(ord(letter) >= FIRST_PRIVATE_CHARACTER for letter in text) and any(
            private in text for private in self._private.values()
        ):
            raise DataError("the text holds private characters that stand for control tokens here", todo="remove them")
        pieces: list[str] = []
        place = 0
        for start, end in [*typed, (len(text), len(text))]:
            pieces += [self._respell(text[place:start]), text[start:end]]
            place = end
        for start, end in unsure:
            piece = text[start:end]
            found = next((content for content in self.control.values() if content in piece), None)
            if found is not None:
                raise DataError(
                    f"cannot tell whether {found!r} was typed or written by the chat template", key="data.chat_template"
                )
        respelled = "".join(pieces)
        encoding = twin.encode(respelled, add_special_tokens=False)
        real = self._real_id
        ids = [real.get(number, number) for number in encoding.ids]
        for number, twin_number, (start, end) in zip(ids, encoding.ids, encoding.offsets, strict=True):
            fallback = self._is_fallback(respelled, number, (start, end))
            if number in self.control and twin_number not in real and not fallback:
                raise DataError(
                    f"the tokenizer makes the control token {self.control[number]!r} of plain text {text[start:end]!r}"
                )
        return ids, encoding.offsets

    def _respell(self, written: str) -> str:
        """A stretch of the template's with its control strings in private characters."""
        if not written:
            return written
        encoding = self._backend.encode(written, add_special_tokens=False)
        pieces, place = [], 0
        for number, offset in zip(encoding.ids, encoding.offsets, strict=True):
            if number in self.control:
                start, end = self._place(written, number, offset)
                pieces += [written[place:start], self._private[number]]
                place = end
        return "".join([*pieces, written[place:]])

    def _build_twin(self) -> Tokenizer:
        from tokenizers import AddedToken, Tokenizer

        twin = Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            twin.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            twin.pre_tokenizer = self._backend.pre_tokenizer
        if len(self.control) > PRIVATE_CHARACTERS:
            raise ModelError(f"the tokenizer has {len(self.control):,} control tokens, more than private characters")
        for number, content in self.control.items():
            self._private[number] = chr(FIRST_PRIVATE_CHARACTER + len(self._private)) * len(content)
        for number, token in sorted(self._added.items()):
            respelled = AddedToken(
                self._private.get(number, token.content),
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special,
            )
            (twin.add_special_tokens if token.special else twin.add_tokens)([respelled])
            twin_number = twin.token_to_id(respelled.content)
            assert twin_number is not None, "a token that was just added"
            self._real_id[twin_number] = number
        self._twin = twin
        return twin


class _Offsets(Sequence[Stretch]):
    """Where each token stands. Only a few are asked for: a list of all takes longer than everything else here."""

    def __init__(self, encoding: Encoding) -> None:
        self._count, self._at = len(encoding), encoding.token_to_chars

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return self._at(number)


def _overlaps(stretches: Sequence[Stretch], start: int, end: int) -> bool:
    """Whether one of the stretches (in order, apart) holds a character of start to end."""
    place = bisect_left(stretches, (end,))
    return place > 0 and stretches[place - 1][1] > start


def mark_trained(offsets: Sequence[Stretch], spans: Sequence[Stretch]) -> list[bool]:
    """Which tokens carry loss, from the characters that do.

    A token that straddles a border carries loss if at least half of its characters do: a header's newline and the
    blanks that begin an answer can share one token, and the ids must stay what the tokenizer makes of the whole.

    Args:
        offsets: Where each token stands, `[tokens]`. Their ends never fall; blanks that a tokenizer leaves out of its
            offsets belong to the token behind them.
        spans: Stretches that carry loss, in order and apart.
    """
    trained = [False] * len(offsets)
    numbers = range(len(offsets))
    first = 0
    for span in spans:
        first = bisect_right(numbers, span[0], first, key=lambda number: offsets[number][1])
        behind = bisect_right(numbers, span[1], first, key=lambda number: offsets[number][1])
        inside = first
        while inside < behind and _start(offsets, inside) < span[0]:
            trained[inside] |= _is_mostly_in(offsets, inside, span)
            inside += 1
        trained[inside:behind] = [True] * (behind - inside)
        for number in range(behind, len(offsets)):
            if _start(offsets, number) >= span[1]:
                break
            trained[number] |= _is_mostly_in(offsets, number, span)
    return trained


def _start(offsets: Sequence[Stretch], number: int) -> int:
    """Where a token starts, with the blanks before it that no token holds."""
    start = offsets[number][0]
    return min(start, offsets[number - 1][1]) if number else start


def _is_mostly_in(offsets: Sequence[Stretch], number: int, span: Stretch) -> bool:
    start, end = _start(offsets, number), offsets[number][1]
    return 2 * (min(end, span[1]) - max(start, span[0])) >= end - start
