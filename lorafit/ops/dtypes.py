"""The words of recipes and cards for dtypes, as torch has them."""

from __future__ import annotations

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_named(word: str) -> torch.dtype:
    """The dtype of `bf16`, `fp16` or `fp32`."""
    return _DTYPES[word]


def word_of(dtype: torch.dtype) -> str:
    """The reverse; torch's own name of any other dtype."""
    return next((word for word, known in _DTYPES.items() if known == dtype), str(dtype))


def autocast_dtype(word: str) -> torch.dtype | None:
    """What a forward computes in beside fp32 adapter weights; None: as they are."""
    return None if word == "fp32" else dtype_named(word)
