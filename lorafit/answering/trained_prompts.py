"""What an adapter's training rows asked: as its run has kept it, or drawn again from rows that have not changed."""

from __future__ import annotations

from pathlib import Path

from lorafit.contracts import Reporter, Silent
from lorafit.errors import LorafitError, ModelError
from lorafit.files.atomic import read_object
from lorafit.files.rundir import RunDir
from lorafit.job import open_job
from lorafit.machine.devices import read_device
from lorafit.run.workspace import is_lone_adapter, open_run, recorded_start


def read_prompts(folder: Path, reporter: Reporter, *, draws: bool = True) -> list[str]:
    """The prompts of an adapter's folder or run.

    An adapter that lies in no run may have a copy of the run's prompts.json beside it.

    Args:
        folder: It.
        reporter: Told what is read.
        draws: Whether rows may be read again, for which files that a recipe names are opened, and the hub is asked.

    Raises:
        ModelError: There are none, or they cannot be had any more.
    """
    lone = is_lone_adapter(folder)
    file = folder / RunDir(folder).prompts.name if lone else open_run(folder).run.prompts
    if not file.is_file():
        if not lone and draws:
            return _draw_again(folder, reporter)
        todo = f"put {file.name} of its run beside it, or serve the run"
        what = f"has no training prompts, since {'it lies in no run' if lone else 'an earlier lorafit trained it'}"
        raise ModelError(what, file=str(folder), todo=todo if lone else "start the server with it, or train again")
    prompts = read_object(file).get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(text, str) and text.strip() for text in prompts):
        raise ModelError("holds no list of prompts", file=str(file), key="prompts", todo="restore the file")
    if not prompts:
        raise ModelError("holds no prompt: no row asks anything", file=str(file), todo="name the adapter in requests")
    return prompts


def _draw_again(folder: Path, reporter: Reporter) -> list[str]:
    """Those of a run of an earlier lorafit, which kept none. Raises ModelError where its rows are not as they were."""
    opened = open_run(folder)
    todo = "put the rows back as they were, or train again"
    reporter.info(f"{opened.run.root}: has no {opened.run.prompts.name}; its rows are read again")
    try:
        job = open_job(opened.loaded, Silent(), *recorded_start(opened.run), device=read_device("cpu"))
    except LorafitError as error:
        what = f"has no training prompts, and its rows cannot be read: {error.what}"
        raise ModelError(what, file=str(opened.run.root), todo=todo) from error
    if job.rows.digest != opened.manifest.get("data"):
        what = "has no training prompts, and its rows are others than it was trained on"
        raise ModelError(what, file=str(opened.run.root), todo=todo)
    found = job.prompts()
    if found is None:
        raise ModelError("its rows ask nothing", file=str(opened.run.root), todo="name the adapter in requests")
    return list(found["prompts"])
