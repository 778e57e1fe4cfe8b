"""Chats with images as their format reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorafit.errors import DataError
from lorafit.kinds.formats import formats

IMAGE, ANSWER = {"type": "image"}, {"role": "assistant", "content": "a cat"}
A, B, HELD = ("a.png", None), ("b.png", None), ("", b"1")
FORMAT = formats.get("image_messages")


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def row(*parts: Any, answer: Any = ANSWER, **columns: Any) -> dict[str, Any]:
    content = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)
    return {"messages": [{"role": "user", "content": content}, answer], **columns}


def refusal(found: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        FORMAT.read(found, "rows.jsonl", 3)
    return str(caught.value)


@pytest.mark.parametrize(
    ("found", "content", "pictures"),
    [
        (row({**IMAGE, "path": "a.png"}, text("what")), [IMAGE, text("what")], [("a.png", None)]),
        (row({**IMAGE, "image": "a.png"}), [IMAGE], [("a.png", None)]),
        (row({**IMAGE, "image": {"bytes": b"x", "path": "a.png"}}), [IMAGE], [("a.png", b"x")]),
        (row({**IMAGE, "image": {"bytes": b"x"}}), [IMAGE], [("", b"x")]),
        (row("<image>what", images=["a.png"]), [IMAGE, text("what")], [("a.png", None)]),
        (row("<image>or<image>", images='["a.png", "b.png"]'), [IMAGE, text("or"), IMAGE], [A, B]),
        (row(text("so <image>"), IMAGE, images=[{"bytes": b"1"}, "b.png"]), [text("so "), IMAGE, IMAGE], [HELD, B]),
        (row("<image>what"), "<image>what", []),  # without the column these are words
        (row("what", images=[]), "what", []),
    ],
)  # fmt: skip
def test_images_stand_in_parts_or_at_marks(found: dict[str, Any], content: Any, pictures: list[Any]) -> None:
    sample = FORMAT.read(found, "rows.jsonl", 3)
    assert sample.messages is not None and sample.messages[0]["content"] == content
    assert [(one.path, one.data) for one in sample.pictures] == pictures
    as_table = {**found, "messages": json.dumps(found["messages"], default=lambda _: None)}
    if not any(data for _, data in pictures):
        assert FORMAT.read(as_table, "rows.csv", 3).messages == sample.messages


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (row({**IMAGE, "url": "http://x/a.png"}), "content[0].url: images are read from files alone; fetch it"),
        (row({**IMAGE, "image": "https://x/a.png"}), "messages[0].content[0].image: images are read from files alone"),
        (row({"type": "image_url", "image_url": {"url": "data:..."}}), "images are read from files alone"),
        (row("<image>", images=["data:image/png;base64,aaaa"]), "images[0]: images are read from files alone"),
        (row("<image><image>", images=["a.png"]), "messages[0]: an image's place, and no image for it is left"),
        (row("<image>what", images=[]), "messages[0]: an image's place, and no image for it is left"),
        (row("<image>what", images=None), "messages[0]: an image's place, and no image for it is left"),
        (row(text("<image>"), images=""), "messages[0].content[0]: an image's place, and no image for it is left"),
        (row(IMAGE), "messages[0].content[0]: an image's place, and no image for it is left"),
        (row("what", images=["a.png"]), "images: 1 image, and the messages have 0 places for them"),
        (row({**IMAGE, "path": 3}), "messages[0].content[0].path: expected path of an image, or {bytes, path}, found"),
        (row("<image>", images="a: 1"), ""),
        (row({"type": "video", "path": "a.mp4"}), "part of type string 'video' is not supported; text and image are"),
        (row("what", answer={**ANSWER, "content": [{**IMAGE, "path": "a"}]}), "messages[1]: an image in an answer"),
        ({"images": ["a.png"]}, "missing field 'messages'"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_told_with_its_place(found: dict[str, Any], said: str) -> None:
    if said:
        assert said in refusal(found)
    else:
        assert [one.path for one in FORMAT.read(found, "rows.jsonl", 3).pictures] == ["a: 1"]


def test_a_prompt_keeps_the_images_of_what_it_asks() -> None:
    later = {"role": "user", "content": [{**IMAGE, "path": "b.png"}]}
    whole = {"messages": [row({**IMAGE, "path": "a.png"})["messages"][0], ANSWER, later, ANSWER]}
    assert [one.path for one in FORMAT.read_prompt(whole, "p.jsonl", 1).pictures] == ["a.png", "b.png"]
    first = {"messages": whole["messages"][:2]}
    assert [one.path for one in FORMAT.read_prompt(first, "p.jsonl", 1).pictures] == ["a.png"]
    unlearnt = {"messages": [*whole["messages"][:3], {**ANSWER, "weight": 0}]}
    assert [one.path for one in FORMAT.read_prompt(unlearnt, "p.jsonl", 1).pictures] == ["a.png"]


def test_other_tasks_say_which_task_reads_images() -> None:
    with pytest.raises(DataError, match="images are for task image-text-to-text"):
        formats.get("messages").read(row({**IMAGE, "path": "a.png"}), "rows.jsonl", 1)
