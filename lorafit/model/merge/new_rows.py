"""Rows of new tokens in a merged model: whole matrices, grown to the highest new id.

base       model.embed_tokens.weight [rows, hidden]
adapter    ...token_adapter.trainable_tokens_delta [new, hidden]; lorafit.json says of which ids
merged     model.embed_tokens.weight [rows', hidden], config.json's vocab_size is rows'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry, read_header, read_rows
from lorafit.model.adapter import AdapterFolder
from lorafit.model.loading_note import HEAD_PREFIX
from lorafit.model.merge.own_head import OwnHead, as_written

if TYPE_CHECKING:
    import torch

_FILE = "grown.safetensors"
_CONFIG_KEY = "trainable_token_indices"


def take_rows(
    head: OwnHead, adapter: AdapterFolder, entries: Mapping[str, TensorEntry], config: JsonMapping, place: Path
) -> tuple[OwnHead, AdapterFolder]:
    """What the adapter holds whole, with the matrices that its rows stand in, and the adapter without the rows.

    Args:
        head: What else it holds whole.
        adapter: The adapter.
        entries: The base's tensors.
        config: The base's config.json.
        place: A folder for the matrices, needed for as long as the merge reads.

    Raises:
        ModelError: The note is not as lorafit writes it, or an older or another tool's, or the rows do not fit.
    """
    noted = adapter.notes.get("rows")
    if noted is None:
        return head, adapter
    from safetensors.torch import save_file

    with as_written(adapter, "rows"):
        ids, tied = [*map(int, noted["ids"])], frozenset(map(str, noted["tied"]))
        files = {f"{HEAD_PREFIX}{name}": str(file) for name, file in noted["tensors"].items()}
        pairs = {file: (entries[file], adapter.tensors[name]) for name, file in files.items()}
    grown = {file: _grown(*pair, ids, adapter) for file, pair in pairs.items()}
    save_file(grown, str(place / _FILE))
    rows = next(iter(grown.values())).shape[0]
    again = tied - grown.keys()
    left = replace(
        head,
        tensors={**head.tensors, **read_header(place / _FILE)},
        left_out=head.left_out | again,
        config={**head.config, **_sized(config, rows)},
    )
    kept = {name: entry for name, entry in adapter.tensors.items() if name not in files}
    return left, replace(adapter, tensors=kept, config={**adapter.config, _CONFIG_KEY: None})


def _grown(matrix: TensorEntry, rows: TensorEntry, ids: list[int], adapter: AdapterFolder) -> torch.Tensor:
    """The base's matrix with rows in their places, and as many behind it as it takes."""
    import torch

    known, new = read_rows(matrix), read_rows(rows)
    if len(ids) != len(new) or new.shape[1] != known.shape[1] or min(ids) > len(known):
        what = f"its rows {list(new.shape)} of tokens {ids[0]} to {ids[-1]} do not fit {list(known.shape)}"
        raise ModelError(what, file=str(adapter.path), todo="use the base it was trained on")
    grown = torch.empty(max(len(known), max(ids) + 1), known.shape[1], dtype=known.dtype)
    grown[: len(known)] = known
    grown[torch.tensor(ids)] = new.to(known.dtype)
    return grown


def _sized(config: JsonMapping, rows: int) -> JsonObject:
    """What config.json says of so many rows."""
    if "vocab_size" in config:
        return {"vocab_size": rows}
    return {"text_config": {**config.get("text_config", {}), "vocab_size": rows}}
