"""Sentences as vectors: an encoder on this disk, pooled as sentence-transformers pools it, every vector of length 1.

    tokens ──encoder──> states [batch, tokens, width] ──mean over a sentence's tokens, or its first──> [batch, width]
                                                                                       ──/ its length──> cosine = dot

Which pooling is the folder's (`modules.json`, `1_Pooling/config.json`); the mean where it says nothing.

Source: Reimers and Gurevych (2019), "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", section 3; the
model card of sentence-transformers/all-MiniLM-L6-v2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lorafit.contracts import JsonObject, JsonValue, Reporter, Silent
from lorafit.errors import ModelError
from lorafit.facts import ModelClass
from lorafit.files.strict_json import JsonError, read_json_file
from lorafit.kinds.quantizations.none import NoneSection
from lorafit.model.base import read_base
from lorafit.model.base_config import CONFIG
from lorafit.model.load import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

_KEY = "evaluation.encoder"
_TODO = "name the folder of a sentence encoder, e.g. all-MiniLM-L6-v2"
_BATCH_ROWS = 32
_MEAN, _FIRST = "pooling_mode_mean_tokens", "pooling_mode_cls_token"
_KNOWN_PARTS = {"Transformer", "Pooling", "Normalize"}


@dataclass(frozen=True, slots=True)
class SentenceEncoder:
    """An encoder that gives texts of any length one vector each; of a long text its beginning is read.

    Attributes:
        name: Of its folder.
        longest: Most tokens that it reads of a text.
        pools_first: Whether a sentence is its first token's state, and not the mean of all.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    longest: int
    pools_first: bool

    @classmethod
    def open(cls, folder: Path, device: torch.device | str, reporter: Reporter) -> SentenceEncoder:
        """The encoder in a folder.

        Raises:
            ModelError: There is none, it is a decoder, or pools in another way.
        """
        folder = folder.resolve()
        if not folder.is_dir():
            raise ModelError("no such folder", file=str(folder), key=_KEY, todo=_TODO)
        if not (folder / CONFIG).is_file():
            raise ModelError(f"holds no {CONFIG}, so it is no sentence encoder", file=str(folder), key=_KEY, todo=_TODO)
        base = read_base(folder, is_compared=False)
        _require_encoder(base.config, folder)
        reporter.info(f"loading the sentence encoder {folder.name}, which compares texts")
        model = load_model(
            base,
            quantization=NoneSection(),
            dtype=torch.float32,
            compute_dtype=torch.float32,
            attention="auto",
            device=device,
            model_class=ModelClass("AutoModel"),
            reporter=Silent(),
        ).eval()
        tokenizer = load_tokenizer(base)
        bounds = (base.config.get("max_position_embeddings"), tokenizer.model_max_length, _longest(folder))
        longest = min(int(bound) for bound in bounds if bound)
        return cls(model, tokenizer, folder.name, longest, _pools_first(folder))

    def embed(self, texts: Sequence[str], reporter: Reporter) -> dict[str, NDArray[np.float64]]:
        """The vector of each text, each once."""
        found: dict[str, NDArray[np.float64]] = {}
        order = sorted(set(texts), key=len)
        with torch.no_grad(), reporter.track(len(order), f"embedding texts by the sentence encoder {self.name}") as bar:
            for start in range(0, len(order), _BATCH_ROWS):
                some = order[start : start + _BATCH_ROWS]
                cut = {"padding": True, "truncation": True, "max_length": self.longest}
                inputs = self.tokenizer(some, return_tensors="pt", **cut).to(self.model.device)
                states = self.model(**inputs).last_hidden_state
                mask = inputs["attention_mask"].unsqueeze(-1)
                pooled = states[:, 0] if self.pools_first else (states * mask).sum(1) / mask.sum(1).clamp(min=1)
                vectors = torch.nn.functional.normalize(pooled.double(), dim=-1).cpu().numpy()
                found |= dict(zip(some, vectors, strict=True))
                bar.advance(len(some))
        return found


def _require_encoder(config: JsonObject, folder: Path) -> None:
    from transformers.models.auto import modeling_auto

    kind = str(config.get("model_type", ""))
    reads_both_ways = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_encoder_decoder")
    if not reads_both_ways or config.get("is_decoder"):
        what = f"'{kind}' is no encoder that reads a text in both directions"
        raise ModelError(what, file=str(folder), key=_KEY, todo=_TODO)


def _pools_first(folder: Path) -> bool:
    """Whether the folder's own pooling takes the first token; the mean where it names none."""
    listed: list[JsonValue] = _read(folder / "modules.json", [])
    parts = [part for part in listed if isinstance(part, dict)]
    kinds = {str(part.get("type")).rpartition(".")[2]: str(part.get("path")) for part in parts}
    no_pooling: JsonObject = {}
    pooling = _read(folder / kinds["Pooling"] / "config.json", no_pooling) if "Pooling" in kinds else {_MEAN: True}
    ways = {str(name) for name, value in pooling.items() if str(name).startswith("pooling_mode") and value is True}
    if (others := set(kinds) - _KNOWN_PARTS) or ways not in ({_MEAN}, {_FIRST}):
        made_by = ", ".join(sorted(others or ways)) or "no pooling that it names"
        what = f"makes vectors by {made_by}, and only the mean or the first token is computed here"
        raise ModelError(what, file=str(folder), key=_KEY, todo=_TODO)
    return ways == {_FIRST}


def _longest(folder: Path) -> int | None:
    none: JsonObject = {}
    value = _read(folder / "sentence_bert_config.json", none).get("max_seq_length")
    return value if isinstance(value, int) else None


def _read(file: Path, otherwise: T) -> T:
    """What a JSON file holds, of the type that is expected there; that where there is no such file."""
    try:
        value = read_json_file(file)
    except FileNotFoundError:
        return otherwise
    except JsonError as error:
        raise ModelError(error.what, file=str(file), key=_KEY, todo="get the file again") from error
    if not isinstance(value, type(otherwise)):
        raise ModelError(f"is no JSON {type(otherwise).__name__}", file=str(file), key=_KEY, todo="get the file again")
    return value
