"""The frozen base model as a folder on this disk, wherever the recipe found it.

    hub id                    a snapshot in Hugging Face's cache (safetensors, config and tokenizer files only)
    local folder              itself
    FILE.gguf                 converted once into $LORAFIT_CACHE/bases/SHA256 (default ~/.cache/lorafit)
    package://NAME/FILE.gguf  the same, for a file inside an installed Python package, which is not imported

No torch at module level: `read_config` serves commands that must be quick.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorafit.contracts import JsonObject
from lorafit.errors import ModelError, SafetyError
from lorafit.facts import CAUSAL_MODEL, ModelClass
from lorafit.files.atomic import MANIFEST, TEMPORARY_PREFIX, require_manifest
from lorafit.files.cache import cache_folder, known_hash, refuse_foreign
from lorafit.hub.asking import fetch_file, fetch_files
from lorafit.hub.refusal import HubRefusedError, Repo
from lorafit.model.base_config import CONFIG, fingerprint, load_config, refuse_quantised
from lorafit.model.gguf import content_name, convert_gguf, read_gguf_config
from lorafit.model.packages import PACKAGE_SCHEME, file_in_package
from lorafit.model.tokenizer_files import MORE_TEMPLATES, TOKENIZER_PATTERNS
from lorafit.model_shapes import known_config, like_known
from lorafit.run.card import BaseOrigin

if TYPE_CHECKING:
    from lorafit.contracts import Reporter
    from lorafit.recipe.schema import ModelSection

_UNPUBLISHED = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}([^/]+)-\d+$")  # a merge is read before it is whole
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_HUB_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *TOKENIZER_PATTERNS,
    *("chat_template*", f"{MORE_TEMPLATES}/*"),
)
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Base:
    """A base model on this disk.

    Attributes:
        path: Folder with safetensors, config.json and tokenizer.
        name: What `base_model_name_or_path` of an adapter says: the hub id, the local folder as the recipe writes it
            (an absolute path is cut to the folder's name), or the content name of a converted GGUF file.
        config: The parsed config.json.
        digest: Fingerprint of config and weights (see `fingerprint`); empty where weights were not asked for.
        written: What the recipe writes, where that is a GGUF file, whose `name` says nothing to a reader.
        kind: Where it comes from.
        revision: Of a hub id: what was asked for.
        commit: Of a hub id: what that was, resolved.
        content: `Content.digest` of all its weights, once they were read; empty before.
    """

    path: Path
    name: str
    config: JsonObject
    digest: str
    written: str = ""
    kind: Literal["hub", "package", "gguf", "folder"] = "folder"
    revision: str | None = None
    commit: str | None = None
    content: str = ""

    @property
    def shown(self) -> str:
        """For messages."""
        return f"{self.written} ({self.name[:12]})" if self.written else _UNPUBLISHED.sub(r"\1", self.name)

    @property
    def origin(self) -> BaseOrigin:
        """Where it can be had again, without any place on this disk."""
        name = self.written or self.name
        return BaseOrigin(
            kind=self.kind,
            name=name if self.kind in ("hub", "package") else Path(name).name or self.path.resolve().name,
            revision=self.revision,
            commit=self.commit,
            folder=self.path.name if self.kind == "hub" else self.path.resolve().name,
            digest=self.digest,
            content=self.content or None,
        )

    @property
    def reference(self) -> tuple[str, str | None]:
        """What PEFT's and transformers' own loaders open it by: a hub id with its commit, or an absolute folder."""
        return (self.name, self.commit) if self.kind == "hub" else (str(self.path.resolve()), None)


def is_gguf(text: str) -> bool:
    """Whether `model.base` names a GGUF file, which the first command that needs its tokenizer or weights converts."""
    return text.startswith(PACKAGE_SCHEME) or text.lower().endswith(".gguf")


def resolve_base(model: ModelSection, folder: Path, reporter: Reporter, *, weights: bool = True) -> Base:
    """The base model that `model.base` names, downloaded or converted if need be.

    Args:
        model: The recipe's section.
        folder: The recipe's folder, which local paths are relative to.
        reporter: Told about downloads and conversions.
        weights: Whether the weights are needed; if not, a hub model comes without them.

    Raises:
        ModelError: Not found, not whole, already quantised, or the hub cannot be reached.
        CheckpointError: The folder has a MANIFEST and is not what that says.
        SafetyError: It asks for foreign code, or holds only pickle files.
    """
    text, written = model.base, ""
    if (file := _gguf_file(text, folder)) is not None:
        _refuse_revision(model)
        path = convert_gguf(file, cache_folder() / "bases", reporter)
        kind: Literal["hub", "package", "gguf", "folder"] = "package" if text.startswith(PACKAGE_SCHEME) else "gguf"
        name, written = path.name, text if kind == "package" else _written_name(text)
    elif (local := _local_folder(text, folder)) is not None:
        _refuse_revision(model)
        path, name, kind = local, _written_name(text), "folder"
        if weights:
            check_made(path)
    else:
        path, name, kind = _snapshot(model, reporter, weights=weights), text, "hub"
    config = load_config(path)
    commit = path.name if kind == "hub" else None
    digest = fingerprint(path, config) if weights else ""
    return Base(path, name, config, digest, written, kind, model.revision, commit)


def open_folder(folder: Path, model_class: ModelClass = CAUSAL_MODEL) -> Base:
    """A model folder that a command names, such as a merge; without a fingerprint.

    Args:
        folder: The model's.
        model_class: What it is to be loaded as.

    Raises:
        CheckpointError: The folder has a MANIFEST and is not what that says.
        ModelError: No model, not whole, or already quantised.
        SafetyError: It asks for foreign code.
    """
    from lorafit.model.class_shape import find_shape

    check_made(folder)
    config = load_config(folder)
    find_shape(config, model_class)  # refuses what no model can be built from
    return Base(folder, folder.name, config, "")


def check_made(folder: Path) -> None:
    """A folder that lorafit made (a merge, a conversion) holds what its MANIFEST says; others have none."""
    if folder.is_relative_to(cache_folder()):
        refuse_foreign(folder)
    if (folder / MANIFEST).exists():
        require_manifest(folder, hash_of=known_hash)


def read_config(model: ModelSection, folder: Path) -> JsonObject:
    """The base's config.json alone: no weights, no download of weights, no conversion.

    Raises:
        ModelError: Not found, unreadable, or the hub cannot be reached.
        SafetyError: It asks for foreign code.
    """
    if (file := _gguf_file(model.base, folder)) is not None:
        return read_gguf_config(file, cache_folder() / "bases")
    if (local := _local_folder(model.base, folder)) is not None:
        return load_config(local)
    return _hub_config(model)


def find_local_base(model: ModelSection, folder: Path) -> Base | None:
    """The base with its tokenizer as far as it lies on this disk, without download or conversion; None where it does
    not."""
    if (file := _gguf_file(model.base, folder)) is not None:
        path = cache_folder() / "bases" / content_name(file)
    elif (local := _local_folder(model.base, folder)) is not None:
        path = local
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = [try_to_load_from_cache(model.base, name, revision=model.revision) for name in (*_TOKENIZER, CONFIG)]
        found = next((Path(name).parent for name in cached if isinstance(name, str)), None)
        if found is None:
            return None
        path = found
    if not (path / CONFIG).is_file() or not any((path / name).is_file() for name in _TOKENIZER):
        return None
    return Base(path, _written_name(model.base), load_config(path), "")


def _refuse_revision(model: ModelSection) -> None:
    if model.revision is not None:
        raise ModelError(f"'{model.base}' is no hub id, so it has no revision", key="model.revision", todo="remove it")


def _written_name(text: str) -> str:
    """A local folder's name for the adapter: as written; an absolute path, which tells where the user works, is cut."""
    path = Path(text).expanduser()
    return path.name if path.is_absolute() else text.rstrip("/")


def _gguf_file(text: str, folder: Path) -> Path | None:
    """The GGUF file that `text` names; None where it names something else."""
    if not is_gguf(text):
        return None
    if text.startswith(PACKAGE_SCHEME):
        return file_in_package(text)
    file = folder / Path(text).expanduser()
    if not file.is_file():
        raise ModelError(
            "no such file", file=str(file), key="model.base", todo="check the path; it is relative to the recipe"
        )
    return file


def _local_folder(text: str, folder: Path) -> Path | None:
    """The local folder that `text` names; None for a hub id."""
    written = Path(text).expanduser()
    path = folder / written
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            "is a file, not a model folder", file=str(path), key="model.base", todo="name a folder, or a .gguf file"
        )
    looks_local = written.is_absolute() or text.startswith((".", "~")) or not _HUB_ID.match(text)
    if looks_local:
        raise ModelError(
            f"no such model folder (with {CONFIG})",
            file=str(path),
            key="model.base",
            todo="check the path; it is relative to the recipe",
        )
    return None


def _snapshot(model: ModelSection, reporter: Reporter, *, weights: bool) -> Path:
    patterns = [p for p in _HUB_FILES if weights or "safetensors" not in p]
    needed = [CONFIG, "model*.safetensors"] if weights else [CONFIG]
    try:
        path = fetch_files(Repo(model.base, "model", model.revision), patterns, needed, reporter)
    except HubRefusedError as refused:
        raise _refused(model, refused) from refused
    if not (path / CONFIG).is_file():
        what, todo = f"'{model.base}' has no {CONFIG} on the hub", "use a model in the format of transformers"
        raise ModelError(what, key="model.base", todo=todo)
    if weights and not any(path.glob("model*.safetensors")):
        raise SafetyError(
            f"'{model.base}' has no safetensors weights on the hub, only pickles, which are never opened",
            key="model.base",
            todo="use a model or revision in safetensors format",
        )
    return path


def _hub_config(model: ModelSection) -> JsonObject:
    """config.json of a hub model: from the cache, from the facts that lorafit ships, or from the hub."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.base, CONFIG, revision=model.revision)
    if isinstance(cached, str):
        return load_config(Path(cached).parent)
    if model.revision is None and (config := known_config(model.base)) is not None:
        refuse_quantised(config, f"{model.base}/{CONFIG}")
        return config
    try:
        file = fetch_file(Repo(model.base, "model", model.revision), CONFIG)
    except HubRefusedError as refused:
        error = _refused(model, refused)
        if (known := like_known(model.base)) is not None and known.lower() != model.base.lower():
            error.todo = f"did you mean {known}, whose shape is known? an estimate needs no more"
        raise error from refused
    return load_config(file.parent)


def _refused(model: ModelSection, refused: HubRefusedError) -> ModelError:
    what, known = f"'{model.base}' is not on this disk, and {refused.what}", like_known(model.base)
    hint = f"did you mean {known}? " if known is not None and "/" not in model.base else ""  # an owner was forgotten
    return ModelError(what, key="model.base", todo=f"{hint}{refused.todo}")
