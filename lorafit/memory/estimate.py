"""The estimate: components that stay, phases that come and go, and the card that all of it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lorafit.facts import LinearShape, ModelShape
from lorafit.kinds.adapters import Adapter, AdapterSection
from lorafit.kinds.optimizers import Optimizer, OptimizerSection
from lorafit.kinds.quantizations import Quantization, QuantizationSection, quantizations
from lorafit.memory.layer import (
    LayerPeak,
    final_norm_bytes,
    keeps_layer_input,
    layer_operations,
    layer_peak,
    ungraded_bytes,
)
from lorafit.memory.layer_inputs import Numerics, Work
from lorafit.memory.linear import fuses_linears, unpacked_bytes
from lorafit.ops.chunk_sizes import chunk_labels

if TYPE_CHECKING:
    from lorafit.memory.exact import ExactEstimate

ALLOCATOR_FACTOR = {"cuda": 1.10, "cpu": 1.40}
"""Reserved beside allocated: torch's caching allocator rounds and fragments. Source: the published fms-hf-tuning
benchmark, fused-loss rows, (nvidia-smi - context) / max_memory_allocated = 1.10; lower with short, equal rows, higher
with full logits. On a CPU: resident memory less context over live tensors, 0.9 to 1.5 in the 24 runs of
benchmarks/memory_measured.py (the C library keeps what was freed, oneDNN its buffers, loading its copies)."""

CONTEXT_BYTES = {"cuda": 512 * 2**20, "cpu": 600 * 2**20}
"""CUDA context and kernels: 0.4-0.6 GiB by card and driver. On a CPU: interpreter and libraries, as resident
memory: 410 MiB measured with torch, transformers, peft, bitsandbytes and accelerate; datasets, arrow and the tokenizer
are the rest."""

COMPONENTS = (
    "base_weights",
    "quantization_constants",
    "unpacked_weights",
    "adapter",
    "gradients",
    "optimizer_state",
    "kept_activations",
    "recomputation",
    "loss",
    "workspace",
)
"""Everything that is a tensor, in the order of the table."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What is alive at one phase's worst moment, beside the fixed components."""

    name: str
    where: str
    kept_bytes: int = 0
    recomputation_bytes: int = 0
    loss_bytes: int = 0
    workspace_bytes: int = 0
    casts_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        parts = (self.kept_bytes, self.recomputation_bytes, self.loss_bytes, self.workspace_bytes, self.casts_bytes)
        return sum(parts)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak memory of one training process, itemised at its worst moment.

    Attributes:
        fixed: Components that stay, in bytes: base_weights, quantization_constants, unpacked_weights, adapter,
            gradients, optimizer_state.
        phases: forward, loss, backward, update.
        device_kind: `cpu` or `cuda`.
        micro_batch_tokens: Padded tokens of the forward that was estimated.
        gradient_checkpointing: Whether it was estimated with it.
        paged_bytes: Optimizer state among the fixed that a paged optimizer can move to host memory.
        unquantized_expert_bytes: Experts of a mixture among the base weights: no quantisation touches them.
    """

    fixed: Mapping[str, int]
    phases: tuple[Phase, ...]
    device_kind: str
    micro_batch_tokens: int
    gradient_checkpointing: bool
    paged_bytes: int = 0
    unquantized_expert_bytes: int = 0
    allocator_factor: float = field(default=0.0)

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    @property
    def components(self) -> dict[str, int]:
        """Bytes by component at the peak; they add up to `tensor_bytes`."""
        peak = self.peak_phase
        return {
            **self.fixed,
            "adapter": self.fixed["adapter"] + peak.casts_bytes,
            "kept_activations": peak.kept_bytes,
            "recomputation": peak.recomputation_bytes,
            "loss": peak.loss_bytes,
            "workspace": peak.workspace_bytes,
        }

    @property
    def tensor_bytes(self) -> int:
        """Peak of live tensors: what `torch.cuda.max_memory_allocated` reports."""
        return sum(self.fixed.values()) + self.peak_phase.total_bytes

    @property
    def context_bytes(self) -> int:
        """What the process takes before any tensor."""
        return CONTEXT_BYTES[self.device_kind]

    @property
    def needed_bytes(self) -> int:
        """What the card must have: tensors x allocator factor + context."""
        return needed_bytes(self.tensor_bytes, self.device_kind, self.allocator_factor)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, in bytes."""
        return {
            "components_bytes": self.components,
            "phases_bytes": {phase.name: phase.total_bytes + sum(self.fixed.values()) for phase in self.phases},
            "peak_phase": self.peak_phase.name,
            "peak_where": self.peak_phase.where,
            "tensor_bytes": self.tensor_bytes,
            "allocator_factor": self.allocator_factor or ALLOCATOR_FACTOR[self.device_kind],
            "context_bytes": self.context_bytes,
            "needed_bytes": self.needed_bytes,
            "device_kind": self.device_kind,
            "micro_batch_tokens": self.micro_batch_tokens,
            "gradient_checkpointing": self.gradient_checkpointing,
            "paged_bytes": self.paged_bytes,
            "unquantized_expert_bytes": self.unquantized_expert_bytes,
        }


def needed_bytes(tensor_bytes: int, device_kind: str, allocator_factor: float = 0.0) -> int:
    """What the card must have for so many live bytes: tensors x allocator factor + context."""
    return round(tensor_bytes * (allocator_factor or ALLOCATOR_FACTOR[device_kind])) + CONTEXT_BYTES[device_kind]


def fits(estimate: MemoryEstimate | ExactEstimate, device_bytes: int, headroom: float = 0.05) -> bool:
    """Tensors x allocator factor + context <= usable memory x (1 - headroom)."""
    return estimate.needed_bytes <= device_bytes * (1.0 - headroom)


def labels_of(micro_batch_tokens: int, longest_tokens: int, longest_trained_tokens: int) -> int:
    """Most labels in a micro-batch: as many rows as fit, each with the most trained tokens that any row has."""
    rows = max(1, micro_batch_tokens // max(1, longest_tokens))
    return rows * min(longest_trained_tokens, longest_tokens - 1) if longest_tokens > 1 else rows


def estimate(
    shape: ModelShape,
    *,
    quantization: Quantization[QuantizationSection],
    adapter: Adapter[AdapterSection],
    optimizer: Optimizer[OptimizerSection],
    dtype_bytes: int,
    micro_batch_tokens: int,
    longest_tokens: int,
    labels: int,
    gradient_checkpointing: bool,
    attention: str = "sdpa",
    device_kind: str = "cuda",
    packed: bool = False,
    keeps_unpacked: bool = False,
) -> MemoryEstimate:
    """Peak memory of lorafit's own training step.

    Args:
        dtype_bytes: Of weights that are not quantised, and of compute: 2 for bf16 and fp16 (under autocast), 4 for
            fp32.
        micro_batch_tokens: Padded tokens of one forward; at least one longest row is counted.
        longest_tokens: Tokens of the longest row: what eager attention grows with.
        labels: Trained tokens in the micro-batch.
        attention: `eager`, or any that keeps no scores.
        packed: Whether a mask keeps several documents of a row apart.
        keeps_unpacked: Whether adapted linears keep their dequantised weight for the whole run.

    Raises:
        RecipeError: The adapter's targets match nothing in this model.
    """
    plain = quantizations.make("none")
    if not shape.quantizable:
        quantization = plain
    tokens = max(micro_batch_tokens, longest_tokens)
    sites = adapter.sites(shape)
    trainable = sum(site.parameters for site in sites)

    def dequantised(linear: LinearShape) -> int:
        one = replace(linear, count=1)
        return quantization.workspace_bytes(one, dtype_bytes) if linear.quantizable else 0

    numerics = _numerics(quantization, dtype_bytes, device_kind)
    work = Work(
        row_tokens=longest_tokens,
        adapted=tuple(site.linear for site in sites if site.linear is not None),
        rank=adapter.rank(),
        dropout=float(getattr(adapter.section, "dropout", 0.0)),
        attention=attention,
        dequantised_bytes=dequantised,
        numerics=numerics,
        masked=packed and attention != "eager",
        keeps_unpacked=keeps_unpacked,
    )
    outside = shape.embedding_parameters + shape.head_parameters + shape.other_parameters
    experts_bytes = shape.expert_parameters * dtype_bytes
    packed_linears = [linear for linear in shape.linears if linear.quantizable]
    weights = [quantization.weight_bytes(linear, dtype_bytes) for linear in packed_linears]
    weights += [plain.weight_bytes(x, dtype_bytes) for x in shape.linears if not x.quantizable]
    state_bytes = optimizer.state_bytes(trainable)
    fixed = {
        "base_weights": sum(weights) + outside * dtype_bytes + experts_bytes,
        "quantization_constants": sum(quantization.constant_bytes(x) for x in packed_linears),
        "unpacked_weights": unpacked_bytes(work),
        "adapter": 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer_state": state_bytes,
    }
    return MemoryEstimate(
        fixed=fixed,
        phases=step_phases(shape, work, tokens, loss_bytes(shape, numerics, labels), gradient_checkpointing, trainable),
        device_kind=numerics.device_kind,
        micro_batch_tokens=tokens,
        gradient_checkpointing=gradient_checkpointing,
        paged_bytes=state_bytes if optimizer.is_paged and device_kind == "cuda" else 0,
        unquantized_expert_bytes=experts_bytes if quantization.is_quantized else 0,
    )


def _numerics(quantization: Quantization[QuantizationSection], dtype_bytes: int, device_kind: str) -> Numerics:
    """lorafit's own way of computing."""
    return Numerics(
        stream_bytes=dtype_bytes,
        compute_bytes=dtype_bytes,
        autocast=dtype_bytes < 4,
        device_kind="cpu" if device_kind == "cpu" else "cuda",
        keeps_inputs=quantization.keeps_inputs,
        leaks_inputs=quantization.keeps_inputs,
    )


def step_phases(
    shape: ModelShape, work: Work, tokens: int, loss: int, checkpointing: bool, trainable: int
) -> tuple[Phase, ...]:
    """Forward, loss, backward and update of one step, each at its worst moment; `loss` is what computing it takes."""
    n = work.numerics
    operations = layer_operations(shape, work)
    forward_peak = layer_peak(operations, tokens, "forward")
    backward_peak = layer_peak(operations, tokens, "backward")
    casts = trainable * n.compute_bytes if n.autocast else 0  # of the adapters' weights
    cached = 0 if fuses_linears(work) else casts  # by autocast, through the forward; a fused linear's go with its layer
    stream = shape.hidden_size * n.stream_bytes * tokens
    final_norm = final_norm_bytes(shape, n) * tokens
    mask_bytes = n.compute_bytes if work.attention == "eager" or shape.softcap else 1 if work.masked else 0
    mask = mask_bytes * work.row_tokens * tokens
    update = Phase("update", "", 0, 0, 0, n.adapter_bytes * trainable, 0)
    if checkpointing:
        stored = 1 if n.offloads_layer_inputs else shape.layers
        inputs = stream * stored + _leaked_bytes(shape, n, tokens) * shape.layers + mask
        again = final_norm if keeps_layer_input(shape, n) else 0
        again_forward = forward_peak.peak_bytes + stream > backward_peak.peak_bytes  # the result's gradient waits
        worst = forward_peak if again_forward else backward_peak
        where = f"{'recomputing ' if again_forward else ''}{worst.where}"
        recomputed = worst.peak_bytes - worst.fixed_bytes - again + (stream if again_forward else 0)
        return (
            Phase("forward", forward_peak.where, inputs, _moment(forward_peak), 0, forward_peak.fixed_bytes, cached),
            Phase("loss", "", inputs + final_norm, 0, loss, 0, cached),
            Phase("backward", where, inputs, recomputed, 0, worst.fixed_bytes, casts // shape.layers),
            update,
        )
    kept = forward_peak.kept_bytes * shape.layers - round(ungraded_bytes(operations, work) * tokens) + mask
    return (
        Phase("forward", forward_peak.where, kept, _moment(forward_peak), 0, forward_peak.fixed_bytes, casts),
        Phase("loss", "", kept + final_norm, 0, loss, 0, casts),
        Phase("backward", backward_peak.where, kept, _moment(backward_peak), 0, backward_peak.fixed_bytes, casts),
        update,
    )


def _moment(peak: LayerPeak) -> int:
    """What a layer's worst moment adds to what the layer keeps."""
    return max(peak.peak_bytes - peak.fixed_bytes - peak.kept_bytes, 0)


def _leaked_bytes(shape: ModelShape, n: Numerics, tokens: int) -> int:
    """Inputs that LLM.int8() holds as plain attributes of its autograd nodes, out of checkpointing's reach."""
    if not n.leaks_inputs:
        return 0
    widths = {linear.role or linear.name: linear.in_features for linear in shape.linears}
    shared = [widths[roles[0]] for roles in (("q", "k", "v"), ("gate", "up")) if roles[0] in widths]
    single = [width for role, width in widths.items() if role not in ("q", "k", "v", "gate", "up")]
    return sum(shared + single) * n.compute_bytes * tokens


def _head_states_bytes(shape: ModelShape, n: Numerics, labels: int) -> int:
    """The labelled hidden states and their gradient."""
    return 2 * n.compute_bytes * shape.hidden_size * labels


def loss_bytes(shape: ModelShape, n: Numerics, labels: int) -> int:
    """One chunk of the linear cross-entropy, or all logits where something stands behind the head.

    A chunk: logits as computed, their fp32 copy that becomes probabilities in place, and the error in the compute
    dtype; the next chunk's logits and copy are made while the last chunk's are still there.
    """
    c = n.compute_bytes
    states = _head_states_bytes(shape, n, labels)
    if not shape.plain_head:  # logits, scaled logits, fp32 copy, log-softmax; or that, its gradient and the copy's
        return states + shape.vocabulary * labels * max(2 * c + 8, c + 12)
    rows = min(labels, chunk_labels(shape.vocabulary, n.device_kind))
    following = min(labels - rows, rows)
    alone = (2 * c + 4 if c < 4 else 4) * rows
    both = (c + 4 if c < 4 else 4) * (rows + following)
    return states + shape.vocabulary * max(alone, both) + c * shape.hidden_size * rows
