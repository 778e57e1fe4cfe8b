"""Optimizer state as safetensors and JSON, dtypes exact: no pickle is read or written.

    optimizer.safetensors   NAME/KEY            each tensor of each parameter's state, stored once where it is shared
    optimizer.json          {"optimizer": CLASS, "states": {NAME: {KEY: {"tensor": "NAME/KEY"} | {"value": 3}}}}

`Optimizer.load_state_dict` is not used: it casts fp32 moments to the dtype of the parameter.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import CheckpointError, LorafitError
from lorafit.files.atomic import read_object

TENSORS_FILE = "optimizer.safetensors"
SKELETON_FILE = "optimizer.json"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file. By Python: safetensors hides the errno of a full disk in a text of its own."""
    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def save_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> None:
    """Writes the state of every parameter, by the parameter's name."""
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[tuple[int, int, torch.dtype], str] = {}  # bitsandbytes shares its quantisation maps between parameters
    states: dict[str, JsonObject] = {}
    for name, parameter in parameters.items():
        entries: JsonObject = {}
        states[name] = entries
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                identity = (value.data_ptr(), value.numel(), value.dtype)
                place = stored.setdefault(identity, f"{name}/{key}")
                tensors.setdefault(place, value)
                entries[key] = {"tensor": place}
            else:
                entries[key] = {"value": value}
    write_tensors(folder / TENSORS_FILE, tensors)
    skeleton = {"optimizer": type(optimizer).__name__, "states": states}
    (folder / SKELETON_FILE).write_text(json.dumps(skeleton, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@torch.no_grad()
def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> None:
    """Takes back what `save_optimizer` wrote.

    Raises:
        CheckpointError: Parameters or shapes are not those that were saved.
    """
    skeleton = read_object(folder / SKELETON_FILE)
    # into memory: nothing stays mapped, so that a file cut short later does no harm
    tensors: dict[str, torch.Tensor] = load((folder / TENSORS_FILE).read_bytes())
    if skeleton["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(
            f"holds the state of {skeleton['optimizer']}, the recipe's optimizer is {type(optimizer).__name__}",
            file=str(folder),
            todo="name the optimizer that was used",
        )
    states = skeleton["states"]
    if different := sorted(set(states) ^ set(parameters)):
        raise CheckpointError(
            f"its optimizer knows other parameters, {len(different)} differ, first {different[0]}",
            file=str(folder),
            todo="the recipe's adapter must be the one that was trained",
        )
    optimizer.state.clear()
    places = [(g, i, p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
    names = {parameter: name for name, parameter in parameters.items()}
    for group_index, index, parameter in places:
        entries = states[names[parameter]]
        values = {key: tensors[e["tensor"]] if "tensor" in e else e["value"] for key, e in entries.items()}
        if values and hasattr(optimizer, "init_state"):
            # bitsandbytes: its own buffers (paged ones, shared maps), filled.
            optimizer.init_state(optimizer.param_groups[group_index], parameter, group_index, index)
            _fill(optimizer.state[parameter], values, f"{folder}: {names[parameter]}")
        elif values:
            # torch keeps its step counter on the CPU; every other tensor lies with its parameter.
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if isinstance(value, torch.Tensor) and key != "step" else value
                for key, value in values.items()
            }


@contextlib.contextmanager
def as_checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turns whatever a library raises while a checkpoint is read into an error that names the checkpoint.

    Raises:
        CheckpointError: A file holds something else than a run saves.
    """
    try:
        yield
    except (LorafitError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # safetensors, torch and numpy share no base class
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"cannot be taken back ({type(error).__name__}: {first})",
            file=str(folder),
            todo="resume from another one with --resume-from STEP",
        ) from error


def _fill(state: JsonObject, values: JsonMapping, where: str) -> None:
    todo = "the recipe's optimizer must be the one that was used"
    if set(state) != set(values):
        what = f"optimizer state has {sorted(values)}, this optimizer wants {sorted(state)}"
        raise CheckpointError(what, file=where, todo=todo)
    for key, value in values.items():
        if not isinstance(value, torch.Tensor):
            state[key] = value
        elif state[key].shape != value.shape or state[key].dtype != value.dtype:
            wanted = f"this optimizer wants {state[key].dtype} {list(state[key].shape)}"
            what = f"optimizer state {key} is {value.dtype} {list(value.shape)}, {wanted}"
            raise CheckpointError(what, file=where, todo=todo)
        else:
            state[key].copy_(value)
