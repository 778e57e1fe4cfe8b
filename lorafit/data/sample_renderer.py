"""One way from a sample of any kind to tokens: chats by their template, prompts and plain text verbatim."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.contracts import Encoded, GenerationRow, Kept, Message, Sample
from lorafit.data.chat.clock import StoppedClock, read_clock, write_moment
from lorafit.data.chat.render import ChatRenderer
from lorafit.data.chat.rendering import Rendering
from lorafit.data.chat.template import compile_or_explain, template_sources
from lorafit.data.chat.template_names import read_template
from lorafit.data.pictures import ask, look_at, place
from lorafit.data.plain_text import PlainText, split_text
from lorafit.data.source_target import SourceTarget
from lorafit.data.truncate import is_surely_longer, is_trained, keep_head, keep_part, keep_tail, truncate_chat
from lorafit.errors import DataError, LorafitError
from lorafit.kinds.chat_fields import says_something, text_of
from lorafit.pictures import PlacedPicture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafit.data.pictures import ProcessorPictures
    from lorafit.kinds.row_limits import TwoTexts
    from lorafit.recipe.schema import DataSection

NO_ANSWER = "every answer is empty or has weight 0; correct or remove the row"


class Renderer:
    """Renders samples for one tokenizer and the `data` section of one recipe.

    Messages, instructions and questions are chats. A prompt with its completion is used verbatim, unless the recipe
    names a chat template, which makes it a chat of one turn each. Plain text stays plain text.

    Args:
        chat_template: Text of the template that the recipe names; None for the tokenizer's own.
        now: The moment that templates take for the present one; this minute where None.
        two_texts: Where an encoder reads a row's prompt, and a decoder writes its completion, how that is done.
        pictures: Looks at the images of rows; None where the model reads text alone.

    Attributes:
        data: The section.
        seen: What the template did with fields of the rows rendered so far, e.g. `history: reasoning_content`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataSection,
        chat_template: str | None,
        now: datetime | None = None,
        two_texts: TwoTexts | None = None,
        pictures: ProcessorPictures | None = None,
    ) -> None:
        self.tokenizer, self.data, self._named_template = tokenizer, data, chat_template
        self.apart = None if two_texts is None else SourceTarget(tokenizer, two_texts)
        self.pictures = pictures
        self._now = now or read_clock()
        self.seen: Counter[str] = Counter()

    @cached_property
    def chats(self) -> ChatRenderer:
        """Made when the first chat comes: a base model without a template needs none for plain text.

        Raises:
            ModelError: There is no template, or not a usable one.
        """
        return ChatRenderer(
            self.tokenizer,
            chat_template=self._named_template,
            train_on=self.data.train_on,
            dropped_fields=self.data.dropped_fields,
            system_prompt=self.data.system_prompt,
            now=self._now,
            image_mark=self.pictures.mark if self.pictures is not None else "",
        )

    @cached_property
    def _plain(self) -> PlainText:
        return PlainText(self.tokenizer)

    @property
    def template(self) -> str:
        """Text of the chat template; empty where there is none."""
        own: Any = self._named_template or getattr(self.tokenizer, "chat_template", None) or ""
        return own if isinstance(own, str) else "\n".join(f"{name}: {text}" for name, text in sorted(own.items()))

    @cached_property
    def written_date(self) -> str | None:
        """What the chat template writes of the present moment, e.g. `05 Feb 2026`; None where it writes nothing."""
        if not self.template:
            return None
        try:
            sources = template_sources(self.tokenizer, self._named_template).values()
            formats = [compile_or_explain(source).clock_formats() for source in sources]
        except LorafitError:  # said when a chat comes
            return None
        clock = StoppedClock(self._now)
        return ", ".join(dict.fromkeys(clock.reading(asked) for asked in formats if asked != ())) or None

    @property
    def template_date(self) -> str | None:
        """The moment that a run must keep so that its rows stay the same, e.g. `2026-02-05T10:32`; None where they do
        not depend on it.
        """
        return None if self.written_date is None else write_moment(self._now)

    def templates(self) -> dict[str, str]:
        """Text of each chat template by name, as written; empty where there is none."""
        if self._named_template is not None or getattr(self.tokenizer, "chat_template", None):
            return template_sources(self.tokenizer, self._named_template)
        return {}

    @cached_property
    def key(self) -> dict[str, str]:
        """Hashes of all that decides how a sample becomes tokens, but for the code, by what it is."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # what a last call may have left there is no part of the tokenizer
            backend.no_truncation()
            backend.no_padding()
        vocabulary = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        special = sorted((name, str(token)) for name, token in self.tokenizer.special_tokens_map.items())
        parts = {"tokenizer": f"{vocabulary}{special}", "chat template": f"{bool(self._named_template)}{self.template}"}
        parts |= {} if self.pictures is None else {"processor": self.pictures.key}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}

    def render(self, sample: Sample) -> Encoded:
        """The whole sample as tokens, however long.

        Raises:
            DataError: Nothing in it can be trained, or the template refuses it.
            ModelError: There is no usable chat template or end token.
        """
        if self.apart is not None:
            return self.apart.encode(sample)
        messages = self._messages(sample)
        if messages is not None:
            looked = look_at(sample.pictures, self.pictures)
            return place(self.chats.encode(self._render_counted(messages, sample, looked)), looked)
        if sample.completion is not None:
            return self._plain.completion(sample.prompt, sample.completion, self.data.train_on)
        if sample.is_labelled:
            return self._plain.labelled(sample, sys.maxsize)
        return self._plain.text(sample.text or "")

    def is_surely_longer(self, sample: Sample) -> bool:
        """Whether a sample has more than `max_length` tokens, told without making all of them; False where that takes
        them.
        """
        if self.apart is not None:
            return self.apart.is_surely_longer(sample, self.data.max_length)
        messages = self._messages(sample)
        if messages is None:
            texts = [sample.prompt, sample.completion or "", sample.text or "", sample.text_pair or ""]
        else:  # system messages may be what a template drops, and reasoning what it drops of earlier turns
            shown = [turn for turn in messages if turn["role"] != "system" or self.data.dropped_fields == "error"]
            texts = [text_of(turn).rpartition("</think>")[2].strip() for turn in shown]
        if is_surely_longer(texts, self.data.max_length, self.tokenizer):
            return True
        return sample.rejected is not None and self.is_surely_longer(sample.rejected)

    def _shorten(self, sample: Sample, keep: Kept) -> Sample:
        """The sample without what cutting it to `max_length` would surely take away: the beginnings of what is asked,
        the ends of what is answered; of a text what is not to be kept.
        """
        limit, messages = self.data.max_length, sample.messages
        return replace(
            sample,
            messages=messages and tuple(self._shorten_turn(turn) for turn in messages),
            prompt=keep_tail(sample.prompt, limit, self.tokenizer),
            completion=sample.completion and keep_head(sample.completion, limit, self.tokenizer),
            text=sample.text and keep_part(sample.text, limit, self.tokenizer, keep),
            text_pair=sample.text_pair and keep_part(sample.text_pair, limit, self.tokenizer, keep),
        )

    def _shorten_turn(self, turn: Message) -> Message:
        content = turn.get("content", "")
        if not isinstance(content, str) or "</think>" in content:
            return turn
        keep = keep_head if turn["role"] == "assistant" else keep_tail
        return {**turn, "content": keep(content, self.data.max_length, self.tokenizer)}

    def render_all(self, samples: Sequence[Sample]) -> list[Encoded | DataError]:
        """`render` of each, or what it raises. Together they take less time than one by one.

        Raises:
            ModelError: There is no usable chat template or end token.
        """
        made: list[Rendering | Encoded | DataError] = []
        looked: list[Sequence[PlacedPicture]] = [()] * len(samples)
        for number, sample in enumerate(samples):
            try:
                messages = self._messages(sample)
                if messages is None:
                    made.append(self.render(sample))
                    continue
                looked[number] = look_at(sample.pictures, self.pictures)
                made.append(self._render_counted(messages, sample, looked[number]))
            except DataError as error:
                made.append(error)
        renderings = [one for one in made if isinstance(one, Rendering)]
        encoded = self.chats.encode_all(renderings) if renderings else iter(())
        found = [next(encoded) if isinstance(one, Rendering) else one for one in made]
        pairs = zip(found, looked, strict=True)
        return [place(one, seen) if isinstance(one, Encoded) else one for one, seen in pairs]

    def truncate(self, sample: Sample, keep: Kept = "head") -> Encoded | None:
        """The sample cut to `max_length`; None where nothing to train on is left.

        Args:
            keep: What is left of a text that is labelled.
        """
        limit = self.data.max_length
        if self.apart is not None:
            return self.apart.encode(sample, limit)
        sample = self._shorten(sample, keep)
        messages = self._messages(sample)
        if messages is not None:
            return truncate_chat(self.chats, messages, sample.tools, limit)
        if sample.completion is not None:
            return self._plain.cut_completion(sample.prompt, sample.completion, limit, self.data.train_on)
        if sample.is_labelled:
            return self._plain.labelled(sample, limit, keep)
        whole = self._plain.text(sample.text or "")
        return Encoded(whole.input_ids[:limit], whole.trained[:limit])

    def split(self, sample: Sample) -> list[Encoded]:
        """Plain text cut into rows of `max_length`."""
        return split_text(self._plain.text(sample.text or ""), self.data.max_length)

    def is_chat(self, sample: Sample) -> bool:
        """Whether the sample goes through the chat template."""
        return self._messages(sample) is not None

    def generation_rows(self, sample: Sample, *, with_calls: bool = False) -> list[GenerationRow]:
        """What is asked of a sample: its last trained answer; before it, `with_calls`, the last turn that calls tools,
        where that is an earlier one. Nothing of plain text.

        The reference is what the model would have to write, reasoning and tool calls as the template has them.
        """
        if self.apart is not None:
            ids = self.reword(sample, sample.prompt)
            return [self._generation_row(sample, ids, sample.completion)] if sample.completion is not None else []
        messages = self._messages(sample)
        if messages is None:
            if sample.completion is None:
                return []
            return [self._generation_row(sample, self._plain.prompt_ids(sample.prompt), sample.completion)]
        trained = [number for number, turn in enumerate(messages) if is_trained(turn)]
        calling = [number for number in trained[:-1] if messages[number].get("tool_calls")]
        is_last_plain = bool(trained) and not messages[trained[-1]].get("tool_calls")
        inner = [self._ask_turn(sample, messages, calling[-1])] if with_calls and calling and is_last_plain else []
        last = [self._ask_turn(sample, messages, trained[-1])] if trained else []
        return [*(replace(row, must_contain=(), is_inner=True) for row in inner), *last]

    def reword(self, asked: Sample, words: str) -> list[int]:
        """Token ids of what asks for an answer, with other words in the place of what the user says last.

        Args:
            asked: Of a row that is answered (`GenerationRow.asked`).
            words: The other words.

        Raises:
            DataError: The chat template refuses them.
        """
        if self.apart is not None:
            return self.apart.source(words, self.data.max_length).input_ids
        if asked.messages is None:
            return self._plain.prompt_ids(words)
        turns = (*asked.messages[:-1], {**asked.messages[-1], "content": words})
        return ask(self.chats, turns, asked, self.pictures).input_ids

    def _ask_turn(self, sample: Sample, messages: tuple[Message, ...], number: int) -> GenerationRow:
        prompt = ask(self.chats, messages[:number], sample, self.pictures)
        rendering = self.chats.render(messages[: number + 1], sample.tools, self._texts(prompt.pictures))
        turn = rendering.turns[-1]
        calls = tuple(str(call["function"]["name"]) for call in messages[number].get("tool_calls") or ())
        reference = rendering.text[turn.start : turn.end if calls else turn.answer_end]
        if calls:  # an answer ends where its last typed character does, a call behind the brackets that close it
            reference = self._without_end(reference)
        asked = replace(sample, messages=messages[:number])
        return self._generation_row(asked, prompt.input_ids, reference, calls, prompt.pictures)

    def _generation_row(
        self,
        asked: Sample,
        prompt_ids: list[int],
        reference: str,
        calls: tuple[str, ...] = (),
        pictures: tuple[PlacedPicture, ...] = (),
    ) -> GenerationRow:
        shown = prompt_ids if self.pictures is None else self.pictures.fold(prompt_ids, pictures)
        prompt_text = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        where, holds = (asked.file, asked.line), asked.must_contain
        text = str(prompt_text)
        return GenerationRow(prompt_ids, text, reference, holds, *where, calls, pictures=pictures, asked=asked)

    def _without_end(self, answer: str) -> str:
        """An answer's text without the token that ends its turn."""
        number = self.chats.end_of_turn_id()
        ends = [self.tokenizer.convert_ids_to_tokens(number) if number is not None else None, self.tokenizer.eos_token]
        end = next((str(end) for end in ends if end and answer.endswith(str(end))), "")
        return answer.removesuffix(end).rstrip()

    def _messages(self, sample: Sample) -> tuple[Message, ...] | None:
        if self.apart is not None:
            return None
        if sample.messages is not None:
            return sample.messages
        if sample.completion is not None and self._named_template is not None:
            answer = {"role": "assistant", "content": sample.completion}
            return ({"role": "user", "content": sample.prompt}, answer)
        return None

    def _texts(self, looked: Sequence[PlacedPicture]) -> list[str]:
        return [] if self.pictures is None else self.pictures.texts(looked)

    def _render_counted(
        self, messages: tuple[Message, ...], sample: Sample, looked: Sequence[PlacedPicture] = ()
    ) -> Rendering:
        if self.data.train_on != "all":
            answers = [turn for turn in messages if turn["role"] == "assistant"]
            if not answers:
                raise DataError("no assistant turn: nothing to train on", key="messages")
            if not any(map(says_something, answers)):
                raise DataError("no trainable tokens", key="messages", todo=NO_ANSWER)
        rendering = self.chats.render(messages, sample.tools, self._texts(looked))
        self.seen.update(f"history: {name}" for name in set(rendering.history_dropped))
        self.seen.update({_without_place(warning) for warning in rendering.warnings})
        return rendering


def build_renderer(
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    folder: Path,
    now: datetime | None = None,
    two_texts: TwoTexts | None = None,
    pictures: ProcessorPictures | None = None,
) -> Renderer:
    """The renderer of a recipe.

    Args:
        folder: The recipe's folder, which a template's path is relative to.
        now: The moment that templates take for the present one; this minute where None.
        two_texts: The task's.
        pictures: Looks at the images of rows; None where the model reads text alone.

    Raises:
        ModelError: `chat_template` is neither a shipped name nor a readable file.
    """
    return Renderer(tokenizer, data, read_template(data.chat_template, folder), now, two_texts, pictures)


def _without_place(warning: str) -> str:
    """The warning without the message's number, so that equal ones are counted together."""
    head, _, rest = warning.partition(": ")
    return rest if head.startswith("message ") else warning.split(" of message ")[0]
