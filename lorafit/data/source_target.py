"""Rows of a source and a target: two texts, which an encoder reads and a decoder writes, each as the tokenizer has it.

    summarize: the whole report ... </s>     source, what the encoder reads: the task's prefix, then the row's text
    the report in short </s>                 target, what the decoder writes: every token of it carries loss

What stands around either is what the tokenizer itself puts there: an end token, a language's token (mBART, NLLB), and
for a target whatever `text_target` means to it, such as a vocabulary of its own (Marian). Control strings that somebody
typed are text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lorafit.contracts import Encoded, Sample
from lorafit.data.text_encoder import TextEncoder
from lorafit.data.truncate import is_surely_longer, keep_head
from lorafit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.kinds.row_limits import TwoTexts

_PROBE = "a"


class SourceTarget:
    """Encodes such rows with one tokenizer.

    Args:
        tokenizer: The base's; it is told the languages.
        rules: The task's.

    Raises:
        ModelError: The tokenizer has no end token; or it writes languages and the task names none, or the other way
            round, or one that the tokenizer does not know.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: TwoTexts) -> None:
        self._tokenizer, self._rules = tokenizer, rules
        _tell_languages(tokenizer, rules)
        self._source, self._target = _Side(tokenizer, is_target=False), _Side(tokenizer, is_target=True)
        for side, language in ((self._source, rules.source_language), (self._target, rules.target_language)):
            if language is not None and tokenizer.unk_token_id in (*side.prefix, *side.suffix):
                what = f"the tokenizer knows no language '{language}'"
                raise ModelError(
                    what, key="task", todo="take a name from its special tokens, such as en_XX or eng_Latn"
                )
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
        if not ends:
            raise ModelError(
                "the tokenizer has no end token", key="eos_token", todo="use a model whose tokenizer has one"
            )
        if not ends & {*self._target.suffix}:
            self._target.suffix.append(int(tokenizer.eos_token_id or tokenizer.sep_token_id))
        self._ends = ends

    @property
    def ends(self) -> list[int]:
        """The tokens that end a target."""
        return [token for token in self._target.suffix if token in self._ends]

    @property
    def begins(self) -> dict[str, int]:
        """How generation must begin to write the target's language, as transformers' generation config calls it; empty
        where the tokenizer writes none.

        A language before the target (mBART-50, NLLB) is its forced first token, one behind it (mBART) what the decoder
        reads first.
        """
        if self._rules.target_language is None:
            return {}
        language = int(self._tokenizer.convert_tokens_to_ids(self._rules.target_language))
        is_first = language in self._target.prefix
        return {"forced_bos_token_id" if is_first else "decoder_start_token_id": language}

    def source(self, text: str, max_length: int) -> Encoded:
        """What the encoder reads: prefix and text, the end of a longer one cut off."""
        ids, is_cut = self._encode_source(text, max_length)
        return Encoded(ids, [False] * len(ids), is_cut)

    def encode(self, sample: Sample, max_length: int | None = None) -> Encoded:
        """Source, then target, which alone is trained; whole, or both cut at their ends.

        A target that had to be cut has no end token: the model is not to stop there.

        Args:
            sample: A row.
            max_length: Of the source, in tokens; None: nothing is cut.

        Raises:
            DataError: The row is no source with a target.
        """
        if sample.completion is None or sample.labels is not None or sample.rejected is not None:
            todo = "give rows source and target, or map them: columns: {source: .., target: ..}"
            raise DataError("is no source with a target", todo=todo)
        source, is_cut = self._encode_source(sample.prompt, max_length)
        side, most = self._target, self._rules.max_target_length
        text = sample.completion if max_length is None else self._keep_head(sample.completion, most)
        target = side.whole(side.ids(text))
        if max_length is not None and len(target) > most:
            around = [token for token in side.suffix if token not in self._ends]
            kept = max(1, most - len(side.prefix) - len(around))
            target, is_cut = [*side.prefix, *side.ids(text)[:kept], *around], True
        return Encoded([*source, *target], [False] * len(source) + [True] * len(target), is_cut)

    def is_surely_longer(self, sample: Sample, max_length: int) -> bool:
        """Whether a text has far more tokens than it may, told without making all of them; False where that takes
        them.
        """
        if not self._source.is_fast:
            return False
        texts = ((sample.prompt, max_length), (sample.completion or "", self._rules.max_target_length))
        return any(is_surely_longer([text], most, self._tokenizer) for text, most in texts)

    def _encode_source(self, text: str, max_length: int | None) -> tuple[list[int], bool]:
        side, text = self._source, self._rules.prefix + text
        ids = side.ids(text if max_length is None else self._keep_head(text, max_length))
        room = len(ids) if max_length is None else max(1, max_length - len(side.prefix) - len(side.suffix))
        return side.whole(ids[:room]), len(ids) > room

    def _keep_head(self, text: str, most: int) -> str:
        return keep_head(text, most, self._tokenizer) if self._source.is_fast else text


class _Side:
    """How one of both texts becomes tokens.

    Attributes:
        prefix, suffix: What the tokenizer puts around it.
        ids: Tokens of a text alone.
        is_fast: Whether the tokenizer is one of the tokenizers library.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, is_target: bool) -> None:
        self.is_fast = hasattr(tokenizer, "backend_tokenizer")
        if self.is_fast:
            _switch(tokenizer, "target" if is_target else "input")
            encoder = TextEncoder(tokenizer)
            _switch(tokenizer, "input")
            self.prefix, self.suffix = list(encoder.prefix), list(encoder.suffix)
            self.ids: Callable[[str], list[int]] = lambda text: encoder.encode(text, [(0, len(text))] if text else [])[
                0
            ]
            return
        named = "text_target" if is_target else "text"

        def read(text: str, *, whole: bool = False) -> list[int]:
            encoded = tokenizer(**{named: text}, add_special_tokens=whole, split_special_tokens=True)
            return [int(token) for token in encoded["input_ids"]]

        self.ids = read
        alone, full = read(_PROBE), read(_PROBE, whole=True)
        place = next((start for start in range(len(full)) if full[start : start + len(alone)] == alone), 0)
        self.prefix, self.suffix = full[:place], full[place + len(alone) :]

    def whole(self, ids: list[int]) -> list[int]:
        """A text's tokens with what stands around them."""
        return [*self.prefix, *ids, *self.suffix]


def _switch(tokenizer: PreTrainedTokenizerBase, mode: str) -> None:
    """What `text_target` does with a tokenizer that writes targets otherwise than sources."""
    if hasattr(tokenizer, f"_switch_to_{mode}_mode"):
        getattr(tokenizer, f"_switch_to_{mode}_mode")()


def _tell_languages(tokenizer: PreTrainedTokenizerBase, rules: TwoTexts) -> None:
    """Sets the languages of a tokenizer that writes them beside the texts.

    Raises:
        ModelError: Only one of tokenizer and task has languages, or one of them is none of the tokenizer's.
    """
    named = {"src_lang": rules.source_language, "tgt_lang": rules.target_language}
    knows = all(hasattr(tokenizer, attribute) for attribute in named)
    if not knows and any(named.values()):
        what = f"{type(tokenizer).__name__} writes no languages"
        raise ModelError(what, key="task.source_language", todo="leave source_language and target_language out")
    if knows and not all(named.values()):
        what = f"{type(tokenizer).__name__} writes the language of each text beside it"
        todo = "name both by its tokens: task: {source_language: en_XX, target_language: de_DE}"
        raise ModelError(what, key="task.source_language", todo=todo)
    for attribute, language in named.items() if knows else ():
        try:
            setattr(tokenizer, attribute, language)
        except KeyError as error:
            raise ModelError(f"the tokenizer knows no language '{language}'", key="task") from error
