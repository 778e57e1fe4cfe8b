"""Whether a folder's weights are those that the model class wants, told from names and shapes before any is loaded.

transformers fills what is missing with random numbers and only logs it; here it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import ModelError
from lorafit.model.weights import FLOAT_DTYPES, TensorEntry

if TYPE_CHECKING:
    import torch

SHOWN_NAMES = 4
_MOVED_BUFFERS = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}


def list_names(names: Iterable[str]) -> str:
    """`a, b, c, d and 12 more`: the first few names, in order."""
    ordered = sorted(names)
    more = len(ordered) - SHOWN_NAMES
    return ", ".join(ordered[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def check_weights(skeleton: Any, entries: Mapping[str, TensorEntry], folder: Path) -> None:
    """Compares the tensors of a folder with a model built on the meta device, by transformers' own renaming rules.

    Raises:
        ModelError: Missing, unexpected or wrongly shaped tensors, or integers where floats belong; all are counted.
    """
    wanted: dict[str, torch.Tensor] = skeleton.state_dict()
    found, unexpected = _place(skeleton, entries, wanted)
    aliases = _tied_groups(skeleton)
    missing = [name for name in wanted if name not in found and not (aliases.get(name, set()) & found.keys())]
    missing = _without(missing, skeleton._keys_to_ignore_on_load_missing or ())
    moved = [
        pattern
        for suffix, pattern in _MOVED_BUFFERS.items()
        if any(name.endswith(suffix) for name, _ in skeleton.named_buffers())
    ]
    unexpected = _without(unexpected, [*(skeleton._keys_to_ignore_on_load_unexpected or ()), *moved])
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing tensors ({list_names(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors that the model has no place for ({list_names(unexpected)})")
    wrong = [_misfit(name, entry, wanted[name]) for name, entry in found.items() if entry is not None]
    misfits = [why for why in wrong if why]
    if misfits:
        problems.append(f"{len(misfits)} tensors do not fit: {misfits[0]}")
    if problems:
        raise ModelError(
            "; ".join(problems),
            file=str(folder),
            todo="weights and config.json must belong together; get the whole model",
        )


def check_loading(info: Mapping[str, Any], folder: Path) -> None:
    """The second look: what transformers itself reports after loading (its conversions of fused weights included).

    Raises:
        ModelError: It filled something in, left something out, or met an error.
    """
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        names = [str(name) for name in info.get(what) or ()]
        if names:
            label = what.replace("_keys", " tensors").replace("error_msgs", "errors")
            raise ModelError(f"{len(names)} {label} while loading: {list_names(names)}", file=str(folder))


def check_finite(model: torch.nn.Module, folder: Path) -> None:
    """Looks for NaN and Inf: plain weights by their extremes, quantised ones by their constants, which inherit them.

    Raises:
        ModelError: A weight holds one; the first names and their number are given.
    """
    import torch

    broken = []
    for name, parameter in model.named_parameters():
        state, scales = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
        if state is not None:
            evidence = state.offset.reshape(1) if state.nested else state.absmax
        else:
            evidence = parameter.detach() if scales is None else scales
        if evidence.numel() and not all(torch.isfinite(edge) for edge in torch.aminmax(evidence)):
            broken.append(name)
    if broken:
        what = f"{len(broken)} tensors hold non-finite values, NaN or Inf ({list_names(broken)})"
        raise ModelError(what, file=str(folder), todo="get the weights again")


def _place(
    skeleton: Any, entries: Mapping[str, TensorEntry], wanted: Mapping[str, torch.Tensor]
) -> tuple[dict[str, TensorEntry | None], list[str]]:
    """Each wanted name with the entry that fills it (None where a conversion fills it from several), and the rest."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    targets = {source: converter.target_patterns for converter in converters for source in converter.source_patterns}
    prefix = skeleton.base_model_prefix
    found: dict[str, TensorEntry | None] = {}
    unexpected: list[str] = []
    for name, entry in entries.items():
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = rename_source_key(name, [], [], prefix, wanted)
        if renamed not in wanted:
            unexpected.append(name)
        elif pattern is None:
            found[renamed] = entry
        else:
            first, *_ = targets[pattern]
            found.update({renamed.replace(first, target): None for target in targets[pattern]})
    return found, unexpected


def _tied_groups(skeleton: Any) -> dict[str, set[str]]:
    """For each tied name, the names that share its tensor: one of them in the file is enough."""
    groups: dict[str, set[str]] = {}
    for target, source in (getattr(skeleton, "all_tied_weights_keys", None) or {}).items():
        together = groups.get(target, {target}) | groups.get(source, {source})
        groups.update(dict.fromkeys(together, together))
    return groups


def _without(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    joined = "|".join(f"({pattern})" for pattern in patterns)
    return [name for name in names if not (joined and re.search(joined, name))]


def _misfit(name: str, entry: TensorEntry, wanted: torch.Tensor) -> str | None:
    if entry.shape != tuple(wanted.shape):
        return f"{name} is {list(entry.shape)} in {entry.file.name}, config.json makes it {list(wanted.shape)}"
    if wanted.is_floating_point() and entry.dtype not in FLOAT_DTYPES:
        return f"{name} holds {entry.dtype} in {entry.file.name}, where floats belong"
    return None
