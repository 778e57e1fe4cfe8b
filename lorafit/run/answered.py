"""What `lorafit generate` and `lorafit classify` give back: a model's answers, or its labels, a row each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.reporting import Printed, say
from lorafit.contracts import JsonObject, Sample
from lorafit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.answering.generate import Answer


@dataclass(frozen=True)
class Generated(Printed):
    """Answers to prompts, with the base model's beside them where asked; or to verbatim texts, which are no chats."""

    prompts: Sequence[Sample]
    answers: Sequence[Answer]
    base_answers: Sequence[Answer] | None
    are_chats: bool = True

    @property
    def texts(self) -> list[str]:
        """The answers' texts, in the prompts' order."""
        return [answer.text for answer in self.answers]

    def to_json(self) -> JsonObject:
        """An entry a prompt, in order."""
        rows = []
        for number, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            row: JsonObject = {"file": prompt.file, "line": prompt.line} if prompt.line else {}
            row |= {"messages": list(prompt.turns)} if self.are_chats else {"prompt": prompt.turns[-1]["content"]}
            if prompt.pictures:
                row["images"] = _names(prompt)
            if prompt.tools:
                row["tools"] = list(prompt.tools)
            row |= {"answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}
            if self.base_answers is not None:
                row["base_answer"] = self.base_answers[number].text
            rows.append(row)
        return {"answers": rows}

    def render(self, console: Console) -> None:
        """The answers, each behind its prompt; that of a command line is repeated only where two models answer."""
        is_plain = len(self.prompts) == 1 and not self.prompts[0].line and self.base_answers is None
        for number, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            if is_plain:
                say(console, answer.text)
                continue
            asked = _say_last_turn(prompt)
            say(console, f"{'' if number == 0 else chr(10)}> {asked}", "bold")
            if self.base_answers is not None:
                say(console, f"base:  {self.base_answers[number].text}")
                say(console, f"tuned: {answer.text}", "green")
            else:
                say(console, answer.text)


def _names(prompt: Sample) -> list[str]:
    """The files of a prompt's images, in order; of one that the row holds without a name, where in the row."""
    return [one.path or one.key for one in prompt.pictures]


def _say_last_turn(prompt: Sample) -> str:
    """What a prompt asks last, as text; each image as its file."""
    content = prompt.turns[-1]["content"]
    if not isinstance(content, list):
        return str(content)
    images = sum("text" not in part for part in content)
    names = iter(_names(prompt)[len(prompt.pictures) - images :])
    return "".join(str(part["text"]) if "text" in part else f"[image: {next(names)}]" for part in content)


@dataclass(frozen=True)
class Classified(Printed):
    """Texts with their labels and the probabilities of all."""

    texts: Sequence[Sample]
    found: Sequence[JsonObject]

    @property
    def labels(self) -> list[list[str]]:
        """Labels of each text, in order; several or none where a text may have so."""
        return [list(row.get("labels", ())) for row in self.found]

    @property
    def values(self) -> list[dict[str, float]]:
        """Numbers of each text by name, in order, of a task that predicts numbers; else empty."""
        return [dict(row.get("values", {})) for row in self.found]

    def to_json(self) -> JsonObject:
        """An entry a text, in order."""
        places = [{"file": text.file, "line": text.line} if text.line else {} for text in self.texts]
        rows = zip(places, self.texts, self.found, strict=True)
        return {"labels": [{**place, **_asked(text), **found} for place, text, found in rows]}

    @staticmethod
    def check_output(file: Path) -> None:
        """Raises UsageError where a file is there already, or its name says that it is neither table nor JSON lines."""
        if file.exists():
            raise UsageError("the output exists", file=str(file), todo="choose another, or remove it")
        if file.suffix.lower() not in _WRITTEN:
            raise UsageError("is no table that is written", file=str(file), todo="name it .csv or .jsonl")

    def write(self, file: Path) -> None:
        """The same as JSON lines, or as a table where the file ends in `.csv`. Raises ResourceError where the disk is
        full, read-only or broken.
        """
        from lorafit.files.atomic import atomic_file

        rows = self.to_json()["labels"]
        lines = [f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n" for row in rows]
        text = _as_table(rows) if file.suffix.lower() == ".csv" else "".join(lines)
        with atomic_file(file) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")

    def render(self, console: Console) -> None:
        """A line a text: labels with their probabilities, and the text where there are several.

        Blank lines of a file that holds a text a line are blank here too, so that both can be laid side by side.
        """
        before, line_before = "", 0
        for text, found in zip(self.texts, self.found, strict=True):
            line_before = line_before if text.file == before else 0
            if text.file.removesuffix(".gz").endswith((".txt", ".jsonl", ".ndjson")):
                console.print("\n" * (text.line - line_before - 1), end="")
            before, line_before = text.file, text.line
            line = _say_words(text, found) if text.words else _say_classes(found)
            answer = text.messages[-1].get("content", "") if text.messages else text.completion
            flat = " ".join(str(text.text or answer or "").split())
            say(console, line + (f"  {flat}" if text.line else ""))


_PLACE = ("file", "line")
_WRITTEN = (".csv", ".jsonl", ".ndjson")


def _as_table(rows: Sequence[JsonObject]) -> str:
    """CSV with a column for each value, and for each class its probability; commas part several labels of a text.

    Words, their labels and entities are JSON lists, as training reads them.
    """
    import csv
    from io import StringIO

    flat: list[JsonObject] = []
    for row in rows:
        if "words" in row:
            as_text = {name: json.dumps(value, ensure_ascii=False) for name, value in row.items() if name not in _PLACE}
            flat.append({name: row[name] for name in _PLACE if name in row} | as_text)
        elif "values" in row:
            own = {name: value for name, value in row.items() if name != "values"} | row["values"]
            nested = (dict, list)
            flat.append({k: json.dumps(v, ensure_ascii=False) if isinstance(v, nested) else v for k, v in own.items()})
        else:
            own = {name: value for name, value in row.items() if name != "probabilities"}
            shares = {f"p({name})": share for name, share in row["probabilities"].items()}  # a class may be named text
            flat.append({**own, "labels": ", ".join(row["labels"]), **shares})
    table = StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(name for line in flat for name in line)))
    writer.writeheader()
    writer.writerows(flat)
    return table.getvalue()


def _asked(text: Sample) -> JsonObject:
    if text.words is not None:
        return {"words": list(text.words)}
    if text.text is None:
        asked = _answered(text)
        return asked if text.rejected is None else {**asked, "rejected": _answered(text.rejected)}
    return {"text": text.text} | ({} if text.text_pair is None else {"text_pair": text.text_pair})


def _answered(text: Sample) -> JsonObject:
    """A prompt with its answer."""
    if text.messages is not None:
        return {"messages": list(text.messages)}
    return {"prompt": text.prompt, "completion": text.completion}


def _say_classes(found: JsonObject) -> str:
    """`spam 98.2 %`, or `score 3.52`."""
    if "values" in found:
        return ", ".join(f"{name} {value:.4g}" for name, value in found["values"].items())
    given = found["labels"] or [max(found["probabilities"], key=found["probabilities"].get)]
    shown = ", ".join(f"{label} {100 * found['probabilities'][label]:.1f} %" for label in given)
    return shown if found["labels"] else f"none of them (nearest: {shown})"


def _say_words(text: Sample, found: JsonObject) -> str:
    """`PER Ada Lovelace, LOC London`; of labels that tell of no entities each word with its own."""
    words = text.words or ()
    if all(label == "O" or "-" in label for label in found["labels"]):
        named = [f"{one['type']} {' '.join(words[one['first'] : one['behind']])}" for one in found["entities"]]
        return ", ".join(named) or "none"
    return " ".join(f"{word}/{label}" for word, label in zip(words, found["labels"], strict=False))
