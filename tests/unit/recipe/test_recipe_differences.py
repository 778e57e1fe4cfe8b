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


def test_one_is_told_and_the_others_are_named() -> None:
    found = ["seed: 1 was changed to 2", "data.train[0].path: a: b was added", "adapter.r: 4 was changed to 8"]
    assert tell_differences(found[:1]) == found[0]
    assert tell_differences(found[:2]) == f"{found[0]}, and data.train[0].path differs too"
    assert tell_differences(found) == f"{found[0]}, and adapter.r, data.train[0].path differ too"
    many = tell_differences([found[0], *(f"k{number}: 1 was added" for number in range(9))])
    assert many == f"{found[0]}, and k0, k1, k2, k3 and 5 more differ too"
