"""`lorafit eval` with metrics of quality on a finished run: table, files, and bad input in a sentence."""

from __future__ import annotations

import json

import pytest

import lorafit
from lorafit.answering.tuned import Tuned
from lorafit.errors import DataError, LorafitError
from lorafit.kinds.metrics._stress_prompts import PROMPTS
from tests.support.tiny_encoder import make_encoder
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_rows, train_tiny, write_rows

ROWS = [{**row, "paraphrases": [f"tell me: {row['question']}"]} for row in make_rows(6, first=200)]
NAMES = ["repeatability", "paraphrase_consistency", "perturbation_consistency", "style_distance", "domain_relevance"]
NAMES += ["stress"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    make_encoder(folder / "encoder")
    make_base(folder / "decoder")
    return train_tiny(folder, test=ROWS)


@pytest.fixture(autouse=True)
def cached(run, monkeypatch):
    monkeypatch.setenv("LORAFIT_CACHE", str(run.parent / "cache"))


def evaluate(run, names, encoder="encoder", **more):
    chosen = {} if encoder is None else {"evaluation.encoder": str(run.parent / encoder)}
    overrides = {"evaluation.final": names, "evaluation.max_new_tokens": 6, **chosen, **more}
    return lorafit.evaluate(run, overrides=overrides, quiet=True)


def test_all_of_them_stand_in_every_form_of_the_report(run):
    found = evaluate(run, NAMES)
    metrics = found.to_json()["metrics"]
    assert set(metrics) == {
        *("repeatability", "sampled_similarity", "paraphrase_consistency", "paraphrase_same"),
        *("perturbation_consistency", "perturbation_same", "style_distance", "style_delta", "domain_relevance"),
        *("relevance_to_prompt", "relevance_to_reference", "relevance_margin", "stress"),
    }
    assert metrics["repeatability"]["tuned"] == metrics["repeatability"]["base"] == 1.0
    assert metrics.pop("stress")["rows"] == len(PROMPTS) - 2  # which fill the tiny model's positions
    assert found.to_json()["unscored"][0]["sentence"].startswith("stress: 2 of 54 rows left out")
    assert all(value["rows"] == 6 for value in metrics.values())
    (file,) = run.glob("report.set-*.json")
    tables = json.loads(file.read_text())["metric_tables"]
    assert [line[0] for line in tables["domain_relevance"]["lines"]] == ["base", "tuned", "references themselves"]
    assert {line[2] for line in tables["stress_answers"]["lines"]} >= {"ok", "متى تفتحون غدًا؟"}
    text = file.with_suffix(".md").read_text()
    assert "## Perturbation_consistency by way of asking" in text
    first = json.loads(file.with_suffix(".jsonl").read_text().splitlines()[0])
    assert first["tuned"]["further"]["paraphrase_consistency"][0]["words"] == ROWS[0]["paraphrases"][0]
    assert len(first["base"]["further"]["sampled_similarity"]) == 4


def test_without_paraphrases_the_metric_does_not_apply(run, monkeypatch):
    write_rows(run.parent / "plain.jsonl", make_rows(6, first=200))
    plain = {"data.test": str(run.parent / "plain.jsonl")}
    found = evaluate(run, ["paraphrase_consistency", "loss"], None, **plain)
    assert set(found.to_json()["metrics"]) == {"loss"}
    (left,) = found.to_json()["unscored"]
    needed = "a row that names paraphrases other than its question"
    assert left["sentence"] == f"paraphrase_consistency: does not apply, none of 6 rows is {needed}"

    monkeypatch.setattr(Tuned, "load", lambda *_: pytest.fail("a model was loaded for nothing"))
    with pytest.raises(
        DataError, match="no row can be scored: paraphrase_consistency needs a row that names"
    ) as caught:
        evaluate(run, ["paraphrase_consistency"], None, **plain)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("encoder", "code", "said"),
    [
        (None, 3, "domain_relevance compares texts by a sentence encoder, and evaluation.encoder is not set"),
        ("nowhere", 5, "no such folder"),
        ("run", 5, "evaluation.encoder: holds no config.json, so it is no sentence encoder"),
        ("decoder", 5, "'llama' is no encoder that reads a text in both directions"),
    ],
)
def test_a_bad_encoder_ends_in_a_sentence(run, encoder, code, said):
    with pytest.raises(LorafitError, match=said) as caught:
        evaluate(run, ["domain_relevance"], encoder)
    assert caught.value.exit_code == code
    assert caught.value.todo


def test_an_encoder_that_is_not_there_is_named_by_its_whole_path(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    with pytest.raises(LorafitError, match="no such folder") as caught:
        evaluate(run, ["domain_relevance"], None, **{"evaluation.encoder": "nowhere"})
    assert caught.value.file == str(run.parent / "nowhere"), "without the way there from the run's folder"


def test_they_are_not_measured_while_training(run):
    with pytest.raises(LorafitError, match="unknown metric while training 'repeatability'"):
        evaluate(run, ["loss"], None, **{"evaluation.during": ["repeatability"]})


def test_rows_with_bad_paraphrases_are_named(run):
    write_rows(run.parent / "bad.jsonl", [{**ROWS[0], "paraphrases": [3]}])
    with pytest.raises(DataError, match=r"bad\.jsonl:1: paraphrases: expected list of strings, found integer 3"):
        evaluate(run, ["paraphrase_consistency"], None, **{"data.test": str(run.parent / "bad.jsonl")})
