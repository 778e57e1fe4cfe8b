"""Token classification: labels stand at words' first tokens, the loss is the model's own, entities are seqeval's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForTokenClassification

from lorafit.contracts import Encoded, Example, Sample, Silent
from lorafit.data.plain_text import PlainText
from lorafit.errors import DataError
from lorafit.kinds.formats import formats
from lorafit.kinds.metrics import RowScore, metrics
from lorafit.kinds.tasks import Task, tasks
from lorafit.kinds.tasks.token_classification import find_entities
from lorafit.objective import prove_objective
from tests.support.tiny_model import make_tokenizer

SIZES = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def make_task() -> Task[Any]:
    return tasks.make("token-classification", labels=LABELS)


def make_model(kind: str, task: Task[Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    config = task.model_class.padded_with(0).config
    if kind == "bert":
        sizes = {**SIZES, "hidden_dropout_prob": 0.0}
        base: Any = BertForTokenClassification(BertConfig(**sizes, **config))
        return get_peft_model(base, LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    base = LlamaForTokenClassification(LlamaConfig(**SIZES, num_key_value_heads=2, **config))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def make_row(task: Task[Any], index: int, ids: list[int], first: list[int], *labels: str) -> Example:
    sample = Sample("d.jsonl", 1, text="x", words=("x",) * len(labels), labels=labels)
    row = task.encode(sample, lambda _: Encoded(ids, [place in first for place in range(len(ids))]))
    assert row is not None and row.weight == len(first)
    return Example(index, row.columns, "d.jsonl", index + 1)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_loss_and_scores_are_the_models_own(kind: str) -> None:
    task = make_task()
    model = make_model(kind, task)
    objective = task.build_objective(model).eval()
    rows = [
        make_row(task, 0, [5, 6, 7, 8], [1, 3], "B-PER", "O"),
        make_row(task, 1, [9, 10, 11, 12, 13, 14], [0, 1, 2, 5], "O", "B-LOC", "I-LOC", "O"),
        make_row(task, 2, [15, 16], [1], "I-PER"),
    ]
    batch = task.collate([[row] for row in rows], 0)
    prove_objective(objective, batch, Silent())
    losses = []
    for row in rows:
        labels = torch.tensor([[label if label >= 0 else -100 for label in row["labels"]]])
        own = model(input_ids=torch.tensor([list(row["tokens"])]), labels=labels).loss
        losses.append(own * (labels >= 0).sum())
    wanted = torch.stack(losses)
    found = objective(batch)
    assert found.weight == batch.weight == 7
    torch.testing.assert_close(found.loss_sum, wanted.sum(), rtol=1e-5, atol=1e-6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, trained) for loss in (found.loss_sum, wanted.sum()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5 * float(other.abs().max()))
    scores = objective.score(batch)
    np.testing.assert_allclose(scores["loss"], wanted.detach().numpy(), rtol=1e-5)
    assert scores["weight"].tolist() == [2.0, 4.0, 1.0]
    assert scores["entities"][:, 2::3].tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]  # LOC, PER
    assert task.show(rows[1])[0].label == "O B-LOC I-LOC O"
    assert task.show(rows[1])[0].trained == [1, 1, 1, 0, 0, 1]


# What seqeval 1.2.2's get_entities gives, its last word taken in.
@pytest.mark.parametrize(
    ("labels", "entities"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("I-PER I-PER B-PER I-LOC", [("PER", 0, 1), ("PER", 2, 2), ("LOC", 3, 3)]),
        ("O O", []),
        ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
        ("B-X I-X E-X S-Y S-Y O I-X E-X E-X", [("X", 0, 2), ("Y", 3, 3), ("Y", 4, 4), ("X", 6, 7), ("X", 8, 8)]),
        ("B-date-time I-date-time", [("date-time", 0, 1)]),
    ],
)
def test_entities_are_seqevals(labels: str, entities: list[tuple[str, int, int]]) -> None:
    assert [(one.type, one.first, one.behind - 1) for one in find_entities(labels.split())] == entities


def test_f1_is_over_all_entities() -> None:
    metric = metrics.get("entity_f1")
    scored = {"entities": (1.0, 2.0, 1.0, 0.0, 0.0, 2.0), "weight": (5.0,), "entity_types": (2.0,)}
    rows = [RowScore(scored), RowScore({**scored, "entity_types": (0.0,)})]  # labels that tell of no entities
    usable = [row for row in rows if metric.usable(row)]
    sums = np.sum(metric.row_sums(usable), axis=0).tolist()
    assert metric.values(sums) == {"entity_f1": 2 / 5, "precision": 1 / 2, "recall": 1 / 3}
    assert set(metric.values([0.0, 0.0, 0.0]).values()) == {0.0}


def test_labels_stand_at_the_first_tokens_of_words() -> None:
    tokenizer = make_tokenizer()
    words = ("the", "shop", "opens,", "antidisestablishmentarianism", "née", "nine")
    encoded = PlainText(tokenizer).labelled(Sample("", 0, words=words), 999)
    places = [place for place, is_first in enumerate(encoded.trained) if is_first] + [len(encoded.input_ids)]
    ids = encoded.input_ids
    pieces = [tokenizer.decode(ids[begin:end]).strip() for begin, end in pairwise(places)]
    assert tuple(pieces) == words and not encoded.is_cut
    cut = PlainText(tokenizer).labelled(Sample("", 0, words=words), places[3])
    assert sum(cut.trained) == 3 and cut.is_cut
    task = tasks.make("token-classification", labels=["O", "X"])
    row = task.encode(Sample("", 0, words=words, labels=("O", "X", "O", "X", "O", "X")), lambda _: cut)
    assert row is not None and row.weight == 3 and [one for one in row.columns["labels"] if one >= 0] == [0, 1, 0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"words": ["a", "b"], "labels": ["O"]}, "1 labels for 2 words"),
        ({"words": ["a", " "], "labels": ["O", "O"]}, "word 2 is blank"),
        ({"words": ["a", 3], "labels": ["O", "O"]}, "list of strings"),
        ({"words": [], "labels": []}, "is empty"),
        ({"words": ["a"], "labels": [None]}, "names or numbers of labels"),
        ({"words": "a b", "labels": ["O"]}, "list"),
        ({"words": ["a"]}, "missing field 'labels'"),
    ],
)
def test_bad_rows_say_what_is_wrong(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        formats.get("word_labels").read(row, "d.jsonl", 1)


def test_labels_are_names_or_the_numbers_that_the_recipe_names() -> None:
    read = formats.get("word_labels").read({"words": '["a", "b"]', "labels": [0, 2]}, "d.csv", 1)
    assert read.words == ("a", "b") and read.labels == ("0", "2")
    render = lambda _: Encoded([3, 4], [True, True])  # noqa: E731
    row = make_task().encode(read, render)
    assert row is not None and row.columns["labels"] == [0, 2]
    settled: Any = tasks.make("token-classification").settle([Sample("", 0, labels=("I-X", "O", "B-X"))])
    assert settled.labels == ["O", "B-X", "I-X"] and settled.types == ["X"]
    with pytest.raises(DataError, match=r"label 'B-PERS' is none of O, B-PER.*"):
        make_task().encode(Sample("", 0, words=("a", "b"), labels=("B-PERS", "O")), render)
