"""A task's own head in a merged model: what the adapter saved whole stands there under the class's own names.

base        embeddings, layers, another head          that head is left out
adapter     base_model.model.classifier.weight        lorafit.json names it: note_head
merged      embeddings, layers, classifier.weight     config.json says the class, and what it was told
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from lorafit.console.wording import list_names
from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError
from lorafit.files.safetensors import DTYPE_BYTES, TensorEntry, main_dtype
from lorafit.model.adapter import NOTES, AdapterFolder
from lorafit.model.loading_note import HEAD_PREFIX


@contextlib.contextmanager
def as_written(adapter: AdapterFolder, key: str) -> Iterator[None]:
    """Raises ModelError where a note is read that is not as lorafit writes it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        file = str(adapter.path / NOTES)
        raise ModelError("is not as lorafit writes it", file=file, key=key, todo="restore the file") from error


@dataclass(frozen=True)
class OwnHead:
    """The head that an adapter brings, and other modules that it holds whole; no tensors where it brings none.

    Attributes:
        tensors: The adapter's entries, by their names in the merged model.
        left_out: Tensors of the base that give way to it.
        config: What the merged config.json says beside the base's.
        tied: Tensors of the adapter that are another one's again.
    """

    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    config: JsonMapping = field(default_factory=dict)
    tied: frozenset[str] = frozenset()

    @classmethod
    def of(cls, adapter: AdapterFolder) -> OwnHead:
        """The head that an adapter notes; one of another tool, whatever it saves whole, notes none.

        Raises:
            ModelError: The note is not as lorafit writes it, or the adapter lacks tensors of the head.
        """
        head, modules = adapter.notes.get("head"), adapter.notes.get("modules")
        found, left_out, tied = dict[str, TensorEntry](), frozenset[str](), frozenset[str]()
        config: JsonObject = {}
        if head is not None:
            with as_written(adapter, "head"):
                config = {"architectures": [str(head["class"])], **head["config"]}
                left_out = frozenset(map(str, head["left_out"]))
        for key, noted in {"head": head, "modules": modules}.items():
            if noted is None:
                continue
            with as_written(adapter, key):
                names = [*map(str, noted["tensors"])]
                files = {str(name): str(file) for name, file in dict(noted.get("files", {})).items()}
                tied |= {f"{HEAD_PREFIX}{name}" for name in noted.get("tied", ())}
            lacking = [name for name in names if f"{HEAD_PREFIX}{name}" not in adapter.tensors]
            if lacking or not names:
                what = f"lacks its {key} ({list_names(lacking)})"
                raise ModelError(what, file=str(adapter.path / NOTES), key=key, todo="use the whole adapter")
            found |= {files.get(name, name): adapter.tensors[f"{HEAD_PREFIX}{name}"] for name in names}
        return cls(found, left_out, config, tied)

    def take_off(self, adapter: AdapterFolder) -> AdapterFolder:
        """The adapter without its head: what is folded."""
        if not self.tensors:
            return adapter
        own = {*self.tied, *(entry.name for entry in self.tensors.values())}
        kept = {name: entry for name, entry in adapter.tensors.items() if name not in own}
        return replace(adapter, config={**adapter.config, "modules_to_save": None}, tensors=kept)

    def put_on(self, entries: Mapping[str, TensorEntry], *, is_cast: bool) -> dict[str, TensorEntry]:
        """The tensors of the merged model: the base's, and those of the head behind them in its last file.

        Args:
            entries: The base's.
            is_cast: Whether all floats are written in another dtype than the base's, to which the head is cast too.
        """
        kept = {n: entry for n, entry in entries.items() if n not in self.left_out and n not in self.tensors}
        last, main = max(kept.values(), key=lambda entry: (entry.file.name, entry.offset)), main_dtype(kept)
        offset = last.offset + last.size_bytes
        for name, entry in self.tensors.items():
            dtype = entry.dtype if is_cast else main
            size = entry.elements * DTYPE_BYTES[dtype]
            kept[name] = replace(entry, name=name, file=last.file, dtype=dtype, offset=offset, size_bytes=size)
            offset += size
        return kept
