"""The base of a trained adapter, found again: where it lay, in the caches, or where the user says.

    --base-model PATH_OR_ID     what the user names; its digest must be the run's
    places                      where it lay when it was trained; the recipe's path from where the run is now
    hub cache                   the commit that was trained on
    $LORAFIT_CACHE/bases        converted GGUF files, by content name; any base there, by digest

Whatever is found counts only if its digest is the one that was trained on. Nothing that a file names starts a download.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lorafit.contracts import Reporter
from lorafit.errors import LorafitError, ModelError
from lorafit.files.cache import cache_folder
from lorafit.model.base import Base, cached_snapshot, check_made, read_base, resolve_base
from lorafit.model.base_config import CONFIG
from lorafit.model.content import describe_difference, read_content
from lorafit.recipe.schema import ModelSection
from lorafit.run.card import BaseOrigin

FLAG = "--base-model"
RECORD = "base.json"
"""In a run: `Content.to_json`, by which a base that changed is told tensor by tensor."""
_HERE = "give it with --base-model PATH_OR_ID"


def find_base(
    origin: BaseOrigin,
    *,
    named: str | None,
    places: Sequence[Path] = (),
    make: Callable[[], Base] | None = None,
    where: Path,
    reporter: Reporter,
) -> Base:
    """The base that an adapter of lorafit was trained on.

    Args:
        origin: What was written when it was trained.
        named: What the user names.
        places: Folders it may lie in.
        make: Downloads or converts it again, where it lies nowhere; None where that is not wanted.
        where: The run or adapter, for messages.
        reporter: Told about downloads and conversions.

    Raises:
        ModelError: It is not on this disk, or what was found is another base.
    """
    if named is not None:
        found = _resolve_named(named, origin.commit if named == origin.name else None, reporter)
    else:
        found = _search(origin, places, make, where)
    if found.origin.digest != origin.digest:
        raise _another(origin, found, where)
    return _as_trained(found, origin, where)


def _search(origin: BaseOrigin, places: Sequence[Path], make: Callable[[], Base] | None, where: Path) -> Base:
    """The first base with the origin's digest; else another one that was found instead."""
    seen: Base | None = None
    refused: LorafitError | None = None
    for folder in _candidates(origin, places):
        try:
            found = read_base(folder)
        except LorafitError as error:
            refused = refused or error
            continue
        if found.origin.digest == origin.digest:
            return found
        seen = seen or found
    if seen is None and make is not None:
        try:
            seen = make()
        except LorafitError as error:
            if origin.kind == "hub" and isinstance(error, ModelError):  # it says why the hub did not give it
                raise ModelError(error.what, file=str(where), todo=_HERE) from error
            raise _absent(origin, where) from error
        if seen.origin.digest == origin.digest:
            return seen
    if refused is not None:
        raise refused
    if seen is None:
        raise _absent(origin, where)
    return seen


def find_foreign_base(name: str, revision: str | None, *, named: str | None, where: Path, reporter: Reporter) -> Base:
    """The base of an adapter that another tool made: what adapter_config.json names, in the hub's cache or a folder.

    Raises:
        ModelError: It is not on this disk.
    """
    if named is not None:
        return _resolve_named(named, revision if named == name else None, reporter)
    bases = cache_folder() / "bases"
    for folder in (bases / name, Path(name).expanduser(), where / name) if name else ():
        if _is_model(folder):
            check_made(folder)
            return read_base(folder, name=Path(name).name)
    cached = _in_hub_cache(name, revision)
    if cached is None:
        what = f"its base '{name}' is not on this disk" if name else "names no base"
        raise ModelError(what, file=str(where), todo=_HERE)
    return read_base(cached, "hub", name, revision)


def _resolve_named(named: str, revision: str | None, reporter: Reporter) -> Base:
    is_here = Path(named).expanduser().exists()
    if not is_here and (cached := _in_hub_cache(named, revision)) is not None:
        return read_base(cached, "hub", named, revision)
    try:
        return resolve_base(ModelSection(base=named, revision=revision), Path.cwd(), reporter)
    except ModelError as error:
        todo = "name a hub id, a model folder or a .gguf file"
        raise ModelError(error.what, file=error.file, key=FLAG, todo=todo) from error


def _candidates(origin: BaseOrigin, places: Sequence[Path]) -> Iterator[Path]:
    yield from (place for place in dict.fromkeys(places) if _is_model(place))
    if origin.kind == "hub":
        cached = _in_hub_cache(origin.name, origin.commit)
        yield from [cached] if cached is not None else []
    bases = cache_folder() / "bases"
    converted = bases / origin.folder
    others = sorted(bases.iterdir()) if bases.is_dir() else []
    yield from (folder for folder in dict.fromkeys([converted, *others]) if _is_model(folder))


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    """The snapshot of a hub model with its weights, as far as it lies on this disk."""
    folder = cached_snapshot(name, revision, CONFIG)
    return folder if folder is not None and any(folder.glob("model*.safetensors")) else None


def _is_model(folder: Path) -> bool:
    try:
        return (folder / CONFIG).is_file()
    except OSError:  # a name that no file can have
        return False


def _as_trained(found: Base, origin: BaseOrigin, where: Path) -> Base:
    """A copy of the base, every byte of it compared with what was recorded, under the names that it was trained by."""
    check_made(found.path)
    if origin.content is not None and read_content(found.path).digest != origin.content:
        changed = describe_difference(found.path, where / RECORD)
        raise ModelError(
            changed or "the base changed since the run was started: its weights are others",
            file=str(found.path),
            todo=f"restore its files, or use a copy of it: {_HERE}",
        )
    return Base(found.path, found.config, origin)


def _absent(origin: BaseOrigin, where: Path) -> ModelError:
    what = f"its base '{origin.shown}' (digest {origin.digest[:12]}) is not on this disk"
    return ModelError(what, file=str(where), todo=_HERE)


def _another(origin: BaseOrigin, found: Base, where: Path) -> ModelError:
    changed = describe_difference(found.path, where / RECORD).rpartition(": ")[2]
    return ModelError(
        f"trained on '{origin.shown}' ({origin.digest[:12]}), but the base at {found.path} is another "
        f"({found.origin.digest[:12]}){f': {changed}' if changed else ''}",
        file=str(where),
        todo=f"use the base it was trained on: {_HERE}",
    )
