"""The closed form: peak memory of a LoRA step by formulas, instant, without weights and without torch."""

from __future__ import annotations

from dataclasses import replace

from lorafit.facts import LinearShape, ModelShape
from lorafit.kinds.quantizations import quantizations
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
from lorafit.memory.peak import MemoryEstimate, Phase
from lorafit.memory.step_shape import StepShape
from lorafit.ops.chunk_sizes import chunk_labels


def covers(step: StepShape) -> bool:
    """Whether the formulas describe such a step: what they do not is measured by `lorafit.estimation.measured`."""
    return step.adapter.closed_form and step.task.closed_form and not step.model.scanning_layers


def closed_form(step: StepShape, tokens: int, checkpointing: bool) -> MemoryEstimate:
    """Peak memory of one training step.

    Args:
        step: The model, the kinds and the rows.
        tokens: Padded tokens of a micro-batch; one longest row at least is counted.
        checkpointing: Whether layers keep their input alone and run forward again.

    Raises:
        RecipeError: The adapter's targets match nothing in this model.
    """
    shape, width, plain = step.model, step.dtype_bytes, quantizations.make("none")
    quantization = step.quantization if shape.quantizable else plain
    tokens, trainable = max(tokens, step.row_tokens), step.trainable_parameters
    work = _work(step)
    outside = shape.embedding_parameters + shape.head_parameters + shape.other_parameters
    experts_bytes = shape.expert_parameters * width
    packed = [linear for linear in shape.linears if linear.quantizable]
    weights = [quantization.weight_bytes(linear, width) for linear in packed]
    weights += [plain.weight_bytes(linear, width) for linear in shape.linears if not linear.quantizable]
    state_bytes = step.optimizer.state_bytes(trainable)
    loss = loss_bytes(shape, work.numerics, step.labels_at(tokens))
    return MemoryEstimate(
        fixed={
            "base_weights": sum(weights) + outside * width + experts_bytes,
            "quantization_constants": sum(quantization.constant_bytes(linear) for linear in packed),
            "unpacked_weights": unpacked_bytes(work),
            "adapter": 4 * trainable,
            "gradients": 4 * trainable,
            "optimizer_state": state_bytes,
        },
        phases=step_phases(shape, work, tokens, loss, checkpointing, trainable),
        device_kind=step.device_kind,
        micro_batch_tokens=tokens,
        gradient_checkpointing=checkpointing,
        paged_bytes=state_bytes if step.pages_state else 0,
        unquantized_expert_bytes=step.unquantized_expert_bytes,
        counts_all=not shape.scanning_layers,
    )


def unpacked_weights_bytes(step: StepShape) -> int:
    """Dequantised copies of adapted weights that stay for the whole run, where the step keeps them."""
    return unpacked_bytes(_work(step)) if step.compute_dtype == step.dtype else 0


def _work(step: StepShape) -> Work:
    """What the walk through a layer is told of lorafit's own way of computing."""
    width, adapter, quantization = step.dtype_bytes, step.adapter, step.quantization
    if not step.model.quantizable:
        quantization = quantizations.make("none")

    def dequantised(linear: LinearShape) -> int:
        return quantization.workspace_bytes(replace(linear, count=1), width) if linear.quantizable else 0

    return Work(
        row_tokens=step.row_tokens,
        adapted=tuple(site.linear for site in adapter.sites(step.model) if site.linear is not None),
        rank=adapter.rank(),
        dropout=float(getattr(adapter.section, "dropout", 0.0)),
        attention=step.attention,
        dequantised_bytes=dequantised,
        numerics=Numerics(
            stream_bytes=width,
            compute_bytes=width,
            autocast=width < 4,
            device_kind=step.device_kind,
            keeps_inputs=quantization.keeps_inputs,
            leaks_inputs=quantization.keeps_inputs,
        ),
        masked=step.packs_rows and step.attention != "eager",
        keeps_unpacked=step.keeps_unpacked,
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
    update = Phase("update", "", {"workspace": n.adapter_bytes * trainable})
    if checkpointing:
        inputs = stream * n.layer_inputs_kept(shape.layers) + _leaked_bytes(shape, n, tokens) * shape.layers + mask
        again = final_norm if keeps_layer_input(shape, n) else 0
        again_forward = forward_peak.peak_bytes + stream > backward_peak.peak_bytes  # the result's gradient waits
        worst = forward_peak if again_forward else backward_peak
        where = f"{'recomputing ' if again_forward else ''}{worst.where}"
        recomputed = worst.peak_bytes - worst.fixed_bytes - again + (stream if again_forward else 0)
        return (
            _phase("forward", forward_peak, inputs, _moment(forward_peak), cached),
            Phase("loss", "", {"kept_activations": inputs + final_norm, "loss": loss, "adapter": cached}),
            replace(_phase("backward", worst, inputs, recomputed, casts // shape.layers), where=where),
            update,
        )
    kept = forward_peak.kept_bytes * shape.layers - round(ungraded_bytes(operations, work) * tokens) + mask
    return (
        _phase("forward", forward_peak, kept, _moment(forward_peak), casts),
        Phase("loss", "", {"kept_activations": kept + final_norm, "loss": loss, "adapter": casts}),
        _phase("backward", backward_peak, kept, _moment(backward_peak), casts),
        update,
    )


def _phase(name: str, worst: LayerPeak, kept: int, recomputation: int, casts: int) -> Phase:
    parts = {"kept_activations": kept, "recomputation": recomputation, "workspace": worst.fixed_bytes, "adapter": casts}
    return Phase(name, worst.where, parts)


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
