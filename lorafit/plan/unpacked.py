"""Whether adapted 4-bit weights keep their dequantised copy for the whole run.

    true   always, where there is anything to keep
    auto   on a CPU whose memory has room: the copies take a quarter of it at most, and the run's smallest micro-batch
           still fits without checkpointing, or with it where the recipe wants that anyway

Kept or not, a step computes the same to the last bit: only speed and memory differ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorafit.memory import fits
from lorafit.plan.step_memory import MemoryQuestion, resolve_compute_dtype

if TYPE_CHECKING:
    from lorafit.facts import DeviceFacts

MOST_OF_MEMORY = 0.25
"""Share of usable memory that `auto` gives to the copies: the rest makes micro-batches larger, which is faster too."""


def decide_unpacked(question: MemoryQuestion, device: DeviceFacts | None, headroom: float) -> MemoryQuestion:
    """The same question with `keeps_unpacked` settled.

    Args:
        question: Of a run or of an estimate.
        device: Where the run happens; None: no card was named, and `auto` keeps nothing.
        headroom: Share of its memory that stays free.
    """
    asked = asks_to_keep(question)
    kept = replace(question, keeps_unpacked=True)
    if asked is False or not unpacked_bytes(kept):
        return replace(question, keeps_unpacked=False)
    return kept if asked is True or _has_room(kept, device, headroom) else replace(question, keeps_unpacked=False)


def asks_to_keep(question: MemoryQuestion) -> bool | str:
    """The recipe's `keep_unpacked`; False for kinds without it."""
    asked: bool | str = getattr(question.recipe.model.quantization, "keep_unpacked", False)
    return asked


def unpacked_bytes(question: MemoryQuestion) -> int:
    """Bytes of the copies; 0 where products are computed in another dtype, for which PEFT's own forward unpacks."""
    if resolve_compute_dtype(question.recipe, question.dtype) != question.dtype:
        return 0
    return question.at(question.longest_tokens, True).fixed["unpacked_weights"]


def _has_room(kept: MemoryQuestion, device: DeviceFacts | None, headroom: float) -> bool:
    if device is None or device.kind != "cpu" or unpacked_bytes(kept) > MOST_OF_MEMORY * device.memory_bytes:
        return False
    training = kept.recipe.training
    tokens = 0 if training.micro_batch_tokens == "auto" else int(training.micro_batch_tokens)  # a longest row at least
    return fits(kept.at(tokens, training.gradient_checkpointing is True), device.memory_bytes, headroom)
