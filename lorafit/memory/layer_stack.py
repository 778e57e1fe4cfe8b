"""How the training stack computes one decoder layer: widths of what it holds, and which parts run as one operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorafit.facts import LinearShape, ModelShape
from lorafit.ops.attention_kernels import Kernel
from lorafit.ops.fusible import fuses_branch


@dataclass(frozen=True)
class LayerStack:
    """One decoder layer under one micro-batch, and how the training stack computes it.

    Attributes:
        row_tokens: Padded length of a row: what eager attention grows with.
        adapted: The linears that carry an adapter.
        rank: Width of the adapters' bottleneck.
        dropout: On the adapters' inputs.
        attention: `eager`, `fused`, or anything that keeps no scores but its output.
        dequantised_bytes: Bytes of the dequantised copy of one linear's weight; 0 where weights are plain.
        compute_bytes: Of the operands of matrix products, a value.
        autocast: Whether torch's autocast is on, over fp32 adapters.
        device_kind: `cpu` or `cuda`: a CPU keeps a dropout mask in the input's dtype, a GPU one byte a value.
        masked: Whether attention that keeps no scores gets a mask: packed documents.
        kernel: What computes attention that is neither `eager` nor `fused`.
        keeps_unpacked: Whether adapted linears that run fused keep that copy, instead of making it for each product.
        keeps_input: Share of a linear's layers in which it keeps its input: all in full fine-tuning and of LLM.int8().
        leaks_inputs: Whether that is out of checkpointing's reach: LLM.int8().
        fused: Layers run as `lorafit.model.fuse` makes them: a norm, a gated product and a linear with its LoRA branch
            are one operation each.
        runs_liger: Whether Liger's kernels compute the gated product and the loss: gradients lie where their operands
            lay.
    """

    shape: ModelShape
    row_tokens: int
    adapted: tuple[LinearShape, ...]
    rank: int
    dropout: float
    attention: str
    dequantised_bytes: Callable[[LinearShape], int]
    compute_bytes: int = 2
    autocast: bool = True
    device_kind: str = "cuda"
    masked: bool = False
    kernel: Kernel = "flash"
    keeps_unpacked: bool = False
    keeps_input: Callable[[LinearShape], float] = lambda linear: 0.0
    leaks_inputs: bool = False
    fused: bool = True
    runs_liger: bool = False

    @property
    def stream_bytes(self) -> int:
        """Of the residual stream, a value."""
        return self.compute_bytes

    @property
    def adapter_bytes(self) -> int:
        """Of adapter weights, a value."""
        return 4

    @property
    def layer_inputs_kept(self) -> int:
        """How many layers' inputs are on the device under checkpointing."""
        return self.shape.layers

    @property
    def wide_on_gpu(self) -> bool:
        """Whether autocast computes pow and LayerNorm in fp32 (CUDA's list has them, the CPU's has not)."""
        return self.autocast and self.device_kind != "cpu"

    @property
    def casts_once(self) -> bool:
        """Whether adapters are cast once a step, all together."""
        return self.fused and self.device_kind != "cpu"

    @property
    def mask_bytes(self) -> int:
        """Of a dropout mask, a value."""
        return self.compute_bytes if self.device_kind == "cpu" else 1

    def share(self, linear: LinearShape) -> float:
        """Share of the layers that hold it, at most 1."""
        return min(1.0, linear.count / max(self.shape.layers, 1))

    # Which parts run as one operation

    def fuses_linear(self, linear: LinearShape) -> bool:
        """Whether a linear and its branch do."""
        keeps_input = self.keeps_input(linear) == 1
        known = linear.quantizable  # the classes that transformers can replace are those that are fused
        return self.fused and fuses_branch(of_known_class=known, keeps_input=keeps_input, transposed=linear.transposed)

    def fuses_norm(self) -> bool:
        """Whether a norm does."""
        return self.fused and self.shape.norm == "rms" and self.shape.plain_norm

    def fuses_gate(self) -> bool:
        """silu between a gate and an up projection of their own."""
        return self.shape.activation == "silu" and {"gate", "up"} <= {linear.role for linear in self.shape.linears}

    def fuses_projections(self) -> bool:
        """Whether both projections and their product do (`lorafit.ops.lora_gated`)."""
        joined = {linear.role for linear in self.adapted if self.fuses_linear(linear)}
        return self.dropout == 0 and self.fuses_gate() and {"gate", "up"} <= joined

    def fuses_attention(self) -> bool:
        """Whether attention runs as `lorafit.ops.causal_attention` does; it hands anything unusual to sdpa."""
        shape = self.shape
        is_usual = not (self.masked or shape.attention_dropout or shape.softcap or shape.math_attention)
        return self.attention == "fused" and self.device_kind == "cpu" and is_usual

    def is_math(self) -> bool:
        """Whether sdpa is plain products."""
        dropped = self.device_kind == "cpu" and self.shape.attention_dropout > 0  # no CPU flash kernel takes dropout
        return self.shape.math_attention or dropped or self.kernel == "math"

    def keeps_attended(self) -> bool:
        """Whether attention keeps its own result: one kernel does, plain products do not."""
        are_products = self.attention == "eager" or bool(self.shape.softcap) or self.is_math()
        return not (are_products or self.fuses_attention())
