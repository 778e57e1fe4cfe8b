"""Messages from a terminal's keys and from a pipe, answers as they are written, and what interrupts them."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from lorafit.chatting.screens import Pipe, Terminal, talk
from lorafit.chatting.session import Chat
from lorafit.errors import LorafitError, UsageError
from tests.support.tiny_data import Listener
from tests.unit.chatting.conftest import MakeChat

UP, ALT_ENTER, CTRL_C, CTRL_D = "\x1b[A", "\x1b\r", "\x03", "\x04"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextlib.contextmanager
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


def type_in(chat: Chat, *keys: str) -> Terminal:
    """A whole chat on a terminal, all keys pressed before it begins, the last of them Ctrl-D."""
    with keyboard() as pressed:
        terminal = Terminal(chat.names, Listener())
        pressed.send_text("".join(keys) + CTRL_D)
        with terminal.interruptible():
            talk(chat, terminal)
    return terminal


def asked(chat: Chat) -> list[str]:
    return [said.asked for said in chat.said]


def test_lines_are_answered_as_they_are_typed(make_chat: MakeChat, capsys: pytest.CaptureFixture[str]) -> None:
    chat = make_chat()
    type_in(chat, "what?\r", "/adapter code\r", f"one{ALT_ENTER}two\\\rthree\r", "//etc\r", "  \r")
    assert asked(chat) == ["what?", "one\ntwo\nthree", "/etc"]
    shown = capsys.readouterr().out
    printed = [said.answer for said in chat.said if said.answer.isprintable()]
    assert [answer for answer in printed if answer not in shown] == []
    assert "code answers now" in shown and "tokens" in shown


def test_a_slip_and_a_ctrl_c_between_messages_end_nothing(
    make_chat: MakeChat, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = make_chat()
    type_in(chat, "/adaptor x\r", f"half a mess{CTRL_C}", "why?\r")
    assert asked(chat) == ["why?"]
    shown = capsys.readouterr().out
    assert "error: no command is called /adaptor; did you mean /adapter?" in shown
    assert "Ctrl-D or /quit leaves" in shown


def test_messages_are_remembered_for_the_next_chat_and_nobody_else(make_chat: MakeChat, cache: Path) -> None:
    type_in(make_chat(), "what?\r")
    assert (cache / "chat-history").stat().st_mode & 0o777 == 0o600
    (cache / "chat-history").chmod(0o644)
    again = make_chat()
    type_in(again, f"{UP}\r")
    assert asked(again) == ["what?"]
    assert (cache / "chat-history").stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_kept_is_told(make_chat: MakeChat, cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (cache / "chat-history").symlink_to(tmp_path / "elsewhere")
    with keyboard():
        listener = Listener()
        Terminal(["law"], listener)
    assert any("messages are not remembered" in said for said in listener.warnings)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("typed", "completed"), [("/ada", "/adapter"), ("/adapter co", "/adapter code"), ("why", None)]
)
def test_tab_completes_commands_and_adapters(typed: str, completed: str | None) -> None:
    with keyboard():
        completer: Any = Terminal(["law", "code"], Listener())._session.completer
    found = [one.text for one in completer.get_completions(Document(typed), CompleteEvent())]
    assert (completed in found) if completed else found == []


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_stops_the_answer_and_not_the_chat(
    make_chat: MakeChat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, presses: int
) -> None:
    chat = make_chat(max_new_tokens=120, min_new_tokens=120)
    written, stream = list[str](), chat._engine.stream

    def interrupted(request: Any) -> Any:
        answer = stream(request)
        try:
            for number, piece in enumerate(answer):
                written.append(piece)
                yield piece
                if number == 2:
                    os.kill(os.getpid(), signal.SIGINT)
        finally:
            for _ in range(presses - 1):
                os.kill(os.getpid(), signal.SIGINT)
            answer.close()
        return None

    monkeypatch.setattr(chat._engine, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with keyboard() as keys:
        terminal = Terminal(chat.names, Listener())
        keys.send_text(f"what?\r/undo\r{CTRL_D}")
        with terminal.interruptible():
            talk(chat, terminal)
    assert signal.getsignal(signal.SIGINT) is before
    assert [(said.ended, said.answer) for said in chat.said] == [("stopped", "".join(written))]
    assert len(written) == 3
    shown = capsys.readouterr().out
    assert "stopped; what was written stays, and carries no loss where it is saved" in shown
    assert "taken back: what?" in shown


def test_without_prompt_toolkit_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    with pytest.raises(UsageError, match=r'pip install "lorafit\[chat\]", or pipe messages in'):
        Terminal(["law"], Listener())


def pipe_in(chat: Chat, monkeypatch: pytest.MonkeyPatch, text: str, *, shows: bool = True) -> Listener:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    listener = Listener()
    talk(chat, Pipe(listener, shows=shows))
    return listener


def test_a_pipe_is_answered_line_by_line(
    make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = make_chat()
    listener = pipe_in(chat, monkeypatch, "what?\n\n/adapter code\none\\\ntwo")
    assert asked(chat) == ["what?", "one\ntwo"]
    assert capsys.readouterr().out == "".join(f"{said.answer}\n" for said in chat.said)
    assert "code answers now" in listener.infos
    pipe_in(chat, monkeypatch, "when?\n/quit\nnever\n", shows=False)
    assert asked(chat)[2:] == ["when?"] and capsys.readouterr().out == ""


def test_the_first_error_ends_a_pipe_with_its_line(make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make_chat()
    with pytest.raises(LorafitError) as error:
        pipe_in(chat, monkeypatch, "what?\n/adapter cod\nwhen?\n")
    assert error.value.one_line.startswith("stdin:2: /adapter: no adapter is called 'cod'; did you mean code?")
    assert asked(chat) == ["what?"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(LorafitError, match="stdin:1: is no text in UTF-8"):
        talk(chat, Pipe(Listener(), shows=True))


def test_a_cut_answer_is_told_with_its_line(make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = pipe_in(make_chat(max_new_tokens=3, min_new_tokens=3), monkeypatch, "what?\n")
    assert listener.warnings == [
        "line 1: cut at the longest answer or the model's last position: /max_new_tokens NUMBER and /retry, or /undo"
    ]
