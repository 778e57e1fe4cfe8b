"""Looking at a model leaves it exactly as it was, NF4 weights included."""

from __future__ import annotations

import random
import types

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MambaConfig, MambaForCausalLM

from lorafit.answering.engine import Engine
from lorafit.answering.sampling import Sampling
from lorafit.contracts import Silent
from lorafit.evaluation.during import evaluate_during
from lorafit.evaluation.runner import evaluate_pair
from lorafit.kinds.tasks import tasks
from lorafit.ops.isolation import adapter_off, evaluating

build_objective = tasks.make("causal-lm").build_objective


def test_modes_and_random_numbers_are_as_before(tuned):
    tuned.train()
    resting = tuned.get_base_model().model.layers[1]
    resting.eval()
    before = [module.training for module in tuned.modules()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with evaluating(tuned):
        assert not any(module.training for module in tuned.modules())
        assert not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(9)
    assert [module.training for module in tuned.modules()] == before
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected
    assert torch.is_grad_enabled()


def test_linears_get_whole_inputs_while_evaluating():
    """Mamba hands its output projection a transposed tensor, for which a CPU copies the weight once a row."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2)
    model = MambaForCausalLM(config).eval()
    ids = torch.randint(0, 40, (3, 7))
    seen = []
    watch = [
        module.register_forward_hook(lambda _, arguments, output: seen.append(arguments[0].is_contiguous()))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        expected = model(ids).logits
    assert not all(seen)
    seen.clear()
    with evaluating(model):
        torch.testing.assert_close(model(ids).logits, expected)
    assert len(seen) > 2 and all(seen)
    for handle in watch:
        handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modes_come_back_after_an_error(tuned):
    tuned.train()
    with pytest.raises(KeyboardInterrupt), evaluating(tuned), adapter_off(tuned):
        raise KeyboardInterrupt
    assert all(module.training for module in tuned.modules())
    assert any(parameter.requires_grad for parameter in tuned.parameters())


@pytest.mark.parametrize("trainable", [True, False])
def test_adapter_off_is_the_base_and_keeps_gradient_flags(llama, attach, trainable):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base = llama(ids).logits.clone()
    tuned = attach(llama).eval()
    for parameter in tuned.parameters():
        parameter.requires_grad_(parameter.requires_grad and trainable)
    flags = [parameter.requires_grad for parameter in tuned.parameters()]
    with torch.no_grad():
        own = tuned(ids).logits.clone()
        with adapter_off(tuned):
            assert torch.equal(tuned(ids).logits, base)
        assert torch.equal(tuned(ids).logits, own)
    assert not torch.equal(own, base)
    assert [parameter.requires_grad for parameter in tuned.parameters()] == flags


@pytest.fixture
def nf4(llama, attach, tmp_path):
    """A real NF4 model with an adapter, as transformers loads it: repacking is not switched off."""
    llama.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    return attach(model, dropout=0.1)


def step_gradients(model, rows):
    model.train()
    torch.manual_seed(0)
    ids = torch.tensor([list(rows[0]["tokens"])])
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_evaluating_nf4_changes_neither_weights_nor_later_gradients(nf4, tokenizer, make_rows):
    """bitsandbytes repacks NF4 weights at the first eval forward on AVX512-BF16 CPUs (seen to fail without care)."""
    rows, questions = make_rows([("hi", "there"), ("a b", "c d e")])
    codes = {name: p.data.clone() for name, p in nf4.named_parameters() if p.dtype == torch.uint8}
    assert codes
    before = step_gradients(nf4, rows)
    evaluate_pair(
        Engine(nf4, tokenizer, autocast_dtype=torch.bfloat16),
        build_objective(nf4, autocast_dtype=torch.bfloat16),
        rows,
        questions,
        ["loss", "exact_match"],
        sampling=Sampling(4),
        stop_ids=[],
        micro_batch_tokens=64,
        seed=0,
        reporter=Silent(),
    )
    for module in nf4.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True  # the objective's choice, taken back for a like comparison
    after = step_gradients(nf4, rows)
    for name, parameter in nf4.named_parameters():
        if name in codes:
            assert torch.equal(parameter.data, codes[name]), name
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def train(model, rows, evaluate_every):
    """Four steps with dropout; returns the adapter."""
    objective = build_objective(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(9)
    seen = []
    for step in range(4):
        model.train()
        loss, weight = objective(objective.task.collate([[rows[step % len(rows)]]], 257))
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        if evaluate_every:
            seen.append(evaluate_during(objective, rows, ["perplexity"], micro_batch_tokens=32, pad_id=257))
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, seen


def test_training_with_evaluation_equals_training_without(make_tuned, make_rows):
    rows, _ = make_rows([("hi", "there"), ("a b", "c d e"), ("x", "y")])
    plain, _ = train(make_tuned(dropout=0.2), rows, False)
    watched, seen = train(make_tuned(dropout=0.2), rows, True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert len({values["loss"] for values in seen}) == 4
    assert all(values["perplexity"] == pytest.approx(np.exp(values["loss"])) for values in seen)


def test_repacking_flags_come_back():
    model = torch.nn.Linear(2, 2)
    model.support_avx512bf16_for_cpu = True
    assert isinstance(model.forward, types.MethodType)
    with evaluating(model):
        assert model.support_avx512bf16_for_cpu is False
    assert model.support_avx512bf16_for_cpu is True
