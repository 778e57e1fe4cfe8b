"""What lorafit.json tells other tools of a quantised base: how to load what the adapter was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.contracts import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FOUR_BIT_SETTINGS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
_HINT = (
    "the adapter was trained on a quantised base: give from_pretrained this dtype and "
    "quantization_config=BitsAndBytesConfig(**quantization_config); without them the base is another one"
)


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
