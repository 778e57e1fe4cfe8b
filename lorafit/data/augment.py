"""Changed copies of training rows: other phrasings of what asks, and noise on its words.

    row by fields ──> the row as it is, copy 1, copy 2, ... ──format──> samples ──> prepared rows

What a copy holds is a function of (seed, source, line, copy, field) alone. Fields that are learnt, or that say what is
to be learnt, are never changed: a format says which may be (`Format.rewordable`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import RecipeError
from lorafit.kinds.formats import formats
from lorafit.recipe.augment_section import AugmentedFieldSection, AugmentSection

_SHORTEST_WORD = 4  # in which letters are exchanged: the first and the last one stay
_WORD = re.compile(r"(\s*)(\S+)")


@dataclass(frozen=True, slots=True)
class Augmenter:
    """Makes copies as a recipe says.

    Attributes:
        section: What to change.
        seed: The recipe's.
    """

    section: AugmentSection
    seed: int

    def check(self, named: Collection[str]) -> None:
        """Looks whether formats of these names have the fields.

        Raises:
            RecipeError: None has one of them, or what it holds carries loss or a label.
        """
        may_be = sorted({field for name in named for field in formats.get(name).rewordable})
        for field in self.section.fields:
            if field.field not in may_be:
                rows = f"rows of format {' and '.join(sorted(named))}"
                todo = f"fields are {', '.join(may_be)}" if may_be else "leave data.augment out"
                what = f"'{field.field}' of {rows} is no text that may be reworded"
                raise RecipeError(what, key="data.augment.fields", todo=todo)

    def copies(self, source: int, line: int, row: JsonMapping, may_be: Collection[str]) -> Iterator[JsonObject]:
        """The copies of a row; of one that has none of the fields there are none.

        Args:
            source: Number of its source.
            line: Its line there.
            row: By the fields of its format.
            may_be: Which of them may be changed.
        """
        fields = [each for each in self.section.fields if each.field in may_be]
        fields = [each for each in fields if isinstance(text := row.get(each.field), str) and text.strip()]
        for copy in range(1, self.section.copies + 1) if fields else ():
            changed = {}
            for each in fields:
                key = f"{self.seed} {source} {line} {each.field}"
                text = add_noise(row[each.field], each, Random(f"{key} {copy}"))
                if each.templates:
                    place = Random(key).randrange(len(each.templates)) + copy
                    template = each.templates[place % len(each.templates)]
                    text = template.replace(f"{{{each.field}}}", text)
                changed[each.field] = text
            yield {**row, **changed}


def add_noise(text: str, rates: AugmentedFieldSection, random: Random) -> str:
    """The text with letters exchanged in words, neighbouring words exchanged, and words left out, all but one at most.

    Source: Wei & Zou, "EDA: Easy Data Augmentation" (2019), random swap and deletion; Belinkov & Bisk, "Synthetic and
    natural noise both break neural machine translation" (2018), swap of letters.
    """
    found = _WORD.findall(text)
    if not found:
        return text
    words = [_exchange_letters(word, random) if random.random() < rates.typo else word for _, word in found]
    for place in range(len(words) - 1):
        if random.random() < rates.swap:
            words[place], words[place + 1] = words[place + 1], words[place]
    kept: Sequence[int] = [place for place in range(len(words)) if random.random() >= rates.drop]
    kept = kept or [random.randrange(len(words))]
    gaps = [found[0][0], *(found[place][0] for place in kept[1:])]
    return "".join(f"{gap}{words[place]}" for gap, place in zip(gaps, kept, strict=True)) + text[len(text.rstrip()) :]


def _exchange_letters(word: str, random: Random) -> str:
    """The word with two neighbours inside of it exchanged."""
    if len(word) < _SHORTEST_WORD:
        return word
    place = random.randrange(1, len(word) - 2)
    return f"{word[:place]}{word[place + 1]}{word[place]}{word[place + 2 :]}"
