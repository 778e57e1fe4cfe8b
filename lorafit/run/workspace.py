"""Run folders from the outside: who may write where, what a run is made of, and how a finished one is opened again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.console.nearest import nearest
from lorafit.contracts import JsonMapping, JsonObject, Reporter
from lorafit.data.chat.clock import find_moment
from lorafit.data.sources.files import find_files
from lorafit.errors import CheckpointError, DataError, UsageError
from lorafit.files.atomic import atomic_file, read_object, require_manifest, write_json
from lorafit.files.rundir import RunDir
from lorafit.kinds.metrics import metrics
from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.tasks import WRITES_NONE
from lorafit.machine.version import installed_versions
from lorafit.recipe.differences import ABSENT, differences, tell_differences
from lorafit.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from lorafit.recipe.schema import Recipe, sources_of
from lorafit.run.card import read_card

if TYPE_CHECKING:
    from lorafit.plan import ResolvedPlan


@dataclass(frozen=True)
class OpenedRun:
    """A run folder with the recipe it was made from; and the checkpoint, where a folder of one in it was named."""

    loaded: LoadedRecipe
    run: RunDir
    manifest: JsonObject
    checkpoint: str | None = None

    def began(self) -> datetime | None:
        """The moment that its chat template took for the present one; None where it does not ask for it."""
        return find_moment(self.manifest, self.run.manifest)

    def usual_split(self) -> str:
        """Which rows the run's own evaluation scores, whatever flags or edits say now."""
        return usual_split(load_recipe(self.run.recipe).recipe)

    def resolved(self) -> ResolvedPlan:
        """The values that the run was trained with."""
        from lorafit.plan import ResolvedPlan

        return ResolvedPlan.from_json(read_object(self.run.plan), str(self.run.plan))

    def trained_parameters(self) -> int | None:
        """How many parameters the run trained, which an adapter may hold more of; None where its plan does not say."""
        count: int | None = read_object(self.run.plan).get("plan", {}).get("trainable_parameters")
        return count

    def adapter(self, checkpoint: str | None) -> tuple[Path, int | None]:
        """The adapter's folder, and its step: the saved one, or that of a checkpoint (`best`, `last`, a step).

        Raises:
            CheckpointError: There is none, or it is not what its MANIFEST says.
        """
        checkpoint = checkpoint if checkpoint is not None else self.checkpoint
        if checkpoint is not None:
            folder = self.run.find_checkpoint(checkpoint)
            return folder / "adapter", int(folder.name.removeprefix("step-"))
        if not self.run.adapter.is_dir():
            raise self._unfinished()
        from lorafit.model.adapter import check_named_base

        check_named_base(self.run.adapter)
        require_manifest(self.run.adapter)
        best = self.run.best_step()
        return self.run.adapter, best if best is not None else max(self.run.steps(), default=None)

    def _unfinished(self) -> CheckpointError:
        """Why there is no saved adapter, and what there is instead."""
        what, ways = "the run has no finished adapter", [f"go on with it: lorafit train {self.run.recipe} --resume"]
        if is_trained_into(self.run):
            what, ways = f"{what}: a process is training into it now", ["wait for its end"]
        if steps := [step for step in self.run.steps() if step]:  # that of step 0 was not trained
            ways.append(f"name one of its checkpoints with --checkpoint: {', '.join(map(str, steps))}")
        return CheckpointError(what, file=str(self.run.root), todo=", or ".join(ways))


def recorded_start(run: RunDir) -> tuple[datetime | None, str | None]:
    """What a run that is to be resumed began with; None and None where nothing was started yet.

    Returns:
        The moment that its chat template took for the present one, where it asks for it; and the commit of a hub's
        model, whose branch may have moved on since.

    Raises:
        CheckpointError: manifest.json or card.json cannot be read.
    """
    if not is_run(run.root):
        return None, None
    commit = read_card(run.card).base.commit if run.card.is_file() else None
    return find_moment(read_object(run.manifest), run.manifest), commit


def chosen_linears(loaded: LoadedRecipe, run: RunDir | None, given: ResolvedPlan | None) -> Mapping[str, str]:
    """Kinds of linears by path that the recipe leaves open: those of a run that is resumed, else of a given plan.

    Raises:
        CheckpointError: The run's plan.json cannot be read.
    """
    if not quantizations.bind(loaded.recipe.model.quantization).candidates():
        return {}
    if run is not None and run.plan.exists():
        from lorafit.plan import ResolvedPlan

        given = ResolvedPlan.from_json(read_object(run.plan), str(run.plan))
    return {} if given is None else given.linears


def is_run(path: Path) -> bool:
    """Whether a folder is a run folder."""
    return RunDir(path).manifest.is_file() and RunDir(path).recipe.is_file()


def is_trained_into(run: RunDir) -> bool:
    """Whether a process holds the run folder to train into it, where the file system has locks."""
    try:
        descriptor = os.open(run.root, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def is_model(path: Path) -> bool:
    """Whether a folder holds a whole model, such as a merge, and is no run folder."""
    return path.is_dir() and not is_run(path) and os.path.lexists(path / "config.json")


def is_lone_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and lies in no run."""
    has_config = path.is_dir() and os.path.lexists(path / "adapter_config.json")
    return has_config and not is_run(path) and not is_run(_find_run_around(path)[0])


def open_run(path: Path, overrides: Sequence[str] = ()) -> OpenedRun:
    """A run from its folder, from the folder of its adapter or of a checkpoint, or from the recipe that made it.

    Raises:
        UsageError: There is nothing at `path`, or one file of a run, an adapter or a model.
        CheckpointError: The folder holds no run.
    """
    checkpoint = None
    if path.is_dir():
        folder, checkpoint = (path, None) if is_run(path) else _find_run_around(path)
        run = RunDir(folder)
        if not is_run(folder):
            todo = "name a run folder, its recipe or an adapter folder"
            raise CheckpointError("is no run folder (no manifest.json)", file=str(path), todo=todo)
        loaded = load_recipe(run.recipe, overrides, flags_from=Path())  # nobody wrote them beside that recipe
    elif path.suffix not in (".yaml", ".yml") and path.is_file() and (what := _what_holds(path.absolute().parent)):
        raise UsageError(
            f"is one file of {what}", file=str(path), todo=f"name the folder that it lies in: {path.parent}"
        )
    elif path.suffix not in (".yaml", ".yml") and path.is_file():
        todo = "name a run folder, its .yaml recipe or an adapter folder"
        raise UsageError("is no run, recipe or adapter", file=str(path), todo=todo)
    elif not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise _nothing_at(path)
    else:
        loaded = load_recipe(path, overrides)
        run = RunDir(loaded.output)
        if not is_run(run.root):
            raise CheckpointError(
                "the recipe has no run yet", file=str(run.root), todo=f"train first: lorafit train {path}"
            )
    return OpenedRun(loaded, run, read_object(run.manifest), checkpoint)


def check_answerable(path: Path, checkpoint: str | None) -> None:
    """Says before any library is loaded where a path is neither a model nor an adapter nor a run that has one.

    Raises:
        UsageError: There is nothing at the path, or a checkpoint is named of what has none.
        CheckpointError: It is no run, or has no such adapter.
    """
    if not is_model(path) and not is_lone_adapter(path):
        open_run(path).adapter(checkpoint)
    else:
        refuse_checkpoint(checkpoint)


def refuse_checkpoint(checkpoint: str | None) -> None:
    """Raises UsageError where a checkpoint is named of a model or an adapter alone."""
    if checkpoint is not None:
        raise UsageError("only a run has checkpoints", key="--checkpoint", todo="name a run folder, or leave it out")


def _nothing_at(path: Path) -> UsageError:
    """The error for a path where nothing is, with the run or model beside it that has the nearest name."""
    beside = path.absolute().parent
    names = [entry.name for entry in beside.iterdir()] if beside.is_dir() else []
    here = [name for name in names if any(is_it(beside / name) for is_it in (is_run, is_model, is_lone_adapter))]
    close = nearest(path.name, here, count=1)
    todo = f"did you mean {path.with_name(close[0])}?" if close else "name a run folder or its recipe; or train first"
    return UsageError("no such file or folder", file=str(path), todo=todo)


def _what_holds(folder: Path) -> str | None:
    """What a folder is of, in words; None where it is neither of a run nor an adapter nor a model."""
    if is_lone_adapter(folder):
        return "an adapter"
    if is_model(folder):
        return "a model"
    return "a run" if is_run(_find_run_around(folder)[0]) else None


def _find_run_around(path: Path) -> tuple[Path, str | None]:
    """The run that `RUN/adapter` or `RUN/checkpoints/step-N[/adapter]` lies in, and its step; else the path itself."""
    for folder in path.absolute().parents[:3]:
        inside = path.absolute().relative_to(folder).parts
        if is_run(folder) and inside == ("adapter",):
            return folder, None
        if is_run(folder) and inside[0] == "checkpoints" and len(inside) > 1 and inside[1].startswith("step-"):
            return folder, inside[1].removeprefix("step-").lstrip("0") or "0"
    return path, None


def usual_split(recipe: Recipe) -> str:
    """Which rows an evaluation scores where none are named."""
    return "test" if recipe.data.test is not None else "validation"


def inputs_of(loaded: LoadedRecipe) -> list[Path]:
    """Local files and folders that a run reads and must not write over.

    A run's own recipe.yaml is none for that run, which writes it itself: a run goes on by it as by the first recipe.
    """
    own = RunDir(loaded.output)
    is_own = is_run(own.root) and Path(loaded.file).resolve() == own.recipe.resolve()
    recipe, found = loaded.recipe, [] if is_own else [Path(loaded.file)]
    for source in (source for sources in sources_of(recipe).values() for source in sources):
        with contextlib.suppress(DataError):  # a pattern without files is said where rows are opened
            found += [loaded.path(name) for name in find_files(source.path, loaded.folder)]
    texts = [recipe.model.base, recipe.data.chat_template, recipe.adapter.init_from]
    found += [loaded.path(text) for text in texts if text]
    return [path for path in found if path.exists()]


def resume_command(recipe: Path | JsonMapping, overrides: Sequence[str], output: Path | None) -> str:
    """What goes on with a run after a stop, as its user would write it."""
    if isinstance(recipe, Mapping):
        return "lorafit.train(..., resume=True)"
    words = ["lorafit", "train", str(recipe)]
    for override in overrides:
        words += ["--set", override]
    if output is not None:
        words += ["--output", str(output)]
    return shlex.join([*words, "--resume"])


def own_rank() -> int:
    """This process's number under torchrun; 0 where there is one process."""
    return int(os.environ.get("RANK", "0") or 0)


_OF_ANSWERS = tuple(WRITES_NONE)
_HARMLESS = (
    *("name", "output", "tracking", "checkpoints", "data.test", "model.quantization.keep_unpacked"),
    *("evaluation.every_steps", "evaluation.final", "evaluation.retention"),
    *_OF_ANSWERS,
    *("training.micro_batch_tokens", "training.gradient_checkpointing"),
)
"""What a resume may change: it decides what is saved, shown and measured, not what is learnt."""


def check_same_recipe(run: RunDir, loaded: LoadedRecipe, reporter: Reporter) -> None:
    """Refuses to go on with another recipe; says what changed harmlessly.

    Raises:
        CheckpointError: It would not be the same run, or nothing tells whether it would.
    """
    if run.steps() and not is_run(run.root):
        what = "has checkpoints, and manifest.json or recipe.yaml, which say what they are of, is missing"
        raise CheckpointError(what, file=str(run.root), todo="restore them, or train into another --output")
    decisive, harmless = compare_recipes(run, loaded)
    if decisive:
        raise CheckpointError(
            f"would not be the same run: {tell_differences(decisive)}",
            file=str(run.root),
            todo="change it back, or train into another --output",
        )
    for what in harmless:
        reporter.info(what)


def compare_recipes(run: RunDir, loaded: LoadedRecipe) -> tuple[list[str], list[str]]:
    """How the recipe differs from that of the run in the folder: what makes it another run, and what does not."""
    if not is_run(run.root):
        return [], []
    before, now = both_recipes(run, loaded)
    evaluation, steers = loaded.recipe.evaluation, tuple[str, ...]()
    stopping = evaluation.early_stopping
    if stopping is not None or evaluation.on_plateau is not None:
        reads_answers = stopping is not None and metrics.get(stopping.metric).needs == "answers"
        steers = ("evaluation.every_steps", *(_OF_ANSWERS if reads_answers else ()))
    decisive: list[str] = []
    harmless: list[str] = []
    for key in sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        is_harmless = key.startswith(_HARMLESS) and not key.startswith(steers)
        found = harmless if is_harmless or _only_longer(key, before, now) else decisive
        found += differences(key, before.get(key, ABSENT), now.get(key, ABSENT))
    return decisive, harmless


def both_recipes(run: RunDir, loaded: LoadedRecipe) -> tuple[JsonObject, JsonObject]:
    """Values by dotted key: of the recipe that a run's folder holds, and of another as it reads from there."""
    with tempfile.TemporaryDirectory(dir=run.root, prefix=".tmp-recipe-") as folder:
        copy = Path(folder) / "recipe.yaml"
        copy.write_text(dump_recipe(loaded, run.root), encoding="utf-8")
        before, now = load_recipe(run.recipe).recipe, load_recipe(copy).recipe
    return _leaves(before.model_dump(mode="json")), _leaves(now.model_dump(mode="json"))


def read_base_digest(run: RunDir) -> str | None:
    """Fingerprint of the base that a run was started on; None where none was started."""
    if not is_run(run.root):
        return None
    base = read_object(run.manifest).get("base")
    return str(base.get("digest")) if isinstance(base, dict) else ""


def check_same_facts(run: RunDir, facts: JsonMapping) -> None:
    """Refuses to go on with other rows, another base, tokenizer or template.

    Raises:
        CheckpointError: It would not be the same run.
    """
    if not is_run(run.root):
        return  # nothing was started here: the run begins at step 0
    recorded = read_object(run.manifest)
    recorded["base"], now_base = read_base_digest(run), facts["base"]["digest"]
    for what in ("base", "tokenizer", "chat_template", "data"):  # each decides those behind it
        if recorded.get(what) != (now_base if what == "base" else facts.get(what)):
            changed = f"the {what.replace('_', ' ')} changed since the run was started"
            if what == "data" and facts["template_date"] is not None and recorded.get("template_date") is None:
                changed = "the chat template writes the date, and the run does not say which one it was started with"
            raise CheckpointError(
                f"would not be the same run: {changed}",
                file=str(run.root),
                todo="restore it, or train into another --output",
            )


def _only_longer(key: str, before: JsonMapping, now: JsonMapping) -> bool:
    """A constant learning rate does not depend on the length of the run: then it may be trained longer."""
    if key not in ("training.max_steps", "training.epochs") or now.get("training.schedule.kind") != "constant":
        return False
    if now.get("training.curriculum.kind") is not None:  # grows with the length of the run
        return False
    old, new = before.get(key), now.get(key)
    ratio = now.get("training.schedule.warmup_ratio")
    return old is not None and new is not None and new > old and not ratio


def _leaves(value: Any, prefix: str = "") -> JsonObject:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: JsonObject = {}
    for key, inner in value.items():
        found |= _leaves(inner, f"{prefix}.{key}" if prefix else key)
    return found


def describe_run(run: RunDir, loaded: LoadedRecipe, facts: JsonMapping) -> None:
    """manifest.json, which makes the folder a run (versions, seed, hashes of what it is made of), and recipe.yaml."""
    write_json(run.manifest, {"format": 1, "versions": installed_versions(), **facts})
    with atomic_file(run.recipe) as temporary:
        temporary.write_text(dump_recipe(loaded, run.root), encoding="utf-8")
