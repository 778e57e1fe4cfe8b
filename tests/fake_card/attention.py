"""Which kernel torch takes for sdpa on the pretended card, asked of torch itself."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from lorafit.model.attention import register_attention
from lorafit.ops.attention_kernels import kernel_of
from lorafit.ops.dtypes import dtype_named
from tests.fake_card.step import CARD, Observer, card_facts

ROWS, HEADS, KEY_HEADS, TOKENS = 2, 32, 8, 200


def answer(question: list[int]) -> list[dict[str, Any]]:
    """For each dtype, with shared keys and without, with a mask and without: torch's choice, and lorafit's word."""
    register_attention()
    capability = card_facts().capability
    found = []
    for dtype, grouped, masked, width in itertools.product(
        ("bf16", "fp16", "fp32"), (False, True), (False, True), question
    ):
        observer = Observer()
        with FakeTensorMode(), CARD, observer.attending(), observer:
            shape = (ROWS, HEADS, TOKENS, width)
            query = torch.empty(shape, dtype=dtype_named(dtype), requires_grad=True)
            keys = torch.empty((ROWS, KEY_HEADS if grouped else HEADS, TOKENS, width), dtype=query.dtype)
            mask = torch.empty((ROWS, 1, TOKENS, TOKENS), dtype=torch.bool) if masked else None
            functional.scaled_dot_product_attention(query, keys, keys, mask, is_causal=not masked, enable_gqa=grouped)
        case = {"dtype": dtype, "grouped": grouped, "masked": masked, "head width": width}
        expected = kernel_of(capability, dtype, grouped=grouped, masked=masked)
        found.append({**case, "torch": list(observer.kernels), "lorafit": [expected]})
    return found
