"""Order, steps, micro-batches and padding: pure functions with the promises the loop relies on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.contracts import Example
from lorafit.data.batch import (
    MICRO_BATCH_COST_TOKENS,
    StepRows,
    cut_step,
    deal,
    epoch_order,
    rows_per_epoch,
    shuffle,
    span_tokens,
    steps_per_epoch,
)
from lorafit.kinds.tasks import tasks

CAUSAL_LM = tasks.make("causal-lm")

GOLDEN = {(0, 0): [0, 7, 8, 2, 5, 9, 4, 6, 3, 1], (7, 3): [7, 2, 0, 9, 5, 3, 4, 8, 6, 1]}


@dataclass
class Rows:
    """Sources with so many rows each."""

    counts: list[int]
    repeats: list[float]

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def source_of(self) -> list[int]:
        return [source for source, count in enumerate(self.counts) for _ in range(count)]


sources = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0])), min_size=1, max_size=3
).map(lambda pairs: Rows([count for count, _ in pairs], [repeats for _, repeats in pairs]))
seeds = st.integers(0, 2**32 - 1)


@given(st.integers(0, 200), seeds, st.integers(0, 50))
def test_shuffle_is_a_permutation_of_its_key_alone(count: int, seed: int, epoch: int) -> None:
    order = shuffle(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    assert (order == shuffle(count, seed, epoch)).all()


def test_shuffle_never_changes() -> None:
    """Golden values: a run of today must be resumable with every later version of lorafit and numpy."""
    assert shuffle(10, 0, 0).tolist() == GOLDEN[0, 0]
    assert shuffle(10, 7, 3).tolist() == GOLDEN[7, 3]


def test_shuffle_is_even() -> None:
    """Over many seeds each number comes first about equally often, and neighbours do not stay together."""
    firsts = Counter(int(shuffle(8, seed)[0]) for seed in range(4000))
    assert all(400 < firsts[number] < 600 for number in range(8))
    order = shuffle(10_000, 1)
    assert np.count_nonzero(np.diff(order) == 1) < 10
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert abs(np.corrcoef(shuffle(10_000, 1, 0), shuffle(10_000, 1, 1))[0, 1]) < 0.05


@given(sources, seeds, st.integers(0, 9))
def test_an_epoch_holds_each_row_as_often_as_its_source_says(rows: Rows, seed: int, epoch: int) -> None:
    order = epoch_order(rows, seed, epoch)
    assert len(order) == rows_per_epoch(rows)
    seen = Counter(order.tolist())
    first = 0
    for count, repeats in zip(rows.counts, rows.repeats, strict=True):
        times = [seen[row] for row in range(first, first + count)]
        whole = int(repeats)
        assert all(whole <= time <= whole + (repeats > whole) for time in times)
        assert sum(times) == whole * count + (max(1, round((repeats - whole) * count)) if repeats > whole else 0)
        first += count


@given(st.integers(1, 12), st.sampled_from([0.25, 0.5, 1.5, 2.25]), seeds)
def test_partial_repeats_see_all_rows_equally_often(count: int, repeats: float, seed: int) -> None:
    """After as many epochs as there are rows, each was seen as often as every other."""
    rows = Rows([count], [repeats])
    seen = Counter(row for epoch in range(count) for row in epoch_order(rows, seed, epoch).tolist())
    assert len(set(seen.values())) == 1 and len(seen) == count


def test_a_half_is_followed_by_the_other_half() -> None:
    rows = Rows([10], [0.5])
    first, second = (set(epoch_order(rows, 3, epoch).tolist()) for epoch in (0, 1))
    assert len(first) == len(second) == 5 and not first & second


def test_order_depends_on_seed_and_epoch() -> None:
    rows = Rows([50], [1.0])
    orders = {tuple(epoch_order(rows, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(sources, seeds, st.integers(1, 7), st.integers(1, 40))
def test_steps_are_functions_of_their_number(rows: Rows, seed: int, batch_size: int, step: int) -> None:
    """Steps asked for in any order give what the epochs laid end to end give."""
    steps = StepRows(rows, seed, batch_size)
    per_epoch = steps_per_epoch(rows_per_epoch(rows), batch_size)
    assert steps.steps_per_epoch == per_epoch
    epoch, place = divmod(step - 1, per_epoch)
    expected = epoch_order(rows, seed, epoch)[place * batch_size : (place + 1) * batch_size].tolist()
    progress, found = steps.rows(step)
    assert found == expected and 0 < len(found) <= batch_size
    assert epoch < progress <= epoch + 1
    assert (progress == epoch + 1) == (place == per_epoch - 1)
    steps.rows(1)
    assert steps.rows(step) == (progress, found)


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=9)


def cost(cut: list[list[int]], tokens: list[int]) -> int:
    return sum(MICRO_BATCH_COST_TOKENS + len(part) * max(tokens[row] for row in part) for part in cut)


@given(lengths, st.integers(1, 300), st.integers(1, 4), st.sampled_from([1, 2, 8]))
def test_a_cut_is_a_partition_within_the_budget(tokens: list[int], budget: int, at_once: int, ranks: int) -> None:
    rows = list(range(len(tokens)))
    cut = cut_step(rows, tokens, budget, at_once, ranks)
    assert sorted(row for part in cut for row in part) == rows
    assert all(part for part in cut)
    for part in cut:
        longest = max(tokens[row] for row in part)
        assert len(part) == 1 or len(part) * longest <= budget


@settings(deadline=None)
@given(lengths, st.integers(1, 300))
def test_a_cut_is_the_cheapest(tokens: list[int], budget: int) -> None:
    """Against every cut of the sorted rows."""
    ordered = sorted(range(len(tokens)), key=lambda row: -tokens[row])
    best = min(
        cost(cut, tokens)
        for count in range(len(tokens))
        for places in combinations(range(1, len(tokens)), count)
        for cut in [[ordered[a:b] for a, b in zip((0, *places), (*places, len(tokens)), strict=True)]]
        if all(len(part) == 1 or len(part) * tokens[part[0]] <= budget for part in cut)
    )
    assert cost(cut_step(list(range(len(tokens))), tokens, budget), tokens) == best


@pytest.mark.parametrize(
    ("padded", "at_once", "expected"),
    [([100, 50, 30], 1, 180 + 3 * 96), ([100, 50, 30], 2, 80 + 2 * 96), ([30, 50, 100], 4, 196), ([], 2, 0)],
)
def test_a_span_ends_with_the_last_core(padded: list[int], at_once: int, expected: int) -> None:
    """The largest begin: 100 on one core, 50 and then 30 on the other, and 96 for each."""
    assert MICRO_BATCH_COST_TOKENS == 96 and span_tokens(padded, at_once) == expected


@given(lengths, st.integers(1, 300), st.integers(2, 4))
def test_micro_batches_at_once_are_done_no_later_than_with_the_plain_cut(
    tokens: list[int], budget: int, at_once: int
) -> None:
    def span(cut: list[list[int]]) -> int:
        return span_tokens([len(part) * max(tokens[row] for row in part) for part in cut], at_once)

    rows = range(len(tokens))
    plain = span(cut_step(rows, tokens, budget))
    assert span(cut_step(rows, tokens, budget, at_once)) <= plain
    assert span(cut_step(rows, tokens, budget, ranks=at_once)) <= plain


@given(st.lists(st.integers(1, 300), max_size=20), st.integers(1, 9))
def test_micro_batches_are_dealt_to_whoever_is_free_first(padded: list[int], workers: int) -> None:
    dealt = deal(padded, workers)
    assert len(dealt) == workers and sorted(number for share in dealt for number in share) == [*range(len(padded))]
    assert all(share == sorted(share) for share in dealt)
    costs = [[MICRO_BATCH_COST_TOKENS + padded[number] for number in share] for share in dealt]
    spans = [sum(share) for share in costs]
    assert max(spans) == span_tokens(padded, workers)
    assert all(span - min(share) <= min(spans) for span, share in zip(spans, costs, strict=True) if share)


@pytest.mark.parametrize(("mean", "longest"), [(120, 1024), (350, 2048)])
@pytest.mark.parametrize(("ranks", "least", "before"), [(2, 0.95, 0.90), (4, 0.90, 0.74), (8, 0.70, 0.52)])
def test_the_share_of_ranks_in_use(mean: int, longest: int, ranks: int, least: float, before: float) -> None:
    """Steps of 16 rows as instructions and chats have them, under the largest budget that a plan of them allows."""
    random = np.random.default_rng(0)
    tokens = np.clip(random.lognormal(np.log(mean), 0.7, 4000), 20, longest).astype(int)
    tokens[0] = longest
    shares: dict[str, list[float]] = {"dealt": [], "in turn": []}
    for _ in range(50):
        rows = random.integers(0, 4000, 16).tolist()
        for how, told in (("dealt", ranks), ("in turn", 1)):
            cut = cut_step(rows, tokens, -(-16 // ranks) * longest, ranks=told)
            padded = [len(part) * int(tokens[part[0]]) for part in cut]
            numbers = deal(padded, ranks) if how == "dealt" else [range(len(cut))[n::ranks] for n in range(ranks)]
            busy = [sum(padded[number] for number in share) for share in numbers]
            shares[how].append(sum(busy) / ranks / max(busy))
    assert np.mean(shares["dealt"]) >= least
    assert np.mean(shares["in turn"]) <= before  # what cuts that know of no ranks give


def test_cuts_are_those_of_older_runs() -> None:
    """A resumed run trains to the same bits only on the cuts that it was begun with."""
    tokens = [20 + int(number) ** 2 // 9000 for number in shuffle(3000, 5)]
    steps = [range(start, start + 16) for start in range(0, 320, 16)]
    golden = {
        (1, 1): "b9deab3fe5b699fa",
        (2, 1): "3b5fe2656f936449",
        (6, 1): "d8d4f67c26caf85f",
        (1, 2): "5b0a7581a6dbde9b",
        (1, 8): "1f449261276b5f55",
    }
    for (at_once, ranks), expected in golden.items():
        cuts = [cut_step(rows, tokens, budget, at_once, ranks) for rows in steps for budget in (640, 4096)]
        assert sha256(repr(cuts).encode()).hexdigest()[:16] == expected


def test_two_cores_get_two_micro_batches() -> None:
    assert [len(part) for part in cut_step(range(16), [60] * 16, 900)] == [1, 15]
    assert [len(part) for part in cut_step(range(16), [60] * 16, 900, at_once=2)] == [8, 8]


def test_one_long_row_does_not_pad_the_others() -> None:
    tokens = [1000] + [100] * 15
    assert [len(part) for part in cut_step(range(16), tokens, 16_384)] == [1, 15]


def test_rows_that_come_twice_and_none_at_all() -> None:
    assert cut_step([], [5], 10) == []
    assert sorted(row for part in cut_step([0, 0, 1], [5, 7], 14) for row in part) == [0, 0, 1]


def test_a_large_evaluation_is_cut_quickly() -> None:
    tokens = (np.arange(20_000) % 500 + 1).tolist()
    cut = cut_step(range(20_000), tokens, 8192)
    padded = sum(len(part) * tokens[part[0]] for part in cut)
    assert sum(len(part) for part in cut) == 20_000
    assert padded < 1.03 * sum(tokens)


def example(index: int, ids: list[int], trained: list[int]) -> Example:
    return Example(index, {"tokens": ids, "trained": trained}, "d.jsonl", index + 1)


def test_collate_pads_on_the_right_and_points_before_each_label() -> None:
    """Token 9 is a label although it is the pad token too; the first token of a row never is one."""
    batch = CAUSAL_LM.collate(
        [[example(4, [5, 6, 9], [0, 1, 1])], [example(2, [7, 8, 3, 4, 9], [1, 0, 0, 0, 1])]], pad_id=9
    )
    assert batch["input_ids"].tolist() == [[5, 6, 9, 9, 9], [7, 8, 3, 4, 9]]
    assert batch["label_index"].tolist() == [0, 1, 5 + 3]
    assert batch["label_ids"].tolist() == [6, 9, 9]
    assert (batch.weight, batch.rows, batch.tokens) == (3, (4, 2), 8)
    assert {str(t.dtype) for t in (batch["input_ids"], batch["label_index"], batch["label_ids"])} == {"torch.int64"}


@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5))
def test_collate_keeps_every_label(rows: list[list[tuple[int, bool]]]) -> None:
    examples = [example(n, [i for i, _ in row], [int(t) for _, t in row]) for n, row in enumerate(rows)]
    batch = CAUSAL_LM.collate([[one] for one in examples], pad_id=0)
    width = batch["input_ids"].shape[1]
    labels = {
        (index // width, index % width + 1): token
        for index, token in zip(batch["label_index"].tolist(), batch["label_ids"].tolist(), strict=True)
    }
    expected = {(n, t): i for n, row in enumerate(rows) for t, (i, trained) in enumerate(row) if trained and t}
    assert labels == expected
    assert batch.weight == len(expected)
    assert all(index % width < width - 1 for index in batch["label_index"].tolist())


@pytest.mark.parametrize(("rows", "batch_size", "steps"), [(10, 4, 3), (8, 4, 2), (1, 16, 1)])
def test_the_last_smaller_step_is_kept(rows: int, batch_size: int, steps: int) -> None:
    assert steps_per_epoch(rows, batch_size) == steps


def test_the_dearer_a_start_the_fewer_micro_batches() -> None:
    tokens = [900, 700, 520, 400, 310, 240, 180, 130, 90, 60, 40, 25]
    rows, usual = range(len(tokens)), cut_step(range(len(tokens)), tokens, 4096)
    sizes = [len(cut_step(rows, tokens, 4096, cost_tokens=cost)) for cost in (96, 700, 2500)]
    assert sizes[0] == len(usual) > sizes[1] > sizes[2]
    padded = [1000, 600, 300, 200, 100]
    assert [span_tokens(padded, 2, cost_tokens=cost) for cost in (0, 500)] == [1100, 2500]
    assert deal(padded, 2, cost_tokens=0) == [[0, 4], [1, 2, 3]]
    assert deal(padded, 2, cost_tokens=500) == [[0, 3], [1, 2, 4]]
