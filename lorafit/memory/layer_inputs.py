"""What the walk through a layer is told, and what it is made of: numerics, one micro-batch's work, operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from lorafit.facts import LinearShape


@dataclass(frozen=True, slots=True)
class Numerics:
    """How a training stack computes; the defaults are lorafit's own: bf16 autocast over fp32 adapters.

    Attributes:
        stream_bytes: Of the residual stream, a value.
        compute_bytes: Of the operands of matrix products.
        adapter_bytes: Of adapter weights.
        autocast: Whether torch's autocast is on.
        device_kind: `cpu` or `cuda`: a CPU keeps a dropout mask in the input's dtype, a GPU one byte a value.
        keeps_inputs: Every linear keeps its input: full fine-tuning, and LLM.int8().
        leaks_inputs: And out of checkpointing's reach: LLM.int8().
        fused: Layers run as `lorafit.model.fuse` makes them: a norm, a gated product and a linear with its LoRA branch
            are one operation each.

    The constants and methods are lorafit's as well; what describes another stack overrides them
    (benchmarks/memory_published.py).
    """

    trains_a: ClassVar[bool] = True
    """Whether the adapters' A is trained, and so keeps its input."""
    widens: ClassVar[bool] = False
    """Whether what autocast computes in fp32 (LayerNorm, pow) goes on in fp32; lorafit's objective casts it back."""

    stream_bytes: int = 2
    compute_bytes: int = 2
    adapter_bytes: int = 4
    autocast: bool = True
    device_kind: str = "cuda"
    keeps_inputs: bool = False
    leaks_inputs: bool = False
    fused: bool = True

    @property
    def wide_on_gpu(self) -> bool:
        """Whether autocast computes pow and LayerNorm in fp32 (CUDA's list has them, the CPU's has not)."""
        return self.autocast and self.device_kind != "cpu"

    def adapter_reads(self, input_bytes: int) -> int:
        """Bytes of a value of what an adapter gets: under autocast its input as it is."""
        return input_bytes if self.autocast else self.adapter_bytes

    def layer_inputs_kept(self, layers: int) -> int:
        """How many layers' inputs are on the device under checkpointing."""
        return layers

    def norm_kernel(self, hidden: int) -> Operation | None:
        """RMSNorm as a kernel of its own, which keeps the stream's own tensor; None: as torch's operations."""
        return None


@dataclass(frozen=True, slots=True)
class Work:
    """One micro-batch in one layer.

    Attributes:
        row_tokens: Padded length of a row: what eager attention grows with.
        adapted: The linears that carry an adapter.
        rank: Width of the adapters' bottleneck.
        dropout: On the adapters' inputs.
        attention: `eager`, `fused`, or anything that keeps no scores but its output.
        masked: Whether attention that keeps no scores gets a mask: packed documents.
        dequantised_bytes: Bytes of the dequantised copy of one linear's weight; 0 where weights are plain.
        keeps_unpacked: Whether adapted linears that run fused keep that copy, instead of making it for each product.
    """

    row_tokens: int
    adapted: tuple[LinearShape, ...]
    rank: int
    dropout: float
    attention: str
    dequantised_bytes: Callable[[LinearShape], int]
    numerics: Numerics = Numerics()
    masked: bool = False
    keeps_unpacked: bool = False


@dataclass(frozen=True, slots=True)
class Moment:
    """Something alive only for a moment: bytes a token, and bytes that do not grow with tokens (a dequantised weight,
    the scores of a block of queries)."""

    phase: str
    token_bytes: float
    fixed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a layer: what it keeps for the backward pass, and its moments."""

    name: str
    kept: float
    moments: tuple[Moment, ...] = ()
