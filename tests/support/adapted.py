"""Bases on disk with an adapter on them, loaded or saved as a run saves it, with random weights instead of training."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lorafit.contracts import Silent
from lorafit.kinds.adapters import adapters
from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.tasks import tasks
from lorafit.model.adapter import save_adapter
from lorafit.model.attach import attach_adapter
from lorafit.model.base import Base, resolve_base
from lorafit.model.inspect import describe_quantization
from lorafit.model.load import load_model
from lorafit.trainer.first_values import give_first_values
from tests.support.tiny_model import tiny_llama


def make_llama(
    folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False, shard: str = "5GB", **other: Any
) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 96, "max_position_embeddings": 64} | other
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = tiny_llama(seed=1, tie_word_embeddings=tied, **ids, **sizes)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def make_gpt2(folder: Path, *, dtype: torch.dtype = torch.float32, vocab_size: int = 96) -> Path:
    torch.manual_seed(1)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=vocab_size, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).to(dtype).save_pretrained(folder)
    return folder


def open_base(folder: Path) -> Base:
    return resolve_base(SimpleNamespace(base=str(folder), revision=None), folder.parent, Silent())  # type: ignore[arg-type]


def load(base: Base, kind: str = "none", *, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    section = quantizations.make_section(kind, **fields)
    return load_model(
        base, quantization=section, dtype=dtype, compute_dtype=dtype, attention="eager", device="cpu", reporter=Silent()
    )


def randomise(model: Any, seed: int = 3) -> None:
    """Gives what starts at zero values, as training would."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "vera_lambda", "miss_", "ia3_")):
            parameter.data = torch.randn_like(parameter) * 0.05


def lora(**fields: Any) -> Any:
    return adapters.make_section("lora", **({"r": 4, "alpha": 8, "dropout": 0.0} | fields))


def begin(base: Base, section: Any, kind: str = "none", rows: Any = None, retention: Any = None, **loading: Any) -> Any:
    """A base with the adapter that a run on it begins with.

    Args:
        base: From `open_base`.
        section: The adapter's.
        kind: How the base is quantised; or the base, loaded.
        rows: Training rows, for what looks at them.
        retention: Rows of general ability; the same ones where None.
        loading: See `load`.
    """
    model = attach_adapter(load(base, kind, **loading) if isinstance(kind, str) else kind, section, 0)
    objective = tasks.make("causal-lm").build_objective(model)
    splits = {"train": rows, "retention": retention or rows}
    give_first_values(objective, section, base, splits, 0, 0, Silent())
    return model


class Trained:
    """A base with a saved adapter, and the run's quantization.json."""

    def __init__(self, base: Base, adapter: Path, quantization: dict[str, Any] | None, model: Any) -> None:
        self.base, self.adapter, self.quantization, self.model = base, adapter, quantization, model


def train_like(base: Base, kind: str, *, dtype: torch.dtype = torch.float32, **section: Any) -> Trained:
    """Loads, adapts and saves, with random adapter weights in the place of training."""
    model = attach_adapter(load(base, kind, dtype=dtype), lora(**section), 0)
    randomise(model)
    used = None
    if kind != "none":
        used = describe_quantization(model, quantizations.make_section(kind), dtype=dtype)
    folder = base.path.parent / f"adapter-{kind}"
    folder.mkdir()
    save_adapter(model, folder, base=base, quantization=used)
    return Trained(base, folder, used, model)


def added(layer: Any) -> torch.Tensor:
    """What one of PEFT's layers adds to its weight, `[out, in]`, fp64: by its answers to the unit vectors."""
    exact = copy.deepcopy(layer).double().eval()
    unit = torch.eye(exact.in_features, dtype=torch.float64)
    with torch.no_grad():
        found: torch.Tensor = (exact(unit) - exact.base_layer(unit)).t()
    return found


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    rows = torch.arange(3, 40).reshape(1, -1) if ids is None else ids
    with torch.no_grad():
        return model.eval()(rows, use_cache=False).logits.float()
