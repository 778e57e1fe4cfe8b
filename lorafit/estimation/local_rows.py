"""Lengths of a recipe's real rows, where all that takes is on this disk: an estimate never downloads or fails for them.

memo (recipe, files as they lie there, code) ──hit──> RowLengths, without tokenizer or torch
     └─miss─> tokenizer ─> the same preparation and cache as `train` ─> RowLengths, kept as a memo
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.contracts import Progress, Reporter, Silent
from lorafit.errors import LorafitError
from lorafit.estimation import RowLengths
from lorafit.facts import Bar, DatasetFacts
from lorafit.files.cache import keep, kept, key_of_code
from lorafit.kinds.linear_targets import new_tokens
from lorafit.kinds.tasks import tasks
from lorafit.recipe.schema import sources_of

if TYPE_CHECKING:
    from lorafit.data.pictures import ProcessorPictures
    from lorafit.model.base import Base
    from lorafit.recipe.load import LoadedRecipe

_REASON_CHARACTERS = 160


def read_lengths(
    loaded: LoadedRecipe, reporter: Reporter, open_pictures: Callable[[Base], ProcessorPictures]
) -> RowLengths:
    """The lengths of the training rows; or, in words, why there are none, and what is then assumed of their images.

    Args:
        loaded: The recipe.
        reporter: Gets a bar.
        open_pictures: Opens the processor of a base that sees.
    """
    from lorafit.model.base import find_local_base

    found, task = _read(loaded, reporter, open_pictures), tasks.bind(loaded.recipe.task)
    base = find_local_base(loaded.recipe.model, loaded.folder) if task.reads_pictures and found.facts is None else None
    with contextlib.suppress(LorafitError):  # a processor that cannot be read is for `train` and `preview` to refuse
        if base is not None:
            return replace(found, pictures=task.seeing(open_pictures(base)).assume_pictures())
    return found


def _read(loaded: LoadedRecipe, reporter: Reporter, open_pictures: Callable[[Base], ProcessorPictures]) -> RowLengths:
    from lorafit.model.base import find_local_base, is_gguf

    try:
        sources = _source_files(loaded)
    except LorafitError as error:
        return RowLengths(missing=error.one_line[:_REASON_CHARACTERS])
    absent = next((path for path in sources if not _local(loaded, path).is_file()), None)
    if absent is not None:
        return RowLengths(missing=f"{absent} is not on this disk")
    base = find_local_base(loaded.recipe.model, loaded.folder)
    if base is None:
        name = loaded.recipe.model.base
        converted = f"{name} is converted by the first preview or train"
        return RowLengths(missing=converted if is_gguf(name) else f"the tokenizer of {name} is not on this disk")
    sees = tasks.bind(loaded.recipe.task).reads_pictures  # a memo would not know of an image that changed
    memo = f"data/lengths/{_key(loaded, base)}.json"
    with contextlib.suppress(KeyError, TypeError):
        stored: Any = None if sees else kept(memo)
        return RowLengths(DatasetFacts(**stored["facts"]), tuple(Bar(**bar) for bar in stored["bars"]))
    try:
        found = _prepare(loaded, base, reporter, open_pictures(base) if sees else None)
    except LorafitError as error:  # rows that cannot be trained on are for `train` and `preview` to refuse
        return RowLengths(missing=error.one_line[:_REASON_CHARACTERS])
    if not sees:
        keep(memo, {"facts": asdict(found.facts), "bars": [asdict(bar) for bar in found.bars]} if found.facts else None)
    return found


def _prepare(loaded: LoadedRecipe, base: Base, reporter: Reporter, pictures: ProcessorPictures | None) -> RowLengths:
    from lorafit.data.prepare import build_renderer, prepare
    from lorafit.files.cache import cache_folder
    from lorafit.model.load import load_tokenizer

    recipe = loaded.recipe
    task = tasks.bind(recipe.task)
    base = replace(base, new_tokens=new_tokens(recipe.adapter))
    tokenizer = load_tokenizer(base) if pictures is None else pictures.tokenizer
    prepared = prepare(
        recipe.data,
        folder=loaded.folder,
        renderer=build_renderer(tokenizer, recipe.data, loaded.folder, two_texts=task.two_texts, pictures=pictures),
        task=task if pictures is None else task.seeing(pictures),
        seed=recipe.seed,
        cache_dir=cache_folder() / "data",
        reporter=_BarsAlone(reporter),
        retention=recipe.evaluation.retention,
    )
    return RowLengths(prepared.facts(), prepared.report.splits["train"].histogram)


class _BarsAlone(Silent):
    """Shows how far a long preparation is, and leaves what it says to the commands that are about rows."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def track(self, total: int | None, what: str, done: int = 0) -> Progress:  # type: ignore[override]
        """The reporter's own bar."""
        return self._reporter.track(total, what, done)


def _key(loaded: LoadedRecipe, base: Base) -> str:
    """A name for all that decides the lengths: options, files by place, size and time of change, and the code."""
    recipe = loaded.recipe
    options = [recipe.data.model_dump(mode="json"), recipe.task.model_dump(), recipe.seed, new_tokens(recipe.adapter)]
    return key_of_code([options, [_stamp(file) for file in _files(loaded, base)]])


def _source_files(loaded: LoadedRecipe) -> list[str]:
    """The files or hub ids of all sources, as the recipe names them or its patterns find them."""
    from lorafit.data.sources.files import find_files

    paths = [source.path for part in sources_of(loaded.recipe).values() for source in part]
    return [name for path in paths for name in find_files(path, loaded.folder)]


def _files(loaded: LoadedRecipe, base: Base) -> Iterator[Path]:
    yield from (_local(loaded, name) for name in _source_files(loaded))
    template = loaded.recipe.data.chat_template
    if template is not None and _local(loaded, template).is_file():
        yield _local(loaded, template)
    beside = [*base.path.glob("*"), *base.path.glob("additional_chat_templates/*")]
    yield from (file for file in sorted(beside) if file.is_file() and file.suffix != ".safetensors")


def _local(loaded: LoadedRecipe, path: str) -> Path:
    return loaded.folder / Path(path).expanduser()


def _stamp(file: Path) -> tuple[str, int, int]:
    now = file.stat()
    return str(file.resolve()), now.st_size, now.st_mtime_ns
