"""Bad recipes, bad command lines and bad rows, by the command line: what each says, how it ends, what it leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.privileges import drop_dac, limit_file_size
from tests.support.processes import PROGRAM, Process, finish
from tests.support.tiny_model import make_base
from tests.support.world import Outcome, World, say_all, without_network

RECIPE_COMMANDS = ("validate", "train", "preview", "estimate-memory")

# Every command reads recipes by one loader, whose faults stand in tests/unit/recipe/test_recipe_faults.py.
# (text of the good recipe, what stands there instead)s, what the last line says, the commands
RECIPE_FAULTS = {
    "two errors": (
        [("  dropout: 0.0", "  dropuot: 0.1"), ("learning_rate: 1.0e-2", "learning_rate: fast")],
        ["r.yaml", "2 errors", "first: r.yaml:11:3: adapter.dropuot: unknown key; did you mean dropout?"],
        RECIPE_COMMANDS,
    ),
    "a tag": ([("name: tiny", "name: !!python/object/apply:os.system [touch PWNED]")], ["r.yaml:1"], ["validate"]),
    "nothing to train": ([("  dropout: 0.0", "  target_modules: []")], ["no trainable parameters"], ["train"]),
}


@pytest.mark.parametrize(("changes", "said", "commands"), RECIPE_FAULTS.values(), ids=RECIPE_FAULTS)
def test_recipe(world: World, changes: list[tuple[str, str]], said: list[str], commands: list[str]) -> None:
    world.recipe(*changes)
    before = world.digests()
    for command in commands:
        say_all(world.run(command, "r.yaml"), 3, *said)
    assert world.digests() == before
    assert world.loaded == []


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_recipe_missing(world: World, command: str) -> None:
    before = world.digests()
    say_all(world.run(command, "nope.yaml"), 2, "nope.yaml", "no such file")
    assert world.digests() == before


@pytest.mark.parametrize("command", ["validate", "train"])
def test_recipe_is_a_folder(world: World, command: str) -> None:
    (world.root / "folder.yaml").mkdir()
    say_all(world.run(command, "folder.yaml"), 2, "folder.yaml")


def test_recipe_unreadable(world: World) -> None:
    (world.root / "r.yaml").chmod(0)
    before = sorted(path.name for path in world.root.iterdir())
    say_all(world.spawn("validate", "r.yaml", prepare=drop_dac), 2, "r.yaml", "permission denied")
    assert sorted(path.name for path in world.root.iterdir()) == before


def test_secrets_are_refused_and_not_echoed(world: World) -> None:
    line = world.recipe(("name: tiny", "name: tiny\nhf_token: hf_canary"))
    for command in RECIPE_COMMANDS:
        outcome = world.run(command, "r.yaml")
        say_all(outcome, 8, f"r.yaml:{line}", "environment")
        assert "canary" not in outcome.stdout + outcome.stderr


def test_no_trainable_parameters_where_a_target_matches_nothing(world: World) -> None:
    world.recipe(("  dropout: 0.0", "  target_modules: [query]"))
    say_all(world.run("train", "r.yaml"), 3, "adapter.target_modules", "query", "q_proj")
    assert not (world.root / "run").exists()
    assert world.loaded == []


def test_relative_paths_belong_to_the_recipe(
    world: World, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_all(world.run("train", "r.yaml"), 0)
    here = world.weights()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    (elsewhere / "d.jsonl").write_text(json.dumps({"question": "another", "answer": "file"}) + "\n")
    shutil.rmtree(world.root / "run")
    say_all(world.run("train", str(world.root / "r.yaml")), 0)
    assert world.weights() == here
    assert [path.name for path in elsewhere.iterdir()] == ["d.jsonl"]


# --- the command line ---------------------------------------------------------------------------------------------

COMMAND_LINES = [
    (["trian", "r.yaml"], ["trian", "did you mean train"]),
    (["train", "r.yaml", "--ouput", "d"], ["--ouput", "did you mean", "--output"]),
    (["train"], ["recipe"]),
    (["train", "r.yaml", "r.yaml"], ["r.yaml"]),
    (["train", "r.yaml", "--resume-from", "-1"], ["--resume-from", "must be at least 0"]),
    (["train", "r.yaml", "--resume-from", "x"], ["--resume-from", "expected a whole number"]),
    (["train", "r.yaml", "--output"], ["--output"]),
    (["preview", "r.yaml", "--rows", "-1"], ["--rows", "must be at least 0"]),
    (["eval", "run", "--limit", "0"], ["--limit", "must be at least 1"]),
    (["generate", "run"], ["prompt"]),
    (["generate", "run", "--prompt", "a", "--input", "d.jsonl"], ["--prompt"]),
    (["generate", "run", "--prompt", "a", "--temperature", "-1"], ["--temperature", "must be at least 0"]),
    (["merge", "run"], ["--output"]),
    (["estimate-memory", "r.yaml", "--gpu", "-1GiB"], ["--gpu", "range"]),
    (["estimate-memory", "r.yaml", "--gpu", "rtx-9999"], ["--gpu", "rtx-9999"]),
    (["estimate-memory", "r.yaml", "--gpu", "12", "GB"], ["(GB); write a size as one word, e.g. 24GB, or see"]),
    (["generate", "run", "--prompt", "two", "words"], ["(words); quote what has blanks, or see lorafit generate"]),
    (["generate", "run", "What is (this) of 7?"], ["write the text behind --prompt, e.g. --prompt", "or see lorafit"]),
    (["classify", "run", "two", "words"], ["write the text behind --prompt, e.g. --prompt", "or see lorafit classify"]),
    (["preview", "r.yaml", "two words"], ["(two words); see lorafit preview --help"]),
    (["estimate-memory", "r.yaml", "--headroom", "2"], ["--headroom", "must be at most 0.9"]),
    (["eval", "nope"], ["nope", "no such file"]),
    (["merge", "nope", "--output", "m"], ["nope", "no such file"]),
    (["generate", "nope", "--prompt", "a"], ["nope", "no such file"]),
]


ROWS_FOR_A_RECIPE = {
    "rows.jsonl": b'{"a": 1}\n{"a": 2}\n',
    "row.jsonl": b'{"a": 1}\n',
    "rows.json": b'[{"question": "a"}]',
    "rows.csv": b"text,label\na: b,c\n",
    "rows.parquet": b"PAR1\xff\xfe",
    "long.jsonl": b'{"a": 1}\n' * 200_000,
}


@pytest.mark.parametrize("name", ROWS_FOR_A_RECIPE)
def test_rows_in_the_place_of_a_recipe(world: World, name: str) -> None:
    (world.root / name).write_bytes(ROWS_FOR_A_RECIPE[name])
    outcome = world.run("validate", name)
    say_all(outcome, 3, f"error: {name}: looks like rows, not like a recipe; name a recipe")
    assert len(outcome.stderr.splitlines()) == 1


def test_a_recipe_may_be_json(world: World) -> None:
    values = yaml.safe_load((world.root / "r.yaml").read_text(encoding="utf-8"))
    (world.root / "r.json").write_text(json.dumps(values), encoding="utf-8")
    say_all(world.run("validate", "r.json"), 0, "is valid")


@pytest.mark.parametrize(("arguments", "said"), COMMAND_LINES, ids=[" ".join(line) for line, _ in COMMAND_LINES])
def test_command_line(world: World, arguments: list[str], said: list[str]) -> None:
    before = world.digests()
    say_all(world.run(*arguments), 2, *said)
    assert world.digests() == before
    assert world.loaded == []


def test_set_goes_through_the_same_checks(world: World) -> None:
    before = world.digests()
    for command in RECIPE_COMMANDS:
        outcome = world.run(command, "r.yaml", "--set", "adapter.dropuot=0.1")
        say_all(outcome, 3, "--set adapter.dropuot=0.1: adapter.dropuot: unknown key; did you mean dropout?")
    assert world.digests() == before


def test_output_parent_not_writable(world: World) -> None:
    (world.root / "closed").mkdir(mode=0o555)
    for output in ("closed/run", "closed/deeper/run"):
        outcome = world.spawn("train", "r.yaml", "--output", output, prepare=drop_dac)
        say_all(outcome, 2, "output", "not writable")
        assert list((world.root / "closed").iterdir()) == []


@pytest.mark.parametrize(
    "output",
    ["", "data", "data/d.jsonl", "base", "template", "start", "link", "data/../data", "base/"],
    ids=lambda output: output or "the recipe's own folder",
)
def test_output_is_an_input(world: World, output: str) -> None:
    """The recipe's own folder, the folder or file of the data, the model, the template, an adapter to start from."""
    for folder in ("data", "template", "start"):
        (world.root / folder).mkdir()
    shutil.copytree(world.base, world.root / "base")
    world.rows(name="data/d.jsonl")
    (world.root / "template" / "t.jinja").write_text("{{ messages }}")
    (world.root / "link").symlink_to("base")
    world.recipe(
        (f"  base: {world.base}", "  base: base"),
        ("  train: d.jsonl", "  train: data/d.jsonl\n  chat_template: template/t.jinja"),
        ("  dropout: 0.0", "  dropout: 0.0\n  init_from: start"),
    )
    before = world.digests()
    say_all(world.run("train", "r.yaml", "--output", str(world.root / output)), 2, "output", "also an input")
    say_all(world.run("train", "r.yaml", "--set", f"output={world.root / output}"), 2, "output", "also an input")
    assert world.digests() == before
    assert world.loaded == []


@pytest.mark.parametrize("kind", ["file", "long", "deep and long", "file above", "loop"])
def test_output_that_cannot_be(world: World, kind: str) -> None:
    (world.root / "file").write_text("mine")
    (world.root / "loop").symlink_to("loop")
    output, said = {
        "file": ("file", "output"),
        "long": ("x" * 300, "name too long"),
        "deep and long": ("a/" + "é" * 150 + "/b", "name too long"),
        "file above": ("file/run", "output"),
        "loop": ("loop/run", "output"),
    }[kind]
    before = world.digests()
    say_all(world.run("train", "r.yaml", "--output", output), 2, said)
    say_all(world.run("train", "r.yaml", "--set", f"output={output}"), 2, said)
    assert world.digests() == before
    assert world.loaded == []


@pytest.mark.parametrize("name", ["x;touch PWNED$(id)", "-rf", "~", "ä 🙂 b", "a'b\"c", "$HOME", "%s{0}", "[bold]x"])
def test_output_names_are_literal(world: World, name: str) -> None:
    world.recipe(("output: run", f"output: {json.dumps(name, ensure_ascii=False)}"), ("max_steps: 2", "max_steps: 1"))
    outcome = world.run("train", "r.yaml")
    say_all(outcome, 0, name)
    assert (world.root / name / "adapter" / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in world.root.iterdir()) == sorted(["d.jsonl", "r.yaml", name])
    say_all(world.run("eval", f"./{name}", "--limit", "1", "--split", "train"), 0, name)


def test_trailing_slash_and_link_as_output(world: World) -> None:
    (world.root / "disk").mkdir()
    (world.root / "linked").symlink_to("disk")
    for output in ("slash/", "linked"):
        say_all(world.run("train", "r.yaml", "--output", output), 0)
        assert (world.root / output / "adapter").is_dir()
    assert (world.root / "linked").is_symlink()
    assert (world.root / "disk" / "manifest.json").is_file()


def test_foreign_files_beside_a_run_stay(world: World) -> None:
    """What its user keeps in a run's folder is left alone by whatever goes on with the run."""
    say_all(world.run("train", "r.yaml", "--set", "checkpoints.keep_last=1", "--set", "training.schedule=constant"), 0)
    (world.root / "run" / "checkpoints" / "mine").mkdir()
    (world.root / "run" / "notes.txt").write_text("mine")
    longer = ["--set", "training.max_steps=3", "--set", "training.schedule=constant"]
    resumed = world.run("train", "r.yaml", "--resume", "--set", "checkpoints.keep_last=1", *longer)
    say_all(resumed, 0, "step 3")
    assert "resumed at step 2\n" in resumed.stderr and "training 3/3 " in resumed.stderr
    assert "trained 3 steps, 2 of them before this resume, in " in resumed.stdout and " altogether" in resumed.stdout
    assert (world.root / "run" / "notes.txt").read_text() == "mine"
    assert (world.root / "run" / "checkpoints" / "mine").is_dir()


def test_a_second_run_into_the_same_folder(world: World) -> None:
    world.rows(name="other.jsonl")
    say_all(world.run("train", "r.yaml"), 0)
    before = world.digests()
    finished = world.run("train", "r.yaml")
    say_all(finished, 2, "run", "output", "finished", "lorafit eval", "--output")
    assert "--resume" not in finished.last
    changed = world.run("train", "r.yaml", "--set", "adapter.r=8")
    say_all(changed, 2, "run", "output", "adapter.r: 4 was changed to 8", "--output")
    say_all(world.run("train", "r.yaml", "--set", "adapter.r=8", "--resume"), 6, "adapter.r")
    one, three = (
        ["--set", "data.train[0].path=other.jsonl"],
        ["--set", "training.max_grad_norm=null", "--set", "seed=3"],
    )
    path = "data.train[0].path: ../d.jsonl was changed to ../other.jsonl"
    keys = "seed, training.max_grad_norm differ too"
    advice = "give another --output, or change it back and add --resume"
    say_all(world.run("train", "r.yaml", *one), 2, f"holds another run ({path}); {advice}")
    say_all(world.run("train", "r.yaml", *one, *three), 2, f"holds another run ({path}, and {keys}); {advice}")
    say_all(world.run("train", "r.yaml", *one, *three, "--resume"), 6, f"would not be the same run: {path}, and {keys}")
    say_all(world.run("train", "r.yaml", "--resume-from", "77"), 6, "77")
    done = world.run("train", "r.yaml", "--resume")
    say_all(done, 0, "already complete")
    assert "plan:" not in done.stderr and "micro-batch" not in done.stderr
    assert world.digests() == before


def test_resume_of_another_recipe_reads_no_rows(world: World) -> None:
    say_all(world.run("train", "r.yaml"), 0)
    outcome = world.run("train", "r.yaml", "--resume", "--set", "adapter.r=8")
    say_all(outcome, 6, "adapter.r")
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize("change", ["rows", "checkpoint"])
def test_a_refused_resume_shows_no_plan(world: World, change: str) -> None:
    say_all(world.run("train", "r.yaml"), 0)
    if change == "rows":
        world.rows(13)
    else:
        for state in (world.root / "run" / "checkpoints").glob("*/state.json"):
            state.write_text("{")
    outcome = world.run("train", "r.yaml", "--resume")
    say_all(outcome, 6, {"rows": "the data changed", "checkpoint": "no usable checkpoint"}[change])
    assert "plan:" not in outcome.stderr


def test_an_unfinished_run_is_gone_on_with(world: World) -> None:
    say_all(world.run("train", "r.yaml"), 0)
    (world.root / "run" / "result.json").unlink()
    say_all(world.run("train", "r.yaml"), 2, "holds a run already", "lorafit train r.yaml --resume")


# --- rows -----------------------------------------------------------------------------------------------------------


def text_rows(count: int, **changes: str) -> str:
    """Good rows of plain text; `row3="..."` puts something else on line 3."""
    lines = [json.dumps({"text": f"the shop opens at {number}"}) for number in range(1, count + 1)]
    for place, line in changes.items():
        lines[int(place.removeprefix("row")) - 1] = line
    return "".join(line + "\n" for line in lines)


def chat(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": "it opens"} for role in roles]})


DATA_FAULTS: list[tuple[str, bytes | str, list[str]]] = [
    ("empty", b"", ["d.jsonl", "no rows"]),
    ("only blank lines", b"\n\n \n", ["d.jsonl", "no rows"]),
    ("malformed in the middle", text_rows(20, row17="{oops}"), ["d.jsonl:17", "invalid JSON"]),
    ("truncated last line", text_rows(5)[:-12], ["d.jsonl:5", "truncated"]),
    ("typo in a key", text_rows(3, row2='{"txet": "the shop"}'), ["d.jsonl:2", "missing", "text"]),
    ("type changes", '{"text": 1}\n{"text": "x"}\n', ["d.jsonl:1", "text", "expected string"]),
    ("type changes later", text_rows(9, row8='{"text": 1}'), ["d.jsonl:8", "text", "expected string"]),
    ("text is null", text_rows(9, row8='{"text": null}'), ["d.jsonl:8", "text"]),
    ("no assistant turn", f"{chat('user', 'assistant')}\n{chat('user')}\n", ["d.jsonl:2", "assistant"]),
    ("only a system turn", f"{chat('system')}\n", ["d.jsonl:1", "assistant"]),
    ("empty messages", f'{chat("user", "assistant")}\n{{"messages": []}}\n', ["d.jsonl:2", "assistant"]),
    ("no rows but messages", '{"messages": []}\n', ["d.jsonl:1", "assistant"]),
    ("duplicate key", '{"text": "a", "text": "b"}\n', ["d.jsonl:1", "duplicate key"]),
    ("NaN", '{"text": NaN}\n', ["d.jsonl:1", "NaN"]),
    ("Infinity", text_rows(3, row3='{"text": "a", "x": -Infinity}'), ["d.jsonl:3", "Infinity"]),
    ("lone surrogate", '{"text": "\\ud800"}\n', ["d.jsonl:1", "surrogate"]),
    ("invalid UTF-8", text_rows(3).encode().replace(b"at 2", b"at \xe9"), ["d.jsonl:2", "UTF-8"]),
    ("NULs", text_rows(4, row3="\0\0\0\0"), ["d.jsonl:3", "NUL"]),
    ("UTF-16", text_rows(4).encode("utf-16"), ["d.jsonl", "UTF-8"]),
    ("UTF-16 without a mark", text_rows(4).encode("utf-16-le"), ["d.jsonl", "UTF-8"]),
    ("deep", text_rows(3, row1='{"text":' + "[" * 3000 + "]" * 3000 + "}"), ["d.jsonl:1", "nested"]),
    ("git-lfs", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", ["d.jsonl", "git-lfs pointer"]),
    ("web page", "<!DOCTYPE html>\n<html></html>\n", ["d.jsonl", "web page"]),
    ("a list in jsonl", "[1, 2]\n", ["d.jsonl:1"]),
    ("unknown format", '{"alpha": "a", "beta": "b"}\n', ["d.jsonl", "alpha"]),
]


@pytest.mark.parametrize(("content", "said"), [fault[1:] for fault in DATA_FAULTS], ids=[f[0] for f in DATA_FAULTS])
def test_rows(world: World, content: bytes | str, said: list[str]) -> None:
    (world.root / "d.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = world.digests()
    for command in ("preview", "train"):
        say_all(world.run(command, "r.yaml"), 4, *said)
    assert world.digests() == before
    assert world.loaded == []


def test_data_file_missing(world: World) -> None:
    world.recipe(("train: d.jsonl", "train: [{path: nope.jsonl}]"))
    for command in ("preview", "train"):
        say_all(world.run(command, "r.yaml"), 4, "r.yaml:", "data.train[0].path: nope.jsonl: no such file")
    assert world.loaded == []
    assert not (world.root / "run").exists()


def test_all_missing_files_are_named(world: World) -> None:
    world.recipe(("train: d.jsonl", "train: [one.jsonl, two.jsonl]"))
    outcome = world.run("train", "r.yaml")
    say_all(outcome, 4, "2 errors", "one.jsonl")
    assert "two.jsonl" in outcome.stderr


def test_data_unreadable(world: World) -> None:
    (world.root / "d.jsonl").chmod(0)
    say_all(world.spawn("train", "r.yaml", prepare=drop_dac), 4, "d.jsonl", "permission denied")


VARIANTS: dict[str, Callable[[bytes], bytes]] = {
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "CRLF": lambda text: text.replace(b"\n", b"\r\n"),
    "no final newline": lambda text: text.rstrip(b"\n"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_harmless_bytes_change_no_row(world: World, variant: str) -> None:
    def rows() -> list[tuple[list[int], list[int]]]:
        return [(row["input_ids"], row["labels"]) for row in world.run("preview", "r.yaml", "--json").json["rows"]]

    plain, file = rows(), world.root / "d.jsonl"
    file.write_bytes(VARIANTS[variant](file.read_bytes()))
    assert rows() == plain
    assert len(plain) == 12


def test_long_line_is_not_held_in_memory(world: World) -> None:
    with (world.root / "d.jsonl").open("wb") as file:
        file.write(b'{"text":"')
        for _ in range(50):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n')
    # A small launcher: what a process held before exec counts as its child's peak, and pytest holds much.
    launcher = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); print(done.stderr)"
    )
    command = [sys.executable, "-c", launcher, str(PROGRAM), "train", "r.yaml"]
    done = subprocess.run(
        command, cwd=world.root, env=dict(world.environment), capture_output=True, text=True, check=True
    )
    figures, _, said = done.stdout.partition("\n")
    code, peak_kib = map(int, figures.split())
    assert code == 4, said
    last = said.strip().splitlines()[-1]
    assert "d.jsonl:1" in last and "longer than" in last
    peak_mib = peak_kib / 1024
    assert peak_mib < 700, peak_mib


def test_loading_scripts_are_not_executed(world: World) -> None:
    (world.root / "d").mkdir()
    shutil.copy(world.root / "d.jsonl", world.root / "d" / "d.jsonl")
    (world.root / "d" / "d.py").write_text("from pathlib import Path\nPath('PWNED').touch()\n")
    for path in ("d", "d/d.py"):
        world.recipe(("train: d.jsonl", f"train: {path}"))
        for command in ("preview", "train"):
            say_all(world.run(command, "r.yaml"), 8, "d.py", "not executed")
    assert not list(world.root.rglob("PWNED"))


def test_every_row_loses_all_labels(world: World) -> None:
    world.recipe(("  max_length: 128", "  max_length: 8\n  overlength: drop"))
    for command in ("preview", "train"):
        outcome = world.run(command, "r.yaml")
        say_all(outcome, 4, "max_length")
        assert "no trainable tokens" in outcome.last or "no rows" in outcome.last, outcome.last
    assert world.loaded == []


def test_overlong_rows_are_an_error_unless_said(world: World) -> None:
    world.recipe(("  max_length: 128", "  max_length: 24"))
    say_all(world.run("train", "r.yaml"), 4, "d.jsonl:", "max_length")
    assert world.loaded == []


def test_bad_rows_over_their_limit(world: World) -> None:
    bad = {f"row{number}": "{oops}" for number in range(5, 100, 10)}
    (world.root / "d.jsonl").write_text(text_rows(100, **bad))
    world.recipe(("  max_length: 128", "  max_length: 128\n  bad_rows: {policy: skip, max_fraction: 0.05}"))
    for command in ("preview", "train"):
        say_all(world.run(command, "r.yaml"), 4, "10 of 100", "limit")
    assert world.loaded == []
    world.recipe(("  max_length: 128", "  max_length: 128\n  bad_rows: {policy: skip, max_fraction: 0.10}"))
    say_all(world.run("preview", "r.yaml"), 0, "d.jsonl:5")


def preview_ids(world: World, name: str = "r.yaml") -> list[list[int]]:
    return [row["input_ids"] for row in world.run("preview", name, "--json").json["rows"]]


def test_cache_of_another_tokenizer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(world.root / "warm"))
    first = preview_ids(world)
    assert "cache hit" in world.run("preview", "r.yaml").stderr
    other = make_base(world.root / "other", seed=1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []  # a tokenizer of single bytes
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    world.recipe((f"base: {world.base}", "base: other"), ("max_length: 128", "max_length: 256"), name="o.yaml")
    outcome = world.run("preview", "o.yaml")
    say_all(outcome, 0, "cache miss", "tokenizer")
    warm = preview_ids(world, "o.yaml")
    monkeypatch.setenv("LORAFIT_CACHE", str(world.root / "cold"))
    assert preview_ids(world, "o.yaml") == warm != first


# --- what needs a process of its own --------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], process: Process, seconds: float = 120) -> None:
    """Until something is seen; fails where the process ends before."""
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, "the process ended too soon"
        assert time.monotonic() - began < seconds, "nothing was seen"
        time.sleep(0.005)


def metric_lines(world: World, run: str = "run") -> list[dict[str, Any]]:
    file = world.root / run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Child processes compute with one thread, so that bits can be compared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_output_closed_by_head(world: World) -> None:
    """`lorafit train r.yaml | head -1`, where head is already gone."""
    process = world.start("train", "r.yaml", "--verbose")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(120) in (0, 141), said
    assert "BrokenPipe" not in said and "Traceback" not in said
    say_all(world.run("train", "r.yaml", "--resume"), 0, "already complete")


def test_preview_into_head(world: World) -> None:
    """`lorafit preview r.yaml | head -1`, where much more is written than a pipe holds."""
    world.rows(2000)
    process = world.start("preview", "r.yaml", "--rows", "2000")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().strip()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(120) == 141, said
    assert "BrokenPipe" not in said and "Traceback" not in said


@pytest.mark.skipif(not without_network(), reason="this machine lets nobody leave its network")
def test_no_network_and_modules_in_the_current_folder(world: World, one_thread: None) -> None:
    for module in ("yaml", "torch", "json", "transformers", "numpy", "recipe", "lorafit"):
        (world.root / f"{module}.py").write_text("open('PWNED', 'w').close()\n")
    say_all(world.spawn("train", "r.yaml", before=without_network()), 0)
    assert not list(world.root.rglob("PWNED"))
    alone = world.weights()
    for module in world.root.glob("*.py"):
        module.unlink()
    say_all(world.run("train", "r.yaml", "--output", "again"), 0)
    assert world.weights("again") == alone


def test_our_own_bug_names_a_saved_traceback(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tempfile

    from lorafit import pipeline

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("a thing\nthat nobody " + "thought of " * 100)

    monkeypatch.setattr(pipeline, "validate", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcome = world.run("validate", "r.yaml")
    say_all(outcome, 1, "bug", str(tmp_path))
    saved = next(tmp_path.glob("lorafit-traceback-*"))
    assert saved.name in outcome.last
    assert "KeyError" in saved.read_text() and "in fail" in saved.read_text()
    debugged = world.run("validate", "r.yaml", "--debug")
    assert debugged.code == 1
    assert "in fail" in debugged.stderr


KILLED_WHILE_PREPARING = """
import os, signal, sys
from lorafit import cli
from lorafit.data import store
real = store.StoreWriter.write
def write(self, chunk):
    real(self, chunk)
    os.kill(os.getpid(), signal.SIGKILL)
store.StoreWriter.write = write
cli.main(["preview", "r.yaml"])
"""


def test_killed_while_rows_are_prepared(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.rows(60)
    world.environment["LORAFIT_CACHE"] = str(world.root / "warm")
    done = finish("-c", KILLED_WHILE_PREPARING, cwd=world.root, env=world.environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((world.root / "warm" / "data").iterdir()) != []
    monkeypatch.setenv("LORAFIT_CACHE", str(world.root / "warm"))
    outcome = world.run("preview", "r.yaml", "--json")
    say_all(outcome, 0, "cache miss")
    monkeypatch.setenv("LORAFIT_CACHE", str(world.root / "cold"))
    assert [row["input_ids"] for row in outcome.json["rows"]] == preview_ids(world)
    left = [path for path in (world.root / "warm").rglob("*") if path.name.startswith(".tmp-")]
    assert left == []


def test_interrupted_training_says_how_to_go_on(world: World, one_thread: None) -> None:
    """Ctrl-C: exit 130, the command on the last line, and that command ends where an unbroken run ends."""
    world.recipe(
        ("max_steps: 2", "max_steps: 120"), ("every_steps: 1", "every_steps: 50"), ("dropout: 0.0", "dropout: 0.2")
    )
    process = world.start("train", "r.yaml", "--set", "name=my run", "--output", "a run")
    wait_for(lambda: count_lines(world.root / "a run" / "metrics.jsonl") >= 3, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    last = said.splitlines()[-1]
    assert process.returncode == 130, said
    assert last.startswith("error: ") and "saved step" in last and len(last) <= 300
    assert "Traceback" not in said
    stopped_at = int(re.search(r"saved step (\d+)", last)[1])  # type: ignore[index]
    assert 0 < stopped_at < 120
    command = shlex.split(last.partition("go on with: ")[2])
    assert command[:2] == ["lorafit", "train"] and command[-1] == "--resume"
    say_all(world.run(*command[1:]), 0)
    assert [line["step"] for line in metric_lines(world, "a run") if "loss" in line] == list(range(1, 121))
    say_all(world.run("train", "r.yaml", "--output", "whole"), 0)
    assert world.weights("a run") == world.weights("whole")


def test_interrupted_before_training(world: World) -> None:
    """Ctrl-C while libraries and weights are loaded: a last line, and nothing is left."""
    process = world.start("train", "r.yaml", fresh=True)
    assert process.stderr is not None
    assert "cache" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.splitlines()[-1].startswith("error: stopped by SIGINT")
    assert "Traceback" not in said
    assert not (world.root / "run").exists()


ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from lorafit import cli
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            cli.main(words)
        except SystemExit as stop:
            print(json.dumps([stop.code, said.getvalue()]))
"""


def test_a_run_that_is_not_there_is_said_before_libraries_load(world: World) -> None:
    """A slip in its name, and a run without an adapter, cost no import of torch; the nearest name is offered."""
    say_all(world.run("train", "r.yaml", "--output", "runs/support-de"), 0)
    shutil.rmtree(world.root / "runs" / "support-de" / "adapter")
    say_all(world.run("train", "runs/support-de/recipe.yaml", "--resume", "--dry-run"), 0, "checkpoint is of step 2")
    said = {
        "runs/suport-de": (2, "runs/suport-de: no such file or folder; did you mean runs/support-de?"),
        "runs/support-de": (
            6,
            "runs/support-de: the run has no finished adapter",
            "; go on with it: lorafit train runs/support-de/recipe.yaml --resume, or name one",
            "with --checkpoint: 1, 2",
        ),
        "other": (2, "other: no such file or folder; name a run folder"),
    }
    commands = (["eval"], ["generate", "--prompt", "what"], ["merge", "--output", "m"])
    lines = [[command[0], run, *command[1:]] for command in commands for run in said]
    for line, outcome in zip(lines, without_torch(world, lines), strict=True):
        say_all(outcome, *said[line[1]])


def without_torch(world: World, lines: list[list[str]]) -> list[Outcome]:
    """How commands end where an import of torch would end them."""
    loads = world.root / "early" / "torch" / "__init__.py"
    loads.parent.mkdir(parents=True)
    loads.write_text("raise SystemExit('torch was imported')\n")
    hidden = {"PYTHONPATH": f"{world.root / 'early'}{os.pathsep}{world.environment.get('PYTHONPATH', '')}"}
    done = finish("-c", ONE_AFTER_ANOTHER, json.dumps(lines), cwd=world.root, env=world.environment | hidden)
    return [Outcome(code, "", text) for code, text in map(json.loads, done.stdout.splitlines())]


def test_a_slip_in_a_flag_is_said_before_libraries_load(world: World) -> None:
    say_all(world.run("train", "r.yaml"), 0)
    said = {
        ("classify", "run", "--prompt", " "): (2, "--prompt: the prompt is empty"),
        ("classify", "run", "--input", "gone.txt"): (4, "gone.txt: no such file", f"looked in {world.root}"),
        ("classify", "run", "--prompt", "a", "--output", "r.yaml"): (2, "r.yaml: the output exists"),
        ("merge", "run", "--output", "run"): (2, "the output run is also an input"),
        ("merge", "run", "--output", "."): (2, "the output . holds run, which is also an input"),
        ("merge", "run/adapter", "--output", "run"): (2, "the output run is also an input"),
        ("train", "r.yaml", "--resume-from", "77"): (6, "step 77: no such checkpoint", "there are steps 1, 2"),
    }
    for line, outcome in zip(said, without_torch(world, [list(line) for line in said]), strict=True):
        say_all(outcome, *said[line])


def test_a_dry_run_says_where_a_resume_would_begin(world: World) -> None:
    """As its result, which --quiet leaves."""
    dry = ("train", "r.yaml", "--resume", "--dry-run", "--quiet")
    say_all(world.run(*dry), 0, "nothing to resume in run: the run would start at step 0")
    say_all(world.run(*dry, "--resume-from", "3"), 6, "no such checkpoint; there are none")
    say_all(world.run("train", "r.yaml"), 0)
    say_all(world.run(*dry), 0, "the last checkpoint is of step 2")
    assert "checkpoint" not in world.run("train", "r.yaml", "--output", "other", "--dry-run", "--quiet").stdout


@pytest.mark.parametrize("output", ["d.jsonl/x", "d.jsonl/x/y"])
def test_output_inside_a_file(world: World, output: str) -> None:
    before = world.digests()
    say_all(
        world.run("train", "r.yaml", "--output", output), 2, "output", "d.jsonl, which is a file", "choose a folder"
    )
    say_all(world.run("train", "r.yaml", "--output", "run"), 0)
    say_all(world.run("merge", "run", "--output", output), 2, "output", "d.jsonl, which is a file")
    assert {name: world.digests().get(name) for name in before} == before


@pytest.mark.skipif(sys.platform != "linux", reason="a folder where even root can make none")
def test_output_that_the_system_refuses(world: World) -> None:
    say_all(world.run("train", "r.yaml", "--output", "/proc/lorafit"), 2, "/proc/lorafit", "cannot be made", "choose")
    say_all(world.run("train", "r.yaml", "--output", "run"), 0)
    say_all(world.run("merge", "run", "--output", "/proc/lorafit/m"), 2, "/proc/lorafit", "cannot be made", "choose")


def test_two_trainings_into_one_folder(world: World) -> None:
    world.recipe(("max_steps: 2", "max_steps: 5000"))
    process = world.start("train", "r.yaml", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: count_lines(world.root / "run" / "metrics.jsonl") >= 3, process)
    (world.root / "d.jsonl").unlink()  # said before anything is read
    say_all(world.run("train", "r.yaml", "--resume"), 2, "run", "another process", "--output")
    for command in (["eval"], ["generate", "--prompt", "what"], ["merge", "--output", "m"]):
        outcome = world.run(command[0], "run", *command[1:])
        say_all(outcome, 6, "run: the run has no finished adapter: a process is training into it now", "--checkpoint")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    steps = [line["step"] for line in metric_lines(world) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def test_killed_training_goes_on(world: World, one_thread: None) -> None:
    world.recipe(("max_steps: 2", "max_steps: 60"), ("every_steps: 1", "every_steps: 7"))
    process = world.start("train", "r.yaml", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: count_lines(world.root / "run" / "metrics.jsonl") >= 9, process)
    process.kill()
    process.wait(30)
    say_all(world.run("train", "r.yaml"), 2, "--resume")
    say_all(world.run("train", "r.yaml", "--resume"), 0)
    say_all(world.run("train", "r.yaml", "--output", "whole"), 0)
    assert world.weights() == world.weights("whole")
    assert [line["step"] for line in metric_lines(world) if "loss" in line] == list(range(1, 61))


def test_stopped_evaluation_leaves_no_report(world: World) -> None:
    world.rows(64, "t.jsonl", first=500)
    world.recipe(
        ("  max_length: 128", "  max_length: 128\n  test: t.jsonl"),
        ("max_new_tokens: 8", "max_new_tokens: 200"),
        ("final: [perplexity]", "final: [perplexity, exact_match]"),
    )
    say_all(world.run("train", "r.yaml"), 0)
    before = world.digests()
    process = world.start("eval", "run", "--verbose", stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("answers"):
            break
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait(60) == 143, said
    assert "stopped" in said.splitlines()[-1] and "Traceback" not in said
    assert world.digests() == before


@pytest.mark.parametrize("what", ["all of it", "all but what is written meanwhile"])
def test_the_run_folder_is_removed_meanwhile(world: World, what: str) -> None:
    world.recipe(("  max_steps: 2", "  max_steps: 100000"))
    process = world.start("train", "r.yaml", "--quiet")
    wait_for(lambda: (world.root / "run" / "checkpoints" / "step-000003").is_dir(), process)
    if what == "all of it":
        while (world.root / "run").exists():
            shutil.rmtree(world.root / "run", ignore_errors=True)
    else:
        (world.root / "run" / "manifest.json").unlink()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 7, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "disappeared" in last and "run" in last
    assert "Traceback" not in said


def test_a_limit_of_the_file_size(world: World) -> None:
    outcome = world.spawn("train", "r.yaml", "--set", "adapter.r=64", prepare=limit_file_size)
    say_all(outcome, 7, "file too large")
    assert not list((world.root / "run").rglob(".tmp*"))


def test_a_run_without_held_out_rows_is_sent_on_by_a_command_that_works(world: World) -> None:
    """`lorafit eval` alone would end with exit 4 after it; what is named instead is tried."""
    world.rows(4, name="test.jsonl", first=100)
    trained = world.run("train", "r.yaml")
    say_all(trained, 0, "next: lorafit generate run --prompt TEXT, or lorafit eval run --set data.test=FILE")
    say_all(world.run("eval", "run"), 4, "no validation rows", "add --set data.test=FILE")
    say_all(world.run("eval", "run", "--set", "data.test=test.jsonl", "--limit", "2"), 0)
    say_all(world.run("generate", "run", "--prompt", "hi", "--max-new-tokens", "2"), 0)


def test_a_run_with_held_out_rows_is_sent_on_to_its_evaluation(world: World) -> None:
    world.recipe(("train: d.jsonl", "train: d.jsonl\n  validation: {fraction: 0.25}"))
    assert world.run("train", "r.yaml").stdout.rstrip().endswith("next: lorafit eval run")
