"""A head that begins fitted gives what the regression over what it reads gives, whatever kind of head it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lorafit.contracts import Batch, Encoded, Example, Sample, Silent
from lorafit.errors import ModelError
from lorafit.kinds.adapters import adapters
from lorafit.kinds.tasks import Task, tasks
from lorafit.model.attach import attach_adapter
from lorafit.objective import Objective

SIZES = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BUILDERS: dict[str, tuple[Any, Any, str, str]] = {
    "bert": (BertForSequenceClassification, BertConfig, "query", "classifier"),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, "query", "classifier"),
    "llama": (LlamaForSequenceClassification, LlamaConfig, "q_proj", "score"),
}


def objective_of(kind: str, task: Task[Any]) -> Objective:
    torch.manual_seed(0)
    build, config, target, head = BUILDERS[kind.removesuffix(" with a prompt")]
    made = build(config(**SIZES, initializer_range=0.3, **task.model_class.padded_with(1).config))
    if "prompt" in kind:
        prompt = adapters.make_section("prompt_tuning", tokens=3)
        return task.build_objective(attach_adapter(made, prompt, 0, model_class=task.model_class)).eval()
    adapted = get_peft_model(made, LoraConfig(target_modules=[target], modules_to_save=[head]))
    return task.build_objective(adapted).eval()


def batches(task: Task[Any], samples: list[Sample]) -> list[Batch]:
    """Rows whose second token tells what is wanted of them, of different lengths."""
    examples = []
    for number, sample in enumerate(samples):
        ids = [5, 20 + number % 3, *range(40, 42 + number % 4), 20 + number % 3]
        row = task.encode(sample, lambda _, ids=ids: Encoded(ids, [False] * len(ids)))
        assert row is not None
        examples.append(Example(number, row.columns, "r", number + 1))
    return [task.collate([[one] for one in examples[start : start + 5]], 1) for start in range(0, len(examples), 5)]


def mean_loss(objective: Objective, rows: list[Batch]) -> float:
    return sum(float(objective.score(batch)["loss"].sum()) for batch in rows) / sum(len(batch.rows) for batch in rows)


@pytest.mark.parametrize("kind", [*BUILDERS, "llama with a prompt"])
def test_a_classifier_begins_right_on_rows_that_a_line_parts(kind: str) -> None:
    task: Any = tasks.make("sequence-classification", labels=["a", "b", "c"], head="fitted")
    assert task.starts_head and not tasks.make("sequence-classification").starts_head
    rows = batches(task, [Sample("r", 1, text="x", labels=("abc"[n % 3],)) for n in range(30)])
    objective = objective_of(kind, task)
    before = mean_loss(objective, rows)
    others = {name: value.clone() for name, value in objective.state_dict().items() if "modules_to_save" not in name}
    task.start_head(objective, rows, rows, Silent())
    assert mean_loss(objective, rows) < 0.1 < before
    for batch in rows:
        scores = objective.score(batch)
        assert (scores["predicted"] == scores["classes"]).all()
    assert all(torch.equal(value, objective.state_dict()[name]) for name, value in others.items())


def test_a_regression_begins_at_the_least_squares() -> None:
    task: Any = tasks.make("sequence-regression", outputs=["one", "two"], head="fitted")
    rows = batches(task, [Sample("r", 1, text="x", numbers=(100.0 + n % 3, -float(n % 3))) for n in range(30)])
    objective = objective_of("bert", task)
    task.start_head(objective, rows, None, Silent())
    assert mean_loss(objective, rows) < 0.05


def test_a_head_without_such_a_linear_is_refused() -> None:
    task: Any = tasks.make("sequence-classification", labels=["a", "b", "c"], head="fitted")
    other = objective_of("bert", tasks.make("sequence-classification", labels=["a", "b"]))
    with pytest.raises(ModelError, match="no linear layer that could be fitted"):
        task.start_head(other, [], None, Silent())
