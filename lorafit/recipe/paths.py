"""Which values of a recipe are paths, and how they read from another folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path, PurePath

from lorafit.recipe.cross_field_rules import DATA_SUFFIXES
from lorafit.recipe.schema_tree import Slot, expand, fields_at, recipe_outline, slot_below
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


def moved(tree: Entry, old: Path, new: Path, *, absolute: bool = False, slot: Slot | None = None) -> Entry:
    """A recipe's tree, written in folder `old`, as it reads from folder `new`.

    Args:
        tree: The recipe, or the part of it that `slot` describes.
        old: Folder that its relative paths start from.
        new: Folder that they shall start from.
        absolute: Whether absolute paths become relative too, as in a file that is passed on.
        slot: What the schema knows about `tree`; the whole recipe if left out.
    """
    slot = slot or recipe_outline()
    tree = expand(slot, tree)
    if isinstance(tree.value, tuple):
        slots = [slot_below(slot, tree, number) for number in range(len(tree.value))]
        items = zip(tree.value, slots, strict=True)
        return replace(tree, value=tuple(moved(e, old, new, absolute=absolute, slot=s) if s else e for e, s in items))
    if not isinstance(tree.value, dict):
        return tree
    fields, entries = fields_at(slot, tree) or {}, {}
    for key, entry in tree.value.items():
        field = fields.get(key)
        if field is None:
            entries[key] = entry
        elif isinstance(entry.value, str) and (field.is_path or (field.may_be_path and is_local(entry.value, old))):
            entries[key] = replace(entry, value=_moved_path(entry.value, old, new, absolute))
        else:
            entries[key] = moved(entry, old, new, absolute=absolute, slot=field.slot)
    return replace(tree, value=entries)


def _moved_path(text: str, old: Path, new: Path, absolute: bool) -> str:
    if not text or (PurePath(text).is_absolute() and not absolute):
        return text
    return Path(os.path.relpath(old / text, new)).as_posix()
