"""A loaded recipe: its digest, its folder, its places, and its copy in a run folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import LorafitError, RecipeError
from lorafit.recipe.load import dump_recipe, load_recipe
from lorafit.recipe.schema import Recipe
from tests.support.recipe_texts import MINIMAL, Loads

RICH = """\
name: 'no'
seed: 7
model: {base: tiny/, dtype: bf16, quantization: {kind: nf4, double_quant: false}}
adapter: {r: 4, target_modules: [q_proj, v_proj], init_from: old/adapter}
data:
  train: [{path: rows/a.jsonl, columns: {prompt: '010', completion: "1:30"}, repeats: 0.5}, org/hub-rows]
  validation: rows/v.jsonl
  chat_template: templates/t.jinja
  system_prompt: "yes: #1\\nof 2e-4"
training:
  max_steps: 9
  learning_rate: 2e-4
  optimizer: {kind: adamw, betas: [0.8, 0.9]}
  schedule: {kind: linear, warmup_steps: 2}
evaluation: {every_steps: 3, during: [perplexity], early_stopping: {metric: perplexity}}
tracking: [tensorboard]
output: out/here
"""

LOAD = "from pathlib import Path; from lorafit.recipe.load import load_recipe; loaded = load_recipe(Path('r.yaml'))"


def test_the_values_are_those_that_were_written(loads: Loads) -> None:
    recipe = loads(RICH).recipe
    assert recipe.name == "no"
    assert recipe.data.train[0].columns == {"prompt": "010", "completion": "1:30"}
    assert recipe.training.optimizer.betas == (0.8, 0.9)
    assert recipe.training.learning_rate == 2e-4
    assert recipe.data.system_prompt == "yes: #1\nof 2e-4"


def test_short_forms_are_their_long_forms(loads: Loads) -> None:
    short = loads(MINIMAL + "adapter: lora\ntraining: {optimizer: adamw, schedule: {warmup_steps: 3}}\n")
    long = loads(
        "name: x\nmodel: {base: b, quantization: {kind: nf4}}\ndata: {train: [{path: a.jsonl}]}\n"
        "adapter: {kind: lora}\n"
        "training: {optimizer: {kind: adamw}, schedule: {kind: cosine, warmup_steps: 3}}\n"
    )
    assert short.digest == long.digest
    assert short.recipe == long.recipe


class TestDigest:
    @pytest.mark.parametrize(
        "same",
        [
            "# a comment\n" + MINIMAL + "\n\n",
            "data:\n  train:\n  - path: a.jsonl\nmodel:\n  base: 'b'\nname: \"x\"\n",
            MINIMAL + "seed: 0\ntraining: {epochs: null, learning_rate: 0.0002}\n",
        ],
    )
    def test_it_is_of_the_values_alone(self, loads: Loads, same: str) -> None:
        assert loads(same).digest == loads(MINIMAL).digest

    @pytest.mark.parametrize(
        "flag", ["seed=1", "adapter.alpha=8", "name=z", "data.train=b.jsonl", "training.schedule=linear"]
    )
    def test_it_is_of_every_value(self, loads: Loads, flag: str) -> None:
        assert loads(MINIMAL, [flag]).digest != loads(MINIMAL).digest

    def test_it_is_the_same_in_every_process(self, loads: Loads) -> None:
        here = loads(RICH).digest
        there = subprocess.run(
            [sys.executable, "-c", f"{LOAD}; print(loaded.digest)"], capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == here

    def test_a_run_folder_given_by_flag_does_not_count(self, loads: Loads) -> None:
        assert loads(MINIMAL, output="elsewhere").digest == loads(MINIMAL).digest


class TestRunFolder:
    @pytest.mark.parametrize(
        ("name", "folder"),
        [
            ("x", "runs/x"),
            ("a/b", "runs/a/b"),
            ("x;touch PWNED$(id)", "runs/x;touch PWNED$(id)"),
            ("é 名", "runs/é 名"),
            ("...", "runs/..."),
            ("../x", "runs/x"),
            ("a/../../b", "runs/a-..-..-b"),
            ("..", "runs/run"),
            (".", "runs/run"),
            ("/etc/cron.d", "runs/etc-cron.d"),
        ],
    )
    def test_a_name_never_leads_out_of_runs(self, loads: Loads, tmp_path: Path, name: str, folder: str) -> None:
        loaded = loads(MINIMAL.replace("name: x", f"name: '{name}'"))
        assert loaded.output == tmp_path / folder
        assert loaded.recipe.name == name

    def test_output_is_relative_to_the_recipe(self, loads: Loads, tmp_path: Path) -> None:
        assert loads(MINIMAL + "output: ../out\n").output == tmp_path.parent / "out"
        assert loads(MINIMAL + f"output: {tmp_path}/out\n").output == tmp_path / "out"

    def test_the_flag_is_relative_to_the_working_folder(
        self, loads: Loads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loads(MINIMAL)
        (tmp_path / "sub").mkdir()
        monkeypatch.chdir(tmp_path / "sub")
        assert load_recipe(Path("../r.yaml"), output="out").output == tmp_path / "sub" / "out"


class TestPlaces:
    def test_of_what_was_written(self, loads: Loads) -> None:
        loaded = loads(RICH)
        assert loaded.place("adapter.r") == ("r.yaml", 4, 14)
        assert loaded.place("data.train[0].path") == ("r.yaml", 6, 18)
        assert loaded.place("data.train[1].path") == ("r.yaml", 6, 93)
        assert loaded.place("data") == ("r.yaml", 5, 1)

    def test_of_what_was_not_written_is_the_section_around_it(self, loads: Loads) -> None:
        loaded = loads(RICH)
        assert loaded.place("adapter.dropout") == loaded.place("adapter") == ("r.yaml", 4, 1)
        assert loaded.place("checkpoints.keep_last").line == 1

    def test_of_a_flag(self, loads: Loads) -> None:
        loaded = loads(RICH, ["adapter.r=8"])
        assert loaded.place("adapter.r") == ("--set adapter.r=8", None, None)

    def test_they_are_arguments_of_an_error(self, loads: Loads) -> None:
        error = RecipeError(
            "matches nothing", key="adapter.target_modules", **loads(RICH).place("adapter.target_modules")._asdict()
        )
        assert str(error) == "r.yaml:4:17: adapter.target_modules: matches nothing"


class TestCopyInARunFolder:
    def test_it_reads_as_the_same_recipe_from_there(self, loads: Loads, tmp_path: Path) -> None:
        for name in ("tiny", "old/adapter", "rows", "templates"):
            (tmp_path / name).mkdir(parents=True)
        loaded = loads(RICH)
        loaded.output.mkdir(parents=True)
        (loaded.output / "recipe.yaml").write_text(dump_recipe(loaded, loaded.output))
        copy = load_recipe(loaded.output / "recipe.yaml")
        assert copy.output == loaded.output
        for text in ("tiny", "rows/a.jsonl", "rows/v.jsonl", "templates/t.jinja", "old/adapter"):
            assert (loaded.folder / text).as_posix() in {
                copy.path(path).resolve().as_posix()
                for path in (
                    copy.recipe.model.base,
                    copy.recipe.data.train[0].path,
                    copy.recipe.data.validation[0].path,  # type: ignore[index,union-attr]
                    copy.recipe.data.chat_template or "",
                    copy.recipe.adapter.init_from,
                )
            }
        assert copy.recipe.data.train[1].path == "org/hub-rows"
        without_paths = {
            "model": {"base"},
            "adapter": {"init_from"},
            "data": {"train", "validation", "chat_template"},
            "output": True,
        }
        assert copy.recipe.model_dump(exclude=without_paths) == loaded.recipe.model_dump(exclude=without_paths)

    def test_a_copy_of_the_copy_is_the_copy(self, loads: Loads) -> None:
        loaded = loads(RICH)
        loaded.output.mkdir(parents=True)
        first = dump_recipe(loaded, loaded.output)
        (loaded.output / "recipe.yaml").write_text(first)
        copy = load_recipe(loaded.output / "recipe.yaml")
        assert dump_recipe(copy, loaded.output) == first

    def test_no_path_from_the_root_is_left_in_it(self, loads: Loads, tmp_path: Path) -> None:
        (tmp_path / "tiny").mkdir()
        text = f"name: x\nmodel: {{base: {tmp_path}/tiny}}\ndata: {{train: {tmp_path}/a.jsonl}}\n"
        loaded = loads(text)
        dumped = dump_recipe(loaded, loaded.output)
        assert str(tmp_path) not in dumped
        assert "base: ../../tiny" in dumped

    def test_a_path_of_the_home_folder_stays_that_file(
        self, loads: Loads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        loaded = loads("name: x\nmodel: {base: ~/tiny}\ndata: {train: ~/a.jsonl}\n")
        dumped = dump_recipe(loaded, loaded.output)
        assert "base: ../../home/tiny" in dumped and "path: ../../home/a.jsonl" in dumped

    def test_presets_and_flags_are_written_out(self, loads: Loads) -> None:
        loaded = loads(MINIMAL + "extends: code\n", ["seed=9"])
        dumped = dump_recipe(loaded, loaded.folder)
        assert "extends" not in dumped
        assert "seed: 9" in dumped
        assert "r: 32" in dumped


def test_reading_a_recipe_imports_nothing_heavy(loads: Loads) -> None:
    loads(RICH)
    heavy = ("torch", "numpy", "transformers", "peft", "datasets", "rich", "pyarrow")
    code = f"{LOAD}; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


KEYS = [
    "name",
    "model",
    "base",
    "data",
    "train",
    "training",
    "epochs",
    "adapter",
    "kind",
    "path",
    "extends",
    "hf_token",
    "<<",
    "x",
]
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([*KEYS, "lora", "auto", "adamw", "a.jsonl", "", "no"])
)
TREES = st.recursive(
    VALUES, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.sampled_from(KEYS), t, max_size=4), max_leaves=12
)


@settings(deadline=None)
@given(TREES)
def test_whatever_a_recipe_holds_it_ends_in_a_recipe_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, tree: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(json.dumps(tree))  # NaN and Infinity included, which YAML reads as text
    try:
        assert isinstance(load_recipe(path).recipe, Recipe)
    except LorafitError as error:
        assert error.exit_code in (3, 8)
        assert len(f"error: {error.one_line}") < 300


@settings(deadline=None)
@given(st.text(max_size=60))
def test_whatever_a_file_holds_it_ends_in_a_recipe_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(LorafitError) as caught:
        load_recipe(path)
    assert caught.value.exit_code in (3, 8)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_whatever_a_flag_holds_it_ends_in_a_recipe_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, flag: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "minimal.yaml"
    path.write_text(MINIMAL)
    try:
        load_recipe(path, [flag])
    except LorafitError as error:
        assert error.exit_code in (2, 3, 8)
