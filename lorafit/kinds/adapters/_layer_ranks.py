"""Ranks that differ from layer to layer, or from linear to linear, and how PEFT's config says them.

    ranks: {early: 4, middle: 8, late: 16}     thirds of the layers that get an adapter, counted from the input
    ranks: [4, 4, 8, 16]                       one for each of them
    ranks: {q_proj: 8, down_proj: 32}          by the linear's name

What is not named has rank r, and so has a linear outside of all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorafit.console.nearest import did_you_mean
from lorafit.errors import RecipeError

THIRDS = ("early", "middle", "late")


@dataclass(frozen=True, slots=True)
class LayerRanks:
    """What a recipe says of ranks.

    Attributes:
        ranks: `adapter.ranks`; None: all are alike.
        usual: `adapter.r`.
    """

    ranks: Sequence[int] | Mapping[str, int] | None
    usual: int

    def check(self, layers: Sequence[int], linears: Iterable[str]) -> None:
        """Raises RecipeError where they name what is none of thirds and adapted linears, or too few layers."""
        if isinstance(self.ranks, Sequence) and len(self.ranks) != len(layers):
            what = f"has {len(self.ranks)} ranks for {len(layers)} layers that get an adapter"
            raise RecipeError(what, key="adapter.ranks", todo="give one for each of them")
        known = sorted(set(linears))
        for name in self._named():
            if name not in known:
                what = f"'{name}' is no linear that gets an adapter, and no third of the layers"
                todo = f"{did_you_mean(name, [*THIRDS, *known])}available: {', '.join((*THIRDS, *known))}"
                raise RecipeError(what, key="adapter.ranks", todo=todo)

    def rank_of(self, linear: str, number: int, layers: Sequence[int]) -> int:
        """Rank beside one linear.

        Args:
            linear: Its name.
            number: Of its layer; -1: it is in none.
            layers: Numbers of those that get an adapter, in order.
        """
        if linear in self._named():
            return self._named()[linear]
        by_layer = self._by_layer(len(layers)) if number in layers else []
        return by_layer[layers.index(number)] if by_layer else self.usual

    def counted(self, linear: str, numbers: Sequence[int], layers: Sequence[int]) -> Counter[int]:
        """How many linears of a name have each rank; `numbers` are those of their layers, the rest as in `rank_of`."""
        if self.ranks is None:  # asked for at every size that an estimate tries
            return Counter({self.usual: len(numbers)})
        return Counter(self.rank_of(linear, number, layers) for number in numbers)

    def pattern(self, paths: Mapping[str, int]) -> dict[str, int]:
        """PEFT's `rank_pattern`: the ranks that are not the usual one, by what matches the paths of their linears.

        Args:
            paths: Numbers of the layers that get an adapter, by their paths.
        """
        found: dict[int, list[str]] = {}
        for path, rank in zip(sorted(paths, key=paths.__getitem__), self._by_layer(len(paths)), strict=False):
            found.setdefault(rank, []).append(path)
        by_layer = {f"({'|'.join(own)})[.].+": rank for rank, own in found.items()}
        return {pattern: rank for pattern, rank in {**by_layer, **self._named()}.items() if rank != self.usual}

    def _named(self) -> Mapping[str, int]:
        return {} if not isinstance(self.ranks, Mapping) or self._is_by_thirds() else self.ranks

    def _is_by_thirds(self) -> bool:
        return isinstance(self.ranks, Mapping) and self.ranks.keys() <= {*THIRDS}

    def _by_layer(self, count: int) -> Sequence[int]:
        """Of each of so many layers; empty where their numbers decide nothing."""
        if isinstance(self.ranks, Mapping):
            ranks = self.ranks if self._is_by_thirds() else {}
            thirds = [THIRDS[(6 * place + 3) // (2 * count)] for place in range(count)]
            return [ranks.get(third, self.usual) for third in thirds] if ranks else []
        return self.ranks or []
