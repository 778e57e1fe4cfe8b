"""A run of sequence to sequence answers: in its evaluation, from its folder, from its adapter alone, and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit import pipeline
from lorafit.contracts import Silent
from lorafit.run.trained import Trained
from tests.support.option_world import evaluation_lines
from tests.support.tiny_seq2seq import make_base, make_language_tokenizer, make_recipe, make_texts

pytestmark = pytest.mark.usefixtures("memory_by_formula")

SEARCH = {"num_beams": 3, "length_penalty": 1.5, "max_new_tokens": 9}


WIDE = {"t5": {"initializer_factor": 3.0}}  # weights so wide that answers differ


def train(folder: Path, family: str, **sections: Any) -> Trained:
    make_base(folder / "base", family, **WIDE.get(family, {}))
    return pipeline.train(make_recipe(folder, **sections))


@pytest.mark.parametrize("family", ["t5", "encoder-decoder"])
def test_a_run_answers_alike_wherever_it_is_asked(tmp_path: Path, family: str) -> None:
    """By beams of a padded batch: evaluation, run, adapter alone, merge; and the merge as plain transformers has it."""
    task = {"kind": "seq2seq-lm", "max_target_length": 48, "prefix": "say: "}
    training = {"max_steps": 6}
    trained = train(tmp_path, family, task=task, training=training, evaluation={**SEARCH, "final": ["rouge", "bleu"]})
    report = pipeline.evaluate(tmp_path / "run").evaluation
    rows, by_line = make_texts(6, first=200), {row.line: row for row in report.rows}
    assert [by_line[number + 1].tuned.reference for number in range(6)] == [row["target"] for row in rows]
    assert all("say:" in row.prompt for row in report.rows)
    assert {"rougeL", "bleu"} <= {line.name for line in report.comparisons}
    written = [by_line[number + 1].tuned.answer for number in range(6)]
    base = [by_line[number + 1].base.answer for number in range(6)]
    assert written != base

    def ask(path: Path) -> list[str]:
        return pipeline.generate(path, input_file=tmp_path / "test.jsonl", **SEARCH).texts  # type: ignore[arg-type]

    both = pipeline.generate(tmp_path / "run", rows=rows, compare_base=True, **SEARCH)  # type: ignore[arg-type]
    assert both.texts == written
    assert [answer.text for answer in both.base_answers or ()] == base
    reporter = Silent()
    pipeline.generate(tmp_path / "run", rows=["a", "red mug " * 200], max_new_tokens=1, reporter=reporter)
    assert "1 prompt was cut: data.max_length of the run is 64 tokens" in reporter.warnings
    shutil.copytree(trained.run.adapter, tmp_path / "alone")
    assert ask(tmp_path / "alone") == written
    merged = pipeline.merge(tmp_path / "run", output=tmp_path / "merged")
    assert merged.parity is not None and merged.parity.mean_kl < 1e-4
    assert ask(tmp_path / "merged") == written
    assert plain_answers(tmp_path / "merged", [f"say: {row['source']}" for row in rows]) == written


def plain_answers(folder: Path, sources: list[str]) -> list[str]:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config.forced_eos_token_id = None  # which would hide that an answer was cut
    found = []
    for source in sources:
        with torch.no_grad():
            ids = model.generate(**tokenizer(source, return_tensors="pt"), **SEARCH, do_sample=False)
        found.append(tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return found


def test_a_model_of_another_tool_reads_the_whole_text(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "bart")
    texts = [row["source"] for row in make_texts(3)]
    assert pipeline.generate(tmp_path / "base", rows=texts, **SEARCH).texts == plain_answers(  # type: ignore[arg-type]
        tmp_path / "base", texts
    )


def test_answers_begin_in_the_language_of_the_targets(tmp_path: Path) -> None:
    """mBART names it first to its decoder; an evaluation while training, the run and its merge all do."""
    from transformers import MBartForConditionalGeneration

    make_base(tmp_path / "base", "mbart", max_position_embeddings=128)
    tokenizer = make_language_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["decoder_start_token_id"] != tokenizer.convert_tokens_to_ids("de_DE")
    task = {"kind": "seq2seq-lm", "source_language": "en_XX", "target_language": "de_DE"}
    seen: list[int] = []
    generate = MBartForConditionalGeneration.generate

    def watched(self: Any, **inputs: Any) -> Any:
        output = generate(self, **inputs)
        seen.extend(output.sequences[:, 0].tolist())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MBartForConditionalGeneration, "generate", watched)
        evaluation = {"every_steps": 4, "during": ["chrf"], "max_new_tokens": 4}
        trained = pipeline.train(make_recipe(tmp_path, task=task, evaluation=evaluation))
        assert "chrf" in evaluation_lines(trained.run)[0]["evaluation"]
        pipeline.generate(tmp_path / "run", prompt="red mug", max_new_tokens=3)
        pipeline.merge(tmp_path / "run", output=tmp_path / "merged")
        pipeline.generate(tmp_path / "merged", prompt="red mug", max_new_tokens=3)
    assert len(seen) == 4 + 1 + 1
    assert set(seen) == {tokenizer.convert_tokens_to_ids("de_DE")}
    shipped = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert shipped["decoder_start_token_id"] == seen[0]
