"""Ratings of answers, each a row that the next run can train on.

answers, the last few thousand, by id ──POST /v1/feedback {"id", "rating"}──> FILE
{"prompt": [turns], "completion": [turn], "label": true, "model": "shop", "id": "chatcmpl-..."}
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from lorafit.console.wording import counted
from lorafit.contracts import JsonObject
from lorafit.errors import DataError, UsageError
from lorafit.files.strict_json import parse_json
from lorafit.serving.errors import ApiError

_REMEMBERED_ANSWERS = 4_096
_REMEMBERED_CHARACTERS = 64 << 20
_NAME_ANOTHER = "name a file of ratings, or a new one"


class Feedback:
    """Ratings in a file of rows with verdicts (`unpaired_preference`), which is added to.

    Args:
        file: It; need not be there yet.

    Raises:
        UsageError: It cannot be written to.
        DataError: A line of it is no rating.

    Attributes:
        ratings: Good ones and all, by model.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._answers: OrderedDict[str, tuple[int, list[JsonObject]]] = OrderedDict()
        self._characters = 0
        self.ratings: dict[str, tuple[int, int]] = {}
        if file.exists() and not file.is_file():  # a device may have no end
            raise UsageError("is no file", file=str(file), key="--feedback", todo="name another one")
        try:
            with file.open("a+", encoding="utf-8") as lines:
                lines.seek(0)
                line = "\n"
                for number, line in enumerate(lines, 1):
                    self._count(line, number)
                if not line.endswith("\n"):  # the next one is to be a line of its own
                    lines.write("\n")
        except UnicodeDecodeError:
            raise DataError("is no text in UTF-8", file=str(file), todo=_NAME_ANOTHER) from None
        except OSError as error:
            what = f"ratings cannot be written: {(error.strerror or 'no file').lower()}"
            raise UsageError(what, file=str(file), key="--feedback", todo="name another file") from error

    def remember(self, name: str, rows: Sequence[JsonObject]) -> None:
        """Keeps an answer that may be rated, a row for each choice; of too many the oldest is forgotten."""
        size = sum(len(json.dumps(row, ensure_ascii=False)) for row in rows)
        self._answers[name] = size, list(rows)
        self._characters += size
        while len(self._answers) > _REMEMBERED_ANSWERS or self._characters > _REMEMBERED_CHARACTERS:
            self._characters -= self._answers.popitem(last=False)[1][0]

    def rate(self, name: str, choice: int, is_good: bool) -> JsonObject:
        """Writes a rating; an answer is rated once.

        Raises:
            ApiError: The answer is not known, or not any more; or it has no such choice.
        """
        size, rows = self._answers.get(name, (0, []))
        if rows and choice >= len(rows):
            what = f"the answer has {counted(len(rows), 'choice')}, the first of which is 0, and no {choice}"
            raise ApiError(400, what, param="choice")
        if not rows:
            raise ApiError(404, f"no answer '{name[:80]}' waits for its rating", param="id", code="answer_not_found")
        row = {**rows[choice], "label": is_good, "id": name}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        try:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")
        except OSError as error:  # the answer waits on
            raise ApiError(500, f"the rating cannot be written: {(error.strerror or 'no file').lower()}") from error
        del self._answers[name]
        self._characters -= size
        self._add(str(row["model"]), is_good)
        return row

    def _count(self, line: str, number: int) -> None:
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        known = row if isinstance(row, dict) else {}
        model, label = known.get("model"), known.get("label")
        if not isinstance(model, str) or not isinstance(label, bool):
            raise DataError("is no rating", file=str(self._file), line=number, todo=_NAME_ANOTHER)
        self._add(model, label)

    def _add(self, model: str, is_good: bool) -> None:
        good, rated = self.ratings.get(model, (0, 0))
        self.ratings[model] = good + is_good, rated + 1
