"""The models of `configs/models` by their hub ids, and their shapes, as `lorafit.model.class_shape` read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.facts import ModelShape
from lorafit.machine.shipped import shipped

_TUNINGS = {
    *("instruct", "it", "base", "pt", "chat", "hf", "thinking", "unsloth", "bnb", "4bit", "8bit", "dynamic"),
    *("gguf", "awq", "gptq", "int4", "int8", "fp8", "bf16"),
}


def known_config(hub_id: str) -> JsonObject | None:
    """The config of a well-known model that lorafit ships, by its hub id; None where it has none."""
    for facts in map(_read, _files(hub_id)):
        if hub_id.lower() in (known.lower() for known in facts["ids"]):
            config: JsonObject = deepcopy(facts["config"])
            return config
    return None


def known_shape(config: JsonMapping) -> ModelShape | None:
    """The shape of a shipped causal model's config, from what `docs/write_shapes.py` wrote; None for any other."""
    name = next((path.stem for path in _files() if _read(path)["config"] == config), None)
    written = None if name is None else _read(shipped("model_shapes.json")).get(name)
    return None if written is None else ModelShape.from_json(written)


def like_known(hub_id: str) -> str | None:
    """The hub id of a shipped config that another id likely means; None where none is alike.

    Owner, case and what tunings and copies append (`-Instruct`, `-it`, `-bnb-4bit`, a date) say nothing of a shape.
    """
    found: dict[str, str] = {}
    for facts in map(_read, _files()):
        if "quantization_config" not in facts["config"]:  # its weights are not to be trained on
            for known in facts["ids"]:
                found.setdefault(_last_part(known), known)
    for known in list(found.values()):
        found.setdefault(_without_tuning(known), known)
    return found.get(_last_part(hub_id)) or found.get(_without_tuning(hub_id))


def _files(hub_id: str = "") -> Iterator[Path]:
    """What is shipped, a file a model; that which is called like the id first."""
    folder = shipped("models")
    first = folder / f"{hub_id.replace('/', '--')}.json"
    yield from [first] if first.is_file() else []
    yield from sorted(folder.glob("*.json"))


@cache
def _read(file: Path) -> JsonObject:
    values: JsonObject = json.loads(file.read_text(encoding="utf-8"))
    return values


def _last_part(hub_id: str) -> str:
    return hub_id.rpartition("/")[2].lower()


def _without_tuning(hub_id: str) -> str:
    words = _last_part(hub_id).removeprefix("meta-").split("-")
    return "-".join(word for word in words if word not in _TUNINGS and not re.fullmatch(r"2[0-9]{3}", word))
