"""Sequence regression: the loss is the model's own, scores and metrics are what their names say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from lorafit.contracts import Encoded, Example, Sample, Silent
from lorafit.errors import DataError
from lorafit.kinds.formats import formats
from lorafit.kinds.metrics import RowScore, metrics
from lorafit.kinds.tasks import Task, tasks
from lorafit.objective.__init__ import prove_objective
from lorafit.ops.ridge_regression import STRENGTHS, fit_ridge

SIZES = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]


def model(kind: str, settings: Task[Any]) -> Any:
    torch.manual_seed(0)
    config = settings.model_class.padded_with(0).config
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SIZES, hidden_dropout_prob=0.0, **config)).eval()
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_key_value_heads=2, **config)).eval()


def example(settings: Task[Any], index: int, numbers: tuple[float, ...], types: list[int] | None = None) -> Example:
    ids = IDS[index]
    sample = Sample("rows.jsonl", 1, text="a", numbers=numbers)
    row = settings.encode(sample, lambda _: Encoded(ids, [False] * len(ids), types=types or ()))
    assert row is not None and row.weight == 1
    return Example(index, row.columns, "rows.jsonl", index + 1)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("outputs", [["score"], ["tone", "length"]])
def test_loss_and_scores_are_the_models_own(kind: str, outputs: list[str]) -> None:
    settings = tasks.make("sequence-regression", outputs=outputs)
    wrapped = model(kind, settings)
    objective = settings.build_objective(wrapped).eval()
    wanted = torch.tensor([[2.5, 0.5], [-1.0, 3.0], [4.0, 0.0]])[:, : len(outputs)]
    examples = [example(settings, row, tuple(wanted[row].tolist())) for row in range(3)]
    batch = settings.collate([[one] for one in examples], 0)
    prove_objective(objective, batch, Silent())

    alone = torch.cat([wrapped(input_ids=torch.tensor([row])).logits.float() for row in IDS])
    labels = wanted if len(outputs) > 1 else wanted[:, 0]
    own = torch.stack(
        [wrapped(input_ids=torch.tensor([ids]), labels=labels[row : row + 1]).loss for row, ids in enumerate(IDS)]
    )
    scores = objective.score(batch)
    np.testing.assert_allclose(scores["loss"], own.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(scores["predicted_numbers"], alone.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(scores["absolute_error"], (alone - wanted).abs().mean(-1).detach().numpy(), rtol=1e-5)
    np.testing.assert_array_equal(scores["right_numbers"], wanted.numpy())
    loss_sum, weight = objective(batch)
    assert weight == 3 and float(loss_sum.detach()) == pytest.approx(float(own.sum().detach()), rel=1e-5)
    told = settings.label(objective, batch)
    assert [list(row["values"]) for row in told] == [outputs] * 3
    assert list(told[1]["values"].values()) == pytest.approx(alone[1].tolist(), rel=1e-5)
    shown = settings.show(examples[0])[0].label
    assert shown == ("2.5" if len(outputs) == 1 else "tone 2.5, length 0.5")


def test_the_second_text_of_a_pair_has_a_token_type_of_its_own() -> None:
    settings = tasks.make("sequence-regression")
    wrapped = model("bert", settings)
    examples = [example(settings, 0, (1.0,), [0, 0, 1, 1]), example(settings, 2, (1.0,))]
    batch = settings.collate([[one] for one in examples], 0)
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1, 0, 0], [0] * 6]
    found = settings.logits(settings.build_objective(wrapped), batch)[:, 0]
    typed = wrapped(input_ids=torch.tensor([IDS[0]]), token_type_ids=torch.tensor([[0, 0, 1, 1]])).logits
    untyped = wrapped(input_ids=torch.tensor([IDS[0]])).logits
    assert float(found[0].detach()) == pytest.approx(float(typed.detach()), rel=1e-5)
    assert float(typed.detach()) != pytest.approx(float(untyped.detach()))
    assert "token_type_ids" not in settings.collate([[examples[1]]], 0).tensors


def test_where_a_text_was_cut_is_known_of_its_row() -> None:
    settings = tasks.make("sequence-regression", long_texts="both")
    assert settings.keeps == "both"
    for cut in (0, 2, 4):
        encoded = Encoded(IDS[0], [False] * 4, is_cut=True, cuts=(cut,))
        row = settings.encode(Sample("r", 1, text="a", numbers=(1.0,)), lambda _, made=encoded: made)
        assert row is not None and settings.show(Example(0, row.columns, "r", 1))[0].cuts == (cut,)


@pytest.mark.parametrize(("numbers", "part"), [((), "has 0 numbers for 1 outputs"), ((1.0, 2.0), "has 2 numbers")])
def test_a_row_with_another_number_of_numbers_is_refused(numbers: tuple[float, ...], part: str) -> None:
    settings = tasks.make("sequence-regression")
    with pytest.raises(DataError, match=part):
        settings.encode(Sample("r", 1, text="a", numbers=numbers), lambda _: Encoded([1], [False]))
    with pytest.raises(DataError, match="no text with a number"):
        settings.encode(Sample("r", 1, text="a", labels=("x",)), lambda _: Encoded([1], [False]))
    with pytest.raises(ValueError, match="none of file, line"):
        tasks.make("sequence-regression", outputs=["text"])


def test_numbers_are_read_from_rows_and_from_cells() -> None:
    read = formats.get("text_score").read
    assert read({"text": "a", "score": 3}, "f", 1).numbers == (3.0,)
    assert read({"text": "a", "score": "2.5", "text_pair": "b"}, "f", 1).text_pair == "b"
    assert read({"text": "a", "score": "[1, -2.5]", "text_pair": None}, "f", 1).numbers == (1.0, -2.5)
    for wrong in ("good", None, True, float("nan"), [1, "x"], [[1]]):
        with pytest.raises(DataError, match="expected a number"):
            read({"text": "a", "score": wrong}, "f", 1)
    with pytest.raises(DataError, match=r"list of them, found nan$"):
        read({"text": "a", "score": "nan"}, "f", 1)
    with pytest.raises(DataError, match=r"found string '3,5'; write 3\.5, with a decimal point"):
        read({"text": "a", "score": "3,5"}, "f", 1)
    with pytest.raises(DataError, match="missing field 'score'"):
        read({"text": "a"}, "f", 1)


def value_of(name: str, predicted: list[Any], right: list[Any]) -> dict[str, float]:
    rows = []
    for one, other in zip(np.array(predicted, float), np.array(right, float), strict=True):
        errors = np.atleast_1d(one - other)
        sums = {"squared_error": (float((errors**2).mean()),), "absolute_error": (float(abs(errors).mean()),)}
        numbers = {"predicted_numbers": tuple(np.atleast_1d(one)), "right_numbers": tuple(np.atleast_1d(other))}
        rows.append(RowScore({**sums, **numbers, "weight": (1.0,)}))
    metric = metrics.get(name)
    return metric.values(np.asarray(metric.row_sums(rows)).sum(axis=0).tolist())


def test_metrics_are_those_of_their_definitions() -> None:
    predicted, right = [1.0, 2.0, 4.0, 7.0], [1.5, 2.0, 2.0, 9.0]
    assert value_of("mse", predicted, right) == pytest.approx({"mse": 8.25 / 4, "rmse": (8.25 / 4) ** 0.5})
    assert value_of("mae", predicted, right) == pytest.approx({"mae": 4.5 / 4})
    wanted = np.corrcoef(predicted, right)[0, 1]
    assert value_of("pearson", predicted, right)["pearson"] == pytest.approx(wanted, rel=1e-12)
    far = [[1e9 + value for value in column] for column in (predicted, right)]
    assert value_of("pearson", *far)["pearson"] == pytest.approx(wanted, rel=1e-6)
    # ranks 1 2 3 4 beside 1 2.5 2.5 4: 1 - 6 sum d^2 / n (n^2 - 1), corrected for the tie
    ranks = np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1]
    assert value_of("spearman", predicted, right)["spearman"] == pytest.approx(ranks, rel=1e-12)
    both = value_of("pearson", [[a, -a] for a in predicted], [[b, b] for b in right])["pearson"]
    assert both == pytest.approx(0.0, abs=1e-12)
    assert value_of("pearson", [3.0, 3.0, 3.0], [1.0, 2.0, 3.0])["pearson"] == 0.0


@pytest.mark.parametrize("held_out", [False, True])
def test_the_bases_ridge_regression_is_the_minimum(held_out: bool) -> None:
    """Of a line with noise: the derivative of its own loss is 0 at the strength it chose, on standardised columns."""
    torch.manual_seed(0)
    states = torch.randn(200, 5, dtype=torch.float64) * torch.tensor([1, 3, 0.1, 1, 1]) + 2
    right = states @ torch.tensor([[1.0, 0.5, 8.0, 0.0, -1.0], [0.0, 1.0, 0.0, 2.0, 0.0]]).double().T + 4
    right += 0.1 * torch.randn_like(right)
    chosen = (states[:50], right[:50]) if held_out else None
    fitted = fit_ridge(states, right, chosen)
    weight, bias = torch.from_numpy(fitted["weight"]), torch.from_numpy(fitted["bias"])
    assert float((states @ weight.T + bias - right).square().mean()) < 0.02
    assert fitted["strength"][0] in STRENGTHS and fitted["strength"][0] <= 0.01
    x, y = (states - states.mean(0)) / states.std(0, correction=0), (right - right.mean(0)) / right.std(0, correction=0)
    scaled = weight * states.std(0, correction=0) / right.std(0, correction=0)[:, None]
    slope = (x @ scaled.T - y).T @ x / len(x) + float(fitted["strength"][0]) * scaled
    assert float(slope.abs().max()) < 1e-9
