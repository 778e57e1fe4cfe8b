"""A classifier from training to plain transformers: head and labels included, and no text asked of it."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

import lorafit
from lorafit import pipeline
from lorafit.data.plain_text import PlainText
from lorafit.errors import DataError, ModelError, UsageError
from tests.support.processes import ENVIRONMENT, PROGRAM, start
from tests.support.tiny_model import make_base

pytestmark = pytest.mark.usefixtures("memory_by_formula")

ROWS = [{"text": f"{word} number {n}", "label": word} for n in range(6) for word in ("red", "green", "blue")]


def colours(base: Path, output: Path) -> dict[str, Any]:
    return {
        "name": "colours",
        "task": "sequence-classification",
        "model": {"base": str(base), "quantization": "none", "dtype": "fp32"},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"train": "unused.jsonl", "max_length": 32},
        "training": {"max_steps": 3, "batch_size": 6, "learning_rate": 1.0e-2, "optimizer": "adamw"},
        "output": str(output),
    }


def test_a_classifier_is_trained_scored_merged_and_asked(tmp_path: Path) -> None:
    run = lorafit.train(colours(make_base(tmp_path / "base"), tmp_path / "run"), rows=ROWS, quiet=True)

    evaluated = lorafit.evaluate(run, rows=ROWS, quiet=True).to_json()
    assert set(evaluated["metrics"]) == {"accuracy", "macro_f1", "loss"}
    assert evaluated["metrics"]["accuracy"]["base"] == 1.0, "words alone tell the classes of these rows"
    assert "logistic regression" in evaluated["base_note"]
    confusion = evaluated["tables"]["tuned"]["confusion"]["lines"]
    assert sum(count for line in confusion for count in line[1:]) == len(ROWS)

    worst = evaluated["worst_rows"][0]
    assert worst["base"]["answer"] == worst["reference"] and worst["tuned"]["answer"] in ("blue", "green", "red")

    merged = lorafit.merge(run, tmp_path / "merged", quiet=True)
    assert merged.parity is not None and merged.parity.max_logit_difference < 1e-4
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.id2label == {0: "blue", 1: "green", 2: "red"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = ["a red one", "something blue, and longer"]
    for by in (run.path, run.path / "adapter", tmp_path / "merged"):
        found = lorafit.classify(by, asked, quiet=True).to_json()["labels"]
        for text, row in zip(asked, found, strict=True):
            with torch.no_grad():
                shares = plain(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
            assert list(row["probabilities"].values()) == pytest.approx(shares, abs=1e-5)
            assert row["labels"] == [plain.config.id2label[max(range(3), key=shares.__getitem__)]]
        with pytest.raises(ModelError, match="writes no text"):
            lorafit.generate(by, "hello", quiet=True)
    notes = json.loads((tmp_path / "run" / "adapter" / "lorafit.json").read_text())
    assert notes["head"]["tensors"] == ["score.weight"]


@pytest.mark.parametrize("base", ["llama", "bert"])
def test_words_are_labelled_by_a_run_its_adapter_and_its_merged_model(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_base(tmp_path / "llama"))
    if base == "bert":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(0)
        BertModel(BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "bert")
        tokenizer.save_pretrained(tmp_path / "bert")
    names = {"red mug": ["B-COLOUR", "O"], "the shop": ["O", "B-PLACE"], "green shop": ["B-COLOUR", "B-PLACE"]}
    rows = [
        {"words": [*words.split(), str(n)], "labels": [*tags, "O"]} for n in range(8) for words, tags in names.items()
    ]
    recipe = colours(tmp_path / base, tmp_path / "run")
    recipe |= {"task": "token-classification", "evaluation": {"during": ["loss", "entity_f1"], "every_steps": 10}}
    recipe["training"] |= {"max_steps": 40, "batch_size": 8}
    run = lorafit.train(recipe, rows=rows, validation_rows=rows, quiet=True)
    evaluated = lorafit.evaluate(run, rows=rows, quiet=True).to_json()
    assert evaluated["metrics"]["entity_f1"]["tuned"] == evaluated["metrics"]["word_accuracy"]["tuned"] == 1.0
    assert evaluated["metrics"]["entity_f1"]["base"] == 1.0 and "logistic regression" in evaluated["base_note"]
    assert [line[0] for line in evaluated["tables"]["tuned"]["entities"]["lines"]] == ["COLOUR", "PLACE"]
    merged = lorafit.merge(run, tmp_path / "merged", quiet=True)
    assert merged.parity is not None and merged.parity.max_logit_difference < 1e-4
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    for by in (run.path, run.path / "adapter", tmp_path / "merged"):
        found = lorafit.classify(by, ["green shop 3"], quiet=True).to_json()["labels"][0]
        assert found["words"] == ["green", "shop", "3"] and found["labels"] == ["B-COLOUR", "B-PLACE", "O"]
        assert found["entities"][1] == {"type": "PLACE", "first": 1, "behind": 2}
        encoded = tokenizer("green shop 3", return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            shares = plain(**encoded).logits.softmax(-1)[0].max(-1).values
        # of "green", its first token that is one of the text
        begin = next(
            place
            for place, (_, end) in enumerate(tokenizer("green shop 3", return_offsets_mapping=True).offset_mapping)
            if end
        )
        assert found["probabilities"][0] == pytest.approx(float(shares[begin]), abs=1e-5)
    print(lorafit.classify(run, ["green shop 3"], quiet=True))
    assert "COLOUR green, PLACE shop" in capsys.readouterr().out


def test_a_head_is_trained_in_fp32_over_fp16(tmp_path: Path) -> None:
    """torch's loss scale takes no gradients in fp16."""
    recipe = colours(make_base(tmp_path / "base"), tmp_path / "run")
    recipe["model"]["dtype"] = "fp16"
    run = lorafit.train(recipe, rows=ROWS, quiet=True)
    tensors = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
    assert any(name.endswith("score.weight") for name in tensors)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_head_for_other_classes_gives_way_and_one_for_as_many_is_gone_on_from(
    tmp_path: Path, classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(tokenizer), num_labels=classes))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")

    run = lorafit.train(colours(tmp_path / "bert", tmp_path / "run"), rows=ROWS)
    said = "warning: the base's head is one for other classes, and a new one is drawn: classifier"
    assert (said in capsys.readouterr().err) is (classes == 2)
    first = load_file(run.path / "checkpoints" / "step-000000" / "adapter" / "adapter_model.safetensors")
    head, own = first["base_model.model.classifier.weight"], model.classifier.weight
    assert head.shape == (3, 32) and (classes == 2 or torch.equal(head, own))
    merged = lorafit.merge(run, tmp_path / "merged", quiet=True)
    assert merged.parity is not None and merged.parity.max_logit_difference < 1e-4
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain.classifier.weight.shape == (3, 32)
    asked = [lorafit.classify(by, ["a red one"], quiet=True).to_json() for by in (run, tmp_path / "merged")]
    shares = [list(each["labels"][0]["probabilities"].values()) for each in asked]
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)


def test_a_model_without_a_trained_head_gives_no_labels(tmp_path: Path) -> None:
    base = make_base(tmp_path / "llama")
    with pytest.raises(ModelError, match="gives no labels; use lorafit generate"):
        lorafit.classify(base, ["a red one"], quiet=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(ModelError, match=r"has no head that lorafit trained, .*; train one first"):
        lorafit.classify(base, ["a red one"], quiet=True)


def test_a_killed_classifier_goes_on_as_the_same_run_and_says_the_same(tmp_path: Path) -> None:
    """Trained, killed, resumed and asked, each in a process of its own: the head's bits and every probability."""
    make_base(tmp_path / "base", layers=4)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = colours(tmp_path / "base", tmp_path / "run")
    recipe["model"] |= {"quantization": "nf4", "dtype": "bf16"}
    recipe["adapter"]["dropout"] = 0.3
    recipe["data"]["train"] = "rows.jsonl"
    recipe["training"]["max_steps"] = 16
    recipe["checkpoints"] = {"every_steps": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def call(*words: str) -> subprocess.Popen[str]:
        environment = {**ENVIRONMENT, "LORAFIT_CACHE": str(tmp_path / "cache")}
        return start(PROGRAM, *words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)

    def finish(*words: str) -> str:
        process = call(*words)
        told, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return told

    finish("train", "recipe.yaml", "--output", "unbroken", "--quiet")
    process, log = call("train", "recipe.yaml", "--output", "killed", "--quiet"), tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= 5):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the kill came too late"
    finish("train", "recipe.yaml", "--output", "killed", "--resume", "--quiet")

    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("unbroken", "killed")]
    assert "base_model.model.score.weight" in load_file(files[0])
    assert files[0].read_bytes() == files[1].read_bytes()
    answers = [finish("classify", name, "--input", "rows.jsonl", "--json") for name in ("unbroken", "killed")]
    told = [json.loads(answer)["labels"] for answer in answers]
    assert len(told[0]) == len(ROWS) and told[0] == told[1]


def test_a_table_goes_in_and_a_table_comes_out(tmp_path: Path) -> None:
    run = lorafit.train(colours(make_base(tmp_path / "base"), tmp_path / "run"), rows=ROWS, quiet=True)
    asked = tmp_path / "asked.csv"
    asked.write_text('id;text\n1;a red one\n2;"blue; or ""green"""\n')
    found = pipeline.classify(run.path, input_file=asked, output=tmp_path / "labels.csv").to_json()["labels"]
    with (tmp_path / "labels.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["text"] for line in lines] == ["a red one", 'blue; or "green"']
    assert [line["labels"] for line in lines] == [row["labels"][0] for row in found]
    for line, row in zip(lines, found, strict=True):
        assert {name: float(line[f"p({name})"]) for name in ("blue", "green", "red")} == row["probabilities"]


def test_words_of_a_table_come_back_as_a_table_and_what_was_cut_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"words": ["red", "mug", str(n)], "labels": ["B-X", "O", "O"]} for n in range(6)]
    recipe = colours(make_base(tmp_path / "base"), tmp_path / "run") | {"task": "token-classification"}
    run = lorafit.train(recipe, rows=rows, quiet=True)
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"words": ["New York", "mug"]}) + "\n" + json.dumps({"words": ["red"] * 60}) + "\n")
    pipeline.classify(run.path, input_file=asked, output=tmp_path / "o.csv")
    with (tmp_path / "o.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert json.loads(first["words"]) == ["New York", "mug"] and len(json.loads(first["labels"])) == 2
    assert first["cut_words"] == "" and int(second["cut_words"]) == 60 - len(json.loads(second["labels"])) > 0
    again = colours(tmp_path / "base", tmp_path / "again") | {"task": "token-classification"}
    again["data"]["train"] = str(tmp_path / "o.csv")
    with pytest.raises(DataError, match=r"o\.csv:3: labels: \d+ labels for 60 words"):
        lorafit.train(again, quiet=True)
    capsys.readouterr()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    texts = [" ".join(["red"] * words) + end for words in range(1, 32) for end in ("", " a", " mug")]
    lorafit.classify(run, [next(text for text in texts if len(tokenizer(text).input_ids) == 32)])
    assert "cut" not in capsys.readouterr().err, "it is as long as a row may be, and whole"
    lorafit.classify(run, ["red " * 60, "red mug", "red " * 50])
    assert "2 texts were cut: data.max_length of the run is 32 tokens" in capsys.readouterr().err

    def refuse(self: PlainText, sample: Any, *_: Any) -> Any:  # a word that the tokenizer drops
        raise DataError("word 2 has no token", key="words")

    monkeypatch.setattr(PlainText, "labelled", refuse)
    with pytest.raises(DataError, match=r"asked\.jsonl:1: words: word 2 has no token"):
        pipeline.classify(run.path, input_file=asked)


def test_a_reward_model_scores_answers_of_a_program(tmp_path: Path) -> None:
    pairs = [{"prompt": f"red {n}", "chosen": " mug", "rejected": " bowl it"} for n in range(6)]
    recipe = colours(make_base(tmp_path / "base"), tmp_path / "run") | {"task": "reward"}
    recipe["model"]["dtype"] = "bf16"
    recipe["model"] |= {"attention": "auto"}
    run = lorafit.train(recipe, rows=pairs, quiet=True)
    assert run.resolved is not None and run.resolved.attention != "eager"
    with pytest.raises(UsageError, match="scores a prompt with its answer"):
        lorafit.classify(run, ["red"], quiet=True)
    scored = lorafit.classify(run, [pairs[0], {"prompt": "red 0", "completion": " mug"}], quiet=True).values
    assert scored[0]["chosen_reward"] == pytest.approx(scored[1]["reward"], abs=1e-2) and len(scored[0]) == 2
    worst = lorafit.evaluate(run, rows=pairs, quiet=True).to_json()["worst_rows"][0]
    assert "mug" in worst["chosen"] and "bowl" in worst["rejected"] and "mug" not in worst["prompt"]
