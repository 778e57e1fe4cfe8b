"""A chat template in Go's language, as Ollama's Modelfile takes it, learnt from how the Jinja template renders.

    start, of chats with a system message or without ── {front of role ── content ── back of role}... ── answer's header

Templates of that form are recognised by what they write between the messages of a few chats, whatever they are called;
every other one is refused. What is written here is read back by `render`, an evaluator of no more than that, and
compared with the Jinja template's own rendering of 20 chats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from lorafit.errors import ModelError

Chat = Sequence[Mapping[str, str]]
Render = Callable[[Chat], str]
_TODO = "use --to gguf with llama.cpp, which runs the Jinja template itself"
_CODES = {"s": "system", "u": "user", "a": "assistant"}
_MARKS = re.compile(r"zq(\d+)qz")
_PIECE = re.compile(r"{{ (.*?) }}(?={{ |$)", re.DOTALL)


@dataclass(frozen=True)
class TurnTemplate:
    """What a chat template writes around contents.

    Attributes:
        start: Before a first message that is none of the system's.
        system_start: Before one that is; None where the template refuses system messages.
        fronts: Before a role's content.
        backs: Behind it.
        answer: Header of the answer.
    """

    start: str
    system_start: str | None
    fronts: Mapping[str, str]
    backs: Mapping[str, str]
    answer: str

    @classmethod
    def learn(cls, render: Render) -> TurnTemplate:
        """Raises ModelError where the template has another form."""
        asked = _gaps(render, "u")
        talk, between = _gaps(render, "uauau"), _gaps(render, "uu")
        if asked is None or talk is None or talk[1] != talk[3] or talk[2] != talk[4] or talk[-1] != asked[-1]:
            raise ModelError("the chat template writes turns differently from place to place", todo=_TODO)
        start, to_answer, to_user, end = talk[0], talk[1], talk[2], talk[-1]
        system, later = _gaps(render, "su"), _gaps(render, "usu")
        ways = [start, to_user, *([between[1]] if between else []), *([system[1]] if system else [])]
        front = _common_end(ways)
        if between is not None:
            back = between[1].removesuffix(front)
        else:
            back = _common_start([to_answer, end])
        if not (to_answer.startswith(back) and end.startswith(back)):
            raise ModelError("the chat template closes a turn of the user in two ways", todo=_TODO)
        system_front = later[1].removeprefix(back) if later and later[1].startswith(back) else ""
        system_start = None
        if system is not None:
            system_front = system_front if system[0].endswith(system_front) else ""
            system_start = system[0].removesuffix(system_front) if system_front else system[0]
        return cls(
            start.removesuffix(front) if front else start,
            system_start,
            {"system": system_front, "user": front, "assistant": to_answer.removeprefix(back)},
            {
                "system": _without_end(system[1], front) if system else "",
                "user": back,
                "assistant": _without_end(to_user, front),
            },
            end.removeprefix(back),
        )

    def write(self) -> str:
        """Go's text, on one line: every literal stands in quotes, so that no blank is anybody's to trim."""
        parts = ["{{ range $i, $m := .Messages }}"]
        if self.system_start in (None, self.start):
            parts += ["{{ if eq $i 0 }}", _literal(self.start), "{{ end }}"] if self.start else []
        else:
            parts += ['{{ if eq $i 0 }}{{ if eq .Role "system" }}', _literal(str(self.system_start))]
            parts += ["{{ else }}", _literal(self.start), "{{ end }}{{ end }}"]
        for role, front in self.fronts.items():
            if role != "system" or self.system_start is not None:
                parts.append(f'{{{{ if eq .Role "{role}" }}}}')
                parts += [_literal(front), "{{ .Content }}", _literal(self.backs[role]), "{{ end }}"]
        parts += ["{{ end }}", _literal(self.answer)]
        return "".join(parts)


def translate(render: Render, chats: Sequence[Chat]) -> tuple[str, list[str]]:
    """The template in Go, and what it cannot do.

    Args:
        render: The Jinja template, with the header of an answer behind the chat.
        chats: What both are compared on. Those that the Jinja template refuses are nobody's.

    Raises:
        ModelError: It has another form, or renders a chat differently.
    """
    learnt = TurnTemplate.learn(render)
    text, notes, unlike, told = learnt.write(), [], [], [chat for chat in chats if _attempt(render, chat) is not None]
    for chat in told:
        if learnt.system_start is None and chat[0]["role"] == "system":
            continue
        if render_go(text, chat) != render(chat):
            unlike.append(chat)
    if unlike:
        what = f"a Modelfile's template writes {len(unlike)} of {len(told)} chats otherwise than the trained one"
        raise ModelError(what, key="chat_template", todo=_TODO)
    blank: Chat = [{"role": "user", "content": " q \n"}]
    if render_go(text, blank) != _attempt(render, blank):
        notes.append("the trained template trims contents and Ollama's cannot: send them without blanks at their ends")
    if learnt.system_start is None:
        notes.append("the trained template takes no system message: Ollama will leave one out")
    return text, notes


def _attempt(render: Render, chat: Chat) -> str | None:
    from jinja2.exceptions import TemplateError

    try:
        return render(chat)
    except TemplateError:
        return None


def _gaps(render: Render, roles: str) -> list[str] | None:
    """What the template writes before, between and behind the contents of a chat; None where it refuses the chat or
    does not write each content once, in order."""
    text = _attempt(render, [{"role": _CODES[code], "content": f"zq{place}qz"} for place, code in enumerate(roles)])
    if text is None or _MARKS.findall(text) != [str(place) for place in range(len(roles))]:
        return None
    return _MARKS.split(text)[::2]


def _common_end(texts: Sequence[str]) -> str:
    return _common_start([text[::-1] for text in texts])[::-1]


def _common_start(texts: Sequence[str]) -> str:
    alike = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(characters[0] for characters in alike)


def _without_end(text: str, end: str) -> str:
    return text[: len(text) - len(end)]


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def render_go(template: str, chat: Chat) -> str:
    """What Go's text/template makes of a template that `write` gave.

    Raises:
        ValueError: It holds an action that is none of those.
    """
    actions = _PIECE.findall(template)
    if "".join(f"{{{{ {action} }}}}" for action in actions) != template:
        raise ValueError("text stands outside of actions")
    return "".join(_run(iter(actions), chat, -1))


def _run(actions: Iterator[str], chat: Chat, place: int) -> Iterator[str]:
    """The output of actions up to the end of their block."""
    for action in actions:
        if action == "end":
            return
        if action.startswith('"'):
            yield json.loads(action)
        elif action == ".Content":
            yield chat[place]["content"]
        elif action.startswith("range"):
            body = _block(actions)
            for number in range(len(chat)):
                yield from _run(iter([*body, "end"]), chat, number)
        elif action.startswith("if "):
            body = _block(actions)
            split = _else_of(body)
            holds = _holds(action.removeprefix("if "), chat, place)
            chosen = body[:split] if holds else body[split + 1 :]
            yield from _run(iter([*chosen, "end"]), chat, place)
        else:
            raise ValueError(f"no action of ours: {action}")


def _block(actions: Iterator[str]) -> list[str]:
    """The actions up to the `end` of the block that was opened."""
    body, depth = [], 1
    for action in actions:
        depth += action.startswith(("if ", "range ")) - (action == "end")
        if depth == 0:
            break
        body.append(action)
    return body


def _else_of(body: Sequence[str]) -> int:
    depth = 0
    for place, action in enumerate(body):
        depth += action.startswith(("if ", "range ")) - (action == "end")
        if action == "else" and depth == 0:
            return place
    return len(body)


def _holds(condition: str, chat: Chat, place: int) -> bool:
    if condition == "eq $i 0":
        return place == 0
    if match := re.fullmatch(r'eq \.Role "(\w+)"', condition):
        return chat[place]["role"] == match[1]
    raise ValueError(f"no condition of ours: {condition}")
