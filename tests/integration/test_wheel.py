"""The wheel, built, installed apart from the checkout, and used from a third folder without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.world import Outcome, say_all, without_network

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
extends: {extends}
name: from-elsewhere
model: {{base: meta-llama/Llama-3.1-8B}}
data: {{train: rows.jsonl, chat_template: chatml}}
"""


def files_below(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts and not path.name.startswith(".")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files alone; what it depends on comes from this environment."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of recipes, which is neither the checkout nor the installation, and one below to call from."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "mine.yaml").write_text("extends: code\nadapter: {r: 12}\n")
    (tmp_path / "recipes" / "preset.yaml").write_text(RECIPE.format(extends="instruction"))
    (tmp_path / "recipes" / "file.yaml").write_text(RECIPE.format(extends="../bases/mine.yaml"))
    return tmp_path


def use(installed: Path, folder: Path, *words: str) -> Outcome:
    """Runs a script of the installation, or python where `words` begin with its flags, in `folder`."""
    command = [sys.executable, *words] if words[0].startswith("-") else [str(installed / "bin" / words[0]), *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(installed), "LORAFIT_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*without_network(), *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_the_wheel_holds_all_that_is_shipped_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        notes = {name.split("/", 1)[1] for name in archive.namelist() if ".dist-info/" in name}
    configs = {f"lorafit/_configs/{name}" for name in files_below(ROOT / "configs")}
    package = {f"lorafit/{name}" for name in files_below(ROOT / "lorafit")}
    assert held == configs | package
    for name in ("presets/instruction.yaml", "presets/code.yaml", "presets/summarisation.yaml", "recipe.schema.json"):
        assert f"lorafit/_configs/{name}" in held
    for name in ("chatml", "hermes", "alpaca", "plain"):
        assert f"lorafit/data/templates/{name}.jinja" in held
    assert {"licenses/LICENSE", "METADATA", "entry_points.txt"} <= notes


def test_the_checkout_is_not_what_runs(installed: Path, elsewhere: Path) -> None:
    code = "import lorafit.machine.shipped as s; print(s.__file__); print(s.shipped('presets'))"
    module, presets = use(installed, elsewhere, "-c", code).stdout.split()
    assert Path(module).is_relative_to(installed)
    assert Path(presets).is_relative_to(installed / "lorafit" / "_configs")
    assert use(installed, elsewhere, "lorafit", "--help").stdout.startswith("Usage: lorafit")


@pytest.mark.parametrize(("recipe", "rank"), [("preset", 64), ("file", 12)])
def test_recipe_that_extends_from_another_folder(installed: Path, elsewhere: Path, recipe: str, rank: int) -> None:
    outcome = use(installed, elsewhere, "lorafit", "validate", f"recipes/{recipe}.yaml", "--json")
    say_all(outcome, 0)
    assert outcome.json["recipe"]["adapter"]["r"] == rank
    say_all(use(installed, elsewhere, "lorafit", "validate", "recipes/none.yaml"), 2, "none.yaml", "no such file")


def test_estimate_for_a_card_by_its_name(installed: Path, elsewhere: Path) -> None:
    """The model's shape and the card's memory are both among the shipped files."""
    arguments = ["lorafit", "estimate-memory", "recipes/preset.yaml", "--set", "model.quantization=nf4"]
    say_all(use(installed, elsewhere, *arguments, "--gpu", "rtx-4090"), 0, "rtx-4090")
    say_all(use(installed, elsewhere, *arguments, "--gpu", "rtx-4091"), 2, "--gpu", "rtx-4090")
    small = use(installed, elsewhere, *arguments, "--gpu", "4GiB")
    say_all(small, 10, "fit")


def test_shipped_template_is_read_from_the_installation(installed: Path, elsewhere: Path) -> None:
    code = "import lorafit.data as d; print(open(d.__path__[0] + '/templates/chatml.jinja').read())"
    assert "<|im_start|>" in use(installed, elsewhere, "-c", code).stdout
