"""Logits of llama.cpp beside lorafit's: the proof that a GGUF computes what was trained.

llama.cpp computes in fp32 with a cache of f32 and without flash attention: its defaults alone move the logits of an
unchanged base by 1e-2. lorafit's side has fp32 weights and sums in fp64, so that what is told is llama.cpp's distance
from the function and not the sum of two roundings.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lorafit.console.wording import counted
from lorafit.errors import NumericsError, UsageError
from lorafit.exporting.exported import EngineProof
from lorafit.exporting.gguf_file import DataType
from lorafit.exporting.probes import probe_texts
from lorafit.exporting.source import Source
from lorafit.kinds.quantizations import quantizations
from lorafit.model.attach import open_adapter
from lorafit.model.base import Base, read_base
from lorafit.model.classes import usual_class
from lorafit.model.load import load_model
from lorafit.ops.logits_distance import logits_distance

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_BOUNDS: dict[DataType, float] = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 0.2}
"""Most that `logits_distance` may be; docs/export.md has SmolLM2's. f32 is the proof: of the others llama.cpp rounds
the inputs of products too. What computes another function is nearer to 1."""
_PROBES, _LONGEST_PROBE = 6, 200
_F32 = 0  # ggml's number for the type


def require_llama_cpp() -> None:
    """Raises UsageError where llama.cpp's Python package is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        todo = "pip install llama-cpp-python, or leave --verify out"
        raise UsageError("llama.cpp is not installed", key="--verify", todo=todo)


def prove_gguf(file: Path, model: Path, source: Source, data_type: DataType) -> EngineProof:
    """A GGUF of a whole model beside the folder that it was made from. Raises NumericsError where they differ."""
    plain = load_exactly(read_base(model, is_compared=False), source)
    return _compare(plain, _Llama(file), source, f"the merged model, as {data_type} there", _BOUNDS[data_type])


def prove_adapter(base_file: Path, adapter_file: Path, source: Source) -> EngineProof:
    """A GGUF adapter on its base in f32, beside the adapter on the same base."""
    saved = source.require_adapter()
    adapted = open_adapter(load_exactly(source.base, source), saved.path, base=source.base)
    theirs = _Llama(base_file, adapter_file)
    return _compare(adapted, theirs, source, "the base as its files have it", _BOUNDS["f32"], reads_text=False)


def load_exactly(base: Base, source: Source) -> PreTrainedModel:
    """A model in fp32 on the CPU, its weights as its files have them."""
    return load_model(
        base,
        quantization=quantizations.make("none").section,
        dtype=torch.float32,
        compute_dtype=torch.float32,
        attention="sdpa",
        device="cpu",
        model_class=usual_class(base.config),
        reporter=source.reporter,
    )


def sum_exactly(model: torch.nn.Module) -> None:
    """From now on its linears compute in fp64, each weight widened for the while; so does what lies between them."""

    def exact(linear: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        bias = None if linear.bias is None else linear.bias.double()
        return lambda x: functional.linear(x.double(), linear.weight.double(), bias)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            setattr(module, "forward", exact(module))  # noqa: B010


class _Llama:
    """A GGUF, loaded by llama.cpp."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        import llama_cpp  # type: ignore[import-not-found,unused-ignore]

        self._llama: Any = llama_cpp.Llama(
            model_path=str(model),
            lora_path=None if adapter is None else str(adapter),
            n_ctx=_LONGEST_PROBE,
            n_batch=_LONGEST_PROBE,
            logits_all=True,
            type_k=_F32,
            type_v=_F32,
            flash_attn=False,
            n_gpu_layers=0,
            n_threads=torch.get_num_threads(),
            verbose=False,
        )

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """`[tokens, vocabulary]`."""
        self._llama.reset()
        self._llama.eval(list(ids))
        return torch.from_numpy(self._llama.scores[: len(ids)].copy())

    def read(self, text: str) -> list[int]:
        """Its own tokens of a text, control tokens read as such."""
        return list(self._llama.tokenize(text.encode(), add_bos=False, special=True))


def _compare(
    ours: PreTrainedModel | PeftModel,
    theirs: _Llama,
    source: Source,
    weights: str,
    bound: float,
    *,
    reads_text: bool = True,
) -> EngineProof:
    tokenizer, texts = source.voice.tokenizer, probe_texts(source)
    ids: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if reads_text:
        unlike = [text for text, own in zip(texts, ids, strict=True) if theirs.read(text) != own]
        if unlike:
            what = f"llama.cpp reads {counted(len(unlike), 'text')} as other tokens, first {unlike[0][:60]!r}"
            raise NumericsError(what, key="tokenizer", todo="report this tokenizer; use --to peft or --to vllm")
    pairs = []
    sum_exactly(ours)
    for row in (row[:_LONGEST_PROBE] for row in ids[:_PROBES]):
        with torch.no_grad():
            own = ours(torch.tensor([row]), use_cache=False).logits[0].double()
        pairs.append((own, theirs.logits(row)[:, : own.shape[1]].double()))
    own, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    proof = EngineProof(
        "llama.cpp",
        weights,
        len(own),
        float((own - other).abs().max()),
        logits_distance(own, other),
        bound,
        float((own.argmax(-1) == other.argmax(-1)).double().mean()),
        len(texts) if reads_text else None,
    )
    if not proof.distance <= bound:
        raise NumericsError(
            f"{proof.describe()}: more than rounding explains", todo="nothing was kept; please report this model"
        )
    return proof
