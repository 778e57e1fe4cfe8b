"""Deterministic algorithms, for as long as a run lasts: the same operations give the same bits every time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from lorafit.console.wording import first_line
from lorafit.errors import RecipeError
from lorafit.ops.holding import holding


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Within it, where wanted, torch and flash-attn take no algorithm whose sums depend on which thread comes first.

    Raises:
        RecipeError: An operation has no other algorithm on this device.
    """
    if not wanted:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic  # of memory for who reads what nobody wrote: a pass more each time
    fills = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False
    try:
        with holding(os.environ, "FLASH_ATTENTION_DETERMINISTIC", "1"):  # transformers hands it to flash-attn
            yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        what = f"this model cannot be trained so on this device: {first_line(error).split('. ')[0]}"
        is_set_late = "CUBLAS_WORKSPACE_CONFIG" in str(error)  # cuBLAS reads it once, and so does torch
        todo = "set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the process starts" if is_set_late else "leave it out"
        raise RecipeError(what, key="training.deterministic", todo=todo) from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        filling.fill_uninitialized_memory = fills
