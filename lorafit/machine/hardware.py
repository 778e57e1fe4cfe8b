"""The cards of `configs/hardware`, and what people call them.

A card is found by any of its names or by its file's, whatever case, blanks, hyphens and underscores it is written with,
with or without maker and series in front, `GPU` behind, or its memory: `NVIDIA GeForce RTX 4070 Laptop GPU`,
`4070laptop`, `rtx_3060_12gb`, `3060 12 GB`. No torch: a card that is not here is asked about, too.
"""

from __future__ import annotations

import json
import re
from functools import cache

from lorafit.console.nearest import nearest
from lorafit.contracts import JsonObject
from lorafit.errors import UsageError
from lorafit.machine.shipped import shipped

_MAKERS = re.compile(r"^(nvidia|amd|geforce|quadro|tesla|instinct|rtx|gtx)+")
FIRST_WITH_BF16 = (8, 0)
"""Compute capability of Ampere, the first with bf16 tensor cores; ROCm reports 9.x for its own."""
_MEMORY = re.compile(r"[\s_-]+([0-9]+)\s*(?:gib|gb|g)\s*$", re.IGNORECASE)


@cache
def cards() -> tuple[JsonObject, ...]:
    """Every card of `configs/hardware`, in order of its file, which `file` names without its suffix."""
    paths = sorted(shipped("hardware").glob("*.json"))
    return tuple({"file": path.stem, **json.loads(path.read_text(encoding="utf-8"))} for path in paths)


def find_card(name: str) -> JsonObject | None:
    """The card of that name; of several, which differ in their memory alone, the first."""
    found = find_cards(name)
    return found[0] if found else None


def find_cards(name: str) -> list[JsonObject]:
    """The cards of that name: two where makers sell one card with two sizes of memory, and the name tells no size."""
    key = _key(name)
    named = [card for card in cards() if key and key in _keys(card)]
    if named or (memory := _MEMORY.search(name)) is None:
        return named
    head = _key(name[: memory.start()])
    return [card for card in cards() if head in _keys(card) and card["label_gib"] == int(memory[1])]


def choose_card(name: str, flag: str) -> JsonObject | None:
    """The one card of that name; None where there is none.

    Raises:
        UsageError: There are several.
    """
    number = name.strip() if name.strip().isdecimal() and len(name.strip()) >= 3 else ""  # 24 and 80 are sizes
    found = find_cards(name) or [card for card in cards() if number and number in _numbers(card)]
    is_size_too = found and 0 < len(number) < 4
    if len(found) > 1 or is_size_too:
        names = [f"{number}GiB"] * bool(is_size_too) + [str(card["names"][0]) for card in found]
        raise UsageError(f"several are called '{name}'", key=flag, todo=f"write {' or '.join(names)}")
    return found[0] if found else None


def _numbers(card: JsonObject) -> list[str]:
    """`4070` of RTX-4070-Laptop."""
    return re.split(r"[^0-9]+", card["names"][0])


def nearest_cards(text: str, count: int = 3) -> list[str]:
    """Names of the cards whose names look most like a text, best first; empty where none does."""
    key, by_key = _key(text), {key: str(card["names"][0]) for card in cards() for key in _keys(card)}
    close = nearest(key, by_key, 2 * count) if key else []
    if not close and re.match(r"[0-9]{4}", key):  # of 1660 no more than 60 is to be found elsewhere: the same class
        close = [other for other in by_key if re.match(r"[0-9]{4}", other) and other[2:] == key[2:]]
    return list(dict.fromkeys(by_key[other] for other in close))[:count]


def usable_bytes(card: JsonObject) -> int:
    """What torch reports for a card where that is known, else what its label says."""
    return round(float(card.get("torch_gib") or card["label_gib"]) * 2**30)


def capability_of(card: JsonObject) -> tuple[int, int]:
    """Its CUDA compute capability, as torch reports it (of AMD's too)."""
    major, minor = map(int, card["capability"].split("."))
    return major, minor


def card_lines() -> list[str]:
    """Every card for people, least memory first: its name, what its label says and what of that a run can use."""
    by_memory = sorted(cards(), key=lambda card: (usable_bytes(card), card["names"][0]))
    lines = ["card                   memory   usable  TFLOP/s in 16 bits"]
    for card in by_memory:
        usable = f"{usable_bytes(card) / 2**30:.4g} GiB"
        lines.append(f"{card['names'][0]:<21} {card['label_gib']:>4} GB {usable:>9} {card['peak_tflops']:>8}")
    return lines


def smallest_card(needed_bytes: int, headroom: float) -> JsonObject | None:
    """The card with the least memory, and of those the slowest, that has so many bytes and its headroom besides."""
    enough = [card for card in cards() if needed_bytes <= usable_bytes(card) * (1.0 - headroom)]
    return min(enough, key=lambda card: (card["label_gib"], card["peak_tflops"]), default=None)


def _keys(card: JsonObject) -> set[str]:
    return {_key(name) for name in (*card["names"], card["file"])}


def _key(name: str) -> str:
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return _MAKERS.sub("", letters).removesuffix("gpu").replace("mobile", "laptop")
