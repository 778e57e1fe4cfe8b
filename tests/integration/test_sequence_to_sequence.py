"""Encoder-decoders through the commands, held against transformers' own trainer and loaded by plain PEFT."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM

from lorafit import pipeline
from lorafit.contracts import Silent
from lorafit.data.batch import StepRows
from lorafit.errors import Problems
from lorafit.job import open_job
from lorafit.recipe.load import load_recipe
from tests.support.tiny_recipe import write_rows
from tests.support.tiny_seq2seq import (
    make_base,
    make_letter_tokenizer,
    make_recipe,
    make_texts,
    make_tokenizer,
    tiny_seq2seq,
)

pytestmark = pytest.mark.usefixtures("memory_by_formula")

ADAMW = {"kind": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}


def step_losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "learning_rate" in line]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_ten_steps_have_the_losses_of_seq2seq_trainer(tmp_path: Path, family: str) -> None:
    """The same rows in the same order from the same adapter, by another collator, loss, clipping and schedule."""
    make_base(tmp_path / "base", family)
    training = {"max_steps": 10, "schedule": {"kind": "linear", "warmup_steps": 0}, "optimizer": ADAMW}
    recipe = make_recipe(tmp_path, training=training, checkpoints={"every_steps": 100})
    pipeline.train(recipe)
    found = step_losses(tmp_path / "run")
    assert len(found) == 10 and found[-1] < found[0] - 0.05
    assert found == pytest.approx(trainer_losses(tmp_path, recipe), abs=1e-4)


def trainer_losses(folder: Path, recipe: Path) -> list[float]:
    """transformers' own, of each step."""
    from peft import PeftModel
    from transformers import (
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
    )

    class InOrder(Seq2SeqTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    rows = make_texts(24)
    job = open_job(load_recipe(recipe), Silent())
    steps = StepRows(job.rows.train, job.recipe.seed, 4)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    asked = [rows[int(row)] for step in range(1, 11) for row in steps.rows(step)[1]]
    data = [dict(tokenizer(row["source"], text_target=row["target"])) for row in asked]
    base = AutoModelForSeq2SeqLM.from_pretrained(folder / "base", attn_implementation="eager")
    first = folder / "run" / "checkpoints" / "step-000000" / "adapter"
    model = PeftModel.from_pretrained(base, first, is_trainable=True)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "theirs"),
        per_device_train_batch_size=4,
        max_steps=10,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model=base)
    trainer = InOrder(model=model, args=arguments, train_dataset=data, data_collator=collator)  # type: ignore[arg-type]
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_model_that_knows_nothing_learns_to_reverse(tmp_path: Path) -> None:
    """LoRA of full rank on a random T5 of 100 thousand parameters; strings that it has not seen, written greedily."""
    letters = "abcdefgh"
    tokenizer, model = make_letter_tokenizer(letters), tiny_seq2seq("t5", vocab_size=3 + len(letters), num_heads=8)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=6.0)  # places that a random model tells apart
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    strings = list(itertools.chain(*(itertools.permutations(letters, length) for length in (3, 4, 5))))
    random.Random(0).shuffle(strings)
    rows = [{"source": " ".join(string), "target": " ".join(string[::-1])} for string in strings[:1600]]
    recipe = make_recipe(
        tmp_path,
        adapter={"r": 64, "alpha": 256},
        training={"max_steps": 75, "batch_size": 64, "micro_batch_tokens": 2048, "learning_rate": 2e-3},
        checkpoints={"every_steps": 1000},
    )
    for name, part in {"train": rows[:1500], "valid": rows[1500:1501], "test": rows[1500:]}.items():
        write_rows(tmp_path / f"{name}.jsonl", part)
    pipeline.train(recipe)
    tuned, held_out = open_plainly(tmp_path, "AutoModelForSeq2SeqLM"), rows[1500:]
    asked = tokenizer([row["source"] for row in held_out], return_tensors="pt", padding=True)
    answers = tokenizer.batch_decode(
        tuned.generate(**asked, max_new_tokens=8, do_sample=False), skip_special_tokens=True
    )
    right = sum(answer == row["target"] for answer, row in zip(answers, held_out, strict=True))
    assert right >= 0.95 * len(held_out)


def open_plainly(folder: Path, auto_class: str) -> Any:
    """A run's adapter on its base, by transformers and PEFT alone, in eval mode."""
    import transformers
    from peft import PeftModel

    base = getattr(transformers, auto_class).from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, folder / "run" / "adapter").eval()


def loss_of(model: Any, tokenizer: Any, row: dict[str, Any]) -> float:
    """The model's own, of one row."""
    encoded = tokenizer(row["source"], text_target=row["target"], return_tensors="pt")
    with torch.no_grad():
        return float(model(**{name: encoded[name] for name in ("input_ids", "attention_mask", "labels")}).loss)


@pytest.mark.parametrize("family", ["t5", "encoder-decoder"])
def test_a_run_resumes_merges_and_opens_elsewhere(tmp_path: Path, family: str) -> None:
    """Two BERTs joined, and a T5 with dropout of its own: one folder, and what lorafit and plain PEFT say of it."""
    make_base(tmp_path / "base", family, **({"dropout_rate": 0.1} if family == "t5" else {}))
    recipe = make_recipe(tmp_path, adapter={"dropout": 0.1}, data={"max_length": 60})
    pipeline.train(recipe)
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    pipeline.train(recipe, resume=True, resume_from=2)
    assert adapter.read_bytes() == whole
    tuned, tokenizer = open_plainly(tmp_path, "AutoModelForSeq2SeqLM"), make_tokenizer()
    rows = make_texts(6, first=200)
    found = pipeline.evaluate(tmp_path / "run").evaluation
    ours = [row.tuned.mean_loss for row in found.rows]
    assert ours == pytest.approx([loss_of(tuned, tokenizer, row) for row in rows], rel=1e-4)
    pipeline.merge(tmp_path / "run", output=tmp_path / "merged")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    assert [loss_of(merged, tokenizer, row) for row in rows] == pytest.approx(ours, rel=1e-4)
    noted = json.loads((tmp_path / "merged" / "lorafit.json").read_text(encoding="utf-8"))
    assert noted["task"]["kind"] == "seq2seq-lm"


def test_a_prompt_is_trained_before_the_source_and_opens_elsewhere(tmp_path: Path) -> None:
    """PEFT would make as many vectors for the decoder, and read none of them."""
    make_base(tmp_path / "base")
    recipe = make_recipe(tmp_path, training={"max_steps": 2}, checkpoints={"every_steps": 2})
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    recipe.write_text(json.dumps({**values, "adapter": {"kind": "prompt_tuning", "tokens": 4}}), encoding="utf-8")
    trained = pipeline.train(recipe)
    assert trained.plan.trainable_parameters == 4 * 64
    tuned, tokenizer = open_plainly(tmp_path, "AutoModelForSeq2SeqLM"), make_tokenizer()
    found = pipeline.evaluate(tmp_path / "run").evaluation
    rows = make_texts(6, first=200)
    ours = [row.tuned.mean_loss for row in found.rows]
    assert ours == pytest.approx([loss_of(tuned, tokenizer, row) for row in rows], rel=1e-4)


def test_preview_shows_both_sides_and_what_was_cut(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    task = {"prefix": "sum: ", "max_target_length": 6}
    recipe = make_recipe(tmp_path, task=task, data={"overlength": "truncate", "max_length": 12})
    shown = str(pipeline.preview(recipe, show=1))
    assert "sum: what shop close 0</s>" in shown and "⟦what the 0</s>⟧" in shown
    assert "cut: source of 13 tokens, max_length is 12; target of 8 tokens, max_target_length is 6" in shown
    with pytest.raises(Problems, match=r"raise data\.max_length and task\.max_target_length"):
        pipeline.preview(recipe, overrides=["data.overlength=error", "data.max_length=8"])
