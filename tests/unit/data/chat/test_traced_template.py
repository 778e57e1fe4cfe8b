"""Every string operation of a template keeps who wrote each character. Leaves are in capitals, templates not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError, TemplateError

from lorafit.data.chat.jinja_filters import TemplateLimitError, tojson
from lorafit.data.chat.traced_template import ChatTemplate, read_trace
from lorafit.data.chat.traced_text import BLURRED, Typed, format_percent, glue, runs_of, shown, typed_leaf
from lorafit.data.chat.typed_chat import Leaf, TypedChat

LEAF = "THE TYPED Text, OF A User:  WITH\nLINES\t AND  BLANKS \n"
TYPED = LEAF.upper()


def assert_origins(text: str, *, leaf: str = TYPED) -> None:
    """Capitals come from the leaf, at their own place; small letters from the template."""
    place = 0
    for length, origin, start in runs_of(text):
        part = str(text)[place : place + length]
        assert start != BLURRED
        if origin == 0:
            assert part == part.lower()
        elif start >= 0 and length:
            assert part == leaf[start : start + length]
        place += length
    assert place == len(text)


@settings(max_examples=150, deadline=None)
@given(st.text("ab ,\n\r", max_size=12), st.sampled_from([None, "a", "ab", " ", ", "]), st.integers(-1, 2))
def test_parts_of_a_text_know_their_places(text: str, separator: str | None, most: int) -> None:
    typed = typed_leaf(text, 1)
    pairs = [
        (typed.split(separator, most), text.split(separator, most)),
        (typed.rsplit(separator, most), text.rsplit(separator, most)),
        (typed.splitlines(), text.splitlines()),
        (typed.splitlines(True), text.splitlines(True)),
    ]
    pairs += [(list(typed.rpartition(separator)), list(text.rpartition(separator)))] if separator else []
    for parts, plain in pairs:
        assert list(map(str, parts)) == plain
        places = [(start, start + length) for part in parts for length, _, start in runs_of(part) if length]
        assert "".join(text[start:end] for start, end in places) == "".join(plain) and places == sorted(places)


def render(source: str, content: Any = TYPED, **more: Any) -> tuple[str, list[tuple[int, int, int]], list[Leaf]]:
    chat = TypedChat([{"role": "user", "content": content, **more}], None)
    traced = read_trace(ChatTemplate(source).render(chat, 1, {"eos": "</s>"}), chat)
    return traced.text, traced.runs, traced.leaves


OPERATIONS = [
    lambda t: t + " tail",
    lambda t: "head " + t,
    lambda t: t.strip(),
    lambda t: t.lstrip("THE "),
    lambda t: t.rstrip(),
    lambda t: t[3:-4],
    lambda t: t[::-1][::-1],
    lambda t: t[5],
    lambda t: t * 2,
    lambda t: t.split()[1],
    lambda t: t.split("T")[-1],
    lambda t: t.split("T", 1)[0],
    lambda t: t.rsplit("T", 2)[-1],
    lambda t: t.rsplit(None, 2)[0],
    lambda t: t.partition(",")[2],
    lambda t: t.rpartition("T")[0],
    lambda t: t.splitlines()[1],
    lambda t: glue(t.splitlines(True)),
    lambda t: t.replace("T", "small"),
    lambda t: t.replace(" ", "", 3),
    lambda t: t.removeprefix("THE").removesuffix("\n"),
    lambda t: typed_or_plain(" and ").join([t, "small", t[:4]]),
    lambda t: format_percent("<%s> %% small", t),
    lambda t: format_percent("<%(a)s>", {"a": t}),
    lambda t: glue(list(t)),
    lambda t: shown(t),
    lambda t: t.upper(),
]


def typed_or_plain(text: str) -> Typed:
    return Typed(text, runs_of(text))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_keep_origins_and_equal_those_of_plain_strings(operation: Any) -> None:
    result = operation(typed_leaf(TYPED, 1))
    assert str.__eq__(result, operation(TYPED))
    assert_origins(result)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, len(OPERATIONS) - 2), max_size=6))
def test_chains_of_operations(numbers: list[int]) -> None:
    typed, plain = typed_leaf(TYPED, 1), TYPED
    for number in numbers:
        try:
            expected = OPERATIONS[number](plain)
        except IndexError:
            continue
        typed, plain = OPERATIONS[number](typed), expected
        assert str.__eq__(typed, plain)
        assert_origins(typed)


def test_typed_text_tests_and_looks_up_like_plain_text() -> None:
    typed = typed_leaf("content", 1)
    assert typed == "content" and hash(typed) == hash("content") and {"content": 1}[typed] == 1
    assert "ten" in typed and typed.startswith("con") and isinstance(typed, str)


@pytest.mark.parametrize("name", ["center", "zfill", "ljust", "casefold", "swapcase", "expandtabs"])
def test_what_is_not_followed_is_blurred_and_not_the_templates(name: str) -> None:
    arguments = () if name in ("casefold", "swapcase", "expandtabs") else (9,)
    result = getattr(typed_leaf("ABC", 1), name)(*arguments)
    assert result == getattr("ABC", name)(*arguments)
    assert runs_of(result) == ((len(result), 1, BLURRED),)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(json_values, st.booleans(), st.sampled_from([None, 0, 2, "\t"]), st.booleans())
def test_tojson_equals_json_and_knows_its_strings(value: Any, ascii_only: bool, indent: Any, sort: bool) -> None:
    count = 0

    def typed(part: Any) -> Any:
        nonlocal count
        if isinstance(part, str):
            count += 1
            return typed_leaf(part, count)
        if isinstance(part, dict):
            return {typed(key): typed(item) for key, item in part.items()}
        return [typed(item) for item in part] if isinstance(part, list) else part

    result = tojson(typed(value), ensure_ascii=ascii_only, indent=indent, sort_keys=sort)
    assert result == json.dumps(value, ensure_ascii=ascii_only, indent=indent, sort_keys=sort)
    assert all(start != BLURRED for _, _, start in runs_of(result))
    quoted = {origin for length, origin, _ in runs_of(result) if length}
    assert len(quoted - {0}) <= count


TEMPLATES = [
    "{{ 'small ' + messages[0].content + eos }}",
    "{{ messages[0]['content'] | trim ~ ' small' }}",
    "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t ~ m.content %}{% endfor %}{{ n.t }}",
    "{% macro show(m) %}small {{ m.content }}{% endmacro %}{{ show(messages[0]) }}",
    "{% set x %}small {{ messages[0].content }}{% endset %}{{ x | trim }}",
    "{{ '%s small %s' % (messages[0].content, eos) }}",
    "{{ '{} small {x}'.format(messages[0].content, x=eos) }}",
    "{{ ['small', messages[0].content] | join(', ') }}",
    "{{ ' '.join([messages[0].content, 'small']) }}",
    "{{ messages[0].content | replace('T', 'small') }}",
    "{{ messages | map(attribute='content') | join }}",
    "{% for line in messages[0].content.split('\\n') %}{{ line.strip() }} small{% endfor %}",
    "{% filter trim %}{{ messages[0].content }}{% endfilter %}",
    "{{ messages[0].content if messages[0].content is string else 'small' }}{{ eos | default('x') }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% else %}none{% endfor %}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_keep_origins(source: str) -> None:
    text, runs, leaves = render(source)
    place = 0
    for length, origin, start in runs:
        part = text[place : place + length]
        assert start != BLURRED and (origin > 0 or part == part.lower())
        if origin:
            assert leaves[origin - 1].text[start : start + length] == part
        place += length
    assert any(origin > 0 for _, origin, _ in runs)


def test_values_printed_as_python_text_count_as_typed() -> None:
    text, runs, _ = render("{{ messages[0].extra }}", extra={"A": ["B", 1]})
    assert text == "{'A': ['B', 1]}"
    assert all(origin > 0 for length, origin, _ in runs if length)


def test_regions_follow_the_loop_through_inner_loops_captures_and_a_pass_before() -> None:
    source = (
        "head {% for m in messages %}{% if m.role == 'none' %}{% break %}{% endif %}{% endfor %}"
        "{% set out %}{% for m in messages %}({% for c in m.content %}{{ c }}{% endfor %}"
        "{% for other in messages %}{% endfor %})\n{% endfor %}{% endset %}{{ out | trim }} tail"
    )
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "BC"}]
    chat = TypedChat(messages, None)
    traced = read_trace(ChatTemplate(source).render(chat, len(messages), {}), chat)
    stretches = {key: [traced.text[a:b] for a, b in value] for key, value in traced.regions.items()}
    assert stretches == {0: ["(A)\n"], 1: ["(BC)"]}
    assert traced.text[traced.tail :] == " tail"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TemplateLimitError),
        ("{{ 'a' * 10 ** 11 }}", TemplateLimitError),
        ("{{ ''.center(10 ** 11) }}", TemplateLimitError),
        ("{{ '{:>99999999999}'.format('a') }}", TemplateLimitError),
        ("{{ 9 ** (9 ** 9) }}", TemplateLimitError),
        ("{{ ''.__class__.__mro__ }}", SecurityError),
        ("{{ cycler.__init__.__globals__ }}", SecurityError),
        ("{{ namespace(_x=1) }}", SecurityError),
        ("{{ messages.append(1) }}", SecurityError),
        ("{{ raise_exception('no ' + messages[0].role) }}", TemplateError),
    ],
)
def test_foreign_code_is_stopped(source: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        render(source)
