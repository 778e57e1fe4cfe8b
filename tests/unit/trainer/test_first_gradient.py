"""A kind of adapter that learns nothing is seen before step 1, and the look leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from lorafit.contracts import Batch, Example
from lorafit.errors import ModelError, RecipeError
from lorafit.kinds.tasks import tasks
from lorafit.objective import Objective
from lorafit.trainer.startup_proofs import prove_gradients
from tests.support.zoo_models import tiny_config

build_objective = tasks.make("causal-lm").build_objective


def objective(architecture: str, targets: list[str]) -> Objective:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture))
    return build_objective(get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=0.5)))


def row(tokens: int = 12) -> Batch:
    ids = torch.randint(3, 300, (1, tokens), generator=torch.Generator().manual_seed(0))
    index = torch.arange(tokens - 1)
    return Batch(
        {"input_ids": ids, "label_index": index, "label_ids": ids.flatten()[index + 1]}, len(index), (0,), ids.numel()
    )


def test_an_adapter_whose_weight_is_read_past_it_is_refused() -> None:
    """Mamba multiplies by dt_proj's weight itself: PEFT attaches an adapter, and no step would ever move it."""
    with pytest.raises(RecipeError, match=r"the adapters of dt_proj get no gradient.*name others: in_proj"):
        prove_gradients(objective("mamba", ["in_proj", "dt_proj"]), row())


def test_the_look_leaves_nothing_behind() -> None:
    ours = objective("llama", ["q_proj", "down_proj"])
    ours.eval()
    state = torch.get_rng_state()
    prove_gradients(ours, row())
    assert torch.equal(state, torch.get_rng_state()) and not ours.training
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_a_model_that_cannot_train_on_such_rows_is_refused() -> None:
    """Reformer trains on rows of one length alone."""
    with pytest.raises(ModelError, match="ReformerModelWithLMHead cannot take a training step"):
        prove_gradients(objective("reformer", ["value"]), row())


def test_a_bias_of_a_head_that_no_loss_tells_of_is_no_fault() -> None:
    """The same number on both rewards of a pair changes nothing."""
    reward = tasks.make("reward")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(vocab_size=83, **sizes, **reward.model_class.config))
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    pair = Example(0, {"chosen_tokens": [4, 5, 6], "rejected_tokens": [4, 7]}, "d.jsonl", 1)
    prove_gradients(reward.build_objective(get_peft_model(base, config)), reward.collate([[pair]], 0))
