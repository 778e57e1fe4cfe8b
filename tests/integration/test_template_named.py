"""`data.chat_template` names a shipped template or a file; what else it names is the recipe's error, with its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_model import CHATML
from tests.support.world import World, say_all

COMMANDS = (["validate", "r.yaml"], ["preview", "r.yaml"], ["train", "r.yaml"])


def name_template(world: World, named: str) -> int:
    return world.recipe(("data:", f"data:\n  chat_template: {named}"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_name_that_is_nothing_is_said_at_its_line(world: World, command: list[str]) -> None:
    line = name_template(world, "chatlm")
    outcome = world.run(*command)
    say_all(outcome, 3, f"r.yaml:{line}:18: data.chat_template", "did you mean chatml", "alpaca, chatml, hermes, plain")
    assert not world.loaded and not (world.root / "run").exists()


def test_shipped_names_and_files_beside_the_recipe_are_valid(world: World, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "own.jinja").write_text(CHATML, encoding="utf-8")
    for named in ("hermes", "chatml", "null", "deep/own.jinja", str(tmp_path / "deep" / "own.jinja")):
        name_template(world, named)
        say_all(world.run("validate", "r.yaml"), 0)
    os.chdir(tmp_path / "deep")  # paths are relative to the recipe
    say_all(world.run("validate", "../r.yaml"), 0)
    say_all(world.run("validate", "../r.yaml", "--set", "data.chat_template=own.jinja"), 3, "--set", "own.jinja")


def test_what_is_no_text_is_no_template(world: World, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_text(" \n", encoding="utf-8")
    (tmp_path / "latin").write_bytes("{{ 'ä' }}".encode("latin-1"))
    (tmp_path / "huge").write_bytes(b"x" * (1 << 20) + b"x")
    os.mkfifo(tmp_path / "pipe")
    for named, said in (
        ("folder", "not a regular file"),
        ("empty", "is empty"),
        ("latin", "not UTF-8"),
        ("huge", "larger than 1 MiB"),
        ("pipe", "not a regular file"),
        ("~nobody-of-this-name/t.jinja", "cannot be read"),
    ):
        line = name_template(world, f'"{named}"')
        say_all(world.run("validate", "r.yaml"), 3, f"r.yaml:{line}:", "data.chat_template", said)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_template_is_judged_beside_every_other_error(world: World, command: list[str]) -> None:
    """Not only once the others are mended."""
    line = world.recipe(("data:", "data:\n  nonsens: 1\n  chat_template: llama3"))
    outcome = world.run(*command)
    say_all(outcome, 3, "2 errors")
    own = next(text for text in outcome.stderr.splitlines() if f"r.yaml:{line}:18: data.chat_template" in text)
    assert "shipped are alpaca, chatml, hermes, plain" in own and "An instruct model has its own: leave this out" in own
    say_all(world.run(*command, "--set", "data.chat_template=7"), 3, "2 errors")


def test_a_file_that_is_no_jinja_is_said_by_validate(world: World, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}", encoding="utf-8")
    line = name_template(world, "t.jinja")
    for command in COMMANDS:
        said = ("template file 't.jinja' is not valid, line 2", "mend it there")
        say_all(world.run(*command), 5, f"r.yaml:{line}:18: data.chat_template", *said)
    assert not world.loaded


def test_jinja_is_read_only_for_a_template_of_its_own(world: World, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML, encoding="utf-8")
    show = "import sys; from lorafit import validate; validate('r.yaml'); print('jinja2' in sys.modules)"
    for named, is_read in (("chatml", "False"), ("own.jinja", "True")):
        name_template(world, named)
        done = subprocess.run([sys.executable, "-c", show], capture_output=True, encoding="utf-8", check=True)
        assert done.stdout.split()[-1] == is_read


def test_a_refused_system_prompt_is_said_at_its_line_once(world: World, tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (tmp_path / "t.jinja").write_text(refusing + CHATML, encoding="utf-8")
    line = world.recipe(("data:", "data:\n  chat_template: t.jinja\n  system_prompt: Be kind."))
    for command in COMMANDS[1:]:
        outcome = world.run(*command)
        say_all(outcome, 3, f"r.yaml:{line}:18: data.system_prompt", "system role not supported", "chat_template")
        assert outcome.stderr.count("error: ") == 1 and not world.loaded
    say_all(world.run("preview", "r.yaml", "--set", "data.system_prompt=null"), 0)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", "not valid, line 1"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "not allowed"),
    ],
)
def test_a_file_that_is_no_template_is_said_at_the_line_that_names_it(
    world: World, tmp_path: Path, template: str, said: str
) -> None:
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    line = name_template(world, "t.jinja")
    for command in COMMANDS[1:]:
        say_all(world.run(*command), 5, f"r.yaml:{line}:18: data.chat_template", said)
    assert not world.loaded and not (world.root / "run").exists()
    say_all(world.run("preview", "r.yaml", "--set", "data.chat_template=hermes"), 0)
