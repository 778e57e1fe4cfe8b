"""Chats to text with the characters that carry loss, and to token ids with the tokens that do.

    messages --template--> Rendering(text, spans) --tokenizer--> Encoded(input_ids, trained)

`ChatRenderer` is the only code that does this: training, preview, evaluation and `mask_chat` all use it. How spans
are found is told in `assistant_spans`, how typed control strings stay text in `lorafit.data.text_encoder`;
`docs/masks.md` draws both.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from lorafit.contracts import Encoded, JsonMapping, JsonObject
from lorafit.data.chat.assistant_spans import Habits, Turn, find_turns, learn_habits
from lorafit.data.chat.clock import StoppedClock, read_clock
from lorafit.data.chat.dropped_fields import DROPS, Dropped, find_dropped, refusal_of_system
from lorafit.data.chat.image_places import in_parts, put_images, tokens_of
from lorafit.data.chat.rendering import Rendering
from lorafit.data.chat.template import (
    BoundChat,
    RenderError,
    check_variables,
    compile_or_explain,
    template_sources,
    with_text_arguments,
)
from lorafit.data.chat.template_names import KEY
from lorafit.data.chat.traced_template import CLOCK, Traced, join_stretches, stretches
from lorafit.data.chat.traced_text import BLURRED
from lorafit.data.chat.typed_chat import TOOLS, Messages
from lorafit.data.text_encoder import Stretch, TextEncoder, mark_trained
from lorafit.errors import DataError, LorafitError, RecipeError
from lorafit.run.prelude import split_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_END_TOKEN = "the chat template writes no end-of-turn token, so the model does not learn to stop"

TrainOn = Literal["assistant", "last_turn", "completion", "all"]


class ChatRenderer:
    """Renders and encodes chats for one tokenizer, one template and one choice of what carries loss.

    Args:
        tokenizer: Its template is used where none is given; it is not changed.
        chat_template: A shipped name (`SHIPPED_TEMPLATES`) or the text of a template.
        train_on: `assistant`: every assistant turn without `weight: 0`; `last_turn`: the last of them; `completion`:
            those behind the last user message; `all`: every token.
        dropped_fields: What to do with a field that the template renders nowhere: `error`; `warn`; or `trained`: an
            error for what would carry loss (content, reasoning and calls of the assistant), else a warning.
        system_prompt: The system message of chats that have none; where None, the one that lorafit shipped in the
            template (`lorafit.run.prelude`).
        now: The moment that the template takes for the present one; this minute where None.
        image_mark: What the template writes for an image. Contents are lists of parts then, as the templates of
            models that see take them, and a BOS that the template does not write is put in front, as processors do.

    Attributes:
        templates: Text of each template by name, without a system prompt; `default` is always one of them.

    Raises:
        ModelError: Without any template, or for one that is not valid, not allowed or uses unknown variables.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        train_on: TrainOn = "assistant",
        dropped_fields: Literal["error", "trained", "warn"] = "error",
        system_prompt: str | None = None,
        now: datetime | None = None,
        image_mark: str = "",
    ) -> None:
        self._tokenizer, self._image_mark = tokenizer, image_mark
        shipped_prompt, self.templates = split_prompts(template_sources(tokenizer, chat_template))
        self.template = chat_template or tokenizer.chat_template
        self._train_on = train_on
        self._dropped_fields = dropped_fields
        self.system_prompt = shipped_prompt if system_prompt is None else system_prompt
        self._clock = StoppedClock(now or read_clock())
        self._variables = {CLOCK: self._clock.strftime_now, **tokenizer.special_tokens_map}
        templates = {source: compile_or_explain(source) for source in self.templates.values()}
        self.encoder = TextEncoder(tokenizer, "\0".join(template.literal_text() for template in templates.values()))
        longest_first = sorted(self.encoder.control.values(), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        end_token = str(tokenizer.eos_token or "")
        self._habits: dict[str, Habits] = {}
        for source, template in templates.items():
            check_variables(template, self._variables, self._in_form)
            self._habits[source] = learn_habits(template, self._variables, end_token, self._control, self._in_form)

    @property
    def dates(self) -> dict[str, str]:
        """What the templates are told of the present moment, by the format they ask in."""
        formats = [compile_or_explain(source).clock_formats() for source in self.templates.values()]
        return self._clock.dates([format for known in formats for format in known or ()])

    def check_system_prompt(self) -> None:
        """Finds a template that can do nothing with a system message: each chat that gets one would be an error.

        Raises:
            RecipeError: It refuses system messages; or drops them, where that is an error.
        """
        for template in map(compile_or_explain, self.templates.values() if self.system_prompt is not None else ()):
            reason = refusal_of_system(template, str(self.system_prompt), self._variables, self._control)
            if reason is not None and not (reason == DROPS and self._dropped_fields == "warn"):
                todo = "leave it out, e.g. put the text before each question, or name another data.chat_template"
                raise RecipeError(reason, key="data.system_prompt", todo=todo)

    def _in_form(self, chat: list[JsonObject]) -> list[JsonObject]:
        """The chat in the form that the templates take."""
        return in_parts(chat) if self._image_mark else chat

    def render(
        self, messages: Messages, tools: Sequence[JsonMapping] | None = None, images: Sequence[str] = ()
    ) -> Rendering:
        """Renders a chat and finds what carries loss.

        Args:
            messages: The chat, in OpenAI's form. An assistant message with `weight: 0` carries no loss.
            images: What stands for each of its images.

        Raises:
            RenderError: If the template refuses the chat, drops a field, or two ways to find a turn disagree.
            ModelError: If the template itself is at fault.
        """
        source = self._source(tools)
        bound, whole = self._trace(self._prepare(messages), tools, source)
        chat = bound.messages
        self._check_official(whole.text, chat, tools, source)
        dropped = find_dropped(bound, whole, self._control)
        turns = find_turns(bound, whole, self._habits[source])
        warnings = self._judge_dropped(dropped, chat)
        warnings += [NO_END_TOKEN for turn in turns if not turn.has_end_token]
        typed, unsure = self._typed_stretches(whole)
        rendering = Rendering(
            text=whole.text,
            spans=tuple(self._spans(whole.text, turns, chat, messages)),
            turns=tuple(turns),
            typed=tuple(typed),
            unsure=tuple(unsure),
            all_trained=self._train_on == "all",
            warnings=tuple(warnings),
            history_dropped=tuple(name for _, name in dropped.history),
        )
        return put_images(rendering, self._image_mark, images) if self._image_mark else rendering

    def encode(self, rendering: Rendering) -> Encoded:
        """Token ids of a rendering, and which of them carry loss.

        Raises:
            DataError: If a control string stands where nobody can say who wrote it.
        """
        return self._mark(rendering, *self.encoder.encode(rendering.text, rendering.typed, rendering.unsure))

    def encode_all(self, renderings: Sequence[Rendering]) -> Iterator[Encoded | DataError]:
        """`encode` of each, or what it raises. Together they take less time than one by one."""
        encodings = self.encoder.encode_batches([rendering.text for rendering in renderings])
        for rendering, encoding in zip(renderings, encodings, strict=True):
            try:
                found = self.encoder.read(encoding, rendering.text, rendering.typed, rendering.unsure)
            except DataError as error:
                yield error
            else:
                yield self._mark(rendering, *found)

    def locate(self, rendering: Rendering) -> tuple[list[int], list[Stretch]]:
        """Token ids of a rendering and where each stands in its text."""
        return self.encoder.encode(rendering.text, rendering.typed, rendering.unsure)

    def _mark(self, rendering: Rendering, ids: list[int], offsets: Sequence[Stretch]) -> Encoded:
        """The tokens, which of them carry loss, and those of each image, none of which do."""
        trained = [True] * len(ids) if rendering.all_trained else mark_trained(offsets, rendering.spans)
        images = [tokens_of(offsets, stretch) for stretch in rendering.images]
        for start, end in images:
            trained[start:end] = [False] * (end - start)
        front = self._front(rendering.text)
        places = tuple((start + len(front), end + len(front)) for start, end in images)
        return Encoded([*front, *ids] if front else ids, [False] * len(front) + trained, images=places)

    def _front(self, text: str) -> list[int]:
        """What a processor's tokenizer puts in front of a text that does not begin with its BOS."""
        bos = self._tokenizer.bos_token
        return self.encoder.prefix if self._image_mark and not (bos and text.startswith(bos)) else []

    def prompt(
        self, messages: Messages, tools: Sequence[JsonMapping] | None = None, images: Sequence[str] = ()
    ) -> Encoded:
        """A chat with the generation prompt behind it, what a model is given to answer, and its images' places.

        Raises:
            RenderError: If the template refuses the chat, or drops a field.
        """
        bound, whole = self._trace(self._prepare(messages), tools, self._source(tools), prompt=True)
        self._judge_dropped(find_dropped(bound, whole, self._control), bound.messages)
        typed, unsure = self._typed_stretches(whole)
        rendering = Rendering(whole.text, (), (), tuple(typed), tuple(unsure))
        rendering = put_images(rendering, self._image_mark, images) if self._image_mark else rendering
        return self.encode(rendering)

    def prompt_ids(self, messages: Messages, tools: Sequence[JsonMapping] | None = None) -> list[int]:
        """Token ids of a chat with the generation prompt behind it: what a model is given to answer.

        Raises:
            RenderError: If the template refuses the chat, or drops a field.
        """
        return self.prompt(messages, tools).input_ids

    def end_of_turn_id(self) -> int | None:
        """The control token that the template writes behind an answer, which need not be the tokenizer's end token.

        None where the template writes none, or refuses a chat of one question and one answer.
        """
        try:
            rendering = self.render([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
        except LorafitError:
            return None
        turn = rendering.turns[-1]
        ids, offsets = self.locate(rendering)
        return next(
            (
                number
                for number, (start, end) in zip(ids, offsets, strict=True)
                if end > turn.answer_end and start < turn.end and number in self.encoder.control
            ),
            None,
        )

    def _source(self, tools: Sequence[JsonMapping] | None) -> str:
        """The template for a chat; some tokenizers have one for chats with tools."""
        return self.templates["tool_use" if tools and "tool_use" in self.templates else "default"]

    def _prepare(self, messages: Messages) -> list[JsonObject]:
        """The chat as the template gets it: no weights, and the system prompt where there is none."""
        if not messages:
            raise RenderError("the chat holds no messages")
        chat = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        if self.system_prompt is not None and chat[0].get("role") not in ("system", "developer"):
            chat.insert(0, {"role": "system", "content": self.system_prompt})
        return self._in_form(chat)

    def _trace(
        self,
        chat: list[JsonObject],
        tools: Sequence[JsonMapping] | None,
        source: str,
        prompt: bool = False,
    ) -> tuple[BoundChat, Traced]:
        """Renders a chat. A template that takes arguments of tool calls as text only (DeepSeek's) gets them as JSON."""
        template = compile_or_explain(source)
        bound = BoundChat(template, chat, tools, self._variables)
        try:
            return bound, bound.trace(prompt=prompt)
        except RenderError:
            bound = BoundChat(template, with_text_arguments(chat), tools, self._variables)
            with contextlib.suppress(RenderError):
                return bound, bound.trace(prompt=prompt)
            raise

    def _check_official(self, text: str, chat: Messages, tools: Sequence[JsonMapping] | None, source: str) -> None:
        official = self._tokenizer.apply_chat_template(
            chat, tools=tools, chat_template=self._clock.stop_in(source), tokenize=False
        )
        if official != text:
            place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(official, text, strict=False)))
            raise RenderError(
                f"lorafit and transformers render this chat differently from character {place} on: "
                f"{text[place : place + 20]!r}, {official[place : place + 20]!r}",
                key=KEY,
                todo="report the template",
            )

    def _judge_dropped(self, dropped: Dropped, chat: Messages) -> list[str]:
        """Warnings for fields that are rendered nowhere.

        Raises:
            RenderError: Where they are errors.
        """
        refused, said = [], []
        for message, field in dropped.lost:
            role = None if message == TOOLS else chat[message].get("role")
            said.append("the tools" if message == TOOLS else f"{field} of {role}")
            if self._dropped_fields == "error" or (
                self._dropped_fields == "trained" and role == "assistant" and field != "name"
            ):
                refused.append("the tools" if message == TOOLS else f"{field} of message {message + 1} ({role})")
        if refused:
            of_tools = any(
                message == TOOLS or field in ("tool_calls", "function_call") for message, field in dropped.lost
            )
            named = "data.chat_template: hermes" if of_tools else "another data.chat_template"
            todo = f"use {named}, or data.dropped_fields: warn"
            raise RenderError(f"the chat template drops {', '.join(refused)}", key=KEY, todo=todo)
        return [f"dropped: {text}" for text in said]

    def _typed_stretches(self, whole: Traced) -> tuple[list[Stretch], list[Stretch]]:
        """What was typed, and which of it perhaps. Where no control string was typed at all, nothing depends on a
        perhaps.
        """
        if not any(start == BLURRED for _, _, start in whole.runs):
            return join_stretches((start, end) for start, end, _ in whole.authors), []
        perhaps = stretches(whole, lambda start: start == BLURRED)
        if perhaps and not any(self._control.search(leaf.text) for leaf in whole.leaves):
            return stretches(whole, lambda start: start != BLURRED), []
        return stretches(whole, lambda start: True), perhaps

    def _spans(self, text: str, turns: Sequence[Turn], chat: Messages, messages: Messages) -> Iterable[Stretch]:
        if self._train_on == "all":
            return [(0, len(text))]
        added = len(chat) - len(messages)
        if self._train_on == "last_turn":
            turns = turns[-1:]
        elif self._train_on == "completion":
            last_user = max((index for index, message in enumerate(chat) if message.get("role") == "user"), default=-1)
            turns = [turn for turn in turns if turn.message > last_user]
        return [
            (turn.start, turn.end)
            for turn in turns
            if turn.end > turn.start and messages[turn.message - added].get("weight", 1) != 0
        ]


_renderers: WeakKeyDictionary[Any, ChatRenderer] = WeakKeyDictionary()


def mask_chat(
    messages: list[JsonObject], tools: list[JsonObject] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of a chat and its labels, as training makes them.

    Args:
        messages: The chat, in OpenAI's form.
        tools: JSON schemas of the tools, or None.
        tokenizer: With a chat template.

    Returns:
        `input_ids` and `labels`, of equal length: `labels[i]` is `input_ids[i]` where the token carries loss, else
        -100. They are not shifted.

    Raises:
        RenderError: If the template refuses the chat or drops something that should be trained.
        ModelError: If there is no usable template.
    """
    renderer = _renderers.get(tokenizer)
    if renderer is None or renderer.template != tokenizer.chat_template or CLOCK in str(renderer.template):
        renderer = _renderers[tokenizer] = ChatRenderer(tokenizer, dropped_fields="trained")
    encoded = renderer.encode(renderer.render(messages, tools))
    labels = [number if trained else -100 for number, trained in zip(encoded.input_ids, encoded.trained, strict=True)]
    return encoded.input_ids, labels
