"""W + s * B A is rounded once, and its proof takes no more than that rounding and the product's own errors."""

from __future__ import annotations

import math

import pytest
import torch

from lorafit.kinds.adapters import _low_rank_fold
from lorafit.kinds.adapters._low_rank_fold import LowRankFold

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
SCALING = -1.5
SMALLEST = {"BF16": 2.0**-126, "F16": 2.0**-24, "F32": 2.0**-126}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_low_rank_fold, "_CACHED_ELEMENTS", 500)


def make(
    dtype: torch.dtype, rows: int = 70, columns: int = 96, rank: int = 4
) -> tuple[torch.Tensor, LowRankFold, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    weight = (torch.randn(rows, columns) * 0.02).to(dtype)
    left, right = torch.randn(rows, rank) * 0.1, torch.randn(rank, columns) * 0.1
    return weight, LowRankFold(left, right, SCALING), (left.double(), right.double())


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("columns", [96, 700])
def test_the_sum_is_that_of_fp32_rounded_once(name: str, columns: int) -> None:
    weight, fold, (left, right) = make(torch.bfloat16, columns=columns)
    exact = weight.double() + SCALING * (left @ right)
    out = torch.empty(weight.shape, dtype=DTYPES[name])
    for start, stop in ((0, 30), (30, 70)):  # a block of the file does not begin at row 0
        fold.apply(weight[start:stop], start, out[start:stop])
    assert torch.allclose(out.double(), exact, rtol=ROUNDOFF[name], atol=1e-7)
    if name == "BF16":
        fold.apply(weight, 0, weight)
        assert torch.equal(weight, out)


@pytest.mark.parametrize("name", DTYPES)
def test_the_proof_is_the_bound_it_says(name: str) -> None:
    weight, fold, (left, right) = make(DTYPES[name])
    out = torch.empty_like(weight)
    fold.apply(weight, 0, out)
    exact = weight.double() + SCALING * left @ right
    product = abs(SCALING) * left.norm(dim=1)[:, None] * right.norm(dim=0)[None]
    bound = ROUNDOFF[name] * exact.abs() + 6 * 2.0**-24 * (weight.double().abs() + product) + SMALLEST[name]
    ratio = (out.double() - exact).abs() / bound
    assert fold.error(weight, out, 0) == pytest.approx(float(ratio.max()), rel=1e-4) and ratio.max() <= 1.0
    assert fold.error(weight[30:], out[30:], 30) == pytest.approx(float(ratio[30:].max()), rel=1e-4)
    place = (41, 17)
    if name == "BF16":  # two steps away from the nearest: no rounding explains it
        out[place] = out[place] * (1 + 2.0**-6)
        assert fold.error(weight, out, 0) > 1.5
    out[place] = math.nan
    assert math.isnan(fold.error(weight, out, 0))


def test_zeros_are_no_division_by_zero() -> None:
    weight, fold = torch.zeros(3, 4, dtype=torch.bfloat16), LowRankFold(torch.zeros(3, 2), torch.zeros(2, 4), 1.0)
    assert fold.error(weight, weight.clone(), 0) == 0.0
    assert fold.error(weight, weight + 1e-30, 0) > 1.0
