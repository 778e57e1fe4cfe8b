"""GGUF files inside installed Python packages, found without importing those."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path, PurePosixPath

from lorafit.errors import ModelError

PACKAGE_SCHEME = "package://"


def file_in_package(text: str) -> Path:
    """The file that `package://NAME/FILE.gguf` names.

    Raises:
        ModelError: It is no such name, or no installed package has the file; the message lists those that there are.
    """
    name, _, inside = text.removeprefix(PACKAGE_SCHEME).partition("/")
    if not name or not inside or ".." in PurePosixPath(inside).parts or not inside.lower().endswith(".gguf"):
        raise ModelError(
            f"'{text}' is not package://NAME/FILE.gguf", key="model.base", todo="name a .gguf file inside a package"
        )
    folders = _package_folders(name)
    if not folders:
        raise ModelError(
            f"no installed package is called '{name}'", key="model.base", todo=f"pip install {name}, or check the name"
        )
    for place in folders:
        if (place / inside).is_file():
            return place / inside
    found = sorted(p.relative_to(place).as_posix() for place in folders for p in place.rglob("*.gguf"))
    listed = f"it holds {', '.join(found[:5])}" if found else "it holds no .gguf file"
    raise ModelError(f"package '{name}' has no file {inside}", key="model.base", todo=listed)


def _package_folders(name: str) -> list[Path]:
    """Folders of an installed package, by import name or distribution name, without importing it."""
    import_names = [name] if name.isidentifier() else []
    try:
        distribution = importlib.metadata.distribution(name)
        listed = (distribution.read_text("top_level.txt") or "").split()
        listed += [Path(str(f)).parts[0] for f in distribution.files or [] if str(f).endswith("__init__.py")]
        import_names += [n for n in dict.fromkeys(listed) if n.isidentifier() and n not in import_names]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        pass
    folders = []
    for import_name in import_names:
        spec = importlib.util.find_spec(import_name)  # of a top-level name: finds, does not import
        folders += [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return folders
