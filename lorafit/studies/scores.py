"""What a run scored of each test row, kept as sums: the rows are scored once, and compared as often as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorafit.evaluation.rows import Row
from lorafit.evaluation.statistics import Floats
from lorafit.files.atomic import FORMAT, read_object, write_json
from lorafit.kinds.metrics import metrics


def keep_scores(file: Path, rows: Sequence[Row], metric_names: Sequence[str]) -> None:
    """Writes the sums that each metric takes of each row that it can score.

    Args:
        file: Where to.
        rows: Of an evaluation: base and tuned model on the same rows.
        metric_names: Registered metrics.
    """
    held = {}
    for name in dict.fromkeys(metric_names):
        metric = metrics.get(name)
        read = [row.asked_for(metric.needs) for row in rows]
        usable = [n for n, row in enumerate(read) if metric.usable(row.base) and metric.usable(row.tuned)]
        held[name] = {
            "rows": usable,
            "tuned": metric.row_sums([read[n].tuned for n in usable]) if usable else [],
            "base": metric.row_sums([read[n].base for n in usable]) if usable else [],
        }
    write_json(file, {"format": FORMAT, "rows": [[row.file, row.line] for row in rows], "metrics": held})


def read_scores(files: Sequence[Path], metric_name: str, side: str) -> list[Floats]:
    """A metric's sums of several runs, `[rows, k]` each, over the rows that all of them could score, in one order.

    Args:
        files: What `keep_scores` wrote.
        metric_name: The metric.
        side: `tuned` or `base`.
    """
    found = []
    for file in files:
        held = read_object(file)
        of_metric = held["metrics"][metric_name]
        places = (tuple(held["rows"][number]) for number in of_metric["rows"])
        found.append(dict(zip(places, of_metric[side], strict=True)))
    shared = sorted(set.intersection(*(set(sums) for sums in found)))
    return [np.asarray([sums[place] for place in shared], dtype=np.float64) for sums in found]


def scored_metrics(files: Sequence[Path]) -> list[str]:
    """The metrics that every one of several runs was scored by, in order."""
    held = [read_object(file)["metrics"] for file in files]
    return [name for name in held[0] if all(name in others for others in held)]
