"""Which values of a recipe are paths, and how they read from another folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path, PurePath

from lorafit.recipe.cross_field_rules import DATA_SUFFIXES
from lorafit.recipe.schema_tree import Node, forms, node_below, recipe_tree
from lorafit.recipe.yaml_tree import Entry

_FILE_SUFFIXES = DATA_SUFFIXES | {".gguf", ".jinja", ".jinja2", ".j2", ".safetensors", ".yaml", ".yml"}


def absolute(path: Path) -> Path:
    """A path from the root, without `..` in it; links stay what they are."""
    return Path(os.path.normpath(path.absolute()))


def is_pattern(text: str) -> bool:
    """Whether a path may stand for several files: no name on the hub holds these letters."""
    return any(letter in text for letter in "*?[")


def is_local(text: str, folder: Path) -> bool:
    """Whether a value that may be a path is one: by its form, by its suffix, or because it exists in `folder`.

    Hub ids, shipped names and `package://` names are none.
    """
    if "://" in text or not text:
        return False
    if text.startswith((".", "/", "~")) or PurePath(text).suffix.lower() in _FILE_SUFFIXES or is_pattern(text):
        return True
    try:
        return (folder / text).exists()
    except OSError:  # a name too long for any file
        return False


def moved(tree: Entry, old: Path, new: Path, *, absolute: bool = False, node: Node | None = None) -> Entry:
    """A recipe's tree, written in folder `old`, as it reads from folder `new`.

    Args:
        tree: The recipe, or the part of it that `node` describes.
        old: Folder that its relative paths start from.
        new: Folder that they shall start from.
        absolute: Whether absolute paths become relative too, as in a file that is passed on.
        node: What the schema says of `tree`; the whole recipe if left out.
    """
    node = node or recipe_tree()
    if isinstance(tree.value, str):
        marks = {one.get("format") for one in (node, *forms(node))}
        is_path = "path" in marks or ("path-or-name" in marks and is_local(tree.value, old))
        path = Path(tree.value).expanduser()
        if is_path and tree.value and (absolute or not path.is_absolute()):
            return replace(tree, value=Path(os.path.relpath(old / path, new)).as_posix())
        return tree

    def inside(part: str | int, entry: Entry) -> Entry:
        below = node_below(node, tree, part)
        return moved(entry, old, new, absolute=absolute, node=below) if below else entry

    if isinstance(tree.value, tuple):
        return replace(tree, value=tuple(inside(number, item) for number, item in enumerate(tree.value)))
    if isinstance(tree.value, dict):
        return replace(tree, value={key: inside(key, entry) for key, entry in tree.value.items()})
    return tree
