"""Files that lorafit ships: inside the wheel they lie in `lorafit/_configs`, in a checkout in `configs`."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(*parts: str) -> Path:
    """The path of a shipped file or folder, e.g. `shipped("presets", "code.yaml")`. It need not exist.

    Raises:
        FileNotFoundError: The installation holds no shipped files at all.
    """
    for folder in (_PACKAGE / "_configs", _PACKAGE.parent / "configs"):
        if folder.is_dir():
            return folder.joinpath(*parts)
    raise FileNotFoundError(f"lorafit's shipped files are missing beside {_PACKAGE}; install it again")
