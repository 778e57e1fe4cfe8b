"""Checkpoints: safetensors and JSON, whole or not there.

checkpoints/step-000100/
  adapter/                  PEFT layout
  optimizer.safetensors     every moment, dtype exact          optimizer.json   what belongs to which parameter
  hooks.safetensors         tensors that step hooks keep, where they do
  state.json                {train, resolved, environment}     MANIFEST         sizes and hashes, written last

A `Snapshot` writes everything that a run trains and takes it back: adapter, optimizer, loss scale, hooks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from lorafit.console.wording import counted
from lorafit.contracts import JsonObject, Reporter
from lorafit.errors import CheckpointError, ResourceError
from lorafit.files.atomic import (
    FORMAT,
    MANIFEST,
    TEMPORARY_PREFIX,
    atomic_dir,
    check_format,
    check_manifest,
    read_object,
    write_json,
)
from lorafit.files.rundir import RunDir
from lorafit.files.strict_json import JsonError, read_object_file
from lorafit.machine.version import installed_versions
from lorafit.plan import ResolvedPlan
from lorafit.trainer.state import (
    Best,
    Count,
    Event,
    TrainState,
    load_hooks,
    load_optimizer,
    read_dataclass,
    save_hooks,
    save_optimizer,
)
from lorafit.trainer.step import Update

ADAPTER_FOLDER = "adapter"
STATE_FILE = "state.json"
_OTHER_STEP = "resume from another one with --resume-from STEP"
_MOST_THREADS = 4096
_DAMAGED_PREFIX, _SUPERSEDED_PREFIX = "damaged-", "superseded-"


@dataclass(frozen=True)
class Environment:
    """Where a run happens; what must be the same for a resume to be the same run bit for bit."""

    device_kind: str
    ranks: Count
    versions: Mapping[str, str]
    threads: Annotated[int, Field(ge=0, le=_MOST_THREADS)] = 0
    """torch's on a CPU, where sums depend on how they are split; 0 where an older run recorded none."""
    card: str = ""
    """Its name and capability, by which kernels are chosen; empty on a CPU, and where an older run recorded none."""
    kernels: str = ""
    """Liger's operations that are taken, with their versions; empty for lorafit's own."""

    @classmethod
    def here(cls, device_kind: str, ranks: int, card: str = "", kernels: str = "") -> Environment:
        """This process's."""
        return cls(device_kind, ranks, installed_versions(), torch.get_num_threads(), card, kernels)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, its tensors not read yet."""

    folder: Path
    state: TrainState
    resolved: JsonObject
    environment: Environment

    @property
    def adapter(self) -> Path:
        """Its adapter in PEFT's layout."""
        return self.folder / ADAPTER_FOLDER


class CheckpointStore:
    """The checkpoints of one run: finding, publishing and rotating them. Steps decide, never file times.

    Args:
        run: The run folder.
        keep_last: Newest checkpoints kept; the best one is kept beside them.
        reporter: Told what is skipped, and what cannot be removed.
        finish: Makes the run's adapter of a copy of a checkpoint's, in that folder.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        keep_last: int,
        reporter: Reporter,
        finish: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.run, self._finish = run, finish
        self._keep_last = keep_last
        self._reporter = reporter
        self._damaged: set[int] = set()
        self._is_described = False  # whether the run folder's manifest.json was seen: then it must stay

    def open(self, step: int | None = None) -> Checkpoint | None:
        """The newest whole checkpoint, or that of `step`; None where none was ever published.

        Raises:
            CheckpointError: `step` is damaged or missing, or there are checkpoints and none is whole.
        """
        for leftover in self._leftovers():
            self._reporter.info(f"ignored incomplete {leftover.name}, left by a run that was cut off")
        steps = self.run.steps()
        for found in steps:  # one of another lorafit is not damaged, and nothing goes on without it
            manifest = self.run.checkpoint(found) / MANIFEST
            check_format(_read_or_none(manifest) or {}, manifest)  # a damaged one is said where its files are compared
        if step is not None:
            return _read(self.run.find_checkpoint(str(step)))
        if not steps:
            self._reporter.info("no checkpoint was published yet: starting at step 0")
            return None
        reasons = []
        for position, newest in reversed(list(enumerate(steps))):
            folder = self.run.checkpoint(newest)
            reason = check_manifest(folder)
            if reason is None:
                return _read(folder)  # whole: what is wrong in it was written so, and nothing falls back behind that
            self._damaged.add(newest)
            reasons.append(f"{folder.name}: {reason}")
            if position:
                self._reporter.warn(
                    f"{folder.name} fails its checksum test ({reason}); falling back to step {steps[position - 1]}"
                )
        raise CheckpointError(
            f"no usable checkpoint; {reasons[0]}",
            file=str(self.run.checkpoints),
            todo="restore that folder from a copy, or train anew with another --output",
        )

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step that this run has saved. Raises CheckpointError where it is damaged or missing."""
        return _read(self.run.find_checkpoint(str(step)))

    def save(self, step: int, fill: Callable[[Path], None], *, best: Best | None) -> None:
        """Publishes the checkpoint of `step`, then which one is best, then removes those that are no longer kept.

        Raises:
            ResourceError: The disk is full or broken, or the run folder disappeared; older checkpoints are intact.
        """
        self._is_described = self._is_described or self.run.manifest.is_file()
        if not self.run.root.is_dir() or (self._is_described and not self.run.manifest.is_file()):
            raise ResourceError("the run folder disappeared", file=str(self.run.root), todo="train anew")
        folder = self.run.checkpoint(step)
        if step in self._damaged or (folder.exists() and check_manifest(folder, hashes=False) is not None):
            _move_aside(folder, _DAMAGED_PREFIX)
            self._damaged.discard(step)
        with atomic_dir(folder, replace=True) as temporary:
            fill(temporary)
        self.note_best(best)
        for leftover in self._leftovers():
            self._remove(leftover)
        self._rotate(best)

    def note_best(self, best: Best | None) -> None:
        """Writes best.json where it does not say so yet; without a best one there is none."""
        if best is None:
            self.run.best.unlink(missing_ok=True)
        elif _read_or_none(self.run.best) != asdict(best):
            write_json(self.run.best, asdict(best))

    def set_later_aside(self, step: int) -> None:
        """Renames whole checkpoints behind `step`: the run goes on from there, and their steps come again."""
        for later in self.run.steps():
            if later > step and later not in self._damaged:
                moved = _move_aside(self.run.checkpoint(later), _SUPERSEDED_PREFIX)
                self._reporter.info(f"going on from step {step}: {self.run.checkpoint(later).name} is now {moved.name}")

    def publish_adapter(self, step: int) -> None:
        """Makes the adapter of checkpoint `step` the run's, unless it is that already."""
        source = self.run.checkpoint(step) / ADAPTER_FOLDER
        if self.run.adapter.is_dir() and _same_files(source, self.run.adapter):
            return
        with atomic_dir(self.run.adapter, replace=True) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
            self._finish(temporary)

    def _rotate(self, best: Best | None) -> None:
        whole = [step for step in self.run.steps() if step not in self._damaged]
        kept = {*whole[-self._keep_last :], *([best.step] if best else [])}
        for step in whole:
            if step not in kept:
                self._remove(self.run.checkpoint(step))

    def _remove(self, folder: Path) -> None:
        """Out of sight first, so that a removal that is cut off leaves nothing that looks like a checkpoint."""
        try:
            if folder.name.startswith(TEMPORARY_PREFIX):
                doomed = folder
            else:
                doomed = folder.rename(folder.with_name(f"{TEMPORARY_PREFIX}old-{folder.name}"))
            shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
        except OSError as error:
            self._reporter.warn(f"could not remove {folder}: {error.strerror or error}; training goes on")

    def _leftovers(self) -> list[Path]:
        return sorted(self.run.checkpoints.glob(f"{TEMPORARY_PREFIX}*")) if self.run.checkpoints.is_dir() else []


def check_continuity(
    was: Environment, now: Environment, *, allow_inexact: bool, reporter: Reporter, where: str
) -> list[Event]:
    """Whether a run that was saved there goes on here as the same run; on a CPU with as many of torch's threads.

    Returns:
        Events to record in the training state: each difference that was warned about.

    Raises:
        CheckpointError: Another kind of device or another number of ranks, and `allow_inexact` is not set.
    """
    differences = []
    if was.device_kind != now.device_kind:
        differences.append(f"the device was {was.device_kind} and is {now.device_kind}")
    if was.ranks != now.ranks:
        differences.append(f"ranks were {was.ranks} and are {now.ranks}")
    if differences and not allow_inexact:
        raise CheckpointError(
            f"{' and '.join(differences)}: what follows would not be bitwise the same run",
            file=where,
            todo="resume where it was trained, or add --allow-inexact",
        )
    changed = [
        f"{name} was {was.versions[name]} and is {now.versions[name]}"
        for name in sorted(set(was.versions) & set(now.versions))
        if was.versions[name] != now.versions[name]
    ]
    if was.card and now.card not in ("", was.card):
        differences.append(f"the card was {was.card} and is {now.card}")
    if was.kernels != now.kernels:
        own = "lorafit's own"
        differences.append(f"the kernels were {was.kernels or own} and are {now.kernels or own}")
    if changed:
        differences.append(f"versions changed ({', '.join(changed)})")
    for difference in differences:
        reporter.warn(f"{difference}: the rest of the run is not guaranteed bitwise the same")
    events: list[Event] = [{"kind": "inexact_resume", "what": difference} for difference in differences]
    if now.device_kind == "cpu" and was.threads not in (0, now.threads):  # another number rounds sums another way
        torch.set_num_threads(was.threads)
        what = f"the run was begun with {counted(was.threads, 'thread')} and goes on so, where {now.threads} were set"
        reporter.warn(f"{what}: the same bits, at that number's speed; to use another one, train anew")
        events.append({"kind": "threads", "what": what})
    return events


def _read_or_none(file: Path) -> JsonObject | None:
    try:
        return read_object_file(file)
    except JsonError:
        return None


def _read(folder: Path) -> Checkpoint:
    file = folder / STATE_FILE
    values = read_object(file)
    try:
        state = TrainState.from_json(values["train"])
        environment = read_dataclass(Environment, values["environment"], "environment")
    except (KeyError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(what, file=str(file), todo=_OTHER_STEP) from error
    if state.step != int(folder.name.rpartition("-")[2]):
        raise CheckpointError(f"is of step {state.step}, its folder of another", file=str(file), todo=_OTHER_STEP)
    if not isinstance(values.get("resolved"), dict):
        raise CheckpointError("holds no resolved plan", file=str(file), key="resolved", todo=_OTHER_STEP)
    return Checkpoint(folder, state, values["resolved"], environment)


def _move_aside(folder: Path, prefix: str) -> Path:
    target, number = folder.with_name(prefix + folder.name), 2
    while target.exists():
        target, number = folder.with_name(f"{prefix}{folder.name}-{number}"), number + 1
    return folder.rename(target)


def _same_files(source: Path, target: Path) -> bool:
    names = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    pairs = ((source / name, target / name) for name in names)
    return all(new.is_file() and new.read_bytes() == old.read_bytes() for old, new in pairs)


@dataclass(frozen=True)
class Snapshot:
    """The trained state of one run.

    Attributes:
        update: Optimizer, loss scale and hooks.
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
        """Writes all of it into an empty folder, `state` with the loss scale and the hooks' states in it."""
        state.hooks = save_hooks(folder, self.update.hooks)
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

    def restore_weights(self, checkpoint: Checkpoint) -> None:
        """Takes adapter and optimizer back."""
        self.load_adapter(checkpoint.adapter)
        load_optimizer(checkpoint.folder, self.update.optimizer, dict(self.update.named))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes all of it back."""
        self.restore_weights(checkpoint)
        load_hooks(checkpoint.folder, self.update.hooks, checkpoint.state.hooks)
        if checkpoint.state.scaler:
            self.update.scaler.load_state_dict(checkpoint.state.scaler)
