"""The base of every recipe section, and the choice of one kind by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Protocol, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    from lorafit.kinds.registry import Registry

PATH: Any = {"format": "path"}
"""`Field(json_schema_extra=PATH)` marks a path, relative to the recipe that it is written in."""
PATH_OR_NAME: Any = {"format": "path-or-name"}
"""The same for a field that may also hold a hub id or a shipped name."""


class Section(BaseModel):
    """A frozen recipe section: unknown keys are errors; the reference reads the field docstrings from the source.

    Validators are built on first use, and docstrings are not read at import: both would cost every command time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class HasSection(Protocol):
    """A kind that brings its own recipe section."""

    section: type[Section]


def one_of(registry: Registry[Any], default: str | None = None) -> Any:
    """The annotated type of a field that names a kind: a union over the registry's sections, told apart by `kind`.

    A bare word stands for the kind with its defaults: `optimizer: adamw` is `optimizer: {kind: adamw}`. A mapping that
    names no kind means `default`: `adapter: {r: 8}` is `adapter: {kind: lora, r: 8}`.
    """

    def with_kind(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        if isinstance(value, dict) and "kind" not in value and default is not None:
            return {"kind": default, **value}
        return value

    sections = tuple(member.section for _, member in registry.items())
    union = Annotated[Union[sections], Field(discriminator="kind")] if len(sections) > 1 else sections[0]  # noqa: UP007
    return Annotated[union, BeforeValidator(with_kind)]
