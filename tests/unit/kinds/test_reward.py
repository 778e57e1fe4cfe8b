"""A reward model against the paper's equation over transformers' own rewards of each text alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from lorafit.contracts import Encoded, Example, Sample, Silent
from lorafit.kinds.tasks import Task, tasks
from lorafit.objective import prove_objective
from tests.support.pairs import SIDES

PAD = 0
SIZES = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_model(kind: str, task: Task[Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    config = task.model_class.padded_with(PAD).config
    if kind == "bert":
        base = BertForSequenceClassification(BertConfig(**SIZES, hidden_dropout_prob=0.0, **config))
        return get_peft_model(base, LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_key_value_heads=2, **config))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def make_pair(task: Task[Any], index: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> Example:
    answers = {"good": chosen, "bad": rejected}

    def render(sample: Sample) -> Encoded:
        answer = answers[str(sample.completion)]
        return Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    whole = Sample("d.jsonl", 1, prompt="p", completion="good", rejected=Sample("d.jsonl", 1, completion="bad"))
    row = task.encode(whole, render)
    assert row is not None and row.weight == 1
    return Example(index, row.columns, "d.jsonl", index + 1)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("centering", [0.0, 0.3])
def test_loss_gradient_and_scores_are_those_of_the_paper(kind: str, centering: float) -> None:
    task = tasks.make("reward", centering=centering)
    model = make_model(kind, task)
    objective = task.build_objective(model).eval()
    pairs = [
        make_pair(task, 0, [5, 6], [7, 8], [9, 10, 11, 12]),
        make_pair(task, 1, [13], [14, 15, 16], [17]),
        make_pair(task, 2, [18, 19, 20], [21], [22, 23]),
    ]
    batch = task.collate([[pair] for pair in pairs], PAD)
    prove_objective(objective, batch, Silent())
    alone = torch.stack(
        [torch.cat([model(input_ids=torch.tensor([list(p[f"{s}_tokens"])])).logits[0] for s in SIDES]) for p in pairs]
    )
    margins = alone[:, 0] - alone[:, 1]
    wanted = -functional.logsigmoid(margins) + centering * (alone[:, 0] + alone[:, 1]) ** 2
    loss = objective(batch)
    assert loss.weight == 3
    torch.testing.assert_close(loss.loss_sum, wanted.sum(), rtol=1e-5, atol=1e-6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = (torch.autograd.grad(value, trained) for value in (loss.loss_sum, wanted.sum()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5 * float(other.abs().max()))
    scores = objective.score(batch)
    np.testing.assert_allclose(scores["margin"], margins.detach().numpy(), rtol=1e-4, atol=1e-6)
    assert scores["preferred"].tolist() == (margins > 0).tolist()
    cut = [objective(task.collate([[pair]], PAD)).loss_sum.item() for pair in pairs]
    assert sum(cut) == pytest.approx(loss.loss_sum.item(), rel=1e-5)


def test_a_pair_has_the_shape_that_memory_is_told() -> None:
    task = tasks.make("reward")
    batch = task.collate([[make_pair(task, 0, [5, 6], [7, 8], [9, 10, 11, 12])]], PAD)
    shaped = task.shape_batch(1, task.row_tokens(6), 0, packed=False)
    assert {name: each.shape for name, each in shaped.tensors.items()} == {
        name: each.shape for name, each in batch.tensors.items()
    }


def test_the_bases_head_is_fitted_to_which_answer_was_chosen() -> None:
    """Token 40 is in each chosen answer: a direction of the frozen states says so for pairs that were not fitted."""
    task = tasks.make("reward")
    objective = task.build_objective(make_model("llama", task)).eval()
    drawn = np.random.default_rng(0)

    def batches(count: int) -> list[Any]:
        rows = [drawn.integers(41, 80, (3, 4)).tolist() for _ in range(count)]
        pairs = [make_pair(task, i, a, [40, 40, *b], c) for i, (a, b, c) in enumerate(rows)]
        return [task.collate([[pair] for pair in pairs], PAD)]

    with torch.no_grad():
        fitted = task.fit_base(objective, batches(40), None, Silent())
        scores = task.score_base(objective, batches(40)[0], fitted)
    assert scores["preferred"].mean() > 0.9
