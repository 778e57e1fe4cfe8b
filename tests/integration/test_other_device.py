"""A base is quantised as its run noted, whatever device it is loaded on later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit import pipeline, training
from lorafit.files.atomic import read_object
from lorafit.model import inspect, load
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe

NARROW = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Over a base of which a CPU holds the down projections, 160 wide, plain."""
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base", intermediate_size=160)
    return make_recipe(tmp_path, model={"quantization": "nf4"}, evaluation={"final": ["perplexity"]})


def as_noted_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = inspect.describe_quantization

    def noted(*model: Any, **options: Any) -> dict[str, Any]:
        described = inner(*model, **options)
        proof = next(iter(described["tensors"].values()))
        return {**described, "device": "cuda", "tensors": {**described["tensors"], **dict.fromkeys(NARROW, proof)}}

    monkeypatch.setattr(inspect, "describe_quantization", noted)


def values_of(folder: Path) -> dict[str, Any]:
    return dict(read_object(folder / "quantization.json"))


def test_a_run_of_a_card_goes_on_and_is_scored_on_a_cpu_with_the_base_it_had(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: list[str] = []
    inner = load._round_plain

    def noted(model: torch.nn.Module, kind: Any, names: Any) -> None:
        inner(model, kind, names)
        rounded.extend(names)

    monkeypatch.setattr(load, "_round_plain", noted)
    with monkeypatch.context() as patch:
        as_noted_on_a_card(patch)
        run = pipeline.train(recipe).path
    begun = values_of(run)
    assert set(NARROW) < begun["tensors"].keys() and not rounded
    own = perplexity(run)
    assert sorted(rounded) == NARROW
    rounded.clear()
    pipeline.train(recipe, resume_from=2)
    assert sorted(rounded) == NARROW
    assert values_of(run) == begun and values_of(run / "adapter") == begun  # not what this device has made of it
    (recipe.parent / "run").rename(recipe.parent / "before")
    plain = pipeline.train(recipe).path
    assert NARROW[0] not in values_of(plain)["tensors"]
    assert abs(perplexity(plain) - own) > 1e-6


def perplexity(run: Path) -> float:
    """Of the base."""
    return float(pipeline.evaluate(run).metrics["perplexity"]["base"])


class Reached(BaseException):
    """As far as is looked at."""


@pytest.mark.parametrize("is_main", [True, False])
def test_one_process_of_a_run_hashes_the_codes(recipe: Path, monkeypatch: pytest.MonkeyPatch, is_main: bool) -> None:
    class Seen(training.Accelerator):
        is_main_process = is_main

    hashed: list[Any] = []
    inner = inspect.quantized_hashes

    def noted(model: Any) -> dict[str, Any]:
        hashed.append(model)
        return inner(model)

    def reach(*arguments: Any, **options: Any) -> None:
        raise Reached

    monkeypatch.setattr(inspect, "quantized_hashes", noted)
    monkeypatch.setattr(training, "build_accelerator", lambda **options: Seen(cpu=True))
    monkeypatch.setattr(training, "resolve_plan", reach)
    with pytest.raises(Reached):
        pipeline.train(recipe)
    assert len(hashed) == is_main
