"""`extends`, presets and `--set`: what wins, what merges, and where errors point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import UsageError
from lorafit.recipe.extends import preset_names
from tests.support.recipe_texts import MINIMAL, Fails, Loads, parts

FAMILY = """\
model: {base: meta-llama/Llama-3.1-8B, revision: main}
data: {train: [{path: one.jsonl}, {path: two.jsonl}], validation: {fraction: 0.1}}
adapter: {r: 4, dropout: 0.2}
training: {epochs: 2, optimizer: {kind: adamw, weight_decay: 0.1}, schedule: linear}
evaluation: {every_steps: 7, final: [rouge, bleu]}
"""


def write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe to extend."""
    monkeypatch.chdir(tmp_path)
    write("family.yaml", FAMILY)


@pytest.mark.usefixtures("family")
class TestExtends:
    def test_sections_merge_key_by_key(self, loads: Loads) -> None:
        recipe = loads("extends: ./family.yaml\nname: x\nadapter: {alpha: 9}\ntraining: {epochs: 5}\n").recipe
        assert (recipe.adapter.r, recipe.adapter.dropout, recipe.adapter.alpha) == (4, 0.2, 9)
        assert (recipe.training.epochs, recipe.training.schedule.kind) == (5, "linear")
        assert recipe.model.revision == "main"

    def test_one_kind_merges_and_another_replaces(self, loads: Loads) -> None:
        def optimizer(text: str) -> Any:
            return loads(f"extends: family.yaml\nname: x\ntraining: {{optimizer: {text}}}\n").recipe.training.optimizer

        assert optimizer("{eps: 1e-6}").model_dump() == {**optimizer("adamw").model_dump(), "eps": 1e-6}
        assert (optimizer("{kind: adamw, eps: 1e-6}").weight_decay, optimizer("adamw").weight_decay) == (0.1, 0.1)
        assert (optimizer("adam").kind, optimizer("adam").weight_decay) == ("adam", 0.0)
        assert optimizer("{kind: adam, eps: 1e-6}").weight_decay == 0.0

    def test_a_mapping_without_a_kind_is_of_the_kind_below_it(self, loads: Loads) -> None:
        schedule = loads(
            "extends: family.yaml\nname: x\ntraining: {schedule: {warmup_steps: 3}}\n"
        ).recipe.training.schedule
        assert (schedule.kind, schedule.warmup_steps) == ("linear", 3)

    def test_lists_and_other_forms_are_replaced(self, loads: Loads) -> None:
        head = "extends: family.yaml\nname: x\n"
        recipe = loads(head + "data: {train: three.jsonl, validation: v.jsonl}\nevaluation: {final: [loss]}\n").recipe
        assert [source.path for source in recipe.data.train] == ["three.jsonl"]
        assert isinstance(recipe.data.validation, list)
        assert recipe.data.validation[0].path == "v.jsonl"
        assert recipe.evaluation.final == ["loss"]

    def test_null_takes_away(self, loads: Loads) -> None:
        head = "extends: family.yaml\nname: x\nmodel: {revision: null}\n"
        recipe = loads(head + "data: {validation: null}\nevaluation: {every_steps: null}\n").recipe
        assert recipe.data.validation is None
        assert recipe.model.revision is None

    def test_a_chain(self, loads: Loads) -> None:
        write("middle.yaml", "extends: family.yaml\nadapter: {r: 8}\nseed: 5\n")
        recipe = loads("extends: middle.yaml\nname: x\nseed: 6\n").recipe
        assert (recipe.adapter.r, recipe.adapter.dropout, recipe.seed) == (8, 0.2, 6)

    def test_places_point_into_the_file_that_a_value_came_from(self, loads: Loads) -> None:
        loaded = loads("extends: family.yaml\nname: x\nadapter: {alpha: 9}\n")
        assert loaded.place("adapter.r") == ("family.yaml", 3, 14)
        assert loaded.place("adapter.alpha") == ("r.yaml", 3, 18)
        assert loaded.place("data.train[1].path") == ("family.yaml", 2, 42)

    def test_errors_point_into_the_file_that_a_value_came_from(self, fails: Fails) -> None:
        write("family.yaml", FAMILY.replace("dropout: 0.2", "dropout: 2"))
        lines = parts(fails("extends: family.yaml\nname: x\nadapter: {alpha: 0}\n"))
        assert [line.split(": ")[0] for line in lines] == ["r.yaml:3:18", "family.yaml:3:26"]

    def test_two_files_that_contradict_each_other(self, fails: Fails) -> None:
        error = fails("extends: family.yaml\nname: x\ntraining: {max_steps: 5}\n")
        assert str(error).startswith("r.yaml:3:23: training.max_steps: training.epochs is set too")

    @pytest.mark.parametrize(
        ("extends", "says"),
        [
            ("nope.yaml", ["r.yaml:1:10", "nope.yaml", "no such file"]),
            ("./", ["is a directory"]),
            ("coed", ["no such preset 'coed'", "did you mean code?", "available: code, instruction, summarisation"]),
            ("[code]", ["expected the name of a preset", "a list of 1"]),
            ("''", ["expected the name of a preset", "''"]),
            ("r.yaml", ["in a circle", "r.yaml > r.yaml"]),
            ("circle.yaml", ["back.yaml:1:10", "in a circle", "circle.yaml > back.yaml > circle.yaml"]),
            ("list.yaml", ["list.yaml:1:1", "expected a mapping of sections"]),
            ("broken.yaml", ["broken.yaml:2:4", "never closed"]),
            ("latin.yaml", ["latin.yaml", "not UTF-8 at byte 6"]),
            ("twice.yaml", ["twice.yaml:2:1", "seed", "duplicate key"]),
        ],
    )
    def test_what_cannot_be_extended(self, fails: Fails, extends: str, says: list[str]) -> None:
        write("circle.yaml", "extends: back.yaml\n")
        write("back.yaml", "extends: ./circle.yaml\n")
        write("list.yaml", "- a\n")
        write("broken.yaml", "a: 1\nb: [\n")
        write("twice.yaml", "seed: 1\nseed: 2\n")
        Path("latin.yaml").write_bytes(b"name: \xe9\n")
        error = fails(f"extends: {extends}\nname: x\n")
        assert error.exit_code == 3
        lines = parts(error)
        assert not any("missing" in line for line in lines), "what is missing may stand in what could not be read"
        for words in says:
            assert any(words in line for line in lines)

    def test_a_chain_without_an_end(self, fails: Fails) -> None:
        for number in range(30):
            write(f"c{number}.yaml", f"extends: c{number + 1}.yaml\n")
        assert "more than 16 recipes extend each other" in str(fails("extends: c0.yaml\nname: x\n"))


class TestPathsOfExtendedRecipes:
    """A path is relative to the file that it is written in, whoever extends that file."""

    BASE = (
        "model: {base: ./tiny}\ndata: {train: [a.jsonl, {path: sub/b.csv}], test: hub/data, chat_template: t.jinja}\n"
        "adapter: {init_from: old/adapter}\noutput: out\n"
    )

    def test_they_are_read_from_there(self, loads: Loads, tmp_path: Path) -> None:
        write(str(tmp_path / "team/base.yaml"), self.BASE)
        loaded = loads("extends: team/base.yaml\nname: x\n")
        recipe = loaded.recipe
        assert recipe.model.base == "team/tiny"
        assert [source.path for source in recipe.data.train] == ["team/a.jsonl", "team/sub/b.csv"]
        assert recipe.data.test is not None
        assert recipe.data.test[0].path == "hub/data", "no file: the id of a hub data set"
        assert recipe.data.chat_template == "team/t.jinja"
        assert recipe.adapter.init_from == "team/old/adapter"
        assert loaded.output == tmp_path / "team" / "out"

    def test_hub_ids_become_paths_only_where_they_exist(self, loads: Loads, tmp_path: Path) -> None:
        write(
            str(tmp_path / "team/base.yaml"),
            "model: {base: org/model}\ndata: {train: org/rows, chat_template: chatml}\n",
        )
        recipe = loads("extends: team/base.yaml\nname: x\n").recipe
        assert (recipe.model.base, recipe.data.train[0].path) == ("org/model", "org/rows")
        (tmp_path / "team/org/model").mkdir(parents=True)
        recipe = loads("extends: team/base.yaml\nname: x\n").recipe
        assert (recipe.model.base, recipe.data.train[0].path) == ("team/org/model", "org/rows")
        assert recipe.data.chat_template == "chatml"

    def test_absolute_paths_and_package_files_stay(self, loads: Loads, tmp_path: Path) -> None:
        write(
            str(tmp_path / "team/base.yaml"),
            f"model: {{base: package://p/m.gguf}}\ndata: {{train: {tmp_path}/a.jsonl}}\n",
        )
        recipe = loads("extends: team/base.yaml\nname: x\n").recipe
        assert recipe.model.base == "package://p/m.gguf"
        assert recipe.data.train[0].path == f"{tmp_path}/a.jsonl"


PRESETS = {
    "instruction": (64, 128, ["q_proj", "v_proj", "o_proj"]),
    "code": (32, 64, ["q_proj", "v_proj", "gate_proj", "up_proj"]),
    "summarisation": (16, 32, ["q_proj", "v_proj"]),
}


def test_the_shipped_presets() -> None:
    assert preset_names() == sorted(PRESETS)
    page = (Path(__file__).parents[3] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert f"a shipped preset ({', '.join(f'`{name}`' for name in sorted(PRESETS))})" in page


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_what_tutorials_use(loads: Loads, name: str) -> None:
    adapter = loads(MINIMAL + f"extends: {name}\n").recipe.adapter
    assert (adapter.r, adapter.alpha, adapter.target_modules) == PRESETS[name]


def test_a_recipe_is_over_its_preset(loads: Loads) -> None:
    recipe = loads(MINIMAL + "extends: code\nadapter: {r: 4}\n").recipe
    assert (recipe.adapter.r, recipe.adapter.alpha) == (4, 64)


def value_after(loads: Loads, text: str, *sets: str) -> dict[str, Any]:
    dumped: dict[str, Any] = loads(text, sets).recipe.model_dump(mode="json")
    return dumped


class TestFlags:
    @pytest.mark.parametrize(
        ("flag", "section", "key", "value"),
        [
            ("training.epochs=1", "training", "epochs", 1.0),
            ("training.learning_rate=2e-4", "training", "learning_rate", 2e-4),
            (" training.epochs = 1 ", "training", "epochs", 1.0),
            ("data.system_prompt=You are: kind, and = fair", "data", "system_prompt", "You are: kind, and = fair"),
            ("data.system_prompt='010'", "data", "system_prompt", "010"),
            ('data.system_prompt="a\\nb"', "data", "system_prompt", "a\nb"),
            ("data.system_prompt=- a # b", "data", "system_prompt", "- a # b"),
            ("data.system_prompt=*a", "data", "system_prompt", "*a"),
            ("model.revision=", "model", "revision", None),
            ("model.revision=null", "model", "revision", None),
            ("evaluation.final=[loss, bleu]", "evaluation", "final", ["loss", "bleu"]),
            ("training.gradient_checkpointing=true", "training", "gradient_checkpointing", True),
        ],
    )
    def test_a_value_is_read_like_one_in_a_recipe(
        self, loads: Loads, flag: str, section: str, key: str, value: Any
    ) -> None:
        assert value_after(loads, MINIMAL, flag)[section][key] == value

    def test_a_flag_wins_over_everything_and_the_last_flag_over_the_first(self, loads: Loads) -> None:
        text = MINIMAL + "extends: code\nadapter: {r: 4}\n"
        assert value_after(loads, text, "adapter.r=5", "adapter.r=6")["adapter"]["r"] == 6

    def test_a_flag_equals_the_same_line_in_the_recipe(self, loads: Loads) -> None:
        written = loads(MINIMAL + "training: {epochs: 2, optimizer: {kind: adamw, eps: 1e-6}}\n")
        flagged = loads(MINIMAL, ["training.epochs=2", "training.optimizer.kind=adamw", "training.optimizer.eps=1e-6"])
        assert flagged.digest == written.digest

    def test_items_of_lists(self, loads: Loads) -> None:
        text = MINIMAL.replace("a.jsonl", "[a.jsonl, {path: b.jsonl, limit: 3}]")
        train = value_after(loads, text, "data.train[0].limit=5", "data.train.1.limit=6", "data.train[1].path=c.txt")[
            "data"
        ]["train"]
        assert [(source["path"], source["limit"]) for source in train] == [("a.jsonl", 5), ("c.txt", 6)]

    def test_an_item_of_a_bare_path(self, loads: Loads) -> None:
        assert value_after(loads, MINIMAL, "data.train[0].limit=5")["data"]["train"][0]["limit"] == 5

    def test_an_option_of_a_bare_kind(self, loads: Loads) -> None:
        text = MINIMAL + "training: {optimizer: sgd}\n"
        assert value_after(loads, text, "training.optimizer.momentum=0.5")["training"]["optimizer"]["momentum"] == 0.5

    def test_an_option_of_a_section_that_is_null(self, loads: Loads) -> None:
        text = MINIMAL + "evaluation: {early_stopping: null, every_steps: 3}\n"
        flags = ["evaluation.early_stopping.patience=9", "data.validation.fraction=0.5"]
        values = value_after(loads, text, *flags)
        assert values["evaluation"]["early_stopping"]["patience"] == 9
        assert values["data"]["validation"] == {"fraction": 0.5}

    def test_another_kind_replaces_the_section(self, loads: Loads) -> None:
        text = MINIMAL + "training: {optimizer: {kind: sgd, momentum: 0.5}}\n"
        assert value_after(loads, text, "training.optimizer=adamw")["training"]["optimizer"]["kind"] == "adamw"
        assert value_after(loads, text, "training.optimizer.kind=rmsprop")["training"]["optimizer"]["momentum"] == 0.5

    def test_extends_can_be_set(self, loads: Loads) -> None:
        assert value_after(loads, MINIMAL + "extends: code\n", "extends=summarisation")["adapter"]["r"] == 16

    @pytest.mark.parametrize(
        ("flag", "says"),
        [
            ("adapter.dropuot=0.1", ["adapter.dropuot: unknown key", "did you mean dropout"]),
            ("training.learning_rate=fast", ["training.learning_rate: expected a number", "'fast'"]),
            ("training.epochs=yes", ["training.epochs", "ambiguous"]),
            ("seed=010", ["seed", "ambiguous"]),
            ("seed=1:30", ["seed", "ambiguous"]),
            ("adapter.r=0", ["adapter.r", "allowed range"]),
            ("adapter={r: 8, r: 9}", ["adapter.r", "duplicate key (twice in one mapping)"]),
            ("tracking=[a", ["'[' is never closed"]),
            ("tracking=[a] b", ["invalid YAML"]),
            ("name='open", ["a quote is never closed"]),
            ("adapter={r: !!int 8}", ["adapter.r", "tag"]),
            ("name=a\x07b", ["name", "control character"]),
            ("name=caf\udce9", ["name", "surrogate"]),
            ("data.train[1].limit=3", ["data.train is a list of 1", "data.train[0]"]),
            ("data.train.path=3", ["data.train is a list of 1"]),
            ("name.first=3", ["name holds 'x'"]),
            ("adapter[0]=3", ["adapter holds"]),
            ("lora_r=8", ["lora_r: unknown key", "adapter.r"]),
            ("training.max_steps=-1", ["allowed range"]),
            ("extends=nope", ["extends", "no such preset"]),
        ],
    )
    def test_errors_name_the_flag(self, fails: Fails, flag: str, says: list[str]) -> None:
        error = fails(MINIMAL + "training: {optimizer: sgd}\nadapter: {alpha: 8}\n", [flag])
        assert error.exit_code == 3
        assert str(error).startswith(f"--set {flag}: ")
        for words in says:
            assert words in str(error)

    @pytest.mark.parametrize("flag", ["", "training.epochs", "=1", "a..b=1", ".a=1", "a[b]=1", "a[=1", "[0]=1"])
    def test_what_is_no_flag(self, loads: Loads, flag: str) -> None:
        with pytest.raises(UsageError, match="write --set KEY=VALUE"):
            loads(MINIMAL, [flag])

    def test_a_long_flag_is_cut(self, fails: Fails) -> None:
        assert "…: nmae: unknown key; did you mean name?" in str(fails(MINIMAL, ["nmae=" + "x" * 1000]))

    def test_a_contradiction_between_a_flag_and_the_recipe(self, fails: Fails) -> None:
        text = MINIMAL + "training: {schedule: {warmup_steps: 500}}\n"
        error = fails(text, ["training.max_steps=10"])
        assert str(error).startswith(
            "r.yaml:4:37: training.schedule.warmup_steps: 500 is more than training.max_steps 10"
        )

    def test_flags_are_listed_behind_the_recipe(self, fails: Fails) -> None:
        lines = parts(fails(MINIMAL + "seed: -1\n", ["adapter.r=0", "training.epochs=-1"]))
        assert [line.split(": ")[0] for line in lines] == [
            "r.yaml:4:7",
            "--set adapter.r=0",
            "--set training.epochs=-1",
        ]
