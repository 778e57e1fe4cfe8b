"""The folder of a composed adapter: plain LoRA that every engine computes alike.

    one rank r for all layers, filled up with zeros, and lora_alpha = r: the scale is 1 with and without rank-stabilised
    scaling, and there are no patterns, which some engines drop without a word

Tokenizer, templates, card and notes are those of the first adapter that has them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.console.wording import list_names
from lorafit.contracts import JsonObject
from lorafit.errors import ModelError
from lorafit.files.safetensors import read_rows
from lorafit.kinds.adapters import adapters
from lorafit.machine.version import __version__
from lorafit.model.adapter import CONFIG, NOTES, QUANTIZATION, WEIGHTS, write_object
from lorafit.model.adapter_checks import NOTES_FORMAT
from lorafit.model.compose import Part
from lorafit.model.low_rank import PREFIX
from lorafit.model.products import Product
from lorafit.model.tokenizer_files import PROCESSOR_PATTERNS, Companions, TokenizerFolder

_MOST_RANK = 4096
_CHOOSES_LAYERS = ("layers_to_transform", "layers_pattern", "exclude_modules")


def lead_of(parts: Sequence[Part]) -> Part:
    """The part whose tokenizer, templates and card the result has: the first with a card, else the first."""
    return next((part for part in parts if part.card is not None), parts[0])


def write_composed(
    folder: Path, parts: Sequence[Part], layers: Mapping[str, Product], *, patterns: bool, note: JsonObject
) -> None:
    """Writes the adapter into an empty folder.

    Args:
        folder: Made whole by the caller's `atomic_dir`.
        parts: What it is made of.
        layers: The updates by path.
        patterns: Whether each layer has its own rank, by PEFT's `rank_pattern`, instead of zeros.
        note: What it is made of, for lorafit.json.

    Raises:
        ModelError: It would have more ranks than adapters may.
    """
    from safetensors.torch import save_file

    lead = lead_of(parts)
    rank = max(product.rank for product in layers.values())
    if rank > _MOST_RANK:
        what = f"the sum has rank {rank:,}, an adapter at most {_MOST_RANK:,}"
        raise ModelError(what, key="--rank", todo="name a smaller --rank")
    tensors = {name: read_rows(entry) for part in reversed(parts) for name, entry in part.whole.items()}
    embeddings = set().union(*(part.embeddings for part in parts))
    for path, product in layers.items():
        a, b = product.padded(product.rank if patterns else rank)
        kind, end = ("lora_embedding_", "") if path in embeddings else ("lora_", ".weight")
        for part, values in (("A", a), ("B", b)):
            tensors[f"{PREFIX}{path}.{kind}{part}{end}"] = values.float().contiguous()
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    ranks = {path: product.rank for path, product in layers.items() if patterns and product.rank != rank}
    write_object(folder / CONFIG, _config(parts, list(layers), rank, ranks))
    write_object(folder / NOTES, _notes(parts, list(layers), rank, note))
    own = TokenizerFolder(lead.saved.path)
    tokenizer = own if own.has_tokenizer() else None
    Companions(tokenizer, own.templates(), own.generation(), processor=own.files(PROCESSOR_PATTERNS)).write(folder)
    if (hashes := lead.saved.path / QUANTIZATION).is_file():
        shutil.copyfile(hashes, folder / QUANTIZATION)


def _config(parts: Sequence[Part], paths: Sequence[str], rank: int, ranks: Mapping[str, int]) -> JsonObject:
    """PEFT's, of plain LoRA."""
    lead = lead_of(parts).saved.config
    return {
        "peft_type": "LORA",
        "task_type": lead.get("task_type"),
        "base_model_name_or_path": lead.get("base_model_name_or_path"),
        "revision": lead.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "target_modules": _targets(parts, paths),
        "fan_in_fan_out": any(part.saved.config.get("fan_in_fan_out") for part in parts),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        **{key: lead.get(key) for key in ("modules_to_save", "trainable_token_indices", "ensure_weight_tying")},
    }


def _targets(parts: Sequence[Part], paths: Sequence[str]) -> list[str]:
    """Names by which PEFT finds these layers: the adapters' own where each says them in a plain list, else whole paths.

    What a list matches that joins two is what one of the two does.
    """
    lists: list[Any] = [part.saved.config.get("target_modules") for part in parts]
    plain = not any(part.saved.config.get(key) for part in parts for key in _CHOOSES_LAYERS)
    if plain and all(isinstance(names, list) for names in lists):
        return sorted({name for names in lists for name in names})
    return sorted(paths)


def _notes(parts: Sequence[Part], paths: Sequence[str], rank: int, note: JsonObject) -> JsonObject:
    """lorafit.json: the first adapter's, with the layers of all and the method that the result is."""
    lead = lead_of(parts)
    notes: JsonObject = {"format": NOTES_FORMAT, **lead.saved.notes, "lorafit": __version__, "composed": note}
    homes: dict[str, Any] = {}
    for part in reversed(parts):
        homes |= part.saved.notes.get("layers") or {}
    notes.pop("layers", None)  # where they are not all known, they are found as another tool's are
    if notes["format"] == NOTES_FORMAT and all(path in homes for path in paths):
        notes["layers"] = {path: homes[path] for path in paths}
    if lead.card is not None:
        names: list[Any] = sorted({path.rsplit(".", 1)[-1] for path in paths})
        section = adapters.make_section("lora", r=rank, alpha=float(rank), dropout=0.0, target_modules=names)
        section = section.model_copy(update={key: getattr(lead.card.adapter, key, None) for key in _KEPT_OF_SECTION})
        card = lead.card.portable().model_copy(update={"adapter": section})
        notes["card"] = {key: value for key, value in card.to_json().items() if key != "base"}
    return notes


_KEPT_OF_SECTION = ("new_tokens", "modules_to_save")


def describe_size(layers: Mapping[str, Product]) -> str | None:
    """What zeros cost where they are more than half of the file; None where they are not."""
    sizes = {path: product.a.shape[1] + product.b.shape[0] for path, product in layers.items()}
    rank = max(product.rank for product in layers.values())
    own = sum(sizes[path] * product.rank for path, product in layers.items())
    whole = rank * sum(sizes.values())
    if whole <= 2 * own:
        return None
    small = list_names({path.rsplit(".", 1)[-1] for path, product in layers.items() if 2 * product.rank < rank})
    return (
        f"one rank, {rank}, for all layers makes the file {whole / own:.1f} times as large ({small} have less than "
        "half of it): give a smaller --rank, or --patterns, which keeps each layer's own and which vLLM ignores"
    )
