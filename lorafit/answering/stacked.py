"""Low-rank adapters beside the linears of one base, each row of a batch with its own.

    rows of a batch       a  b  a  -  c                    x [rows, in]
    by adapter            [a a] [b .] [c .]                X [adapters, most rows of one, in]
    one gathered product  X @ A^T @ B                      A [adapters, r, in]    B [adapters, r, out], scale inside
    back to the rows      a  b  a  -  c                    added to what the base's linear answers

A and B of the adapters in a batch lie in one tensor for each linear, padded with zeros to the widest rank. It is made
anew only when an adapter comes that is not in it, and not for a batch of a single adapter, which is a plain product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lorafit.errors import ModelError
from lorafit.files.safetensors import read_rows
from lorafit.model.low_rank import read_low_rank

if TYPE_CHECKING:
    from lorafit.model.adapter import AdapterFolder

Factors = tuple[torch.Tensor, torch.Tensor]
"""A `[r, in]` and B `[r, out]`, fp32, B times the scale."""


class StackedAdapters:
    """The adapters of one base that are products B A beside its linears.

    Args:
        model: The base, or PEFT's model around it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        from transformers.pytorch_utils import Conv1D

        base: Any = model
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        found = {path.removesuffix(".base_layer"): module for path, module in base.named_modules()}
        self._paths = list(found)
        self.linears = {path: one for path, one in found.items() if isinstance(one, torch.nn.Linear | Conv1D)}
        self._sites: dict[str, _Site] = {}
        self._adapters: dict[str, dict[str, Factors]] = {}
        self._arranged: tuple[tuple[str | None, ...], list[tuple[_Site, _Arrangement]]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(self._adapters)

    def read(self, saved: AdapterFolder) -> dict[str, Factors]:
        """A saved adapter's factors by the paths of its linears.

        Raises:
            ModelError: It is something else than such products at linears of this base, or not all of it is there.
        """
        from peft import get_peft_config
        from peft.tuners.tuners_utils import check_target_module_exists

        layers = read_low_rank(saved)
        config = get_peft_config(saved.kind.opened_config(saved.config))
        promised = {path for path in self._paths if check_target_module_exists(config, path)}
        if promised != layers.keys() or len(saved.tensors) != 2 * len(layers):
            raise ModelError("it holds more or less than a product for each linear that it names")
        made: dict[str, Factors] = {}
        for path, layer in layers.items():
            a, b = (read_rows(layer.factors[part]).float() for part in "AB")
            if path not in self.linears or (a.shape[1:], b.shape[:1]) != sizes(self.linears[path]):
                raise ModelError(f"'{path}' is no linear of that size")
            device = self.linears[path].weight.device
            made[path] = a.to(device), (b.t() * layer.scaling).contiguous().to(device)
        return made

    def add(self, name: str, factors: Mapping[str, Factors]) -> None:
        """Puts an adapter beside its linears."""
        self._adapters[name], self._arranged = dict(factors), None
        for path in factors:
            if path not in self._sites:
                self._sites[path] = _Site(self.linears[path])

    def remove(self, name: str) -> None:
        """Takes an adapter away; a linear without any answers as before."""
        self._arranged = None
        for path in self._adapters.pop(name):
            if any(path in others for others in self._adapters.values()):
                self._sites[path].forget()
            else:
                self._sites.pop(path).close()

    @contextlib.contextmanager
    def applied(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it each row of the model's batch is answered with its adapter.

        Args:
            names: Of each row; None: the base alone. A single one is for a batch of whatever rows.
        """
        if self._arranged is None or self._arranged[0] != tuple(names):
            self._arranged = tuple(names), self._arrange(names)
        for site, arrangement in self._arranged[1]:
            site.arrangement = arrangement
        try:
            yield
        finally:
            for site, _ in self._arranged[1]:
                site.arrangement = None

    def _arrange(self, names: Sequence[str | None]) -> list[tuple[_Site, _Arrangement]]:
        """The linears that have an adapter of these rows, with what they need to know; factors are gathered."""
        wanted = [name for name in dict.fromkeys(names) if name is not None]
        made: dict[tuple[str, ...], _Arrangement] = {}  # most linears have the same adapters
        arranged = []
        for path, site in self._sites.items():
            own = {name: self._adapters[name][path] for name in wanted if path in self._adapters[name]}
            if own:
                site.gather(own)
                key = tuple(site.gathered)
                if key not in made:
                    made[key] = _Arrangement.of(names, key, site.linear.weight.device)
                arranged.append((site, made[key]))
        return arranged


def sizes(linear: torch.nn.Module) -> tuple[torch.Size, torch.Size]:
    """Inputs and outputs, as shapes."""
    made: Any = linear
    if hasattr(made, "nf"):  # transformers' Conv1D
        return torch.Size([made.nx]), torch.Size([made.nf])
    return torch.Size([made.in_features]), torch.Size([made.out_features])


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """Which row is where in the gathered product.

    Attributes:
        rows: Rows of the batch.
        whole: Whether all of them have the one adapter there is.
        most: Rows of the adapter that has most.
        taken: Row of the batch for each place of X, `[adapters * most]`.
        rows_of: Rows that have an adapter.
        places: Their places in X.
    """

    rows: int
    whole: bool
    most: int
    taken: torch.Tensor
    rows_of: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, names: Sequence[str | None], adapters: Sequence[str], device: torch.device) -> _Arrangement:
        """Of the rows' adapters, and those that are gathered."""
        rows = [[row for row, name in enumerate(names) if name == adapter] for adapter in adapters]
        most = max(map(len, rows))
        taken = [row for own in rows for row in own + [0] * (most - len(own))]
        places = {row: number * most + place for number, own in enumerate(rows) for place, row in enumerate(own)}
        whole = len(adapters) == 1 and most == len(names)
        tensors = (torch.tensor(values, device=device) for values in (taken, [*places], [*places.values()]))
        return cls(len(names), whole, most, *tensors)


@dataclass(eq=False)
class _Site:
    """One linear with the adapters beside it.

    Attributes:
        linear: It.
        gathered: Adapters in the tensors of the product, with the factors that went in.
        arrangement: Of the batch that is running; None: no row has an adapter here.
    """

    linear: Any
    gathered: dict[str, Factors] = field(default_factory=dict)
    arrangement: _Arrangement | None = None

    def __post_init__(self) -> None:
        self._hook = self.linear.register_forward_hook(self._add)
        self._a = self._b = torch.empty(0)

    def close(self) -> None:
        """Leaves the linear as it was."""
        self._hook.remove()

    def forget(self) -> None:
        """Lets go of what was gathered."""
        self.gathered = {}
        self._a = self._b = torch.empty(0)

    def gather(self, own: Mapping[str, Factors]) -> None:
        """Has the factors of these adapters in one tensor, where that is not so; twice as many may stay in it."""
        if own.keys() <= self.gathered.keys() and len(self.gathered) <= 2 * len(own) and len(own) > 1:
            return
        if [*self.gathered] == [*own]:
            return
        self.gathered = dict(own)
        if len(own) == 1:
            ((a, b),) = own.values()
            self._a, self._b = a[None], b[None]
            return
        rank = max(len(a) for a, _ in own.values())
        self._a, self._b = (
            torch.stack([functional.pad(pair[part], (0, 0, 0, rank - len(pair[part]))) for pair in own.values()])
            for part in (0, 1)
        )

    def _add(self, _: torch.nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Adds each row's product to what the base answers, in place: nobody else has that tensor yet."""
        order = self.arrangement
        if order is None:
            return None
        x, flat = arguments[0].reshape(-1, arguments[0].shape[-1]), output.reshape(-1, output.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            if order.whole:
                return flat.add_(x.float() @ self._a[0].t() @ self._b[0]).view(output.shape)
            if len(x) != order.rows:
                raise ModelError(f"a linear sees {len(x)} rows of a batch of {order.rows}")
            taken = x.index_select(0, order.taken).float().view(-1, order.most, x.shape[-1])
            added = (taken @ self._a.transpose(1, 2) @ self._b).view(-1, flat.shape[-1])
            flat.index_add_(0, order.rows_of, added.index_select(0, order.places).to(flat.dtype))
        return flat.view(output.shape)
