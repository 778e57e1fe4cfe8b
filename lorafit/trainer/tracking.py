"""accelerate's Accelerator and its trackers, as a recipe asks for them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lorafit.errors import DataError, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from lorafit.contracts import Reporter

_PARTING_SECONDS = 0.5


def build_accelerator(*, use_cpu: bool, tracking: Sequence[str] = (), folder: Path | None = None) -> Any:
    """An Accelerator without mixed precision and without accumulation: the loop does both itself.

    Args:
        use_cpu: Train on the CPU although there is a GPU.
        tracking: Trackers by accelerate's names.
        folder: Where trackers that write files put them: the run folder. None where there are none.

    Raises:
        RecipeError: A tracker is not installed.
    """
    for name in tracking:
        if find_spec(name) is None:
            raise RecipeError(
                f"{name} is not installed", key="tracking", todo=f'install it with: pip install "lorafit[{name}]"'
            )
    from accelerate import Accelerator

    return Accelerator(
        cpu=use_cpu, mixed_precision="no", log_with=list(tracking) or None, project_dir=str(folder or ".")
    )


def check_same_rows(accelerator: Any, digest: str) -> None:
    """Refuses to train where the processes of a run hold different rows: a file differs between machines, or a template
    writes the date and it turned while they started.

    Args:
        accelerator: From `build_accelerator`.
        digest: Of this process's rows, in hex.

    Raises:
        DataError: In every process.
    """
    if accelerator.num_processes == 1:
        return
    import torch

    own = torch.tensor([int(digest[:15], 16)], dtype=torch.int64, device=accelerator.device)
    if len(set(accelerator.gather(own).tolist())) > 1:
        raise DataError(
            f"the {accelerator.num_processes} processes prepared different rows",
            key="data",
            todo="give each the same files; where the template writes the date and it just turned, start again",
        )


def part(accelerator: Any) -> None:
    """The last word between several ranks, before anything of their process group is dropped.

    gloo's threads drop a finished collective a moment after it returned, and need the interpreter's lock to do so; a
    group that is destroyed in that moment waits for its threads with the lock in hand, for ever.
    """
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        time.sleep(_PARTING_SECONDS)


class Trackers:
    """Hands each line of metrics.jsonl to accelerate's trackers. One that fails is said once; training goes on."""

    def __init__(self, accelerator: Any, reporter: Reporter) -> None:
        self._accelerator = accelerator
        self._reporter = reporter
        self._said = False

    def start(self, project: str, config: Mapping[str, Any]) -> None:
        """Opens them. Only plain values of `config` are handed over, by dotted key: not every tracker takes more."""
        self._guarded(lambda: self._accelerator.init_trackers(project, config=_flat(config)))

    def log(self, line: Mapping[str, Any]) -> None:
        """One line."""
        prefix, values = ("evaluation/", line["evaluation"]) if "evaluation" in line else ("train/", line)
        shown = {prefix + name: value for name, value in values.items() if value is not None and name != "step"}
        self._guarded(lambda: self._accelerator.log(shown, step=line["step"]))

    def finish(self) -> None:
        """Closes them."""
        self._guarded(self._accelerator.end_training)

    def _guarded(self, call: Any) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker raises, the run is worth more
            if not self._said:
                self._reporter.warn(f"a tracker failed ({type(error).__name__}: {error}); training goes on without it")
                self._said = True


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return found
