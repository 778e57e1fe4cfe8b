"""A task over pairs of answers, all the way: preview, estimate, train, resume, eval, generate, merge."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.support.tiny_recipe import make_pairs, make_verdicts, write_rows
from tests.support.world import World, say_all, stop_after

DPO = (
    ("  dropout: 0.0", "  dropout: 0.0\ntask: {kind: dpo, beta: 0.5}"),
    ("max_steps: 2", "max_steps: 4"),
    ("  train: d.jsonl", "  train: d.jsonl\n  test: t.jsonl\n  validation: v.jsonl"),
    ("  final: [perplexity]", "  every_steps: 2\n  final: [reward_accuracy, reward_margin, loss, rouge]"),
)


@pytest.fixture
def pairs(world: World) -> World:
    for name, count, first in (("d", 12, 0), ("v", 3, 40), ("t", 8, 60)):
        write_rows(world.root / f"{name}.jsonl", make_pairs(count, first=first))
    world.recipe(*DPO)
    return world


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics_of(world: World, run: str) -> Any:
    found = world.run("eval", run, "--json")
    say_all(found, 0)
    return found.json["metrics"]


def test_from_preview_to_merge(pairs: World) -> None:
    shown = pairs.run("preview", "r.yaml", "--rows", "1", "--json").json["rows"]
    assert [row["name"] for row in shown] == ["chosen", "rejected"]
    pair = make_pairs(1)[0]
    for row in shown:
        trained = [label for label in row["labels"] if label != -100]
        assert row["rendering"].startswith(pair["prompt"] + pair[row["name"]])
        assert trained == row["input_ids"][-len(trained) :] and len(trained) < len(row["input_ids"])
    seen = pairs.run("preview", "r.yaml")
    lengths = re.findall(r"longest (\d+) \(2 sequences padded to (\d+)\)", seen.stdout)
    assert len(lengths) == 3 and all(int(both) == 2 * int(one) for both, one in lengths)  # max_length bounds the one
    say_all(seen, 0, "d.jsonl", "prompts and their answers go through no chat template; for chats name a template")
    estimated = pairs.run("estimate-memory", "r.yaml")
    say_all(estimated, 0, "12 rows", f"{lengths[0][0]} (2 sequences padded to {lengths[0][1]})")
    trained = pairs.run("train", "r.yaml")
    say_all(trained, 0, "adapter of step 4", f"longest {lengths[0][0]} tokens (2 sequences padded to {lengths[0][1]})")
    assert [each.stderr.count("by dry runs") for each in (seen, estimated, trained)] == [0, 1, 1]
    assert sum("reward_accuracy" in json.dumps(line) for line in steps_of(pairs.root / "run")) == 2
    scored = metrics_of(pairs, "run")
    assert scored["reward_accuracy"]["base"] == pytest.approx(0.5) and scored["reward_margin"]["base"] == 0.0
    assert scored["reward_margin"]["tuned"] > 0.1 and {"low", "high", "verdict"} <= scored["reward_accuracy"].keys()
    assert scored["loss"]["tuned"] < scored["loss"]["base"] == pytest.approx(0.693147, abs=1e-5)
    assert "rougeL" in scored
    shown = pairs.run("eval", "run", "--set", "evaluation.final=[loss]").stdout
    [report] = (pairs.root / "run").glob("report.set-final-*.json")
    worst = json.loads(report.read_text())["worst_rows"][0]
    assert shown.count(f"loss {worst['tuned_score']:.4g} (base {worst['base_score']:.4g})") == 1
    pair = make_pairs(8, first=60)[worst["line"] - 1]
    for name in ("chosen", "rejected"):
        assert pair[name].strip() in worst[name] and f"  {name}: {pair[name].strip()}" in shown
    assert ", loss" not in shown and "  reference: " not in shown
    say_all(pairs.run("generate", "run", "--input", "t.jsonl", "--max-new-tokens", "3"), 0)
    say_all(pairs.run("merge", "run", "--output", "merged"), 0, "merged")


@pytest.mark.parametrize(("metric", "task", "steps"), [("reward_accuracy", "orpo", 12), ("reward_margin", "dpo", 4)])
def test_a_reward_chooses_the_checkpoint_and_stops_the_run(pairs: World, metric: str, task: str, steps: int) -> None:
    """The higher the better: an accuracy that cannot rise any more ends the run after its patience."""
    stopping = f"every_steps: 1\n  final: [loss]\n  early_stopping: {{metric: {metric}, patience: 2}}"
    kind, longer = ("  dropout: 0.0", f"  dropout: 0.0\ntask: {task}"), ("max_steps: 2", f"max_steps: {steps}")
    pairs.recipe(kind, longer, DPO[2], ("  final: [perplexity]", f"  {stopping}"))
    rows = "data={train: d.jsonl, validation: t.jsonl}"
    trained = pairs.run("train", "r.yaml", "--set", f"evaluation.during=[{metric}]", "--set", rows)
    say_all(trained, 0, f"best {metric}")
    lines = steps_of(pairs.root / "run")
    values = {line["step"]: line["evaluation"][metric] for line in lines if "evaluation" in line}
    best = max(values, key=lambda step: (values[step], -step))
    assert json.loads((pairs.root / "run" / "best.json").read_text())["step"] == best
    assert values[best] > values[1] and f"the adapter of step {best} " in trained.stdout + trained.stderr
    if metric == "reward_accuracy":
        assert max(values) == best + 2 < steps and "stopped early" in trained.stdout + trained.stderr


@pytest.mark.usefixtures("memory_by_formula")
def test_the_reference_is_the_adapter_that_training_began_with(pairs: World) -> None:
    """At step 0, after a resume whose cache and init_from are gone, and in eval."""
    short = ["--set", "training.max_steps=1", "--set", "evaluation.every_steps=null"]
    say_all(pairs.run("train", "r.yaml", "--output", "start", *short), 0)
    change = ("  dropout: 0.0", "  dropout: 0.0\n  init_from: start/adapter\ntask: {kind: dpo, beta: 0.5}")
    pairs.recipe(change, *DPO[1:])
    say_all(pairs.run("train", "r.yaml"), 0, "step 4")
    assert steps_of(pairs.root / "run")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    whole, scored = pairs.weights(), metrics_of(pairs, "run")
    shutil.rmtree(Path(pairs.environment["LORAFIT_CACHE"]) / "reference")
    shutil.copytree(pairs.root / "run" / "adapter", pairs.root / "start" / "adapter", dirs_exist_ok=True)
    stop_after(pairs.root / "run", 3)
    say_all(pairs.run("train", "r.yaml", "--resume"), 0, "step 4")
    assert pairs.weights() == whole
    assert metrics_of(pairs, "run") == scored and scored["loss"]["tuned"] < 0.6
    shutil.rmtree(pairs.root / "run" / "first-adapter")
    say_all(pairs.run("eval", "run"), 5, "first-adapter")


def test_odds_need_no_reference(pairs: World) -> None:
    pairs.recipe(("  dropout: 0.0", "  dropout: 0.0\ntask: {kind: orpo, odds_weight: 0.5}"), *DPO[1:])
    trained = pairs.run("train", "r.yaml")
    say_all(trained, 0, "adapter of step 4")
    assert "reference" not in trained.stdout + trained.stderr
    whole = pairs.weights()
    stop_after(pairs.root / "run", 2)
    say_all(pairs.run("train", "r.yaml", "--resume"), 0, "step 4")
    assert pairs.weights() == whole
    scored = metrics_of(pairs, "run")
    assert scored["loss"]["tuned"] < scored["loss"]["base"]
    assert scored["reward_margin"]["tuned"] > scored["reward_margin"]["base"] != 0.0
    say_all(pairs.run("merge", "run", "--output", "merged"), 0, "merged")


@pytest.mark.usefixtures("memory_by_formula")
def test_a_reward_model_is_resumed_scored_and_merged_into_plain_transformers(pairs: World) -> None:
    final = ("  final: [perplexity]\n  max_new_tokens: 8\n", "  final: [reward_accuracy, reward_margin, loss]\n")
    pairs.recipe(("  dropout: 0.0", "  dropout: 0.0\ntask: {kind: reward, centering: 0.01}"), *DPO[1:3], final)
    seen = pairs.run("preview", "r.yaml")
    say_all(seen, 0, "2 sequences padded to")
    say_all(pairs.run("estimate-memory", "r.yaml"), 0, "by dry runs")
    say_all(pairs.run("train", "r.yaml"), 0, "adapter of step 4")
    whole = pairs.weights()
    stop_after(pairs.root / "run", 2)
    say_all(pairs.run("train", "r.yaml", "--resume"), 0, "step 4")
    assert pairs.weights() == whole
    scored = pairs.run("eval", "run", "--json")
    say_all(scored, 0)
    assert 0.0 <= scored.json["metrics"]["reward_accuracy"]["tuned"] <= 1.0
    assert "logistic regression" in scored.json["base_note"]
    for worst in scored.json["worst_rows"]:
        assert_sides(worst, make_pairs(8, first=60)[worst["line"] - 1])
    say_all(pairs.run("merge", "run", "--output", "merged"), 0, "merged")
    folder = pairs.root / "run" / "adapter"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    tuned = PeftModel.from_pretrained(model, folder).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(pairs.root / "merged").eval()
    assert plain.config.id2label == {0: "reward"}
    ids = AutoTokenizer.from_pretrained(pairs.root / "merged")("red mug on monday", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(tuned(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    say_all(pairs.run("generate", "run", "--prompt", "red"), 5, "writes no text", "use lorafit classify")
    check_rewards(pairs)


def assert_sides(worst: dict[str, Any], pair: dict[str, str]) -> None:
    """The prompt is what both sides begin with, and each answer what comes behind."""
    assert worst["prompt"].startswith(pair["prompt"]), worst
    for side in ("chosen", "rejected"):
        assert worst["prompt"] + worst[side] == pair["prompt"] + pair[side] + "<|im_end|>", worst


def check_rewards(pairs: World) -> None:
    """Each answer of a row gets its reward: of pairs those whose difference an evaluation counts."""
    found = rewards_of(pairs, "run", "t.jsonl")
    report = [json.loads(line) for line in (pairs.root / "run" / "report.jsonl").read_text().splitlines()]
    margins = [row["chosen_reward"] - row["rejected_reward"] for row in found]
    assert margins == pytest.approx([row["tuned"]["margin"] for row in report], abs=1e-5)
    both = make_pairs(8, first=60)
    write_rows(pairs.root / "one.jsonl", [{"prompt": row["prompt"], "completion": row["rejected"]} for row in both])
    for model in ("run", "run/adapter", "merged"):
        rewards = [row["reward"] for row in rewards_of(pairs, model, "one.jsonl")]
        assert rewards == pytest.approx([row["rejected_reward"] for row in found], abs=1e-4), model
    say_all(pairs.run("classify", "run", "--input", "one.jsonl"), 0, "reward ", both[0]["rejected"])
    say_all(pairs.run("classify", "run", "--input", "t.jsonl", "--output", "t.csv"), 0)
    header, first, *_ = (pairs.root / "t.csv").read_text().splitlines()
    assert header == "file,line,prompt,completion,rejected,chosen_reward,rejected_reward" and first.startswith(
        "t.jsonl,1,"
    )
    say_all(pairs.run("classify", "run", "--prompt", "red"), 2, "--prompt", "a prompt with its answer")
    write_rows(pairs.root / "bad.jsonl", [{"text": "no answer"}])
    say_all(pairs.run("classify", "run", "--input", "bad.jsonl"), 4, "bad.jsonl:1: holds no prompt with its answer")
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_rows(pairs.root / "bad.jsonl", [{"messages": chat}])
    say_all(pairs.run("classify", "run", "--input", "bad.jsonl"), 4, "bad.jsonl:1: messages: is a chat")


def test_a_reward_model_of_chats_scores_chats(pairs: World) -> None:
    """Prompts and answers as strings are turns then, for run, adapter and merge alike."""
    rows = make_pairs(6)
    asked = [{"role": "user", "content": row["prompt"]} for row in rows]
    said = [{side: {"role": "assistant", "content": row[side]} for side in ("chosen", "rejected")} for row in rows]
    chats = [{side: [one, both[side]] for side in both} for one, both in zip(asked, said, strict=True)]
    write_rows(pairs.root / "d.jsonl", chats)
    final = ("  final: [perplexity]\n  max_new_tokens: 8\n", "  final: [loss]\n")
    system = ("  train: d.jsonl", "  train: d.jsonl\n  system_prompt: be kind")
    pairs.recipe(("  dropout: 0.0", "  dropout: 0.0\ntask: reward"), system, final)
    say_all(pairs.run("train", "r.yaml"), 0)
    say_all(pairs.run("merge", "run", "--output", "merged", "--no-verify"), 0)
    write_rows(pairs.root / "chats.jsonl", [{"messages": row["chosen"]} for row in chats])
    write_rows(pairs.root / "texts.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    found = [row["chosen_reward"] for row in rewards_of(pairs, "run", "d.jsonl")]
    for model, file in (("run/adapter", "chats.jsonl"), ("merged", "chats.jsonl"), ("merged", "texts.jsonl")):
        rewards = [row["reward"] for row in rewards_of(pairs, model, file)]
        assert rewards == pytest.approx(found, abs=1e-4), (model, file)


def rewards_of(world: World, model: str, rows: str) -> list[dict[str, float]]:
    outcome = world.run("classify", model, "--input", rows, "--json")
    say_all(outcome, 0)
    return [row["values"] for row in outcome.json["labels"]]


def test_rows_of_one_answer_and_of_two_are_told_apart(pairs: World) -> None:
    pairs.rows()
    say_all(pairs.run("preview", "r.yaml"), 4, "rows of question_answer", "dpo needs prompt, chosen, rejected")
    write_rows(pairs.root / "d.jsonl", make_pairs(12))
    pairs.recipe()
    say_all(pairs.run("preview", "r.yaml"), 4, "compares two answers", "causal-lm", "columns: {completion: chosen}")
    say_all(pairs.run("preview", "r.yaml", "--set", "data.train=[{path: d.jsonl, columns: {completion: chosen}}]"), 0)


def test_answers_with_verdicts_from_preview_to_merge(pairs: World) -> None:
    """The best checkpoint is that of the largest margin; a resume is the same run."""
    for name, count, first in (("d", 12, 0), ("v", 3, 40), ("t", 8, 60)):
        write_rows(pairs.root / f"{name}.jsonl", make_verdicts(count, first=first))
    final = "desirable_margin, loss, reference_point, ref_log_ratio"
    stopping = "early_stopping: {metric: desirable_margin, patience: 9}"
    pairs.recipe(
        ("  dropout: 0.0", "  dropout: 0.0\ntask: {kind: kto, beta: 0.5, desirable_weight: 1.2}"),
        *DPO[1:3],
        ("  final: [perplexity]", f"  every_steps: 2\n  final: [{final}]\n  {stopping}"),
    )
    shown = pairs.run("preview", "r.yaml", "--rows", "1", "--json").json["rows"]
    row, other = make_verdicts(2)[0], make_verdicts(2)[2]
    assert [one["name"] for one in shown] == ["desirable", "mismatched"]
    for one, completion in zip(shown, (row["completion"], other["completion"]), strict=True):
        assert one["rendering"].startswith(row["prompt"] + completion)
    assert [any(label != -100 for label in one["labels"]) for one in shown] == [True, False]
    seen = pairs.run("preview", "r.yaml")
    say_all(seen, 0, "desirable 12, undesirable 12", "2 sequences padded to", "for chats name a template")
    say_all(pairs.run("estimate-memory", "r.yaml"), 0, "24 rows", "by dry runs")
    say_all(pairs.run("train", "r.yaml"), 0, "best desirable_margin")
    lines = steps_of(pairs.root / "run")
    assert lines[0]["loss"] == pytest.approx(0.55, abs=0.051)  # half of the weights' mean, by the step's verdicts
    margins = {line["step"]: line["evaluation"]["desirable_margin"] for line in lines if "evaluation" in line}
    best = json.loads((pairs.root / "run" / "best.json").read_text())
    assert (best["step"], best["value"]) == max(margins.items(), key=lambda entry: entry[1])
    whole = pairs.weights()
    stop_after(pairs.root / "run", 2)
    say_all(pairs.run("train", "r.yaml", "--resume"), 0, "step 4")
    assert pairs.weights() == whole
    scored = metrics_of(pairs, "run")
    assert {name: scored[name]["base"] for name in scored} == pytest.approx(
        dict.fromkeys(scored, 0.0) | {"loss": 0.55}, abs=1e-5
    )
    assert scored["desirable_reward"]["tuned"] > 0 > scored["undesirable_reward"]["tuned"]
    assert scored["desirable_margin"]["verdict"] == "better" and scored["loss"]["tuned"] < 0.55
    for worst in json.loads((pairs.root / "run" / "report.json").read_text())["worst_rows"]:
        assert worst["mismatched"] and not worst["mismatched"].startswith(worst["prompt"])  # an answer, no prompt
    rows = [json.loads(line)["tuned"] for line in (pairs.root / "run" / "report.jsonl").read_text().splitlines()]
    good, bad = ([row["reward"] for row in rows if row["desirable"] == kind] for kind in (1, 0))
    above = [one > other for one in good for other in bad]
    assert sum(above) / len(above) > 0.9  # of pairs of a desirable and an undesirable one
    say_all(pairs.run("merge", "run", "--output", "merged"), 0, "merged")
    write_rows(pairs.root / "d.jsonl", [{**row, "prompt": "red"} for row in make_verdicts(2)])
    say_all(pairs.run("train", "r.yaml", "--output", "other"), 4, "all rows ask the same", "other prompts")
    pairs.recipe()
    say_all(pairs.run("preview", "r.yaml"), 4, "an answer with a verdict is not for task causal-lm")
