"""How the CPU's attention and the loss are cut into pieces: what a piece takes is known without torch, for the
estimate."""

from __future__ import annotations

BLOCK_TOKENS = 128
"""Queries of a row at a time. Larger blocks compute more of what is masked, smaller ones make narrow products."""
CHUNK_TOKENS = 512
"""Short rows go through the products together up to so many tokens; scores then stay in the CPU's caches."""
_VECTOR_VALUES = 32  # bf16 in 64 bytes
LOGITS_CHUNK_BYTES = {"cpu": 16 * 2**20, "gpu": 64 * 2**20}
"""Of fp32 logits that the loss holds at once: few enough to leave a CPU's caches to others, and on a GPU enough rows
for a wide product."""
LARGER_CHUNKS = ((70 << 30, 512 << 20), (20 << 30, 256 << 20))
"""(memory of a GPU, bytes) of larger ones, since the head (1 GB in Llama-3.1-8B) is read twice for each. A card of 24
or 80 GB has a bit less that is usable."""
_FP32_BYTES = 4


def chunk_rows(tokens: int) -> int:
    """How many rows of so many tokens go through the products together."""
    return max(1, CHUNK_TOKENS // tokens)


def cut_blocks(tokens: int) -> list[slice[int, int, None]]:
    """Blocks of queries of a row; a block sees the keys up to its end."""
    return [slice(start, min(start + BLOCK_TOKENS, tokens)) for start in range(0, tokens, BLOCK_TOKENS)]


def padded_keys(block: slice[int, int, None]) -> int:
    """Keys that a block of queries is multiplied with: those up to its end, filled up to whole vectors.

    torch's softmax takes four times as long for a row of 63 values in bf16 as for one of 64.
    """
    return -(-block.stop // _VECTOR_VALUES) * _VECTOR_VALUES


def largest_block(tokens: int) -> int:
    """Scores of the largest block, a head and row."""
    return max((block.stop - block.start) * padded_keys(block) for block in cut_blocks(tokens))


def usual_chunk_bytes(device_kind: str) -> int:
    """Bytes of a chunk, on a device of which no more is known."""
    return LOGITS_CHUNK_BYTES["cpu" if device_kind == "cpu" else "gpu"]


def larger_chunk_bytes(memory_bytes: int) -> int | None:
    """Bytes of a larger chunk on a GPU of so much memory; None where the usual one is right."""
    return next((chunk for least, chunk in LARGER_CHUNKS if memory_bytes >= least), None)


def chunk_labels(vocabulary: int, device_kind: str, chunk_bytes: int | None = None) -> int:
    """Labels whose fp32 logits are held at once; in as many bytes as are usual on the device where none are given."""
    return max(1, (chunk_bytes or usual_chunk_bytes(device_kind)) // (_FP32_BYTES * vocabulary))
