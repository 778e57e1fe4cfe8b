"""Share of labelled words whose label is right."""

from __future__ import annotations

from lorafit.kinds.metrics import ScoreMean, metrics


@metrics.register("word_accuracy")
class WordAccuracy(ScoreMean):
    """Words that belong to no entity count too, and are most of a text: see entity_f1 beside it."""

    name = "word_accuracy"
    reads = ("right_words", "weight")
    condition = "a row with labelled words"
    better = "higher"
    percent = True
    settings = "labelled words whose label is right"
