"""What one decoder layer holds, operation by operation: what it keeps for the backward pass, and what is alive beside
it.

    forward    norm ─ q k v ─ rotate ─ attention ─ o ─ norm ─ gate up ─ act·up ─ down
               each operation adds `kept`; while it runs, a moment's bytes are alive besides
    backward   the same list from its end: what was kept goes, gradients come

    peak of a layer = max over operations i and their moments of  (kept_1 + .. + kept_i) + moment

All sizes are bytes a token of the micro-batch (padding counted) unless a name says otherwise. The terms are derived in
docs/memory.md; `tests/unit/memory` counts live storage of a real step and compares.

Source: what each operation of torch 2 saves for its backward (`derivatives.yaml`), and the modeling files of
transformers 5 and tuners/lora/layer.py of PEFT 0.21 for what is called in which order; `lorafit.ops` for what
`lorafit.model.fuse` puts in their place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from lorafit.facts import LinearShape
from lorafit.memory.inside_blocks import activation_operations, attention_operations
from lorafit.memory.layer_stack import LayerStack
from lorafit.memory.operations import Moment, Operation, run_beside


@dataclass(frozen=True)
class Layer(LayerStack):
    """One decoder layer under one micro-batch, operation by operation.

    Methods that describe another stack than lorafit's are overridden in benchmarks/memory_published.py.
    """

    @cached_property
    def operations(self) -> list[Operation]:
        """All of them in forward order."""
        shape = self.shape
        hidden, stream = shape.hidden_size, shape.hidden_size * self.stream_bytes
        attention = [
            self.norm("norm"),
            *self._inputs(("q", "k", "v", "qkv")),
            *attention_operations(self),
            *self._outputs("o"),
            *self._dropped_stream(),
        ]
        mlp = [
            *([] if shape.norms_per_layer == 1 else [self.norm("norm")]),
            *self._inputs(("gate", "up", "gate_up", "")),
            *activation_operations(self),
            *self._outputs("down"),
            *self._dropped_stream(),
        ]
        # While a block runs, the stream that goes past it and the norm's output (its argument) are alive; on the way
        # back the stream's gradient is. With parallel blocks the first block's result waits too.
        waiting = stream if shape.parallel else 0
        past = 0 if self.norm_keeps_stream() else stream
        alive = {"forward": past + hidden * self.norm_out_bytes(), "backward": stream + waiting}
        post = [self.norm("post norm")] if shape.norms_per_layer == 4 else []
        return [run_beside(operation, alive) for operation in [*attention, *post, *mlp, *post]]

    def ungraded_bytes(self) -> float:
        """What the very first layer does not keep, a token: nothing needs a gradient before its first adapter."""
        kept, graded = 0.0, {linear.name for linear in self.adapted}
        for operation in self.operations if not any(map(self.keeps_input, self.shape.linears)) else ():
            if operation.name in graded:
                break
            kept += operation.kept
        return kept

    def leaked_bytes(self) -> int:
        """Inputs that LLM.int8() holds as plain attributes of its autograd nodes, out of checkpointing's reach."""
        held: dict[str, tuple[int, float]] = {}  # by what reads one tensor: its width, and the share of layers
        for linear in self.shape.linears if self.leaks_inputs else ():
            role = linear.role or linear.name
            reader = next((roles for roles in (("q", "k", "v"), ("gate", "up")) if role in roles), (role,))[0]
            width, share = held.get(reader, (0, 0.0))
            held[reader] = max(width, linear.in_features), min(1.0, share + self.keeps_input(linear))
        return round(sum(width * share for width, share in held.values()) * self.compute_bytes)

    # What other stacks do otherwise

    def norm(self, name: str) -> Operation:
        """RMSNorm of transformers: an fp32 copy of the input, from which pow and mul take their gradient.

        Its backward holds the gradients of both branches (x·r and mean x²) in fp32: four copies at its worst.
        """
        hidden, narrow = self.shape.hidden_size, self.compute_bytes * self.shape.hidden_size
        if self.shape.norm == "layer":
            kept = hidden * (4 if self.wide_on_gpu else self.stream_bytes) + 8
            return Operation(name, kept, (Moment("forward", 4 * hidden), Moment("backward", 8 * hidden)))
        if self.fuses_norm():  # on a CPU its own cast, and the gradient's beside it, in fp32
            wide = hidden if self.device_kind == "cpu" else 0
            moments = (Moment("forward", 4 * wide + narrow), Moment("backward", 8 * wide + narrow))
            return Operation(name, hidden * self.stream_bytes + 4, moments)
        moments = (Moment("forward", 4 * hidden + narrow), Moment("backward", 16 * hidden + narrow))
        return Operation(name, 4 * hidden + 4, moments)

    def norm_keeps_stream(self) -> bool:
        """Whether what a norm keeps is the stream's own tensor, and no cast of it.

        The first one's is the layer's input then, which checkpointing has counted already.
        """
        is_wide = self.stream_bytes == 4 if self.shape.norm == "rms" else not self.wide_on_gpu
        return self.fuses_norm() or is_wide

    def norm_out_bytes(self) -> int:
        """Of a norm's result, a value; lorafit's objective casts back what autocast computed in fp32."""
        return self.compute_bytes

    def product_bytes(self) -> int:
        """Of what the MLP's last linear reads, a value."""
        return self.compute_bytes

    def reads_shared_input(self, linear: LinearShape) -> bool:
        """Whether its A multiplies the block's input itself, which is kept once for all, and no tensor of its own."""
        return linear in self.adapted and self.dropout == 0

    def linear(self, linear: LinearShape, *, alive: float, ends_block: bool = False, freed: float = 0.0) -> Operation:
        """One linear with its adapter: y = W x + s·B·A·dropout(x).

        Kept for an adapter: what A multiplies, where that is no tensor that others keep; the dropout mask; A's result
        [rank]. A frozen W keeps nothing of x. Run apart, forward: W's result, then B's result, scaled, and the sum;
        backward: for W the gradients of both paths and their sum, beside W dequantised. As one operation nothing but
        the result is made, and on the way back the gradients of the input and of the dropped input, which dropout
        turns into one more. What ends a block gets the stream's own gradient, which is counted there; `freed` is kept
        input that is gone once A's gradient is known.
        """
        c, width_in, result = self.compute_bytes, linear.in_features, self.compute_bytes * linear.out_features
        arriving, weight = 0 if ends_block else result, self.dequantised_bytes(linear)
        if linear not in self.adapted:
            plain = (Moment("forward", alive + result, weight), Moment("backward", arriving + c * width_in, weight))
            return Operation(linear.name, 0.0, plain)
        own = c + self.mask_bytes if self.dropout > 0 else 0
        kept = own * width_in + c * self.rank
        if not self.fuses_linear(linear):
            moments = [
                Moment(
                    "forward", alive + result - kept, weight
                ),  # W comes first, when the adapter has kept nothing yet
                Moment("forward", alive + 3 * result),
                Moment("backward", arriving + c * width_in),
                Moment("backward", arriving + (3 * c - own) * width_in - freed, weight),
            ]
            return Operation(linear.name, kept, tuple(moments))
        weight = 0 if self.keeps_unpacked else weight
        moments = [Moment("forward", alive + result, weight), Moment("backward", arriving + c * width_in, weight)]
        if self.dropout > 0:
            moments += [Moment("backward", arriving + 2 * c * width_in), Moment("backward", 2 * c * width_in - freed)]
        return Operation(linear.name, kept, tuple(moments))

    # The operations between

    def _inputs(self, roles: tuple[str, ...]) -> list[Operation]:
        """The linears that read a block's normalised input, in order; earlier results wait for the later ones."""
        found, waiting = [], 0.0
        linears = [linear for linear in self.shape.linears if linear.role in roles]
        shared = any(self.keeps_input(x) > 0 or self.reads_shared_input(x) for x in linears)
        for number, linear in enumerate(linears):
            operation = self._in_some_layers(self.linear(linear, alive=waiting), linear)
            if shared and number == 0:  # the norm's output itself is kept, once for all
                operation = replace(operation, kept=operation.kept + linear.in_features * self.norm_out_bytes())
            waiting += linear.out_features * self.compute_bytes
            found.append(operation)
        return found

    def _outputs(self, role: str) -> list[Operation]:
        """The linear that ends a block (twice in a mixture with a shared expert)."""
        found = []
        width = self.compute_bytes if role == "o" else self.product_bytes()
        for linear in (linear for linear in self.shape.linears if linear.role == role):
            attention_keeps = role == "o" and self.keeps_attended()
            kept_anyway = attention_keeps or self.shape.activation == "relu"  # its result, and so does relu
            multiplies_again = role == "down" and linear in self.adapted and self.fuses_projections()
            shared = self.keeps_input(linear) > 0 or (self.reads_shared_input(linear) and not multiplies_again)
            held = 0 if kept_anyway else linear.in_features * width
            alive, freed = (0.0, held) if shared else (held, 0.0)
            operation = self.linear(linear, alive=alive, ends_block=True, freed=freed)
            found.append(self._in_some_layers(replace(operation, kept=operation.kept + freed), linear))
        return found

    def _in_some_layers(self, operation: Operation, linear: LinearShape) -> Operation:
        """What an average layer keeps of an operation that not every layer has; its moment stays whole."""
        return replace(operation, kept=operation.kept * self.share(linear))

    def _dropped_stream(self) -> list[Operation]:
        """The model's own dropout on a block's result: a mask."""
        hidden = self.shape.hidden_size
        moments = (Moment("forward", 2 * self.compute_bytes * hidden),)
        return [Operation("dropout", self.mask_bytes * hidden, moments)] if self.shape.hidden_dropout else []
