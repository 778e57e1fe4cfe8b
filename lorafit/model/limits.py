"""How large a model's config may say that it is, before anything is built or counted by it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError

MOST_LAYERS = 4096
MOST_EXPERTS = 65_536
WIDEST = 2**26
"""Limits far above every known model (126 layers, 512 experts, a vocabulary of 262,144), which keep a config that names
a billion of something from being built, on the meta device or as an estimate."""

_COUNTS = (
    (re.compile(r"^(num|n)_(\w+_)?(layers?|blocks)$|^depth$|^(encoder|decoder)_layers$"), MOST_LAYERS),
    (re.compile(r"^(num|n)_(\w+_)?(experts|heads|groups)$|^moe_num_experts$|^n_head$"), MOST_EXPERTS),
    (re.compile(r"^\w+_(size|dim)$|^n_embd$|^n_inner$|^d_(model|ff|kv)$|^ffn_dim$"), WIDEST),
)


def check_sizes(config: JsonMapping, file: str, prefix: str = "") -> None:
    """Raises ModelError where a config, or a part of it, has more layers, experts or width than any model."""
    for key, value in config.items():
        place = f"{prefix}{key}"
        if isinstance(value, Mapping):
            check_sizes(value, file, f"{place}.")
        elif isinstance(value, int | float):
            limit = next((limit for pattern, limit in _COUNTS if pattern.match(str(key))), None)
            if limit is not None and value > limit:
                raise ModelError(
                    f"{value:g} is more than any model has (limit {limit:,})",
                    file=file,
                    key=place,
                    todo="repair the file",
                )
