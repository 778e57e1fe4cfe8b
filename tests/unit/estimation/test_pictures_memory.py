"""The memory of a step with images: a dry run beside the same step on real tensors, and what is said of it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorafit import pipeline
from lorafit.contracts import Silent
from lorafit.estimation.dry_run import DryRun
from lorafit.estimation.measured import MeasuredSteps
from lorafit.job import Job, build_objective, open_job
from lorafit.model.attach import attach_adapter
from lorafit.model.checkpointing import set_checkpointing
from lorafit.model.fuse import fuse_layers
from lorafit.model.load import load_model
from lorafit.ops.live_tensors import LivePeak, LiveTensors, watching
from lorafit.ops.recomputed_layers import Checkpointing
from lorafit.plan import plan
from lorafit.plan.recipe_step import recipe_step
from lorafit.recipe.load import load_recipe
from lorafit.trainer.executor import Executor
from lorafit.trainer.step import Update, accumulate_gradients
from tests.support.pictures import draw_rows, draw_square
from tests.support.tiny_recipe import write_rows
from tests.support.tiny_vision import make_idefics3, make_llava

ROWS = 4


def make_recipe(folder: Path, kind: str, projector: str = "none") -> dict[str, Any]:
    """Rows of one length, with an image each that takes more than the text: 64 tokens, or five tiles of 16."""
    if kind == "llava":
        make_llava(folder / "base", side=64)
    else:
        make_idefics3(folder / "base", side=32)
    row, *_ = draw_rows(folder, 1, size=(64, 64))
    write_rows(folder / "train.jsonl", [row] * ROWS)
    return {
        "name": "x",
        "task": {"kind": "image-text-to-text", "projector": projector},
        "model": {"base": str(folder / "base"), "quantization": "none", "dtype": "fp32", "attention": "sdpa"},
        "adapter": {"r": 4, "dropout": 0.0},
        "data": {"train": str(folder / "train.jsonl")},
        "training": {"optimizer": "adamw"},
        "output": str(folder / "run"),
    }


def measure_each(job: Job) -> dict[Checkpointing, LivePeak]:
    """A step of all rows in one micro-batch; gradients and optimizer state are there from a step before."""
    kinds = recipe_step(job.recipe, job.shape, job.rows.facts(), job.device).step
    base = load_model(
        job.base,
        quantization=kinds.quantization.section,
        dtype=torch.float32,
        compute_dtype=torch.float32,
        attention="sdpa",
        device="cpu",
        model_class=job.task.model_class,
        reporter=Silent(),
    )
    model = attach_adapter(base, job.recipe.adapter, 0, model_class=job.task.model_class)
    fuse_layers(model)
    objective = build_objective(job, model, "fp32")
    objective.train()
    executor = Executor(objective, torch.device("cpu"))
    optimizer = kinds.optimizer.build(executor.parameters, 1e-3, torch.device("cpu"))
    update = Update(optimizer, list(objective.named_parameters()), lambda step: 1e-3, executor.scaler)
    batch = job.task.collate([[job.rows.train[row]] for row in range(ROWS)], job.pad_id)
    found: dict[Checkpointing, LivePeak] = {}
    for checkpointing in (False, False, True):
        set_checkpointing(model, checkpointing)
        live = LiveTensors()
        with watching(live, objective, optimizer):
            live.phase = "forward"
            live.note(batch.tensors.values())
            accumulate_gradients(executor, [batch])
            update.apply(1, update.gradient_norm())
        found[checkpointing] = live.peak()
    return found


@pytest.mark.parametrize(("kind", "projector"), [("llava", "none"), ("idefics3", "full")])
def test_a_dry_run_holds_what_a_real_step_with_images_holds(kind: str, projector: str, tmp_path: Path) -> None:
    job = open_job(load_recipe(make_recipe(tmp_path, kind, projector)), Silent())
    step = recipe_step(job.recipe, job.shape, job.rows.facts(), job.device).step
    assert step.held_rows == 2 * 16  # of a step, and of the next, beside what the micro-batch measured here has
    step = replace(step, held_rows=0)
    dry = DryRun(step, job.base.config)
    tokens = ROWS * step.row_tokens
    for checkpointing, real in measure_each(job).items():
        found = dry.run(tokens, checkpointing)
        assert found.counts_pictures and found.tensor_bytes == pytest.approx(real.tensor_bytes, rel=0.01)
        for phase in found.phases[:3]:  # in an update the measured step still holds its batch
            whole = sum(found.fixed.values()) + phase.total_bytes
            assert whole == pytest.approx(real.phases[phase.name], rel=0.01)
        assert dry.run(tokens, checkpointing, few_layers=True).tensor_bytes == found.tensor_bytes
    pixels = job.task.collate([[job.rows.train[row]] for row in range(ROWS)], job.pad_id)
    bytes_of_rows = sum(pixels[name].nbytes for name in pixels.attached)
    dry.step = replace(step, held_rows=3 * ROWS)
    assert dry.run(tokens, checkpointing).tensor_bytes == found.tensor_bytes + 3 * bytes_of_rows
    text = DryRun(replace(step, pictures=None), job.base.config).run(tokens, checkpointing)
    assert not text.counts_pictures and text.tensor_bytes < 0.96 * real.tensor_bytes


def test_an_estimate_says_with_which_images_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path, "idefics3")
    known = pipeline.estimate(recipe)
    assert "at most: 1 image of 64x64, 94 tokens each" in printed(known)
    assert known.to_json()["pictures"] == {"images": 1, "width": 64, "height": 64, "tokens": 94, "counted": True}
    many = pipeline.estimate(recipe, overrides=["training.micro_batch_tokens=2000"])
    assert many.to_json()["pictures"]["images"] == 2000 // many.asked.step.row_tokens
    exact = pipeline.estimate(recipe, exact=True)
    assert exact.exact is not None and exact.exact.tensor_bytes == pytest.approx(known.memory.tensor_bytes, rel=0.01)

    unknown = pipeline.estimate(recipe, overrides=["data.train=none.jsonl", "data.max_length=400"])
    assert "assumed, one a row: 1 image of 2048x2048, 94 tokens each" in printed(unknown)
    assert unknown.memory.counts_pictures and unknown.memory.micro_batch_tokens == 400

    (tmp_path / "base" / "processor_config.json").unlink()
    blind = pipeline.estimate(recipe)
    assert "too low: what the vision tower holds for a moment is not counted, which waits for the base's" in printed(
        blind
    )
    assert blind.memory.tensor_bytes < known.memory.tensor_bytes or not blind.memory.counts_pictures


def test_a_tower_that_asks_for_values_is_told_of_and_the_rest_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llava import modeling_llava

    own = modeling_llava.LlavaModel.get_image_features

    def needs_values(self: Any, pixel_values: torch.Tensor, **options: Any) -> Any:
        assert pixel_values.nonzero().shape[0] >= 0
        return own(self, pixel_values, **options)

    monkeypatch.setattr(modeling_llava.LlavaModel, "get_image_features", needs_values)
    recipe = make_recipe(tmp_path, "llava")
    found = pipeline.estimate(recipe, exact=True)
    assert found.memory.counts_all and not found.memory.counts_pictures
    assert found.exact is not None and not found.exact.counts_pictures
    assert "is not counted, which does not run on tensors without values" in printed(found)
    job = open_job(load_recipe(recipe), Silent())
    engine = MeasuredSteps(job.base.config, Silent())
    warnings = plan(job.recipe, job.shape, job.rows.facts(), job.device, engine).warnings
    assert any(one.startswith("the vision tower does not run on tensors without values") for one in warnings)
    monkeypatch.undo()


def test_images_of_a_micro_batch_follow_from_the_densest_row(tmp_path: Path) -> None:
    """A long text among rows with images thins them out for nobody; where sizes differ all are as the largest."""
    recipe = make_recipe(tmp_path, "idefics3")
    rows = draw_rows(tmp_path, 2, size=(64, 64))
    draw_square(tmp_path / "p1.png", "blue", size=(64, 32))
    long = {"messages": [{"role": "user", "content": "what " * 90}, {"role": "assistant", "content": "red"}]}
    write_rows(tmp_path / "train.jsonl", [*rows, long])
    facts = open_job(load_recipe(recipe), Silent()).rows.facts()
    pictures = facts.pictures
    assert pictures is not None and (pictures.width, pictures.height) == (64, 64) and not pictures.alike
    assert facts.longest_tokens > pictures.tokens > pictures.image_tokens == pictures.one_tokens == 94
    assert [pictures.images(tokens) for tokens in (1, pictures.tokens, 2 * pictures.tokens + 1)] == [1, 1, 3]
    assert replace(pictures, alike=True).images(2 * pictures.tokens + 1) == 2
    assert pictures.shapes(3 * pictures.tokens)["pixel_values"] == ("float32", (1, 15, 3, 32, 32))
    write_rows(tmp_path / "train.jsonl", [long])
    assert open_job(load_recipe(recipe), Silent()).rows.facts().pictures is None


def printed(estimate: Any) -> str:
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    estimate.render(console)
    return console.export_text()
