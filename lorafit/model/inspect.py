"""What a loaded model is made of: coverage for people, and hashes of quantised weights as a proof for merges."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorafit.errors import CheckpointError
from lorafit.model.check_weights import list_names
from lorafit.model.names import Part, names_of, write_parts

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from rich.table import Table

_MEAN_TOLERANCE = 1e-5
SUM_BYTES = 8192
"""Packed bytes whose codes are summed together (see `sum_codes`)."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One kind of weight-holding layer, e.g. all `q_proj`.

    Attributes:
        name: Last part of the layers' paths.
        count: How many there are.
        adapted: How many of them carry an adapter.
        quantised: How many of them are quantised.
        parameters: Logical parameters of all of them (an NF4 code counts as one), a tied tensor once.
        trainable: Parameters of their adapters.
    """

    name: str
    count: int
    adapted: int
    quantised: int
    parameters: int
    trainable: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """What is frozen, quantised and trained.

    Attributes:
        total_parameters: Of the base: the published count.
        quantised_parameters: Of those, the ones stored quantised.
        trainable_parameters: Of the adapter.
    """

    kinds: tuple[LayerKind, ...]
    total_parameters: int
    quantised_parameters: int
    trainable_parameters: int

    @property
    def quantised_share(self) -> float:
        """Share of the base's parameters that is quantised, 0 to 1."""
        return self.quantised_parameters / self.total_parameters if self.total_parameters else 0.0

    @property
    def trainable_percent(self) -> float:
        """Trainable parameters per hundred of the base's."""
        return 100.0 * self.trainable_parameters / self.total_parameters if self.total_parameters else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json` and the report."""
        return {
            **asdict(self),
            "quantised_share": self.quantised_share,
            "trainable_percent": self.trainable_percent,
        }


def logical_elements(parameter: torch.nn.Parameter) -> int:
    """Weights that a parameter stands for: two for each byte of a packed 4-bit one (by its recorded shape)."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.numel()
    elements = 1
    for length in state.shape:
        elements *= int(length)
    return elements


def is_quantised(parameter: torch.nn.Parameter) -> bool:
    """Whether bitsandbytes holds this parameter as codes."""
    return getattr(parameter, "quant_state", None) is not None or getattr(parameter, "SCB", None) is not None


def coverage(model: Any) -> Coverage:
    """Counts a model with or without an adapter; shared tensors (a tied head) count once."""
    prefix = model.base_model.prefix if hasattr(model, "peft_config") else None
    rows: dict[str, list[int]] = {}
    seen: set[int] = set()
    trainable_of: dict[str, int] = {}
    for path, module in model.named_modules():
        own = [(n, p) for n, p in module.named_parameters(recurse=False)]
        if not own:
            continue
        if prefix is not None and prefix in path:  # an adapter's own layer: base.q_proj.lora_A.default
            owner = path.split(f".{prefix}")[0].rsplit(".", 1)[-1]
            trainable_of[owner] = trainable_of.get(owner, 0) + sum(p.numel() for _, p in own if p.requires_grad)
            continue
        inside_adapter = path.endswith(".base_layer")
        name = path.removesuffix(".base_layer").rsplit(".", 1)[-1]
        fresh = [p for _, p in own if id(p) not in seen]
        seen |= {id(p) for p in fresh}
        quantised = sum(logical_elements(p) for p in fresh if is_quantised(p))
        row = rows.setdefault(name, [0, 0, 0, 0, 0])
        changes = (1, int(inside_adapter), int(quantised > 0), sum(map(logical_elements, fresh)), quantised)
        rows[name] = [old + new for old, new in zip(row, changes, strict=True)]
    kinds = tuple(
        LayerKind(name, count, adapted, packed, parameters, trainable_of.get(name, 0))
        for name, (count, adapted, packed, parameters, _) in rows.items()
    )
    return Coverage(
        kinds,
        total_parameters=sum(kind.parameters for kind in kinds),
        quantised_parameters=sum(row[4] for row in rows.values()),
        trainable_parameters=sum(trainable_of.values()),
    )


def coverage_table(found: Coverage) -> Table:
    """The coverage as a rich table."""
    from rich.table import Table

    title = (
        f"{found.trainable_parameters:,} of {found.total_parameters:,} parameters are trained "
        f"({found.trainable_percent:.2f} %); {100 * found.quantised_share:.1f} % are quantised"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "count", "adapter", "quantised", "parameters", "trained"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for kind in found.kinds:
        adapted, packed = (str(n) if n else "-" for n in (kind.adapted, kind.quantised))
        trained = f"{kind.trainable:,}" if kind.trainable else "-"
        table.add_row(kind.name, str(kind.count), adapted, packed, f"{kind.parameters:,}", trained)
    return table


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def sum_codes(codes: torch.Tensor, *, packed: bool) -> str:
    """Sums of codes over stretches of SUM_BYTES bytes, modulo 2^16, as base64 of little-endian uint16.

    A hash only says that two sets of codes differ. On another kind of device a code on a rounding edge may come out one
    level off; the difference of these sums says how many did (as long as few do, which is what is allowed).
    """
    import torch

    flat = codes.detach().reshape(-1).view(torch.uint8)
    sums = []
    for start in range(0, flat.numel(), SUM_BYTES * 512):  # 4 MiB at a time
        part = flat[start : start + SUM_BYTES * 512]
        levels = ((part >> 4) + (part & 15)).to(torch.int32) if packed else part.to(torch.int32)
        levels = torch.nn.functional.pad(levels, (0, -levels.numel() % SUM_BYTES))
        sums.append(levels.view(-1, SUM_BYTES).sum(dim=1) % 65536)
    return base64.b64encode(torch.cat(sums).to(torch.uint16).cpu().numpy().astype("<u2").tobytes()).decode("ascii")


def count_differences(ours: str, theirs: str) -> int:
    """Levels by which two sets of codes differ, from their sums: the sum of |difference| over stretches."""
    import numpy as np

    a, b = (np.frombuffer(base64.b64decode(text), dtype="<u2").astype(np.int64) for text in (ours, theirs))
    if a.shape != b.shape:
        return 2**62
    distance = (a - b) % 65536
    return int(np.minimum(distance, 65536 - distance).sum())


def hash_four_bit(codes: torch.Tensor, state: Any) -> dict[str, Any]:
    """The proof of one 4-bit weight: codes, constants and offset, never dequantised values.

    Returns:
        `codes`: hash of the packed codes. `constants`: hash of the absmax values, or of their codes where those are
        quantised; then also `nested`: hash of their second-level constants, and `offset`: the subtracted mean.
        `code_sums` and `constant_sums`: see `sum_codes`.
    """
    proof: dict[str, Any] = {
        "shape": [int(length) for length in state.shape],
        "codes": hash_tensor(codes),
        "code_sums": sum_codes(codes, packed=True),
        "constants": hash_tensor(state.absmax),
        "offset": None,
    }
    if state.nested:
        proof["constant_sums"] = sum_codes(state.absmax, packed=False)
        proof["nested"] = hash_tensor(state.state2.absmax)
        proof["offset"] = float(state.offset)
    return proof


def quantized_hashes(model: Any) -> dict[str, dict[str, Any]]:
    """The proof of every quantised weight, by the path of its layer in the plain base model.

    Paths carry neither PEFT's prefix nor its `base_layer`, so that they are the same before and after an adapter.
    `parts` says which rows of the files the weight is, where that is not the whole tensor of the layer's own name.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = names_of(model)
    proofs: dict[str, dict[str, Any]] = {}
    for path, module in base.named_modules():
        weight: Any = getattr(module, "weight", None)
        name = path.removesuffix(".base_layer")
        if getattr(weight, "quant_state", None) is not None:
            proofs[name] = hash_four_bit(weight.data, weight.quant_state)
        elif getattr(weight, "SCB", None) is not None:
            shape = [int(length) for length in weight.shape]
            proofs[name] = {"shape": shape, "codes": hash_tensor(weight.data), "constants": hash_tensor(weight.SCB)}
        else:
            continue
        proofs[name]["transposed"] = getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"
        parts = names.parts.get(f"{name}.weight", ()) if names is not None else ()
        if names is not None and parts != (Part(f"{name}.weight", 0, names.rows.get(f"{name}.weight", 0)),):
            proofs[name]["parts"] = write_parts(parts, names.rows)
    return proofs


def kept_tensors(model: Any, dtype: torch.dtype) -> list[str]:
    """Tensors of the base's files that the loaded model has not rounded to `dtype`: a merge leaves them as they are.

    The class leaves them out (other heads, towers), or keeps them in a dtype of their own.
    """
    names = names_of(model)
    if names is None:
        return []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = {
        path.replace(".base_layer", ""): value
        for path, value in [*base.named_parameters(), *base.named_buffers()]
        if value.is_floating_point() and value.dtype != dtype and not is_quantised(value)
    }
    return sorted({*names.ignored, *(file for path in own for file in names.files_of(path))})


def describe_quantization(model: Any, section: Any, *, dtype: torch.dtype) -> dict[str, Any]:
    """What a run stores as `quantization.json`, and a merge needs to rebuild what training saw.

    Args:
        model: The loaded model, with or without an adapter.
        section: The recipe's quantisation section.
        dtype: What `load_model` got: weights were rounded to it before they were quantised.

    Returns:
        The section's fields that decide values, `weights_dtype`, `device` (kind), `digest` (of all proofs), `tensors`
        (the proofs) and `kept` (see `kept_tensors`).
    """
    tensors = quantized_hashes(model)
    return {
        **section.model_dump(exclude={"keep_unpacked"}),  # of speed and memory alone
        "weights_dtype": str(dtype).removeprefix("torch."),
        "device": next(model.parameters()).device.type,
        "digest": digest_of(tensors),
        "tensors": tensors,
        "kept": kept_tensors(model, dtype),
    }


def summarise_quantization(described: Mapping[str, Any]) -> dict[str, Any]:
    """The same without the list of tensors: what `save_adapter` keeps beside the weights."""
    return {key: value for key, value in described.items() if key not in ("tensors", "kept")}


def digest_of(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """One SHA-256 over the hashes of all quantised weights, so that an adapter folder alone can prove its base."""
    exact = {n: [proof["codes"], proof["constants"], proof.get("nested")] for n, proof in tensors.items()}
    return hashlib.sha256(json.dumps(exact, sort_keys=True).encode("utf-8")).hexdigest()


def require_same_quantization(now: Mapping[str, Any], before: Mapping[str, Any], *, file: Path) -> None:
    """Compares what a resume has quantised with what the run had when it began.

    Codes of another kind of device may be off by one level here and there, which a merge counts; they are let through.

    Raises:
        CheckpointError: They differ; names the layers. Or the record is none.
    """
    ours, theirs = now["tensors"], before.get("tensors")
    if not isinstance(theirs, dict) or not all(isinstance(proof, dict) for proof in theirs.values()):
        raise CheckpointError("holds no hashes of tensors", file=str(file), key="tensors", todo="restore it")
    changed = [f"{key} differs" for key in ("kind", "weights_dtype") if now.get(key) != before.get(key)]
    if now["device"] == before.get("device"):
        names = ours.keys() | theirs.keys()
        differ = [name for name in names if not _same_proof(ours.get(name, {}), theirs.get(name, {}))]
        changed += [f"{len(differ)} quantised tensors differ ({list_names(differ)})"] if differ else []
    if changed:
        raise CheckpointError(
            f"the base changed since the run was started: {changed[-1]}",
            file=str(file),
            todo="restore the base's files, or train anew on this one",
        )


def _same_proof(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two proofs are of the same weight.

    The mean that double quantisation subtracts has another last bit with another number of threads, and what is coded
    behind it with it: then equal codes and means that are near say the same.
    """
    if ours.get("codes") != theirs.get("codes") or ours.get("shape") != theirs.get("shape"):
        return False
    offset, other = ours.get("offset"), theirs.get("offset")
    if isinstance(offset, float) and isinstance(other, float) and offset != other:
        return math.isclose(offset, other, rel_tol=_MEAN_TOLERANCE)
    return all(ours.get(key) == theirs.get(key) for key in ("constants", "nested"))
