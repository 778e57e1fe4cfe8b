"""How `causal_attention` cuts rows: what it takes for a moment is known without running it."""

from __future__ import annotations

BLOCK_TOKENS = 128
"""Queries of a row at a time. Larger blocks compute more of what is masked, smaller ones make narrow products."""
CHUNK_TOKENS = 512
"""Short rows go through the products together up to so many tokens; scores then stay in the CPU's caches."""


def chunk_rows(tokens: int) -> int:
    """How many rows of so many tokens go through the products together."""
    return max(1, CHUNK_TOKENS // tokens)


def cut_blocks(tokens: int) -> list[slice[int, int, None]]:
    """Blocks of queries of a row; a block sees the keys up to its end."""
    return [slice(start, min(start + BLOCK_TOKENS, tokens)) for start in range(0, tokens, BLOCK_TOKENS)]


def largest_block(tokens: int) -> int:
    """Scores of the largest block, a head and row."""
    return max((block.stop - block.start) * block.stop for block in cut_blocks(tokens))
