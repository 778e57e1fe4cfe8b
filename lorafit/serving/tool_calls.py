"""Calls of tools in an answer, where the form in which its template writes them is known.

    <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>      hermes, Qwen 2.5 and 3

In any other form, or where what stands between the marks is no such call, the answer stays text.
"""

from __future__ import annotations

import json
import secrets

from lorafit.contracts import JsonObject

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def writes_calls(template: str) -> bool:
    """Whether a template's text writes calls in the known form."""
    return _OPEN in template


class CallReader:
    """Takes calls out of an answer, piece by piece; text that may begin one is held back.

    Attributes:
        calls: Those that were found, as OpenAI writes them. Known behind `end`.
    """

    def __init__(self) -> None:
        self._held = ""
        self.calls: list[JsonObject] = []

    def add(self, text: str) -> str:
        """The text that is certainly none of a call."""
        self._held += text
        if _OPEN in self._held:
            start = self._held.index(_OPEN)
        else:
            start = len(self._held) - _beginning(self._held)
        free, self._held = self._held[:start], self._held[start:]
        return free

    def end(self) -> str:
        """What is left of the text when the answer is over."""
        found, free = list[JsonObject | None](), ""
        text = self._held
        while _OPEN in text:
            before, _, text = text.partition(_OPEN)
            inside, _, text = text.partition(_CLOSE)  # which the last one may lack
            found.append(_read_call(inside))
            free += before
        if not found or None in found:
            return self._held
        self.calls = [call for call in found if call is not None]
        return (free + text).strip()


def _beginning(text: str) -> int:
    """Characters at the end that may begin a call."""
    return next((size for size in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:size])), 0)


def _read_call(text: str) -> JsonObject | None:
    try:
        value = json.loads(text.strip())
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = json.dumps(value.get("arguments", {}), ensure_ascii=False)
    called = {"name": value["name"], "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": called}
