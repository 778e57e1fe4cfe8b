"""Where results may be written: what stands in a folder is its user's, unless it is known as lorafit's own.

A folder to train into is new, or empty, or holds a run by its manifest.json; what systems leave everywhere
(`.DS_Store`, `lost+found`) counts for nothing. All of it is asked before anything is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorafit.console.wording import list_names
from lorafit.contracts import JsonObject
from lorafit.errors import LorafitError, UsageError
from lorafit.files.atomic import TEMPORARY_PREFIX, check_format, make_folder, read_object
from lorafit.files.rundir import RunDir
from lorafit.files.strict_json import JsonError, read_object_file
from lorafit.recipe.differences import tell_differences
from lorafit.recipe.load import LoadedRecipe
from lorafit.run.workspace import compare_recipes

LONGEST_NAME_BYTES = 255
_SYSTEMS_OWN = (".DS_Store", ".localized", ".directory", "Thumbs.db", "desktop.ini", "lost+found")
_SYSTEMS_PREFIXES = (".nfs", ".Trash", ".Spotlight-", ".fseventsd", TEMPORARY_PREFIX)
_RUN_KEYS = ("versions", "seed", "recipe", "data", "base")
_REPORT_KEYS = ("metrics", "signatures")


def check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Refuses an output folder that cannot be written, has too long a name, or would hold one of the inputs.

    Raises:
        UsageError: As said; nothing was created.
    """
    what, todo = _why_unusable(output, inputs) or ("", "")
    if what:
        raise UsageError(what, key="output", todo=todo)


def _why_unusable(output: Path, inputs: Iterable[Path]) -> tuple[str, str] | None:
    """What is wrong with an output folder, and what to do about it."""
    for part in output.parts:
        if len(os.fsencode(part)) > LONGEST_NAME_BYTES:
            return f"name too long: '{part[:40]}…'", f"{LONGEST_NAME_BYTES} bytes at most"
    try:
        made = output.resolve()
    except (OSError, RuntimeError):  # RuntimeError: what Python 3.11 and 3.12 call a loop
        return f"the output {output.name} goes through a loop of links", "choose another folder"
    if output.is_symlink() and not output.exists():
        return f"the output {output.name} is a broken link", "choose another folder, or mend the link"
    for entry in inputs:
        source = entry.resolve()
        if made == source:
            return f"the output {output.name or output} is also an input", "choose a folder of its own"
        if made in source.parents:
            what = f"the output {output.name or output} holds {entry.name}, which is also an input"
            return what, "choose a folder of its own"
    if output.exists() and not output.is_dir():
        return f"the output {output.name} is a file", "choose a folder"
    parent = next(folder for folder in (made, *made.parents) if folder.exists())
    if not parent.is_dir():
        return f"the output {output.name} would lie in {parent.name}, which is a file", "choose a folder"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"the output {output.name} is not writable: {parent}", "choose another folder"
    return None


def check_unused(run: RunDir, loaded: LoadedRecipe, *, command: str) -> None:
    """Refuses a run folder that holds a started run already; says whether `--resume` would go on there.

    Raises:
        UsageError: It does, or it holds what is no run's.
    """
    check_own(run)
    if not run.steps() and not run.adapter.exists():
        return
    decisive: list[str] = []
    with contextlib.suppress(LorafitError):  # where its recipe cannot be read, that is not what is asked
        decisive, _ = compare_recipes(run, loaded)
    is_python = command.startswith("lorafit.train(")
    elsewhere, again = ("give another output=", "resume=True") if is_python else ("give another --output", "--resume")
    what, todo = "holds a run already", f"go on with {command}, or {elsewhere}"
    if decisive:
        what = f"holds another run ({tell_differences(decisive)})"
        todo = f"{elsewhere}, or change it back and add {again}"
    elif _is_finished(run):
        what, todo = "holds this run, finished", f"score it with lorafit eval {run.root}, or {elsewhere}"
    raise UsageError(what, file=str(run.root), key="output", todo=todo)


def _is_finished(run: RunDir) -> bool:
    """Whether the run that was started last in the folder came to its end."""
    if not run.result.is_file() or not run.plan.is_file():
        return False
    try:
        result, planned = read_object(run.result), read_object(run.plan)["plan"]
        return bool(result["stopped_early"] or result["steps"] >= planned["total_steps"])
    except (LorafitError, KeyError, TypeError):  # a damaged run is not what is asked
        return False


def check_own(run: RunDir) -> None:
    """Refuses a folder to train into that holds anything of the user's instead of a run.

    Raises:
        UsageError: As said; nothing was created or changed.
        CheckpointError: It holds a run of another lorafit.
    """
    names = own_names(run.root)
    if _holds_run(run):
        names = [name for name in ("checkpoints", "adapter") if name in names and not (run.root / name).is_dir()]
    if names:
        what = f"the output is not empty, and {list_names(names)} is no run of lorafit's"
        raise UsageError(what, file=str(run.root), key="output", todo="choose a new or empty folder")


def check_reports(run: RunDir, name: str) -> None:
    """Raises UsageError where a report would take the place of a file that no evaluation wrote."""
    known = {
        "json": all(key in _read(run.report("json", name)) for key in _REPORT_KEYS),
        "md": _begins(run.report("md", name), b"# Evaluation"),
        "jsonl": _begins(run.report("jsonl", name), b'{"file": '),
    }
    for suffix, is_ours in known.items():
        file = run.report(suffix, name)
        if os.path.lexists(file) and not is_ours:
            raise UsageError(
                "would be written, and is no report of lorafit's", file=str(file), todo="move it to another place"
            )


def own_names(folder: Path) -> list[str]:
    """Names in a folder, if there is one, without what systems leave there and lorafit's own leftovers."""
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [name for name in found if name not in _SYSTEMS_OWN and not name.startswith(_SYSTEMS_PREFIXES)]


def _holds_run(run: RunDir) -> bool:
    manifest = _read(run.manifest)
    versions = manifest.get("versions")
    if not (all(key in manifest for key in _RUN_KEYS) and isinstance(versions, dict) and "lorafit" in versions):
        return False
    check_format(manifest, run.manifest)
    return True


def _read(file: Path) -> JsonObject:
    """The object in a JSON file; an empty one where the file is anything else."""
    try:
        return read_object_file(file)
    except (OSError, JsonError):
        return {}


def _begins(file: Path, start: bytes) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


@contextlib.contextmanager
def claimed(run: RunDir) -> Iterator[None]:
    """Keeps other processes from training into the folder meanwhile. What was made for it and stayed empty goes again.

    Raises:
        UsageError: Another process trains there.
    """
    made = [folder for folder in (run.root, *run.root.parents) if not folder.exists()]
    make_folder(run.root)
    descriptor = os.open(run.root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what, todo = "another process is training into it", "wait for its end, or give another --output"
            raise UsageError(what, file=str(run.root), key="output", todo=todo) from error
        except OSError:
            pass  # some network disks have no locks
        yield
    finally:
        os.close(descriptor)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
