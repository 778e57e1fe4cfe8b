"""Texts that something is told of: two at once are joined as the tokenizer joins them, and long ones cut as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from lorafit.contracts import Kept, Sample
from lorafit.data.plain_text import PlainText
from lorafit.data.sample_renderer import Renderer
from lorafit.recipe.schema import DataSection
from tests.support.tiny_model import make_tokenizer

WORDS = [f"w{number}" for number in range(60)]


def bert(folder: Path) -> Any:
    file = folder / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    return BertTokenizerFast(str(file))


def roberta(folder: Path) -> Any:
    """Two separators between the texts, and one token type."""
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", model_input_names=names)


def plain(folder: Path) -> Any:
    """A causal model's, which puts nothing around texts."""
    return make_tokenizer()


def text_of(first: int, count: int) -> str:
    return " ".join(WORDS[first : first + count])


@pytest.mark.parametrize("make", [bert, roberta, plain])
@pytest.mark.parametrize("sizes", [(3, 4), (12, 3), (3, 12), (9, 10), (11, 9), (10, 10)])
def test_two_texts_are_what_the_tokenizer_makes_of_them(tmp_path: Path, make: Any, sizes: tuple[int, int]) -> None:
    tokenizer = make(tmp_path)
    first, second = text_of(0, sizes[0]), text_of(30, sizes[1])
    plain_text = PlainText(tokenizer)
    for limit in (999, 16, 15):
        wanted = tokenizer(first, second, truncation="longest_first", max_length=limit)
        found = plain_text.labelled(Sample("", 0, text=first, text_pair=second), limit)
        assert found.input_ids == wanted["input_ids"]
        if make is bert:
            assert found.types == wanted["token_type_ids"]
        else:
            assert not found.types
        assert found.is_cut is (len(tokenizer(first, second)["input_ids"]) > limit) is bool(found.cuts)


@pytest.mark.parametrize(
    ("keep", "kept", "cut"),
    [("head", range(14), 15), ("tail", range(26, 40), 1), ("both", [*range(3), *range(29, 40)], 4)],
)
def test_what_is_kept_of_a_long_text(tmp_path: Path, keep: Kept, kept: Any, cut: int) -> None:
    tokenizer = bert(tmp_path)
    found = PlainText(tokenizer).labelled(Sample("", 0, text=text_of(0, 40)), 16, keep)
    assert tokenizer.convert_ids_to_tokens(found.input_ids) == ["[CLS]", *(WORDS[number] for number in kept), "[SEP]"]
    assert found.cuts == (cut,) and found.is_cut
    whole = PlainText(tokenizer).labelled(Sample("", 0, text=text_of(0, 14)), 16, keep)
    assert len(whole.input_ids) == 16 and whole.cuts == () and not whole.is_cut


@pytest.mark.parametrize("keep", ["head", "tail", "both"])
@pytest.mark.parametrize("second", [None, "short"])
def test_of_a_very_long_text_the_same_is_kept(tmp_path: Path, keep: Kept, second: str | None) -> None:
    """Only its ends are made tokens of, where they are all that can be left."""
    tokenizer = bert(tmp_path)
    text = " ".join(WORDS[number * number % 60] for number in range(9000))
    sample = Sample("", 0, text=text, text_pair=second and text_of(5, 3), labels=("x",))
    renderer = Renderer(tokenizer, DataSection(train="unused", max_length=16, overlength="truncate"), None)
    cut = renderer.truncate(sample, keep)
    assert cut == PlainText(tokenizer).labelled(sample, 16, keep)
    shortened = renderer._shorten(sample, keep).text
    assert shortened is not None and len(shortened) < len(text) / 2
