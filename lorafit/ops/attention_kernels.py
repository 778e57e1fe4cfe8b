"""Which of torch's kernels computes sdpa's attention on a CUDA device; known without torch, for the estimate.

    flash       keeps q, k, v, its result and a log-sum a head
    efficient   the same, and every query head needs keys and values of its own
    math        plain products in fp32: every score is kept

cuDNN's kernel is out: `lorafit.model.attention` switches it off.
"""

from __future__ import annotations

from typing import Literal

VARLEN = "varlen"
"""lorafit's own attention for packed rows on a card: torch's flash kernel, which is told where documents begin."""
VARIABLE_LENGTH_ATTENTION = frozenset({VARLEN, "flash_attention_2"})
"""Implementations that compute each document of a row by itself, of one row at a time."""
_MOST_HEAD_DIM = 256

Capability = tuple[int, int]
"""A card's CUDA compute capability: (8, 9) is written 8.9."""
Kernel = Literal["flash", "efficient", "math"]


def kernel_of(capability: Capability, dtype: str, *, grouped: bool, masked: bool) -> Kernel:
    """The kernel that torch takes.

    Args:
        capability: The card's.
        dtype: Of queries, keys and values: `bf16`, `fp16` or `fp32`.
        grouped: Whether several query heads share keys and values (`enable_gqa`).
        masked: Whether a mask is given, causal ones apart.

    Source: torch 2.13, ATen/native/transformers/cuda/sdp_utils.cpp, `can_use_flash_attention` and
    `can_use_mem_efficient_attention`.
    """
    is_recent = capability >= (8, 0)
    if is_recent and dtype in ("bf16", "fp16") and not masked:
        return "flash"
    if not grouped and (is_recent or dtype != "bf16"):
        return "efficient"
    return "math"


def packs(packing: bool | None, attention: str) -> bool:
    """Whether documents share rows under an attention, by what a recipe says of packing; None: `auto`."""
    return attention == VARLEN if packing is None else packing


def takes_documents(capability: Capability, dtype: str, head_dim: int) -> bool:
    """Whether torch's variable-length attention runs on a card.

    Source: torch 2.13, ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_varlen_fwd`.
    """
    is_flash = kernel_of(capability, dtype, grouped=True, masked=False) == "flash"
    return is_flash and head_dim % 8 == 0 and head_dim <= _MOST_HEAD_DIM
