"""Errors for runs that are out of memory, which say what to lower, and ways to give memory back."""

from __future__ import annotations

import torch

from lorafit.errors import ResourceError
from lorafit.ops.process_memory import trim_heap

_TRIMMED_AFTER_SECONDS = 1.0  # shorter steps leave little behind, and would feel it


def out_of_memory(where: str, longest_tokens: int, micro_batch_tokens: int) -> ResourceError:
    """The error a user sees.

    Args:
        where: E.g. `at step 12`.
        longest_tokens: Sequence length of the longest row of that step.
        micro_batch_tokens: The token budget in force.
    """
    return ResourceError(
        f"out of memory {where}: seq length {longest_tokens}, micro_batch_tokens {micro_batch_tokens}",
        todo="lower training.micro_batch_tokens or data.max_length, or set training.gradient_checkpointing: true",
    )


def release_memory(device: torch.device) -> None:
    """Gives cached blocks back, so that the next try starts from an unbroken pool."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def trim_after(seconds: float, device: torch.device) -> None:
    """Gives a CPU's free heap back after a long step: else it grows, as each step takes blocks of other sizes."""
    if device.type == "cpu" and seconds > _TRIMMED_AFTER_SECONDS:
        trim_heap()
