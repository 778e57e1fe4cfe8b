"""Messages of errors: their form, their length, and how lists in them are cut."""

from __future__ import annotations

import pytest

from lorafit.errors import MESSAGE_LIMIT_CHARACTERS, Problems, UsageError
from lorafit.kinds.fields import listed


def names(count: int) -> list[str]:
    return [f"name-{number:03d}" for number in range(count)]


@pytest.mark.parametrize("count", [5, 24, 25, 26, 27, 28, 29, 30, 31, 200])
def test_a_list_is_cut_between_two_names(count: int) -> None:
    message = str(UsageError("'x' is unknown", key="--gpu", todo=f"one of: {', '.join(names(count))}"))
    assert len(message) <= MESSAGE_LIMIT_CHARACTERS
    shown, _, more = message.partition(" and ")
    kept = shown.split("one of: ")[1].split(", ")
    assert kept == names(count)[: len(kept)]
    assert more == (f"{count - len(kept)} more" if len(kept) < count else "")
    assert count > 26 or len(kept) == count


def test_what_is_no_list_is_cut_as_text() -> None:
    message = str(UsageError("no", todo="look, " + "x" * 400))
    assert message.endswith("x…") and len(message) == MESSAGE_LIMIT_CHARACTERS


@pytest.mark.parametrize("folder", ["m", "/models/" + "x" * 170])
@pytest.mark.parametrize("what", ["w " * 150, "6 missing tensors (a.b)"])
def test_what_to_do_is_told_whole(folder: str, what: str) -> None:
    todo = "weights and config.json must belong together, all of them; get the whole model"
    message = UsageError(what, file=folder, key="model.base", todo=todo).one_line
    assert message.endswith(f"; {todo}") and message.startswith(folder) and len(message) <= MESSAGE_LIMIT_CHARACTERS


def test_names_of_a_row_are_counted() -> None:
    assert listed(names(8)) == ", ".join(names(8))
    assert listed(names(11)) == ", ".join(names(8)) + " and 3 more"


def test_json_holds_the_message_and_its_parts() -> None:
    error = UsageError("is wrong", file="r.yaml", line=3, key="a.b", todo="mend it")
    assert error.to_json() == {
        "exit_code": 2,
        "message": "r.yaml:3: a.b: is wrong; mend it",
        "what": "is wrong",
        "file": "r.yaml",
        "line": 3,
        "column": None,
        "key": "a.b",
        "todo": "mend it",
    }


def test_of_several_errors_the_last_line_cuts_no_list_a_second_time() -> None:
    """The first error's own line lists all names; where they do not fit behind the count, none are listed again."""
    first = UsageError("unknown kind", file="r.yaml", line=3, key="a.b", todo=f"available: {', '.join(names(23))}")
    assert first.one_line.endswith(names(23)[-1])
    last = Problems([first, UsageError("is wrong")], file="some-recipe.yaml").one_line
    assert last == "some-recipe.yaml: 2 errors; first: r.yaml:3: a.b: unknown kind"


def test_advice_is_no_list_of_names() -> None:
    message = UsageError("x" * 250, todo="give --output, or change it back and add --resume " + "y" * 40).one_line
    assert " more" not in message
