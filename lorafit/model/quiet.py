"""Keeps the libraries' own bars and advice off the terminal; what a user must know, lorafit says itself."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_NOISY = ("bitsandbytes", "transformers", "peft", "accelerate", "torch.utils.checkpoint")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it, transformers draws no bars, and libraries log nothing below an error. bitsandbytes stays quiet.

    With lorafit's own logger at DEBUG (`--debug`) nothing is silenced.
    """
    if logging.getLogger("lorafit").isEnabledFor(logging.DEBUG):
        yield
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before its first import, and for its per-forward advice
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _NOISY[1:]}
    transformers_logging.disable_progress_bar()
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
