"""NEFTune: uniform noise on the embeddings of a training step's tokens, and of nothing else.

    x' = x + alpha / sqrt(L d) * e        e: uniform on [-1, 1], anew for each value of each micro-batch

L is the number of real tokens of the sequence that a token stands in, or of its document where a row holds several; d
is the width of the embeddings. `noise_scale` is made with the micro-batch, on the host, and only batches that are
trained on have it: evaluations, proofs and rehearsals run without noise.

Source: Jain et al. 2023, NEFTune: Noisy Embeddings Improve Instruction Finetuning (https://arxiv.org/abs/2310.05914),
algorithm 1.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from lorafit.contracts import Batch
from lorafit.errors import ModelError
from lorafit.ops.dropout import draw_uniform

NOISE = "noise_scale"
_of_thread = threading.local()


def with_noise(batch: Batch, alpha: float) -> Batch:
    """The batch with alpha / sqrt(L) for each of its tokens, fp32 [sequences, tokens]."""
    scale = alpha / real_lengths(batch).to(torch.float32).clamp_(min=1.0).sqrt_()
    return replace(batch, tensors={**batch.tensors, NOISE: scale})


def real_lengths(batch: Batch) -> torch.Tensor:
    """Real tokens of the document or sequence that each token stands in, [sequences, tokens]; in padding anything."""
    ids = batch["input_ids"]
    if "position_ids" in batch.tensors:
        document = (batch["position_ids"] == 0).cumsum(1)
        counts = torch.zeros(ids.shape[0], ids.shape[1] + 1, dtype=torch.int64)
        return counts.scatter_add_(1, document, torch.ones_like(document)).gather(1, document)
    if "attention_mask" in batch.tensors:
        return batch["attention_mask"].sum(1, keepdim=True).expand(ids.shape)
    return torch.tensor(batch.lengths)[:, None].expand(ids.shape)


@contextlib.contextmanager
def noise_of(batch: Batch) -> Iterator[None]:
    """Inside, one forward of this thread reads embeddings with the batch's noise, where it has any.

    Raises:
        ModelError: The model read its tokens' embeddings past the layer that has them.
    """
    scale = batch.tensors.get(NOISE)
    if scale is None:
        yield
        return
    _of_thread.scale = scale
    try:
        yield
        is_left = _of_thread.scale is not None
    finally:
        _of_thread.scale = None
    if is_left:
        what = "the model reads its tokens past its embedding layer, so that no noise reaches them"
        raise ModelError(what, key="training.embedding_noise", todo="leave it out")


def take_noise(embedding: nn.Module) -> None:
    """Lets a model's input embedding add the noise of the forward that runs. Once for each model."""
    embedding.register_forward_hook(_add)


def _add(_: nn.Module, __: object, embedded: torch.Tensor) -> torch.Tensor | None:
    scale: torch.Tensor | None = getattr(_of_thread, "scale", None)
    if scale is None or embedded.shape[:-1] != scale.shape:
        return None
    _of_thread.scale = None
    noise = draw_uniform(embedded).mul_(scale.unsqueeze(-1) / math.sqrt(embedded.shape[-1]))
    return embedded + noise.to(embedded.dtype)
