"""Counts live tensor storage while a step runs, real or on fake tensors: what `max_memory_allocated` counts on a GPU.

    storage   ──born──────────── alive ─────────────died──      one record each: bytes, when, in which phase
    phase     forward │ loss │ backward          │ update
    peak                            ↑ what is alive here, by component, and the operation that made the last of it

Every tensor that an operation returns is noted by its storage, and forgotten when the storage dies. What an operation
takes and gives back inside itself (a kernel's workspace) is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorafit.ops.step_hook import StepHook

_MODULE = "lorafit.module"  # key in an autograd node's metadata


@dataclass(slots=True)
class _Record:
    """One storage. `component` is empty where it follows from when the storage was born and died."""

    size_bytes: int
    component: str
    born_in: str
    recomputed: bool
    died_in: str = ""
    died_at: int = -1


@dataclass(frozen=True, slots=True)
class LivePeak:
    """The worst moment of what was counted.

    Attributes:
        tensor_bytes: The most that was alive at once.
        phase: `forward`, `loss`, `backward` or `update`; empty before the first.
        where: The operation of that moment, and the module or backward node it ran in.
        components: What was alive then, in the terms of `lorafit.memory`.
        phases: The most that was alive in each phase; under the empty name, what was there before the first.
        parts: What that was, by component.
        places: The operation of each phase's worst moment.
    """

    tensor_bytes: int
    phase: str
    where: str
    components: dict[str, int]
    phases: dict[str, int]
    parts: dict[str, dict[str, int]]
    places: dict[str, str]


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that counts what is alive from when it was made.

    Args:
        rounding_bytes: Each storage is rounded up to so many: 512 is what CUDA's caching allocator gives out at least.
    """

    def __init__(self, rounding_bytes: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.phase = ""
        self.modules: list[str] = []
        self._rounding_bytes = rounding_bytes
        self._alive: dict[int, _Record] = {}
        self._records: list[_Record] = []
        self._worst: dict[str, tuple[int, int, str]] = {}  # by phase: bytes, the last record, its operation

    def note(self, tensors: Iterable[Any], component: str = "") -> None:
        """Counts tensors that were there before, or names the component of tensors that are counted already."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, component, None)

    @property
    def peak_bytes(self) -> int:
        """The most that was alive at once."""
        return max((size for size, *_ in self._worst.values()), default=0)

    def peak(self) -> LivePeak:
        """The worst moment so far."""
        sizes = {phase: size for phase, (size, *_) in self._worst.items()}
        parts = {phase: self._components(at) for phase, (_, at, _) in self._worst.items()}
        places = {phase: place for phase, (*_, place) in self._worst.items()}
        phase = max(sizes, key=lambda name: sizes[name], default="")
        return LivePeak(self.peak_bytes, phase, places.get(phase, ""), parts.get(phase, {}), sizes, parts, places)

    def _components(self, at: int) -> dict[str, int]:
        """What was alive when a record was made."""
        found: dict[str, int] = defaultdict(int)
        for record in self._records[: at + 1]:
            if record.died_at < 0 or record.died_at > at:
                found[_component(record)] += record.size_bytes
        return dict(found)

    def _note(self, tensor: torch.Tensor, component: str, operation: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None:
            if component:
                known.component = component
            return
        size = storage.nbytes()
        if size == 0:
            return
        size = -(-size // self._rounding_bytes) * self._rounding_bytes
        record = _Record(size, component, self.phase, self.phase == "backward" and bool(self.modules))
        self._alive[key] = record
        self._records.append(record)
        weakref.finalize(storage, self._forget, key)
        self.live_bytes += size
        if self.live_bytes > self._worst.get(self.phase, (0,))[0]:
            self._worst[self.phase] = self.live_bytes, len(self._records) - 1, self._describe(operation)

    def _forget(self, key: int) -> None:
        record = self._alive.pop(key, None)
        if record is not None:
            record.died_in, record.died_at = self.phase, len(self._records)
            self.live_bytes -= record.size_bytes

    def _describe(self, operation: Any) -> str:
        if operation is None:
            return ""
        if self.modules:
            recomputing = "recomputing " if self.phase == "backward" else ""
            return f"{operation} in {recomputing}{self.modules[-1]}"
        node = torch._C._current_autograd_node() if self.phase == "backward" else None
        if node is None:
            return str(operation)
        metadata: Any = node.metadata
        module = metadata.get(_MODULE)
        return f"{operation} in " + (f"the backward of {module}" if module else node.name())

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = self.call(function, arguments, options or {})
        component = ""
        if function is torch.ops.aten._to_copy.default:  # autocast's cast of an adapter's weight belongs to it
            component = "adapter" if self._is_of_adapter(arguments[0]) else ""
        if function is torch.ops.aten._foreach_copy_.default:  # and so do the casts of all of them
            self.note(
                (copy for copy, source in zip(*arguments[:2], strict=True) if self._is_of_adapter(source)), "adapter"
            )
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, component, function)
        return result

    def _is_of_adapter(self, tensor: torch.Tensor) -> bool:
        record = self._alive.get(tensor.untyped_storage()._cdata)
        return record is not None and record.component == "adapter"

    def call(self, function: Any, arguments: Any, options: Any) -> Any:
        """Runs one operation."""
        return function(*arguments, **options)


def _component(record: _Record) -> str:
    """In the terms of `lorafit.memory`: what the forward leaves for the backward is kept, the rest a workspace."""
    if record.component:
        return record.component
    if record.born_in == "loss":
        return "loss"
    if record.born_in == "forward" and record.died_in != "forward":
        return "kept_activations"
    return "recomputation" if record.recomputed else "workspace"


@contextlib.contextmanager
def watching(
    live: LiveTensors, objective: Any, optimizer: torch.optim.Optimizer, hooks: Sequence[StepHook] = ()
) -> Iterator[LiveTensors]:
    """Counts inside: what is there already by component, then every operation, with phase and module.

    Args:
        live: The counter.
        objective: Model and loss; `base` is the transformers model.
        optimizer: Over the objective's trainable parameters.
        hooks: What they keep counts as the optimizer's state.
    """
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    base = objective.base
    names = {id(module): name for name, module in base.named_modules() if name}
    backbone = getattr(base, base.base_model_prefix, None)

    def enter(module: torch.nn.Module, _: Any) -> None:
        if id(module) in names:
            live.modules.append(names[id(module)])
        elif module is objective:
            live.phase = "forward"

    def leave(module: torch.nn.Module, _: Any, output: Any) -> None:
        if id(module) in names:
            name = live.modules.pop()
            node = getattr(output, "grad_fn", None)
            if node is not None:
                node.metadata.setdefault(_MODULE, name)  # the innermost module leaves first
        if module is objective:
            live.phase = "backward"
        elif module is backbone:
            live.phase = "loss"

    def update(*_: Any) -> None:
        live.phase = "update"

    live.note((value for hook in hooks for value in hook.state_dict().values()), "optimizer_state")
    live.note((p.data for p in objective.parameters() if not p.requires_grad), "base_weights")
    live.note(objective.buffers(), "base_weights")
    live.note(quantization_tensors(objective), "quantization_constants")
    live.note(unpacked_weights(objective), "unpacked_weights")
    live.note((p.data for p in trained), "adapter")
    live.note((p.grad for p in trained), "gradients")
    live.note((value for state in optimizer.state.values() for value in state.values()), "optimizer_state")
    watchers = [p.register_post_accumulate_grad_hook(lambda p: live.note([p.grad], "gradients")) for p in trained]
    watchers += [
        torch.nn.modules.module.register_module_forward_pre_hook(enter),
        torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
        optimizer.register_step_pre_hook(update),
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(live.modules.clear)
        for watcher in watchers:
            stack.enter_context(watcher)
        stack.enter_context(live)
        yield live


def unpacked_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """Dequantised copies that `lorafit.model.fused_lora.keep_unpacked` left on its layers."""
    return [vars(module)["unpacked_weight"] for module in model.modules() if "unpacked_weight" in vars(module)]


def quantization_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Constants that bitsandbytes keeps beside its weights, outside of parameters and buffers."""
    found: list[Any] = []
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code, state.offset]
            found += [state.state2.absmax, state.state2.code] if state.state2 is not None else []
        eight_bit = getattr(module, "state", None)
        found += [getattr(eight_bit, "CB", None), getattr(eight_bit, "SCB", None)]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
