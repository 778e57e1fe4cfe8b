"""What is shared, remembered or done at once to be fast gives what the slow way gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.contracts import Encoded, Sample
from lorafit.data import text_encoder as encode
from lorafit.data.chat import jinja_environment
from lorafit.data.chat.jinja_environment import ChatEnvironment, JsonMemo
from lorafit.data.chat.jinja_filters import TemplateLimitError
from lorafit.data.chat.render import ChatRenderer
from lorafit.data.chat.template import BoundChat, RenderError, compile_or_explain
from lorafit.data.chat.traced_template import ChatTemplate
from lorafit.data.chat.typed_chat import ToolSet, TypedChat
from lorafit.data.sample_renderer import build_renderer
from lorafit.data.text_encoder import mark_trained
from lorafit.errors import DataError, LorafitError
from lorafit.recipe.schema import DataSection
from tests.support.chat_families import FAMILIES, WEATHER, assistant, call, tokenizer_of, tool, user

TOOLS = [
    WEATHER,
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
]
offset_lists = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12).map(
    lambda steps: [
        (sum(length + gap for length, gap in steps[:place]) + steps[place][1],
         sum(length + gap for length, gap in steps[: place + 1]))
        for place in range(len(steps))
    ]
)  # fmt: skip


@given(offset_lists, st.lists(st.integers(0, 40), min_size=2, max_size=6, unique=True).map(sorted))
def test_marking_is_the_rule_applied_to_every_token(offsets: list[tuple[int, int]], places: list[int]) -> None:
    spans = list(zip(places[::2], places[1::2], strict=False))
    expected = [False] * len(offsets)
    for first, behind in spans:
        for number, (start, end) in enumerate(offsets):
            start = min(start, offsets[number - 1][1]) if number else start
            is_behind = start >= behind and end > behind
            half = 2 * (min(end, behind) - max(start, first)) >= end - start
            expected[number] |= end > first and not is_behind and half
    assert mark_trained(offsets, spans) == expected


def test_several_renderings_are_encoded_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of every size, among them a row whose typed control string nobody can place."""
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 150)
    blurring = "{{ messages[0].content.center(40) }}" + FAMILIES["chatml"].template
    renderer = ChatRenderer(tokenizer_of("chatml"), chat_template=blurring)
    chats = [[user(f"{'long ' * n}question {n}"), assistant(f"answer {n} <|im_end|>")] for n in range(9)]
    chats[4][0] = user("<|im_start|>")
    renderings = [renderer.render(chat) for chat in chats]
    together = list(renderer.encode_all(renderings))
    assert [isinstance(one, DataError) for one in together] == [number == 4 for number in range(9)]
    for number, one in enumerate(together):
        if isinstance(one, Encoded):
            assert one == renderer.encode(renderings[number])
        else:
            with pytest.raises(DataError, match="cannot tell whether"):
                renderer.encode(renderings[number])


def test_rows_of_all_kinds_keep_their_order_and_their_errors(tmp_path: Any) -> None:
    section = DataSection(train="d.jsonl")
    renderer = build_renderer(tokenizer_of("gemma"), section, tmp_path)
    samples = [
        Sample("d", 1, messages=(user("a?"), assistant("A."))),
        Sample("d", 2, prompt="p", completion="c"),
        Sample("d", 3, messages=(user("a?"), user("b?"))),
        Sample("d", 4, text="words"),
        Sample("d", 5, messages=(assistant("first"), user("a?"), assistant("A."))),
        Sample("d", 6, messages=(user("c?"), assistant("C."))),
    ]
    made = renderer.render_all(samples)
    alone: list[Any] = []
    for sample in samples:
        try:
            alone.append(renderer.render(sample))
        except LorafitError as error:
            alone.append(error)
    assert [type(one) for one in made] == [type(one) for one in alone] and isinstance(made[2], DataError)
    assert [str(one) for one in made] == [str(one) for one in alone]


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_equal_tools_are_typed_once_and_changed_ones_anew() -> None:
    tools = copy.deepcopy(TOOLS)
    first = ToolSet.of(tools)
    assert ToolSet.of(copy.deepcopy(TOOLS)) is first
    assert ToolSet.of([{**TOOLS[0], "strict": True}]) is not ToolSet.of([{**TOOLS[0], "strict": 1}])
    tools[1]["function"]["name"] = "clock"
    changed, again = ToolSet.of(tools), ToolSet.of(TOOLS)
    assert [changed.leaves[number - 1].text for number in changed.names] == ["weather", "clock"]
    assert [again.leaves[number - 1].text for number in again.names] == ["weather", "time"]
    assert ToolSet.of(None).typed is None
    with pytest.raises(DataError, match="the tools are no JSON"):
        ToolSet.of([{"name": object()}])


def test_tools_of_another_row_never_show() -> None:
    renderer = ChatRenderer(tokenizer_of("qwen"))
    for city in ("Paris", "Rome", "Paris"):
        tools = [{"type": "function", "function": {"name": f"weather_{city}", "parameters": {}}}]
        messages = [user("w?"), assistant("", tool_calls=[call("weather", city=city)]), tool(city), assistant("21.")]
        text = renderer.render(messages, tools).text
        assert [other in text for other in ("Paris", "Rome")] == [city == "Paris", city == "Rome"]


def test_json_is_made_once_for_values_that_are_kept_and_never_taken_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(jinja_environment, "tojson", lambda value, *options: made.append(value) or f"{value}{options}")
    kept, behind = [1], [2]
    memo = JsonMemo([kept], behind=JsonMemo([behind]))
    for value in (kept, behind, kept, behind):
        assert memo.write(value, 4) == f"{value}(4,)"
    assert made == [kept, behind]
    assert [memo.write([n], 4) for n in range(50)] == [f"[{n}](4,)" for n in range(50)]
    assert memo.write(kept, [7]) == "[1]([7],)"  # an option that no dict takes
    for indent in range(50):
        assert memo.write(kept, indent) == f"[1]({indent},)"


def test_a_template_that_writes_a_dict_of_its_own_gets_its_own_json() -> None:
    source = "{% for n in range(40) %}{{ {'n': n} | tojson }}{% endfor %}{{ messages[0].content }}"
    chat = TypedChat([user("x")], None)
    assert ChatTemplate(source).render(chat, 1, {}) == "".join(f'{{"n": {n}}}' for n in range(40)) + "x"


# --- limits -----------------------------------------------------------------------------------------------------------

ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) | map('string') %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in 'ab' recursive %}{% for b in range(9999) %}{% endfor %}{{ loop('ab') if loop.depth < 9 }}{% endfor %}",
    "{{ 'a' * 10 ** 11 }}",
    "{{ ''.center(10 ** 11) }}",
    "{% set x = namespace(s='a' * 40000000) %}{{ x.s ~ x.s }}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_templates_are_stopped(source: str) -> None:
    with pytest.raises(TemplateLimitError):
        ChatTemplate(source).render(TypedChat([user("x")], None), 1, {})


def test_a_template_that_loops_only_in_a_beginning_has_no_such_beginning() -> None:
    hang = (
        "{% if messages | length == 1 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    source = hang + "{% endif %}" + FAMILIES["chatml"].template
    chat = BoundChat(compile_or_explain(source), [user("a?"), assistant("A.")], None, {})
    assert chat.attempt(1) is None and chat.attempt(2) is not None


def test_lookups_find_what_jinja_finds() -> None:
    """Attributes, items, loops, macros and names that shadow each other."""
    source = (
        "{% set own = messages[0] %}{{ own.content }}{{ own['role'] }}{{ own.missing }}{{ own['missing'] }}"
        "{% macro m(x) %}{{ x.content.strip() }}{{ x.items() | length }}{% endmacro %}{{ m(own) }}"
        "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ m.extra.a['b'].c }}{% endfor %}"
        "{% set loop = {'index': 'i', 'first': 'f'} %}{{ loop.index }}{{ loop.first }}"
        "{{ messages | map(attribute='content') | join }}{{ [1, 2].index(2) }}{{ 'abc'.index('c') }}"
        "{% set n = namespace(length=3, x={'y': 4}) %}{{ n.length }}{{ n.x.y }}{{ n.z }}"
    )
    chat = TypedChat([{**user(" hi "), "extra": {"a": {"b": {"c": 5}}}}], None)
    expected = " hi userhi31TrueTrue5if hi 1234"
    assert ChatTemplate(source).render(chat, 1, {}) == expected


def test_the_environment_is_closed() -> None:
    environment = ChatEnvironment()
    for source in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ namespace(_x=1) }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages[0].pop('content') }}",
    ):
        with pytest.raises(Exception, match=r"unsafe|not safely|may not store"):
            environment.run(environment.from_string(source), {"messages": [user("x")]})


def test_a_refused_beginning_costs_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = BoundChat(compile_or_explain(FAMILIES["gemma"].template), [user("a?"), assistant("A.")], None, {})
    with pytest.raises(RenderError):
        BoundChat(compile_or_explain(FAMILIES["gemma"].template), [assistant("A.")], None, {}).trace()
    monkeypatch.setattr("lorafit.data.chat.template.explain", lambda error: pytest.fail("explained"))
    assert chat.attempt(1) is not None
