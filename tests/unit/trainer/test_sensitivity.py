"""The change of the loss that a linear's kind would make: the gradient's product with its error, and near the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorafit.contracts import Batch, Example
from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.tasks import tasks
from lorafit.model.targets import find_linears
from lorafit.objective import Objective
from lorafit.ops.live_tensors import LiveTensors
from lorafit.plan.calibration import calibration_memory
from lorafit.trainer.sensitivity import measure_changes
from tests.support.adapted import load, make_gpt2, make_llama, open_base
from tests.unit.estimation.test_dry_run import ask

TRIED = {name: quantizations.make(name) for name in ("nf4", "int8")}
ROWS = [[3, 14, 15, 9, 26, 5], [35, 8, 9, 79], [32, 38, 46, 26, 43]]


def build(model: Any) -> Objective:
    return tasks.make("causal-lm").build_objective(model, autocast_dtype=None, exact=False)


def objective_of(make: Any, folder: Path) -> Objective:
    return build(load(open_base(make(folder / "base"))))


def batch_of(objective: Objective, rows: list[list[int]]) -> Batch:
    columns = [{"tokens": row, "trained": [0] + [1] * (len(row) - 1)} for row in rows]
    return objective.task.collate([[Example(n, values, "x", n)] for n, values in enumerate(columns)], 0)


def mean_loss(objective: Objective, batches: list[Batch]) -> float:
    with torch.no_grad():
        found = [objective(batch) for batch in batches]
    return float(sum(one.loss_sum.double() for one in found)) / sum(one.weight for one in found)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_it_is_the_gradient_times_the_error(make: Any, tmp_path: Path) -> None:
    """L(W + E) - L(W) = <dL/dW, E> + O(E^2): Taylor's first term, of the mean loss."""
    objective = objective_of(make, tmp_path).eval()
    batches = [batch_of(objective, ROWS[:2]), batch_of(objective, ROWS[2:])]
    linears: dict[str, Any] = dict(find_linears(objective.base))
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    found = measure_changes(objective, batches, dict.fromkeys(linears, TRIED))
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in objective.parameters())
    assert not any(module.training or module._forward_hooks for module in objective.base.modules())
    objective.requires_grad_(True)
    sum(objective(batch).loss_sum for batch in batches).backward()  # type: ignore[union-attr]
    weight = sum(batch.weight for batch in batches)
    for path, linear in linears.items():
        lies_across = not hasattr(linear, "in_features")
        value = linear.weight.data.t().contiguous() if lies_across else linear.weight.data
        gradient = linear.weight.grad.t() if lies_across else linear.weight.grad
        for kind, told in found[path].items():
            expected = (gradient * (TRIED[kind].rounded(value) - value)).sum().item() / weight
            assert told == pytest.approx(expected, rel=1e-3, abs=1e-8)


def test_it_ranks_linears_as_storing_them_one_at_a_time_does(tmp_path: Path) -> None:
    objective = objective_of(lambda folder: make_llama(folder, num_hidden_layers=3), tmp_path).eval()
    batches = [batch_of(objective, ROWS)]
    linears: dict[str, Any] = dict(find_linears(objective.base))
    told = [each["nf4"] for each in measure_changes(objective, batches, dict.fromkeys(linears, TRIED)).values()]
    start, measured = mean_loss(objective, batches), []
    for linear in linears.values():
        kept = linear.weight.data
        linear.weight.data = TRIED["nf4"].rounded(kept)
        measured.append(mean_loss(objective, batches) - start)
        linear.weight.data = kept
    ranks = [np.argsort(np.argsort(values)) for values in (told, measured)]
    assert len(told) == 21 and np.corrcoef(*ranks)[0, 1] >= 0.8


def test_dropout_of_the_model_takes_no_part_and_a_second_time_gives_the_same(tmp_path: Path) -> None:
    objective = objective_of(make_gpt2, tmp_path).train()  # GPT-2 has a dropout of 0.1
    batches, paths = [batch_of(objective, ROWS)], [path for path, _ in find_linears(objective.base)]
    first, second = (measure_changes(objective, batches, dict.fromkeys(paths, TRIED)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("longest", "rows"), [(32, 16), (1024, 1)])
def test_it_takes_the_memory_that_the_plan_says(longest: int, rows: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "max_position_embeddings": 2048}
    folder = make_llama(tmp_path / "base", **sizes)
    objective = build(load(open_base(folder)))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    options = {"model__quantization": "{kind: adaptive, bits: 7}", "model__dtype": "fp32", "model__attention": "eager"}
    estimate = calibration_memory(ask(config, tmp_path, tokens=longest, **options))
    assert estimate is not None
    batch = batch_of(objective.eval(), [[n % 90 + 3 for n in range(longest)]] * rows)
    live, linears = LiveTensors(), [path for path, _ in find_linears(objective.base)]
    live.note(objective.parameters(), "base_weights")
    with live:
        measure_changes(objective, [batch], dict.fromkeys(linears, TRIED))
    assert 0.75 * estimate.tensor_bytes < live.peak().tensor_bytes <= 1.02 * estimate.tensor_bytes
