"""Two recipes told apart leaf by leaf."""

from __future__ import annotations

from typing import Any

import pytest

from lorafit.recipe.differences import ABSENT, differences, tell_differences


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (1, 1, []),
        (0.5, None, ["k: 0.5 was changed to null"]),
        (True, "auto", ["k: true was changed to auto"]),
        (ABSENT, 3, ["k: 3 was added"]),
        ({"fraction": 0.1}, ABSENT, ["k: a section was taken away"]),
        ([{"path": "a", "limit": None}], [{"path": "b", "limit": None}], ["k[0].path: a was changed to b"]),
        (
            [{"path": "a", "columns": {"prompt": "q"}}],
            [{"path": "b", "columns": {"prompt": "p"}}, {"path": "c"}],
            ["k[0].path: a was changed to b", "k[0].columns.prompt: q was changed to p", "k[1]: c was added"],
        ),
        (["q_proj", "v_proj"], ["q_proj"], ["k: [q_proj, v_proj] was changed to [q_proj]"]),
        (["a"], ["name"] * 20, ["k: [a] was changed to a list of 20"]),
        ("all-linear", ["q_proj"], ["k: all-linear was changed to [q_proj]"]),
        ("x", "/long" * 20 + "/rows.jsonl", [f"k: x was changed to …{('/long' * 20 + '/rows.jsonl')[-39:]}"]),
    ],
)
def test_the_leaves_that_differ(before: Any, now: Any, said: list[str]) -> None:
    assert differences("k", before, now) == said


def test_one_is_told_and_the_others_are_counted() -> None:
    assert tell_differences(["a"]) == "a"
    assert tell_differences(["a", "b"]) == "a, and 1 more key"
    assert tell_differences(["a", "b", "c"]) == "a, and 2 more keys"
