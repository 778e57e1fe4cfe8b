"""Facts about a model, its data and the device: plain numbers, frozen, no torch. `plan` turns them into a Plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One kind of linear layer that every decoder layer holds `count` times.

    Attributes:
        name: Last part of the module's name, e.g. `q_proj`.
        in_features: Width of its input.
        out_features: Width of its output.
        count: How many the whole model holds.
        bias: Whether it has a bias vector.
        transposed: Stored `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
    """

    name: str
    in_features: int
    out_features: int
    count: int
    bias: bool = False
    transposed: bool = False

    @property
    def weight_parameters(self) -> int:
        """Parameters of all `count` weights, biases apart."""
        return self.in_features * self.out_features * self.count


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What plan and memory must know of a causal language model; read from a `config.json` alone.

    Attributes:
        linears: Every kind of linear layer inside the decoder layers (head and embeddings apart).
        other_parameters: Parameters outside linears' weights, embeddings and head: norms, biases, position tables, routers.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    tied_embeddings: bool
    linears: tuple[LinearShape, ...]
    embedding_parameters: int
    head_parameters: int
    other_parameters: int
    gated_mlp: bool = True
    position_parameters: int = 0

    @property
    def linear_parameters(self) -> int:
        """Parameters of all linear weights inside the decoder layers."""
        return sum(linear.weight_parameters for linear in self.linears)

    @property
    def total_parameters(self) -> int:
        """The published parameter count; a tied head is counted once."""
        return self.linear_parameters + self.embedding_parameters + self.head_parameters + self.other_parameters


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """What plan and memory must know of the prepared training rows.

    Attributes:
        rows: Rows of one epoch, repeats counted.
        tokens: Tokens of one epoch, padding apart.
        trained_tokens: Tokens of one epoch that carry loss.
        longest_tokens: Tokens of the longest row.
        longest_trained_tokens: Most trained tokens in one row.
        validation_rows: Rows that are scored while training.
        validation_longest_tokens: Tokens of the longest of those.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    longest_trained_tokens: int
    validation_rows: int = 0
    validation_longest_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Where the run happens.

    Attributes:
        kind: `cpu`, `cuda` or `mps`.
        name: Name to print, e.g. `NVIDIA L4` or `cpu`.
        memory_bytes: Usable memory: what torch reports for a card; on a CPU the smaller of available RAM and the cgroup's limit.
        bf16: Whether bf16 matrix products run at speed.
        count: Processes that train together.
    """

    kind: str
    name: str
    memory_bytes: int
    bf16: bool
    count: int = 1
