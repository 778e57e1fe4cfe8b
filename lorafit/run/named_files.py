"""What a recipe names, looked at before anything heavy: its chat template, its files of rows; faults by its lines."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorafit.contracts import Silent
from lorafit.errors import LorafitError, ModelError, RecipeError, raise_all
from lorafit.kinds.tasks import tasks
from lorafit.recipe.extends import FLAG
from lorafit.recipe.schema import sources_of

if TYPE_CHECKING:
    from pathlib import Path

    from lorafit.recipe.load import LoadedRecipe


@contextmanager
def placed(loaded: LoadedRecipe) -> Iterator[None]:
    """Says of an error in here where in the recipe its key stands, where that is the recipe's fault and no row's."""
    try:
        yield
    except LorafitError as error:
        key = error.key or ""
        is_recipes = error.file is None and key and (isinstance(error, RecipeError) or key.startswith("data."))
        if is_recipes or (isinstance(error, ModelError) and key.startswith("model.")):  # whatever folder it names
            error.named_at(key, *loaded.place(key))
        raise


def look_at_template(named: str | None, folder: Path) -> None:
    """Looks whether what a recipe names as its chat template is one that is shipped, or a file of Jinja.

    Raises:
        RecipeError: It is neither a shipped name nor a file of text.
        ModelError: The file is no valid Jinja.
    """
    from lorafit.data.chat.template_names import KEY, SHIPPED_TEMPLATES, read_template

    try:
        text = read_template(named, folder)
    except ModelError as error:
        raise RecipeError(error.what, key=KEY, todo=error.todo) from error
    if text is None or named in SHIPPED_TEMPLATES:
        return
    from lorafit.data.chat.template import compile_or_explain

    try:
        compile_or_explain(text)
    except ModelError as error:
        error.what = error.what.replace("the chat template", f"template file '{named}'", 1)
        error.todo = error.todo or "mend it there"
        raise


def look_for_rows(loaded: LoadedRecipe, only: Collection[str] | None = None, *, todo: str = "") -> None:
    """Opens every file of rows; what is wrong with a whole file is said at the recipe's line that names it.

    Args:
        loaded: The recipe.
        only: Keys of the recipe whose sources are wanted; all where None.
        todo: What else may be done about a file that is not there.

    Raises:
        DataError: A file is missing, or cannot be read.
    """
    from lorafit.data.sources.sample_set import read_sources

    task, errors = tasks.bind(loaded.recipe.task), list[LorafitError]()
    for key, sources in sources_of(loaded.recipe).items():
        for number, source in enumerate(sources if only is None or key in only else ()):
            try:
                read_sources([source], loaded.folder, loaded.recipe.data.bad_rows, Silent(), task)
            except LorafitError as error:
                named = f"{key}[{number}].{error.key or 'path'}"
                place = loaded.place(named)
                if todo and error.what.endswith("no such file") and not place[0].startswith(FLAG):
                    error.todo = f"{error.todo}; {todo}"
                errors.append(error.named_at(named, *place))
    raise_all(errors, file=loaded.file)
