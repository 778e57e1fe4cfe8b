"""Names by the model class, for an adapter that brings no note of them: another tool's, or an older lorafit's.

It builds the class and PEFT's layers on the meta device, which imports both libraries: asked only where plain names do
not settle where an adapter's layers lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

from lorafit.errors import ModelError
from lorafit.model.adapter import AdapterFolder
from lorafit.model.attach import wrap_model
from lorafit.model.homes import Home, adapted_layers, find_home
from lorafit.model.names import Part, read_names

if TYPE_CHECKING:
    from lorafit.files.safetensors import TensorEntry
    from lorafit.model.base import Base


def read_class_homes(
    base: Base, adapter: AdapterFolder, paths: Set[str], entries: Mapping[str, TensorEntry]
) -> dict[str, Home]:
    """Where every layer lies that PEFT adapts with this adapter's config.

    The class is the one that causal language models of this type load as; the one that the config names, where only
    that has the adapter's layers.

    Args:
        paths: The layers that the adapter has.

    Raises:
        ModelError: No class has these layers, or a layer's weight has no place that an update can be added to.
    """
    found: dict[str, Home] = {}
    failure: ModelError | None = None
    for model in _classes(base):
        names = read_names(model, entries)
        try:
            layers = adapted_layers(wrap_model(model, adapter.config, adapter.path, trainable=False, empty=True))
            found = {path: find_home(path, layer, names) for path, layer in layers.items()}
        except ModelError as error:
            error.at(file=str(adapter.path))
            failure = failure or error
            continue
        if found.keys() == paths:
            return found
    if failure is not None:
        raise failure
    return found


def read_class_parts(
    base: Base, paths: Iterable[str], entries: Mapping[str, TensorEntry]
) -> dict[str, tuple[Part, ...]]:
    """Where the weights of these layers lie, by the class that causal language models of this type load as.

    Raises:
        ModelError: Some are in none of the base's files.
    """
    names = read_names(next(_classes(base)), entries)
    parts = {path: names.parts.get(f"{path}.weight", ()) for path in paths}
    lost = [path for path, found in parts.items() if not found]
    if lost:
        raise ModelError(
            f"{len(lost)} layers that training quantised are not in the base ({lost[0]} ...)",
            file=str(base.path),
            todo="use the base it was trained on",
        )
    return parts


def _classes(base: Base) -> Iterator[Any]:
    """Skeletons of the classes that may have been trained."""
    import transformers

    from lorafit.model.load import build_class

    yield build_class(base)
    for name in base.config.get("architectures") or ():
        if hasattr(transformers, str(name)):
            yield build_class(base, str(name))
