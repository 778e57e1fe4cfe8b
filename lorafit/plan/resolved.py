"""The values that a run really used: what `auto` became. Saved with every checkpoint, so that a resume measures
nothing anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from lorafit.contracts import JsonMapping, JsonObject, JsonValue
from lorafit.errors import CheckpointError

_TODO = "take a plan.json that a run of lorafit wrote"
_DTYPES = ("bf16", "fp16", "fp32")
_CHOICES: dict[str, tuple[str, ...]] = {
    "attention": ("auto", "eager", "sdpa", "fused", "flash_attention_2"),
    "dtype": _DTYPES,
    "compute_dtype": _DTYPES,
}
"""What a text may be: transformers takes any other name of an attention for a kernel to fetch and run."""


@dataclass(frozen=True, slots=True)
class ResolvedPlan:
    """A plan without `auto`.

    Attributes:
        micro_batch_tokens: Padded tokens of one training forward.
        evaluation_micro_batch_tokens: Padded tokens of one evaluation forward.
        attention: `eager`, `sdpa`, `fused` or `flash_attention_2`.
        dtype: `bf16`, `fp16` or `fp32`: of weights that are not quantised.
        compute_dtype: Of products with dequantised weights.
        ranks: Processes that train together.
        source: Where the values come from: `recipe`, `run`, `plan`, `cache` or `rehearsal`.
        measured: What the rehearsal measured: seconds and bytes by candidate.
        micro_batches_at_once: On a CPU, each on a core of its own; 1: one by one.
    """

    micro_batch_tokens: int
    evaluation_micro_batch_tokens: int
    attention: str
    gradient_checkpointing: bool
    dtype: str
    compute_dtype: str
    device_kind: str
    ranks: int
    source: str
    measured: JsonObject = field(default_factory=dict)
    micro_batches_at_once: int = 1

    @property
    def tokens_at_once(self) -> int:
        """Padded tokens whose activations are in memory together."""
        return self.micro_batch_tokens * self.micro_batches_at_once

    def to_json(self) -> JsonObject:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: JsonMapping, file: str = "plan.json") -> ResolvedPlan:
        """What `to_json` gave.

        Raises:
            CheckpointError: A value is missing or of another type.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError("holds no JSON object", file=file, todo=_TODO)
        taken: JsonObject = {"measured": {}, "micro_batches_at_once": 1}
        for known in fields(cls):
            value = values.get(known.name, taken.get(known.name))
            if not _is_valid(str(known.type), value) or value not in _CHOICES.get(known.name, (value,)):
                raise CheckpointError(
                    f"{str(value)[:60]!r} is no valid value" if known.name in values else "is missing",
                    file=file,
                    key=known.name,
                    todo=_TODO,
                )
            taken[known.name] = value
        return cls(**taken)


def _is_valid(wanted: str, value: JsonValue) -> bool:
    if wanted == "int":
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 53
    return isinstance(value, {"str": str, "bool": bool, "JsonObject": dict}[wanted])
