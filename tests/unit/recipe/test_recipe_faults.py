"""Broken recipes as users write them: exit code, and what the last line must say."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from lorafit.errors import Problems, UsageError
from lorafit.recipe.load import load_recipe
from tests.support.recipe_texts import MINIMAL, Fails, Loads, parts

FAULTS: list[tuple[str, str, list[str]]] = [  # what, the recipe, what the last line says
    ("unclosed list", MINIMAL + "tracking: [a, b\n", ["r.yaml:4", "never closed"]),
    (
        "key twice",
        MINIMAL + "training:\n  learning_rate: 1e-4\n  learning_rate: 1e-2\n",
        ["r.yaml:6:3", "training.learning_rate", "duplicate key", "first at line 5"],
    ),
    ("typo", MINIMAL + "adapter:\n  dropuot: 0.1\n", ["r.yaml:5:3", "adapter.dropuot", "did you mean dropout"]),
    (
        "word for a number",
        MINIMAL + "training:\n  learning_rate: fast\n",
        ["r.yaml:5:18", "training.learning_rate", "expected a number", "'fast'"],
    ),
    *[
        (f"a word for {key}", MINIMAL + f"{text}\n", [f"expected a mapping, found {found}", f"write {key}: {todo}"])
        for text, key, found, todo in (
            ("checkpoints: 50", "checkpoints", "50", "{every_steps: 50}"),
            ("training: adamw", "training", "'adamw'", "{optimizer: adamw}"),
        )
    ],
    ("yes for a number", MINIMAL + "training: {epochs: yes}\n", ["r.yaml:4:20", "training.epochs", "ambiguous"]),
    (
        "true for a number",
        MINIMAL + "training: {epochs: true}\n",
        ["training.epochs", "expected a number", "found true"],
    ),
    (
        "true for a whole number",
        MINIMAL + "training: {batch_size: true}\n",
        ["batch_size", "whole number", "found true"],
    ),
    (
        "1 for true",
        MINIMAL + "training: {gradient_checkpointing: 1}\n",
        ["gradient_checkpointing", "true, false, half, auto", "found 1"],
    ),
    ("Norway", MINIMAL.replace("name: x", "name: no"), ["r.yaml:1:7", "name", "quote it"]),
    ("octal", MINIMAL + "seed: 010\n", ["r.yaml:4:7", "seed", "ambiguous", "quote it"]),
    ("base 60", MINIMAL + "training: {max_steps: 1:30}\n", ["training.max_steps", "ambiguous"]),
    ("alias of itself", MINIMAL + "a: &a [*a]\n", ["r.yaml:4:8", "alias"]),
    ("merge key", MINIMAL + "<<: {seed: 1}\n", ["r.yaml:4:1", "merge keys"]),
    ("control character", MINIMAL + 'output: "a\0b"\n', ["r.yaml:4", "control character"]),
    ("escaped control character", MINIMAL + 'output: "a\\0b"\n', ["r.yaml:4", "output", "control character"]),
    ("second document", MINIMAL + "---\nseed: 1\n", ["r.yaml:4", "second document"]),
    ("tag", MINIMAL + "seed: !!python/name:os.system\n", ["r.yaml:4:7", "seed", "tag"]),
    ("empty file", "", ["r.yaml", "empty"]),
    ("comments alone", "# later\n", ["r.yaml", "empty"]),
    ("list at the top", "- name: x\n", ["r.yaml:1", "expected a mapping of sections", "list"]),
    ("text at the top", "name\n", ["r.yaml:1", "expected a mapping of sections", "'name'"]),
    ("section without content", MINIMAL + "training:\n", ["r.yaml:4", "training", "found nothing"]),
    ("list for a section", MINIMAL + "training: [1]\n", ["r.yaml:4", "training", "expected a mapping", "a list of 1"]),
    ("text for a section", MINIMAL + "checkpoints: often\n", ["checkpoints", "expected a mapping", "'often'"]),
    ("mapping for a value", MINIMAL + "seed: {a: 1}\n", ["r.yaml:4:1", "seed", "expected a whole number", "a mapping"]),
    ("number for a text", MINIMAL.replace("name: x", "name: 12"), ["name", "expected text", "found 12", "quote it"]),
    (
        "number of a mapping",
        MINIMAL + "adapter: {ranks: {q_proj: 8, late_proj: 0}}\n",
        ["r.yaml:4", "adapter.ranks.late_proj", "must be between 1 and 4096", "found 0"],
    ),
    ("not a number", MINIMAL + "training: {learning_rate: .nan}\n", ["training.learning_rate", "not a finite number"]),
    ("infinity", MINIMAL + "training: {learning_rate: .inf}\n", ["training.learning_rate", "not a finite number"]),
    (
        "nan in words",
        MINIMAL + "training: {learning_rate: nan}\n",
        ["training.learning_rate", "expected a number", "'nan'"],
    ),
    ("beyond any number", MINIMAL + "training: {epochs: 1e999}\n", ["training.epochs", "outside the numbers"]),
    ("huge seed", MINIMAL + "seed: 99999999999999999999\n", ["seed", "allowed range", "99999999999999999999"]),
    ("huge count", MINIMAL + "training: {max_steps: 1000000000000}\n", ["max_steps", "allowed range", "2147483647"]),
    ("number in quotes", MINIMAL + "training: {learning_rate: '2e-4'}\n", ["learning_rate", "remove the quotes"]),
    ("decimal comma", MINIMAL + 'adapter: {dropout: "0,05"}\n', ["adapter.dropout", "write 0.05"]),
    ("3.0 for a whole number", MINIMAL + "training: {batch_size: 3.0}\n", ["batch_size", "whole number", "write 3"]),
    (
        "unknown kind",
        MINIMAL + "adapter: lisa\n",
        ["r.yaml:4:10", "adapter", "adapter 'lisa' does not exist yet", "available: ", "lora"],
    ),
    (
        "kind that is nearly one",
        MINIMAL + "training:\n  optimizer: {kind: adamww}\n",
        ["r.yaml:5:21", "training.optimizer.kind", "did you mean adamw", "available"],
    ),
    ("kind that is a number", MINIMAL + "adapter: {kind: 3}\n", ["adapter.kind", "name of a kind", "available: "]),
    (
        "option of another kind",
        MINIMAL + "training: {optimizer: {kind: adamw, momentum: 0.9}}\n",
        ["r.yaml:4:37", "training.optimizer.momentum", "adamw has no momentum", "sgd"],
    ),
    (
        "nothing is trained",
        MINIMAL + "adapter: {target_modules: []}\n",
        ["adapter.target_modules", "no trainable parameters"],
    ),
    (
        "early stopping on what is not measured",
        MINIMAL.replace("a.jsonl}", "a.jsonl, validation: {fraction: 0.1}}")
        + "evaluation: {every_steps: 5, during: [loss], early_stopping: {metric: accuracy}}\n",
        ["r.yaml:4:71", "evaluation.early_stopping.metric", "available metrics: loss"],
    ),
    (
        "evaluation without rows",
        MINIMAL + "evaluation: {every_steps: 10}\n",
        ["r.yaml:4:27", "evaluation.every_steps", "data.validation"],
    ),
    (
        "warm-up longer than the run",
        MINIMAL + "training: {max_steps: 10, schedule: {warmup_steps: 500}}\n",
        ["r.yaml:4:52", "training.schedule.warmup_steps", "500", "training.max_steps 10"],
    ),
    ("two lengths", MINIMAL + "training: {max_steps: 10, epochs: 1}\n", ["training.max_steps", "training.epochs"]),
    (
        "two warm-ups",
        MINIMAL + "training: {schedule: {warmup_steps: 1, warmup_ratio: 0.1}}\n",
        ["training.schedule", "warmup_steps", "warmup_ratio"],
    ),
    ("unknown metric", MINIMAL + "evaluation: {final: [rogue]}\n", ["evaluation.final[0]", "did you mean rouge"]),
    (
        "a metric's other value",
        MINIMAL + "evaluation: {final: [relevance_to_prompt]}\n",
        ["evaluation.final[0]", "'relevance_to_prompt' is no metric by itself; name domain_relevance"],
    ),
    (
        "metric that needs another turn's answers while training",
        MINIMAL + "evaluation: {during: [loss, tool_call]}\n",
        ["evaluation.during[1]", "while training", "available: ", "loss"],
    ),
    (
        "unknown format",
        MINIMAL.replace("a.jsonl}", "[{path: a, format: sharegtp}]}"),
        ["data.train[0].format", "did you mean sharegpt"],
    ),
    (
        "unknown word",
        MINIMAL.replace("base: b", "base: b, dtype: bfloat16"),
        ["model.dtype", "'bfloat16'", "did you mean bf16"],
    ),
    ("empty text", MINIMAL.replace("base: b", "base: ''"), ["model.base", "must not be empty"]),
    ("empty list", MINIMAL.replace("a.jsonl", "[]"), ["data.train", "must not be empty"]),
    ("no model", "name: x\ndata: {train: a}\n", ["r.yaml:1:1", "model", "is missing"]),
    ("no base", "name: x\nmodel: {dtype: bf16}\ndata: {train: a}\n", ["r.yaml:2:1", "model.base", "is missing"]),
    ("source without a path", MINIMAL.replace("a.jsonl", "[{limit: 3}]"), ["data.train[0].path", "is missing"]),
    (
        "one of two betas",
        MINIMAL + "training: {optimizer: {kind: adamw, betas: [0.9]}}\n",
        ["optimizer.betas", "a list of 2 numbers", "a list of 1"],
    ),
    (
        "three betas",
        MINIMAL + "training: {optimizer: {kind: adamw, betas: [0.9, 0.9, 0.9]}}\n",
        ["optimizer.betas", "a list of 2 numbers"],
    ),
    ("key of the whole recipe in a section", MINIMAL + "training: {seed: 1}\n", ["training.seed", "did you mean seed"]),
    ("Cyrillic letter", MINIMAL + "s\u0435ed: 1\n", ["CYRILLIC SMALL LETTER IE", "did you mean seed"]),
    ("letter that cannot be seen", MINIMAL + "seed\u200b: 1\n", ["ZERO WIDTH SPACE", "did you mean seed"]),
    ("full-width letters", MINIMAL + "\uff53eed: 1\n", ["FULLWIDTH LATIN SMALL LETTER S", "did you mean seed"]),
    ("capitals", MINIMAL + "Training: {epochs: 1}\n", ["r.yaml:4:1", "Training", "did you mean training"]),
    ("hyphens", MINIMAL + "training: {batch-size: 1}\n", ["training.batch-size", "did you mean batch_size"]),
    ("text for a list", MINIMAL + "tracking: wandb\n", ["tracking", "found 'wandb'", "write [wandb]"]),
    ("a target for a list", MINIMAL + "adapter: {target_modules: q_proj}\n", ["target_modules", "write [q_proj]"]),
    (
        "a target that is nearly a word",
        MINIMAL + "adapter: {target_modules: all_linear}\n",
        ["target_modules", "did you mean all-linear"],
    ),
    (
        "share without its name",
        MINIMAL.replace("a.jsonl}", "a.jsonl, validation: 0.1}"),
        ["data.validation", "found 0.1", "write {fraction: 0.1}"],
    ),
    ("line break in a name", MINIMAL.replace("name: x", 'name: "a\\nb"'), ["r.yaml:1:7", "name", "line break"]),
    ("line break in a path", MINIMAL + "output: |\n  a\n  b\n", ["r.yaml:4:9", "output", "line break"]),
    (
        "no space behind a colon",
        MINIMAL + "training: {epochs:3}\n",
        ["training.epochs:3", "no space behind the colon", "write epochs: value"],
    ),
    ("very long key", MINIMAL + "k" * 900 + ": 1\n", ["r.yaml:4:1", "unknown key"]),
    ("very long value", MINIMAL + f"seed: {'v' * 100_000}\n", ["r.yaml:4:7: seed", "expected a whole number", "vvv…"]),
]


@pytest.mark.parametrize(("text", "says"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_broken_recipe(fails: Fails, text: str, says: list[str]) -> None:
    error = fails(text)
    assert error.exit_code == 3
    assert not isinstance(error, Problems), parts(error)
    for words in says:
        assert words in str(error)


OUT_OF_RANGE = [
    *("training.learning_rate=-1", "training.learning_rate=0", "training.learning_rate=11"),
    *("adapter.dropout=1.5", "adapter.dropout=-0.1", "adapter.r=0", "adapter.r=-1", "adapter.alpha=0"),
    *("training.batch_size=0", "training.epochs=-1", "training.epochs=0", "training.max_steps=0"),
    *("training.max_grad_norm=0", "training.micro_batch_tokens=0", "training.schedule.warmup_ratio=1.1"),
    *("training.schedule.warmup_steps=-1", "training.optimizer.betas=[0.9, 1.5]"),
    *("adapter.r=1000000000", "training.max_steps=-1", "evaluation.early_stopping.min_delta=-1"),
    *("checkpoints.every_steps=0", "checkpoints.keep_last=0", "seed=-1", "seed=4294967296"),
    *("data.max_length=0", "data.validation={fraction: 0}", "data.validation={fraction: 1}"),
    *("data.bad_rows.max_fraction=2", "data.train[0].repeats=0", "data.train[0].limit=0"),
    *("evaluation.every_steps=0", "evaluation.max_new_tokens=0", "evaluation.early_stopping.patience=0"),
]


@pytest.mark.parametrize("flag", OUT_OF_RANGE)
def test_a_number_out_of_range_names_the_range(fails: Fails, flag: str) -> None:
    error = fails(MINIMAL, [flag])
    assert error.exit_code == 3
    key = flag.partition("=")[0]
    assert key in str(error)
    assert "allowed range" in str(error)
    assert "must be" in str(error)


@pytest.mark.parametrize(
    ("flag", "todo"),
    [
        ("data.bad_rows=skip", "write bad_rows: {policy: skip}"),
        ("data.bad_rows=0.2", "write bad_rows: {max_fraction: 0.2}"),
        ("model=org/name", "write model: {base: org/name}"),
        ("data=rows.jsonl", "write data: {train: rows.jsonl}"),
    ],
)
def test_a_value_that_stands_for_a_section_is_told_with_the_key_that_takes_it(
    fails: Fails, loads: Loads, flag: str, todo: str
) -> None:
    assert str(fails(MINIMAL, [flag])).endswith(todo)
    section = yaml.safe_load(todo.removeprefix("write "))
    key = flag.partition("=")[0]
    assert loads(MINIMAL, [f"{key}={json.dumps(section[key.rpartition('.')[2]])}"])


def test_several_errors_are_all_listed(fails: Fails) -> None:
    error = fails(MINIMAL + "adapter: {dropuot: 0.1}\ntraining: {learning_rate: fast}\nseed: -1\n")
    assert isinstance(error, Problems)
    assert [line.split(": ")[0] for line in parts(error)] == ["r.yaml:4:11", "r.yaml:5:27", "r.yaml:6:7"]
    assert str(error).startswith("r.yaml: 3 errors; first: r.yaml:4:11: adapter.dropuot: unknown key")


def test_what_the_text_says_wrongly_comes_before_what_it_means_wrongly_and_what_it_lacks(fails: Fails) -> None:
    error = fails("model: {bas: b}\nadapter: {dropuot: 0.1}\nseed: 010\nseed: 2\na: &a [*a]\n")
    keys = [line.split(": ")[1] for line in parts(error)]
    assert keys == ["seed", "seed", "a[0]", "model.bas", "adapter.dropuot", "name", "data"]


def test_errors_that_hide_behind_others_are_listed_too(fails: Fails) -> None:
    """A contradiction is found although a section with an unknown key never gets as far as being compared."""
    error = fails(
        "nmae: x\nmodel: {base: b, dtyp: bf16}\ndata: {train: a}\n"
        "training: {max_steps: 5, schedule: {warmup_steps: 9, warmup: 1}, batch_size: none}\n"
        "evaluation: {every_steps: 3}\n"
    )
    keys = [line.split(": ")[1] for line in parts(error)]
    assert keys == [
        "nmae",
        "model.dtyp",
        "training.schedule.warmup_steps",
        "training.schedule.warmup",
        "training.batch_size",
        "evaluation.every_steps",
    ]


def test_a_list_of_thousands_of_mistakes_has_an_end(fails: Fails) -> None:
    start = time.process_time()
    lines = parts(fails(MINIMAL + f"tracking: [{', '.join(['wandbb'] * 15_000)}]\n"))
    assert len(lines) == 401
    assert any("more than 400 errors" in line for line in lines)
    assert time.process_time() - start < 30


def test_one_mistake_is_one_error(fails: Fails) -> None:
    """What follows from a mistake is not reported again: the key it was meant to be is not missing as well."""
    error = fails("name: x\nmodle: {base: b}\ndata: {trian: a.jsonl}\n")
    assert [line.split(": ")[1] for line in parts(error)] == ["modle", "data.trian"]
    error = fails(MINIMAL.replace("name: x", "name: no") + "evaluation: {every_steps: 5}\n")
    assert [line.split(": ")[1] for line in parts(error)] == ["name", "evaluation.every_steps"]
    error = fails(
        "name: x\nmodel: {base: b}\ndata: {train: a.jsonl, valdiation: v.jsonl}\nevaluation: {every_steps: 5}\n"
    )
    assert len(parts(error)) == 1


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(loads: Loads) -> None:
    text = MINIMAL + "training: {epochs: 2}\n# end\n"
    plain = loads(text)
    odd = loads(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert odd.digest == plain.digest
    assert odd.recipe == plain.recipe


def test_the_working_folder_changes_nothing(loads: Loads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = loads(MINIMAL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = load_recipe(Path("../r.yaml"))
    assert there.digest == here.digest
    assert there.path("a.jsonl") == here.path("a.jsonl") == tmp_path / "a.jsonl"
    assert there.output == here.output == tmp_path / "runs" / "x"


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nope\.yaml: no such file") as caught:
        load_recipe(tmp_path / "nope.yaml")
    assert caught.value.exit_code == 2


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        load_recipe(tmp_path)


def test_a_validators_words_stand_behind_their_key_once(fails: Fails) -> None:
    """In the recipe's own order: the key, and what is wrong there."""
    model = MINIMAL.replace("{base: b}", "{base: b, quantization: {kind: adaptive, bits: 3}}")
    assert ": model.quantization.bits: 3 is less than NF4 alone takes: about 4.127" in str(fails(model))
    peft = "adapter: {kind: peft, method: loha, options: {no_such: 1}}\n"
    assert str(fails(MINIMAL + peft)).count("options") == 1


def test_a_run_folder_is_answered_with_what_goes_on_with_it(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    for name in ("manifest.json", "recipe.yaml"):
        (run / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="is a run folder, not a recipe") as caught:
        load_recipe(run)
    assert f"lorafit train '{run}/recipe.yaml' --resume" in str(caught.value)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="file name too long"):
        load_recipe(tmp_path / ("n" * 300 + ".yaml"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_recipe_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(MINIMAL)
    (tmp_path / "r.yaml").chmod(0)
    with pytest.raises(UsageError, match=r"r\.yaml: permission denied"):
        load_recipe(tmp_path / "r.yaml")


def test_a_data_file_given_as_recipe(fails: Fails) -> None:
    error = fails(b"# " + b"x" * 3_000_000)
    assert error.exit_code == 3
    assert "larger than" in str(error)
