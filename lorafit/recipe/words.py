"""Fields that hold a name out of a list, and the names that other tools use for the same things."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lorafit.console.nearest import nearest

LARGEST_COUNT = 2**31 - 1
"""Whole numbers up to this fit the counters of every library below."""

FOREIGN_VALUES: Mapping[str, str] = {
    "bfloat16": "bf16",
    "torch.bfloat16": "bf16",
    "float16": "fp16",
    "torch.float16": "fp16",
    "half": "fp16",
    "bf16_true": "bf16",
    "bf16_mixed": "bf16",
    "16_true": "fp16",
    "16_mixed": "fp16",
    "32_true": "fp32",
    "float32": "fp32",
    "torch.float32": "fp32",
    "flash_attn": "flash_attention_2",
    "flash_attention": "flash_attention_2",
    "fa2": "flash_attention_2",
    "4bit": "nf4",
    "int4": "nf4",
    "bnb_4bit": "nf4",
    "8bit": "int8",
    "bnb_8bit": "int8",
    "llm.int8": "int8",
    "adamw_torch": "adamw",
    "adamw_hf": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_apex_fused": "adamw",
    "adam_torch": "adam",
    "adamw8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_32bit": "adamw_bnb_32bit",
    "paged_adamw": "paged_adamw_32bit",
    "lion": "lion_32bit",
    "paged_lion": "paged_lion_32bit",
    "rmsprop_torch": "rmsprop",
    "rmsprop_8bit": "rmsprop_bnb_8bit",
    "rmsprop_bnb": "rmsprop_bnb_32bit",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "poly": "polynomial",
    "inverse_sqrt_lr": "inverse_sqrt",
    "sft": "causal-lm",
    "causal_lm": "causal-lm",
    "sharegpt": "sharegpt",
    "chat_template": "messages",
    "chat": "messages",
    "openai": "messages",
    "conversational": "messages",
    "completion": "text",
    "eval_loss": "loss",
    "accuracy": "token_accuracy",
    "output": "completion",
    "all": "all-linear",
    "auto": "all-linear",
    "linear": "all-linear",
    "all_linears": "all-linear",
    "all_linear_layers": "all-linear",
}


NOT_BUILT: Mapping[str, tuple[str, ...]] = {
    "format": ("preference", "pairwise", "ranking", "dpo", "orpo", "kto", "chosen_rejected", "classification", "label"),
}
"""Names that people know of other tools and that mean nothing here yet, by the family they would belong to."""


_WORDS_FOR_NOTHING = frozenset({"", "none", "null", "nil", "no", "off", "false", "~", "nothing", "disabled"})


def means_nothing(value: Any) -> bool:
    """Whether a text is one of the words by which people and other tools say that they want none."""
    return isinstance(value, str) and value.strip().lower() in _WORDS_FOR_NOTHING


def fold(word: str) -> str:
    """A word as it is looked up: in lower case, its parts joined by `_`."""
    return re.sub(r"[\s_-]+", "_", word.strip().lower())


def suggest_word(word: str, known: Iterable[str]) -> str:
    """`did you mean lora? ` for a word that is not among `known`, or nothing."""
    known = list(known)
    same = [name for name in known if fold(name) == fold(word)]
    ours = FOREIGN_VALUES.get(fold(word), FOREIGN_VALUES.get(word.strip().lower()))
    close = same or ([ours] if ours in known else nearest(word.strip(), known, count=2))
    return f"did you mean {' or '.join(str(name) for name in close)}? " if close else ""


class OneNameOf:
    """A validator that refuses a name not among `names()`; its message lists the nearest and all of them."""

    def __init__(self, what: str, names: Callable[[], list[str]]) -> None:
        self.what, self.names = what, names

    def __call__(self, value: str) -> str:
        known = self.names()
        if value.strip().lower().replace("_", "-") in {name.replace("_", "-") for name in NOT_BUILT.get(self.what, ())}:
            raise ValueError(f"{self.what} '{value}' does not exist yet; available: {', '.join(known)}")
        if value not in known:
            raise ValueError(
                f"unknown {self.what} '{value}'; {suggest_word(value, known)}available: {', '.join(known)}"
            )
        return value
