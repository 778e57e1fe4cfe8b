"""Every command that the documentation shows runs as written; generated pages are today's; links lead somewhere."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.support.docs_scripts import load_script
from tests.support.served import Server
from tests.support.tiny_encoder import make_encoder
from tests.support.tiny_model import make_base
from tests.support.world import World, say_all

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND_PAGES = sorted((ROOT / "docs" / "commands").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>hub|gpu) -->\s*)?^```(?:bash|sh|shell|console)\n(?P<text>.*?)^```", re.M | re.S
)
ACTIVATE = "source .venv/bin/activate"
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
SCHEMA_LINE = "# yaml-language-server: $schema=../configs/recipe.schema.json"
MADE_BY = {
    "runs/quickstart": "lorafit train recipes/quickstart.yaml",
    "runs/faq_classifier": "lorafit train recipes/faq_classifier.yaml",
    "runs/sentiment_minilm": "lorafit train recipes/sentiment_minilm.yaml",
    "runs/dpo_smollm2": "lorafit train recipes/dpo_smollm2.yaml",
    "runs/quickstart-merged": "lorafit merge runs/quickstart --output runs/quickstart-merged",
}


@dataclass(frozen=True)
class Command:
    """One line of a fenced block."""

    page: Path
    line: str
    needs: str | None

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def commands_of(page: Path) -> Iterator[Command]:
    """The commands of a page in their order; a line that ends in a backslash goes on."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        for line in block["text"].replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield Command(page, line.strip().removeprefix("$ "), block["needs"])


def shown(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_COMMANDS = [page for page in PAGES if any(True for _ in commands_of(page))]


@pytest.fixture(scope="module")
def small_recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `recipes/` whose quickstart has the same name, paths and keys, but a tiny base, few rows, few steps."""
    folder = tmp_path_factory.mktemp("small") / "recipes"
    shutil.copytree(ROOT / "recipes", folder)
    base = make_base(folder / "tiny-base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    for split, count in {"train": 24, "valid": 4, "test": 6}.items():
        file = folder / "data" / f"support_{split}.jsonl"
        file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    values = yaml.safe_load((folder / "quickstart.yaml").read_text(encoding="utf-8"))
    for section, changes in {
        "model": {"base": "tiny-base"},
        "data": {"max_length": 600},
        "training": {"epochs": 1},
        "evaluation": {"every_steps": 1, "max_new_tokens": 4},
        "checkpoints": {"every_steps": 1},
    }.items():
        assert changes.keys() <= values[section].keys(), "the quickstart has other keys now"
        values[section] = {**values[section], **changes}
    (folder / "quickstart.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    values = yaml.safe_load((folder / "faq_classifier.yaml").read_text(encoding="utf-8"))
    values["model"]["base"], values["training"]["epochs"] = "tiny-base", 1
    values["data"]["test"] = values["data"]["train"]  # the few rows of the other file have other labels
    (folder / "faq_classifier.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    values = yaml.safe_load((folder / "sentiment_minilm.yaml").read_text(encoding="utf-8"))
    values["model"]["base"], values["training"]["epochs"] = "tiny-base", 1
    (folder / "sentiment_minilm.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    values = yaml.safe_load((folder / "dpo_smollm2.yaml").read_text(encoding="utf-8"))
    values["model"]["base"], values["data"]["max_length"] = "tiny-base", 600
    for split, count in {"train": 16, "test": 4}.items():
        file = folder / "data" / f"preferences_{split}.jsonl"
        file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    (folder / "dpo_smollm2.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first page that trains leaves its runs for pages that begin with them."""
    return tmp_path_factory.mktemp("finished")


ENCODER = "models/all-MiniLM-L6-v2"


def prepare(world: World, small_recipes: Path, finished_runs: Path, commands: list[Command]) -> None:
    """The sandbox that a page finds: the recipes, and what it uses but does not make itself: runs, an encoder."""
    shutil.copytree(small_recipes, world.root / "recipes")
    lines = [command.line for command in commands]
    if any(ENCODER in line for line in lines):
        make_encoder(world.root / ENCODER)
    for run, made_by in MADE_BY.items():
        used = next((n for n, line in enumerate(lines) if run in re.split(r"[\s=]", line)), None)
        made = lines.index(made_by) if made_by in lines else len(lines)
        if used is None or made <= used:
            continue
        finished = finished_runs / Path(run).name
        if finished.exists():
            shutil.copytree(finished, world.root / run)
        else:
            say_all(world.run(*shlex.split(made_by)[1:]), 0)
            shutil.copytree(world.root / run, finished)


def check_with_make(command: Command) -> None:
    """A target that `make` knows; what it does is what its recipe's own tests show."""
    done = subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_without_device(world: World, command: Command) -> None:
    """What needs a hub or a GPU: its recipe is valid, and its memory can be estimated."""
    recipes = [word for word in command.words if word.endswith((".yaml", ".yml"))]
    assert recipes, f"{command.line} names no recipe"
    for recipe in recipes:
        say_all(world.run("validate", recipe), 0)
        say_all(world.run("estimate-memory", recipe), 0)


def check_server(world: World, command: Command) -> None:
    """It comes up and writes a token."""
    server = Server(*command.words[2:], cwd=world.root, env=world.environment)
    try:
        assert server.client.get("/health").status_code == 200
    finally:
        server.close()


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=shown)
def test_commands_run_as_written(
    page: Path, world: World, small_recipes: Path, finished_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = list(commands_of(page))
    own = [command for command in commands if command.needs is None and command.words[0] == "lorafit"]
    prepare(world, small_recipes, finished_runs, own)
    for command in commands:
        tool = command.words[0]
        if tool == "make":
            check_with_make(command)
        elif command.line == ACTIVATE:
            assert "VENV := .venv\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
        elif tool in ("pip", "git", "cd", "python"):
            assert len(command.words) > 1
        elif command.needs is not None:
            check_without_device(world, command)
        elif command.words[1] == "serve":
            check_server(world, command)
        else:
            assert tool == "lorafit", f"{shown(page)}: nothing runs {command.line!r}"
            words, stdin = command.words[1:], ""
            if "<" in words:  # behind it stands the last word, a file
                stdin, words = (world.root / words[-1]).read_text(encoding="utf-8"), words[:-2]
            monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
            outcome = world.run(*words)
            assert outcome.code == 0, f"{shown(page)}: {command.line}\n{outcome.stderr}"
            assert outcome.stdout.strip() != ""
            if "--json" in command.words:
                assert isinstance(outcome.json, dict)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "quickstart.md"], ids=shown)
def test_a_newcomer_is_told_where_lorafit_is(page: Path) -> None:
    lines = [command.line for command in commands_of(page)]
    before = lines[: next(number for number, line in enumerate(lines) if line.startswith("lorafit "))]
    assert before[-2:] == ["make setup", ACTIVATE]


def test_the_documentation_shows_every_command() -> None:
    from lorafit.cli import app

    first_words = {command.words[1] for page in PAGES for command in commands_of(page) if command.words[0] == "lorafit"}
    names = {entry.name or entry.callback.__name__ for entry in app.registered_commands if entry.callback}
    assert names <= first_words
    assert {page.stem for page in COMMAND_PAGES} == names


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=shown)
def test_help_on_the_page_is_the_present_one(page: Path) -> None:
    assert "<!-- help: generated -->" in page.read_text(encoding="utf-8")
    assert load_script("write_help").page_with_help(page) == page.read_text(encoding="utf-8"), "run make docs"


def anchor(heading: str) -> str:
    """The anchor that GitHub and MkDocs give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "recipes").rglob("*.md"))], ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target, place in LINK.findall(text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{shown(page)}: {target}"
        assert file == ROOT or ROOT in file.parents, f"{shown(page)}: {target} leads out of the project"
        if place:
            lines = file.read_text(encoding="utf-8").splitlines()
            assert place in {anchor(line.lstrip("#")) for line in lines if line.startswith("#")}, f"{target}#{place}"


def test_recipes_named_in_the_documentation_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"recipes/[\w./-]+\.yaml", page.read_text(encoding="utf-8"))}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=shown)
def test_shipped_recipe(recipe: Path, world: World) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    assert lines[0] == SCHEMA_LINE
    header = "\n".join(line for line in lines[1:12] if line.startswith("#"))
    for part in ("What:", f"lorafit train recipes/{recipe.name}", "Hardware:", "xpected"):
        assert part in header, part
    say_all(world.run("validate", str(recipe)), 0)
    said = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert said["name"] == recipe.stem
    assert said["output"] == f"../runs/{recipe.stem}"
    estimate = world.run("estimate-memory", str(recipe), "--json")
    say_all(estimate, 0)
    assert estimate.json
    assert world.loaded == []
    if "Needs the hub" in header:
        checkpointing = json.dumps("without checkpointing" not in header)
        words = ["--set", f"training.gradient_checkpointing={checkpointing}", "--json"]
        found = world.run("estimate-memory", str(recipe), *words).json["memory"]["needed_bytes"] / 2**30
        (told,) = re.findall(r"Expected memory: ([\d.]+) GiB", header)
        assert f"{found:.1f}" == told, f"{recipe.name} says {told} GiB"
        [line] = [line for line in README.splitlines() if line.startswith(f"| [`{recipe.stem}`]")]
        assert line.endswith(f"| {told} GiB |"), line
