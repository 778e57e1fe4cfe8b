"""What another tool's key is called here, with the value to write: by its own value, and by the keys beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from lorafit.recipe.expect import form_names, listed_names
from lorafit.recipe.names import foreign_names, is_not_yet
from lorafit.recipe.schema_tree import Choice, Items, Leaf, Slot, every_key, recipe_outline
from lorafit.recipe.words import FOREIGN_VALUES, fold, means_nothing
from lorafit.recipe.yaml_tree import Entry, KeyPath, parse_key, shown

_BATCH_KEYS = ("micro_batch_size", "per_device_train_batch_size", "per_gpu_train_batch_size", "train_batch_size")
_ACCUMULATION_KEYS = ("gradient_accumulation_steps", "gradient_accumulation", "accumulate_grad_batches")
_KINDS_BY_KEY = {"load_in_4bit": "nf4", "load_in_8bit": "int8", "load_in_16bit": "none"}
_LONGEST_LIST_CHARACTERS = 60


def foreign_answer(name: str, section: Entry) -> tuple[str, str] | None:
    """Our key, empty where there is none, and what else to say; None for a name that no other tool has.

    Args:
        name: The key, folded.
        section: What it stands in.
    """
    answer = foreign_names().get(name)
    if answer is None:
        return None
    beside: Mapping[str, Entry] = section.value if isinstance(section.value, dict) else {}
    values = {fold(key): entry.value for key, entry in beside.items()}
    value = values.get(name)
    if not isinstance(answer, str):
        answer = answer.get(fold(value) if isinstance(value, str) else value is not False, answer[True])
    ours, _, note = answer.partition(": ")
    if name in _KINDS_BY_KEY:
        note = _quantization_of(name, values)
    elif name in (*_BATCH_KEYS, *_ACCUMULATION_KEYS):
        note = _whole_step(values)
    elif ours:
        note = value_of_ours(parse_key(ours), value) or note
    return ours, note


def value_of_ours(key: KeyPath, value: Any) -> str:
    """What to write at a key of ours for another tool's word; empty where the word says nothing to it.

    Args:
        key: Our key.
        value: What stands at theirs.
    """
    if not isinstance(value, str):
        return ""
    slot = _slot_called(key)
    known, holds_list = _names_of(slot)
    if isinstance(slot, Items) and isinstance(slot.item, Leaf) and means_nothing(value):
        return "leave it out, or write []"
    words = [word for word in re.split(r"[\s,]+", value.strip(" []")) if word]
    ours = [_known_word(word, known) for word in words]
    if len(ours) == 1 and ours[0]:
        return f"[{ours[0]}]" if isinstance(slot, Items) else ours[0]
    if holds_list and len(words) > 1 and (all(ours) or not isinstance(slot, Items)):
        written = f"[{', '.join(our or word for our, word in zip(ours, words, strict=True))}]"
        return written if len(written) <= _LONGEST_LIST_CHARACTERS else ""
    family = str(key[-2] if key[-1] == "kind" else key[-1])
    return f"{shown(value)} does not exist yet" if isinstance(slot, Choice) and is_not_yet(family, value) else ""


def _known_word(word: str, known: Sequence[str]) -> str:
    same = next((name for name in known if fold(name) == fold(word)), "")
    meant = FOREIGN_VALUES.get(fold(word), FOREIGN_VALUES.get(word.strip().lower(), ""))
    return same or (meant if meant in known else "")


def _slot_called(key: KeyPath) -> Slot | None:
    """The schema's slot of a key; a kind's is that of its section."""
    slots = dict(reversed(list(every_key(recipe_outline()))))
    return slots.get(key) or (slots.get(key[:-1]) if key[-1] == "kind" else None)


def _names_of(slot: Slot | None) -> tuple[list[str], bool]:
    """The words that a slot knows, and whether it holds a list."""
    if isinstance(slot, Choice):
        return list(slot.kinds), False
    if isinstance(slot, Items):
        return _names_of(slot.item)[0], True
    if not isinstance(slot, Leaf):
        return [], False
    words = [word for form, limits in slot.forms for word in listed_names(limits) or _literals(form)]
    return words, any(get_origin(form) is list for form, _ in slot.forms)


def _literals(form: Any) -> list[str]:
    return form_names(form) if any(isinstance(word, str) for word in get_args(form)) else []


def _quantization_of(name: str, values: Mapping[str, Any]) -> str:
    """Which kind the `load_in_*` keys of one section mean together."""
    said = next((key for key in _KINDS_BY_KEY if values.get(key) not in (None, False)), None)
    if said is None:
        return "none"
    return _KINDS_BY_KEY[said] if said == name else f"{_KINDS_BY_KEY[said]}, by {said}"


def _whole_step(values: Mapping[str, Any]) -> str:
    """Examples of a whole optimizer step: what a device takes at once, times the steps that are accumulated."""
    batch = next((key for key in _BATCH_KEYS if key in values), None)
    times = next((key for key in _ACCUMULATION_KEYS if key in values), None)
    both = [key for key in (batch, times) if key is not None]
    if len(both) == 2 and all(type(values[key]) is int for key in both):
        one, other = (values[key] for key in both)
        said = f"{one * other}: {both[0]} {one} x {both[1]} {other}, times the devices"
    elif times is None:
        said = f"{both[0]} x {_ACCUMULATION_KEYS[0]}, 1 where it is not said, x the devices"
    else:
        said = f"the batch of one device x {times} x the devices"
    return f"{said}; training.micro_batch_tokens cuts a step"
