"""Which weight of a base gets which update of an adapter: W + s * B A.

Source: Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685), section 4.1; rank-stabilised scaling: Kalajdzievski
2023 (https://arxiv.org/abs/2312.03732), equation 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafit.errors import ModelError
from lorafit.model.adapter import AdapterFolder
from lorafit.model.addition import Factors
from lorafit.model.check import list_names
from lorafit.model.weights import TensorEntry, read_rows

_PAIR = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<half>[AB])\.weight$")
_TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt")
_PLAIN_INITS = (True, False, "gaussian", "eva", None)
_PLAIN_KEYS = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "task_type"),
        *("peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
        *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config", "megatron_core"),
        *("qalora_group_size", "ensure_weight_tying"),
    }
)
"""Keys of adapter_config.json that leave the update s * B A, or are judged by `_refuse_features` and `_scaling`."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one weight gets: `scaling * B @ A`, transposed where the file's weight lies `[in, out]`."""

    lora_a: TensorEntry
    lora_b: TensorEntry
    scaling: float
    transposed: bool

    def factors(self) -> Factors:
        """Both factors read, in fp32 and in the file's orientation."""
        a, b = read_rows(self.lora_a).float(), read_rows(self.lora_b).float()
        left, right = (a.t().contiguous(), b.t().contiguous()) if self.transposed else (b, a)
        return Factors(left, right, self.scaling)


def plan_updates(
    adapter: AdapterFolder, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
) -> dict[str, Update]:
    """Which weight of the base's files gets which update.

    Raises:
        ModelError: A feature that is no plain update, a tensor that fits nowhere, half of a pair.
    """
    _refuse_features(adapter)
    pairs: dict[str, dict[str, TensorEntry]] = {}
    foreign = []
    for tensor, entry in adapter.tensors.items():
        if match := _PAIR.match(tensor):
            pairs.setdefault(match["path"], {})[match["half"]] = entry
        else:
            foreign.append(tensor)
    found = {path: find_weight(path, entries) for path in pairs}
    homes = {path: name for path, name in found.items() if name is not None}
    foreign += [path for path in pairs if path not in homes]
    missing = [f"{path}.lora_{half}" for path, pair in pairs.items() for half in "AB" if half not in pair]
    missing += sorted(_expected_weights(adapter, entries) - set(homes.values()))
    if missing or foreign or not pairs:
        raise ModelError(
            f"{len(missing)} missing adapter tensors ({list_names(missing)}); "
            f"{len(foreign)} that find no home in the base ({list_names(foreign)})",
            file=str(adapter.path),
            todo="use the whole adapter, and the base it was trained on",
        )
    transposed = _transposed_names(adapter, config)
    updates: dict[str, Update] = {}
    for path, name in homes.items():
        pair = pairs[path]
        if name in updates:
            raise ModelError(f"two adapter layers lead to the weight '{name}'", file=str(adapter.path), key=path)
        flipped = path.rsplit(".", 1)[-1] in transposed
        update = Update(pair["A"], pair["B"], _scaling(adapter, path, pair["A"].shape[0]), flipped)
        rank, inputs = pair["A"].shape
        outputs, rank_b = pair["B"].shape
        wanted = (inputs, outputs) if flipped else (outputs, inputs)
        if entries[name].shape != wanted or rank != rank_b:
            raise ModelError(
                f"its update is {list(wanted)}, the base's weight {list(entries[name].shape)}",
                file=str(adapter.path),
                key=path,
                todo="use the base it was trained on",
            )
        updates[name] = update
    return updates


def find_weight(path: str, entries: Mapping[str, TensorEntry]) -> str | None:
    """The name in the files of a layer's weight: files may lack leading parts of the path, or have more of them."""
    name = f"{path}.weight"
    parts = name.split(".")
    for start in range(len(parts) - 2):
        if (shorter := ".".join(parts[start:])) in entries:
            return shorter
    longer = [candidate for candidate in entries if candidate.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None


def _expected_weights(adapter: AdapterFolder, entries: Mapping[str, TensorEntry]) -> set[str]:
    """Weights that the adapter's config says it adapts; none where it chooses layers by a pattern or by number."""
    targets = adapter.config.get("target_modules")
    if not isinstance(targets, list) or any(adapter.config.get(k) for k in ("layers_to_transform", "exclude_modules")):
        return set()
    layers = {name.removesuffix(".weight") for name in entries if name.endswith(".weight")}
    return {
        f"{layer}.weight"
        for layer in layers
        if any(layer == t or layer.endswith(f".{t}") or t.endswith(f".{layer}") for t in targets)
    }


def _refuse_features(adapter: AdapterFolder) -> None:
    config = adapter.config
    active = [k for k, v in config.items() if k not in _PLAIN_KEYS and v and not (k == "bias" and v == "none")]
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        active.append(f"init_lora_weights={config['init_lora_weights']}")
    if active:
        raise ModelError(
            f"cannot be merged as W + s * B A: it uses {', '.join(sorted(active))}",
            file=str(adapter.path),
            todo="merge it with the tool that made it",
        )


def _matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _scaling(adapter: AdapterFolder, path: str, rank: int) -> float:
    config = adapter.config
    written = _matching(config.get("rank_pattern") or {}, path, config.get("r"))
    if written != rank:
        raise ModelError(f"has rank {rank} in the weights, {written} in its config", file=str(adapter.path), key=path)
    alpha = float(_matching(config.get("alpha_pattern") or {}, path, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _transposed_names(adapter: AdapterFolder, config: Mapping[str, Any]) -> set[str]:
    """Adapted layers whose weight lies `[in, out]`: as noted at training, else GPT-2's own, whatever PEFT wrote."""
    if "transposed" in adapter.notes:
        return set(adapter.notes["transposed"])
    paths = {match["path"].rsplit(".", 1)[-1] for name in adapter.tensors if (match := _PAIR.match(name))}
    if config.get("model_type") in _TRANSPOSED_MODELS or adapter.config.get("fan_in_fan_out"):
        return paths
    return set()
