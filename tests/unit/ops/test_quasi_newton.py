"""Known least points are found in few looks, and a start that is one is left alone."""

from __future__ import annotations

import torch

from lorafit.ops.quasi_newton import minimise


class Counted:
    """A function by autograd, and how often it was looked at."""

    def __init__(self, function: object) -> None:
        self.function, self.looks = function, 0

    def __call__(self, point: torch.Tensor) -> tuple[float, torch.Tensor]:
        self.looks += 1
        point = point.clone().requires_grad_()
        value = self.function(point)  # type: ignore[operator]
        value.backward()
        assert point.grad is not None
        return float(value.detach()), point.grad


def test_a_quadratic_and_a_bent_valley() -> None:
    matrix = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 0.4]], dtype=torch.float64)
    wanted = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    quadratic = Counted(lambda x: (x - wanted) @ matrix @ (x - wanted))
    found = minimise(quadratic, torch.zeros(3, dtype=torch.float64), tolerance=1e-9)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
    assert quadratic.looks < 25
    valley = Counted(lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    found = minimise(valley, start, rounds=60, tolerance=1e-12)
    torch.testing.assert_close(found, torch.ones(2, dtype=torch.float64), atol=1e-3, rtol=0)


def test_it_ends_where_nothing_is_gained() -> None:
    flat = Counted(lambda x: (x**2).sum() * 1e-9 + 3)
    start = torch.tensor([0.3], dtype=torch.float64)
    assert torch.equal(minimise(flat, start), start) and flat.looks == 1
    kink = Counted(lambda x: x.abs().sum())  # whose gradient never falls: halved steps end it
    found = minimise(kink, torch.tensor([0.7], dtype=torch.float64))
    assert abs(float(found)) < 0.7 and kink.looks < 60
