"""What lies beside a merge's weights: the adapter's tokenizer and template, nothing foreign, and a word about both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from lorafit.contracts import Silent
from lorafit.errors import ModelError
from lorafit.files.portable import portable
from lorafit.model.merge import merge_adapter
from lorafit.model.tokenizer_files import TokenizerFolder
from tests.support.adapted import Trained


def tokenizer_of(*words: str) -> str:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    made.add_special_tokens([AddedToken("<end>")])
    text: str = made.to_str()
    return text


def merged(made: Trained) -> tuple[Path, list[str]]:
    reporter, output = Silent(), made.base.path.parent / "merged"
    merge_adapter(made.base, made.adapter, output, kind="original", reporter=reporter)
    return output, reporter.warnings


def twelve(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.fixture
def made(trained: Callable[..., Trained]) -> Trained:
    """A base with tokenizer and template; its adapter folder holds weights alone."""
    found = trained("none")
    (found.base.path / "tokenizer.json").write_text(tokenizer_of("a", "b"))
    (found.base.path / "tokenizer_config.json").write_text('{"eos_token": "<end>", "chat_template": "old"}')
    (found.base.path / "chat_template.jinja").write_text("base")
    return found


def test_the_base_speaks_for_an_adapter_without_a_tokenizer(made: Trained) -> None:
    output, warnings = merged(made)
    assert warnings == [] and (output / "chat_template.jinja").read_text() == "base"
    assert (output / "tokenizer.json").read_text() == tokenizer_of("a", "b")
    assert json.loads((output / "tokenizer_config.json").read_text()) == {"eos_token": "<end>"}


def test_another_template_or_tokenizer_is_taken_with_a_word(made: Trained) -> None:
    (made.adapter / "chat_template.jinja").write_text("adapter's")
    (made.adapter / "tokenizer.json").write_text(tokenizer_of("a", "c"))
    output, warnings = merged(made)
    assert (output / "chat_template.jinja").read_text() == "adapter's"
    assert (output / "tokenizer.json").read_text() == tokenizer_of("a", "c")
    assert not (output / "tokenizer_config.json").exists(), "nothing of the base's tokenizer is mixed in"
    template = next(text for text in warnings if "template" in text)
    assert twelve("adapter's") in template and twelve("base") in template and "the adapter's is taken" in template
    digests = [TokenizerFolder(folder).digest()[:12] for folder in (made.adapter, made.base.path)]
    tokenizer = next(text for text in warnings if "tokenizer" in text)
    assert all(digest in tokenizer for digest in digests) and "the adapter's is taken" in tokenizer


def test_the_same_tokenizer_written_otherwise_is_no_difference(made: Trained) -> None:
    saved = json.loads(tokenizer_of("a", "b")) | {"truncation": {"direction": "Right", "max_length": 8, "stride": 0,
                                                                 "strategy": "LongestFirst"}}  # fmt: skip
    (made.adapter / "tokenizer.json").write_text(json.dumps(saved, indent=3))
    (made.adapter / "chat_template.jinja").write_text("base")
    assert merged(made)[1] == []


def test_an_adapters_end_token_ends_answers(made: Trained) -> None:
    (made.adapter / "tokenizer.json").write_text(tokenizer_of("a", "c", "d"))
    (made.adapter / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    output, _ = merged(made)
    before = json.loads((made.base.path / "generation_config.json").read_text())["eos_token_id"]
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [before, 3]


def test_files_of_other_tools_stay_where_they_are(made: Trained, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"password": 1}')
    for name in ("trainer_state.json", "training_args.bin", "optimizer.pt", "README.md", "notes.txt", "a.jinja"):
        (made.adapter / name).write_text("{}")
    (made.base.path / "trainer_state.json").write_text("{}")
    for name in ("special_tokens_map.json", "chat_template.jinja", "LICENSE"):
        (made.adapter / name).symlink_to(tmp_path / "secret.json")
    (made.base.path / "LICENSE").write_text("free")
    (made.base.path / "NOTICE").symlink_to(tmp_path / "secret.json")
    output, warnings = merged(made)
    assert {path.name for path in output.iterdir()} == {
        "LICENSE", "MANIFEST", "chat_template.jinja", "config.json", "generation_config.json", "lorafit.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (output / "chat_template.jinja").read_text() == "base" and (output / "LICENSE").read_text() == "free"
    assert sorted(text.split(" is a link")[0].rsplit("/", 1)[-1] for text in warnings) == [
        "chat_template.jinja", "special_tokens_map.json",
    ]  # fmt: skip


def test_links_of_the_hubs_cache_are_its_own_files(made: Trained, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name, text in {"tokenizer.json": tokenizer_of("a", "z"), "chat_template.jinja": "cached"}.items():
        (repository / "blobs" / twelve(text)).write_text(text)
        (snapshot / name).symlink_to(f"../../blobs/{twelve(text)}")
    (snapshot / "merges.txt").symlink_to(tmp_path)
    folder = TokenizerFolder(snapshot)
    assert folder.templates() == {"default": "cached"} and folder.vocabulary()["z"] == 1
    assert folder.ignored_links() == ["merges.txt"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", '{"version": "1.0"'), ("tokenizer.json", '{"version": "1.0", "model": {"type": "None"}}'),
     ("tokenizer_config.json", "[]"), ("added_tokens.json", '{"a": 1'), ("chat_template.jinja", b"\xff")],
)  # fmt: skip
def test_a_broken_file_is_an_error_before_anything_is_written(made: Trained, name: str, content: str | bytes) -> None:
    (made.adapter / "tokenizer.json").write_text(tokenizer_of("a", "c"))
    (made.adapter / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as caught:
        merged(made)
    assert str(made.adapter / name) in str(caught.value)
    assert not [path for path in made.base.path.parent.iterdir() if "merged" in path.name]


def test_tokens_beyond_the_embedding_are_refused(made: Trained) -> None:
    (made.adapter / "tokenizer.json").write_text(tokenizer_of(*map(str, range(96))))
    with pytest.raises(ModelError, match="token ids up to 96, the base's embedding size is 96 rows"):
        merged(made)


def test_no_place_of_this_machine_is_in_a_merge(made: Trained, tmp_path: Path) -> None:
    made.base.config["_name_or_path"] = str(tmp_path)
    made.base.config["vision_config"] = {"_name_or_path": "/home/u/vision"}
    settings = {"name_or_path": str(tmp_path), "special_tokens_map_file": "/home/u/map.json", "unk_token": "/home/u"}
    (made.base.path / "tokenizer_config.json").write_text(json.dumps(settings))
    output, _ = merged(made)
    for file in (file for file in output.iterdir() if file.suffix == ".json"):
        assert str(tmp_path) not in file.read_text() and "/home/u/" not in file.read_text(), file.name
    assert json.loads((output / "tokenizer_config.json").read_text()) == {"unk_token": "/home/u"}


@pytest.mark.parametrize("place", ["/a/b", "~/a", "./a", "../a", "..", "C:\\a", "D:/a", "\\\\host\\a", "file:///a"])
def test_local_paths_do_not_travel(place: str) -> None:
    value = {"base_model_name_or_path": place, "deep": [{"tokenizer_file": place, "eos_token": place}], "n": 1}
    assert portable(value) == {"deep": [{"eos_token": place}], "n": 1}
    assert portable({"base_model_name_or_path": "org/name"}) == {"base_model_name_or_path": "org/name"}
