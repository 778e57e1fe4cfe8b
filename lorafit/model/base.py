"""The frozen base model as a folder on this disk, wherever the recipe found it.

    hub id                    a snapshot in Hugging Face's cache (safetensors, config and tokenizer files only)
    local folder              itself
    FILE.gguf                 converted once into $LORAFIT_CACHE/bases/SHA256 (default ~/.cache/lorafit)
    package://NAME/FILE.gguf  the same, for a file inside an installed Python package, which is not imported

No torch at module level: `read_config` serves commands that must be quick.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorafit.contracts import JsonObject, Reporter, Silent
from lorafit.errors import LorafitError, ModelError, SafetyError
from lorafit.files.atomic import MANIFEST, TEMPORARY_PREFIX, require_manifest
from lorafit.files.cache import cache_folder, known_hash, refuse_foreign
from lorafit.hub.asking import fetch_files
from lorafit.hub.refusal import HubRefusedError, Repo
from lorafit.model.base_config import CONFIG, fingerprint, load_config, refuse_quantised
from lorafit.model.gguf import PACKAGE_SCHEME, content_name, convert_gguf, file_in_package, read_gguf_config
from lorafit.model.known_models import known_config, like_known
from lorafit.model.tokenizer_files import MORE_TEMPLATES, PROCESSOR_PATTERNS, TOKENIZER_PATTERNS
from lorafit.recipe.schema import ModelSection
from lorafit.run.card import BaseOrigin, Source

_UNPUBLISHED = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}([^/]+)-\d+$")  # a merge is read before it is whole
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_WEIGHTS = "model*.safetensors"
_HUB_FILES = (
    *("config.json", "generation_config.json", _WEIGHTS, "model.safetensors.index.json"),
    *TOKENIZER_PATTERNS,
    *("chat_template*", f"{MORE_TEMPLATES}/*", *PROCESSOR_PATTERNS),
)
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Base:
    """A base model on this disk.

    Attributes:
        path: Folder with safetensors, config.json and tokenizer.
        config: The parsed config.json.
        origin: Where it can be had again, and what proves that another copy is the same: `digest` is a `fingerprint`,
            empty where nothing is compared with it; `content` is None before all weights were read.
        new_tokens: What its tokenizer is taught, and its model gets rows for (`lorafit.model.new_tokens`).
    """

    path: Path
    config: JsonObject
    origin: BaseOrigin
    new_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """For messages."""
        return _UNPUBLISHED.sub(r"\1", self.origin.shown)

    @property
    def reference(self) -> tuple[str, str | None]:
        """What PEFT's and transformers' own loaders open it by: a hub id with its commit, or an absolute folder."""
        is_hub = self.origin.kind == "hub"
        return (self.origin.name, self.origin.commit) if is_hub else (str(self.path.resolve()), None)

    def known_as(self, **values: str | None) -> Base:
        """The same with other values in its origin."""
        return replace(self, origin=self.origin.model_copy(update=values))


def read_base(
    path: Path, kind: Source = "folder", name: str = "", revision: str | None = None, *, is_compared: bool = True
) -> Base:
    """The base model in a folder.

    Args:
        path: The folder; of a hub id the snapshot of a commit.
        kind: Where it comes from.
        name: What it is called there; the folder's name where empty.
        revision: Of a hub id: what was asked for.
        is_compared: Whether its digest is wanted.

    Raises:
        ModelError: No model, not whole, or already quantised.
        SafetyError: It asks for foreign code.
    """
    config, is_hub = load_config(path), kind == "hub"
    folder = path.name if is_hub else path.resolve().name
    origin = BaseOrigin(
        kind=kind,
        name=name or folder,
        revision=revision,
        commit=folder if is_hub else None,
        folder=folder,
        digest=fingerprint(path, config) if is_compared else "",
    )
    return Base(path, config, origin)


def is_gguf(text: str) -> bool:
    """Whether `model.base` names a GGUF file, which the first command that needs its tokenizer or weights converts."""
    return text.startswith(PACKAGE_SCHEME) or text.lower().endswith(".gguf")


def base_text(given: str | Path) -> str:
    """A base as its user wrote it, of whom a path may have taken one of the slashes of `package://`."""
    text = str(given)
    slip = PACKAGE_SCHEME.removesuffix("/")
    return text.replace(slip, PACKAGE_SCHEME, 1) if text.startswith(slip) and PACKAGE_SCHEME not in text else text


def resolve_base(model: ModelSection, folder: Path, reporter: Reporter) -> Base:
    """The base model that `model.base` names, downloaded or converted if need be.

    Args:
        model: The recipe's section.
        folder: The recipe's folder, which local paths are relative to.
        reporter: Told about downloads and conversions.

    Raises:
        ModelError: Not found, not whole, already quantised, or the hub cannot be reached.
        CheckpointError: The folder has a MANIFEST and is not what that says.
        SafetyError: It asks for foreign code, or holds only pickle files.
    """
    kind, place = _locate(model.base, folder)
    name = model.base if kind in ("hub", "package") else Path(model.base).expanduser().name
    if place is None:
        path = _snapshot(model, reporter)
    elif model.revision is not None:
        raise ModelError(f"'{model.base}' is no hub id, so it has no revision", key="model.revision", todo="remove it")
    elif kind == "folder":
        path = place
        check_made(path)
    else:
        path = convert_gguf(place, cache_folder() / "bases", reporter)
    return read_base(path, kind, name, model.revision)


def resolve_unrecorded(text: str, reporter: Reporter) -> Base:
    """`resolve_base` of what no recipe names, so that no error speaks of one's key."""
    try:
        return resolve_base(ModelSection(base=text), Path.cwd(), reporter)
    except LorafitError as error:
        error.key = None if error.key == "model.base" else error.key
        raise


def model_folder(given: Path, reporter: Reporter) -> Path:
    """The folder of the base that a `.gguf` file or `package://` name stands for; every other path as it is.

    Raises:
        ModelError: There is no such file, or it cannot be converted.
    """
    text = base_text(given)
    return resolve_unrecorded(text, reporter).path if is_gguf(text) else given


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
    kind, place = _locate(model.base, folder)
    if place is None:
        return _hub_config(model)
    return load_config(place) if kind == "folder" else read_gguf_config(place, cache_folder() / "bases")


def find_local_base(model: ModelSection, folder: Path) -> Base | None:
    """The base with its tokenizer as far as it lies on this disk, without download or conversion; None where it does
    not."""
    kind, path = _locate(model.base, folder)
    if path is None:
        path = cached_snapshot(model.base, model.revision, *_TOKENIZER, CONFIG)
    elif kind != "folder":
        path = cache_folder() / "bases" / content_name(path)
    if path is None or not (path / CONFIG).is_file() or not any((path / name).is_file() for name in _TOKENIZER):
        return None
    return read_base(path, is_compared=False)


def cached_snapshot(name: str, revision: str | None, *files: str) -> Path | None:
    """The folder of the hub's cache with the first of these files of a model that it holds; None where it has none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):
        for file in files:
            if isinstance(cached := try_to_load_from_cache(name, file, revision=revision), str):
                return Path(cached).parent
    return None


def _locate(text: str, folder: Path) -> tuple[Source, Path | None]:
    """What `model.base` names: its kind, and the file or folder; None for a hub id.

    Raises:
        ModelError: It can only be a path, and there is nothing, or no model, at its end.
    """
    if text.startswith(PACKAGE_SCHEME):
        return "package", file_in_package(text)
    written, todo = Path(text).expanduser(), f"check the path; it begins in {folder.absolute()}"
    path = folder / written
    if is_gguf(text):
        if path.is_file():
            return "gguf", path
        what = "no such file"
    elif path.is_dir():
        return "folder", path
    elif path.is_file():
        what, todo = "is a file, not a model folder", "name a folder, or a .gguf file"
    elif written.is_absolute() or text.startswith((".", "~")) or not _HUB_ID.match(text):
        what = f"no such model folder (with {CONFIG})"
    else:
        return "hub", None
    raise ModelError(what, file=str(path), key="model.base", todo=todo)


def _snapshot(model: ModelSection, reporter: Reporter) -> Path:
    try:
        path = fetch_files(Repo(model.base, "model", model.revision), _HUB_FILES, [CONFIG, _WEIGHTS], reporter)
    except HubRefusedError as refused:
        raise _refused(model, refused) from refused
    if not (path / CONFIG).is_file():
        what, todo = f"'{model.base}' has no {CONFIG} on the hub", "use a model in the format of transformers"
        raise ModelError(what, key="model.base", todo=todo)
    if not any(path.glob(_WEIGHTS)):
        raise SafetyError(
            f"'{model.base}' has no safetensors weights on the hub, only pickles, which are never opened",
            key="model.base",
            todo="use a model or revision in safetensors format",
        )
    return path


def _hub_config(model: ModelSection) -> JsonObject:
    """config.json of a hub model: from the cache, from the facts that lorafit ships, or from the hub."""
    if (cached := cached_snapshot(model.base, model.revision, CONFIG)) is not None:
        return load_config(cached)
    if model.revision is None and (config := known_config(model.base)) is not None:
        refuse_quantised(config, f"{model.base}/{CONFIG}")
        return config
    try:
        folder = fetch_files(Repo(model.base, "model", model.revision), [CONFIG], [CONFIG], Silent())
    except HubRefusedError as refused:
        error = _refused(model, refused)
        if (known := like_known(model.base)) is not None and known.lower() != model.base.lower():
            error.todo = f"did you mean {known}, whose shape is known? an estimate needs no more"
        raise error from refused
    return load_config(folder)


def _refused(model: ModelSection, refused: HubRefusedError) -> ModelError:
    what, known = f"'{model.base}' is not on this disk, and {refused.what}", like_known(model.base)
    hint = f"did you mean {known}? " if known is not None and "/" not in model.base else ""  # an owner was forgotten
    return ModelError(what, key="model.base", todo=f"{hint}{refused.todo}")
