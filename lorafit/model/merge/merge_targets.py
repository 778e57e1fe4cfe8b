"""Which rows of a base's files get which change of an adapter.

Where an adapter brings no note of its layers (another tool's, or an older lorafit's), and plain names do not settle
where they lie, the class and PEFT's layers are built on the meta device, which imports both libraries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lorafit.console.wording import list_names
from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry, read_rows
from lorafit.kinds.folding import BESIDE_A_LAYER, AdaptedLayer, Fold, Folding
from lorafit.model.adapter import AdapterFolder
from lorafit.model.adapter_checks import NOTES_FORMAT
from lorafit.model.attach import wrap_model
from lorafit.model.base import Base
from lorafit.model.classes import usual_class
from lorafit.model.homes import Home, find_homes, read_homes
from lorafit.model.load import build_class
from lorafit.model.names import Part, read_names

_COPY = re.compile(r"^base_model\.model\.(?P<path>.+?)(?:\.base_layer)?\.weight$")
_TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt")


@dataclass(frozen=True, slots=True)
class Patch:
    """Rows of one tensor of the files that get the change of rows of one matrix.

    Attributes:
        start: First row of the tensor.
        stop: One behind the last.
        matrix: Number of the layer's matrix.
        first: The matrix's row that belongs to `start`.
        of_bias: Whether the tensor is the bias beside the layer's weight.
    """

    start: int
    stop: int
    folding: Folding
    layer: AdaptedLayer
    matrix: int
    first: int
    of_bias: bool = False

    def fold(self, read: Callable[[int, int], torch.Tensor]) -> Fold:
        """The change of these rows; `read` gives the base's, counted from `start`."""
        bias = self.folding.fold_bias(self.layer, self.first, self.first + self.stop - self.start)
        if self.of_bias and bias is not None:
            return bias
        return self.folding.fold(self.layer, self.matrix, self.first, self.first + self.stop - self.start, read)


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
    base: Base,
    entries: Mapping[str, TensorEntry],
) -> Updates:
    """Which rows of the base's files get which update.

    Args:
        adapter: Whose layers' homes are those that it notes; else those of their own names, or by the model class
            where names alone do not settle it.
        base: The base.
        entries: Its tensors.

    Raises:
        ModelError: A feature that is no plain update, a tensor that fits nowhere, half of a pair, tied weights.
    """
    try:
        folding = adapter.kind.folding(adapter.config)
    except ModelError as error:
        raise error.at(file=str(adapter.path)) from error
    layers: dict[str, dict[str, TensorEntry]] = {}
    copies: dict[str, TensorEntry] = {}
    shared = {part: adapter.tensors[name] for name, part in folding.shared.items() if name in adapter.tensors}
    foreign = []
    copied = re.compile(rf"^base_model\.model\.(?P<path>.+)\.{folding.copies}\.(?P<own>\w+)$")
    for name, entry in adapter.tensors.items():
        if name in folding.shared:
            continue
        if match := copied.match(name):
            layers[f"{match['path']}.{match['own']}"] = {"copy": entry}
        elif (place := folding.place(name)) is not None:
            layers.setdefault(place[0], {})[place[1]] = entry
        elif match := _COPY.match(name):
            copies[match["path"]] = entry
        else:
            foreign.append(name)
    homes = _find_homes(adapter, layers, base, entries)
    foreign += [path for path in layers if path not in homes]
    names = {part: tensor for tensor, part in reversed(list(folding.parts.items()))}
    missing = [f"{path}.{names[part]}" for path in homes for part in names if part not in layers.get(path, {})]
    missing += [name for name in folding.shared if name not in adapter.tensors]
    missing += [path for path in homes if path not in layers and not names]
    if missing or foreign or not layers:
        raise ModelError(
            f"{len(missing)} missing adapter tensors ({list_names(missing)}); "
            f"{len(foreign)} that find no home in the base ({list_names(foreign)})",
            file=str(adapter.path),
            todo="use the whole adapter, and the base it was trained on",
        )
    made = Updates()
    for path, home in homes.items():
        try:
            tensors = {**layers[path], **shared}
            _place(made, folding, AdaptedLayer(tensors, home.key, home.matrices, home.transposed), home, entries)
        except ModelError as error:
            raise error.at(file=str(adapter.path), key=path) from error
    for patches in made.patches.values():
        patches.sort(key=lambda patch: patch.start)
    for path, entry in copies.items():
        try:
            _place_copy(made, path, homes.get(path), entry, entries)
        except ModelError as error:
            raise error.at(file=str(adapter.path)) from error
    return made


def _find_homes(
    adapter: AdapterFolder,
    layers: Mapping[str, Mapping[str, TensorEntry]],
    base: Base,
    entries: Mapping[str, TensorEntry],
) -> dict[str, Home]:
    """Homes of all layers the adapter should have: noted, or by their own names, or by the class."""
    if "layers" in adapter.notes and adapter.notes.get("format") == NOTES_FORMAT:
        return read_homes(adapter.notes["layers"], entries, str(adapter.path))
    flipped = _transposed_layers(adapter, base.config)
    homes = {}
    for path in layers:
        name = f"{path}.weight"
        if name in entries and len(entries[name].shape) == 2:
            homes[path] = Home(path, (Part(name, 0, entries[name].rows),), 1, path in flipped)
    is_settled = homes.keys() == layers.keys() and homes.keys() == _promised_layers(adapter, entries)
    if is_settled and not _may_be_tied(homes, base.config):
        return homes
    return _read_class_homes(base, adapter, layers.keys(), entries)


def _may_be_tied(paths: JsonMapping, config: JsonMapping) -> bool:
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


def _place(
    made: Updates, folding: Folding, layer: AdaptedLayer, home: Home, entries: Mapping[str, TensorEntry]
) -> None:
    """Adds the patches of one layer: its rows where they lie, cut where a matrix ends."""
    widths = {entries[part.name].as_matrix().row_elements for part in home.parts}
    told, width = folding.shape(layer)
    height = home.rows // home.matrices if told is None else told
    width = max(widths) if width is None else width
    if home.rows != height * home.matrices or widths != {width}:
        raise ModelError(
            f"its update is {[height * home.matrices, width]}, the base's weight {[home.rows, *widths]}",
            todo="use the base it was trained on",
        )
    row = 0
    for part in home.parts:
        start = part.start
        while start < part.stop:
            matrix, first = divmod(row, height)
            length = min(part.stop - start, height - first)
            others = made.patches.setdefault(part.name, [])
            met = [other for other in others if other.start < start + length and start < other.stop]
            if folding.copies and any(_are_equal(other.layer, layer) for other in met):
                return  # the base ties them, and so does the adapter
            if met:
                raise ModelError(f"two adapter layers lead to the weight '{part.name}'")
            others.append(patch := Patch(start, start + length, folding, layer, matrix, first))
            if not home.transposed:
                _place_bias(made, replace(patch, of_bias=True), part, entries)
            start, row = start + length, row + length
    if home.transposed:
        _place_bias(made, Patch(0, widths.pop(), folding, layer, 0, 0, of_bias=True), home.parts[0], entries)


def _place_bias(made: Updates, patch: Patch, part: Part, entries: Mapping[str, TensorEntry]) -> None:
    """Adds a patch of the bias that lies beside a weight, a value for each output, where the method changes it."""
    bias = f"{part.name.removesuffix('weight')}bias"
    if bias in entries and patch.folding.fold_bias(patch.layer, patch.first, patch.first) is not None:
        made.patches.setdefault(bias, []).append(patch)


def _are_equal(one: AdaptedLayer, other: AdaptedLayer) -> bool:
    """Whether copies of two parameters that the base ties hold the same values."""
    first, second = (layer.tensors["copy"] for layer in (one, other))
    return first.shape == second.shape and torch.equal(read_rows(first), read_rows(second))


def _place_copy(
    made: Updates, path: str, home: Home | None, entry: TensorEntry, entries: Mapping[str, TensorEntry]
) -> None:
    """Puts a whole weight that the adapter holds in the place of the base's."""
    name = f"{path}.weight" if home is None else home.parts[0].name
    if name not in entries or (home is not None and len(home.parts) > 1):
        todo = "merge it with the tool that made it"
        raise ModelError(f"holds a copy of '{path}', which is no single tensor of the base", todo=todo)
    if entries[name].shape != entry.shape:
        raise ModelError(
            f"holds '{path}' as {list(entry.shape)}, the base {list(entries[name].shape)}: its vocabulary was changed",
            todo="give the base the same vocabulary first, or merge it with the tool that made it",
        )
    made.copies[name] = entry


def _transposed_layers(adapter: AdapterFolder, config: JsonMapping) -> set[str]:
    """Adapted layers whose weight lies `[in, out]`: as an older lorafit noted, else GPT-2's own, whatever PEFT wrote.

    Embeddings lie so everywhere: a row for each token.
    """
    paths, embeddings = set(), set()
    for name in adapter.tensors:
        if match := BESIDE_A_LAYER.match(name):
            paths.add(match["path"])
            embeddings |= {match["path"]} if "embedding" in match["tensor"] else set()
    if "transposed" in adapter.notes:
        return embeddings | {path for path in paths if path.rsplit(".", 1)[-1] in adapter.notes["transposed"]}
    if config.get("model_type") in _TRANSPOSED_MODELS or adapter.config.get("fan_in_fan_out"):
        return paths
    return embeddings


def _read_class_homes(
    base: Base, adapter: AdapterFolder, paths: Set[str], entries: Mapping[str, TensorEntry]
) -> dict[str, Home]:
    """Where every layer lies that PEFT adapts with this adapter's config.

    The class is the one that causal language models of this type load as; the one that the config names, where only
    that has the adapter's layers.

    Args:
        paths: The layers that the adapter has.

    Raises:
        ModelError: No class has these layers, or a layer's weight has no place that an update can be added to.
    """
    found: dict[str, Home] = {}
    failure: ModelError | None = None
    for model in _classes(base):
        names = read_names(model, entries)
        try:
            found = find_homes(wrap_model(model, adapter.config, adapter.tensors, adapter.path, empty=True), names)
        except ModelError as error:
            error.at(file=str(adapter.path))
            failure = failure or error
            continue
        if found.keys() == paths:
            return found
    if failure is not None:
        raise failure
    return found


def read_class_parts(
    base: Base, paths: Iterable[str], entries: Mapping[str, TensorEntry]
) -> dict[str, tuple[Part, ...]]:
    """Where the weights of these layers lie, by the class that models of this type load as.

    Raises:
        ModelError: Some are in none of the base's files.
    """
    names = read_names(next(_classes(base)), entries)
    parts = {path: names.parts.get(f"{path}.weight", ()) for path in paths}
    lost = [path for path, found in parts.items() if not found]
    if lost:
        raise ModelError(
            f"{len(lost)} layers that training quantised are not in the base ({lost[0]} ...)",
            file=str(base.path),
            todo="use the base it was trained on",
        )
    return parts


def _classes(base: Base) -> Iterator[Any]:
    """Skeletons of the classes that may have been trained."""
    import transformers

    yield build_class(base, model_class=usual_class(base.config))
    for name in base.config.get("architectures") or ():
        if hasattr(transformers, str(name)):
            yield build_class(base, str(name))
