"""Whether a chat template can do anything with a system message; Gemma's and older ones of Mistral refuse it."""

from __future__ import annotations

import re

from lorafit.contracts import JsonMapping
from lorafit.data.chat.dropped_fields import find_dropped
from lorafit.data.chat.template import BoundChat, RenderError
from lorafit.data.chat.traced_template import ChatTemplate

DROPS = "the chat template drops system messages"
_REASON_CHARACTERS = 120


def refusal_of_system(
    template: ChatTemplate, prompt: str, variables: JsonMapping, control: re.Pattern[str]
) -> str | None:
    """Why a chat with a system message cannot be rendered, though it can without one; None where it can.

    Args:
        template: The template.
        prompt: The system message.
        variables: What the template may read besides a chat.
        control: Matches control strings.
    """
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    if BoundChat(template, chat, None, variables).attempt(len(chat)) is None:
        return None  # what it refuses is something else
    prompted = BoundChat(template, [{"role": "system", "content": prompt}, *chat], None, variables)
    try:
        lost = find_dropped(prompted, prompted.trace(), control).lost
    except RenderError as error:
        return error.what.replace("refuses this chat", "refuses system messages")[:_REASON_CHARACTERS]
    return DROPS if any(message == 0 for message, _ in lost) else None
