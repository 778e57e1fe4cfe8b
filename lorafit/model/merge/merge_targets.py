"""Which rows of a base's files get which update of an adapter: W + s * B A.

Source: Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685), section 4.1; rank-stabilised scaling: Kalajdzievski
2023 (https://arxiv.org/abs/2312.03732), equation 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry, read_rows
from lorafit.model.adapter import AdapterFolder
from lorafit.model.check_weights import list_names
from lorafit.model.merge.homes import Home, read_homes
from lorafit.model.merge.lora_math import Factors
from lorafit.model.names import Part

if TYPE_CHECKING:
    import torch

_PAIR = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<kind>embedding_)?(?P<half>[AB])(?:\.weight)?$")
_COPY = re.compile(r"^base_model\.model\.(?P<path>.+?)(?:\.base_layer)?\.weight$")
_FACTORS_KEPT = 4  # both of an expert's two parameters
_TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt")
_PLAIN_INITS = (True, False, "gaussian", "eva", None)
_PLAIN_KEYS = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
        *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config", "megatron_core"),
        *("qalora_group_size", "ensure_weight_tying", "lora_dropout", "task_type"),
    }
)
"""Keys of adapter_config.json that leave the update s * B A, or are judged by `_refuse_features` and `_scaling`."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one layer's weight gets: `scaling * B @ A` for each of its matrices.

    Attributes:
        lora_a: `[matrices * r, in]`, or `[r, rows]` of an embedding.
        lora_b: `[out, r * matrices]`: PEFT lays the matrices' columns side by side for each rank.
        home: Where the weight lies.
        read: Reads a factor in fp32; it remembers the last few, since experts share theirs.
    """

    lora_a: TensorEntry
    lora_b: TensorEntry
    scaling: float
    home: Home
    read: Callable[[TensorEntry], torch.Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """Of one matrix, as it lies in the files."""
        outputs, inputs = self.lora_b.shape[0], self.lora_a.shape[1]
        return (inputs, outputs) if self.home.transposed else (outputs, inputs)

    def factors(self, matrix: int) -> Factors:
        """Both factors of one matrix, read, in fp32 and in the files' orientation.

        Source: peft.tuners.lora.layer.ParamWrapper.get_delta_weight, for several matrices.
        """
        count = self.home.matrices
        rank = self.lora_a.shape[0] // count
        a = self.read(self.lora_a)[matrix * rank : (matrix + 1) * rank]
        b = self.read(self.lora_b)[:, matrix::count]
        left, right = (a.t(), b.t()) if self.home.transposed else (b, a)
        return Factors(left.contiguous(), right.contiguous(), self.scaling)


@dataclass(frozen=True, slots=True)
class Patch:
    """Rows of one tensor of the files that get rows of one matrix of an update.

    Attributes:
        start: First row of the tensor.
        stop: One behind the last.
        matrix: Number of the update's matrix.
        first: The matrix's row that belongs to `start`.
    """

    start: int
    stop: int
    update: Update
    matrix: int
    first: int

    def factors(self) -> Factors:
        """For these rows alone."""
        whole = self.update.factors(self.matrix)
        return Factors(whole.left[self.first : self.first + self.stop - self.start], whole.right, whole.scaling)


@dataclass(frozen=True, slots=True)
class Updates:
    """What an adapter does to its base.

    Attributes:
        patches: By the tensor of the files they belong to, in the order of its rows.
        copies: Tensors of the files -> the adapter's own, which take their place before anything is added: PEFT saves
            the whole layer where an adapter lies on the head or the embedding.
    """

    patches: dict[str, list[Patch]] = field(default_factory=dict)
    copies: dict[str, TensorEntry] = field(default_factory=dict)


def plan_updates(
    adapter: AdapterFolder,
    entries: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    read_class: Callable[[Set[str]], dict[str, Home]],
) -> Updates:
    """Which rows of the base's files get which update.

    Args:
        adapter: Whose layers' homes are those that it notes; else those of their own names.
        entries: The base's tensors.
        config: The base's config.json.
        read_class: Gives every layer that PEFT would adapt with this config, from the model class, for the layers that
            the adapter has; called only where names alone do not settle it.

    Raises:
        ModelError: A feature that is no plain update, a tensor that fits nowhere, half of a pair, tied weights.
    """
    _refuse_features(adapter)
    pairs: dict[str, dict[str, TensorEntry]] = {}
    copies: dict[str, TensorEntry] = {}
    foreign = []
    for tensor, entry in adapter.tensors.items():
        if match := _PAIR.match(tensor):
            pairs.setdefault(match["path"], {})[match["half"]] = entry
        elif match := _COPY.match(tensor):
            copies[match["path"]] = entry
        else:
            foreign.append(tensor)
    homes = _find_homes(adapter, pairs, entries, config, read_class)
    foreign += [path for path in pairs if path not in homes]
    missing = [f"{path}.lora_{half}" for path in homes for half in "AB" if half not in pairs.get(path, {})]
    if missing or foreign or not pairs:
        raise ModelError(
            f"{len(missing)} missing adapter tensors ({list_names(missing)}); "
            f"{len(foreign)} that find no home in the base ({list_names(foreign)})",
            file=str(adapter.path),
            todo="use the whole adapter, and the base it was trained on",
        )
    made = Updates()
    read = lru_cache(maxsize=_FACTORS_KEPT)(_read_fp32)
    for path, home in homes.items():
        _place(made, adapter, path, _update(adapter, path, home, pairs[path], read), entries)
    for patches in made.patches.values():
        patches.sort(key=lambda patch: patch.start)
    for path, entry in copies.items():
        _place_copy(made, adapter, path, homes.get(path), entry, entries)
    return made


def _find_homes(
    adapter: AdapterFolder,
    pairs: Mapping[str, Mapping[str, TensorEntry]],
    entries: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    read_class: Callable[[Set[str]], dict[str, Home]],
) -> dict[str, Home]:
    """Homes of all layers the adapter should have: noted, or by their own names, or by the class."""
    if "layers" in adapter.notes:
        return read_homes(adapter.notes["layers"], entries, str(adapter.path))
    flipped = _transposed_layers(adapter, config)
    homes = {}
    for path in pairs:
        name = f"{path}.weight"
        if name in entries and len(entries[name].shape) == 2:
            homes[path] = Home(path, (Part(name, 0, entries[name].rows),), 1, path in flipped)
    is_settled = homes.keys() == pairs.keys() and homes.keys() == _promised_layers(adapter, entries)
    return homes if is_settled and not _may_be_tied(homes, config) else read_class(pairs.keys())


def _may_be_tied(paths: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a layer lies outside of the numbered ones (a head, an embedding), and the config does not untie these."""
    outside = [path for path in paths if not any(part.isdigit() for part in path.split("."))]
    return bool(outside) and config.get("tie_word_embeddings") is not False


def _promised_layers(adapter: AdapterFolder, entries: Mapping[str, TensorEntry]) -> set[str]:
    """Layers in the files that the adapter's config names; none where it names them in another way than by a list."""
    targets = adapter.config.get("target_modules")
    others = ("layers_to_transform", "exclude_modules", "target_parameters")
    if not isinstance(targets, list) or any(adapter.config.get(key) for key in others):
        return set()
    layers = {name.removesuffix(".weight") for name in entries if name.endswith(".weight")}
    return {layer for layer in layers if any(layer == t or layer.endswith(f".{t}") for t in targets)}


def _read_fp32(entry: TensorEntry) -> torch.Tensor:
    return read_rows(entry).float()


def _update(
    adapter: AdapterFolder,
    path: str,
    home: Home,
    pair: Mapping[str, TensorEntry],
    read: Callable[[TensorEntry], torch.Tensor],
) -> Update:
    a, b = pair["A"], pair["B"]
    rank = a.shape[0] // home.matrices
    if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0] or rank * home.matrices != a.shape[0]:
        raise ModelError(
            f"its factors are {list(a.shape)} and {list(b.shape)}, which no weight of a linear is made of",
            file=str(adapter.path),
            key=path,
            todo="get the adapter again",
        )
    return Update(a, b, _scaling(adapter, path, home.key, rank), home, read)


def _place(
    made: Updates, adapter: AdapterFolder, path: str, update: Update, entries: Mapping[str, TensorEntry]
) -> None:
    """Adds the patches of one update: its rows where they lie, cut where a matrix ends."""
    height, width = update.shape
    home = update.home
    widths = {entries[part.name].as_matrix().row_elements for part in home.parts}
    if home.rows != height * home.matrices or widths != {width}:
        raise ModelError(
            f"its update is {[height * home.matrices, width]}, the base's weight {[home.rows, *widths]}",
            file=str(adapter.path),
            key=path,
            todo="use the base it was trained on",
        )
    row = 0
    for part in home.parts:
        start = part.start
        while start < part.stop:
            matrix, first = divmod(row, height)
            length = min(part.stop - start, height - first)
            others = made.patches.setdefault(part.name, [])
            if any(other.start < start + length and start < other.stop for other in others):
                raise ModelError(
                    f"two adapter layers lead to the weight '{part.name}'", file=str(adapter.path), key=path
                )
            others.append(Patch(start, start + length, update, matrix, first))
            start, row = start + length, row + length


def _place_copy(
    made: Updates,
    adapter: AdapterFolder,
    path: str,
    home: Home | None,
    entry: TensorEntry,
    entries: Mapping[str, TensorEntry],
) -> None:
    """Puts a whole weight that the adapter holds in the place of the base's."""
    name = f"{path}.weight" if home is None else home.parts[0].name
    if name not in entries or (home is not None and len(home.parts) > 1):
        raise ModelError(
            f"holds a copy of '{path}', which is no single tensor of the base",
            file=str(adapter.path),
            todo="merge it with the tool that made it",
        )
    if entries[name].shape != entry.shape:
        raise ModelError(
            f"holds '{path}' as {list(entry.shape)}, the base {list(entries[name].shape)}: its vocabulary was changed",
            file=str(adapter.path),
            todo="give the base the same vocabulary first, or merge it with the tool that made it",
        )
    made.copies[name] = entry


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


def _matching(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def _scaling(adapter: AdapterFolder, path: str, key: str, rank: int) -> float:
    config = adapter.config
    written = _matching(config.get("rank_pattern") or {}, key, config.get("r"))
    if written != rank:
        raise ModelError(f"has rank {rank} in the weights, {written} in its config", file=str(adapter.path), key=path)
    alpha = float(_matching(config.get("alpha_pattern") or {}, key, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _transposed_layers(adapter: AdapterFolder, config: Mapping[str, Any]) -> set[str]:
    """Adapted layers whose weight lies `[in, out]`: as an older lorafit noted, else GPT-2's own, whatever PEFT wrote.

    Embeddings lie so everywhere: a row for each token.
    """
    matches = [match for name in adapter.tensors if (match := _PAIR.match(name))]
    embeddings = {match["path"] for match in matches if match["kind"]}
    paths = {match["path"] for match in matches}
    if "transposed" in adapter.notes:
        return embeddings | {path for path in paths if path.rsplit(".", 1)[-1] in adapter.notes["transposed"]}
    if config.get("model_type") in _TRANSPOSED_MODELS or adapter.config.get("fan_in_fan_out"):
        return paths
    return embeddings
