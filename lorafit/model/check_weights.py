"""Whether a folder's weights are those that the model class wants, told from names and shapes before any is loaded.

transformers fills what is missing with random numbers and only logs it; here it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.console.wording import list_names
from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry
from lorafit.model.names import TensorNames, read_names
from lorafit.ops.output_head import outer_modules

if TYPE_CHECKING:
    import torch


def check_weights(
    skeleton: Any, entries: Mapping[str, TensorEntry], folder: Path, *, has_new_head: bool = False
) -> TensorNames:
    """Compares the tensors of a folder with a model built on the meta device, by transformers' own renaming rules.

    Args:
        skeleton: The model.
        entries: The folder's tensors.
        folder: For messages.
        has_new_head: Whether the head is the task's own: the folder may lack it, and another one there is left out.

    Returns:
        Which tensors hold which parameter.

    Raises:
        ModelError: Missing, unexpected or wrongly shaped tensors, or integers where floats belong; all are counted.
    """
    names = read_names(skeleton, entries)
    if has_new_head:
        names.leave_head_out(tuple(outer_modules(skeleton)), skeleton.base_model_prefix)
    problems = []
    if names.missing:
        problems.append(f"{len(names.missing)} missing tensors ({list_names(names.missing)})")
    if names.unexpected:
        count, shown = len(names.unexpected), list_names(names.unexpected)
        problems.append(f"{count} tensors that the model has no place for ({shown})")
    if names.misfits:
        problems.append(f"{len(names.misfits)} tensors do not fit: {next(iter(names.misfits.values()))}")
    if problems:
        heads = tuple(f"{name}." for name in outer_modules(skeleton))
        todo = "weights and config.json must belong together; get the whole model"
        if names.missing and all(name.startswith(heads) for name in names.missing):
            todo = (
                "an encoder has no head that writes text: train task: sequence-classification, or get the whole model"
            )
        raise ModelError("; ".join(problems), file=str(folder), todo=todo)
    return names


def check_loading(info: JsonMapping, folder: Path, names: TensorNames) -> None:
    """The second look: what transformers itself reports after loading (its conversions of fused weights included).

    Args:
        info: What `from_pretrained` reports.
        folder: The model's.
        names: From `check_weights`; what the class leaves out on purpose is no news.

    Raises:
        ModelError: It filled something in, left something out, or met an error.
    """
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        listed = (name if isinstance(name, str) else name[0] for name in info.get(what) or ())  # or with two shapes
        told = set(listed) - set(names.ignored.values()) - set(names.fresh)
        if told:
            label = what.replace("_keys", " tensors").replace("error_msgs", "errors")
            raise ModelError(f"{len(told)} {label} while loading: {list_names(told)}", file=str(folder))


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
