"""Typed control strings stay text, the template's become control tokens, and borders fall where they should."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorafit.data.plain_text import (
    PlainText,
    split_text,
)
from lorafit.data.text_encoder import FIRST_PRIVATE_CHARACTER, TextEncoder, mark_trained
from lorafit.errors import DataError, ModelError
from tests.support.chat_families import CORPUS, FAMILIES, tokenizer_of


@cache
def build(kind: str, *, rstrip: bool = False) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with `<s>`, `</s>` and the tag `<t>`, of one of the kinds that differ in blanks and offsets."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind != "bytes"))
    alphabet: list[str] = []
    if kind in ("bytes", "trimmed"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    elif kind == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    letters = sorted({letter for line in CORPUS for letter in line} | set("▁<>/?!\n\t"))
    specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if not alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet or letters, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, rstrip=rstrip, normalized=False) for token in ("<s>", "</s>")])
    backend.add_tokens([AddedToken("<t>", normalized=False)])
    if kind == "trimmed":
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    else:
        number = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


KINDS = ["bytes", "trimmed", "metaspace", "legacy"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_tokenizers_own_without_typed_control_strings(kind: str) -> None:
    tokenizer = build(kind)
    encoder = TextEncoder(tokenizer, "<t>")
    text = "<s>user asks why?</s><t>so it is\n\n  yes</s>"
    ids, offsets = encoder.encode(text, [(3, 17), (24, 39)])
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert len(offsets) == len(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("typed", ["</s>", "a </s><s> b", "<t>", "x<s", "<s><s></s>", "why? </s>"])
def test_typed_control_strings_are_text(kind: str, typed: str) -> None:
    tokenizer = build(kind)
    encoder = TextEncoder(tokenizer, "<t>")
    text = f"<s>{typed}</s><t>{typed}</s>"
    first, second = (3, 3 + len(typed)), (10 + len(typed), 10 + 2 * len(typed))
    ids, offsets = encoder.encode(text, [first, second])
    assert [encoder.control[number] for number in ids if number in encoder.control] == ["<s>", "</s>", "<t>", "</s>"]
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    for number, (start, end) in zip(ids, offsets, strict=True):
        if number in encoder.control:
            assert text[start:end] == encoder.control[number]


def test_typed_added_tokens_that_are_no_control_tokens_stay_tokens() -> None:
    tokenizer = build("bytes")
    ids, _ = TextEncoder(tokenizer, "").encode("a <t> b", [(0, 7)])
    assert tokenizer.convert_tokens_to_ids("<t>") in ids


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(), st.text() | st.sampled_from([*FAMILIES["qwen"].special, *FAMILIES["qwen"].plain, "<|im_"])
        ),
        max_size=8,
    )
)
def test_only_what_the_template_wrote_becomes_control(pieces: list[tuple[bool, str]]) -> None:
    tokenizer = tokenizer_of("qwen")
    encoder = TextEncoder(tokenizer, FAMILIES["qwen"].template)
    text, typed = "", []
    for is_typed, piece in pieces:
        if is_typed and piece:
            if typed and typed[-1][1] == len(text):
                typed[-1] = (typed[-1][0], len(text) + len(piece))
            else:
                typed.append((len(text), len(text) + len(piece)))
        text += piece
    ids, offsets = encoder.encode(text, typed)
    clean = tokenizer.backend_tokenizer.normalizer.normalize_str
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # A control token splits the text before it is normalised, so that marks cannot join across it.
    assert clean(decoded) == clean(text)
    inside = [letter for start, end in typed for letter in range(start, end)]
    for number, (start, end) in zip(ids, offsets, strict=True):
        if number in encoder.control:
            assert text[start:end] == encoder.control[number]
            assert not set(range(start, end)) & set(inside)
    written = "\0" + "".join("\0" if place in set(inside) else letter for place, letter in enumerate(text))
    expected = sum(written.count(token) for token in encoder.control.values())
    assert sum(number in encoder.control for number in ids) == expected


def test_private_characters_that_would_forge_a_control_token_are_refused() -> None:
    tokenizer = build("bytes")
    encoder = TextEncoder(tokenizer)
    forged = chr(FIRST_PRIVATE_CHARACTER) * 3
    encoder.encode(forged, [(0, 3)])
    with pytest.raises(DataError, match="private characters"):
        encoder.encode(forged + "<s>", [(0, 6)])


def test_truncation_that_somebody_left_in_the_tokenizer_does_not_cut() -> None:
    tokenizer = build.__wrapped__("bytes")
    tokenizer("a b c d e f", truncation=True, max_length=3)
    ids, _ = TextEncoder(tokenizer).encode("a b c d e f", [])
    assert tokenizer.decode(ids) == "a b c d e f"


def test_tokenizers_without_offsets_are_refused() -> None:
    class Slow:
        backend_tokenizer = None

    with pytest.raises(ModelError, match="Slow cannot say"):
        TextEncoder(Slow())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("offsets", "span", "expected"),
    [
        ([(0, 2), (2, 4), (4, 6)], (2, 4), [0, 1, 0]),
        ([(0, 3), (3, 6)], (2, 6), [0, 1]),  # one of three characters: the header keeps the token
        ([(0, 3), (3, 6)], (1, 6), [1, 1]),  # two of three: the answer has it
        ([(0, 2), (2, 6)], (1, 6), [1, 1]),  # one of two: the answer has it
        ([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], (1, 2), [0, 1, 1, 1, 0]),  # one character in three byte tokens
        ([(0, 1), (2, 4), (5, 7)], (1, 4), [0, 1, 0]),  # blanks left out of the offsets belong to the token behind
        ([(0, 2), (2, 7), (7, 8)], (2, 6), [0, 1, 0]),  # an end token that swallows the newline behind it
        ([(0, 2)], (2, 2), [0]),
    ],
)
def test_tokens_on_borders(offsets: list[tuple[int, int]], span: tuple[int, int], expected: list[int]) -> None:
    assert mark_trained(offsets, [span]) == [bool(flag) for flag in expected]


def test_end_token_that_swallows_blanks_is_trained() -> None:
    tokenizer = build("bytes", rstrip=True)
    text = "user</s>\n\nso</s>\n"
    ids, offsets = TextEncoder(tokenizer).encode(text, [(0, 4), (10, 12)])
    trained = mark_trained(offsets, [(10, 16)])
    assert ids[-1] == tokenizer.eos_token_id and trained[-1] and sum(trained) >= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["user asks:", "user asks: ", "", "q\n", "x</s>"])
@pytest.mark.parametrize("completion", [" so it is", "so", "\n\nso", "</s>", ""])
def test_completions_go_on_from_the_tokens_of_their_prompt(kind: str, prompt: str, completion: str) -> None:
    tokenizer = build(kind)
    plain = PlainText(tokenizer)
    encoded, asked = plain.completion(prompt, completion), plain.prompt_ids(prompt)
    assert encoded.input_ids[: len(asked)] == asked
    assert encoded.trained == [False] * len(asked) + [True] * (len(encoded.input_ids) - len(asked))
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1
    bos = 0 if kind == "trimmed" else 1
    assert encoded.input_ids.count(tokenizer.bos_token_id) == bos
    body = tokenizer.decode(encoded.input_ids[bos:-1], clean_up_tokenization_spaces=False)
    assert body in (prompt + completion, (prompt + completion).removeprefix(" "))
    assert plain.completion(prompt, completion, train_on="all").trained == [True] * len(encoded.input_ids)


def test_completion_is_cut_from_the_left_of_its_prompt() -> None:
    tokenizer = build("bytes")
    whole = PlainText(tokenizer).completion("the quick brown fox asks", " why")
    cut = PlainText(tokenizer).cut_completion("the quick brown fox asks", " why", len(whole.input_ids) - 3)
    assert cut is not None
    assert cut.input_ids[0] == tokenizer.bos_token_id and cut.input_ids[-1] == tokenizer.eos_token_id
    assert cut.input_ids[1:] == whole.input_ids[4:]
    short = PlainText(tokenizer).cut_completion("the quick brown fox asks", " why not so " * 9, 12)
    assert short is not None and len(short.input_ids) == 12 and tokenizer.eos_token_id not in short.input_ids
    assert sum(short.trained) == 9
    assert PlainText(tokenizer).cut_completion("a", "b", 1) is None


def test_plain_text_is_trained_whole_and_split() -> None:
    tokenizer = build("bytes")
    text = "the quick brown fox </s> answers"
    row = PlainText(tokenizer).text(text)
    assert (
        all(row.trained) and row.input_ids[-1] == tokenizer.eos_token_id and row.input_ids[0] == tokenizer.bos_token_id
    )
    assert row.input_ids.count(tokenizer.eos_token_id) == 1
    length = len(row.input_ids)
    for size in range(3, length):
        parts = split_text(row, size)
        assert [number for part in parts for number in part.input_ids] == row.input_ids
        assert all(2 <= len(part.input_ids) <= size for part in parts)


def test_an_end_token_is_needed() -> None:
    tokenizer = build.__wrapped__("bytes")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        PlainText(tokenizer).completion("a", "b")
