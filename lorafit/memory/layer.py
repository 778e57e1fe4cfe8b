"""What one decoder layer holds, operation by operation: what it keeps for the backward pass, and what is alive beside
it.

    forward    norm ─ q k v ─ rotate ─ attention ─ o ─ norm ─ gate up ─ act·up ─ down
               each operation adds `kept`; while it runs, a moment's bytes are alive besides
    backward   the same list from its end: what was kept goes, gradients come

    peak of a layer = max over operations i and their moments of  (kept_1 + .. + kept_i) + moment

All sizes are bytes a token of the micro-batch (padding counted) unless a name says otherwise. The terms are derived in
docs/memory.md; `tests/unit/memory` counts live storage of a real step and compares.

Source: what each operation of torch 2 saves for its backward (`derivatives.yaml`), and the modeling files of
transformers 5 and tuners/lora/layer.py of PEFT 0.21 for what is called in which order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafit.facts import LinearShape, ModelShape
from lorafit.memory.layer_inputs import Moment, Numerics, Operation, Work
from lorafit.memory.linear import fuses_linears, linear_operation, own_copy_bytes
from lorafit.ops.chunk_sizes import chunk_rows, largest_block


@dataclass(frozen=True, slots=True)
class LayerPeak:
    """The most that one layer holds.

    Attributes:
        kept_bytes: What the whole layer leaves for its backward pass.
        peak_bytes: Kept so far plus the moment, at the worst moment.
        fixed_bytes: The dequantised weight among them, or the scores of a block of queries.
        where: The operation of that moment.
    """

    kept_bytes: int
    peak_bytes: int
    fixed_bytes: int
    where: str


def layer_peak(operations: list[Operation], tokens: int, phase: str) -> LayerPeak:
    """Walks the operations and keeps the worst moment of a phase (`forward` or `backward`)."""
    kept = 0.0
    peak, fixed, where = 0.0, 0, ""
    for operation in operations:
        kept += operation.kept
        for moment in (m for m in operation.moments if m.phase == phase):
            bytes_now = (kept + moment.token_bytes) * tokens + moment.fixed_bytes
            if bytes_now > peak:
                peak, fixed, where = bytes_now, moment.fixed_bytes, operation.name
    return LayerPeak(round(kept * tokens), round(max(peak, kept * tokens)), fixed, where)


def layer_operations(shape: ModelShape, work: Work) -> list[Operation]:
    """The operations of one decoder layer in forward order."""
    n = work.numerics
    hidden, stream = shape.hidden_size, shape.hidden_size * n.stream_bytes
    norm_out = hidden * _norm_out_bytes(shape, n)
    attention = [
        _norm("norm", shape, n),
        *_inputs(shape, work, ("q", "k", "v", "qkv")),
        *_attention(shape, work),
        *_outputs(shape, work, "o"),
        *_dropped_stream(shape, n),
    ]
    mlp = [
        *([] if shape.norms_per_layer == 1 else [_norm("norm", shape, n)]),
        *_inputs(shape, work, ("gate", "up", "gate_up", "")),
        *_activation(shape, work),
        *_outputs(shape, work, "down"),
        *_dropped_stream(shape, n),
    ]
    # While a block runs, the stream that goes past it and the norm's output (its argument) are alive; on the way back
    # the stream's gradient is. With parallel blocks the first block's result waits too.
    waiting = stream if shape.parallel else 0
    past = 0 if _norm_keeps_stream(shape, n) else stream
    block = {"forward": past + norm_out, "backward": stream + waiting}
    post = [_norm("post norm", shape, n)] if shape.norms_per_layer == 4 else []
    return [_beside(operation, block) for operation in [*attention, *post, *mlp, *post]]


def final_norm_bytes(shape: ModelShape, numerics: Numerics) -> int:
    """What the norm behind the last layer keeps, a token."""
    return round(_norm("norm", shape, numerics).kept)


def ungraded_bytes(operations: list[Operation], work: Work) -> float:
    """What the very first layer does not keep, a token: nothing needs a gradient before its first adapter."""
    kept = 0.0
    for operation in operations:
        if work.numerics.keeps_inputs or any(operation.name == linear.name for linear in work.adapted):
            return kept
        kept += operation.kept
    return kept


def keeps_layer_input(shape: ModelShape, numerics: Numerics) -> bool:
    """Whether that is the layer's own input, which checkpointing has counted already."""
    return _norm_keeps_stream(shape, numerics)


def _beside(operation: Operation, alive: dict[str, int]) -> Operation:
    moments = operation.moments or (Moment("forward", 0.0),)
    return replace(operation, moments=tuple(replace(m, token_bytes=m.token_bytes + alive[m.phase]) for m in moments))


def _norm(name: str, shape: ModelShape, n: Numerics) -> Operation:
    """RMSNorm of transformers: an fp32 copy of the input, from which pow and mul take their gradient.

    Its backward holds the gradients of both branches (x·r and mean x²) in fp32: four copies at its worst.
    """
    hidden = shape.hidden_size
    if shape.norm == "layer":
        kept = hidden * (4 if n.wide_on_gpu else n.stream_bytes) + 8
        return Operation(name, kept, (Moment("forward", 4 * hidden), Moment("backward", 8 * hidden)))
    if _fuses_norm(shape, n):  # its own cast, and the gradient's beside it, in fp32
        narrow = n.compute_bytes * hidden
        moments = (Moment("forward", 4 * hidden + narrow), Moment("backward", 8 * hidden + narrow))
        return Operation(name, hidden * n.stream_bytes + 4, moments)
    kernel = n.norm_kernel(hidden)
    if kernel is not None:
        return replace(kernel, name=name)
    moments = (Moment("forward", hidden * (4 + n.compute_bytes)), Moment("backward", (16 + n.compute_bytes) * hidden))
    return Operation(name, 4 * hidden + 4, moments)


def _fuses_norm(shape: ModelShape, n: Numerics) -> bool:
    return n.fused and shape.norm == "rms" and shape.plain_norm


def _inputs(shape: ModelShape, work: Work, roles: tuple[str, ...]) -> list[Operation]:
    """The linears that read a block's normalised input, in order; earlier results wait for the later ones."""
    n, found, waiting = work.numerics, [], 0.0
    linears = [linear for linear in shape.linears if linear.role in roles]
    width = _norm_out_bytes(shape, n)
    shared = n.keeps_inputs or (
        n.trains_a and any(x in work.adapted for x in linears) and not own_copy_bytes(work, width)
    )
    for number, linear in enumerate(linears):
        operation = _in_some_layers(linear_operation(linear, work, input_bytes=width, alive=waiting), linear, shape)
        if shared and number == 0:  # the norm's output itself is kept, once for all
            operation = replace(operation, kept=operation.kept + linear.in_features * width)
        waiting += linear.out_features * n.compute_bytes
        found.append(operation)
    return found


def _outputs(shape: ModelShape, work: Work, role: str) -> list[Operation]:
    """The linear that ends a block (twice in a mixture with a shared expert)."""
    n, found = work.numerics, []
    width = n.compute_bytes if role == "o" else _product_bytes(shape, n)
    for linear in (linear for linear in shape.linears if linear.role == role):
        attention_keeps = role == "o" and not _fuses_attention(shape, work)
        kept_anyway = attention_keeps or shape.activation == "relu"  # its result, and so does relu
        multiplies_again = role == "down" and linear in work.adapted and _fuses_projections(shape, work)
        keeps_input = n.trains_a and linear in work.adapted and not own_copy_bytes(work, width)
        shared = n.keeps_inputs or (keeps_input and not multiplies_again)
        held = 0 if kept_anyway else linear.in_features * width
        operation = linear_operation(
            linear,
            work,
            input_bytes=width,
            alive=0.0 if shared else held,
            ends_block=True,
            freed=held if shared else 0.0,
        )
        kept = replace(operation, kept=operation.kept + held) if shared else operation
        found.append(_in_some_layers(kept, linear, shape))
    return found


def _in_some_layers(operation: Operation, linear: LinearShape, shape: ModelShape) -> Operation:
    """What an average layer keeps of an operation that not every layer has; its moment stays whole."""
    return replace(operation, kept=operation.kept * _share(linear, shape))


def _share(linear: LinearShape, shape: ModelShape) -> float:
    """Share of the layers that hold it, at most 1."""
    return min(1.0, linear.count / max(shape.layers, 1))


def _norm_keeps_stream(shape: ModelShape, n: Numerics) -> bool:
    """Whether what a norm keeps is the stream's own tensor, and no cast of it."""
    has_kernel = n.norm_kernel(shape.hidden_size) is not None or _fuses_norm(shape, n)
    return has_kernel or (n.stream_bytes == 4 if shape.norm == "rms" else not n.wide_on_gpu)


def _norm_out_bytes(shape: ModelShape, n: Numerics) -> int:
    return 4 if shape.norm == "layer" and n.wide_on_gpu and n.widens else n.compute_bytes


def _product_bytes(shape: ModelShape, n: Numerics) -> int:
    return 4 if shape.activation == "gelu_new" and n.wide_on_gpu and n.widens else n.compute_bytes


def _attention(shape: ModelShape, work: Work) -> list[Operation]:
    """Rotation and attention.

    Flash keeps q, k, v, its output and a log-sum a head; `fused` q, k and v; eager keeps every score, in fp32 and as
    computed; sdpa without a flash kernel keeps them in fp32.
    """
    n = work.numerics
    c, q_width, kv_width = n.compute_bytes, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    operations = []
    if shape.qk_norm:
        wide = (c if _fuses_norm(shape, n) else 4) * (q_width + kv_width)
        operations.append(
            Operation("query and key norm", wide, (Moment("forward", 6 * q_width), Moment("backward", 16 * q_width)))
        )
    scores = shape.heads * work.row_tokens
    expands = shape.kv_heads < shape.heads
    math_dropout = n.device_kind == "cpu" and shape.attention_dropout > 0  # no CPU flash kernel takes dropout
    if work.attention != "eager" and not shape.softcap and (shape.math_attention or math_dropout):
        # fp32 throughout: softmax keeps its result, dropout its mask and the product that multiplies v
        copies = 3 if shape.attention_dropout > 0 else 1
        kept = 4 * (copies * scores + 3 * q_width)
        moments = (Moment("forward", 4 * scores), Moment("backward", (4 if copies == 3 else 8) * scores))
    elif work.attention == "eager" and shape.has_sinks:  # softmax keeps its result, which multiplies v as it is
        kept = scores * c + 3 * c * q_width
        moments = (Moment("forward", 2 * scores * c), Moment("backward", 3 * scores * c + 3 * c * q_width))
    elif work.attention == "eager" or shape.softcap:
        softmax = 4 if c < 4 else 0  # softmax in fp32 keeps its result; its bf16 copy multiplies v
        kept = scores * (softmax + c) + c * (q_width + 2 * (q_width if expands else kv_width))
        kept += scores * c if shape.softcap else 0
        kept += scores * (c if n.device_kind == "cpu" else 1) if shape.attention_dropout > 0 else 0
        freed = c if c < 4 else 0  # the bf16 copy is used up before softmax's fp32 gradients stand at their most
        moments = (Moment("forward", scores * c), Moment("backward", scores * (8 - freed) + 3 * c * q_width))
    elif _fuses_attention(shape, work):
        kept = c * (q_width + 2 * kv_width)
        if shape.position_parameters == 0 and any(linear.role == "qkv" for linear in shape.linears):
            kept += c * (q_width + kv_width)  # as below
        rows = chunk_rows(work.row_tokens)
        block = rows * shape.heads * largest_block(work.row_tokens) * c
        # dk and dv: their sums in fp32, three of a block's; keys and values are copied, or filled up
        sums = rows * work.row_tokens * kv_width * (8 + c * (4 if rows == 1 else 5))
        moments = (
            Moment("forward", 3 * c * q_width, 2 * block),
            Moment("backward", c * (2 * q_width + 2 * kv_width), 3 * block + sums),
        )
    else:
        kept = c * (2 * q_width + 2 * kv_width) + 4 * shape.heads
        if shape.position_parameters == 0 and any(linear.role == "qkv" for linear in shape.linears):
            kept += c * (q_width + kv_width)  # v is a view of the fused result, whose rotated q and k are copies
        if work.masked:  # added to the scores in the compute dtype, and every query head has its own keys and values
            kept += c * work.row_tokens + 2 * c * (q_width - kv_width)
        # CUDA's flash backward sums dq in fp32 and makes dk, dv for every query head
        gpu = 4 * q_width + 2 * c * q_width if n.device_kind != "cpu" else 0
        moments = (Moment("forward", 3 * c * q_width), Moment("backward", c * (2 * q_width + 2 * kv_width) + gpu))
    operations.append(Operation("attention", kept, moments))
    return operations


def _fuses_attention(shape: ModelShape, work: Work) -> bool:
    """Whether attention runs as `lorafit.ops.causal_attention` does; it hands anything unusual to sdpa."""
    is_usual = not (work.masked or shape.attention_dropout or shape.softcap or shape.math_attention)
    return work.attention == "fused" and work.numerics.device_kind == "cpu" and is_usual


def _activation(shape: ModelShape, work: Work) -> list[Operation]:
    """What stands between the MLP's linears, by activation; the experts of a mixture whole."""
    n = work.numerics
    c = n.compute_bytes
    found = []
    if shape.experts:
        found.append(_experts(shape, c))
    inner = round(sum(x.in_features * _share(x, shape) for x in shape.linears if x.role == "down"))
    if not inner:
        return found
    moments = []
    if shape.gated_mlp and n.fused and _fuses_gate(shape):  # its two factors; both gradients and two on the way
        kept, backward = 2 * c * inner, 4 * c * inner
        gate = next(linear for linear in shape.linears if linear.role == "gate")
        if _fuses_projections(shape, work):  # the gradient of both projections' input, before the factors may go
            weight = 0 if work.keeps_unpacked else work.dequantised_bytes(gate)
            moments.append(Moment("backward", 3 * c * inner + c * gate.in_features, weight))
    elif shape.gated_mlp:  # act keeps its input, act·up keeps both factors
        kept, backward = 3 * c * inner, 3 * c * inner
    elif shape.activation == "gelu_new":  # written out: x³, tanh, 1 + tanh and x/2 are kept one by one
        kept = (4 + 4 + 4 + c if n.wide_on_gpu else 4 * c) * inner
        backward = (c + 3 * (4 if n.wide_on_gpu else c)) * inner  # the result's gradient, and three on its way back
    elif shape.activation == "xielu":  # in torch's own operations: its input, two results, where it is positive
        kept, backward = (3 * c + 1) * inner, 3 * c * inner
    else:  # gelu keeps its input, relu its result
        kept, backward = c * inner, 2 * c * inner
    moments += [Moment("forward", c * inner), Moment("backward", backward)]
    return [*found, Operation("activation", kept, tuple(moments))]


def _fuses_gate(shape: ModelShape) -> bool:
    """silu between a gate and an up projection of their own."""
    return shape.activation == "silu" and {"gate", "up"} <= {linear.role for linear in shape.linears}


def _fuses_projections(shape: ModelShape, work: Work) -> bool:
    """Whether both projections and their product are one operation (`lorafit.ops.lora_gated`)."""
    adapted = {linear.role for linear in work.adapted}
    return fuses_linears(work) and work.dropout == 0 and _fuses_gate(shape) and {"gate", "up"} <= adapted


def _experts(shape: ModelShape, c: int) -> Operation:
    """Frozen fused experts: each token goes through `experts_per_token` gated MLPs and is weighted by its router."""
    ways, inner, hidden = shape.experts_per_token, shape.expert_size, shape.hidden_size
    kept = ways * (3 * c * inner + c * hidden) + 8 * shape.experts
    weighted = (c + 8) * hidden  # by fp32 router weights: results, or their gradients, in fp32 twice
    returns = 3 * c * inner - c * hidden  # their gradients through act·up, when the weighted results are gone
    moments = (Moment("forward", ways * weighted), Moment("backward", ways * max(returns, weighted)))
    return Operation("experts", kept, moments)


def _dropped_stream(shape: ModelShape, n: Numerics) -> list[Operation]:
    """The model's own dropout on a block's result: a mask."""
    if shape.hidden_dropout == 0:
        return []
    mask = n.compute_bytes if n.device_kind == "cpu" else 1
    return [
        Operation("dropout", mask * shape.hidden_size, (Moment("forward", 2 * n.compute_bytes * shape.hidden_size),))
    ]
