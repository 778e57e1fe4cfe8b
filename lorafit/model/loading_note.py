"""What lorafit.json tells of the model that an adapter was trained on: how a base was quantised, and of a new head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorafit.contracts import JsonObject
from lorafit.model.names import names_of
from lorafit.model.towers import projector_names
from lorafit.ops.output_head import outer_modules

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lorafit.facts import ModelClass

_FOUR_BIT_SETTINGS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
_HINT = (
    "the adapter was trained on a quantised base: give from_pretrained this dtype and "
    "quantization_config=BitsAndBytesConfig(**quantization_config); without them the base is another one"
)
_HEAD_HINT = "build the base as this class with these values in its config before the adapter is loaded onto it"
_PROJECTOR_HINT = "these were trained whole, and take the place of the base's"
_MODULES_HINT = "these are of the base, and were trained whole beside the adapter"
_OUTER = "base_model."
HEAD_PREFIX = f"{_OUTER}model."
"""What PEFT puts before the names of a head that is saved whole, where a method puts layers of its own into the model;
only the first half of it where vectors stand before the tokens."""


def note_loading(model: PreTrainedModel, dtype: str) -> JsonObject:
    """What other tools must hand to `from_pretrained` to get the base that was trained on; nothing for a plain one."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return {}
    known = config if isinstance(config, dict) else config.to_dict()
    taken = {
        key: value
        for key, value in known.items()
        if key in ("load_in_4bit", "load_in_8bit", "llm_int8_skip_modules")
        or (known["load_in_4bit"] and key in _FOUR_BIT_SETTINGS)
    }
    return {"loading": {"hint": _HINT, "dtype": dtype, "quantization_config": taken}}


def note_head(model: PeftModel, model_class: ModelClass, saved: Iterable[str]) -> JsonObject:
    """What an adapter notes of the head that is saved with it; nothing where its task has none of its own.

    Args:
        model: From `load_model`, with the adapter.
        model_class: The task's, with the id that fills up rows.
        saved: Names of the adapter's tensors on disk.
    """
    if not (model_class.has_new_head or model_class.trains_projector):
        return {}
    base, names = model.get_base_model(), names_of(model)
    whole = (
        [f"{base.base_model_prefix}.{name}" for name in projector_names(base)]
        if model_class.trains_projector
        else list(outer_modules(base))
    )
    prefix = HEAD_PREFIX if hasattr(model.base_model, "prefix") else _OUTER
    marks = tuple(f"{prefix}{module}." for module in whole)
    tensors = sorted(name.removeprefix(prefix) for name in saved if name.startswith(marks))
    called = {} if names is None else {name: names.files_of(name) for name in tensors}
    files = {name: found[0] for name, found in called.items() if found and found[0] != name}
    head: JsonObject = {
        "hint": _PROJECTOR_HINT if model_class.trains_projector else _HEAD_HINT,
        "class": type(base).__name__,
        "config": dict(model_class.config),
        "tensors": tensors,
        **({"files": files} if files else {}),
        "left_out": [] if names is None else sorted(names.left_head),
    }
    return {"head": head}


def note_modules(model: PeftModel, model_class: ModelClass, saved: Iterable[str]) -> JsonObject:
    """What an adapter notes of the base's modules that were trained whole beside it; nothing where there are none.

    Args:
        model: From `load_model`, with the adapter.
        model_class: The task's: what `note_head` notes is left out.
        saved: Names of the adapter's tensors on disk; an output head that is the embedding is noted as tied.
    """
    from peft.utils import ModulesToSaveWrapper

    base, names, (config,) = model.get_base_model(), names_of(model), model.peft_config.values()
    tied = tuple(f"{path}." for path in getattr(config, "modules_to_tie", None) or ())
    outer = [*outer_modules(base)] if model_class.has_new_head else []
    if model_class.trains_projector:
        outer += [f"{base.base_model_prefix}.{name}" for name in projector_names(base)]
    whole = [
        path for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper) and path not in outer
    ]
    marks = tuple(f"{HEAD_PREFIX}{path}." for path in whole)
    tensors = sorted(name.removeprefix(HEAD_PREFIX) for name in saved if name.startswith(marks))
    own, again = ([name for name in tensors if name.startswith(tied) == is_tied] for is_tied in (False, True))
    called = {} if names is None else {name: names.files_of(name) for name in own}
    files = {name: found[0] for name, found in called.items() if found and found[0] != name}
    note: JsonObject = {"hint": _MODULES_HINT, "tensors": own, "tied": again, **({"files": files} if files else {})}
    return {"modules": note} if own else {}
