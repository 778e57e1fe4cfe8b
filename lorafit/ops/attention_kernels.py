"""Which of torch's kernels computes sdpa's attention on a CUDA device; known without torch, for the estimate.

    flash       keeps q, k, v, its result and a log-sum a head
    efficient   the same, and every query head needs keys and values of its own
    math        plain products in fp32: every score is kept

cuDNN's kernel is out: `lorafit.model.attention` switches it off.
"""

from __future__ import annotations

from typing import Literal

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
