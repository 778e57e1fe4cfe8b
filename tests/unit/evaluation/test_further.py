"""What metrics ask beside the rows' answers is answered as if asked alone, and told before it costs anything."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorafit.answering.engine import Engine
from lorafit.answering.generate import Request
from lorafit.answering.sampling import Sampling
from lorafit.contracts import Sample, Silent
from lorafit.errors import DataError
from lorafit.evaluation.further import Asking, FurtherQuestions
from lorafit.evaluation.runner import evaluate_pair
from lorafit.kinds.metrics import Question, metrics
from lorafit.kinds.metrics._stress_prompts import PROMPTS
from lorafit.kinds.metrics.perturbation_consistency import PERTURBATIONS
from lorafit.kinds.tasks import tasks

PAIRS = [("say hi", "hi"), ("Count them.", "one two"), ("x", "y")]
PARAPHRASES = [("greet me", "hello there"), (), ("again",)]


class Told(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def asked(make_rows):
    rows, questions = make_rows(PAIRS)
    samples = [
        Sample(row.file, row.line, prompt=prompt, completion=answer, paraphrases=others)
        for row, (prompt, answer), others in zip(rows, PAIRS, PARAPHRASES, strict=True)
    ]
    return rows, [replace(row, asked=sample) for row, sample in zip(questions, samples, strict=True)]


@pytest.fixture
def asking(tokenizer):
    return Asking(lambda asked, words: list(tokenizer(words)["input_ids"]), draws=3, temperature=1.5, seed=7)


def run(model, tokenizer, asked, names, asking, reporter=None):
    rows, questions = asked
    objective = tasks.make("causal-lm").build_objective(model)
    return evaluate_pair(
        Engine(model, tokenizer), objective, rows, questions, names,
        sampling=Sampling(3), stop_ids=[], micro_batch_tokens=64, seed=0, reporter=reporter or Silent(), asking=asking,
    )  # fmt: skip


NAMES = ["repeatability", "paraphrase_consistency", "perturbation_consistency"]


def test_every_reply_is_what_the_engine_answers_alone(tuned, tokenizer, asked, asking):
    told = Told()
    found = run(tuned, tokenizer, asked, NAMES, asking, told)
    engine = Engine(tuned, tokenizer)
    for side, adapter in (("base", None), ("tuned", engine.adapters[0])):
        for row, (prompt, _), others in zip(found.rows, PAIRS, PARAPHRASES, strict=True):
            score = getattr(row, side)
            assert set(score.further) == {*NAMES, "sampled_similarity"} - ({NAMES[1]} if not others else set())
            assert [reply.question.words for reply in score.further.get(NAMES[1], ())] == list(others)
            for reply in (reply for name in NAMES for reply in score.further.get(name, ())):
                ids = tokenizer(reply.question.words or prompt)["input_ids"]
                assert reply.text == engine.answer([Request(ids, adapter, Sampling(3))])[0].text
    lines = {line.name: line for line in found.comparisons}
    assert (lines["repeatability"].base, lines["repeatability"].tuned) == (1.0, 1.0)  # in fp32
    assert lines["paraphrase_consistency"].rows == 2
    count = sum(len(PERTURBATIONS) - (prompt.lower() == prompt) for prompt, _ in PAIRS) - 2  # no word to mistype
    numbers = 3 + 3 * 3 + 3 + count
    (line,) = (line for line in told.lines if "further" in line)
    assert line == (
        f"repeatability, sampled_similarity, paraphrase_consistency, perturbation_consistency: {numbers} further "
        f"answers of each model, at most {3 * numbers} tokens, beside 3 answers to the rows themselves"
    )
    assert [entry.metric for entry in found.unscored] == ["paraphrase_consistency"]
    assert {table.name for table in found.metric_tables} >= {"perturbation_consistency"}


def test_draws_differ_from_each_other_and_come_again(tuned, tokenizer, asked, asking):
    first, second = (run(tuned, tokenizer, asked, ["sampled_similarity"], asking) for _ in range(2))
    draws = [[reply.text for reply in row.tuned.further["sampled_similarity"]] for row in first.rows]
    assert [len(set(of_row)) for of_row in draws] == [3] * 3
    assert len({of_row[0] for of_row in draws}) == 3
    assert draws == [[reply.text for reply in row.tuned.further["sampled_similarity"]] for row in second.rows]
    other = run(tuned, tokenizer, asked, ["sampled_similarity"], replace(asking, seed=8, draws=2))
    again = [[reply.text for reply in row.tuned.further["sampled_similarity"]] for row in other.rows]
    assert again != [of_row[:2] for of_row in draws]
    value = next(line.tuned for line in first.comparisons)
    assert value < next(line.tuned for line in run(
        tuned, tokenizer, asked, ["sampled_similarity"], replace(asking, temperature=1e-3)
    ).comparisons)  # fmt: skip


def test_nothing_is_asked_for_metrics_that_ask_nothing(asked, asking):
    told = Told()
    questions = FurtherQuestions.of(asked[1], ["exact_match", "rouge", "style_distance"], asking)
    questions.tell(told)
    assert not questions.asked
    assert not told.lines


def test_other_words_that_the_template_refuses_name_the_row(asked, asking):
    def refuse(asked, words):
        raise DataError("the template refuses it")

    with pytest.raises(DataError, match=r"rows\.jsonl:1: the template refuses it"):
        FurtherQuestions.of(asked[1], ["perturbation_consistency"], replace(asking, reword=refuse))


def test_prompts_of_a_metrics_own_are_asked_behind_the_first_rows_system_message(tokenizer, asked, asking):
    system, user = {"role": "system", "content": "be brief"}, {"role": "user", "content": "say hi"}
    chat = Sample("rows.jsonl", 1, messages=(system, user, {"role": "assistant", "content": "x"}, user))
    seen = []

    def reword(sample, words):
        seen.append((sample.messages[:-1], words))
        if not words:
            raise DataError("a turn without words")
        return list(tokenizer(words)["input_ids"])

    like = [replace(asked[1][0], asked=chat)]
    asking = replace(asking, reword=reword, row_tokens=300, context_tokens=900)
    questions = FurtherQuestions.of([], ["stress"], asking, like, Sampling(100))
    assert all(before == (system,) for before, _ in seen)
    assert len(questions.asked) == len(PROMPTS) - 1  # the template refuses the empty one
    lengths = [len(each.prompt_ids) for each in questions.asked if each.question.filler]
    assert [300 - 70 < length <= 300 for length in lengths[:1]] == [True]
    assert [800 - 70 < length <= 800 for length in lengths[1:]] == [True, True]


def test_prompts_that_are_cut_whatever_their_length_are_not_filled_without_end(asking):
    question = Question("long", "?", filler="mug ", room="context")
    cutting = replace(asking, reword=lambda asked, words: [0] * 8, context_tokens=100_000)
    assert cutting.fill(Sample("rows.jsonl", 1, prompt="x"), question, 6) == f"{'mug ' * 11}?"


def test_a_metrics_own_prompts_are_scored_instead_of_rows(tuned, tokenizer, asked, asking, monkeypatch):
    few = (Question("short", "a"), Question("empty", " "), Question("long", "?", filler="mug ", room="context"))
    monkeypatch.setattr(metrics.get("stress"), "probes", lambda: few)
    found = run(tuned, tokenizer, asked, ["stress", "loss"], replace(asking, context_tokens=64))
    lines = {line.name: line for line in found.comparisons}
    assert (lines["stress"].rows, lines["loss"].rows) == (3, 3)
    assert found.tuned_speed is None  # no row needs an answer
    assert all(row.tuned.answer is None for row in found.rows)
    assert [line[:2] for line in found.metric_tables[0].lines] == [("short", 1), ("empty", 1), ("long", 1)]
    assert "at most 3 tokens" in found.metric_tables[0].title, "on which it depends how many are cut"
    assert found.worst[0].name == "loss"
    assert not found.unscored
    without = run(tuned, tokenizer, (asked[0], []), ["stress", "loss"], asking)
    assert [entry.metric for entry in without.unscored] == ["stress"]
