"""Floating-point operations of training: what a model, an adapter and its rows ask for, whatever computes it.

    frozen         4 N_frozen T             2 forward, 2 for the gradient of the input; none for the weight's own
    adapter        6 N_adapter T            2 forward, 2 for the gradient of the input, 2 for the weights'
    head           4 N_head T_labelled      logits exist only where a label is
    attention      12 Q L pairs             q·k and p·v are 2 Q each forward, twice that backward
    recomputation  2 N_frozen T + 2 N_adapter T + 4 Q L pairs        a second forward of the layers, where checkpointed

Of an encoder-decoder, a source's tokens go through the weights of the encoder, and a target's through the decoder's.

T are real tokens, without padding. Pairs are what causal attention looks at: a row of S tokens has S (S + 1) / 2.
Norms, activations, rotations and lookups are left out: they take bandwidth, hardly any arithmetic.

Source: Kaplan et al. 2020, Scaling Laws (https://arxiv.org/abs/2001.08361), section 2.1, for 2 N forward and 4 N
backward; Chowdhery et al. 2022, PaLM (https://arxiv.org/abs/2204.02311), appendix B, for 12 L Q S a token of attention
(there without the causal half) and for model flops utilisation, which leaves recomputation out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lorafit.facts import ModelShape
from lorafit.ops.recomputed_layers import Checkpointing, recomputed_layers


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations by what they are for."""

    frozen: int
    adapter: int
    head: int
    attention: int
    recomputation: int

    @property
    def model_flops(self) -> int:
        """What the result needs: all but recomputation. Utilisation is this, a second, over the machine's peak."""
        return self.frozen + self.adapter + self.head + self.attention

    @property
    def total(self) -> int:
        """What is computed."""
        return self.model_flops + self.recomputation

    def to_json(self) -> dict[str, int]:
        """Plain numbers."""
        return {**asdict(self), "total": self.total}


def count_flops(
    shape: ModelShape,
    *,
    adapter_parameters: int,
    tokens: int,
    labelled_tokens: int,
    squared_tokens: int,
    checkpointing: Checkpointing,
) -> Flops:
    """Operations of training on some rows once.

    Args:
        shape: The model.
        adapter_parameters: Trainable parameters of all layers.
        tokens: Real tokens of the rows (T).
        labelled_tokens: Those that carry loss.
        squared_tokens: Sum of the squares of the rows' lengths; of documents, where several share a row.
        checkpointing: Which layers run forward twice.
    """
    frozen, attention = active_parameters(shape), 4 * shape.heads * shape.head_dim * shape.layers
    pairs = (squared_tokens + tokens) // 2
    written = shape.decoder_parameters
    read = frozen - written
    products = read * (tokens - labelled_tokens) + written * labelled_tokens if written else frozen * tokens
    adapted = adapter_parameters * products // max(1, frozen)  # beside each weight alike
    again = 2 * (products + adapted) + attention * pairs
    return Flops(
        frozen=4 * products,
        adapter=6 * adapted,
        head=4 * head_parameters(shape) * labelled_tokens,
        attention=3 * attention * pairs,
        recomputation=again * len(recomputed_layers(checkpointing, shape.layers)) // shape.layers,
    )


def active_parameters(shape: ModelShape) -> int:
    """Weights of the layers that one token is multiplied with (N_frozen): of a mixture only the experts it goes to."""
    chosen = 3 * shape.experts_per_token * shape.expert_size * shape.hidden_size * shape.layers if shape.experts else 0
    return shape.linear_parameters + chosen


def head_parameters(shape: ModelShape) -> int:
    """Weights of the head (N_head), its own or the embedding's."""
    return shape.head_parameters or shape.embedding_parameters
