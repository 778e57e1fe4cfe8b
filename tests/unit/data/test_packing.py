"""Packed rows hold every document once, never more than they may, and say where each document begins."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.contracts import Example
from lorafit.data.batch import cut_step, span_tokens
from lorafit.data.packing import PACKED_ROW_TOKENS, Cutter, cut_packed, pack_rows, padded_tokens
from lorafit.kinds.tasks import tasks

CAUSAL_LM = tasks.make("causal-lm")

documents = st.lists(st.integers(1, 90), min_size=1, max_size=40)


class Rows:
    """Rows of given lengths; token t of row n is 100 n + t, and the second half of a row is trained."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = list(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        length = self.lengths[index]
        trained = [int(place >= length // 2) for place in range(length)]
        return Example(
            index, {"tokens": [100 * index + place for place in range(length)], "trained": trained}, "f", index + 1
        )


@given(documents, st.integers(1, 120))
def test_packed_rows_hold_every_document_and_no_two_could_be_one(lengths: list[int], row_tokens: int) -> None:
    rows = [*range(len(lengths)), 0]  # repeated rows are documents of their own
    packed = pack_rows(rows, lengths, row_tokens)
    assert Counter(chain(*packed)) == Counter(rows)
    totals = [sum(lengths[row] for row in documents) for documents in packed]
    for total, row in zip(totals, packed, strict=True):
        assert total <= row_tokens or len(row) == 1  # a longer document is a row of its own
    assert all(a + b > row_tokens for n, a in enumerate(totals) for b in totals[n + 1 :])


def test_a_document_goes_where_the_least_room_is_left_behind_it() -> None:
    """The last 3 tokens fill the second row up; first-fit would put them into the first."""
    assert pack_rows(range(4), [60, 55, 42, 3], 100) == [[0], [1, 2, 3]]
    assert pack_rows([0, 1], [12, 3], 10) == [[0], [1]]


@given(documents, st.integers(1, 400), st.booleans(), st.sampled_from([1, 2, 8]))
def test_cuts_keep_the_rows_and_the_budget_and_never_cost_more(
    lengths: list[int], budget: int, one_row: bool, ranks: int
) -> None:
    rows = list(range(len(lengths)))
    cut = cut_packed(rows, lengths, budget, one_row=one_row, ranks=ranks)
    assert sorted(row for part in cut for documents in part for row in documents) == rows
    for part in cut:
        assert padded_tokens(part, lengths) <= budget or len(part) == len(part[0]) == 1
        if one_row and any(len(documents) > 1 for documents in part):
            assert len(part) == 1  # what variable-length attention needs
    plain = [len(part) * lengths[part[0]] for part in cut_step(rows, lengths, budget)]
    assert span_tokens([padded_tokens(part, lengths) for part in cut], ranks) <= span_tokens(plain, ranks)


@pytest.mark.parametrize("one_row", [True, False])
def test_packed_rows_that_ranks_share_are_short_enough_for_all(one_row: bool) -> None:
    lengths = [120, 80, 100, 60, 140, 90, 110, 70] * 2
    cutter = Cutter(Rows(*lengths), CAUSAL_LM, 9, True, "flash_attention_2" if one_row else "sdpa", ranks=4)
    cut = cutter.cut(range(16), 2048)
    shares = [sum(padded_tokens(part, lengths) for part in cutter.of_rank(cut, rank)) for rank in range(4)]
    assert sorted(row for part in cut for documents in part for row in documents) == [*range(16)]
    assert sum(shares) / 4 / max(shares) > 0.8
    assert len(replace(cutter, ranks=1).cut(range(16), 2048)) <= 2  # which would leave ranks with nothing


def test_one_row_has_no_padding_and_others_are_no_longer_than_the_longest_document() -> None:
    lengths = [700, 300, 400, 350, 650, 100, 120, 80]
    one_row = cut_packed(range(8), lengths, 1024, one_row=True)
    assert sum(padded_tokens(part, lengths) for part in one_row) == sum(lengths)
    cut = cut_packed(range(8), lengths, 1400, one_row=False)
    assert max(padded_tokens([documents], lengths) for part in cut for documents in part) == 700
    short = [40, 9, 30, 21, 35, 8] * 6
    packed = cut_packed(range(36), short, 512, one_row=False)
    widest = max(padded_tokens([documents], short) for part in packed for documents in part)
    assert 40 < widest <= PACKED_ROW_TOKENS
    assert cut_packed([], [], 10, one_row=False) == []


def test_collate_draws_what_the_docstring_draws() -> None:
    rows = Rows(5, 3, 4)
    batch = CAUSAL_LM.collate([[rows[0], rows[1]], [rows[2]]], pad_id=9)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 100, 101, 102], [200, 201, 202, 203, 9, 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["label_index"].tolist() == [1, 2, 3, 5, 6, 9, 10]
    assert batch["label_ids"].tolist() == [2, 3, 4, 101, 102, 202, 203]
    assert (batch.weight, batch.tokens, batch.rows) == (7, 12, (0, 1, 2))


def test_a_documents_first_token_is_never_a_label() -> None:
    everything = [Example(row, {"tokens": [7, 8], "trained": [1, 1]}, "rows.jsonl", row) for row in range(3)]
    batch = CAUSAL_LM.collate([everything], pad_id=0)
    assert batch["label_index"].tolist() == [0, 2, 4] and batch["label_ids"].tolist() == [8, 8, 8]


def test_rows_of_one_document_are_plain() -> None:
    rows = Rows(5, 3)
    packed, plain = CAUSAL_LM.collate([[rows[0]], [rows[1]]], 9), CAUSAL_LM.collate([[rows[0]], [rows[1]]], 9)
    assert "position_ids" not in packed.tensors
    assert packed["input_ids"].tolist() == plain["input_ids"].tolist()
    assert packed["label_index"].tolist() == plain["label_index"].tolist()


@pytest.mark.parametrize(
    ("packing", "attention", "wanted"),
    [
        (False, "flash_attention_2", [[[0], [1]], [[2], [3], [4]]]),
        (True, "sdpa", [[[1, 2, 3], [0, 4]]]),
        (True, "flash_attention_2", [[[0, 1, 2, 3, 4]]]),
    ],
)
def test_a_cutter_cuts_as_recipe_and_attention_want(packing: bool, attention: str, wanted: list[object]) -> None:
    rows = Rows(200, 150, 60, 40, 30)
    assert Cutter(rows, CAUSAL_LM, 9, packing, attention).cut(range(5), 512) == wanted
