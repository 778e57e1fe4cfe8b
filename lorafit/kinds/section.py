"""The base of every recipe section, and the choice of one kind by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Protocol, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    from lorafit.registry import Registry


class Section(BaseModel):
    """A frozen recipe section: unknown keys are errors, field docstrings become the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=False)


class HasSection(Protocol):
    """A kind that brings its own recipe section."""

    section: type[Section]


def _from_bare_word(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def one_of(registry: Registry[Any]) -> Any:
    """The annotated type of a field that names a kind: a union over the registry's sections, told apart by `kind`.

    A bare word stands for the kind with its defaults: `optimizer: adamw` is `optimizer: {kind: adamw}`.
    """
    sections = tuple(member.section for _, member in registry.items())
    union = Annotated[Union[sections], Field(discriminator="kind")] if len(sections) > 1 else sections[0]  # noqa: UP007
    return Annotated[union, BeforeValidator(_from_bare_word)]
