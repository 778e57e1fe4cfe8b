"""Which rows of which tensors in a folder's files hold each parameter of its model class: the one rule for names.

    file tensor --transformers' renamings--> parameter                          one of another name
                --transformers' conversions--> rows of one or several parameters  fused, split, stacked experts

A conversion is not imitated: transformers' own operations run on numbers of rows in the place of values, and what they
give says where every row went. What it does to the columns, or to values, has no rows to follow and is noted as such.

Everything here knows names and shapes alone, so it is settled before a weight is loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lorafit.errors import ModelError
from lorafit.files.safetensors import FLOAT_DTYPES, TensorEntry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_ROW_OPERATIONS = frozenset(
    {"Chunk", "Split", "Concatenate", "MergeModulelist", "Interleave", "PermuteForRope"}
    | {"ErnieFuseAndSplitTextVisionExperts"}
)
"""Operations of transformers that move values and change none."""
_MOVED_BUFFERS = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
_MASKS = r"(^|\.)(masked_bias|causal_mask)$"  # constants that older classes saved with each attention
_KEPT_AT = "_lorafit_tensor_names"


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one tensor of the files; a tensor of more than two axes counts as a matrix of all but its last.

    Attributes:
        start: First row.
        stop: One behind the last.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """A parameter that is made from the files' tensors in another way than by putting rows together.

    Attributes:
        how: transformers' operations, by name.
        files: Names of the tensors it is made from.
    """

    how: str
    files: tuple[str, ...]


@dataclass
class TensorNames:
    """The table of one class and one folder.

    Attributes:
        parts: Where each lies: rows that make it up, in order. A tied one has the rows of the one that is in the files.
        converted: Those whose values are made otherwise.
        missing: Names of the class that nothing in the files fills.
        unexpected: Names in the files that the class has no place for.
        ignored: Names in the files that the class leaves out on purpose (extra heads, other towers, moved buffers),
            each with what transformers' renaming makes of it.
        misfits: A sentence for each tensor of another shape or kind than the class wants, by the class's name of it.
        tied: For each name that shares its tensor with others, all of these names.
        fresh: Names of a new head, which the files lack, or have for another number of classes.
        redrawn: Of those that they have so, a sentence each.
        left_head: Names in the files of a head that gave way to a new one; among `ignored` too.
    """

    parts: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    converted: dict[str, Conversion] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)
    tied: dict[str, frozenset[str]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    redrawn: list[str] = field(default_factory=list)
    left_head: list[str] = field(default_factory=list)

    def leave_head_out(self, head: Sequence[str], backbone: str) -> None:
        """Takes a head that the files lack, or have for other classes, for one that is drawn anew; leaves out theirs.

        Args:
            head: Names of the class's modules outside of its backbone.
            backbone: Name of that.
        """
        self.fresh = [name for name in self.missing if name.split(".")[0] in head]
        self.missing = [name for name in self.missing if name not in self.fresh]
        self.left_head = [name for name in self.unexpected if not name.startswith(f"{backbone}.")]
        self.unexpected = [name for name in self.unexpected if name not in self.left_head]
        for name in [name for name in self.misfits if name.split(".")[0] in head and name in self.parts]:
            self.redrawn.append(self.misfits.pop(name).partition(", config.json")[0])
            self.fresh.append(name)
            self.left_head += [part.name for part in self.parts.pop(name)]
        self.ignored |= {name: name for name in self.left_head}

    def files_of(self, parameter: str) -> tuple[str, ...]:
        """Names of the tensors in the files that a parameter is made from."""
        if parameter in self.converted:
            return self.converted[parameter].files
        return tuple(dict.fromkeys(part.name for part in self.parts.get(parameter, ())))


def rows_of(entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    """Rows of every tensor in the files, by name."""
    return {name: entry.as_matrix().rows for name, entry in entries.items()}


def note_parts(parts: Iterable[Part]) -> list[list[str | int]]:
    """Where a layer's weight lies, as JSON: `[name, start, stop]` of each part."""
    return [[part.name, part.start, part.stop] for part in parts]


def read_parts(noted: Any) -> tuple[Part, ...]:
    """What `note_parts` noted. Raises ValueError or TypeError where it is anything else."""
    parts = tuple(Part(*part) for part in noted)
    if not parts or any([type(value) for value in astuple(part)] != [str, int, int] for part in parts):
        raise ValueError("no parts of a tensor")
    return parts


def require_parts(found: Mapping[str, Sequence[Part]], rows: Mapping[str, int], file: str) -> None:
    """Raises ModelError where the weight of a layer, by path, lies in rows that the files do not have."""
    for path, parts in found.items():
        lost = [part.name for part in parts if not 0 <= part.start < part.stop <= rows.get(part.name, 0)]
        if lost:
            what = f"finds no home in the base: it has no '{lost[0]}' of that size"
            raise ModelError(what, file=file, key=path, todo="use the base it was trained on")


def keep_names(model: PreTrainedModel, names: TensorNames) -> None:
    """Keeps the table on the loaded model, as transformers keeps the conversions it used there."""
    setattr(model, _KEPT_AT, names)


def names_of(model: PreTrainedModel) -> TensorNames | None:
    """The table that `load_model` kept on a model, with or without an adapter; None for a model of other origin."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, _KEPT_AT, None)


def read_names(skeleton: PreTrainedModel, entries: Mapping[str, TensorEntry]) -> TensorNames:
    """The table of a class and a folder.

    Args:
        skeleton: The model on the meta device, without an adapter.
        entries: The folder's tensors.
    """
    wanted: dict[str, torch.Tensor] = skeleton.state_dict()
    names = TensorNames()
    plain, gathered, foreign = _place(skeleton, entries, wanted)
    for name, entry in plain.items():
        names.parts[name] = (Part(entry.name, 0, entry.as_matrix().rows),)
        shape, why = list(wanted[name].shape), _wrong_kind(name, entry, wanted[name])
        if list(entry.shape) != shape:
            why = f"{name} is {list(entry.shape)} in {entry.file.name}, config.json makes it {shape}"
        if why:
            names.misfits[name] = why
    for each in gathered:
        _convert(names, each, wanted)
    names.tied = _tied_groups(skeleton)
    found = names.parts.keys() | names.converted.keys()
    for name in wanted:
        together = names.tied.get(name, frozenset()) & names.parts.keys()
        if name not in found and together:
            names.parts[name] = names.parts[min(together)]
    lacking = [name for name in wanted if name not in names.parts and name not in names.converted]
    names.missing = _without(lacking, skeleton._keys_to_ignore_on_load_missing or ())
    left_out = [*(skeleton._keys_to_ignore_on_load_unexpected or ()), *_moved_buffers(skeleton), _MASKS]
    unexpected = set(_without(foreign.values(), left_out))
    names.unexpected = [name for name, renamed in foreign.items() if renamed in unexpected]
    names.ignored = {name: renamed for name, renamed in foreign.items() if renamed not in unexpected}
    return names


@dataclass(frozen=True, slots=True)
class _Gathered:
    """What one conversion of transformers takes.

    Attributes:
        skeleton: The model.
        first: The first parameter that it makes.
        converter: The conversion.
        sources: Its tensors in order, each with the pattern that took it.
    """

    skeleton: PreTrainedModel
    first: str
    converter: Any
    sources: list[tuple[str, TensorEntry]]

    def targets(self) -> list[str]:
        """Names of the parameters that it makes."""
        patterns = self.converter.target_patterns
        return [self.first.replace(patterns[0], target) for target in patterns]

    def make(self, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What transformers makes of these tensors, one for each source, by parameter; nothing where it fails."""
        fresh = copy.deepcopy(self.converter)
        try:
            for (pattern, _), tensor in zip(self.sources, tensors, strict=True):
                fresh.add_tensor(self.first, self.first, pattern, tensor)
            made = fresh.convert(self.first, model=self.skeleton, config=self.skeleton.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            return {}
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def follow_rows(self) -> dict[str, tuple[Part, ...]]:
        """For each parameter that is made: the rows it is made of; it is left out where there are none to tell.

        Each tensor goes in as the numbers of its rows, counted through all sources, its last axis cut to one.
        """
        import torch

        entries = [entry for _, entry in self.sources]
        widths = {entry.as_matrix().row_elements for entry in entries}
        is_moved = all(type(operation).__name__ in _ROW_OPERATIONS for operation in self.converter.operations)
        if len(widths) != 1 or not is_moved:
            return {}
        starts, total, numbered = [], 0, []
        for entry in entries:
            shape = (*entry.shape[:-1], 1) if len(entry.shape) > 1 else entry.shape
            numbered.append(torch.arange(total, total + entry.as_matrix().rows).view(shape))
            starts.append(total)
            total += entry.as_matrix().rows
        width, found = widths.pop(), {}
        for target, numbers in self.make(numbered).items():
            shape = tuple(self.skeleton.get_parameter_or_buffer(target).shape)
            lead = (*shape[:-1], 1) if len(shape) > 1 else shape
            if tuple(numbers.shape) == lead and (len(shape) < 2 or shape[-1] == width):
                found[target] = _as_parts(numbers.reshape(-1), starts, entries)
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what is made, from tensors without values."""
        import torch

        made = self.make(torch.empty(entry.shape, device="meta") for _, entry in self.sources)
        return {target: tuple(value.shape) for target, value in made.items()}


def _place(
    skeleton: PreTrainedModel, entries: Mapping[str, TensorEntry], wanted: Mapping[str, torch.Tensor]
) -> tuple[dict[str, TensorEntry], list[_Gathered], dict[str, str]]:
    """Tensors that only get another name, those that conversions gather, and those that lead nowhere (with where)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {source: converter for converter in converters for source in converter.source_patterns}
    prefix = skeleton.base_model_prefix
    plain: dict[str, TensorEntry] = {}
    gathered: dict[str, _Gathered] = {}
    foreign: dict[str, str] = {}
    for name in sorted(entries, key=dot_natural_key):  # transformers' order, which decides which expert is which
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = rename_source_key(name, [], [], prefix, wanted)
        if renamed not in wanted or (pattern is None and (renamed in plain or renamed in gathered)):
            foreign[name] = renamed
        elif pattern is None:
            plain[renamed] = entries[name]
        else:
            made = gathered.setdefault(renamed, _Gathered(skeleton, renamed, by_pattern[pattern], []))
            made.sources.append((pattern, entries[name]))
    return plain, list(gathered.values()), foreign


def _convert(names: TensorNames, gathered: _Gathered, wanted: Mapping[str, torch.Tensor]) -> None:
    """Adds what one conversion makes: the parameters' rows, or their names where rows cannot be followed."""
    how = ", ".join(type(operation).__name__ for operation in gathered.converter.operations)
    files = tuple(entry.name for _, entry in gathered.sources)
    rows, shapes = gathered.follow_rows(), gathered.shapes()
    for target in gathered.targets():
        if target not in wanted:
            continue
        if target in rows:
            names.parts[target] = rows[target]
        else:
            names.converted[target] = Conversion(how, files)
        shape = tuple(wanted[target].shape)
        if shapes.get(target) != shape:
            made = list(shapes[target]) if target in shapes else "nothing"
            why = f"{target} is made {made} of {len(files)} tensors, config.json makes it {list(shape)}"
            names.misfits[target] = why
        for _, entry in gathered.sources:
            if wrong := _wrong_kind(target, entry, wanted[target]):
                names.misfits[target] = wrong


def _as_parts(numbers: torch.Tensor, starts: Sequence[int], entries: Sequence[TensorEntry]) -> tuple[Part, ...]:
    """Runs of consecutive row numbers, each inside one tensor."""
    import torch

    if not numbers.numel():
        return ()
    owners = torch.bucketize(numbers, torch.tensor(starts), right=True) - 1
    breaks = ((numbers.diff() != 1) | (owners.diff() != 0)).nonzero().reshape(-1) + 1
    edges = [0, *breaks.tolist(), numbers.numel()]
    parts = []
    for begin, end in pairwise(edges):
        owner = int(owners[begin])
        row = int(numbers[begin]) - starts[owner]
        parts.append(Part(entries[owner].name, row, row + end - begin))
    return tuple(parts)


def _tied_groups(skeleton: PreTrainedModel) -> dict[str, frozenset[str]]:
    groups: dict[str, frozenset[str]] = {}
    for target, source in (getattr(skeleton, "all_tied_weights_keys", None) or {}).items():
        together = groups.get(target, frozenset({target})) | groups.get(source, frozenset({source}))
        groups.update(dict.fromkeys(together, together))
    return groups


def _moved_buffers(skeleton: PreTrainedModel) -> list[str]:
    """Patterns for buffers that the class makes itself now, or has elsewhere, and that older files hold."""
    buffers = [name for name, _ in skeleton.named_buffers()]
    moved = [pattern for suffix, pattern in _MOVED_BUFFERS.items() if any(name.endswith(suffix) for name in buffers)]
    prefix = f"({re.escape(skeleton.base_model_prefix)}\\.)?"
    return moved + [
        f"^{prefix}{re.escape(name.removeprefix(skeleton.base_model_prefix + '.'))}$"
        for name, _ in skeleton.named_non_persistent_buffers()
    ]


def _without(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    joined = "|".join(f"({pattern})" for pattern in patterns)
    return [name for name in names if not (joined and re.search(joined, name))]


def _wrong_kind(name: str, entry: TensorEntry, wanted: torch.Tensor) -> str | None:
    if wanted.is_floating_point() and entry.dtype not in FLOAT_DTYPES:
        return f"{name} holds {entry.dtype} in {entry.file.name}, where floats belong"
    return None
