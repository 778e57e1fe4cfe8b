"""Where messages come from and answers go: a terminal, or a pipe; and the loop between them.

terminal    prompt-toolkit reads, answers are streamed to stdout, Ctrl-C stops one, an error is a line
pipe        a line of stdin is a message, answers are streamed to stdout, the first error ends it
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lorafit.chatting.commands import NAMES, Quit, is_command, run_command
from lorafit.chatting.session import Chat, Said
from lorafit.chatting.transcript import Transcript
from lorafit.console.exits import bug, explain
from lorafit.console.reporting import printable, result_console, say
from lorafit.console.wording import counted
from lorafit.contracts import Reporter
from lorafit.errors import DataError, LorafitError, StoppedBySignal, UsageError
from lorafit.files.cache import cache_folder, own_folder

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

_HISTORY = "chat-history"
_STDIN = "stdin"
_LOCAL_MODES = 3  # in what termios.tcgetattr gives


class Screen(ABC):
    """Reads messages and shows answers."""

    @abstractmethod
    def read(self, chat: Chat) -> str:
        """The next message or command. Raises EOFError where there is none."""

    @abstractmethod
    def say(self, text: str) -> None:
        """What a command says."""

    @abstractmethod
    def show(self, pieces: Generator[str, None, Said], chat: Chat) -> None:
        """An answer as it is written."""

    @abstractmethod
    def fail(self, error: LorafitError) -> None:
        """Why a message or command came to nothing; raises it where that is the end."""


def talk(chat: Chat, screen: Screen) -> None:
    """Reads and answers until the user leaves."""
    transcript = Transcript()
    while True:
        try:
            line, said = screen.read(chat), ""
            asked: str | None = line.removeprefix("/") if line.startswith("//") else line
            if is_command(line):
                said, asked = run_command(chat, transcript, line)
            if said:
                screen.say(said)
            if asked is not None and asked.strip():
                screen.show(chat.answer(asked), chat)
        except (EOFError, Quit):
            return
        except (StoppedBySignal, BrokenPipeError):
            raise
        except Exception as error:
            screen.fail(error if isinstance(error, LorafitError) else explain(error, "chat") or bug(error))


class Pipe(Screen):
    """Lines of stdin; answers go to stdout, a line each and more where they have them, and all else to stderr.

    Args:
        reporter: Gets what commands say.
        shows: Whether answers go to stdout: else only the result does.
    """

    def __init__(self, reporter: Reporter, *, shows: bool) -> None:
        self._reporter, self._shows, self._line = reporter, shows, 0

    def read(self, chat: Chat) -> str:
        """A line; the one behind a backslash belongs to it."""
        text = ""
        while True:
            self._line += 1
            try:
                line = sys.stdin.readline()
            except UnicodeDecodeError:
                todo = "write the messages in UTF-8"
                raise DataError("is no text in UTF-8", todo=todo) from None
            if not line and not text:
                raise EOFError
            text += line.rstrip("\r\n")
            if not line or not text.endswith("\\"):
                return text
            text = text[:-1] + "\n"

    def say(self, text: str) -> None:
        self._reporter.info(text)

    def show(self, pieces: Generator[str, None, Said], chat: Chat) -> None:
        for piece in pieces:
            if self._shows:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if self._shows:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if (why := _why_it_ended(chat.said[-1])) is not None:
            self._reporter.warn(f"line {self._line}: {why}")

    def fail(self, error: LorafitError) -> None:
        raise error.at(file=_STDIN, line=self._line)


class Terminal(Screen):
    """A terminal with lines that can be edited, a history of them, and answers that Ctrl-C stops.

    Args:
        speakers: Names that /adapter can be completed with.
        reporter: Told where the history cannot be kept.

    Raises:
        UsageError: prompt-toolkit is not installed.
    """

    def __init__(self, speakers: Sequence[str], reporter: Reporter) -> None:
        self._session = _open_session(speakers, reporter)
        self._console = result_console()
        self._may_interrupt = False

    @contextlib.contextmanager
    def _unseen_keys(self) -> Iterator[None]:
        """Within it what is typed does not show amid an answer; it is there in the next line.

        Keys are kept one by one and not as lines, since a kernel's line forgets a Ctrl-D that nobody reads.
        """
        try:
            before = termios.tcgetattr(sys.stdin)
        except (termios.error, OSError, ValueError):  # no terminal of this process: a test's
            yield
            return
        quiet = [*before]
        quiet[_LOCAL_MODES] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it Ctrl-C stops an answer, and a second one does not disturb that."""

        def interrupt(number: int, frame: Any) -> None:
            if self._may_interrupt:
                self._may_interrupt = False
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def read(self, chat: Chat) -> str:
        while True:
            try:
                return self._session.prompt([("bold", chat.speaker.name), ("", "> ")]).strip()
            except KeyboardInterrupt:
                self.say("Ctrl-D or /quit leaves")

    def say(self, text: str) -> None:
        say(self._console, text, "dim")

    def show(self, pieces: Generator[str, None, Said], chat: Chat) -> None:
        began, first, is_stopped, before = time.perf_counter(), 0.0, False, len(chat.said)
        self._may_interrupt = True
        try:
            with self._unseen_keys():
                for piece in pieces:
                    first = first or time.perf_counter() - began
                    self._console.file.write(printable(self._console, piece))
                    self._console.file.flush()
        except KeyboardInterrupt:
            is_stopped = True
        finally:
            self._may_interrupt = False
            pieces.close()
            if first or is_stopped:
                self._console.file.write("\n")
        if len(chat.said) == before:
            self.say("[stopped before it began: the message was taken back]")
            return
        said = chat.said[-1]
        notes = [_why_it_ended(said)]
        if not is_stopped:
            rate = f", {(said.tokens - 1) / max(said.seconds - first, 1e-6):.1f} tokens/s" if said.tokens > 1 else ""
            notes.insert(0, f"{counted(said.tokens, 'token')}{rate}, first after {first:.1f} s")
        self.say(f"[{'; '.join(filter(None, notes))}]")

    def fail(self, error: LorafitError) -> None:
        say(self._console, f"error: {error.one_line}", "red")


def _why_it_ended(said: Said) -> str | None:
    """What is to be known of an answer that the model did not end itself, or that is empty."""
    if not said.answer.strip():
        why = "stopped before the first word" if said.ended == "stopped" else "the model ended at once, without a word"
        return f"{why}: the message was taken back"
    if said.ended == "stopped":
        return "stopped; what was written stays, and carries no loss where it is saved; /undo takes it back"
    if said.ended == "length":
        return "cut at the longest answer or the model's last position: /max_new_tokens NUMBER and /retry, or /undo"
    return None


def _open_session(speakers: Sequence[str], reporter: Reporter) -> PromptSession[str]:
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    except ImportError:
        todo = 'install it with: pip install "lorafit[chat]", or pipe messages in'
        raise UsageError("prompt-toolkit is not installed, which a chat on a terminal needs", todo=todo) from None
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    words = [f"/{name}" for name in NAMES] + [f"/adapter {name}" for name in speakers]
    return PromptSession(
        history=_open_history(reporter),
        key_bindings=keys,
        multiline=True,
        prompt_continuation="… ",
        completer=WordCompleter(words, sentence=True),
        complete_while_typing=False,
    )


def _open_history(reporter: Reporter) -> History:
    """Messages of earlier chats, in a file of the cache that its user alone may read."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = cache_folder() / _HISTORY
    try:
        own_folder(file.parent)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
    except (OSError, LorafitError) as error:
        reporter.warn(f"messages are not remembered for the next chat: {error}")
        return InMemoryHistory()
    return FileHistory(str(file))


def greeting(chat: Chat) -> str:
    """What a chat begins with."""
    others = f"; also here: {', '.join(name for name in chat.names if name != chat.speaker.name)}"
    return f"{chat.speaker.name} answers{others if len(chat.names) > 1 else ''}. /help lists commands, Ctrl-D leaves"
