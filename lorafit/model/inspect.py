"""What a loaded model is made of: coverage for people, and hashes of quantised weights as a proof for merges."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lorafit.console.wording import list_names
from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import CheckpointError
from lorafit.kinds.quantizations import QuantizationSection, kind_of_codes
from lorafit.model.names import names_of, note_parts

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from rich.table import Table
    from transformers import PreTrainedModel

NOTED_DTYPES = ("bfloat16", "float16", "float32")
"""What quantization.json may say that weights were rounded to before they were quantised: torch's names."""
_MEAN_TOLERANCE = 1e-5
_WRAPPED = (".base_layer", ".original_module")  # what PEFT calls a layer inside of its own
_WRAPPED_END = re.compile(r"(\.token_adapter)?(\.base_layer|\.original_module)$")


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


def coverage(model: PreTrainedModel) -> Coverage:
    """Counts a model with or without an adapter; shared tensors (a tied head) count once.

    What a method's layers keep beside what they train, as AdaLoRA its rank, is neither trained nor of the base.
    """
    is_adapted = hasattr(model, "peft_config")
    inside = {id(module) for module in (model.get_base_model() if is_adapted else model).modules()}
    prefix = getattr(model.base_model, "prefix", "") if is_adapted else ""
    rows: dict[str, Counter[str]] = {}
    seen: set[int] = set()
    kept_aside: set[str] = set()
    for path, module in model.named_modules():
        kept_aside |= {f"{path}.{name}" for name in getattr(module, "other_param_names", ())}  # PEFT's word for it
        own = [p for p in module.parameters(recurse=False) if p.requires_grad or path not in kept_aside]
        owner = (_owner_of_trained(path, prefix) if id(module) in inside else "prompt") if own else None
        fresh = [p for p in own if id(p) not in seen]
        seen |= {id(p) for p in fresh}
        if owner is not None:
            rows.setdefault(owner, Counter()).update(trainable=sum(p.numel() for p in fresh if p.requires_grad))
        elif own:
            name = _WRAPPED_END.sub("", path).rsplit(".", 1)[-1]
            codes = module.weight if kind_of_codes(module) is not None else None
            packed = sum(module.in_features * module.out_features for p in fresh if p is codes)
            rows.setdefault(name, Counter()).update(
                count=1,
                adapted=int(path.endswith(_WRAPPED)),
                quantised=int(packed > 0),
                parameters=packed + sum(p.numel() for p in fresh if p is not codes),
                packed=packed,
            )
    for row in rows.values():
        if not row["count"]:  # what an adapter trains beside the layers of the base
            row.update(count=1, adapted=1)
    fields = ("count", "adapted", "quantised", "parameters", "trainable")
    return Coverage(
        kinds=tuple(LayerKind(name, *(row[field] for field in fields)) for name, row in rows.items()),
        total_parameters=sum(row["parameters"] for row in rows.values()),
        quantised_parameters=sum(row["packed"] for row in rows.values()),
        trainable_parameters=sum(row["trainable"] for row in rows.values()),
    )


def _owner_of_trained(path: str, prefix: str) -> str | None:
    """Name of the layer that a module trains beside or in the place of; None for a module of the base."""
    marks = (f".{prefix}" if prefix else None, ".modules_to_save.", ".token_adapter.trainable")
    for mark in marks:  # base.q_proj.lora_A.default
        if mark is not None and mark in path:
            return path.split(mark)[0].rsplit(".", 1)[-1]
    return None


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


def quantized_hashes(model: PreTrainedModel) -> dict[str, JsonObject]:
    """The proof of every quantised weight, by the path of its layer in the plain base model.

    Paths carry neither PEFT's prefix nor its `base_layer`, so that they are the same before and after an adapter.
    `parts` says which rows of the files the weight is.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = names_of(model)
    proofs: dict[str, JsonObject] = {}
    for path, module in base.named_modules():
        kind = kind_of_codes(module)
        if kind is None:
            continue
        name = path.removesuffix(".base_layer")
        proofs[name] = {**kind.prove(module), "kind": kind.name()}
        proofs[name]["transposed"] = getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"
        if names is not None:
            proofs[name]["parts"] = note_parts(names.parts.get(f"{name}.weight", ()))
    return proofs


def kept_tensors(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
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
        if value.is_floating_point() and value.dtype != dtype
    }
    return sorted({*names.ignored, *(file for path in own for file in names.files_of(path))})


def describe_quantization(model: PreTrainedModel, section: QuantizationSection, *, dtype: torch.dtype) -> JsonObject:
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


def describing_quantization(
    model: PreTrainedModel, section: QuantizationSection, *, dtype: torch.dtype
) -> Callable[[], JsonObject]:
    """Begins `describe_quantization`, and gives what waits for it.

    On a card in a thread: copying the codes of 8B to the host and hashing them takes seconds, in which the card can be
    given other work. A CPU has no other.
    """
    describe = partial(describe_quantization, model, section, dtype=dtype)
    if next(model.parameters()).device.type == "cpu":
        described = describe()
        return lambda: described
    with_one = ThreadPoolExecutor(1, thread_name_prefix="lorafit-hash")
    found = with_one.submit(describe)
    with_one.shutdown(wait=False)
    return found.result


def recorded_linears(described: JsonMapping | None) -> frozenset[str] | None:
    """Paths of the linears that a run had quantised, whatever device it was on; None where it noted none."""
    tensors = (described or {}).get("tensors")
    return frozenset(tensors) if isinstance(tensors, dict) else None


def summarise_quantization(described: JsonMapping) -> JsonObject:
    """The same without the list of tensors: what `save_adapter` keeps beside the weights."""
    return {key: value for key, value in described.items() if key not in ("tensors", "kept")}


def digest_of(tensors: Mapping[str, JsonMapping]) -> str:
    """One SHA-256 over the hashes of all quantised weights, so that an adapter folder alone can prove its base."""
    exact = {n: [proof["codes"], proof["constants"], proof.get("nested")] for n, proof in tensors.items()}
    return hashlib.sha256(json.dumps(exact, sort_keys=True).encode("utf-8")).hexdigest()


def require_same_quantization(now: JsonMapping, before: JsonMapping, *, file: Path) -> None:
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


def _same_proof(ours: JsonMapping, theirs: JsonMapping) -> bool:
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
