"""What a step reads out of a tensor: on a card the host waits for it, so it is read once a step, whatever the cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorafit.trainer.state import TrainState
from tests.support.tiny_run import Job


class Reads(TorchDispatchMode):
    """Counts numbers that are read out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def test_a_step_of_many_micro_batches_reads_its_norm_and_nothing_else(tmp_path: Path) -> None:
    job = Job(tmp_path, budget=64, optimizer={"kind": "sgd"})
    trainer, state = job.trainer(), TrainState()
    assert len(trainer.build_micro_batches(1, 64)) > 4
    trainer.executor.objective.train()
    with trainer.feed, trainer.journal.tracking(8, 0, trainer.executor.device), Reads() as reads:
        trainer._take_step(state)
        trainer._take_step(state)
    assert state.step == 2
    assert reads.count == 2
    assert [line["grad_norm"] > 0 for line in job.lines()] == [True, True]
