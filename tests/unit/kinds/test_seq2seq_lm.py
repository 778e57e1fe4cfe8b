"""Sequence to sequence: rows, batches, and the loss of each family against the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lorafit.contracts import Encoded, Example, Sample, Silent
from lorafit.data.source_target import SourceTarget
from lorafit.errors import DataError, ModelError
from lorafit.kinds.row_limits import TwoTexts
from lorafit.kinds.tasks import tasks
from lorafit.objective import prove_objective
from tests.support.tiny_seq2seq import FAMILIES, make_language_tokenizer, make_tokenizer, tiny_seq2seq

TASK = tasks.make("seq2seq-lm")
RULES = TwoTexts("", 64)


def example(index: int, source: Sequence[int], target: Sequence[int]) -> Example:
    return Example(index, {"source": source, "target": target}, "d.jsonl", index + 1)


ROWS = [
    example(0, [5, 6, 7, 8, 1], [9, 10, 1]),
    example(1, [11, 1], [12, 13, 14, 15, 1]),
    example(2, [16, 17, 1], [18, 1]),
]


def own_loss(model: Any, row: Example) -> float:
    """The model's own, of a row alone, summed over its labels."""
    source, target = (torch.tensor([list(row[side])]) for side in ("source", "target"))
    with torch.no_grad():
        loss = model(input_ids=source, attention_mask=torch.ones_like(source), labels=target).loss
    return float(loss) * target.numel()


@pytest.mark.parametrize("family", [*FAMILIES, "mt5", "m2m_100"])
def test_a_padded_batch_has_the_losses_that_the_model_gives_of_each_row_alone(family: str) -> None:
    untied = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"} if family == "mt5" else {}
    model = tiny_seq2seq(family, **untied).eval()
    expected = [own_loss(model, row) for row in ROWS]
    batch = TASK.collate([[row] for row in ROWS], 0)
    for exact in (False, True):
        objective = TASK.build_objective(model, exact=exact)
        assert objective.exact is exact
        found = objective.score(batch)
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
        assert found["weight"].tolist() == [3, 5, 2]
        reporter = Silent()
        prove_objective(objective, batch, reporter)
        assert (objective.exact, reporter.warnings) == (exact, [])
        assert float(objective(batch).loss_sum.detach()) == pytest.approx(sum(expected), rel=1e-5)


def test_the_decoder_reads_its_start_token_and_then_the_target() -> None:
    from lorafit.objective.next_token import _inputs

    batch = TASK.collate([[row] for row in ROWS], 0)
    for family, begins in {
        "t5": [0, 0, 0],
        "bart": [1, 1, 1],
        "mbart": [1, 1, 1],
        "encoder-decoder": [2, 2, 2],
    }.items():
        read = _inputs(TASK.build_objective(tiny_seq2seq(family)), batch)["decoder_input_ids"]
        assert read[:, 0].tolist() == begins  # mBART's is the target's last token, which names its language there
        assert read[1, 1:].tolist() == [12, 13, 14, 15] and read[0, 1:3].tolist() == [9, 10]


def test_a_wrong_shift_is_no_way_past_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.errors import NumericsError

    model = tiny_seq2seq("t5").eval()
    monkeypatch.setattr(model, "prepare_decoder_input_ids_from_labels", lambda labels: labels.clamp(min=0))
    with pytest.raises(NumericsError, match="not the model's own"):
        prove_objective(TASK.build_objective(model), TASK.collate([[ROWS[0]]], 0), Silent())


def test_a_model_without_a_start_token_is_refused() -> None:
    model = tiny_seq2seq("t5", decoder_start_token_id=None)
    with pytest.raises(ModelError, match="says not how targets begin"):
        prove_objective(TASK.build_objective(model), TASK.collate([[ROWS[0]]], 0), Silent())


def test_a_model_that_predicts_several_tokens_at_once_is_refused() -> None:
    from transformers import ProphetNetConfig, ProphetNetForConditionalGeneration

    sides = {f"num_{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 2}
    sizes = {"vocab_size": 32, "hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = ProphetNetForConditionalGeneration(ProphetNetConfig(max_position_embeddings=32, **sizes, **sides, **ends))
    with pytest.raises(ModelError, match="something else than one token"):
        prove_objective(TASK.build_objective(model.eval()), TASK.collate([[ROWS[0]]], 0), Silent())


def test_padding_is_known_by_length() -> None:
    """A pad token inside of a text is a token like others."""
    rows = [example(0, [5, 0, 7, 0], [9, 0]), example(1, [5, 6, 7, 8, 9, 1], [9, 10, 11, 1])]
    batch = TASK.collate([[row] for row in rows], 0)
    assert batch["attention_mask"].sum(1).tolist() == [4, 6]
    assert batch["decoder_labels"].tolist() == [[9, 0, -100, -100], [9, 10, 11, 1]]
    assert batch["label_ids"].tolist() == [9, 0, 9, 10, 11, 1] and batch.weight == 6
    assert batch.padded_tokens == 2 * (6 + 4) and batch.tokens == 4 + 2 + 6 + 4


def test_both_sides_are_what_the_tokenizer_itself_makes() -> None:
    for tokenizer, rules in (
        (make_tokenizer(), RULES),
        (make_language_tokenizer(), TwoTexts("", 64, "en_XX", "de_DE")),
        (byte_tokenizer(), RULES),
    ):
        found = SourceTarget(tokenizer, rules).encode(Sample("d", 1, prompt="red mug", completion="blue"))
        whole = tokenizer("red mug", text_target="blue")
        assert found.input_ids == [*whole["input_ids"], *whole["labels"]]
        assert found.trained == [False] * len(whole["input_ids"]) + [True] * len(whole["labels"])


def byte_tokenizer() -> Any:
    """One that no tokenizers library backs."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def test_a_prefix_stands_before_sources() -> None:
    tokenizer = make_tokenizer()
    found = SourceTarget(tokenizer, TwoTexts("sum: ", 64))
    assert found.source("red mug", 64).input_ids == tokenizer("sum: red mug")["input_ids"]


def test_cut_sides_keep_what_stands_around_them_but_for_the_targets_end() -> None:
    tokenizer = make_tokenizer()
    sample = Sample("d", 1, prompt="red blue mug", completion="one two three")
    whole = SourceTarget(tokenizer, TwoTexts("", 64)).encode(sample)
    cut = SourceTarget(tokenizer, TwoTexts("", 4)).encode(sample, 4)
    source, target = (
        [i for i, flag in zip(each.input_ids, each.trained, strict=True) if not flag] for each in (whole, cut)
    )
    assert target == [*source[:3], 1] and cut.is_cut
    labels = [i for i, flag in zip(cut.input_ids, cut.trained, strict=True) if flag]
    assert len(labels) == 4 and 1 not in labels
    assert SourceTarget(tokenizer, TwoTexts("", 64)).encode(sample, 64) == whole


def test_languages_and_tokenizer_must_agree() -> None:
    for tokenizer, rules, said in (
        (make_tokenizer(), TwoTexts("", 64, "en_XX", "de_DE"), "writes no languages"),
        (make_language_tokenizer(), RULES, "writes the language of each text"),
        (make_language_tokenizer(), TwoTexts("", 64, "en_XX", "xx"), "knows no language 'xx'"),
    ):
        with pytest.raises(ModelError, match=said):
            SourceTarget(tokenizer, rules)


def test_rows_are_refused_that_have_no_target() -> None:
    apart = SourceTarget(make_tokenizer(), RULES)
    for sample in (Sample("d", 1, text="a"), Sample("d", 1, text="a", labels=("x",)), Sample("d", 1, messages=())):
        with pytest.raises(DataError, match="no source with a target"):
            apart.encode(sample)


def test_each_side_has_a_limit_that_says_its_name() -> None:
    task = tasks.make("seq2seq-lm", max_target_length=3)
    row = task.encode(Sample("d", 1), lambda _: Encoded([1] * 9 + [2] * 4, [False] * 9 + [True] * 4))
    assert row is not None and (row.tokens, row.weight) == (13, 4)
    said = [limit.excess(row) for limit in task.limits(8)]
    assert said == ["source of 9 tokens, max_length is 8", "target of 4 tokens, max_target_length is 3"]
    assert [limit.excess(row) for limit in task.limits(9)] == ["", said[1]]
