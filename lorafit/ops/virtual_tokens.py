"""Trained vectors that an adapter puts before the tokens of each row: prompt tuning's."""

from __future__ import annotations

from typing import Any

from torch import nn


def count_virtual_tokens(model: nn.Module) -> int:
    """How many the active adapter puts there; 0 for other methods, for a plain model, and with the adapter off."""
    adapted: Any = model
    if not hasattr(model, "peft_config") or adapted._adapters_disabled:
        return 0
    config = adapted.active_peft_config
    return int(config.num_virtual_tokens) if config.is_prompt_learning else 0
