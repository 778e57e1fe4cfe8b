"""NEFTune's noise (Jain et al. 2023, algorithm 1) is as large as each sequence's real length says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lorafit.contracts import Batch, Example
from lorafit.errors import ModelError
from lorafit.kinds.tasks import tasks
from lorafit.ops.dropout import drawing_from
from lorafit.ops.embedding_noise import noise_of, real_lengths, take_noise, with_noise
from tests.support.tiny_run import PAD

ALPHA, WIDTH = 5.0, 64


def row(tokens: int) -> Example:
    """Whose last token is the one that padding is made of, as an end of turn often is."""
    return Example(0, {"tokens": [*range(1, tokens), PAD], "trained": [1] * tokens}, "x", 1)


def batch_of(lengths: Sequence[Sequence[int]], task: str = "causal-lm") -> Batch:
    batch: Batch = tasks.make(task).collate([[row(tokens) for tokens in each] for each in lengths], PAD)
    return batch


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([[9], [4]], [[9] * 9, [4] * 4]),  # padded
        ([[5, 3, 8]], [[5] * 5 + [3] * 3 + [8] * 8]),  # packed into one row
        ([[5, 3], [6]], [[5] * 5 + [3] * 3, [6] * 6]),  # packed and padded
    ],
)
def test_l_is_the_length_of_each_document(lengths: Sequence[Sequence[int]], wanted: list[list[int]]) -> None:
    found = real_lengths(batch_of(lengths)).tolist()
    assert [line[: len(real)] for line, real in zip(found, wanted, strict=True)] == wanted


def test_pairs_and_texts_have_lengths_too() -> None:
    pair = {f"{side}_{key}": [1] * n for side, n in (("chosen", 7), ("rejected", 3)) for key in ("tokens", "trained")}
    sides = real_lengths(tasks.make("dpo").collate([[Example(0, pair, "x", 1)]], PAD))
    assert (sides[0, 0], sides[1, 0]) == (7, 3)
    task: Any = tasks.make("sequence-classification", labels=["no", "yes"])
    texts = [[Example(0, {"tokens": [1] * n, "marks": [], "classes": [0, 1]}, "x", 1)] for n in (2, 6)]
    assert real_lengths(task.collate(texts, PAD))[:, 0].tolist() == [2, 6]


def test_algorithm_1() -> None:
    """x' = x + alpha / sqrt(L d) e with e uniform on [-1, 1], each document by its own L."""
    embedding = torch.nn.Embedding(200, WIDTH)
    take_noise(embedding)
    batch = with_noise(batch_of([[100, 25]]), ALPHA)
    with drawing_from(0), noise_of(batch):
        noise = (embedding(batch["input_ids"]) - embedding.weight[batch["input_ids"]]).detach()[0]
    for document, length in ((noise[:100], 100), (noise[100:], 25)):
        bound = ALPHA / math.sqrt(length * WIDTH)
        assert 0.99 * bound < float(document.abs().max()) <= bound * (1 + 1e-4)
        assert float(document.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(float(document.mean())) < 0.05 * bound
    assert torch.equal(embedding(batch["input_ids"])[0], embedding.weight[batch["input_ids"][0]])  # only inside


def test_a_model_that_reads_its_tokens_elsewhere_is_refused() -> None:
    with pytest.raises(ModelError, match="no noise reaches them"), noise_of(with_noise(batch_of([[4]]), ALPHA)):
        pass
