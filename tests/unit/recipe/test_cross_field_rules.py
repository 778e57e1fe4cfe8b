"""What two fields must agree on, and what is no disagreement."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorafit.kinds.tasks import tasks
from tests.support.recipe_texts import MINIMAL, Fails, Loads, parts

AGREE = [
    "training: {max_steps: 10, schedule: {warmup_steps: 10}}\n",
    "training: {schedule: {warmup_steps: 500}}\n",
    "training: {epochs: 2}\n",
    "evaluation: {during: [perplexity], early_stopping: {metric: loss}, every_steps: 5}\n",
    "evaluation: {during: [perplexity], early_stopping: {metric: perplexity}, every_steps: 5}\n",
    "model: {base: org/model, revision: main}\n",
]


@pytest.mark.parametrize("text", AGREE)
def test_what_agrees(loads: Loads, text: str) -> None:
    given = {line.split(":")[0] for line in text.splitlines()}
    lines = [
        "name: x\n",
        "model: {base: b}\n",
        "data: {train: [a.jsonl, {path: org/rows, split: test, revision: main, subset: s}], validation: v.jsonl}\n",
    ]
    loaded = loads("".join(line for line in lines if line.split(":")[0] not in given) + text)
    ((section, values),) = yaml.safe_load(text).items()
    said = loaded.recipe.model_dump(mode="json", include={section})[section]
    assert {key: said[key] for key in values if not isinstance(values[key], dict)} == {
        key: value for key, value in values.items() if not isinstance(value, dict)
    }


@pytest.mark.parametrize(
    ("source", "option"),
    [
        ("{path: a.jsonl, split: test}", "split"),
        ("{path: b/a.CSV, subset: x}", "subset"),
        ("{path: a.parquet, revision: main}", "revision"),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "data.test", "data.validation", "evaluation.retention"])
def test_options_of_the_hub_on_a_file(fails: Fails, key: str, source: str, option: str) -> None:
    error = fails(MINIMAL, [f"{key}=[c.txt, {source}]"])
    assert f"{key}[1].{option}: only hub data sets have a {option}, and path is a file; remove it" in str(error)


@pytest.mark.parametrize("base", ["package://p/m.gguf", "models/m.gguf"])
def test_a_revision_of_a_file(fails: Fails, base: str) -> None:
    error = fails(MINIMAL.replace("base: b", f"base: {base}, revision: main"))
    assert "model.revision: only hub ids have revisions, and model.base is a file" in str(error)


UNREAD = [(name, option) for name in tasks.names() for option in tasks.get(name).unread]
OTHER = {
    "embedding_noise": "5",
    "train_on": "all",
    "augment": "{fields: [{field: prompt, drop: 0.1}]}",
    "dropped_fields": "warn",
    "max_new_tokens": "9",
    "min_new_tokens": "2",
}
OTHER |= {
    "embedding_noise": "5",
    "num_beams": "4",
    "length_penalty": "0.5",
    "no_repeat_ngram_size": "3",
    "answered_rows": "9",
    "draws": "3",
    "draw_temperature": "0.5",
}
NEEDS = {"length_penalty": "evaluation.num_beams=4", "encoder": "evaluation.final=[sampled_similarity]"}


@pytest.mark.parametrize(("task", "option"), UNREAD)
def test_an_option_that_a_task_does_not_read_is_refused(fails: Fails, loads: Loads, task: str, option: str) -> None:
    key, _, value = option.partition("=")
    sets = f"{key}={value or OTHER.get(key.split('.')[1], 'chatml')}"
    said = str(fails(MINIMAL, [f"task={task}", sets]))
    assert f"{key}: task {task} {tasks.get(task).unread[option]}; leave it out" in said
    needed = NEEDS.get(option.rpartition(".")[2])
    loads(MINIMAL, [sets, needed] if needed else [sets])


def test_what_may_be_set_instead_of_a_refused_value_is_said(fails: Fails) -> None:
    for task, value, left in (("image-text-to-text", "truncate", "drop"), ("seq2seq-lm", "split", "drop or truncate")):
        said = str(fails(MINIMAL, [f"task={task}", f"data.overlength={value}"]))
        assert said.endswith(f"leave it out, or set error{', ' if ' or ' in left else ' or '}{left}"), said


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ("length_penalty: 2", "evaluation.length_penalty: only a beam search reads it; set evaluation.num_beams"),
        (
            "encoder: minilm, final: [must_contain]",
            "evaluation.encoder: no metric of evaluation.final compares texts by it; name one that does",
        ),
        (
            "max_new_tokens: 4, min_new_tokens: 5",
            "evaluation.min_new_tokens: 5 is more than max_new_tokens 4",
        ),
    ],
)
def test_ways_to_answer_that_do_not_go_together(fails: Fails, evaluation: str, said: str) -> None:
    assert said in str(fails(MINIMAL + f"evaluation: {{{evaluation}}}\n"))


def test_classification_reads_nothing_of_chats() -> None:
    unread = {"chat_template", "system_prompt", "dropped_fields", "train_on", "packing=True"}
    assert {f"data.{name}" for name in unread} < tasks.get("sequence-classification").unread.keys()


def test_early_stopping_needs_evaluations(fails: Fails) -> None:
    error = fails(
        MINIMAL.replace("a.jsonl", "a.jsonl, validation: v.jsonl") + "evaluation: {early_stopping: {patience: 2}}\n"
    )
    assert "r.yaml:4:14: evaluation.early_stopping: needs evaluation.every_steps" in str(error)


def test_a_plateau_needs_evaluations_and_comes_before_the_end(fails: Fails) -> None:
    held_out = MINIMAL.replace("a.jsonl", "a.jsonl, validation: v.jsonl")
    error = fails(held_out + "evaluation: {on_plateau: {patience: 2}}\n")
    assert "r.yaml:4:14: evaluation.on_plateau: needs evaluation.every_steps" in str(error)
    stops = "evaluation: {every_steps: 5, early_stopping: {patience: 2}, on_plateau: {patience: 2}}\n"
    assert "early_stopping.patience 2 ends the run before the learning rate falls" in str(fails(held_out + stops))


@pytest.mark.parametrize(
    "acts",
    [
        *(f"adapter: {{kind: {kind}}}" for kind in ("adalora", "dylora", "growing_lora")),
        "training: {unfreezing: {top: 1, steps: [2]}}",
    ],
)
def test_weights_do_not_go_back_past_what_acts_between_steps(fails: Fails, loads: Loads, acts: str) -> None:
    held_out = MINIMAL.replace("a.jsonl", "a.jsonl, validation: v.jsonl")
    falls = "evaluation: {every_steps: 5, on_plateau: {patience: 2, go_back: true}}\n"
    said = str(fails(f"{held_out}{falls}{acts}\n"))
    assert "evaluation.on_plateau.go_back: weights would go back to an earlier step, and what" in said
    assert acts.split(":")[0] in said
    assert loads(f"{held_out}{falls.replace('true', 'false')}{acts}\n") and loads(held_out + falls)


def classifies(evaluation: str) -> str:
    """A classifier's recipe that stops early."""
    return MINIMAL.replace("a.jsonl", "a.jsonl, validation: v.jsonl") + (
        f"task: sequence-classification\nevaluation: {{every_steps: 5, {evaluation}}}\n"
    )


@pytest.mark.parametrize(
    ("metric", "meant"),
    [("macrof1", "macro_f1 or micro_f1"), ("acuracy", "accuracy"), ("eval_loss", "loss"), ("zzqq", "")],
)
def test_a_metric_to_stop_by_that_is_misspelt_is_answered_with_the_nearest(
    fails: Fails, metric: str, meant: str
) -> None:
    said = str(fails(classifies(f"early_stopping: {{metric: {metric}}}")))
    hint = f"did you mean {meant}? " if meant else ""
    assert f"'{metric}' is not measured while training; {hint}available metrics: loss, accuracy;" in said


def test_a_metric_that_is_refused_is_not_listed_as_available(fails: Fails) -> None:
    refused, other = parts(fails(classifies("during: [bleu, accuracy], early_stopping: {metric: macro_f1}")))
    assert "metric 'bleu' reads what task sequence-classification does not give" in refused
    assert "available metrics: loss, accuracy;" in other


def test_all_disagreements_are_found_at_once(fails: Fails) -> None:
    error = fails(
        "name: x\nmodel: {base: m.gguf, revision: v1}\ndata: {train: a.jsonl}\n"
        "training: {epochs: 1, max_steps: 5, schedule: {warmup_steps: 6}}\n"
        "evaluation: {every_steps: 2, early_stopping: {metric: bleu}}\n"
    )
    assert [line.split(": ")[1] for line in parts(error)] == [
        "model.revision",
        "training.max_steps",
        "training.schedule.warmup_steps",
        "evaluation.early_stopping.metric",
        "evaluation.every_steps",
    ]


def test_a_rule_is_not_asked_about_what_is_already_wrong(fails: Fails) -> None:
    """`max_steps` is unreadable, so nobody can say that the warm-up is longer than it."""
    error = fails(MINIMAL + "training: {max_steps: 1:30, schedule: {warmup_steps: 500}}\n")
    assert [line.split(": ")[1] for line in parts(error)] == ["training.max_steps"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "r.yaml:4:34: training.max_steps: training.epochs is set too; keep one of the two"),
        (
            ["training.epochs=1", "training.max_steps=4"],
            "--set training.max_steps=4: training.max_steps: training.epochs is set too; keep one of the two",
        ),
    ],
)
def test_two_lengths_said_in_one_place(fails: Fails, flags: list[str], said: str) -> None:
    assert str(fails(MINIMAL + "training: {epochs: 2, max_steps: 5}\n", flags)).startswith(said)


@pytest.mark.parametrize(("kept", "other"), [("epochs", "max_steps"), ("max_steps", "epochs")])
def test_of_two_lengths_the_one_said_last_is_kept(fails: Fails, loads: Loads, kept: str, other: str) -> None:
    """What was just typed is not what is to be taken back; and what is advised is enough."""
    text, flag = MINIMAL + f"training: {{{other}: 2}}\n", f"training.{kept}=1"
    said = str(fails(text, [flag]))
    assert said.startswith(f"--set {flag}: training.{kept}: training.{other} is set too, in r.yaml; ")
    assert f"add --set training.{other}=null" in said and f"training.{kept}=null" not in said
    assert getattr(loads(text, [flag, f"training.{other}=null"]).recipe.training, kept) == 1


def test_a_length_over_that_of_an_extended_recipe(fails: Fails, loads: Loads, tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("training: {max_steps: 5}\n", encoding="utf-8")
    text = MINIMAL + "extends: below.yaml\ntraining: {epochs: 2}\n"
    said = str(fails(text))
    assert said.startswith("r.yaml:5:20: training.epochs: training.max_steps is set too, in below.yaml; ")
    assert "add max_steps: null in training" in said
    assert loads(text.replace("epochs: 2", "epochs: 2, max_steps: null")).recipe.training.epochs == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["adapter=prefix_tuning", "data.packing=true"], "prefix_tuning begins a row with vectors of its own"),
        (["adapter=prompt_tuning", "model.attention=varlen"], "varlen attention is for packed rows"),
        (["data.packing=false", "model.attention=varlen"], "varlen attention is for packed rows"),
        (["adapter=prefix_tuning", "training.gradient_checkpointing=half"], "takes no gradient checkpointing"),
    ],
)
def test_what_the_recipe_alone_forbids_needs_no_model(fails: Fails, flags: list[str], said: str) -> None:
    (found,) = parts(fails(MINIMAL, flags))
    assert said in found
