"""One name for several models, each with a share of the users: who answers whom, and what their ratings tell apart.

model: split, user: u ──SHA-256 of u──> a place in 0 to 1 ──shares──> the model, the same for u each time
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from lorafit.contracts import JsonObject
from lorafit.errors import UsageError
from lorafit.evaluation.share_intervals import difference_of_shares, share_interval

NAME = "split"
_PLACES = 1 << 64


@dataclass(frozen=True)
class Split:
    """Shares of users by model, which together are 1. The first model is what others are compared with."""

    shares: Mapping[str, float]

    def __str__(self) -> str:
        return ",".join(f"{name}={share:g}" for name, share in self.shares.items())

    def pick(self, user: str | None) -> str:
        """The model for a user; by chance where none is named."""
        if user is None:
            number = secrets.randbits(64)
        else:
            number = int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big")
        place, until = number / _PLACES, 0.0
        for name, share in self.shares.items():
            until += share
            if place < until:
                return name
        return list(self.shares)[-1]

    def report(self, ratings: Mapping[str, tuple[int, int]]) -> JsonObject:
        """What ratings say: the share of good ones of each model, and its difference from the first one's.

        Args:
            ratings: Good ones and all, by model.
        """
        first, *_ = self.shares
        known = {name: ratings.get(name, (0, 0)) for name in self.shares}
        return {
            "name": NAME,
            "models": [
                {"model": name, "users": share, **_told(known[name], None if name == first else known[first])}
                for name, share in self.shares.items()
            ],
        }


def _told(own: tuple[int, int], first: tuple[int, int] | None) -> JsonObject:
    good, rated = own
    told: JsonObject = {"rated": rated, "good": good, "share": None, "interval": None}
    if rated:
        told |= {"share": good / rated, "interval": list(share_interval(good, rated))}
    if first is not None and rated and first[1]:
        low, high = difference_of_shares(*first, *own)
        verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
        difference = good / rated - first[0] / first[1]
        told |= {"difference": difference, "difference_interval": [low, high], "verdict": verdict}
    return told


def read_split(given: str | Mapping[str, float] | None) -> Split | None:
    """`a=0.9,b=0.1` as a split; None for none.

    Raises:
        UsageError: A share is no number above 0, they are not 1 together, or there is one model alone.
    """
    if given is None:
        return None
    todo = "write NAME=SHARE,NAME=SHARE, e.g. a=0.9,b=0.1"
    pairs = list(given.items()) if isinstance(given, Mapping) else [one.partition("=")[::2] for one in given.split(",")]
    shares: dict[str, float] = {}
    for name, share in pairs:
        try:
            number = float(share)
        except (TypeError, ValueError):
            number = math.nan
        if name in shares:
            raise UsageError(f"'{name}' is named twice", key="--split", todo=todo)
        if not name or not 0 < number < 1:
            raise UsageError(f"'{name}={share}' is no model with its share", key="--split", todo=todo)
        shares[name] = number
    if len(shares) < 2 or abs(sum(shares.values()) - 1) > 1e-6:
        raise UsageError(f"the shares are {sum(shares.values()):g} together, not 1", key="--split", todo=todo)
    return Split(shares)
