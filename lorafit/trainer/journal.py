"""What is told of a run while it trains: metrics.jsonl, trackers, the bar, and what watches over a step.

metrics.jsonl holds a line a step and a line an evaluation, without gaps or doubles over resumes. Experiment trackers
that a recipe names are accelerate's, and made with its Accelerator.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, on_main_process

from lorafit.contracts import JsonMapping, JsonObject, Progress, Reporter
from lorafit.errors import RecipeError
from lorafit.files.atomic import atomic_file
from lorafit.ops.live_tensors import LivePeak, LiveTensors, watching
from lorafit.ops.process_memory import peak_memory_bytes
from lorafit.trainer.profile import NO_PROFILE, NoProfile
from lorafit.trainer.step import Update

_GIB = 2**30
_SMOOTHING = 0.9  # share of the old tokens/s in the shown one


class MetricsLog:
    """Appends JSON objects. A write that fails is said once and tried again with the next line; training goes on."""

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self._path = path
        self._reporter = reporter
        self._unwritten = ""
        self._said = False

    def rewind(self, *, step: int, evaluated_step: int) -> None:
        """Drops what lies behind the edge at `step`, and a torn last line."""
        if not self._path.is_file():
            return
        text = self._path.read_bytes().decode("utf-8", errors="replace")
        kept = [line for line in text.splitlines(keepends=True) if _is_before(line, step, evaluated_step)]
        if (wanted := "".join(kept)) != text:
            with atomic_file(self._path) as temporary:
                temporary.write_text(wanted, encoding="utf-8")

    def write(self, values: JsonMapping) -> None:
        """Appends one object; NaN and Infinity are refused."""
        self._unwritten += json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._append(self._unwritten.encode("utf-8"))
        except OSError as error:
            if not self._said:
                self._reporter.warn(f"log write failed once ({error}): {self._path}; training goes on, and tries again")
                self._said = True
        else:
            self._unwritten = ""

    def sync(self) -> None:
        """Makes what was written last through a power cut; before each checkpoint, which says that it is there."""
        if self._path.is_file():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def _append(self, data: bytes) -> None:
        if not self._path.parent.is_dir():
            raise FileNotFoundError("its folder disappeared")
        size = self._path.stat().st_size if self._path.is_file() else 0
        try:
            with self._path.open("ab", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError("only a part of a line was written")
        except OSError:
            if self._path.is_file():
                os.truncate(self._path, size)  # never half a line
            raise


def _is_before(line: str, step: int, evaluated_step: int) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        values = json.loads(line)
        return int(values["step"]) <= (evaluated_step if "evaluation" in values else step)
    except (ValueError, KeyError, TypeError):
        return False


@dataclass
class Journal:
    """Tells everybody who listens what a run does.

    Attributes:
        reporter: The console.
        log: metrics.jsonl.
        trackers: accelerate's; None: none.
        profile: Times the parts of a step.
        counts_memory: Live tensors are counted in every step, which makes each slower.
        estimate_bytes: Estimated peak memory, shown beside the measured one.
        live_peak: The worst moment of live tensors so far, where they are counted.
    """

    reporter: Reporter
    log: MetricsLog
    trackers: Trackers | None = None
    profile: NoProfile = NO_PROFILE
    counts_memory: bool = False
    estimate_bytes: int | None = None
    live_peak: LivePeak | None = field(default=None, init=False)
    _bar: Progress = field(init=False)
    _device: torch.device = field(init=False)
    _tokens_per_second: float | None = field(default=None, init=False)

    @contextlib.contextmanager
    def tracking(self, steps: int, done: int, device: torch.device) -> Iterator[None]:
        """The training bar: `training 12/240  loss 1.23  lr 1e-04  grad 0.5  812 tok/s  1.2 of 1.5 GiB`."""
        if 0 < done < steps:
            self.reporter.info(f"resumed at step {done}")
        self._device, self._tokens_per_second = device, None
        with self.reporter.track(steps, "training", done) as self._bar:
            yield

    @contextlib.contextmanager
    def watching(self, objective: torch.nn.Module, update: Update) -> Iterator[None]:
        """Around an optimizer step: profiles it, and keeps the worst moment of live tensors, where asked for."""
        live = LiveTensors() if self.counts_memory else None
        counting = watching(live, objective, update.optimizer, update.hooks) if live else contextlib.nullcontext()
        with self.profile.step(), counting:
            yield
        if live is not None and (self.live_peak is None or live.peak().tensor_bytes > self.live_peak.tensor_bytes):
            self.live_peak = live.peak()

    def write(self, values: JsonMapping) -> None:
        """Into metrics.jsonl, and to the trackers; of several ranks the first one writes."""
        self.log.write(values)
        if self.trackers is not None:
            self.trackers.log(values)

    def show(self, line: JsonMapping) -> None:
        """Takes a step's line of metrics.jsonl to the bar."""
        now = line["tokens"] / max(line["seconds"], 1e-9)
        before = self._tokens_per_second
        self._tokens_per_second = now if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * now
        memory = f"{peak_memory_bytes(self._device) / _GIB:.2f}"
        if self.estimate_bytes is not None:
            memory += f" of est. {self.estimate_bytes / _GIB:.2f}"
        self._bar.advance(
            1,
            loss=line["loss"],
            lr=line["learning_rate"],
            grad="overflow" if line["grad_norm"] is None else line["grad_norm"],
            **{"tok/s": f"{self._tokens_per_second:.0f}", "GiB": memory},
        )


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
    trackers = [_Board(name, place) if name == "tensorboard" else name for name in tracking]
    return Accelerator(cpu=use_cpu, mixed_precision="no", log_with=trackers or None, project_dir=place)


class _Board(TensorBoardTracker):  # type: ignore[misc]
    """accelerate's tracker for TensorBoard, with the recipe as a text.

    accelerate would write the recipe as a run of its own, below, one for each resume.
    """

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: JsonMapping) -> None:
        lines = [f"    {name}: {value}" for name, value in values.items()]
        self.writer.add_text("recipe", "\n".join(lines), global_step=self.init_kwargs["purge_step"] - 1)


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
        with self._guarded():
            for tracker in self._accelerator.log_with:
                if getattr(tracker, "name", "") == "tensorboard":
                    tracker.init_kwargs["purge_step"] = step + 1
            self._accelerator.init_trackers(project, config=_flat(config))

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
        with self._guarded():
            self._accelerator.log(shown, step=line["step"])

    def finish(self) -> None:
        """Closes them."""
        with self._guarded():
            self._accelerator.end_training()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
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
