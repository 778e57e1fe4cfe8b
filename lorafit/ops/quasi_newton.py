"""The least value of a smooth function of a few numbers, with few looks at it: BFGS with halved steps.

    step       d = -H g, halved until f falls by at least 1e-4 of what its slope promises (Armijo)
    H          the inverse Hessian, learnt from the gradients' changes; at first a step of at most 0.5

Nothing is drawn. Source: Nocedal and Wright 2006, Numerical Optimization, algorithms 3.1 and 6.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_FIRST_STEP, _SMALLEST_SHARE, _ARMIJO = 0.5, 2.0**-6, 1e-4

Look = Callable[[torch.Tensor], tuple[float, torch.Tensor]]
"""Value and gradient, fp64, at a point."""


def minimise(look: Look, start: torch.Tensor, *, rounds: int = 15, tolerance: float = 1e-5) -> torch.Tensor:
    """The point of least value that was found.

    Args:
        look: The function.
        start: Where to begin, fp64.
        rounds: Most steps.
        tolerance: It ends where a step promises less than that.
    """
    point, (value, gradient) = start, look(start)
    unit = torch.eye(len(start), dtype=start.dtype)
    inverse = unit * min(1.0, _FIRST_STEP / max(float(gradient.norm()), 1e-12))
    for number in range(rounds):
        direction = -inverse @ gradient
        slope = float(gradient @ direction)
        if -slope < tolerance:
            break
        share = 1.0
        while (found := look(point + share * direction))[0] > value + _ARMIJO * share * slope:
            share /= 2
            if share < _SMALLEST_SHARE:
                return point
        moved, turned = share * direction, found[1] - gradient
        point, (value, gradient) = point + moved, found
        curvature = float(moved @ turned)
        if curvature > 0:
            inverse = unit * (curvature / float(turned @ turned)) if number == 0 else inverse
            shift = unit - torch.outer(moved, turned) / curvature
            inverse = shift @ inverse @ shift.T + torch.outer(moved, moved) / curvature
    return point
