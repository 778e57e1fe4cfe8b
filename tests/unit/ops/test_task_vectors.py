"""TIES is PEFT's own on dense updates, and DARE keeps what it says, the same by seed, unbiased."""

from __future__ import annotations

import torch
from peft.utils.merge_utils import ties as pefts

from lorafit.ops.task_vectors import dare, ties

torch.manual_seed(0)
UPDATES = [torch.randn(40, 30, dtype=torch.float64) for _ in range(3)]


def test_ties_of_equal_weights_is_pefts_own() -> None:
    for density in (0.2, 0.5, 1.0):
        theirs = pefts([update.clone() for update in UPDATES], torch.ones(3, dtype=torch.float64), density)
        torch.testing.assert_close(ties(UPDATES, density), theirs)


def test_ties_by_hand() -> None:
    """The largest two of four stay; where signs differ the larger sum decides, and only those that agree are averaged.

    trimmed   [ 4,  3, 0, 0]   [-1, 0, 0, 2]        sum [3, 3, 0, 2]
    """
    one, other = torch.tensor([4.0, 3.0, 1.0, -0.5]), torch.tensor([-1.0, 0.2, 0.1, 2.0])
    assert ties([one, other], 0.5).tolist() == [4.0, 3.0, 0.0, 2.0]
    assert ties([one, 2 * one], 1.0).tolist() == (1.5 * one).tolist()


def test_dare_keeps_its_share_by_seed_and_is_the_sum_on_average() -> None:
    whole = sum(UPDATES, torch.zeros_like(UPDATES[0]))
    first = dare(UPDATES, 0.25, ["0 a", "0 b", "0 c"])
    assert torch.equal(first, dare(UPDATES, 0.25, ["0 a", "0 b", "0 c"]))
    assert not torch.equal(first, dare(UPDATES, 0.25, ["1 a", "1 b", "1 c"]))
    one = dare(UPDATES[:1], 0.25, ["0 a"])
    kept = one != 0
    assert 0.2 < kept.double().mean() < 0.3
    torch.testing.assert_close(one[kept], UPDATES[0][kept] * 4)
    mean = torch.stack([dare(UPDATES, 0.5, [f"{n} a", f"{n} b", f"{n} c"]) for n in range(400)]).mean(dim=0)
    assert float((mean - whole).norm() / whole.norm()) < 0.12  # 1 / sqrt(400) = 0.05 with a factor for the drops
    torch.testing.assert_close(dare(UPDATES, 1.0, ["a", "b", "c"]), whole)
