"""Chat templates from everywhere, and what they raise as our errors: the tokenizer's own, a shipped one, a file's
text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.data.chat.jinja_filters import TemplateLimitError
from lorafit.data.chat.template_names import KEY, SHIPPED_TEMPLATES, shipped_template
from lorafit.data.chat.traced_template import ChatTemplate, Traced, read_trace
from lorafit.data.chat.typed_chat import Messages, TypedChat
from lorafit.errors import DataError, LorafitError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RenderError(DataError):
    """A chat that the template refuses, or of which it drops something that should be trained."""


class BoundChat:
    """A template with one chat and the tokenizer's special tokens; renders the chat and what it begins with."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Messages,
        tools: Sequence[JsonMapping] | None,
        variables: JsonMapping,
    ) -> None:
        self.messages = messages
        self._template, self._variables = template, variables
        self._chat = TypedChat(messages, tools)
        self._known: dict[tuple[int, bool], str | Exception] = {}

    def _render(self, count: int, prompt: bool) -> str | Exception:
        """The first messages as their template writes them, with its marks; or what it raises."""
        if (count, prompt) not in self._known:
            try:
                text = self._template.render(self._chat, count, self._variables, add_generation_prompt=prompt)
                self._known[count, prompt] = text
            except Exception as error:  # a template can raise anything
                self._known[count, prompt] = error
        return self._known[count, prompt]

    def trace(self, count: int | None = None, *, prompt: bool = False) -> Traced:
        """The first `count` messages, all where None, rendered and traced.

        Raises:
            RenderError: The template refuses them.
            ModelError: The template itself is at fault.
        """
        found = self._render(len(self.messages) if count is None else count, prompt)
        if isinstance(found, Exception):
            explain(found, self._template)
        return read_trace(found, self._chat)

    def attempt(self, count: int, *, prompt: bool = False) -> str | None:
        """The text of the first `count` messages; None where the template refuses them."""
        found = self._render(count, prompt)
        return None if isinstance(found, Exception) else str.__str__(found)


def explain(error: Exception, template: ChatTemplate) -> NoReturn:
    """Raises what a template raised as an error of ours, with the template's line."""
    if isinstance(error, LorafitError):
        raise error
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    place = f" at line {template.line_of(lines[-1])}" if lines else ""
    if isinstance(error, jinja2.exceptions.SecurityError):
        raise ModelError(f"what the chat template does{place} is not allowed: {error}", key=KEY) from error
    if isinstance(error, (TemplateLimitError, MemoryError, RecursionError, OverflowError)):
        limit = "" if isinstance(error, TemplateLimitError) else "time limit or size limit: "
        raise ModelError(f"the chat template was stopped{place}: {limit}{error}", key=KEY) from error
    message = " ".join(str(error).split()) or type(error).__name__
    what = f"the chat template refuses this chat{place}: {message}"
    raise RenderError(what, key=KEY, todo="correct the row") from error


def template_sources(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> dict[str, str]:
    """The templates to use, by name; `default` is always one of them."""
    if chat_template is not None:
        return {"default": shipped_template(chat_template) if chat_template in SHIPPED_TEMPLATES else chat_template}
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict) and own:
        return {**own, "default": own.get("default") or next(iter(own.values()))}
    if isinstance(own, str) and own:
        return {"default": own}
    raise ModelError(
        "the tokenizer has no chat template, as is usual for base models",
        key=KEY,
        todo=f"set data.chat_template to one of {', '.join(SHIPPED_TEMPLATES)}, or to a file",
    )


@lru_cache(maxsize=32)
def compile_or_explain(source: str) -> ChatTemplate:
    """A compiled template, made once a process. Raises ModelError where it is not valid."""
    try:
        return ChatTemplate(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid, line {error.lineno}: {error.message}", key=KEY) from error
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template is not valid: {error}", key=KEY) from error


def check_variables(
    template: ChatTemplate,
    variables: JsonMapping,
    in_form: Callable[[list[JsonObject]], list[JsonObject]] = list,
) -> None:
    """Finds a template that fails for any chat because a name in it is unknown.

    Args:
        template: It.
        variables: What it may read.
        in_form: Brings a chat into the form that the template takes.

    Raises:
        ModelError: With the line of the template.
    """
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    undefined: RenderError | None = None
    for chat in ([ask], [ask, answer], [{"role": "system", "content": "s"}, ask, answer]):
        try:
            BoundChat(template, in_form(chat), None, variables).trace()
            return
        except RenderError as error:
            undefined = error if isinstance(error.__cause__, jinja2.UndefinedError) else undefined
    if undefined is not None:
        raise ModelError(
            undefined.what.replace("refuses this chat", "fails for any chat"), key=KEY, todo="correct the template"
        ) from undefined


def with_text_arguments(chat: Sequence[JsonObject]) -> list[JsonObject]:
    """The chat with arguments of tool calls as JSON text."""
    return [
        {**message, "tool_calls": list(map(_call_as_text, calls))} if (calls := message.get("tool_calls")) else message
        for message in chat
    ]


def _call_as_text(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_as_text(call["function"])}
    if not isinstance(call.get("arguments"), (dict, list)):
        return call
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
