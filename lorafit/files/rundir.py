"""Every path in a run folder.

runs/NAME/
  manifest.json  recipe.yaml  card.json  plan.json  metrics.jsonl  best.json  report.json  report.md
  checkpoints/step-000100/{adapter/, optimizer.safetensors, state.json, ..., MANIFEST}
  adapter/                                    PEFT layout, loadable by PEFT and vLLM
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lorafit.errors import CheckpointError, UsageError
from lorafit.files.atomic import check_manifest, read_object

_STEP = re.compile(r"^step-(\d{6,})$")
_STEP_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class _Inside:
    """A path in a run folder, as an attribute of the run."""

    name: str

    def __get__(self, run: RunDir, _: type[RunDir]) -> Path:
        return run.root / self.name


@dataclass(frozen=True)
class RunDir:
    """The paths of one run. Makes nothing by itself."""

    root: Path

    manifest = _Inside("manifest.json")
    """Versions, seed, and hashes of data, base and template; written at the start."""
    recipe = _Inside("recipe.yaml")
    """The recipe as it was used, with paths relative to the run folder."""
    card = _Inside("card.json")
    """What whoever answers, merges or evaluates must know of the run (`lorafit.run.card`)."""
    comparison = _Inside("comparison.json")
    """Tokens of a few rows, on which a merge is compared with the adapter it came from."""
    prompts = _Inside("prompts.json")
    """What a few hundred of the training rows ask, by which a server picks an adapter and sees drift."""
    base_head = _Inside("base_head.safetensors")
    """What an evaluation fitted to a base whose head was only drawn."""
    data = _Inside("data.json")
    """What became of the rows: counts by source, rows skipped and cut, overlaps, contradictions, warnings."""
    plan = _Inside("plan.json")
    """The resolved plan."""
    result = _Inside("result.json")
    """How training ended: steps, best evaluation, time, memory as estimated and as measured."""
    profile = _Inside("profile.txt")
    """Where the steps' time went, as a table."""
    trace = _Inside("trace.json.gz")
    """Every operation of a few steps, for a trace viewer."""
    quantization = _Inside("quantization.json")
    """Hashes of every packed base tensor, so that a merge can prove that it rebuilt the same base."""
    sensitivity = _Inside("sensitivity.json")
    """What each kind would change the loss by, and the kind that was chosen, linear by linear."""
    curriculum = _Inside("curriculum.safetensors")
    """How hard each training row is, by which a curriculum orders them."""
    base = _Inside("base.json")
    """Hashes of all bytes of the base's tensors, so that a resume can prove that it goes on with the same base."""
    metrics = _Inside("metrics.jsonl")
    """One JSON object a step and one an evaluation."""
    best = _Inside("best.json")
    """Which checkpoint is best, by which metric."""
    adapter = _Inside("adapter")
    """The trained adapter in PEFT's layout."""
    first_adapter = _Inside("first-adapter")
    """The adapter as it was before the first step, of a run whose task refers to one that is not the base."""
    checkpoints = _Inside("checkpoints")
    """The folder of checkpoints."""

    def checkpoint(self, step: int) -> Path:
        """The checkpoint at the edge behind optimizer step `step`."""
        return self.checkpoints / f"step-{step:06d}"

    def report(self, suffix: str, name: str = "report") -> Path:
        """`report.json`, `report.md` or `report.jsonl`; or those of an evaluation with a name of its own."""
        return self.root / f"{name}.{suffix}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, valid or not, in order."""
        if not self.checkpoints.is_dir():
            return []
        found = (_STEP.match(p.name) for p in self.checkpoints.iterdir() if p.is_dir())
        return sorted(int(m.group(1)) for m in found if m)

    def best_step(self) -> int | None:
        """Step of the best checkpoint; None where no metric selects one."""
        if not self.best.is_file():
            return None
        step = read_object(self.best).get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise CheckpointError(
                f"{step!r} is no step", file=str(self.best), key="step", todo="name a step with --checkpoint"
            )
        return step

    def find_checkpoint(self, which: str) -> Path:
        """The checkpoint folder for `best`, `last` or a step's number, checked against its MANIFEST.

        Raises:
            CheckpointError: There is none, or it is not whole.
        """
        steps = self.steps()
        listed = f"there are steps {', '.join(map(str, steps))}" if steps else "there are none"
        if which == "best":
            best = self.best_step()
            if best is None:
                raise CheckpointError(
                    "no metric selected a best checkpoint", file=str(self.root), todo="use --checkpoint last"
                )
            which = str(best)
        if which == "last":
            for step in reversed(steps):
                if check_manifest(self.checkpoint(step)) is None:
                    return self.checkpoint(step)
            raise CheckpointError("no usable checkpoint", file=str(self.root), todo=listed)
        if not _STEP_NUMBER.fullmatch(which):
            raise UsageError(f"'{which}' is not best, last or a step", key="--checkpoint", todo=listed)
        folder = self.checkpoint(int(which))
        reason = check_manifest(folder) if folder.is_dir() else "no such checkpoint"
        if reason is not None:
            raise CheckpointError(f"step {which}: {reason}", file=str(folder), todo=listed)
        return folder
