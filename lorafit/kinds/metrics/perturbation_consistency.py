"""Whether a question that is written carelessly gets the same answer. Perturbations are no paraphrases.

Each keeps the meaning and changes the surface of the user's last words; which letters is a function of these words:

    small letters    all of them small
    capitals         ALL OF THEM CAPITALS
    blanks           doubled, and one before and behind
    typing errors    two neighbouring letters changed places in every fifth word of four letters and more, at least one
    other end mark   without the mark of its last sentence, or with a full stop where it has none
    greeting         behind "Hello! ", which is English

Where letters decide the answer (code, names, capitals that are asked about) a change of the answer can be right.

Source: invariance tests, Ribeiro et al. (2020), "Beyond Accuracy: Behavioral Testing of NLP Models with CheckList";
typing errors, case and blanks, Liang et al. (2022), "Holistic Evaluation of Language Models", on robustness; Zhu
et al. (2023), "PromptBench: Towards Evaluating the Robustness of Large Language Models on Adversarial Prompts".
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

from lorafit.kinds.metrics import Question, RowScore, metrics
from lorafit.kinds.metrics._consistency import Consistency

_WORD = re.compile(r"[^\W\d_]{4,}")
_WORDS_AN_ERROR = 5


def with_typing_errors(text: str) -> str:
    """Neighbouring letters inside some words changed places; the same ones whenever the text is the same."""
    draw = random.Random(text)
    words = [match for match in _WORD.finditer(text) if _places(match[0])]
    letters = list(text)
    for match in draw.sample(words, max(1, len(words) // _WORDS_AN_ERROR)) if words else ():
        place = match.start() + draw.choice(_places(match[0]))
        letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return "".join(letters)


def _places(word: str) -> list[int]:
    """Places inside a word, its first letter left alone, whose letter differs from the next one."""
    return [place for place in range(1, len(word) - 1) if word[place] != word[place + 1]]


def _other_end(text: str) -> str:
    kept = text.rstrip()
    bare = kept.rstrip(".!?\u3002\uff01\uff1f\u061f")
    return bare if bare != kept else f"{kept}."


PERTURBATIONS: Mapping[str, Callable[[str], str]] = {
    "small letters": str.lower,
    "capitals": str.upper,
    "blanks": lambda text: f" {text.replace(' ', '  ')} ",
    "typing errors": with_typing_errors,
    "other end mark": _other_end,
    "greeting": lambda text: f"Hello! {text}",
}


@metrics.register("perturbation_consistency")
class PerturbationConsistency(Consistency):
    """Over careless ways to write the row's words; one that changes nothing of them is left out."""

    name = "perturbation_consistency"
    same = "perturbation_same"
    beside = (same,)
    condition = "a row whose prompt ends in words of the user"

    def usable(self, row: RowScore) -> bool:
        """Rows that end in words of the user and got an answer."""
        return row.answer is not None and bool(row.prompt.strip())

    def questions(self, row: RowScore, draws: int) -> Sequence[Question]:
        """Each perturbation that changes the words."""
        changed = {name: perturb(row.prompt) for name, perturb in PERTURBATIONS.items()}
        return [Question(name, words) for name, words in changed.items() if words != row.prompt]
