"""Run folders from the outside: who may write where, what a run is made of, and how a finished one is opened again."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import CheckpointError, UsageError
from lorafit.rundir import RunDir, read_json, write_json

if TYPE_CHECKING:
    from lorafit.recipe.load import LoadedRecipe

LONGEST_NAME_BYTES = 255
_RECORDED = ("lorafit", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors")


@dataclass(frozen=True)
class OpenedRun:
    """A run folder with the recipe it was made from."""

    loaded: LoadedRecipe
    run: RunDir
    manifest: dict[str, Any]

    def adapter(self, checkpoint: str | None) -> tuple[Path, int | None]:
        """The adapter's folder, and its step: the saved one, or that of a checkpoint.

        Raises:
            CheckpointError: There is none, or it is not whole.
        """
        if checkpoint is not None:
            folder = self.run.find_checkpoint(checkpoint)
            return folder / "adapter", int(folder.name.removeprefix("step-"))
        if not self.run.adapter.is_dir():
            steps = self.run.steps()
            todo = f"name one of its checkpoints with --checkpoint: {', '.join(map(str, steps))}" if steps else "train first"
            raise CheckpointError("the run has no finished adapter", file=str(self.run.root), todo=todo)
        best = self.run.best_step()
        return self.run.adapter, best if best is not None else max(self.run.steps(), default=None)


def is_run(path: Path) -> bool:
    """Whether a folder is a run folder."""
    return RunDir(path).manifest.is_file() and RunDir(path).recipe.is_file()


def open_run(path: Path, overrides: Sequence[str] = ()) -> OpenedRun:
    """A run from its folder, or from the recipe that made it.

    Raises:
        UsageError: There is nothing at `path`.
        CheckpointError: The folder holds no run.
    """
    from lorafit.recipe.load import load_recipe

    if path.is_dir():
        run = RunDir(path)
        if not is_run(path):
            raise CheckpointError("is no run folder (no manifest.json)", file=str(path), todo="name a run folder or a recipe")
        loaded = load_recipe(run.recipe, overrides)
    else:
        loaded = load_recipe(path, overrides)
        run = RunDir(loaded.output)
        if not is_run(run.root):
            raise CheckpointError(
                "the recipe has no run yet", file=str(run.root), todo=f"train first: lorafit train {path}"
            )
    return OpenedRun(loaded, run, read_json(run.manifest))


def check_output(output: Path, inputs: Iterable[Path], *, shown: str) -> None:
    """Refuses an output folder that cannot be written, has too long a name, or would hold one of the inputs.

    Raises:
        UsageError: As said; nothing was created.
    """
    for part in output.parts:
        if len(os.fsencode(part)) > LONGEST_NAME_BYTES:
            raise UsageError(f"name too long: '{part[:40]}…'", key="output", todo=f"{LONGEST_NAME_BYTES} bytes at most")
    made = output.resolve()
    for entry in inputs:
        source = entry.resolve()
        if made == source or made in source.parents:
            what = f"the output {shown} is, or holds, {entry.name}, which is also an input"
            raise UsageError(what, key="output", todo="choose a folder of its own")
    if output.exists() and not output.is_dir():
        raise UsageError(f"the output {shown} is a file", key="output", todo="choose a folder")
    parent = made
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"the output {shown} is not writable", file=str(parent), key="output", todo="choose another folder")


def check_unused(run: RunDir, *, command: str) -> None:
    """Refuses a run folder that holds a started run already: only `--resume` goes on there.

    Raises:
        UsageError: It does.
    """
    if run.steps() or run.adapter.exists():
        raise UsageError(
            "holds a run already", file=str(run.root), key="output", todo=f"go on with {command} --resume, or give --output"
        )


def write_manifest(run: RunDir, facts: dict[str, Any]) -> None:
    """Writes what the run is made of, at its start: versions, seed, and hashes of data, base, tokenizer and template."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    write_json(run.manifest, {"format": 1, "versions": versions, **facts})
