"""The base of every recipe section."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

PATH: Any = {"format": "path"}
"""`Field(json_schema_extra=PATH)` marks a path, relative to the recipe that it is written in."""
PATH_OR_NAME: Any = {"format": "path-or-name"}
"""The same for a field that may also hold a hub id or a shipped name."""

PACKED = "data.packing=True"
"""Among what tasks and adapters do not read that take one row a sequence."""


class Section(BaseModel):
    """A frozen recipe section: unknown keys are errors; the reference reads the field docstrings from the source.

    Validators are built on first use, and docstrings are not read at import: both would cost every command time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class KindSection(Section):
    """The section of a kind: `kind` says which one."""

    kind: str
