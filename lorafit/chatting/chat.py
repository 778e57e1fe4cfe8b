"""`lorafit chat`: a base with its adapters, talked with on a terminal or through a pipe.

RUN --adapter law=DIR ──open──> speakers over one Engine ──Chat──> Terminal or Pipe
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lorafit.console.arguments import check_arguments, check_search, read_adapters
from lorafit.console.reporting import Printed
from lorafit.contracts import JsonObject, Reporter, Silent
from lorafit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.answering.engine import Engine
    from lorafit.answering.several import Opened
    from lorafit.chatting.session import Said, Speaker


@dataclass(frozen=True)
class Chatted(Printed):
    """What was said, once the user has left.

    Attributes:
        said: Every answer, also those that were taken back.
        rows: The conversation as it stood at the end, in the form that training reads.
    """

    said: Sequence[Said]
    rows: Sequence[JsonObject]

    def to_json(self) -> JsonObject:
        """Plain values."""
        return {"answers": [asdict(one) for one in self.said], "rows": list(self.rows)}

    def render(self, console: Console) -> None:
        """Nothing: it was shown while it was written."""


def chat(
    run: str | os.PathLike[str],
    *,
    adapters: Sequence[str] | Mapping[str, str | os.PathLike[str]] = (),
    system: str | None = None,
    checkpoint: str | None = None,
    base_model: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    no_repeat_ngram_size: int = 0,
    seed: int = 0,
    shows: bool = True,
    reporter: Reporter | None = None,
) -> Chatted:
    """Reads messages from a terminal, or from a pipe's lines, and answers each; `shows`: as it is written."""
    ways: JsonObject = {"temperature": float(temperature), "top_p": top_p, "seed": seed}
    ways |= {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    ways["no_repeat_ngram_size"] = no_repeat_ngram_size
    check_arguments(ways)
    check_search({**ways, "num_beams": 1, "length_penalty": 1.0})
    given = read_adapters(adapters)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal and not shows:
        raise UsageError("a chat on a terminal prints no JSON", key="--json", todo="pipe messages in, or use /save")
    reporter = reporter or Silent()
    from lorafit.answering.sampling import Sampling
    from lorafit.answering.several import BASE, open_several
    from lorafit.chatting.screens import Pipe, Terminal, greeting, talk
    from lorafit.chatting.session import Chat

    opened = open_several(os.fspath(run), given, checkpoint, base_model, reporter)
    if BASE in opened.adapters:
        todo = "give it another name: lorafit chat BASE --adapter NAME=DIR"
        raise UsageError(f"'{BASE}' is what the model without any adapter is called", key="--adapter", todo=todo)
    terminal = Terminal([*opened.adapters, BASE], reporter) if on_terminal else None
    engine, speakers = _load(opened, reporter)
    chatting = Chat(engine, speakers, next(iter(speakers)), Sampling(**ways))
    if system:
        chatting.set_system(system)
    for line in (greeting(chatting), chatting.speaker.habits):
        if line:
            reporter.info(line)
    if terminal is None:
        talk(chatting, Pipe(reporter, shows=shows))
    else:
        with terminal.interruptible():
            talk(chatting, terminal)
    return Chatted(chatting.said, chatting.rows())


def _load(opened: Opened, reporter: Reporter) -> tuple[Engine, dict[str, Speaker]]:
    """The base with every adapter, and who can answer, by name: the base comes last."""
    from lorafit.answering.several import BASE, check_vocabulary
    from lorafit.chatting.session import Speaker

    engine, speakers = opened.first.load_base(), dict[str, Speaker]()
    for name, answerer in opened.adapters.items():
        assert answerer.folder is not None, "whole models are refused"
        check_vocabulary(answerer.voice.tokenizer, engine.tokenizer, str(answerer.folder))
        engine.add_adapter(name, answerer.folder, reporter)
        speakers[name] = Speaker(name, name, answerer.voice)
    return engine, {**speakers, BASE: Speaker(BASE, None, opened.voice)}
