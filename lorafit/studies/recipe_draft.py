"""The text of a first recipe: what is known of its rows, and a comment at each line that may be changed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from lorafit import pipeline
from lorafit.console.wording import counted
from lorafit.contracts import JsonObject, Reporter, Silent
from lorafit.data.sources.source import ROWS_LOOKED_AT, Source
from lorafit.errors import ModelError
from lorafit.kinds.formats import formats
from lorafit.kinds.tasks import tasks
from lorafit.recipe.schema import SourceSection

_LONGEST_TOKENS, _TEXT_TOKENS = 2048, 512
_STEP_TOKENS = 32  # max_length is a multiple of it
_ROOM = 1.1  # rows to come may be longer than those at hand
_FEW_ROWS, _MANY_ROWS = 40, 200  # of fewer none is held out; from so many on a step has 16
_EPOCHS, _MOST_EPOCHS, _FEW_STEPS, _EVALUATIONS = 3, 10, 60, 6
_PLAIN, _MISREAD = re.compile(r"[A-Za-z][\w./-]*"), re.compile(r"(?i)y|n|yes|no|on|off|true|false|null")
_RATES = {"preference": 5e-5, "unpaired_preference": 5e-5}
"""Usual learning rates of LoRA, by the rows' format, where they differ from those of next tokens."""


@dataclass(frozen=True)
class Reading:
    """One way in which a file's rows can be read.

    Attributes:
        task: What they would teach.
        format: Name of the rows' format.
        columns: `{ours: theirs}`; empty where the names are known.
    """

    task: str
    format: str
    columns: Mapping[str, str]


def open_rows(data: Path, reading: Reading) -> Source:
    """The rows of a file, read so."""
    section = SourceSection(path=str(data), format=reading.format, columns=dict(reading.columns))
    return Source(section, Path(), Silent(), task=tasks.make(reading.task))


@dataclass(frozen=True)
class Draft:
    """What a recipe says, and how much is known of its rows.

    Attributes:
        base: Of `model.base`.
        splits: Files of held-out rows, by split.
        folder: The recipe's, which its paths start in.
        usual_rate: The adapter's learning rate, as a multiple of LoRA's.
        rows: How many rows there are to train on, about.
        longest: Tokens of the longest; None where no tokenizer could be asked.
        longest_characters: Of the first rows, where none could.
        unknown: Why none could.
        template: What `data.chat_template` must say; None: the tokenizer has one, or none is needed.
    """

    reading: Reading
    base: str
    adapter: str
    quantization: str
    data: Path
    splits: Mapping[str, Path]
    folder: Path
    usual_rate: float = 1.0
    rows: int = 0
    longest: int | None = None
    longest_characters: int = 0
    unknown: str = ""
    template: str | None = None

    def measured(self, reporter: Reporter) -> Draft:
        """The same with the number of rows and the longest of them, by the base's own tokenizer where that is here."""
        reason = ""
        for template in (None, "chatml"):
            draft = replace(self, template=template)
            try:
                seen = pipeline.preview(draft._values(), show=0, reporter=reporter).to_json()
            except ModelError as error:
                if Path(self.base).exists() or self.base.startswith((".", "/", "~")):  # no hub will ever have it
                    raise error.at(file=self.base) from None
                reason = reason or error.what
                if error.key != "data.chat_template":  # a base without a template of its own needs a name
                    break
                continue
            splits = seen["report"]["splits"]
            longest = max(split["longest_tokens"] for split in splits.values())
            return replace(draft, rows=splits["train"]["rows"], longest=longest)
        source = open_rows(self.data, self.reading)
        texts = (str(sample) for _, sample in islice(source.read(), ROWS_LOOKED_AT))
        characters = max(map(len, texts), default=0)
        return replace(self, rows=source.guess_rows(), longest_characters=characters, unknown=reason)

    def _values(self) -> JsonObject:
        """A recipe by which the rows' lengths can be looked at, its paths as they are here."""
        reading = {"format": self.reading.format, "columns": dict(self.reading.columns)}
        files = {"train": self.data, **self.splits}
        data: JsonObject = {name: [{"path": str(file.absolute()), **reading}] for name, file in files.items()}
        data |= {"chat_template": self.template, "max_length": _LONGEST_TOKENS, "overlength": self._overlength(True)}
        return {"name": "init", "task": self.reading.task, "model": {"base": self.base}, "data": data}

    def unread(self) -> list[str]:
        """Columns of the first rows that nothing reads."""
        source = open_rows(self.data, self.reading)
        for _ in islice(source.read(), ROWS_LOOKED_AT):
            pass
        return sorted(source.unread)

    def _overlength(self, is_longer: bool) -> str:
        """What becomes of rows that are longer than `max_length`, where some are."""
        if self._is_one_text:
            return "split"
        cuts = "data.overlength=truncate" not in tasks.get(self.reading.task).unread
        return ("truncate" if cuts else "drop") if is_longer else "error"

    @property
    def _is_one_text(self) -> bool:
        """Whether the file is one text and no row."""
        return self.reading.format == "text" and self.data.suffix.lower() == ".txt"

    def write(self, name: str) -> str:
        """The recipe with a comment at each line that somebody may want to change."""
        length, why = self._length()
        batch_size = 16 if self.rows >= _MANY_ROWS else 8
        an_epoch = math.ceil(self.rows / batch_size)
        epochs = max(_EPOCHS, min(_MOST_EPOCHS, math.ceil(_FEW_STEPS / an_epoch)))
        steps = an_epoch * epochs
        every = _said(f"  every_steps: {max(1, steps // _EVALUATIONS)}", "optimizer steps between looks at validation")
        rate = self.usual_rate * _RATES.get(str(tasks.get(self.reading.task).row_format), 2e-4)
        holds_out = "validation" in self.splits or self.rows >= _FEW_ROWS
        columns = f", columns: {{{', '.join(f'{a}: {_quoted(b)}' for a, b in self.reading.columns.items())}}}"
        lines = [
            f"# Written by `lorafit init {self.data}`. Every field: docs/recipe.md.",
            f"name: {_quoted(name)}",
            f"task: {self.reading.task}",
            "model:",
            f"  base: {_quoted(self._from_folder(self.base))}",
            _said(f"  quantization: {self.quantization}", "how the frozen weights are stored"),
            _said(f"adapter: {self.adapter}", f"{{kind: {self.adapter}, ...}} sets its options"),
            "data:",
            *self._sources(columns if self.reading.columns else ""),
            *self._chat_template(),
            _said(f"  max_length: {length}", why),
            _said(f"  overlength: {self._overlength(length >= _LONGEST_TOKENS)}", self._longer()),
            "training:",
            _said(f"  epochs: {epochs}", f"passes over {counted(self.rows, 'row')}: {counted(steps, 'step')}"),
            _said(f"  batch_size: {batch_size}", "rows an optimizer step: the number that decides the result"),
            _said(f"  learning_rate: {rate:.1e}", "bases below 1B take more, up to ten times"),
            "  schedule: {kind: cosine, warmup_ratio: 0.1}",
            *(["evaluation:", every] if holds_out else []),
            f"checkpoints: {{every_steps: {max(1, min(50, steps // 3))}, keep_last: 2}}",
            f"output: {_quoted(f'runs/{name}')}",
        ]
        return "\n".join(lines) + "\n"

    def _chat_template(self) -> list[str]:
        if self.template:
            return [_said(f"  chat_template: {self.template}", "the base has none of its own")]
        if formats.get(self.reading.format).verbatim and tasks.get(self.reading.task).row_format is None:
            return [_said("  # chat_template: chatml", "to ask in chats; as it stands rows are learnt verbatim")]
        return []

    def _longer(self) -> str:
        return "one text, cut into rows of max_length" if self._is_one_text else "rows that are longer"

    def _sources(self, columns: str) -> list[str]:
        """The lines of the splits."""

        def source(file: Path) -> str:
            path = _quoted(self._from_folder(str(file)))
            return f"[{{path: {path}{columns}}}]" if columns else path

        lines = [_said(f"  train: {source(self.data)}", f"read as {self.reading.format}")]
        if "validation" in self.splits:
            lines.append(f"  validation: {source(self.splits['validation'])}")
        elif self.rows >= _FEW_ROWS:
            lines.append(_said("  validation: {fraction: 0.1}", "of the rows above, drawn by the seed"))
        else:
            why = f"{counted(self.rows, 'row')}: too few to hold some of them out"
            lines.append(_said("  # validation: valid.jsonl", why))
        if "test" in self.splits:
            lines.append(_said(f"  test: {source(self.splits['test'])}", "looked at by `lorafit eval` alone"))
        else:
            lines.append(_said("  # test: test.jsonl", "rows that training never sees, for the final figures"))
        return lines

    def _length(self) -> tuple[int, str]:
        """`max_length` and where it comes from."""
        if self._is_one_text:
            return _TEXT_TOKENS, f"tokens; the text has {self.longest or 'more'}"
        if self.longest is not None:
            length = min(_LONGEST_TOKENS, math.ceil(_ROOM * self.longest / _STEP_TOKENS) * _STEP_TOKENS)
            cut = ", longer ones are cut" if self.longest >= _LONGEST_TOKENS else ""
            return length, f"tokens; the longest row has {self.longest:,}{cut}"
        length = min(_LONGEST_TOKENS, math.ceil(self.longest_characters / 2 / _STEP_TOKENS) * _STEP_TOKENS)
        return max(
            length, _STEP_TOKENS
        ), "tokens; a guess by characters, since the base could not be opened: see preview"

    def _from_folder(self, path: str) -> str:
        """A path as seen from the recipe's folder; what is none, such as a hub id, as it is."""
        return os.path.relpath(path, self.folder) if Path(path).exists() and not Path(path).is_absolute() else path


def _said(line: str, why: str) -> str:
    """A line and its comment, which stands in one column where that is wide enough."""
    return f"{line:<32}  # {why}"


def _quoted(text: str) -> str:
    """A text as YAML reads it back."""
    return text if _PLAIN.fullmatch(text) and not _MISREAD.fullmatch(text) else json.dumps(text, ensure_ascii=False)
