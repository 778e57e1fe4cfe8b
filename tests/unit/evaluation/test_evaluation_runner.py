"""Scores equal plain formulas on full logits, however rows are batched or shared; base and tuned are what they say."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lorafit.answering.engine import Engine
from lorafit.answering.sampling import Sampling
from lorafit.contracts import Silent
from lorafit.errors import DataError, NumericsError
from lorafit.evaluation.during import evaluate_during
from lorafit.evaluation.evaluation import About
from lorafit.evaluation.runner import evaluate_pair, measure, score_examples
from lorafit.kinds.tasks import tasks

build_objective = tasks.make("causal-lm").build_objective

PAIRS = [
    ("say hi", "hi"),
    ("the longest prompt of them all, by far", "a long answer as well"),
    ("x", "y"),
    ("count", "one two three"),
    ("a", "b c"),
    ("last", "end"),
    ("more", "and more"),
    ("tiny", "t"),
]


def score(model, rows, budget, **options):
    model.eval()
    return score_examples(
        build_objective(model), rows, micro_batch_tokens=budget, pad_id=257, reporter=Silent(), **options
    )


def plain_scores(model, rows):
    """Cross-entropy from full logits, every row alone."""
    found = []
    for row in rows:
        ids = torch.tensor([list(row["tokens"])])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1].double()
        kept = torch.tensor([bool(flag) for flag in row["trained"][1:]])
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[kept]
        right = (logits.argmax(-1) == ids[0, 1:])[kept]
        found.append((float(losses.sum()), int(kept.sum()), int(right.sum())))
    return found


@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_scores_equal_full_logits_of_single_rows(tuned, make_rows, budget):
    rows, _ = make_rows(PAIRS)
    expected = plain_scores(tuned.eval(), rows)
    for found, (loss, tokens, right) in zip(score(tuned, rows, budget), expected, strict=True):
        assert found.value("loss") == pytest.approx(loss, rel=1e-5)
        assert (found.value("tokens"), found.value("correct")) == (tokens, right)


def test_micro_batches_that_do_not_fit_are_halved(tuned, make_rows, monkeypatch):
    rows, _ = make_rows(PAIRS)
    whole = score(tuned, rows, 10_000)
    objective, sizes = build_objective(tuned), []
    own = objective.score

    def small_score(batch):
        sizes.append(len(batch.tensors["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(batch)

    monkeypatch.setattr(objective, "score", small_score)
    halved = score_examples(objective, rows, micro_batch_tokens=10_000, pad_id=257, reporter=Silent())
    assert sizes == [1, 7, 3, 4, 2, 2]
    for one, other in zip(whole, halved, strict=True):
        assert other.value("loss") == pytest.approx(one.value("loss"), rel=1e-5)


def test_processes_share_the_rows_and_add_up(tuned, make_rows):
    rows, _ = make_rows(PAIRS)
    shares = []

    def ranks(rank, add):
        return SimpleNamespace(rank=rank, ranks=2, sum=add)

    for rank in (0, 1):
        score(tuned, rows, 50, ranks=ranks(rank, lambda sums: shares.append(sums) or sums))
    assert all((np.reshape(share, (len(rows), -1))[:, 1] == 0).any() for share in shares)
    whole = score(tuned, rows, 50)
    together = score(tuned, rows, 50, ranks=ranks(0, lambda sums: np.add(sums, shares[1]).tolist()))
    assert together == whole


def test_a_loss_that_is_not_finite_names_the_row(llama, make_rows):
    rows, _ = make_rows([("abc", "d"), ("ab~", "d")])
    with torch.no_grad():
        llama.model.embed_tokens.weight[rows[1]["tokens"][2]] = math.nan
    with pytest.raises(NumericsError, match=r"rows.jsonl:2: the loss of this row is not finite") as caught:
        score(llama, rows, 64)
    assert caught.value.exit_code == 9


def test_evaluate_during_gives_the_loss_and_what_was_asked_for(tuned, make_rows):
    rows, _ = make_rows(PAIRS)
    found = evaluate_during(build_objective(tuned), rows, ["token_accuracy"], micro_batch_tokens=64, pad_id=257)
    plain = np.array(plain_scores(tuned.eval(), rows)).sum(axis=0)
    assert found == {"loss": pytest.approx(plain[0] / plain[1]), "token_accuracy": pytest.approx(plain[2] / plain[1])}


def run_pair(model, tokenizer, rows, questions, names, **options):
    defaults = {"sampling": Sampling(6), "stop_ids": [], "micro_batch_tokens": 64, "seed": 0, "reporter": Silent()}
    return evaluate_pair(
        Engine(model, tokenizer), build_objective(model), rows, questions, names, **(defaults | options)
    )


def test_base_is_the_model_without_its_adapter_and_tuned_with_it(tuned, llama, tokenizer, make_rows):
    rows, questions = make_rows(PAIRS)
    names = ["perplexity", "token_accuracy", "exact_match", "rouge"]
    found = run_pair(tuned, tokenizer, rows, questions, names)
    base, own = (np.array(plain_scores(model.eval(), rows)).sum(axis=0) for model in (llama, tuned))
    lines = {line.name: line for line in found.comparisons}
    assert list(lines) == ["perplexity", "token_accuracy", "exact_match", "rougeL", "rouge1", "rouge2", "rougeLsum"]
    assert lines["perplexity"].base == pytest.approx(math.exp(base[0] / base[1]), rel=1e-4)
    assert lines["perplexity"].tuned == pytest.approx(math.exp(own[0] / own[1]), rel=1e-4)
    assert lines["token_accuracy"].tuned == pytest.approx(own[2] / own[1])
    assert lines["perplexity"].base != pytest.approx(lines["perplexity"].tuned, rel=1e-3)
    assert [row.line for row in found.rows] == list(range(1, len(PAIRS) + 1))
    assert any(row.base.answer != row.tuned.answer for row in found.rows)
    assert found.tuned_speed.tokens > 0
    assert found.tuned_speed.answers == len(PAIRS)
    assert found.tuned_speed.tokens_per_second > 0
    assert found.peak_memory_bytes > 50 * 2**20


def test_only_rows_that_a_metric_reads_are_answered_and_the_rest_is_counted(tuned, tokenizer, make_rows):
    rows, questions = make_rows(PAIRS, must_contain=[("hi",), (), (), (), ("c",), (), (), ()])
    found = run_pair(tuned, tokenizer, rows, questions, ["must_contain", "loss", "final_number"])
    assert found.tuned_speed.answers == 2
    assert [row.tuned.answer is not None for row in found.rows] == [True] + [False] * 3 + [True] + [False] * 3
    assert {line.name: line.rows for line in found.comparisons} == {"must_contain": 2, "loss": 8}
    assert [entry.sentence for entry in found.unscored] == [
        "must_contain: 6 of 8 rows left out, it needs a row that names must_contain",
        "final_number: does not apply, none of 8 rows is a row whose reference ends in '#### number'",
    ]


def test_tool_calls_are_scored_with_needless_ones_beside_them_and_the_rest_is_counted(tuned, tokenizer, make_rows):
    """Asking for tool_call alone answers the rows without calls as well: a model may call where nothing is due."""
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    rows, questions = make_rows([("a", call), ("b", "plain"), ("c", "plain too"), ("d", call), ("e", "x")])
    questions[3] = replace(questions[3], reference="CALL f", calls=("f",))
    options = {"sampling": Sampling(4), "stop_ids": [], "micro_batch_tokens": 64, "seed": 0, "reporter": Silent()}
    found = evaluate_pair(Engine(tuned, tokenizer), build_objective(tuned), rows, questions, ["tool_call"], **options)
    assert {line.name: line.rows for line in found.comparisons} == {"tool_call": 1, "needless_call": 3}
    assert {entry.metric: entry.rows for entry in found.unscored} == {"tool_call": 4, "needless_call": 2}
    assert found.tuned_speed.answers == 4
    assert set(found.signatures) == {"tool_call", "needless_call"}


def test_a_call_before_the_last_answer_is_scored_beside_it(tuned, tokenizer, make_rows):
    """tool_call reads the call, every other metric the answer, each one question a row; losses are counted once."""
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    rows, questions = make_rows([("a", "plain"), ("b", "plain too")])
    ids = tokenizer("c", add_special_tokens=False)["input_ids"]
    inner = replace(questions[1], prompt_ids=ids, prompt_text="c", reference=call, calls=("f",), is_inner=True)
    plain = run_pair(tuned, tokenizer, rows, questions, ["loss", "exact_match", "needless_call"])
    asked = [questions[0], inner, questions[1]]
    found = run_pair(tuned, tokenizer, rows, asked, ["loss", "exact_match", "tool_call"])
    lines, usual = ({line.name: line for line in each.comparisons} for each in (found, plain))
    counts = {name: line.rows for name, line in lines.items()}
    assert counts == {"loss": 2, "exact_match": 2, "tool_call": 1, "needless_call": 2}
    assert all(lines[name].tuned == usual[name].tuned for name in usual)
    assert [row.call is not None for row in found.rows] == [False, True]
    called = found.rows[1].to_json()["call"]
    assert (called["prompt"], called["reference"]) == ("c", call)
    alone = run_pair(tuned, tokenizer, rows, [replace(inner, is_inner=False)], ["tool_call"])
    assert called["tuned_answer"] == alone.rows[1].tuned.answer is not None
    worst = run_pair(tuned, tokenizer, rows, asked, ["tool_call"]).worst
    assert [(each.row.prompt, each.row.tuned.reference) for each in worst] == [("c", call)]
    assert (
        run_pair(tuned, tokenizer, rows, asked, ["exact_match"]).rows
        == run_pair(tuned, tokenizer, rows, questions, ["exact_match"]).rows
    )


def test_no_answers_are_generated_where_no_metric_reads_them(tuned, tokenizer, make_rows):
    rows, questions = make_rows(PAIRS)
    tuned.get_base_model().generate = None  # would fail if called
    found = run_pair(tuned, tokenizer, rows, questions, ["loss"])
    assert found.tuned_speed is None
    assert found.worst[0].row.prompt in {prompt for prompt, _ in PAIRS}
    assert found.worst[0].row.tuned.reference.endswith("<|im_end|>")


def test_worst_rows_come_first_and_carry_everything(tuned, tokenizer, make_rows):
    rows, questions = make_rows(PAIRS)
    found = run_pair(tuned, tokenizer, rows, questions, ["loss"])
    losses = [worst.tuned for worst in found.worst]
    assert losses == sorted(losses, reverse=True)
    by_line = {row.line: row for row in found.rows}
    worst = found.worst[0]
    assert worst.tuned == max(row.tuned.mean_loss for row in found.rows)
    assert by_line[worst.row.line].base.mean_loss == worst.base
    answered = run_pair(tuned, tokenizer, rows, questions, ["exact_match"])
    assert {worst.name for worst in answered.worst} == {"exact_match"}
    right_first = [worst.tuned for worst in answered.worst]
    assert right_first == sorted(right_first)


def test_parts_of_one_source_row_count_as_one_row(tuned, tokenizer, make_rows):
    rows, _ = make_rows(PAIRS)
    whole = run_pair(tuned, tokenizer, rows, [], ["loss"])
    for example in rows:
        object.__setattr__(example, "line", (example.index + 2) // 2)
    halves = run_pair(tuned, tokenizer, rows, [], ["loss"])
    assert len(halves.rows) == len(PAIRS) // 2
    assert halves.comparisons[0].tuned == pytest.approx(whole.comparisons[0].tuned)
    assert halves.comparisons[0].rows == len(PAIRS) // 2
    assert halves.comparisons[0].verdict == "too few rows"


def test_retention_rows_are_compared_on_their_own(tuned, llama, tokenizer, make_rows):
    rows, _ = make_rows(PAIRS)
    general, _ = make_rows([(answer, prompt) for prompt, answer in PAIRS])
    found = run_pair(tuned, tokenizer, rows, [], ["loss"], retention=general)
    own = np.array(plain_scores(tuned.eval(), general)).sum(axis=0)
    assert found.retention_rows == len(PAIRS)
    lines = {line.name: line for line in found.retention}
    assert list(lines) == ["loss", "perplexity", "token_accuracy"]
    assert lines["loss"].tuned == pytest.approx(own[0] / own[1], rel=1e-5)


def test_a_better_model_is_called_better(make_tuned, tokenizer, make_rows):
    """A few steps on the rows themselves: the tuned model must win on them, and the report must say so."""
    rows, questions = make_rows(PAIRS)
    model = make_tuned(scale=0.0)
    objective = build_objective(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(60):
        loss, weight = objective(objective.task.collate([[row] for row in rows], 257))
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = run_pair(
        model, tokenizer, rows, questions, ["perplexity", "chrf"], sampling=Sampling(24), about=About("run")
    )
    assert [line.verdict for line in found.comparisons] == ["better", "better"]
    assert found.comparisons[0].tuned < 0.5 * found.comparisons[0].base


def test_no_rows_is_an_error(tuned, tokenizer, make_rows):
    with pytest.raises(DataError, match="no rows"):
        run_pair(tuned, tokenizer, make_rows([])[0], [], ["loss"])


def test_measure_leaves_out_what_does_not_apply(tuned, make_rows):
    rows, _ = make_rows(PAIRS)
    assert set(measure(["loss", "rouge", "must_contain"], score(tuned, rows, 64))) == {"loss"}
