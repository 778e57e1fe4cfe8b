"""DyLoRA and rank growth: the first ranks alone compute, as an adapter of so many ranks does; a plain LoRA is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafit import pipeline
from lorafit.errors import LorafitError
from lorafit.facts import RunFacts
from lorafit.files.rundir import RunDir
from lorafit.kinds.adapters import adapters
from lorafit.model.attach import attach_adapter
from lorafit.model.fuse import fuse_layers
from lorafit.recipe.load import load_recipe
from lorafit.studies.trim import trim
from tests.support.adapted import randomise
from tests.support.tiny_model import make_base, tiny_llama
from tests.support.tiny_recipe import make_recipe, make_rows, write_rows
from tests.support.tiny_run import quantize

LORA = {"r": 8, "alpha": 16, "dropout": 0.0}
IDS = torch.arange(12)[None]


def adapted(kind: str, *, quantised: bool = False, **fields: Any) -> Any:
    base = tiny_llama(seed=1)
    if quantised:
        base = quantize(base.to(torch.bfloat16))
    model = attach_adapter(base, adapters.make_section(kind, **{**LORA, **fields}), 0)
    fuse_layers(model)
    randomise(model)
    return model


def hook_of(model: Any, kind: str, steps: int = 12, **fields: Any) -> Any:
    return adapters.make(kind, **{**LORA, **fields}).step_hook(model, RunFacts(3, steps))


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantised", [False, True])
def test_a_step_at_b_is_a_step_of_an_adapter_of_rank_b_to_the_bit(quantised: bool) -> None:
    """Section 3: h = W x + (alpha / b) W_up[:, :b] W_dw[:b] x."""
    model = adapted("dylora", quantised=quantised)
    hook = hook_of(model, "dylora", r_min=2)
    step = next(step for step in range(1, 99) if hook.rank_at(step) == 3)
    small = adapted("lora", quantised=quantised, r=3)
    whole = dict(model.named_parameters())
    for name, p in small.named_parameters():
        if "lora_" in name:
            p.data = (whole[name][:3] if "lora_A" in name else whole[name][:, :3]).detach().clone()
    hook.before_step(step)
    loss, gradients = loss_and_gradients(model)
    expected, small_gradients = loss_and_gradients(small)
    assert torch.equal(loss, expected) and len(gradients) == 28
    for name, gradient in gradients.items():
        first, rest = (gradient[:3], gradient[3:]) if "lora_A" in name else (gradient[:, :3], gradient[:, 3:])
        assert torch.equal(first, small_gradients[name]) and not rest.any()
    before = model(input_ids=IDS).logits
    hook.after_optimizer_step(step)
    assert not torch.equal(model(input_ids=IDS).logits, before), "outside of a step all ranks compute"
    assert model.state_dict().keys() == adapted("lora", quantised=quantised).state_dict().keys()


def test_ranks_are_drawn_by_seed_and_step_alone_and_all_of_them() -> None:
    model = adapted("dylora")
    hook, again = hook_of(model, "dylora", r_min=3), hook_of(model, "dylora", r_min=3)
    drawn = [hook.rank_at(step) for step in range(1, 200)]
    assert drawn == [again.rank_at(step) for step in range(1, 200)] and set(drawn) == set(range(3, 9))


def test_the_frozen_mode_trains_the_last_row_and_column_alone() -> None:
    """Algorithm 1, FROZEN: only W_dw^b and W_up^b are updated; the forward is the same."""
    model = adapted("dylora")
    plain, last = hook_of(model, "dylora"), hook_of(model, "dylora", only_last=True)
    step = next(step for step in range(1, 99) if plain.rank_at(step) == 5)
    plain.before_step(step)
    loss, whole = loss_and_gradients(model)
    last.before_step(step)
    frozen_loss, gradients = loss_and_gradients(model)
    assert torch.equal(loss, frozen_loss)
    for name, gradient in gradients.items():
        at, expected = (gradient, whole[name]) if "lora_A" in name else (gradient.T, whole[name].T)
        torch.testing.assert_close(at[4], expected[4])
        assert not at[:4].any() and not at[5:].any()


def test_growth_changes_nothing_of_what_is_computed_and_new_ranks_have_no_moments(tmp_path: Path) -> None:
    model = attach_adapter(tiny_llama(), adapters.make_section("growing_lora", **LORA, start_r=2), 0)
    hook = hook_of(model, "growing_lora", start_r=2, raise_steps=[3, 5])
    assert [hook.news(step) for step in (1, 2, 3, 4)] == [None, None, "the rank grows from 2 to 5", None]
    assert [hook.rank_at(step) for step in range(1, 7)] == [2, 2, 5, 5, 8, 8]
    method = adapters.make("growing_lora", **LORA, start_r=2, raise_steps=[3, 5])
    early = method.outcome({}, 4, 6)  # an evaluation chose it
    assert early is not None and early.told == "5 of its 8 ranks are trained"
    assert "step 4, before rank 8 is reached at step 5;" in early.warning and method.outcome({}, 5, 6) is None
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), 1e-2, weight_decay=0.1)
    started = {n: p.detach().clone() for n, p in parameters.items()}
    for step in (1, 2):
        hook.before_step(step)
        loss_and_gradients(model)
        optimizer.step()
        hook.after_optimizer_step(step)
    hook.before_step(2)
    before, _ = loss_and_gradients(model)
    hook.before_step(3)
    after, gradients = loss_and_gradients(model)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0.0)
    for name, p in parameters.items():
        if "lora_B" in name:
            assert not p[:, 2:].any() and p[:, :2].any()
            assert not optimizer.state[p]["exp_avg"][:, 2:].any() and not optimizer.state[p]["exp_avg_sq"][:, 2:].any()
            assert gradients[name][:, 2:5].any() and not gradients[name][:, 5:].any()
        else:
            assert torch.allclose(p[2:], started[name][2:], rtol=3e-3)  # weight decay alone


@pytest.fixture(scope="module", params=["dylora", "growing_lora"])
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> RunDir:
    folder = tmp_path_factory.mktemp(request.param)
    make_base(folder / "base")
    recipe = make_recipe(
        folder,
        adapter={"kind": request.param, **LORA, "dropout": 0.1},
        training={"max_steps": 6},
        checkpoints={"every_steps": 3, "keep_last": 9},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.estimation.measured.covers", lambda step: True)
        patch.setenv("LORAFIT_CACHE", str(folder / "cache"))
        return pipeline.train(recipe).run


def test_a_plain_lora_is_saved_and_a_resumed_run_is_the_same(
    run: RunDir, memory_by_formula: None, monkeypatch: Any
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(run.root.parent / "cache"))
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["rank_pattern"]) == ("LORA", 8, 16, {})
    assert all(8 in value.shape for value in load_file(run.adapter / "adapter_model.safetensors").values())
    whole = {file.name: file.read_bytes() for file in run.checkpoint(6).rglob("*.safetensors")}
    pipeline.train(run.root.parent / "recipe.yaml", resume_from=3)
    assert {file.name: file.read_bytes() for file in run.checkpoint(6).rglob("*.safetensors")} == whole


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"kind": "dylora", "r": 4, "r_min": 5}, "r_min 5 is more than r 4"),
        ({"kind": "growing_lora", "r": 4, "start_r": 4}, "start_r 4 must be less than r 4"),
        ({"kind": "growing_lora", "raise_steps": [3, 3]}, "raise_steps must rise"),
        ({"kind": "growing_lora", "start_r": 14, "raise_steps": [2, 3, 4]}, "3 raise_steps are more than the 2 ranks"),
        ({"kind": "growing_lora", "raise_steps": [2, 9]}, "raise_steps ends at 9, the run has 4"),
    ],
)
def test_ranks_that_do_not_go_together_are_refused(tmp_path: Path, adapter: dict[str, Any], message: str) -> None:
    recipe = make_recipe(tmp_path)
    text = recipe.read_text()
    import yaml

    recipe.write_text(yaml.safe_dump({**yaml.safe_load(text), "adapter": adapter}))
    with pytest.raises(LorafitError, match=message):
        load_recipe(recipe)


@pytest.mark.slow
def test_every_rank_is_nearly_as_good_as_a_run_of_that_rank(tmp_path: Path, memory_by_formula: None) -> None:
    """Within 2 % of its held-out loss."""
    make_base(tmp_path / "base")
    training = {"max_steps": 200, "learning_rate": 2e-3, "batch_size": 8, "micro_batch_tokens": 512}
    validation = {"every_steps": 200, "final": ["perplexity"]}

    def train(name: str, kind: str, rank: int) -> Path:
        adapter = {"kind": kind, "r": rank, "alpha": 8, "dropout": 0.0}
        recipe = make_recipe(tmp_path, adapter=adapter, training=training, evaluation=validation, output=name)
        write_rows(tmp_path / "train.jsonl", make_rows(96))
        write_rows(tmp_path / "valid.jsonl", make_rows(24, first=300))
        return pipeline.train(recipe).run.root

    whole = train("whole", "dylora", 8)
    for rank in (2, 4):
        cut = trim(whole, rank=rank, output=tmp_path / f"rank-{rank}").tried[0].loss.tuned
        lines = (train(f"lora-{rank}", "lora", rank) / "metrics.jsonl").read_text().splitlines()
        alone = [json.loads(line) for line in lines if "evaluation" in line][-1]["evaluation"]["loss"]
        assert cut <= 1.02 * alone
