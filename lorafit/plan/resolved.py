"""The values that a run really used: what `auto` became. Saved with every checkpoint, so that a resume repeats them.

How a step is run is a function of its number: the first ones may be run in ways of their own, which are tried there.

    step        1  2  3  4  5  6 | 7  8  9 ...
    way         A  B  C  A  B  C | the fastest of them
    settled     no               | yes: written down before step 7, and the same whoever repeats the run
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import CheckpointError
from lorafit.ops.recomputed_layers import Checkpointing

_TODO = "take a plan.json that a run of lorafit wrote"
_Count = Annotated[int, Field(gt=0, lt=1 << 53)]
_Attention = Annotated[str, Field(pattern="^(auto|eager|sdpa|fused|varlen|flash_attention_2)$")]
"""transformers takes any other name of an attention for a kernel to fetch and run."""
_Kernels = Annotated[str, Field(pattern="^(none|liger( without [a-z, ]+)?)$")]
_LinearKind = Annotated[str, Field(pattern="^(nf4|int8|none)$")]
_Dtype = Annotated[str, Field(pattern="^(bf16|fp16|fp32)$")]


@dataclass(frozen=True, slots=True)
class Way:
    """How the micro-batches of a step are run; it decides speed and memory, and no result beyond rounding.

    Attributes:
        attention: `eager`, `sdpa`, `fused`, `varlen` or `flash_attention_2`.
        micro_batch_tokens: Padded tokens of one training forward.
        micro_batches_at_once: On a CPU, each on a core of its own; 1: one by one.
    """

    attention: _Attention
    micro_batch_tokens: _Count
    micro_batches_at_once: _Count = 1

    @property
    def tokens_at_once(self) -> int:
        """Padded tokens whose activations are in memory together."""
        return self.micro_batch_tokens * self.micro_batches_at_once


@dataclass(frozen=True, slots=True)
class ResolvedPlan:
    """A plan without `auto`.

    Attributes:
        micro_batch_tokens: Padded tokens of one training forward.
        evaluation_micro_batch_tokens: Padded tokens of one evaluation forward.
        attention: `eager`, `sdpa`, `fused`, `varlen` or `flash_attention_2`.
        dtype: `bf16`, `fp16` or `fp32`: of weights that are not quantised.
        compute_dtype: Of products with dequantised weights.
        ranks: Processes that train together.
        source: Where the values come from: `recipe`, `run`, `plan`, `cache`, or `rehearsal` and first steps.
        measured: Figures to keep: bytes and seconds of the rehearsal, what the tried steps took.
        micro_batches_at_once: On a CPU, each on a core of its own; 1: one by one.
        first_steps: Ways of steps 1, 2, ...; the steps behind them are run as the values above say.
        is_settled: Whether those values were chosen by what the first steps took, or nothing was left to choose.
        keeps_unpacked: Whether adapted 4-bit weights keep their dequantised copy; older runs did as their plan said.
        micro_batch_cost_tokens: What starting a micro-batch costs on a card, as its steps are cut; None: as on a CPU.
        loss_chunk_bytes: Of fp32 logits that the loss holds at once; None: as many as are usual on the device.
        kernels: `none` or `liger`, with what of it was left out.
        linears: Kinds of linears by path, where calibration rows chose them.
    """

    micro_batch_tokens: _Count
    evaluation_micro_batch_tokens: _Count
    attention: _Attention
    gradient_checkpointing: Checkpointing
    dtype: _Dtype
    compute_dtype: _Dtype
    device_kind: str
    ranks: _Count
    source: str
    measured: JsonObject = field(default_factory=dict)
    micro_batches_at_once: _Count = 1
    first_steps: list[Way] = field(default_factory=list)
    is_settled: bool = True
    keeps_unpacked: bool = True
    loss_chunk_bytes: _Count | None = None
    micro_batch_cost_tokens: _Count | None = None
    kernels: _Kernels = "none"
    linears: dict[str, _LinearKind] = field(default_factory=dict)

    @property
    def later(self) -> Way:
        """Of the steps behind the first ones."""
        return Way(self.attention, self.micro_batch_tokens, self.micro_batches_at_once)

    @property
    def ways(self) -> list[Way]:
        """All that the run takes or may take, each once."""
        return list(dict.fromkeys([*self.first_steps, self.later]))

    def way(self, step: int) -> Way:
        """Of one step, from 1."""
        return self.first_steps[step - 1] if 0 < step <= len(self.first_steps) else self.later

    def running(self, later: Way) -> ResolvedPlan:
        """The plan with another way for the steps behind the first ones."""
        return replace(self, **asdict(later))

    def to_json(self) -> JsonObject:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: JsonMapping, file: str = "plan.json") -> ResolvedPlan:
        """What `to_json` gave.

        Raises:
            CheckpointError: A value is missing or of another type.
        """
        try:
            return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            fault = error.errors()[0]
        if not fault["loc"]:
            raise CheckpointError("holds no JSON object", file=file, todo=_TODO)
        what = "is missing" if fault["type"] == "missing" else f"{str(fault['input'])[:60]!r} is no valid value"
        raise CheckpointError(what, file=file, key=str(fault["loc"][0]), todo=_TODO)
