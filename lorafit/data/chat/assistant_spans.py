"""Finds what the model writes in a rendered chat: each assistant turn, from behind its header to its end-of-turn token.

    <|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎Paris.<|im_end|>⏎
    └────── header ─────┘└──────────── turn ────────────────┘     (the template's newline behind it is not generated)

The first method reads the tracing: the stretch of text that the template wrote while its loop stood at the message,
less the header. The header is what the generation prompt ends with, because that is what the model will be given. The
second method renders prefixes of the chat and applies wherever a prefix renders as it does inside the whole: the
prompt before a turn must end where the turn starts, and the chat cut after it where the turn ends. Where the template
has `{% generation %}` marks, the typed characters inside them must be the ones found. A disagreement is an error.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.data.chat.template import BoundChat, RenderError
from lorafit.data.chat.template_names import KEY
from lorafit.data.chat.traced_template import ChatTemplate, Traced
from lorafit.data.chat.typed_chat import Messages
from lorafit.errors import LorafitError


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn in a rendering, in characters.

    Attributes:
        message: Its number in the chat.
        header: Where its header starts.
        start: Where the model starts to write.
        end: Behind its end-of-turn token.
        answer_end: Behind the last character that is not part of the end-of-turn token.
    """

    message: int
    header: int
    start: int
    end: int
    answer_end: int

    @property
    def has_end_token(self) -> bool:
        return self.end > self.answer_end


@dataclass(frozen=True, slots=True)
class Habits:
    """What a template does in every chat, learnt from a small one.

    Attributes:
        end_token: The tokenizer's end token, "" if it has none.
        control: Matches control strings.
        prompt: The header of its generation prompt.
        unprompted_header: What it writes before an answer although no generation prompt announces it.
        dangling: What it writes behind the last message even where no generation prompt was asked for.
    """

    end_token: str
    control: re.Pattern[str]
    prompt: str = ""
    unprompted_header: str = ""
    dangling: str = ""


def learn_habits(
    template: ChatTemplate,
    variables: JsonMapping,
    end_token: str,
    control: re.Pattern[str],
    in_form: Callable[[list[JsonObject]], list[JsonObject]] = list,
) -> Habits:
    """Renders a small chat to see how the template opens an answer. A template that refuses it has no habits.

    `in_form` brings a chat into the form that the template takes.
    """
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    chat = BoundChat(template, in_form([ask, answer, ask]), None, variables)
    prompt = dangling = unprompted = ""
    try:
        prompt = _opening(chat, 1)
        bare = chat.trace(1)
        dangling = bare.text[bare.tail :] if bare.tail else ""
        if not prompt.strip():
            whole = chat.trace()
            region = whole.regions.get(1, [(0, 0)])[0]
            lead = whole.text[region[0] : _typed_extent(whole, 1, region)[0]]
            unprompted = lead.rstrip(" ") if lead.strip() else ""  # the blank belongs to the answer's first token
    except LorafitError:
        pass
    return Habits(end_token, control, prompt, unprompted, dangling)


def _refusal(what: str, todo: str = "use another template") -> RenderError:
    return RenderError(what, key=KEY, todo=todo)


def find_turns(chat: BoundChat, whole: Traced, habits: Habits) -> list[Turn]:
    """All assistant turns that the rendering holds.

    Raises:
        RenderError: If a turn cannot be found, or two ways to find it disagree.
    """
    turns = []
    for index, message in enumerate(chat.messages):
        if message.get("role") != "assistant":
            continue
        turn = _find_turn(index, chat, whole, habits)
        if turn is not None:
            turns.append(turn)
    _check_apart(turns, chat.messages, whole)
    _check_generation_marks(turns, whole)
    return turns


def _find_turn(index: int, chat: BoundChat, whole: Traced, habits: Habits) -> Turn | None:
    prompt = chat.attempt(index, prompt=True) if index else None
    prompt = prompt if prompt is not None and whole.text.startswith(prompt) else None
    region = _region(index, whole)
    if region is None:
        return _turn_by_prefixes(index, chat, whole, habits, prompt)
    first, last = _typed_extent(whole, index, region)
    if prompt is not None and region[0] <= len(prompt) <= region[1]:
        start = len(prompt)
    else:
        start = _behind_header(index, chat, whole, habits, region[0], first)
    if not whole.text[region[0] : start].strip() and whole.text.startswith(habits.unprompted_header, start):
        start += len(habits.unprompted_header)
    last = max(last, start)
    answer_end, end = _end(whole.text, start, last, region[1], habits)
    turn = Turn(index, region[0], start, end, answer_end)
    _check_prefix(turn, chat, whole, habits)
    return turn


def _region(index: int, whole: Traced) -> tuple[int, int] | None:
    """The one stretch that was written for a message; None where the template does not loop over the messages."""
    regions = whole.regions.get(index, [])
    if len(regions) > 1:
        regions = [region for region in regions if _typed_extent(whole, index, region)[1] > region[0]]
    if len(regions) > 1:
        places = f"the chat template writes message {index + 1} in {len(regions)} places"
        raise _refusal(f"{places}: its answer cannot be told apart")
    return regions[0] if regions else None


def _typed_extent(whole: Traced, index: int, region: tuple[int, int]) -> tuple[int, int]:
    """From the first typed character of a message in a region to behind its last; (end, start) without any."""
    inside = [
        (max(start, region[0]), min(end, region[1]))
        for start, end in whole.typed_by.get(index, ())
        if start < region[1] and end > region[0]
    ]
    return (inside[0][0], inside[-1][1]) if inside else (region[1], region[0])


def _opening(chat: BoundChat, count: int) -> str:
    """What the generation prompt adds behind the first messages: the header of the answer that follows."""
    prompt = chat.trace(count, prompt=True)
    behind_loop = prompt.text[prompt.tail :] if prompt.tail else ""
    bare = chat.attempt(count)
    added = prompt.text[len(bare) :] if bare is not None and prompt.text.startswith(bare) else ""
    return max(added, behind_loop, key=len)


def _behind_header(index: int, chat: BoundChat, whole: Traced, habits: Habits, start: int, first_typed: int) -> int:
    """Where the turn starts when the prompt before it does not render as it does in the whole."""
    opening = habits.prompt
    with suppress(LorafitError):
        opening = _opening(chat, index) if index else opening
    text = whole.text
    if not opening.strip():
        return (
            start + len(opening) if text.startswith(opening, start) and start + len(opening) <= first_typed else start
        )
    place = text.find(opening, start, first_typed)
    if place >= 0:
        return place + len(opening)
    same = 0
    while same < len(opening) and start + same < first_typed and text[start + same] == opening[same]:
        same += 1
    for piece in (opening, text[start : start + len(opening) + same]):  # not in the middle of a control string
        same = next(
            (found.start() for found in habits.control.finditer(piece) if found.start() < same < found.end()), same
        )
    if opening[:same].strip() or habits.unprompted_header:
        return start + same
    lead = text[start:first_typed]
    if lead.strip():
        raise _refusal(
            f"message {index + 1} starts with {lead[:40]!r}, but the chat template's generation prompt is "
            f"{opening[:40]!r}: cannot tell where the answer starts"
        )
    return start


def _end(text: str, start: int, last: int, region_end: int, habits: Habits) -> tuple[int, int]:
    """Behind the answer, and behind its end-of-turn token, both without the blanks that the template writes there."""
    tail, end_token = text[last:region_end], habits.end_token
    opening = habits.prompt.strip()
    if opening and tail.rstrip().endswith(opening):  # a generation prompt that nobody asked for
        tail = tail.rstrip()[: -len(opening)]
    if end_token and end_token in tail:
        tail = tail[: tail.index(end_token) + len(end_token)]
    tail = tail.rstrip()
    if tail:
        return last, last + len(tail)
    for place in (last, region_end):
        if end_token and text.startswith(end_token, place):
            return last, place + len(end_token)
    return last, last


def _turn_by_prefixes(index: int, chat: BoundChat, whole: Traced, habits: Habits, prompt: str | None) -> Turn | None:
    """The second method alone, for templates that do not loop over the messages themselves."""
    cut = chat.attempt(index + 1)
    first, last = _typed_extent(whole, index, (0, len(whole.text)))
    if prompt is not None and cut is not None and whole.text.startswith(cut):
        start = len(prompt)
        if start <= min(first, len(cut)) and last <= len(cut):
            answer_end, end = _end(whole.text, start, max(last, start), len(cut), habits)
            return Turn(index, start, start, end, answer_end)
    if last == 0 and not chat.messages[index].get("content"):
        return None
    todo = "use a template that loops over the messages"
    raise _refusal(f"cannot find where the chat template writes message {index + 1}", todo)


def _check_prefix(turn: Turn, chat: BoundChat, whole: Traced, habits: Habits) -> None:
    """The chat cut after a turn must end where the turn ends, if it renders as in the whole."""
    if turn.message + 1 == len(chat.messages):
        return
    cut = chat.attempt(turn.message + 1)
    if cut is None:
        return
    cut = cut.removesuffix(habits.dangling)
    if not whole.text.startswith(cut) or len(cut) < turn.start:
        return
    low, high = sorted((turn.end, len(cut.rstrip())))
    if whole.text[low:high].strip():
        raise _refusal(
            f"two ways to find the answer in message {turn.message + 1} disagree: it ends at character {turn.end} of "
            f"the rendering, or at {len(cut.rstrip())}"
        )


def _check_apart(turns: Sequence[Turn], messages: Messages, whole: Traced) -> None:
    """No turn may hold text of a message that is not the assistant's."""
    authors = whole.authors
    starts = [start for start, _, _ in authors]
    for turn in turns:
        for start, end, author in authors[max(0, bisect_right(starts, turn.start) - 1) :]:
            if start >= turn.end:
                break
            if end > turn.start and (author < 0 or messages[author].get("role") != "assistant"):
                whose = f"message {author + 1}" if author >= 0 else "the tools"
                inside = f"inside the answer of message {turn.message + 1}"
                raise _refusal(f"the chat template writes text of {whose} {inside}")


def _check_generation_marks(turns: Sequence[Turn], whole: Traced) -> None:
    """Where the template marks what is generated, typed text must be trained inside the marks and nowhere else."""
    if not whole.generation:
        return
    place = 0
    for length, origin, _ in whole.runs:
        a, b = place, place + length
        place = b
        if not length or origin <= 0:
            continue
        marked = any(start <= a and b <= end for start, end in whole.generation)
        found = any(turn.start <= a and b <= turn.end for turn in turns)
        if marked != found:
            raise _refusal(
                f"the chat template's generation marks {'hold' if marked else 'leave out'} {whole.text[a:b][:40]!r}, "
                f"which is {'not part' if marked else 'part'} of an assistant turn",
                "use another template, or correct its marks",
            )
