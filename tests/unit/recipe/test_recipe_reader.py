"""From bytes to a tree: what is refused, and where a reader is pointed."""

from __future__ import annotations

import time

import pytest

from lorafit.errors import RecipeError
from lorafit.recipe.reader import MOST_BYTES, decode, read_tree
from lorafit.recipe.yaml_tree import Place, find, plain

TOP = Place("r.yaml", 1, 1)


def first_error(text: str) -> RecipeError:
    tree, errors = read_tree(text, TOP)
    assert errors, f"read without an error: {plain(tree)}"
    return errors[0]


SYNTAX = [  # text, line, column, words
    ("a: 1\nb: [1, 2\n", 2, 4, "'[' is never closed"),
    ("a: 1\nb: [1, 2\nc: 3\n", 2, 4, "'[' is never closed"),
    ("a: 1\nb: {c: 1\n", 2, 4, "'{' is never closed"),
    ("a: 1\nb: [\n", 2, 4, "'[' is never closed"),
    ("a: {b: [1,\n\n", 1, 8, "'[' is never closed"),
    ("a: {b: [1, 2],\n", 1, 4, "'{' is never closed"),
    ("a: {b: 1\nc: 2\n", 1, 4, "'{' is never closed"),
    ("a: [1, 'x' 'y']\n", 1, 12, "a comma is missing"),
    ("a: [1]]\n", 1, 7, "nothing opens this bracket"),
    ("a: [,]\n", 1, 5, "a value is missing"),
    ("key: 'it's'\n", 1, 10, "text behind a closing quote"),
    ("a: - b\n", 1, 4, "a list item in the middle of a line"),
    ("a: 1\n- b\n", 2, 1, "wrong indentation"),
    ("a: !x!y z\n", 1, 4, "tags are not allowed"),
    ('a: 1\nb: "open\nc: 3\n', 2, 4, "a quote is never closed"),
    ("a: 1\n\tb: 2\n", 2, 1, "a tab where YAML wants spaces"),
    ("a:\n\tb: 2\n", 2, 1, "a tab where YAML wants spaces"),
    ("a: b: c\n", 1, 5, "a second ': '"),
    ("a: 1\nbc\n", 3, 1, "a key without ': '"),
    ("a:\n  b: 1\n c: 2\n", 3, 2, "wrong indentation"),
    ("a: @b\n", 1, 4, "cannot start with this character"),
    ('a: "\\q"\n', 1, 6, "unknown escape"),
    ('a: "\\U00110000"\n', 1, 7, "a character that does not exist"),
]


@pytest.mark.parametrize(("text", "line", "column", "words"), SYNTAX)
def test_broken_syntax_is_placed_where_it_is_mended(text: str, line: int, column: int, words: str) -> None:
    error = first_error(text)
    assert (error.line, error.column) == (line, column)
    assert words in str(error)


REFUSED = [  # text, line, column, key, words
    ("a: 1\nb: 2\na: 3\n", 3, 1, "a", "duplicate key (first at line 1)"),
    ("s: {a: {b: 1, b: 2}}\n", 1, 15, "s.a.b", "duplicate key (first at line 1)"),
    ('a: 1\n"a": 2\n', 2, 1, "a", "duplicate key"),
    ("l:\n- {a: 1}\n- {b: 1, b: 1}\n", 3, 10, "l[1].b", "duplicate key"),
    ("a: !!int 3\n", 1, 4, "a", "tag '!!int'"),
    ("a: !mine {b: 1}\n", 1, 4, "a", "tag '!mine'"),
    ("a: !!python/object/apply:os.system [id]\n", 1, 4, "a", "tag '!!python/object/apply:os.system'"),
    ("a: ! b\n", 1, 4, "a", "tag"),
    ("!!str a: b\n", 1, 1, None, "tag"),
    ("b: &x {c: 1}\na: {<<: *x}\n", 2, 5, "a", "merge keys (<<) are not read"),
    ("a: &x [*x]\n", 1, 8, "a[0]", "the alias *x refers to itself"),
    ("a: &x {b: {c: *x}}\n", 1, 15, "a.b.c", "the alias *x refers to itself"),
    ("a: *nowhere\n", 1, 4, "a", "the alias *nowhere names no anchor"),
    ("a: 1\n---\nb: 2\n", 2, 1, None, "a second document"),
    ("a: 1\n---\n", 2, 1, None, "a second document"),
    ('a: "\\0"\n', 1, 4, "a", "control character U+0000"),
    ('a: "\\x1b[31m"\n', 1, 4, "a", "control character U+001B"),
    ('"\\x07": 1\n', 1, 1, None, "control character U+0007"),
    ('a: "\\ud800"\n', 1, 4, "a", "lone surrogate"),
    ("1: a\n", 1, 1, None, "a key that is not text"),
    ("true: a\n", 1, 1, None, "a key that is not text"),
    ("null: a\n", 1, 1, None, "a key that is not text"),
    ("'': a\n", 1, 1, None, "a key that is not text"),
    ("? [a]\n: b\n", 1, 3, None, "a key that is not text"),
    ("s: {on: a}\n", 1, 5, "s", "'on' is ambiguous"),
    ("a: no\n", 1, 4, "a", "'no' is ambiguous"),
    ("a: [b, 010]\n", 1, 8, "a[1]", "'010' is ambiguous"),
    ("a: {b: [{c: 1:30}]}\n", 1, 13, "a.b[0].c", "'1:30' is ambiguous"),
]


@pytest.mark.parametrize(("text", "line", "column", "key", "words"), REFUSED)
def test_what_is_refused_and_where(text: str, line: int, column: int, key: str | None, words: str) -> None:
    error = first_error(text)
    assert (error.line, error.column, error.key) == (line, column, key)
    assert words in str(error)


def test_everything_wrong_is_found_at_once() -> None:
    _, errors = read_tree("a: yes\na: 2\nb: !x 1\nc: 010\n1: 2\n", TOP)
    assert [error.line for error in errors] == [1, 2, 3, 4, 5]


def test_every_value_and_key_keeps_its_place() -> None:
    tree, errors = read_tree("data:\n  train:\n  - path: a\n    limit: 3\n", TOP)
    assert errors == []
    entry = find(tree, ("data", "train", 0, "limit"))
    assert entry is not None
    assert (entry.key_place.line, entry.key_place.column) == (4, 5)
    assert (entry.place.line, entry.place.column) == (4, 12)
    train = find(tree, ("data", "train"))
    assert train is not None
    assert (train.at.line, train.at.column) == (2, 3)


def test_aliases_are_read() -> None:
    tree, errors = read_tree("a: &x {b: [1, 2]}\nc: *x\n", TOP)
    assert errors == []
    assert plain(tree) == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_quoted_words_are_text() -> None:
    tree, errors = read_tree("a: 'no'\nb: \"010\"\n'on': '1:30'\nc: |\n  yes\n", TOP)
    assert errors == []
    assert plain(tree) == {"a": "no", "b": "010", "on": "1:30", "c": "yes\n"}


def test_a_document_start_and_a_directive_are_read() -> None:
    tree, errors = read_tree("%YAML 1.2\n---\na: 1\n...\n", TOP)
    assert errors == []
    assert plain(tree) == {"a": 1}


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines)


EXPENSIVE = [
    (bomb(), "aliases grow to more than 20000 values"),
    ("x: " + "[" * 100_000, "nested deeper than 32 levels"),
    ("x: " + "{a: " * 5_000, "nested deeper than 32 levels"),
    ("\n".join("  " * n + f"k{n}:" for n in range(500)), "nested deeper than 32 levels"),
    ("x:\n" + "- 1\n" * 100_000, "more than 20000 values"),
    ("a: 1\n" * 100_000, "duplicate key"),
    ("a: " + "9" * 1_000_000, "a number of 1000000 digits"),
]


@pytest.mark.parametrize(("text", "words"), EXPENSIVE, ids=[words[:24] for _, words in EXPENSIVE])
def test_texts_made_to_be_expensive_are_cheap(text: str, words: str) -> None:
    start = time.process_time()
    assert words in str(first_error(text))
    assert time.process_time() - start < 10, "a bomb went off"


def test_errors_have_an_end() -> None:
    _, errors = read_tree("a: 1\n" * 10_000, TOP)
    assert len(errors) == 101
    assert "more than 100 errors" in str(errors[-1])


def test_too_large_a_file_is_not_even_decoded() -> None:
    with pytest.raises(RecipeError, match="larger than 1 MiB"):
        decode(b"\xff" * (MOST_BYTES + 1), "r.yaml")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"x" * 40 + b"\xe9 is latin-1", "not UTF-8 at byte 40"),
        (b"\xef\xbb\xbfname: \xe9", "not UTF-8 at byte 9"),
        ("name: x".encode("utf-16"), "not UTF-8 at byte 0"),
        (b"a: 1\r\nb: 'x\x00'\r\n", "r.yaml:2:6: control character U+0000"),
        (b"a: 1\nb: \x1b[31m\n", "r.yaml:2:4: control character U+001B"),
        (b"\x7fa: 1\n", "r.yaml:1:1: control character U+007F"),
    ],
)
def test_bytes_that_are_no_text(raw: bytes, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        decode(raw, "r.yaml")
    assert words in str(caught.value)
