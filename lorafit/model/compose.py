"""Several adapters of one base made one: the weighted sum of what each adds, layer by layer.

    sum          sum_i w_i s_i B_i A_i  =  [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1 ; A_2 ; ...]      exact
    at a rank    the closest update of that rank to it, by its factors (`products`)
    dense        TIES, DARE, and adapters whose new weight is no sum: W' - W at their base; then the closest of a rank

An adapter that has nothing at a layer adds nothing there. The scale of each is folded into B, so that alpha, ranks that
differ and rank-stabilised scaling are gone from the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from lorafit.console.wording import list_names
from lorafit.contracts import Reporter
from lorafit.errors import ModelError
from lorafit.files.safetensors import read_rows
from lorafit.kinds.folding import why_unknown
from lorafit.model.adapter import AdapterFolder
from lorafit.model.low_rank import PREFIX, method_of
from lorafit.model.products import LayerError, Product
from lorafit.model.saved_layers import SavedLayers
from lorafit.model.tokenizer_files import TokenizerFolder
from lorafit.ops.task_vectors import dare, ties
from lorafit.run.card import RunCard

Method = Literal["sum", "ties", "dare"]
Rank = int | float | None
"""Of every layer; or as a share, such as 0.01, the smallest that leaves out no more of its update; None: all ranks."""
BaseChanges = Callable[[str], torch.Tensor]
"""What an adapter changes in the weight of its base at a layer's path, `[out, in]` in fp64."""
_BASE_COPY = ".base_layer."


class Part:
    """One adapter of a sum.

    Args:
        name: What it is called in the sum.
        saved: It.

    Raises:
        ModelError: It changes no weights of linears, or uses what no kind computes.
    """

    def __init__(self, name: str, saved: AdapterFolder) -> None:
        self.name, self.saved = name, saved
        try:
            self._saved_layers = SavedLayers(saved)
        except ModelError as error:
            why = why_unknown(error)
            told = self.refusal(why or error.what, "leave it out" if why or not error.todo else error.todo)
            raise error if error.file else told from error
        self.layers, self.whole = self._saved_layers.layers, self._saved_layers.whole
        self.embeddings = self._saved_layers.embeddings

    @property
    def method(self) -> str:
        """The adapter's kind, as a recipe names it."""
        return method_of(self.saved)

    @cached_property
    def card(self) -> RunCard | None:
        """Of the run that made it."""
        return self.saved.card()

    @cached_property
    def why_no_product(self) -> str | None:
        """The arithmetic for which its updates cannot be summed by their factors; None where they can."""
        if all(self._factors(path) is not None for path in self.layers):
            return None
        return self._saved_layers.why_no_product

    def product(self, path: str) -> Product | None:
        """What it adds to a layer; None where it has nothing there."""
        if path not in self.layers:
            return None
        found = self._factors(path)
        assert found is not None, "why_no_product was asked"
        return Product(found[1], found[0])

    def _factors(self, path: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """B with its scale and A, by the fold that merges; None where it has none, or must see the base's weight."""
        fold = self._saved_layers.fold(path)
        return None if fold is None else fold.factors(None)

    def refusal(self, why: str, todo: str = "leave it out") -> ModelError:
        """That it cannot be part of a sum."""
        return ModelError(f"'{self.name}' cannot be summed: {why}", file=str(self.saved.path), todo=todo)


def check_one_base(parts: Sequence[Part], reporter: Reporter, *, is_named: bool = False) -> None:
    """Refuses adapters that are not of one base, or that hold whole modules of different values.

    Args:
        parts: The adapters.
        reporter: Warned of what differs and does not matter for the sum.
        is_named: Whether the user names the base, so that other names for it count for nothing.

    Raises:
        ModelError: As said; with both sides.
    """
    first = parts[0]
    for part in parts[1:]:
        tasks: list[str | None] = [one.card.task.kind if one.card else None for one in (first, part)]
        known = _have_digests(first, part)
        bases: list[str | None] = [_base_of(one, has_digests=known) for one in (first, part)]
        bases = [None, None] if is_named and not known else bases
        for what, (ours, theirs) in {"bases": bases, "tasks": tasks}.items():
            if ours is not None and theirs is not None and ours != theirs:
                told = f"'{first.name}' and '{part.name}' are of different {what}: {ours} and {theirs}"
                raise ModelError(told, file=str(part.saved.path), todo=f"sum adapters of one {what[:-1]}")
        stored = [str((one.saved.quantization() or {}).get("kind", "none")) for one in (first, part)]
        if stored[0] != stored[1]:
            reporter.warn(
                f"'{first.name}' was trained beside weights stored as {stored[0]}, '{part.name}' as {stored[1]}: "
                f"rounding makes these two bases, and the sum is noted as one for {stored[0]}"
            )
        _warn_of_other_words(first, part, reporter)
        _check_shapes(first, part)
    if any(not _have_digests(first, part) for part in parts):
        named = list_names({str(part.saved.config.get("base_model_name_or_path")) for part in parts})
        reporter.warn(f"not every adapter notes its base's digest; going by the name they give it: {named}")
    _check_whole(parts)


def _have_digests(*parts: Part) -> bool:
    return all((part.saved.notes.get("base") or {}).get("digest") for part in parts)


def _base_of(part: Part, *, has_digests: bool) -> str:
    """The base by its digest, where both adapters note one; else by the name that PEFT wrote."""
    if has_digests:
        noted = part.saved.notes["base"]
        return f"'{noted['name']}' ({noted['digest'][:12]})"
    written = str(part.saved.config.get("base_model_name_or_path")).rstrip("/")
    return f"'{written.rsplit('/', 1)[-1]}'"


def _warn_of_other_words(first: Part, part: Part, reporter: Reporter) -> None:
    """Says where two adapters were trained with different tokenizers or templates; the sum has the first one's."""
    mine, theirs = (TokenizerFolder(one.saved.path) for one in (first, part))
    differs = []
    if mine.has_tokenizer() and theirs.has_tokenizer() and not mine.is_same_tokenizer(theirs):
        differs.append("tokenizers")
    if first.card is not None and part.card is not None:
        keys = {"chats or verbatim text": "chat", "chat templates": "templates", "system prompts": "system_prompt"}
        differs += [what for what, key in keys.items() if getattr(first.card, key) != getattr(part.card, key)]
    if differs:
        taken = f"the sum is asked as '{first.name}', which comes first"
        reporter.warn(f"'{first.name}' and '{part.name}' were trained with different {', '.join(differs)}: {taken}")


def _check_shapes(first: Part, part: Part) -> None:
    for path in (path for path in first.layers if path in part.layers):
        sides = [one.why_no_product is None and one.product(path) for one in (first, part)]
        shapes = [[len(side.b), side.a.shape[1]] for side in sides if side]
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            what = f"{path}: '{first.name}' changes a weight {shapes[0]}, '{part.name}' one of {shapes[1]}"
            raise ModelError(what, file=str(part.saved.path), todo="sum adapters of one base")


def _check_whole(parts: Sequence[Part]) -> None:
    """Raises ModelError unless what is saved whole (heads, modules_to_save, new tokens) is equal in all."""
    names = dict.fromkeys(name for part in parts for name in part.whole)
    for name in names:
        holders = [part for part in parts if name in part.whole]
        values = [read_rows(part.whole[name]) for part in holders]
        is_copy = _BASE_COPY in name  # the frozen layer under an adapter, which PEFT saves for heads and embeddings
        lacks = next((part for part in parts if part not in holders), None)
        if any(value.shape != values[0].shape or not torch.equal(value, values[0]) for value in values[1:]):
            why = "it is not equal in all, and values that took the place of others cannot be summed"
        elif lacks is not None and not is_copy:
            why = f"'{lacks.name}' has none, and what takes the place of the base's values cannot be summed"
        else:
            continue
        short = name.removeprefix(PREFIX)
        raise holders[-1].refusal(f"it holds '{short}' whole (modules_to_save, a head or new tokens): {why}")


@dataclass(frozen=True)
class Recipe:
    """How adapters become one.

    Attributes:
        weights: By name.
        method: Sum, TIES or DARE.
        density: Of TIES and DARE.
        seed: Of DARE.
        rank: Of the result.
    """

    weights: Mapping[str, float]
    method: Method = "sum"
    density: float = 1.0
    seed: int = 0
    rank: Rank = None


def paths_of(parts: Sequence[Part]) -> list[str]:
    """Every layer that one of them changes, in the order of the files."""
    return list(dict.fromkeys(path for part in parts for path in part.layers))


def compose_layers(
    parts: Sequence[Part], recipe: Recipe, changes: Mapping[str, BaseChanges] | None = None
) -> Iterator[tuple[str, Product, LayerError]]:
    """Each layer's update as two factors, and what these leave out of it.

    Args:
        parts: The adapters.
        recipe: How.
        changes: Of those whose new weight is no sum.
    """
    is_dense = recipe.method != "sum" or bool(changes)
    most = max(sum(_rank_of(part, path) for part in parts) for path in paths_of(parts))
    for path in paths_of(parts):
        if is_dense:
            update = _dense(parts, recipe, path, changes or {})
            kept, error = Product.closest_to(update, recipe.rank or most)
            norm = float(update.norm())
        else:
            kept, error, norm = _summed(parts, recipe, path)
        yield path, kept, LayerError(path, error, norm)


def _rank_of(part: Part, path: str) -> int:
    """Ranks that it takes at a layer; of a new weight that is no sum, as many as its narrowest tensor says."""
    layer = part.layers.get(path)
    if layer is None:
        return 0
    return layer.tensors["A"].shape[0] if "A" in layer.tensors else int(part.saved.config.get("r") or 1)


def _summed(parts: Sequence[Part], recipe: Recipe, path: str) -> tuple[Product, float, float]:
    products = {part.name: product for part in parts if (product := part.product(path)) is not None}
    whole = Product.sum_of(list(products.values()), [recipe.weights[name] for name in products])
    rank = whole.rank_within(recipe.rank) if isinstance(recipe.rank, float) else recipe.rank
    rank = min(rank or whole.rank, len(whole.b), whole.a.shape[1])  # no matrix has more
    if rank >= whole.rank:
        return whole, 0.0, whole.norm
    return *whole.closest(rank), whole.norm


def _dense(parts: Sequence[Part], recipe: Recipe, path: str, changes: Mapping[str, BaseChanges]) -> torch.Tensor:
    """The update of a layer as one matrix, `[out, in]`."""
    updates, seeds = [], []
    for part in parts:
        if path in part.layers:
            update = changes[part.name](path) if part.name in changes else _product(part, path).dense()
            updates.append(update * recipe.weights[part.name])
            seeds.append(f"{recipe.seed} {part.name} {path}")
    if recipe.method == "ties":
        return ties(updates, recipe.density)
    if recipe.method == "dare":
        return dare(updates, recipe.density, seeds)
    return torch.stack(updates).sum(dim=0)


def _product(part: Part, path: str) -> Product:
    found = part.product(path)
    assert found is not None
    return found
