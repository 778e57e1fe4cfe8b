"""A chat template in Go's language, as Ollama's Modelfile takes it, learnt from how the Jinja template renders.

    start, of chats with a system message or without ── {front of role ── content ── back of role}... ── answer's header

Beside this, the system message may stand in the first or the last question, and the reasoning of earlier answers may be
left out. Templates of these forms are recognised by what they write between the messages of a few chats, whatever they
are called; every other one is refused. What is written here is read back by `render_go`, an evaluator of no more than
that, and compared with the Jinja template's own rendering of 20 chats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from lorafit.errors import ModelError

Chat = Sequence[Mapping[str, str]]
Render = Callable[[Chat], str]
_TODO = "use --to gguf with llama.cpp, which runs the Jinja template itself"
_CODES = {"s": "system", "u": "user", "a": "assistant"}
_MARKS = re.compile(r"zq(\d+)qz")
_PIECE = re.compile(r'{{ ("(?:[^"\\]|\\.)*"|(?:(?!}}).)*?) }}', re.DOTALL)
_REASONING = re.compile(r"^\s*<think>\n?(.*?)\n?</think>\n*(.*)$", re.DOTALL)
_IS_LAST = "(eq (len (slice $.Messages $i)) 1)"
_SHOWN = 60


@dataclass(frozen=True)
class Inside:
    """A system message that stands in a question of the user's.

    Attributes:
        where: Go's condition of that question.
        front: Before it.
        back: Behind it.
    """

    where: str
    front: str
    back: str


@dataclass(frozen=True)
class Reasoning:
    """What is written of an answer's reasoning, which earlier answers leave out.

    Attributes:
        instead: What earlier answers have in its place.
        front: Before it.
        back: Behind it.
        in_last: Whether an answer that ends the chat has it.
    """

    instead: str

    front: str
    back: str
    in_last: bool


@dataclass(frozen=True)
class TurnTemplate:
    """What a chat template writes around contents.

    Attributes:
        start: Before a first message that is none of the system's.
        system_start: Before one that is; None where the template refuses system messages.
        fronts: Before a role's content.
        backs: Behind it.
        answer: Header of the answer.
        inside: Where the system message is no turn of its own.
        reasoning: Where that of earlier answers is left out.
    """

    start: str
    system_start: str | None
    fronts: Mapping[str, str]
    backs: Mapping[str, str]
    answer: str
    inside: Inside | None = None
    reasoning: Reasoning | None = None

    @classmethod
    def learn(cls, render: Render) -> TurnTemplate:
        """With the system message as a turn, or none. Raises ModelError where the template has another form."""
        asked = _gaps(render, "u")
        talk, between = _gaps(render, "uauau"), _gaps(render, "uu")
        if asked is None or talk is None or talk[1] != talk[3] or talk[2] != talk[4] or talk[-1] != asked[-1]:
            raise ModelError("the chat template writes turns differently from place to place", todo=_TODO)
        start, to_answer, to_user, end = talk[0], talk[1], talk[2], talk[-1]
        system, later = _gaps(render, "su"), _gaps(render, "usu")
        own = system if system is not None and system[-1] == end else None
        ways = [start, to_user, *([between[1]] if between else []), *([own[1]] if own else [])]
        front = _common_end(ways)
        if between is not None:
            back = between[1].removesuffix(front)
        else:
            back = _common_start([to_answer, end])
        if not (to_answer.startswith(back) and end.startswith(back)):
            raise ModelError("the chat template closes a turn of the user in two ways", todo=_TODO)
        system_front = later[1].removeprefix(back) if later and later[1].startswith(back) else ""
        system_start = None
        if own is not None:
            system_front = system_front if own[0].endswith(system_front) else ""
            system_start = own[0].removesuffix(system_front) if system_front else own[0]
        return cls(
            start.removesuffix(front) if front else start,
            system_start,
            {"system": system_front, "user": front, "assistant": to_answer.removeprefix(back)},
            {
                "system": _without_end(own[1], front) if own else "",
                "user": back,
                "assistant": _without_end(to_user, front),
            },
            end.removeprefix(back),
            reasoning=_learn_reasoning(render, to_answer),
        )

    @classmethod
    def learn_turns(cls, render: Render) -> list[TurnTemplate]:
        """The one whose system message is a turn, or is none."""
        return [cls.learn(render)]

    @classmethod
    def learn_inside(cls, render: Render) -> list[TurnTemplate]:
        """Those whose system message stands in the first question, or in the last one."""
        learnt, found = cls.learn(lambda chat: _refuse_system(render, chat)), []
        for where, order in (("(eq $i 1)", "0123"), (_IS_LAST, "1203")):
            gaps, place = _gaps(render, "suau", order), order.index("0")
            usual = learnt.start if place == 0 else learnt.backs["assistant"]
            front = usual + learnt.fronts["user"]
            if gaps is not None and gaps[place].startswith(front):
                inside = Inside(where, gaps[place].removeprefix(front), gaps[place + 1])
                found.append(replace(learnt, inside=inside, system_start=learnt.start))
        return found

    def write(self) -> str:
        """Go's text, on one line: every literal stands in quotes, so that no blank is anybody's to trim."""
        parts = ["{{ range $i, $m := .Messages }}"]
        if self.system_start in (None, self.start):
            parts += ["{{ if eq $i 0 }}", _literal(self.start), "{{ end }}"] if self.start else []
        else:
            parts += ['{{ if eq $i 0 }}{{ if eq .Role "system" }}', _literal(str(self.system_start))]
            parts += ["{{ else }}", _literal(self.start), "{{ end }}{{ end }}"]
        for role, front in self.fronts.items():
            if role != "system" or (self.system_start is not None and self.inside is None):
                parts.append(f'{{{{ if eq .Role "{role}" }}}}')
                parts += [_literal(front), *self._before(role), "{{ .Content }}", _literal(self.backs[role])]
                parts.append("{{ end }}")
        parts += ["{{ end }}", _literal(self.answer)]
        return "".join(parts)

    def _before(self, role: str) -> Iterator[str]:
        """What stands between a role's front and the content."""
        if role == "user" and (inside := self.inside) is not None:
            yield f"{{{{ if and $.System {inside.where} }}}}"
            yield from (_literal(inside.front), "{{ $.System }}", _literal(inside.back), "{{ end }}")
        if role == "assistant" and (own := self.reasoning) is not None:
            yield f"{{{{ if .Thinking }}}}{{{{ if {_IS_LAST[1:-1] if own.in_last else 'false'} }}}}"
            # as text and not in quotes: Ollama looks for both tags as text around .Thinking
            yield f"{own.front}{{{{ .Thinking }}}}{own.back}{{{{ else }}}}"
            yield from (_literal(own.instead), "{{ end }}{{ end }}")


def translate(render: Render, chats: Sequence[Chat]) -> tuple[str, list[str]]:
    """The template in Go, and what it cannot do.

    Args:
        render: The Jinja template, with the header of an answer behind the chat.
        chats: What both are compared on. Those that the Jinja template refuses are nobody's.

    Raises:
        ModelError: It has another form, or renders a chat differently.
    """
    told = [chat for chat in chats if _attempt(render, chat) is not None]
    tried = [(learnt, _unlike(learnt, render, told)) for learnt in _candidates(render)]
    learnt, unlike = min(tried, key=lambda one: len(one[1]))
    if unlike:
        first = " | ".join(f"{turn['role']}: {turn['content']}" for turn in unlike[0])
        what = f"a Modelfile's template writes {len(unlike)} of {len(told)} chats otherwise than the trained one"
        what += f", first {json.dumps(first[:_SHOWN], ensure_ascii=False)}"
        raise ModelError(what, key="chat_template", todo=_TODO)
    text, notes = learnt.write(), []
    blank: Chat = [{"role": _CODES[code], "content": " q \n"} for code in "uau"]
    if render_go(text, blank) != _attempt(render, blank):
        notes.append("the trained template trims contents and Ollama's cannot: send them without blanks at their ends")
    if learnt.system_start is None:
        notes.append("the trained template takes no system message: Ollama will leave one out")
    if learnt.reasoning is not None:
        what = "the reasoning of earlier answers is left out, as in training, where it is a message's `thinking`"
        notes.append(f"{what} (Ollama 0.9 or later); what a client sends as content stays")
    return text, notes


def _candidates(render: Render) -> list[TurnTemplate]:
    """Raises ModelError where there is none."""
    found, why = list[TurnTemplate](), list[ModelError]()
    for learn in (TurnTemplate.learn_turns, TurnTemplate.learn_inside):
        try:
            found += learn(render)
        except ModelError as error:
            why.append(error)
    if not found:
        raise why[0]
    return found


def _unlike(learnt: TurnTemplate, render: Render, told: Sequence[Chat]) -> list[Chat]:
    """The chats that it writes otherwise."""
    text = learnt.write()
    asked = [chat for chat in told if learnt.system_start is not None or chat[0]["role"] != "system"]
    more = [_REASONED] if learnt.reasoning is not None and learnt.reasoning.in_last else []
    heard = [(chat, chat if learnt.reasoning is None else [*map(_with_thinking, chat)]) for chat in (*asked, *more)]
    return [chat for chat, theirs in heard if render_go(text, theirs) != render(chat)]


_REASONED: Chat = (
    {"role": "user", "content": "zq0qz"},
    {"role": "assistant", "content": "<think>\nzq1qz\n</think>\n\nzq2qz"},
)


def _learn_reasoning(render: Render, to_answer: str) -> Reasoning | None:
    """How an answer's reasoning is written; None where earlier answers keep it."""
    earlier, last = (_attempt(render, chat) for chat in ([*_REASONED, _REASONED[0]], _REASONED))
    if earlier is None or last is None or _MARKS.findall(earlier) != ["0", "2", "0"]:
        return None
    instead, gaps = _MARKS.split(earlier)[2].removeprefix(to_answer), _MARKS.split(last)[::2]
    if _MARKS.findall(last) == ["0", "1", "2"] and gaps[1].startswith(to_answer):
        return Reasoning(instead, gaps[1].removeprefix(to_answer), gaps[2], in_last=True)
    return Reasoning(instead, "<think>\n", "\n</think>\n\n", in_last=False)


def _with_thinking(turn: Mapping[str, str]) -> Mapping[str, str]:
    """A message as Ollama has it, reasoning apart."""
    match = _REASONING.match(turn["content"]) if turn["role"] == "assistant" else None
    return {**turn, "thinking": match[1], "content": match[2]} if match else turn


def _refuse_system(render: Render, chat: Chat) -> str:
    from jinja2.exceptions import TemplateError

    if any(turn["role"] == "system" for turn in chat):
        raise TemplateError("not looked at")
    return render(chat)


def _attempt(render: Render, chat: Chat) -> str | None:
    from jinja2.exceptions import TemplateError

    try:
        return render(chat)
    except TemplateError:
        return None


def _gaps(render: Render, roles: str, order: str = "") -> list[str] | None:
    """What the template writes before, between and behind the contents of a chat; None where it refuses the chat or
    does not write each content once, in order, or in the order that is named."""
    text = _attempt(render, [{"role": _CODES[code], "content": f"zq{place}qz"} for place, code in enumerate(roles)])
    if text is None or _MARKS.findall(text) != list(order or "0123456789"[: len(roles)]):
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
    pieces = _PIECE.split(template)
    actions = [("" if number % 2 else "text ") + piece for number, piece in enumerate(pieces) if number % 2 or piece]
    return "".join(_run(iter(actions), chat, -1))


def _run(actions: Iterator[str], chat: Chat, place: int) -> Iterator[str]:
    """The output of actions up to the end of their block."""
    for action in actions:
        if action == "end":
            return
        if action.startswith("text "):
            yield action.removeprefix("text ")
        elif action.startswith('"'):
            yield json.loads(action)
        elif action == "$.System":
            yield _system(chat)
        elif action in (".Content", ".Thinking"):
            yield chat[place].get(action[1:].lower(), "")
        elif action == "range $i, $m := .Messages":
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


def _system(chat: Chat) -> str:
    """`$.System` as Ollama fills it."""
    return "\n\n".join(turn["content"] for turn in chat if turn["role"] == "system")


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
    if match := re.fullmatch(r"and (\S+) (\(.*\))", condition):
        return _holds(match[1], chat, place) and _holds(match[2][1:-1], chat, place)
    if match := re.fullmatch(r"eq \$i (\d)", condition):
        return place == int(match[1])
    if match := re.fullmatch(r'eq \.Role "(\w+)"', condition):
        return chat[place]["role"] == match[1]
    known = {
        "false": False,
        "$.System": bool(_system(chat)),
        ".Thinking": bool(chat[place].get("thinking")),
        _IS_LAST[1:-1]: place == len(chat) - 1,
    }
    if condition not in known:
        raise ValueError(f"no condition of ours: {condition}")
    return known[condition]
