"""Options of PEFT's methods, read off the source of its config classes: PEFT itself takes seconds to import.

peft/tuners/hira/config.py    class HiraConfig(PeftConfig):
                                  r: int = field(default=32, ...)          -> options: r, a whole number
                                  def __post_init__: self.peft_type = PeftType.HIRA
"""

from __future__ import annotations

import ast
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lorafit.console.nearest import did_you_mean
from lorafit.contracts import JsonMapping, JsonValue

_Plain = bool | int | float | str | None
PeftOption = _Plain | list[_Plain] | dict[str, _Plain]
"""What a recipe may say for an option."""
TARGETS = "target_modules"
_SET_ELSEWHERE = frozenset(
    {
        *("base_model_name_or_path", "revision", "peft_type", "task_type", "inference_mode", "auto_mapping"),
        *("peft_version", TARGETS, "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("fan_in_fan_out", "bias", "megatron_config", "megatron_core", "runtime_config"),
    }
)
"""Fields that a recipe says by other keys, or that lorafit decides."""
_TYPES = {name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")}
_TYPES |= {"list": list, "dict": dict, "tuple": tuple, "set": set, "int": int, "float": float, "str": str, "bool": bool}


@dataclass(frozen=True)
class PeftMethod:
    """One of PEFT's methods.

    Attributes:
        peft_type: Its name in adapter_config.json.
        fields: The type of each field of its config, as it is written there.
    """

    peft_type: str
    fields: Mapping[str, str]

    @property
    def at_linears(self) -> bool:
        """Whether it stands at modules that a config names."""
        return TARGETS in self.fields

    def options(self) -> list[str]:
        """Names that a recipe may set."""
        return sorted(set(self.fields) - _SET_ELSEWHERE)

    def fault_of(self, name: str, value: PeftOption | JsonValue) -> str | None:
        """What is wrong with an option; None where nothing is."""
        if name not in self.options():
            known = self.options()
            hint = did_you_mean(name, known)
            return f"'{name}' is no option of {self.peft_type.lower()}; {hint}known: {', '.join(known)}"
        try:
            TypeAdapter(_type_of(self.fields[name])).validate_json(json.dumps(value), strict=True)
        except ValidationError:
            return f"'{name}' is {json.dumps(value)[:60]}, and PEFT wants {self.fields[name]}"
        return None

    def faults(self, config: JsonMapping) -> list[str]:
        """What is wrong with the options of an adapter_config.json."""
        given = {name: config[name] for name in self.options() if config.get(name) is not None}
        return [fault for name, value in given.items() if (fault := self.fault_of(name, value)) is not None]


@cache
def peft_methods() -> Mapping[str, PeftMethod]:
    """Every method of the installed PEFT by its type."""
    found = find_spec("peft")
    if found is None or found.origin is None:
        return {}
    sources = sorted((Path(found.origin).parent / "tuners").glob("*/config.py"))
    methods = (method for source in sources for method in _read(ast.parse(source.read_text(encoding="utf-8"))))
    return {method.peft_type: method for method in methods}


def _read(source: ast.Module) -> Iterator[PeftMethod]:
    for made in source.body:
        if not isinstance(made, ast.ClassDef):
            continue
        named = [
            node.value.attr
            for node in ast.walk(made)
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Attribute)
            and ast.unparse(node.targets[0]) == "self.peft_type"
        ]
        fields = {
            node.target.id: ast.unparse(node.annotation)
            for node in made.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        for peft_type in named[:1]:
            yield PeftMethod(peft_type, fields)


def _type_of(written: str) -> Any:
    """The type that an annotation of PEFT's says; whatever it is, where it names one of PEFT's own."""
    names = {node.id for node in ast.walk(ast.parse(written)) if isinstance(node, ast.Name)}
    return eval(written, {"__builtins__": {}}, _TYPES) if names <= _TYPES.keys() else Any
