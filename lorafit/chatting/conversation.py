"""What was said so far: the turns that a next answer reads, and rows of them for training.

asked ──> messages ──> the speaker's template          Exchange(asked, answer, is_whole)
/save ──> rows, as `lorafit train` reads them: an answer that was stopped or cut carries no loss
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorafit.contracts import JsonObject, Message, Sample

if TYPE_CHECKING:
    from lorafit.answering.opening import Voice

_PLACE = "chat"


@dataclass(frozen=True)
class Exchange:
    """A message and its answer.

    Attributes:
        asked: The message.
        answer: What was written.
        is_whole: Whether the model ended it itself: it was neither stopped nor cut at its longest length.
    """

    asked: str
    answer: str
    is_whole: bool


@dataclass
class Conversation:
    """A chat with any speakers.

    Attributes:
        system: The system message; None: the speaker's own, where it has one.
        exchanges: In their order.
    """

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def prompt(self, voice: Voice, asked: str) -> Sample:
        """What the speaker of a voice is given: the whole chat, or the message alone where it knows no chats."""
        if voice.chats is None:
            return Sample(_PLACE, 0, prompt=asked)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return Sample(_PLACE, 0, messages=(*system, *self._turns(), {"role": "user", "content": asked}))

    def rows(self, voice: Voice) -> list[JsonObject]:
        """The conversation for training, in the form in which that voice's rows are: one chat, or a row an answer.

        Empty where there is no whole answer.
        """
        whole = [exchange for exchange in self.exchanges if exchange.is_whole]
        if voice.chats is None:
            asked, answer = ("prompt", "completion") if voice.apart is None else ("source", "target")
            return [{asked: exchange.asked, answer: exchange.answer} for exchange in whole]
        prompt = voice.chats.system_prompt if self.system is None else self.system
        system = [] if prompt is None else [{"role": "system", "content": prompt}]
        turns = self._turns(weights=True)
        return [{"messages": [*system, *turns]}] if whole else []

    def _turns(self, *, weights: bool = False) -> list[Message]:
        turns: list[Message] = []
        for exchange in self.exchanges:
            unlearnt = {"weight": 0} if weights and not exchange.is_whole else {}
            turns += [
                {"role": "user", "content": exchange.asked},
                {"role": "assistant", "content": exchange.answer, **unlearnt},
            ]
        return turns
