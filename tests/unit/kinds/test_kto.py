"""KTO against the paper's equation over transformers' log-probabilities, and what becomes of rows on their way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from lorafit.contracts import Example, Sample, Silent
from lorafit.data.batch import cut_step
from lorafit.errors import LorafitError
from lorafit.evaluation.runner import measure, score_examples
from lorafit.job import open_job
from lorafit.kinds.metrics import RowScore, with_companions
from lorafit.kinds.tasks import tasks
from lorafit.recipe.load import load_recipe
from lorafit.trainer.step import accumulate_gradients
from lorafit.trainer.threaded_micro_batches import run_at_once
from tests.support.pairs import PAD, make_examples, plain_log_probs
from tests.support.tiny_model import make_base, make_tokenizer
from tests.support.tiny_recipe import make_recipe, make_verdicts, write_rows
from tests.support.tiny_run import KTO, Job, VerdictRows
from tests.unit.evaluation.conftest import add_adapter, build_llama

SIDES = ("answer", "mismatched")
Prepare = Callable[..., Any]


def make_verdict_examples(count: int = 6) -> list[Example]:
    """Answers with verdicts beside others to the same prompt, and the reference that plain transformers give."""
    base, found = build_llama(), []
    for pair in make_examples(count):
        renamed = zip(("chosen", "rejected"), SIDES, strict=True)
        columns: dict[str, Any] = {
            f"{to}_{part}": pair[f"{side}_{part}"] for side, to in renamed for part in ("tokens", "trained")
        }
        with torch.no_grad():
            columns |= {
                "desirable": [int(pair.index % 3 == 0)],
                "reference": plain_log_probs(base, pair).double().numpy(),
            }
        found.append(replace(pair, columns=columns))
    return found


def plain_losses(section: Any, model: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 7 over plain log-probabilities, and z0."""
    found = torch.stack([plain_log_probs(model, one, SIDES).double() for one in examples])
    gains = found - torch.tensor(np.stack([one["reference"] for one in examples]))
    point = gains[:, 1].mean().detach().clamp(min=0)
    losses = []
    for one, reward in zip(examples, gains[:, 0], strict=True):
        if one["desirable"][0]:
            value = section.desirable_weight * torch.sigmoid(section.beta * (reward - point))
            losses.append(section.desirable_weight - value)
        else:
            value = section.undesirable_weight * torch.sigmoid(section.beta * (point - reward))
            losses.append(section.undesirable_weight - value)
    return torch.stack(losses), point


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("options", "gained"),
    [({}, 2.0), ({"beta": 1.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}, 2.0), ({}, -2.0)],
)
def test_loss_and_gradient_are_those_of_the_paper(options: dict[str, Any], gained: float, exact: bool) -> None:
    """z0 is the mean of what mismatched answers gained, or 0 where they lost."""
    task, examples = tasks.make("kto", **options), make_verdict_examples()
    for one in examples:
        one["reference"][1] -= gained
    tuned = add_adapter(build_llama())
    objective, trained = task.build_objective(tuned, exact=exact), [p for p in tuned.parameters() if p.requires_grad]
    batch = task.collate([[one] for one in examples], PAD)
    loss = objective(batch)
    wanted, point = plain_losses(task.section, tuned, examples)
    assert (float(point) > 0) == (gained > 0)
    assert (loss.weight, batch.trained_tokens) == (6, sum(sum(one["answer_trained"]) for one in examples))
    torch.testing.assert_close(loss.loss_sum, wanted.sum().float(), rtol=2e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss.loss_sum, trained)
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted.sum(), trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * float(theirs.abs().max()))
    scores = objective.score(batch)
    assert np.allclose(scores["loss"], wanted.detach().numpy(), rtol=1e-4, atol=1e-5)
    assert scores["answer_tokens"].tolist() == [sum(one["answer_trained"]) for one in examples]


def test_how_a_step_is_cut_changes_nothing(tmp_path: Path) -> None:
    """One micro-batch, many, and threads; gloo ranks are `pooled` in test_ranks."""
    trainer = Job(tmp_path, task=KTO, rows=VerdictRows(12)).trainer()
    rows, objective = trainer.cutter.examples, trainer.executor.objective
    whole = KTO.collate([[rows[row]] for row in range(12)], PAD)
    alone = objective(whole)
    (alone.loss_sum / 12).backward()
    gradients = [parameter.grad.clone() for parameter in trainer.executor.parameters]
    alone, (gain, count) = alone.loss_sum.item(), objective.pool(whole)
    assert float(gain / count) > 0.5 and count == 12
    for budget, at_once, cut in ((9999, 1, 1), (300, 1, None), (1, 1, 12), (1, 3, 12)):
        batches = [
            KTO.collate([[rows[row]] for row in part], PAD) for part in cut_step(range(12), rows.lengths, budget)
        ]
        assert len(batches) == (cut or len(batches)) and (cut or 1 < len(batches) < 12)
        trainer.update.optimizer.zero_grad(set_to_none=True)
        with run_at_once(trainer.executor, at_once) as executor:
            figures, _ = accumulate_gradients(executor, batches)
        assert figures.loss == pytest.approx(alone / 12, rel=1e-6)
        for parameter, gradient in zip(trainer.executor.parameters, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2])
def test_dropout_does_not_move_the_reference_point_and_memory_may_run_out_there(tmp_path: Path, at_once: int) -> None:
    rows = VerdictRows(4)
    batches = [KTO.collate([[rows[row]]], PAD) for row in range(4)]
    pooled = []
    for dropout in (0.0, 0.5):
        trainer = Job(tmp_path / str(dropout), task=KTO, rows=rows, dropout=dropout).trainer()
        objective = trainer.executor.objective.train()
        before = torch.get_rng_state()
        with run_at_once(trainer.executor, at_once) as executor:
            pooled.append(torch.stack(executor.pool(batches)))
            assert objective.training and torch.equal(before, torch.get_rng_state())
            objective.pool = lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
            with pytest.raises(MemoryError):
                accumulate_gradients(executor, batches)
    assert torch.equal(*pooled)


def test_held_out_rows_are_scored_by_the_reference_point_of_them_all() -> None:
    class Examples(list[Example]):
        lengths: ClassVar = [64] * 6

    task, examples = tasks.make("kto"), make_verdict_examples()
    tuned = add_adapter(build_llama())
    scored = [
        score_examples(
            task.build_objective(tuned), Examples(examples), micro_batch_tokens=budget, pad_id=PAD, reporter=Silent()
        )
        for budget in (1, 9999)
    ]
    wanted, _ = plain_losses(task.section, tuned, examples)
    for rows in scored:
        assert [row.value("loss") for row in rows] == pytest.approx(wanted.tolist(), rel=1e-5)


@pytest.fixture(scope="module")
def verdict_rows(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """Prepared rows of answers with verdicts, by options of `data` and `task`."""
    root = tmp_path_factory.mktemp("verdicts")
    make_base(root / "base")

    def prepare(rows: list[dict[str, Any]], task: Any = "kto", **data: Any) -> Any:
        recipe = make_recipe(root, task=task, evaluation={"final": ["loss"]})
        write_rows(root / "train.jsonl", rows)
        for name in ("valid", "test"):
            write_rows(root / f"{name}.jsonl", make_verdicts(2, first=50))
        overrides = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
        return open_job(load_recipe(recipe, overrides), Silent()).rows

    return prepare


def texts_of(rows: Any) -> list[tuple[str, str]]:
    """What is shown of each row's two sequences."""
    decode = make_tokenizer().decode
    shown = [rows.task.show(rows.train[row]) for row in range(len(rows.train))]
    return [(decode(own.input_ids), decode(other.input_ids)) for own, other in shown]


def answer(prompt: str, completion: str, label: bool = True) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def test_a_mate_is_an_answer_to_the_prompt_before(verdict_rows: Prepare) -> None:
    """Rows of one prompt are no mates of each other, and each answer of pairs is one mate but at the ends."""
    pairs = [answer("red mug", " on monday"), answer("red mug", " on friday", False)]
    pairs += [answer("the shop", " opens"), answer("the shop", " costs ten", False), answer("it", " is nine")]
    end = "<|im_end|>"
    assert texts_of(verdict_rows(pairs)) == [
        (f"red mug on monday{end}", f"red mug opens{end}"),
        (f"red mug on friday{end}", f"red mug costs ten{end}"),
        (f"the shop opens{end}", f"the shop on monday{end}"),
        (f"the shop costs ten{end}", f"the shop on friday{end}"),
        (f"it is nine{end}", f"it opens{end}"),
    ]


def test_chats_and_strings_may_stand_side_by_side() -> None:
    user, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    chat = Sample("d", 1, messages=(user, {**said, "weight": 0}, user, said))
    arranged = [
        sample for *_, sample in KTO.arrange([(0, 1, chat), (0, 2, Sample("d", 2, prompt="p", completion="b"))])
    ]
    assert arranged[0].mismatched.messages == (*chat.messages[:3], {"role": "assistant", "content": "b"})
    assert (arranged[1].mismatched.prompt, arranged[1].mismatched.completion) == ("p", "a")


def test_a_mate_never_decides_about_a_row(verdict_rows: Prepare) -> None:
    """It is cut to what fits, whatever is done with rows that are too long themselves; the prompt is the row's."""
    long = answer("the shop", " it opens on monday" * 40)
    rows = [answer("red", " mug"), long, answer("it is", " nine")]
    kept = verdict_rows(rows, max_length=24, overlength="drop")
    assert [example.line for example in (kept.train[row] for row in range(len(kept.train)))] == [1, 3]
    for row, (own, other) in enumerate(texts_of(kept)):
        example = kept.train[row]
        assert len(example["answer_tokens"]) < len(example["mismatched_tokens"]) == 24
        assert other.startswith(own.rsplit(" ", 1)[0] + " it opens on")
    lengths = list(map(int, kept.train.lengths))
    assert lengths == [kept.task.row_tokens(24)] * 2
    cut = verdict_rows(rows, max_length=24, overlength="truncate")
    assert len(cut.train[1]["answer_tokens"]) == 24


def test_rows_of_a_single_prompt_have_no_mates(verdict_rows: Prepare) -> None:
    with pytest.raises(LorafitError, match=r"train\.jsonl:1: prompt: all rows ask the same") as caught:
        verdict_rows([answer("red", " mug"), answer("red", " bowl", False)])
    assert caught.value.exit_code == 4


def test_the_same_answer_with_both_verdicts_contradicts_and_twice_with_one_does_not(verdict_rows: Prepare) -> None:
    twice = [answer("red", " mug"), answer("red", " mug"), answer("red", " bowl", False), answer("it", " is")]
    assert verdict_rows(twice).report.contradictions is None
    assert verdict_rows([*twice, answer("red", " mug", False)]).report.contradictions.rows >= 2


@pytest.mark.parametrize(
    ("counts", "weights", "said"),
    [
        ((3, 3), (1.0, 1.0), ""),
        ((4, 3), (1.0, 1.0), ""),
        ((1, 3), (4.0, 1.0), ""),
        ((3, 4), (1.0, 1.0), "a task.desirable_weight of 1.33 to 1.78"),
        ((6, 3), (1.0, 1.0), "stand to 3 undesirable ones of weight 1 as 2 to 1"),
        ((3, 0), (1.0, 1.0), "no training row is undesirable"),
        ((0, 3), (1.0, 1.0), "no training row is desirable"),
    ],
)
def test_weights_that_do_not_go_with_the_counts_are_warned_of(
    counts: tuple[int, int], weights: tuple[float, float], said: str
) -> None:
    task = tasks.make("kto", desirable_weight=weights[0], undesirable_weight=weights[1])
    flags = np.array([[1]] * counts[0] + [[0]] * counts[1], dtype=np.uint8)
    found = task.count_classes(lambda name: iter((flags[:1], flags[1:])))
    assert found == {"desirable": counts[0], "undesirable": counts[1]}
    warned = task.check_classes(found, sum(counts))
    assert said in warned[0] if said else warned == []


def test_a_row_is_two_sequences_wherever_memory_is_asked() -> None:
    task, (one, other) = tasks.make("kto"), make_verdict_examples(2)
    batch = task.collate([[one], [other]], PAD)
    labels = batch.trained_tokens
    shaped = task.shape_batch(2, batch.padded_tokens // 2, labels, packed=False)
    assert shaped["input_ids"].shape == batch["input_ids"].shape and shaped.tensors.keys() == batch.tensors.keys()
    assert (shaped.weight, shaped.trained_tokens) == (batch.weight, labels)


def test_rewards_of_both_kinds_are_counted() -> None:
    rows = [
        RowScore({"weight": (1.0,), "reward": (reward,), "desirable": (good,), "mismatched": (reward - 2.0,)})
        for reward, good in ((3.0, 1.0), (1.0, 1.0), (-1.0, 0.0))
    ]
    names = ["desirable_reward", "undesirable_reward", "desirable_margin", "reference_point"]
    wanted = dict(zip(names, (2.0, -1.0, 3.0, 0.0), strict=True))
    assert with_companions(["desirable_margin"]) == ["desirable_margin", "desirable_reward", "undesirable_reward"]
    assert measure(names, rows) == wanted
    assert measure(names, rows[:1]) == dict(zip(names, (3.0, 0.0, 3.0, 1.0), strict=True))
