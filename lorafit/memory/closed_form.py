"""The closed form: peak memory of a LoRA step by formulas, instant, without weights and without torch."""

from __future__ import annotations

from dataclasses import replace

from lorafit.memory.layer import Layer
from lorafit.memory.operations import LayerPeak, worst_moment
from lorafit.memory.peak import MemoryEstimate, Phase
from lorafit.memory.step_shape import StepShape
from lorafit.ops.recomputed_layers import Checkpointing, recomputed_layers


def covers(step: StepShape) -> bool:
    """Whether the formulas describe such a step: what they do not is measured by `lorafit.estimation.measured`."""
    return step.adapter.closed_form and step.task.closed_form and not step.model.scanning_layers


def closed_form(step: StepShape, tokens: int, checkpointing: Checkpointing) -> MemoryEstimate:
    """Peak memory of one training step.

    Args:
        step: The model, the kinds and the rows.
        tokens: Padded tokens of a micro-batch; one longest row at least is counted.
        checkpointing: Which layers keep their input alone and run forward again.

    Raises:
        RecipeError: The adapter's targets match nothing in this model.
    """
    shape, width, layer = step.model, step.dtype_bytes, layer_of(step)
    tokens, trainable = max(tokens, step.row_tokens), step.trainable_parameters
    outside = shape.embedding_parameters + shape.head_parameters + shape.other_parameters + shape.expert_parameters
    stored = [(step.stored_as(linear), linear) for linear in shape.linears]
    state_bytes = step.optimizer.state_bytes(trainable)
    loss = loss_bytes(layer, step.labels_at(tokens), step.chunk_labels)
    updates_in_place = step.device_kind != "cpu" and step.optimizer.updates_in_place
    return MemoryEstimate(
        fixed={
            "base_weights": sum(kind.weight_bytes(linear, width) for kind, linear in stored) + outside * width,
            "quantization_constants": sum(kind.constant_bytes(linear) for kind, linear in stored),
            "unpacked_weights": _unpacked_bytes(layer) if step.keeps_unpacked else 0,
            "adapter": 4 * trainable,
            "gradients": 4 * trainable,
            "optimizer_state": state_bytes,
        },
        phases=step_phases(layer, tokens, loss, checkpointing, trainable, updates_in_place=updates_in_place),
        device_kind=step.device_kind,
        micro_batch_tokens=tokens,
        gradient_checkpointing=checkpointing,
        paged_bytes=state_bytes if step.pages_state else 0,
        unquantized_expert_bytes=step.unquantized_expert_bytes,
        counts_all=not shape.scanning_layers,
    )


def unpacked_weights_bytes(step: StepShape) -> int:
    """Dequantised copies of adapted weights that stay for the whole run, where the step keeps them."""
    keeps = step.keeps_unpacked and step.fuses_branches and step.compute_dtype == step.dtype
    return _unpacked_bytes(layer_of(step)) if keeps else 0


def _unpacked_bytes(layer: Layer) -> int:
    """Bytes of the dequantised copies of every adapted linear that runs fused."""
    fused = filter(layer.fuses_linear, layer.adapted)
    return sum(layer.dequantised_bytes(linear) * linear.count for linear in fused)


def layer_of(step: StepShape) -> Layer:
    """A layer of the step, computed in lorafit's own way."""
    return Layer(
        shape=step.model,
        row_tokens=step.row_tokens,
        adapted=tuple(site.linear for site in step.adapter.sites(step.model) if site.linear is not None),
        rank=step.adapter.rank(),
        dropout=float(getattr(step.adapter.section, "dropout", 0.0)),
        attention=step.attention,
        dequantised_bytes=lambda x: step.stored_as(x).workspace_bytes(replace(x, count=1), step.dtype_bytes),
        compute_bytes=step.dtype_bytes,
        autocast=step.dtype_bytes < 4,
        device_kind=step.device_kind,
        masked=step.packs_rows and step.attention != "eager",
        kernel=step.attention_kernel,
        keeps_unpacked=step.keeps_unpacked,
        keeps_input=lambda linear: step.stored_as(linear).share_keeping_inputs(linear),
        leaks_inputs=True,
        runs_liger=step.runs_liger,
    )


def step_phases(
    layer: Layer,
    tokens: int,
    loss: int,
    checkpointing: Checkpointing,
    trainable: int,
    *,
    updates_in_place: bool = False,
) -> tuple[Phase, ...]:
    """Forward, loss, backward and update of one step, each at its worst moment; `loss` is what computing it takes.

    The backward pass is at its worst where it begins: in the last layer, or in the first one that it recomputes.
    """
    shape, operations = layer.shape, layer.operations
    recomputed = recomputed_layers(checkpointing, shape.layers)
    whole = shape.layers - len(recomputed)
    forward_peak = worst_moment(operations, tokens, "forward")
    backward_peak = worst_moment(operations, tokens, "backward")
    casts = trainable * layer.compute_bytes if layer.autocast else 0  # of the adapters' weights
    held = casts if layer.casts_once else casts * whole // shape.layers
    # autocast caches them through the forward; those of a fused linear go with its layer
    cached = held if all(map(layer.fuses_linear, layer.adapted)) else casts
    stream = shape.hidden_size * layer.stream_bytes * tokens
    final_norm = round(layer.norm("norm").kept) * tokens
    mask_bytes = layer.compute_bytes if layer.attention == "eager" or shape.softcap else 1 if layer.masked else 0
    inputs = stream * min(layer.layer_inputs_kept, len(recomputed)) + layer.leaked_bytes() * tokens * len(recomputed)
    ungraded = round(layer.ungraded_bytes() * tokens) if 0 not in recomputed else 0
    kept = forward_peak.kept_bytes * whole - ungraded + inputs + mask_bytes * layer.row_tokens * tokens
    backward = [_phase("backward", backward_peak, kept, _moment(backward_peak), held)] if whole else []
    if recomputed:
        again = final_norm if layer.norm_keeps_stream() else 0
        again_forward = forward_peak.peak_bytes + stream > backward_peak.peak_bytes  # the result's gradient waits
        worst = forward_peak if again_forward else backward_peak
        where = f"{'recomputing ' if again_forward else ''}{worst.where}"
        moment = worst.peak_bytes - worst.fixed_bytes - again + (stream if again_forward else 0)
        others = kept - forward_peak.kept_bytes if whole else kept
        at_once = max(held, casts // shape.layers)
        backward.append(replace(_phase("backward", worst, others, moment, at_once), where=where))
    return (
        _phase("forward", forward_peak, kept, _moment(forward_peak), cached),
        Phase("loss", "", {"kept_activations": kept + final_norm, "loss": loss, "adapter": cached}),
        max(backward, key=lambda phase: phase.total_bytes),
        Phase("update", "", {"workspace": 0 if updates_in_place else layer.adapter_bytes * trainable}),
    )


def _phase(name: str, worst: LayerPeak, kept: int, recomputation: int, casts: int) -> Phase:
    parts = {"kept_activations": kept, "recomputation": recomputation, "workspace": worst.fixed_bytes, "adapter": casts}
    return Phase(name, worst.where, parts)


def _moment(peak: LayerPeak) -> int:
    """What a layer's worst moment adds to what the layer keeps."""
    return max(peak.peak_bytes - peak.fixed_bytes - peak.kept_bytes, 0)


def loss_bytes(layer: Layer, labels: int, most_rows: int) -> int:
    """One chunk of the linear cross-entropy, or all logits where something stands behind the head.

    A chunk: logits as computed, their fp32 copy that becomes probabilities in place, and the error in the compute
    dtype. In fp32, and of Liger's kernel, the logits themselves become the error, and the next chunk's are made while
    the last chunk's are still there.
    """
    shape, c = layer.shape, layer.compute_bytes
    states = 2 * c * shape.hidden_size * labels  # the labelled hidden states and their gradient
    if not shape.plain_head:  # logits, scaled logits, fp32 copy, log-softmax; or that, its gradient and the copy's
        return states + shape.vocabulary * labels * max(2 * c + 8, c + 12)
    rows = min(labels, most_rows)
    following = min(labels - rows, rows)
    if c < 4 and not layer.runs_liger:
        return states + (2 * c + 4) * shape.vocabulary * rows
    return states + c * max(shape.vocabulary * (rows + following), (shape.vocabulary + shape.hidden_size) * rows)
