"""A rendered chat, and what in it carries loss."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.data.chat.assistant_spans import Turn
from lorafit.data.text_encoder import Stretch


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered chat. All places are characters of `text`.

    Attributes:
        text: What the template makes of the chat, equal to `apply_chat_template(tokenize=False)`.
        spans: What carries loss, in order.
        turns: Every assistant turn, whether it carries loss or not.
        typed: What somebody typed; all else was written by the template itself.
        unsure: The part of `typed` that may be the template's all the same.
        all_trained: Whether every token carries loss, those of no length too.
        warnings: Dropped fields (where they are no errors) and turns without an end-of-turn token, one text for each;
            equal ones are to be counted.
        history_dropped: Fields that the template shows in the last turn only, one name for each time it happens.
        images: What stands for each image.
    """

    text: str
    spans: tuple[Stretch, ...]
    turns: tuple[Turn, ...]
    typed: tuple[Stretch, ...]
    unsure: tuple[Stretch, ...] = ()
    all_trained: bool = False
    warnings: tuple[str, ...] = ()
    history_dropped: tuple[str, ...] = ()
    images: tuple[Stretch, ...] = ()

    @property
    def answers(self) -> tuple[Stretch, ...]:
        """What the model writes: the spans, or every assistant turn where all of the text carries loss."""
        return tuple((turn.start, turn.end) for turn in self.turns) if self.all_trained else self.spans
