"""Chats with images: as parts of a turn's content, or in a column `images` beside the turns that mark their places.

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "..."}]}]}
    {"messages": [{"role": "user", "content": "<image>What is this?"}], "images": ["cat.png"]}

An image is the path of a file, relative to the folder of the rows, or `{bytes, path}` as parquet files hold one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorafit.console.wording import counted
from lorafit.contracts import JsonObject, Message, Sample
from lorafit.errors import DataError
from lorafit.kinds.chat_fields import count_images, read_tools, read_turns, without_answer
from lorafit.kinds.fields import Row, describe, missing_field, read_json_list, read_must_contain, wrong_type
from lorafit.kinds.formats import Format, formats
from lorafit.pictures import Picture

_MARK = "<image>"
_IMAGES = "images"
_NO_FILE = ("http://", "https://", "data:", "ftp://", "s3://")


@formats.register("image_messages")
class ImageMessages(Format):
    """Turns of `messages` whose content may be a list of text and image parts; for a task that reads images."""

    priority = 12
    asks = None
    fields: Mapping[str, bool] = {"messages": True, _IMAGES: False, "tools": False, "must_contain": False}
    known_as: Mapping[str, tuple[str, ...]] = {"messages": ("conversations", "conversation", "chat", "texts")}
    form = " (turns whose content has text and image parts)"

    def read(self, row: Row, file: str, line: int) -> Sample:
        """The chat, each image part without what it holds, and the images in order."""
        if "messages" not in row:
            raise missing_field("messages", row)
        places = _Places(list(_read_column(row)), counts_marks=_IMAGES in row)
        turns = read_turns(row, "messages", places.read_content)
        places.check_all_used()
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant" and count_images([turn]):
                what = "an image in an answer, and models of this kind write text alone"
                raise DataError(what, key=f"messages[{number}]", todo="move it to a turn of the user")
        tools, must_contain = read_tools(row), read_must_contain(row)
        return Sample(file, line, turns, tools, must_contain=must_contain, pictures=tuple(places.found))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The chat up to the answer that is to be written, and its images."""
        asked = without_answer(self.read(row, file, line), "messages")
        return replace(asked, pictures=asked.pictures[: count_images(asked.messages or ())])


@dataclass
class _Places:
    """Collects the images of a chat while its turns are read.

    Attributes:
        column: Those of the column, which stand where no part says which image.
        counts_marks: Whether the row has that column, be it empty, so that a mark in a text is an image's place.
        found: Those that were met.
    """

    column: list[Picture]
    counts_marks: bool

    def __post_init__(self) -> None:
        self.found: list[Picture] = []
        self._left = list(self.column)

    def read_content(self, value: Any, place: str) -> str | list[JsonObject]:
        """A turn's content: a text, or parts of text and images."""
        if isinstance(value, str):
            return list(self._split(value, place)) if self.counts_marks and _MARK in value else value
        if not isinstance(value, list) or not value:
            raise wrong_type(f"{place}.content", "string or list of parts", value)
        keyed = ((each, f"{place}.content[{number}]") for number, each in enumerate(value))
        return [part for each, key in keyed for part in self._read_part(each, key)]

    def check_all_used(self) -> None:
        """Raises DataError where the column holds more images than the turns have places."""
        if self._left:
            used = len(self.column) - len(self._left)
            what = f"{counted(len(self.column), 'image')}, and the messages have {counted(used, 'place')} for them"
            raise DataError(what, key=_IMAGES, todo=f"write {_MARK}, or a part {{type: image}}, where each stands")

    def _read_part(self, part: Any, key: str) -> Iterator[Message]:
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            text = part["text"]
            yield from self._split(text, key) if self.counts_marks and _MARK in text else [_text(text)]
        elif _is_image(part):
            named = [name for name in ("image", "path", "url", "image_url") if part.get(name) is not None]
            if not named:
                yield self._take(key)
                return
            if "url" in named[0]:
                raise _no_file(f"{key}.{named[0]}")
            self.found.append(_read_image(part[named[0]], f"{key}.{named[0]}"))
            yield {"type": "image"}
        elif isinstance(part, dict) and part.get("type") != "text":
            raise DataError(f"part of type {describe(part.get('type'))} is not supported; text and image are", key=key)
        else:
            raise wrong_type(key, "{type: text, text: string} or {type: image, path: string}", part)

    def _split(self, text: str, key: str) -> Iterator[Message]:
        for number, piece in enumerate(text.split(_MARK)):
            if number:
                yield self._take(key)
            if piece:
                yield _text(piece)

    def _take(self, key: str) -> Message:
        if not self._left:
            what = "an image's place, and no image for it is left"
            raise DataError(what, key=key, todo=f"name its path there, or one more in {_IMAGES}")
        self.found.append(self._left.pop(0))
        return {"type": "image"}


def _read_column(row: Row) -> Iterator[Picture]:
    value = row.get(_IMAGES)
    if isinstance(value, str):
        value = read_json_list(value, _IMAGES) if value.lstrip().startswith("[") else [value] if value else None
    if value is None:
        return
    if not isinstance(value, list):
        raise wrong_type(_IMAGES, "list", value)
    for number, each in enumerate(value):
        yield _read_image(each, f"{_IMAGES}[{number}]")


def _read_image(value: Any, key: str) -> Picture:
    path, data = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    if isinstance(value, bytes):
        path, data = None, value
    if isinstance(path, str) and path.lower().startswith(_NO_FILE) and data is None:
        raise _no_file(key)
    if isinstance(data, bytes):
        return Picture(path if isinstance(path, str) else "", key, data)
    if not isinstance(path, str) or not path:
        raise wrong_type(key, "path of an image, or {bytes, path}", value)
    return Picture(path, key)


def _no_file(key: str) -> DataError:
    return DataError("images are read from files alone", key=key, todo="fetch it, and write its path")


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("type", "")).startswith("image")
