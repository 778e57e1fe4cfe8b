"""Settings of the libraries below torch, which they read from the environment once, while they are imported."""

from __future__ import annotations

import os

LIBRARY_SETTINGS = {
    "GOMP_SPINCOUNT": "100000",  # threads that spin for longer stop each other where the CPU is shared: 50 times slower
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",  # every shape of a product is cached: 0.4 GiB less than with 1024
    "LRU_CACHE_CAPACITY": "1",  # ideep keeps them once more, for each thread: a run grows for ever, with no gain
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # steps of ever new shapes break a card's fixed segments up
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else a card's products may differ from one run to the next
    "USE_HUB_KERNELS": "NO",  # transformers' switch: else it fetches and runs code that nobody named
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_OLDER_NAMES = {"PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF"}


def set_library_defaults() -> None:
    """Sets what the user has not set, by an older name either. Call it before torch is imported."""
    for name, value in LIBRARY_SETTINGS.items():
        if _OLDER_NAMES.get(name, name) not in os.environ:
            os.environ.setdefault(name, value)
