"""What a task asks of the model before the first step: once for each row, kept, and found again by what decides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorafit.contracts import Batch, Column, Example, Silent, TaskRow
from lorafit.data.store import ExampleSet, StoreWriter, pack_chunk
from lorafit.evaluation.reference import add_reference
from lorafit.kinds.tasks import tasks
from lorafit.kinds.tasks.causal_lm import CausalLm, CausalLmSection


class Referring(CausalLm):
    """Next-token prediction that also asks each row's loss before the first step, and batches what it was told."""

    reference_columns = (Column("began", "<f8", 1),)
    asked = 0

    def refer(self, objective: Any, batch: Batch) -> Mapping[str, Any]:
        self.asked += len(batch.rows)
        return {"began": self.score(objective, batch)["loss"]}

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        batch = super().collate(rows, pad_id)
        began = [row[0].columns["began"][0] for row in rows if "began" in row[0].columns]
        return Batch({**batch.tensors, "began": torch.tensor(began)}, batch.weight, batch.rows, batch.tokens)


def store(folder: Path, count: int = 7) -> ExampleSet:
    folder.mkdir()
    columns = tasks.make("causal-lm").columns
    rows = []
    for number in range(count):
        ids = [1 + (7 * number + place) % 90 for place in range(4 + number)]
        trained = [int(place > 1) for place in range(len(ids))]
        rows.append((0, number + 1, TaskRow({"tokens": ids, "trained": trained}, len(ids), sum(trained), [], ids)))
    with StoreWriter(folder, columns) as writer:
        writer.write(pack_chunk(rows, columns))
    return ExampleSet(folder, columns, ["rows.jsonl"], [1.0])


def test_each_row_is_asked_once_and_the_column_is_kept(
    tmp_path: Path, tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    examples, task = store(tmp_path / "store"), Referring(CausalLmSection())
    objective = task.build_objective(tuned)

    def refer(**made_of: object) -> ExampleSet:
        return add_reference(objective, task, {"train": examples}, made_of, 0, Silent())["train"]

    found = refer(base="a")
    assert task.asked == len(examples)
    alone = [objective.score(task.collate([[examples[row]]], 0))["loss"][0] for row in range(len(examples))]
    assert np.allclose([found[row]["began"][0] for row in range(len(examples))], alone, rtol=1e-5)
    assert task.collate([[found[2]], [found[5]]], 0)["began"].tolist() == [found[2]["began"][0], found[5]["began"][0]]
    assert found.digest() == examples.digest()
    some = found.select(np.array([5, 2]))
    assert [row["began"][0] for row in (some[0], some[1])] == [found[2]["began"][0], found[5]["began"][0]]

    again = refer(base="a")
    assert task.asked == len(examples) and again[3]["began"][0] == found[3]["began"][0]
    refer(base="b")
    assert task.asked == 2 * len(examples)
    for file in (tmp_path / "cache" / "reference").glob("*.safetensors"):
        file.write_bytes(b"torn")
    refer(base="a")
    assert task.asked == 3 * len(examples)
