"""Cuts a row that is longer than `max_length`.

    system | turn 1 | turn 2 | question answer<end>      a chat of several turns
    system |          turn 2 | question answer<end>      1. the oldest turns go, the system message stays
                            estion answer<end>           2. the prompt is cut from its left; a BOS stays
                               ion ans                   3. an answer still too long ends where it was cut

A turn is a user message with all that follows it up to the next one, so that what is left starts with a user message
and holds every call together with its result. Tokens behind the last trained one teach nothing and go before anything
else.

A row of 15 MB would take gigabytes as tokens: that one is surely too long is told from stretches of its texts. The
tokens of a stretch are those of the whole text but for a few at its ends. So texts whose stretches hold twice the
tokens that a row may have are too long; and of a text that is cut anyway, what lies further from the cut plays no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from lorafit.contracts import Encoded, JsonMapping, Kept
from lorafit.data.text_encoder import mark_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.data.chat.render import ChatRenderer

Messages = Sequence[JsonMapping]

PROMPT_SHARE = (
    4  # where an answer must be cut, a quarter of the room is the prompt's: an answer to nothing teaches nothing
)
CHARACTERS_PER_TOKEN = 16
"""Texts of at most this many times the limit are not looked at: they are cheap as tokens, and most of them fit."""
SURE_FACTOR = 2
_SYSTEM = ("system", "developer")
_SURE_TOKENS = 64
_LEAST_STRETCH_CHARACTERS = 1024


def truncate_chat(
    renderer: ChatRenderer, messages: Messages, tools: Sequence[JsonMapping] | None, max_length: int
) -> Encoded | None:
    """A chat cut to `max_length` tokens.

    Returns:
        None where nothing useful of an answer fits.

    Raises:
        RenderError: As `ChatRenderer.render`.
    """
    chats = _shorter_chats(messages)
    low, high = 0, len(chats) - 1
    while low < high:  # the first that fits, else the last; fewer turns never make a chat longer
        middle = (low + high) // 2
        if _useful_tokens(renderer.encode(renderer.render(chats[middle], tools)).trained) <= max_length:
            high = middle
        else:
            low = middle + 1
    rendering = renderer.render(chats[low], tools)
    _, offsets = renderer.locate(rendering)
    answers = mark_trained(offsets, rendering.answers)
    first = rendering.answers[0][0] if rendering.answers else 0
    header = next((turn.header for turn in rendering.turns if turn.start == first), first)
    return cut_tokens(
        renderer.encode(rendering),
        answers.index(True) if True in answers else len(answers),
        max_length,
        bos=renderer.encoder.bos,
        header_tokens=sum(header <= start and end <= first for start, end in offsets),
        is_cut=low > 0,
    )


def cut_tokens(
    encoded: Encoded,
    prompt_tokens: int,
    max_length: int,
    *,
    bos: int | None,
    header_tokens: int = 0,
    is_cut: bool = False,
) -> Encoded | None:
    """Cuts the tokens of one row to `max_length`: its prompt from the left, then, if it must be, its answer from the
    right.

    Args:
        prompt_tokens: Tokens before the first that an answer holds, whether that carries loss or not.
        max_length: In tokens.
        bos: The id that stays in front of a cut prompt, if the row starts with it.
        header_tokens: Tokens right before the first answer that are never cut: its header.
        is_cut: Whether something went already.

    Returns:
        None if no token that carries loss is left.
    """
    useful = _useful_tokens(encoded.trained)
    ids, trained = encoded.input_ids[:useful], encoded.trained[:useful]
    prompt = min(prompt_tokens, useful)
    answer = useful - prompt
    header = min(header_tokens, prompt)
    kept_prompt = min(prompt, max_length - answer)
    if kept_prompt < header:
        kept_prompt = min(prompt, max(header, max_length // PROMPT_SHARE))
    left = list(range(prompt - kept_prompt, prompt))
    if 0 < len(left) < prompt and bos is not None and ids[0] == bos and kept_prompt > header:
        left[0] = 0
    kept = [*left, *range(prompt, useful)][:max_length]
    while kept and not trained[kept[-1]]:
        kept.pop()
    if not any(trained[place] for place in kept[1:]):  # the first token of a row is never predicted
        return None
    is_cut = is_cut or len(kept) < useful
    return Encoded([ids[place] for place in kept], [trained[place] for place in kept], is_cut)


def _useful_tokens(trained: Sequence[bool]) -> int:
    """Tokens up to the last one that carries loss."""
    return next((place for place in range(len(trained), 0, -1) if trained[place - 1]), 0)


def _shorter_chats(messages: Messages) -> list[Messages]:
    """The chat, and the same without its oldest turn, its two oldest, ... as long as an answer that carries loss is
    left.
    """
    first = next((place for place, message in enumerate(messages) if message.get("role") not in _SYSTEM), len(messages))
    starts = [place for place in range(first, len(messages)) if messages[place].get("role") == "user"]
    chats: list[Messages] = [messages]
    for start in starts:
        rest = messages[start:]
        if start > first and any(is_trained(message) for message in rest):
            chats.append([*messages[:first], *rest])
    return chats


def is_trained(message: JsonMapping) -> bool:
    """Whether a message is an answer that carries loss."""
    return message.get("role") == "assistant" and message.get("weight", 1) != 0


def is_surely_longer(texts: Sequence[str], limit_tokens: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts have more than twice as many tokens together as a row may have.

    Args:
        texts: Parts of a row that its rendering holds whole.
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


def keep_part(text: str, limit_tokens: int, tokenizer: PreTrainedTokenizerBase, keep: Kept) -> str:
    """What a text is cut to, and some more: its beginning, its end, or both without what lies between."""
    if keep == "head":
        return keep_head(text, limit_tokens, tokenizer)
    tail = keep_tail(text, limit_tokens, tokenizer)
    if keep == "tail":
        return tail
    head = keep_head(text, limit_tokens, tokenizer)
    return head + tail if len(head) + len(tail) < len(text) else text


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
