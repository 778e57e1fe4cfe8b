"""The paired bootstrap agrees with formulas, with resampled text, and is honest about few rows."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from lorafit.evaluation.report import cells_of
from lorafit.evaluation.share_intervals import difference_of_shares, share_difference_interval, share_interval
from lorafit.evaluation.statistics import LEAST_ROWS, bootstrap_values, compare, draw_counts, judge
from lorafit.kinds.metrics import RowScore, metrics


def sums(loss: float, tokens: float, correct: float) -> dict[str, tuple[float, ...]]:
    return {"loss": (loss,), "weight": (tokens,), "tokens": (tokens,), "correct": (correct,)}


def classes(right: int) -> dict[str, tuple[float, ...]]:
    return {"loss": (0.1,), "weight": (1.0,), "classes": (1.0, 0.0), "predicted": (float(right), 1.0 - right)}


def losses(values, tokens=10):
    return [RowScore(sums(float(value) * tokens, tokens, 0)) for value in values]


def hits(values):
    return [RowScore(answer="yes" if value else "no", reference="yes") for value in values]


def test_interval_of_a_mean_is_the_normal_one_for_many_rows():
    rng = np.random.default_rng(1)
    base = rng.normal(3.0, 1.0, 400)
    tuned = base + rng.normal(-0.1, 0.5, 400)
    (found,) = compare("loss", metrics.get("loss"), losses(base), losses(tuned), seed=0)
    moved = tuned - base
    half = 1.96 * moved.std() / 400**0.5
    assert found.difference == pytest.approx(moved.mean())
    assert found.low == pytest.approx(moved.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(moved.mean() + half, abs=0.05 * half)
    assert found.verdict == "better"
    assert (found.rows_better, found.rows_worse) == ((moved < 0).sum(), (moved > 0).sum())


def test_the_tuned_score_has_an_interval_of_its_own():
    """A share's is the binomial one for many rows, whatever the base did on the same rows."""
    metric = metrics.get("exact_match")
    right = [1] * 300 + [0] * 100
    for base in ([0] * 400, right):
        (found,) = compare("exact_match", metric, hits(base), hits(right), seed=0)
        half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
        assert found.tuned_low == pytest.approx(0.75 - half, abs=0.1 * half)
        assert found.tuned_high == pytest.approx(0.75 + half, abs=0.1 * half)
        assert found.to_json()["tuned_high"] == found.tuned_high
        assert found.tuned_span == f"{100 * found.tuned_low:.1f} % to {100 * found.tuned_high:.1f} %"
    assert -0.01 < found.low < 0 < found.high < 0.01, "no row of 400 differs"


@pytest.mark.parametrize(
    ("right", "rows", "base_right", "base_rows", "low", "high"),
    [(56, 70, 48, 80, 0.0524, 0.3339), (9, 10, 3, 10, 0.1705, 0.8090), (10, 10, 0, 10, 0.6075, 1.0)],
)
def test_the_difference_of_shares_of_other_rows_is_newcombes(
    right: int, rows: int, base_right: int, base_rows: int, low: float, high: float
) -> None:
    """Table II of Newcombe (1998), method 10."""
    assert difference_of_shares(base_right, base_rows, right, rows) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "rows"), [(0, 6), (6, 6), (3, 7), (550, 584)])
def test_the_interval_of_a_share_is_where_the_score_test_turns(right: int, rows: int) -> None:
    """Wilson's ends are the shares p whose own standard error puts the observed share 1.96 of them away."""
    share = right / rows
    for end in share_interval(right, rows):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / rows) ** 0.5, rel=1e-6)
    low, high = share_interval(right, rows)
    assert low <= share <= high and high - low > 0.01


def test_the_interval_of_a_paired_difference_is_the_published_one() -> None:
    """Airway hyper-responsiveness of 21 children, 1, 1, 7, 12: -0.507 to -0.026. Source: Fagerland, Lydersen and Laake
    (2014), Recommended tests and confidence intervals for paired binomial proportions, Statistics in Medicine 33.
    """
    tuned = np.array([1.0] * 2 + [0.0] * 19)
    base = np.array([1.0, 0.0] + [1.0] * 7 + [0.0] * 12)
    assert share_difference_interval(base, tuned) == pytest.approx((-0.507, -0.026), abs=5e-4)


def test_a_share_keeps_a_width_where_every_row_is_right() -> None:
    metric = metrics.get("exact_match")
    (found,) = compare("exact_match", metric, hits([1] * 6), hits([1] * 6), seed=0)
    assert found.tuned_low == pytest.approx(0.6097, abs=1e-4) and found.tuned_high == 1.0
    assert found.verdict == "not distinguishable" and found.low < -0.3 and found.high > 0.3
    (found,) = compare("exact_match", metric, hits([0] * 6), hits([1] * 6), seed=0)
    assert found.verdict == "better" and 0.4 < found.low < 0.5 and found.high == 1.0
    (f1,) = compare("macro_f1", metrics.get("macro_f1"), *[[RowScore(classes(1), "a")] * 8] * 2, seed=0)
    assert f1.tuned_low == f1.tuned_high == 1.0 and f1.tuned_span == "-"


def test_an_interval_without_a_width_is_none() -> None:
    """Of two models that answer alike every draw gives a difference of 0: no sign of how sure that is."""
    rows = losses([1.0, 2.0, 3.0] * 4)
    (found,) = compare("loss", metrics.get("loss"), rows, rows, seed=0)
    assert found.low == found.high == 0 and found.verdict == "not distinguishable"
    assert found.span == "-" and found.tuned_span != "-" and cells_of(found)[5] == "-"
    assert "(difference 0, no interval: every draw of rows gives the same)" in found.sentence
    (found,) = compare("loss", metrics.get("loss"), rows, losses([1.5, 2.5, 3.0] * 4), seed=0)
    assert found.span == cells_of(found)[5] == f"{found.show_change(found.low)} to {found.show_change(found.high)}"


def test_interval_holds_the_true_difference_about_95_times_in_100():
    rng = np.random.default_rng(2)
    held = 0
    for trial in range(300):
        base = rng.normal(3.0, 1.0, 60)
        tuned = base + rng.normal(0.2, 0.5, 60)
        (found,) = compare("loss", metrics.get("loss"), losses(base), losses(tuned), seed=trial, resamples=1000)
        held += found.low <= 0.2 <= found.high
    assert 0.90 <= held / 300 <= 0.985


def test_pairing_cancels_what_is_hard_for_both():
    base = np.random.default_rng(3).normal(5.0, 2.0, 50)
    (found,) = compare("loss", metrics.get("loss"), losses(base), losses(base - 0.01), seed=0)
    assert (found.low, found.high) == (pytest.approx(-0.01), pytest.approx(-0.01))
    assert found.verdict == "better"


@pytest.mark.parametrize(("name", "direct"), [("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)])
def test_corpus_metrics_are_recomputed_on_each_resampled_corpus(name, direct):
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "over", "two", "lazy", "birds"]
    rng = np.random.default_rng(4)
    references = [" ".join(rng.choice(words, 12)) for _ in range(12)]

    def spoil(text, share):
        return " ".join(rng.choice(words) if rng.random() < share else word for word in text.split())

    base, tuned = [spoil(text, 0.6) for text in references], [spoil(text, 0.2) for text in references]
    rows = [[RowScore({}, a, r) for a, r in zip(side, references, strict=True)] for side in (base, tuned)]
    metric = metrics.get(name)
    sums = [np.asarray(metric.row_sums(side)) for side in rows]
    of_base, of_tuned = bootstrap_values(metric, *sums, seed=7, resamples=20)
    (counts,) = list(draw_counts(12, 20, 7))
    for line, *values in zip(counts.astype(int), of_base[:, 0], of_tuned[:, 0], strict=True):
        drawn = np.repeat(np.arange(12), line)
        scores = [direct([side[i] for i in drawn], [[references[i] for i in drawn]]).score for side in (base, tuned)]
        assert values == pytest.approx(scores, abs=1e-9)
    assert compare(name, metric, *rows, seed=0)[0].verdict == "better"


def test_every_value_of_a_metric_gets_its_own_interval():
    base = [RowScore({}, "b a", "a b") for _ in range(8)]
    tuned = [RowScore({}, "a b", "a b") for _ in range(8)]
    found = {line.name: line for line in compare("rouge", metrics.get("rouge"), base, tuned, seed=0)}
    assert found["rouge1"].verdict == "not distinguishable"
    assert found["rouge2"].verdict == found["rougeL"].verdict == "better"


def test_a_share_that_fell_is_worse_and_one_that_may_be_luck_is_neither():
    metric = metrics.get("exact_match")
    (fell,) = compare("exact_match", metric, hits([1] * 30 + [0] * 10), hits([0] * 40), seed=0)
    (luck,) = compare("exact_match", metric, hits([1] * 20 + [0] * 20), hits([1] * 21 + [0] * 19), seed=0)
    assert fell.verdict == "worse"
    assert (fell.rows_better, fell.rows_worse) == (0, 30)
    assert luck.verdict == "not distinguishable"
    assert luck.sentence == (
        "exact_match: not distinguishable with 40 rows, from 50.0 % to 52.5 % (difference +2.5 points, "
        f"95 % interval {luck.show_change(luck.low)} to {luck.show_change(luck.high)})"
    )


def test_few_rows_get_no_verdict_or_a_warning():
    metric = metrics.get("loss")
    (five,) = compare("loss", metric, losses([4.0] * 5), losses([1.0] * 5), seed=0)
    (six,) = compare("loss", metric, losses([4.0] * 6), losses([1.0] * 6), seed=0)
    (many,) = compare("loss", metric, losses([4.0] * 30), losses([1.0] * 30), seed=0)
    assert five.verdict == "too few rows"
    assert f"5 rows are too few to tell, from 4.000 to 1.000; a verdict needs at least {LEAST_ROWS}" in five.sentence
    (one,) = compare("loss", metric, losses([4.0]), losses([1.0]), seed=0)
    assert "1 row is too few to tell" in one.sentence
    assert six.verdict == "better"
    assert "rough" in six.sentence
    assert "rough" not in many.sentence
    assert many.sentence.startswith("loss: better on 30 rows, from 4.000 to 1.000 (difference -3.000,")


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (0.1, 0.2, "higher", "better"),
        (0.1, 0.2, "lower", "worse"),
        (-0.2, -0.1, "lower", "better"),
        (-0.2, -0.1, "higher", "worse"),
        (-0.1, 0.1, "higher", "not distinguishable"),
        (0.0, 0.1, "higher", "not distinguishable"),
    ],
)
def test_verdict_follows_the_interval(low, high, better, verdict):
    assert judge(low, high, better, 100) == verdict
    assert judge(low, high, better, LEAST_ROWS - 1) == "too few rows"


def test_the_seed_decides_the_interval():
    rng = np.random.default_rng(5)
    base, tuned = losses(rng.normal(3, 1, 20)), losses(rng.normal(3, 1, 20))
    one, again, other = (compare("loss", metrics.get("loss"), base, tuned, seed=seed)[0] for seed in (1, 1, 2))
    assert one == again
    assert (one.low, one.high) != (other.low, other.high)


@given(rows=st.integers(1, 60), resamples=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_each_resample_draws_as_many_rows_as_there_are(rows, resamples, seed):
    counts = np.concatenate(list(draw_counts(rows, resamples, seed)))
    assert counts.shape == (resamples, rows)
    assert (counts.sum(axis=1) == rows).all()


def test_large_sets_are_drawn_in_chunks_and_every_row_alike():
    chunks = list(draw_counts(50_000, 200, 0))
    assert len(chunks) > 1
    assert sum(map(len, chunks)) == 200
    mean = np.concatenate(chunks).mean(axis=0)
    assert mean.mean() == pytest.approx(1.0)
    assert mean.std() == pytest.approx((1 / 200) ** 0.5, rel=0.05)  # each count is Poisson(1), nearly


def test_rows_must_be_paired():
    with pytest.raises(ValueError, match="paired"):
        compare("loss", metrics.get("loss"), losses([1.0]), losses([1.0, 2.0]), seed=0)
    with pytest.raises(ValueError, match="paired"):
        compare("loss", metrics.get("loss"), [], [], seed=0)
