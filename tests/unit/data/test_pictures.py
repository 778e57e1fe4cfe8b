"""Images of rows against the model's own processor, and what is said of bad ones."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorafit.contracts import Batch, Silent
from lorafit.data.pictures import ProcessorPictures
from lorafit.data.prepare import Prepared, build_renderer, prepare
from lorafit.data.preview import preview
from lorafit.errors import DataError
from lorafit.kinds.tasks import tasks
from lorafit.recipe.schema import DataSection
from tests.support.pictures import ask_colour, draw_rows, draw_square
from tests.support.tiny_recipe import write_rows
from tests.support.tiny_vision import make_idefics3, make_llava

Prepares = Callable[..., Prepared]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("see")
    llava = make_llava(folder / "llava")
    return {"llava": llava, "idefics3": make_idefics3(folder / "idefics3"), "llava-bos": llava}


@pytest.fixture
def prepare_pictures(bases: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[Prepared, ProcessorPictures]]:
    def run(kind: str, **data: Any) -> tuple[Prepared, ProcessorPictures]:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(bases[kind])
        if kind == "llava-bos":
            write_bos(processor.tokenizer)
        section, reader = DataSection(**data), ProcessorPictures(processor, tmp_path / "images")
        renderer = build_renderer(reader.tokenizer, section, tmp_path, pictures=reader)
        task = tasks.make("image-text-to-text").seeing(reader)
        options = {"folder": tmp_path, "renderer": renderer, "task": task, "cache_dir": tmp_path / "cache"}
        return prepare(section, seed=0, reporter=Silent(), **options), reader

    return run


def write_bos(tokenizer: Any) -> None:
    """The tokenizer puts a BOS in front, which the template does not write: LLaVA 1.5's way."""
    from tokenizers.processors import TemplateProcessing

    bos = "<|endoftext|>"
    tokenizer.bos_token = bos
    special = [(bos, tokenizer.convert_tokens_to_ids(bos))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos} $A", f"{bos} $A $B", special)


def draw_chats(folder: Path) -> list[dict[str, Any]]:
    """Twenty chats: one to three turns, none to three images of all kinds, anywhere in a turn."""
    chance, chats = random.Random(3), []
    for number in range(20):
        messages: list[dict[str, Any]] = [{"role": "system", "content": "look"}] if number % 4 == 0 else []
        for turn in range(1 + number % 3):
            parts: list[dict[str, str]] = [
                {"type": "text", "text": chance.choice(["what does it sell", "open on", "é"])}
            ]
            for which in range(chance.randrange(0 if turn else number % 2, 3)):
                size = chance.randrange(9, 80), chance.randrange(9, 80)
                name = f"{number}-{turn}-{which}.{chance.choice(['png', 'jpg', 'webp'])}"
                image = Image.effect_noise(size, 50).convert(chance.choice(["RGB", "L"]))
                exif = Image.Exif()
                exif[0x0112] = chance.choice([1, 6])  # a camera that was held upright
                image.save(folder / name, exif=exif)
                parts.insert(chance.randrange(len(parts) + 1), {"type": "image", "path": name})
            messages += [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": chance.choice(["red", "it"])},
            ]
        chats.append({"messages": messages})
    return chats


@pytest.mark.parametrize("kind", ["llava", "llava-bos", "idefics3"])
def test_ids_labels_and_pixels_are_the_processors_own(
    kind: str, bases: dict[str, Path], tmp_path: Path, prepare_pictures: Any
) -> None:
    chats = draw_chats(tmp_path)
    prepared, _ = prepare_pictures(kind, train=[{"path": str(write_rows(tmp_path / "chats.jsonl", chats))}])
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(bases[kind])
    if kind == "llava-bos":
        write_bos(processor.tokenizer)
    images = 0
    for number, chat in enumerate(chats):
        placed = json.loads(json.dumps(chat["messages"]))
        for turn in placed:
            if isinstance(turn["content"], str):
                turn["content"] = [{"type": "text", "text": turn["content"]}]
            for part in turn["content"]:
                if part["type"] == "image":
                    part["path"] = str(tmp_path / part["path"])
        own = processor.apply_chat_template(placed, tokenize=True, return_dict=True, return_tensors="pt")
        row = prepared.train[number]
        batch: Batch = prepared.task.collate([[row]], 0)
        assert batch["input_ids"].tolist() == own["input_ids"].tolist()
        assert set(batch.attached) == set(own) - {"input_ids", "attention_mask"}
        for name in batch.attached:
            assert torch.equal(batch[name], own[name]), name
        images += len(prepared.task.pictures(row))
        answers = [turn["content"][0]["text"] + "<|im_end|>" for turn in placed if turn["role"] == "assistant"]
        assert processor.tokenizer.decode(batch["label_ids"]) == "".join(answers)
        image_ids = {processor.image_token_id, getattr(processor, "fake_image_token_id", None)}
        assert not image_ids & set(batch["label_ids"].tolist())
    assert images > 20


def test_all_tokens_carry_loss_but_those_of_images(tmp_path: Path, prepare_pictures: Any) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", draw_rows(tmp_path, 2, size=(40, 30)))
    prepared, _ = prepare_pictures("idefics3", train=[{"path": str(rows)}], train_on="all")
    for number in range(2):
        row = prepared.train[number]
        (picture,) = prepared.task.pictures(row)
        untrained = [place for place, flag in enumerate(row["trained"]) if not flag]
        assert untrained == [0, *range(picture.start, picture.end)] and picture.tokens > 20


def test_typed_marks_stay_words(tmp_path: Path, prepare_pictures: Any) -> None:
    row = ask_colour(draw_square(tmp_path / "a.png", "red").name, "red")
    row["messages"][0]["content"][1]["text"] = "say <image> and <|im_end|>"
    prepared, reader = prepare_pictures("llava", train=[{"path": str(write_rows(tmp_path / "rows.jsonl", [row]))}])
    ids = prepared.train[0]["tokens"]
    assert list(ids).count(reader.tokenizer.convert_tokens_to_ids("<image>")) == 4
    assert "say <image> and <|im_end|>" in reader.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: None, "no such image: {file}; paths start in the folder of the rows' file"),
        (
            lambda file: file.write_text("<html>"),
            "{file} cannot be read as an image: it is none, or one that Pillow does not know",
        ),
        (lambda file: file.write_bytes(b""), "{file} cannot be read as an image"),
        (lambda file: file.mkdir(), "{file} cannot be read as an image: [Errno 21] Is a directory"),
    ],
)
def test_what_is_no_image_is_told_with_file_line_and_key(
    make: Callable[[Path], Any], said: str, tmp_path: Path, prepare_pictures: Any
) -> None:
    rows = draw_rows(tmp_path, 3)
    (file := tmp_path / "p1.png").unlink()
    make(file)
    with pytest.raises(DataError) as caught:
        prepare_pictures("llava", train=[{"path": str(write_rows(tmp_path / "rows.jsonl", rows))}])
    error = caught.value
    assert error.what.startswith(said.format(file=file).split("; ")[0])
    assert (error.file, error.line, error.key) == (str(tmp_path / "rows.jsonl"), 2, "messages[0].content[0].path")
    assert error.exit_code == 4


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_a_truncated_image_is_told_before_a_step(suffix: str, tmp_path: Path, prepare_pictures: Any) -> None:
    file = tmp_path / f"a.{suffix}"
    Image.effect_noise((90, 70), 60).convert("RGB").save(file)
    rows = write_rows(tmp_path / "rows.jsonl", [ask_colour(file.name, "red")])
    prepare_pictures("llava", train=[{"path": str(rows)}])
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match="cannot be read as an image"):
        prepare_pictures("llava", train=[{"path": str(rows)}])


def test_bytes_in_parquet_are_put_aside_once_and_read_for_each_batch(tmp_path: Path, prepare_pictures: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = draw_rows(tmp_path, 3)
    plain, _ = prepare_pictures("llava", train=[{"path": str(write_rows(tmp_path / "rows.jsonl", rows))}])
    packed = []
    for row in rows:
        asked, answer = row["messages"]
        content = [{"type": "image", "text": None}, {"type": "text", "text": "what"}]
        picture = {"bytes": (tmp_path / asked["content"][0]["path"]).read_bytes(), "path": None}
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer["content"]}]},
        ]
        packed.append({"messages": turns, "images": [picture]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(packed), tmp_path / "rows.parquet")
    held, _ = prepare_pictures("llava", train=[{"path": str(tmp_path / "rows.parquet")}])
    assert held.digest == plain.digest  # the same tokens and images, wherever they lie
    assert len(list((tmp_path / "images").iterdir())) == 3
    for number in range(3):
        ours, theirs = (each.task.collate([[each.train[number]]], 0) for each in (held, plain))
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_a_changed_image_is_prepared_anew_and_told_while_a_run_goes_on(tmp_path: Path, prepare_pictures: Any) -> None:
    rows = draw_rows(tmp_path, 3)
    source = {"path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    before, _ = prepare_pictures("llava", train=[source])
    assert prepare_pictures("llava", train=[source])[0].digest == before.digest
    draw_square(tmp_path / "p2.png", "red", seed=99, size=(50, 20))
    with pytest.raises(DataError, match=r"p2\.png was changed") as caught:
        before.task.collate([[before.train[2]]], 0)
    assert (caught.value.line, caught.value.exit_code) == (3, 4)
    again = "put it back; a run then goes on from its last saved step with --resume"
    assert caught.value.todo == f"{again}; or start anew"
    after, _ = prepare_pictures("llava", train=[source])
    assert after.digest != before.digest
    after.task.collate([[after.train[2]]], 0)
    (tmp_path / "p2.png").unlink()
    with pytest.raises(DataError, match=r"p2\.png is gone") as gone:
        after.task.collate([[after.train[2]]], 0)
    assert gone.value.todo == again


def test_a_row_comes_back_once_its_image_is_there(tmp_path: Path, prepare_pictures: Any) -> None:
    rows = draw_rows(tmp_path, 3)
    good = (file := tmp_path / "p1.png").read_bytes()
    source = {"path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    skip = {"train": [source], "bad_rows": {"policy": "skip", "max_fraction": 0.5}}
    file.unlink()
    assert len(prepare_pictures("llava", **skip)[0].train) == 2
    for bad in (b"text", b"other text"):
        file.write_bytes(bad)
        with pytest.raises(DataError, match=r"p1\.png cannot be read as an image") as caught:
            prepare_pictures("llava", train=[source])
    assert vars(pickle.loads(pickle.dumps(caught.value))) == vars(caught.value)  # as a worker process hands it over
    file.write_bytes(good)
    assert len(prepare_pictures("llava", train=[source])[0].train) == 3
    file.unlink()
    assert len(prepare_pictures("llava", **skip)[0].train) == 2
    again, _ = prepare_pictures("llava", **skip)
    assert len(again.train) == 2 and again.report.splits["train"].cache.startswith("cache hit")
    file.write_bytes(good)
    assert len(prepare_pictures("llava", **skip)[0].train) == 3


def test_equal_questions_about_other_images_contradict_nothing(tmp_path: Path, prepare_pictures: Any) -> None:
    rows = draw_rows(tmp_path, 3)
    again = [*rows, {**rows[0], "messages": [rows[0]["messages"][0], {"role": "assistant", "content": "green"}]}]
    prepared, _ = prepare_pictures("llava", train=[{"path": str(write_rows(tmp_path / "rows.jsonl", again))}])
    assert [warning for warning in prepared.report.warnings if "rows.jsonl:1" in warning or "contradict" in warning]
    alone, _ = prepare_pictures("llava", train=[{"path": str(write_rows(tmp_path / "rows2.jsonl", rows))}])
    assert not [warning for warning in alone.report.warnings if "contradict" in warning]


def test_a_row_that_is_too_long_is_left_out_whole(tmp_path: Path, prepare_pictures: Any) -> None:
    rows = [*draw_rows(tmp_path, 2, size=(40, 10)), *draw_rows(tmp_path, 1, name="square", size=(40, 40))]
    source = {"path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    whole, _ = prepare_pictures("idefics3", train=[source])
    narrow, _, square = whole.train.lengths
    assert narrow < square
    left, _ = prepare_pictures("idefics3", train=[source], max_length=int(square) - 1, overlength="drop")
    assert list(left.train.lengths) == [narrow, whole.train.lengths[1]]
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: {square} tokens, max_length is {square - 1}") as caught:
        prepare_pictures("idefics3", train=[source], max_length=int(square) - 1)
    assert caught.value.todo == "raise data.max_length, or set data.overlength: drop"
    with pytest.raises(DataError, match="no rows left") as caught:
        prepare_pictures("idefics3", train=[source], max_length=8, overlength="drop")
    assert caught.value.todo == "raise data.max_length"


def test_preview_shows_where_an_image_stands(tmp_path: Path, prepare_pictures: Any) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", draw_rows(tmp_path, 1, size=(40, 30)))
    data = {"train": [{"path": str(rows)}]}
    prepared, reader = prepare_pictures("llava", **data)
    renderer = build_renderer(reader.tokenizer, DataSection(**data), tmp_path, pictures=reader)
    shown = preview(prepared, renderer, 1)
    assert "<|im_start|>user\n[image 1: p0.png, 40x30, 4 tokens]what<|im_end|>" in str(shown)
    (asked,) = prepared.generation_rows("train")
    assert asked.prompt_text == "<|im_start|>user\n<image>what<|im_end|>\n<|im_start|>assistant\n"
    (row,) = shown.to_json()["rows"]
    assert "<image><image><image><image>what" in row["rendering"]
    assert [(one["width"], one["height"], one["end"] - one["start"]) for one in row["pictures"]] == [(40, 30, 4)]


def test_images_of_a_hub_data_set_are_not_decoded(tmp_path: Path) -> None:
    import datasets

    from lorafit.data.sources.hub import as_stored
    from lorafit.kinds.formats import formats

    draw_square(tmp_path / "a.png", "red")
    asked = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "what", "index": None}]
    answer = [{"type": "text", "text": "red", "index": None}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    features = {"images": datasets.List(datasets.Image()), "one": datasets.Image()}
    found = datasets.Dataset.from_dict({"images": [[str(tmp_path / "a.png")]], "one": [str(tmp_path / "a.png")]})
    found = found.cast(datasets.Features(features)).add_column("messages", [messages])
    (row,) = as_stored(found)
    assert row["images"][0]["path"] == row["one"]["path"] == str(tmp_path / "a.png")
    sample = formats.get("image_messages").read(row, "some/data", 1)
    assert [picture.path for picture in sample.pictures] == [str(tmp_path / "a.png")]
    plain = datasets.Dataset.from_dict({"text": ["a"]})
    assert as_stored(plain) is plain


def test_an_image_that_bytes_name_is_told_by_its_path(tmp_path: Path, bases: dict[str, Path]) -> None:
    from transformers import AutoProcessor

    from lorafit.pictures import Picture

    reader = ProcessorPictures(AutoProcessor.from_pretrained(bases["llava"]), tmp_path)
    with pytest.raises(DataError, match=r"cat\.png cannot be read as an image"):
        reader.look(Picture("cat.png", "images[0]", b"no image"))
    buffer = io.BytesIO()
    Image.new("RGB", (3, 5)).save(buffer, "PNG")
    found = reader.look(Picture("cat.png", "images[0]", buffer.getvalue()))
    assert (found.width, found.height) == (3, 5) and Path(found.file).read_bytes() == buffer.getvalue()
