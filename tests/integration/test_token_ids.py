"""Token ids that the embedding has no row for are found before the weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.world import World, say_all


def add_tokens(world: World, *tokens: str, **settings: Any) -> Path:
    """A copy of the base whose tokenizer knows more tokens than the model (320)."""
    folder = world.root / "wide"
    shutil.copytree(world.base, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for number, token in enumerate(tokens):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": 600 + number, "content": token, "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    world.recipe((f"base: {world.base}", "base: wide"))
    return folder


@pytest.mark.parametrize("command", [["preview"], ["train"], ["train", "--dry-run"]])
def test_a_template_that_writes_a_token_the_model_lacks(world: World, command: list[str]) -> None:
    folder = add_tokens(world, "<|extra|>", "<|unused|>")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|extra|>"))
    outcome = world.run(command[0], "r.yaml", *command[1:])
    say_all(outcome, 5, "model.base", "<|extra|>", "id 320", "vocab size is 322", "embedding size 320", "d.jsonl:1")
    assert world.loaded == [] and not (world.root / "run").exists()


def test_tokens_that_no_row_holds_are_no_matter(world: World) -> None:
    add_tokens(world, "<|pad|>", pad_token="<|pad|>")
    say_all(world.run("train", "r.yaml"), 0, "run/adapter")
    assert json.loads((world.root / "run" / "card.json").read_text())["pad_id"] < 320
    say_all(world.run("eval", "run", "--split", "train"), 0, "perplexity")
