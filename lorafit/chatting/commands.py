"""What a line that begins with a slash does.

/temperature 0.7 ──> run_command ──> what is said of it, and the message that is to be answered, if any
//etc/hosts      ──> a message that begins with a slash
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorafit.chatting.session import SETTINGS, Chat
from lorafit.chatting.transcript import Transcript
from lorafit.console.nearest import did_you_mean
from lorafit.errors import UsageError

_HELP = {
    "adapter": ("NAME|base", "who answers from now on; the conversation stays"),
    "system": ("TEXT", "the system message; without a text the adapter's own again"),
    "undo": ("", "take the last message and its answer back"),
    "retry": ("", "answer the last message again"),
    "new": ("", "begin a new conversation"),
    "save": ("FILE.jsonl", "add the conversation to a file that lorafit train reads"),
    **dict.fromkeys(SETTINGS, ("NUMBER", "")),
    "help": ("", "this list"),
    "quit": ("", "leave; so does Ctrl-D"),
}
NAMES = tuple(_HELP)


class Quit(Exception):  # noqa: N818 - no fault
    """The user leaves."""


def is_command(line: str) -> bool:
    """Whether a line is one, and no message."""
    return line.startswith("/") and not line.startswith("//")


def run_command(chat: Chat, transcript: Transcript, line: str) -> tuple[str, str | None]:
    """Does what a line says.

    Returns:
        What to tell the user, and a message that is to be answered now.

    Raises:
        UsageError: There is no such command, or it cannot do what was asked.
        Quit: The user leaves.
    """
    typed, _, rest = line[1:].partition(" ")
    name, rest = typed.strip().lower().replace("-", "_"), rest.strip()
    if name not in _HELP:
        todo = f"{did_you_mean(name, NAMES).replace('did you mean ', 'did you mean /')}/help lists all"
        raise UsageError(f"no command is called /{typed[:40]}", todo=todo)
    if name == "quit":
        raise Quit
    if name == "retry":
        return _retry(chat)
    if name in SETTINGS:
        return _set(chat, name, rest), None
    does: dict[str, Callable[[], str]] = {
        "adapter": lambda: _adapter(chat, rest),
        "system": lambda: _system(chat, rest),
        "undo": lambda: f"taken back: {_shortened(chat.take_back())}",
        "new": lambda: _new(chat, transcript),
        "save": lambda: _save(chat, transcript, rest),
        "help": help_text,
    }
    return does[name](), None


def help_text() -> str:
    """All commands, and how lines are written."""
    lines = [f"  {_usage(name):<22} {does}".rstrip() for name, (_, does) in _HELP.items() if name not in SETTINGS]
    lines.insert(-2, f"  {', '.join('/' + name for name in SETTINGS)} NUMBER")
    keys = "Ctrl-C stops an answer. A line that ends in \\ goes on in the next one; so does Alt-Enter on a terminal."
    return "\n".join([*lines, f"{keys} A message that begins with a slash is written with two."])


def _usage(name: str) -> str:
    return f"/{name} {_HELP[name][0]}".rstrip()


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:60]}…"


def _adapter(chat: Chat, name: str) -> str:
    if name:
        chat.switch(name)
        return chat.speaker.habits or f"{chat.speaker.name} answers now"
    return ", ".join(f"{one} (answers now)" if one == chat.speaker.name else one for one in chat.names)


def _system(chat: Chat, text: str) -> str:
    chat.set_system(text or None)
    if text:
        return "set for the whole conversation"
    chats = chat.speaker.voice.chats
    own = None if chats is None else chats.system_prompt
    return "none" if own is None else f"{chat.speaker.name}'s own: {own}"


def _new(chat: Chat, transcript: Transcript) -> str:
    transcript.forget()
    chat.conversation.exchanges.clear()
    return "a new conversation; system message and settings stay"


def _set(chat: Chat, name: str, text: str) -> str:
    if text:
        try:
            chat.set(name, text)
        except UsageError as error:  # in the words of flags
            key = f"/{(error.key or name).removeprefix('--').replace('-', '_')}"
            raise UsageError(error.what, key=key, todo=(error.todo or "").replace("--", "/") or None) from None
    return f"{name} {getattr(chat.sampling, name):g}"


def _retry(chat: Chat) -> tuple[str, str | None]:
    kept = chat.conversation.exchanges[-1:]
    asked = chat.take_back()
    if chat.would_repeat(asked):
        chat.conversation.exchanges += kept
        return "the answer would be the same one: it is chosen greedily; draw another with /temperature 0.7", None
    return "", asked


def _save(chat: Chat, transcript: Transcript, name: str) -> str:
    if not name:
        raise UsageError("needs the name of a file", key="/save", todo="e.g. /save talk.jsonl")
    rows = chat.rows()
    if chat.conversation.exchanges and not rows:
        only = "the only answer was" if len(chat.conversation.exchanges) == 1 else "every answer was"
        what = f"{only} stopped or cut, and is none to train on"
        raise UsageError(what, key="/save", todo="/retry, or write another message")
    return transcript.save(Path(name).expanduser(), rows)
