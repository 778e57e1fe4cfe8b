"""Adapters on disk, in PEFT's layout, read and written strictly.

    FOLDER/adapter_config.json           PEFT's; loads in PEFT and vLLM. Names the base by hub id, or by its folder here
           adapter_model.safetensors     fp32; base_model.model.<path>.lora_A.weight, ...lora_B.weight
           lorafit.json                  the base's origin and digest, by which it is found elsewhere; the run's card
           quantization.json             hashes of the quantised base, where it was: enough to merge
           tokenizer*, chat_template.jinja, generation_config.json     what it was trained with (`tokenizer_files`)

PEFT loads a file in which no tensor fits with no more than a warning; here each mismatch is an error, all listed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.wording import list_names
from lorafit.contracts import JsonMapping, JsonObject, Reporter
from lorafit.errors import ModelError, SafetyError
from lorafit.facts import CAUSAL_MODEL
from lorafit.files.atomic import MANIFEST, require_manifest
from lorafit.files.cache import known_hash
from lorafit.files.portable import is_local_path
from lorafit.files.safetensors import FLOAT_DTYPES, TensorEntry, read_header, read_rows, refuse_pickles
from lorafit.files.strict_json import JsonError, read_object_file
from lorafit.kinds.adapters import Adapter, AdapterSection, adapter_kind, adapters
from lorafit.machine.version import __version__
from lorafit.model.adapter_checks import NOTES_FORMAT, check_fields, check_notes
from lorafit.model.homes import find_homes
from lorafit.model.inspect import summarise_quantization
from lorafit.model.loading_note import note_head, note_loading, note_modules
from lorafit.model.names import names_of
from lorafit.model.new_tokens import note_rows
from lorafit.run.card import RunCard

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lorafit.model.base import Base
    from lorafit.model.tokenizer_files import Companions

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NOTES = "lorafit.json"
QUANTIZATION = "quantization.json"
ADAPTER_NAME = "default"
_BASE_NAME = "base_model_name_or_path"


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk, its files checked, its tensors not read yet.

    Attributes:
        kind: Its method.
        config: adapter_config.json.
        tensors: Entries of adapter_model.safetensors by name.
        notes: lorafit.json; empty for adapters that other tools made.
    """

    path: Path
    kind: type[Adapter[AdapterSection]]
    config: JsonObject
    tensors: dict[str, TensorEntry]
    notes: JsonObject

    def card(self) -> RunCard | None:
        """The card of the run that made it; None for adapters of other tools, and of earlier versions.

        Raises:
            ModelError: It is no card.
        """
        written = self.notes.get("card")
        if written is None:
            return None
        try:
            return RunCard.from_json({**written, "base": self.notes.get("base")})
        except (ValueError, TypeError) as error:
            todo = "restore the file, or take another copy of the adapter"
            raise ModelError(f"is no card of a run: {error}", file=str(self.path / NOTES), todo=todo) from error

    def check_values(self, reporter: Reporter) -> None:
        """Reads every tensor once; warns where the adapter changes nothing.

        Raises:
            ModelError: Integers where floats belong, or NaN or Inf.
        """
        import torch

        file = self.path / WEIGHTS
        integers = [name for name, entry in self.tensors.items() if entry.dtype not in FLOAT_DTYPES]
        if integers:
            found = f"{self.tensors[min(integers)].dtype} where floats belong ({list_names(integers)})"
            what = f"{len(integers)} adapter tensors hold {found}"
            raise ModelError(what, file=str(file), todo="get the adapter again")
        broken, nonzero = [], set()
        for name, entry in self.tensors.items():
            if entry.elements == 0:
                continue
            low, high = torch.aminmax(read_rows(entry))
            if not (torch.isfinite(low) and torch.isfinite(high)):
                broken.append(name)
            if low != 0 or high != 0:
                nonzero.add(name)
        if broken:
            what = f"{len(broken)} adapter tensors hold non-finite values, NaN or Inf ({list_names(broken)})"
            raise ModelError(what, file=str(file), todo="use another checkpoint of its run, or get the adapter again")
        why = self.kind.why_no_effect(self.config, nonzero)
        if why is not None:
            what = f"the adapter has no effect: {why}, so the model answers as its base; train it"
            reporter.warn(f"{self.path}: {what}")

    def quantization(self) -> JsonObject | None:
        """How the base was quantised, with the hashes of every weight where they lie beside the adapter."""
        if (self.path / QUANTIZATION).is_file():
            return _read_object(self.path / QUANTIZATION, self.path)
        return self.notes.get("quantization") or None


def read_adapter(folder: Path) -> AdapterFolder:
    """Config and tensor headers of an adapter.

    Raises:
        CheckpointError: The folder has a MANIFEST and is not what that says.
        ModelError: A file is missing, incomplete or no adapter of a known kind, or a field is not what PEFT writes.
        SafetyError: Only pickle weights, a config that would import a module, or a pattern that can take for ever.
    """
    check_named_base(folder)
    if (folder / MANIFEST).exists():
        require_manifest(folder, hash_of=known_hash)
    config = _read_object(folder / CONFIG, folder)
    kind = saved_kind(config, folder / CONFIG)
    _refuse_imports(config, folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        refuse_pickles(folder, ("adapter_model.bin",))
        raise ModelError(f"{WEIGHTS} is missing", file=str(folder), todo="get the whole adapter folder")
    tensors = read_header(folder / WEIGHTS)
    check_fields(kind, config, tensors, folder / CONFIG)
    return AdapterFolder(folder, kind, config, tensors, read_notes(folder))


def saved_kind(config: JsonMapping, file: Path) -> type[Adapter[AdapterSection]]:
    """The method of an adapter_config.json. Raises ModelError where lorafit has none of its type."""
    kind = adapter_kind(config)
    if kind is None:
        known = sorted({kind.peft_type for _, kind in adapters.items()})
        raise ModelError(
            f"is an adapter of type {str(config.get('peft_type'))[:40]!r}, which is not known",
            file=str(file),
            todo=f"use one of {', '.join(known)}",
        )
    return kind


def read_notes(folder: Path) -> JsonObject:
    """lorafit.json of an adapter or a merged model; empty where another tool made the folder.

    Raises:
        ModelError: It is no JSON object, or holds what lorafit does not write.
    """
    if not os.path.lexists(folder / NOTES):
        return {}
    notes = _read_object(folder / NOTES, folder)
    check_notes(notes, folder / NOTES)
    return notes


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    base: Base,
    quantization: JsonMapping | None = None,
    card: RunCard | None = None,
    companions: Companions | None = None,
) -> None:
    """Writes an adapter of a model into a folder (made whole by the caller's `atomic_dir`).

    Args:
        model: The PEFT model.
        folder: Where the files go.
        base: What it was trained on.
        quantization: `inspect.describe_quantization`.
        card: The run's.
        companions: Tokenizer, templates and generation settings.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = adapter_config(model, *base.reference)
    live = {**adapter_tensors(model), **derived_tensors(model)}
    once = {id(value): path for path, value in live.items()}
    tensors = {path: value.detach().to("cpu").contiguous() for path, value in live.items()}
    tensors = {path: value if once[id(live[path])] == path else value.clone() for path, value in tensors.items()}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    names = names_of(model)  # None for a model that `load_model` did not load
    layers = {} if names is None else {path: home.to_json() for path, home in find_homes(model, names).items()}
    notes = {
        "format": NOTES_FORMAT,
        "lorafit": __version__,
        "base": base.origin.model_dump(mode="json"),
        "quantization": summarise_quantization(quantization) if quantization else None,
        **({} if names is None else {"layers": layers}),
        **({} if quantization is None else note_loading(model, str(quantization["weights_dtype"]))),
        **({} if card is None else note_head(model, card.model_class, tensors)),
        **note_rows(model),
        **note_modules(model, CAUSAL_MODEL if card is None else card.model_class, live),
        "card": {key: value for key, value in card.portable().to_json().items() if key != "base"} if card else None,
    }
    for file, value in ((CONFIG, config), (NOTES, notes)):
        write_object(folder / file, value)
    if quantization and quantization.get("tensors"):
        (folder / QUANTIZATION).write_text(json.dumps(quantization, allow_nan=False) + "\n", encoding="utf-8")
    if companions is not None:
        companions.write(folder)


def finish_adapter(folder: Path) -> None:
    """Makes the result of a run of a copy of a checkpoint's adapter, in its folder: see `Adapter.finished`."""
    from safetensors.torch import load_file, save_file

    config = _read_object(folder / CONFIG, folder)
    finished = saved_kind(config, folder / CONFIG).finished(config, load_file(folder / WEIGHTS))
    if finished is not None:
        save_file(finished[1], str(folder / WEIGHTS), metadata={"format": "pt"})
        write_object(folder / CONFIG, finished[0])


def adapter_config(model: PeftModel, base_name: str, revision: str | None) -> JsonObject:
    """What adapter_config.json says of a model's adapter, on a base of that name and revision."""
    config = model.peft_config[ADAPTER_NAME].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config = {key: value.value if isinstance(value, Enum) else value for key, value in config.items()}
    tied = getattr(model.peft_config[ADAPTER_NAME], "modules_to_tie", None)
    if tied:  # PEFT takes them out of its list, and knows some ties by these names alone
        config["modules_to_save"] = sorted({*config["modules_to_save"], *tied})
    return config | {_BASE_NAME: base_name, "revision": revision, "inference_mode": True, "auto_mapping": None}


def adapter_tensors(model: PeftModel, name: str = ADAPTER_NAME) -> dict[str, torch.Tensor]:
    """An adapter's live parameters by the names they have on disk."""
    kind = saved_kind(model.peft_config[name].to_dict(), Path(CONFIG))
    return kind.live_tensors(model, name)


def derived_tensors(model: PeftModel, name: str = ADAPTER_NAME) -> dict[str, torch.Tensor]:
    """What is saved beside those, computed of them."""
    kind = saved_kind(model.peft_config[name].to_dict(), Path(CONFIG))
    return kind.derived_tensors(model, name)


def hash_adapter(model: PeftModel) -> str:
    """SHA-256 of all that an adapter computes with: its values, and what PEFT's config says of its form."""
    import torch

    config = adapter_config(model, "", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path, value in sorted(adapter_tensors(model).items()):
        digest.update(f"{path} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_named_base(folder: Path) -> None:
    """Raises ModelError where adapter_config.json names another base than lorafit.json, whatever a MANIFEST says.

    A folder that it names may lie anywhere, since it is the place on the machine that trained; its name stays the same.
    Files that are missing or damaged are for others to refuse.
    """
    try:
        config, notes = _read_object(folder / CONFIG, folder), _read_object(folder / NOTES, folder)
    except ModelError:
        return
    trained, written = notes.get("base"), str(config.get(_BASE_NAME))
    if not isinstance(trained, dict):
        return
    is_folder = is_local_path(written) and Path(written).name == trained.get("folder")
    if written != trained.get("name") and not is_folder:
        raise ModelError(
            f"base mismatch: {CONFIG} says '{written[:80]}', {NOTES} says '{trained.get('name')}'",
            file=str(folder),
            key=_BASE_NAME,
            todo="restore the file that was changed",
        )


def check_base(saved: AdapterFolder, base: Base) -> None:
    """Raises ModelError where the adapter was trained on another base, by digest."""
    trained = saved.notes.get("base") or {}
    digest = base.origin.digest
    if digest and trained.get("digest") and digest != trained["digest"]:
        raise ModelError(
            f"trained on '{trained['name']}' ({trained['digest'][:12]}), "
            f"but this base is '{base.shown}' ({digest[:12]})",
            file=str(saved.path),
            todo="use the base it was trained on",
        )


def _refuse_imports(config: JsonMapping, file: Path) -> None:
    """PEFT imports modules that these keys name. Written by PEFT itself they name transformers and megatron.core."""
    mapping = config.get("auto_mapping") or {}
    library = str(mapping.get("parent_library", "")) if isinstance(mapping, dict) else str(mapping)
    named = {
        "megatron_core": config.get("megatron_core") not in (None, "megatron.core"),
        "megatron_config": config.get("megatron_config") is not None,
        "auto_mapping.parent_library": bool(library) and not library.startswith("transformers."),
    }
    for key, foreign in named.items():
        if foreign:
            raise SafetyError("would import a module that the file names", file=str(file), key=key, todo="remove it")


def _read_object(file: Path, folder: Path) -> JsonObject:
    try:
        return read_object_file(file, constants=True)
    except JsonError as error:
        todo = "get the file again" if file.exists() else "name an adapter folder or a run"
        raise ModelError(f"{file.name} {error.what}", file=str(folder), todo=todo) from error


def write_object(file: Path, value: JsonMapping) -> None:
    """Writes a JSON file of an adapter's folder."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, default=str)
    file.write_text(text + "\n", encoding="utf-8")
