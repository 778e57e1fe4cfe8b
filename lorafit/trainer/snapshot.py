"""Everything that a run trains, written into a checkpoint and taken back: adapter, optimizer, loss scale, hook."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lorafit.files.atomic import FORMAT
from lorafit.trainer.checkpoint import ADAPTER_FOLDER, STATE_FILE, Checkpoint, Environment
from lorafit.trainer.optimizer_state import load_optimizer, save_optimizer

if TYPE_CHECKING:
    from pathlib import Path

    from lorafit.plan import ResolvedPlan
    from lorafit.trainer.state import TrainState
    from lorafit.trainer.step import Update


@dataclass(frozen=True)
class Snapshot:
    """The trained state of one run.

    Attributes:
        update: Optimizer, loss scale and hook.
        save_adapter: Writes the adapter in PEFT's layout into a folder.
        load_adapter: Takes it back from there.
        resolved: The values that the run is trained with.
        environment: Where that happens.
    """

    update: Update
    save_adapter: Callable[[Path], None]
    load_adapter: Callable[[Path], None]
    resolved: ResolvedPlan
    environment: Environment

    def write(self, folder: Path, state: TrainState) -> None:
        """Writes all of it into an empty folder, `state` with the loss scale and the hook's state in it."""
        hook = self.update.hook
        state.hooks = [dict(hook.state_dict())] if hook is not None else []
        state.scaler = dict(self.update.scaler.state_dict())
        self.save_adapter(folder / ADAPTER_FOLDER)
        save_optimizer(folder, self.update.optimizer, dict(self.update.named))
        values = {
            "format": FORMAT,
            "train": state.to_json(),
            "resolved": self.resolved.to_json(),
            "environment": asdict(self.environment),
        }
        (folder / STATE_FILE).write_text(json.dumps(values, allow_nan=False) + "\n", encoding="utf-8")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes all of it back."""
        self.load_adapter(checkpoint.adapter)
        load_optimizer(checkpoint.folder, self.update.optimizer, dict(self.update.named))
        for hook, saved in zip([self.update.hook] if self.update.hook else [], checkpoint.state.hooks, strict=True):
            hook.load_state_dict(saved)
        if checkpoint.state.scaler:
            self.update.scaler.load_state_dict(checkpoint.state.scaler)
