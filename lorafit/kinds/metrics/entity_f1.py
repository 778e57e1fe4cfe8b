"""F1 of entities: one counts as found where its first word, its last word and its type are all right.

Over all entities of all rows, as in seqeval's `f1_score` (micro average) and the CoNLL shared tasks.

Source: Tjong Kim Sang and De Meulder 2003, Introduction to the CoNLL-2003 Shared Task (https://aclanthology.org/W03-0419).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorafit.kinds.metrics import RowScore, ScoreMean, metrics


@metrics.register("entity_f1")
class EntityF1(ScoreMean):
    """F1 = 2 right / (given + wanted), with precision and recall."""

    reads: tuple[str, ...] = ("entities", "weight", "entity_types")
    condition = "labels that tell of entities, such as O, B-PER and I-PER"
    better: Literal["lower", "higher"] = "higher"
    percent = True
    settings = "entities whose words and type are right, micro average, as seqeval"

    def row_sums(self, rows: Sequence[RowScore]) -> list[list[float]]:
        """Entities that are right, those that the model gives, those of the row; over all types."""
        return [[sum(row.sums["entities"][part::3]) for part in range(3)] for row in rows]

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """All three; 0 where nothing is given or wanted."""
        right, given, wanted = sums
        return {
            "entity_f1": 2 * right / max(1.0, given + wanted),
            "precision": right / max(1.0, given),
            "recall": right / max(1.0, wanted),
        }
