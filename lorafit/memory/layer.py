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

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from lorafit.facts import LinearShape, ModelShape
from lorafit.memory.operations import Moment, Operation, run_beside
from lorafit.ops.attention_kernels import Kernel
from lorafit.ops.chunk_sizes import chunk_rows, largest_block
from lorafit.ops.fusible import fuses_branch


@dataclass(frozen=True)
class Layer:
    """One decoder layer under one micro-batch, and how the training stack computes it.

    Methods that describe another stack than lorafit's are overridden in benchmarks/memory_published.py.

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
        keeps_input: Whether a linear keeps its input: all do in full fine-tuning, and those of LLM.int8().
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
    keeps_input: Callable[[LinearShape], bool] = lambda linear: False
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

    @cached_property
    def operations(self) -> list[Operation]:
        """All of them in forward order."""
        shape = self.shape
        hidden, stream = shape.hidden_size, shape.hidden_size * self.stream_bytes
        attention = [
            self.norm("norm"),
            *self._inputs(("q", "k", "v", "qkv")),
            *self._attention(),
            *self._outputs("o"),
            *self._dropped_stream(),
        ]
        mlp = [
            *([] if shape.norms_per_layer == 1 else [self.norm("norm")]),
            *self._inputs(("gate", "up", "gate_up", "")),
            *self._activation(),
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
        held = filter(self.keeps_input, self.shape.linears if self.leaks_inputs else ())
        widths = {linear.role or linear.name: linear.in_features for linear in held}
        shared = [widths[roles[0]] for roles in (("q", "k", "v"), ("gate", "up")) if roles[0] in widths]
        single = [width for role, width in widths.items() if role not in ("q", "k", "v", "gate", "up")]
        return sum(shared + single) * self.compute_bytes

    # Which parts run as one operation

    def fuses_linear(self, linear: LinearShape) -> bool:
        """Whether a linear and its branch do."""
        keeps_input = self.keeps_input(linear)
        known = linear.quantizable  # the classes that transformers can replace are those that are fused
        return self.fused and fuses_branch(of_known_class=known, keeps_input=keeps_input, transposed=linear.transposed)

    def fuses_norm(self) -> bool:
        return self.fused and self.shape.norm == "rms" and self.shape.plain_norm

    def fuses_gate(self) -> bool:
        """silu between a gate and an up projection of their own."""
        return self.shape.activation == "silu" and {"gate", "up"} <= {linear.role for linear in self.shape.linears}

    def _fuses_projections(self) -> bool:
        """Whether both projections and their product do (`lorafit.ops.lora_gated`)."""
        joined = {linear.role for linear in self.adapted if self.fuses_linear(linear)}
        return self.dropout == 0 and self.fuses_gate() and {"gate", "up"} <= joined

    def _fuses_attention(self) -> bool:
        """Whether attention runs as `lorafit.ops.causal_attention` does; it hands anything unusual to sdpa."""
        shape = self.shape
        is_usual = not (self.masked or shape.attention_dropout or shape.softcap or shape.math_attention)
        return self.attention == "fused" and self.device_kind == "cpu" and is_usual

    def _is_math(self) -> bool:
        """Whether sdpa is plain products."""
        dropped = self.device_kind == "cpu" and self.shape.attention_dropout > 0  # no CPU flash kernel takes dropout
        return self.shape.math_attention or dropped or self.kernel == "math"

    def _keeps_attended(self) -> bool:
        """Whether attention keeps its own result: one kernel does, plain products do not."""
        are_products = self.attention == "eager" or bool(self.shape.softcap) or self._is_math()
        return not (are_products or self._fuses_attention())

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
        shared = any(self.keeps_input(x) or self.reads_shared_input(x) for x in linears)
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
            attention_keeps = role == "o" and self._keeps_attended()
            kept_anyway = attention_keeps or self.shape.activation == "relu"  # its result, and so does relu
            multiplies_again = role == "down" and linear in self.adapted and self._fuses_projections()
            shared = self.keeps_input(linear) or (self.reads_shared_input(linear) and not multiplies_again)
            held = 0 if kept_anyway else linear.in_features * width
            alive, freed = (0.0, held) if shared else (held, 0.0)
            operation = self.linear(linear, alive=alive, ends_block=True, freed=freed)
            found.append(self._in_some_layers(replace(operation, kept=operation.kept + freed), linear))
        return found

    def _in_some_layers(self, operation: Operation, linear: LinearShape) -> Operation:
        """What an average layer keeps of an operation that not every layer has; its moment stays whole."""
        return replace(operation, kept=operation.kept * self._share(linear))

    def _share(self, linear: LinearShape) -> float:
        """Share of the layers that hold it, at most 1."""
        return min(1.0, linear.count / max(self.shape.layers, 1))

    def _attention(self) -> list[Operation]:
        """Rotation and attention.

        Flash keeps q, k, v, its output and a log-sum a head; `fused` q, k and v; eager keeps every score, in fp32 and
        as computed; sdpa without a flash kernel keeps them in fp32.
        """
        shape, c = self.shape, self.compute_bytes
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        operations = []
        if shape.qk_norm:
            wide = (c if self.fuses_norm() else 4) * (q_width + kv_width)
            moments = (Moment("forward", 6 * q_width), Moment("backward", 16 * q_width))
            operations.append(Operation("query and key norm", wide, moments))
        scores = shape.heads * self.row_tokens
        # v is a view of a fused projection's result, whose rotated q and k are copies
        is_view = shape.position_parameters == 0 and any(linear.role == "qkv" for linear in shape.linears)
        copies = c * (q_width + kv_width) if is_view else 0
        if self.attention != "eager" and not shape.softcap and self._is_math():
            # fp32 throughout: softmax keeps its result, dropout its mask and the product that multiplies v
            results = 3 if shape.attention_dropout > 0 else 1
            kept = 4 * (results * scores + 3 * q_width)
            moments = (Moment("forward", 4 * scores), Moment("backward", (4 if results == 3 else 8) * scores))
        elif self.attention == "eager" and shape.has_sinks:  # softmax keeps its result, which multiplies v as it is
            kept = scores * c + 3 * c * q_width
            moments = (Moment("forward", 2 * scores * c), Moment("backward", 3 * scores * c + 3 * c * q_width))
        elif self.attention == "eager" or shape.softcap:
            softmax = 4 if c < 4 else 0  # softmax in fp32 keeps its result; its bf16 copy multiplies v
            kept = scores * (softmax + c) + c * (q_width + 2 * (q_width if shape.kv_heads < shape.heads else kv_width))
            kept += scores * c if shape.softcap else 0
            kept += scores * self.mask_bytes if shape.attention_dropout > 0 else 0
            freed = c if c < 4 else 0  # the bf16 copy is used up before softmax's fp32 gradients stand at their most
            moments = (Moment("forward", scores * c), Moment("backward", scores * (8 - freed) + 3 * c * q_width))
        elif self._fuses_attention():
            kept = c * (q_width + 2 * kv_width) + copies
            rows = chunk_rows(self.row_tokens)
            block = rows * shape.heads * largest_block(self.row_tokens) * c
            # dk and dv: their sums in fp32, three of a block's; keys and values are copied, or filled up
            sums = rows * self.row_tokens * kv_width * (8 + c * (4 if rows == 1 else 5))
            moments = (
                Moment("forward", 3 * c * q_width, 2 * block),
                Moment("backward", c * (2 * q_width + 2 * kv_width), 3 * block + sums),
            )
        else:
            kept = c * (2 * q_width + 2 * kv_width) + 4 * shape.heads + copies
            if self.masked:  # added to the scores in the compute dtype
                kept += c * self.row_tokens
            if self.masked or self.kernel == "efficient":  # every query head has its own keys and values
                kept += 2 * c * (q_width - kv_width)
            # CUDA's flash backward sums dq in fp32 and makes dk, dv for every query head
            gpu = 4 * q_width + 2 * c * q_width if self.device_kind != "cpu" else 0
            moments = (Moment("forward", 3 * c * q_width), Moment("backward", c * (2 * q_width + 2 * kv_width) + gpu))
        return [*operations, Operation("attention", kept, moments)]

    def _activation(self) -> list[Operation]:
        """What stands between the MLP's linears, by activation; the experts of a mixture whole."""
        shape, c, wide = self.shape, self.compute_bytes, 4 if self.wide_on_gpu else self.compute_bytes
        found = [self._experts()] if shape.experts else []
        inner = round(sum(x.in_features * self._share(x) for x in shape.linears if x.role == "down"))
        if not inner:
            return found
        moments = []
        if shape.gated_mlp and self.fused and self.fuses_gate():  # its two factors; both gradients, two on the way
            own = 0 if self.runs_liger else 2  # gradients with memory of their own
            kept, backward = 2 * c * inner, (4 if own else 1) * c * inner
            gate = next(linear for linear in shape.linears if linear.role == "gate")
            if self._fuses_projections():  # the gradient of both projections' input, before the factors may go
                weight = 0 if self.keeps_unpacked else self.dequantised_bytes(gate)
                moments.append(Moment("backward", (1 + own) * c * inner + c * gate.in_features, weight))
        elif shape.gated_mlp:  # act keeps its input, act·up keeps both factors
            kept, backward = 3 * c * inner, 3 * c * inner
        elif shape.activation == "gelu_new":  # written out: x³, tanh, 1 + tanh and x/2 are kept one by one
            result = 0 if self.wide_on_gpu else c  # its gradient, gone once it is cast up
            kept, backward = (3 * wide + c) * inner, (result + 3 * wide) * inner  # three on its way
        elif shape.activation == "xielu":  # in torch's own operations: its input, two results, where it is positive
            kept, backward = (3 * c + 1) * inner, 3 * c * inner
        else:  # gelu keeps its input, relu its result
            kept, backward = c * inner, 2 * c * inner
        moments += [Moment("forward", c * inner), Moment("backward", backward)]
        return [*found, Operation("activation", kept, tuple(moments))]

    def _experts(self) -> Operation:
        """Frozen fused experts: a token goes through `experts_per_token` gated MLPs and is weighted by its router."""
        shape, c = self.shape, self.compute_bytes
        ways, inner, hidden = shape.experts_per_token, shape.expert_size, shape.hidden_size
        kept = ways * (3 * c * inner + c * hidden) + 8 * shape.experts
        weighted = (c + 8) * hidden  # by fp32 router weights: results, or their gradients, in fp32 twice
        returns = 3 * c * inner - c * hidden  # their gradients through act·up, when the weighted results are gone
        moments = (Moment("forward", ways * weighted), Moment("backward", ways * max(returns, weighted)))
        return Operation("experts", kept, moments)

    def _dropped_stream(self) -> list[Operation]:
        """The model's own dropout on a block's result: a mask."""
        hidden = self.shape.hidden_size
        moments = (Moment("forward", 2 * self.compute_bytes * hidden),)
        return [Operation("dropout", self.mask_bytes * hidden, moments)] if self.shape.hidden_dropout else []
