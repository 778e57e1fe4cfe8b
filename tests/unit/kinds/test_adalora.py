"""AdaLoRA against its equations, its ranks within the budget, and its adapter in PEFT, in a merge and in a resume."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorafit import pipeline
from lorafit.errors import LorafitError
from lorafit.facts import RunFacts
from lorafit.files.rundir import RunDir
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters.adalora import AdaloraSection
from lorafit.model.attach import attach_adapter, open_adapter
from lorafit.model.inspect import coverage
from lorafit.recipe.load import load_recipe
from lorafit.run.trained import Trained
from tests.support.adapted import load, logits, open_base
from tests.support.tiny_model import make_base, tiny_llama
from tests.support.tiny_recipe import make_recipe

SECTION = {"kind": "adalora", "r": 2, "init_r": 4, "alpha": 8, "dropout": 0.1}
STEPS = {"warmup_steps": 2, "final_steps": 4, "interval_steps": 1}


def adalora(**fields: Any) -> Any:
    return adapters.make_section(**{"name": "adalora", **SECTION, **STEPS, **fields})


def attached(**fields: Any) -> tuple[Any, Any]:
    """A tiny model with fresh triplets, and what is done between its steps in a run of 12."""
    model = attach_adapter(tiny_llama(), adalora(**fields), 0)
    return model, adapters.bind(adalora(**fields)).step_hook(model, RunFacts(0, 12))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained on NF4 for 12 steps; every checkpoint is kept."""
    folder = tmp_path_factory.mktemp("adalora")
    make_base(folder / "base")
    recipe = make_recipe(
        folder,
        model={"quantization": "nf4"},
        adapter={**SECTION, **STEPS},
        training={"max_steps": 12, "optimizer": {"kind": "adamw"}},
        checkpoints={"every_steps": 4, "keep_last": 9},
        evaluation={"final": ["perplexity"]},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.estimation.measured.covers", lambda step: True)
        patch.setenv("LORAFIT_CACHE", str(folder / "cache"))
        return pipeline.train(recipe)


@pytest.fixture(scope="module")
def run(trained: Trained) -> RunDir:
    return trained.run


def test_what_it_keeps_beside_its_matrices_is_no_layer() -> None:
    plain, (model, _) = tiny_llama(), attached()
    found = coverage(model)
    assert {kind.name for kind in found.kinds} == {kind.name for kind in coverage(plain).kinds}
    assert found.total_parameters == coverage(plain).total_parameters
    assert found.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_budget_falls_by_a_cube() -> None:
    """Section 3.3: b(t) = b(T) + (b(0) - b(T)) (1 - (t - t_i) / (T - t_i - t_f))^3 between t_i and T - t_f."""
    model, _ = attached()
    allocator, count = model.base_model.rankallocator, 14
    for step in range(1, 13):
        left = 1.0 if step <= 2 else max(0.0, 1 - (step - 2) / (12 - 2 - 4)) ** 3
        assert allocator.budget_schedule(step)[0] == int(2 * count + (4 * count - 2 * count) * left)


def test_importance_is_smoothed_sensitivity_times_its_spread() -> None:
    """Section 3.2: I = |w g|; I' = b1 I' + (1 - b1) I; U' = b2 U' + (1 - b2) |I - I'|; s = I' U'."""
    model, hook = attached(beta1=0.8, beta2=0.6)
    path, parameter = next((n, p) for n, p in hook._parameters.items() if ".lora_A." in n)
    smooth = spread = torch.zeros_like(parameter)
    for step in (1, 2):
        torch.manual_seed(step)
        for p in hook._parameters.values():
            p.grad = torch.randn_like(p)
        now = (parameter * parameter.grad).abs().detach()
        smooth = 0.8 * smooth + 0.2 * now
        spread = 0.6 * spread + 0.4 * (now - smooth).abs()
        hook.after_optimizer_step(step)
    allocator = model.base_model.rankallocator
    torch.testing.assert_close(allocator._element_score(path), smooth * spread)
    kept = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
    assert hook.state_bytes == sum(value.nbytes for values in kept for value in values.values())


def test_a_step_that_overflowed_leaves_no_trace_in_the_ranks() -> None:
    model, hook = attached()
    for p in hook._parameters.values():
        p.grad = torch.full_like(p, float("inf"))
    hook.after_optimizer_step(1)
    assert all(torch.isfinite(value).all() for value in model.base_model.rankallocator.exp_avg_ipt.values())


def test_the_penalty_is_equation_4_as_peft_takes_it_and_no_loss_holds_it() -> None:
    model, hook = attached(orthogonality=0.5)
    norms = []
    for path, p in hook._parameters.items():
        if ".lora_B." in path:
            norms.append((p.T @ p - torch.eye(4)).pow(2).sum().sqrt())  # P^T P - I
        elif ".lora_A." in path:
            norms.append((p @ p.T - torch.eye(4)).pow(2).sum().sqrt())  # Q Q^T - I
    assert len(norms) == 28
    torch.testing.assert_close(hook.penalty(), 0.5 * sum(norms) / 28)
    ids = torch.arange(5)[None]
    plain = model(input_ids=ids, labels=ids).loss
    model.peft_config["default"].orth_reg_weight = 0.5
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss - plain, hook.penalty(), rtol=1e-4, atol=1e-6)
    assert attached(orthogonality=0.0)[1].penalty() is None


def test_the_ranks_that_are_left_are_within_the_budget(run: RunDir) -> None:
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    values = {path: value for path, value in tensors.items() if path.endswith(".lora_E")}
    assert len(values) == 14
    assert 0 < sum(value.numel() for value in values.values()) <= 2 * 14
    assert all((value != 0).all() for value in values.values())
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert sum(map(sum, config["rank_pattern"].values())) == sum(value.numel() for value in values.values())
    assert (config["tinit"], config["tfinal"], config["deltaT"], config["total_step"]) == (2, 4, 1, 12)
    whole = load_file(run.checkpoint(12) / "adapter" / "adapter_model.safetensors")
    assert {value.shape for path, value in whole.items() if path.endswith("_E")} == {(4, 1)}


def test_the_end_of_a_run_says_which_ranks_are_left(trained: Trained) -> None:
    """By the linears' names, as they are saved; and that it did not get that far, where an early step was the best."""
    pattern = json.loads((trained.run.adapter / "adapter_config.json").read_text())["rank_pattern"]
    q = [sum(kept) for path, kept in pattern.items() if path.endswith("q_proj.lora_E")]
    total = sum(map(sum, pattern.values()))
    out = io.StringIO()
    trained.render(Console(file=out, width=500))
    assert f", q_proj {min(q)} to {max(q)} ({sum(q) / 2:.1f})" in out.getvalue() and len(q) == 2
    assert f"; {total} in all, of a budget of 28\n" in out.getvalue() and "warning" not in out.getvalue()
    written = json.loads(trained.run.result.read_text())["adapter"]["figures"]
    assert written["ranks"]["q_proj"] == {"min": min(q), "mean": sum(q) / 2, "max": max(q)}
    assert (written["total"], written["budget"], written["budget_reached_at_step"]) == (total, 28, 8)
    assert trained.fit is not None
    replace(trained, fit=replace(trained.fit, adapter_step=7)).render(Console(file=out, width=500))
    assert "warning: the adapter is that of step 7, before the budget is reached at step 8; " in out.getvalue()


def test_plain_peft_and_lorafit_read_what_the_last_step_computed(run: RunDir) -> None:
    base = open_base(run.root.parent / "base")
    whole = open_adapter(load(base), run.checkpoint(12) / "adapter", base=base)
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(plain, run.adapter)
    ours = open_adapter(load(base), run.adapter, base=base)
    expected = logits(whole)
    for model in (ours, theirs):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, logits(load(base)), atol=1e-4)


def test_a_run_is_evaluated_and_no_penalty_stands_in_its_loss(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(run.root.parent / "cache"))
    found = pipeline.evaluate(run.root)  # which compares its loss with that of the opened model
    assert found.metrics["perplexity"]["tuned"] != found.metrics["perplexity"]["base"]


@pytest.mark.parametrize("kind", ["original", "dequantized"])
def test_a_merge_is_the_forward(run: RunDir, kind: str, tmp_path: Path) -> None:
    report = pipeline.merge(run.root, output=tmp_path / "merged", base=kind)
    base = open_base(run.root.parent / "base")
    tuned = logits(open_adapter(load(base, "none" if kind == "original" else "nf4"), run.adapter, base=base))
    merged = AutoModelForCausalLM.from_pretrained(
        report.report.output, attn_implementation="eager", dtype=torch.float32
    )
    assert float((logits(merged) - tuned).abs().max()) <= 2e-4


def test_a_resumed_run_is_the_same_run(run: RunDir, tmp_path: Path, memory_by_formula: None, monkeypatch: Any) -> None:
    """Before the first rank is gone, while they go, and with the choice made."""
    monkeypatch.setenv("LORAFIT_CACHE", str(run.root.parent / "cache"))
    whole = {file.name: file.read_bytes() for file in run.checkpoint(12).rglob("*.safetensors")}
    assert [(run.checkpoint(step) / "hooks.safetensors").exists() for step in (4, 8, 12)] == [True, False, False]
    adapter = (run.adapter / "adapter_model.safetensors").read_bytes()
    for step in (4, 8):
        pipeline.train(run.root.parent / "recipe.yaml", resume_from=step)
        assert {file.name: file.read_bytes() for file in run.checkpoint(12).rglob("*.safetensors")} == whole
        assert (run.adapter / "adapter_model.safetensors").read_bytes() == adapter


def test_steps_and_ranks_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="init_r 4 must be more than r 4"):
        adalora(r=4)
    assert [AdaloraSection(r=r).first_rank for r in (1, 8, 16)] == [2, 12, 24]  # null: as many as the paper begins with
    recipe = make_recipe(tmp_path, adapter={**SECTION, "warmup_steps": 3, "final_steps": 1})
    with pytest.raises(LorafitError, match="leaves no steps in which ranks are taken away: 4 of the run, 3 of warmup"):
        load_recipe(recipe)
    assert [
        adapters.bind(adalora(warmup_steps=None, final_steps=None)).refuses_steps(n) is None for n in (1, 2, 3)
    ] == [False, True, True]
