"""accelerate's Accelerator, and the experiment trackers that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import RecipeError
from lorafit.ops.peak_memory import peak_memory_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from lorafit.contracts import Reporter


def build_accelerator(*, use_cpu: bool, tracking: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """An Accelerator without mixed precision and without accumulation: lorafit does both itself.

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
    place = str(folder or ".")
    trackers = [_build_board(place) if name == "tensorboard" else name for name in tracking]
    return Accelerator(cpu=use_cpu, mixed_precision="no", log_with=trackers or None, project_dir=place)


def _build_board(folder: str) -> Any:
    """accelerate's tracker for TensorBoard, in the folder's `tensorboard`, with the recipe as a text.

    accelerate would write the recipe as a run of its own, below, one for each resume.
    """
    from accelerate.tracking import TensorBoardTracker, on_main_process

    class Board(TensorBoardTracker):  # type: ignore[misc]
        @on_main_process  # type: ignore[untyped-decorator]
        def store_init_configuration(self, values: JsonMapping) -> None:
            lines = [f"    {name}: {value}" for name, value in values.items()]
            self.writer.add_text("recipe", "\n".join(lines), global_step=self.init_kwargs["purge_step"] - 1)

    return Board("tensorboard", folder)


class Trackers:
    """Hands each line of metrics.jsonl to accelerate's trackers. One that fails is said once; training goes on.

    Names are those of transformers' Trainer: `train/loss`, `train/learning_rate`, `train/grad_norm`, `train/epoch`,
    `train/global_step`, `eval/loss`; with `train/tokens_per_second` and `train/peak_memory_bytes`.
    """

    def __init__(self, accelerator: Accelerator, reporter: Reporter) -> None:
        self._accelerator = accelerator
        self._reporter = reporter
        self._said = False

    def start(self, project: str, config: JsonMapping, *, step: int = 0) -> None:
        """Opens them.

        Args:
            project: What trackers that know projects put the run into.
            config: Only plain values are handed over, by dotted key: not every tracker takes more.
            step: What a resumed run goes on behind. TensorBoard drops what it holds of later steps.
        """

        def open_all() -> None:
            for tracker in self._accelerator.log_with:
                if getattr(tracker, "name", "") == "tensorboard":
                    tracker.init_kwargs["purge_step"] = step + 1
            self._accelerator.init_trackers(project, config=_flat(config))

        self._guarded(open_all)

    def log(self, line: JsonMapping) -> None:
        """One line."""
        if "evaluation" in line:
            shown = {f"eval/{name}": value for name, value in line["evaluation"].items()}
        else:
            values = {name: value for name, value in line.items() if value is not None and name != "step"}
            shown = {f"train/{name}": value for name, value in {**values, "global_step": line["step"]}.items()}
            if line.get("seconds"):
                shown["train/tokens_per_second"] = line["tokens"] / line["seconds"]
            shown["train/peak_memory_bytes"] = peak_memory_bytes(self._accelerator.device)
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


def _flat(values: JsonMapping, prefix: str = "") -> JsonObject:
    found: JsonObject = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, int | float | str | bool) else str(value)
    return found
