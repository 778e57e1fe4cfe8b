"""What the walk through a layer is told, and what it is made of: numerics, one micro-batch's work, operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        casts_adapter_inputs: PEFT's default, which lorafit's objective turns off under autocast: an adapter's input is
            cast
            to the adapter's dtype before autocast casts it down again.
        keeps_inputs: Every linear keeps its input: full fine-tuning, and LLM.int8().
        leaks_inputs: And out of checkpointing's reach: LLM.int8().
        offloads_layer_inputs: Checkpointed layer inputs wait in host memory.
        trains_a: Whether the adapters' A is trained; a frozen one (LoRA-FA) keeps nothing of its input.
        fused_norm: A fused kernel keeps the norm's input and no fp32 copy.
        fused: Layers run as `lorafit.model.fuse` makes them: a norm, a gated product and a linear with its LoRA branch
            are one operation each.
        widens: What autocast computes in fp32 (LayerNorm, pow) goes on in fp32; lorafit's objective casts it back.
    """

    stream_bytes: int = 2
    compute_bytes: int = 2
    adapter_bytes: int = 4
    autocast: bool = True
    device_kind: str = "cuda"
    casts_adapter_inputs: bool = False
    keeps_inputs: bool = False
    leaks_inputs: bool = False
    offloads_layer_inputs: bool = False
    trains_a: bool = True
    fused_norm: bool = False
    fused: bool = True
    widens: bool = False

    @property
    def wide_on_gpu(self) -> bool:
        """Whether autocast computes pow and LayerNorm in fp32 (CUDA's list has them, the CPU's has not)."""
        return self.autocast and self.device_kind != "cpu"


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
