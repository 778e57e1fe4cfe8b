"""What stands between the linears of a layer's blocks: attention in the middle of one, the activation of the other."""

from __future__ import annotations

from lorafit.memory.layer_stack import LayerStack
from lorafit.memory.operations import Moment, Operation
from lorafit.ops.chunk_sizes import chunk_rows, largest_block


def attention_operations(layer: LayerStack) -> list[Operation]:
    """Rotation and attention.

    Flash keeps q, k, v, its output and a log-sum a head; `fused` q, k and v; eager keeps every score, in fp32 and
    as computed; sdpa without a flash kernel keeps them in fp32.
    """
    shape, c = layer.shape, layer.compute_bytes
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    operations = []
    if shape.qk_norm:
        wide = (c if layer.fuses_norm() else 4) * (q_width + kv_width)
        moments = (Moment("forward", 6 * q_width), Moment("backward", 16 * q_width))
        operations.append(Operation("query and key norm", wide, moments))
    scores = shape.heads * layer.row_tokens
    # v is a view of a fused projection's result, whose rotated q and k are copies
    is_view = shape.position_parameters == 0 and any(linear.role == "qkv" for linear in shape.linears)
    copies = c * (q_width + kv_width) if is_view else 0
    if layer.attention != "eager" and not shape.softcap and layer.is_math():
        # fp32 throughout: softmax keeps its result, dropout its mask and the product that multiplies v
        results = 3 if shape.attention_dropout > 0 else 1
        kept = 4 * (results * scores + 3 * q_width)
        moments = (Moment("forward", 4 * scores), Moment("backward", (4 if results == 3 else 8) * scores))
    elif layer.attention == "eager" and shape.has_sinks:  # softmax keeps its result, which multiplies v as it is
        kept = scores * c + 3 * c * q_width
        moments = (Moment("forward", 2 * scores * c), Moment("backward", 3 * scores * c + 3 * c * q_width))
    elif layer.attention == "eager" or shape.softcap:
        softmax = 4 if c < 4 else 0  # softmax in fp32 keeps its result; its bf16 copy multiplies v
        kept = scores * (softmax + c) + c * (q_width + 2 * (q_width if shape.kv_heads < shape.heads else kv_width))
        kept += scores * c if shape.softcap else 0
        kept += scores * layer.mask_bytes if shape.attention_dropout > 0 else 0
        freed = c if c < 4 else 0  # the bf16 copy is used up before softmax's fp32 gradients stand at their most
        moments = (Moment("forward", scores * c), Moment("backward", scores * (8 - freed) + 3 * c * q_width))
    elif layer.fuses_attention():
        kept = c * (q_width + 2 * kv_width) + copies
        rows = chunk_rows(layer.row_tokens)
        block = rows * shape.heads * largest_block(layer.row_tokens) * c
        # dk and dv: their sums in fp32, three of a block's; keys and values are copied, or filled up
        sums = rows * layer.row_tokens * kv_width * (8 + c * (4 if rows == 1 else 5))
        moments = (
            Moment("forward", 3 * c * q_width, 2 * block),
            Moment("backward", c * (2 * q_width + 2 * kv_width), 3 * block + sums),
        )
    else:
        kept = c * (2 * q_width + 2 * kv_width) + 4 * shape.heads + copies
        if layer.masked:  # added to the scores in the compute dtype
            kept += c * layer.row_tokens
        if layer.masked or layer.kernel == "efficient":  # every query head has its own keys and values
            kept += 2 * c * (q_width - kv_width)
        # CUDA's flash backward sums dq in fp32 and makes dk, dv for every query head
        gpu = 4 * q_width + 2 * c * q_width if layer.device_kind != "cpu" else 0
        moments = (Moment("forward", 3 * c * q_width), Moment("backward", c * (2 * q_width + 2 * kv_width) + gpu))
    return [*operations, Operation("attention", kept, moments)]


def activation_operations(layer: LayerStack) -> list[Operation]:
    """What stands between the MLP's linears, by activation; the experts of a mixture whole."""
    shape, c, wide = layer.shape, layer.compute_bytes, 4 if layer.wide_on_gpu else layer.compute_bytes
    found = [_experts(layer)] if shape.experts else []
    inner = round(sum(x.in_features * layer.share(x) for x in shape.linears if x.role == "down"))
    if not inner:
        return found
    moments = []
    if shape.gated_mlp and layer.fused and layer.fuses_gate():  # its two factors; both gradients, two on the way
        own = 0 if layer.runs_liger else 2  # gradients with memory of their own
        kept, backward = 2 * c * inner, (4 if own else 1) * c * inner
        gate = next(linear for linear in shape.linears if linear.role == "gate")
        if layer.fuses_projections():  # the gradient of both projections' input, before the factors may go
            weight = 0 if layer.keeps_unpacked else layer.dequantised_bytes(gate)
            moments.append(Moment("backward", (1 + own) * c * inner + c * gate.in_features, weight))
    elif shape.gated_mlp:  # act keeps its input, act·up keeps both factors
        kept, backward = 3 * c * inner, 3 * c * inner
    elif shape.activation == "gelu_new":  # written out: x³, tanh, 1 + tanh and x/2 are kept one by one
        result = 0 if layer.wide_on_gpu else c  # its gradient, gone once it is cast up
        kept, backward = (3 * wide + c) * inner, (result + 3 * wide) * inner  # three on its way
    elif shape.activation == "xielu":  # in torch's own operations: its input, two results, where it is positive
        kept, backward = (3 * c + 1) * inner, 3 * c * inner
    else:  # gelu keeps its input, relu its result
        kept, backward = c * inner, 2 * c * inner
    moments += [Moment("forward", c * inner), Moment("backward", backward)]
    return [*found, Operation("activation", kept, tuple(moments))]


def _experts(layer: LayerStack) -> Operation:
    """Frozen fused experts: a token goes through `experts_per_token` gated MLPs and is weighted by its router."""
    shape, c = layer.shape, layer.compute_bytes
    ways, inner, hidden = shape.experts_per_token, shape.expert_size, shape.hidden_size
    kept = ways * (3 * c * inner + c * hidden) + 8 * shape.experts
    weighted = (c + 8) * hidden  # by fp32 router weights: results, or their gradients, in fp32 twice
    returns = 3 * c * inner - c * hidden  # their gradients through act·up, when the weighted results are gone
    moments = (Moment("forward", ways * weighted), Moment("backward", ways * max(returns, weighted)))
    return Operation("experts", kept, moments)
