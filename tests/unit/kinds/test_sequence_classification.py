"""Sequence classification: the loss is the model's own, the head is drawn alike and saved, scores are the metrics'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from lorafit.contracts import Encoded, Example, Sample, Silent
from lorafit.errors import DataError
from lorafit.kinds.formats import formats
from lorafit.kinds.metrics import RowScore, metrics
from lorafit.kinds.metrics.calibration_error import bin_of
from lorafit.kinds.tasks import Task, tasks
from lorafit.kinds.tasks._class_tables import reliability
from lorafit.objective.__init__ import prove_objective

SIZES = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NAMES = ["bad", "good", "so-so"]


def task(*, multi_label: bool = False) -> Task[Any]:
    return tasks.make("sequence-classification", labels=NAMES, multi_label=multi_label)


def model(kind: str, settings: Task[Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    config = settings.model_class.padded_with(0).config
    if kind == "bert":
        base = BertForSequenceClassification(BertConfig(**SIZES, hidden_dropout_prob=0.0, **config))
        return get_peft_model(base, LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_key_value_heads=2, **config))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def sample(*labels: str) -> Sample:
    return Sample("rows.jsonl", 1, text="a b c", labels=labels)


def example(settings: Task[Any], index: int, ids: list[int], *labels: str) -> Example:
    row = settings.encode(sample(*labels), lambda _: Encoded(ids, [False] * len(ids)))
    assert row is not None and row.weight == 1
    return Example(index, row.columns, "rows.jsonl", index + 1)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_loss_scores_and_names_are_the_models_own(kind: str, multi_label: bool) -> None:
    settings = task(multi_label=multi_label)
    wrapped = model(kind, settings)
    objective = settings.build_objective(wrapped).eval()
    labels: list[tuple[str, ...]] = [("good",), ("bad", "so-so") if multi_label else ("so-so",), ("bad",)]
    ids = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
    examples = [example(settings, row, ids[row], *labels[row]) for row in range(3)]
    batch = settings.collate([[one] for one in examples], 0)
    prove_objective(objective, batch, Silent())

    alone = torch.cat([wrapped(input_ids=torch.tensor([row])).logits.float() for row in ids])
    flags = torch.tensor([[float(name in row) for name in NAMES] for row in labels])
    if multi_label:
        losses = torch.nn.functional.binary_cross_entropy_with_logits(alone, flags, reduction="none").sum(-1)
        told = alone > 0
    else:
        losses = torch.nn.functional.cross_entropy(alone, flags.argmax(-1), reduction="none")
        told = torch.nn.functional.one_hot(alone.argmax(-1), 3)
    scores = objective.score(batch)
    np.testing.assert_allclose(scores["loss"], losses.detach().numpy(), rtol=1e-5)
    np.testing.assert_array_equal(scores["predicted"], told.numpy())
    np.testing.assert_array_equal(scores["classes"], flags.numpy())
    loss_sum, weight = objective(batch)
    assert weight == 3 and float(loss_sum.detach()) == pytest.approx(float(losses.sum().detach()), rel=1e-5)
    loss_sum.backward()
    assert settings.show(examples[1])[0].label == ", ".join(labels[1])
    named = settings.predict({name: tuple(map(float, np.ravel(values[0]))) for name, values in scores.items()})
    assert named == (", ".join(n for n, on in zip(NAMES, told[0].tolist(), strict=True) if on) or "none of them")


def test_rows_decide_the_labels_where_the_recipe_does_not() -> None:
    fresh = tasks.make("sequence-classification")
    settled = fresh.settle(iter([sample("10"), sample("9"), sample("spam"), sample("9")]))
    assert settled.section.labels == ["9", "10", "spam"] and settled.model_class.config["num_labels"] == 3
    assert task().settle(iter([sample("else")])).section.labels == NAMES
    with pytest.raises(DataError, match="two at least"):
        fresh.settle(iter([sample("spam")]))


@pytest.mark.parametrize("multi_label", [False, True])
def test_classes_without_a_training_row_are_told_and_one_class_alone_is_refused(multi_label: bool) -> None:
    settings = task(multi_label=multi_label)

    def count(*rows: tuple[str, ...]) -> dict[str, int]:
        return dict(
            settings.count_classes(lambda _: iter([np.array([[n in row for n in NAMES]], "u1") for row in rows]))
        )

    whole = count(("good",), ("bad",), ("so-so",))
    assert whole == {"bad": 1, "good": 1, "so-so": 1} and settings.check_classes(whole, 3) == []
    said = settings.check_classes(count(("good",), ("bad",), ("good",)), 3)
    assert said == ["no training row has class so-so; add such rows, or leave it out"]
    with pytest.raises(DataError, match="all 2 training rows have one label, good: there is nothing to tell apart"):
        settings.check_classes(count(("good",), ("good",)), 2)


@pytest.mark.parametrize(
    ("labels", "multi_label", "part"),
    [(("odd",), False, "is none of bad, good, so-so"), (("bad", "good"), False, "has 2 labels"), ((), False, "has 0")],
)
def test_a_row_that_is_of_no_class_is_refused(labels: tuple[str, ...], multi_label: bool, part: str) -> None:
    with pytest.raises(DataError, match=part):
        task(multi_label=multi_label).encode(sample(*labels), lambda _: Encoded([1], [False]))


@pytest.mark.parametrize(("label", "hint"), [("Good", "did you mean good? "), ("0", "")])
def test_an_unknown_label_says_how_labels_are_named(label: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        task().encode(sample(label), lambda _: Encoded([1], [False]))
    assert caught.value.todo == f"{hint}correct it, or name all classes in task.labels as the rows do"


def test_texts_and_labels_are_read() -> None:
    read = formats.get("text_label").read
    assert read({"text": "a", "label": "x"}, "f", 1).labels == ("x",)
    assert read({"text": "a", "label": 3}, "f", 1).labels == ("3",)
    assert read({"text": "a", "label": ["x", "y"]}, "f", 1).labels == ("x", "y")
    assert read({"text": "a", "label": True}, "f", 1).labels == ("true",)
    assert read({"text": "a", "label": 2.0}, "f", 1).labels == ("2",), "a column of numbers that lacks some, in parquet"
    assert read({"text": "a", "text_pair": "b", "label": "x"}, "f", 1).text_pair == "b"
    with pytest.raises(DataError, match=r"found number 2\.5"):
        read({"text": "a", "label": 2.5}, "f", 1)
    for wrong in ({"text": "a", "label": None}, {"text": "a", "label": ""}, {"text": "a", "label": ["x", "x"]}):
        with pytest.raises(DataError):
            read(wrong, "f", 1)


def test_accuracy_and_macro_f1_are_those_of_a_confusion_table() -> None:
    """By hand: class 0 is right 2 of 3 times and given 3 times, class 1 right 1 of 2 and given 2; class 2 never."""
    wanted, given = [0, 0, 0, 1, 1], [0, 0, 1, 1, 0]
    flags = np.eye(3)
    rows = [
        RowScore({"classes": tuple(flags[w]), "predicted": tuple(flags[g]), "weight": (1.0,), "loss": (0.0,)})
        for w, g in zip(wanted, given, strict=True)
    ]

    def value(name: str) -> float:
        kind = metrics.get(name)
        return kind.values(np.asarray(kind.row_sums(rows)).sum(axis=0).tolist())[name]

    assert value("accuracy") == pytest.approx(3 / 5)
    assert value("macro_f1") == pytest.approx((4 / 6 + 2 / 4) / 2)


def test_calibration_error_is_that_of_the_paper() -> None:
    """By hand: four rows said with 0.9 of which three are right, one row said with 0.5 and right."""
    rows = [
        RowScore({"confidence": (said,), "predicted": (1.0, 0.0), "classes": (right, 1 - right), "weight": (1.0,)})
        for said, right in [(0.9, 1.0), (0.9, 1.0), (0.9, 1.0), (0.9, 0.0), (0.5, 1.0)]
    ]
    metric = metrics.get("calibration_error")
    sums = np.asarray(metric.row_sums(rows)).sum(axis=0).tolist()
    assert metric.values(sums)["calibration_error"] == pytest.approx((4 * abs(0.9 - 0.75) + abs(0.5 - 1.0)) / 5)
    assert [bin_of(share) for share in (0.0, 1 / 15, 0.0667, 0.99, 1.0)] == [0, 0, 1, 14, 14]


def test_one_label_is_told_with_its_probability_and_several_are_not() -> None:
    settings = task()
    objective = settings.build_objective(model("bert", settings)).eval()
    batch = settings.collate([[example(settings, 0, [5, 6, 7], "good")]], 0)
    said = objective.score(batch)["confidence"]
    assert float(said[0]) == pytest.approx(float(objective.logits(batch).softmax(-1).max().detach()), rel=1e-6)
    assert settings.can_score("calibration_error") and not task(multi_label=True).can_score("calibration_error")
    right = {"confidence": (0.97,), "predicted": (1.0,), "classes": (1.0,)}
    rows = [right, {**right, "confidence": (0.91,), "predicted": (0.0,)}]
    (line,) = reliability(rows).lines
    assert line[:4] == ("90 to 100 %", 2, pytest.approx(0.94), 0.5) and line[4] == "█" * 10


@pytest.mark.parametrize("multi_label", [False, True])
def test_balanced_classes_count_alike(multi_label: bool) -> None:
    rows = [("bad",)] * 6 + [("good",)] * 3 + [("so-so",)]
    settings: Any = tasks.make("sequence-classification", multi_label=multi_label, class_weights="balanced")
    settled = settings.settle([sample(*labels) for labels in rows])
    wanted = [4 / 6, 7 / 3, 9 / 1] if multi_label else [10 / 18, 10 / 9, 10 / 3]
    assert settled.labels == NAMES and settled.section.class_weights == pytest.approx(wanted)
    objective = settled.build_objective(model("bert", settled)).eval()
    labels = [("bad", "so-so") if multi_label else ("bad",), ("so-so",), ("good",)]
    batch = settled.collate([[example(settled, n, [5 + n, 6, 7], *names)] for n, names in enumerate(labels)], 0)
    inputs, weights = {name: batch[name] for name in ("input_ids", "attention_mask")}, torch.tensor(wanted)
    logits = objective.model(**inputs).logits
    if multi_label:
        flags = torch.tensor([[float(name in row) for name in NAMES] for row in labels])
        own = torch.nn.functional.binary_cross_entropy_with_logits(logits, flags, pos_weight=weights, reduction="sum")
    else:
        right = torch.tensor([NAMES.index(row[0]) for row in labels])
        own = torch.nn.functional.cross_entropy(logits, right, weight=weights, reduction="sum")
    assert float(objective(batch).loss_sum.detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    plain = task(multi_label=multi_label).build_objective(objective.model).eval()
    np.testing.assert_allclose(objective.score(batch)["loss"], plain.score(batch)["loss"])
    given = tasks.make("sequence-classification", labels=NAMES, class_weights=[1.0, 2.0, 3.0])
    assert given.settle([]) is given
    with pytest.raises(ValueError, match=r"in the order of task\.labels, which is not set"):
        tasks.make("sequence-classification", class_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="1 value for 3 classes that are named"):
        tasks.make("sequence-classification", class_weights=[1.0], labels=NAMES)
