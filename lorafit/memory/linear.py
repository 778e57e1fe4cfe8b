"""One linear with its LoRA branch: what it keeps for the backward pass and what is alive while it runs.

Source: tuners/lora/layer.py of PEFT 0.21 for a branch run apart, `lorafit.ops.lora_linear` for both in one operation.
"""

from __future__ import annotations

from itertools import pairwise

from lorafit.facts import LinearShape
from lorafit.memory.layer_inputs import Moment, Operation, Work


def own_copy_bytes(work: Work, input_bytes: int) -> int:
    """Bytes of a value of the tensor that A multiplies and keeps; 0 where that is the block's shared input itself."""
    n, reads = work.numerics, work.numerics.adapter_reads(input_bytes)
    if not n.trains_a:
        return 0
    multiplied = n.compute_bytes if n.autocast else reads
    return multiplied if work.dropout > 0 or multiplied != input_bytes or reads != input_bytes else 0


def linear_operation(
    linear: LinearShape, work: Work, *, input_bytes: int, alive: float, ends_block: bool = False, freed: float = 0.0
) -> Operation:
    """One linear with its adapter: y = W x + s·B·A·dropout(x).

    Kept for an adapter: what A multiplies, where that is no tensor that others keep; the dropout mask; A's result
    [rank]. A frozen W keeps nothing of x. Forward: casts and dropout's result beside W's result, then B's result,
    scaled, and the sum. Backward: the same casts as gradients, with A's input gone; and for W the gradients of both
    paths and their sum, beside W dequantised. What ends a block gets the stream's own gradient, which is counted
    there; `freed` is kept input that is gone once A's gradient is known.
    """
    n, width_in, width_out = work.numerics, linear.in_features, linear.out_features
    c, result, weight = n.compute_bytes, n.compute_bytes * linear.out_features, work.dequantised_bytes(linear)
    arriving = 0 if ends_block else result
    if linear not in work.adapted:
        plain = (Moment("forward", alive + result, weight), Moment("backward", arriving + c * width_in, weight))
        return Operation(linear.name, 0.0, plain)
    reads, copy = n.adapter_reads(input_bytes), own_copy_bytes(work, input_bytes)
    if fuses_linears(work):
        return _fused_linear(linear, work, alive=alive, arriving=arriving, freed=freed)
    mask = (reads if n.device_kind == "cpu" else 1) if work.dropout > 0 else 0
    stages = [reads] * ((reads != input_bytes) + (work.dropout > 0))  # cast, dropout
    if n.autocast and reads != c:
        stages.append(c)
    wide = max(sum(stages) - copy, 0)  # the last of them is the copy that stays
    steps = [c if n.autocast else reads, *reversed(stages), input_bytes]  # widths of the gradient on its way back
    returns = max(max(x + y for x, y in pairwise(steps)) - copy, 0) if len(stages) else steps[0]
    low = c if n.autocast else n.adapter_bytes
    kept = (copy + mask) * width_in + low * work.rank
    moments = (
        Moment("forward", alive + result - kept, weight),  # W comes first, when the adapter has kept nothing yet
        Moment("forward", alive + result + wide * width_in),
        Moment("forward", alive + result + 2 * low * width_out + (reads * width_in if reads != input_bytes else 0)),
        Moment("backward", arriving + returns * width_in),
        Moment("backward", arriving + (3 * c - copy - mask) * width_in - freed, weight),
    )
    return Operation(linear.name, kept, moments)


def fuses_linears(work: Work) -> bool:
    """Whether a linear and its branch run as one operation: plain and 4-bit ones do, LLM.int8() and Conv1D do not."""
    n = work.numerics
    return n.fused and not n.keeps_inputs and not any(linear.transposed for linear in work.adapted)


def unpacked_bytes(work: Work) -> int:
    """Bytes of the dequantised copies that stay for the whole run: of every adapted linear that runs fused."""
    if not work.keeps_unpacked or not fuses_linears(work):
        return 0
    return sum(work.dequantised_bytes(linear) * linear.count for linear in work.adapted)


def _fused_linear(linear: LinearShape, work: Work, *, alive: float, arriving: float, freed: float) -> Operation:
    """The same as one operation: what A multiplies, the dropout mask and A's result are kept; nothing but the result
    is made, and on the way back the gradients of the input and of the dropped input, which dropout turns into one more.
    """
    n, width_in = work.numerics, linear.in_features
    c, result = n.compute_bytes, n.compute_bytes * linear.out_features
    weight = 0 if work.keeps_unpacked else work.dequantised_bytes(linear)
    drops = work.dropout > 0
    kept = ((c + (c if n.device_kind == "cpu" else 1)) * width_in if drops else 0) + c * work.rank
    moments = [Moment("forward", alive + result, weight), Moment("backward", arriving + c * width_in, weight)]
    if drops:
        moments += [Moment("backward", arriving + 2 * c * width_in), Moment("backward", 2 * c * width_in - freed)]
    return Operation(linear.name, kept, tuple(moments))
