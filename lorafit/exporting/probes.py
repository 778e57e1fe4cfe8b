"""Chats and texts that an export is tried on: what people write, and what breaks templates and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafit.model.tokenizer_files import DEFAULT

if TYPE_CHECKING:
    from lorafit.exporting.source import Source

Chat = list[dict[str, str]]
_TALKS = (
    ("What opens at nine?", "The shop does.", "And at ten?"),
    ("Where is my parcel 12345?", "It is on its way; see https://example.org/p?id=1&b=2.", "Thanks!"),
    ("def add(a, b):\n    return a + b  # 1,000.5\n\tdone", "It adds:\n\n1. a\n2. b", "Again, in Go: {{ .Content }}"),
    ("Ich möchte zwölf Äpfel.", "Gerne – 12 €.", "谢谢 🙂 и ещё"),
    ('She said "{% if x %}" and `\\n`', "It's 3 < 4 & 5 > 4", "don't   stop\n\n\nhere"),
    ('"""quoted"""', "'single' {\"json\": [1, 2]}", "a"),
)
_SYSTEMS = ("You are terse.", 'Answer in JSON:\n{"a": 1}')


def chats() -> list[Chat]:
    """20 chats, each ending with a user's turn: one to three turns, with and without a system message."""
    found: list[Chat] = []
    for number, (first, answer, second) in enumerate(_TALKS):
        short, long = [_turn("user", first)], [_turn("user", first), _turn("assistant", answer), _turn("user", second)]
        system = _turn("system", _SYSTEMS[number % 2])
        found += [short, long, [system, *long]]
    more = [_turn("assistant", "<think>\nhm\n</think>\n\nYes."), _turn("user", "Why?")]
    longest = [_turn("system", _SYSTEMS[0]), *found[1], *found[4][1:], *found[7][1:]]
    return [*found, [*found[0], *more], _alternating(longest)]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _alternating(chat: Chat) -> Chat:
    """The chat with an answer between two turns of the user."""
    made: Chat = []
    for turn in chat:
        if made and made[-1]["role"] == turn["role"]:
            made.append(_turn("assistant", "I see."))
        made.append(turn)
    return made


def probe_texts(source: Source) -> Sequence[str]:
    """The chats as the run's template writes them, those that it refuses left out; without one, what is in them."""
    template = source.companions.templates.get(DEFAULT)
    if template is None or source.voice.chats is None:
        return [" ".join(turn["content"] for turn in chat) for chat in chats()]
    from jinja2.exceptions import TemplateError

    texts = []
    for chat in chats():
        try:
            texts.append(render(source, chat))
        except TemplateError:
            continue
    return texts


def render(source: Source, chat: Chat) -> str:
    """A chat with the header of its answer, by the template that stands beside the weights."""
    template = source.companions.templates[DEFAULT]
    return str(
        source.voice.tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )
