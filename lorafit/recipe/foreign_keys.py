"""What another tool's key is called here, with the value to write: by its own value, and by the keys beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorafit.recipe.foreign import fold, foreign, is_not_yet, means_nothing, same_word
from lorafit.recipe.schema_tree import Node, every_key, forms, kinds_of, recipe_tree, words
from lorafit.recipe.yaml_tree import Entry, KeyPath, Value, parse_key, shown

_LONGEST_LIST_CHARACTERS = 60


def foreign_answer(name: str, section: Entry) -> tuple[str, str] | None:
    """Our key, empty where there is none, and what else to say; None for a name that no other tool has.

    Args:
        name: The key, folded.
        section: What it stands in.
    """
    tables = foreign()
    answer = tables["anywhere"].get(name)
    if answer is None:
        return None
    values = {fold(key): entry.value for key, entry in section.entries.items()}
    value = values.get(name)
    if not isinstance(answer, str):
        answer = answer.get(fold(value) if isinstance(value, str) else value is not False, answer[True])
    ours, _, note = answer.partition(": ")
    if name in tables["quantization_by_key"]:
        note = _quantization_of(name, values)
    elif any(name in keys for keys in tables["whole_step"].values()):
        note = _whole_step(values)
    elif ours:
        note = word_of_ours(parse_key(ours), value) or note
    return ours, note


def word_of_ours(key: KeyPath, value: Value) -> str:
    """What to write at a key of ours for another tool's word; empty where the word says nothing to it.

    Args:
        key: Our key.
        value: What stands at theirs.
    """
    node = _node_called(key)
    if not isinstance(value, str) or node is None:
        return ""
    known, lists = words(node), [form for form in forms(node) if form.get("type") == "array"]
    is_list = len(lists) == len(forms(node))
    if is_list and means_nothing(value):
        return "leave it out, or write []"
    theirs = [word for word in re.split(r"[\s,]+", value.strip(" []")) if word]
    ours = [same_word(word, known) for word in theirs]
    if len(ours) == 1 and ours[0]:
        return f"[{ours[0]}]" if is_list else ours[0]
    if lists and len(theirs) > 1 and (all(ours) or not is_list):
        written = f"[{', '.join(our or word for our, word in zip(ours, theirs, strict=True))}]"
        return written if len(written) <= _LONGEST_LIST_CHARACTERS else ""
    family = str(key[-2] if key[-1] == "kind" else key[-1])
    return f"{shown(value)} does not exist yet" if kinds_of(node) and is_not_yet(family, value) else ""


def _node_called(key: KeyPath) -> Node | None:
    """What may stand at a key of ours; at a kind, what may stand at its section."""
    nodes = dict(reversed(list(every_key(recipe_tree()))))
    return nodes.get(key[:-1] if key[-1] == "kind" else key)


def _quantization_of(name: str, values: Mapping[str, Value]) -> str:
    """Which kind the `load_in_*` keys of one section mean together."""
    kinds = foreign()["quantization_by_key"]
    said = next((key for key in kinds if values.get(key) not in (None, False)), None)
    if said is None:
        return "none"
    return kinds[said] if said == name else f"{kinds[said]}, by {said}"


def _whole_step(values: Mapping[str, Value]) -> str:
    """Examples of a whole optimizer step: what a device takes at once, times the steps that are accumulated."""
    keys = foreign()["whole_step"]
    batch, times = (next((key for key in keys[part] if key in values), None) for part in ("batch", "accumulation"))
    one, other = values.get(batch or ""), values.get(times or "")
    if type(one) is int and type(other) is int:
        said = f"{one * other}: {batch} {one} x {times} {other}, times the devices"
    elif times is None:
        said = f"{batch} x {keys['accumulation'][0]}, 1 where it is not said, x the devices"
    else:
        said = f"the batch of one device x {times} x the devices"
    return f"{said}; training.micro_batch_tokens cuts a step"
