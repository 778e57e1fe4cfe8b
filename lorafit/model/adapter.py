"""Adapters on disk, in PEFT's layout, read and written strictly.

    FOLDER/adapter_config.json           PEFT's; loads in PEFT and vLLM. Names the base by hub id, or by its folder here
           adapter_model.safetensors     fp32; base_model.model.<path>.lora_A.weight, ...lora_B.weight
           lorafit.json                  the base's origin and digest, by which it is found elsewhere; the run's card
           quantization.json             hashes of the quantised base, where it was: enough to merge
           tokenizer*, chat_template.jinja, generation_config.json     what it was trained with (`tokenizer_files`)

PEFT loads a file in which no tensor fits with no more than a warning; here each mismatch is an error, all listed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.contracts import Silent
from lorafit.errors import ModelError, RecipeError, SafetyError
from lorafit.files.cache import known_hash
from lorafit.files.portable import is_local_path
from lorafit.files.rundir import MANIFEST, require_manifest
from lorafit.files.safetensors import TensorEntry, read_header, read_rows
from lorafit.files.strict_json import JsonError, read_json_file
from lorafit.machine.version import __version__
from lorafit.model.adapter_checks import check_fields, check_notes, check_values
from lorafit.model.check_weights import list_names
from lorafit.model.inspect import summarise_quantization
from lorafit.model.loading_note import note_loading
from lorafit.model.merge.homes import adapted_layers, find_home, note_homes
from lorafit.model.names import names_of
from lorafit.run.card import RunCard

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Reporter
    from lorafit.model.base import Base
    from lorafit.model.tokenizer_files import Companions

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NOTES = "lorafit.json"
QUANTIZATION = "quantization.json"
ADAPTER_NAME = "default"
_BASE_NAME = "base_model_name_or_path"
_PICKLE = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk, its files checked, its tensors not read yet.

    Attributes:
        config: adapter_config.json.
        tensors: Entries of adapter_model.safetensors by name.
        notes: lorafit.json; empty for adapters that other tools made.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    notes: dict[str, Any]

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

    def quantization(self) -> dict[str, Any] | None:
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
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"is an adapter of type {str(config.get('peft_type'))[:40]!r}, not LORA", file=str(folder / CONFIG)
        )
    _refuse_imports(config, folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        if (folder / _PICKLE).exists():
            raise SafetyError(
                f"{_PICKLE} is a pickle file, which can run code and is never opened",
                file=str(folder),
                todo=f"use an adapter with {WEIGHTS}",
            )
        raise ModelError(f"{WEIGHTS} is missing", file=str(folder), todo="get the whole adapter folder")
    tensors = read_header(folder / WEIGHTS)
    check_fields(config, tensors, folder / CONFIG)
    return AdapterFolder(folder, config, tensors, read_notes(folder))


def read_notes(folder: Path) -> dict[str, Any]:
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
    model: Any,
    folder: Path,
    *,
    base: Base,
    quantization: Mapping[str, Any] | None = None,
    card: RunCard | None = None,
    companions: Companions | None = None,
) -> None:
    """Writes the adapter called `default` into a folder (made whole by the caller's `atomic_dir`).

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
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in adapter_tensors(model).items()}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    layers = _note_layers(model)
    notes = {
        "format": 1,
        "lorafit": __version__,
        "base": base.origin.model_dump(mode="json"),
        "quantization": summarise_quantization(quantization) if quantization else None,
        **({} if layers is None else {"layers": layers}),
        **({} if quantization is None else note_loading(model, str(quantization["weights_dtype"]))),
        "card": {key: value for key, value in card.portable().to_json().items() if key != "base"} if card else None,
    }
    for name, value in ((CONFIG, config), (NOTES, notes)):
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, default=str)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    if quantization and quantization.get("tensors"):
        (folder / QUANTIZATION).write_text(json.dumps(quantization, allow_nan=False) + "\n", encoding="utf-8")
    if companions is not None:
        companions.write(folder)


def adapter_config(model: Any, base_name: str, revision: str | None) -> dict[str, Any]:
    """What adapter_config.json says of the adapter called `default`, on a base of that name and revision."""
    config = model.peft_config[ADAPTER_NAME].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {_BASE_NAME: base_name, "revision": revision}
    config |= {"inference_mode": True, "peft_type": "LORA", "auto_mapping": None}
    config["task_type"] = getattr(config["task_type"], "value", config["task_type"])
    return config


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's live parameters by the names they have on disk."""
    from peft import get_peft_model_state_dict

    prefix = model.base_model.prefix
    own = {name: parameter for name, parameter in model.named_parameters() if prefix in name}
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, state_dict=own, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    return state


def _note_layers(model: Any) -> dict[str, Any] | None:
    """Where each adapted layer's weight lies in the base's files; None for a model that `load_model` did not load."""
    names = names_of(model)
    if names is None:
        return None
    return note_homes({path: find_home(path, layer, names) for path, layer in adapted_layers(model).items()}, names)


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Puts a saved adapter's values into the model's adapter, in place (shapes and dtype of the model stay).

    Raises:
        ModelError: Missing or superfluous tensors, wrong shapes, all counted; or values that are no finite floats.
    """
    saved = read_adapter(folder)
    check_values(saved.tensors, folder / WEIGHTS, saved.config["lora_alpha"], Silent())
    _load_weights(model, saved)


def _load_weights(model: Any, saved: AdapterFolder) -> None:
    import torch

    live = adapter_tensors(model)
    check_fit(saved, {name: tuple(value.shape) for name, value in live.items()})
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(read_rows(saved.tensors[name]))


def check_fit(saved: AdapterFolder, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelError where an adapter's tensors are not exactly the wanted ones; names every mismatch."""
    missing = [name for name in wanted if name not in saved.tensors]
    extra = [name for name in saved.tensors if name not in wanted]
    misshapen = [n for n, shape in wanted.items() if n in saved.tensors and saved.tensors[n].shape != shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} missing adapter tensors ({list_names(missing)})")
    if extra:
        problems.append(f"{len(extra)} adapter tensors find no home in this model ({list_names(extra)})")
    if misshapen:
        name = sorted(misshapen)[0]
        has, needs = list(saved.tensors[name].shape), list(wanted[name])
        problems.append(f"{len(misshapen)} of another shape ({name} is {has}, the model needs {needs})")
    if problems:
        raise ModelError("; ".join(problems), file=str(saved.path / WEIGHTS), todo="use the base it was trained on")


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
    if base.digest and trained.get("digest") and base.digest != trained["digest"]:
        raise ModelError(
            f"trained on '{trained['name']}' ({trained['digest'][:12]}), "
            f"but this base is '{base.shown}' ({base.digest[:12]})",
            file=str(saved.path),
            todo="use the base it was trained on",
        )


def open_adapter(
    base_model: Any, folder: Path, *, trainable: bool, base: Base | None = None, reporter: Reporter | None = None
) -> Any:
    """The loaded base with a saved adapter on it.

    Args:
        base_model: From `load_model`.
        folder: The adapter's.
        trainable: Whether its weights require gradients.
        base: Checked against the adapter's notes where given.
        reporter: Warned where the adapter has no effect; silent where None.

    Raises:
        ModelError: It does not fit, in any respect; nothing is guessed.
        SafetyError: See `read_adapter`.
    """
    from lorafit.model.load import keep_weights_unpacked

    saved = read_adapter(folder)
    if base is not None:
        check_base(saved, base)
    check_values(saved.tensors, folder / WEIGHTS, saved.config["lora_alpha"], reporter or Silent())
    model = wrap_model(base_model, saved.config, folder, trainable=trainable)
    _load_weights(model, saved)
    keep_weights_unpacked(model)
    for parameter in adapter_tensors(model).values():
        parameter.requires_grad_(trainable)
    return model


def wrap_model(
    base_model: Any, config: Mapping[str, Any], folder: Path, *, trainable: bool, empty: bool = False
) -> Any:
    """A base model with fresh layers where PEFT puts those of an adapter.

    Args:
        config: The adapter's adapter_config.json.
        folder: Where that lies, for messages.
        empty: Whether the layers get no values, as those of a base on the meta device.

    Raises:
        ModelError: PEFT does not know its config, or cannot apply it to this model.
    """
    from peft import LoraConfig, get_peft_model

    from lorafit.model.quiet import quiet_libraries

    known = LoraConfig.__dataclass_fields__
    foreign = {key: value for key, value in config.items() if key not in known and value}
    if foreign:
        raise ModelError(f"keys this PEFT does not know: {list_names(foreign)}", file=str(folder / CONFIG))
    fields = {key: value for key, value in config.items() if key in known and key not in ("peft_type", "auto_mapping")}
    fields |= {"inference_mode": not trainable, "init_lora_weights": True}
    with quiet_libraries():
        try:
            return get_peft_model(base_model, LoraConfig(**fields), adapter_name=ADAPTER_NAME, low_cpu_mem_usage=empty)
        except Exception as error:  # PEFT raises whatever its tuners meet in a foreign config
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"does not fit this model: {first}", file=str(folder / CONFIG)) from error


def go_on_from(model: Any, folder: Path) -> None:
    """Gives a fresh adapter the weights of a saved one that has the same rank, scaling and targets.

    Raises:
        RecipeError: Rank, scaling or targets of recipe and adapter differ.
        ModelError: See `read_adapter`.
    """
    saved, fresh = read_adapter(folder), model.peft_config[ADAPTER_NAME]
    for key, ours in (("r", "r"), ("lora_alpha", "alpha")):
        theirs, asked = saved.config.get(key), getattr(fresh, key)
        if theirs != asked:
            raise RecipeError(
                f"the recipe says {asked:g}, the adapter to go on from has {theirs}", key=f"adapter.{ours}"
            )
    unlike = [
        key
        for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
        if saved.config.get(key)
    ]
    if unlike or saved.config.get("bias", "none") != "none":
        raise RecipeError(f"{folder} is no plain LoRA adapter ({', '.join(unlike) or 'bias'})", key="adapter.init_from")
    live = {name: tuple(value.shape) for name, value in adapter_tensors(model).items()}
    if live.keys() != saved.tensors.keys():
        raise RecipeError(
            f"{folder} adapts other layers: {list_names(saved.tensors.keys() ^ live.keys())}",
            key="adapter.target_modules",
            todo="name the targets it was trained with",
        )
    load_adapter_weights(model, folder)


def _refuse_imports(config: Mapping[str, Any], file: Path) -> None:
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


def _read_object(file: Path, folder: Path) -> dict[str, Any]:
    try:
        value = read_json_file(file, constants=True)
    except FileNotFoundError as error:
        raise ModelError(f"{file.name} is missing", file=str(folder), todo="name an adapter folder or a run") from error
    except JsonError as error:
        raise ModelError(f"{file.name} {error.what}", file=str(folder), todo="get the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file.name} is no JSON object", file=str(folder), todo="get the file again")
    return value
