"""A model folder's config.json, checked before anything is built from it, and the folder's fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError, SafetyError
from lorafit.files.safetensors import read_index
from lorafit.files.strict_json import JsonError, read_object_file

CONFIG = "config.json"
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_VOLATILE_KEYS = ("transformers_version", "_name_or_path", "use_cache")
_SAMPLE_BYTES = 4096
_CONFIG_LIMIT_BYTES = 16 << 20
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


def load_config(folder: Path) -> JsonObject:
    """A model folder's config.json, checked.

    Raises:
        ModelError: The folder or the file is missing or no JSON object, a size is absurd, or the weights are quantised
            already.
        SafetyError: It switches remote code on, or names an attention kernel of the hub.
    """
    file = folder / CONFIG
    if not file.exists():
        what = f"{CONFIG} is missing" if folder.is_dir() else f"no such model folder, so no {CONFIG}"
        raise ModelError(what, file=str(folder), todo="check model.base, or get the whole model")
    try:
        config = read_object_file(file, limit_bytes=_CONFIG_LIMIT_BYTES, constants=True)
    except JsonError as error:
        raise ModelError(error.what, file=str(file), todo="get the file again") from error
    if not isinstance(config.get("model_type"), str):
        raise ModelError("names no model_type", file=str(file), todo="get the whole model")
    refuse_foreign_code(config, file)
    check_sizes(config, str(file))
    refuse_quantised(config, str(file))
    return config


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


def refuse_quantised(config: JsonMapping, file: str) -> None:
    """Raises ModelError where a config says that its weights are quantised already."""
    settings = config.get("quantization_config")
    if not settings:
        return
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "by no method we know"
    copies = ", e.g. unsloth/gpt-oss-20b-BF16" if config["model_type"] == "gpt_oss" else ""
    raise ModelError(
        f"the weights are quantised already ({method})",
        file=file,
        key="quantization_config",
        todo=f"use the model's original weights, or a copy in 16 bits{copies}; model.quantization quantises them",
    )


def refuse_foreign_code(value: Any, file: Path, key: str = "") -> None:
    """Raises SafetyError where a config, at any depth, turns on remote code or names an attention kernel of the hub."""
    if isinstance(value, dict):
        for name, inner in value.items():
            place = f"{key}.{name}" if key else str(name)
            what = ""
            if name == "trust_remote_code" and inner:
                what = "switches foreign code on"
            elif name in _ATTENTION_KEYS and (kernel := _hub_kernel(inner)) is not None:
                what = f"names a kernel of the hub ({kernel})"
            elif name == "transformers_weights" and inner:
                what = "redirects the weights to another file"
            if what:
                raise SafetyError(what, file=str(file), key=place, todo="remove the key, if you trust the rest")
            refuse_foreign_code(inner, file, place)
    elif isinstance(value, list):
        for inner in value:
            refuse_foreign_code(inner, file, key)


def _hub_kernel(value: Any) -> str | None:
    """The first name in a value, at any depth, that transformers would fetch a kernel by."""
    if isinstance(value, str):
        return value if "/" in value else None
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((kernel for kernel in map(_hub_kernel, inner) if kernel is not None), None)


def fingerprint(folder: Path, config: JsonObject) -> str:
    """SHA-256 over the config, every tensor's name, dtype and shape, and 4 KiB from the middle of each tensor.

    Reading all of a large model at each start would take minutes; another training of the same architecture differs in
    nearly every tensor, so the samples tell bases apart. Quantised runs prove all codes besides.
    """
    settled = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    digest = hashlib.sha256(json.dumps(settled, sort_keys=True).encode("utf-8"))
    streams: dict[Path, BinaryIO] = {}
    try:
        for name, entry in sorted(read_index(folder).items()):
            digest.update(f"\n{name} {entry.dtype} {entry.shape}\n".encode())
            if entry.file not in streams:
                streams[entry.file] = entry.file.open("rb")
            middle = max(0, (entry.size_bytes - _SAMPLE_BYTES) // 2)
            streams[entry.file].seek(entry.offset + middle)
            digest.update(streams[entry.file].read(min(_SAMPLE_BYTES, entry.size_bytes)))
    finally:
        for stream in streams.values():
            stream.close()
    return digest.hexdigest()
