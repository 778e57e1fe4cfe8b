"""`lorafit compose`: several adapters of one base made one, exactly or at a rank, and what that costs on rows.

a=DIR ... ──checked: one base?──> parts ──weights: written, a mean, or fitted──> layer by layer ──> adapter folder
                                    └──rows──> base, each alone, the exact sum and the result, scored side by side
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorafit.contracts import Reporter, Silent
from lorafit.errors import DataError, ModelError, UsageError
from lorafit.recipe.schema import sources_of
from lorafit.run.output_folder import check_output
from lorafit.run.workspace import OpenedRun
from lorafit.studies.compose_asked import (
    NamedAdapter,
    check_flags,
    choose_weights,
    leave_out,
    open_named,
    read_named,
    read_rank,
)
from lorafit.studies.composed import Composed

if TYPE_CHECKING:
    import torch

    from lorafit.model.compose import BaseChanges, Method, Part, Recipe
    from lorafit.studies.compose_rows import Mixture, RowSet

_USUAL_DENSITY = 0.2
_NOTHING = 1e-12  # what rounding in fp64 leaves of a - a


def compose(
    expression: str | None = None,
    *,
    adapters: Sequence[str],
    output: Path,
    rank: int | str | None = None,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
    mean: bool = False,
    weights: str | None = None,
    fit_rows: Path | None = None,
    eval_rows: Path | None = None,
    scores: bool = True,
    convert: bool = False,
    patterns: bool = False,
    base_model: str | None = None,
    reporter: Reporter | None = None,
) -> Composed:
    """Writes the weighted sum of several adapters of one base as one plain LoRA adapter."""
    reporter = reporter or Silent()
    named = [open_named(name, path) for name, path in read_named(adapters).items()]
    cut = read_rank(rank)
    check_flags(expression, mean=mean, weights=weights, method=method, density=density, fit_rows=fit_rows)
    chosen = choose_weights(expression, named, mean=mean, weights=weights)
    named = leave_out(named, chosen, reporter, is_fitted=fit_rows is not None)
    check_output(output, [each.folder for each in named])
    if output.exists():
        raise UsageError("exists already", file=str(output), key="output", todo="choose another --output")
    from lorafit.files.atomic import atomic_dir
    from lorafit.model.adapter import read_adapter
    from lorafit.model.compose import Part, Recipe, check_one_base, compose_layers
    from lorafit.model.composed_adapter import describe_size, write_composed

    parts = [Part(each.name, read_adapter(each.folder)) for each in named]
    for part in parts:
        part.saved.check_values(reporter)
    check_one_base(parts, reporter, is_named=base_model is not None)
    _check_products(parts, convert=convert, is_fitted=fit_rows is not None)
    recipe = Recipe({each.name: chosen.get(each.name, 0.0) for each in named}, cast("Method", method), 1.0, seed, cut)
    if method != "sum":
        recipe = replace(recipe, density=_USUAL_DENSITY if density is None else density)
    rows = _Rows(named, parts, fit_rows, eval_rows, base_model, reporter, wanted=scores)
    fitted = rows.fit(recipe.weights)
    recipe = recipe if fitted is None else replace(recipe, weights=fitted.weights)
    changes = _read_changes(named, parts, base_model, reporter)
    with atomic_dir(output) as folder:
        layers, errors = {}, []
        with reporter.track(len({path for part in parts for path in part.layers}), "composing") as bar:
            for path, product, error in compose_layers(parts, recipe, changes):
                layers[path] = product
                errors.append(error)
                bar.advance()
        write_composed(folder, parts, layers, patterns=patterns, note=_note(recipe, parts, errors))
        told = None if patterns else describe_size(layers)
        if told is not None:
            reporter.info(told)
        if all(error.update < _NOTHING for error in errors):
            reporter.warn("the sum is zero in every layer: the result answers as the base")
        found = rows.score(folder, recipe, fitted.started if fitted else recipe.weights)
    most = max(product.rank for product in layers.values())
    if isinstance(cut, int) and cut > most:
        reporter.info(f"--rank {cut}: {most} is all there is")
    return Composed(output, recipe.weights, method, most, errors, fitted, found)


def _check_products(parts: Sequence[Part], *, convert: bool, is_fitted: bool) -> None:
    """Raises ModelError where an adapter is no product of two matrices, unless it is to be converted."""
    for part in parts:
        why = part.why_no_product
        if why is None:
            continue
        if not convert:
            todo = "add --convert: what it changes in its base is taken, cut to a rank, and the error shown"
            raise part.refusal(why, todo)
        if part.whole:
            raise part.refusal("it holds modules whole, beside a weight that is converted")
        if is_fitted:
            raise part.refusal(f"{why}, so that no factor of it can be fitted", "leave out --fit")


def _read_changes(
    named: Sequence[NamedAdapter], parts: Sequence[Part], base_model: str | None, reporter: Reporter
) -> dict[str, BaseChanges]:
    """What adapters change in their base whose new weight is no sum, each layer when it is asked for."""
    from lorafit.model.adapter import check_base
    from lorafit.model.updates import UpdateReader

    def changes_of(each: NamedAdapter, part: Part) -> BaseChanges:
        base, used = each.base(base_model, reporter), part.saved.quantization()
        check_base(part.saved, base)
        is_quantised = used is not None and used.get("kind", "none") != "none"
        reader = UpdateReader(part.saved, base, used if is_quantised else None)
        lies_flat = bool(part.saved.config.get("fan_in_fan_out"))

        def change(path: str) -> torch.Tensor:
            matrix = reader.read(path).matrix
            assert matrix is not None, "values were checked"
            return matrix.dense().t() if lies_flat else matrix.dense()

        return change

    return {
        part.name: changes_of(each, part)
        for each, part in zip(named, parts, strict=True)
        if part.why_no_product is not None
    }


def _note(recipe: Recipe, parts: Sequence[Part], errors: Sequence[Any]) -> dict[str, Any]:
    """What lorafit.json says of how it was made: no place on a disk, each adapter by the hash of its weights."""
    from lorafit.files.atomic import hash_file
    from lorafit.model.adapter import WEIGHTS
    from lorafit.model.products import share_of_all

    return {
        "method": recipe.method,
        "density": recipe.density,
        "seed": recipe.seed,
        "share_lost": share_of_all(errors),
        "parts": [
            {
                "name": part.name,
                "weight": recipe.weights[part.name],
                "kind": part.method,
                "sha256": hash_file(part.saved.path / WEIGHTS),
            }
            for part in parts
        ],
    }


class _Rows:
    """Rows to fit weights on and to score with, opened before anything is computed; none where none are wanted.

    Args:
        named: The adapters as they were named.
        parts: The same, opened.
        fit_rows: A file to fit weights on.
        eval_rows: A file to score; the validation rows of the runs where None.
        base_model: Where the base is, as the user says.
        reporter: Gets bars and warnings.
        wanted: Whether anything is scored.
    """

    def __init__(
        self,
        named: Sequence[NamedAdapter],
        parts: Sequence[Part],
        fit_rows: Path | None,
        eval_rows: Path | None,
        base_model: str | None,
        reporter: Reporter,
        *,
        wanted: bool,
    ) -> None:
        from lorafit.model.composed_adapter import lead_of

        self._named, self._parts, self._reporter = named, parts, reporter
        self._fit: RowSet | None = None
        self._scored: list[RowSet] = []
        self._mixture: Mixture | None = None
        asked = fit_rows is not None or eval_rows is not None
        runs = [each for each in named if each.opened is not None and _has_validation(each.opened)]
        if not asked and not (wanted and runs):
            if wanted:
                reporter.info("no run among them has validation rows, so nothing is scored; --eval ROWS scores a file")
            return
        lead = named[parts.index(lead_of(parts))]
        if lead_of(parts).card is None:
            what = "none of the adapters has a run's card, so that nothing tells how rows become tokens"
            raise ModelError(what, key="--eval", todo="merge the result, and evaluate that")
        from lorafit.studies.compose_rows import open_row_file, open_validation

        try:
            self._tuned = lead.tuned(base_model, reporter)
        except ModelError as error:
            if asked:
                raise
            reporter.warn(f"nothing is scored: {error.one_line}")
            return
        known = [source.columns for each in runs for source in _sources(each.opened) if source.columns]
        if fit_rows is not None:
            self._fit = open_row_file(self._tuned, fit_rows, known, "--fit", reporter)
        if eval_rows is not None:
            self._scored.append(open_row_file(self._tuned, eval_rows, known, "--eval", reporter))
        for each in runs if wanted and eval_rows is None else ():
            assert each.opened is not None
            try:
                self._scored.append(open_validation(each.name, each.opened, each.tuned(base_model, reporter), reporter))
            except DataError as error:
                reporter.warn(f"the validation rows of '{each.name}' are not scored: {error.what}")

    def _mixed(self) -> Mixture:
        from lorafit.studies.compose_rows import Mixture

        if self._mixture is None:
            tokenizer = (self._fit or self._scored[0]).job.tokenizer
            self._mixture = Mixture(self._tuned, self._parts, tokenizer, self._reporter)
        return self._mixture

    def fit(self, started: Mapping[str, float]) -> Any:
        """Weights for the rows; None where none are to be found."""
        return None if self._fit is None else self._mixed().fit(self._fit, started)

    def score(self, folder: Path, recipe: Recipe, started: Mapping[str, float]) -> list[Any]:
        """Losses of the result in a folder, beside what it was made of."""
        if not self._scored:
            return []
        mixture = self._mixed()
        mixture.add_result(folder)
        return [mixture.score(rows, recipe.weights, started, is_sum=recipe.method == "sum") for rows in self._scored]


def _has_validation(opened: OpenedRun) -> bool:
    return opened.loaded.recipe.data.validation is not None


def _sources(opened: OpenedRun | None) -> Iterator[Any]:
    if opened is not None:
        for sources in sources_of(opened.loaded.recipe).values():
            yield from sources
