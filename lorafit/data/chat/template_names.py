"""What a recipe can name as its chat template: one that comes with lorafit, or a file. Imports nothing heavy."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from lorafit.console.nearest import did_you_mean
from lorafit.errors import ModelError
from lorafit.files.strict_json import JsonError, read_regular_file

SHIPPED_TEMPLATES = ("alpaca", "chatml", "hermes", "plain")
KEY = "data.chat_template"
_LARGEST_BYTES = 1 << 20


def shipped_template(name: str) -> str:
    """The text of a chat template that comes with lorafit, one of `SHIPPED_TEMPLATES`."""
    return resources.files("lorafit.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def read_template(named: str | None, folder: Path) -> str | None:
    """What a recipe names: None, a shipped name as it is, or the text of a file that starts in the recipe's folder.

    Raises:
        ModelError: It is neither a shipped name nor a file that can be read.
    """
    if named is None or named in SHIPPED_TEMPLATES:
        return named
    try:
        raw = read_regular_file(folder / Path(named).expanduser(), _LARGEST_BYTES + 1)
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except (JsonError, UnicodeDecodeError) as error:
        what = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.what
        raise ModelError(f"template file '{named}' {what}", key=KEY, todo="name a file of Jinja text") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: the home of an unknown user
        hint = did_you_mean(named, SHIPPED_TEMPLATES)
        shipped = f"shipped are {', '.join(SHIPPED_TEMPLATES)}; else name a file"
        todo = f"{hint}{shipped}. An instruct model has its own: leave this out"
        reason = (getattr(error, "strerror", None) or type(error).__name__).lower()
        raise ModelError(f"template '{named}' cannot be read: {reason}", key=KEY, todo=todo) from None
    if not text.strip() or len(raw) > _LARGEST_BYTES:
        what = f"larger than {_LARGEST_BYTES >> 20} MiB" if text.strip() else "empty"
        raise ModelError(f"template file '{named}' is {what}", key=KEY, todo="name a file of Jinja text")
    return text
