"""What adapters' kinds are described by: where they train what, and what adapter_config.json says of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from lorafit.contracts import JsonObject, JsonValue

if TYPE_CHECKING:
    from lorafit.facts import LinearShape

Number = Annotated[float, Field(allow_inf_nan=False)]
"""A finite number of a JSON file."""
Rank = Annotated[int, Field(gt=0, le=1 << 20)]
"""A whole number that a width may be."""
CopiedModules = Literal["norms", "biases", "all"]
"""Which modules of a language model a method trains copies of."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place of the model that a method trains something at.

    Attributes:
        kind: What stands there; `prompt`: nothing, the method's vectors are read before the tokens; `module`: a layer
            of any kind, which gets a trained copy beside it.
        name: Last part of the modules' paths.
        count: How many modules of that name get something.
        parameters: Trained parameters of all of them.
        linear: The shape of a linear; its `count` and `layers` are of those that get something.
    """

    kind: Literal["linear", "embedding", "prompt", "head", "module"]
    name: str
    count: int
    parameters: int
    linear: LinearShape | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an adapter in its run, where its recipe does not say it.

    Attributes:
        told: In a sentence or two.
        figures: The same as plain values.
        warning: Why it may be another than the recipe asks for, and what to do; empty where it is that.
    """

    told: str
    figures: JsonObject
    warning: str = ""


@dataclass(frozen=True, slots=True)
class SavedField:
    """A check of one key of adapter_config.json, which is a stranger's file.

    Attributes:
        type: Of the values that PEFT writes.
        wanted: What such a value is, for the message.
        needed: Whether the key must be there.
    """

    type: Any
    wanted: str
    needed: bool = False

    def is_valid(self, value: JsonValue) -> bool:
        """Whether a value is of the type."""
        try:
            TypeAdapter(self.type).validate_json(json.dumps(value), strict=True)
        except ValidationError:
            return False
        return True
