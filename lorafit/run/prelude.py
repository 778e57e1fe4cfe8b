"""What a run adds to its chat template, as lines before it, so that plain transformers writes what training wrote.

    {%- set messages = ([{'role': 'system', 'content': "Be kind."}] + ...) if ... else messages %}     system prompt
    {% macro strftime_now(format) %}{{ {'%d %b %Y': '05 Feb 2026'}[format] }}{% endmacro %}             the run's date
    the template as it was

The first line gives chats without a system message the recipe's; the template behind it does with that message
whatever it does with any other. lorafit takes that line off again and sees the prompt as what it is: typed text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

_HEAD = "{%- set messages = ([{'role': 'system', 'content': "
_TAIL = "}] + (messages | list)) if messages and messages[0]['role'] not in ['system', 'developer'] else messages %}\n"
_DATE = "{% macro strftime_now(format) %}{{ "
_DATE_END = "[format] }}{% endmacro %}\n"  # its line end is eaten, as behind any block


def with_system_prompt(template: str, prompt: str | None) -> str:
    """The template with `prompt` as the system message of chats that have none; it replaces one put in before."""
    _, plain = split_system_prompt(template)
    if prompt is None:
        return plain
    return f"{_HEAD}{json.dumps(prompt, ensure_ascii=False)}{_TAIL}{plain}"


def split_system_prompt(template: str) -> tuple[str | None, str]:
    """What `with_system_prompt` put together: the prompt, None where there is none, and the template as it was."""
    if not template.startswith(_HEAD):
        return None, template
    try:
        prompt, end = json.JSONDecoder().raw_decode(template, len(_HEAD))
    except ValueError:
        return None, template
    if not isinstance(prompt, str) or not template.startswith(_TAIL, end):
        return None, template
    return prompt, template[end + len(_TAIL) :]


def split_prompts(templates: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
    """The same for templates by name, which all carry the same prompt."""
    parts = {name: split_system_prompt(text) for name, text in templates.items()}
    prompt = next((prompt for prompt, _ in parts.values() if prompt is not None), None)
    return prompt, {name: plain for name, (_, plain) in parts.items()}


def with_dates(template: str, dates: Mapping[str, str]) -> str:
    """The template with a `strftime_now` of its own, which hides that of whoever renders it.

    Args:
        template: The template.
        dates: What it says by format; where that is empty, the template stays as it is.
    """
    return f"{_DATE}{dict(dates)!r}{_DATE_END}{template}" if dates else template


def has_dates(template: str) -> bool:
    """Whether a template got its dates from `with_dates`, and asks nobody for the present one."""
    return split_system_prompt(template)[1].startswith(_DATE)
