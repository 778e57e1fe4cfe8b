"""Values that leave this machine: the one rule by which paths of its disks stay behind.

Whatever is made to be uploaded or handed on (a merged model's configs, `lorafit.json`) goes through `portable`.
"""

from __future__ import annotations

import re
from typing import Any

_PATH_KEYS = ("name_or_path", "_file", "_path", "_dir", "_folder")
_MORE_PATH_KEYS = ("file", "path", "dir", "folder", "init_from")
_LOCAL = re.compile(r"^(/|~|\.{1,2}([/\\]|$)|[A-Za-z]:[/\\]|\\\\|file:)")


def is_local_path(text: str) -> bool:
    """Whether a text can only be a place on some machine's disk: an absolute path, or one from the current folder."""
    return bool(_LOCAL.match(text))


def portable(value: Any) -> Any:
    """A JSON value without the entries, at any depth, whose key says that they hold a path and whose value is local.

    Tokens, templates and hub ids stay: a token may well begin with a slash.
    """
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items() if not _is_place(str(key), inner)}
    return [portable(inner) for inner in value] if isinstance(value, list) else value


def _is_place(key: str, value: Any) -> bool:
    names_path = key in _MORE_PATH_KEYS or key.endswith(_PATH_KEYS)
    return names_path and isinstance(value, str) and is_local_path(value)
