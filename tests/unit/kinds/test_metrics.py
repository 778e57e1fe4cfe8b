"""Metrics equal sacrebleu, rouge_score and plain formulas called directly; every metric keeps the contract of sums."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from lorafit.kinds.metrics import Question, Reply, RowScore, metrics
from lorafit.kinds.metrics.final_number import read_final_number
from lorafit.kinds.metrics.must_contain import holds_all
from lorafit.kinds.metrics.rouge import split_words


def sums(loss: float, tokens: float, correct: float) -> dict[str, tuple[float, ...]]:
    classes = {"classes": (1.0, 0.0), "predicted": (1.0, 0.0) if correct else (0.0, 1.0)}
    classes["confidence"] = (0.9,)
    pairs = {"preferred": (correct * tokens,), "margin": (correct,)}
    words = {"right_words": (correct,), "entities": (correct, tokens, tokens + 1.0), "entity_types": (1.0,)}
    verdicts = {"reward": (correct,), "desirable": (1.0,), "mismatched": (1.0 - correct,)}
    ratios = {"log_ratio": (1.0 - correct,), "answer_tokens": (tokens,)}
    counts = {"loss": (loss,), "weight": (tokens,), "tokens": (tokens,), "correct": (correct,)}
    numbers = {"squared_error": (loss,), "absolute_error": (loss,)}
    numbers |= {"predicted_numbers": (loss,), "right_numbers": (correct,)}
    return {**counts, **classes, **pairs, **words, **numbers, **verdicts, **ratios}


TEXTS = [  # answer, reference
    ("The cat sat on the mat.", "The cat is sitting on the mat."),
    ("", "Nothing was said."),
    ("Then you are paid.\nRefunds take 5 working days.", "Refunds take 14 working days.\nThen we pay you."),
    ("Перевод готов .", "Перевод не готов."),
    ("running quickly through fields", "runs quick through the field"),
    ("a b c d e f", "a b c d e f"),
]
ROWS = [
    RowScore(sums(3.5 * (i + 1), i + 2, i + 1), answer=a, reference=r, must_contain=("the",))
    for i, (a, r) in enumerate(TEXTS)
]


def score(name, rows=ROWS):
    metric = metrics.get(name)
    usable = [row for row in rows if metric.usable(row)]
    return metric.values([sum(column) for column in zip(*metric.row_sums(usable), strict=True)])


def test_bleu_and_chrf_equal_sacrebleu_over_the_corpus():
    answers, references = [a for a, _ in TEXTS], [r for _, r in TEXTS]
    assert score("bleu") == {"bleu": pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score, abs=1e-12)}
    assert score("chrf") == {"chrf": pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score, abs=1e-12)}
    assert "tok:13a" in metrics.get("bleu").signature()
    assert f"version:{sacrebleu.__version__}" in metrics.get("chrf").signature()


def test_rouge_of_ascii_equals_rouge_score_with_its_own_tokenizer():
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    texts = [(a, r) for a, r in TEXTS if (a + r).isascii()]
    direct = [scorer.score(r, a) for a, r in texts]
    found = score("rouge", [RowScore({}, a, r) for a, r in texts])
    assert set(found) == set(kinds)
    for kind in kinds:
        assert found[kind] == pytest.approx(sum(s[kind].fmeasure for s in direct) / len(direct), abs=1e-12)
    assert found["rougeL"] != pytest.approx(found["rougeLsum"])
    assert next(iter(found)) == "rougeL"


@given(st.text(st.characters(max_codepoint=127), max_size=80))
def test_words_of_ascii_are_rouge_scores(text):
    assert split_words(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)
    assert split_words(f"{text} ü")[:-1] == split_words(text)  # the long way round


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Größe für Äpfel", ["grösse", "für", "äpfel"]),
        ("价格是45元，可以退货", ["价", "格", "是", "45", "元", "可", "以", "退", "货"]),
        ("ひらがなとABC", ["ひ", "ら", "が", "な", "と", "abc"]),
        ("ครับ ๔๕", ["ค", "รั", "บ", "๔", "๕"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("e\u0301te\u0301 été", ["été", "été"]),
        ("Цена: 45 руб.", ["цена", "45", "руб"]),
        ("😀 — !", []),
    ],
)
def test_words_of_any_script(text, words):
    assert split_words(text) == words


@pytest.mark.parametrize(
    ("reference", "wrong", "nearly"),
    [
        ("价格是 45 元，可以退货", "完全不对的回答 45", "价格是 45 元，不可以退货"),
        ("Цена 45 рублей", "Возврат 45 невозможен", "Цена сорок пять рублей"),
        ("Größe für Äpfel", "Gruß an Otto", "Größe für Birnen"),
        ("คืนเงินภายใน 14 วัน", "ไม่ทราบ 14", "คืนเงินภายใน 15 วัน"),
        ("返品は14日以内です", "わかりません14", "返品は14日間です"),
        ("Τιμή 45 ευρώ", "Άγνωστο 45", "Τιμή 46 ευρώ"),
    ],
)
def test_rouge_reads_all_words_of_a_reference_in_another_script(reference, wrong, nearly):
    """rouge_score's own tokenizer sees 45 alone: 1.0 for any answer with 45 in it, 0.0 for one that spells it."""
    values = [score("rouge", [RowScore({}, answer, reference)]) for answer in (wrong, nearly, reference)]
    for kind in ("rougeL", "rouge1", "rougeLsum"):
        assert values[0][kind] < 0.5 < values[1][kind] < values[2][kind] == 1.0
    assert not metrics.get("rouge").usable(RowScore({}, "45", "— 😀"))


def test_bleu_sees_the_letters_of_a_script_without_blanks_as_sacrebleu_does_of_chinese():
    answers, references = (
        ["价格是四十五元，可以退货。", "订单45已经发货"],
        ["价格是45元，可以退货。", "订单45今天已经发货"],
    )
    rows = [RowScore({}, a, r) for a, r in zip(answers, references, strict=True)]
    direct = sacrebleu.corpus_bleu(answers, [references], tokenize="zh").score
    assert score("bleu", rows) == {"bleu": pytest.approx(direct, abs=1e-9)}
    assert 20 < direct < 80
    assert score("bleu", [RowScore({}, "返品は14日間以内です", "返品は14日以内です")])["bleu"] > 20


def test_token_metrics_weigh_by_tokens():
    loss, tokens = sum(row.value("loss") for row in ROWS), sum(row.value("tokens") for row in ROWS)
    assert score("loss") == {"loss": pytest.approx(loss / tokens)}
    assert score("perplexity") == {"perplexity": pytest.approx(math.exp(loss / tokens))}
    assert score("token_accuracy") == {"token_accuracy": pytest.approx(sum(r.value("correct") for r in ROWS) / tokens)}


def test_perplexity_stays_a_number():
    assert math.isfinite(score("perplexity", [RowScore(sums(1e6, 1, 0))])["perplexity"])


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("  The  answer\n is 4 ", "The answer is 4", True),
        ("the answer is 4", "The answer is 4", False),
        ("The answer is 4.", "The answer is 4", False),
        ("a\u00a0b", "a b", True),
    ],
)
def test_exact_match_ignores_white_space_alone(answer, reference, right):
    assert score("exact_match", [RowScore({}, answer, reference)]) == {"exact_match": float(right)}


@pytest.mark.parametrize(
    ("answer", "strings", "right"),
    [
        ("You have 30 DAYS.", ("30 days",), True),
        ("You have 30\u00a0days.", ("30 days",), True),
        ("You have thirty days.", ("30 days",), False),
        ("Write to help@shop.example in 30 days", ("30 days", "HELP@shop.example"), True),
        ("in 30 days", ("30 days", "help"), False),
        ("STRASSE 5", ("straße",), True),
        ("²", ("2",), True),
    ],
)
def test_must_contain_wants_every_string_in_any_case(answer, strings, right):
    assert holds_all(answer, strings) is right
    rows = [RowScore({}, answer, "", strings), RowScore({}, answer, "")]
    assert [metrics.get("must_contain").usable(row) for row in rows] == [True, False]
    assert score("must_contain", rows) == {"must_contain": float(right)}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("so 2 * 540 = 1080\n#### 1,080", True),
        ("it is $1080.00 in all", True),
        ("#### 1080 and then 7 more words", True),
        ("1080 apples, or 90 a month", False),
        ("10800", False),
        ("-1080", False),
        ("none", False),
    ],
)
def test_final_number_compares_numbers(answer, right):
    rows = [RowScore({}, answer, "540 * 2 = 1080\n#### 1080"), RowScore({}, answer, "no mark, 1080")]
    assert [metrics.get("final_number").usable(row) for row in rows] == [True, False]
    assert score("final_number", rows) == {"final_number": float(right)}


def test_final_number_reads_the_last_mark():
    assert read_final_number("#### 3 ... #### -4.50") == -4.5
    assert read_final_number("3 and 4", marked=True) is None


RELATIVE = {"domain_relevance"}  # compares a row with all others, which test_quality.py does


@pytest.mark.parametrize("name", sorted({*metrics.names()} - RELATIVE))
def test_contract_sums_of_rows_give_the_corpus(name):
    metric = metrics.get(name)
    right, wrong = "it is 4 #### 4", "it is 5"
    if name == "tool_call":
        right = wrong = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    further = {name: tuple(Reply(Question("again"), text) for text in (right, right))}
    asked = {"prompt": "how much is it?", "paraphrases": ("what does it cost?",), "further": further}
    rows = [
        RowScore(sums(2.0, 3, 1), right, right, ("4",), written=right, **asked),
        RowScore(
            sums(9.0, 5, 0), wrong, wrong if name == "tool_call" else "we have 7 #### 7", ("7",), written="<tool_call>"
        ),
    ]
    other = (Reply(Question("again"), right), Reply(Question("again"), wrong))
    if name == "stress":  # an answer that says nothing
        other = (Reply(Question("again"), " "),)
    rows[1] = replace(rows[1], **{**asked, "further": {name: other}})
    assert all(metric.usable(row) for row in rows)
    one, both, twice = score(name, rows[:1]), score(name, rows), score(name, rows * 2)
    assert both == pytest.approx(twice)  # a corpus seen twice is no better
    assert list(one) == list(both)
    headline = next(iter(both))
    assert (one[headline] > both[headline]) == (metric.better == "higher")
    assert metric.condition
    assert metric.signature()
    assert headline == (metric.name or name)
    assert not metric.usable(RowScore())
    if metric.percent:
        assert all(0 <= value <= 1 for value in both.values())


def test_naming_metrics_imports_nothing_heavy():
    code = (
        "import sys; from lorafit.kinds.metrics import metrics; from lorafit.kinds.tasks import tasks; "
        "metrics.names(), tasks.names(); "
        "print([name for name in ('torch', 'numpy', 'sacrebleu', 'rouge_score') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
